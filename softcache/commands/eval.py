"""softcache eval: examples and printing; its flags are `softcache.config.EvalConfig`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import EvalConfig, option


@dataclass(frozen=True)
class EvalOfModel(EvalConfig):
    """softcache eval: how good a model is on a data set."""

    model: str = option(..., "run folder, MODEL@WEIGHTS or a cache", metavar="MODEL", positional=True)


def run(config: EvalOfModel, output: Output) -> int:
    from softcache.evaluate import measure
    from softcache.evaluate.evaluation import class_table, span_table, summary

    result = measure.run(config.model, config, quiet=output.quiet)
    if output.json:
        print(json.dumps(result.to_json()))
        return 0
    print(summary(f"{config.model} on {config.data}", result))
    if config.per_class:
        print("\n" + class_table(result))
        if result.spans:
            print("\n" + span_table(result))
    return 0


VERB = Verb(
    config=EvalOfModel,
    run=run,
    summary="measure a model: accuracy, likelihood, calibration, closeness to a cache",
    examples="""
softcache eval runs/s --data digits?split=test
softcache eval runs/s --data digits --cache caches/digits --temperature 4
softcache eval caches/digits --data digits --combine mean_probs
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

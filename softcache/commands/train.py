"""softcache train: examples and printing; its flags are `softcache.config.TrainConfig`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import TrainConfig

if TYPE_CHECKING:
    from softcache.train.flow import TrainResult


def run(config: TrainConfig, output: Output) -> int:
    from softcache.train import flow

    result = flow.run(config, quiet=output.quiet)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first talks
        return 0
    if output.json:
        facts = {"path": str(result.path), "parameters": result.parameters, "kept_epoch": result.kept_epoch}
        print(json.dumps({**facts, **result.metrics[-1]}))
    else:
        print(_text(result, config))
    return 0


def _text(result: TrainResult, config: TrainConfig) -> str:
    """About ten epochs, the last among them, and the evaluation of the student that is kept."""
    from softcache.evaluate.evaluation import summary
    from softcache.report.tables import table

    shown = [row for row in result.metrics if row["epoch"] % max(1, len(result.metrics) // 10) == 0]
    if result.metrics[-1] not in shown:
        shown.append(result.metrics[-1])
    names = dict.fromkeys(name for row in result.metrics for name in row)  # stages have terms of their own
    columns = [name for name in names if name not in ("view", "seconds")] + ["seconds"]
    blocks = [table(columns, [[row.get(name) for name in columns] for row in shown])]
    if config.eval_data is not None and result.evaluation is not None:
        title = config.eval_data if config.keep == "last" else f"{config.eval_data}, epoch {result.kept_epoch}"
        blocks.append(summary(title, result.evaluation))
    blocks.append(f"{result.path}: {result.parameters:,} parameters; next: softcache eval {result.path} --data ...")
    return "\n\n".join(blocks)


VERB = Verb(
    config=TrainConfig,
    run=run,
    summary="train a student from a cache, or on hard labels without one",
    examples=r"""
softcache train --data digits --student softcache:mlp?hidden=64,64 --loss ce --epochs 20 --out runs/hard
softcache train --cache caches/digits --data digits --eval-data digits?split=test \
                --student softcache:mlp?hidden=64,64 --loss kd:temperature=4,weight=0.9 --loss ce:weight=0.1 --out runs/s
""",
    after_stop=RESUMES,
    writes=True,
)

"""softcache reproduce: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import flag_of, option
from softcache.config.options import ALLOW_CODE_HELP
from softcache.errors import ConfigError


@dataclass(frozen=True)
class ReproduceConfig:
    """softcache reproduce: a paper's table again."""

    recipe: str = option(..., "name of a recipe, or its .toml file; LIST shows them", metavar="RECIPE", positional=True)
    budget: str = option("paper", "how much of it: smoke, short or paper", metavar="BUDGET")
    data_root: str = option("data", "where the data sets are", metavar="DIR")
    data: tuple[str, ...] = option((), "another source of the recipe's data; repeat", metavar="NAME=SPEC", repeat=True)
    use: tuple[str, ...] = option(
        (), "a model in the place of one it trains; repeat", metavar="STEP=MODEL", repeat=True
    )
    seeds: tuple[int, ...] = option((), "of the students (default: the recipe's)", metavar="N,N")
    only: tuple[str, ...] = option(
        (), "these steps and what they build on: 'vgg13-*'; repeat", metavar="STEPS", repeat=True
    )
    device: str | None = option(None, "for every step (default: a GPU where there is one)", metavar="DEVICE")
    out: str = option("reproduced", "for runs, caches and the table", metavar="DIR")
    download: bool = option(False, "let torchvision download what is not in --data-root")
    allow_code: bool = option(False, ALLOW_CODE_HELP)


def run(config: ReproduceConfig, output: Output) -> int:
    from softcache.reproduce import flow

    if config.recipe.upper() == "LIST":
        _refuse_with_list(config)
        print(json.dumps(flow.recipes()) if output.json else flow.listing())
        return 0
    done = flow.run(
        config.recipe,
        budget=config.budget,
        data_root=config.data_root,
        data=config.data,
        models=config.use,
        seeds=config.seeds,
        only=config.only,
        device=config.device,
        out=Path(config.out),
        download=config.download,
        allow_code=config.allow_code,
        quiet=output.quiet,
    )
    print(json.dumps(done.to_json()) if output.json else done.text())
    return 0


def _refuse_with_list(config: ReproduceConfig) -> None:
    for one in fields(config):
        if one.name != "recipe" and getattr(config, one.name) != one.default:
            raise ConfigError(
                f"{flag_of(one.name)} needs a recipe; {config.recipe} only lists them", tip="leave it out"
            )


VERB = Verb(
    config=ReproduceConfig,
    run=run,
    summary="a paper's table again, from shared caches: ours beside the paper's numbers, with spread and verdict",
    examples="""
softcache reproduce LIST
softcache reproduce digits
softcache reproduce hinton2015-mnist --data-root data --budget short --seeds 0,1,2
""",
    after_stop=RESUMES,
    writes=True,
)

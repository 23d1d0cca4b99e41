"""softcache inspect: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class InspectConfig:
    """softcache inspect: what made this cache, and one sample's soft target."""

    cache: str = option(..., "folder of the cache, or its URL", metavar="CACHE", positional=True)
    sample: str | None = option(None, "show this sample's soft target at several temperatures", metavar="KEY")
    view: int = option(0, "of the sample (default: 0)", metavar="V")


def run(config: InspectConfig, output: Output) -> int:
    from softcache.check import inspect
    from softcache.remote.places import cache_of

    path = cache_of(config.cache)
    if config.sample is not None:
        target = inspect.soft_target(path, config.sample, view=config.view)
        print(json.dumps(target.to_json()) if output.json else target.text())
    elif output.json:
        print(json.dumps(inspect.describe(path), indent=1))
    else:
        print(inspect.report(path))
    return 0


VERB = Verb(
    config=InspectConfig,
    run=run,
    summary="what made this cache, from what, how big; one sample's soft target as bars",
    examples="""
softcache inspect caches/digits
softcache inspect caches/digits --sample digits/000001
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

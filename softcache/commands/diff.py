"""softcache diff: flags, examples and printing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option
from softcache.spec import split_list


@dataclass(frozen=True)
class DiffConfig:
    """softcache diff: what differs between two caches."""

    a: str = option(..., "folder of a cache", metavar="A", positional=True)
    b: str = option(..., "folder of another", metavar="B", positional=True)
    members: tuple[str, ...] = option(
        (), "members to compare, NAME or NAME=OTHER (default: of the same name)", metavar="NAMES", repeat=True
    )
    temperatures: tuple[float, ...] = option((1.0, 4.0), "of the KL", metavar="T", repeat=True)


def run(config: DiffConfig, output: Output) -> int:
    from softcache.remote.places import cache_of
    from softcache.share import diff

    a, b = cache_of(config.a), cache_of(config.b)
    found = diff.run(
        a,
        b,
        pairs=split_list(",".join(config.members)),
        temperatures=config.temperatures,
        quiet=output.quiet or output.json,
    )
    print(json.dumps(dataclasses.asdict(found)) if output.json else diff.text(a, b, found))
    return 0


VERB = Verb(
    config=DiffConfig,
    run=run,
    summary="what differs between two caches, and how far apart their teachers are",
    examples="""
softcache diff caches/digits caches/mnist
softcache diff caches/digits caches/mnist --members teacher=second --json
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

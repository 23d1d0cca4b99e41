"""softcache demo: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class DemoConfig:
    """softcache demo: the whole main job on scikit-learn's digits."""

    out: str = option("softcache-demo", "folder for teachers, cache, students and the picture", metavar="DIR")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "seeds of the students", metavar="N,N")


def run(config: DemoConfig, output: Output) -> int:
    from softcache import demo

    result = demo.run(Path(config.out), seeds=config.seeds, quiet=output.quiet)
    print(json.dumps(result.to_json()) if output.json else result.text())
    return 0


VERB = Verb(
    config=DemoConfig,
    run=run,
    summary="the whole main job on scikit-learn's digits: teachers, one dump, students with and without the cache",
    examples="""
softcache demo
softcache demo --out my-demo --seeds 0,1,2
""",
    after_stop=RESUMES,
    writes=True,
)

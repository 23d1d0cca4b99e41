"""softcache views: flags, examples and printing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option
from softcache.config.options import ALLOW_CODE_HELP


@dataclass(frozen=True)
class ViewsConfig:
    """softcache views: a picture of what the teacher saw."""

    cache: str = option(..., "folder of the cache, or its URL", metavar="CACHE", positional=True)
    sample: str = option(..., "whose views", metavar="KEY")
    out: str = option("views.png", "the picture", metavar="FILE")
    data: str | None = option(
        None, "where the sample is (with --allow-code by default as the cache says)", metavar="DATA"
    )
    allow_code: bool = option(False, ALLOW_CODE_HELP)


def run(config: ViewsConfig, output: Output) -> int:
    from softcache.check import view_picture
    from softcache.remote.places import cache_of

    picture = view_picture.draw_views(
        cache_of(config.cache),
        config.sample,
        Path(config.out),
        data=config.data,
        allow_code=config.allow_code,
    )
    print(json.dumps(dataclasses.asdict(picture)) if output.json else picture.text())
    return 0


VERB = Verb(
    config=ViewsConfig,
    run=run,
    summary="a picture of what the teacher saw of one sample, and of what it answered",
    examples="""
softcache views caches/digits --sample digits/000001 --data digits --out views.png
softcache views caches/mnist --sample digits/000002 --data digits --out seen.png
""",
    after_stop=STARTS_AGAIN,
    writes=True,
)

"""softcache card: flags, examples and printing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class CardConfig:
    """softcache card: what a hub shows of a cache."""

    cache: str = option(..., "folder of the cache", metavar="CACHE", positional=True)
    language: tuple[str, ...] = option((), "of the samples: en, de, ... (nothing here knows it)", metavar="CODE")
    pictures: str | None = option(
        None, "show two pictures of this transfer set: see to it that you may pass them on", metavar="DATA"
    )


def run(config: CardConfig, output: Output) -> int:
    from softcache.cache.manifest import read_manifest
    from softcache.dump.made_with import left_out_before
    from softcache.remote.places import folder_of
    from softcache.share import show

    path = folder_of(config.cache, "card")
    left_out = left_out_before(path, len(read_manifest(path).plan.rounds))
    shown = show.run(
        path,
        languages=config.language,
        pictures=config.pictures,
        left_out=left_out,
        quiet=output.quiet or output.json,
    )
    if output.json:
        print(json.dumps({"cache": config.cache, **dataclasses.asdict(shown)}))
        return 0
    print(f"{path}: {', '.join(shown.files)}")
    if shown.rows is None:
        print("no preview: that needs the package pyarrow: pip install 'softcache[preview]'")
    else:
        print(f"a preview of {shown.rows} samples: softcache push sends it with the cache")
    return 0


VERB = Verb(
    config=CardConfig,
    run=run,
    summary="make the card of a cache, with a preview of its samples that a hub shows",
    examples="""
softcache card caches/mnist
softcache card caches/digits --language en --pictures digits
""",
    after_stop=STARTS_AGAIN,
    writes=True,
)

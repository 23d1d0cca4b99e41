"""softcache push: flags, examples and printing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class PushConfig:
    """softcache push: a cache to where others can pull it from."""

    cache: str = option(..., "folder of the cache", metavar="CACHE", positional=True)
    url: str = option(..., "where to: file:PATH, hf:ORG/NAME or s3://BUCKET/PATH", metavar="URL", positional=True)
    id: str | None = option(None, "of an older state of the cache (default: the newest)", metavar="ID")


def run(config: PushConfig, output: Output) -> int:
    from softcache.remote.places import folder_of, parse_place
    from softcache.report.tables import size
    from softcache.share import push

    place = parse_place(config.url)
    done = push.run(folder_of(config.cache, "push"), place, id=config.id, quiet=output.quiet or output.json)
    if output.json:
        print(json.dumps({"url": place.url, **dataclasses.asdict(done)}))
        return 0
    there = done.files - done.sent_files
    print(
        f"{place.url}: {done.sent_files:,} files sent, {size(done.sent_bytes)}"
        + (f"; {there:,} were there" if there else "")
    )
    print(f"id {done.id}")
    print(f"send the id by another way than the files; to take it: softcache pull {place.url}@{done.id[:16]} CACHE")
    return 0


VERB = Verb(
    config=PushConfig,
    run=run,
    summary="send a cache to where others can pull it from",
    examples="""
softcache push caches/mnist file:/shared/caches/mnist
softcache push caches/mnist hf:team/mnist
softcache push caches/mnist file:/shared/caches/mnist --json
""",
    after_stop=RESUMES,
    writes=True,
)

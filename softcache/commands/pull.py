"""softcache pull: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class PullConfig:
    """softcache pull: a cache from somewhere else."""

    url: str = option(
        ...,
        "where from: https://HOST/PATH, file:PATH, hf:ORG/NAME or s3://BUCKET/PATH, with @ID at its end",
        metavar="URL",
        positional=True,
    )
    out: str = option(..., "folder of the cache", metavar="CACHE", positional=True)
    id: str | None = option(None, "that the cache must have: 8 or more of its 64 digits", metavar="ID")
    signed_by: str | None = option(None, "ask for a signature of somebody in this list of signers", metavar="FILE")


def run(config: PullConfig, output: Output) -> int:
    from softcache.remote.places import parse_place
    from softcache.report.tables import size
    from softcache.share import pull

    place, out = parse_place(config.url, config.id), Path(config.out)
    signers = Path(config.signed_by) if config.signed_by else None
    manifest, nbytes, names = pull.run(place, out, signed_by=signers, quiet=output.quiet or output.json)
    if output.json:
        sizes = {"bytes": manifest.nbytes, "fetched_bytes": nbytes}
        print(json.dumps({"path": str(out), "url": place.url, "id": manifest.id, **sizes, "signed_by": list(names)}))
        return 0
    print(f"{out}: {len(manifest.files):,} files, {size(manifest.nbytes)}; {size(nbytes)} fetched")
    if names:
        print(f"signed by {', '.join(names)}")
    asked = place.id or names
    print(
        f"id {manifest.id}" + ("" if asked else ": nobody said which it must be; compare it with the one you were sent")
    )
    return 0


VERB = Verb(
    config=PullConfig,
    run=run,
    summary="fetch a cache from somewhere else, every byte checked",
    examples="""
softcache pull file:/shared/caches/mnist@3f9a2b7c41d0e856 caches/theirs
softcache pull hf:team/mnist@3f9a2b7c41d0e856 caches/theirs
softcache pull https://data.example.org/caches/mnist caches/mine --id 3f9a2b7c41d0e856
""",
    after_stop=RESUMES,
    writes=True,
)

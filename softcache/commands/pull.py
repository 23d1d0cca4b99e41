"""softcache pull: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.commands.subset import PartOptions, choice_of, facts, text
from softcache.config import option

if TYPE_CHECKING:
    from softcache.remote.places import Place


@dataclass(frozen=True)
class PullConfig(PartOptions):
    """softcache pull: a cache from somewhere else, or a part of it."""

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
    from softcache.remote.places import folder_of, parse_place
    from softcache.report.tables import size
    from softcache.share import pull

    place, out = parse_place(config.url, config.id), folder_of(config.out, "pull")
    signers = Path(config.signed_by) if config.signed_by else None
    if any(getattr(config, field.name) for field in fields(PartOptions)):
        return _run_part(place, out, config, signers, output)
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


def _run_part(place: Place, out: Path, config: PullConfig, signers: Path | None, output: Output) -> int:
    from softcache.report.tables import size
    from softcache.share import pull_part

    done = pull_part.run(place, out, choice_of(config), signed_by=signers, quiet=output.quiet or output.json)
    if output.json:
        moved = {"fetched_records": done.records, "fetched_others": done.others}
        print(json.dumps(facts(out, done.manifest) | {"url": place.url} | moved | {"signed_by": list(done.names)}))
        return 0
    print(text(out, done.manifest))
    others = "manifest, lists, checksums, samples.h5 and what else stands once"
    print(f"fetched: {size(done.records)} of records, and {size(done.others)} of {others}")
    if done.names:
        print(f"signed by {', '.join(done.names)}: whole files were fetched and hashed")
    else:
        print(
            "blocks were compared with their checksums, which find accidents and no forger; files that came whole were hashed"
        )
    if not (place.id or done.names):
        print(f"nobody said of which cache: compare its id with the one you were sent: {done.parent}")
    return 0


VERB = Verb(
    config=PullConfig,
    run=run,
    summary="fetch a cache from somewhere else, every byte checked",
    examples="""
softcache pull file:/shared/caches/mnist@3f9a2b7c41d0e856 caches/theirs
softcache pull file:/shared/caches/mnist@3f9a2b7c41d0e856 caches/some --members teacher --views 0-1
softcache pull hf:team/mnist@3f9a2b7c41d0e856 caches/theirs
softcache pull https://data.example.org/caches/mnist caches/mine --id 3f9a2b7c41d0e856
""",
    after_stop=RESUMES,
    writes=True,
)

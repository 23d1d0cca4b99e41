"""softcache subset: flags, examples and printing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import option
from softcache.errors import ConfigError
from softcache.spec import split_list

if TYPE_CHECKING:
    from softcache.cache.manifest import Manifest
    from softcache.share.subset import Choice


@dataclass(frozen=True)
class PartOptions:
    """Which part of a cache: what is left out is wanted whole."""

    views: str | None = option(
        None, "one range of views, both ends included, or one view (default: all)", metavar="A-B"
    )
    members: tuple[str, ...] = option((), "members to keep: a,b (default: all)", metavar="NAMES", repeat=True)
    keep_labels: tuple[str, ...] = option(
        (), "only samples of these classes: names or indices, 7,8 or 0-4", metavar="LABELS", repeat=True
    )
    drop_labels: tuple[str, ...] = option((), "no samples of these classes", metavar="LABELS", repeat=True)
    samples: str | None = option(
        None, "only the samples whose keys (or ids) this file lists, one a line", metavar="FILE"
    )
    without: str | None = option(None, "no samples whose keys (or ids) this file lists", metavar="FILE")


@dataclass(frozen=True)
class SubsetConfig(PartOptions):
    """softcache subset: some of a cache as a smaller cache of its own."""

    cache: str = option(..., "folder of the cache, or its URL", metavar="CACHE", positional=True)
    out: str = option(..., "folder of the smaller cache", metavar="OUT", positional=True)
    id: str | None = option(None, "of the manifest to read (default: the newest)", metavar="ID")
    license: str | None = option(None, "of the smaller cache (default: the cache's)", metavar="TEXT")


def run(config: SubsetConfig, output: Output) -> int:
    from softcache.remote.places import cache_of, folder_of
    from softcache.share import subset

    choice = choice_of(config)
    out, quiet = folder_of(config.out, "subset"), output.quiet or output.json
    manifest = subset.run(cache_of(config.cache), out, choice, id=config.id, license=config.license, quiet=quiet)
    print(json.dumps(facts(out, manifest)) if output.json else text(out, manifest))
    return 0


def choice_of(config: PartOptions) -> Choice:
    """What was asked for."""
    from softcache.share.subset import Choice

    return Choice(
        views=config.views,
        members=_names("--members", config.members),
        keep_labels=_names("--keep-labels", config.keep_labels),
        drop_labels=_names("--drop-labels", config.drop_labels),
        samples=Path(config.samples) if config.samples else None,
        without=Path(config.without) if config.without else None,
    )


def _names(flag: str, given: Sequence[str]) -> tuple[str, ...]:
    """Every name of a list; a list that was given and holds none is refused, since an empty one means all."""
    names = split_list(",".join(given))
    if given and not names:
        raise ConfigError(f"{flag} names nothing", tip="leave it out to keep all")
    return names


def facts(out: Path, manifest: Manifest) -> dict[str, Any]:
    plan = manifest.plan
    assert plan.parent is not None
    return {
        "path": str(out),
        "id": manifest.id,
        "parent": plan.parent.id,
        "bytes": manifest.nbytes,
        "samples": plan.samples.count,
        "views": plan.views.count,
        "members": [member.name for member in plan.members],
    }


def text(out: Path, manifest: Manifest) -> str:
    from softcache.report.tables import size

    about = facts(out, manifest)
    views = f"{about['views']} view{'s' * (about['views'] != 1)}"
    what = f"{about['samples']:,} samples x {views} of {', '.join(about['members'])}"
    return f"{out}: {what}; {size(manifest.nbytes)}\nid {manifest.id}, out of {about['parent']}"


VERB = Verb(
    config=SubsetConfig,
    run=run,
    summary="write some views, members or samples of a cache as a smaller cache of its own",
    examples="""
softcache subset caches/mnist caches/mnist-first --views 0-3
softcache subset caches/mnist caches/mnist-few --members teacher --keep-labels 0-4 --license cc-by-4.0
softcache subset caches/mnist caches/mnist-some --samples keys.txt --json
""",
    after_stop=RESUMES,
    writes=True,
)

"""softcache merge: several caches as one. Read it top to bottom.

What can be merged is found out from the caches themselves: members side by side over the same samples and views; later views of
the same members behind the earlier ones; or other samples of the same teachers. Nothing is rendered, and no teacher is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache.cache.card import card
from softcache.cache.checksums import BadBlock, sha256_of
from softcache.cache.file_entry import StoredFile
from softcache.cache.manifest import Manifest
from softcache.cache.open_file import COPY_AGAIN
from softcache.cache.provenance import told_data, told_of_copies
from softcache.cache.write.copier import Copier
from softcache.errors import CacheError, ConfigError, DamagedCacheError, warn
from softcache.report.progress import Meter
from softcache.share import merge_samples
from softcache.share.merge_rounds import Stack, added, stack_of
from softcache.share.merge_rules import refuse_overlap, refuse_unlike
from softcache.targets.cache import Cache
from softcache.targets.cache import open as open_cache


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Attributes:
        manifest: of the merged cache.
        how: "members", "views", "views and members" or "samples": what was put together.
        notes: what was tolerated.
    """

    manifest: Manifest
    how: str
    notes: Sequence[str] = ()


def run(
    paths: Sequence[Path],
    out: Path,
    *,
    license: str | None = None,
    quiet: bool = False,
    shard_rows: int | None = None,
) -> Merged:
    """Merge caches into a new one in `out`; goes on with a merge that was interrupted.

    Args:
        paths: two caches or more, in the order in which their views, members or rows are to stand.
        license: of the merged cache; None: theirs, which must be the same.
        quiet: no progress.
        shard_rows: of its shards, where different samples are merged; None: as the layout derives them.

    Raises:
        CacheError: they do not fit; names the first field of their manifests that differs, or the samples.
        UnfinishedCacheError, DamagedCacheError: one of them is not whole. All this before anything is written.
        DumpError: and its children, of `out` and the disk; whatever was finished before stays and is resumed by the same command.
    """
    started = time.monotonic()
    _refuse_folders(paths, out)
    caches = [open_cache(path, quiet=quiet) for path in paths]
    _refuse_same(caches)
    license = license_of(caches) if license is None else license
    disjoint = [[refuse_overlap(other, one) for other in caches[:number]] for number, one in enumerate(caches)]
    command = _asked(paths, out, license)
    if disjoint[1][0]:
        for number, of_cache in enumerate(disjoint):
            if not all(of_cache):
                raise _mixed(caches, number)
        names = merge_samples.check(caches)
        notes = merge_samples.notes_of(caches, names)
        for note in notes:
            warn(note)
        _refuse_damaged(caches, quiet=quiet)
        command |= {"notes": notes}
        manifest = merge_samples.write(
            caches, names, out, license, command, started=started, quiet=quiet, shard_rows=shard_rows
        )
        return Merged(manifest, "samples", notes)
    for number, of_cache in enumerate(disjoint):
        if any(of_cache):
            raise _mixed(caches, number)
    stack = stack_of(caches[0])
    for cache in caches[1:]:
        stack = added(stack, cache)
    copier = Copier(out, replace(stack.plan, license=license), stack.rounds)
    if not copier.is_done():
        _refuse_damaged(caches, quiet=quiet)
        _copy(copier, caches, {**command, "notes": list(stack.notes)}, started, quiet=quiet)
    return Merged(copier.manifest, _how(stack, caches[0]), stack.notes)


def _copy(copier: Copier, caches: Sequence[Cache], command: Mapping[str, Any], started: float, *, quiet: bool) -> None:
    first = caches[0]
    with copier, Meter(f"merge {copier.path}", copier.manifest.nbytes, unit="B", quiet=quiet) as meter:
        copier.copy(meter.add)
        records = sum(len(cache) * cache.num_views for cache in caches)
        copier.commit({first.id: first.manifest.to_bytes()}, card, told_of_copies(command, started, records))


def _how(stack: Stack, first: Cache) -> str:
    more_views = stack.plan.views.count > first.num_views
    more_members = len(stack.plan.members) > len(first.members)
    return " and ".join(["views"] * more_views + ["members"] * more_members)


def _mixed(caches: Sequence[Cache], number: int) -> CacheError:
    paths = [cache.reader.path for cache in caches]
    return CacheError(
        f"{paths[number]} cannot be merged with the caches before it: some of all these have the same samples, some others",
        tip="merge those of the same samples first, and then the results",
    )


def _refuse_folders(paths: Sequence[Path], out: Path) -> None:
    if len(paths) < 2:
        raise ConfigError("one cache alone has nothing to be merged with", tip="softcache merge A B OUT")
    for path in paths:
        if out.resolve().is_relative_to(path.resolve()):
            raise ConfigError(
                f"{out}: lies in the cache {path}, which is never changed", tip="choose another folder for OUT"
            )


def _refuse_same(caches: Sequence[Cache]) -> None:
    for number, cache in enumerate(caches):
        for before in caches[:number]:
            if cache.id == before.id:
                raise CacheError(
                    f"{before.reader.path} and {cache.reader.path} are the same cache, id {cache.id}",
                    tip="name each cache once; OUT comes last",
                )


def license_of(caches: Sequence[Cache]) -> str | None:
    """The licence of all; CacheError where they have different ones."""
    first = caches[0]
    for cache in caches[1:]:
        x, y = first.manifest.plan.license, cache.manifest.plan.license
        refuse_unlike(first.reader.path, cache.reader.path, [("license", x, y)])
    return first.manifest.plan.license


def _refuse_damaged(caches: Sequence[Cache], *, quiet: bool) -> None:
    """DamagedCacheError where a file of a cache is not what its manifest names: found out before anything is written."""
    with Meter("check the caches", sum(cache.manifest.nbytes for cache in caches), unit="B", quiet=quiet) as meter:
        for cache in caches:
            for file in cache.manifest.files:
                _refuse_damaged_file(cache, file)
                meter.add(file.nbytes)


def _refuse_damaged_file(cache: Cache, file: StoredFile) -> None:
    path = cache.reader.path
    try:
        fd = cache.reader.files.open(file)
    except BadBlock as exc:
        raise DamagedCacheError(f"{path / file.path}: {exc.damage}", tip=COPY_AGAIN) from None
    try:
        # a file of version 1 has been hashed when the cache was opened
        if file.checksums is not None and sha256_of(fd) != file.sha256:
            raise DamagedCacheError(
                f"{path / file.path}: is not the file that the manifest names: its sha256 differs", tip=COPY_AGAIN
            )
    finally:
        os.close(fd)


def _asked(paths: Sequence[Path], out: Path, license: str | None) -> dict[str, Any]:
    """The command, for provenance.json."""
    data = {told_data(path) for path in paths}
    return {
        "caches": [str(path) for path in paths],
        "out": str(out),
        "license": license,
        "data": data.pop() if len(data) == 1 else None,
    }

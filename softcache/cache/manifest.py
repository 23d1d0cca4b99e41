"""manifest.json: what a cache holds and what made it. Canonical JSON; the sha256 of its bytes is the cache's id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from softcache.cache.canonical import canonical_json
from softcache.cache.plan import Plan
from softcache.cache.schema import FORMAT_VERSION, MANIFEST, MANIFESTS, OUR_FILES
from softcache.cache.statistics import MemberStatistics
from softcache.cache.stored import StoredFile
from softcache.cache.work import read_journals, read_planned, work_folder
from softcache.errors import CacheError, DamagedCacheError, UnfinishedCacheError

MAX_MANIFEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Manifest:
    """A committed cache. `id` is the sha256 of the canonical JSON."""

    plan: Plan
    files: Sequence[StoredFile]
    id: str = ""

    def to_bytes(self) -> bytes:
        return canonical_json(self.plan.to_json() | {"files": [file.to_json() for file in self.files]})

    @classmethod
    def from_bytes(cls, data: bytes, where: Path) -> Manifest:
        """Parse a manifest; CacheError when it is of another version, DamagedCacheError when it is not one at all."""
        try:
            entry = json.loads(data)
            found = entry["format"]
        except (ValueError, KeyError, TypeError) as exc:
            raise DamagedCacheError(
                f"{where}: not a manifest ({exc})", tip="copy the cache again, or restore the file from manifests/"
            ) from None
        if isinstance(found, bool) or found != FORMAT_VERSION:
            raise CacheError(
                f"{where}: written in format version {found}; this softcache reads version {FORMAT_VERSION}",
                tip="install the softcache that wrote it, or dump again",
            )
        if "layout" in entry and "rounds" not in entry:
            raise CacheError(
                f"{where}: written by softcache 0.1, before the format was frozen; this one cannot read it",
                tip="dump again, or install softcache 0.1",
            )
        try:
            manifest = cls(
                plan=Plan.from_json(entry),
                files=tuple(StoredFile.from_json(file) for file in entry["files"]),
                id=hashlib.sha256(data).hexdigest(),
            )
            for file in manifest.files:
                if not OUR_FILES.fullmatch(file.path):
                    raise ValueError(f"{file.path!r} is not the name of a cache file")
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise DamagedCacheError(
                f"{where}: field missing or of the wrong type ({exc})",
                tip="copy the cache again, or restore the file from manifests/",
            ) from None

    def files_of(self, kind: str, member: str | None = None) -> Iterator[StoredFile]:
        return (file for file in self.files if file.kind == kind and file.member == member)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @cached_property
    def statistics(self) -> Mapping[str, MemberStatistics]:
        """Member -> what was measured over all its records: the sum over its files."""
        sums = {member.name: MemberStatistics() for member in self.plan.members}
        for file in self.files:
            if file.statistics is not None and file.member is not None:
                sums[file.member] += file.statistics
        return sums


def read_manifest(path: Path, *, id: str | None = None) -> Manifest:
    """The manifest of a cache folder: the newest, or the one with the given id (a unique prefix is enough).

    Raises:
        CacheError: no such folder, not a cache, or a version this code cannot read.
        UnfinishedCacheError: a dump that has not been committed; the message says how far it is.
        DamagedCacheError: the manifest's bytes do not have the id that is its name.
    """
    if not path.is_dir():
        raise CacheError(f"{path}: there is no such folder", tip="give the folder that `softcache dump --out` wrote")
    if id is not None:
        matches = sorted((path / MANIFESTS).glob(f"{id}*.json"))
        if len(matches) != 1:
            known = ", ".join(p.stem[:12] for p in sorted((path / MANIFESTS).glob("*.json"))) or "none"
            raise CacheError(f"{path}: {len(matches)} manifests match id {id!r}; known: {known}")
        file = matches[0]
    else:
        file = path / MANIFEST
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise DamagedCacheError(f"{file}: {file.stat().st_size} bytes is no manifest of ours")
        data = file.read_bytes()
    except FileNotFoundError:
        raise _without_manifest(path) from None
    manifest = Manifest.from_bytes(data, file)
    if id is not None and manifest.id != file.stem:
        raise DamagedCacheError(f"{file}: its bytes have sha256 {manifest.id}", tip="copy the cache again")
    return manifest


def _without_manifest(path: Path) -> CacheError:
    work = work_folder(path, 0)
    planned = read_planned(work)
    if planned is None:
        if work.is_dir():
            return UnfinishedCacheError(
                f"{path}: the dump is not finished: it was still reading the samples, no span is written",
                tip="run the same `softcache dump` command again to resume it",
            )
        return CacheError(
            f"{path}: no {MANIFEST}, so this is not a softcache cache",
            tip="give the folder that `softcache dump --out` wrote",
        )
    total, done = len(planned.plan.rounds[0].layout), len(read_journals(work))
    return UnfinishedCacheError(
        f"{path}: the dump is not finished: {done} of {total} spans are written ({100 * done // max(1, total)} %)",
        tip="run the same `softcache dump` command again to resume it; finished shards are kept",
    )

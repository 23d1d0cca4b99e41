"""manifest.json: what a cache holds and what made it. Canonical JSON; the sha256 of its bytes is the cache's id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softcache.cache.canonical import canonical_json
from softcache.cache.dump_folder import read_journals, read_planned, work_folder
from softcache.cache.file_entry import StoredFile
from softcache.cache.file_lists import FileList, ListedFiles
from softcache.cache.manifest_rules import check_lists, check_manifest, check_plan
from softcache.cache.plan import Plan
from softcache.cache.schema import FORMAT_VERSION, FORMATS, MANIFEST, MANIFESTS, MERGING, PULLING, part_path
from softcache.cache.statistics import MemberStatistics
from softcache.cache.strict_json import MANIFEST as MANIFEST_SHAPE
from softcache.cache.strict_json import MAX_BYTES, check_shape, read_canonical
from softcache.errors import CacheError, DamagedCacheError, UnfinishedCacheError
from softcache.files.inside import is_inside, read_inside


@dataclass(frozen=True)
class Manifest:
    """A committed cache. `id` is the sha256 of the canonical JSON.

    `files` are all its files in order; of version 2 they are read list by list, when they are asked for.
    """

    plan: Plan
    files: Sequence[StoredFile]
    id: str = ""

    def to_bytes(self) -> bytes:
        if isinstance(self.files, ListedFiles):
            return canonical_json(self.plan.to_json() | {"lists": [one.to_json() for one in self.files.lists]})
        return canonical_json(self.plan.to_json() | {"files": [file.to_json() for file in self.files]})

    @classmethod
    def from_bytes(cls, data: bytes, where: Path, root: Path | None = None) -> Manifest:
        """Parse a manifest: strict JSON, then the gate.

        Args:
            where: for messages.
            root: the cache, in which lists of version 2 lie; None: the folder of `where`.

        Raises:
            CacheError: it is of another version.
            DamagedCacheError: it is not one at all, or does not describe one whole cache.
        """
        try:
            entry = read_canonical(data)
            _check_version(entry, where)
            check_shape(entry, MANIFEST_SHAPE[entry["format"]])
            plan = Plan.from_json(entry)
            files = _files_of(plan, entry, root or where.parent)
        except ValueError as exc:
            raise DamagedCacheError(
                f"{where}: is no manifest that can be trusted: {exc}",
                tip="copy the cache again, or restore it with `softcache repair`",
            ) from None
        return cls(plan, files, hashlib.sha256(data).hexdigest())

    @property
    def named(self) -> dict[str, str]:
        """path -> sha256 of what the manifest names itself: all files; of version 2 the lists of them."""
        files = self.files.lists if isinstance(self.files, ListedFiles) else self.files
        return {one.path: one.sha256 for one in files}

    def files_of(self, kind: str, member: str | None = None) -> Iterator[StoredFile]:
        files = self.files.among(kind, member) if isinstance(self.files, ListedFiles) else self.files
        return (file for file in files if file.kind == kind and file.member == member)

    def part_file(self, kind: str, member: str | None, part: int) -> StoredFile | None:
        """The file of a part, None where there is none."""
        if isinstance(self.files, ListedFiles):
            return self.files.of_part(kind, member, part)
        return self._by_path.get(part_path(kind, member, part))

    @cached_property
    def _by_path(self) -> Mapping[str, StoredFile]:
        return {file.path: file for file in self.files}

    def known_files(self) -> list[StoredFile]:
        """All files, as far as the lists that name them are whole."""
        return list(self.files.whole() if isinstance(self.files, ListedFiles) else self.files)

    def list_faults(self) -> list[tuple[FileList, str]]:
        """The lists that are not what the manifest names, each with what is wrong; none of version 1, which has no lists."""
        return list(self.files.faults()) if isinstance(self.files, ListedFiles) else []

    @property
    def nbytes(self) -> int:
        if isinstance(self.files, ListedFiles):
            return self.files.nbytes
        return sum(file.nbytes for file in self.files)

    @cached_property
    def statistics(self) -> Mapping[str, MemberStatistics]:
        """Member -> what was measured over all its records: the sum over its files."""
        if isinstance(self.files, ListedFiles):
            return self.files.statistics
        sums = {member.name: MemberStatistics() for member in self.plan.members}
        for file in self.files:
            if file.statistics is not None and file.member is not None:
                sums[file.member] += file.statistics
        return sums


def _files_of(plan: Plan, entry: Any, root: Path) -> Sequence[StoredFile]:
    """What a manifest of the right shape says of its files; ValueError unless it describes one whole cache."""
    if plan.format == FORMAT_VERSION:
        files = tuple(StoredFile.from_json(file) for file in entry["files"])
        check_manifest(plan, files)
        return files
    check_plan(plan)
    lists = tuple(FileList.from_json(one) for one in entry["lists"])
    check_lists(plan, lists)
    return ListedFiles(root, plan, lists)


def _check_version(entry: Any, where: Path) -> None:
    """CacheError for a version that this code does not read."""
    if not isinstance(entry, dict) or type(entry.get("format")) is not int:
        raise ValueError("format: missing")
    found = entry["format"]
    if found > FORMATS[-1]:
        raise CacheError(
            f"{where}: written in format version {found}; this softcache reads versions {FORMATS[0]} and {FORMATS[-1]}",
            tip="install a newer softcache: pip install -U softcache",
        )
    if found < FORMAT_VERSION:
        raise CacheError(
            f"{where}: written in format version {found}, before the format was frozen; this softcache reads versions "
            f"{FORMATS[0]} and {FORMATS[-1]}",
            tip="dump again; caches of version 1 and later stay readable",
        )


def read_manifest(path: Path, *, id: str | None = None) -> Manifest:
    """The manifest of a cache folder: the newest, or the one with the given id (a unique prefix is enough).

    Raises:
        CacheError: no such folder, not a cache, or a version this code cannot read.
        UnfinishedCacheError: a dump that has not been committed; the message says how far it is.
        DamagedCacheError: bytes that are no manifest, or not the ones whose id is kept in manifests/.
    """
    if not path.is_dir():
        raise CacheError(f"{path}: there is no such folder", tip="give the folder that `softcache dump --out` wrote")
    relative = MANIFEST if id is None else f"{MANIFESTS}/{_known_id(path, id)}.json"
    try:
        data = read_inside(path, relative, MAX_BYTES)
    except FileNotFoundError:
        raise _without_manifest(path) from None
    manifest = Manifest.from_bytes(data, path / relative, path)
    # its own sha256 is the only thing that can tell one changed digit from another cache
    kept = f"{MANIFESTS}/{manifest.id}.json"
    if not is_inside(path, kept) or (id is not None and kept != relative):
        raise DamagedCacheError(
            f"{path / relative}: its bytes have sha256 {manifest.id}, which is no id in {MANIFESTS}/: it was changed, or "
            "not all of the cache was copied",
            tip="copy the whole cache again, or restore it with `softcache repair`",
        )
    return manifest


def known_ids(path: Path) -> list[str]:
    """The ids that manifests/ has files for, in order of name."""
    return sorted(file.stem for file in (path / MANIFESTS).glob("*.json"))


def _known_id(path: Path, prefix: str) -> str:
    known = known_ids(path)
    matches = [one for one in known if one.startswith(prefix)]
    if len(matches) != 1:
        shown = ", ".join(one[:12] for one in known) or "none"
        raise CacheError(f"{path}: {len(matches)} manifests match id {prefix!r}; known: {shown}")
    return matches[0]


def _without_manifest(path: Path) -> CacheError:
    work = work_folder(path, 0)
    planned = read_planned(path, 0)
    if (work / MERGING).is_file():
        return UnfinishedCacheError(
            f"{path}: the merge is not finished: not all files of the merged caches are copied",
            tip="run the same `softcache merge` command again: it goes on",
        )
    if (path / PULLING).is_file():
        return UnfinishedCacheError(
            f"{path}: not all of the cache has been pulled",
            tip="run the same `softcache pull` command again: it goes on",
        )
    if planned is None:
        if work.is_dir():
            return UnfinishedCacheError(
                f"{path}: the dump is not finished: it was still reading the samples, no span is written",
                tip="run the same `softcache dump` command again to resume it",
            )
        return CacheError(
            f"{path}: no {MANIFEST}, so this is not a softcache cache",
            tip="give the folder that `softcache dump --out` wrote; a run folder is measured by `softcache eval`",
        )
    total, done = len(planned.plan.rounds[0].layout), len(read_journals(path, 0))
    verb = "dump" if not planned.plan.parents else "subset" if planned.plan.parent else "merge"
    return UnfinishedCacheError(
        f"{path}: the {verb} is not finished: {done} of {total} spans are written ({100 * done // max(1, total)} %)",
        tip=f"run the same `softcache {verb}` command again to resume it; finished shards are kept",
    )

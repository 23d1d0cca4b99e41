"""A cache made of files of other caches, copied byte for byte under names of its own; nothing in them is looked at.

Which files it will have, and so its manifest and its id, is known before the first byte is copied. A file gets its name when its
bytes have the sha256 that its own cache's manifest names; manifest.json comes last.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from softcache.cache.canonical import canonical_json
from softcache.cache.checksums import READ_BYTES, sha256_of
from softcache.cache.dump_folder import PLAN
from softcache.cache.file_entry import FileList, StoredFile
from softcache.cache.file_lists import make_lists
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.manifest_rules import check_listed
from softcache.cache.open_file import COPY_AGAIN, open_checked
from softcache.cache.plan import Plan
from softcache.cache.schema import CARD, FORMAT_VERSION, MANIFEST, MANIFESTS, MERGING, PROVENANCE, WORK
from softcache.cache.write.writer import refuse_foreign_folder
from softcache.errors import CacheError, DamagedCacheError, LockedError, PlanMismatchError
from softcache.files import durable
from softcache.files.inside import open_inside, refuse_linked_folders
from softcache.files.locks import holder_of, release_lock, sign, take_lock

TAG = "merge"  # of temporary files


@dataclass(frozen=True)
class Copy:
    """A file of another cache, and what it is called in the new one.

    Attributes:
        root: the folder of the other cache.
        source: its entry there.
        target: the same bytes as the new manifest names them.
    """

    root: Path
    source: StoredFile
    target: StoredFile


class Copier:
    """Writes a cache out of copies; a context manager, which holds the folder. What cannot be a cache is refused before.

    Args:
        path: the new cache's folder; made when it does not exist.
        plan: of the new cache, all rounds of it.
        rounds: the files of each round, in the order of the manifest.

    Attributes:
        manifest: what it will be.

    Raises:
        LockedError: a living process merges into the same folder.
        PlanMismatchError: the folder was begun with other caches.
    """

    def __init__(self, path: Path, plan: Plan, rounds: Sequence[Sequence[Copy]]) -> None:
        self.path, self._rounds = path, rounds
        self._lists: list[tuple[FileList, bytes]] = []
        targets = [[one.target for one in of_round] for of_round in rounds]
        if plan.format == FORMAT_VERSION:
            data = Manifest(plan, [file for of_round in targets for file in of_round]).to_bytes()
        else:
            for number, files in enumerate(targets):
                self._lists += make_lists(plan, number, files)
            _check_lists(plan, targets, self._lists)
            data = canonical_json(plan.to_json() | {"lists": [about.to_json() for about, _ in self._lists]})
        self._data = data
        self.manifest = Manifest.from_bytes(data, path / MANIFEST)

    def is_done(self) -> bool:
        """Whether the folder holds this very cache already; CacheError where it holds something else."""
        refuse_foreign_folder(self.path)
        if not self.path.is_dir():
            return False
        if (self.path / MANIFEST).exists():
            there = read_manifest(self.path).id
            if there != self.manifest.id:
                raise CacheError(
                    f"{self.path}: holds another cache, id {there[:12]}...", tip="choose another folder for OUT"
                )
            return True
        if (self.path / WORK / PLAN).exists():
            raise PlanMismatchError(
                f"{self.path}: another dump, subset or merge is not finished there",
                tip="finish it with its own command, choose another folder for OUT, or delete this one",
            )
        return False

    def __enter__(self) -> Self:
        """Hold the folder. A mark in it says which cache is being made; it goes when that is there."""
        refuse_linked_folders(self.path)
        durable.make_folder(self.path / WORK)
        lock = self.path / WORK / "merge.lock"
        try:
            self._lock = take_lock(lock)
        except BlockingIOError:
            raise LockedError(
                f"{self.path}: another process merges into it: {holder_of(lock)}",
                tip="wait for it, end it, or choose another folder for OUT",
            ) from None
        try:
            sign(self._lock)
            told = canonical_json({"id": self.manifest.id})
            if self._mark.exists() and self._mark.read_bytes() != told:
                raise PlanMismatchError(
                    f"{self.path}: a merge of other caches, or into another licence, is not finished there",
                    tip="repeat the command it was started with, choose another folder for OUT, or delete this one",
                )
            durable.write_whole(self._mark, told, tag=TAG)
        except BaseException:
            release_lock(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        release_lock(self._lock)

    @property
    def _mark(self) -> Path:
        return self.path / WORK / MERGING

    def copy(self, note: Callable[[int], None]) -> None:
        """Copy what is not there yet.

        Args:
            note: is told the bytes of each block that is there, or was copied.

        Raises:
            DiskSpaceError: there is no room for it.
            DamagedCacheError: a file is not what its cache's manifest names.
        """
        wanted = [one for of_round in self._rounds for one in of_round]
        missing = [one for one in wanted if not self._is_there(one.target, note)]
        durable.require_room(self.path, sum(one.target.nbytes for one in missing), "what is to be merged needs")
        for one in missing:
            self._copy(one, note)

    def commit(
        self, earlier: Mapping[str, bytes], card: Callable[[Manifest], str], provenance: Mapping[str, Any]
    ) -> None:
        """Write the manifest, last of all.

        Args:
            earlier: id -> bytes of manifests that the new one extends: their files are all among the new cache's.
        """
        for about, data in self._lists:
            durable.write_whole(self.path / about.path, data, tag=TAG)
        durable.make_folder(self.path / MANIFESTS)
        for id, data in {**earlier, self.manifest.id: self._data}.items():
            durable.write_whole(self.path / MANIFESTS / f"{id}.json", data, tag=TAG)
        told = json.dumps(dict(provenance), indent=1).encode()
        durable.write_whole(self.path / PROVENANCE, told, tag=TAG)
        durable.write_whole(self.path / CARD, card(self.manifest).encode("utf-8"), tag=TAG)
        durable.write_whole(self.path / MANIFEST, self._data, tag=TAG)
        durable.remove(self._mark)

    def _is_there(self, target: StoredFile, note: Callable[[int], None]) -> bool:
        """Whether an earlier try has copied it: by its bytes, since anybody may have been here."""
        try:
            about = os.lstat(self.path / target.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if not stat.S_ISREG(about.st_mode) or about.st_size != target.nbytes:
            return False
        fd = open_inside(self.path, target.path)
        try:
            same = sha256_of(fd) == target.sha256
        finally:
            os.close(fd)
        note(target.nbytes if same else 0)
        return same

    def _copy(self, one: Copy, note: Callable[[int], None]) -> None:
        final, hasher = self.path / one.target.path, sha256()
        durable.make_folder(final.parent)
        fd = open_checked(one.root, one.source)
        try:
            with durable.written_aside(final, tag=TAG) as file:
                durable.reserve(file, one.source.nbytes)
                for start in range(0, one.source.nbytes, READ_BYTES):
                    with durable.explained("read", one.root / one.source.path):
                        block = os.pread(fd, READ_BYTES, start)
                    hasher.update(block)
                    durable.write_at(file, block, start)
                    note(len(block))
                if hasher.hexdigest() != one.source.sha256:
                    raise DamagedCacheError(
                        f"{one.root / one.source.path}: is not the file that its manifest names: its sha256 differs",
                        tip=COPY_AGAIN,
                    )
        finally:
            os.close(fd)


def _check_lists(plan: Plan, rounds: Sequence[Sequence[StoredFile]], lists: Sequence[tuple[FileList, bytes]]) -> None:
    """ValueError where no reader would take the lists."""
    by_path = {file.path: file for files in rounds for file in files}
    kinds: dict[str, Any] = {}
    for about, data in lists:
        check_listed(plan, about, [by_path[entry["path"]] for entry in json.loads(data)], kinds)

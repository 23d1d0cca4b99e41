"""Mending a cache: damaged files are written again in a folder of their own, and take their place only as the same bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from softcache.cache.checksums import READ_BYTES, sha256_of
from softcache.cache.file_entry import StoredFile, part_of, round_of
from softcache.cache.manifest import Manifest
from softcache.cache.open_file import open_checked
from softcache.cache.plan import Plan
from softcache.cache.samples import SampleTable
from softcache.cache.schema import WORK, ArraySpec, Span
from softcache.cache.write.shard import write_plain, write_shard
from softcache.cache.write.writer import SpanWriter, written_span
from softcache.errors import DamagedCacheError, LockedError
from softcache.files import durable
from softcache.files.inside import refuse_linked_folders
from softcache.files.locks import release_lock, sign, take_lock

REPAIR = "repair"  # below dump/


class Rewriter:
    """Writes files of a committed cache again. Use as a context manager: it holds a lock, and clears up behind itself.

    Args:
        root: the cache.
        manifest: what every file must be.
        damaged: paths of the files that may be replaced.

    Attributes:
        path: the folder that files are first written into.
        mended, differing: paths of the files that were replaced, and of those that came out as other bytes.
    """

    def __init__(self, root: Path, manifest: Manifest, damaged: Sequence[str]) -> None:
        self.root, self.path, self.tag = root, root / WORK / REPAIR, REPAIR
        self._wanted = {file.path: file for file in manifest.known_files() if file.path in damaged}
        self._manifest = manifest
        self.plan: Plan = manifest.plan
        self.samples: SampleTable  # set by whoever writes spans
        self.mended: list[str] = []
        self.differing: list[str] = []
        self.bytes_written = 0

    def __enter__(self) -> Self:
        refuse_linked_folders(self.root)
        durable.make_folder(self.root / WORK)
        lock = self.root / WORK / f"{REPAIR}.lock"
        try:
            self._lock = take_lock(lock)
        except BlockingIOError:
            raise LockedError(
                f"{self.root}: is being repaired by another process", tip="wait for it, or end it"
            ) from None
        sign(self._lock)
        self._clear()
        durable.make_folder(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
        release_lock(self._lock)

    def _clear(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        else:  # of a pipe it would wait for the writer
            durable.remove(self.path)

    def concerns(self, number: int) -> bool:
        """Whether a round wrote something damaged."""
        return any(round_of(self._manifest.plan, file) == number for file in self._wanted.values())

    def spans_of(self, number: int) -> list[Span]:
        """Turn to a round; returns its spans of which a file is damaged."""
        self.plan = replace(self._manifest.plan, rounds=self._manifest.plan.rounds[: number + 1])
        indices = {part_of(file) for file in self._wanted.values()}
        return [span for span in self.plan.rounds[number].layout.spans() if span.index in indices]

    def members_of(self, span: Span) -> set[str]:
        """The members whose records of this span are damaged."""
        found = (file for file in self._wanted.values() if part_of(file) == span.index)
        return {file.member for file in found if file.member is not None}

    def span(self, span: Span, member_arrays: Mapping[str, Sequence[ArraySpec]]) -> AbstractContextManager[SpanWriter]:
        """Write one span again: as `CacheWriter.span`, but each file is put in its place only if it is what it was."""
        return written_span(self, span, member_arrays, self._put_all_back)

    def _put_all_back(self, entry: Mapping[str, Any]) -> None:
        for made in map(StoredFile.from_json, entry["files"]):
            self._put_back(made)

    def write(self, relative: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one whole file again (samples, probe, positions, constants)."""
        if relative not in self._wanted:
            return
        wanted = self._wanted[relative]
        self._put_back(
            write_shard(
                self.path / relative,
                arrays,
                kind=wanted.kind,
                relative_path=relative,
                tag=self.tag,
                format=wanted.format,
                member=wanted.member,
                index=wanted.index,
                views=wanted.views,
            )
        )

    def write_plain(self, relative: str, data: bytes) -> None:
        """Write a file that is not HDF5 again, the tokenizer's."""
        if relative in self._wanted:
            self._put_back(write_plain(self.path / relative, data, relative, self.tag))

    def copy(self, source: Path, relative: str) -> bool:
        """Take the file from another copy of the cache; False where that one is not whole either."""
        wanted = self._wanted[relative]
        try:
            fd = open_checked(source, wanted)
        except DamagedCacheError:
            return False
        try:
            if sha256_of(fd) != wanted.sha256:
                return False
            _copy(fd, wanted.nbytes, self.path / relative)
        finally:
            os.close(fd)
        self._put_back(wanted)
        return True

    def _put_back(self, made: StoredFile) -> None:
        """Give a file its place if it is damaged there and is now the same to the last byte."""
        self.bytes_written += made.nbytes
        if made.path not in self._wanted:
            return
        if made != self._wanted[made.path]:
            self.differing.append(made.path)
            return
        final = self.root / made.path
        durable.make_folder(final.parent)
        durable.publish(self.path / made.path, final)
        self.mended.append(made.path)


def _copy(fd: int, size: int, path: Path) -> None:
    durable.make_folder(path.parent)
    with durable.closing(durable.create(path)) as out:
        for start in range(0, size, READ_BYTES):
            durable.write_at(out, os.pread(fd, READ_BYTES, start), start)
        durable.sync(out)

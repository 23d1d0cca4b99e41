"""One data set over all its parts: any rows of any views, from mmap or pread at the manifest's offsets."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Literal

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.checksums import (
    BlockChecks,
    Bytes,
    CheckBlocks,
    read_sums,
)
from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.mapped_file import MappedFile
from softcache.cache.memory_map import BackToBack, Piece, fits_back_to_back
from softcache.cache.part_table import check_range
from softcache.cache.schema import Layout
from softcache.errors import DamagedCacheError

ReadMode = Literal["mmap", "pread"]


class RowTable:
    """Random access to one data set that is spread over the shards of one or several layouts.

    Args:
        files: of the cache.
        layouts: in the order of their views, which follow one another from 0 on.
        shards: in the order of the layouts' spans.
        name: the data set, shaped (views, rows, ...) in every shard.
        mode: "mmap" reads through the page cache without system calls; "pread" suits network file systems.
        check_blocks: when the checksums of the blocks that a gather touches are looked at.
    """

    def __init__(
        self,
        files: BoundFiles,
        layouts: Sequence[Layout],
        shards: Sequence[StoredFile],
        name: str,
        mode: ReadMode,
        check_blocks: CheckBlocks,
    ) -> None:
        first = shards[0].arrays[name]
        self.dtype, self.tail = np.dtype(first.dtype), first.shape[2:]
        self._mode, self._num_rows = mode, layouts[0].num_rows
        self._num_views = layouts[-1].first_view + layouts[-1].num_views
        self._places = _Places(layouts)
        self._whole: np.ndarray | None = None  # all records in one array, where the shards can be mapped back to back
        self._flat: list[np.ndarray] = []  # else the records of each shard
        self._files: list[tuple[int, StoredArray]] = []  # for pread
        weakref.finalize(self, _close_all, self._files)
        counts = [shard.arrays[name].shape[0] * shard.arrays[name].shape[1] for shard in shards]
        self._starts = np.cumsum([0, *counts])  # the first record of each shard in `whole`
        self._sums: list[np.ndarray] = []
        if files.source is not None:
            files.source.prepare(shards)
        if mode == "pread":
            self._open_files(files, shards, name)
        else:
            self._map_files(files, shards, name)
        self._blocks = BlockChecks(shards, name, self._sums, check_blocks, files.source)

    def _open_files(self, files: BoundFiles, shards: Sequence[StoredFile], name: str) -> None:
        for file in shards:
            try:
                self._files.append((files.open(file), file.arrays[name]))
            except BaseException:
                self._close_files()
                raise
            self._sums.append(read_sums(self._files[-1][0], file, name))

    def _map_files(self, files: BoundFiles, shards: Sequence[StoredFile], name: str) -> None:
        def open_piece(file: StoredFile) -> int:
            fd = files.open(file)
            self._sums.append(read_sums(fd, file, name))
            return fd

        groups = [shards] if fits_back_to_back([_piece(file, name) for file in shards]) else [[file] for file in shards]
        for group in groups:
            pieces = [_piece(file, name) for file in group]
            if fits_back_to_back(pieces):
                mapped = BackToBack(pieces, lambda i, group=group: open_piece(group[i]))  # type: ignore[misc]
                records = np.frombuffer(memoryview(mapped.memory), self.dtype).reshape(-1, *self.tail)
                records.flags.writeable = False
            else:  # not on Linux
                os.close(open_piece(group[0]))
                records = MappedFile(files, group[0], check=False).array(name).reshape(-1, *self.tail)
            self._flat.append(records)
        if len(groups) == 1:
            self._whole = self._flat[0]

    def _bytes_of(self, shard: int, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the data set in one shard."""
        if self._mode == "pread":
            fd, stored = self._files[shard]
            return os.pread(fd, stop - start, stored.offset + start)
        if self._whole is None:
            records = self._flat[shard]
        else:
            records = self._whole[self._starts[shard] : self._starts[shard + 1]]
        return records.reshape(-1).view(np.uint8)[start:stop].data

    def gather(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, ...) records of B (row, view) pairs, in their order.

        Raises:
            IndexError: one is out of range.
            BadBlock: a block that one lies in has other bytes than were written, as far as that is looked at.
        """
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        check_range(rows, self._num_rows, "row")
        check_range(views, self._num_views, "view")
        if self._whole is not None and self._num_views == 1 and not self._blocks.pending:
            return np.take(self._whole, rows, axis=0)
        span, record = self.place(rows, views)
        if self._blocks.pending:
            self._blocks.check(span, record, self._bytes_of)
        if self._whole is not None:
            return np.take(self._whole, self._starts[span] + record, axis=0)
        out = np.empty((len(rows), *self.tail), self.dtype)
        order = np.argsort(span, kind="stable")
        sorted_span, sorted_record = span[order], record[order]
        borders = np.flatnonzero(np.diff(sorted_span)) + 1
        grouped = np.empty_like(out)  # by shard; put back in order at the end
        start = 0
        for stop in [*borders.tolist(), len(rows)]:
            if stop > start:
                self._take(int(sorted_span[start]), sorted_record[start:stop], grouped[start:stop])
            start = stop
        out[order] = grouped
        return out

    def place(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of the shards, record within it) of each (row, view)."""
        return self._places.of(rows, views)

    def _take(self, span: int, records: np.ndarray, out: np.ndarray) -> None:
        if self._mode == "mmap":
            # "clip" only skips NumPy's buffering: the range is checked above
            np.take(self._flat[span], records, axis=0, out=out, mode="clip")
            return
        fd, stored = self._files[span]
        record_bytes = out[0].nbytes if len(out) else 0
        for place, record in zip(out.reshape(len(records), -1), records.tolist(), strict=True):
            got = os.preadv(fd, [place.view(np.uint8).data], stored.offset + record * record_bytes)
            if got != record_bytes:
                raise DamagedCacheError(f"span {span}: the file became shorter while it was read")

    def close(self) -> None:
        self._close_files()
        self._flat.clear()
        self._whole = None

    def _close_files(self) -> None:
        _close_all(self._files)


class _Places:
    """Where a record lies, as FORMAT.md says it: arithmetic on the layout that holds its view."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._layouts = layouts
        self._first_views = np.array([layout.first_view for layout in layouts])
        self._first_spans = np.cumsum([0, *map(len, layouts)])[:-1]

    def of(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self._layouts) == 1:
            return self._within(0, rows, views)
        span, record = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        which = np.searchsorted(self._first_views, views, side="right") - 1
        for number in np.unique(which):
            chosen = np.flatnonzero(which == number)
            span[chosen], record[chosen] = self._within(int(number), rows[chosen], views[chosen])
        return span, record

    def _within(self, number: int, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        layout = self._layouts[number]
        row_range, row = np.divmod(rows, layout.shard_rows)
        view_range, view = np.divmod(views - layout.first_view, layout.shard_views)
        span_rows = np.minimum(layout.shard_rows, layout.num_rows - row_range * layout.shard_rows)
        span = row_range * layout.view_ranges + view_range + int(self._first_spans[number])
        return span, view * span_rows + row


def _close_all(files: list[tuple[int, StoredArray]]) -> None:
    while files:
        os.close(files.pop()[0])


def _piece(file: StoredFile, name: str) -> Piece:
    return Piece(file.arrays[name].offset, file.arrays[name].nbytes)

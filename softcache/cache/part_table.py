"""One data set of a cache of version 2 over all its parts: a slice for each (row, view); parts open when first touched."""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.checksums import BadBlock, CheckBlocks, damage_of, read_sums
from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.memory_map import BackToBack, Piece, fits_back_to_back
from softcache.cache.positions import PositionIndex, Ragged
from softcache.cache.schema import BLOCK_BYTES, Layout, Span, layout_of_view
from softcache.errors import DamagedCacheError

OPEN_PARTS = {"mmap": 4096, "pread": 128}  # a process may have some ten thousand maps, and a thousand open files


@dataclass
class _Part:
    """An open part: the bytes of its data set in memory, or a descriptor to read them from."""

    file: StoredFile
    stored: StoredArray
    sums: np.ndarray
    known: np.ndarray  # which of its blocks are known to be whole
    fd: int = -1
    data: np.ndarray | None = None  # (bytes,) uint8
    mapped: BackToBack | None = None

    def read(self, start: int, stop: int) -> Any:
        """Bytes [start, stop) of the data set."""
        if self.data is not None:
            return self.data[start:stop].data
        return os.pread(self.fd, stop - start, self.stored.offset + start)


class PartTable:
    """Random access to a data set, by (row, view).

    Args:
        files: of the cache.
        layouts: in the order of their views, which follow one another from 0 on.
        file_of: part -> its file.
        name: the data set.
        index: its index; None where each (row, view) has one record.
        mode: "mmap" or "pread".
        check_blocks: when the checksums of the blocks that a gather touches are looked at.
    """

    def __init__(
        self,
        files: BoundFiles,
        layouts: Sequence[Layout],
        file_of: Callable[[int], StoredFile],
        name: str,
        index: PositionIndex | None,
        mode: Literal["mmap", "pread"],
        check_blocks: CheckBlocks,
    ) -> None:
        self._files, self._layouts, self._file_of, self._name = files, layouts, file_of, name
        self.index, self._mode, self._check_blocks = index, mode, check_blocks
        self._num_rows, self._num_views = layouts[0].num_rows, layouts[-1].first_view + layouts[-1].num_views
        first = file_of(layouts[0].first_part).arrays[name]
        self.dtype, self.tail = np.dtype(first.dtype), first.shape[2 if index is None else 1 :]
        self._record_bytes = int(self.dtype.itemsize * np.prod(self.tail, dtype=np.int64))
        self._parts: OrderedDict[int, _Part] = OrderedDict()  # by number, the one that was opened first first
        self._known: dict[int, np.ndarray] = {}
        self._spans: dict[int, Span] = {}

    def gather(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, ...) records of B pairs that have one each. Errors as of `slices`."""
        assert self.index is None
        return self.slices(rows, views).values

    def slices(self, rows: np.ndarray, views: np.ndarray) -> Ragged:
        """All records of B (row, view) pairs, in their order: one slice of a part for each.

        Raises:
            IndexError: one is out of range.
            BadBlock: a block that one lies in has other bytes than were written, as far as that is looked at.
            DamagedCacheError: a part is not what the manifest names.
        """
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        check_range(rows, self._num_rows, "row")
        check_range(views, self._num_views, "view")
        spans = [self._span_of(row, view) for row, view in zip(rows.tolist(), views.tolist(), strict=True)]
        if self.index is None:
            first = [
                (view - span.view_start) * span.rows - span.row_start for span, view in zip(spans, views, strict=True)
            ]
            starts, counts = np.array(first, np.int64) + rows, np.ones(len(rows), np.int64)
        else:
            starts, counts = self.index.elements(rows, views, spans)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        out = np.empty((int(offsets[-1]), *self.tail), self.dtype)
        flat, size = out.reshape(-1).view(np.uint8), self._record_bytes
        slices = [
            (self._part(span), start, stop, flat[at : at + stop - start])
            for span, start, stop, at in zip(
                spans,
                (starts * size).tolist(),
                ((starts + counts) * size).tolist(),
                (offsets * size).tolist(),
                strict=False,
            )
            if start < stop
        ]
        for part, start, stop, _ in slices:
            if part.mapped is not None and stop - start >= mmap.PAGESIZE:
                part.mapped.will_need(start, stop)
        for part, start, stop, place in slices:
            self._copy(part, start, stop, place)
        return Ragged(out, offsets)

    def _span_of(self, row: int, view: int) -> Span:
        layout = layout_of_view(self._layouts, view)
        part = layout.part(row, view)
        if part not in self._spans:
            self._spans[part] = layout.span(part - layout.first_part)
        return self._spans[part]

    def _copy(self, part: _Part, start: int, stop: int, out: np.ndarray) -> None:
        if self._check_blocks != "never":
            self._check(part, start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1)
        if part.data is not None:
            out[:] = part.data[start:stop]
        elif os.preadv(part.fd, [out.data], part.stored.offset + start) != stop - start:
            raise DamagedCacheError(f"{self._files.root / part.file.path}: the file became shorter while it was read")

    def _check(self, part: _Part, first: int, last: int) -> None:
        """Blocks [first, last)."""
        if part.known[first:last].all():
            return
        for block in range(first, last):
            if not part.known[block]:
                stop = min((block + 1) * BLOCK_BYTES, part.stored.nbytes)
                if zlib.crc32(part.read(block * BLOCK_BYTES, stop)) != part.sums[block]:
                    raise BadBlock(damage_of(part.file, self._name, block))
                part.known[block] = self._check_blocks != "always"

    def _part(self, span: Span) -> _Part:
        found = self._parts.get(span.index)
        if found is not None:
            return found
        while len(self._parts) >= OPEN_PARTS[self._mode]:
            self._parts.popitem(last=False)  # closed when the batch that reads it is done
        opened = self._opened(span)
        self._parts[span.index] = opened
        return opened

    def _opened(self, span: Span) -> _Part:
        file = self._file_of(span.index)
        stored = file.arrays[self._name]
        if self.index is not None and stored.shape[0] != self.index.in_part(span):
            raise DamagedCacheError(
                f"{self._files.root / file.path}: {self._name!r} has {stored.shape[0]} positions, its index "
                f"{self.index.info.name!r} has {self.index.in_part(span)} there",
                tip="copy the cache again, or restore it with `softcache repair`",
            )
        fd = self._files.open(file)
        try:
            sums = read_sums(fd, file, self._name)
            known = self._known.setdefault(span.index, np.zeros(len(sums), bool))
            piece = Piece(stored.offset, stored.nbytes)
            if self._mode == "mmap" and fits_back_to_back([piece]):
                mapped = BackToBack([piece], lambda _: os.dup(fd))
                data = np.frombuffer(memoryview(mapped.memory), np.uint8)
                data.flags.writeable = False
                return _Part(file, stored, sums, known, data=data, mapped=mapped)
            part = _Part(file, stored, sums, known, fd=os.dup(fd))
            weakref.finalize(part, os.close, part.fd)
            return part
        finally:
            os.close(fd)

    def close(self) -> None:
        self._parts.clear()


def check_range(values: np.ndarray, limit: int, what: str) -> None:
    # negative numbers are huge as unsigned ones: one pass instead of two
    if len(values) and int(values.view(np.uint64).max()) >= limit:
        told = f"{what} {int(values.min())}..{int(values.max())} is outside 0..{limit - 1}"
        if what == "row" and int(values.min()) == -1:
            told += "; -1 is what `find` gives for a key that the cache does not hold: leave those samples out"
        raise IndexError(told)

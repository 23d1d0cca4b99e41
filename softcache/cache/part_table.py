"""One data set over all its parts: a slice for each (row, view); parts open when first touched.

Of version 2, and of whatever is fetched sparingly.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.checksums import CheckBlocks, block_range, check_block, read_sums
from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.memory_map import BackToBack, Piece, fits_back_to_back
from softcache.cache.positions import PositionIndex, Ragged
from softcache.cache.schema import BLOCK_BYTES, Layout, Span, layout_of_view
from softcache.cache.source import Touched
from softcache.errors import DamagedCacheError

OPEN_PARTS = {"mmap": 4096, "pread": 128}  # a process may have some ten thousand maps, and a thousand open files


@dataclass
class _Part:
    """An open part: the bytes of its data set in memory, or a descriptor to read them from."""

    file: StoredFile
    stored: StoredArray
    sums: np.ndarray
    known: bytearray  # a 1 for each of its blocks that is known to be whole
    fd: int = -1
    data: np.ndarray | None = None  # (bytes,) uint8
    mapped: BackToBack | None = None

    def is_known(self, start: int, size: int) -> bool:
        """Whether all blocks that have bytes of [start, start + size) are known to be whole."""
        return self.known.find(0, start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES + 1) < 0

    def will_need(self, start: int, size: int) -> None:
        """Let the kernel fetch these bytes while others are looked at."""
        if self.mapped is not None:
            self.mapped.will_need(start, start + size)

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
        self._known: dict[int, bytearray] = {}
        self._places: dict[int, tuple[Span, int]] = {}  # part and view, see _place

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
        places, starts, counts = self._ranges(rows, views)
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        out, size = np.empty((int(offsets[-1]), *self.tail), self.dtype), self._record_bytes
        self._read(places, (starts * size).tolist(), (counts * size).tolist(), out.reshape(-1).view(np.uint8))
        return Ragged(out, offsets)

    def touched(self, rows: np.ndarray, views: np.ndarray) -> list[Touched]:
        """The blocks that the records of these pairs lie in."""
        places, starts, counts = self._ranges(rows, views)
        size, found = self._record_bytes, []
        for (span, _), start, count in zip(places, (starts * size).tolist(), (counts * size).tolist(), strict=True):
            if count:
                found.append(Touched(self._file_of(span.index), self._name, _blocks(start, count)))
        return found

    def _ranges(self, rows: np.ndarray, views: np.ndarray) -> tuple[list[tuple[Span, int]], np.ndarray, np.ndarray]:
        """Of B pairs: the part of each, its first record there, and how many it has."""
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        check_range(rows, self._num_rows, "row")
        check_range(views, self._num_views, "view")
        known, keys = self._places, (self._parts_of(rows, views) * self._num_views + views).tolist()
        places = [known[key] if key in known else self._place(key) for key in keys]
        shifts = np.array([shift for _, shift in places], np.int64)
        if self.index is None:
            return places, rows + shifts, np.ones(len(rows), np.int64)
        starts, counts = self.index.ranges(rows, views)
        return places, starts + shifts, counts

    def _read(self, places: Sequence[tuple[Span, int]], starts: list[int], sizes: list[int], out: np.ndarray) -> None:
        """Bytes [start, start + size) of each place's part, one after the other."""
        source = self._files.source
        if source is not None:
            new = {span.index for (span, _), size in zip(places, sizes, strict=True) if size} - self._parts.keys()
            source.prepare([self._file_of(part) for part in sorted(new)])
        opened = [self._part(span) if size else None for (span, _), size in zip(places, sizes, strict=True)]
        slices = [
            (part, start, size) for part, start, size in zip(opened, starts, sizes, strict=True) if part is not None
        ]
        unknown = [] if self._check_blocks == "never" else [one for one in slices if not one[0].is_known(*one[1:])]
        if source is not None and unknown:
            source.need([Touched(part.file, self._name, _blocks(start, size)) for part, start, size in unknown])
        for part, start, size in unknown:
            part.will_need(start, size)
        for part, start, size in unknown:
            self._check(part, start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES + 1)
        at = 0
        for part, start, size in slices:
            if part.data is not None:
                out[at : at + size] = part.data[start : start + size]
            elif os.preadv(part.fd, [out[at : at + size].data], part.stored.offset + start) != size:
                raise DamagedCacheError(
                    f"{self._files.root / part.file.path}: the file became shorter while it was read"
                )
            at += size

    def _parts_of(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B,) the parts that hold the pairs."""
        if len(self._layouts) == 1:
            return self._layouts[0].parts(rows, views)
        which = np.searchsorted([layout.first_view for layout in self._layouts], views, side="right") - 1
        parts = np.empty(len(rows), np.int64)
        for number in np.unique(which).tolist():
            chosen = np.flatnonzero(which == number)
            parts[chosen] = self._layouts[number].parts(rows[chosen], views[chosen])
        return parts

    def _place(self, place: int) -> tuple[Span, int]:
        """The span of a part, and what is added to an offset of a view (without an index to a row) to give its element."""
        if place not in self._places:
            part, view = divmod(place, self._num_views)
            layout = layout_of_view(self._layouts, view)
            span = layout.span(part - layout.first_part)
            plain = (view - span.view_start) * span.rows - span.row_start
            self._places[place] = (span, plain if self.index is None else self.index.shift(span, view))
        return self._places[place]

    def _check(self, part: _Part, first: int, last: int) -> None:
        """Blocks [first, last)."""
        for block in range(first, last):
            if not part.known[block]:
                start, stop = block_range(part.file, self._name, block)
                check_block(
                    part.file, self._name, block, part.sums[block], partial(part.read, start, stop), self._files.source
                )
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
            known = self._known.setdefault(span.index, bytearray(len(sums)))
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


def _blocks(start: int, size: int) -> range:
    """Those that have bytes of [start, start + size)."""
    return range(start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES + 1)


def check_range(values: np.ndarray, limit: int, what: str) -> None:
    # negative numbers are huge as unsigned ones: one pass instead of two
    if len(values) and int(values.view(np.uint64).max()) >= limit:
        told = f"{what} {int(values.min())}..{int(values.max())} is outside 0..{limit - 1}"
        if what == "row" and int(values.min()) == -1:
            told += "; -1 is what `find` gives for a key that the cache does not hold: leave those samples out"
        raise IndexError(told)

"""Rows -> arrays, from mmap or pread at the manifest's offsets. No HDF5 library, no HDF5 handle, nothing written."""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softcache.cache.bound_files import BoundFiles, Facts
from softcache.cache.checksums import (
    CHECK_BLOCKS,
    BadBlock,
    BlockChecks,
    Bytes,
    CheckBlocks,
    Damage,
    damage_of,
    read_sums,
)
from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.memory_map import BackToBack, Piece, fits_back_to_back
from softcache.cache.part_table import PartTable, check_range
from softcache.cache.plan import Plan
from softcache.cache.plan_rules import width_of
from softcache.cache.positions import PositionIndex, Positions, Ragged, check_positions
from softcache.cache.samples import SampleTable, check_keys, table_from_arrays
from softcache.cache.schema import (
    BLOCK_BYTES,
    CRC_SUFFIX,
    Layout,
    dense_shard_path,
    index_path,
    layout_of_view,
    member_shard_path,
    view_shard_path,
)
from softcache.errors import CacheError, DamagedCacheError, first_offenders

ReadMode = Literal["mmap", "pread"]
MAPPED_AT_ONCE = 4096  # parts of one data set; of more each is opened when it is first touched

REPAIR = (
    "`softcache verify --full` lists all that is damaged; `softcache repair` makes it again, or copy the cache again"
)


class MappedFile:
    """One file of a cache, mapped read-only; `array(name)` is a view into the map.

    Args:
        check: look at the checksums of a data set before it is used.

    Raises:
        DamagedCacheError: the file is missing, has another size, is not the one that the manifest names, or a block of a data set
            has other bytes than were written.
    """

    def __init__(self, files: BoundFiles, file: StoredFile, *, check: bool = True) -> None:
        self.file, self.path, self._check = file, files.root / file.path, check
        try:
            fd = files.open(file)
        except BadBlock as exc:
            raise DamagedCacheError(f"{self.path}: {exc.damage}", tip=REPAIR) from None
        try:
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def array(self, name: str) -> np.ndarray:
        stored = self.file.arrays[name]
        if not stored.nbytes:
            return np.zeros(stored.shape, stored.dtype)
        if self._check:
            self._check_blocks(name)
        return self._view(name)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them, checksums left out."""
        return {name: self.array(name) for name in self.file.arrays if not name.endswith(CRC_SUFFIX)}

    def _view(self, name: str) -> np.ndarray:
        stored = self.file.arrays[name]
        count = stored.nbytes // np.dtype(stored.dtype).itemsize
        return np.frombuffer(self._map, stored.dtype, count, stored.offset).reshape(stored.shape)

    def _check_blocks(self, name: str) -> None:
        data = self._view(name).reshape(-1).view(np.uint8).data
        for block, crc in enumerate(self._view(name + CRC_SUFFIX).tolist()):
            if zlib.crc32(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != crc:
                raise DamagedCacheError(f"{self.path}: {damage_of(self.file, name, block)}", tip=REPAIR)


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
        if mode == "pread":
            self._open_files(files, shards, name)
        else:
            self._map_files(files, shards, name)
        self._blocks = BlockChecks(shards, name, self._sums, check_blocks)

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


def read_constants(files: BoundFiles, member: str, *, check: bool = True) -> dict[str, np.ndarray]:
    """The arrays that stand once for all records of a member, as views into the mapped file; empty where there are none.

    Of version 2 they may lie in several files, one after the other along their first axis.
    """
    found = [file for file in files.setup_files() if file.kind == "constants" and file.member == member]
    pieces = [MappedFile(files, file, check=check).arrays() for file in found]
    if len(pieces) < 2:
        return pieces[0] if pieces else {}
    names = dict.fromkeys(name for piece in pieces for name in piece)
    return {name: np.concatenate([piece[name] for piece in pieces if name in piece]) for name in names}


def read_samples(files: BoundFiles, plan: Plan, *, check: bool = True) -> SampleTable:
    """Who the samples are."""
    file = next(file for file in files.setup_files() if file.kind == "samples")
    mapped = MappedFile(files, file, check=check)
    return table_from_arrays(mapped.arrays(), plan.samples, plan.num_classes)


def read_candidates(files: BoundFiles, *, check: bool = True) -> dict[str, np.ndarray]:
    """The arrays of candidates.h5, `ids` and `digests` among them; empty where there is none."""
    for file in files.setup_files():
        if file.kind == "candidates":
            arrays = MappedFile(files, file, check=check).arrays()
            if "key_offsets" in arrays:
                check_keys(arrays["key_bytes"], arrays["key_offsets"], file.path)
            return arrays
    return {}


def read_index(files: BoundFiles, plan: Plan, name: str, *, check: bool = True) -> PositionIndex:
    """An index over all views, after every check."""
    info, rounds, first = plan.index(name), [], None
    found = {file.path: file for file in files.setup_files() if file.kind == "positions" and file.index == name}
    candidates = len(read_candidates(files, check=check).get("ids", ())) if info.kind == "candidates" else 0
    for number in plan.rounds_of_index(name):
        file = found[index_path(name, number)]
        positions = Positions(**MappedFile(files, file, check=check).arrays())
        where = str(files.root / file.path)
        check_positions(positions, info, where, candidates=candidates, classes=plan.num_classes)
        first = positions.offsets if first is None else first
        if info.labels and not np.array_equal(positions.offsets, first):
            raise DamagedCacheError(f"{where}: has labels, and other offsets than the round before", tip=REPAIR)
        rounds.append((plan.rounds[number].layout, positions))
    return PositionIndex(info, rounds)


def _close_all(files: list[tuple[int, StoredArray]]) -> None:
    while files:
        os.close(files.pop()[0])


def _piece(file: StoredFile, name: str) -> Piece:
    return Piece(file.arrays[name].offset, file.arrays[name].nbytes)


class CacheReader:
    """A committed cache: its manifest, its sample table, and gathers of any stored data set.

    Pickles by path and id: a worker process opens its own maps. Nothing is opened before it is first read, and no file is read
    before it is known to be the one that the manifest names.

    Args:
        mode: "mmap", or "pread" for network file systems.
        check_blocks: when the checksum of a block of 64 KiB is looked at: when it is "first" touched, "always", or "never".
        check_files: False reads whatever has the right name and size.
        known: as `BoundFiles` takes it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        id: str | None = None,
        mode: ReadMode = "mmap",
        check_blocks: CheckBlocks = "first",
        check_files: bool = True,
        known: Mapping[Facts, str] | None = None,
    ) -> None:
        if mode not in ("mmap", "pread"):
            raise CacheError(f"unknown read mode {mode!r}", tip="use 'mmap', or 'pread' on a network file system")
        if check_blocks not in CHECK_BLOCKS:
            raise CacheError(f"check_blocks={check_blocks!r}", tip=f"use one of {', '.join(CHECK_BLOCKS)}")
        self.path, self.mode, self.check_blocks = Path(path), mode, check_blocks
        self.manifest: Manifest = read_manifest(self.path, id=id)
        self.files = BoundFiles(self.path, self.manifest.files, check=check_files, known=known)
        self._tables: dict[tuple[str | None, str], RowTable | PartTable] = {}
        self._indexes: dict[str, PositionIndex] = {}
        self._dense_rows: dict[str, np.ndarray] = {}
        self._samples: SampleTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        how = {"mode": self.mode, "check_blocks": self.check_blocks, "check_files": self.files.check}
        return {"path": self.path, "id": self.manifest.id, **how, "known": self.files.known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("path"), **state)  # type: ignore[misc]

    @property
    def _check(self) -> bool:
        return self.check_blocks != "never"

    @property
    def samples(self) -> SampleTable:
        if self._samples is None:
            self._samples = read_samples(self.files, self.manifest.plan, check=self._check)
        return self._samples

    def table(self, member: str | None, name: str) -> RowTable | PartTable:
        """The data set `name` of a member (None: the views' pixel digests)."""
        key = (member, name)
        if key not in self._tables:
            layouts, index = self.manifest.plan.layouts_of(member), self.index_of(member, name)
            parts = sum(layout.row_ranges * layout.view_ranges for layout in layouts)
            if index is None and parts <= MAPPED_AT_ONCE:
                shards = self._shards(member)
                self._tables[key] = RowTable(self.files, layouts, shards, name, self.mode, self.check_blocks)
            else:
                self._tables[key] = PartTable(
                    self.files, layouts, partial(self._part, member), name, index, self.mode, self.check_blocks
                )
        return self._tables[key]

    def index_of(self, member: str | None, name: str) -> PositionIndex | None:
        """The index of a data set; None where each sample has one record in a view."""
        found = None if member is None else self.manifest.plan.member(member).index_of(name)
        return None if found is None else self.index(found)

    def index(self, name: str) -> PositionIndex:
        """An index of the cache, over all its views.

        Raises:
            CacheError: there is none of that name.
            DamagedCacheError: its numbers do not fit one another, or the cache.
        """
        if name not in self._indexes:
            if name not in (index.name for index in self.manifest.plan.indexes):
                raise CacheError(f"{self.path}: no index {name!r}")
            self._indexes[name] = read_index(self.files, self.manifest.plan, name, check=self._check)
        return self._indexes[name]

    def candidates(self) -> dict[str, np.ndarray]:
        """The arrays of candidates.h5; empty where the cache has none."""
        return read_candidates(self.files, check=self._check)

    def tokenizer(self) -> bytes | None:
        """tokenizer.json; None where the classes are not those of one."""
        for file in self.manifest.files_of("tokenizer"):
            fd = self.files.open(file)
            try:
                return os.pread(fd, file.nbytes, 0)
            finally:
                os.close(fd)
        return None

    def _part(self, member: str | None, part: int) -> StoredFile:
        found = self.manifest.part_file("views" if member is None else "member", member, part)
        assert found is not None  # the gate asks for every part
        return found

    def _shards(self, member: str | None) -> list[StoredFile]:
        """The shards of a member (None: of the views), in the order of their views' rounds."""
        found = {file.path: file for file in self.manifest.files_of("views" if member is None else "member", member)}
        return [
            found[view_shard_path(span.index) if member is None else member_shard_path(member, span.index)]
            for layout in self.manifest.plan.layouts_of(member)
            for span in layout.spans()
        ]

    def gather(self, member: str | None, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, ...) stored values of B (row, view) pairs.

        Raises:
            IndexError: a row or view is out of range.
            DamagedCacheError: a block that is touched has other bytes than were written; names file, rows and samples.
        """
        try:
            return self.table(member, name).gather(rows, views)
        except BadBlock as exc:
            raise self._damaged(exc.damage) from None

    def slices(self, member: str, name: str, rows: np.ndarray, views: np.ndarray) -> Ragged:
        """The stored values of all positions of B (row, view) pairs, of a data set that has an index. Errors as of `gather`."""
        table = self.table(member, name)
        assert isinstance(table, PartTable)
        try:
            return table.slices(rows, views)
        except BadBlock as exc:
            raise self._damaged(exc.damage) from None

    def _damaged(self, damage: Damage) -> DamagedCacheError:
        named = ""
        if damage.rows is not None:
            keys = (self.samples.key(row) for row in range(*damage.rows))
            named = f"; samples {first_offenders(keys, damage.rows[1] - damage.rows[0])}"
        return DamagedCacheError(f"{self.path / damage.file}: {damage}{named}", tip=REPAIR)

    def dense(self, member: str, rows: np.ndarray, views: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(n, C) float16 rows that were kept dense.

        Args:
            rows, views: (n,) their places.
            numbers: (n,) as their records say, counted from 1 within a shard.
        """
        layouts = self.manifest.plan.layouts_of(member)
        pairs = zip(np.asarray(rows).tolist(), np.asarray(views).tolist(), strict=True)
        parts = np.array([layout_of_view(layouts, view).part(row, view) for row, view in pairs], np.int64)
        out = np.empty((len(rows), width_of(self.manifest.plan.member(member), self.manifest.plan)), np.float16)
        for which in np.unique(parts):
            chosen = np.flatnonzero(parts == which)
            kept = self._mapped_dense(member, int(which))
            wanted = np.asarray(numbers)[chosen].astype(np.int64) - 1
            if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(kept)):
                raise DamagedCacheError(
                    f"{self.path / dense_shard_path(member, int(which))}: has {len(kept)} rows, a record asks for "
                    f"{wanted.max() + 1}"
                )
            out[chosen] = kept[wanted]
        return out

    def _mapped_dense(self, member: str, part: int) -> np.ndarray:
        path = dense_shard_path(member, part)
        if path not in self._dense_rows or self.check_blocks == "always":
            file = self.manifest.part_file("dense", member, part)
            if file is None:
                raise DamagedCacheError(f"{self.path}: a record points into {path}, which the manifest does not name")
            self._dense_rows[path] = MappedFile(self.files, file, check=self._check).array("logits")
        return self._dense_rows[path]

    def constants(self, member: str) -> dict[str, np.ndarray]:
        """What stands once for all records of a member."""
        return read_constants(self.files, member, check=self._check)

    def probe(self) -> dict[str, np.ndarray]:
        """The arrays of probe.h5; empty where the cache has none."""
        for file in self.manifest.files_of("probe"):
            arrays, plan = MappedFile(self.files, file, check=self._check).arrays(), self.manifest.plan
            sizes = (
                arrays["shapes"].clip(1, 2**20).astype(np.int64).prod(axis=1)
            )  # an axis of no length stands for none
            inside = arrays["rows"].max() < plan.samples.count and arrays["views"].max() < plan.views.count
            if not inside or sum(sizes.tolist()) != len(arrays["pixels"]):
                raise DamagedCacheError(f"{self.path / file.path}: its records are not those of this cache", tip=REPAIR)
            return arrays
        return {}

    def array_kinds(self, member: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The data sets of a member, checksums left out: name -> (NumPy dtype string, shape of one record)."""
        for file in self.manifest.files_of("member", member):
            index_of = self.manifest.plan.member(member).index_of
            arrays = {name: array for name, array in file.arrays.items() if not name.endswith(CRC_SUFFIX)}
            return {n: (a.dtype, a.shape[2 if index_of(n) is None else 1 :]) for n, a in arrays.items()}
        raise CacheError(f"{self.path}: no member {member!r}")

    def close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables.clear()
        self._indexes.clear()
        self._dense_rows.clear()
        self._samples = None

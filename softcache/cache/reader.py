"""Rows -> arrays, from mmap or pread at the manifest's offsets. No HDF5 library, no HDF5 handle, nothing written."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.mapping import BackToBack, Piece, fits_back_to_back
from softcache.cache.samples import SampleTable, table_from_arrays
from softcache.cache.schema import CRC_SUFFIX, Layout, dense_shard_path, member_shard_path, view_shard_path
from softcache.cache.stored import StoredArray, StoredFile
from softcache.errors import CacheError, DamagedCacheError

ReadMode = Literal["mmap", "pread"]


class MappedFile:
    """One file of a cache, mapped read-only; `array(name)` is a view into the map.

    Raises:
        DamagedCacheError: the file is missing, has another size, or a data set reaches past its end.
    """

    def __init__(self, root: Path, file: StoredFile) -> None:
        self.file, self.path = file, root / file.path
        self._fd = open_checked(self.path, file)
        try:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if file.nbytes else None
        finally:
            os.close(self._fd)

    def array(self, name: str) -> np.ndarray:
        stored = self.file.arrays[name]
        if self._map is None or not stored.nbytes:
            return np.zeros(stored.shape, stored.dtype)
        count = stored.nbytes // np.dtype(stored.dtype).itemsize
        return np.frombuffer(self._map, stored.dtype, count, stored.offset).reshape(stored.shape)


def open_checked(path: Path, file: StoredFile) -> int:
    """A read-only descriptor of a cache file whose size is the manifest's and whose data sets lie inside it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DamagedCacheError(
            f"{path}: the manifest names this file, but it is not there", tip="copy the cache again, or dump again"
        ) from None
    size = os.fstat(fd).st_size
    if size != file.nbytes:
        os.close(fd)
        raise DamagedCacheError(
            f"{path}: has {size} bytes, the manifest says {file.nbytes}",
            tip="the copy is incomplete or damaged; copy the cache again, or dump again",
        )
    for name, stored in file.arrays.items():
        if stored.offset < 0 or stored.offset + stored.nbytes > size:
            os.close(fd)
            raise DamagedCacheError(f"{path}: data set {name!r} reaches past the end of the file")
    return fd


class RowTable:
    """Random access to one data set that is spread over the shards of one or several layouts.

    Args:
        layouts: in the order of their views, which follow one another from 0 on.
        shards: in the order of the layouts' spans.
        name: the data set, shaped (views, rows, ...) in every shard.
        mode: "mmap" reads through the page cache without system calls; "pread" suits network file systems.
    """

    def __init__(
        self, root: Path, layouts: Sequence[Layout], shards: Sequence[StoredFile], name: str, mode: ReadMode
    ) -> None:
        spans = [span for layout in layouts for span in layout.spans()]
        if len(shards) != len(spans):
            raise DamagedCacheError(f"{root}: {len(shards)} shards hold {name!r}, the layout asks for {len(spans)}")
        first = shards[0].arrays[name]
        self.dtype, self.tail = np.dtype(first.dtype), first.shape[2:]
        self._mode, self._num_rows = mode, layouts[0].num_rows
        self._num_views = layouts[-1].first_view + layouts[-1].num_views
        self._places = _Places(layouts)
        self._whole: np.ndarray | None = None  # all records in one array, where the shards can be mapped back to back
        self._flat: list[np.ndarray] = []  # else the records of each shard
        self._files: list[tuple[int, StoredArray]] = []  # for pread
        weakref.finalize(self, _close_all, self._files)
        for span, file in zip(spans, shards, strict=True):
            stored = file.arrays[name]
            if stored.shape != (span.views, span.rows, *self.tail) or np.dtype(stored.dtype) != self.dtype:
                raise DamagedCacheError(f"{root / file.path}: {name!r} does not have the shape of its span")
        self._starts = np.cumsum([0, *(span.views * span.rows for span in spans)])[:-1]  # first records in `whole`
        if mode == "pread":
            for file in shards:
                try:
                    self._files.append((open_checked(root / file.path, file), file.arrays[name]))
                except DamagedCacheError:
                    self._close_files()
                    raise
            return
        groups = [shards] if fits_back_to_back([_piece(file, name) for file in shards]) else [[file] for file in shards]
        for group in groups:
            pieces = [_piece(file, name) for file in group]
            if fits_back_to_back(pieces):
                mapped = BackToBack(pieces, lambda i, group=group: open_checked(root / group[i].path, group[i]))  # type: ignore[misc]
                records = np.frombuffer(memoryview(mapped.memory), self.dtype).reshape(-1, *self.tail)
                records.flags.writeable = False
            else:  # not on Linux
                records = MappedFile(root, group[0]).array(name).reshape(-1, *self.tail)
            self._flat.append(records)
        if len(groups) == 1:
            self._whole = self._flat[0]

    def gather(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, ...) records of B (row, view) pairs, in their order. IndexError when one is out of range."""
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        _check_range(rows, self._num_rows, "row")
        _check_range(views, self._num_views, "view")
        if self._whole is not None and self._num_views == 1:
            return np.take(self._whole, rows, axis=0)
        span, record = self.place(rows, views)
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


def read_constants(root: Path, stored: Sequence[StoredFile], member: str) -> dict[str, np.ndarray]:
    """The arrays that stand once for all records of a member, as views into the mapped file; empty where there are none."""
    found = [file for file in stored if file.kind == "constants" and file.member == member]
    if not found:
        return {}
    mapped = MappedFile(root, found[0])
    return {name: mapped.array(name) for name in found[0].arrays if not name.endswith(CRC_SUFFIX)}


def _close_all(files: list[tuple[int, StoredArray]]) -> None:
    while files:
        os.close(files.pop()[0])


def _piece(file: StoredFile, name: str) -> Piece:
    return Piece(file.arrays[name].offset, file.arrays[name].nbytes)


def _check_range(values: np.ndarray, limit: int, what: str) -> None:
    # negative numbers are huge as unsigned ones: one pass instead of two
    if len(values) and int(values.view(np.uint64).max()) >= limit:
        raise IndexError(f"{what} {int(values.min())}..{int(values.max())} is outside 0..{limit - 1}")


class CacheReader:
    """A committed cache: its manifest, its sample table, and gathers of any stored data set.

    Pickles by path and id: a worker process opens its own maps. Nothing is opened before it is first read.
    """

    def __init__(self, path: str | os.PathLike[str], *, id: str | None = None, mode: ReadMode = "mmap") -> None:
        if mode not in ("mmap", "pread"):
            raise CacheError(f"unknown read mode {mode!r}", tip="use 'mmap', or 'pread' on a network file system")
        self.path, self.mode = Path(path), mode
        self.manifest: Manifest = read_manifest(self.path, id=id)
        self._tables: dict[tuple[str | None, str], RowTable] = {}
        self._dense: dict[str, dict[str, StoredFile]] = {}
        self._dense_rows: dict[str, np.ndarray] = {}
        self._samples: SampleTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "id": self.manifest.id, "mode": self.mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], id=state["id"], mode=state["mode"])  # type: ignore[misc]

    @property
    def samples(self) -> SampleTable:
        if self._samples is None:
            (file,) = self.manifest.files_of("samples")
            mapped = MappedFile(self.path, file)
            plan = self.manifest.plan
            self._samples = table_from_arrays(mapped.array, list(file.arrays), plan.samples, len(plan.class_names))
        return self._samples

    def table(self, member: str | None, name: str) -> RowTable:
        """The data set `name` of a member (None: the views' pixel digests)."""
        key = (member, name)
        if key not in self._tables:
            layouts = self.manifest.plan.layouts_of(member)
            self._tables[key] = RowTable(self.path, layouts, self._shards(member), name, self.mode)
        return self._tables[key]

    def _shards(self, member: str | None) -> list[StoredFile]:
        """The shards of a member (None: of the views), in the order of their views' rounds."""
        found = {file.path: file for file in self.manifest.files_of("views" if member is None else "member", member)}
        try:
            return [
                found[view_shard_path(span.index) if member is None else member_shard_path(member, span.index)]
                for layout in self.manifest.plan.layouts_of(member)
                for span in layout.spans()
            ]
        except KeyError as exc:
            raise DamagedCacheError(
                f"{self.path}: the manifest does not name {exc}", tip="copy the cache again"
            ) from None

    def gather(self, member: str | None, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, ...) stored values of B (row, view) pairs."""
        return self.table(member, name).gather(rows, views)

    def dense(self, member: str, rows: np.ndarray, views: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(n, C) float16 rows that were kept dense.

        Args:
            rows, views: (n,) their places.
            numbers: (n,) as their records say, counted from 1 within a shard.
        """
        if member not in self._dense:
            self._dense[member] = {file.path: file for file in self.manifest.files_of("dense", member)}
        spans = [span for layout in self.manifest.plan.layouts_of(member) for span in layout.spans()]
        shard, _ = self.table(member, "records").place(np.asarray(rows, np.int64), np.asarray(views, np.int64))
        out = np.empty((len(rows), len(self.manifest.plan.class_names)), np.float16)
        for which in np.unique(shard):
            chosen = np.flatnonzero(shard == which)
            path = dense_shard_path(member, spans[int(which)].index)
            kept = self._mapped_dense(member, path)
            wanted = np.asarray(numbers)[chosen].astype(np.int64) - 1
            if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(kept)):
                raise DamagedCacheError(
                    f"{self.path / path}: has {len(kept)} rows, a record asks for {wanted.max() + 1}"
                )
            out[chosen] = kept[wanted]
        return out

    def _mapped_dense(self, member: str, path: str) -> np.ndarray:
        if path not in self._dense_rows:
            if path not in self._dense[member]:
                raise DamagedCacheError(f"{self.path}: a record points into {path}, which the manifest does not name")
            self._dense_rows[path] = MappedFile(self.path, self._dense[member][path]).array("logits")
        return self._dense_rows[path]

    def constants(self, member: str) -> dict[str, np.ndarray]:
        """What stands once for all records of a member."""
        return read_constants(self.path, self.manifest.files, member)

    def probe(self) -> dict[str, np.ndarray]:
        """The arrays of probe.h5; empty where the cache has none."""
        for file in self.manifest.files_of("probe"):
            mapped = MappedFile(self.path, file)
            return {name: mapped.array(name) for name in file.arrays if not name.endswith(CRC_SUFFIX)}
        return {}

    def array_names(self, member: str) -> list[str]:
        """The data sets of a member, checksums left out."""
        for file in self.manifest.files_of("member", member):
            return [name for name in file.arrays if not name.endswith(CRC_SUFFIX)]
        raise CacheError(f"{self.path}: no member {member!r}")

    def close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables.clear()
        self._dense_rows.clear()
        self._samples = None

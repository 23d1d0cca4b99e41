"""Rows -> arrays, from mmap or pread at the manifest's offsets. No HDF5 library, no HDF5 handle, nothing written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.bound_files import BoundFiles, Facts
from softcache.cache.checksums import (
    CHECK_BLOCKS,
    BadBlock,
    CheckBlocks,
    Damage,
)
from softcache.cache.file_entry import StoredFile
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.mapped_file import REPAIR, MappedFile, tip_for
from softcache.cache.part_table import PartTable
from softcache.cache.plan import Plan
from softcache.cache.plan_rules import width_of
from softcache.cache.positions import PositionIndex, Positions, Ragged, check_positions
from softcache.cache.row_table import ReadMode, RowTable
from softcache.cache.samples import SampleTable, check_keys, table_from_arrays
from softcache.cache.schema import (
    CRC_SUFFIX,
    dense_shard_path,
    index_path,
    layout_of_view,
    member_shard_path,
    view_shard_path,
)
from softcache.cache.source import Source
from softcache.errors import CacheError, DamagedCacheError, first_offenders

MAPPED_AT_ONCE = 4096  # parts of one data set; of more each is opened when it is first touched


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


class CacheReader:
    """A committed cache: its manifest, its sample table, and gathers of any stored data set.

    Pickles by path and id: a worker process opens its own maps. Nothing is opened before it is first read, and no file is read
    before it is known to be the one that the manifest names.

    Args:
        mode: "mmap", or "pread" for network file systems.
        check_blocks: when the checksum of a block of 64 KiB is looked at: when it is "first" touched, "always", or "never".
        check_files: False reads whatever has the right name and size.
        known: as `BoundFiles` takes it.
        source: of a cache that lies somewhere else, of which `path` has the manifest and the lists; its blocks are looked at
            when they are first touched, though it be "never".
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
        source: Source | None = None,
    ) -> None:
        if source is not None and check_blocks == "never":
            check_blocks = "first"
        if mode not in ("mmap", "pread"):
            raise CacheError(f"unknown read mode {mode!r}", tip="use 'mmap', or 'pread' on a network file system")
        if check_blocks not in CHECK_BLOCKS:
            raise CacheError(f"check_blocks={check_blocks!r}", tip=f"use one of {', '.join(CHECK_BLOCKS)}")
        self.path, self.mode, self.check_blocks = Path(path), mode, check_blocks
        self.manifest: Manifest = read_manifest(self.path, id=id)
        self.files = BoundFiles(self.path, self.manifest.files, check=check_files, known=known, source=source)
        self._tables: dict[tuple[str | None, str], RowTable | PartTable] = {}
        self._indexes: dict[str, PositionIndex] = {}
        self._dense_rows: dict[str, np.ndarray] = {}
        self._samples: SampleTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        how = {"mode": self.mode, "check_blocks": self.check_blocks, "check_files": self.files.check}
        known = {"known": self.files.known, "source": self.files.source}
        return {"path": self.path, "id": self.manifest.id, **how, **known}

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
            parts, source = sum(layout.row_ranges * layout.view_ranges for layout in layouts), self.files.source
            if index is None and parts <= MAPPED_AT_ONCE and not (source is not None and source.sparing):
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

    def will_read(self, wanted: Sequence[tuple[str | None, str]], rows: np.ndarray, views: np.ndarray) -> None:
        """Where the cache is fetched as it is read: fetch all that these data sets have of B pairs, several files at once.

        Args:
            wanted: (member, data set), as `gather` takes them.
        """
        source = self.files.source
        if source is None or not source.sparing:
            return
        tables = [self.table(*one) for one in wanted]
        touched = [one for table in tables if isinstance(table, PartTable) for one in table.touched(rows, views)]
        source.prepare(list({one.file.path: one.file for one in touched}.values()))
        source.need(touched)

    def _damaged(self, damage: Damage) -> DamagedCacheError:
        named = ""
        if damage.rows is not None:
            keys = (self.samples.key(row) for row in range(*damage.rows))
            named = f"; samples {first_offenders(keys, damage.rows[1] - damage.rows[0])}"
        return DamagedCacheError(f"{self.path / damage.file}: {damage}{named}", tip=tip_for(self.files))

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

"""One HDF5 file: written whole or not at all.

h5py creates and closes the empty, pre-allocated file; rows are then written with pwrite at the data sets' offsets. The
result is byte for byte what h5py would have written, and readers need only the offsets.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from softcache.cache import files
from softcache.cache.schema import ALIGNMENT, BLOCK_BYTES, CRC_SUFFIX, FORMAT_VERSION, ArraySpec
from softcache.cache.stored import StoredArray, StoredFile
from softcache.errors import DamagedCacheError, DiskSpaceError

WRITE_ROWS = 1024  # rows gathered before one pwrite
READ_BYTES = 1 << 20
HDF5_VERSION = f"{h5py.version.hdf5_version} (h5py {h5py.version.version})"


@dataclass
class _Column:
    """A data set being written in order: rows waiting for their pwrite, and the running block checksums."""

    spec: ArraySpec
    offset: int
    waiting: list[np.ndarray] = field(default_factory=list)
    waiting_rows: int = 0
    written: int = 0
    checksums: list[int] = field(default_factory=list)
    crc: int = 0
    crc_bytes: int = 0

    def update(self, data: memoryview) -> None:
        while data.nbytes:
            piece = data[: BLOCK_BYTES - self.crc_bytes]
            self.crc = zlib.crc32(piece, self.crc)
            self.crc_bytes += piece.nbytes
            data = data[piece.nbytes :]
            if self.crc_bytes == BLOCK_BYTES:
                self.end_block()

    def end_block(self) -> None:
        if self.crc_bytes:
            self.checksums.append(self.crc)
        self.crc, self.crc_bytes = 0, 0


class ShardWriter:
    """Writes one shard under a temporary name; `finish` makes it durable, checks it and gives it its name.

    Args:
        path: the final path. The temporary one stands beside it, ending in `.tmp-<tag>`.
        arrays: the data sets; their checksums are added.
        kind: of the file, kept as its attribute: see StoredFile.
        tag: distinguishes writers that may work on the same folder.

    Raises:
        DiskSpaceError: the file system cannot hold the file.
    """

    def __init__(self, path: Path, arrays: Sequence[ArraySpec], *, kind: str, tag: str = "0") -> None:
        self.path, self.kind = path, kind
        self.temporary = path.with_name(f"{path.name}.tmp-{tag}")
        files.make_folder(path.parent)
        self._fd = -1
        specs = [spec for array in arrays for spec in (array, array.checksums)]
        with self._undone_on_fault():
            offsets = _create(self.temporary, specs, kind)
            self._columns = {a.name: _Column(a, offsets[a.name]) for a in arrays}
            self._stored = {s.name: StoredArray(offsets[s.name], s.dtype, s.shape) for s in specs}
            self._fd = files.open_for_writing(self.temporary)
            files.reserve(self._fd, os.fstat(self._fd).st_size)

    def append(self, name: str, rows: np.ndarray) -> None:
        """Append rows to one data set: (n, ...) in the order of its flattened leading axes."""
        column = self._columns[name]
        column.waiting.append(np.ascontiguousarray(rows, dtype=column.spec.dtype))
        column.waiting_rows += len(rows)
        if column.waiting_rows >= WRITE_ROWS:
            self._flush(column)

    def _flush(self, column: _Column) -> None:
        if not column.waiting:
            return
        block = column.waiting[0] if len(column.waiting) == 1 else np.concatenate(column.waiting)
        column.waiting, column.waiting_rows = [], 0
        if not block.nbytes:
            return
        data = block.reshape(-1).view(np.uint8).data
        assert column.written + data.nbytes <= column.spec.nbytes, f"{column.spec.name}: more rows than planned"
        with self._undone_on_fault():
            files.write_at(self._fd, data, column.offset + column.written)
        column.update(data)
        column.written += data.nbytes

    def finish(self, *, relative_path: str, **place: Any) -> StoredFile:
        """Write the checksums, fsync, read everything back, hash, rename. Returns the manifest's entry."""
        with self._undone_on_fault():
            for column in self._columns.values():
                self._flush(column)
                column.end_block()
                assert column.written == column.spec.nbytes, f"{column.spec.name}: fewer rows than planned"
                sums = np.asarray(column.checksums, dtype="<u4")
                files.write_at(self._fd, sums.tobytes(), self._stored[column.spec.name + CRC_SUFFIX].offset)
            files.sync(self._fd)
            nbytes = os.fstat(self._fd).st_size
            digest = self._read_back()
            fd, self._fd = self._fd, -1
            files.close(fd)
            files.publish(self.temporary, self.path)
        return StoredFile(relative_path, self.kind, nbytes, digest, self._stored, **place)

    def _read_back(self) -> str:
        """sha256 of the file as it now reads; every block must have the checksum it was written with."""
        for column in self._columns.values():
            for block, expected in enumerate(column.checksums):
                start = block * BLOCK_BYTES
                data = os.pread(self._fd, min(BLOCK_BYTES, column.spec.nbytes - start), column.offset + start)
                if zlib.crc32(data) != expected:
                    raise DamagedCacheError(
                        f"{self.temporary}: block {block} of {column.spec.name} reads back other bytes than were written",
                        tip="the disk or the network file system cannot be trusted; write the cache elsewhere",
                    )
        return sha256_of(self._fd)

    def discard(self) -> None:
        """Close and remove the unfinished file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self.temporary.unlink(missing_ok=True)

    @contextmanager
    def _undone_on_fault(self) -> Iterator[None]:
        """Remove the unfinished file when something goes wrong; a full disk gets its own name."""
        try:
            yield
        except BaseException as exc:
            self.discard()
            if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskSpaceError(
                    f"{self.path}: {os.strerror(exc.errno)}",
                    tip="free some space and run the same command again: finished shards are kept",
                ) from exc
            raise


def file_bytes(arrays: Sequence[ArraySpec]) -> int:
    """How long a shard of these data sets is, checksums included: an empty one is made and measured."""
    specs = [spec for array in arrays for spec in (array, array.checksums)]
    with tempfile.TemporaryDirectory(prefix="softcache-") as folder:
        _create(Path(folder) / "empty.h5", specs, "empty")  # allocated, but not filled: it takes no space
        return (Path(folder) / "empty.h5").stat().st_size


def write_shard(
    path: Path, arrays: Mapping[str, np.ndarray], *, kind: str, relative_path: str, tag: str = "0", **place: Any
) -> StoredFile:
    """Write one file at once (samples, probe, constants, dense rows): every array whole."""
    specs = [ArraySpec(name, a.dtype.newbyteorder("<").str, a.shape) for name, a in arrays.items()]
    writer = ShardWriter(path, specs, kind=kind, tag=tag)
    try:
        for name, array in arrays.items():
            writer.append(name, array)
        return writer.finish(relative_path=relative_path, **place)
    except BaseException:
        writer.discard()
        raise


def sha256_of(source: Path | int) -> str:
    """Hex sha256 of a file (by path or descriptor)."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC) if isinstance(source, Path) else source
    hasher, position = hashlib.sha256(), 0
    try:
        while data := os.pread(fd, READ_BYTES, position):
            hasher.update(data)
            position += len(data)
    finally:
        if isinstance(source, Path):
            os.close(fd)
    return hasher.hexdigest()


def structure_faults(path: Path, file: StoredFile) -> list[str]:
    """Where the HDF5 structure differs from the manifest's entry: the only place that opens HDF5 for reading.

    Call it after size and sha256 have matched.
    """
    faults = []
    try:
        with h5py.File(path, "r") as handle:
            if sorted(handle) != sorted(file.arrays):
                faults.append(f"holds the data sets {sorted(handle)}, the manifest names {sorted(file.arrays)}")
            for name in set(handle) & set(file.arrays):
                stored, found = file.arrays[name], handle[name]
                plain = isinstance(found, h5py.Dataset) and found.chunks is None and not found.external
                if not plain:
                    faults.append(f"{name!r} is not a contiguous data set")
                elif found.shape != stored.shape or found.dtype != np.dtype(stored.dtype):
                    faults.append(
                        f"{name!r} is {found.dtype} {found.shape}, the manifest says {stored.dtype} {stored.shape}"
                    )
                elif stored.nbytes and found.id.get_offset() != stored.offset:
                    faults.append(f"{name!r} lies at {found.id.get_offset()}, the manifest says {stored.offset}")
    except OSError as exc:
        faults.append(f"is not HDF5: {exc}")
    return faults


def bad_blocks(path: Path, file: StoredFile) -> Iterator[tuple[str, int]]:
    """(data set, block number) of every block whose CRC-32 differs from the one stored beside it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for name, stored in file.arrays.items():
            sums = file.arrays.get(name + CRC_SUFFIX)
            if sums is None:
                continue
            expected = np.frombuffer(os.pread(fd, sums.nbytes, sums.offset), "<u4")
            for block, crc in enumerate(expected.tolist()):
                start = block * BLOCK_BYTES
                if zlib.crc32(os.pread(fd, min(BLOCK_BYTES, stored.nbytes - start), stored.offset + start)) != crc:
                    yield name, block
    finally:
        os.close(fd)


def _create(path: Path, arrays: Sequence[ArraySpec], kind: str) -> dict[str, int]:
    """Create the empty file with every data set allocated, contiguous and aligned; returns name -> offset."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, ALIGNMENT)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)  # the root group's times would make equal inputs give other bytes
    handle = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    with h5py.File(handle) as file:
        file.attrs.create("softcache_format", FORMAT_VERSION, dtype="<u4")
        file.attrs.create("softcache_kind", np.bytes_(kind))
        offsets = {}
        for spec in arrays:
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            layout.set_obj_track_times(False)
            space = h5py.h5s.create_simple(spec.shape)
            kind_id = h5py.h5t.py_create(np.dtype(spec.dtype))
            dataset = h5py.h5d.create(file.id, spec.name.encode(), kind_id, space, dcpl=layout)
            offsets[spec.name] = 0 if spec.nbytes == 0 else int(dataset.get_offset())
    return offsets

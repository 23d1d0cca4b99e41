"""One HDF5 file: written whole or not at all.

h5py makes the empty, pre-allocated file in memory; its few blocks, and then the rows, are written with pwrite through the file
layer. The result is byte for byte what h5py would have written, and readers need only the offsets.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from softcache.cache.checksums import sha256_of
from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.schema import (
    ALIGNMENT,
    BLOCK_BYTES,
    CRC_SUFFIX,
    FORMAT_VERSION,
    MAX_SHARD_BYTES,
    ArraySpec,
    constants_path,
    numbered_constants_path,
)
from softcache.errors import DamagedCacheError
from softcache.files import durable
from softcache.files.durable import OpenFile

WRITE_ROWS = 1024  # rows gathered before one pwrite
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
        format: of the cache.

    Raises:
        DiskSpaceError: the file system cannot hold the file.
        DumpError: another fault of the file system.
    """

    def __init__(
        self, path: Path, arrays: Sequence[ArraySpec], *, kind: str, tag: str = "0", format: int = FORMAT_VERSION
    ) -> None:
        self.path, self.kind, self._format = path, kind, format
        self.temporary = path.with_name(f"{path.name}.tmp-{tag}")
        self._file: OpenFile | None = None
        specs = [spec for array in arrays for spec in (array, array.checksums)]
        empty = _empty_file(specs, kind, format)
        self._columns = {a.name: _Column(a, empty.offsets[a.name]) for a in arrays}
        self._stored = {s.name: StoredArray(empty.offsets[s.name], s.dtype, s.shape) for s in specs}
        durable.make_folder(path.parent)
        with self._undone_on_fault():
            self._file = durable.create(self.temporary)
            durable.set_size(self._file, empty.nbytes)
            durable.reserve(self._file, empty.nbytes)
            for offset, block in empty.blocks:
                durable.write_at(self._file, block, offset)

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
        assert self._file is not None
        assert column.written + data.nbytes <= column.spec.nbytes, f"{column.spec.name}: more rows than planned"
        with self._undone_on_fault():
            durable.write_at(self._file, data, column.offset + column.written)
        column.update(data)
        column.written += data.nbytes

    def finish(self, *, relative_path: str, **place: Any) -> StoredFile:
        """Write the checksums, fsync, read everything back, hash, rename. Returns the manifest's entry."""
        with self._undone_on_fault():
            assert self._file is not None
            for column in self._columns.values():
                self._flush(column)
                column.end_block()
                assert column.written == column.spec.nbytes, f"{column.spec.name}: fewer rows than planned"
                sums = np.asarray(column.checksums, dtype="<u4")
                durable.write_at(self._file, sums.tobytes(), self._stored[column.spec.name + CRC_SUFFIX].offset)
            durable.sync(self._file)
            with durable.explained("read", self.temporary):
                nbytes = os.fstat(self._file.fd).st_size
                digest = self._read_back(self._file.fd)
            if self._format != FORMAT_VERSION:
                place["checksums"] = self._digest_of_sums()
            finished, self._file = self._file, None
            durable.close(finished)
            durable.publish(self.temporary, self.path)
        return StoredFile(relative_path, self.kind, nbytes, digest, self._stored, **place)

    def _read_back(self, fd: int) -> str:
        """sha256 of the file as it now reads; every block must have the checksum it was written with."""
        for column in self._columns.values():
            for block, expected in enumerate(column.checksums):
                start = block * BLOCK_BYTES
                data = os.pread(fd, min(BLOCK_BYTES, column.spec.nbytes - start), column.offset + start)
                if zlib.crc32(data) != expected:
                    raise DamagedCacheError(
                        f"{self.temporary}: block {block} of {column.spec.name} reads back other bytes than were written",
                        tip="the disk or the network file system cannot be trusted; write the cache elsewhere",
                    )
        return sha256_of(fd)

    def _digest_of_sums(self) -> str:
        """sha256 of all checksums in the file, in order of their names."""
        hasher = sha256()
        for column in sorted(self._columns.values(), key=lambda column: column.spec.checksums.name):
            hasher.update(np.asarray(column.checksums, dtype="<u4").tobytes())
        return hasher.hexdigest()

    def discard(self) -> None:
        """Close and remove the unfinished file; nothing where it is finished."""
        file, self._file = self._file, None
        durable.abandon(self.temporary, file)

    @contextmanager
    def _undone_on_fault(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise


def file_bytes(arrays: Sequence[ArraySpec]) -> int:
    """How long a shard of these data sets is, checksums included."""
    return _empty_file([spec for array in arrays for spec in (array, array.checksums)], "empty", FORMAT_VERSION).nbytes


def write_shard(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    kind: str,
    relative_path: str,
    tag: str = "0",
    format: int = FORMAT_VERSION,
    **place: Any,
) -> StoredFile:
    """Write one file at once (samples, probe, constants, dense rows): every array whole."""
    specs = [ArraySpec(name, a.dtype.newbyteorder("<").str, a.shape) for name, a in arrays.items()]
    writer = ShardWriter(path, specs, kind=kind, tag=tag, format=format)
    try:
        for name, array in arrays.items():
            writer.append(name, array)
        return writer.finish(relative_path=relative_path, **place)
    except BaseException:
        writer.discard()
        raise


def write_plain(path: Path, data: bytes, relative_path: str, tag: str) -> StoredFile:
    """Write a file that is not HDF5, the tokenizer's: its entry binds all of its bytes."""
    durable.write_whole(path, data, tag=tag)
    digest = sha256(data).hexdigest()
    return StoredFile(relative_path, "tokenizer", len(data), digest, {}, checksums=digest)


def constants_files(
    member: str, constants: Mapping[str, np.ndarray], format: int
) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """(path, arrays) of the files that a member's constants lie in: of version 1 one, of version 2 none is too large."""
    if not constants:
        return
    if format == FORMAT_VERSION:
        yield constants_path(member), constants
        return
    pieces: list[dict[str, np.ndarray]] = [{}]
    room = MAX_SHARD_BYTES
    for name, array in constants.items():
        at, rows = 0, len(array)
        row_bytes = max(1, array.nbytes // max(1, rows))
        while at < rows or not rows:
            count = min(rows - at, room // row_bytes)
            if count == 0 and rows and (pieces[-1] or room < MAX_SHARD_BYTES):
                pieces.append({})
                room = MAX_SHARD_BYTES
                continue
            count = max(count, min(1, rows))
            pieces[-1][name] = array[at : at + count]
            at, room = at + count, max(0, room - count * row_bytes)
            if not rows:
                break
    for number, arrays in enumerate(pieces):
        yield numbered_constants_path(member, number), arrays


@dataclass(frozen=True)
class _EmptyFile:
    """A shard before its first row: what libhdf5 writes of itself, and where the data sets will lie."""

    nbytes: int
    blocks: Sequence[tuple[int, bytes]]
    offsets: Mapping[str, int]


class _Memory:
    """What libhdf5 takes for a file: keeps what is written, in order. No byte of the data sets is among it.

    A disk it does not see cannot fail it: a library that fails to close a file keeps it open, and tries again at exit.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[int, bytes]] = []
        self.nbytes = self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.nbytes}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: memoryview) -> int:
        self.blocks.append((self._position, bytes(data)))
        self.nbytes = max(self.nbytes, self.seek(len(data), os.SEEK_CUR))
        return len(data)

    def truncate(self, size: int) -> int:
        self.nbytes = size
        return size

    def flush(self) -> None:
        pass


def _empty_file(arrays: Sequence[ArraySpec], kind: str, format: int) -> _EmptyFile:
    """An empty file with every data set allocated, contiguous and aligned."""
    memory = _Memory()
    with _hdf5_file(memory) as file:
        file.attrs.create("softcache_format", format, dtype="<u4")
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
    return _EmptyFile(memory.nbytes, memory.blocks, offsets)


def _hdf5_file(memory: _Memory) -> h5py.File:
    # the property list must not outlive this function: at the end of the process h5py could no longer free its driver
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, ALIGNMENT)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, memory)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)  # the root group's times would make equal inputs give other bytes
    return h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access))

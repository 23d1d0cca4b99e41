"""Some bytes of a file of a place, and of them those blocks that are right."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softcache.cache.checksums import block_range, digest_of_sum_arrays
from softcache.cache.file_entry import StoredFile
from softcache.cache.schema import BLOCK_BYTES, CRC_SUFFIX
from softcache.errors import RemoteError
from softcache.remote.patience import Patience
from softcache.remote.transport import FleetingError, Transport
from softcache.remote.work import Work

PIECE_BLOCKS = 64  # 4 MiB at once
GAP = 8 << 10  # bytes between two lists of checksums that are fetched with them


@dataclass(frozen=True)
class Run:
    """Blocks [first, stop) of a data set of a file."""

    file: StoredFile
    name: str
    first: int
    stop: int

    @property
    def nbytes(self) -> int:
        return block_range(self.file, self.name, self.stop - 1)[1] - self.first * BLOCK_BYTES


def runs_of(file: StoredFile, name: str, blocks: Sequence[int]) -> list[Run]:
    """Blocks, ascending, as runs of neighbours."""
    found: list[Run] = []
    for block in blocks:
        if found and found[-1].stop == block and block - found[-1].first < PIECE_BLOCKS:
            found[-1] = Run(file, name, found[-1].first, block + 1)
        else:
            found.append(Run(file, name, block, block + 1))
    return found


def read_range(transport: Transport, path: str, start: int, stop: int, work: Work) -> bytearray:
    """Bytes [start, stop) of a file; what breaks off is gone on with.

    Raises:
        RemoteError: they cannot be had.
        NoRangesError: the other side gives whole files only.
    """
    data, size = bytearray(), stop - start
    patience = Patience(f"{transport.url}/{path}", work)
    while len(data) < size:
        patience.begins()
        try:
            for piece in transport.read(path, start + len(data), stop):
                data += piece
                work.add(len(piece))
                if len(data) >= size:
                    break
                patience.came(len(piece))
            if len(data) < size:
                raise FleetingError(f"it ended after {len(data):,} of {size:,} bytes")
        except FleetingError as exc:
            patience.failed(exc)
    return data[:size]


def read_checksums(transport: Transport, file: StoredFile, work: Work) -> dict[int, bytes]:
    """offset -> bytes: the checksums that lie in a file of version 2, which are those that the manifest names.

    Raises:
        RemoteError: they come with other bytes twice.
        NoRangesError: as `read_range`.
    """
    arrays = sorted((a for n, a in file.arrays.items() if n.endswith(CRC_SUFFIX)), key=lambda array: array.offset)
    for _ in range(2):
        found: dict[int, bytes] = {}
        waiting = [array for array in arrays if array.nbytes]
        while waiting:
            start = stop = waiting[0].offset
            together = []
            while waiting and waiting[0].offset - stop <= GAP:
                together.append(waiting.pop(0))
                stop = together[-1].offset + together[-1].nbytes
            data = bytes(read_range(transport, file.path, start, stop, work))
            found |= {one.offset: data[one.offset - start : one.offset - start + one.nbytes] for one in together}
        if digest_of_sum_arrays(file, lambda array: found.get(array.offset, b"")) == file.checksums:  # noqa: B023
            return found
    raise RemoteError(
        f"{transport.url}/{file.path}: its checksums came twice with other bytes than the manifest names",
        tip="whoever serves it has a damaged or a changed copy: ask for a whole one",
    )


def read_blocks(transport: Transport, run: Run, sums: np.ndarray, work: Work) -> bytearray:
    """The bytes of a run of blocks, each of which has its checksum; a bad one is asked for once more.

    Args:
        sums: (blocks,) of all the data set.

    Raises:
        RemoteError: a block comes with other bytes twice.
        NoRangesError: as `read_range`.
    """
    base = run.file.arrays[run.name].offset
    origin = run.first * BLOCK_BYTES
    data = read_range(transport, run.file.path, base + origin, base + origin + run.nbytes, work)
    for block in range(run.first, run.stop):
        start, stop = block_range(run.file, run.name, block)
        place = slice(start - origin, stop - origin)
        if zlib.crc32(memoryview(data)[place]) == sums[block]:
            continue
        data[place] = read_range(transport, run.file.path, base + start, base + stop, work)
        if zlib.crc32(memoryview(data)[place]) != sums[block]:
            raise RemoteError(
                f"{transport.url}/{run.file.path}: block {block} of data set {run.name!r} came twice with other bytes than its "
                "checksum says",
                tip="whoever serves it has a damaged or a changed copy: ask for a whole one",
            )
    return data

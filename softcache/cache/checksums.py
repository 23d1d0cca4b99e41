"""Are these still the bytes that were written? A sha256 tells of a whole file, one CRC-32 per 64 KiB of a data set says where."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np

from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.schema import BLOCK_BYTES, CRC_SUFFIX, FORMAT_VERSION
from softcache.cache.source import Source, Touched

CheckBlocks = Literal["first", "always", "never"]  # when a gather looks at the checksums of the blocks it touches
CHECK_BLOCKS = ("first", "always", "never")

Bytes = Any  # whatever zlib.crc32 takes
READ_BYTES = 1 << 20


def sha256_of(fd: int, *, stop: Callable[[], bool] = lambda: False) -> str:
    """Hex sha256 of an open file; of its beginning alone once `stop` says that nobody waits for it."""
    hasher, position, buffer = sha256(), 0, memoryview(bytearray(READ_BYTES))
    while not stop() and (count := os.preadv(fd, [buffer], position)):
        hasher.update(buffer[:count])
        position += count
    return hasher.hexdigest()


@dataclass(frozen=True)
class Damage:
    """A block whose bytes are not those that were written.

    Attributes:
        file, data_set, block: where it is.
        rows, views: [start, stop) of the cache's rows and views that lie in it; None where the file is no table of them.
    """

    file: str
    data_set: str
    block: int
    rows: tuple[int, int] | None = None
    views: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"data set {self.data_set!r}, block {self.block}"
        if self.rows is not None:
            text += f", rows {self.rows[0]} to {self.rows[1] - 1}"
        if self.views is not None:
            text += f" of view{'s' if self.views[1] - self.views[0] > 1 else ''} {_listed(self.views)}"
        return f"{text}: its bytes are not those that were written"


def _listed(views: tuple[int, int]) -> str:
    return f"{views[0]} to {views[1] - 1}" if views[1] - views[0] > 1 else str(views[0])


def damage_of(file: StoredFile, name: str, block: int) -> Damage:
    """What a block of a data set holds."""
    shape = file.arrays[name].shape
    if file.kind == "samples" and name not in ("key_bytes", "key_offsets"):
        first, last = _records(file, name, block, shape[0])
        return Damage(file.path, name, block, (first, last + 1))
    if file.rows is None or file.views is None or file.kind == "dense":
        return Damage(file.path, name, block)
    rows = file.rows[1] - file.rows[0]
    if is_indexed(file, name):  # which rows they are, its index knows
        return Damage(file.path, name, block, file.rows, file.views)
    first, last = _records(file, name, block, shape[0] * rows)
    views = (file.views[0] + first // rows, file.views[0] + last // rows + 1)
    one_view = views[1] - views[0] == 1
    chosen = (first % rows, last % rows + 1) if one_view else (0, rows)
    return Damage(file.path, name, block, (file.rows[0] + chosen[0], file.rows[0] + chosen[1]), views)


def is_indexed(file: StoredFile, name: str) -> bool:
    """Whether a data set of a part has one record a position: its first axes are not the part's views and rows."""
    assert file.rows is not None and file.views is not None
    place = (file.views[1] - file.views[0], file.rows[1] - file.rows[0])
    return file.format != FORMAT_VERSION and file.arrays[name].shape[:2] != place


def _records(file: StoredFile, name: str, block: int, count: int) -> tuple[int, int]:
    """The first and the last record that a block has bytes of."""
    size = file.arrays[name].nbytes // count
    return block * BLOCK_BYTES // size, min(((block + 1) * BLOCK_BYTES - 1) // size, count - 1)


def read_sums(fd: int, file: StoredFile, name: str) -> np.ndarray:
    """(blocks,) uint32 checksums of a data set, as the file holds them."""
    stored = file.arrays[name + CRC_SUFFIX]
    return np.frombuffer(os.pread(fd, stored.nbytes, stored.offset), "<u4")


def digest_of_sums(fd: int, file: StoredFile) -> str:
    """Hex sha256 of the checksums that lie in a file, data set after data set in order of name: what binds it in version 2."""
    names = sorted(name for name in file.arrays if name.endswith(CRC_SUFFIX))
    if not names:
        return sha256_of(fd)  # it has no data sets: of the whole file
    return digest_of_sum_arrays(file, lambda stored: os.pread(fd, stored.nbytes, stored.offset))


def digest_of_sum_arrays(file: StoredFile, read: Callable[[StoredArray], bytes]) -> str:
    """The same, of checksums that may lie somewhere else; of a file that has some."""
    hasher = sha256()
    for name in sorted(name for name in file.arrays if name.endswith(CRC_SUFFIX)):
        hasher.update(read(file.arrays[name]))
    return hasher.hexdigest()


def block_range(file: StoredFile, name: str, block: int) -> tuple[int, int]:
    """[start, stop) of a block within its data set."""
    return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, file.arrays[name].nbytes)


def check_block(
    file: StoredFile, name: str, block: int, wanted: int, read: Callable[[], Bytes], source: Source | None
) -> None:
    """Raise BadBlock unless a block has its checksum; where it was fetched, it is fetched once more before."""
    if zlib.crc32(read()) == wanted:
        return
    if source is None or not source.again(file, name, block) or zlib.crc32(read()) != wanted:
        raise BadBlock(damage_of(file, name, block))


def bad_blocks(fd: int, file: StoredFile, name: str) -> Iterator[int]:
    """The blocks of a data set whose CRC-32 differs from the one stored beside it."""
    stored = file.arrays[name]
    for block, crc in enumerate(read_sums(fd, file, name).tolist()):
        start = block * BLOCK_BYTES
        if zlib.crc32(os.pread(fd, min(BLOCK_BYTES, stored.nbytes - start), stored.offset + start)) != crc:
            yield block


class BadBlock(Exception):
    """A gather touched a damaged block; whoever knows the samples makes a DamagedCacheError of it."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(str(damage))
        self.damage = damage


class BlockChecks:
    """The blocks of one data set over all its shards: which are known to be whole.

    Args:
        files: the shards.
        name: the data set.
        sums: of each shard.
        when: "first" looks at a block when it is first touched, "always" each time, "never" not at all.
        source: fetches the blocks, where they are not here.
    """

    def __init__(
        self,
        files: Sequence[StoredFile],
        name: str,
        sums: Sequence[np.ndarray],
        when: CheckBlocks,
        source: Source | None = None,
    ) -> None:
        self._files, self._name, self._source = files, name, source
        self._always = when == "always"
        self._sums = np.concatenate(sums)
        self._starts = np.cumsum([0, *map(len, sums)])  # the first block of each shard in `_sums`
        first = files[0].arrays[name]
        self._record_bytes = first.nbytes // (first.shape[0] * first.shape[1])
        self._reach = np.arange(2 + self._record_bytes // BLOCK_BYTES)  # no record touches more blocks
        self._known = np.zeros(len(self._sums), bool)
        self.pending = when != "never"  # whether a gather has to ask

    def check(self, shards: np.ndarray, records: np.ndarray, read: Callable[[int, int, int], Bytes]) -> None:
        """Look at the blocks of (B,) records within their shards; BadBlock for the first damaged one.

        Args:
            read: (shard, start, stop) -> these bytes of the data set there.
        """
        starts, first = self._starts[shards], records * self._record_bytes
        last = starts + (first + self._record_bytes - 1) // BLOCK_BYTES
        touched = np.minimum((starts + first // BLOCK_BYTES)[:, None] + self._reach, last[:, None]).reshape(-1)
        unknown = np.unique(touched[~self._known[touched]])
        if self._source is not None and len(unknown):
            self._source.need([self._touched(block) for block in unknown.tolist()])
        for block in unknown.tolist():
            self._check_block(block, read)
            self._known[block] = not self._always
        self.pending = self._always or not self._known.all()

    def _touched(self, block: int) -> Touched:
        shard = int(np.searchsorted(self._starts, block, side="right")) - 1
        return Touched(self._files[shard], self._name, (block - int(self._starts[shard]),))

    def _check_block(self, block: int, read: Callable[[int, int, int], Bytes]) -> None:
        shard = int(np.searchsorted(self._starts, block, side="right")) - 1
        number = block - int(self._starts[shard])
        start, stop = block_range(self._files[shard], self._name, number)
        check_block(
            self._files[shard], self._name, number, self._sums[block], lambda: read(shard, start, stop), self._source
        )

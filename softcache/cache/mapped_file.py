"""One file of a cache in memory: its data sets as arrays, their blocks checked."""

from __future__ import annotations

import mmap
import os

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.checksums import BadBlock, block_range, check_block
from softcache.cache.file_entry import StoredFile
from softcache.cache.schema import CRC_SUFFIX
from softcache.errors import DamagedCacheError

REPAIR = (
    "`softcache verify --full` lists all that is damaged; `softcache repair` makes it again, or copy the cache again"
)


FETCH_AGAIN = "run it again: the file is fetched anew; `softcache store prune` empties the store"


def tip_for(files: BoundFiles) -> str:
    """What to do about damage."""
    return REPAIR if files.source is None else FETCH_AGAIN


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
        self._files = files
        try:
            fd = files.open(file)
        except BadBlock as exc:
            raise DamagedCacheError(f"{self.path}: {exc.damage}", tip=tip_for(files)) from None
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
            start, stop = block_range(self.file, name, block)
            try:
                check_block(self.file, name, block, crc, lambda: data[start:stop], self._files.source)  # noqa: B023
            except BadBlock as exc:
                raise DamagedCacheError(f"{self.path}: {exc.damage}", tip=tip_for(self._files)) from None

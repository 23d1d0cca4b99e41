"""Several files in one stretch of memory: the records of all shards become one array, and a gather one call.

Shard data starts on a page border and, but for the last shard, usually fills whole pages; then the files can be mapped back
to back with mmap(MAP_FIXED) inside a reserved range. Where that is not so, the reader takes shard by shard: same result,
three times slower with 64 shards.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MAP_FIXED = 0x10
_WILL_NEED = 3
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_HUGE = 2**21
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class Piece:
    """Bytes [offset, offset + nbytes) of a file."""

    offset: int
    nbytes: int


def fits_back_to_back(pieces: Sequence[Piece]) -> bool:
    """Whether every piece starts on a page border and all but the last fill whole pages."""
    page = mmap.PAGESIZE
    return (
        sys.platform == "linux"
        and all(piece.offset % page == 0 and piece.nbytes > 0 for piece in pieces)
        and all(piece.nbytes % page == 0 for piece in pieces[:-1])
    )


class BackToBack:
    """The pieces, mapped read-only one after the other; unmapped when the last array into them is gone.

    `memory` is what NumPy may view. OSError when the kernel refuses.

    Args:
        pieces: for which `fits_back_to_back` holds.
        open_piece: piece number -> descriptor; closed again at once, so that any number of shards needs one.
    """

    def __init__(self, pieces: Sequence[Piece], open_piece: Callable[[int], int]) -> None:
        assert fits_back_to_back(pieces)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        total = sum(piece.nbytes for piece in pieces)
        reserved = libc.mmap(None, total + _HUGE, 0, _PRIVATE_ANONYMOUS, -1, 0)  # no access, no memory
        if reserved == _FAILED:
            raise _last_error("reserving address space")
        # address and file offset congruent, as the kernel itself would place a large file: pages that lie together on
        # both sides share a TLB entry, which makes a random gather a third faster
        base = reserved + (pieces[0].offset - reserved) % _HUGE
        self.memory = (ctypes.c_char * total).from_address(base)
        # arrays keep the buffer object alive, so its end is the end of the last of them
        weakref.finalize(
            self.memory, libc.munmap, reserved, total + _HUGE
        ).atexit = False  # threads may still read then
        place = base
        for number, piece in enumerate(pieces):
            fd = open_piece(number)
            try:
                flags = mmap.MAP_SHARED | _MAP_FIXED
                if libc.mmap(place, piece.nbytes, mmap.PROT_READ, flags, fd, piece.offset) == _FAILED:
                    raise _last_error("mapping a shard")
            finally:
                os.close(fd)
            place += piece.nbytes
        self._madvise, self._base = libc.madvise, base

    def will_need(self, start: int, stop: int) -> None:
        """Let the kernel fetch these bytes of the whole while others are looked at."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._madvise(self._base + first, stop - first, _WILL_NEED)


def _last_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")

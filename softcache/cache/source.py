"""Where the files of a cache come from that lies somewhere else: they are fetched as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from softcache.cache.file_entry import StoredFile


class Touched(NamedTuple):
    """Blocks of one data set of a file that somebody is about to read: numbers from 0 on, perhaps with repeats."""

    file: StoredFile
    name: str
    blocks: Sequence[int]


class Source(Protocol):
    """What a reader asks for before it reads. It pickles, and may be used from several threads.

    What comes is right when it is there: a whole file has the manifest's sha256; of a file with holes the checksums of its blocks
    have the sha256 that the manifest names, and each block has its checksum.

    Attributes:
        where: the place, for messages.
        sparing: only what is asked for is fetched, so that a reader opens parts when it touches them.
    """

    where: str
    sparing: bool

    def prepare(self, files: Sequence[StoredFile]) -> None:
        """Have these ready to be opened, several at once. Raises RemoteError, DiskSpaceError."""
        ...

    def open(self, file: StoredFile) -> int:
        """A read-only descriptor of that very file, of the manifest's size; it may have holes. Errors as of `prepare`."""
        ...

    def need(self, touched: Sequence[Touched]) -> None:
        """Have these blocks there when it returns.

        Raises:
            RemoteError: they cannot be had, or come with other bytes twice.
        """
        ...

    def again(self, file: StoredFile, name: str, block: int) -> bool:
        """A block that was there has other bytes than were written: fetch it anew. False where only a new start can do so."""
        ...

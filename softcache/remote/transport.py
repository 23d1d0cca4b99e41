"""What a place can do: a few functions over names in one folder. What is read here is trusted by nobody: it is hashed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from softcache.errors import RemoteError

PIECE = 1 << 16  # bytes that are read at once


class NotThereError(RemoteError):
    """There is no such file."""


class FleetingError(Exception):
    """Something that may be over when it is tried again.

    Attributes:
        after_s: how long the other side asks to wait.
        hopeless: it is seldom over soon: nobody answers there at all.
    """

    def __init__(self, why: str, after_s: float = 0.0, *, hopeless: bool = False) -> None:
        super().__init__(why)
        self.after_s, self.hopeless = after_s, hopeless


class NoRangesError(Exception):
    """A server that gives whole files only."""


@dataclass(frozen=True)
class Sending:
    """A file of this machine, and the name and the hex sha256 that it has there."""

    path: str
    source: Path
    sha256: str


class Transport(Protocol):
    """One folder somewhere else. Paths are relative, with `/`. Safe to use from several threads.

    Attributes:
        url: for messages.
    """

    url: str

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Bytes [start, stop) of a file in pieces of at most PIECE; perhaps fewer than asked for, never others.

        Raises:
            NotThereError: no such file.
            FleetingError: it may work when it is tried again; pieces that came before are right as far as anybody knows.
            NoRangesError: `start` is not 0, and only whole files can be had.
            RemoteError: it will not work.
        """
        ...


class WritableTransport(Transport, Protocol):
    """One to which a cache can be pushed.

    Attributes:
        at_once: files that are best sent in one call.
    """

    at_once: int

    def claim(self, id: str) -> AbstractContextManager[None]:
        """While it lasts nobody else pushes there, as far as the place can see to that.

        Raises:
            RemoteError: somebody does, or what lies there is neither a cache, nor nothing, nor a push of this id that was cut.
        """
        ...

    def require_room(self, nbytes: int) -> None:
        """Raise DiskSpaceError where the place knows that there is less."""
        ...

    def size(self, path: str) -> int | None:
        """Of a file; None where there is none."""
        ...

    def digest(self, path: str) -> str | None:
        """Hex sha256 of a file as far as the other side can tell it; None where it cannot, or where there is no such file."""
        ...

    def put(self, files: Sequence[Sending], note: Callable[[int], None]) -> None:
        """Files, each under its name whole or not at all.

        Args:
            note: is told the bytes that are through.
        """
        ...

    def publish(self, create: Mapping[str, bytes], replace: Mapping[str, bytes], was: bytes | None) -> bool:
        """The last step: small files that make everything visible.

        Args:
            create: files that are not there, or have these bytes already.
            replace: files that may be there; the last of them makes the cache visible.
            was: the bytes that the last of them has had; None: it was not there.

        Returns:
            False where another one came first: nothing is replaced then.
        """
        ...

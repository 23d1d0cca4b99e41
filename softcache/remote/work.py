"""Several files at once: what is done is counted, and the first fault, or Ctrl-C, ends them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event, Lock
from typing import TypeVar

AT_ONCE = 8  # files

Item = TypeVar("Item")


class StoppedError(Exception):
    """Something else went wrong, and nobody waits for this any more."""


class Work:
    """What several threads do together.

    Args:
        note: is told of bytes that are done, by one thread at a time.
    """

    def __init__(self, note: Callable[[int], None] = lambda nbytes: None) -> None:
        self._note, self._lock, self._stopped = note, Lock(), Event()

    def add(self, nbytes: int) -> None:
        """So many bytes are done, less than nothing where they were wrong; StoppedError where nobody waits."""
        if self._stopped.is_set():
            raise StoppedError
        with self._lock:
            self._note(nbytes)

    def sleep(self, seconds: float) -> None:
        """Wait; StoppedError as soon as nobody waits."""
        if self._stopped.wait(seconds):
            raise StoppedError

    def over(self, items: Iterable[Item], do: Callable[[Item], None]) -> None:
        """Do it with each item, several at once; the first fault is raised when all have ended."""
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for done in as_completed([pool.submit(do, one) for one in items]):
                done.result()
        finally:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

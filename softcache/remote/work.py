"""Several files at once: what is done is counted, and the first fault, or Ctrl-C, ends them all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TypeVar

AT_ONCE = 8  # files
LEAVE_S = 1.0  # that a stopped thread is waited for: what it still does gives no file a name

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

    def part(self, note: Callable[[int], None]) -> Work:
        """A part of it that is counted by itself, and ends with all of it."""
        one = Work(note)
        one._stopped = self._stopped
        return one

    def add(self, nbytes: int) -> None:
        """So many bytes are done, less than nothing where they were wrong; StoppedError where nobody waits."""
        self.check()
        with self._lock:
            self._note(nbytes)

    def check(self) -> None:
        """StoppedError where nobody waits any more."""
        if self._stopped.is_set():
            raise StoppedError

    def sleep(self, seconds: float) -> None:
        """Wait; StoppedError as soon as nobody waits."""
        if self._stopped.wait(seconds):
            raise StoppedError

    def over(self, items: Iterable[Item], do: Callable[[Item], None]) -> None:
        """Do it with each item, several at once. The first fault is raised at once; the threads die with this process."""
        waiting = deque(items)
        total, ended = len(waiting), SimpleQueue[BaseException | None]()

        def work() -> None:
            while not self._stopped.is_set():
                try:
                    one = waiting.popleft()
                except IndexError:
                    return
                try:
                    do(one)
                except BaseException as exc:
                    ended.put(exc)
                    return
                ended.put(None)

        threads = [Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, total))]
        try:
            for thread in threads:
                thread.start()
            for _ in range(total):
                fault = ended.get()
                if fault is not None:
                    raise fault
        except BaseException:
            self._stopped.set()
            for thread in threads:
                if thread.ident is not None:  # a signal may come before all of them are started
                    thread.join(LEAVE_S / AT_ONCE)
            raise
        for thread in threads:
            thread.join()

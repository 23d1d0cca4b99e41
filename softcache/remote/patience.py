"""How long something is tried again: with pauses that grow, and an end."""

from __future__ import annotations

import random
import time

from softcache.errors import RemoteError
from softcache.remote.transport import FleetingError
from softcache.remote.work import Work

HOPELESS_S = 40.0  # without any progress; with one last try of STALL_S that is less than a minute
NOBODY_S = 5.0  # where nobody answers at all
STALL_S = 7.0  # in which nothing comes at all
HEAD_S = 12.0  # for the head of an answer, all of it
SLOW_S, LEAST = 15.0, 1 << 16  # seconds in which so many bytes have to come
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.3, 8.0


class Patience:
    """With one file of one place.

    Args:
        what: the file, for messages.
        work: that it is a part of.
    """

    def __init__(self, what: str, work: Work) -> None:
        self.what, self._work = what, work
        self._pause, self._came = FIRST_PAUSE_S, 0
        self._moved = self._since = time.monotonic()

    def begins(self) -> None:
        """A new try: it has its own time to send LEAST bytes."""
        self._since, self._came = time.monotonic(), 0

    def came(self, nbytes: int) -> None:
        """So much came; FleetingError where that is next to nothing."""
        now = time.monotonic()
        self._came += nbytes
        if self._came >= LEAST:
            self._moved = self._since = now
            self._pause, self._came = FIRST_PAUSE_S, 0
        elif now - self._since > SLOW_S:
            raise FleetingError(f"{self._came} bytes in {now - self._since:.0f} s")

    def failed(self, fault: FleetingError) -> None:
        """Wait before the next try.

        Raises:
            RemoteError: nothing has come for too long.
        """
        pause = max(fault.after_s, self._pause * random.uniform(0.75, 1.25))
        limit = NOBODY_S if fault.hopeless else HOPELESS_S
        if time.monotonic() + pause - self._moved > limit:
            raise RemoteError(
                f"{self.what}: {fault}; tried again for {time.monotonic() - self._moved:.0f} s",
                tip="run the same command again: it goes on where it stopped",
            ) from None
        self._work.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)

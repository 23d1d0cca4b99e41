"""SIGTERM and Ctrl-C while a student learns: the run is saved where it stands, and then the signal takes its course."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from softcache.signals import GRACE_S, in_an_import
from softcache.train.checkpoint import CHECKPOINT
from softcache.train.ranks import ALONE, Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STARTS_AGAIN = "nothing was learned yet; the same command starts again"
TWICE_S = 0.5  # two signals within this are one: `timeout` sends its own to the process and to the group


class Asked(BaseException):
    """Somebody asked the run to stop. Raised where it can be saved as it stands: between two steps, on all ranks."""


class Stop:
    """While it is entered, the two signals are held back, and heeded where that costs nothing of what was learned.

    A step or a write is finished first. A step that is still under way after GRACE_S is given up, and so is everything after
    a second Ctrl-C; the run then stands at its last checkpoint. A signal that is ignored stays so, and outside the main thread
    none is touched.

    Attributes:
        asked: the number of the signal that came; 0 = none.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks, self.asked = ranks, 0
        self._open, self._since = False, 0.0
        self._before: dict[int, Any] = {}
        self._vote: Callable[[], int] | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            found = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self._before = {signum: one for signum, one in found.items() if one not in (signal.SIG_IGN, None)}
            for signum in self._before:
                signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            if self._vote is not None:
                self._vote()
            self.asked = max(self.ranks.everyone(self.asked))
        self._put_back()
        if kind is None and self.asked:
            self.leave()

    def _note(self, signum: int, frame: Any) -> None:
        """The handler of both signals."""
        if in_an_import(signum, frame):
            return
        if self.asked:
            past = time.monotonic() - self._since
            if past >= GRACE_S or (signum == self.asked == signal.SIGINT and past >= TWICE_S):
                self._put_back()
                self.leave()
            return
        self.asked, self._since = signum, time.monotonic()
        if self._open:
            raise Asked
        self._timer = threading.Timer(GRACE_S, signal.pthread_kill, (threading.main_thread().ident, signum))
        self._timer.daemon = True
        self._timer.start()

    def _put_back(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before = {}

    @contextmanager
    def opened(self, wanted: bool = True) -> Iterator[None]:
        """What may be broken off anywhere: the signals raise `Asked` in here, if that is wanted."""
        before, self._open = self._open, wanted
        try:
            self._heed()
            yield
        finally:
            self._open = before

    @contextmanager
    def held(self) -> Iterator[None]:
        """What must be whole, within what may be broken off."""
        before, self._open = self._open, False
        try:
            yield
        finally:
            self._open = before
        self._heed()

    def _heed(self) -> None:
        if self.asked and self._open:
            raise Asked

    def together(self) -> None:
        """Between two steps of several ranks, on each of them: raise `Asked` on all where one was asked.

        They vote at every call, and look at the votes of the call before: nobody waits for an answer.
        """
        if self.ranks.size == 1:
            return
        before, self._vote = self._vote, self.ranks.largest(self.asked)
        if before is not None and (asked := before()):
            self.asked = asked
            raise Asked

    def leave(self, note: str = "") -> NoReturn:
        """Let the signal do what it would have done without us; what it raises gets the note."""
        self._put_back()
        try:
            signal.raise_signal(self.asked)
            raise SystemExit(128 + self.asked)  # somebody's own handler lets us go on, and the run has been ended
        except BaseException as exc:
            if note:
                exc.add_note(note)
            raise


@contextmanager
def told_where_it_stands(out: Path) -> Iterator[None]:
    """Whoever ends a run by a signal is told what of it is on the disk."""
    try:
        yield
    except Exception:
        raise
    except BaseException as exc:
        if not getattr(exc, "__notes__", []):
            saved = os.path.lexists(out / CHECKPOINT)
            exc.add_note(f"the same command goes on from the checkpoint in {out}" if saved else STARTS_AGAIN)
        raise

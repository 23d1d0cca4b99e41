"""Ctrl-C and SIGTERM: as exceptions, but not out of an import, whose C code may swallow one or abort; or as the end at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE_S = 8.0  # what is held back is held so long at most: schedulers kill ten seconds after SIGTERM, or later
AGAIN_S = 0.05  # between two looks whether the import has ended
IMPORT = "<frozen importlib._bootstrap>"

_since: dict[int, float] = {}  # signals that wait for the end of an import, and since when


def in_an_import(signum: int, frame: FrameType | None) -> bool:
    """Whether a signal came while a module is being imported. Then its handler is called again soon, and has to do nothing now.

    After GRACE_S it is no longer held back: a user's file may do all of its work while it is imported.
    """
    since = _since.setdefault(signum, time.monotonic())
    if time.monotonic() - since < GRACE_S and _importing(frame):
        signal.signal(signal.SIGALRM, _again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        return True
    del _since[signum]
    return False


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False


def _again(_: int, __: FrameType | None) -> None:
    for signum in tuple(_since):
        signal.raise_signal(signum)


@contextmanager
def kills(signums: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """While it is entered, these signals end the process at once, as they would without Python; nothing may be half done.

    For a wait in C code, after which alone a handler would run. A signal that is ignored stays so, and outside the main
    thread none is touched.
    """
    here = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in signums if here}
    before = {signum: one for signum, one in before.items() if one not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum, one in before.items():
            signal.signal(signum, one)


@contextmanager
def raised(exceptions: Mapping[int, Callable[[], BaseException]]) -> Iterator[None]:
    """While it is entered, each of these signals raises its exception; afterwards they are handled as before.

    A signal that is ignored, or that somebody else handles, stays so, and outside the main thread none is touched.
    """

    def handler(signum: int, frame: FrameType | None) -> None:
        if not in_an_import(signum, frame):
            raise exceptions[signum]()

    before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in (*exceptions, signal.SIGALRM)}
    try:
        for signum in exceptions:
            if before[signum] in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(signum, handler)
    except ValueError:  # not the main thread: somebody else's signals
        before = {}
    try:
        yield
    finally:
        if before and _since:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _since.clear()
        for signum, one in before.items():
            if one is not None:
                signal.signal(signum, one)

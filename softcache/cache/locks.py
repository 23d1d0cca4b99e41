"""Advisory locks that end with the process that took them, however it ends, and are not kept alive by its loader workers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_HELD: set[int] = set()


def take_lock(path: Path) -> int:
    """A descriptor that holds the file's lock; BlockingIOError when another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    _HELD.add(fd)
    return fd


def release_lock(fd: int) -> None:
    _HELD.discard(fd)
    os.close(fd)


def _forget_in_child() -> None:
    # a forked worker would hold its dead parent's lock for as long as it takes to notice, and the resume be refused
    for fd in _HELD:
        os.close(fd)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)

"""Advisory locks that end with the process that took them, however it ends, and are not kept alive by its loader workers."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softcache.errors import DumpError, SoftcacheError
from softcache.files import durable
from softcache.files.durable import OpenFile
from softcache.files.inside import open_inside

try:
    import fcntl
except ImportError:  # not a POSIX system: caches are read there, and nothing is written that needs a lock
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
HOLDER = re.compile(r"host [^\x00-\x1f]{1,255}, pid [0-9]{1,10}, since [0-9T:+-]{1,32}")
UNKNOWN = "one that has not said its name"

_HELD: set[OpenFile] = set()


def take_lock(path: Path, *, wait: bool = False, shared: bool = False) -> OpenFile:
    """The lock of a file, made when it is not there, until `release_lock` or the end of this process.

    A file that a dead process left behind is simply taken: the kernel knows that nobody holds it.

    Args:
        shared: others may share it, and nobody has it alone meanwhile.

    Raises:
        BlockingIOError: another process has it; with `wait`, its end is waited for instead.
        DumpError: the file system, or this platform, cannot lock.
    """
    if fcntl is None:
        raise DumpError(
            f"{path}: cannot be locked: Python on {sys.platform} has no module 'fcntl', and without a lock two processes could "
            "write the same files at once",
            tip="dump, train and repair on Linux; a finished cache can be read here",
        )
    file = durable.open_or_create(path)
    try:
        fcntl.flock(file.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BaseException as exc:
        _close(file)
        if not isinstance(exc, OSError) or isinstance(exc, BlockingIOError):
            raise
        if exc.errno in NO_LOCKS:
            raise DumpError(
                f"{path}: this file system has no locks ({exc.strerror}): two processes could write the same files at once, "
                "and neither would notice",
                tip="write to a local disk, and copy the finished folder to its place",
            ) from exc
        with durable.explained("flock", path):
            raise
    _HELD.add(file)
    return file


def release_lock(file: OpenFile) -> None:
    _HELD.discard(file)
    _close(file)


def keep_shared(path: Path) -> None:
    """Share a lock until this process, and every one that it forked, has ended."""
    _HELD.discard(take_lock(path, wait=True, shared=True))


@contextmanager
def waiting_lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock; wait for whoever holds it."""
    file = take_lock(path, wait=True, shared=shared)
    try:
        yield
    finally:
        release_lock(file)


def sign(file: OpenFile) -> None:
    """Write into a lock that this process holds who that is, for `holder_of`; not where the file has a second name."""
    if durable.has_other_names(file):
        return
    text = f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
    durable.set_size(file, 0)
    durable.write_at(file, text.encode("utf-8", "replace"), 0)


def holder_of(path: Path) -> str:
    """`host, pid, since` of whoever holds a lock, as it was signed; whatever else the file may hold is not shown."""
    try:
        with os.fdopen(open_inside(path.parent, path.name), "rb") as handle:
            text = handle.read(400).decode("utf-8", "replace").strip()
    except (OSError, SoftcacheError):
        return UNKNOWN
    return text if HOLDER.fullmatch(text) else UNKNOWN


def _close(file: OpenFile) -> None:
    with suppress(SoftcacheError):  # the lock is gone in any case, and nothing was written that could be lost
        durable.close(file)


def _forget_in_child() -> None:
    # a forked worker would hold its dead parent's lock for as long as it takes to notice, and the resume be refused
    for file in _HELD:
        os.close(file.fd)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)

"""The file layer: every write-side system call of a cache goes through these few functions, which fault tests replace."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def open_for_writing(path: Path) -> int:
    """A descriptor of an existing file, for `write_at`."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def reserve(fd: int, size: int) -> None:
    """Have the file system set aside `size` bytes, so that a full disk shows before the first row is written."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync(fd: int) -> None:
    os.fsync(fd)


def close(fd: int) -> None:
    os.close(fd)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, and make the name durable."""
    os.replace(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and make their names durable."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file aside, fsync, rename: after a crash there is the old file or the new one."""
    # processes on two machines may share a folder and a pid
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_at(fd, data, 0)
            sync(fd)
        finally:
            close(fd)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: bytes) -> None:
    """Append one line to a journal, durably."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        # a line torn by a crash is closed off first, so that it cannot swallow this one
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + line + b"\n"
        if os.write(fd, data) != len(data):  # a full disk may take a part of it without an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(fd)
    finally:
        close(fd)
    if size == 0:
        sync_folder(path.parent)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free

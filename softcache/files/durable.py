"""The file layer: every system call that changes a cache or a run folder is made here, and every fault of one gets a name here.

No other module opens a file of theirs for writing. Each call stands in `os`, this module's name for it: fault tests put another
`os` in its place, and see, stop or fail whatever a dump does to a disk.

A file is written under a name that this process created itself, and renamed when it is whole: neither follows a link. Folders
that are links are refused by `files/inside.py` before anything is written below them.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from softcache.errors import DiskSpaceError, DumpError, SoftcacheError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
FILE, FOLDER = 0o664, 0o775  # nothing that everyone may write, whatever the umask allows
WRONG_NAME = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True)
class OpenFile:
    """A descriptor, and the path that an error of it names."""

    fd: int
    path: Path


@contextmanager
def explained(call: str, path: Path) -> Iterator[None]:
    """The one place where a fault of the file system becomes an error of ours, naming path and call.

    Raises:
        DiskSpaceError: full, over quota, or over the largest size of a file.
        DumpError: anything else.
    """
    try:
        yield
    except OSError as exc:
        what = f"{path}: {exc.strerror or exc} ({call})"
        if exc.errno in NO_ROOM:
            tip = "free some space and run the same command again: what was finished is kept"
            raise DiskSpaceError(what, tip=tip) from exc
        if exc.errno in NOT_WRITABLE:
            tip = "make the folder writable and run the same command again, or choose another --out; what was finished is kept"
            raise DumpError(f"{path}: not writable: {exc.strerror} ({call})", tip=tip) from exc
        if exc.errno in WRONG_NAME:
            raise DumpError(what, tip="choose another --out; below it, links are not followed") from exc
        tip = (
            "what was finished is kept: once the disk or the network file system works again, the same command resumes"
        )
        raise DumpError(what, tip=tip) from exc


def _open(path: Path, flags: int) -> OpenFile:
    with explained("open", path):
        return OpenFile(os.open(path, flags | os.O_CLOEXEC, FILE), path)


def create(path: Path) -> OpenFile:
    """A new, empty file. What a killed process left under this name, or whatever else has it, loses the name first.

    So nothing is written through a link, symbolic or hard, that was put there before.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with explained("open", path):
        try:
            return OpenFile(os.open(path, flags, FILE), path)
        except FileExistsError:
            pass
    remove(path)
    return _open(path, flags)


def open_again(path: Path) -> OpenFile:
    """A file that is there, to change some of its bytes."""
    return _open(path, os.O_RDWR | os.O_NOFOLLOW)


def open_or_create(path: Path) -> OpenFile:
    """A file as it is, for a lock."""
    return _open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)


def has_other_names(file: OpenFile) -> bool:
    """Whether the file has a second name (a hard link), under which it is perhaps somebody else's."""
    with explained("stat", file.path):
        return os.fstat(file.fd).st_nlink > 1


def set_size(file: OpenFile, size: int) -> None:
    """Cut a file, or let it grow by zeros."""
    with explained("ftruncate", file.path):
        os.ftruncate(file.fd, size)


def reserve(file: OpenFile, size: int) -> None:
    """Have the file system set aside `size` bytes, so that a full disk shows before the first row is written."""
    with explained("posix_fallocate", file.path):
        try:
            os.posix_fallocate(file.fd, 0, size)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def write_at(file: OpenFile, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    with explained("pwrite", file.path):
        while view.nbytes:
            written = _some(os.pwrite(file.fd, view, offset))
            view, offset = view[written:], offset + written


def _some(written: int) -> int:
    """A write that takes nothing and says nothing would be tried forever."""
    if not written:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return written


def sync(file: OpenFile) -> None:
    """Make the bytes of a file durable."""
    with explained("fsync", file.path):
        os.fsync(file.fd)


def close(file: OpenFile) -> None:
    """The descriptor is gone afterwards, also where this fails."""
    with explained("close", file.path):
        os.close(file.fd)


@contextmanager
def closing(file: OpenFile) -> Iterator[OpenFile]:
    """The file, closed at the end; a fault of the close must not hide one before it."""
    try:
        yield file
    except BaseException:
        with suppress(SoftcacheError):
            close(file)
        raise
    close(file)


def remove(path: Path) -> None:
    """Remove a file; nothing happens when there is none."""
    with explained("unlink", path), suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder in which nothing is."""
    with explained("rmdir", path):
        os.rmdir(path)


def abandon(temporary: Path, file: OpenFile | None) -> None:
    """Close and remove a file that something went wrong with. A further fault must not hide the first one.

    What cannot be removed now is removed by the next writer of the same part.
    """
    if file is not None:
        with suppress(SoftcacheError):
            close(file)
    with suppress(SoftcacheError):
        remove(temporary)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, and make the name durable."""
    with explained("rename", final):
        os.replace(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    with closing(_open(folder, os.O_RDONLY | os.O_DIRECTORY)) as file:
        sync(file)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and make their names durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with explained("mkdir", path):
        try:
            os.mkdir(path, FOLDER)
        except FileExistsError:
            if not path.is_dir():
                raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, tag: str = "0") -> None:
    """Write a small file aside, fsync, rename: after a crash there is the old file or the new one.

    Args:
        tag: ends the temporary name, `.tmp-<tag>`: distinguishes writers that may work on the same folder.
    """
    with written_aside(path, tag=tag) as file:
        write_at(file, data, 0)


@contextmanager
def written_aside(path: Path, *, tag: str = "0") -> Iterator[OpenFile]:
    """The same for a file that is written in pieces: it gets its name when all of them are there."""
    temporary = path.with_name(f"{path.name}.tmp-{tag}")
    file: OpenFile | None = None
    try:
        file = create(temporary)
        yield file
        sync(file)
        finished, file = file, None
        close(finished)
        publish(temporary, path)
    except BaseException:
        abandon(temporary, file)
        raise


class Stream(io.RawIOBase):
    """An open file for libraries that write front to back into what Python calls a file."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._at = file, 0
        self.fault: SoftcacheError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            write_at(self._file, data, self._at)
        except SoftcacheError as exc:
            self.fault = exc
            raise
        size = memoryview(data).nbytes
        self._at += size
        return size

    def tell(self) -> int:
        return self._at


@contextmanager
def streamed(file: OpenFile) -> Iterator[Stream]:
    """An open file as a `Stream`. What could not be written is told as it was, whatever the library makes of it."""
    stream = Stream(file)
    try:
        yield stream
    except Exception:
        if stream.fault is not None:
            raise stream.fault from None
        raise


@contextmanager
def written_by_path(path: Path, temporary: Path) -> Iterator[Path]:
    """The same for libraries that want a path: an empty file that was made here, under `temporary` beside `path`."""
    try:
        close(create(temporary))
        yield temporary
        with closing(_open(temporary, os.O_RDWR | os.O_NOFOLLOW)) as file:
            sync(file)
        publish(temporary, path)
    except BaseException:
        abandon(temporary, None)
        raise


def append_line(path: Path, line: bytes) -> None:
    """Append one line to a journal, durably."""
    with closing(_open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)) as file:
        if has_other_names(file):
            raise DumpError(
                f"{path}: has a second name (a hard link), and what is written here would be written there",
                tip="copy the folder, as `cp -r` does, and go on with the copy",
            )
        # a line torn by a crash is closed off first, so that it cannot swallow this one
        with explained("read", path):
            size = os.fstat(file.fd).st_size
            torn = size > 0 and os.pread(file.fd, 1, size - 1) != b"\n"
        data = memoryview((b"\n" if torn else b"") + line + b"\n")
        with explained("write", path):
            while data.nbytes:
                data = data[_some(os.write(file.fd, data)) :]
        sync(file)
    if size == 0:
        sync_folder(path.parent)


def require_room(folder: Path, nbytes: int, what: str) -> None:
    """Nothing, where a folder's file system has so many bytes free. The folder need not exist yet.

    Args:
        what: begins the message: "the next shards need".

    Raises:
        DiskSpaceError: with both numbers.
    """
    there = next((one for one in (folder, *folder.absolute().parents) if one.is_dir()), folder)
    free = free_bytes(there)
    if free < nbytes:
        raise DiskSpaceError(
            f"{folder}: {what} {nbytes / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB left",
            tip="free some space and run the same command again: what was finished is kept",
        )


def free_bytes(folder: Path) -> int:
    with explained("statvfs", folder):
        return shutil.disk_usage(folder).free

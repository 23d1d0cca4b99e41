"""The one way into a file of a cache: below the folder no symbolic link is followed, and only regular files are opened."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from softcache.cache.file_entry import StoredFile
from softcache.errors import DamagedCacheError

COPY_AGAIN = "copy the cache again, or mend it with `softcache repair`"


def open_inside(root: Path, relative: str) -> int:
    """A read-only descriptor of `root/relative`, whose names are joined by `/`.

    The cache folder itself may be reached through a link: that is its user's choice.

    Raises:
        FileNotFoundError: it is not there.
        DamagedCacheError: it, or a folder on the way to it, is a symbolic link; or it is no regular file.
    """
    *folders, name = relative.split("/")
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = _open(folder, os.O_DIRECTORY, at, root / relative)
            os.close(at)
            at = inner
        fd = _open(name, os.O_NONBLOCK, at, root / relative)  # opening a pipe would otherwise wait for its writer
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamagedCacheError(f"{root / relative}: is not a regular file", tip=COPY_AGAIN)
    return fd


def _open(name: str, flags: int, folder: int, path: Path) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise DamagedCacheError(
                f"{path}: {name!r} is a symbolic link or no folder; links inside a cache are not followed",
                tip="copy the cache with its links resolved: cp -rL, rsync -L, or a download into a folder of its own",
            ) from None
        if exc.errno == errno.ENXIO:
            raise DamagedCacheError(f"{path}: is not a regular file", tip=COPY_AGAIN) from None  # a socket
        exc.filename = str(path)
        raise


def open_checked(root: Path, file: StoredFile) -> int:
    """A read-only descriptor of a cache file whose size is the manifest's.

    Raises:
        DamagedCacheError: the file is missing, no regular file, or has another size.
    """
    try:
        fd = open_inside(root, file.path)
    except FileNotFoundError:
        raise DamagedCacheError(
            f"{root / file.path}: the manifest names this file, but it is not there", tip=COPY_AGAIN
        ) from None
    size = os.fstat(fd).st_size
    if size != file.nbytes:
        os.close(fd)
        raise DamagedCacheError(
            f"{root / file.path}: has {size} bytes, the manifest says {file.nbytes}",
            tip=f"the file is incomplete or damaged; {COPY_AGAIN}",
        )
    return fd


def read_inside(root: Path, relative: str, limit: int) -> bytes:
    """All bytes of a small file of a cache; errors as `open_inside`, and DamagedCacheError above `limit` bytes."""
    fd = open_inside(root, relative)
    with os.fdopen(fd, "rb") as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise DamagedCacheError(f"{root / relative}: has more than {limit:,} bytes, too many for it", tip=COPY_AGAIN)
    return data

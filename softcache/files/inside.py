"""The one way into a file of a cache or a run folder: below the folder no link is followed, and only regular files are opened.

The folder itself, and whatever is named beside it, may be reached through links: that is its user's choice.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softcache.errors import DamagedCacheError, DumpError, LinkedCacheError, SoftcacheError, TrainingError


@dataclass(frozen=True)
class Whose:
    """What a folder is: how messages call it, and what is raised of it.

    Attributes:
        what: "cache", "run folder".
        misfit: raised for what is no regular file, or too large.
        linked: raised for a link.
        tip: what to do about a misfit.
    """

    what: str
    misfit: type[SoftcacheError]
    linked: type[SoftcacheError]
    tip: str


HUB_LINK = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")  # what a file of a hub's store is
CACHE = Whose("cache", DamagedCacheError, LinkedCacheError, "copy the cache again, or mend it with `softcache repair`")
RUN = Whose("run folder", TrainingError, TrainingError, "copy the run folder again")


def open_inside(root: Path, relative: str, whose: Whose = CACHE) -> int:
    """A read-only descriptor of `root/relative`, whose names are joined by `/`.

    Raises:
        FileNotFoundError: it is not there.
        SoftcacheError: of `whose`: it, or a folder on the way to it, is a symbolic link; or it is no regular file.
    """
    *folders, name = relative.split("/")
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = _open(folder, os.O_DIRECTORY, at, root, relative, whose)
            os.close(at)
            at = inner
        fd = _open(name, os.O_NONBLOCK, at, root, relative, whose)  # opening a pipe would otherwise wait for its writer
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise whose.misfit(f"{root / relative}: is not a regular file", tip=whose.tip)
    return fd


def _open(name: str, flags: int, folder: int, root: Path, relative: str, whose: Whose) -> int:
    path = root / relative
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, folder):
            if whose is CACHE and HUB_LINK.fullmatch(os.readlink(name, dir_fd=folder)):
                raise whose.linked(
                    f"{root}: lies in a hub's store, whose files are symbolic links ({relative} is one); links inside a cache "
                    "are not followed, and that says nothing of damage",
                    tip=_way_out_of_hub(root),
                ) from None
            raise whose.linked(
                f"{path}: {name!r} is a symbolic link; links inside a {whose.what} are not followed",
                tip=f"copy the {whose.what} with its links resolved: cp -rL, rsync -L, or a download into a folder of its own",
            ) from None
        if exc.errno == errno.ENOTDIR:
            raise whose.misfit(f"{path}: {name!r} is no folder", tip=whose.tip) from None
        if exc.errno == errno.ENXIO:
            raise whose.misfit(f"{path}: is not a regular file", tip=whose.tip) from None  # a socket
        exc.filename = str(path)
        raise


def _way_out_of_hub(root: Path) -> str:
    """How to have such a cache as a folder of its own."""
    copied = f"cp -rL {root} NEW"
    for part in root.absolute().parts:
        if part.startswith("datasets--"):
            repository = part.removeprefix("datasets--").replace("--", "/", 1)
            return f"{copied}, or softcache pull hf:{repository} NEW"
    return copied


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def is_inside(root: Path, relative: str, whose: Whose = CACHE) -> bool:
    """Whether `root/relative` is there; errors of what is there and no regular file as `open_inside` raises them."""
    try:
        os.close(open_inside(root, relative, whose))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_inside(root: Path, relative: str, limit: int, whose: Whose = CACHE) -> bytes:
    """All bytes of a small file; errors as `open_inside`, and `whose.misfit` above `limit` bytes."""
    fd = open_inside(root, relative, whose)
    with os.fdopen(fd, "rb") as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise whose.misfit(f"{root / relative}: has more than {limit:,} bytes, too many for it", tip=whose.tip)
    return data


def refuse_linked_folders(root: Path, what: str = "cache") -> None:
    """Raise DumpError for a link to a folder anywhere below `root`: what is written there would be written somewhere else.

    A link in the place of a file needs no such look: a file is written under a new name, which is then given to it.
    """
    for link in _linked_folders(root):
        refuse_link(link, what)


def refuse_link(path: Path, what: str) -> None:
    """Raise DumpError where this path, in a folder that is called `what`, is a symbolic link."""
    if path.is_symlink():
        raise DumpError(
            f"{path}: is a symbolic link; links inside a {what} are not followed",
            tip="put a folder with its files in its place, or choose another one to write into",
        )


def _linked_folders(root: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_symlink():
            if entry.is_dir():
                yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            yield from _linked_folders(Path(entry.path))

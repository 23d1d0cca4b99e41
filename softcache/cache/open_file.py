"""The files of a cache, opened as its manifest has them; `files/inside.py` follows no link to them."""

from __future__ import annotations

import os
from pathlib import Path

from softcache.cache.file_entry import StoredFile
from softcache.errors import DamagedCacheError
from softcache.files.inside import CACHE, open_inside

COPY_AGAIN = CACHE.tip


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

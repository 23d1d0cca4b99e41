"""Whose a place is while somebody pushes to it: the file `push.json` there says which cache is not whole yet.

A place without locks is claimed by making that file where there is none, and the cache becomes visible when its manifest takes
the place of the one that was looked at. Both are one step where the place can do that, and a look and a step where it cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from softcache.cache.schema import MANIFEST
from softcache.errors import RemoteError

PUSHING = "push.json"  # gone once all is there
NAMES = 5  # that are looked at in a place without a manifest


class Shelf(Protocol):
    """Small files of a place without locks."""

    url: str

    def names(self) -> list[str]:
        """The first NAMES or more files."""
        ...

    def whole(self, path: str) -> bytes | None:
        """All bytes of a file; None where there is none."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """A new file; False where there is one."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """A file, whatever was there."""
        ...

    def swap(self, path: str, data: bytes, was: bytes | None) -> bool:
        """A file in the place of these bytes, or of none; False where others are there."""
        ...

    def remove(self, path: str) -> None:
        """A file, if it is there."""
        ...


def refuse_others(url: str, there: Sequence[str], started: bytes | None, id: str) -> None:
    """RemoteError where files lie in a place that are no cache's, or of another cache that is not finished.

    Args:
        there: names of files of a place without a manifest.
        started: what its push.json holds; None: it has none.
    """
    if not there:
        return
    begun = _id_of(started)
    if begun is None:
        raise RemoteError(
            f"{url}: is not empty, and holds no whole cache ({', '.join(sorted(there)[:3])})",
            tip="push to an empty place",
        )
    if begun != id:
        raise RemoteError(
            f"{url}: a push of another cache (id {begun[:12]}...) is not finished there",
            tip="finish it, or push to another place; this one may be deleted",
        )


def _id_of(started: bytes | None) -> str | None:
    try:
        found = json.loads(started or b"")["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


@contextmanager
def claimed(shelf: Shelf, id: str) -> Iterator[None]:
    """While it lasts nobody else pushes another cache there. What is not whole stays claimed by a fault: the same push goes on.

    Raises:
        RemoteError: somebody does, or what lies there is neither a cache, nor nothing, nor a push of this id that was cut.
    """
    started, whole = shelf.whole(PUSHING), shelf.whole(MANIFEST) is not None
    if not whole:
        refuse_others(shelf.url, shelf.names(), started, id)
    elif started is not None and (begun := _id_of(started)) != id:
        raise RemoteError(
            f"{shelf.url}: somebody else pushes there (id {str(begun)[:12]}...), or was stopped while they did",
            tip=f"wait until they have done; if nobody does any more, delete {PUSHING} there",
        )
    if started is None and not shelf.create(PUSHING, json.dumps({"id": id}).encode()):
        raise RemoteError(f"{shelf.url}: somebody else pushes there", tip="wait until they have done")
    try:
        yield
    except Exception:
        if whole:
            shelf.remove(PUSHING)
        raise
    shelf.remove(PUSHING)


def published(shelf: Shelf, create: Mapping[str, bytes], replace: Mapping[str, bytes], was: bytes | None) -> bool:
    """The last step of a push; see WritableTransport.publish."""
    *others, last = replace
    if shelf.whole(last) != was:
        return False
    for path, data in create.items():
        if not shelf.create(path, data) and shelf.whole(path) != data:
            raise RemoteError(f"{shelf.url}/{path}: has other bytes than its name says", tip="push to another place")
    for path in others:
        shelf.replace(path, replace[path])
    return shelf.swap(last, replace[last], was)

"""The store of this machine: what was fetched of caches that lie somewhere else, shared by all processes.

    caches/ID/   manifest.json, manifests/ID.json, the lists, origin.json, and a lock that every process shares that has it open
    files/ab/    files by their sha256, whole; or with holes, and beside them which blocks are there
    locks/ab     held while something in files/ab/ is made or changed
    store.lock   shared while a cache is entered, held alone while caches are removed

All of it may be deleted while nobody uses it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from softcache.cache.schema import MANIFEST
from softcache.errors import DumpError, RemoteError
from softcache.files import durable, home
from softcache.files.inside import read_inside
from softcache.files.locks import keep_shared, release_lock, take_lock, waiting_lock
from softcache.remote.places import Place

CACHES, FILES, LOCKS = "caches", "files", "locks"
ORIGIN, IN_USE, ENTERING = "origin.json", "lock", "store.lock"
ORIGIN_BYTES = 1 << 16

_KEPT: set[Path] = set()  # the locks of caches that this process has open


class Store:
    """A store in a folder, which is made when something is entered."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def cache_folder(self, id: str) -> Path:
        return self.root / CACHES / id

    def path_of(self, name: str) -> Path:
        """Of something in files/, whose name begins with a sha256."""
        return self.root / FILES / name[:2] / name

    def ids(self) -> list[str]:
        """Of the caches that are entered, in order."""
        return sorted(path.parent.name for path in self.root.glob(f"{CACHES}/*/{MANIFEST}"))

    def origin(self, id: str) -> dict[str, Any]:
        """`url`, and when it was `fetched` and last `opened`; empty where that is lost."""
        with suppress(OSError, ValueError):
            found = json.loads(read_inside(self.cache_folder(id), ORIGIN, ORIGIN_BYTES))
            if isinstance(found, dict):
                return found
        return {}

    def note_opened(self, place: Place) -> None:
        """Write down where a cache comes from, and that it was opened now."""
        assert place.id is not None
        now = round(time.time())
        before = self.origin(place.id)
        told = {"url": place.url, "id": place.id, "fetched": before.get("fetched", now), "opened": now}
        self.write_small(self.cache_folder(place.id) / ORIGIN, json.dumps(told).encode())

    def write_small(self, path: Path, data: bytes) -> None:
        """A small file, whole or not at all; several processes may write the same one."""
        durable.make_folder(path.parent)
        durable.write_whole(path, data, tag=_own_tag())

    def hold(self, id: str) -> None:
        """Keep a cache from being removed until this process, and all that it forks, have ended."""
        lock = self.cache_folder(id) / IN_USE
        if lock in _KEPT and lock.exists():
            return
        self._make()
        with self.entering():
            durable.make_folder(lock.parent)
            keep_shared(lock)
        _KEPT.add(lock)

    def _make(self) -> None:
        """The folders of the store, which nobody else can look into."""
        try:
            home.make_private(self.root)
            for name in (CACHES, FILES, LOCKS):
                durable.make_folder(self.root / name)
        except (OSError, DumpError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else exc.message
            raise RemoteError(
                f"{self.root}: what is fetched of a cache cannot be kept there ({why})",
                tip="set SOFTCACHE_HOME to a folder that can be written, or fetch all of it: softcache pull URL FOLDER",
            ) from None

    def entering(self) -> AbstractContextManager[None]:
        """While it lasts no cache is removed."""
        return waiting_lock(self.root / ENTERING, shared=True)

    def alone(self) -> AbstractContextManager[None]:
        """While it lasts no cache is entered."""
        return waiting_lock(self.root / ENTERING)

    def in_use(self, id: str) -> bool:
        """Whether a living process has it open; to be asked while nobody enters one."""
        try:
            release_lock(take_lock(self.cache_folder(id) / IN_USE))
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def changing(self, names: Iterable[str]) -> Iterator[None]:
        """While it lasts nobody else makes or changes the files of these names, or any beside them."""
        with ExitStack() as held:
            for prefix in sorted({name[:2] for name in names}):  # always in this order: nobody waits in a circle
                held.enter_context(waiting_lock(self.root / LOCKS / prefix))
            yield

    def remove_all(self) -> None:
        """Remove the store, which nobody else knows of."""
        for folder, folders, files in os.walk(self.root, topdown=False):
            for name in files:
                durable.remove(Path(folder) / name)
            for name in folders:
                durable.remove_folder(Path(folder) / name)
        if self.root.is_dir():
            durable.remove_folder(self.root)


def shared_store() -> Store:
    """The one of this user: `store` below `$SOFTCACHE_HOME`."""
    return Store(home.home() / "store")


def _own_tag() -> str:
    """Ends a temporary name that no other process has."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"

"""What the store holds of each cache, and what goes when it is too much: never anything of a cache that somebody has open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.schema import MANIFEST
from softcache.errors import CacheError, ConfigError
from softcache.files import durable
from softcache.remote.store import CACHES, FILES, IN_USE, Store

LIMIT, DEFAULT_GIB = "SOFTCACHE_STORE_GIB", 100.0
DAY_S = 86400


@dataclass(frozen=True)
class Kept:
    """A cache of which something is in the store.

    Attributes:
        url: where it comes from; "" where that is lost.
        bytes_here, nbytes: on the disk here, and of the whole cache.
        opened: seconds since 1970.
        in_use: somebody has it open.
        names: the sha256 of its files.
    """

    id: str
    url: str
    bytes_here: int
    nbytes: int
    opened: int
    in_use: bool
    names: frozenset[str]


def kept_caches(store: Store) -> list[Kept]:
    """What the store has, the one that was opened last first; to be asked while nobody enters one."""
    sizes = _sizes(store)
    found = [one for id in store.ids() if (one := _kept(store, id, sizes)) is not None]
    return sorted(found, key=lambda one: (-one.opened, one.id))


def _kept(store: Store, id: str, sizes: dict[str, int]) -> Kept | None:
    """None of one whose manifest or lists are damaged: nobody can read it."""
    folder, origin = store.cache_folder(id), store.origin(id)
    try:
        manifest: Manifest = read_manifest(folder, id=id)
        names = frozenset(file.sha256 for file in manifest.files)
    except CacheError:
        return None
    opened, url = origin.get("opened"), origin.get("url")
    here = sum(sizes.get(name, 0) for name in names)
    return Kept(
        id,
        url if isinstance(url, str) else "",
        here,
        manifest.nbytes,
        opened if isinstance(opened, int) else 0,
        store.in_use(id),
        names,
    )


def listed(store: Store) -> list[Kept]:
    """As `kept_caches`, asked at any time."""
    if not (store.root / CACHES).is_dir():
        return []
    with store.alone():
        return kept_caches(store)


def prune(store: Store, chosen: Callable[[list[Kept]], list[Kept]]) -> tuple[list[Kept], int]:
    """Remove caches that nobody has open, and every file that no other one names.

    Args:
        chosen: of those that nobody has open, which.

    Returns:
        The caches that went, and how many bytes are free again.
    """
    if not (store.root / CACHES).is_dir():
        return [], 0
    with store.alone():
        before = bytes_of(store)
        caches = kept_caches(store)
        gone = chosen([one for one in caches if not one.in_use])
        for one in gone:
            _remove_cache(store, one.id)
        known = _remove_broken(store, {one.id for one in caches})
        needed = {name for one in caches if one not in gone for name in one.names}
        for path in list(_files(store)) if known else ():
            if path.name[:64] not in needed:
                durable.remove(path)
        return gone, before - bytes_of(store)


def _remove_broken(store: Store, whole: set[str]) -> bool:
    """Remove caches that were never entered wholly, or are damaged.

    Returns:
        False where somebody has one of these open: it cannot be told which files it needs.
    """
    known = True
    for folder in sorted((store.root / CACHES).iterdir()):
        if folder.name in whole or not folder.is_dir() or folder.is_symlink():
            continue
        if not store.in_use(folder.name):
            _remove_cache(store, folder.name)
        elif (folder / MANIFEST).exists():  # else it is being entered, and has no files yet
            known = False
    return known


def _remove_cache(store: Store, id: str) -> None:
    """Its manifest first: without it, it is not entered."""
    folder = store.cache_folder(id)
    for path in sorted(folder.rglob("*"), key=lambda path: (path.name != MANIFEST, path.name == IN_USE)):
        if not path.is_dir() or path.is_symlink():
            durable.remove(path)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        durable.remove_folder(path)
    durable.remove_folder(folder)


def beyond(caches: list[Kept], nbytes: int, in_all: int) -> list[Kept]:
    """Those that have to go, the longest unused first, so that no more than `nbytes` stay of `in_all`."""
    gone = []
    for one in sorted(caches, key=lambda one: one.opened):
        if in_all <= nbytes:
            break
        gone.append(one)
        in_all -= one.bytes_here
    return gone


def chosen_by(
    store: Store, *, ids: tuple[str, ...] = (), keep: int | None = None, older: float | None = None
) -> Callable[[list[Kept]], list[Kept]]:
    """What `prune` takes: caches by the beginnings of their ids, what is beyond a size, or older than so many days; else all."""

    def choose(caches: list[Kept]) -> list[Kept]:
        if keep is not None:
            return beyond(caches, keep, bytes_of(store))
        if older is not None:
            return [one for one in caches if one.opened < time.time() - older * DAY_S]
        if not ids:
            return caches
        known = {one: [kept for kept in caches if kept.id.startswith(one)] for one in ids}
        for one, found in known.items():
            if len(found) != 1:
                what = (
                    "is not in the store, or somebody has it open" if not found else "is the beginning of several ids"
                )
                raise ConfigError(f"{one}: {what}", tip="see `softcache store list`")
        return [found for (found,) in known.values()]

    return choose


def keep_within(store: Store) -> None:
    """Remove what was not opened for longest, where more is in the store than SOFTCACHE_STORE_GIB."""
    limit = round(limit_gib() * 2**30)
    if bytes_of(store) > limit:
        prune(store, chosen_by(store, keep=limit))


def limit_gib() -> float:
    """SOFTCACHE_STORE_GIB."""
    text = os.environ.get(LIMIT) or str(DEFAULT_GIB)
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise ConfigError(f"{LIMIT}={text}: is no number of GiB", tip=f"set it to a number, such as {DEFAULT_GIB:g}")
    return found


def bytes_of(store: Store) -> int:
    """What all of it takes on the disk."""
    return sum(_sizes(store).values())


def _files(store: Store) -> Iterator[Path]:
    for folder, _, names in os.walk(store.root / FILES):
        yield from (Path(folder) / name for name in names)


def _sizes(store: Store) -> dict[str, int]:
    """sha256 -> bytes on the disk of what is there of such a file; a hole has none."""
    sizes: dict[str, int] = {}
    for path in _files(store):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        sizes[path.name[:64]] = sizes.get(path.name[:64], 0) + 512 * found.st_blocks
    return sizes

"""A cache that lies somewhere else, entered into the store: its manifest and its lists; files come as they are read."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from softcache.cache.file_lists import ListedFiles
from softcache.cache.schema import MANIFEST, MANIFESTS
from softcache.errors import ConfigError, RemoteError, note_once
from softcache.files import durable
from softcache.remote.fetch import Wanted, fetch
from softcache.remote.named import parsed, read_named
from softcache.remote.places import Place
from softcache.remote.prune import keep_within
from softcache.remote.reach import open_transport
from softcache.remote.source import StoreSource
from softcache.remote.store import Store, shared_store
from softcache.remote.transport import Transport
from softcache.remote.work import Work
from softcache.report.progress import Meter


def open_place(place: Place, *, quiet: bool = False) -> tuple[Path, StoreSource]:
    """A folder with the manifest of a cache, for a reader, and where its files come from: the store of this machine.

    Without an id it is the newest, and its id is said. One that was entered before is opened by its id without the network.

    Raises:
        RemoteError: the place cannot be reached, or has no such cache.
    """
    store, named = shared_store(), place.id is not None
    folder, place = enter(place, store, quiet=quiet)
    if not named and not quiet:
        note_once(f"{place.url}: the newest is opened; the same again, whatever is pushed there: {place}")
    source = StoreSource(store, place, quiet=quiet)
    keep_within(store)
    return folder, source


def enter(place: Place, store: Store, *, quiet: bool = False) -> tuple[Path, Place]:
    """Have the manifest and the lists of a cache in a store; the place with its whole id."""
    id, data = _known(place, store), b""
    transport = None
    if id is None:
        transport = open_transport(place)
        data, id = _asked(transport, place, store)
    place = replace(place, id=id)
    store.hold(id)
    folder = store.cache_folder(id)
    if not (folder / MANIFEST).is_file():
        transport = transport or open_transport(place)
        _write(folder, data or read_named(transport, place), transport, place, store, quiet=quiet)
    store.note_opened(place)
    return folder, place


def id_of(manifest: bytes) -> str:
    """The id of the cache whose manifest has these bytes."""
    return hashlib.sha256(manifest).hexdigest()


def _known(place: Place, store: Store) -> str | None:
    """The whole id of a cache that is entered, by the id that was asked for."""
    if place.id is None:
        return None
    found = [id for id in store.ids() if id.startswith(place.id)]
    if len(found) > 1:
        raise ConfigError(
            f"{place}: {len(found)} caches in the store begin so: {', '.join(found)}", tip="give more digits"
        )
    return found[0] if found else None


def _asked(transport: Transport, place: Place, store: Store) -> tuple[bytes, str]:
    """The manifest, and its id."""
    try:
        data = read_named(transport, place)
    except RemoteError as exc:
        kept = [id for id in store.ids() if store.origin(id).get("url") == place.url]
        if place.id is None and kept:
            newest = max(kept, key=lambda id: store.origin(id).get("opened", 0))
            tip = f"what was fetched before is opened without it: {place.url}@{newest}"
            raise RemoteError(exc.message, tip=tip) from None
        raise
    return data, id_of(data)


def _write(folder: Path, data: bytes, transport: Transport, place: Place, store: Store, *, quiet: bool) -> None:
    """Manifest and lists; manifest.json comes last: before it the cache is not entered."""
    assert place.id is not None
    with store.changing([place.id]):
        if (folder / MANIFEST).is_file():
            return  # another process has done so
        manifest = parsed(data, place, folder)
        if isinstance(manifest.files, ListedFiles):
            lists = [Wanted(one.path, one.nbytes, one.sha256) for one in manifest.files.lists]
            nbytes = sum(one.nbytes for one in lists)
            durable.require_room(folder, nbytes, "the lists of what is to be fetched need")
            with Meter(f"fetch lists of {place}", nbytes, unit="B", quiet=quiet) as meter:
                work = Work(meter.add)
                work.over(lists, lambda one: fetch(transport, one, folder / one.path, work))
            for one, why in manifest.list_faults():
                raise RemoteError(f"{place.url}/{one.path}: {why}", tip="ask whoever pushed it for a whole one")
        store.write_small(folder / MANIFESTS / f"{place.id}.json", data)
        with store.entering():
            store.write_small(folder / MANIFEST, data)

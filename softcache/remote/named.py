"""The manifest of a place: the one that was asked for, and one that can be trusted to be a manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from softcache.cache.manifest import Manifest
from softcache.cache.schema import MANIFEST, MANIFESTS
from softcache.cache.strict_json import MAX_BYTES
from softcache.errors import DamagedCacheError, RemoteError
from softcache.remote.fetch import read_small
from softcache.remote.places import Place
from softcache.remote.transport import NotThereError, Transport


def read_named(transport: Transport, place: Place) -> bytes:
    """The bytes of the manifest that was asked for.

    Raises:
        RemoteError: there is none, or it has another id than was asked for.
    """
    whole = place.id is not None and len(place.id) == 64
    path = f"{MANIFESTS}/{place.id}.json" if whole else MANIFEST
    try:
        data = read_small(transport, path, MAX_BYTES)
    except NotThereError:
        what = f"no cache with id {place.id}" if whole else f"no {MANIFEST}, so no cache, or one that is not whole yet"
        raise RemoteError(
            f"{place.url}: {what}", tip="ask for the URL of the folder with manifest.json, and for the id"
        ) from None
    id = hashlib.sha256(data).hexdigest()
    if place.id is not None and not id.startswith(place.id):
        raise RemoteError(
            f"{place.url}: has a cache with id {id}, not {place.id}",
            tip="all 64 digits of the id find an older state of the cache, where it has grown; or ask which id is meant",
        )
    return data


def parsed(data: bytes, place: Place, out: Path) -> Manifest:
    """The manifest of these bytes, whose lists lie in `out`; RemoteError where it is none that can be trusted."""
    try:
        return Manifest.from_bytes(data, out / MANIFEST, out)
    except DamagedCacheError as exc:
        told = exc.message.removeprefix(f"{out / MANIFEST}: ")
        raise RemoteError(f"{place.url}/{MANIFEST}: {told}", tip="ask whoever pushed it for a whole one") from None

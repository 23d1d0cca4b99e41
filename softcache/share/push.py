"""softcache push: a cache of this machine to somewhere else. Read it top to bottom.

What lies there is known by its sha256; what is missing is sent, hashed before. The new manifest is written last, and only if
the one that was there is still there: of two who push at once, one comes first and the other is told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softcache.cache.card.beside import MAX_SHOWN, shown_files
from softcache.cache.checksums import sha256_of
from softcache.cache.file_lists import ListedFiles
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.schema import MANIFEST, MANIFESTS
from softcache.cache.signatures import merged, read_signatures, signatures_path
from softcache.cache.strict_json import MAX_BYTES
from softcache.errors import ConfigError, DamagedCacheError, RemoteError, SoftcacheError
from softcache.files.inside import open_inside, read_inside
from softcache.remote.fetch import Wanted, read_small, signatures_there
from softcache.remote.places import Place
from softcache.remote.reach import open_writable
from softcache.remote.transport import NotThereError, Sending, WritableTransport
from softcache.remote.work import Work
from softcache.report.progress import Meter


@dataclass(frozen=True)
class Pushed:
    """What a push did: files and bytes of the cache, and of them those that were sent."""

    id: str
    files: int
    nbytes: int
    sent_files: int
    sent_bytes: int


def run(cache: Path, place: Place, *, id: str | None = None, quiet: bool = False) -> Pushed:
    """Push a cache, whole.

    Args:
        id: of an older state of it.

    Raises:
        RemoteError: the place cannot be written, holds a cache that this one does not extend, or somebody else came first.
        DamagedCacheError: a file of the cache is not the manifest's: nothing becomes visible.
    """
    if place.id is not None:
        raise ConfigError(
            f"{place}: the id is the cache's own", tip=f"push to {place.url}; --id pushes an older state of the cache"
        )
    manifest = read_manifest(cache, id=id)
    transport, files = open_writable(place), files_of(manifest)
    sent: list[Wanted] = []
    with transport.claim(manifest.id):
        was = current(transport)
        known = {} if was is None else known_there(was, place, cache, manifest)
        missing = [one for one in files if known.get(one.path) != one.sha256 or transport.size(one.path) != one.nbytes]
        transport.require_room(sum(one.nbytes for one in missing))
        with Meter(f"push to {place}", sum(one.nbytes for one in missing), unit="B", quiet=quiet) as meter:
            work = Work(meter.add)

            def send(several: Sequence[Wanted]) -> None:
                new = []
                for one in several:
                    if transport.size(one.path) == one.nbytes and transport.digest(one.path) == one.sha256:
                        work.add(one.nbytes)
                        continue
                    check_whole(cache, one)
                    new.append(one)
                transport.put([Sending(one.path, cache / one.path, one.sha256) for one in new], work.add)
                sent.extend(new)

            work.over([missing[at : at + transport.at_once] for at in range(0, len(missing), transport.at_once)], send)
        publish(transport, place, cache, manifest, was)
    return Pushed(manifest.id, len(files), sum(f.nbytes for f in files), len(sent), sum(f.nbytes for f in sent))


def publish(transport: WritableTransport, place: Place, cache: Path, manifest: Manifest, was: bytes | None) -> None:
    """Make the cache visible: card and what it shows, signatures of both sides, the manifest last."""
    path = f"{MANIFESTS}/{manifest.id}.json"
    data = read_inside(cache, path, MAX_BYTES)
    beside = shown_files(cache, manifest)
    shown = beside | {MANIFEST: data}
    there = signatures_there(transport, manifest.id)
    signed = merged(there, read_signatures(cache, manifest.id))
    if signed != there:
        shown = {signatures_path(manifest.id): signed} | shown
    if was == data and signed == there and all(shown_there(transport, one) == beside[one] for one in beside):
        return
    if not transport.publish({path: data}, shown, was) and current(transport) != data:
        raise RemoteError(
            f"{place}: somebody else pushed there at the same time; their cache is what is there now",
            tip="pull it and extend it, or push to another place",
        )


def shown_there(transport: WritableTransport, path: str) -> bytes | None:
    """What lies there of the card, or of what it shows."""
    try:
        return read_small(transport, path, MAX_SHOWN)
    except RemoteError:  # a bucket says "forbidden" of what is not there
        return None


def files_of(manifest: Manifest) -> list[Wanted]:
    """All files of a cache but the manifest: of version 2 the lists first."""
    listed = manifest.files.lists if isinstance(manifest.files, ListedFiles) else ()
    lists = [Wanted(one.path, one.nbytes, one.sha256) for one in listed]
    return [*lists, *(Wanted(one.path, one.nbytes, one.sha256) for one in manifest.files)]


def current(transport: WritableTransport) -> bytes | None:
    """The manifest that lies there now."""
    try:
        return read_small(transport, MANIFEST, MAX_BYTES)
    except NotThereError:
        return None


def known_there(data: bytes, place: Place, cache: Path, manifest: Manifest) -> dict[str, str]:
    """path -> sha256 of the files of the cache that lies there, of which this one must be a later state.

    Raises:
        RemoteError: it is not.
    """
    try:
        there = Manifest.from_bytes(
            data, cache / MANIFEST, cache
        )  # what it names is among ours, if it is an earlier state
    except SoftcacheError:
        raise RemoteError(f"{place}: holds a {MANIFEST} that is none", tip="push to another place") from None
    ours = manifest.named
    if there.id != manifest.id and all(there.named.get(path) == sha256 for path, sha256 in ours.items()):
        raise RemoteError(
            f"{place}: holds a later state of this cache (id {there.id[:12]}...)",
            tip=f"all that it has of this state is there: softcache pull {place.url}@{manifest.id}",
        )
    if any(ours.get(path) != sha256 for path, sha256 in there.named.items()):
        raise RemoteError(
            f"{place}: holds another cache (id {there.id[:12]}...), which this one (id {manifest.id[:12]}...) does not extend",
            tip="push to another place: what others may have pinned there stays",
        )
    return {one.path: one.sha256 for one in files_of(there)}


def check_whole(cache: Path, one: Wanted) -> None:
    """Raise DamagedCacheError unless a file is the manifest's."""
    try:
        fd = open_inside(cache, one.path)
    except FileNotFoundError:
        found = None
    else:
        try:
            found = sha256_of(fd)
        finally:
            os.close(fd)
    if found != one.sha256:
        what = "is not there" if found is None else "has other bytes than the manifest names"
        raise DamagedCacheError(f"{cache / one.path}: {what}", tip=f"mend it first: softcache repair {cache}")

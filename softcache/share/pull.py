"""softcache pull: a cache from somewhere else into a folder. Read it top to bottom.

The manifest is read first, and must have the id that was asked for. It names every file with its size and sha256; what comes is
hashed while it is written, and gets its name when it is right. manifest.json is written last: before that the folder is no cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from softcache.cache.card import card
from softcache.cache.checksums import sha256_of
from softcache.cache.dump_folder import read_planned
from softcache.cache.file_lists import ListedFiles
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.schema import CARD, MANIFEST, MANIFESTS, PULLING
from softcache.cache.signatures import allowed_signers_of, merged, read_signatures, signatures_path
from softcache.errors import (
    CacheError,
    LockedError,
    UnfinishedCacheError,
)
from softcache.files import durable
from softcache.files.inside import open_inside, refuse_linked_folders
from softcache.files.locks import release_lock, take_lock
from softcache.remote.fetch import PARTIAL, Wanted, fetch, signatures_there
from softcache.remote.named import parsed, read_named
from softcache.remote.places import Place
from softcache.remote.reach import open_transport
from softcache.remote.transport import Transport
from softcache.remote.work import Work
from softcache.report.progress import Meter


def run(
    place: Place, out: Path, *, signed_by: Path | None = None, quiet: bool = False
) -> tuple[Manifest, int, tuple[str, ...]]:
    """The whole cache of a place in the folder `out`, or what is missing of it there.

    Args:
        signed_by: a list of signers, of whom one must have signed the id; this is asked before the first file is fetched.

    Returns:
        its manifest, how many bytes of files were fetched, and the names of those who signed, where that was asked.

    Raises:
        RemoteError: it cannot be had, or is not what its id says.
        SignatureError: nobody of the list has signed it.
        CacheError, DumpError: `out` holds something else.
    """
    transport = open_transport(place)
    data = read_named(transport, place)
    id = hashlib.sha256(data).hexdigest()
    signatures = signatures_there(transport, id)
    names = () if signed_by is None else tuple(allowed_signers_of(signatures, id, signed_by))
    manifest = parsed(data, place, out)
    check_folder(out, place, id)
    check_same_cache(out, manifest)
    durable.make_folder(out)
    with under_way(out, place, id):
        check_folder(out, place, id)  # once more, now that nobody else pulls into it
        check_same_cache(out, manifest)
        refuse_linked_folders(out)
        if isinstance(manifest.files, ListedFiles):
            lists = [Wanted(one.path, one.nbytes, one.sha256) for one in manifest.files.lists]
            fetch_all(transport, missing_of(out, lists, quiet=quiet), out, f"pull lists of {place}", quiet=quiet)
        files = [Wanted(file.path, file.nbytes, file.sha256) for file in manifest.files]
        wanted = missing_of(out, files, quiet=quiet)
        nbytes = sum(one.nbytes for one in wanted)
        durable.require_room(out, nbytes - already(out, wanted), "what is to be pulled needs")
        fetch_all(transport, wanted, out, f"pull {place}", quiet=quiet)
        durable.make_folder(out / MANIFESTS)
        durable.write_whole(out / CARD, card(manifest).encode("utf-8"))
        durable.write_whole(out / MANIFESTS / f"{id}.json", data)
        own = read_signatures(out, id)
        if merged(own, signatures) != own:
            durable.write_whole(out / signatures_path(id), merged(own, signatures))
        durable.write_whole(out / MANIFEST, data)
    return manifest, nbytes, names


def check_folder(out: Path, place: Place, id: str) -> None:
    """Raise CacheError unless a folder is empty, or holds this cache, an earlier state of it, or a pull of it under way."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CacheError(f"{out}: is a file, not a folder", tip="choose another folder for the cache")
    started = pulled_id(out)
    if started not in (None, "", id):
        raise CacheError(
            f"{out}: a pull of another cache (id {started[:12]}...) is not finished there",
            tip=f"finish it with `softcache pull {place.url}@{started} {out}`, or choose another folder; this one may be deleted",
        )
    if started is not None or not any(out.iterdir()):
        return
    if not (out / MANIFEST).exists():
        try:
            read_manifest(out)
        except UnfinishedCacheError as exc:
            raise CacheError(f"{out}: {exc.message.removeprefix(f'{out}: ')}", tip="choose another folder") from None
        except CacheError:
            pass
        raise CacheError(
            f"{out}: is not empty, and holds no cache", tip="choose a folder that is empty or not there yet"
        )
    rounds = len(read_manifest(out).plan.rounds)
    if read_planned(out, rounds) is not None:
        raise CacheError(
            f"{out}: an extension of its cache is under way there, whose files would be replaced",
            tip="finish it with its own command, or choose another folder",
        )


def pulled_id(out: Path) -> str | None:
    """Of the pull that is under way in a folder: "" where it was stopped before it could say; None without one."""
    try:
        text = (out / PULLING).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    try:
        found = json.loads(text)["id"]
    except (ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


@contextmanager
def under_way(out: Path, place: Place, id: str) -> Iterator[None]:
    """Hold the lock of a pull; its file says what is pulled, and goes when all is there."""
    told = json.dumps({"url": place.url, "id": id}).encode()
    while True:
        try:
            lock = take_lock(out / PULLING)
        except BlockingIOError:
            raise LockedError(
                f"{out}: another process pulls into it", tip="wait for it, or choose another folder"
            ) from None
        try:
            same = os.fstat(lock.fd).st_ino == os.stat(out / PULLING).st_ino
        except FileNotFoundError:
            same = False
        if same:  # else whoever had it has just done with it
            break
        release_lock(lock)
    try:
        if pulled_id(out) != id:
            durable.write_at(lock, told, 0)
            durable.set_size(lock, len(told))
        yield
        durable.remove(out / PULLING)
    finally:
        release_lock(lock)


def check_same_cache(out: Path, manifest: Manifest) -> None:
    """Raise CacheError where `out` holds a cache that is no earlier state of this one."""
    if not (out / MANIFEST).exists():
        return
    there = read_manifest(out)
    new = manifest.named
    other = next((path for path, sha256 in there.named.items() if new.get(path) != sha256), None)
    if other is not None:
        raise CacheError(
            f"{out}: holds another cache (id {there.id[:12]}...): its {other} is none of {manifest.id[:12]}...",
            tip="choose another folder",
        )


def missing_of(out: Path, wanted: Sequence[Wanted], *, quiet: bool) -> list[Wanted]:
    """The files that are not there; one that has the name and the size is hashed."""
    there = [one for one in wanted if _size(out, one.path) == one.nbytes]
    right: set[str] = set()
    with Meter(f"hash what is in {out}", sum(one.nbytes for one in there), unit="B", quiet=quiet) as meter:
        work = Work(meter.add)

        def look(one: Wanted) -> None:
            fd = open_inside(out, one.path)
            try:
                if sha256_of(fd) == one.sha256:
                    right.add(one.path)
            finally:
                os.close(fd)
            work.add(one.nbytes)

        work.over(there, look)
    return [one for one in wanted if one.path not in right]


def _size(out: Path, path: str) -> int | None:
    """Of a regular file; None of whatever else has the name, and of nothing."""
    try:
        found = os.lstat(out / path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def already(out: Path, wanted: Sequence[Wanted]) -> int:
    """Bytes that an earlier pull fetched of files that are not whole yet."""
    return sum(min(one.nbytes, _size(out, one.path + PARTIAL) or 0) for one in wanted)


def fetch_all(transport: Transport, wanted: Sequence[Wanted], out: Path, what: str, *, quiet: bool) -> None:
    """Several at once; the first fault ends them all, and what came is kept."""
    with Meter(what, sum(one.nbytes for one in wanted), unit="B", quiet=quiet) as meter:
        work = Work(meter.add)
        work.over(wanted, lambda one: fetch(transport, one, out / one.path, work))

"""Files of a place, fetched whole: hashed while they are written, named when they are right, and gone on with by range."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from softcache.cache.checksums import READ_BYTES
from softcache.cache.signatures import MAX_SIGNATURES, merged, signatures_path
from softcache.errors import RemoteError
from softcache.files import durable
from softcache.files.durable import OpenFile
from softcache.remote.patience import Patience
from softcache.remote.transport import FleetingError, NoRangesError, Transport
from softcache.remote.work import Work

PARTIAL = ".pulling"  # ends the name of a file that is not whole yet
RESTARTS = 3  # of one file from its beginning, where a server has no ranges


@dataclass(frozen=True)
class Wanted:
    """A file as the manifest, or whoever names it, has it."""

    path: str
    nbytes: int
    sha256: str


def read_small(transport: Transport, path: str, limit: int) -> bytes:
    """All bytes of a small file whose size nobody knows yet.

    Raises:
        RemoteError: it has more than `limit` bytes, or cannot be had; NotThereError: it is not there.
    """
    patience, longest = Patience(f"{transport.url}/{path}", Work()), 0
    while True:
        data = bytearray()
        patience.begins()
        try:
            for piece in transport.read(path):
                data += piece
                if len(data) > limit:
                    raise RemoteError(f"{transport.url}/{path}: has more than {limit:,} bytes, too many for it")
                patience.came(max(0, len(data) - max(longest, len(data) - len(piece))))  # beyond all earlier tries
            return bytes(data)
        except FleetingError as exc:
            longest = max(longest, len(data))
            patience.failed(exc)


def signatures_there(transport: Transport, id: str) -> bytes:
    """The signatures of a manifest, and nothing else that a server may send for them; empty where none can be had."""
    try:
        return merged(read_small(transport, signatures_path(id), MAX_SIGNATURES))
    except RemoteError:  # a bucket says "forbidden" of what is not there
        return b""


def fetch(transport: Transport, wanted: Wanted, target: Path, work: Work) -> None:
    """A file into its place; what a stopped process fetched of it is kept. Wrong bytes are asked for once more.

    Args:
        work: that this is a part of.

    Raises:
        RemoteError: it cannot be had, or comes with other bytes twice.
    """
    durable.make_folder(target.parent)
    temporary = target.with_name(target.name + PARTIAL)
    with durable.closing(_opened(temporary)) as file:
        found = ""
        for _ in range(2):
            found = _continued(transport, wanted, file, work)
            if found == wanted.sha256:
                durable.sync(file)
                durable.publish(temporary, target)
                return
            work.add(-wanted.nbytes)
            durable.set_size(file, 0)
    durable.remove(temporary)
    raise RemoteError(
        f"{transport.url}/{wanted.path}: came twice with other bytes than the manifest names: sha256 {found[:16]}..., not "
        f"{wanted.sha256[:16]}...",
        tip="whoever serves it has a damaged or a changed copy: ask for a whole one",
    )


def _opened(temporary: Path) -> OpenFile:
    """What was fetched before, or a new file; another one where the name leads somewhere else."""
    if temporary.is_symlink():
        durable.remove(temporary)
    file = durable.open_or_create(temporary)
    if not durable.has_other_names(file):
        return file
    durable.close(file)
    return durable.create(temporary)


def _continued(transport: Transport, wanted: Wanted, file: OpenFile, work: Work) -> str:
    """Fetch what is missing at the end of a file; hex sha256 of all of it."""
    hasher, at = _hashed(file, wanted.nbytes)
    work.add(at)
    patience, restarts = Patience(f"{transport.url}/{wanted.path}", work), 0
    while at < wanted.nbytes:
        patience.begins()
        try:
            for piece in transport.read(wanted.path, at, wanted.nbytes):
                durable.write_at(file, piece, at)
                hasher.update(piece)
                at += len(piece)
                work.add(len(piece))
                if at == wanted.nbytes:
                    break
                patience.came(len(piece))
            if at < wanted.nbytes:
                raise FleetingError(f"it ended after {at:,} of {wanted.nbytes:,} bytes")
        except NoRangesError:
            restarts += 1
            if restarts > RESTARTS:
                raise RemoteError(
                    f"{patience.what}: breaks off each time, and this server sends whole files only",
                    tip="try again later",
                ) from None
            work.add(-at)
            hasher, at = hashlib.sha256(), 0
        except FleetingError as exc:
            patience.failed(exc)
    return hasher.hexdigest()


def _hashed(file: OpenFile, nbytes: int) -> tuple[hashlib._Hash, int]:
    """The hash of what is there, and how much; of a file that is too long nothing is kept."""
    size = os.fstat(file.fd).st_size
    if size > nbytes:
        durable.set_size(file, 0)
        return hashlib.sha256(), 0
    hasher, at = hashlib.sha256(), 0
    while piece := os.pread(file.fd, READ_BYTES, at):
        hasher.update(piece)
        at += len(piece)
    return hasher, at

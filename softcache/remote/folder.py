"""file: a folder that both sides reach, such as a network file system."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from softcache.cache.checksums import sha256_of
from softcache.cache.schema import MANIFEST
from softcache.errors import ConfigError, RemoteError
from softcache.files import durable
from softcache.files.inside import CACHE, open_inside, read_inside, refuse_linked_folders
from softcache.files.locks import holder_of, release_lock, sign, take_lock
from softcache.remote.claim import PUSHING, refuse_others
from softcache.remote.places import Place
from softcache.remote.transport import PIECE, FleetingError, NotThereError, Sending

LOCK = "push.lock"


class Folder:
    """A folder as a transport; links inside of it are not followed."""

    at_once = 1

    def __init__(self, place: Place) -> None:
        self.url = place.url
        self.root = _path_of(place)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        if not self.root.is_dir():
            raise NotThereError(f"{self.root}: there is no such folder")
        try:
            fd = open_inside(self.root, path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotThereError(f"{self.root / path}: is not there") from None
        except OSError as exc:
            raise RemoteError(f"{self.root / path}: {exc.strerror or exc}") from None
        try:
            at = start
            while stop is None or at < stop:
                piece = os.pread(fd, PIECE if stop is None else min(PIECE, stop - at), at)
                if not piece:
                    return
                yield piece
                at += len(piece)
        except OSError as exc:
            raise FleetingError(f"{exc.strerror or exc}") from None
        finally:
            os.close(fd)

    @contextmanager
    def claim(self, id: str) -> Iterator[None]:
        durable.make_folder(self.root)
        refuse_linked_folders(self.root)
        try:
            lock = take_lock(self.root / LOCK)
        except BlockingIOError:
            raise RemoteError(
                f"{self.url}: somebody else pushes there ({holder_of(self.root / LOCK)})",
                tip="wait until they have done",
            ) from None
        try:
            sign(lock)
            self._check_whose(id)
            if not (self.root / MANIFEST).exists():
                durable.write_whole(self.root / PUSHING, json.dumps({"id": id}).encode())
            for left in self.root.rglob("*.tmp-push-*"):  # of a push that was killed: nobody else writes here now
                durable.remove(left)
            yield
            durable.remove(self.root / PUSHING)
        finally:
            release_lock(lock)

    def _check_whose(self, id: str) -> None:
        """RemoteError where files lie there that are no cache's, or of a cache that is not finished."""
        if (self.root / MANIFEST).exists():
            return
        there = [path.name for path in self.root.iterdir() if path.name != LOCK]
        try:
            started = read_inside(self.root, PUSHING, 1 << 16)
        except OSError:
            started = None
        refuse_others(self.url, there, started, id)

    def require_room(self, nbytes: int) -> None:
        durable.require_room(self.root, nbytes, "what is to be pushed needs")

    def size(self, path: str) -> int | None:
        try:
            found = os.lstat(self.root / path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def digest(self, path: str) -> str | None:
        try:
            fd = open_inside(self.root, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return sha256_of(fd)
        finally:
            os.close(fd)

    def put(self, files: Sequence[Sending], note: Callable[[int], None]) -> None:
        for one in files:
            self._put(one.path, one.source, note)

    def _put(self, path: str, source: Path, note: Callable[[int], None]) -> None:
        target = self.root / path
        durable.make_folder(target.parent)
        at = 0
        with source.open("rb") as given, durable.written_aside(target, tag=f"push-{secrets.token_hex(8)}") as file:
            while piece := given.read(1 << 20):
                durable.write_at(file, piece, at)
                at += len(piece)
                note(len(piece))

    def publish(self, create: Mapping[str, bytes], replace: Mapping[str, bytes], was: bytes | None) -> bool:
        *_, last = replace
        if self._bytes(last) != was:
            return False
        for path, data in create.items():
            durable.make_folder((self.root / path).parent)
            found = self._bytes(path)
            if found is not None and found != data:
                raise RemoteError(f"{self.root / path}: has other bytes than its name says", tip=CACHE.tip)
            durable.write_whole(self.root / path, data)
        for path, data in replace.items():
            durable.make_folder((self.root / path).parent)
            durable.write_whole(self.root / path, data)
        return True

    def _bytes(self, path: str) -> bytes | None:
        try:
            return read_inside(self.root, path, 1 << 31)
        except (FileNotFoundError, NotADirectoryError):
            return None


def _path_of(place: Place) -> Path:
    """Of file:relative, file:/absolute and file:///absolute%20path."""
    rest = place.rest
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(
                f"{place.url}: is a folder of another host", tip="write file:/PATH, or the URL of a server"
            )
        rest = unquote(f"/{path}")
    if not rest:
        raise ConfigError(f"{place.url}: names no folder", tip="write file:/PATH")
    return Path(os.path.expanduser(rest))

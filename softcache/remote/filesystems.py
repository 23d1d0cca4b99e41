"""fsspec+PROTOCOL://: a folder of whatever fsspec has a file system for, such as sftp, smb, or a store with a package of its own.

How long it waits, and what it asks for, is its own; it is settled in fsspec's files. What has been sent is hashed by reading it.
A claim is made in one step where the file system makes new files only (mode "xb"), and is a look and a step elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from secrets import token_hex
from threading import Lock
from typing import Any

from softcache.errors import ConfigError, RemoteError, require_extra
from softcache.remote.claim import NAMES, claimed, published
from softcache.remote.places import FSSPEC, Place
from softcache.remote.scrub import scrubbed
from softcache.remote.transport import PIECE, FleetingError, NotThereError, Sending

BLOCK = 1 << 22  # bytes that are asked for at once


class FileSystem:
    """A folder of a file system of fsspec, as a transport."""

    at_once = 1

    def __init__(self, place: Place) -> None:
        require_extra("fsspec", "fsspec", f"{place.scheme}:")
        from fsspec.core import url_to_fs

        self.url = place.url
        try:
            self._fs, self._root = url_to_fs(place.url.removeprefix(FSSPEC))
        except (ValueError, ImportError) as exc:  # no such protocol, or its package is missing
            raise ConfigError(f"{place.url}: fsspec cannot reach it ({scrubbed(exc)})") from None
        except Exception as exc:
            raise RemoteError(f"{place.url}: {scrubbed(exc)}") from None
        # what has no loop of its own is seldom made for several threads
        self._turn: Any = nullcontext() if getattr(self._fs, "async_impl", False) else Lock()

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        with self._told(path):
            nbytes = self._fs.size(self._at(path))
        end = nbytes if stop is None else min(stop, nbytes)
        for at in range(start, end, BLOCK):
            with self._told(path):
                data = self._fs.cat_file(self._at(path), start=at, end=min(at + BLOCK, end))
            for piece in range(0, len(data), PIECE):
                yield data[piece : piece + PIECE]
            if len(data) < min(BLOCK, end - at):
                return

    @contextmanager
    def claim(self, id: str) -> Iterator[None]:
        with claimed(self, id):
            yield

    def require_room(self, nbytes: int) -> None:
        pass  # few of them know

    def size(self, path: str) -> int | None:
        with self._writing(path):
            return int(self._fs.size(self._at(path))) if self._fs.isfile(self._at(path)) else None

    def digest(self, path: str) -> str | None:
        hasher = hashlib.sha256()
        with self._as_error(path):
            try:
                for piece in self.read(path):
                    hasher.update(piece)
            except NotThereError:
                return None
        return hasher.hexdigest()

    def put(self, files: Sequence[Sending], note: Callable[[int], None]) -> None:
        for one in files:
            with self._writing(one.path):
                self._fs.makedirs(self._fs._parent(self._at(one.path)), exist_ok=True)
                self._fs.put_file(str(one.source), self._at(one.path))
            note(one.source.stat().st_size)

    def publish(self, create: Mapping[str, bytes], replace: Mapping[str, bytes], was: bytes | None) -> bool:
        return published(self, create, replace, was)

    # ---- small files, for the claim

    def names(self) -> list[str]:
        with self._writing(""):
            if not self._fs.isdir(self._root):
                return []
            found = islice(
                (one for _, folders, files in self._fs.walk(self._root) for one in (*files, *folders)), NAMES
            )
            return list(found)

    def whole(self, path: str) -> bytes | None:
        with self._writing(path):
            return bytes(self._fs.cat_file(self._at(path))) if self._fs.isfile(self._at(path)) else None

    def create(self, path: str, data: bytes) -> bool:
        with self._writing(path):
            self._fs.makedirs(self._fs._parent(self._at(path)), exist_ok=True)
            if self._fs.exists(self._at(path)):
                return False
            try:
                with self._fs.open(self._at(path), "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
            except Exception:  # not every file system has this mode
                self._fs.pipe_file(self._at(path), data)
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Written aside first: what is cut is never seen under the name."""
        aside = self._at(f"{path}.tmp-push-{token_hex(8)}")
        with self._writing(path):
            self._fs.makedirs(self._fs._parent(aside), exist_ok=True)
            self._fs.pipe_file(aside, data)
            self._fs.mv(aside, self._at(path))

    def swap(self, path: str, data: bytes, was: bytes | None) -> bool:
        if self.whole(path) != was:
            return False
        self.replace(path, data)
        return True

    def remove(self, path: str) -> None:
        with self._writing(path):
            if self._fs.exists(self._at(path)):
                self._fs.rm_file(self._at(path))

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """In turn; and whatever it raises in a line without what may be a secret."""
        where = f"{self.url}/{path}".rstrip("/")
        try:
            with self._turn:
                yield
        except (FileNotFoundError, NotADirectoryError):
            raise NotThereError(f"{where}: is not there") from None
        except PermissionError:
            raise RemoteError(
                f"{where}: is not open to you", tip="see fsspec's own settings, ~/.config/fsspec"
            ) from None
        except Exception as exc:
            raise FleetingError(scrubbed(exc)) from None

    @contextmanager
    def _as_error(self, path: str) -> Iterator[None]:
        try:
            yield
        except FleetingError as exc:
            raise RemoteError(
                f"{self.url}/{path}: {exc}", tip="run the same command again: it goes on where it stopped"
            ) from None

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        with self._as_error(path), self._told(path):
            yield

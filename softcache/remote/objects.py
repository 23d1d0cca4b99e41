"""s3:, gs: and az: objects of a bucket whose names begin alike, by obstore. Credentials are those of the environment.

What has been sent is known by the sha256 that is kept beside each object; an object without it is sent anew. A claim and the
manifest are written on a condition, which the store checks: of two who push at once one is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from softcache.errors import RemoteError, require_extra
from softcache.remote.claim import NAMES, claimed, published
from softcache.remote.places import Place
from softcache.remote.scrub import scrubbed
from softcache.remote.transport import PIECE, FleetingError, NotThereError, Sending
from softcache.version import __version__

KEPT_SHA256 = "softcachesha256"  # names of metadata are letters and digits in all three
PART = 8 << 20  # bytes of a large object that are sent at once
PARTS = 9000  # a store takes 10,000
READ_S = "20s"  # in which something has to come
LETS_IN = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION; for an open bucket AWS_SKIP_SIGNATURE=true",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, what `gcloud auth application-default login` keeps; or GOOGLE_SKIP_SIGNATURE=true",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or another of its kind",
}


class Objects:
    """Objects under one beginning of their names, as a transport."""

    at_once = 1

    def __init__(self, place: Place) -> None:
        require_extra("obstore", "cloud", f"{place.scheme}:")
        self.url = place.url
        self._tip = f"the environment lets in: {LETS_IN[place.scheme]}"
        with self._writing(""):
            self._store = _store(place)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        import obstore

        part: dict[str, Any] = {"range": {"offset": start}} if start else {}
        if stop is not None:
            part = {"range": (start, stop)}
        with self._told(path):
            for several in obstore.get(self._store, path, options=part).stream(min_chunk_size=PIECE):
                data = bytes(several)
                for at in range(0, len(data), PIECE):
                    yield data[at : at + PIECE]

    @contextmanager
    def claim(self, id: str) -> Iterator[None]:
        with claimed(self, id):
            yield

    def require_room(self, nbytes: int) -> None:
        pass  # there is no end to it

    def size(self, path: str) -> int | None:
        import obstore

        with self._writing(path):
            try:
                return int(obstore.head(self._store, path)["size"])
            except FileNotFoundError:
                return None

    def digest(self, path: str) -> str | None:
        import obstore

        with self._writing(path):
            try:
                return obstore.get(self._store, path, options={"head": True}).attributes.get(KEPT_SHA256)
            except FileNotFoundError:
                return None

    def put(self, files: Sequence[Sending], note: Callable[[int], None]) -> None:
        import obstore

        for one in files:
            nbytes = one.source.stat().st_size
            part = max(PART, -(-nbytes // PARTS))
            data = _pieces(one.source, part, note) if nbytes > part else one.source.read_bytes()
            with self._writing(one.path):
                obstore.put(self._store, one.path, data, attributes={KEPT_SHA256: one.sha256}, chunk_size=part)
            if nbytes <= part:
                note(nbytes)

    def publish(self, create: Mapping[str, bytes], replace: Mapping[str, bytes], was: bytes | None) -> bool:
        return published(self, create, replace, was)

    # ---- small files, for the claim

    def names(self) -> list[str]:
        import obstore

        with self._writing(""):
            return [one["path"] for one in next(iter(obstore.list(self._store, chunk_size=NAMES)), [])]

    def whole(self, path: str) -> bytes | None:
        import obstore

        with self._writing(path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def create(self, path: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._writing(path):
            try:
                obstore.put(self._store, path, data, mode="create")
            except (AlreadyExistsError, PreconditionError):
                return False
            except NotImplementedError:  # the store has no conditions
                if self.whole(path) is not None:
                    return False
                obstore.put(self._store, path, data)
        return True

    def replace(self, path: str, data: bytes) -> None:
        import obstore

        with self._writing(path):
            obstore.put(self._store, path, data)

    def swap(self, path: str, data: bytes, was: bytes | None) -> bool:
        import obstore
        from obstore.exceptions import PreconditionError

        if was is None:
            return self.create(path, data)
        with self._writing(path):
            try:
                found = obstore.get(self._store, path)
                version = {key: value for key in ("e_tag", "version") if (value := found.meta[key]) is not None}
                if bytes(found.bytes()) != was:
                    return False
                obstore.put(self._store, path, data, mode=version)
            except (FileNotFoundError, PreconditionError):
                return False
            except NotImplementedError:
                obstore.put(self._store, path, data)
        return True

    def remove(self, path: str) -> None:
        import obstore

        with self._writing(path):
            obstore.delete(self._store, path)

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """Whatever obstore raises, in a line without what may be a secret."""
        from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

        where = f"{self.url}/{path}".rstrip("/")
        try:
            yield
        except FileNotFoundError:
            raise NotThereError(f"{where}: is not there, or its bucket is not") from None
        except (PermissionDeniedError, UnauthenticatedError) as exc:
            status = "403" if isinstance(exc, PermissionDeniedError) else "401"
            raise RemoteError(f"{where}: is not open to you ({status})", tip=self._tip) from None
        except (OSError, RemoteError, FleetingError):
            raise
        except Exception as exc:
            text = str(exc)
            if "169.254.169.254" in text or "metadata.google" in text:
                raise RemoteError(f"{where}: no credentials were found", tip=self._tip) from None
            if "redirect without LOCATION" in text:
                raise RemoteError(
                    f"{where}: its bucket lies in another region", tip="say which in AWS_REGION"
                ) from None
            raise FleetingError(scrubbed(exc)) from None

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """As `_told`, for what obstore has tried several times itself."""
        try:
            with self._told(path):
                yield
        except FleetingError as exc:
            raise RemoteError(
                f"{self.url}/{path}: {exc}", tip="run the same command again: it goes on where it stopped"
            ) from None


def _store(place: Place) -> Any:
    from obstore.store import from_url

    family = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[place.scheme]
    plain = os.environ.get(f"{family}_ALLOW_HTTP", "").lower() in ("1", "true")  # what is given here takes its place
    waits = {"connect_timeout": "5s", "read_timeout": READ_S, "timeout": "86400s"}
    return from_url(
        place.url,
        client_options={**waits, "allow_http": plain, "user_agent": f"softcache/{__version__}"},
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=15)},
    )


def _pieces(source: Path, nbytes: int, note: Callable[[int], None]) -> Iterator[bytes]:
    with source.open("rb") as file:
        while piece := file.read(nbytes):
            yield piece
            note(len(piece))

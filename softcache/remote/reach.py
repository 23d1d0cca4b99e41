"""Which transport reaches a place. A new one is a file like its neighbours, and a line here."""

from __future__ import annotations

from softcache.errors import ConfigError
from softcache.remote.places import BUCKETS, FSSPEC, Place
from softcache.remote.transport import Transport, WritableTransport


def open_transport(place: Place) -> Transport:
    """Reach a place. Nothing is read yet.

    Raises:
        MissingExtraError: it needs a package that is not installed.
    """
    if place.scheme in ("http", "https"):
        from softcache.remote.web import Web

        return Web(place)
    return open_writable(place)


def open_writable(place: Place) -> WritableTransport:
    """Reach a place to which something is pushed.

    Raises:
        ConfigError: nothing can be written there.
        MissingExtraError: it needs a package that is not installed.
    """
    if place.scheme in ("http", "https"):
        raise ConfigError(
            f"{place.url}: a web server is read from, and takes nothing",
            tip="push to the folder that it serves (file:...), or copy the cache there and send its id",
        )
    if place.scheme == "hf":
        from softcache.remote.hub import Hub

        return Hub(place)
    if place.scheme in BUCKETS:
        from softcache.remote.objects import Objects

        return Objects(place)
    if place.scheme.startswith(FSSPEC):
        from softcache.remote.filesystems import FileSystem

        return FileSystem(place)
    from softcache.remote.folder import Folder

    return Folder(place)

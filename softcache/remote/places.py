"""Where a cache lies, as people write it: `https://host/caches/mnist@ID`, `file:/shared/mnist`, `hf:team/mnist`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from softcache.errors import ConfigError, nearest

SCHEMES = ("file", "http", "https")
_ID = re.compile(r"(.+)@([0-9a-f]{12,64})")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(?!\\)")


@dataclass(frozen=True)
class Place:
    """A cache somewhere else.

    Attributes:
        url: without an id; it holds no secret and may be printed.
        scheme: before the first colon.
        id: of the manifest, whole or its beginning; None: the newest.
    """

    url: str
    scheme: str
    id: str | None = None

    def __str__(self) -> str:
        return self.url if self.id is None else f"{self.url}@{self.id}"

    @property
    def rest(self) -> str:
        """What follows the scheme."""
        return self.url.partition(":")[2]


def is_place(text: str) -> bool:
    """Whether this is written as a place and not as a folder of this machine."""
    found = _SCHEME.match(text)
    return found is not None and found[1] in SCHEMES


def folder_of(text: str, what: str) -> Path:
    """A folder of this machine; ConfigError where a place was written.

    Args:
        what: needs it, for the message.
    """
    if is_place(text):
        raise ConfigError(
            f"{text}: {what} works on a folder of this machine",
            tip=f"fetch it: softcache pull {text} FOLDER; a folder is sent elsewhere by softcache push",
        )
    return Path(text)


def cache_of(text: str) -> Path | str:
    """Where a cache is opened: a folder, or a place as it was written, which is no path."""
    return text if is_place(text) else Path(text)


def parse_place(text: str, id: str | None = None) -> Place:
    """A place, with the id at its end or beside it.

    Raises:
        ConfigError: a scheme that is not known, secrets in the URL, no id, or two.
    """
    url, given = (found[1], found[2]) if (found := _ID.fullmatch(text)) else (text, None)
    if id is not None and not re.fullmatch("[0-9a-f]{8,64}", id):
        raise ConfigError(f"--id {id}: is no id", tip="an id is 64 digits 0-9 and a-f; its first 8 or more will do")
    if given and id and not (given.startswith(id) or id.startswith(given)):
        raise ConfigError(f"{text}: ends with another id than --id {id}", tip="give one of them")
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise ConfigError(
            f"{url}: is no URL",
            tip=f"a folder is written file:{url}; softcache knows {', '.join(f'{one}:' for one in SCHEMES)}",
        )
    if scheme[1] not in SCHEMES:
        raise ConfigError(f"{url}: softcache does not know {scheme[1]}:", tip=nearest(scheme[1], SCHEMES))
    if scheme[1] in ("http", "https"):
        _check_http(url)
    return Place(url.rstrip("/") or url, scheme[1], max(filter(None, (given, id)), key=len, default=None))


def _check_http(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 it is read, and may be none
        url.encode("ascii")
    except ValueError as exc:
        raise ConfigError(
            f"{url}: is no URL ({exc})", tip="write letters that are not ASCII as %.., as a browser shows them"
        ) from None
    if re.search(r"\s", url):
        raise ConfigError(f"{url}: has a blank in it", tip="write it as %20")
    if "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        raise ConfigError(
            f"{parts.scheme}://...@{host}: a user's name or password stands in the URL, which is printed and kept",
            tip="leave it out: names and passwords of hosts are read from ~/.netrc",
        )
    if not parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{url}: is no folder of a web server", tip="write https://HOST/PATH, without ? and #")

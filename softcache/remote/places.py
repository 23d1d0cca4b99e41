"""Where a cache lies, as people write it: `https://host/caches/mnist@ID`, `file:/shared/mnist`, `hf:team/mnist`, `s3://bucket/mnist`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from softcache.errors import ConfigError, nearest

SCHEMES = ("file", "http", "https", "hf", "s3", "gs", "az")
BUCKETS = ("s3", "gs", "az")
FSSPEC = "fsspec+"  # begins the scheme of whatever fsspec has a file system for
_ID = re.compile(r"(.+)@([0-9a-f]{12,64})")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(?!\\)")
_HUB = re.compile(r"hf:[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*((?:/[^/]+)*)")
_ALIKE = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "azure": "az", "huggingface": "hf"}


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
    return found is not None and (found[1] in SCHEMES or found[1].startswith(FSSPEC))


def folder_of(text: str, what: str) -> Path:
    """A folder of this machine; ConfigError where a place was written.

    Args:
        what: needs it, for the message.
    """
    if is_place(text):
        raise ConfigError(
            f"{_shown(text)}: {what} works on a folder of this machine",
            tip=f"fetch it: softcache pull {_shown(text)} FOLDER; a folder is sent elsewhere by softcache push",
        )
    return Path(text)


def has_id(text: str) -> bool:
    """Whether it ends with the id of a cache."""
    return _ID.fullmatch(text) is not None


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
            tip=f"a folder is written file:{url}; softcache knows {', '.join(f'{one}:' for one in SCHEMES)}, and {FSSPEC}...://",
        )
    if scheme[1] not in SCHEMES and not scheme[1].startswith(FSSPEC):
        close = _ALIKE.get(scheme[1])
        raise ConfigError(
            f"{_shown(url)}: softcache does not know {scheme[1]}:",
            tip=(f"did you mean {close!r}?" if close else nearest(scheme[1], SCHEMES))
            + f" (what fsspec reaches is written {FSSPEC}{scheme[1]}://...)",
        )
    if scheme[1] == "hf":
        _check_hub(url)
    elif scheme[1] != "file":
        _check_url(url, scheme[1])
    return Place(url.rstrip("/") or url, scheme[1], max(filter(None, (given, id)), key=len, default=None))


def _shown(url: str) -> str:
    """Without what stands before a host or behind a question mark: it may be a secret."""
    return re.sub(r"(//[^/]*|:[^/@:]+)@|\?.*", "...", url)


def _check_hub(url: str) -> None:
    found = _HUB.fullmatch(url.rstrip("/"))
    parts = url.rstrip("/").removeprefix("hf:").split("/")
    if found is None or {".", ".."} & {*parts} or re.search(r"[\s?#%\\@]", url) or parts[0] in ("datasets", "models"):
        raise ConfigError(
            f"{_shown(url)}: is no repository of data of a hub", tip="write hf:ORG/NAME or hf:ORG/NAME/FOLDER"
        )


def _check_url(url: str, scheme: str) -> None:
    """Of a web server, a bucket, or a file system of fsspec."""
    if scheme.startswith(FSSPEC) and re.search(r"::[a-z]", url):
        raise ConfigError(f"{_shown(url)}: is several URLs in one", tip="write one, without ::")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 it is read, and may be none
        url.encode("ascii")
    except ValueError as exc:
        raise ConfigError(
            f"{_shown(url)}: is no URL ({exc})", tip="write letters that are not ASCII as %.., as a browser shows them"
        ) from None
    if re.search(r"\s", url):
        raise ConfigError(f"{_shown(url)}: has a blank in it", tip="write it as %20")
    before, at, host = parts.netloc.rpartition("@")
    if at and (":" in before or not scheme.startswith(FSSPEC)):
        raise ConfigError(
            f"{scheme}://...@{host}: a user's name or password stands in the URL, which is printed and kept",
            tip=f"leave it out: {_credentials(scheme)}",
        )
    if scheme.startswith(FSSPEC):
        if not re.match(r"[^:]+://", url) or parts.query or parts.fragment:
            raise ConfigError(
                f"{_shown(url)}: is no folder of a file system", tip=f"write {scheme}://HOST/PATH, without ? and #"
            )
        return
    if not parts.netloc or parts.query or parts.fragment:
        what, host = ("a bucket", "BUCKET") if scheme in BUCKETS else ("a web server", "HOST")
        raise ConfigError(
            f"{_shown(url)}: is no folder of {what}", tip=f"write {scheme}://{host}/PATH, without ? and #"
        )


def _credentials(scheme: str) -> str:
    if scheme in ("http", "https"):
        return "names and passwords of hosts are read from ~/.netrc"
    if scheme in BUCKETS:
        names = {"s3": "AWS_ACCESS_KEY_ID and its like", "gs": "GOOGLE_...", "az": "AZURE_STORAGE_..."}
        return f"credentials are read from the environment ({names[scheme]})"
    return "fsspec reads them from its own files (~/.config/fsspec) and the environment"

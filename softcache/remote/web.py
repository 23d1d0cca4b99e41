"""http: and https: folders of a web server. Read only, with ranges; proxies as the environment names them."""

from __future__ import annotations

import http.client
import netrc
import re
import socket
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from threading import Timer, local
from time import time
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from softcache.errors import RemoteError
from softcache.remote.patience import HEAD_S, STALL_S
from softcache.remote.places import Place
from softcache.remote.transport import PIECE, FleetingError, NoRangesError, NotThereError
from softcache.version import __version__

REDIRECTS = 5
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_BROKEN = (http.client.HTTPException, urllib.error.URLError, OSError, EOFError)


@dataclass(frozen=True)
class Access:
    """What opens a host: sent to no other host, and printed nowhere.

    Attributes:
        header: of Authorization; None: nothing is known that would.
        tip: for whoever is not let in.
    """

    header: str | None = field(repr=False)
    tip: str


class Web:
    """One folder of a web server, as a transport.

    Args:
        access: of another kind than ~/.netrc knows.
    """

    def __init__(self, place: Place, access: Access | None = None) -> None:
        self.url = place.url
        self._opener = urllib.request.build_opener(_Redirects(), _Plain(), _Secure())
        self._opener.addheaders = [("User-Agent", f"softcache/{__version__}"), ("Accept-Encoding", "identity")]
        self._access = access or _access_of(self.url)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        url = f"{self.url}/{quote(path)}"
        request = urllib.request.Request(url)
        if self._access.header:
            request.add_unredirected_header("Authorization", self._access.header)
        if start or stop is not None:
            request.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
        try:
            with closing(self._open(request)) as answer:
                _check(answer, url, start)
                at = start
                while stop is None or at < stop:
                    piece = _piece(answer, PIECE if stop is None else min(PIECE, stop - at))
                    if not piece:
                        if answer.length:
                            raise FleetingError(f"it ended {answer.length:,} bytes too early")
                        return
                    yield piece
                    at += len(piece)
        except urllib.error.HTTPError as exc:
            with exc:
                raise _told(exc, url, self._access.tip) from None
        except _BROKEN as exc:
            raise _told_broken(exc, url) from None
        except ValueError as exc:  # of what a server wrote where a number or an address should be
            raise RemoteError(f"{url}: its answer cannot be read ({exc})") from None

    def _open(self, request: urllib.request.Request) -> Any:
        """The answer once its head is there, which has to be soon: a head may come byte by byte."""
        _OF_THREAD.sockets = []
        with _soon():
            return self._opener.open(request, timeout=STALL_S)


_OF_THREAD = local()  # the sockets of the request that a thread makes


def _piece(answer: Any, nbytes: int) -> bytes:
    """What came; what comes in chunks ends in lines, which may be without an end."""
    with _soon() if answer.chunked else nullcontext():
        return cast("bytes", answer.read1(nbytes))


@contextmanager
def _soon() -> Iterator[None]:
    """It is over within HEAD_S, or the other side is hung up on."""
    timer = Timer(HEAD_S, _shut, [_OF_THREAD.sockets])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(sockets: list[socket.socket]) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class _PlainConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _OF_THREAD.sockets.append(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _OF_THREAD.sockets.append(self.sock)


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_PlainConnection, req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req, context=self._context)  # type: ignore[attr-defined]


def _check(answer: Any, url: str, start: int) -> None:
    """That an answer is what was asked for, as far as its head tells."""
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RemoteError(
            f"{url}: comes packed ({encoding}) though it was asked for as it is",
            tip="turn compression off for this folder of the server",
        )
    if answer.status == 206:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start:
            raise FleetingError(f"asked for bytes from {start} on, got {answer.headers.get('Content-Range')!r}")
    elif answer.status != 200:
        raise RemoteError(f"{url}: answers with status {answer.status}")
    elif start:
        raise NoRangesError


def _told(exc: urllib.error.HTTPError, url: str, tip: str) -> Exception:
    """What a status means."""
    if exc.code in (404, 410):
        return NotThereError(f"{url}: is not there")
    if exc.code in (401, 403, 407):
        return RemoteError(f"{url}: is not open to you ({exc.code} {_phrase(exc.code)})", tip=tip)
    if exc.code in (408, 425, 429) or exc.code >= 500:
        return FleetingError(f"{exc.code} {_phrase(exc.code)}", _seconds(exc.headers.get("Retry-After")))
    if exc.code in (301, 302, 303, 307, 308):
        return _not_followed(url, exc.headers.get("Location", "nowhere"))
    if exc.code == 416:
        return FleetingError("416: it is shorter than the manifest says")
    return RemoteError(f"{url}: {exc.code} {_phrase(exc.code)}")


def _phrase(status: int) -> str:
    """Of the standard: what a server writes beside its number may be anything."""
    return http.client.responses.get(status, "")


def _not_followed(url: str, target: str) -> RemoteError:
    parts = urlsplit(target)  # what else stands in an address may be a secret
    where = f"{parts.scheme}://{parts.hostname or ''}" if parts.scheme else "itself or another folder"
    return RemoteError(
        f"{url}: leads to {where}, which is not followed",
        tip=f"{REDIRECTS} redirects are, to other web servers, and from https: to https: only: give the address they end at",
    )


def _told_broken(exc: BaseException, url: str) -> Exception:
    reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
    if isinstance(reason, ssl.SSLCertVerificationError):
        return RemoteError(f"{url}: its certificate is not trusted ({reason.verify_message})")
    if isinstance(reason, ssl.SSLError) and "WRONG_VERSION" in str(reason):
        return RemoteError(f"{url}: does not speak https there", tip="write http: if it is to be so")
    if isinstance(reason, http.client.InvalidURL):
        return RemoteError(f"{url}: is no address ({reason})")
    if isinstance(reason, socket.gaierror):
        return FleetingError(f"there is no host {_proxy_of(url) or repr(urlsplit(url).hostname)}", hopeless=True)
    if isinstance(reason, ConnectionRefusedError):
        return FleetingError(f"nobody answers {f'at {proxy}' if (proxy := _proxy_of(url)) else 'there'}", hopeless=True)
    text = str(reason) or type(reason).__name__
    return FleetingError("nothing came" if isinstance(reason, TimeoutError) else text)


def _seconds(text: str | None) -> float:
    """Of Retry-After: seconds, or a date."""
    if not text:
        return 0.0
    if re.fullmatch("[0-9]{1,9}", text.strip()):
        return float(text)
    date = parsedate_tz(text)
    return max(0.0, mktime_tz(date) - time()) if date else 0.0


def _proxy_of(url: str) -> str | None:
    """The host through which a URL is reached, without what may be a secret; None: it is reached itself."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return f"{urlsplit(proxy if '//' in proxy else f'//{proxy}').hostname!r}, the proxy of the environment"


def _access_of(url: str) -> Access:
    """What ~/.netrc has of this host; over https alone."""
    tip = "put the name and password of the host into ~/.netrc"
    try:
        found = netrc.netrc().authenticators(urlsplit(url).hostname or "")
    except netrc.NetrcParseError as exc:  # also where others may read or own it
        return Access(None, f"~/.netrc was passed over: {exc.msg}")
    except (OSError, ValueError):
        return Access(None, tip)
    if found is None:
        return Access(None, tip)
    if urlsplit(url).scheme != "https":
        return Access(None, "what ~/.netrc has of this host is sent over https: only")
    return Access(
        "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode("ascii"), "~/.netrc has another password of it"
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A few redirects, to web servers only, and never from an encrypted one to one that is not."""

    max_redirections = REDIRECTS
    max_repeats = REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urlsplit(urljoin(req.full_url, newurl)).scheme
        if scheme not in ("http", "https") or (req.full_url.startswith("https:") and scheme != "https"):
            fp.close()
            raise _not_followed(req.full_url, newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

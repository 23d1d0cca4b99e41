"""A web server that does wrong on purpose: it serves a folder, and of some answers it makes what it is told to."""

from __future__ import annotations

import gzip
import mmap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

FAULTS = (
    "cut",  # the connection ends in the middle
    "stall",  # nothing more comes
    "whole",  # 200 with the whole file where a range was asked for
    "other range",  # 206 of a range that begins elsewhere
    "shifted",  # 206 that says what was asked for, and has other bytes
    "busy",  # 429, and when to come again
    "down",  # 503
    "corrupt",  # one byte is another one
    "packed",  # compressed, though nobody asked for that
    "changed",  # from here on the file is another one
    "loop",  # leads to itself
    "to a file",  # leads to file:
    "to ftp",  # leads to ftp:
    "endless",  # never ends
    "long",  # more bytes than there are
    "drip",  # a byte now and then
    "slow head",  # its head comes a byte now and then
    "no answer",  # the connection ends before a word
    "page",  # a page that says something, with 200
)

HOSTILE = (
    "to data",  # leads to data:
    "headers",  # lines of its head without an end
    "long header",  # one of them is long
    "continues",  # says "go on" without an end
    "trailer",  # what comes in chunks ends in lines without an end
    "later",  # 503, and come again in thirty years
    "packed bomb",  # compressed, and a thousand times as large
)

LEADS = {"loop": "", "to a file": "file:///etc/hostname", "to ftp": "ftp://127.0.0.1:9/samples.h5"}
LEADS |= {"to data": "data:text/plain,secrets"}


class Server(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        faults: path -> what is done to its next answers, one after the other; then it is served right.
        always: path -> what is done to each of them.
        sent: path -> bytes of its contents that were sent.
        asked: (path, Range) of every request.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.changed: set[str] = set()
        self.sent: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # whoever asked has gone


@contextmanager
def serving(folder: Path, faults: Mapping[str, list[str]] | None = None) -> Iterator[Server]:
    """A server of this folder, in a thread."""
    server = Server(folder)
    server.faults = {path: [*list_] for path, list_ in (faults or {}).items()}
    with running(server):
        yield server


@contextmanager
def running(server: Server) -> Iterator[None]:
    """It answers, in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def do_GET(self) -> None:
        path = unquote(self.path).lstrip("/")
        server, data = self.server, None
        wrong = bool(server.faults.get(path)) or path in server.always or path in server.changed
        try:
            with (server.folder / path).open("rb") as file:  # of a large file no more is read than was asked for
                data = file.read() if wrong else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            pass
        except ValueError:
            data = b""  # an empty file is not mapped
        self.serve(path, data)

    def serve(self, path: str, data: bytes | mmap.mmap | None) -> None:
        """A file as it is to go wrong; None: there is no such file."""
        given = self.headers.get("Range")
        self.server.asked.append((path, given))
        self.close_connection = True
        if data is None:
            self.send_error(404)
            return
        waiting = self.server.faults.get(path, [])
        fault = waiting.pop(0) if waiting else self.server.always.get(path)
        if fault == "changed":
            self.server.changed.add(path)
        if path in self.server.changed:
            data = bytes(byte ^ 0x55 for byte in data)
        start, stop = _range(given, len(data))
        self._answer(path, data, start, stop, given is not None, fault)

    def _answer(self, path: str, data: Any, start: int, stop: int, ranged: bool, fault: str | None) -> None:
        if fault in ("headers", "long header", "continues", "trailer"):
            self._without_end(fault)
            return
        if fault in ("busy", "down", "later"):
            self.send_response(429 if fault == "busy" else 503)
            self.send_header("Retry-After", "999999999" if fault == "later" else "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault in LEADS:
            self.send_response(302)
            self.send_header("Location", LEADS[fault] or self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "no answer":
            return
        if fault == "slow head":
            for byte in b"HTTP/1.1 200 OK\r\nServer: " + b"x" * 10_000:
                self.wfile.write(bytes([byte]))
                if self.server.stopped.wait(0.05):
                    return
        body = data[start:stop]
        if fault == "whole":
            ranged, start, body = False, 0, data
        elif fault == "shifted":
            body = (data + data)[start + 1 : stop + 1]
        elif fault == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif fault == "long":
            body += b"more"
        elif fault == "page":
            ranged, body = False, b"<html>please sign in</html>"
        elif fault == "packed bomb":
            body = gzip.compress(bytes(1 << 24))
        self.send_response(206 if ranged else 200)
        if ranged:
            told = start + 7 if fault == "other range" else start
            self.send_header("Content-Range", f"bytes {told}-{max(told, stop - 1)}/{len(data)}")
        if fault in ("packed", "packed bomb"):
            self.send_header("Content-Encoding", "gzip")
        if fault != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(path, body, fault)

    def _without_end(self, fault: str) -> None:
        """Lines, until nobody listens."""
        start, line = {
            "headers": (b"HTTP/1.1 200 OK\r\n", b"X-More: and more\r\n"),
            "long header": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 4096),
            "continues": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            "trailer": (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
                b"X-More: and more\r\n",
            ),
        }[fault]
        self.wfile.write(start)
        while not self.server.stopped.is_set():
            self.wfile.write(line * 100)

    def _send(self, path: str, body: bytes, fault: str | None) -> None:
        if fault in ("cut", "stall"):
            body = body[: len(body) // 2]
        if fault == "drip":
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                if self.server.stopped.wait(0.05):
                    return
        self.wfile.write(body)
        self.server.sent[path] = self.server.sent.get(path, 0) + len(body)
        while fault == "endless" and not self.server.stopped.is_set():
            self.wfile.write(bytes(1 << 16))
        if fault == "stall":
            self.wfile.flush()
            self.server.stopped.wait(30)


def _range(given: str | None, size: int) -> tuple[int, int]:
    if given is None:
        return 0, size
    first, _, last = given.removeprefix("bytes=").partition("-")
    return int(first), min(size, int(last) + 1 if last else size)

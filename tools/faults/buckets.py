"""`softcache push` and `pull` by obstore against moto, a stand-in for S3 in an environment of its own, also through a proxy that
does wrong: the right bytes, or an error and nothing that is seen; of two who push at once one is told."""

from __future__ import annotations

import http.client
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from faults.pulls import check_files, contents
from faults.report import Report, demand
from golden.indexed import make_indexed
from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST
from softcache.errors import RemoteError
from softcache.remote.places import parse_place
from softcache.share import pull, push

BUCKET = "s3://bucket"


def buckets(root: Path, count: int, seed: int, moto: Path | None) -> Report:
    """So many pushes and pulls of each kind.

    Args:
        moto: an environment that has moto[server]; None: one is made, which asks the registry for it.
    """
    report, draw = Report("buckets"), random.Random(seed)
    for name, rounds in (("first", 2), ("grown", 3), ("other", 1)):
        make_indexed(root / name, rounds=rounds)
    with moto_server(moto or environment(root / "moto")) as port, proxy(port, draw) as wrong:
        with settings(port):
            for number in range(count):
                with report.trial(f"plain {number}, seed {seed}"):
                    there_and_back(root, f"{BUCKET}/plain{number}", report)
                with report.trial(f"race {number}, seed {seed}"):
                    race(root, f"{BUCKET}/race{number}", "first", "other", report)
                with report.trial(f"race of extensions {number}, seed {seed}"):
                    race_of_extensions(root, f"{BUCKET}/both{number}", report)
                with report.trial(f"kill {number}, seed {seed}"):
                    killed(root, f"{BUCKET}/kill{number}", draw, report)
        with settings(wrong):
            for number in range(count):
                with report.trial(f"wrong {number}, seed {seed}"):
                    through_a_proxy(root, f"{BUCKET}/wrong{number}", report)
    return report


def there_and_back(root: Path, url: str, report: Report) -> None:
    """Pushed, extended, pushed again, pulled in both states."""
    first = push.run(root / "first", parse_place(url), quiet=True)
    demand(push.run(root / "first", parse_place(url), quiet=True).sent_files == 0, "sent again")
    grown = push.run(root / "grown", parse_place(url), quiet=True)
    demand(grown.sent_files == grown.files - first.files, f"{grown.sent_files} files sent of an extension")
    for id, cache in ((first.id, "first"), (grown.id, "grown")):
        same_bytes(root, parse_place(url, id), cache)
    report.counts["pushed, extended and pulled"] += 1


def race(root: Path, url: str, one: str, other: str, report: Report) -> None:
    """Two at once; each may come first."""
    told: dict[str, Exception | None] = {}

    def pushed(name: str) -> None:
        try:
            push.run(root / name, parse_place(url), quiet=True)
            told[name] = None
        except RemoteError as exc:
            told[name] = exc

    threads = [threading.Thread(target=pushed, args=(name,)) for name in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [name for name, error in told.items() if error is None]
    demand(len(won) == 1 and len(told) == 2, f"{won} came first: {told}")
    same_bytes(root, parse_place(url), won[0])
    report.counts["races: one came first, the other was told"] += 1


def race_of_extensions(root: Path, url: str, report: Report) -> None:
    """Somebody comes between the last look and the last step."""
    push.run(root / "first", parse_place(url), quiet=True)
    swap = push.publish

    def meanwhile(transport: Any, *rest: Any) -> None:
        transport.replace("push.json", b"{}")  # and took the claim away
        transport.replace(MANIFEST, b"somebody else's")
        swap(transport, *rest)

    with mock.patch.object(push, "publish", meanwhile):
        try:
            push.run(root / "grown", parse_place(url), quiet=True)
            demand(False, "replaced what somebody else pushed")
        except RemoteError as exc:
            demand("somebody else pushed there" in str(exc), str(exc))
    report.counts["extensions: whoever came second was told"] += 1


def killed(root: Path, url: str, draw: random.Random, report: Report) -> None:
    """Killed at any time; nothing is seen before all is there, and the same push goes on."""
    command = [sys.executable, "-m", "softcache", "push", str(root / "grown"), url, "--quiet"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(draw.uniform(0.2, 1.2))
    child.kill()
    code = child.wait()
    out = root / "seen"
    try:
        pull.run(parse_place(url), out, quiet=True)
        report.counts["kills: all was there"] += 1
    except RemoteError:
        demand(not (out / MANIFEST).exists(), "a cache opens")
        report.counts["kills: nothing was to be seen" if code else "ended with 0, and nothing is to be seen"] += 1
        demand(code != 0, "it said that all was there")
    shutil.rmtree(out, ignore_errors=True)
    push.run(root / "grown", parse_place(url), quiet=True)
    same_bytes(root, parse_place(url), "grown")
    report.counts["kills: gone on to the same bytes"] += 1


def through_a_proxy(root: Path, url: str, report: Report) -> None:
    """Answers that are cut, refused, late or of other bytes: tried again until they are right."""
    out, pushed = root / "out", False
    for _ in range(20):
        try:
            push.run(root / "first", parse_place(url), quiet=True)
            pushed = True
            break
        except RemoteError:
            report.counts["wrong answers: push refused"] += 1
    demand(pushed, "20 pushes failed")
    for _ in range(20):
        try:
            pull.run(parse_place(url), out, quiet=True)
            break
        except RemoteError:
            report.counts["wrong answers: pull refused"] += 1
            demand(not (out / MANIFEST).exists(), "a cache opens")
            check_files(out, contents(root / "first"))
    demand(contents(out) == contents(root / "first"), "other bytes")
    shutil.rmtree(out)
    report.counts["wrong answers: the right bytes in the end"] += 1


def same_bytes(root: Path, place: Any, cache: str) -> None:
    out = root / "out"
    pull.run(place, out, quiet=True)
    demand(contents(out) == contents(root / cache), f"{place}: other bytes than {cache}")
    demand(read_manifest(out).id == read_manifest(root / cache).id, "another id")
    shutil.rmtree(out)


def environment(path: Path) -> Path:
    """A new one, with moto."""
    venv.create(path, with_pip=True)
    subprocess.run([path / "bin" / "pip", "install", "-q", "moto[server]"], check=True)
    return path


@contextmanager
def moto_server(environment: Path) -> Iterator[int]:
    """On this machine alone; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [str(environment / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        for _ in range(600):
            try:
                urllib.request.urlopen(request, timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield port
    finally:
        child.terminate()
        child.wait()


@contextmanager
def settings(port: int) -> Iterator[None]:
    """What the environment says of S3; nothing of the user's is used."""
    told = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    told |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", "NO_PROXY": "127.0.0.1"}
    with mock.patch.dict(os.environ, told):
        yield


@contextmanager
def proxy(port: int, draw: random.Random) -> Iterator[int]:
    """Passes on what it hears; of some answers it makes something else."""

    class Passing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def passed(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.close_connection = True
            fault = draw.choice(("busy", "lost", "cut", "corrupt")) if draw.random() < 0.05 else None
            if fault == "busy":
                self.send_error(503)
                return
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            link.request(self.command, self.path, body, dict(self.headers))
            answer = link.getresponse()
            data = answer.read()
            if fault == "lost":
                return  # it was done, and nobody hears of it
            if fault == "corrupt" and self.command == "GET" and data:
                data = bytes([data[0] ^ 1]) + data[1:]
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.send_header("Connection", "close")
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = passed

    server = ThreadingHTTPServer(("127.0.0.1", 0), Passing)
    server.daemon_threads = True
    server.handle_error = lambda *given: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()

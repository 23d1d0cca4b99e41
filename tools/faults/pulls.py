"""`softcache pull` from a server that does wrong, and killed at any time: the right bytes, or an error and no cache."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from faults.hub_server import TOKEN, HubServer
from faults.hub_server import hub as hub_of
from faults.report import Report, demand
from faults.web_server import FAULTS, HOSTILE, Server, serving
from golden.indexed import make_indexed
from softcache.cache.manifest import read_manifest
from softcache.cache.schema import CARD, MANIFEST, PROVENANCE
from softcache.errors import CacheError, RemoteError, SoftcacheError, UnfinishedCacheError
from softcache.remote import patience, web
from softcache.remote.places import Place, parse_place
from softcache.share import pull


def pulls(root: Path, count: int, seed: int, *, hub: bool = False) -> Report:
    """So many pulls of a small cache; each file may be served wrong, some once or twice, some always.

    Args:
        hub: from a repository of a hub, whose large files lie at another address.
    """
    report, draw = Report("pulls"), random.Random(seed)
    make_indexed(root / "served", rounds=2)
    wanted, id = contents(root / "served"), read_manifest(root / "served").id
    names = sorted(wanted)
    with hasty(), serving_hub(root / "served") if hub else serving(root / "served") as server:
        for number in range(count):
            out = root / "out"
            with report.trial(f"pull {number}, seed {seed}"):
                spoil(server, names, draw)
                told = {**server.faults, **server.always}
                began = time.monotonic()
                try:
                    pull.run(place_of(server, id), out, quiet=True)
                except RemoteError:
                    report.counts["refused"] += 1
                    demand(not (out / MANIFEST).exists(), f"a cache opens after {told}")
                    check_files(out, wanted)
                else:
                    report.counts["pulled"] += 1
                    demand(contents(out) == wanted, f"other bytes after {told}")
                demand(time.monotonic() - began < 60, f"{time.monotonic() - began:.0f} s after {told}")
                heal(server)
                before = set(contents(out)) if out.exists() else set()
                server.asked.clear()
                pull.run(place_of(server, id), out, quiet=True)
                demand(contents(out) == wanted, f"other bytes once all is well, after {told}")
                again = {path for path, _ in server.asked} & before - {f"manifests/{id}.json"}
                demand(not again, f"fetched again: {sorted(again)[:3]}")
            shutil.rmtree(out, ignore_errors=True)
    return report


def killed_pulls(root: Path, count: int, seed: int) -> Report:
    """So many kills of a pull at random times; then it goes on to the same bytes."""
    report, draw = Report("killed pulls"), random.Random(seed)
    make_indexed(root / "served", rounds=3)
    wanted, id = contents(root / "served"), read_manifest(root / "served").id
    with serving(root / "served") as server:
        began = time.monotonic()
        pull.run(place_of(server, id), root / "undisturbed", quiet=True)
        took = time.monotonic() - began
        for number in range(count):
            out = root / "out"
            with report.trial(f"kill {number}, seed {seed}"):
                for _ in range(draw.randint(1, 3)):
                    killed(place_of(server, id), out, draw.uniform(0, took))
                    judge(out, wanted, report)
                pull.run(place_of(server, id), out, quiet=True)
                demand(contents(out) == wanted, "other bytes")
            shutil.rmtree(out, ignore_errors=True)
    return report


def killed(place: Place, out: Path, after_s: float) -> None:
    """A child that pulls, and is killed."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            pull.run(place, out, quiet=True)
            code = 0
        except SoftcacheError:
            pass
        finally:
            os._exit(code)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def judge(out: Path, wanted: dict[str, bytes], report: Report) -> None:
    """What a reader meets: nothing, a pull under way, or the whole cache; and every file under its name is right."""
    try:
        read_manifest(out)
        report.counts["was whole"] += 1
    except UnfinishedCacheError:
        report.counts["was under way"] += 1
    except CacheError as exc:
        demand(not (out / MANIFEST).exists(), str(exc))
        report.counts["had not begun"] += 1
    check_files(out, wanted)


def check_files(out: Path, wanted: dict[str, bytes]) -> None:
    """Whatever has the name of a file has its bytes."""
    for path, data in contents(out).items() if out.exists() else ():
        demand(path not in wanted or data == wanted[path], f"{path} has other bytes")


def contents(root: Path) -> dict[str, bytes]:
    """Every file that a pull brings; the card is made anew, and what a dump left stays behind."""
    newest = f"manifests/{read_manifest(root).id}.json" if (root / MANIFEST).exists() else ""
    found = {}
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        left = name in (CARD, PROVENANCE) or name.startswith("dump/") or name.endswith((".pulling", "pull.json"))
        if path.is_file() and not left and (not name.startswith("manifests/") or name == newest):
            found[name] = path.read_bytes()
    return found


def spoil(server: Server, names: list[str], draw: random.Random) -> None:
    """One to four files are served wrong."""
    heal(server)
    for path in draw.sample(names, draw.randint(1, 4)):
        fault = draw.choice(FAULTS + HOSTILE)
        if draw.random() < 0.15:
            server.always[path] = fault
        else:
            server.faults[path] = [
                fault if draw.random() < 0.7 else draw.choice(FAULTS + HOSTILE) for _ in range(draw.randint(1, 3))
            ]


def heal(server: Server) -> None:
    server.faults.clear()
    server.always.clear()
    server.changed.clear()


def place_of(server: Server, id: str) -> Place:
    return parse_place("hf:team/cache" if isinstance(server, HubServer) else server.url, id)


@contextmanager
def serving_hub(folder: Path) -> Iterator[HubServer]:
    """A hub with this cache, for whom the environment names no other."""
    with hub_of() as server, mock.patch.dict(os.environ, {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN}):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        server.lay("team/cache", {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        yield server
        demand(all(heard is None for where, heard in server.heard if where == "files"), "the token was sent elsewhere")


@contextmanager
def hasty() -> Iterator[None]:
    """Times divided by forty: what is waited for is the same."""
    kept = [(module, name, getattr(module, name)) for module, name in WAITS]
    try:
        for module, name, value in kept:
            setattr(module, name, value / 40)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


WAITS = [(patience, name) for name in ("HOPELESS_S", "NOBODY_S", "SLOW_S", "FIRST_PAUSE_S", "LONGEST_PAUSE_S")]
WAITS += [(web, "STALL_S"), (web, "HEAD_S")]

"""Does a dump survive whatever a machine can do to it? Kills, power cuts, faults of every system call, full disks, crowds.

    python tools/faults kill --count 1000         SIGKILL at random times, and after every call of the file layer
    python tools/faults kill --full-command 20    the same for `python -m softcache dump`
    python tools/faults prefixes                  every prefix of the calls, under a model of what survives a power cut
    python tools/faults strace                    are the recorded calls all that the kernel sees?
    python tools/faults errno                     ENOSPC, EDQUOT, EIO, EROFS, EACCES, EINTR, short writes: at every call
    python tools/faults fulldisk                  a really full small file system, at many fill levels
    python tools/faults many                      8 dumpers and 16 readers on one folder

The writer is small, torch-free and deterministic: two members, views, dense rows, constants, a probe, two parts, and an
extension by one view. After whatever happened a reader must meet the old cache, the new one, or "unfinished"; nothing that
was finished may be lost; and the same call must end in the bytes of an undisturbed run. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import errno
import gc
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.dump_folder import read_journals, work_folder
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.reader import CacheReader
from softcache.cache.samples import build_table
from softcache.cache.schema import ArraySpec, Layout, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Part, Setup
from softcache.errors import (
    CacheError,
    DamagedCacheError,
    DiskSpaceError,
    DumpError,
    LockedError,
    SoftcacheError,
    UnfinishedCacheError,
)
from softcache.files import durable as files
from softcache.report.tables import table

ROWS, CLASSES = 600, ("ant", "bee", "cat", "dog")
FIRST = Layout(num_rows=ROWS, num_views=2, shard_rows=512, shard_views=2)
SECOND = Layout(num_rows=ROWS, num_views=1, shard_rows=512, shard_views=1, first_view=2, first_part=len(FIRST))
CALLS = ("open", "ftruncate", "posix_fallocate", "pwrite", "write", "fsync", "close", "replace", "mkdir", "unlink")
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EINTR)


class Broken(Exception):
    """A promise that did not hold."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


@dataclass
class Report:
    """What one sub-command tried and found."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trial(self, where: str) -> Iterator[None]:
        """One trial; whatever it raises is a failure."""
        self.counts["trials"] += 1
        try:
            yield
        except Exception as exc:
            told = str(exc) if isinstance(exc, Broken) else "".join(traceback.format_exception(exc))
            self.failures.append(f"{where}: {told}")
        else:
            self.counts["as promised"] += 1


# ---- a small dump ----------------------------------------------------------------------------------------------------


def logits_at(rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(n, C) float32: no two records are alike."""
    return ((rows * 8 + views)[:, None] * 4 + np.arange(len(CLASSES))).astype("<f4")


def codes_at(rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(n, 4) uint8."""
    return ((rows * 7 + views * 13)[:, None] + np.arange(4)).astype(np.uint8)


def _plan(rounds: int) -> Plan:
    fields = [("level", 0, "<f4", []), ("dense", 4, "<u4", []), ("codes", 8, "|u1", [4])]
    lowrank = {"max_kl": "0.0001", "at_temperature": "4.0"}
    made_with: dict[str, Any] = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    made_with |= {"device": "cpu", "batch_size": 128, "threads": 1, "autocast": "none"}

    def member(name: str, codec: str, parameters: Mapping[str, str], fields: Sequence[Any]) -> MemberInfo:
        listed = [dict(zip(("name", "offset", "dtype", "shape"), one, strict=True)) for one in fields]
        about = {"name": codec, "parameters": dict(parameters), "fields": listed}
        return MemberInfo(name, "toy", "0" * 64, "logits", "float32", class_order=None, codec=about)

    layouts = (FIRST, SECOND)[:rounds]
    return Plan(
        samples=SampleInfo("toy", ROWS, "", "item", True, False, "natural", "0"),
        class_names=CLASSES,
        views=ViewInfo(
            count=sum(layout.num_views for layout in layouts),
            first=0,
            root_seed="0",
            replay="derived",
            steps=({"name": "shift", "version": 1, "parameters": {"pixels": "1"}},),
        ),
        members=(member("plain", "float32", {}, []), member("compact", "lowrank", lowrank, fields)),
        rounds=tuple(Round(layout, ("plain", "compact"), True, made_with) for layout in layouts),
    )


def _setup() -> Setup:
    keys = [f"toy/{i:04d}" for i in range(ROWS)]
    ids = np.array([int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") for k in keys], "<u8")
    digests = np.arange(ROWS * 16).reshape(ROWS, 16).astype(np.uint8)
    samples = build_table(
        keys, ids, np.arange(ROWS) % len(CLASSES), digests, len(CLASSES), np.arange(ROWS), store_keys=True
    )
    probe = {
        "rows": np.array([3, 599], "<u8"),
        "views": np.array([0, 1], "<u4"),
        "shapes": np.array([[2, 2, 1], [2, 2, 1]], "<u4"),
        "pixels": np.arange(8, dtype=np.uint8),
    }
    return Setup(samples, probe, {"compact": {"codec_basis": np.eye(4, dtype="<f4")}})


def _write_spans(writer: CacheWriter, pause_s: float) -> None:
    for span in writer.my_spans():
        place = (span.views, span.rows)
        specs = {
            "plain": [ArraySpec("logits", "<f4", (*place, 4)), ArraySpec("eps", "<f2", place)],
            "compact": [ArraySpec("records", "|u1", (*place, 12))],
        }
        with writer.span(span, specs) as out:
            for rows, views in _batches(span):
                time.sleep(pause_s)
                number = np.zeros(len(rows), "<u4")
                dense = np.flatnonzero(rows % 97 == 0)
                if len(dense):
                    number[dense] = out.append_dense(
                        "compact", logits_at(rows, views)[dense].astype("<f2")
                    ) + np.arange(len(dense))
                records = np.zeros((len(rows), 12), np.uint8)
                records[:, 4:8], records[:, 8:] = number.view(np.uint8).reshape(-1, 4), codes_at(rows, views)
                about = MemberStatistics(records=len(rows), labelled=len(rows), correct=len(rows) // 2)
                out.append(None, {"pixel_digests": (rows * 3 + views).astype("<u4")})
                out.append("plain", {"logits": logits_at(rows, views), "eps": np.zeros(len(rows), "<f2")}, about)
                out.append("compact", {"records": records}, replace(about, dense=len(dense)))


def _batches(span: Span) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for view in range(span.view_start, span.view_stop):
        for start in range(span.row_start, span.row_stop, 128):
            rows = np.arange(start, min(start + 128, span.row_stop))
            yield rows, np.full(len(rows), view)


def write_part(path: Path, part: Part, *, extend: bool = False, pause_s: float = 0.0) -> Manifest | None:
    """One process's share of the dump, or of its extension by a view."""
    base = read_manifest(path) if extend else None
    if base is not None and len(base.plan.rounds) == 2:
        return base
    with CacheWriter(
        path, _plan(1 + extend), lambda: Setup(_setup().samples) if extend else _setup(), part=part, base=base
    ) as writer:
        _write_spans(writer, pause_s)
        return writer.commit(lambda manifest: f"# {manifest.id}\n", {"host": "any"})


def write_cache(path: Path) -> None:
    """The dump in two parts, then its extension; whatever is there already is not done again."""
    write_part(path, Part(1, 2))
    write_part(path, Part(2, 2))
    demand(write_part(path, Part(), extend=True) is not None, "the extension was not committed")


# ---- the file layer, watched -----------------------------------------------------------------------------------------

OnCall = Callable[[int, str, Callable[..., Any], tuple[Any, ...]], Any]


class Layer:
    """Stands in for `os` in softcache.files.durable: numbers every call that may change a disk, and has `on_call` make it."""

    def __init__(self, on_call: OnCall) -> None:
        self.on_call, self.count = on_call, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def numbered(*args: Any) -> Any:
            self.count += 1
            return self.on_call(self.count, name, real, args)

        return numbered


@contextmanager
def layer(on_call: OnCall) -> Iterator[Layer]:
    """The file layer with `on_call` between it and the system."""
    stand_in = Layer(on_call)
    vars(files)["os"] = stand_in
    try:
        yield stand_in
    finally:
        vars(files)["os"] = os


def half(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The first half of a write."""
    return real(args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)], *args[2:])


@dataclass(frozen=True)
class Call:
    """One call of the file layer. `data` is what was written; `size` of ftruncate and posix_fallocate; `to` of a rename."""

    name: str
    path: str
    flags: int = 0
    offset: int = 0
    size: int = 0
    data: bytes = b""
    to: str = ""


Choice = Callable[[Sequence[Call]], Sequence[int]]  # numbers of calls, counted from 1


def everywhere(calls: Sequence[Call]) -> Sequence[int]:
    return range(1, len(calls) + 1)


def one_of_each(calls: Sequence[Call]) -> Sequence[int]:
    """The last of each kind of call on each kind of file."""
    kinds = {(c.name, re.sub(r"\d+|\.tmp-.*", "", c.to or c.path)): n for n, c in enumerate(calls, start=1)}
    return sorted(kinds.values())


class Recorder:
    """The calls of the file layer in order, by path relative to `root`."""

    def __init__(self, root: Path, *, stop_after: int = 2**62) -> None:
        self.root, self.calls, self.stop_after = root, list[Call](), stop_after
        self._paths: dict[int, str] = {}

    def __call__(self, number: int, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if number > self.stop_after:  # the process is dead: what the code does about its exception is not done
            if name == "close":
                real(*args)
            raise Stopped
        result = real(*args)
        if name == "open":
            self._paths[result] = self._relative(args[0])
            self.calls.append(Call(name, self._paths[result], flags=args[1]))
        elif name == "replace":
            self.calls.append(Call(name, self._relative(args[0]), to=self._relative(args[1])))
        elif name in ("mkdir", "unlink"):
            self.calls.append(Call(name, self._relative(args[0])))
        else:
            path = self._paths.pop(args[0]) if name == "close" else self._paths[args[0]]
            if name in ("pwrite", "write"):
                offset = args[2] if name == "pwrite" else -1
                self.calls.append(Call(name, path, offset=offset, data=bytes(args[1])[:result]))
            else:
                self.calls.append(Call(name, path, size=args[-1] if name in ("ftruncate", "posix_fallocate") else 0))
        return result

    def _relative(self, path: Any) -> str:
        return os.path.relpath(os.fspath(path), self.root)


class Stopped(BaseException):
    """The process that a recorder has stopped."""


# ---- what must hold --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """An undisturbed run.

    Attributes:
        ids: of the dump, and of its extension.
        old, new: relative path -> bytes, before and after the extension; without `dump/` and provenance.json.
        calls: of the file layer, all of them.
    """

    ids: tuple[str, str]
    old: Mapping[str, bytes]
    new: Mapping[str, bytes]
    calls: Sequence[Call]


def contents(path: Path) -> dict[str, bytes]:
    """Relative path -> bytes of everything that is a function of the plan."""
    found = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {n: p.read_bytes() for n, p in found.items() if not n.startswith("dump/") and n != "provenance.json"}


def undisturbed(root: Path) -> Expected:
    root.mkdir(exist_ok=True)
    path, recorder = root / "cache", Recorder(root)
    with layer(recorder):
        write_part(path, Part(1, 2))
        first = write_part(path, Part(2, 2))
        old = contents(path)
        second = write_part(path, Part(), extend=True)
    assert first is not None and second is not None
    expected = Expected((first.id, second.id), old, contents(path), recorder.calls)
    demand(judge(path, expected) == "new", "an undisturbed run is not whole")
    return expected


def judge(path: Path, expected: Expected) -> str:
    """What a reader meets: "nothing", "unfinished", "old" or "new". Broken if it is anything else, or not what it says it is."""
    found = contents(path) if path.is_dir() else {}
    for name, data in found.items():
        if ".tmp-" not in name:
            demand(data in (expected.old.get(name), expected.new.get(name)), f"{name} is there, with other bytes")
    for number in range(2):
        for entries in read_journals(work_folder(path, number)).values():
            for file in (file for entry in entries for file in entry["files"]):
                demand(file["path"] in found, f"{file['path']} was finished, and is lost")
    try:
        manifest = read_manifest(path)
    except UnfinishedCacheError:
        return "unfinished"
    except DamagedCacheError:
        raise
    except CacheError:
        demand(not (path / "dump").exists(), "a dump under way is not recognised")
        return "nothing"
    demand(manifest.id in expected.ids, f"the id is {manifest.id}")
    for file in manifest.files:
        data = found.get(file.path, b"")
        demand(
            len(data) == file.nbytes and hashlib.sha256(data).hexdigest() == file.sha256, f"{file.path} is not whole"
        )
    read_everything(path, manifest.id)
    return ("old", "new")[expected.ids.index(manifest.id)]


def read_everything(path: Path, id: str | None = None) -> int:
    """Every record of the cache through the reader; Broken if one is not the one that was written. Returns the views."""
    reader = CacheReader(path, id=id, check_blocks="always")
    views = reader.manifest.plan.views.count
    at = np.repeat(np.arange(ROWS), views), np.tile(np.arange(views), ROWS)
    demand(np.array_equal(reader.gather("plain", "logits", *at), logits_at(*at)), "other logits")
    demand(np.array_equal(reader.gather(None, "pixel_digests", *at), at[0] * 3 + at[1]), "other pixel digests")
    records = reader.gather("compact", "records", *at)
    demand(np.array_equal(records[:, 8:], codes_at(*at)), "other codes")
    numbers = np.ascontiguousarray(records[:, 4:8]).view("<u4")[:, 0]
    kept = np.flatnonzero(numbers)
    dense = reader.dense("compact", at[0][kept], at[1][kept], numbers[kept])
    demand(np.array_equal(dense, logits_at(*at)[kept].astype("<f2")) and len(kept) == 7 * views, "other dense rows")
    demand(len(reader.samples) == ROWS, "other samples")
    return views


def resume(path: Path, expected: Expected) -> None:
    """The same call again must end in the bytes of an undisturbed run, leave what was finished alone, and clear up."""
    finished = {
        name: (path / name).stat().st_ino
        for number in range(2)
        for entries in read_journals(work_folder(path, number)).values()
        for name in (file["path"] for entry in entries for file in entry["files"])
    }
    write_cache(path)
    ended = contents(path)
    demand(ended.keys() == expected.new.keys(), f"resumed to other files: {sorted(ended.keys() ^ expected.new.keys())}")
    for name, data in ended.items():
        demand(data == expected.new[name], f"{name} was resumed to other bytes")
    demand(judge(path, expected) == "new", "resumed, but not whole")
    left = [str(p.relative_to(path)) for p in path.rglob("*.tmp-*")]
    demand(not left, f"left behind: {left}")
    for name, inode in finished.items():
        demand((path / name).stat().st_ino == inode, f"{name} was finished, and is written again")


# ---- kill ------------------------------------------------------------------------------------------------------------


def killed_writer(path: Path, moment: float | int, *, torn: bool) -> str:
    """A child that writes the cache and is killed: after so many seconds, or after its n-th call. Says where it stood."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(receive)

        def on_call(number: int, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            last = number == moment and isinstance(moment, int)
            writes = name in ("pwrite", "write")
            result = half(name, real, args) if last and torn and writes else real(*args)
            if last:
                os.write(send, f"{'half of' if torn and writes else 'after'} {name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        code = 1
        try:
            with layer(on_call):
                write_cache(path)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(send)
    if isinstance(moment, float):
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with os.fdopen(receive, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    demand(not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the writer failed")
    if os.WIFEXITED(status):
        return "had finished"
    return told or "at a random time"


def kill(root: Path, count: int, seed: int) -> Report:
    """So many kills, half at random times and half after a call; then each cache is resumed."""
    report, draw = Report("kill"), random.Random(seed)
    expected = undisturbed(root / "undisturbed")
    started = time.monotonic()
    killed_writer(root / "timed", 60 * 60 * 24 * 365, torn=False)
    seconds, points = time.monotonic() - started, itertools.count()
    while report.counts["kills"] < count:
        path = root / "killed"
        with report.trial(f"cache {report.counts['trials']}"):
            for _ in range(draw.randint(1, 3)):
                targeted = report.counts["kills"] % 2 == 0
                # a stride that is no divisor of their number: every point is met before one is met again
                moment = 1 + next(points) * 7 % len(expected.calls) if targeted else draw.uniform(0, seconds)
                where = killed_writer(path, moment, torn=draw.random() < 0.5)
                report.counts["kills"] += where != "had finished"
                report.counts[f"killed {where}" if where != "had finished" else "had finished before"] += 1
                report.counts[f"a reader then met: {judge(path, expected)}"] += 1
            resume(path, expected)
        shutil.rmtree(path, ignore_errors=True)
    return report


def softcache(*arguments: str) -> None:
    """One command, which must succeed."""
    command = [sys.executable, "-m", "softcache", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    demand(done.returncode == 0, f"softcache {arguments[0]}: exit code {done.returncode}: {done.stdout[-1000:]}")


def kill_full_command(root: Path, count: int, seed: int) -> Report:
    """So many kills of `python -m softcache dump` with digits and a small teacher, at random times; each is resumed."""
    report, draw = Report("kill --full-command"), random.Random(seed)
    model, teacher, path = "softcache:mlp?hidden=16", str(root / "teacher"), root / "killed"
    train = ["--student", model, "--loss", "ce", "--epochs", "1", "--threads", "1", "--quiet", "--out", teacher]
    softcache("train", "--data", "digits", *train)
    dump = ["dump", "--data", "digits", "--teacher", f"{model}@{teacher}", "--policy", "shift:pixels=1", "--views", "2"]
    dump += ["--shard-rows", "256", "--threads", "1", "--workers", "0", "--quiet", "--out"]
    command = [sys.executable, "-m", "softcache", *dump]

    def started(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL)

    def wait_for(file: Path, process: subprocess.Popen[bytes]) -> float:
        begin = time.monotonic()
        while not file.exists() and process.poll() is None:
            time.sleep(0.001)
        return time.monotonic() - begin

    begin, process = time.monotonic(), started(root / "whole")
    wait_for(root / "whole", process)
    writing_s = wait_for(root / "whole" / "manifest.json", process)
    demand(process.wait() == 0, "an undisturbed dump failed")
    seconds, whole = time.monotonic() - begin, contents(root / "whole")
    while report.counts["kills"] < count:
        with report.trial(f"cache {report.counts['trials']}"):
            process = started(path)
            waits = report.counts["kills"] % 2  # most of the time goes by before the first file
            if waits:
                wait_for(path, process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, writing_s if waits else seconds))
            process.kill()
            if process.wait() == -signal.SIGKILL:
                report.counts["kills"] += 1
            else:  # the machine was slower when the first one was timed
                report.counts["had finished before"] += 1
                seconds, writing_s = seconds * 0.8, writing_s * 0.8
            report.counts[f"a reader then met: {_state_of(path, whole)}"] += 1
            softcache(*dump, str(path))
            demand(contents(path) == whole, "resumed to other bytes")
            softcache("verify", str(path), "--full")
        shutil.rmtree(path, ignore_errors=True)
    return report


def _state_of(path: Path, whole: Mapping[str, bytes]) -> str:
    """How far a killed command is, as a reader is told; Broken where something is there that is not whole."""
    for name, data in contents(path).items():
        demand(".tmp-" in name or data == whole[name], f"{name} is there, with other bytes")
    try:
        read_manifest(path)
        return "whole"
    except UnfinishedCacheError as exc:
        return exc.message.rpartition("finished: ")[2]
    except DamagedCacheError:
        raise
    except CacheError:
        demand(not (path / "dump").exists(), "a dump under way is not recognised")
        return "nothing"


# ---- prefixes, under a model of what survives ------------------------------------------------------------------------


@dataclass(eq=False)
class Inode:
    """A file: what a process reads now, what is surely on the disk, and what was done since."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def do(self, what: str, number: int, data: bytes = b"") -> None:
        self.pending.append((what, number, data))
        _change(self.data, what, number, data)

    def sync(self) -> None:
        self.durable, self.pending = bytes(self.data), []


def _change(target: bytearray, what: str, number: int, data: bytes) -> None:
    if what == "cut":
        del target[number:]
        target.extend(bytes(number - len(target)))
    else:
        target.extend(bytes(max(0, number + len(data) - len(target))))
        target[number : number + len(data)] = data


@dataclass(eq=False)
class Folder:
    """A folder: its names now, those that are surely on the disk, and what was done to them since."""

    names: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)

    def do(self, name: str, node: Any, instead_of: str = "") -> None:
        self.pending.append((name, instead_of, node))
        _rename(self.names, name, instead_of, node)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.names), []


def _rename(names: dict[str, Any], name: str, instead_of: str, node: Any) -> None:
    names.pop(instead_of, None)
    names.pop(name, None)
    if node is not None:
        names[name] = node


class Disk:
    """A file system that keeps only what was synced: contents by fsync of the file, names by fsync of their folder."""

    def __init__(self) -> None:
        self.root = Folder()

    def apply(self, call: Call) -> None:
        folder, name = self._place(call.path)
        node: Any = folder.names.get(name) if name else folder  # "" is the folder around the cache
        if call.name == "mkdir":
            folder.do(name, Folder())
        elif call.name == "unlink":
            folder.do(name, None)
        elif call.name == "replace":
            folder.do(self._place(call.to)[1], node, instead_of=name)
        elif call.name == "fsync":
            node.sync()
        elif call.name == "open" and call.flags & os.O_CREAT:
            if node is None:
                folder.do(name, node := Inode())
            if call.flags & os.O_TRUNC:
                node.do("cut", 0)
        elif call.name == "ftruncate":
            node.do("cut", call.size)
        elif call.name == "posix_fallocate":
            node.do("cut", max(call.size, len(node.data)))
        elif call.name in ("pwrite", "write"):
            node.do("write", len(node.data) if call.offset < 0 else call.offset, call.data)

    def _place(self, path: str) -> tuple[Folder, str]:
        *folders, name = ("" if path == "." else path).split("/")
        at = self.root
        for folder in folders:
            at = at.names[folder]
        return at, name

    def survivors(self, how: str, draw: random.Random) -> dict[str, bytes | None]:
        """Path -> bytes (None: a folder) after a power cut.

        Args:
            how: "all" of the calls took effect; those not synced are "lost"; every name is there, but of the bytes that were
                not synced only some are ("torn"); or of both some are ("mixed").
        """
        found: dict[str, bytes | None] = {}

        def walk(folder: Folder, prefix: str) -> None:
            names = dict(folder.names if how in ("all", "torn") else folder.durable)
            for change in folder.pending if how == "mixed" else []:
                if draw.random() < 0.5:
                    _rename(names, change[0], change[1], change[2])
            for name, node in names.items():
                if isinstance(node, Folder):
                    found[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    found[prefix + name] = bytes(node.data) if how == "all" else _survived(node, how, draw)

        walk(self.root, "")
        return found


def _survived(file: Inode, how: str, draw: random.Random) -> bytes:
    data = bytearray(file.durable)
    for what, number, written in file.pending if how != "lost" else []:
        if draw.random() < 0.5:
            torn = len(written) * draw.randrange(3) // 2
            _change(data, what, number, written[:torn])
    return bytes(data)


def lay_out(root: Path, found: Mapping[str, bytes | None]) -> Path:
    """The survivors as files; the cache folder among them."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, data in found.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    return root / "cache"


SURVIVALS = ("all", "lost", "torn", "mixed")
STATES = ("nothing", "unfinished", "old", "new")


def prefixes(root: Path, seed: int, *, at: Choice = everywhere, resumed_at: Choice = everywhere) -> Report:
    """Every prefix of the calls, under every model.

    Args:
        at: after which calls the power fails.
        resumed_at: after which of them that state is resumed as well; and after which calls a process dies, the next one
            goes on to the end, and then the power fails.
    """
    report, draw = Report("prefixes"), random.Random(seed)
    expected = undisturbed(root / "undisturbed")
    report.counts["calls of the file layer"] = len(expected.calls)
    disk, reached = Disk(), dict.fromkeys(SURVIVALS, 0)
    cuts, resumes = {*at(expected.calls), len(expected.calls)}, {*resumed_at(expected.calls)}
    for number, call in enumerate(expected.calls, start=1):
        disk.apply(call)
        for how in SURVIVALS if number in cuts else ():
            with report.trial(f"{how} of the first {number} calls, up to {call.name} {call.to or call.path}"):
                path = lay_out(root / "replayed", disk.survivors(how, draw))
                state = judge(path, expected)
                report.counts[f"{how}: {state}"] += 1
                if how in ("all", "lost"):  # the others are drawn anew each time
                    demand(STATES.index(state) >= reached[how], f"from {STATES[reached[how]]} back to {state}")
                    reached[how] = STATES.index(state)
                if number in resumes:
                    resume(path, expected)
                    report.counts["resumed"] += 1
    with report.trial("the last call"):
        demand(reached["all"] == reached["lost"] == STATES.index("new"), "a power cut undoes the finished cache")
    for number in sorted(resumes):
        with report.trial(f"killed after {number} calls, resumed, power cut"):
            path = lay_out(root / "replayed", after_resume(root / "resumed", number).survivors("lost", draw))
            demand(judge(path, expected) == "new", "what was said to be done is undone")
            report.counts["killed, resumed, power cut: new"] += 1
    return report


def after_resume(root: Path, number: int) -> Disk:
    """A disk on which a process died after so many calls, and another one went on to the end."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    died, went_on = Recorder(root, stop_after=number), Recorder(root)
    with layer(died), suppress(Stopped):
        write_cache(root / "cache")
    with layer(went_on):
        write_cache(root / "cache")
    disk = Disk()
    for call in (*died.calls, *went_on.calls):
        disk.apply(call)
    return disk


# ---- strace ----------------------------------------------------------------------------------------------------------

TRACED = "open,openat,creat,pwrite64,write,writev,pwritev,fsync,fdatasync,ftruncate,truncate,fallocate,rename,renameat"
TRACED += ",renameat2,mkdir,mkdirat,unlink,unlinkat,link,linkat,symlink,symlinkat,chmod,fchmod"
KERNEL = {"pwrite64": "pwrite", "rename": "replace", "renameat": "replace", "openat": "open", "mkdirat": "mkdir"}
KERNEL |= {"unlinkat": "unlink", "fallocate": "posix_fallocate"}


def may_trace() -> bool:
    """Whether strace is there, and allowed to trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], stderr=subprocess.DEVNULL).returncode == 0


def strace(root: Path) -> Report:
    """The write-side calls that the kernel sees on a cache are those that the file layer records, in their order."""
    report = Report("strace")
    if not may_trace():
        report.failures.append("strace is not installed, or not allowed")
        return report
    log, record = root / "log", root / "record.json"
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={TRACED}", sys.executable, __file__]
    subprocess.run([*command, "write", str(root / "traced"), "--record", str(record)], check=True)
    recorded = [tuple(one) for one in json.loads(record.read_text())]
    seen = list(_seen(log.read_text().splitlines(), root / "traced"))
    with report.trial("the calls"):
        report.counts["recorded calls"], report.counts["calls that the kernel saw"] = len(recorded), len(seen)
        for number, (one, other) in enumerate(zip(recorded, seen, strict=False)):
            demand(one == other, f"call {number}: recorded {one}, the kernel saw {other}")
        demand(len(recorded) == len(seen), "one has more calls than the other")
    report.counts |= Counter(f"of these {name}" for name, *_ in seen)
    return report


def record_of(root: Path) -> list[tuple[str, str]]:
    """(call, path) of a whole run, as strace can tell it: closes and folders opened for fsync are not writes."""
    recorder = Recorder(root)
    with layer(recorder):
        write_cache(root / "cache")
    kept = [c for c in recorder.calls if c.name != "close" and (c.name != "open" or c.flags & os.O_CREAT)]
    return [(call.name, call.to or call.path) for call in kept]


def _seen(lines: Sequence[str], root: Path) -> Iterator[tuple[str, str]]:
    for line in lines:
        found = re.match(r"\d+ +(\w+)\((.*)\) += (-?\d+)", line)
        if found is None or int(found[3]) < 0 or str(root) not in line:
            continue
        name, arguments = KERNEL.get(found[1], found[1]), found[2]
        if name == "open" and not re.search(r"O_CREAT|O_WRONLY|O_RDWR|O_TRUNC", arguments):
            continue
        paths = re.findall(r'"([^"]*)"|\d+<([^>]*)>', arguments)
        named = [quoted or of_fd for quoted, of_fd in paths if (quoted or of_fd).startswith(str(root))]
        path = os.path.relpath(named[-1], root)
        if (name, path) != ("mkdir", "."):  # before the record begins
            yield name, path


# ---- errno -----------------------------------------------------------------------------------------------------------


def faulty(number: int, code: int, *, from_then_on: bool, short: bool) -> OnCall:
    """The n-th call fails, as Linux has it fail: a close closes, and a short write wrote its half."""

    def on_call(at: int, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if at != number and not (from_then_on and at > number):
            return real(*args)
        if name == "close":
            real(*args)
        if name in ("pwrite", "write") and short:
            if not code:
                return half(name, real, args)
            half(name, real, args)
        if not code:
            return real(*args)
        raise OSError(code, os.strerror(code))

    return on_call


def errnos(root: Path, codes: Sequence[int] = ERRNOS, *, at: Choice = everywhere, in_turn: bool = False) -> Report:
    """Each error at each call of the file layer by its number: alone, with all later calls failing, and after half a write.

    Args:
        in_turn: only one of these at each call.
    """
    report = Report("errno")
    expected = undisturbed(root / "undisturbed")
    report.counts["calls of the file layer"] = len(expected.calls)
    for turn, number in enumerate(at(expected.calls)):
        writes = expected.calls[number - 1].name in ("pwrite", "write")
        plans = [(code, False, False) for code in codes] + [(codes[turn % len(codes)], True, False)]
        if writes:
            plans += [(codes[turn % len(codes)], False, True), (0, False, True)]
        if in_turn:
            plans = [plans[turn % len(plans)]]
        for code, from_then_on, short in plans:
            path = root / f"faulty-{report.counts['trials']}"
            call = expected.calls[number - 1]
            told = f"{errno.errorcode[code] if code else 'short write'}{' and on' if from_then_on else ''}"
            with report.trial(f"{told} at call {number}, {call.name} {call.to or call.path}"):
                outcome = _outcome(path, faulty(number, code, from_then_on=from_then_on, short=short), code)
                demand(not open_below(path), f"stayed open: {open_below(path)}")
                report.counts[f"{told}: {outcome}"] += 1
                state = judge(path, expected)
                demand(outcome != "went on" or state == "new", f"went on to {state}")
                left = [] if from_then_on or call.name == "unlink" else list(path.rglob("*.tmp-*"))
                demand(not left, f"left behind: {left}")
                resume(path, expected)
            shutil.rmtree(path, ignore_errors=True)
    report.counts["handled"] = report.counts["as promised"]
    return report


def open_below(path: Path) -> list[str]:
    """The files of a cache that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists the others
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(f"{path}/")]


def _outcome(path: Path, on_call: OnCall, code: int) -> str:
    """What a dump under a fault came to: the name of its error, which must be one of ours and fit the fault."""
    try:
        with layer(on_call):
            write_cache(path)
        return "went on"
    except SoftcacheError as exc:
        demand(bool(code), f"a short write is no error: {exc}")
        wanted = DiskSpaceError if code in files.NO_ROOM else DumpError
        demand(type(exc) is wanted, f"{type(exc).__name__} for {os.strerror(code)}")
        demand(os.strerror(code) in exc.message and bool(exc.tip), f"does not say what happened: {exc}")
        demand(("not writable" in exc.message) == (code in files.NOT_WRITABLE), f"says another thing: {exc}")
        return type(exc).__name__


# ---- a full disk -----------------------------------------------------------------------------------------------------


def fulldisk(root: Path, steps: int) -> Report:
    """A really full file system: a small tmpfs of our own, a loop mount, or a limit on the size of a file."""
    report = Report("fulldisk")
    record, mount = root / "inside.json", root / "small"
    mount.mkdir()
    inside = [sys.executable, __file__, "fulldisk", "--steps", str(steps), "--json", "--inside", str(mount)]
    image = root / "image"
    ways = {
        "a tmpfs of 3 MB": f"mount -t tmpfs -o size=3m tmpfs {mount}",
        "a loop mount of 3 MB": f"truncate -s 3M {image} && mkfs.ext4 -q {image} && mount -o loop {image} {mount}",
    }
    for way, command in ways.items():
        script = f'{command} && exec "$@"'
        with record.open("wb") as out:
            done = subprocess.run(
                ["unshare", "-m", "sh", "-c", script, "sh", *inside], stdout=out, stderr=subprocess.PIPE
            )
        if record.stat().st_size:
            found = json.loads(record.read_text())
            report.counts[f"used {way}"] = 1
            report.counts |= Counter(found["counts"])
            report.failures += found["failures"]
            return report
        report.counts[f"could not use {way}: {done.stderr.decode().strip()[-200:]}"] = 1
    report.counts["used RLIMIT_FSIZE"] = 1
    return _limited(root, report, steps)


def fill_up(mount: Path, steps: int) -> Report:
    """Inside the small file system: a dump with every amount of room from none to enough."""
    report = Report("fulldisk")
    with tempfile.TemporaryDirectory() as elsewhere:
        expected = undisturbed(Path(elsewhere))
    needed = sum(map(len, expected.new.values())) * 5 // 4
    for step in range(steps):
        room = needed * step // steps
        with report.trial(f"{room} bytes of room"):
            with (mount / "ballast").open("wb") as ballast, suppress(OSError):
                free = shutil.disk_usage(mount).free
                ballast.write(b"x" * max(0, free - room))
            _until_full(mount / "cache", report)
            (mount / "ballast").unlink()
            gc.collect()  # a deleted file takes room for as long as it is mapped
            report.counts[f"a reader then met: {judge(mount / 'cache', expected)}"] += 1
            demand(not list(mount.rglob("*.tmp-*")), "temporary files stayed on the full disk")
            resume(mount / "cache", expected)
        shutil.rmtree(mount / "cache", ignore_errors=True)
        (mount / "ballast").unlink(missing_ok=True)
    return report


def _limited(root: Path, report: Report, steps: int) -> Report:
    expected = undisturbed(root / "undisturbed")
    largest = max(map(len, expected.new.values()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(steps):
        with report.trial(f"files of at most {largest * step // steps} bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest * step // steps, before[1]))
            try:
                _until_full(root / "cache", report)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            judge(root / "cache", expected)
            resume(root / "cache", expected)
        shutil.rmtree(root / "cache", ignore_errors=True)
    return report


def _until_full(path: Path, report: Report) -> None:
    try:
        write_cache(path)
        report.counts["had room enough"] += 1
    except DiskSpaceError as exc:
        call = re.search(r"\((\w+)\)$", exc.message)
        report.counts[f"DiskSpaceError: {call[1] if call else 'before a span'}"] += 1


# ---- many at once ----------------------------------------------------------------------------------------------------


def many(root: Path, dumpers: int, readers: int) -> Report:
    """Dumpers that start at once on one folder, for one part and for parts of their own; readers all the while."""
    report = Report("many")
    expected = undisturbed(root / "undisturbed")
    for name, parts in (
        ("one part", [Part()] * dumpers),
        ("two for each part", [Part(1 + i % (dumpers // 2), dumpers // 2) for i in range(dumpers)]),
    ):
        path, stop = root / name.replace(" ", "-"), root / f"stop-{name[:3]}"
        reading = [_forked(lambda path=path, stop=stop: _read_until(path, stop)) for _ in range(readers)]  # type: ignore[misc]
        for extend in (False, True):
            with report.trial(f"{name}, {'extension' if extend else 'dump'}"):
                writing = [_forked(lambda p=p: _dump_once(path, p, extend)) for p in parts]  # type: ignore[misc] # noqa: B023
                told = Counter(outcome for one in writing for outcome in one())
                report.counts |= {f"{name}, {'extend' if extend else 'dump'}: {key}": n for key, n in told.items()}
                unexpected = [key for key in told if key.startswith("failed")]
                demand(not unexpected, f"{unexpected}")
                # whoever was refused tries again once the others are done
                for part in sorted({*parts}, key=str):
                    write_part(path, part, extend=extend)
                demand(read_manifest(path).id == expected.ids[extend], "another id")
        time.sleep(0.05)
        stop.touch()
        with report.trial(f"{name}, readers"):
            told = Counter()
            for one in reading:
                told.update(one())
            report.counts |= {f"{name}, readers: {key}": n for key, n in told.items()}
            demand(not [key for key in told if key.startswith("failed")], f"{dict(told)}")
            demand(told["2 views"] > 0 and told["3 views"] > 0, f"no reader met both caches: {dict(told)}")
        with report.trial(f"{name}, bytes"):
            shards = {n: data for n, data in contents(path).items() if ".tmp-" not in n}
            demand(shards == expected.new, "other bytes than an undisturbed run")
    return report


def _forked(task: Callable[[], Counter[str]]) -> Callable[[], Counter[str]]:
    """Start a task in a process of its own; calling the result waits for its counts."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            told = task()
        except BaseException as exc:
            told = Counter({"failed: " + "".join(traceback.format_exception(exc)): 1})
        os.write(send, json.dumps(told).encode()[:60000])
        os._exit(0)
    os.close(send)

    def wait() -> Counter[str]:
        with os.fdopen(receive, "rb") as pipe:
            data = pipe.read()
        os.waitpid(pid, 0)
        return Counter(json.loads(data)) if data else Counter({"failed: without a word": 1})

    return wait


def _dump_once(path: Path, part: Part, extend: bool) -> Counter[str]:
    try:
        done = write_part(path, part, extend=extend, pause_s=0.02)
        return Counter({"committed" if done else "its part is done": 1})
    except LockedError as exc:
        demand(
            re.search(r"being written by another process: host .*, pid \d+, since \d{4}-", exc.message) is not None,
            str(exc),
        )
        return Counter({"refused, named the holder": 1})


def _read_until(path: Path, stop: Path) -> Counter[str]:
    """Open and read everything again and again."""
    told: Counter[str] = Counter()
    while not stop.exists():
        try:
            told[f"{read_everything(path)} views"] += 1
        except UnfinishedCacheError:
            told["unfinished"] += 1
        except DamagedCacheError:
            raise
        except CacheError:
            told["nothing there yet"] += 1
        time.sleep(0.001)
    return told


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the caches are made (default: a temporary folder)")
    commands = parser.add_subparsers(dest="command", required=True)
    subs = {
        name: commands.add_parser(name) for name in ("kill", "prefixes", "strace", "errno", "fulldisk", "many", "write")
    }
    for sub in subs.values():
        sub.add_argument("--json", action="store_true")
        sub.add_argument("--seed", type=int, default=0)
    subs["kill"].add_argument("--count", type=int, default=1000)
    subs["kill"].add_argument("--full-command", type=int, metavar="N", help="kill `softcache dump` N times instead")
    subs["fulldisk"].add_argument("--steps", type=int, default=60)
    subs["fulldisk"].add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    subs["many"].add_argument("--dumpers", type=int, default=8)
    subs["many"].add_argument("--readers", type=int, default=16)
    subs["write"].add_argument("path", type=Path)
    subs["write"].add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.command == "write":
        arguments.path.mkdir()
        arguments.record.write_text(json.dumps(record_of(arguments.path)))
        return 0
    with tempfile.TemporaryDirectory(prefix="softcache-faults-", dir=arguments.folder) as folder:
        report = _run(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(vars(report)))
    else:
        print(table([report.name, ""], [[name, f"{count:,}"] for name, count in report.counts.items()]))
        print(f"{len(report.failures)} failures")
        for failure in report.failures[:20]:
            print(f"FAILED {failure}")
    return 1 if report.failures else 0


def _run(arguments: argparse.Namespace, root: Path) -> Report:
    if arguments.command == "kill" and arguments.full_command:
        return kill_full_command(root, arguments.full_command, arguments.seed)
    if arguments.command == "kill":
        return kill(root, arguments.count, arguments.seed)
    if arguments.command == "prefixes":
        return prefixes(root, arguments.seed)
    if arguments.command == "strace":
        return strace(root)
    if arguments.command == "errno":
        return errnos(root)
    if arguments.command == "fulldisk":
        return fill_up(arguments.inside, arguments.steps) if arguments.inside else fulldisk(root, arguments.steps)
    return many(root, arguments.dumpers, arguments.readers)


if __name__ == "__main__":
    sys.exit(main())

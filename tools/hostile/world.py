"""A small honest world of a cache, run folders and data, what must not be touched beside it, and the judge of a verb in it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache import cli

DATA = "synthetic:images?classes=3&count=12&size=8&channels=1"
EVAL = f"{DATA}&split=test"
MLP = "softcache:mlp?hidden=4"
MINE = '''
"""Code of somebody's: whatever of it is called leaves a mark."""

import os
from pathlib import Path


def _mark(name):
    (Path(os.environ["HOSTILE_OUTSIDE"]) / f"called-{name}").touch()


_mark("import")


def images():
    _mark("data")
    return [0]


def net(num_classes, input_shape=(8, 8), command=""):
    from torch import nn

    _mark("net")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def darker():
    _mark("transform")
    return lambda image: image
'''
SLOW_S = 20.0


@dataclass(frozen=True)
class Outcome:
    """What a verb did with something hostile.

    Attributes:
        case: what was done to what, and the verb.
        code: its exit code.
        faults: what must not have happened; empty where all is well.
        said: the first line of its error.
    """

    case: str
    code: int
    faults: Sequence[str]
    said: str
    seconds: float


def command(*words: str) -> None:
    """Run one honest command line, which has to go well."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main([*words]) == 0, said.getvalue()


def dump_by(teacher: str) -> list[str]:
    """The command line that makes the cache of the world."""
    views = ["--views", "2", "--policy", "shift:pixels=1"]
    return ["dump", "--data", DATA, "--teacher", teacher, *views, "--out", "cache"]


def make_world(folder: Path) -> None:
    """`world/` with data, runs and a cache made by the verbs themselves; `outside/` with what they must not touch."""
    world, outside = folder / "world", folder / "outside"
    for path in (world, outside / "full"):
        path.mkdir(parents=True)
    (outside / "precious").write_text("precious\n")
    (outside / "full" / "precious").write_text("precious\n")
    (world / "mine.py").write_text(MINE)
    os.environ["HOSTILE_OUTSIDE"] = str(outside)
    how = ["--threads", "1", "--device", "cpu", "--quiet"]
    with contextlib.chdir(world):
        runs = ["train", "--data", DATA, "--eval-data", EVAL, "--student", MLP, "--epochs", "1", "--keep", "best", *how]
        command(*runs, "--out", "run")
        command(*dump_by("run"), *how)
        shutil.copytree("run", "other")
        shutil.copytree("cache", "backup")


VERBS: dict[str, Sequence[str]] = {
    "eval": ["eval", "run", "--data", EVAL],
    "eval MODEL@RUN": ["eval", f"{MLP}@run", "--data", EVAL],
    "eval FILE": ["eval", "run/student.safetensors", "--data", EVAL],
    "export": ["export", "run", "--to", "safetensors", "--data", EVAL],
    "export of its data": ["export", "run", "--to", "safetensors"],
    "plan": ["plan", "--data", DATA, "--teacher", "run"],
    "dump": ["dump", "--data", DATA, "--teacher", "run", "--out", "fresh"],
    "train from it": ["train", "--data", DATA, "--student", "run", "--epochs", "1", "--out", "fresh"],
    "init": ["train", "--data", DATA, "--student", MLP, "--init-from", "run", "--epochs", "1", "--out", "fresh"],
    "resume": [
        *("train", "--data", DATA, "--eval-data", EVAL, "--student", MLP, "--epochs", "1", "--keep", "best"),
        *("--out", "run"),
    ],
    "inspect": ["inspect", "cache"],
    "inspect a sample": ["inspect", "cache", "--sample", "synthetic/train/000001"],
    "verify": ["verify", "cache"],
    "verify --full": ["verify", "cache", "--full"],
    "verify --replay": ["verify", "cache", "--replay", "4"],
    "views": ["views", "cache", "--sample", "synthetic/train/000001", "--out", "views.png"],
    "repair": ["repair", "cache"],
    "repair by a teacher": ["repair", "cache", "--data", DATA, "--teacher", "other"],
    "repair from a copy": ["repair", "cache", "--from", "backup"],
    "subset": ["subset", "cache", "fresh", "--views", "0"],
    "learn": ["train", "--cache", "cache", "--data", DATA, "--student", MLP, "--epochs", "1", "--out", "fresh"],
    "eval the cache": ["eval", "cache", "--data", DATA],
    "extend": ["dump", "--extend", "--out", "cache", "--data", DATA, "--teacher", "other", "--views", "3"],
    "dump again": dump_by("other?name=run"),
}
OF_RUNS = (
    "eval",
    "eval MODEL@RUN",
    "eval FILE",
    "export",
    "export of its data",
    "plan",
    "dump",
    "train from it",
    "init",
    "resume",
)
OF_CACHES = tuple(verb for verb in VERBS if verb not in OF_RUNS)
THREADED = ("eval", "export", "plan", "dump", "train")


def words_of(verb: str) -> list[str]:
    words = [*VERBS[verb]]
    return [*words, "--threads", "1", "--device", "cpu"] if words[0] in THREADED else words


def seen_from_outside(outside: Path) -> dict[str, Any]:
    """Everything that a write, a rename or a removal would change."""
    found: dict[str, Any] = {}
    for path in sorted(outside.rglob("*")):
        state = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(outside))] = (state.st_ino, state.st_mode, state.st_mtime_ns, data)
    return found


@contextlib.contextmanager
def no_network(asked: list[str]) -> Iterator[None]:
    """Every connection is refused and noted."""
    real = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        asked.append(str(address))
        raise OSError("there is no network here")

    def look_up(*address: Any, **_: Any) -> Any:
        asked.append(str(address[:2]))
        raise socket.gaierror("there is no network here")

    real_look_up = socket.getaddrinfo
    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = look_up
    try:
        yield
    finally:
        socket.socket.connect = real  # type: ignore[method-assign]
        socket.getaddrinfo = real_look_up


def judge(case: str, words: Sequence[str], place: Path, outside: Path) -> Outcome:
    """Run a verb in `place` and look at what it did."""
    before, asked, faults = seen_from_outside(outside), list[str](), list[str]()
    out, err = io.StringIO(), io.StringIO()
    started, code = time.monotonic(), -1
    with contextlib.chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_network(asked):
        try:
            code = cli.main(words)
        except SystemExit as exc:
            code = int(exc.code or 0)
        except BaseException as exc:  # what this tool looks for
            last = traceback.extract_tb(exc.__traceback__)[-1]
            faults.append(
                f"traceback: {type(exc).__name__}: {str(exc)[:100]} ({Path(last.filename).name}:{last.lineno})"
            )
    seconds, after = time.monotonic() - started, seen_from_outside(outside)
    called = sorted(name for name in after if name.startswith("called-"))
    faults += [f"code run: {name}" for name in called]
    rest = {name: state for name, state in after.items() if name not in called}
    if rest != before:
        changed = [name for name in {**before, **rest} if before.get(name) != rest.get(name)]
        faults.append(f"outside touched: {', '.join(changed)}")
    faults += [f"network asked: {asked[0]}"] if asked else []
    text = out.getvalue() + err.getvalue()
    faults += ["escapes on the screen"] if "\x1b" in text.replace("\x1b[A", "") else []
    faults += [f"seconds: {seconds:.0f}"] if seconds > SLOW_S else []
    for name in called:
        (outside / name).unlink()
    said = next((line for line in err.getvalue().splitlines() if "error" in line), "")
    return Outcome(case, code, faults, said, seconds)


@contextlib.contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """A copy of the world, beside it, so that links to what is outside are the same."""
    place = folder / "place"
    shutil.copytree(folder / "world", place, symlinks=True)
    outside = folder / "outside"
    shutil.copytree(outside, folder / "kept", symlinks=True)
    try:
        yield place
    finally:
        shutil.rmtree(place)
        shutil.rmtree(outside)
        (folder / "kept").rename(outside)

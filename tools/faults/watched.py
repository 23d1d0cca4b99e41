"""The file layer, watched: every call that may change a disk is numbered, and can be made otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.files import durable as files

CALLS = ("open", "ftruncate", "posix_fallocate", "pwrite", "write", "fsync", "close", "replace", "mkdir", "unlink")
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

"""Every call fails once: ENOSPC, EIO, EINTR and others, and short writes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults.promise import judge, resume, undisturbed
from faults.report import Report, demand
from faults.small_dump import write_cache
from faults.watched import Choice, OnCall, everywhere, half, layer
from softcache.errors import DiskSpaceError, DumpError, SoftcacheError
from softcache.files import durable as files

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EINTR)


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

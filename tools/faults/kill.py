"""SIGKILL of a writer, at random times and after every call of the file layer."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults.promise import contents, judge, resume, undisturbed
from faults.report import Report, demand
from faults.small_dump import write_cache
from faults.watched import half, layer
from softcache.cache.manifest import read_manifest
from softcache.errors import CacheError, DamagedCacheError, UnfinishedCacheError


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


def run_softcache(*arguments: str) -> None:
    """One command, which must succeed."""
    command = [sys.executable, "-m", "softcache", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    demand(done.returncode == 0, f"softcache {arguments[0]}: exit code {done.returncode}: {done.stdout[-1000:]}")


def kill_full_command(root: Path, count: int, seed: int) -> Report:
    """So many kills of `python -m softcache dump` with digits and a small teacher, at random times; each is resumed."""
    report, draw = Report("kill --full-command"), random.Random(seed)
    model, teacher, path = "softcache:mlp?hidden=16", str(root / "teacher"), root / "killed"
    train = ["--student", model, "--loss", "ce", "--epochs", "1", "--threads", "1", "--quiet", "--out", teacher]
    run_softcache("train", "--data", "digits", *train)
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
            run_softcache(*dump, str(path))
            demand(contents(path) == whole, "resumed to other bytes")
            run_softcache("verify", str(path), "--full")
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

"""SIGTERM of `softcache train` at random moments: on one process and on two, with loader workers and without."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from faults.report import Report, demand
from softcache import cli

LEFT_S = 10.0  # what a scheduler waits at least
LAUNCHER_S = 0.1  # between two looks of a launcher at its processes
TOLD = 2  # of a process that was told that another one had ended before all were together
STUDENT = Path(__file__).resolve().parents[2] / "tests" / "worlds" / "slow_student.py"
PAUSE_S = "0.02"  # of each step


def term(root: Path, count: int, seed: int) -> Report:
    """So many signals: each run must leave within LEFT_S with 143, and end, resumed, with the student of one left alone."""
    report, draw = Report("term"), random.Random(seed)
    shutil.copy(STUDENT, root / "pieces.py")
    alone: dict[tuple[int, int], bytes] = {}
    for size, workers in itertools.product((1, 2), (0, 2)):
        demand(waited(started(root, "alone", size, workers), 120) == [0] * size, "an undisturbed run failed")
        alone[size, workers] = (root / "alone" / "student.safetensors").read_bytes()
        shutil.rmtree(root / "alone")
    for trial, (size, workers) in zip(range(count), itertools.cycle(alone)):
        where = f"trial {trial}, {size} processes, {workers} workers"
        with report.trial(where):
            _one(root, size, workers, draw, report)
            demand((root / "run" / "student.safetensors").read_bytes() == alone[size, workers], "another student")
        shutil.rmtree(root / "run", ignore_errors=True)
    return report


def _one(root: Path, size: int, workers: int, draw: random.Random, report: Report) -> None:
    """A run that is stopped, once or twice, and gone on with to its end."""
    for _ in range(draw.randint(1, 2)):
        pids, begun = started(root, "run", size, workers), time.monotonic()
        while not (root / "run" / "run.json").exists() and time.monotonic() - begun < 60:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 1.5))
        to = pids if draw.random() < 0.5 else [draw.choice(pids)]
        for pid in to:
            os.kill(pid, signal.SIGTERM)
        asked = time.monotonic()
        codes = waited(pids, LEFT_S, together=True)
        report.counts[f"{size} processes, {workers} workers: ended with {' and '.join(map(str, codes))}"] += 1
        demand((set(codes) <= {143, TOLD} and 143 in codes) or codes == [0] * size, f"ended with {codes}")
        report.counts["slowest, in ms"] = max(report.counts["slowest, in ms"], round(1000 * (time.monotonic() - asked)))
    demand(waited(started(root, "run", size, workers), 120) == [0] * size, "the run could not be resumed")


def started(root: Path, out: str, size: int, workers: int) -> list[int]:
    """The processes of `softcache train`."""
    argv = ["train", "--data", f"{root}/pieces.py:toy", "--eval-data", f"{root}/pieces.py:toy", "--loss", "ce"]
    argv += ["--student", f"{root}/pieces.py:student", "--policy", "crop_flip:padding=1", "--epochs", "3"]
    argv += ["--batch-size", "16", "--threads", "1", "--device", "cpu", "--lr", "0.01", "--quiet"]
    argv += ["--workers", str(workers), "--out", str(root / out)]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return [forked(partial(_train, argv, rank, size, port, root)) for rank in range(size)]


def _train(argv: Sequence[str], rank: int, size: int, port: str, root: Path) -> int:
    os.environ["STUDENT_PAUSE_S"] = PAUSE_S
    if size > 1:
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ.update(here)
    os.dup2(os.open(root / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(2, 1)
    return cli.main(argv)


def forked(work: Callable[[], int]) -> int:
    """A child that does it and ends with what it gives."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def waited(pids: Sequence[int], seconds: float, *, together: bool = False) -> list[int]:
    """The exit codes as a shell tells them; whoever has not ended in time is killed.

    Args:
        together: as torchrun does, the others get SIGTERM a moment after one has ended.
    """
    end, asked = time.monotonic() + seconds, False
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                codes[pid] = 143 if code == -signal.SIGTERM else code
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        if together and codes and not asked:
            asked = True
            time.sleep(LAUNCHER_S)
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]

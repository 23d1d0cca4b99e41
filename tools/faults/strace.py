"""Are the recorded calls all that the kernel sees?"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.report import Report, demand
from faults.small_dump import write_cache
from faults.watched import Recorder, layer

HERE = Path(__file__).resolve().parent
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
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={TRACED}", sys.executable, str(HERE)]
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

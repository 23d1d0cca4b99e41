"""A really full disk."""

from __future__ import annotations

import gc
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from faults.promise import judge, resume, undisturbed
from faults.report import Report, demand
from faults.small_dump import write_cache
from softcache.errors import DiskSpaceError

HERE = Path(__file__).resolve().parent


def fulldisk(root: Path, steps: int) -> Report:
    """A really full file system: a small tmpfs of our own, a loop mount, or a limit on the size of a file."""
    report = Report("fulldisk")
    record, mount = root / "inside.json", root / "small"
    mount.mkdir()
    inside = [sys.executable, str(HERE), "fulldisk", "--steps", str(steps), "--json", "--inside", str(mount)]
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

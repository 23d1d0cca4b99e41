"""Many dumpers and readers on one folder."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from faults.promise import contents, read_everything, undisturbed
from faults.report import Report, demand
from faults.small_dump import write_part
from softcache.cache.manifest import read_manifest
from softcache.cache.write.writer import Part
from softcache.errors import CacheError, DamagedCacheError, LockedError, UnfinishedCacheError


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

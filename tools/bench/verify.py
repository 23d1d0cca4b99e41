"""What trust costs: verify --full against plain sha256, verify --quick of many shards, block checks in a training epoch.

    python tools/bench/verify.py [--rows 65536] [--hashed-rows 2097152] [--classes 1000] [--rounds 5] [--threads 1] [--quick]

Everything is warm (in the page cache). One core's sha256 speed is hashlib's over bytes in memory, in the same run.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import softcache
from softcache.check import verify
from softcache.data.join import batches
from softcache.losses import kd
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cache import make_cache
from bench.harness import heading, parser_of, write_json

BATCH = 256


def cpu_seconds() -> float:
    """Of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def bench_full(path: Path, rounds: int, hashed: int) -> dict[str, float]:
    """GB/s of sha256 (of so many bytes in memory, and of the files) and of verify --full, per core used, in turn."""
    buffer = np.random.default_rng(0).bytes(hashed)
    files = [path / file.path for file in softcache.open(path).manifest.files]

    def hash_files() -> None:
        for file in files:
            with file.open("rb") as handle:
                hashlib.file_digest(handle, "sha256")

    size = softcache.open(path).manifest.nbytes
    whole = lambda: verify.run(path, full=True, quiet=True)  # noqa: E731
    assert whole().state == "whole"
    plain, read, per_core, wall = [], [], [], []
    for _ in range(rounds):
        plain.append(hashed / timed(lambda: hashlib.sha256(buffer).digest())[1] / 1e9)
        read.append(size / timed(hash_files)[1] / 1e9)
        taken = timed(whole)
        per_core.append(size / taken[1] / 1e9)
        wall.append(size / taken[0] / 1e9)
    return {
        "sha256_gb_per_s": median(plain),
        "verify_gb_per_cpu_s": median(per_core),
        "verify_gb_per_s": median(wall),
        "files_gb_per_s": median(read),
        "ratio": median(one / other for one, other in zip(per_core, plain, strict=True)),
        "files_ratio": median(one / other for one, other in zip(per_core, read, strict=True)),
    }


def bench_quick(path: Path, rounds: int) -> dict[str, float]:
    """Seconds of verify --quick."""
    assert verify.run(path, full=False, quiet=True).state == "whole"
    seconds = median(timed(lambda: verify.run(path, full=False, quiet=True))[0] for _ in range(rounds))
    return {"files": len(softcache.open(path).manifest.files), "seconds": seconds}


def bench_epochs(path: Path, rounds: int) -> dict[str, float]:
    """Seconds of an epoch of training without checks, of one that touches new blocks, and of one that knows them all."""
    never, known = (softcache.open(path, check_blocks=when) for when in ("never", "first"))
    count, classes = len(never), never.num_classes
    every = np.arange(count)
    for start in range(0, count, BATCH):
        for cache in (never, known):
            cache.gather(every[start : start + BATCH], np.zeros(len(every[start : start + BATCH]), np.int64))
    images = torch.rand(1024, 3, 32, 32)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, classes))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)

    def epoch(cache: softcache.Cache, order: np.ndarray) -> None:
        for pairs in batches(order, 0, BATCH):
            rows = np.array([row for row, _ in pairs])
            logits = cache.gather(rows, np.zeros(len(rows), np.int64)).logits()
            loss = kd(student(images[rows % len(images)]), logits, temperature=4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    seconds: dict[str, list[float]] = {"never": [], "known": [], "new": []}
    for number in range(rounds):
        order = np.random.default_rng(number).permutation(count)
        for name, cache in (("never", never), ("known", known), ("new", softcache.open(path))):
            seconds[name].append(timed(partial(epoch, cache, order))[0])
    return {name: median(found) for name, found in seconds.items()} | {
        f"{name}_ratio": median(one / other for one, other in zip(seconds[name], seconds["never"], strict=True))
        for name in ("known", "new")
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=65536, help="of the cache that is trained from")
    parser.add_argument("--hashed-rows", type=int, default=2**21, help="of the cache that is verified")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of torch, in the epochs")
    arguments = parser.parse_args()
    shards, hashed = 512, 256 * 2**20  # of the cache with many files; bytes, for the speed of one core
    if arguments.quick:
        arguments.rows, arguments.hashed_rows, arguments.classes, arguments.rounds = 2048, 4096, 100, 1
        shards, hashed = 4, 2**22
    with tempfile.TemporaryDirectory(prefix="bench-verify-") as folder:
        root = Path(folder)
        make_cache(root / "many", shards * 256, 10, shard_rows=256)
        quick = bench_quick(root / "many", arguments.rounds)
        make_cache(root / "trained", arguments.rows, arguments.classes, shard_rows=None)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)  # not before: a dump takes all cores
        epochs = bench_epochs(root / "trained", arguments.rounds)
        make_cache(root / "large", arguments.hashed_rows, arguments.classes, shard_rows=None)
        full = bench_full(root / "large", arguments.rounds, hashed)
    print(heading("verify.py", arguments))
    rows = [
        ["sha256 of bytes in memory, GB/s of one core", f"{full['sha256_gb_per_s']:.2f}", "1"],
        ["sha256 of the files, GB/s of one core", f"{full['files_gb_per_s']:.2f}", ""],
        ["verify --full, GB per CPU second", f"{full['verify_gb_per_cpu_s']:.2f}", f"{full['ratio']:.2f}"],
        ["  the same, to sha256 of the files", "", f"{full['files_ratio']:.2f}"],
        [f"verify --full, GB/s on {os.cpu_count()} cores", f"{full['verify_gb_per_s']:.2f}", ""],
        [f"verify --quick of {quick['files']} files, s", f"{quick['seconds']:.3f}", ""],
        ["epoch without checks, s", f"{epochs['never']:.2f}", "1"],
        ["epoch, every block known, s", f"{epochs['known']:.2f}", f"{epochs['known_ratio']:.3f}"],
        ["epoch, every block new, s", f"{epochs['new']:.2f}", f"{epochs['new_ratio']:.3f}"],
    ]
    print(table(["what", "median", "ratio"], rows))
    write_json(arguments.json, {"full": full, "quick": quick, "epochs": epochs})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast and how lean is the reader? Shuffled batches through several readers, alternating in one run; medians.

    python tools/bench/cache.py                     # speed: 131,072 x 1000 float16 in one shard, batches of 256
    python tools/bench/cache.py --memory            # private memory of one shuffled epoch, 10k against 1M rows
    python tools/bench/cache.py --quick             # small, to see that it runs

The logits are random numbers from a stub teacher: only bytes matter here. Everything is warm (in the page cache).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader

import softcache
from softcache import dump
from softcache.config import DumpConfig
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, parser_of, write_json

LIMIT = "numpy memmap take (the limit)"
TURN = 4  # batches a reader reads before it is the next one's turn
PER_FILE_SAMPLES = 8192  # of the peer with one file per sample


class Keys(Sequence[str]):
    """`row/0000000`, made when asked for: the data set's own memory shall not be counted as the reader's."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.total:
            raise IndexError(index)
        return f"row/{index:07d}"


class Rows:
    """A data set whose item is its own number."""

    def __init__(self, count: int, classes: int) -> None:
        self.sample_keys = Keys(count)
        self.class_names = [str(c) for c in range(classes)]
        self.labels = np.zeros(count, np.int32)

    def __len__(self) -> int:
        return len(self.sample_keys)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([index], dtype=np.int64)


class StubTeacher:
    """Random logits, the same for the same item; costs nothing."""

    def __init__(self, num_classes: int) -> None:
        self.block = np.random.default_rng(0).standard_normal((4096, num_classes), dtype=np.float32)

    def collate(self, items: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(items)[:, 0]

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self.block[batch % len(self.block)] + (batch // len(self.block) * 0.01).astype(np.float32)[:, None]


def rows(count: int, classes: int) -> Rows:
    """The data set, as a factory for `softcache dump`."""
    return Rows(count, classes)


def stub(num_classes: int) -> StubTeacher:
    """The teacher, as a factory for `softcache dump`."""
    return StubTeacher(num_classes)


def make_cache(path: Path, count: int, classes: int, *, shard_rows: int | None) -> None:
    dump.run(
        DumpConfig(
            data=f"{__file__}:rows?count={count}&classes={classes}",
            teacher=(f"{__file__}:stub",),
            out=str(path),
            batch_size=4096,
            shard_rows=shard_rows,
        ),
        quiet=True,
    )


Reader = Callable[[np.ndarray], Any]


def bench_speed(root: Path, count: int, classes: int, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Median microseconds per shuffled batch, every reader in turn within each round."""
    make_cache(root / "one", count, classes, shard_rows=count)
    make_cache(root / "many", count, classes, shard_rows=None)
    cache = softcache.open(root / "one")
    joined = cache.join(Rows(count, classes))
    (file,) = cache.manifest.files_of("member", "stub")
    stored = file.arrays["logits"]
    plain = np.memmap(root / "one" / file.path, stored.dtype, "r", stored.offset, (count, classes))
    with h5py.File(root / "one" / file.path, "r") as handle:
        others = other_readers(root / "files", plain, handle["logits"])
        readers = {LIMIT: others.pop(LIMIT), **softcache_readers(root, joined), **others}
        for name in ("softcache gather", "softcache joined.gather"):
            assert np.array_equal(readers[name](np.arange(batch_size)).numpy(), plain[:batch_size]), name
        for name, read in readers.items():  # every page is mapped once, by each reader for itself
            if not name.startswith(("h5py", "one")):
                for start in range(0, count, batch_size):
                    read(np.arange(start, min(start + batch_size, count)))
        times = shuffled_times(readers, count, batch_size, rounds)
    limit, slowest = median(times[LIMIT]), median(times["h5py row by row"])
    results = [
        {
            "reader": name,
            "us_per_batch": 1e6 * median(values),
            "us_per_row": 1e6 * median(values) / batch_size,
            "to_memmap": median(values) / limit,
            "faster_than_row_by_row": slowest / median(values),
        }
        for name, values in times.items()
    ]
    return [*results, *bench_loader(joined, batch_size, limit)]


def softcache_readers(root: Path, joined: softcache.Joined) -> dict[str, Reader]:
    cache, many, pread = joined.cache, softcache.open(root / "many"), softcache.open(root / "one", mode="pread")

    def first_view(batch: np.ndarray) -> np.ndarray:
        return np.zeros(len(batch), np.int64)

    return {
        "softcache gather": lambda batch: cache.gather(batch, first_view(batch)).arrays["stub"]["logits"],
        "softcache joined.gather": lambda batch: joined.gather(batch).arrays["stub"]["logits"],
        "softcache gather, many shards": lambda batch: many.gather(batch, first_view(batch)),
        "softcache gather, pread": lambda batch: pread.gather(batch, first_view(batch)),
    }


def other_readers(folder: Path, plain: np.ndarray, dataset: Any) -> dict[str, Reader]:
    """NumPy and h5py on the same file, and one file per sample."""
    count, classes = plain.shape
    per_file_samples = min(count, PER_FILE_SAMPLES)
    folder.mkdir()
    for i in range(per_file_samples):
        torch.save(torch.from_numpy(plain[i].copy()), folder / f"{i}.pt")

    def sorted_list(batch: np.ndarray) -> Any:
        order = np.argsort(batch)
        out = np.empty((len(batch), classes), plain.dtype)
        out[order] = dataset[0, batch[order]]
        return out

    def per_file(batch: np.ndarray) -> Any:
        files = (folder / f"{int(i) % per_file_samples}.pt" for i in batch)
        return torch.stack([torch.load(file, weights_only=True) for file in files])

    return {
        LIMIT: lambda batch: np.take(plain, batch, axis=0),
        "h5py sorted index list": sorted_list,
        "h5py row by row": lambda batch: np.stack([dataset[0, int(i)] for i in batch]),
        "one torch file per sample": per_file,
    }


def shuffled_times(readers: Mapping[str, Reader], count: int, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch of a shuffled epoch, which is read batch by batch."""
    order, place = np.random.default_rng(1).permutation(count), 0
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            for turn in range(-1, TURN):
                place = (place + batch_size) % (count - batch_size)
                batch = order[place : place + batch_size]
                begin = time.perf_counter()
                read(batch)
                if turn >= 0:  # the first of a turn pays for what the reader before it left in the processor's caches
                    times[name].append(time.perf_counter() - begin)
    return times


def bench_loader(joined: Any, batch_size: int, limit: float) -> list[dict[str, Any]]:
    """A real DataLoader over the joined data set, with and without the gather."""
    results = []
    for workers in (0, 2):
        for gather in (False, True):
            loader = DataLoader(joined, batch_size=batch_size, shuffle=True, num_workers=workers)
            times, waited = [], time.perf_counter()
            for number, (_, records) in enumerate(loader):
                if gather:
                    joined.gather(records)
                now = time.perf_counter()
                if number > 4:
                    times.append(now - waited)
                waited = now
                if number > 200:
                    break
            results.append(
                {
                    "reader": f"DataLoader, {workers} workers, {'with' if gather else 'without'} gather",
                    "us_per_batch": 1e6 * median(times),
                    "us_per_row": 1e6 * median(times) / batch_size,
                    "to_memmap": median(times) / limit,
                    "faster_than_row_by_row": None,
                }
            )
    return results


def private_bytes() -> dict[str, int]:
    """USS of this process, and the part of it that is anonymous memory, from the kernel's own accounting."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.replace(":", "").split()
        fields[name] = int(value) * 1024
    return {"uss": fields["Private_Clean"] + fields["Private_Dirty"], "anonymous": fields["Anonymous"]}


def epoch_of(path: Path, count: int, classes: int) -> None:
    """One shuffled epoch in a process of its own; prints its private memory, then waits so that its maps stay shared."""
    from softcache.data.loading import epoch_order

    joined = softcache.open(path).join(Rows(count, classes))
    order = epoch_order(count, 0, 0)
    for start in range(0, count, 256):
        index = order[start : start + 256]
        joined.gather_samples(index, np.zeros(len(index), np.int64))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(private_bytes()), flush=True)
    sys.stdin.readline()


def bench_memory(root: Path, classes: int, counts: tuple[int, int], processes: int) -> list[dict[str, Any]]:
    """Private memory of two readers of one cache after an epoch each: what both map counts as shared, as it is."""
    results = []
    for count in counts:
        path = root / str(count)
        make_cache(path, count, classes, shard_rows=None)
        command = [sys.executable, __file__, "--epoch-of", str(path), str(count), str(classes)]
        readers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        found = []
        for step in range(3):
            for reader in readers:
                assert reader.stdin is not None
                assert reader.stdout is not None
                if step:
                    reader.stdin.write("\n")
                    reader.stdin.flush()
                line = reader.stdout.readline() if step < 2 else ""
                if step == 1:
                    found.append(json.loads(line))
        for reader in readers:
            reader.wait()
        results.append({"rows": count, **{key: median(f[key] for f in found) for key in ("uss", "anonymous")}})
    small, large = results
    for key in ("uss", "anonymous"):
        large[f"{key}_per_row"] = (large[key] - small[key]) / (large["rows"] - small["rows"])
    return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--memory", action="store_true", help="measure private memory instead of speed")
    parser.add_argument("--epoch-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epoch_of:
        path, count, classes = arguments.epoch_of
        epoch_of(Path(path), int(count), int(classes))
        return
    if arguments.quick:
        arguments.rows, arguments.classes, arguments.batch_size, arguments.rounds = 1024, 50, 64, 1
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        if arguments.memory:
            sizes = ((1000, 3000), 1) if arguments.quick else ((10_000, 1_000_000), 2)
            results = bench_memory(Path(folder), 100, *sizes)
        else:
            results = bench_speed(
                Path(folder), arguments.rows, arguments.classes, arguments.batch_size, arguments.rounds
            )
    print(heading("cache.py", arguments))
    columns = list(results[-1] if arguments.memory else results[0])
    print(table(columns, [[row.get(name) for name in columns] for row in results]))
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()

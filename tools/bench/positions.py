"""Several answers a sample: a gather beside a plain copy of the same bytes, a large index, and the opening of many parts.

    python tools/bench/positions.py            # 4,096 samples of 512 positions and 186 bytes; 1,000,000 samples; 100,000 parts
    python tools/bench/positions.py --quick    # small, to see that it runs

The copy reads the samples' slices out of memory maps of the parts, one after the other, and knows where they lie. The cache of
many parts has one sample in each; nothing of it is synced to the disk. It is opened in a new process, which imports first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

from softcache.cache.manifest import Manifest
from softcache.cache.plan import IndexInfo, MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.positions import PositionIndex, build_positions, check_positions
from softcache.cache.reader import CacheReader
from softcache.cache.samples import build_table
from softcache.cache.schema import ArraySpec, Layout
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Setup
from softcache.files import durable
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, in_turn, parser_of, write_json

CLASSES, BYTES = 178, 186  # of a record: a lowest, a step, and a code for each class
SAMPLES_A_BATCH = 32
FIELDS = [
    {"name": "lowest", "offset": 0, "dtype": "<f4", "shape": []},
    {"name": "step", "offset": 4, "dtype": "<f4", "shape": []},
    {"name": "codes", "offset": 8, "dtype": "|u1", "shape": [CLASSES]},
]
OPENING = """
import json, sys, time
import numpy as np
import softcache, softcache.targets.cache
from softcache.errors import note_once
began = time.perf_counter()
cache = softcache.open(sys.argv[1], quiet=True)
opened = time.perf_counter()
rows = np.random.default_rng(0).integers(0, len(cache), 256)
found = []
for _ in range(2):
    began_batch = time.perf_counter()
    cache.reader.slices("m", "records", rows, np.zeros(256, np.int64))
    found.append(time.perf_counter() - began_batch)
print(json.dumps([opened - began, *found]))
"""


def write(path: Path, samples: int, positions: int, part_rows: int) -> Manifest:
    """A cache of random records, so many positions a sample."""
    layout = Layout(samples, 1, part_rows, 1)
    made: dict[str, Any] = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    made |= {"device": "cpu", "batch_size": 1, "threads": 1, "autocast": "none", "batch_tokens": None}
    codec = {"name": "int8", "parameters": {}, "fields": FIELDS}
    member = MemberInfo("m", "made up", "0" * 64, "logits", "float32", None, codec, [], None, "words", CLASSES)
    keys = [f"sample/{number:07d}" for number in range(samples)]
    tag = np.arange(samples, dtype="<u8")
    samples_info = SampleInfo("made up", samples, "", "item", True, False, "natural", "0")
    names = tuple(f"c{number}" for number in range(CLASSES))
    empty = build_table(
        keys, tag, np.full(samples, -1), np.zeros((samples, 16), np.uint8), CLASSES, np.arange(samples), store_keys=True
    )
    plan = Plan(
        samples=replace(samples_info, fingerprint=empty.fingerprint()),
        class_names=names,
        views=ViewInfo(1, 0, "0", "derived", ()),
        members=(member,),
        rounds=(Round(layout, ("m",), True, made, ("words",)),),
        license=None,
        format=2,
        indexes=(IndexInfo("words", "words"),),
    )
    index = build_positions(np.full(samples, positions))
    draw = np.random.default_rng(0)
    with CacheWriter(path, plan, lambda: Setup(empty, positions={"words": index})) as writer:
        for span in writer.my_spans():
            count = span.rows * positions
            specs = {"m": [ArraySpec("records", "|u1", (count, BYTES)), ArraySpec("eps", "<f2", (count,))]}
            with writer.span(span, specs) as out:
                out.append(None, {"pixel_digests": np.zeros(span.rows, "<u4")})
                records = draw.integers(0, 256, (count, BYTES), np.uint8)
                records[:, :8] = np.array([0.0, 1.0], "<f4").view(np.uint8)
                out.append("m", {"records": records, "eps": np.zeros(count, "<f2")}, MemberStatistics(records=count))
        manifest = writer.commit(lambda manifest: "", {})
    assert manifest is not None
    return manifest


def bench_gather(root: Path, samples: int, positions: int, rounds: int) -> dict[str, Any]:
    """Batches of whole samples: `slices` beside a plain copy."""
    write(root / "gather", samples, positions, 256)
    reader, draw = CacheReader(root / "gather"), np.random.default_rng(1)
    layout = reader.manifest.plan.rounds[0].layout
    maps = []
    for span in layout.spans():
        file = reader.manifest.part_file("member", "m", span.index)
        assert file is not None
        stored = file.arrays["records"]
        maps.append(np.memmap(root / "gather" / file.path, np.uint8, "r", stored.offset, stored.shape))
    batches = [draw.integers(0, samples, SAMPLES_A_BATCH) for _ in range(100)]
    views = np.zeros(SAMPLES_A_BATCH, np.int64)

    def copied(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows) * positions, BYTES), np.uint8)
        for number, row in enumerate(rows.tolist()):
            part, place = divmod(row, 256)
            out[number * positions : (number + 1) * positions] = maps[part][place * positions : (place + 1) * positions]
        return out

    for rows in batches:  # every block is looked at once, and everything is in memory
        assert np.array_equal(reader.slices("m", "records", rows, views).values, copied(rows))
    times = in_turn(
        {
            "copy": lambda: [copied(rows) for rows in batches],
            "slices": lambda: [reader.slices("m", "records", rows, views) for rows in batches],
        },
        rounds,
    )
    ratios = [one / other for one, other in zip(times["slices"], times["copy"], strict=True)]
    return {name: median(found) / len(batches) * 1e6 for name, found in times.items()} | {"ratio": median(ratios)}


def bench_index(samples: int) -> dict[str, Any]:
    """An index of many samples: its bytes, its check, and where a batch lies."""
    draw = np.random.default_rng(2)
    lengths = draw.integers(0, 600, samples)
    began = time.perf_counter()
    made = build_positions(lengths)
    built = time.perf_counter()
    check_positions(made, IndexInfo("words", "words"), "made up", candidates=0, classes=CLASSES)
    checked = time.perf_counter()
    index = PositionIndex(IndexInfo("words", "words"), [(Layout(samples, 1, 1024, 1), made)])
    rows = draw.integers(0, samples, 256)
    views = np.zeros(256, np.int64)
    index.ranges(rows, views)
    times = in_turn({"ranges": lambda: [index.ranges(rows, views) for _ in range(100)]}, 5)
    arrays: Mapping[str, np.ndarray] = made.arrays()
    return {
        "megabytes": sum(array.nbytes for array in arrays.values()) / 1e6,
        "built_s": built - began,
        "checked_s": checked - built,
        "batch_us": median(times["ranges"]) / 100 * 1e6,
    }


def bench_parts(root: Path, parts: int) -> dict[str, Any]:
    """A cache of many parts, opened in a new process; then a batch of 256 samples, and the same once more."""
    with (
        mock.patch.object(durable, "sync", return_value=None),
        mock.patch.object(durable, "sync_folder", return_value=None),
    ):
        manifest = write(root / "parts", parts, 1, 1)
    command = [sys.executable, "-W", "ignore", "-c", OPENING, str(root / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    opened, first, again = json.loads(done.stdout)
    return {"parts": len(manifest.plan.rounds[0].layout), "opened_s": opened, "first_batch_s": first, "again_s": again}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=4096, help="of the gather")
    parser.add_argument("--positions", type=int, default=512, help="of each of them")
    parser.add_argument("--index", type=int, default=1_000_000, help="samples of the large index")
    parser.add_argument("--parts", type=int, default=100_000)
    arguments = parser.parse_args()
    rounds = 15
    if arguments.quick:
        arguments.samples, arguments.positions, arguments.index, arguments.parts, rounds = 512, 16, 1000, 20, 3
    print(heading("positions", arguments))
    with tempfile.TemporaryDirectory(prefix="softcache-bench-") as folder:
        gather = bench_gather(Path(folder), arguments.samples, arguments.positions, rounds)
        index = bench_index(arguments.index)
        parts = bench_parts(Path(folder), arguments.parts)
    what = f"{SAMPLES_A_BATCH} samples x {arguments.positions} positions x {BYTES} B"
    rows = [
        [what, "copy out of memory maps", f"{gather['copy']:,.0f} us"],
        ["", "slices", f"{gather['slices']:,.0f} us"],
        ["", "ratio, median of rounds in turn", f"{gather['ratio']:.3f}"],
        [f"an index of {arguments.index:,} samples", "bytes", f"{index['megabytes']:.1f} MB"],
        ["", "built, checked", f"{index['built_s']:.3f} s, {index['checked_s']:.3f} s"],
        ["", "where 256 samples lie", f"{index['batch_us']:.0f} us"],
        [f"{parts['parts']:,} parts", "opened", f"{parts['opened_s']:.3f} s"],
        ["", "256 samples at random, and again", f"{parts['first_batch_s']:.3f} s, {parts['again_s']:.4f} s"],
    ]
    print(table(["", "", ""], rows))
    write_json(arguments.json, {"gather": gather, "index": index, "parts": parts})


if __name__ == "__main__":
    main()

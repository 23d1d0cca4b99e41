"""What does it cost to learn from a cache that lies somewhere else, and how much is moved for a part of one?

    python tools/bench/remote.py                      # a cache of 1 GB, four members and eight views, served over loopback HTTP
    python tools/bench/remote.py --folder /dev/shm    # where it is made; twice its size is needed
    python tools/bench/remote.py --quick              # small, to see that it runs

A part of one member and two views is pulled, and what was moved is compared with what the part holds. Then an epoch, all views of
one member in shuffled batches, is read from the URL for the first time; and from the store that is full, and from the folder, in
turn; medians.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import softcache
from softcache import dump
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.schema import BLOCK_BYTES
from softcache.config import DumpConfig
from softcache.remote.places import parse_place
from softcache.report.tables import table
from softcache.share import pull_part, subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, in_turn, parser_of, write_json
from faults.web_server import serving

BATCH, MEMBERS, VIEWS = 256, 4, 8
PART = subset.Choice(members=("m1",), views="2-3")


class Tiles:
    """Images of 8 x 8 pixels, no two alike."""

    def __init__(self, count: int, classes: int) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        self.sample_keys = [f"tile/{i:07d}" for i in range(count)]
        self.class_names = [str(c) for c in range(classes)]
        self.labels = np.zeros(count, np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


class StubTeacher:
    """Random logits, the same for the same pixels; costs nothing."""

    def __init__(self, num_classes: int, seed: int) -> None:
        self.block = np.random.default_rng(seed).standard_normal((4096, num_classes), dtype=np.float32)

    def collate(self, items: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([int(np.asarray(item, np.int64).sum()) for item in items])

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self.block[batch % len(self.block)]


def tiles(count: int, classes: int) -> Tiles:
    """The data set, as a factory for `softcache dump`."""
    return Tiles(count, classes)


def stub(num_classes: int, seed: int = 0) -> StubTeacher:
    """The teacher, as a factory for `softcache dump`."""
    return StubTeacher(num_classes, seed)


def make_cache(path: Path, count: int, classes: int, format: str) -> None:
    dump.run(
        DumpConfig(
            data=f"{__file__}:tiles?count={count}&classes={classes}",
            teacher=tuple(f"{__file__}:stub?seed={i}&name=m{i}" for i in range(MEMBERS)),
            out=str(path),
            policy=("shift:pixels=1",),
            views=VIEWS,
            codec="float16",
            batch_size=1024,
            workers=0,
            format=format,
        ),
        quiet=True,
    )


def serve(folder: Path, port: Any, moved: Any, stop: Any) -> None:
    """In a process of its own: who serves takes no time of who reads."""
    with serving(folder) as server:
        port.value = server.server_address[1]
        while not stop.wait(0.05):
            moved.value = sum(server.sent.values())


def epoch(cache: softcache.Cache) -> None:
    """Every record of one member once, in shuffled batches, view after view."""
    for view in range(cache.num_views):
        order = np.random.default_rng(view).permutation(len(cache))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            cache.gather(rows, np.full(len(rows), view), members=["m0"])


def allowed(part: Manifest, parent: Manifest) -> int:
    """1.02 x the records of a part, and two blocks a file and data set that it was taken from."""
    kinds = [("views", None), *(("member", member.name) for member in part.plan.members)]
    records = sum(a.nbytes for kind in kinds for file in part.files_of(*kind) for a in file.arrays.values())
    sets = sum(len(file.arrays) // 2 for kind in kinds for file in parent.files_of(*kind))
    return round(1.02 * records) + 2 * BLOCK_BYTES * sets


def pulled(url: str, local: Path, folder: Path, moved: Any) -> dict[str, Any]:
    """A part, what was moved for it, and whether it is what `subset` makes."""
    before, begin = moved.value, time.perf_counter()
    done = pull_part.run(parse_place(url), folder / "part", PART, quiet=True)
    seconds = time.perf_counter() - begin
    wanted = subset.run(local, folder / "wanted", PART, quiet=True)
    time.sleep(0.2)  # until the server has told
    return {
        "what": "a part",
        "seconds": seconds,
        "records": done.records,
        "allowed": allowed(done.manifest, read_manifest(local)),
        "others": done.others,
        "moved": moved.value - before,
        "same id as subset": done.manifest.id == wanted.id,
    }


def read(url: str, local: Path, rounds: int, moved: Any) -> dict[str, Any]:
    """Epochs from the URL and from the folder."""
    far, near = softcache.open(url, quiet=True), softcache.open(local, quiet=True)
    begin = time.perf_counter()
    epoch(far)
    first = time.perf_counter() - begin
    epoch(far)
    epoch(near)
    time.sleep(0.2)  # until the server has told
    again = moved.value
    times = in_turn({"store": lambda: epoch(far), "folder": lambda: epoch(near)}, rounds)
    time.sleep(0.2)
    return {
        "what": "an epoch",
        "first_s": first,
        "store_s": median(times["store"]),
        "folder_s": median(times["folder"]),
        "ratio": median(times["store"]) / median(times["folder"]),
        "ratio_of_each": sorted(round(a / b, 4) for a, b in zip(times["store"], times["folder"], strict=True)),
        "moved_again": moved.value - again,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="a folder with room for twice the cache (default: of temporary files)"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.classes, arguments.rounds = 1200, 20, 2
    found = []
    print(heading("remote", arguments))
    with tempfile.TemporaryDirectory(prefix="bench-remote-", dir=arguments.folder) as name:
        folder = Path(name)
        os.environ["SOFTCACHE_HOME"] = str(folder / "home")
        context = multiprocessing.get_context("fork")
        port, moved, stop = context.Value("i", 0), context.Value("q", 0), context.Event()
        server = context.Process(target=serve, args=(folder, port, moved, stop))
        server.start()
        try:
            for format in ("2", "1"):
                local = folder / f"v{format}"
                make_cache(local, arguments.rows, arguments.classes, format)
                url = f"http://127.0.0.1:{port.value}/{local.name}@{read_manifest(local).id}"
                size = read_manifest(local).nbytes
                (folder / f"pulled{format}").mkdir()
                for one in (
                    pulled(url, local, folder / f"pulled{format}", moved),
                    read(url, local, arguments.rounds, moved),
                ):
                    found.append({"version": int(format), "cache_bytes": size, **one})
                    shown = [
                        [key, f"{value:,.4f}" if isinstance(value, float) else str(value)]
                        for key, value in found[-1].items()
                    ]
                    print(table(["", ""], shown), flush=True)
        finally:
            stop.set()
            server.join()
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()

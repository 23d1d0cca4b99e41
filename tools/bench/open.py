"""What does it cost that every file is hashed before its first use? Opening, joining and an epoch, alternating; medians.

    python tools/bench/open.py                      # a cache of 4 GB, 1,280,000 samples joined
    python tools/bench/open.py --rows 100000        # a smaller one
    python tools/bench/open.py --quick              # small, to see that it runs

The first opening forgets before each round what is remembered of the cache; the second knows all of its files. Both stand
beside an opening that takes files by their names and sizes, the first also beside the sha256 of the same bytes in one thread.
All is warm.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

import softcache
from softcache.data.loading import epoch_order
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cache import Rows, make_cache
from bench.harness import heading, in_turn, parser_of, write_json

BATCH = 256


def plain_sha256(path: Path) -> None:
    """Every file of a folder, one after the other."""
    for file in sorted(path.rglob("*.h5")):
        with file.open("rb") as handle:
            hashlib.file_digest(handle, "sha256")


def epoch_of(joined: softcache.Joined) -> Callable[[], None]:
    """A warm pass over some 200 batches, shuffled."""
    order = epoch_order(len(joined), 0, 0)[: 200 * BATCH]

    def read() -> None:
        for start in range(0, len(order), BATCH):
            index = order[start : start + BATCH]
            joined.gather_samples(index, np.zeros(len(index), np.int64))

    read()
    return read


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.classes, arguments.rounds = 2048, 50, 2
    with tempfile.TemporaryDirectory(prefix="bench-open-") as folder:
        home = Path(folder, "home")
        os.environ["SOFTCACHE_HOME"] = str(home)
        path, data = Path(folder, "cache"), Rows(arguments.rows, arguments.classes)
        make_cache(path, arguments.rows, arguments.classes, shard_rows=None)
        if not arguments.quick:
            time.sleep(3)  # what was written just now is not remembered

        def opened(*, check: bool, forget: bool = False) -> softcache.Cache:
            if forget:
                shutil.rmtree(home, ignore_errors=True)
            return softcache.open(path, check_files=check, quiet=True)

        kinds: dict[str, Callable[[], object]] = {
            "sha256 of its bytes": lambda: plain_sha256(path),
            "first open": lambda: opened(check=True, forget=True),
            "second open": lambda: opened(check=True),
            "open, files unchecked": lambda: opened(check=False),
            "join": lambda: opened(check=True).join(data),
            "join, files unchecked": lambda: opened(check=False).join(data),
            "epoch": epoch_of(opened(check=True).join(data)),
            "epoch, files unchecked": epoch_of(opened(check=False).join(data)),
        }
        times = {name: median(values) for name, values in in_turn(kinds, arguments.rounds).items()}
        nbytes = sum(file.stat().st_size for file in path.rglob("*.h5"))
    print(heading("open.py", arguments))
    print(table([f"{nbytes / 1e9:.2f} GB", "ms"], [[name, f"{1e3 * value:.2f}"] for name, value in times.items()]))
    found = {
        "first_open_to_sha256": times["first open"] / times["sha256 of its bytes"],
        "second_open_more_ms": 1e3 * (times["second open"] - times["open, files unchecked"]),
        "join_ratio": times["join"] / times["join, files unchecked"],
        "epoch_ratio": times["epoch"] / times["epoch, files unchecked"],
    }
    print(table(["", ""], [[name, f"{value:.3f}"] for name, value in found.items()]))
    write_json(arguments.json, {"gigabytes": nbytes / 1e9, "ms": {k: 1e3 * v for k, v in times.items()}, **found})


if __name__ == "__main__":
    main()

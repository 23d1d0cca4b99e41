"""What do the codecs keep of an embedding with loud dimensions, and does `plan` foresee their sizes?

    python tools/bench/embeddings.py            # 8,192 embeddings of 1,024 numbers, 1 % of them ten times as large
    python tools/bench/embeddings.py --quick    # small, to see that it runs

The numbers are drawn around 16 directions, as features of a network lie, and the loud dimensions are the same in every row. A
record's bytes are those of its data sets. The error is |stored - given| / |given| of each row, in float64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import softcache
from softcache import dump
from softcache.cache.schema import CRC_SUFFIX
from softcache.config import DumpConfig, PlanConfig
from softcache.dump import forecast
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, parser_of, write_json

CODECS = ("float32", "float16", "int8", "int8:group=64", "lowrank:max_relative_error=0.02")
MACHINE: dict[str, Any] = {"device": "cpu", "workers": 0, "batch_size": 256}


class Rows:
    """(D,) float32 rows, drawn anew from their number; no labels."""

    class_names = ()

    def __init__(self, count: int, width: int) -> None:
        draw = np.random.default_rng(0)
        near = draw.normal(size=(count, 16)) @ draw.normal(size=(16, width))
        self.x = (near + draw.normal(size=(count, width))).astype(np.float32)
        self.x[:, draw.permutation(width)[: max(1, width // 100)]] *= 10
        self.sample_keys = [f"row/{i:06d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.x[index]), -1


def rows(count: int, width: int) -> Rows:
    return Rows(count, width)


class Given(nn.Module):
    """The row as it is, as an embedding."""

    output = "embedding"

    def collate(self, items: list[Tensor]) -> Tensor:
        return torch.stack(items)

    def forward(self, batch: Tensor) -> Tensor:
        return batch


def given() -> Given:
    return Given()


def record_bytes(cache: softcache.Cache, member: str) -> float:
    """Of a record in the mean, without checksums; rows kept dense and what stands once for all are counted in."""
    kinds = ("member", "dense", "constants")
    files = [file for kind in kinds for file in cache.manifest.files_of(kind, member)]
    nbytes = sum(array.nbytes for file in files for name, array in file.arrays.items() if not name.endswith(CRC_SUFFIX))
    return nbytes / len(cache)


def measured(root: Path, codec: str, count: int, width: int) -> dict[str, Any]:
    """One codec: what a dump keeps, and what `plan` said before."""
    asked: dict[str, Any] = {
        "data": f"{__file__}:rows?count={count}&width={width}",
        "teacher": (f"{__file__}:given?output=embedding",),
        "codec": codec,
        **MACHINE,
    }
    foreseen = forecast.run(PlanConfig(**asked), quiet=True).choice.nbytes
    dump.run(DumpConfig(**asked, out=str(root)), quiet=True)
    cache, wanted = softcache.open(root, quiet=True), Rows(count, width)
    (member,), errors = cache.members, []
    for start in range(0, count, 1024):
        keys = wanted.sample_keys[start : start + 1024]
        stored = cache.gather(cache.find(keys), np.zeros(len(keys), np.int64)).embedding().double().numpy()
        exact = wanted.x[start : start + 1024].astype(np.float64)
        errors.append(np.linalg.norm(stored - exact, axis=1) / np.linalg.norm(exact, axis=1))
    error, actual = np.concatenate(errors), cache.manifest.nbytes
    return {
        "codec": codec,
        "bytes": record_bytes(cache, member),
        "mean": float(error.mean()),
        "worst": float(error.max()),
        "cache_bytes": actual,
        "foreseen_bytes": foreseen,
        "off": foreseen / actual - 1,
    }


def main() -> int:
    arguments = parser_of(__doc__).parse_args()
    count, width = (512, 128) if arguments.quick else (8192, 1024)
    print(heading("embeddings", arguments))
    with tempfile.TemporaryDirectory() as scratch:
        found = [measured(Path(scratch) / str(i), codec, count, width) for i, codec in enumerate(CODECS)]
    header = ("codec", "bytes a record", "relative error, mean", "worst", "cache", "plan said", "off")
    shown = [
        (
            f["codec"], f"{f['bytes']:,.0f}", f"{f['mean']:.2e}", f"{f['worst']:.2e}", f"{f['cache_bytes']:,}",
            f"{f['foreseen_bytes']:,}", f"{f['off']:+.2%}",
        )
        for f in found
    ]  # fmt: skip
    print(table(header, shown))
    write_json(arguments.json, {"codecs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

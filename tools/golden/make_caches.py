"""Writes tests/golden/v<version>/: one small cache per codec and kind of content, with the numbers that it must give for good.

Run it once for each new format version, never again: what is there is not written anew.

    python tools/golden/make_caches.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softcache
from softcache import dump
from softcache.cache.schema import FORMAT_VERSION
from softcache.config import DumpConfig
from softcache.share import subset

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
PIECES = GOLDEN / "pieces.py"
SHOWN = 20  # records whose numbers are kept

WIDE: dict[str, Any] = {
    "data": f"{PIECES}:images?count=300&classes=64",
    "teacher": (f"{PIECES}:network?classes=64&width=4",),
}
CACHES: dict[str, dict[str, Any]] = {
    "float32": {"codec": "float32"},
    "float16": {"codec": "float16", "policy": ("shift:pixels=1",), "views": 2},
    "int8": {"codec": "int8"},
    "headtail": {"codec": "headtail:k=3,bits=6"},
    "topk": {"codec": "topk:k=5"},
    "linear_head": {"codec": "linear_head"},
    "linear_head-int8": {"codec": "linear_head:dtype=int8"},
    "lowrank": {"codec": "lowrank:max_kl=2e-6,at_temperature=4", **WIDE},
    "features": {"codec": "float16", "features": ("hidden:flatten",), "feature_dtype": "int8", "license": "cc0-1.0"},
    "multi-label": {"codec": "float16", "data": f"{PIECES}:images?multi_label=true", "no_keys": True},
    "mixed": {"codec": "float16", "policy": ("crop_flip:padding=1", "mixup"), "views": 2},
}


def make(folder: Path, settings: dict[str, Any]) -> None:
    """One dump, without what tells of this machine."""
    defaults = {"data": f"{PIECES}:images", "teacher": (f"{PIECES}:network",), "device": "cpu", "threads": 1}
    settings = {**defaults, **settings}
    dump.run(DumpConfig(out=str(folder), workers=0, batch_size=16, **settings), quiet=True)


def make_extended(folder: Path) -> None:
    """Three rounds: a member, another view, another member."""
    policy, first = ("shift:pixels=1",), f"{PIECES}:network?name=first"
    make(folder, {"codec": "int8", "policy": policy, "views": 1, "teacher": (first,)})
    make(folder, {"extend": True, "views": 2, "teacher": (first,)})
    make(folder, {"extend": True, "teacher": (f"{PIECES}:network?name=second&seed=2",), "codec": "float16"})


def expected(path: Path) -> dict[str, Any]:
    """What the cache gives, and what its teachers give, for its first records."""
    cache = softcache.open(path)
    count = min(SHOWN, len(cache) * cache.num_views)
    records = np.linspace(0, len(cache) * cache.num_views - 1, count).astype(np.int64)
    views, rows = np.divmod(records, len(cache))
    names = {member: list(cache.features[member]) for member in cache.members}
    wanted = sorted({feature for found in names.values() for feature in found})
    targets = cache.gather(rows, views, features=wanted)
    members = {}
    for member in cache.members:
        complete = cache.codecs[member].complete
        members[member] = {
            "logits": numbers(targets.logits(member)) if complete else None,
            "log_probs at T=2": numbers(targets.log_probs(member, 2.0)),
            "eps": numbers(torch.from_numpy(cache.eps(member, rows, views))) if cache.codecs[member].bounded else None,
            "features": {name: numbers(targets.feature(name, member)) for name in names[member]},
        }
    return {
        "id": cache.id,
        "rows": rows.tolist(),
        "views": views.tolist(),
        "sample_ids": [f"{int(i):016x}" for i in targets.sample_ids],
        "keys": [cache.samples.key(int(row)) for row in rows],
        "labels": targets.labels.int().tolist(),
        "pixel_digests": cache.reader.gather(None, "pixel_digests", rows, views).tolist(),
        "members": members,
    }


def numbers(values: torch.Tensor) -> Any:
    """float32 values as the decimals that read back to them."""
    return values.double().tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    version = GOLDEN / f"v{FORMAT_VERSION}"
    if version.exists():
        print(f"{version} is there: golden caches are written once and read for good", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for name, settings in CACHES.items():
        make(version / name, settings)
    make_extended(version / "extended")
    subset.run(version / "float16", version / "subset", subset.Choice(views="1"), quiet=True)
    for path in sorted(version.iterdir()):
        (path / "README.md").unlink()
        (path / "provenance.json").unlink()
        shutil.rmtree(path / "dump")
        (version / f"{path.name}.json").write_text(json.dumps(expected(path), indent=1) + "\n")
        print(f"{path.name:<18} {sum(f.stat().st_size for f in path.rglob('*') if f.is_file()):>9,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

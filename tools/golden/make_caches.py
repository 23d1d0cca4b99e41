"""Writes tests/golden/v<version>/: one small cache per codec and kind of content, with the numbers that it must give for good.

Run it once for each new format version, never again: what is there is not written anew.

    python tools/golden/make_caches.py
    python tools/golden/make_caches.py --provisional   # those of the version that may still change: written anew each time
    python tools/golden/make_caches.py --quick         # some of them, into a temporary folder
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softcache
from softcache.cache.manifest import Manifest
from softcache.cache.reader import CacheReader
from softcache.cache.schema import FORMAT_VERSION, PROVISIONAL_FORMAT

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden.cases import CACHES, CACHES_2, GOLDEN, make, make_extended, make_subset
from golden.indexed import MEMBERS, make_indexed

SHOWN = 20  # records whose numbers are kept
QUICK = ("float16", "features")
OF_PROVISIONAL = ("float16", "topk", "lowrank", "features", "mixed", *CACHES_2)
INDEXED = GOLDEN / "indexed"


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


def write(version: Path, names: Sequence[str], format: int = FORMAT_VERSION) -> None:
    """These caches, one made in three rounds, and a subset, without what tells of this machine."""
    for name in names:
        make(version / name, {**CACHES, **CACHES_2}[name] | {"format": str(format)})
    make_extended(version / "extended", format)
    make_subset(version / "float16", version / "subset", "--views", "1")
    for path in sorted(version.iterdir()):
        _leave_bytes(path)
        (version / f"{path.name}.json").write_text(json.dumps(expected(path), indent=1) + "\n")


def write_indexed(path: Path) -> None:
    """The cache of indexes, and of every one of its records the bytes."""
    manifest = make_indexed(path)
    _leave_bytes(path)
    told = {"id": manifest.id, "records": records(path, manifest)}
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


def records(path: Path, manifest: Manifest) -> dict[str, list[str]]:
    """Member/data set -> of each view the bytes of all records, in hex."""
    reader, found = CacheReader(path), {}
    rows = np.arange(manifest.plan.samples.count)
    for member, (_, arrays) in MEMBERS.items():
        for name in arrays:
            of = reader.gather if reader.index_of(member, name) is None else lambda *at: reader.slices(*at).values
            views = range(manifest.plan.views.count)
            found[f"{member}/{name}"] = [of(member, name, rows, np.full(len(rows), v)).tobytes().hex() for v in views]
    return found


def _leave_bytes(path: Path) -> None:
    """Take away what tells of this machine."""
    for name in ("README.md", "provenance.json"):
        (path / name).unlink()
    shutil.rmtree(path / "dump")
    print(f"{path.name:<18} {sum(f.stat().st_size for f in path.rglob('*') if f.is_file()):>9,} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some of them, into a temporary folder")
    parser.add_argument("--provisional", action="store_true", help="those of the version that may still change, anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.provisional:
        for version in (GOLDEN / f"v{PROVISIONAL_FORMAT}", INDEXED):
            shutil.rmtree(version, ignore_errors=True)
        write(GOLDEN / f"v{PROVISIONAL_FORMAT}", OF_PROVISIONAL, PROVISIONAL_FORMAT)
        write_indexed(INDEXED)
        return 0
    if arguments.quick:
        with tempfile.TemporaryDirectory(prefix="make-caches-") as folder:
            write(Path(folder) / "v", QUICK)
            write_indexed(Path(folder) / "indexed")
        return 0
    version = GOLDEN / f"v{FORMAT_VERSION}"
    if version.exists():
        print(f"{version} is there: golden caches are written once and read for good", file=sys.stderr)
        return 2
    write(version, tuple(CACHES))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does this tree still write the same caches, byte for byte, as another one did? Small dumps of every kind, and their ids.

    python tools/golden/same_bytes.py --write before.json        # in the tree before a change
    python tools/golden/same_bytes.py --against before.json      # in the tree after it; exit code 1 where something differs

Another tree than the script's own is dumped with by PYTHONPATH. Ids depend on versions and on the processor, so a comparison with
others is refused. `--quick` makes a few of the dumps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import softcache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden.cases import CACHES, WIDE, make, make_extended, make_in_parts, make_subset

MORE: dict[str, dict[str, Any]] = {
    "max_kl": {"max_kl": 1e-4, "policy": ("shift:pixels=1",), "views": 2},  # the survey chooses a codec
    "max_kl-wide": {"max_kl": 1e-5, **WIDE},
    "natural-order": {"codec": "float16", "order": "natural", "shard_rows": 7},
}
QUICK = ("float16", "lowrank", "mixed", "extended", "two-parts", "subset")


def makers(root: Path) -> dict[str, Callable[[Path], None]]:
    """Name -> what dumps it into a folder; a subset finds its parent below `root`."""
    found: dict[str, Callable[[Path], None]] = {}
    for name, settings in {**CACHES, **MORE}.items():
        found[name] = lambda folder, settings=settings: make(folder, settings)  # type: ignore[misc]
    found["extended"] = make_extended
    found["two-parts"] = make_in_parts
    found["subset"] = lambda folder: make_subset(root / "float16", folder, "--views", "1")
    found["subset-classes"] = lambda folder: make_subset(root / "features", folder, "--keep-labels", "0-5")
    return found


def described(folder: Path) -> dict[str, str]:
    """The cache's id, and one sha256 over all its files."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    hasher = hashlib.sha256()
    for file in sorted(manifest["files"], key=lambda file: str(file["path"])):
        hasher.update(f"{file['path']} {hashlib.sha256((folder / file['path']).read_bytes()).hexdigest()}\n".encode())
    return {"id": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(), "files": hasher.hexdigest()}


def versions(folder: Path) -> dict[str, Any]:
    """What ids depend on: the versions, threads and processor that a cache names."""
    made_with: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())["rounds"][0]["made_with"]
    return {"python": ".".join(map(str, sys.version_info[:2])), **made_with}


def dumped(quick: bool) -> dict[str, Any]:
    """Every dump made once: {"versions": ..., "caches": {name: {"id", "files"}}}."""
    caches: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as root:
        for name, build in makers(Path(root)).items():
            if not quick or name in QUICK:
                build(Path(root) / name)
                caches[name] = described(Path(root) / name)
                print(f"{name:<18} {caches[name]['id']}  files {caches[name]['files'][:16]}", flush=True)
        return {"versions": versions(Path(root) / "float16"), "caches": caches}


def compare(now: dict[str, Any], before: dict[str, Any]) -> int:
    """Print what differs; 0: nothing, 1: a cache, 2: they cannot be compared."""
    ours, theirs = now["versions"], before["versions"]
    other = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if other:
        listing = "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in other)
        print(f"cannot be compared: {listing}", file=sys.stderr)
        return 2
    shared = [name for name in now["caches"] if name in before["caches"]]
    different = [name for name in shared if now["caches"][name] != before["caches"][name]]
    for name in different:
        changed = [key for key in ("id", "files") if now["caches"][name][key] != before["caches"][name][key]]
        print(f"{name}: differs in {' and '.join(changed)}")
    lost = [name for name in before["caches"] if name not in now["caches"]]
    print(f"{len(shared) - len(different)} of {len(shared)} equal" + (f"; not made: {', '.join(lost)}" if lost else ""))
    return int(bool(different))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="save versions and ids as JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with what --write saved")
    parser.add_argument("--quick", action="store_true", help="a few of the dumps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"softcache {softcache.__version__} from {Path(softcache.__file__).parent}, torch {torch.__version__}, one thread"
    )
    now = dumped(arguments.quick)
    if arguments.write:
        arguments.write.write_text(json.dumps(now, indent=1) + "\n")
    return compare(now, json.loads(arguments.against.read_text())) if arguments.against else 0


if __name__ == "__main__":
    sys.exit(main())

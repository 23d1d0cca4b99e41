"""Single damages: flipped bits and cut files, one at a time. Is each of them found?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hostile.judge import read_everything, same
from softcache.cache.file_entry import StoredFile
from softcache.cache.manifest import read_manifest
from softcache.check import verify
from softcache.errors import SoftcacheError


def damages(root: Path, flips: int, truncations: int, seed: int) -> dict[str, int]:
    """Flip bits and cut files one at a time; what was found, and what was not."""
    honest = read_everything(root)
    manifest = read_manifest(root)
    # None: the manifest; of version 2 its lists too
    files = [*manifest.files, None, *(one.path for one in getattr(manifest.files, "lists", ()))]
    draw, counts = random.Random(seed), Counter[str]()
    real = verify.structure_faults
    # it comes after the hashes and can only find more: left out, so that a run takes milliseconds
    verify.structure_faults = _not_looked_at  # type: ignore[assignment]
    try:
        for number in range(flips + truncations):
            file = draw.choice(files)
            path = root / (file if isinstance(file, str) else file.path if file else "manifest.json")
            data = path.read_bytes()
            if number < flips:
                changed = bytearray(data)
                places: Sequence[int] = range(len(data))
                if (
                    file and not isinstance(file, str) and number % 2
                ):  # most of such small files is padding: half of the flips go to the data sets
                    places = draw.choice(
                        [range(a.offset, a.offset + a.nbytes) for a in file.arrays.values() if a.nbytes]
                    )
                changed[draw.choice(places)] ^= 1 << draw.randrange(8)
            else:
                changed = bytearray(data[: draw.randrange(len(data))])
            path.write_bytes(changed)
            kind = "flips" if number < flips else "truncations"
            counts[kind] += 1
            counts[f"{kind} found by verify --full"] += found_by_verify(root, full=True)
            if number >= flips:
                counts[f"{kind} found by verify --quick"] += found_by_verify(root, full=False)
            counts[f"{kind} {reading_of(root, honest)} with check_blocks=always"] += 1
            path.write_bytes(data)
    finally:
        verify.structure_faults = real
    assert same(read_everything(root), honest)
    return dict(counts)


def _not_looked_at(root: Path, files: object) -> Iterator[tuple[StoredFile, list[str]]]:
    return iter(())


def found_by_verify(root: Path, *, full: bool) -> bool:
    try:
        return verify.run(root, full=full, quiet=True).state == "damaged"
    except SoftcacheError:  # a flip may make it a cache of another version
        return True


def reading_of(root: Path, honest: dict[str, np.ndarray]) -> str:
    """By the checksums of blocks alone: the hash of the whole file would find everything before them."""
    try:
        found = read_everything(root, check_blocks="always", check_files=False)
    except SoftcacheError:
        return "refused"
    return "read as before (no data was hit)" if same(found, honest) else "SILENTLY WRONG"

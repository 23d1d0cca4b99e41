"""What became of a hostile cache: how it was refused, or that it was not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import softcache
from hostile.forge import Case, Forge
from softcache.cache.checksums import CheckBlocks
from softcache.cache.reader import CacheReader
from softcache.check import verify
from softcache.errors import SoftcacheError


def read_stored(reader: CacheReader) -> dict[str, np.ndarray]:
    """Everything that is stored, through the reader: what each data set gives for every record."""
    plan = reader.manifest.plan
    samples = reader.samples
    views, rows = (part.reshape(-1) for part in np.mgrid[: plan.views.count, : plan.samples.count])
    found = {f"samples/{name}": value for name, value in samples.arrays().items()}
    found |= {f"probe/{name}": value for name, value in reader.probe().items()}
    for member in [None, *(m.name for m in plan.members)]:
        for name in plan.views.digests if member is None else reader.array_kinds(member):
            if reader.index_of(member, name) is None:
                found[f"{member}/{name}"] = reader.gather(member, name, rows, views)
            elif member is not None:
                found[f"{member}/{name}"] = reader.slices(member, name, rows, views).values
        if member is not None:
            found |= {f"{member}/{name}": value for name, value in reader.constants(member).items()}
    found |= {f"candidates/{name}": value for name, value in reader.candidates().items()}
    for index in plan.indexes:
        for number, positions in enumerate(reader.index(index.name).rounds()):
            found |= {f"{index.name}-{number}/{name}": value for name, value in positions.arrays().items()}
    return found


def read_decoded(cache: softcache.Cache) -> dict[str, np.ndarray]:
    """What a training loop is given: keys, labels, logits and features of every record, all at once."""
    views, rows = (part.reshape(-1) for part in np.mgrid[: cache.num_views, : len(cache)])
    features = sorted({name for of_member in cache.features.values() for name in of_member})
    targets = cache.gather(rows, views, features=features)
    found = {"labels": targets.labels.numpy(), "keys": np.array([cache.samples.key(row) for row in range(len(cache))])}
    for member in cache.members:
        if member in cache.codecs:
            found[f"{member}/logits"] = targets.output(member).numpy()
        found |= {f"{member}/{name}": targets.feature(name, member).numpy() for name in cache.features[member]}
        cache.classifier(member)
    return found


def read_everything(
    path: Path, *, check_blocks: CheckBlocks = "first", check_files: bool = True
) -> dict[str, np.ndarray]:
    cache = softcache.open(path, check_blocks=check_blocks, check_files=check_files)
    return read_stored(cache.reader) | {f"decoded/{name}": value for name, value in read_decoded(cache).items()}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.tobytes() == other[name].tobytes()
        for name, value in one.items()
    )


@dataclass(frozen=True)
class Outcome:
    """What became of one hostile cache.

    Attributes:
        reading: the typed error of opening and reading, or "honest numbers" or "other numbers".
        verifying: the typed error or first fault of `verify --full`, or "whole".
        fault: why that is not good enough; "" where it is.
    """

    case: str
    reading: str
    verifying: str
    fault: str
    reading_s: float
    verifying_s: float


def judge(name: str, case: Case, root: Path, honest: Mapping[str, np.ndarray], *, verifying: bool = True) -> Outcome:
    started = time.monotonic()
    reading, refused = _reading(root, honest)
    between = time.monotonic()
    verified, found = _verifying(root) if verifying else ("not asked", True)
    stopped = time.monotonic()
    fault = ""
    if "CRASH" in reading or "CRASH" in verified:
        fault = "an error that is not ours"
    elif case.gate == "verify" and not found:
        fault = "verify --full calls it whole"
    elif not refused and (case.gate == "open" or (case.numbers == "honest" and reading != "honest numbers")):
        fault = "reading accepts it"
    return Outcome(name, reading, verified, fault, between - started, stopped - between)


def _reading(root: Path, honest: Mapping[str, np.ndarray]) -> tuple[str, bool]:
    """What happened, and whether it is a refusal."""
    try:
        return ("honest numbers" if same(read_everything(root), honest) else "other numbers"), False
    except SoftcacheError as exc:
        return f"{type(exc).__name__}: {_first_line(exc.message)}", True
    except Exception as exc:  # a crash: what this tool looks for
        return f"CRASH {type(exc).__name__}: {_first_line(str(exc))}", False


def _verifying(root: Path) -> tuple[str, bool]:
    try:
        verdict = verify.run(root, full=True, quiet=True)
        return (_first_line(verdict.faults[0]), True) if verdict.state == "damaged" else (verdict.state, False)
    except SoftcacheError as exc:
        return f"{type(exc).__name__}: {_first_line(exc.message)}", True
    except Exception as exc:
        return f"CRASH {type(exc).__name__}: {_first_line(str(exc))}", False


def _first_line(text: str) -> str:
    return ascii((text.splitlines() or [""])[0])[1:-1]


def folder_name(case: str) -> str:
    return case.replace("/", "-").replace(" ", "_")


def try_case(
    case: Case,
    honest_root: Path,
    honest: Mapping[str, np.ndarray],
    folder: Path,
    *,
    verifying: bool = True,
    at_most: int = 10**6,
) -> Iterator[Outcome]:
    """Make the case out of a copy of the honest cache, and judge it and its variants.

    Args:
        verifying: run `verify --full` too.
        at_most: so many of the variants, evenly chosen.
    """
    root = folder / folder_name(case.name)
    shutil.copytree(honest_root, root)
    forge = Forge(root)
    variants = case.make(forge)
    if variants is None:
        yield judge(case.name, case, root, honest, verifying=verifying)
        return
    chosen = list(variants)
    for what, data in chosen[:: -(-len(chosen) // at_most)]:
        forge.publish(data)
        yield judge(f"{case.name}: {what}", case, root, honest, verifying=verifying)

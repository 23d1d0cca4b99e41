"""Small caches that tests serve as if they lay far away: of both versions, and of words. Made once a session."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from conftest import MEMORY, WORLDS
from words_cache import sentences, write_cache

import softcache
from softcache import dump
from softcache.config import DumpConfig

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from faults.web_server import Server, serving  # noqa: F401 the tests take it from here

ROWS, VIEWS = 1600, 4
KINDS = ("version 1", "version 2", "words")
BLOCK = 1 << 16


@cache
def folder() -> Path:
    """Where they lie."""
    found = Path(tempfile.mkdtemp(prefix="far-", dir=MEMORY if MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return found


@cache
def far(kind: str) -> Path:
    """A cache of the kind: two members; of samples with four views and a feature, and files of many blocks."""
    path = folder() / kind.replace(" ", "")
    if kind == "words":
        spec = sentences(folder() / "words.jsonl", count=2200, seed=3)
        write_cache(path, spec, ("a", "b"), part_rows=2048)
        return path
    toy = f"{WORLDS / 'toy.py'}"
    config = DumpConfig(
        data=f"{toy}:images?count={ROWS}",
        teacher=(f"{toy}:network?seed=1&name=one", f"{toy}:network?seed=2&name=two"),
        policy="shift:pixels=2",
        views=VIEWS,
        features=("1",),
        codec="float32",
        shard_rows=1280,
        format="2" if kind == "version 2" else "1",
        threads=1,
        workers=0,
        out=str(path),
    )
    dump.run(config, quiet=True)
    return path


def all_pairs(cache: softcache.Cache) -> tuple[np.ndarray, np.ndarray]:
    """Every row in every view, in no order."""
    pairs = np.random.default_rng(0).permutation(len(cache) * cache.num_views)
    return pairs % len(cache), pairs // len(cache)


def read_all(cache: softcache.Cache, rows: np.ndarray, views: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(member, data set) -> what is stored of these pairs, of everything."""
    reader, found = cache.reader, {}
    for member in cache.members:
        for name in reader.array_kinds(member):
            found[member, name] = cache.stored(member, name, rows, views)
    for name in cache.manifest.plan.views.digests:
        found["", name] = reader.gather(None, name, rows, views)
    for index in cache.manifest.plan.indexes:
        at = cache.positions(index.name, rows, views)
        found["index", index.name] = np.concatenate([at.offsets, at.numbers])
    return found


def check_alike(found: dict[Any, np.ndarray], wanted: dict[Any, np.ndarray]) -> None:
    """Bit for bit."""
    assert found.keys() == wanted.keys() != set()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert found[key].tobytes() == value.tobytes(), key

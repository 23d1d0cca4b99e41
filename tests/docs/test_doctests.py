"""The examples in docstrings run, in a folder with a small teacher and small caches, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import softcache
from softcache import dump, train
from softcache.config import DumpConfig, TrainConfig
from softcache.data.transfer_set import open_transfer_set

ROOT = Path(softcache.__file__).parent
DATA = "synthetic:images?count=64"
QUICK: dict[str, Any] = {"data": DATA, "device": "cpu", "threads": 1}
EXAMPLED = 12  # names at least


def examples() -> list[doctest.DocTest]:
    """Every docstring of the package that has an example."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            found += [one for one in doctest.DocTestFinder().find(module) if one.examples]
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/teacher, and of it caches/a with two views, caches/ensemble with two members, and caches/embedded."""
    folder = tmp_path_factory.mktemp("docstrings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teacher = TrainConfig(student="softcache:mlp?hidden=8", loss=("ce",), epochs=1, out="runs/teacher", **QUICK)
        train.run(teacher, quiet=True)
        one = DumpConfig(
            teacher=("runs/teacher",), policy=("shift:pixels=1",), views=2, codec="float32", out="caches/a", **QUICK
        )
        dump.run(one, quiet=True)
        spec = "softcache:mlp?hidden=8&name={}@runs/teacher"
        two = DumpConfig(teacher=(spec.format("a"), spec.format("b")), out="caches/ensemble", **QUICK)
        dump.run(two, quiet=True)
        dump.run(DumpConfig(teacher=("runs/teacher?head=none",), out="caches/embedded", **QUICK), quiet=True)
    return folder


@pytest.fixture
def names(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What examples take as given, in that folder; torch's threads are put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(world)
    cache, data = softcache.open("caches/a"), open_transfer_set(DATA)
    joined = cache.join(data)
    yield {
        "softcache": softcache, "torch": torch, "np": np, "DataLoader": DataLoader,
        "cache": cache, "data": data, "joined": joined,
    }  # fmt: skip
    torch.set_num_threads(threads)


def run(test: doctest.DocTest, names: dict[str, Any]) -> list[str]:
    """What went wrong, as doctest tells it; empty where all is as written."""
    said: list[str] = []
    test.globs = {**test.globs, **names}
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return said


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name.removeprefix("softcache."))
def test_an_example_prints_what_it_says(test: doctest.DocTest, names: dict[str, Any]) -> None:
    assert not (said := run(test, names)), "\n".join(said)


def test_public_names_have_examples() -> None:
    told = {test.name.partition(".")[2] for test in EXAMPLES}
    wanted = {
        "targets.cache.open", "targets.cache.Cache.join", "targets.cache.Cache.gather", "targets.cache.Joined.gather",
        "targets.batch.Targets.logits", "targets.batch.Targets.combined", "losses.logits.kd", "losses.labelled.ce",
        "dump.flow.run", "train.flow.run",
    }  # fmt: skip
    assert wanted <= told and len(told) >= EXAMPLED


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (">>> len(cache)\n65", "Expected:\n    65\nGot:\n    64"),
        (">>> softcache.open('caches/gone')", "CacheError"),
        (">>> gone", "NameError"),
        (">>> import warnings\n>>> warnings.warn('old', stacklevel=1)", "UserWarning"),
    ],
    ids=["output", "error", "name", "warning"],
)
def test_a_planted_wrong_example_is_found(names: dict[str, Any], example: str, told: str) -> None:
    def parsed(text: str) -> doctest.DocTest:
        return doctest.DocTestParser().get_doctest(text, {}, "planted", None, 0)

    assert run(parsed(">>> len(cache)\n64"), names) == []
    assert told in "".join(run(parsed(example), names))

"""The examples run as a stranger would run them: they learn, and what they print would show a wrong pairing."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORLDS
from PIL import Image

import softcache
from softcache import dump
from softcache.config import DumpConfig
from softcache.targets.batch import Targets
from softcache.targets.cache import Joined

EXAMPLES = Path(__file__).parents[2] / "tools" / "examples"
Run = Callable[..., dict[str, float]]

# in the order of their classes; timm would sort them n1, n2, n10, n33
COLOURS = {"n1": (200, 40, 40), "n10": (40, 200, 40), "n2": (40, 40, 200), "n33": (160, 160, 160)}


@pytest.fixture(scope="module")
def teachers() -> Path:
    return WORLDS / "example_teachers.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/CLASS/0.png, ... and val/...: noise around the colour of a class."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw.normal(colour, 60, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run_example("plain_loop", "--cache", ...) -> the last number of each kind that it printed."""

    def run(name: str, *arguments: str) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
        found = re.findall(r"(loss|accuracy|agreement)[^:,\n]*?:? (\d+\.\d+)( %)?$", printed.replace(", ", "\n"), re.M)
        return {kind: float(value) / (100 if percent else 1) for kind, value, percent in found}

    return run


def dumped(out: Path, **settings: object) -> softcache.Cache:
    config = DumpConfig(out=str(out), threads=1, workers=0, **settings)  # type: ignore[arg-type]
    return softcache.open(dump.run(config, quiet=True).path)


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every batch gets the targets of the rows beside its own."""
    gather = Joined.gather

    def wrong(self: Joined, records: torch.Tensor, **settings: object) -> Targets:
        count = len(self.cache)
        return gather(self, records // count * count + (records % count + 1) % count, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Joined, "gather", wrong)


@pytest.fixture
def picture_cache(tmp_path: Path, teachers: Path, pictures: Path) -> softcache.Cache:
    return dumped(
        tmp_path / "cache",
        data=f"imagefolder:{pictures / 'train'}",
        teacher=(f"{teachers}:colours",),
        policy=("to_rgb", "resized_crop_flip:size=32,scale_min=0.5"),
        views=2,
        for_=("kd", "hint"),
    )


@pytest.mark.slow
def test_plain_loop_on_a_folder_of_images(
    picture_cache: softcache.Cache, pictures: Path, run_example: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--cache", str(picture_cache.reader.path), "--epochs", "3"]
    arguments += ["--data", str(pictures / "train"), "--eval-data", str(pictures / "val")]
    found = run_example("plain_loop", *arguments)
    assert found["accuracy"] > 0.7  # chance is 0.25
    assert found["agreement"] > 0.8
    shifted(monkeypatch)
    assert run_example("plain_loop", *arguments)["agreement"] < 0.6


@pytest.mark.slow
def test_embedder_loop(
    tmp_path: Path, teachers: Path, pictures: Path, run_example: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = dumped(
        tmp_path / "cache", data=f"imagefolder:{pictures / 'train'}", teacher=(f"{teachers}:colours?head=none",),
        policy=("to_rgb", "resized_crop_flip:size=32,scale_min=0.5"), views=2,
    )  # fmt: skip
    arguments = ["--cache", str(cache.reader.path), "--epochs", "12"]
    arguments += ["--data", str(pictures / "train"), "--eval-data", str(pictures / "val")]
    found = run_example("embedder_loop", *arguments)
    assert found["accuracy"] > 0.7  # chance is 0.2
    assert found["agreement"] > 0.8
    shifted(monkeypatch)
    assert run_example("embedder_loop", *arguments)["agreement"] < 0.6
    monkeypatch.undo()
    assert 0 <= run_example("embedder_loop", "--quick")["accuracy"] <= 1


@pytest.mark.slow
def test_tagger_loop_learns_word_by_word(run_example: Run) -> None:
    found = run_example("tagger_loop", "--quick")
    assert found["accuracy"] > 0.7 and found["agreement"] > 0.7  # the most frequent tag alone: 0.62


@pytest.mark.slow
def test_plain_loop_on_digits(
    tmp_path: Path, teachers: Path, run_example: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra softcache[demo]")
    cache = dumped(tmp_path / "cache", data="digits", teacher=(f"{teachers}:means",), for_=("kd", "hint"))
    arguments = ["--cache", str(cache.reader.path), "--epochs", "8"]
    found = run_example("plain_loop", *arguments)
    assert found["accuracy"] > 0.6  # chance is 0.1
    assert found["agreement"] > 0.65
    shifted(monkeypatch)
    assert run_example("plain_loop", *arguments)["agreement"] < 0.3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves the files of its images open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_loop(
    picture_cache: softcache.Cache, pictures: Path, run_example: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm", reason="needs the extra softcache[timm]")
    arguments = [
        "--cache",
        str(picture_cache.reader.path),
        "--model",
        "test_resnet",
        "--epochs",
        "4",
        "--batch-size",
        "16",
    ]
    arguments += ["--lr", "3e-3", "--data", str(pictures / "train"), "--eval-data", str(pictures / "val")]
    found = run_example("timm_loop", *arguments)
    assert found["accuracy"] > 0.7
    assert found["agreement"] > 0.8
    shifted(monkeypatch)
    assert run_example("timm_loop", *arguments)["agreement"] < 0.6


def test_find_gives_rows_of_keys(picture_cache: softcache.Cache) -> None:
    keys = [picture_cache.samples.key(row) for row in (3, 0, 7)]
    assert keys[0].startswith("n") and keys[0].endswith(".png")
    assert picture_cache.find([keys[0], "n1/none.png", *keys[1:], keys[0]]).tolist() == [3, -1, 0, 7, 3]


@pytest.mark.skipif(find_spec("executorch") is None, reason="needs executorch, in an environment of its own")
def test_a_program_runs_in_executorch(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "executorch_student.py"))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    torch.export.save(torch.export.export(net, (torch.zeros(3, 4),)), tmp_path / "net.pt2")
    assert example["convert"](str(tmp_path / "net.pt2"), str(tmp_path / "net.pte")) < 1e-3

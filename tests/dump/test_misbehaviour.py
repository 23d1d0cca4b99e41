"""Teachers and data sets that go wrong in the middle of a dump: the samples are named, nothing is lost, the dump goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import WORLDS
from PIL import Image

import softcache
from softcache import cli
from softcache.check import verify


@pytest.fixture
def user(tmp_path: Path) -> Path:
    shutil.copy(WORLDS / "armed.py", tmp_path / "user.py")
    return tmp_path


def dump(user: Path, *more: str) -> int:
    argv = [
        "dump",
        "--data",
        f"{user}/user.py:images",
        "--teacher",
        f"{user}/user.py:teacher",
        "--out",
        f"{user}/cache",
    ]
    argv += ["--codec", "float32", "--batch-size", "32", "--shard-rows", "256", "--threads", "1", "--quiet", *more]
    return cli.main(argv)


MIDWAY = {
    "nan": ["not finite for 1 samples of this batch: toy/"],
    "fewer columns": [r"a result of shape (32, 3)", "in the batch of toy/"],
    "fewer rows": ["gave 31 rows for 32 samples", "in the batch of toy/"],
    "train mode": ["has modules in train mode"],
    "learns": ["seen' while it ran"],
    "another output": ["gave another output for the first batch than before the dump, up to 1 apart"],
    "raises": ["teacher 'teacher' failed: KeyError: 'stage7' (user.py, line ", "in the batch of toy/", "and 27 more"],
    "no memory": ["ran out of memory at batch size 32", "--batch-size 16", "in the batch of toy/"],
    "data raises": ["sample toy/0321: OSError: cannot identify image file"],
    "data changes": ["1 samples changed since this dump was started: toy/0321"],
    "data of another size": [
        "sample toy/0321: ndarray uint8 (3, 4), where most are ndarray uint8 (4, 4)",
        "--without FILE",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers"), [(how, 0) for how in MIDWAY] + [(how, 1) for how in MIDWAY if "data" in how]
)
def test_a_fault_in_the_middle_is_named_and_the_dump_goes_on(
    how: str, workers: int, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (user / "armed").write_text(how)
    assert dump(user, "--workers", str(workers)) == 2
    said = capsys.readouterr().err
    for part in MIDWAY[how]:
        assert part in said, said
    assert "Traceback" not in said and "tip:" in said
    assert not (user / "cache/manifest.json").exists()
    assert not list((user / "cache").rglob("*.tmp-*"))
    (user / "armed").unlink()
    before = {path: path.stat().st_ino for path in (user / "cache/members").rglob("*.h5")}
    assert dump(user) == 0
    if how not in ("learns", "train mode", "another output"):  # these are known at the end, when every shard is written
        assert {path: path.stat().st_ino for path in before} == before
    assert verify.run(user / "cache", full=True, quiet=True).state == "whole"
    cache = softcache.open(user / "cache")
    assert len(cache) == 600 and bool(cache.gather(np.arange(600), np.zeros(600, np.int64)).logits().isfinite().all())


def test_an_unreadable_image_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"{number:02d}.png")
    (tmp_path / "t.py").write_text("def teacher():\n    return lambda batch: batch[:, :2] * 1.0\n")
    bad = tmp_path / "images/dog/07.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    argv = ["dump", "--data", f"imagefolder:{tmp_path}/images", "--teacher", f"{tmp_path}/t.py:teacher", "--quiet"]
    argv += ["--out", str(tmp_path / "cache"), "--workers", "2", "--threads", "1"]
    assert cli.main(argv) == 2
    assert "dog/07.png" in capsys.readouterr().err
    bad.write_bytes(whole)
    os.utime(bad)
    assert cli.main(argv) == 0

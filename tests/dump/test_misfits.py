"""Samples that do not fit are told before anything is written, listed where asked, and left out by --without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import softcache
from softcache import cli

TEACHER = """
import torch
from torch import nn
def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
"""


def test_misfits_are_listed_before_anything_is_written_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text(TEACHER)
    Path("p").mkdir()
    for i in range(80):  # the first 64 rows are looked at by the teacher's own checks
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(f"p/{i:02d}.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save("p/79.png")
    Path("p/78.png").write_bytes(b"nothing")
    argv = ["dump", "--data", "images:p?classes=3", "--teacher", "t.py:teacher", "--order", "natural", "--threads", "1"]
    argv += ["--batch-size", "8", "--quiet"]
    assert cli.main([*argv, "--out", "c", "--misfits", "bad.txt"]) == 2
    assert "2 of 80 samples cannot be used: 78.png, 79.png" in capsys.readouterr().err
    assert Path("bad.txt").read_text() == "78.png\n79.png\n" and not Path("c").exists()
    Path("bad.txt").unlink()
    first = Path("p/00.png").read_bytes()
    Path("p/00.png").write_bytes(b"nothing")  # the teacher is tried on this one
    assert cli.main([*argv, "--out", "c", "--misfits", "bad.txt"]) == 2
    assert "2 of 80 samples cannot be used: 00.png, 78.png" in capsys.readouterr().err
    assert Path("bad.txt").read_text() == "00.png\n78.png\n" and not Path("c").exists()
    Path("p/00.png").write_bytes(first)
    Path("bad.txt").write_text("78.png\n79.png\n")
    Path("78.txt").write_text("78.png\n")
    assert (
        cli.main([*argv, "--out", "c", "--without", "78.txt", "--policy", "to_rgb"]) == 0
    )  # no other plan: none began
    assert len(softcache.open("c")) == 79
    assert cli.main([*argv, "--out", "d", "--without", "bad.txt"]) == 0
    cache = softcache.open("d")
    assert len(cache) == 78 and "79.png" not in {cache.samples.key(i) for i in range(78)}
    assert cli.main(["subset", "d", "e", "--without", "few.txt"]) == 2  # no such file
    Path("few.txt").write_text("00.png\n")
    assert cli.main(["subset", "d", "e", "--without", "few.txt", "--quiet"]) == 0 and len(softcache.open("e")) == 77


def test_pictures_without_classes_get_those_of_a_teacher_that_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text(TEACHER)
    Path("p").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)).save(f"p/{i}.png")
    quiet = ["--threads", "1", "--quiet"]
    train = ["train", "--student", "softcache:mlp?hidden=4", "--epochs", "1", "--batch-size", "4", *quiet]
    assert cli.main([*train, "--data", "synthetic:images?classes=3&size=4&count=16", "--out", "teacher"]) == 0
    assert cli.main(["dump", "--data", "images:p", "--teacher", "teacher?name=old", "--out", "c", *quiet]) == 0
    cache = softcache.open("c")
    assert cache.class_names == softcache.open("c").class_names and cache.num_classes == 3
    assert cache.samples.labels_of(np.arange(8)).tolist() == [-1] * 8
    assert cli.main([*train, "--data", "images:p", "--cache", "c", "--out", "student"]) == 0
    capsys.readouterr()
    assert cli.main(["dump", "--data", "images:p", "--teacher", "t.py:teacher", "--out", "d", *quiet]) == 2
    told = capsys.readouterr().err
    assert "has no classes, and no teacher names any" in told and "classes=10" in told

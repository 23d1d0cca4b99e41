"""Honest users are not refused, and hardly ever warned: fifty odd sets, each opened and dumped with a fair teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import WORLDS

from softcache import dump
from softcache.config import DumpConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.spec import load_user_file

WORLD = WORLDS / "honest_sets.py"


@pytest.fixture(scope="module")
def sets() -> dict[str, object]:
    found: dict[str, object] = load_user_file(WORLD).SETS
    return found


def test_there_are_fifty(sets: dict[str, object]) -> None:
    assert len(sets) == 50


def test_all_open_with_their_classes_and_labels(sets: dict[str, object], tmp_path: Path) -> None:
    for number, (name, honest) in enumerate(sets.items()):
        (tmp_path / str(number)).mkdir()
        found = open_transfer_set(honest.write(tmp_path / str(number), number))  # type: ignore[attr-defined]
        called = [found.class_names[label] if label >= 0 else None for label in found.labels.tolist()]
        wanted = [honest.names[label] if label >= 0 else None for label in honest.labels]  # type: ignore[attr-defined]
        assert sorted(map(str, called)) == sorted(map(str, wanted)), name


@pytest.mark.slow
def test_all_are_dumped_and_at_most_two_are_warned_of(sets: dict[str, object], tmp_path: Path) -> None:
    warned: dict[str, list[str]] = {}
    for number, (name, honest) in enumerate(sets.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = honest.write(folder, number)  # type: ignore[attr-defined]
        teacher = f"{WORLD}:fair?number={number}"
        dump.run(DumpConfig(data=data, teacher=(teacher,), out=str(folder / "c"), threads=1, workers=0), quiet=True)
        told = json.loads((folder / "c" / "provenance.json").read_text())["classes"]["warnings"]
        if told:
            warned[name] = told
    assert len(warned) <= 2, warned

"""Free space is asked for before anything is written, and both numbers are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache import train
from softcache.config import TrainConfig
from softcache.errors import DiskSpaceError
from softcache.files import durable
from softcache.train.preparation import prepare
from softcache.train.session import bytes_of


def test_both_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(durable, "free_bytes", lambda folder: asked.append(folder) or 2_000_000)
    new = tmp_path / "not" / "yet"
    durable.require_room(new, 2_000_000, "the shards need")
    with pytest.raises(DiskSpaceError, match=r"yet: the shards need 2\.5 MB, the disk has 2\.0 MB left"):
        durable.require_room(new, 2_500_000, "the shards need")
    assert asked == [tmp_path, tmp_path]  # of the folder that is there


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"ema": 0.9, "keep": "best"},
    ],
    ids=str,
)
def test_a_run_asks_for_what_it_writes(tmp_path: Path, toy: Path, settings: dict[str, object]) -> None:
    """Not less than checkpoint, its successor and the students take; and not half as much again."""
    config = TrainConfig(
        data=f"{toy}:images",
        eval_data=f"{toy}:images",
        student="softcache:mlp?hidden=200,200",
        out=str(tmp_path / "run"),
        epochs=1,
        threads=1,
        **settings,  # type: ignore[arg-type]
    )
    asked = bytes_of(prepare(config))
    train.run(config, quiet=True)
    size = {path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()}
    written = 2 * size["checkpoint.pt"] + size["student.safetensors"] + size.get("best.safetensors", 0)
    assert 0.85 * written < asked < 1.2 * written

"""A run that is lengthened by --more-epochs is the run that was given that many epochs from the start."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import stopped_after

from softcache import train
from softcache.config import TrainConfig
from softcache.errors import ConfigError, SoftcacheError, TrainingError
from softcache.losses.schedules import Schedule
from softcache.train.checkpoint import CHECKPOINT
from softcache.train.more_epochs import lengthened
from softcache.train.run_folder import CONFIG, METRICS_JSONL, RUN, STUDENT

BASE: dict[str, Any] = {
    "data": "digits?rows=0-47",
    "eval_data": "digits?rows=40-79",
    "student": "softcache:mlp?hidden=6",
    "batch_size": 20,
    "schedule": "constant",
    "policy": ("crop_flip:padding=1",),
    "threads": 1,
    "device": "cpu",
}
STEPPED = {"optimizer": "sgd", "nesterov": True, "ema": 0.9, "keep": "best", "schedule": "step(1, at=1/3)"}
CURVED = {"schedule": "warmup(4steps, piecewise(0:1, 4:0.1))", "loss": ("ce:weight=linear(0.5, 1, until=2)",)}
SEVERAL = {"stage": ("epochs=1 schedule=cosine", "loss='ce:weight=step(1, at=2)' 'epochs=2' lr=0.01")}
DEFAULTS = {"epochs": 2, "stage": ("freeze=0", "lr=0.01")}


def settings(out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "out": str(out), **BASE, **changes})


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / METRICS_JSONL).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def plain(value: Any) -> Any:
    """A checkpoint's state, tensors as lists, without what is of a clock."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items() if key not in ("seconds", "digest")}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert (one / STUDENT).read_bytes() == (other / STUDENT).read_bytes()
    states = [plain(torch.load(out / CHECKPOINT, weights_only=True)) for out in (one, other)]
    assert states[0] == states[1]
    assert (one / RUN).read_bytes() == (other / RUN).read_bytes()
    texts = [(out / CONFIG).read_text().replace(str(out), "OUT") for out in (one, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        pytest.param({}, {"epochs": 5}, id="plain"),
        pytest.param(STEPPED, {"epochs": 5}, id="stepped", marks=pytest.mark.slow),
        pytest.param(CURVED, {"epochs": 5}, id="curved", marks=pytest.mark.slow),
        pytest.param({"eval_every": 3}, {"epochs": 5}, id="out-of-turn", marks=pytest.mark.slow),
        pytest.param({"patience": 30}, {"epochs": 5}, id="patient", marks=pytest.mark.slow),
        pytest.param(
            SEVERAL,
            {"stage": (SEVERAL["stage"][0], SEVERAL["stage"][1].replace("'epochs=2'", "epochs=5"))},
            id="stages",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DEFAULTS, {"stage": (DEFAULTS["stage"][0], "lr=0.01 epochs=5")}, id="last-of-two", marks=pytest.mark.slow
        ),
    ],
)
def test_a_lengthened_run_is_the_longer_run_bit_for_bit(
    changes: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train.run(settings(out, **changes), quiet=True)
    longer = settings(out, **changes, more_epochs=3)
    with pytest.raises(KeyboardInterrupt), stopped_after(1):
        train.run(longer, quiet=True)
    train.run(longer, quiet=True)
    before = os.stat(out / CHECKPOINT).st_mtime_ns
    train.run(longer, quiet=True)  # the same command means the same run
    train.run(settings(out, **changes | whole), quiet=True)
    assert os.stat(out / CHECKPOINT).st_mtime_ns == before
    train.run(settings(tmp_path / "alone", **changes | whole), quiet=True)
    same(out, tmp_path / "alone")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("more") / "run"
    train.run(settings(out, epochs=1), quiet=True)
    return out


def test_what_cannot_be_lengthened_is_refused(finished: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    faults: list[tuple[dict[str, Any], type[SoftcacheError], str]] = [
        ({"more_epochs": 0}, ConfigError, "--more-epochs 0: must be at least 1"),
        ({"out": str(tmp_path / "none")}, ConfigError, r"holds no run[\s\S]*--epochs 4"),
        ({"lr": 0.5}, TrainingError, r"other settings: lr was 0\.001, is now 0\.5"),
        ({"epochs": 2}, TrainingError, "epochs was 1, is now 2"),
    ]
    for changes, kind, text in faults:
        with pytest.raises(kind, match=text):
            train.run(replace(settings(finished, epochs=1, more_epochs=3), **changes), quiet=True)
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"schedule": "cosine"}, "the learning rate's schedule, cosine,"),
        ({"schedule": "warmup(1, linear(1, 0))"}, "the learning rate's schedule, warmup"),
        ({"loss": ("ce:weight=linear(0, 1)",)}, "the weight of loss 'ce', linear"),
        ({"cache": "c", "loss": ("kd:temperature=linear(8, 2)",)}, "temperature of loss 'kd', linear"),
        ({"stage": ("epochs=1", "epochs=2 schedule=cosine")}, "the learning rate's schedule, cosine,"),
    ],
)
def test_what_depends_on_the_length_is_refused(
    changes: dict[str, Any], what: str, finished: Path, tmp_path: Path
) -> None:
    config = settings(tmp_path, epochs=1, **changes)
    about = json.loads((finished / RUN).read_text())
    about["config"] |= {name: getattr(config, name) for name in changes}
    (tmp_path / RUN).write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=what):
        lengthened(config, 3)


@pytest.mark.slow
def test_a_run_that_ended_early_or_kept_an_epoch_out_of_turn_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "early"
    config = settings(out, epochs=30, patience=1, lr=1e-9, optimizer="sgd", momentum=0.0)
    assert len(train.run(config, quiet=True).metrics) == 2
    with pytest.raises(TrainingError, match="--patience 1 ended this run after epoch 2"):
        train.run(replace(config, more_epochs=3), quiet=True)
    config = settings(tmp_path / "best", keep="best", eval_every=3)
    train.run(config, quiet=True)
    with pytest.raises(TrainingError, match="--eval-every 3 alone would not"):
        train.run(replace(config, more_epochs=3), quiet=True)


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        *((text, False) for text in ("0.5", "step(1, at=2)", "piecewise(0:1, 4:2)", "warmup(2, 0.5)")),
        *((text, False) for text in ("linear(1, 0, until=3)", "warmup(2, cosine(1, 0, until=90steps))")),
        *((text, True) for text in ("linear", "cosine", "linear(1, 0, start=3)", "warmup(2, cosine)")),
    ],
)
def test_which_schedules_follow_the_length(text: str, follows: bool) -> None:
    assert Schedule.parse(text, "--schedule").follows_length is follows

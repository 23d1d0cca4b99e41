"""What a run will learn little by is told before its first step, with the number that shows it; nothing at all is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from small_world import World

from softcache.config import TrainConfig
from softcache.data.transfer_set import TransferSet
from softcache.errors import ConfigError
from softcache.losses import make_term
from softcache.losses.schedules import Schedule
from softcache.train import flow
from softcache.train.outlook import Reach, _idle, moments
from softcache.train.stages import Stage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("outlook"))


def told(world: World, *losses: str, **settings: Any) -> list[str]:
    """What is said before the first step."""
    return list(flow.rehearse(flow.prepare(world.config(world.path / "run", *losses, **settings))))


def test_of_an_ordinary_run_nothing_is_told(world: World) -> None:
    for settings in ({}, {"ema": 0.9, "epochs": 20}, {"stage": ("loss=ce freeze=early", "epochs=2")}):
        assert told(world, "kd", "ce:weight=0.1", **settings) == []
    assert told(world, "kd", "ce:weight=0") == []  # watched, not learned
    assert told(world, "kd", "rkd_distance:layer=late", accumulate=64, batch_size=128) == []


@pytest.mark.parametrize(
    ("losses", "settings", "message"),
    [
        (
            ["kd"],
            {"ema": 0.999, "epochs": 40},
            r"--ema 0.999 over 120 steps: 89% of the average .*; --ema 0.96 would leave 1 %",
        ),
        (
            ["kd"],
            {"schedule": "piecewise(0:1, 1:0)", "epochs": 9},
            "the learning rate is 0 in 89% of the steps of 9 epochs",
        ),
        (
            ["kd"],
            {"schedule": "warmup(10, cosine)", "epochs": 2},
            "the learning rate comes to 20% of its peak in 2 epochs",
        ),
        (
            ["kd", "ce:weight=linear(0, 1, start=5, until=9)"],
            {},
            r"the weight of ce is 0 in 100% of the steps of 1 epochs",
        ),
        (["kd"], {"lr": 1e-12}, "3 steps at a learning rate of at most 1e-12 are 3e-12 in all"),
        (["kd:temperature=1000"], {}, "temperature 1000 .* differ by 1.01%"),
        (["kd:temperature=linear(4, 0.01)"], {}, r"temperature 0.01 .* a factor of 3e\+43: .* T\*\*2 is 1e-04"),
        (["kd", "rkd_distance:layer=late"], {"accumulate": 128}, "'rkd_distance' relates .*: pieces of one sample"),
        (["kd", "rkd_distance:layer=late"], {"batch_size": 1}, "'rkd_distance' relates .*: pieces of one sample"),
        (["kd"], {"accumulate": 1000}, "--accumulate 1000: batches have 128 samples"),
        (["kd"], {"combine": "mean_probs"}, "--combine mean_probs does nothing: teacher is the only member"),
        (["hint:layer=early"], {}, "of the student's .* numbers get no gradient from any loss: .*"),
        (["hint:layer=late"], {"freeze": ("*",)}, "no stage trains the student: none of its .* numbers"),
        (
            ["kd", "rkd_distance:layer=early,student=early"],
            {"freeze": ("early",)},
            "loss 'rkd_distance': no parameter that learns has a part",
        ),
    ],
)
def test_little_is_told(world: World, losses: list[str], settings: dict[str, Any], message: str) -> None:
    found = told(world, *losses, **settings)
    assert [line for line in found if re.search(message, line)], found


@pytest.mark.parametrize(
    ("losses", "settings", "message"),
    [
        (["kd:weight=0", "ce:weight=0"], {}, r"nothing can be learned: every weight is 0 throughout \(kd 0, ce 0\)"),
        (["kd"], {"schedule": "constant(0)"}, "the learning rate is 0 throughout"),
        (["rkd_angle:layer=late"], {"batch_size": 2, "accumulate": 2}, "leave nothing to relate, .* of rkd_angle is 0"),
        (["kd"], {"freeze": ("*",)}, "every parameter is frozen"),
    ],
)
def test_nothing_is_refused(world: World, losses: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        told(world, *losses, **settings)


def test_a_trial_of_a_long_schedule_that_is_still_at_its_beginning_is_told(world: World) -> None:
    assert told(world, "kd:weight=piecewise(5:0, 9:1)", epochs=2) == [
        "every weight is 0 throughout (kd piecewise(5:0, 9:1))"
    ]
    (line,) = told(world, "kd", schedule="warmup(5, 1, by=epoch)")
    assert line == "the learning rate is 0 throughout (schedule 'warmup(5, 1, by=epoch)')"


def test_a_stage_of_several_in_which_nothing_is_learned_is_told(world: World) -> None:
    found = told(world, stage=("loss=kd", "loss=kd:weight=0"))
    assert found == ["--stage 2: every weight is 0 throughout (kd 0)"]


def test_a_start_that_gives_few_numbers_is_told(world: World, tmp_path: Path) -> None:
    net = flow.prepare(world.config(tmp_path / "run", "kd")).model.net.state_dict()
    name = min(net, key=lambda one: net[one].numel() if net[one].ndim else 9**9)
    save_file({name: net[name].clone()}, tmp_path / "few.safetensors")
    start = f"{world.spec('net')}@{tmp_path / 'few.safetensors'}"
    (line,) = told(world, "kd", init_from=start)
    total = sum(tensor.numel() for tensor in net.values())
    assert f"gives {net[name].numel():,} of the student's {total:,} numbers" in line
    save_file({key: value.clone() for key, value in net.items()}, tmp_path / "all.safetensors")
    assert told(world, "kd", init_from=start.replace("few.", "all.")) == []


def test_an_evaluation_that_counts_nothing_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = flow.prepare(
        world.config(world.path / "run", "kd", eval_data=world.spec("toy"), keep="best", patience=2)
    )
    assert flow.rehearse(prepared) == ()
    data = prepared.material.eval_set
    assert isinstance(data, TransferSet)
    monkeypatch.setattr(data, "labels", data.labels * 0 - 1)
    assert [line.partition(": ")[2] for line in flow.rehearse(prepared)] == [
        "--keep best keeps the last",
        "--patience ends no stage",
    ]


def test_what_is_told_is_recorded_and_said_however_quiet(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.train(tmp_path / "run", "ce", cache=None, lr=1e-12)
    (line,) = json.loads((tmp_path / "run/run.json").read_text())["warnings"]
    assert f"warning: {line}" in capsys.readouterr().err


def test_every_moment_of_a_short_stage_is_looked_at() -> None:
    def stage(epochs: int, schedule: str, *losses: str) -> Stage:
        config = TrainConfig(data="d", student="s", out="o", epochs=epochs)
        return Stage(config, tuple(make_term("kd", weight=one) for one in losses), Schedule.parse(schedule, "schedule"))

    assert [(m.epoch, m.step) for m in moments(stage(2, "1", "1"), 3)] == [(e, s) for e in (0, 1) for s in (0, 1, 2)]
    assert len(moments(stage(100, "1", "1"), 1000)) == 4096
    reach = Reach(frozenset({"kd"}), frozenset(), frozenset({"w"}))
    spike = "piecewise(3steps:0, 4steps:1, 5steps:0)"
    assert not _idle(stage(2, spike, "1"), 4, reach) and not _idle(stage(2, "1", spike), 4, reach)
    assert _idle(stage(1, spike, "1"), 4, reach)

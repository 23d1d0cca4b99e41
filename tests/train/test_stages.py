"""Stages: how they are written, what each changes, and what is carried from one to the next."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import Arrays, World, trained, weights_of
from torch import nn

from softcache import cli
from softcache.config import TrainConfig, resolve
from softcache.errors import ConfigError, LossError, SoftcacheError
from softcache.losses.schedules import Moment
from softcache.models import load_model
from softcache.train.optimizer import freeze, train_mode
from softcache.train.preparation import prepare
from softcache.train.stages import parse_stages


def config(*stages: str, **settings: Any) -> TrainConfig:
    return TrainConfig(data="D", student="S", out="O", cache="C", stage=stages, **settings)


# ---------------------------------------------------------------------------------------------------- how they are written


def test_without_stages_the_run_is_one() -> None:
    (stage,) = parse_stages(config(epochs=7, lr=0.5, loss=("kd:temperature=3", "ce:weight=0.1")))
    assert stage.config == config(epochs=7, lr=0.5, loss=("kd:temperature=3", "ce:weight=0.1"))
    assert [term.name for term in stage.terms] == ["kd", "ce"]


def test_a_stage_changes_what_it_says_and_keeps_the_rest_of_the_run() -> None:
    first, second = parse_stages(
        config(
            "epochs=5 lr=0.01 freeze=* loss=hint loss=ce:weight=0.1 optimizer=sgd nesterov=true",
            "schedule='warmup(1, linear(1, 0.5))' weight-decay=0.1 patience=3",
            epochs=9,
            lr=0.2,
            loss=("soft_ce",),
            freeze=("early",),
            eval_data="E",
        )
    )
    assert [(term.name, term.weight.text) for term in first.terms] == [("hint", "1.0"), ("ce", "0.1")]
    assert (first.config.epochs, first.config.lr, first.config.freeze) == (5, 0.01, ("*",))
    assert (first.config.optimizer, first.config.nesterov, first.config.weight_decay) == ("sgd", True, 0.0)
    assert [term.name for term in second.terms] == ["soft_ce"]
    assert (second.config.epochs, second.config.lr, second.config.freeze) == (9, 0.2, ("early",))
    assert (second.config.optimizer, second.config.weight_decay, second.config.patience) == ("adamw", 0.1, 3)
    rates = [second.rate(Moment(epoch, 0, 1, 9)) for epoch in (0, 1, 9)]
    assert rates == pytest.approx([0.2, 0.2, 0.1])


def test_what_is_not_said_comes_from_the_defaults() -> None:
    (stage,) = parse_stages(config("epochs=1"))
    assert [(term.name, term.temperature.text) for term in stage.terms if term.temperature] == [("kd", "4")]
    assert stage.config.lr == TrainConfig.lr


def test_lists_in_a_stage() -> None:
    (together,) = parse_stages(config("freeze=a,b.* loss=kd"))
    (repeated,) = parse_stages(config("freeze=a freeze=b.* loss=kd"))
    assert together.config.freeze == repeated.config.freeze == ("a", "b.*")


TOML = """
epochs = 3
lr = 0.5

[[loss]]
name = "kd"
temperature = "linear(8, 2)"

[[stage]]
epochs = 2
lr = 0.01
freeze = ["early", "late.*"]
schedule = "step(1, at=1, gamma=0.1)"

[[stage.loss]]
name = "hint"
weight = 0.5
layer = "late:pool"

[[stage.loss]]
name = "ce"

[[stage]]
loss = ["ce", "kd:temperature=2,weight=0.9"]
"""
TEXTS = (
    "epochs=2 lr=0.01 freeze=early freeze=late.* 'schedule=step(1, at=1, gamma=0.1)' "
    "loss=hint:weight=0.5,layer=late:pool loss=ce",
    "loss=ce loss=kd:temperature=2,weight=0.9",
)
REST = {"data": "D", "student": "S", "out": "O", "cache": "C"}


def test_tables_are_stages(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    told = resolve(TrainConfig, file=str(tmp_path / "run.toml"), flags=REST).config
    flags = REST | {"epochs": "3", "lr": "0.5", "loss": ("kd:temperature=linear(8, 2)",), "stage": TEXTS}
    said = resolve(TrainConfig, flags=flags).config
    assert parse_stages(told) == parse_stages(said)
    assert [len(stage.terms) for stage in parse_stages(told)] == [2, 2]
    assert parse_stages(told)[0].terms[0].placement == {"layer": "late:pool"}


def test_flags_win_over_the_files_stages(tmp_path: Path) -> None:
    """Stages as a whole; what a stage does not say follows a flag."""
    (tmp_path / "run.toml").write_text(TOML)
    flags = REST | {"lr": "0.125"}
    first, second = parse_stages(resolve(TrainConfig, file=str(tmp_path / "run.toml"), flags=flags).config)
    assert (first.config.lr, second.config.lr) == (0.01, 0.125)
    (only,) = parse_stages(
        resolve(TrainConfig, file=str(tmp_path / "run.toml"), flags=REST | {"stage": ("epochs=8",)}).config
    )
    assert (only.config.epochs, [term.name for term in only.terms]) == (8, ["kd"])


REFUSED = [
    pytest.param("epoch=5", "--stage 1: 'epoch' is no setting of a stage", "epochs", id="unknown"),
    pytest.param("batch-size=5", "'batch_size' belongs to the whole run", "--batch-size once", id="of-the-run"),
    pytest.param("epochs", "'epochs' is not key=value", "", id="no-value"),
    pytest.param("loss='kd", "No closing quotation", "", id="quote"),
    pytest.param("lr=0.1 lr=0.2", "lr is given twice", "keep one", id="twice"),
    pytest.param("epochs=many", "'many' is not", "", id="no-number"),
    pytest.param("epochs=0", "--stage 1: epochs 0: must be at least 1", "", id="epochs"),
    pytest.param("lr=0", "--stage 1: lr 0.0: must be > 0", "", id="lr"),
    pytest.param("lr=nan", "must be > 0", "", id="lr-nan"),
    pytest.param("momentum=-1", "momentum -1.0: must be at least 0", "", id="momentum"),
    pytest.param("weight-decay=inf", "weight-decay inf: must be", "", id="weight-decay"),
    pytest.param("optimizer=lamb", "optimizer cannot be 'lamb'", "adam", id="optimizer"),
    pytest.param("nesterov=perhaps", "nesterov", "", id="bool"),
    pytest.param("schedule=linear(1,-1)", "makes the learning rate negative", "", id="negative-rate"),
    pytest.param("schedule=cosinus", "neither a number nor a schedule", "cosine", id="schedule"),
    pytest.param("loss=kdd", "unknown loss 'kdd'", "kd", id="loss"),
    pytest.param("loss=kd:temprature=4", "no setting 'temprature'", "temperature", id="loss-setting"),
]


@pytest.mark.parametrize(("text", "message", "tip"), REFUSED)
def test_a_stage_that_makes_no_sense_is_refused(text: str, message: str, tip: str) -> None:
    with pytest.raises((ConfigError, LossError)) as caught:
        parse_stages(config(text))
    assert message in str(caught.value)
    assert tip in (caught.value.tip or "")


def test_the_stage_at_fault_is_named() -> None:
    with pytest.raises(ConfigError, match="--stage 2: epochs 0"):
        parse_stages(config("epochs=1", "epochs=0"))
    with pytest.raises(LossError, match="learns from a teacher, and there is no cache"):
        parse_stages(TrainConfig(data="D", student="S", out="O", stage=("loss=ce", "loss=kd")))


# ------------------------------------------------------------------------------------------------------------------- freeze


def net() -> nn.Module:
    layers = nn.ModuleDict({f"layer{i}": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for i in (1, 2, 10)})
    return nn.Sequential(nn.Module(), layers, nn.Dropout(), nn.Linear(2, 2))


def frozen(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if not parameter.requires_grad}


def below(*prefixes: str) -> set[str]:
    return {name for name, _ in net().named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        pytest.param((), set(), id="nothing"),
        pytest.param(("*",), below(""), id="all"),
        pytest.param(("1.layer1",), below("1.layer1."), id="a-module-and-not-layer10"),
        pytest.param(("1.layer*",), below("1."), id="pattern"),
        pytest.param(("1.layer2.0.weight",), {"1.layer2.0.weight"}, id="a-parameter"),
        pytest.param(("*.bias",), {n for n in below("") if n.endswith("bias")}, id="biases"),
        pytest.param(("3", "1.layer1.1"), below("3.", "1.layer1.1."), id="two"),
    ],
)
def test_what_patterns_freeze(patterns: Sequence[str], wanted: set[str]) -> None:
    made = net()
    freeze(made, ("3.weight",))  # what an earlier stage froze is free again
    freeze(made, patterns)
    assert frozen(made) == wanted


def test_what_is_fixed_for_good_stays_frozen() -> None:
    made = net()
    freeze(made, ("1.layer1",), fixed=("3.weight",))
    assert frozen(made) == below("1.layer1.") | {"3.weight"}
    freeze(made, (), fixed=("3.weight",))
    assert frozen(made) == {"3.weight"}


@pytest.mark.parametrize("pattern", ["layer1", "1.layer3", "1.layer", "Dropout", "2"])
def test_a_pattern_that_names_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"--freeze {pattern}: the student has no parameters there"):
        freeze(net(), (pattern,))


def test_frozen_modules_do_not_train() -> None:
    made = net()
    freeze(made, ("1.layer1", "1.layer2.0"))
    train_mode(made)
    modes = {name: module.training for name, module in made.named_modules()}
    assert not modes["1.layer1"]
    assert not modes["1.layer1.1"]
    assert not modes["1.layer2.0"]
    assert all(modes[name] for name in ("1", "1.layer2", "1.layer2.1", "2", "3"))
    freeze(made, ("*",))
    train_mode(made)
    assert not any(module.training for module in made.modules())  # dropout among them
    freeze(made, ())
    train_mode(made)
    assert all(module.training for module in made.modules())


# ------------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("stages"))
    world.cache("plain")
    return world


HINT = "loss=hint:layer=late:pool"
PRE_TRAINED = (f"epochs=2 freeze=* {HINT} lr=0.2", f"epochs=1 loss=kd {HINT},weight=0.1 schedule=linear")


def initial(world: World) -> Arrays:
    """The student's weights before the first step."""
    torch.manual_seed(0)
    model = load_model(world.spec("net?norm=true"), num_classes=5, class_names=tuple("abcde"), input_shape=(8, 8))
    return {name: tensor.numpy().copy() for name, tensor in model.net.state_dict().items()}


def equal(one: Arrays, other: Arrays) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if np.array_equal(one[name], other[name])}


def parts_of_steps(config: TrainConfig) -> list[Arrays]:
    """What the terms have learned before each step: name within the objective -> values."""
    states = [step.before for step in trained(config).steps]
    return [{k.removeprefix("objective."): v for k, v in state.items() if "objective." in k} for state in states]


def test_an_adapter_is_trained_on_a_frozen_student_and_carried_over(world: World, tmp_path: Path) -> None:
    student = world.spec("net?norm=true&dropout=0.5")
    alone = world.config(tmp_path / "first", student=student, stage=PRE_TRAINED[:1], momentum=0.0)
    first = parts_of_steps(alone)
    assert equal(weights_of(tmp_path / "first"), initial(world)) == initial(world).keys()  # BatchNorm's statistics too
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert rows[1]["hint"] < rows[0]["hint"]  # it learned

    both = parts_of_steps(world.config(tmp_path / "both", student=student, stage=PRE_TRAINED, momentum=0.0))
    assert [equal(one, other) == one.keys() for one, other in zip(first, both[:6], strict=True)] == [True] * 6
    names = {name for name in both[0] if "adapters" in name}
    assert len(names) == 2  # weight and bias
    hint = {name.removeprefix("term_modules.0."): value for name, value in both[5].items()}
    carried = {name.removeprefix("term_modules.1."): value for name, value in both[6].items()}
    gone_on = {name: np.abs(carried[name] - hint[name]).max() for name in hint}
    begun = {name: np.abs(carried[name] - both[0][f"term_modules.0.{name}"]).max() for name in hint}
    assert all(0 < gone_on[name] < begun[name] for name in hint)  # one step further, not from the start
    assert not equal(weights_of(tmp_path / "both"), initial(world))  # by then the student learns


@pytest.mark.parametrize(
    ("second", "shared"),
    [
        pytest.param(f"loss=kd {HINT},weight=3", True, id="another-weight"),
        pytest.param("loss=hint:layer=late:map,student=late", False, id="another-layer"),
        pytest.param(f"{HINT},adapter=mlp", False, id="another-adapter"),
        pytest.param("loss=cosine:layer=late:pool", False, id="another-loss"),
    ],
)
def test_which_terms_share_what_they_learned(world: World, tmp_path: Path, second: str, shared: bool) -> None:
    prepared = prepare(world.config(tmp_path / "run", stage=(HINT, second)))
    first, last = ({id(p) for p in objective.parameters()} for objective in prepared.objectives)
    assert first
    assert bool(first & last) == shared
    assert (first <= last) == shared


def test_metrics_of_stages(world: World, tmp_path: Path) -> None:
    result = world.train(tmp_path / "run", stage=(*PRE_TRAINED, "loss=ce epochs=2 lr=0.01 freeze=early"), epochs=9)
    rows = result.metrics
    assert [(row["epoch"], row["stage"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)]
    assert [row["view"] for row in rows] == [0, 1, 0, 1, 0]  # the views take turns across stages
    assert [sorted({"hint", "kd", "ce"} & row.keys()) for row in rows] == [["hint"]] * 2 + [["hint", "kd"]] + [
        ["ce"]
    ] * 2
    assert [row["lr"] for row in rows] == pytest.approx([0.2, 0.2, 0.05 / 3, 0.01, 0.01])  # of the last step
    assert rows[2]["loss"] == pytest.approx(rows[2]["kd"] + 0.1 * rows[2]["hint"])
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["stage"] for row in table] == ["0", "0", "1", "2", "2"]
    assert [bool(row["kd"]) for row in table] == [False, False, True, False, False]
    assert [float(row["hint"]) for row in table[:3]] == [row["hint"] for row in rows[:3]]
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert "kd" in json.dumps(about["losses"] if "losses" in about else about["stages"])


def test_the_table_of_a_run_with_stages(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--data", world.spec("toy"), "--student", world.spec("net"), "--cache", world.cache("plain")]
    argv += ["--threads", "1", "--device", "cpu", "--batch-size", "128", "--out", str(tmp_path / "run")]
    assert cli.main([*argv, "--stage", f"epochs=1 freeze=* {HINT}", "--stage", "epochs=1 loss=kd", "--quiet"]) == 0
    head, _, first, second = capsys.readouterr().out.splitlines()[:4]
    assert head.split()[:2] == ["epoch", "stage"]
    assert (first.split()[:2], second.split()[:2]) == (["0", "0"], ["1", "1"])


def test_frozen_in_one_stage_and_free_in_the_next(world: World, tmp_path: Path) -> None:
    """Frozen layers, parameters and statistics, are those of a run without the stages that freeze them."""
    student = world.spec("net?norm=true")
    stages = ("freeze=early loss=kd", "freeze=late,head.bias loss=kd")
    world.train(tmp_path / "one", student=student, stage=stages[:1])
    world.train(tmp_path / "two", student=student, stage=stages)
    start, one, two = initial(world), weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert equal(start, one) == {name for name in start if name.startswith("early")}
    assert equal(one, two) == {name for name in start if name.startswith("late")} | {"head.bias"}


def test_one_stage_is_a_run_with_the_same_settings_as_flags(world: World, tmp_path: Path) -> None:
    settings = {"epochs": 2, "lr": 0.01, "weight_decay": 0.1, "optimizer": "adamw", "freeze": ("early",)}
    flags = world.train(tmp_path / "flags", "kd", "ce:weight=0.1", schedule="cosine", **settings)
    text = "epochs=2 lr=0.01 weight_decay=0.1 optimizer=adamw freeze=early schedule=cosine loss=kd loss=ce:weight=0.1"
    stage = world.train(tmp_path / "stage", "hint", stage=(text,), epochs=7)
    one, other = weights_of(tmp_path / "flags"), weights_of(tmp_path / "stage")
    assert equal(one, other) == one.keys()
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(flags.metrics) == drop(stage.metrics)


def test_a_stage_begins_with_a_new_optimiser(world: World, tmp_path: Path) -> None:
    """Without momentum from the stage before: its first step is -lr * gradient."""
    config = world.config(tmp_path / "run", stage=("loss=kd lr=0.1", "loss=kd lr=0.5"), momentum=0.9)
    steps, name = trained(config).steps, "model.net.head.weight"
    np.testing.assert_allclose(steps[4].before[name], steps[3].before[name] - 0.5 * steps[3].gradients[name], atol=1e-7)


MISTAKES = [
    pytest.param("loss=ce freeze=*", "every parameter is frozen", id="all-frozen"),
    pytest.param("loss=ce freeze=erly", "--freeze erly: the student has no parameters there", id="freeze"),
    pytest.param("loss=hint:layer=later", "no layer 'later'", id="layer"),
    pytest.param("loss=fsp", "needs a feature of the teacher as LAYER:fsp", id="feature"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_in_a_later_stage_is_refused_before_the_first_step(
    world: World, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(SoftcacheError) as caught:
        world.train(tmp_path / "run", stage=("loss=kd", text))
    assert message in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert not (tmp_path / "run").exists()

"""The training recipe: what is learned, what a run folder holds, and what is refused before the first step."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from safetensors.torch import load_file

import softcache
from softcache import cli, dump, train
from softcache.config import DumpConfig, EvalConfig, TrainConfig
from softcache.data import view_steps
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import (
    CacheError,
    ClassMismatchError,
    ConfigError,
    DriftError,
    LossError,
    SoftcacheError,
    TrainingError,
)
from softcache.evaluate import measure
from softcache.models import load_model, read_metadata, read_saved
from softcache.targets.teacher import CachedTeacher
from softcache.train.flow import TrainResult
from softcache.train.run_folder import STUDENT
from softcache.train.terms import check_term, parse_terms


class World:
    """pieces.py, and caches of its data: `one` (one member), `three` (another output kind among them), `views`, `many`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.copy(WORLDS / "label_kinds.py", path / "pieces.py")
        self.dump("one", "toy", "sharp")
        self.dump("three", "toy", "sharp", "blunt", "likely")
        self.dump("views", "toy", "sharp", policy=("shift:pixels=1",), views=3, view_seed=9)
        self.dump("many", "toy?labels=many", "sharp")

    def spec(self, name: str) -> str:
        return f"{self.path}/pieces.py:{name}"

    def dump(self, out: str, data: str, *teachers: str, **settings: Any) -> None:
        config = DumpConfig(
            data=self.spec(data),
            teacher=tuple(map(self.spec, teachers)),
            out=str(self.path / out),
            codec="float32",
            threads=1,
            device="cpu",
            **settings,
        )
        dump.run(config, quiet=True)

    def config(self, out: Path, **settings: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "data": self.spec("toy"),
            "student": "softcache:mlp?hidden=8",
            "epochs": 2,
            "batch_size": 32,
            "threads": 1,
            "device": "cpu",
            "lr": 0.01,
        }
        if "cache" in settings and "/" not in settings["cache"]:
            settings["cache"] = str(self.path / settings["cache"])
        return TrainConfig(out=str(out), **{**defaults, **settings})

    def train(self, out: Path, **settings: Any) -> TrainResult:
        return train.run(self.config(out, **settings), quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("train"))


def weights(out: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(out / STUDENT).values()])


# ---- digits: the whole job ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher trained on hard labels, and its cache of two random views."""
    pytest.importorskip("sklearn", reason="needs the extra softcache[demo]")
    folder = tmp_path_factory.mktemp("digits")
    common: dict[str, Any] = {"threads": 1, "device": "cpu"}
    train.run(
        TrainConfig(
            data="digits",
            eval_data="digits?split=test",
            student="softcache:mlp?hidden=64",
            out=str(folder / "teacher"),
            policy=("shift:pixels=1",),
            epochs=12,
            batch_size=64,
            lr=0.005,
            **common,
        ),
        quiet=True,
    )
    dump.run(
        DumpConfig(
            data="digits",
            teacher=(str(folder / "teacher"),),
            out=str(folder / "cache"),
            policy=("shift:pixels=1",),
            views=2,
            **common,
        ),
        quiet=True,
    )
    return folder


@pytest.mark.slow
def test_hard_labels_on_digits(digits: Path) -> None:
    rows = [json.loads(line) for line in (digits / "teacher/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_top1"] > 0.7  # chance is 0.1
    assert rows[-1]["ce"] < 0.5 * rows[0]["ce"]
    assert [row["view"] for row in rows] == list(range(12))  # a fresh view every epoch


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1, 4, 20])
def test_a_student_from_the_cache_without_labels(digits: Path, tmp_path: Path, temperature: int) -> None:
    result = train.run(
        TrainConfig(
            data="digits",
            eval_data="digits?split=test",
            cache=str(digits / "cache"),
            student="softcache:mlp?hidden=32",
            loss=(f"kd:temperature={temperature}",),
            out=str(tmp_path / "run"),
            epochs=12,
            batch_size=64,
            lr=0.02,
            threads=1,
            device="cpu",
        ),
        quiet=True,
    )
    assert result.evaluation is not None and result.evaluation.top1 is not None
    assert result.evaluation.top1 > 0.6  # chance is 0.1
    assert result.metrics[-1]["kd"] < 0.5 * result.metrics[0]["kd"]
    assert result.metrics[-1]["eval_top1"] == result.evaluation.top1
    assert result.parameters == 64 * 32 + 32 + 32 * 10 + 10


@pytest.mark.slow
def test_a_run_folder_is_a_teacher_and_a_start(digits: Path, tmp_path: Path) -> None:
    """As a student's start it begins where the run ended; as a teacher it gives that run's logits."""
    start = f"softcache:mlp?hidden=64@{digits / 'teacher'}"
    result = train.run(
        TrainConfig(
            data="digits",
            eval_data="digits?split=test",
            student=start,
            out=str(tmp_path / "more"),
            epochs=1,
            lr=1e-9,
            policy=("shift:pixels=1",),
            threads=1,
            device="cpu",
        ),
        quiet=True,
    )
    before = json.loads((digits / "teacher/metrics.jsonl").read_text().splitlines()[-1])
    assert result.metrics[0]["eval_errors"] == before["eval_errors"]
    torch.testing.assert_close(weights(tmp_path / "more"), weights(digits / "teacher"), rtol=0, atol=1e-6)

    cache = softcache.open(digits / "cache")
    data = open_transfer_set("digits")
    joined = cache.join(data)
    model = load_model(str(digits / "teacher"), num_classes=10).eval()
    items = [cache.policy.render(data.load(i)[0], int(cache.samples.ids[joined.rows[i]]), 1) for i in range(50)]
    with torch.no_grad():
        live = model(model.input.collate(items))
    stored = joined.gather_samples(np.arange(50), np.ones(50, np.int64)).logits()
    assert bool(((stored - live).abs() <= 2e-3 * live.abs().amax(dim=1, keepdim=True)).all())  # float16


@pytest.mark.parametrize("start", ["softcache:mlp?hidden=8@{}", "{}"])
def test_a_start_that_knows_the_classes_in_another_order(world: World, tmp_path: Path, start: str) -> None:
    first = world.train(tmp_path / "first", eval_data=world.spec("toy"), epochs=20)
    assert first.evaluation is not None and first.evaluation.top1 is not None and first.evaluation.top1 > 0.4
    data, student = world.spec("mirrored"), start.format(tmp_path / "first")
    more = world.train(tmp_path / "more", data=data, eval_data=data, student=student, epochs=1, lr=1e-9)
    assert more.metrics[0]["eval_errors"] == first.evaluation.errors
    for name in ("toy", "mirrored"):
        config = EvalConfig(data=world.spec(name), threads=1, device="cpu")
        assert measure.run(str(tmp_path / "more"), config, quiet=True).errors == first.evaluation.errors


# ---- the run folder -------------------------------------------------------------------------------------------------


def test_what_a_run_folder_holds(world: World, tmp_path: Path) -> None:
    result = world.train(
        tmp_path / "run",
        cache="one",
        eval_data=world.spec("toy?count=40"),
        loss=("kd:temperature=3,weight=0.75", "ce:weight=0.25"),
        epochs=3,
    )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "config.toml", "metrics.jsonl", "metrics.csv", "checkpoint.pt", "student.safetensors"}
    cache = softcache.open(world.path / "one")

    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["cache"] == cache.id
    assert (about["targets"], about["drift"]) == ("matched", None)
    assert (about["samples"], about["labelled"], about["labels_changed"]) == (90, 90, 0)
    assert about["softcache"] == softcache.__version__
    assert about["torch"] == torch.__version__ and about["numpy"] == np.__version__
    assert about["config"]["lr"] == 0.01 and about["config"]["seed"] == 0
    (stage,) = about["stages"]
    assert (stage["epochs"], stage["lr"], stage["schedule"]) == (3, 0.01, "cosine")
    assert stage["losses"] == [
        {"name": "kd", "weight": 0.75, "temperature": 3.0, "standardized": False},
        {"name": "ce", "weight": 0.25, "smoothing": 0.0},
    ]

    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["loss"] == pytest.approx(0.75 * row["kd"] + 0.25 * row["ce"], rel=1e-5)
        assert row["eval_errors"] == round((1 - row["eval_top1"]) * 40)
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in line.items()} for line in table] == rows

    saved = read_saved(str(tmp_path / "run"))
    assert saved is not None
    assert saved.spec == "softcache:mlp?hidden=8"
    assert saved.class_names == ("ant", "bee", "cat", "dog")
    assert (saved.num_classes, saved.input_shape) == (4, (4, 4))
    assert saved.input["kind"] == "vector"
    metadata = read_metadata(tmp_path / "run")
    assert metadata["softcache_cache"] == cache.id
    assert metadata["softcache_version"] == softcache.__version__


def test_the_config_file_repeats_the_run(world: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "cache": "views",
        "loss": ("kd:temperature=2,weight=0.5", "kd:temperature=8", "ce:weight=0.1"),
        "optimizer": "sgd",
        "nesterov": True,
        "schedule": "warmup(0.5, step(at=1/1.5))",
        "keep_labels": ("ant", "cat", "dog"),
        "seed": 3,
        "view": 1,
    }
    world.train(tmp_path / "first", **settings)
    config = tmp_path / "first" / "config.toml"
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert (tmp_path / "again" / STUDENT).read_bytes() == (tmp_path / "first" / STUDENT).read_bytes()
    first, again = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("first", "again"))
    assert first == again
    assert "kd-2" in json.loads((tmp_path / "first/metrics.jsonl").read_text().splitlines()[0])


def test_seeds(world: World, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.train(tmp_path / name, cache="views", seed=seed, student="softcache:mlp?hidden=8&dropout=0.2")
    assert (tmp_path / "a" / STUDENT).read_bytes() == (tmp_path / "b" / STUDENT).read_bytes()
    assert not torch.equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_how_it_is_read_does_not_matter(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "a", cache="views")
    world.train(tmp_path / "b", cache="views", read="pread", check_content="full")
    assert (tmp_path / "a" / STUDENT).read_bytes() == (tmp_path / "b" / STUDENT).read_bytes()


# ---- the numbers ----------------------------------------------------------------------------------------------------


def first_step(world: World, out: Path, **settings: Any) -> tuple[dict[str, Any], np.ndarray, Any]:
    """Metrics of one step over the whole set, the student's logits before it, and the data, in the data's order."""
    result = world.train(out, epochs=1, batch_size=1000, seed=6, **settings)
    data = open_transfer_set(settings.get("data", world.spec("toy")))
    torch.manual_seed(6)
    model = load_model("softcache:mlp?hidden=8", num_classes=4, input_shape=(4, 4))
    policy = softcache.open(world.path / settings["cache"]).policy if "cache" in settings else None
    items = [data.load(i)[0] for i in range(len(data))]
    if policy is not None and policy.steps:
        ids = softcache.open(world.path / settings["cache"]).join(data)
        items = [
            policy.render(item, int(ids.cache.samples.ids[row]), settings.get("view", 0))
            for item, row in zip(items, ids.rows, strict=True)
        ]
    with torch.no_grad():
        logits = model.train()(model.input.collate(items)).double().numpy()
    pixels = np.stack([item.reshape(-1) for item in items]).astype(np.float64)
    return result.metrics[0], logits, (pixels, data.labels)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return (
        z - z.max(axis=1, keepdims=True) - np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    )


def kl(teacher: np.ndarray, student: np.ndarray, t: float) -> float:
    p, q = log_softmax(teacher / t), log_softmax(student / t)
    return float(t**2 * (np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("view", [0, 2])
def test_the_first_kd_value_is_the_formulas(world: World, tmp_path: Path, view: int) -> None:
    """From pixels to loss: the teacher's rule is applied here to the very pixels that the student saw."""
    row, student, (pixels, labels) = first_step(
        world, tmp_path / "run", cache="views", view=view, loss=("kd:temperature=3", "mse_logits", "ce:weight=2")
    )
    teacher = pixels[:, :4] / 30 - 3
    assert row["kd"] == pytest.approx(kl(teacher, student, 3), rel=1e-5)
    assert row["mse_logits"] == pytest.approx(((teacher - student) ** 2).mean(), rel=1e-5)
    ce = -log_softmax(student)[np.arange(90), labels].mean()
    assert row["ce"] == pytest.approx(ce, rel=1e-5)
    assert row["loss"] == pytest.approx(row["kd"] + row["mse_logits"] + 2 * row["ce"], rel=1e-5)
    assert row["view"] == view


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        pytest.param({"members": ("sharp",)}, (1, 0), id="one"),
        pytest.param({"members": ("sharp", "blunt")}, (0.5, 0.5), id="equal"),
        pytest.param({"members": ("sharp=3", "blunt=1")}, (0.75, 0.25), id="weighted"),
    ],
)
def test_chosen_members_are_combined(
    world: World, tmp_path: Path, settings: dict[str, Any], share: tuple[float, float]
) -> None:
    row, student, (pixels, _) = first_step(
        world, tmp_path / "run", cache="three", loss=("kd:temperature=2",), **settings
    )
    sharp, blunt = pixels[:, :4] / 30 - 3, (pixels[:, :4] + pixels[:, 4:8]) / 60
    assert row["kd"] == pytest.approx(kl(share[0] * sharp + share[1] * blunt, student, 2), rel=1e-5)


def test_labels_of_some(world: World, tmp_path: Path) -> None:
    """The hard-label term averages over the labelled rows, and the run says how many there were."""
    row, student, (_, labels) = first_step(world, tmp_path / "run", data=world.spec("toy?labels=some"), loss=("ce",))
    known = np.flatnonzero(labels >= 0)
    assert 0 < len(known) < 90
    assert row["ce"] == pytest.approx(-log_softmax(student)[known, labels[known]].mean(), rel=1e-5)
    assert json.loads((tmp_path / "run/run.json").read_text())["labelled"] == len(known)


@pytest.mark.slow
def test_several_labels_per_sample(world: World, tmp_path: Path) -> None:
    row, student, (pixels, labels) = first_step(
        world, tmp_path / "run", data=world.spec("toy?labels=many"), cache="many", loss=("bce:temperature=2", "ce")
    )
    p = 1 / (1 + np.exp(-(pixels[:, :4] / 30 - 3) / 2))
    q = 1 / (1 + np.exp(-student / 2))
    assert row["bce"] == pytest.approx(-4 * (p * np.log(q) + (1 - p) * np.log(1 - q)).mean(), rel=1e-5)
    q = 1 / (1 + np.exp(-student))
    assert row["ce"] == pytest.approx(-np.where(labels, np.log(q), np.log(1 - q)).mean(), rel=1e-5)
    learned = world.train(
        tmp_path / "long",
        data=world.spec("toy?labels=many"),
        eval_data=world.spec("toy?labels=many"),
        cache="many",
        loss=("bce",),
        epochs=30,
        lr=0.03,
    )
    assert learned.evaluation is not None and learned.evaluation.top1 is not None and learned.evaluation.top1 > 0.65


def test_views_take_turns(world: World, tmp_path: Path) -> None:
    rows = world.train(tmp_path / "run", cache="views", epochs=5).metrics
    assert [row["view"] for row in rows] == [0, 1, 2, 0, 1]
    rows = world.train(tmp_path / "pinned", cache="views", epochs=3, view=2).metrics
    assert [row["view"] for row in rows] == [2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        pytest.param({"schedule": "constant"}, lambda step: 1.0, id="constant"),
        pytest.param({"schedule": "cosine"}, lambda step: 0.5 * (1 + math.cos(math.pi * step / 12)), id="cosine"),
        pytest.param(
            {"schedule": "step(at=1/3, gamma=0.5)"},
            lambda step: 0.5 ** ((step >= 3) + (step >= 9)),
            id="step",
        ),
        pytest.param({"schedule": "warmup(2)"}, lambda step: min(1.0, (step + 1) / 6), id="warm-up"),
        pytest.param(
            {"schedule": "warmup(1, cosine)"},
            lambda step: (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9)),
            id="warm-up and cosine",
        ),
        pytest.param(
            {"schedule": "warmup(3steps, step(1, at=2))"},
            lambda step: (step + 1) / 3 if step < 3 else 0.1 ** (step >= 6),
            id="warm-up and step",
        ),
    ],
)
def test_learning_rates(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], factor: Any
) -> None:
    """Every step's rate, over 4 epochs of 3 steps; the metrics give each epoch's last."""
    used: list[float] = []
    original = torch.optim.AdamW.step

    def noted(self: Any, *args: Any, **more: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return original(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    rows = world.train(tmp_path / "run", epochs=4, lr=0.02, **settings).metrics
    assert used == pytest.approx([0.02 * factor(step) for step in range(12)], rel=1e-9)
    assert [row["lr"] for row in rows] == used[2::3]
    assert min(used) > 0


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        pytest.param({"optimizer": "sgd"}, lambda w, g: g + 0.3 * w, id="sgd"),
        pytest.param(
            {"optimizer": "sgd", "nesterov": True, "momentum": 0.8}, lambda w, g: 1.8 * (g + 0.3 * w), id="nesterov"
        ),
        pytest.param({"optimizer": "adam"}, lambda w, g: (g + 0.3 * w) / ((g + 0.3 * w).abs() + 1e-8), id="adam"),
        pytest.param({"optimizer": "adamw"}, lambda w, g: g / (g.abs() + 1e-8) + 0.3 * w, id="adamw"),
    ],
)
def test_the_first_step_of_each_optimiser(world: World, tmp_path: Path, settings: dict[str, Any], step: Any) -> None:
    """From its definition, with weight decay 0.3: L2 in the gradient, for adamw beside it."""
    more = {"epochs": 1, "batch_size": 90, "seed": 6, "schedule": "constant", "lr": 0.02, "weight_decay": 0.3}
    world.train(tmp_path / "run", **more, **settings)
    data = open_transfer_set(world.spec("toy"))
    torch.manual_seed(6)
    model = load_model("softcache:mlp?hidden=8", num_classes=4, input_shape=(4, 4))
    logits = model(model.input.collate([data.load(i)[0] for i in range(90)]))
    (-logits.log_softmax(1)[torch.arange(90), torch.from_numpy(data.labels).long()]).mean().backward()
    trained = load_file(tmp_path / "run" / STUDENT)
    for name, w in model.net.named_parameters():
        assert w.grad is not None
        # a gradient of zero (a dead unit) has no direction that rounding would not choose for it
        sure = (w.grad.abs() > 1e-6) | (w.grad == 0)
        expected = w.detach() - 0.02 * step(w.detach(), w.grad)
        torch.testing.assert_close(trained[name][sure], expected[sure], rtol=1e-4, atol=1e-5)
        assert bool((trained[name] != w).any())


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_autocast(world: World, tmp_path: Path, kind: str) -> None:
    full = world.train(tmp_path / "full", cache="one", epochs=5, eval_data=world.spec("toy"))
    half = world.train(tmp_path / "half", cache="one", epochs=5, eval_data=world.spec("toy"), autocast=kind)
    assert [row["kd"] for row in half.metrics] == pytest.approx([row["kd"] for row in full.metrics], rel=0.02)
    assert half.metrics[-1]["eval_nll"] == pytest.approx(full.metrics[-1]["eval_nll"], rel=0.02)
    assert not torch.equal(weights(tmp_path / "half"), weights(tmp_path / "full"))
    assert weights(tmp_path / "half").dtype == torch.float32


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message", "tip"),
    [
        pytest.param({"loss": ("kd",)}, LossError, "there is no cache", "--cache DIR", id="loss without cache"),
        pytest.param(
            {"cache": "three", "members": ("likely",), "loss": ("mse_logits",)},
            LossError,
            "member 'likely' gave log_probs",
            "kd or soft_ce",
            id="mse of log_probs",
        ),
        pytest.param(
            {"cache": "three", "members": ("sharp", "blunt"), "loss": ("mse_logits",), "combine": "vote"},
            LossError,
            "needs logits, and a vote has none",
            "mean_logits",
            id="mse of a vote",
        ),
        pytest.param({"cache": "one", "combine": "median"}, LossError, "unknown combination rule", "", id="rule"),
        pytest.param({"cache": "one", "members": ("shrap",)}, CacheError, "no member 'shrap'", "sharp", id="member"),
        pytest.param(
            {"cache": "one", "members": ("shrap",), "loss": ("ce",)}, CacheError, "'shrap'", "sharp", id="member of ce"
        ),
        pytest.param({"cache": "one", "members": ("sharp=x",)}, ConfigError, "'x' is not a number", "", id="weight"),
        pytest.param({"cache": "one", "members": ("sharp=-1",)}, ConfigError, "negative", "", id="negative weight"),
        pytest.param({"cache": "one", "members": ("sharp=0",)}, ConfigError, "all weights are zero", "", id="zero"),
        pytest.param({"cache": "views", "view": 3}, ConfigError, "views 0 to 2", "", id="view"),
        pytest.param({"cache": "views", "view": -1}, ConfigError, "views 0 to 2", "", id="negative view"),
        pytest.param(
            {"cache": "one", "policy": ("shift",)}, ConfigError, "cannot be given together", "own", id="policy"
        ),
        pytest.param({"view": 0}, ConfigError, "--view 0 needs --cache", "", id="view without cache"),
        pytest.param({"members": ("a",)}, ConfigError, "--members needs --cache", "", id="members without cache"),
        pytest.param({"cache_id": "ab"}, ConfigError, "--cache-id ab needs --cache", "", id="id without cache"),
        pytest.param({"size": 8}, ConfigError, "--size 8 needs --cache", "", id="size without cache"),
        pytest.param({"augment": ("shift",)}, ConfigError, "--augment needs --cache", "", id="augment without cache"),
        pytest.param(
            {"cache": "views", "augment": ("shift",), "size": 8}, ConfigError, "together", "own size", id="size twice"
        ),
        pytest.param({"cache": "views", "size": 8}, ConfigError, "cannot render at 8 pixels", "", id="size"),
        pytest.param({"cache": "one", "cache_id": "zz"}, CacheError, "0 manifests match", "", id="unknown id"),
        pytest.param({"data": "{}:toy?labels=none"}, LossError, "no sample of .* has one", "soft targets", id="ce"),
        pytest.param({"cache": "one", "data": "{}:five_classes"}, ClassMismatchError, "5 classes", "", id="classes"),
        pytest.param(
            {"cache": "one", "data": "{}:turned"}, ClassMismatchError, "in another order", "", id="class order"
        ),
        pytest.param({"eval_data": "{}:five_classes"}, ClassMismatchError, "5 classes", "", id="classes of eval data"),
        pytest.param({"loss": ("ce:temperature=2",)}, LossError, "no setting 'temperature'", "", id="parameter"),
        pytest.param({"loss": ("cee",)}, LossError, "unknown loss 'cee'", "'ce'", id="loss"),
        pytest.param({"cache": "one", "loss": ("kd:temperature=0",)}, LossError, "must be > 0", "", id="temperature"),
        pytest.param({"policy": ("shfit",)}, ConfigError, "unknown view step 'shfit'", "shift", id="policy step"),
        pytest.param({"epochs": 0}, ConfigError, "--epochs 0", "", id="epochs"),
        pytest.param({"batch_size": 0}, ConfigError, "--batch-size 0", "", id="batch size"),
        pytest.param({"lr": 0.0}, ConfigError, "--lr 0", "", id="lr"),
        pytest.param({"lr": float("nan")}, ConfigError, "--lr nan", "", id="lr that is none"),
        pytest.param({"schedule": "cosin"}, ConfigError, "neither a number nor a schedule", "cosine", id="schedule"),
        pytest.param({"threads": 0}, ConfigError, "--threads 0", "", id="threads"),
        pytest.param({"workers": -1}, ConfigError, "--workers -1", "", id="workers"),
        pytest.param({"device": "tpu"}, ConfigError, "'tpu'", "", id="device"),
        pytest.param(
            {"student": "{}:wild"}, TrainingError, "not finite in epoch 0, step 0", "--lr", id="infinite loss"
        ),
    ],
)
def test_refused(
    world: World, tmp_path: Path, settings: dict[str, Any], error: type[SoftcacheError], message: str, tip: str
) -> None:
    pieces = world.path / "pieces.py"
    settings = {key: value.format(pieces) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(error, match=message) as caught:
        world.train(tmp_path / "run", **settings)
    assert tip in caught.value.tip
    assert not (tmp_path / "run" / STUDENT).exists()


def test_another_run_in_the_folder(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run")
    before = (tmp_path / "run" / STUDENT).read_bytes()
    with pytest.raises(TrainingError, match="seed was 0, is now 1") as caught:
        world.train(tmp_path / "run", seed=1)
    assert "--out" in caught.value.tip
    with pytest.raises(TrainingError, match="cache was None"):
        world.train(tmp_path / "run", cache="one")
    assert (tmp_path / "run" / STUDENT).read_bytes() == before


def test_a_run_goes_on_where_its_cache_moved_and_not_with_another(world: World, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    config = world.config(tmp_path / "run", cache="one")
    assert config.cache is not None
    shutil.copytree(config.cache, moved)
    shutil.copytree(world.path / "three", other)
    first = train.run(config, quiet=True)
    again = train.run(replace(config, cache=str(moved)), quiet=True)
    assert again.metrics == first.metrics
    with pytest.raises(SoftcacheError, match="0 manifests match"):
        train.run(replace(config, cache=str(other)), quiet=True)


def test_a_run_of_an_older_version_knows_fewer_settings(world: World, tmp_path: Path) -> None:
    first = world.train(tmp_path / "run")
    about = json.loads((tmp_path / "run/run.json").read_text())
    del about["config"]["eval_every"]
    (tmp_path / "run/run.json").write_text(json.dumps(about))
    assert world.train(tmp_path / "run").metrics == first.metrics
    with pytest.raises(TrainingError, match="eval_every was 1, is now 2"):
        world.train(tmp_path / "run", eval_every=2)


def test_other_files_in_the_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(TrainingError, match="files that are no run"):
        world.train(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        world.train(tmp_path / "file")


def test_a_cache_that_was_made_anew_under_a_run(world: World, tmp_path: Path) -> None:
    """A run resumes on the cache it began with, or not at all: other targets would give neither run's student."""
    world.dump(str(tmp_path / "cache"), "toy", "sharp")
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache"), "epochs": 3}
    world.train(tmp_path / "run", **settings)
    (tmp_path / "cache").rename(tmp_path / "old")
    world.dump(str(tmp_path / "cache"), "toy", "blunt")
    (tmp_path / "run" / STUDENT).unlink()
    with pytest.raises(CacheError, match="0 manifests match id") as caught:
        world.train(tmp_path / "run", **settings)
    assert "--out" in caught.value.__notes__[0]


def test_pixels_that_drifted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another crop is refused; trained on as it is only when asked, with a warning that the run keeps."""
    window = view_steps.window
    monkeypatch.setattr(view_steps, "window", lambda image, dy, dx: window(image, dy, dx + 1))
    with pytest.raises(DriftError, match=r"64 of 64 .* other pixels than the teacher saw .* of 255 apart"):
        world.train(tmp_path / "run", cache="views")
    assert not (tmp_path / "run").exists()
    world.train(tmp_path / "run", cache="views", on_drift="warn")
    drift = json.loads((tmp_path / "run/run.json").read_text())["drift"]
    assert "64 of 64 checked views differ from what the teacher saw" in drift
    assert capsys.readouterr().err.count(drift) == 1


def test_a_rounding_is_one_recorded_warning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    window = view_steps.window
    monkeypatch.setattr(view_steps, "window", lambda image, dy, dx: window(image, dy, dx).clamp(min=1))
    world.train(tmp_path / "run", cache="views")
    told = capsys.readouterr().err
    drift = json.loads((tmp_path / "run/run.json").read_text())["drift"]
    assert drift.endswith("of 64 checked views differ from what the teacher saw, by 1 of 255")
    assert told.startswith(f"softcache: warning: {drift}; the run records it\n") and told.count(drift) == 1


def test_a_policy_of_the_students_own_is_recorded_as_mismatched(world: World, tmp_path: Path) -> None:
    """Targets still go through the cache's views; what the student sees is another view every epoch."""
    settings: dict[str, Any] = {"cache": "views", "epochs": 4}
    world.train(tmp_path / "matched", **settings)
    augmented = world.train(tmp_path / "run", **settings, augment=("shift:pixels=1",), view_seed=5)
    targets = [json.loads((tmp_path / name / "run.json").read_text())["targets"] for name in ("matched", "run")]
    assert targets == ["matched", "mismatched"]
    assert [row["view"] for row in augmented.metrics] == [0, 1, 2, 3]
    assert not torch.equal(weights(tmp_path / "matched"), weights(tmp_path / "run"))


def test_terms_and_members_as_flags() -> None:
    (kd,), (ce,) = parse_terms([], has_cache=True), parse_terms([], has_cache=False)
    assert kd.describe() == {"name": "kd", "weight": 1.0, "temperature": 4.0, "standardized": False}
    assert ce.describe() == {"name": "ce", "weight": 1.0, "smoothing": 0.0}
    (term,) = parse_terms(["kd:temperature=2.5,weight=0.9"], has_cache=True)
    assert (term.describe()["temperature"], term.describe()["weight"]) == (2.5, 0.9)


def test_a_single_member_under_any_rule_serves_mse(world: World) -> None:
    cache = softcache.open(world.path / "one")
    (term,) = parse_terms(["mse_logits"], has_cache=True)
    check_term(CachedTeacher(cache, "mean_logits"), term)
    three = softcache.open(world.path / "three")
    check_term(CachedTeacher(three, "draw", {"sharp": 1.0, "blunt": 1.0}), term)
    with pytest.raises(LossError, match="log_probs"):
        check_term(CachedTeacher(three), term)

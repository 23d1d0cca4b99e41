"""The options of train beside losses and stages, each against its definition."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from small_world import Outcome, Step, World, joined, relative, trained, weights_of
from training import at_each_save, run_with

import softcache
from softcache import cli
from softcache.config import EvalConfig, TrainConfig
from softcache.data.loading import LoadedBatch
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ClassMismatchError, ConfigError, DataError, LossError, ModelError
from softcache.evaluate import measure
from softcache.evaluate.evaluation import Evaluation
from softcache.losses import LOSSES, chunked_kd
from softcache.losses.schedules import Moment
from softcache.models import load_model, read_saved
from softcache.train import flow as train
from softcache.train import objective
from softcache.train.metrics import best_epoch, is_stale

STEPS = 3  # of an epoch: 301 samples in batches of 128


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("options"))
    for name in ("plain", "four"):
        world.cache(name)
    return world


@pytest.fixture(autouse=True)
def _beside_the_users_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run folder of a student of that file can be loaded by its name alone."""
    monkeypatch.chdir(world.path)


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def measured(model: str, data: str, **settings: Any) -> Evaluation:
    return measure.run(model, EvalConfig(data=data, threads=1, device="cpu", allow_code=True, **settings), quiet=True)


# ------------------------------------------------------------------------------------------------------- ema, clip-norm


def weights_after_steps(config: TrainConfig) -> list[dict[str, np.ndarray]]:
    """The student after each step, statistics included."""
    found: list[dict[str, np.ndarray]] = []

    def noted(_: Path, made: Any) -> None:
        found.append({name: tensor.numpy().copy() for name, tensor in made.net.state_dict().items()})

    with at_each_save(noted):
        train.run(replace(config, checkpoint_every=1), quiet=True)
    return found


@pytest.mark.slow
def test_the_moving_average_is_what_is_evaluated_and_kept(world: World, tmp_path: Path) -> None:
    student, decay = world.spec("net?norm=true&dropout=0.2"), 0.8
    stages = ("epochs=2 loss=kd", "epochs=1 loss=ce freeze=early")
    config = world.config(tmp_path / "run", student=student, eval_data=world.spec("toy"), stage=stages, ema=decay)
    after = weights_after_steps(config)
    assert len(after) == 3 * STEPS
    average = {name: value.astype(np.float64) for name, value in after[0].items()}
    for weights in after[1:]:
        for name, value in weights.items():
            average[name] = decay * average[name] + (1 - decay) * value
    kept = weights_of(tmp_path / "run")
    assert not np.allclose(after[-1]["head.weight"], average["head.weight"], rtol=1e-3)
    for name, wanted in average.items():
        if "running" in name or "num_batches" in name:  # statistics are those of the last step
            assert np.array_equal(kept[name], after[-1][name])
        else:
            np.testing.assert_allclose(kept[name], wanted, rtol=1e-5, atol=1e-7)
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    found = measured(str(tmp_path / "run"), world.spec("toy"))
    assert (found.top1, found.nll) == pytest.approx((row["eval_top1"], row["eval_nll"]))


@pytest.mark.slow
@pytest.mark.parametrize("length", [0.01, 100.0])
def test_a_long_gradient_is_scaled_down_and_a_short_one_is_not(world: World, tmp_path: Path, length: float) -> None:
    """Of everything that learns, together: the student and the adapter."""
    config = world.config(tmp_path / "run", "kd", "hint:layer=late:pool", clip_norm=length, momentum=0.0, epochs=2)
    whole = trained(replace(config, out=str(tmp_path / "whole"), clip_norm=None))
    steps = trained(config, [step.before for step in whole.steps]).steps
    scaled = 0
    for step, without in zip(steps[:-1], whole.steps[:-1], strict=True):
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in without.gradients.values()))
        assert len(step.gradients) == 8
        factor = min(1.0, length / (norm + 1e-6))  # torch's definition
        scaled += factor < 1
        for name, gradient in without.gradients.items():
            np.testing.assert_allclose(step.gradients[name], factor * gradient, rtol=1e-4, atol=1e-9)
    assert scaled == (len(steps) - 1 if length < 1 else 0)
    after = weights_after_steps(replace(config, out=str(tmp_path / "again")))
    first = whole.steps[0]
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in first.gradients.values()))
    for name, weight in after[0].items():
        moved = 0.05 * min(1.0, length / (norm + 1e-6)) * first.gradients[f"model.net.{name}"]
        np.testing.assert_allclose(weight, first.before[f"model.net.{name}"] - moved, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ accumulate


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 5, 1000])
def test_a_batch_in_parts_learns_as_a_whole_one(world: World, tmp_path: Path, parts: int) -> None:
    """For losses that are means over samples or labels: the labels of some are missing, the parts are of unequal size."""
    losses = ("kd:weight=0.5", "ce", "hint:layer=late:pool", "dkd:weight=0.1", "ctkd")
    whole = trained(world.config(tmp_path / "whole", *losses))
    steps = trained(world.config(tmp_path / "parts", *losses, accumulate=parts), [s.before for s in whole.steps]).steps
    for one, other in zip(whole.steps, steps, strict=True):
        assert other.values == pytest.approx(one.values, rel=1e-5)
        for name, gradient in one.gradients.items():  # most of the temperature's cancels out
            assert relative(other.gradients[name], gradient) < (1e-4 if name.endswith("level") else 1e-5), name


def test_a_relation_in_pieces_is_the_mean_over_the_pieces(world: World, tmp_path: Path) -> None:
    """Each piece is a batch of its own to it, weighted by its samples: 128 in 3 pieces are 43, 43 and 42."""
    seen: list[tuple[int, float]] = []
    values: list[float] = []

    def noted(own: Any, arguments: Any, _: Any) -> None:
        student_logits, outputs, given, moment = arguments
        alone = own.forward(student_logits, outputs, replace(given, factors={}), moment)
        seen.append((len(student_logits), alone["dist"].item()))

    def step(prepared: Any, live: Any, *rest: Any) -> Any:
        hook = live.objective.register_forward_hook(noted)
        found = train.one_step(prepared, live, *rest)
        hook.remove()
        values.append(found["dist"].item())
        return found

    run_with(world.config(tmp_path / "run", "dist", accumulate=3), step=step)
    assert [size for size, _ in seen] == [43, 43, 42, 43, 43, 42, 15, 15, 15]
    assert len(values) == STEPS
    for number, value in enumerate(values):
        own = seen[3 * number : 3 * number + 3]
        wanted = sum(size * one for size, one in own) / sum(size for size, _ in own)
        assert value == pytest.approx(wanted, rel=1e-5)


def test_inputs_that_cannot_be_divided(world: World, tmp_path: Path) -> None:
    shutil.copy(WORLDS / "bag.py", tmp_path / "bag.py")
    student = f"{tmp_path}/bag.py:bag"
    assert len(world.train(tmp_path / "whole", "kd", student=student).metrics) == 1
    with pytest.raises(ConfigError, match="for 128 samples: they cannot be divided") as caught:
        world.train(tmp_path / "parts", "kd", student=student, accumulate=2)
    assert "leave --accumulate out" in caught.value.tip


# ------------------------------------------------------------------------------------------------------- views per visit


def visited(config: TrainConfig) -> list[list[list[tuple[int, int]]]]:
    """Epoch -> batch -> (sample, view) pairs, as they are loaded."""
    epochs: list[list[list[tuple[int, int]]]] = []

    def noted(prepared: Any, live: Any, loaded: LoadedBatch, moment: Moment, number: int) -> Any:
        if moment.step == 0:
            epochs.append([])
        epochs[-1].append(list(zip(loaded.index.tolist(), loaded.views.tolist(), strict=True)))
        return train.one_step(prepared, live, loaded, moment, number)

    run_with(config, step=noted)
    return epochs


@pytest.mark.slow
@pytest.mark.parametrize(("views", "epochs", "times"), [(1, 4, 1), (2, 2, 1), (2, 4, 2), (3, 4, 3), (4, 1, 1)])
def test_every_view_takes_its_turn(world: World, tmp_path: Path, views: int, epochs: int, times: int) -> None:
    """A cache of four views: each (sample, view) once in 4 / K epochs."""
    config = world.config(tmp_path / "run", "kd", cache="four", views_per_visit=views, epochs=epochs)
    found = visited(config)
    assert len(found) == epochs
    counts = Counter(pair for epoch in found for batch in epoch for pair in batch)
    assert counts == {(sample, view): times for sample in range(301) for view in range(4)}
    for epoch in found:
        assert [len(batch) for batch in epoch] == [128 * views, 128 * views, 45 * views]
        for batch in epoch:
            assert all(len({sample for sample, _ in batch[i : i + views]}) == 1 for i in range(0, len(batch), views))
            assert all(len({view for _, view in batch[i : i + views]}) == views for i in range(0, len(batch), views))


def test_a_visit_of_two_views_is_a_batch_of_both(world: World, tmp_path: Path) -> None:
    """Same samples, same order: each term is the mean of what the two views give."""
    settings: dict[str, Any] = {"cache": "four", "lr": 1e-12, "momentum": 0.0}
    both = trained(world.config(tmp_path / "both", "kd", "ce", views_per_visit=2, **settings))
    one, two = (trained(world.config(tmp_path / str(v), "kd", "ce", view=v, **settings)) for v in (0, 1))
    for step, first, second in zip(both.steps, one.steps, two.steps, strict=True):
        for name in ("kd", "ce", "loss"):
            assert step.values[name] == pytest.approx((first.values[name] + second.values[name]) / 2, rel=1e-5)
        assert abs(first.values["kd"] - second.values["kd"]) > 1e-4 * first.values["kd"]


def test_views_of_the_students_own_are_fresh_in_every_epoch(world: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache": None, "policy": ("shift:pixels=1",), "views_per_visit": 2, "epochs": 3}
    found = visited(world.config(tmp_path / "run", "ce", **settings))
    assert [{view for batch in epoch for _, view in batch} for epoch in found] == [{0, 1}, {2, 3}, {4, 5}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"views_per_visit": 5}, "--views-per-visit 5: of each sample the cache has 4", id="too-many"),
        pytest.param({"views_per_visit": 0}, "--views-per-visit 0: must be at least 1", id="none"),
        pytest.param({"views_per_visit": 2, "view": 1}, "cannot be given together", id="pinned"),
        pytest.param({"accumulate": 0}, "--accumulate 0: must be at least 1", id="accumulate"),
        pytest.param({"clip_norm": 0.0}, "--clip-norm 0.0: must be > 0", id="clip-norm"),
        pytest.param({"ema": 1.0}, "--ema 1.0: must be between 0 and 1", id="ema"),
        pytest.param({"keep": "best"}, "--keep best needs --eval-data", id="keep"),
        pytest.param({"patience": 2}, "patience 2 needs --eval-data", id="patience"),
        pytest.param({"init_map": ("a=b",)}, "--init-map needs --init-from", id="init-map"),
        pytest.param({"sync_bn": True}, "--sync-bn works on GPUs", id="sync-bn"),
        pytest.param({"classes": ("5",)}, "no class '5' among 5 classes", id="classes"),
    ],
)
def test_what_cannot_be_is_refused(world: World, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        world.train(tmp_path / "run", "kd", cache="four", **settings)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- patience, keep best


def with_scores(config: TrainConfig, scores: Sequence[float | None]) -> list[dict[str, Any]]:
    """Train, with evaluations that were made up."""
    made = iter([*scores, *[0.0] * 20])
    return run_with(config, measure=lambda: Evaluation(100, 100, 0.0, top1=next(made), nll=1.0)).metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "patience", "epochs", "best"),
    [
        pytest.param((0.1, 0.2, 0.3, 0.4, 0.5), 1, 5, 4, id="ever-better"),
        pytest.param((0.5, 0.4, 0.3), 2, 3, 0, id="ever-worse"),
        pytest.param((0.2, 0.5, 0.4, 0.5, 0.9), 2, 4, 1, id="as-good-is-no-better"),
        pytest.param((0.2, 0.1, 0.3, 0.2, 0.1), 2, 5, 2, id="patient"),
        pytest.param((0.2, 0.1, 0.3, 0.2, 0.1), 1, 2, 0, id="impatient"),
        pytest.param((0.2, 0.1, 0.3, 0.2, 0.1), None, 5, 2, id="without"),
    ],
)
def test_when_it_ends_and_which_student_is_kept(
    world: World, tmp_path: Path, scores: tuple[float, ...], patience: int | None, epochs: int, best: int
) -> None:
    settings: dict[str, Any] = {"eval_data": world.spec("toy"), "schedule": "constant"}
    config = world.config(tmp_path / "run", "kd", epochs=5, patience=patience, keep="best", **settings)
    rows = with_scores(config, scores)
    assert [row["eval_top1"] for row in rows] == list(scores[:epochs])
    world.train(tmp_path / "short", "kd", epochs=best + 1, **settings)
    assert same_weights(tmp_path / "run", tmp_path / "short")
    last = replace(config, out=str(tmp_path / "last"), keep="last")
    with_scores(last, scores)
    assert same_weights(tmp_path / "last", tmp_path / "run") == (best == epochs - 1)
    assert not (tmp_path / "last/best.safetensors").exists()


@pytest.mark.slow
def test_patience_is_a_stages_own_and_the_best_is_of_all(world: World, tmp_path: Path) -> None:
    stages = ("epochs=9 patience=1 loss=kd", "epochs=9 patience=2 loss=ce", "epochs=2 loss=ce")
    config = world.config(tmp_path / "run", stage=stages, eval_data=world.spec("toy"), keep="best")
    rows = with_scores(config, (0.8, 0.7, 0.1, 0.9, 0.3, 0.2, 0.6, 0.5))
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 1, 1, 2, 2]
    short = replace(config, out=str(tmp_path / "short"), stage=("epochs=2 loss=kd", "epochs=2 loss=ce"), keep="last")
    train.run(short, quiet=True)
    assert same_weights(tmp_path / "run", tmp_path / "short")


@pytest.mark.slow
def test_the_kept_student_is_the_one_that_is_reported(world: World, tmp_path: Path) -> None:
    data = world.spec("toy?count=200&seed=3")
    result = world.train(tmp_path / "run", "ce", epochs=6, lr=0.3, eval_data=data, keep="best")
    best = max(row["eval_top1"] for row in result.metrics)
    assert result.evaluation is not None
    assert result.evaluation.top1 == best
    assert measured(str(tmp_path / "run"), data).top1 == best
    assert result.metrics[-1]["eval_top1"] < best  # or there would be nothing to see


@pytest.mark.slow
@pytest.mark.parametrize(("every", "evaluated"), [(2, [1, 3, 4, 5, 6]), (3, [2, 4, 5, 6]), (9, [4, 6])])
def test_evaluations_are_every_few_epochs_and_at_the_end_of_a_stage(
    world: World, tmp_path: Path, every: int, evaluated: list[int]
) -> None:
    stages = ("epochs=5 loss=kd", "epochs=2 loss=ce")
    config = world.config(tmp_path / "run", stage=stages, eval_data=world.spec("toy"), keep="best", eval_every=every)
    scores = [0.5 + 0.1 * (place == 1) for place in range(len(evaluated))]  # the second is the best
    rows = with_scores(config, scores)
    assert [place for place, row in enumerate(rows) if "eval_top1" in row] == evaluated
    until = (5, evaluated[1] - 4) if evaluated[1] > 4 else (evaluated[1] + 1, 0)
    kept = tuple(f"epochs={count} loss={loss}" for count, loss in zip(until, ("kd", "ce"), strict=True) if count)
    train.run(replace(config, out=str(tmp_path / "short"), stage=kept, keep="last"), quiet=True)
    assert same_weights(tmp_path / "run", tmp_path / "short")


def test_patience_waits_for_an_evaluation(world: World, tmp_path: Path) -> None:
    data = world.spec("toy")
    config = world.config(tmp_path / "run", "kd", epochs=9, patience=1, eval_data=data, eval_every=2)
    assert len(with_scores(config, (0.5, 0.4))) == 4


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        pytest.param([None, 0.2, None, 0.4, 0.4], 3, id="the-first-of-equals"),
        pytest.param([None, 0.0, None, 0.0], 1, id="zero-throughout-where-the-first-was-not-evaluated"),
        pytest.param([0.0, 0.0], 0, id="zero-throughout"),
        pytest.param([math.nan, 0.1, math.nan], 1, id="no-number"),
        pytest.param([None, None, math.nan], None, id="none"),
        pytest.param([], None, id="nothing"),
    ],
)
def test_the_best_is_among_what_was_evaluated(scores: list[float | None], best: int | None) -> None:
    rows = [{} if score is None else {"eval_top1": score} for score in scores]
    assert best_epoch(rows) == best
    assert best_epoch([{"eval_top1": None}, *rows]) == (None if best is None else best + 1)
    age = 0 if best is None else len(rows) - 1 - best
    for patience in range(1, 4):
        assert is_stale(rows, patience, 0) == (best is not None and age >= patience)
    assert not is_stale(rows, None, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "every", "kept"),
    [pytest.param((0.0,) * 4, 2, 1, id="zero"), pytest.param((None,) * 4, 1, 3, id="no-labels")],
)
def test_a_finished_run_can_always_be_saved(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scores: tuple[float | None, ...],
    every: int,
    kept: int,
) -> None:
    settings: dict[str, Any] = {"eval_data": world.spec("toy"), "epochs": 4, "patience": 4, "keep": "best"}
    config = world.config(tmp_path / "run", "ce", cache=None, eval_every=every, **settings)
    with_scores(config, scores)
    last = world.train(tmp_path / "last", "ce", cache=None, epochs=4)
    assert same_weights(tmp_path / "last", tmp_path / "run") == (kept == 3)
    assert ("the last epoch's student is kept" in capsys.readouterr().err) == (kept == 3)
    (tmp_path / "run/best.safetensors").unlink(missing_ok=True)  # as older versions left such runs
    again = train.run(config, quiet=True)
    assert (again.kept_epoch, last.kept_epoch) == (3, 3)
    assert same_weights(tmp_path / "last", tmp_path / "run")
    assert "the last epoch's student is kept" in capsys.readouterr().err


@pytest.mark.slow
def test_channels_last_changes_the_memory_and_not_the_mathematics(world: World, tmp_path: Path) -> None:
    plain = world.config(tmp_path / "plain", "kd", "ce", epochs=2)
    last = replace(plain, out=str(tmp_path / "last"), channels_last=True)
    layouts: list[bool] = []

    def looked(_: Path, state: Any) -> None:
        layouts.append(state.net.late[0].weight.is_contiguous(memory_format=torch.channels_last))

    with at_each_save(looked):
        train.run(plain, quiet=True)
        train.run(last, quiet=True)
    assert layouts == [False, False, True, True]
    one, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "last")
    assert all(relative(one[name], other[name]) < 1e-4 for name in one)


# --------------------------------------------------------------------------------------------------------------- classes

CHOSEN = [1, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("said", [("bee", "dog", "eel"), ("3-4", "1"), ("eel", "bee", "dog")])
def test_a_student_of_some_classes(world: World, tmp_path: Path, said: tuple[str, ...]) -> None:
    """kd and ce at its first step, in float64 from the cache and the data: the teacher's softmax over the chosen alone."""
    losses = ("kd:temperature=3", "ce")
    config = world.config(tmp_path / "run", *losses, classes=said, view=0, lr=1e-12, eval_data=world.spec("toy"))
    found = trained(config)
    saved = read_saved(str(tmp_path / "run"))
    assert saved is not None
    assert saved.class_names == ("bee", "dog", "eel")

    data = open_transfer_set(world.spec("toy"))
    joined = softcache.open(world.cache("plain")).join(data)
    model = load_model(str(tmp_path / "run"), num_classes=3, allow_code=True)
    items = torch.stack([torch.as_tensor(joined[i][0][0]) for i in range(len(data))])[:, None]
    with torch.no_grad():
        student = model.eval()(items).double()
    everyone = np.arange(len(data))
    teacher = joined.gather_samples(everyone, np.zeros(len(data), np.int64)).logits()[:, CHOSEN].double()
    log_p, log_q = ((logits / 3).log_softmax(1) for logits in (teacher, student))
    kd = 9 * (log_p.exp() * (log_p - log_q)).sum(1)
    place = torch.tensor([-1, 0, -1, 1, 2, -1])[torch.from_numpy(data.labels.astype(np.int64))]
    ce = -student.log_softmax(1)[torch.arange(len(data)), place.clamp(min=0)]
    first = everyone_of_the_first_batch(config)
    known = place[first] >= 0
    assert 0 < known.sum() < 60  # samples of other classes, and those without a label, have none
    assert found.steps[0].values["kd"] == pytest.approx(kd[first].mean().item(), rel=1e-5)
    assert found.steps[0].values["ce"] == pytest.approx(ce[first][known].mean().item(), rel=1e-5)
    evaluated = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    clean = measured(str(tmp_path / "run"), world.spec("toy"))
    assert clean.labelled == int((place >= 0).sum())
    assert (clean.samples, clean.top1, clean.nll) == (301, evaluated["eval_top1"], pytest.approx(evaluated["eval_nll"]))
    assert json.loads((tmp_path / "run/run.json").read_text())["labelled"] == clean.labelled


def everyone_of_the_first_batch(config: TrainConfig) -> list[int]:
    return [sample for sample, _ in visited(replace(config, out=config.out + "-again", eval_data=None))[0][0]]


@pytest.mark.slow
def test_a_student_of_some_classes_is_evaluated_on_all_of_the_data(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.train(tmp_path / "run", "kd:temperature=1", "ce", classes=("1", "3-4"), epochs=3)
    out, data = str(tmp_path / "run"), open_transfer_set(world.spec("toy"))
    model = load_model(out, num_classes=3, allow_code=True)
    items = torch.stack([torch.as_tensor(data.load(i)[0]) for i in range(len(data))])[:, None]
    with torch.no_grad():
        logits = model.eval()(items).double()
    place = np.array([-1, 0, -1, 1, 2, -1])[data.labels]
    right = float((logits.argmax(1).numpy() == place)[place >= 0].mean())
    found = measured(out, world.spec("toy"))
    assert (found.top1, found.labelled, found.top5) == (pytest.approx(right), int((place >= 0).sum()), None)

    # against the cache: with what the teacher says of these classes
    joined = softcache.open(world.cache("plain")).join(data)
    with torch.no_grad():
        viewed = model(torch.stack([torch.as_tensor(joined[i][0][0]) for i in range(len(data))])[:, None]).double()
    teacher = joined.gather_samples(np.arange(301), np.zeros(301, np.int64)).logits()[:, CHOSEN].double()
    log_p, log_q = (teacher / 2).log_softmax(1), (viewed / 2).log_softmax(1)
    compared = measured(out, world.spec("toy"), cache=world.cache("plain"), temperature=2.0)
    assert compared.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).mean().item(), rel=1e-5)
    assert compared.agreement == pytest.approx((teacher.argmax(1) == viewed.argmax(1)).double().mean().item())

    assert (
        cli.main(["eval", out, "--data", world.spec("toy"), "--device", "cpu", "--threads", "1", "--allow-code"]) == 0
    )
    assert f"with a label {found.labelled}" in " ".join(capsys.readouterr().out.split())


def test_a_run_on_other_classes_than_the_datas_is_refused(world: World, tmp_path: Path) -> None:
    """Only classes in the data's own order are a part of it."""
    world.train(tmp_path / "run", "ce", cache=None, data=world.spec("turned"), epochs=1)
    with pytest.raises((ModelError, ClassMismatchError), match="2 classes"):
        measured(str(tmp_path / "run"), world.spec("toy"))


def test_losses_on_the_teachers_classifier_take_the_chosen_rows(world: World, tmp_path: Path) -> None:
    taken: list[Any] = []
    config = world.config(tmp_path / "run", "srrl:layer=late:pool", classes=("1", "3-4"))
    found = run_with(config, look=lambda prepared: taken.append(prepared.objectives[0].term_modules[0]))
    assert [tuple(taken[0].classifier_weight.shape), tuple(taken[0].classifier_bias.shape)] == [(3, 16), (3,)]
    assert np.isfinite(found.metrics[-1]["srrl"])


# -------------------------------------------------------------------------------------------------------------- init-from


@pytest.mark.slow
def test_a_student_begins_with_the_weights_of_a_run(world: World, tmp_path: Path) -> None:
    data, still = world.spec("toy?count=200&seed=3"), {"lr": 1e-12, "momentum": 0.0}
    source = world.train(tmp_path / "source", "kd", epochs=6, lr=0.5, eval_data=data)
    start = str(tmp_path / "source")
    same = world.train(tmp_path / "same", "kd", eval_data=data, init_from=start, **still)
    assert same.metrics[0]["eval_nll"] == pytest.approx(source.metrics[-1]["eval_nll"])
    fresh = world.train(tmp_path / "fresh", "kd", eval_data=data, **still)
    assert fresh.metrics[0]["eval_nll"] != pytest.approx(source.metrics[-1]["eval_nll"])
    about = json.loads((tmp_path / "same/run.json").read_text())["initialised"]
    assert "6 of 6 tensors initialised from" in about
    assert json.loads((tmp_path / "fresh/run.json").read_text())["initialised"] is None


def test_of_other_classes_the_head_keeps_its_own_weights(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "source", "kd", epochs=1)
    start, still = str(tmp_path / "source"), {"lr": 1e-12, "momentum": 0.0, "classes": ("1", "3-4")}
    world.train(tmp_path / "some", "kd", init_from=start, **still)
    world.train(tmp_path / "fresh", "kd", **still)
    source, some, fresh = (weights_of(tmp_path / name) for name in ("source", "some", "fresh"))
    for name, value in some.items():
        np.testing.assert_allclose(value, (fresh if name.startswith("head") else source)[name], atol=1e-9)
    assert "head.weight" in json.loads((tmp_path / "some/run.json").read_text())["initialised"]


def test_layers_of_other_names(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "source", "kd")
    settings: dict[str, Any] = {"lr": 1e-12, "momentum": 0.0, "student": world.spec("renamed")}
    mapped = ("body.early=early", "body.late=late")
    world.train(tmp_path / "run", "kd", init_from=str(tmp_path / "source"), init_map=mapped, **settings)
    source, found = weights_of(tmp_path / "source"), weights_of(tmp_path / "run")
    np.testing.assert_allclose(found["body.early.0.weight"], source["early.0.weight"], atol=1e-9)
    assert not np.allclose(found["body.head.weight"], source["head.weight"])
    wrong = ("body.early=earlier",)
    with pytest.raises(ConfigError, match="no 'earlier'"):
        world.train(tmp_path / "other", "kd", init_from=str(tmp_path / "source"), init_map=wrong, **settings)


# ---------------------------------------------------------------------------------------------- half types, many classes

FEATURES = ("hint:layer=late:pool", "at", "crd:negatives=16,width=8,layer=late:pool", "sp", "vid", "reviewkd:width=4")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_losses_on_features_in_half_types(world: World, tmp_path: Path, kind: str) -> None:
    """Close to float32 from the same weights, and computed in float32: a half type's own noise only."""
    student = world.spec("net?norm=true")
    full = trained(world.config(tmp_path / "full", "kd", *FEATURES, student=student))
    starts = [step.before for step in full.steps]
    half = trained(world.config(tmp_path / kind, "kd", *FEATURES, student=student, autocast=kind), starts[:1] * STEPS)
    again = trained(world.config(tmp_path / "first", "kd", *FEATURES, student=student), starts[:1] * STEPS)
    differ = 0
    for one, other in zip(again.steps, half.steps, strict=True):
        assert all(np.isfinite(g).all() for g in other.gradients.values())
        for name, wanted in one.values.items():
            assert other.values[name] == pytest.approx(wanted, rel=0.03, abs=1e-4), name
            differ += other.values[name] != wanted
    assert differ > STEPS
    assert weights_of(tmp_path / kind)["head.weight"].dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 2}, {"classes": ("1", "3-4")}], ids=["plain", "parts", "classes"]
)
def test_many_classes_give_what_few_do(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """kd in pieces, where nothing but its temperature is set; its other forms stay whole."""
    temperatures: list[float] = []

    def noted(student_logits: torch.Tensor, rows: Any, temperature: float) -> torch.Tensor:
        temperatures.append(temperature)
        return chunked_kd(student_logits, rows, temperature)

    monkeypatch.setitem(LOSSES, "kd", replace(LOSSES["kd"], many_classes=noted))
    losses = ("kd:temperature=linear(4, 2)", "ce", "kd:standardized=true,weight=0.1")
    plain = trained(world.config(tmp_path / "plain", *losses, epochs=2, **settings))
    assert not temperatures
    monkeypatch.setattr(objective, "MANY_CLASSES", 2)
    starts = [step.before for step in plain.steps]
    many = trained(world.config(tmp_path / "many", *losses, epochs=2, **settings), starts)
    per_step = settings.get("accumulate", 1)
    used = temperatures[-2 * STEPS * per_step :]  # before them, the terms are tried out
    assert used == pytest.approx([4 - step / 3 for step in range(2 * STEPS) for _ in range(per_step)])
    for one, other in zip(plain.steps, many.steps, strict=True):
        assert other.values == pytest.approx(one.values, rel=1e-5)
        assert all(relative(other.gradients[name], g) < 1e-5 for name, g in one.gradients.items())


# ------------------------------------------------------------------------------------------------- simkd, from end to end


@pytest.mark.slow
@pytest.mark.parametrize("placed", ["layer=late:map", "layer=late:pool,student=head"], ids=["maps", "vectors"])
def test_a_student_with_its_teachers_classifier(world: World, tmp_path: Path, placed: str) -> None:
    """Trained, saved, loaded and evaluated alike; the classifier is the teacher's to the bit, and the projector stays."""
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.02, "epochs": 8, "eval_data": world.spec("toy")}
    result = world.train(tmp_path / "run", f"simkd:{placed}", **settings)
    assert result.metrics[-1]["simkd"] < 0.5 * result.metrics[0]["simkd"]
    weight, bias = softcache.open(world.cache("plain")).classifier("teacher")  # type: ignore[misc]
    kept = weights_of(tmp_path / "run")
    (name,) = (name for name, value in kept.items() if value.shape == (5, 16))
    assert np.array_equal(kept[name], weight)
    assert bias is not None
    assert np.array_equal(kept[name.replace("weight", "bias")], bias)
    found = measured(str(tmp_path / "run"), world.spec("toy"))
    assert (found.top1, found.nll) == (result.metrics[-1]["eval_top1"], pytest.approx(result.metrics[-1]["eval_nll"]))
    compared = measured(str(tmp_path / "run"), world.spec("toy"), cache=world.cache("plain"))
    untrained = world.train(tmp_path / "untrained", f"simkd:{placed}", **settings | {"lr": 1e-12, "epochs": 1})
    before = measured(str(untrained.path), world.spec("toy"), cache=world.cache("plain"))
    assert compared.kl is not None and before.kl is not None
    assert compared.kl < 0.5 * before.kl  # through the teacher's classifier it comes close to its soft targets
    resumed = world.train(tmp_path / "run", f"simkd:{placed}", **settings)
    assert resumed.evaluation is not None
    assert resumed.evaluation.top1 == found.top1


def test_a_projector_is_trained_like_the_rest_in_stages(world: World, tmp_path: Path) -> None:
    stages = ("loss=simkd:layer=late:map freeze=early", "loss=ce freeze=head")
    world.train(tmp_path / "run", stage=stages, ema=0.5)
    kept = weights_of(tmp_path / "run")
    assert any("projector" in name for name in kept)
    assert measured(str(tmp_path / "run"), world.spec("toy")).top1 is not None
    stages = ("loss=simkd:layer=late:map", "loss=simkd:layer=late:pool,student=head")
    with pytest.raises(LossError, match="two terms ask for it"):
        world.train(tmp_path / "other", stage=stages)


# --------------------------------------------------------------------------------------------------- tensorboard, compile


@pytest.mark.slow
def test_tensorboard_has_the_metrics(world: World, tmp_path: Path) -> None:
    """Each epoch once, though the second was broken off after it was noted and done again."""
    calls = 0

    def broken(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    path = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(path, reason="needs the extra softcache[tensorboard]")
    settings: dict[str, Any] = {"eval_data": world.spec("toy"), "epochs": 3, "tensorboard": True}
    losses = ("kd:temperature=linear(4, 2)", "ce")
    with at_each_save(broken, before=True), pytest.raises(KeyboardInterrupt):
        world.train(tmp_path / "run", *losses, **settings)
    rows = world.train(tmp_path / "run", *losses, **settings).metrics
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"epoch"}
    for name in ("kd", "ce", "loss", "lr", "kd.temperature", "eval_top1"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [0, 1, 2]
        assert [event.value for event in found] == pytest.approx([row[name] for row in rows])


@pytest.mark.slow
# torch hides this one from its users in a way that does not reach warnings that are errors
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_student_learns_as_an_eager_one(world: World, tmp_path: Path) -> None:
    """With the layers that a stage taps: another stage's do not count."""
    stages = tuple(
        " ".join(f"loss={one}" for one in losses) for losses in (("kd", "ce"), ("kd", *FEATURES), ("kd", "at"))
    )
    student, data = world.spec("net?norm=true"), world.spec("toy")
    eager = trained(world.config(tmp_path / "eager", stage=stages, student=student, eval_data=data))
    compiled = trained(world.config(tmp_path / "compiled", stage=stages, student=student, eval_data=data, compile=True))
    apart = max(relative(other.values[k], v) for one, other in pairs(eager, compiled) for k, v in one.values.items())
    weights = relative(*(joined(weights_of(tmp_path / name)) for name in ("compiled", "eager")))
    print(f"\ncompiled, three stages of three steps: values {apart:.1e}, weights {weights:.1e} apart")
    assert max(apart, weights) < 1e-4  # the compiler fuses and orders sums as it likes on this processor


def pairs(eager: Outcome, compiled: Outcome) -> list[tuple[Step, Step]]:
    return list(zip(eager.steps, compiled.steps, strict=True))

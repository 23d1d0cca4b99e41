"""Every number that is reported, for both kinds of labels and every combination rule, against formulas written here in float64.

Thirty sets of logits and labels, with ties, saturation, missing labels, one class and so on; equal to six digits. scikit-learn
says the same of what it knows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, needs
from safetensors.torch import load_file

from softcache import dump, train
from softcache import open as open_cache
from softcache.config import DumpConfig, EvalConfig, TrainConfig
from softcache.evaluate import measure
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.sums import Sums
from softcache.reproduce import steps
from softcache.targets.ensemble import COMBINE_RULES, combine

MEMBERS = 4
WEIGHTS = (0.625, 0.125, 0.0, 0.25)  # sums of eighths are exact, so that ties stay ties; and none is one half of all
FLAVOURS = ("plain", "ties", "saturated", "missing", "same", "flat", "few", "one class", "two classes", "six", "many",
            "unlabelled", "alone", "right", "wrong")  # fmt: skip
SETS = [(kind, flavour) for kind in ("single", "several") for flavour in FLAVOURS]
QUICK = ("ties", "saturated", "missing", "one class", "unlabelled")
six_digits = {"rel": 1e-6, "abs": 1e-7}


@dataclass(frozen=True)
class World:
    """`logits` (N, MEMBERS + 1, C) float32, the student's last; `labels` (N,), or (N, C) of 1, 0 and -1."""

    logits: np.ndarray
    labels: np.ndarray

    @property
    def several(self) -> bool:
        return self.labels.ndim == 2

    @property
    def student(self) -> np.ndarray:
        return self.logits[:, -1].astype(np.float64)

    @property
    def members(self) -> np.ndarray:
        return self.logits[:, :-1].swapaxes(0, 1).astype(np.float64)  # (M, N, C)


def made(kind: str, flavour: str) -> World:
    rng = np.random.default_rng([SETS.index((kind, flavour)), 7])
    classes = {"one class": 1, "two classes": 2, "six": 6, "many": 40}.get(flavour, 7)
    count = {"few": 2, "alone": 1}.get(flavour, 60)
    logits = rng.normal(0, 2, (count, MEMBERS + 1, classes))
    if flavour == "ties":
        logits = rng.integers(-1, 2, logits.shape).astype(float)
        logits[:, :, classes // 2] = logits[:, :, 0]
    if flavour == "saturated":
        logits *= 60
    if flavour == "flat":
        logits[:] = 0
    truth = rng.integers(0, classes, count)
    yes = rng.random((count, classes)) < 0.4
    if flavour == "same":
        truth[:], yes[:] = 3, np.arange(classes) == 3
    if flavour in ("right", "wrong"):
        truth, yes = logits[:, -1].argmax(axis=1), logits[:, -1] > 0
        truth, yes = ((truth + 1) % classes, ~yes) if flavour == "wrong" else (truth, yes)
    known = rng.random(yes.shape) < {"missing": 0.6, "unlabelled": 0.0}.get(flavour, 1.0)
    labels = np.where(known, yes, -1) if kind == "several" else np.where(known[:, 0], truth, -1)
    return World(logits.astype(np.float32), labels.astype(np.int8 if kind == "several" else np.int32))


# ---------------------------------------------------------------------------------------------------------------- the formulas


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(-np.logaddexp(0, -x))


def log_mean(logs: np.ndarray, share: np.ndarray) -> np.ndarray:
    """log of the weighted mean over the first axis."""
    top = logs.max(axis=0)
    return np.asarray(top + np.log((share[:, None, None] * np.exp(logs - top)).sum(axis=0)))


def combined(
    members: np.ndarray, rule: str, share: np.ndarray, t: float, several: bool, draws: np.ndarray
) -> np.ndarray:
    """Logits of the ensemble, of shape (N, C); of a vote +-1e9."""
    members, share = members[share > 0], share[share > 0]
    if rule == "mean_logits":
        return np.asarray((share[:, None, None] * members).sum(axis=0))
    if rule == "draw":
        taken = [int(np.flatnonzero(draw < share.cumsum())[0]) for draw in draws]
        return members[taken, np.arange(members.shape[1])]
    if rule == "vote":
        if several:
            return np.where((share[:, None, None] * (members > 0)).sum(axis=0) > 0.5, 1e9, -1e9)
        ballots = np.zeros(members.shape[1:])
        for one, weight in zip(members, share, strict=True):
            ballots[np.arange(len(ballots)), one.argmax(axis=1)] += weight
        return np.where(np.arange(ballots.shape[1]) == ballots.argmax(axis=1)[:, None], 0.0, -1e9)
    at = t if rule == "mean_probs_at_t" else 1.0
    if several:
        return at * (log_mean(log_sigmoid(members / at), share) - log_mean(log_sigmoid(-members / at), share))
    return at * log_mean(log_softmax(members / at), share)


def calibration(confidence: np.ndarray, right: np.ndarray) -> float:
    """Guo et al. 2017, equation 3."""
    edges, total = np.arange(16) / 15, 0.0
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, 14)
    for one in range(15):
        inside = place == one
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return float(total)


def expected(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Every number of one model's logits."""
    if labels.ndim == 2:
        known, yes = labels >= 0, labels > 0
        wrong = ((logits > 0) != yes) & known
        chance = np.where(logits > 0, np.exp(log_sigmoid(logits)), np.exp(log_sigmoid(-logits)))
        losses = -np.where(yes, log_sigmoid(logits), log_sigmoid(-logits))
        confidence, right = chance[known], ~wrong[known]
        n = int(known.sum())
        found = {
            "labelled": int(known.any(axis=1).sum()), "decisions": n, "nll": losses[known].mean() if n else None,
            "wrong_samples": int(wrong.any(axis=1).sum()) if n else None, "top5": None,
            "class_errors": {f"c{c}": (int(wrong[:, c].sum()), int(known[:, c].sum())) for c in range(known.shape[1])},
            "yes_errors": {f"c{c}": (int((wrong & yes)[:, c].sum()), int(yes[:, c].sum())) for c in range(known.shape[1])},
        }  # fmt: skip
    else:
        kept, own = logits[labels >= 0], labels[labels >= 0]
        n, places = len(own), np.arange(len(own))
        first = kept.argmax(axis=1)  # of equals the first
        rank = np.argsort(-kept, axis=1, kind="stable")
        right, probs = first == own, np.exp(log_softmax(kept))
        confidence = probs.max(axis=1) if n else np.zeros(0)
        within = (rank[:, :5] == own[:, None]).any(axis=1)
        found = {
            "labelled": n, "decisions": n, "nll": -log_softmax(kept)[places, own].mean() if n else None,
            "wrong_samples": int((~right).sum()) if n else None,
            "top5": within.mean() if n and logits.shape[1] > 5 else None,
            "class_errors": {
                f"c{c}": (int((~right)[own == c].sum()), int((own == c).sum())) for c in range(logits.shape[1])
            },
            "yes_errors": {},
        }  # fmt: skip
    errors = int((~right).sum()) if n else None
    return found | {
        "top1": right.mean() if n else None, "errors": errors,
        "calibration_error": calibration(confidence, right) if n else None,
    }  # fmt: skip


def closeness(logits: np.ndarray, target: np.ndarray, t: float, several: bool) -> dict[str, float]:
    """Agreement and KL(target || logits) at a temperature."""
    own, target_t = logits / t, target / t
    if several:
        kl = sum(
            np.exp(log_sigmoid(s * target_t)) * (log_sigmoid(s * target_t) - log_sigmoid(s * own)) for s in (1, -1)
        )
        return {"agreement": ((logits > 0) == (target > 0)).mean(), "kl": np.asarray(kl).mean()}
    log_p = log_softmax(target_t)
    kl = (np.exp(log_p) * (log_p - log_softmax(own))).sum(axis=1)
    return {"agreement": (logits.argmax(axis=1) == target.argmax(axis=1)).mean(), "kl": kl.mean()}


def assert_same(found: Evaluation, wanted: dict[str, Any]) -> None:
    said = found.to_json()
    for name, value in wanted.items():
        if isinstance(value, float):
            assert said[name] == pytest.approx(value, **six_digits), name
        else:
            assert said[name] == value, name
    for value in (said[name] for name in ("top1", "nll", "calibration_error", "agreement", "kl")):
        assert value is None or np.isfinite(value)


# ------------------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    ("kind", "flavour"),
    [one if one[1] in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in SETS],
    ids=str,
)
def test_every_number_of_a_model_and_of_every_rule(kind: str, flavour: str) -> None:
    """On tensors: what is counted, over several batches, of the student and of the members under each rule."""
    world = made(kind, flavour)
    share, draws = np.asarray(WEIGHTS), np.random.default_rng(5).random(len(world.labels))
    names = [f"c{i}" for i in range(world.logits.shape[2])]

    def counted(own: torch.Tensor, target: torch.Tensor | None, t: float) -> Evaluation:
        sums = Sums(len(names), multi_label=world.several)
        for rows in torch.arange(len(own)).split(40):
            sums.add_labels(own[rows], torch.from_numpy(world.labels)[rows])
            if target is not None:
                sums.add_targets(own[rows], target[rows], t)
        return sums.result(len(own), 0.0, t, names)

    student, own = torch.from_numpy(world.logits[:, -1]), expected(world.student, world.labels)
    members = [torch.from_numpy(world.logits[:, m]) for m in range(MEMBERS)]
    for rule in COMBINE_RULES:
        for t in (4.0, 1.0):
            link = "sigmoid" if world.several else "softmax"
            made_of = {"weights": WEIGHTS, "temperature": t, "link": link, "draws": torch.from_numpy(draws)}
            target = combine(members, rule, **made_of)
            wanted = combined(world.members, rule, share, t, world.several, draws)
            near = closeness(world.student, wanted, t, world.several)
            assert_same(counted(student, target, t), own | near)
        if rule != "vote":  # which has no likelihood
            assert_same(counted(target, None, 1.0), expected(wanted, world.labels))


def evaluated(tmp_path: Path, world: World) -> None:
    """Through the whole product: dump, then eval of the student beside the cache and of the cache, under each rule."""
    labels = world.labels if not world.several else np.where(world.labels < 0, np.nan, world.labels)
    np.savez(tmp_path / "given.npz", logits=world.logits, labels=labels)
    pieces, out = WORLDS / "given_logits.py", str(tmp_path / "cache")
    data = f"{pieces}:given?path={tmp_path / 'given.npz'}"
    names = [f"m{m}" for m in range(MEMBERS)]
    teachers = tuple(f"{pieces}:pick?index={m}&name={name}" for m, name in enumerate(names))
    given = {"data": data, "threads": 1, "device": "cpu"}
    dump.run(DumpConfig(teacher=teachers, out=out, codec="float32", **given), quiet=True)
    cache = open_cache(out, quiet=True)
    targets = cache.join(measure.open_transfer_set(data)).gather_samples(
        np.arange(len(world.labels)), np.zeros(len(world.labels), np.int64)
    )
    draws = targets._draws(0).numpy()
    chosen = tuple(f"{name}={weight}" for name, weight in zip(names, WEIGHTS, strict=True))
    share, several = np.asarray(WEIGHTS), world.several
    for number, rule in enumerate(COMBINE_RULES):
        t = (1.0, 4.0)[number % 2]
        how = {"combine": rule, "members": chosen, "batch_size": 7, **given}
        wanted = combined(world.members, rule, share, t, several, draws)
        config = EvalConfig(cache=out, temperature=t, **how)
        found = measure.run(f"{pieces}:pick?index={MEMBERS}", config, quiet=True)
        near = closeness(world.student, wanted, t, several)
        assert_same(found, expected(world.student, world.labels) | near)
        alone = combined(world.members, rule, share, 1.0, several, draws)
        said = expected(alone, world.labels)
        said |= {"nll": None, "calibration_error": None} if rule == "vote" else {}
        assert_same(measure.run(out, EvalConfig(**how), quiet=True), said)


@pytest.mark.parametrize(
    ("kind", "flavour"), [pytest.param("single", "ties", marks=pytest.mark.slow), ("several", "missing")], ids=str
)
def test_every_number_of_an_evaluation(kind: str, flavour: str, tmp_path: Path) -> None:
    evaluated(tmp_path, made(kind, flavour))


@pytest.mark.whole
@pytest.mark.parametrize(("kind", "flavour"), SETS, ids=str)
def test_every_number_of_every_evaluation(kind: str, flavour: str, tmp_path: Path) -> None:
    evaluated(tmp_path, made(kind, flavour))


@pytest.mark.parametrize(("kind", "flavour"), [("single", "missing"), ("several", "missing")], ids=str)
def test_a_runs_metrics_and_a_recipes_scores_are_the_same_numbers(kind: str, flavour: str, tmp_path: Path) -> None:
    world = made(kind, flavour)
    unknown = np.where(world.labels < 0, np.nan, world.labels) if world.several else world.labels
    np.savez(tmp_path / "given.npz", logits=world.logits, labels=unknown)
    pieces, out = WORLDS / "given_logits.py", tmp_path / "run"
    data = f"{pieces}:given?path={tmp_path / 'given.npz'}"
    settings = {"data": data, "eval_data": data, "threads": 1, "device": "cpu", "epochs": 2, "lr": 0.1, "out": str(out)}
    result = train.run(TrainConfig(student=f"{pieces}:pick?index={MEMBERS}", loss=("ce",), **settings), quiet=True)
    (scale,) = load_file(out / "student.safetensors").values()  # the only number of this student: all logits times it
    logits = (torch.from_numpy(world.logits[:, -1]) * scale).double().numpy()
    wanted = expected(logits, world.labels)
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    told = {"eval_top1": "top1", "eval_nll": "nll", "eval_errors": "errors"}
    told |= {"eval_wrong_samples": "wrong_samples"} if world.several else {}
    assert {name for name in row if name.startswith("eval")} == set(told) and scale.item() != 1.0
    for name, number in told.items():
        assert row[name] == pytest.approx(wanted[number], **six_digits)
    assert result.evaluation is not None
    scores = steps._scores(result.evaluation)
    assert scores["errors"] == wanted["errors"] and scores["top1"] == pytest.approx(100 * wanted["top1"], **six_digits)
    assert scores["class_errors"] == {name: errors for name, (errors, _) in wanted["class_errors"].items()}


@pytest.mark.slow
@needs("sklearn", "demo")
@pytest.mark.parametrize("flavour", ["plain", "ties", "saturated", "same", "two classes", "six", "many", "wrong"])
def test_scikit_learn_says_the_same(flavour: str) -> None:
    from sklearn import metrics

    for kind in ("single", "several"):
        world = made(kind, flavour)
        sums = Sums(world.logits.shape[2], multi_label=world.several)
        sums.add_labels(torch.from_numpy(world.logits[:, -1]), torch.from_numpy(world.labels))
        names = [f"c{i}" for i in range(world.logits.shape[2])]
        found = sums.result(len(world.labels), 0.0, 1.0, names)
        z = world.student
        if kind == "single":
            probs, every = np.exp(log_softmax(z)), np.arange(len(names))
            assert found.top1 == pytest.approx(metrics.accuracy_score(world.labels, probs.argmax(axis=1)), **six_digits)
            if flavour != "saturated":  # whose probabilities it clips
                nll = metrics.log_loss(world.labels, probs, labels=every)
                assert found.nll == pytest.approx(nll, **six_digits)
            table = metrics.confusion_matrix(world.labels, z.argmax(axis=1), labels=every)
            assert list(found.class_errors.values()) == [
                (int(row.sum() - row[c]), int(row.sum())) for c, row in enumerate(table)
            ]
            continue
        assert found.top1 == pytest.approx(1 - metrics.hamming_loss(world.labels, z > 0), **six_digits)
        exact = metrics.accuracy_score(world.labels, z > 0)
        assert found.wrong_samples == round((1 - exact) * len(z))
        for c, ((tn, fp), (fn, tp)) in enumerate(metrics.multilabel_confusion_matrix(world.labels, z > 0)):
            assert found.class_errors[f"c{c}"] == (fp + fn, tn + fp + fn + tp)
            assert found.yes_errors[f"c{c}"] == (fn, fn + tp)

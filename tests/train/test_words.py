"""Students of words: parity with the live teacher word by word, masks, pieces, rules, metrics, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_world import Outcome, joined, relative, trained
from torch import Tensor
from training import run_with, stopped_after
from words_cache import (
    COUNT,
    NAMES,
    SEEDS,
    STUDENT,
    WORLD,
    World,
    listed_words,
    live_teacher,
    made_world,
    sentences,
    write_cache,
)  # fmt: skip

import softcache
from softcache import dump
from softcache.cache.statistics import MemberStatistics
from softcache.config import DumpConfig, EvalConfig, TrainConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import (
    CacheError,
    ContentMismatchError,
    LabelMismatchError,
    LossError,
    SoftcacheError,
    TrainingError,
)
from softcache.evaluate import measure
from softcache.losses import LOSSES
from softcache.losses.ctkd import Ctkd
from softcache.models import load_model
from softcache.spec import load_user_file
from softcache.targets.positions import BatchPositions
from softcache.train import flow
from softcache.train.batches import _class_warnings
from softcache.train.metrics import score_of

STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made_world(tmp_path_factory.mktemp("words"))


# ----------------------------------------------------------------------------------------------- parity with the live teacher


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(dim=1)


def at(z: Tensor, t: float) -> Tensor:
    return (z / t).log_softmax(dim=1)


def even(z: Tensor) -> Tensor:
    return (z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-7)


def rows_of_labels(rows: Tensor, y: Tensor) -> Tensor:
    return rows[y >= 0].sum() / max(1, int((y >= 0).sum()))


def dkd(s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    own, values = F.one_hot(y.clamp(min=0), s.shape[1]).bool(), []
    for logits in (s, z):
        others = at(logits, 4.0).masked_fill(own, -torch.inf)
        rest = others.logsumexp(dim=1, keepdim=True)
        first = at(logits, 4.0)[own][:, None]
        values.append((torch.cat([first, rest], 1), (others - rest).masked_fill(own, 0.0)))
    (q2, q), (p2, p) = values
    inside = ((p.exp() * (p - q)).masked_fill(own, 0.0)).sum(dim=1)
    return 16 * rows_of_labels(kl(p2, q2) + 8 * inside, y)


def wsld(s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    own = y.clamp(min=0)
    student, teacher = (F.cross_entropy(one, own, reduction="none").detach() for one in (s, z))
    weights = 1 - (-student / (teacher + 1e-7)).exp()
    return -16 * rows_of_labels(weights * (at(z, 4.0).exp() * at(s, 4.0)).sum(dim=1), y)


def shifted(s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    changed = z.clone()
    for row, label in enumerate(y.tolist()):
        first = int(z[row].argmax())
        if label >= 0:
            changed[row, first], changed[row, label] = z[row, label], z[row, first]
    return 16 * kl(at(changed, 4.0), at(s, 4.0)).mean()


def virtual(s: Tensor, y: Tensor) -> Tensor:
    p = torch.full_like(s, np.log(0.01 / (s.shape[1] - 1))).scatter(1, y.clamp(min=0)[:, None], np.log(0.99))
    return 400 * rows_of_labels(kl(at(p, 20.0), at(s, 20.0)), y)


def correlated(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    return (x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def dist(s: Tensor, z: Tensor) -> Tensor:
    q, p = at(s, 4.0).exp(), at(z, 4.0).exp()
    return 16 * (2 - correlated(q, p).mean() - correlated(q.T, p.T).mean())


def gram(s: Tensor, z: Tensor, *, classes: bool) -> Tensor:
    q, p = at(s, 4.0).exp(), at(z, 4.0).exp()
    q, p = (q.T, p.T) if classes else (q, p)
    return (q @ q.T - p @ p.T).square().sum() / len(q)


def jsd(s: Tensor, z: Tensor) -> Tensor:
    q, p = at(s, 1.0), at(z, 1.0)
    m = (0.5 * (q.exp() + p.exp())).log()
    return (0.5 * kl(p, m) + 0.5 * kl(q, m)).mean()


def skew(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, (0.1 * p.exp() + 0.9 * q.exp()).log()).mean()


def of_labels(s: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    target = (1 - smoothing) * F.one_hot(y.clamp(min=0), s.shape[1]) + smoothing / s.shape[1]
    return rows_of_labels(-(target * at(s, 1.0)).sum(dim=1), y)


# of the student's and the teacher's words with a record, or of the student's and the labels of all words
OF_TEACHER: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda s, z, y: 16 * kl(at(z, 4.0), at(s, 4.0)).mean(),
    "kd:temperature=2,standardized=true": lambda s, z, y: 4 * kl(at(even(z), 2.0), at(even(s), 2.0)).mean(),
    "soft_ce": lambda s, z, y: -16 * (at(z, 4.0).exp() * at(s, 4.0)).sum(dim=1).mean(),
    "reverse_kl": lambda s, z, y: kl(at(s, 1.0), at(z, 1.0)).mean(),
    "jsd": lambda s, z, y: jsd(s, z),
    "skew_kl": lambda s, z, y: skew(at(z, 1.0), at(s, 1.0)),
    "skew_reverse_kl": lambda s, z, y: skew(at(s, 1.0), at(z, 1.0)),
    "tvd": lambda s, z, y: (at(s, 1.0).exp() - at(z, 1.0).exp()).abs().sum(dim=1).mean() / 2,
    "mse_logits": lambda s, z, y: (s - z).square().mean(),
    "bce": lambda s, z, y: -(z.sigmoid() * F.logsigmoid(s) + (-z).sigmoid() * F.logsigmoid(-s)).mean(),
    "hard": lambda s, z, y: -at(s, 1.0).gather(1, z.argmax(dim=1)[:, None]).mean(),
    "dkd": dkd,
    "wsld": wsld,
    "shifted_kd": shifted,
    "dist": lambda s, z, y: dist(s, z),
    "batch_correlation": lambda s, z, y: gram(s, z, classes=False),
    "class_correlation": lambda s, z, y: gram(s, z, classes=True),
}
# of log-probabilities (words, k + 1) of the teacher and the student at T = 3
OF_BUCKETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd_lower_bound": lambda p, q: 9 * kl(p, q).mean(),
    "reverse_kl_lower_bound": lambda p, q: 9 * kl(q, p).mean(),
    "jsd_lower_bound": lambda p, q: 9 * jsd(q, p),
    "skew_kl_lower_bound": lambda p, q: 9 * skew(p, q),
    "skew_reverse_kl_lower_bound": lambda p, q: 9 * skew(q, p),
    "tvd_lower_bound": lambda p, q: 3 * (p.exp() - q.exp()).abs().sum(dim=1).mean() / 2,
}
OF_LABELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": of_labels,
    "ce:smoothing=0.2": lambda s, y: of_labels(s, y, 0.2),
    "tf_virtual": virtual,
}


@dataclass(frozen=True)
class Live:
    """What a step saw: weights and momentum before and after, and which sentences."""

    before: dict[str, Tensor]
    optimizer: dict[str, Any]
    index: np.ndarray
    value: float
    after: dict[str, Tensor]


def steps_of(config: TrainConfig) -> list[Live]:
    found: list[Live] = []

    def copied(module: Any) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    def noted(prepared: Any, live: Any, loaded: Any, *rest: Any) -> dict[str, Tensor]:
        net, optimizer = prepared.model.net, live.trained.optimizer
        before, state = copied(net), json_like(optimizer.state_dict())
        values = flow.one_step(prepared, live, loaded, *rest)
        found.append(Live(before, state, loaded.index, values["loss"].item(), copied(net)))
        return values

    run_with(config, step=noted)
    return found


def json_like(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {name: json_like(value) for name, value in state.items()}
    return [json_like(value) for value in state] if isinstance(state, list) else state


@dataclass(frozen=True)
class Words:
    """What a batch of sentences is, written out here: the places of the words with a record, their teachers, the labels."""

    items: list[Any]
    recorded: list[int]
    teacher: dict[str, Tensor]
    labels: Tensor


@cache
def asked(data: str, member: str) -> list[Tensor]:
    """What a live teacher says of each sentence."""
    return live_teacher(member, [item for item, _ in sentences_of(data)])


@cache
def sentences_of(data: str) -> list[Any]:
    transfer_set = open_transfer_set(data)
    return [transfer_set[i] for i in range(len(transfer_set))]


def words_of(data: str, index: Sequence[int], members: Sequence[str], every: int) -> Words:
    items, recorded, start = [sentences_of(data)[i][0] for i in index], [], 0
    for words in items:
        recorded += [start + place for place in listed_words(len(words), every)]
        start += len(words)
    labels = [sentences_of(data)[i][1].tolist() for i in index]
    teacher = {name: torch.cat([asked(data, name)[i] for i in index])[recorded] for name in members}
    return Words(items, recorded, teacher, torch.tensor([one for row in labels for one in row]))


def live_value(loss: str, student: Tensor, words: Words, *, shift: int = 0) -> Tensor:
    """The loss of the words with a record, or of those `shift` behind them."""
    if loss in OF_LABELS:
        return OF_LABELS[loss](student, words.labels.roll(shift))
    places = (torch.tensor(words.recorded) + shift) % len(student)
    (teacher,) = words.teacher.values()
    return OF_TEACHER[loss](student[places], teacher, words.labels[places])


def check_twenty_steps(config: TrainConfig, losses: Sequence[str], every: int) -> float:
    """Each step from the same weights and momentum comes to the same value and the same weights; the least that a shift does."""
    steps = steps_of(config)
    assert len(steps) == STEPS
    network = load_user_file(WORLD).tagger(len(NAMES), 7, double=True)
    least = np.inf
    for step in steps:
        network.load_state_dict(step.before)
        optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=config.momentum)
        optimizer.load_state_dict(step.optimizer)
        words = words_of(config.data, step.index, ("a",), every)
        student = network(words.items)
        value = torch.stack([live_value(loss, student, words) for loss in losses]).sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert step.value == pytest.approx(value.item(), rel=1e-6, abs=1e-9)
        moved, wanted = (
            torch.cat([(one[name] - step.before[name]).flatten() for name in step.before])
            for one in (step.after, network.state_dict())
        )
        assert float((moved - wanted).norm()) <= 1e-5 * float(wanted.norm())
        with torch.no_grad():
            other = torch.stack([live_value(loss, student.detach(), words, shift=1) for loss in losses]).sum()
        least = min(least, abs(other.item() / value.item() - 1))
    return float(least)


TRIED = [
    *((loss, "one") for loss in (*OF_TEACHER, *OF_LABELS)),
    *((loss, "second") for loss in ("kd", "dkd", "dist", "ce")),
]
QUICK = [("kd", "one"), ("dkd", "second")]


@pytest.mark.parametrize(
    ("loss", "cache"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in TRIED]
)
def test_twenty_steps_are_those_of_the_live_teacher_in_float64(
    world: World, tmp_path: Path, loss: str, cache: str
) -> None:
    """Word by word, though every second word alone may have a record; a mask that is one word off gives other numbers."""
    config = world.config(tmp_path / "run", loss, cache=cache, epochs=4, lr=0.01 if "correlation" in loss else 0.05)
    shifted_by = check_twenty_steps(config, [loss], 1 if cache == "one" else 2)
    assert (
        shifted_by > 1e-5 or loss == "class_correlation"
    )  # which relates classes over the batch, and no word to a word


def test_soft_targets_of_some_words_and_labels_of_all_count_each_by_its_own_words(world: World, tmp_path: Path) -> None:
    """kd is a mean over the words in the cache, ce over all that have a label."""
    config = world.config(tmp_path / "run", "kd", "ce", "dkd:weight=1", cache="second", epochs=4)
    assert check_twenty_steps(config, ["kd", "ce", "dkd"], 2) > 1e-4


def test_every_loss_on_logits_and_labels_is_tried_beside_the_live_teacher() -> None:
    tried = {loss.partition(":")[0] for loss in (*OF_TEACHER, *OF_LABELS)}
    plain = {name for name, loss in LOSSES.items() if not loss.has_features}
    assert plain - tried == {"ctkd", *OF_BUCKETS}  # which follow, for they take more than logits


def test_a_temperature_that_is_learned_goes_word_by_word(world: World, tmp_path: Path) -> None:
    """Each step is kd at the temperature of then, which rises on the loss that the student descends."""
    config, levels = world.config(tmp_path / "run", "ctkd", cache="second", epochs=4, lr=0.01), []
    forward = Ctkd.forward

    def noted(self: Ctkd, *given: Any, **how: Any) -> Tensor:
        levels.append(float(self.level.detach()))
        return forward(self, *given, **how)

    with mock.patch.object(Ctkd, "forward", noted):
        steps = steps_of(config)
    levels = levels[-STEPS:]  # those before them looked whether a step will work
    network, speed = load_user_file(WORLD).tagger(len(NAMES), 7, double=True), 0.0
    for number, step in enumerate(steps):
        network.load_state_dict(step.before)
        words = words_of(world.data, step.index, ("a",), 2)
        student, level = network(words.items)[words.recorded], torch.tensor(levels[number], dtype=torch.float64)
        temperature = 1 + 20 * level.requires_grad_().sigmoid()
        value = (
            temperature**2 * kl(*((z / temperature).log_softmax(dim=1) for z in (words.teacher["a"], student))).mean()
        )
        assert step.value == pytest.approx(value.item(), rel=1e-6)
        value.backward()
        assert level.grad is not None
        speed = 0.9 * speed - float(level.grad)
        if number + 1 < STEPS:
            assert levels[number + 1] - levels[number] == pytest.approx(-0.01 * speed, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        ("kd_lower_bound", 2),
        ("kd_lower_bound", len(NAMES) - 1),
        *(pytest.param(loss, 2, marks=pytest.mark.slow) for loss in OF_BUCKETS if loss != "kd_lower_bound"),
    ],
)
def test_the_largest_logits_of_each_word_teach_by_k_classes_and_the_rest(
    world: World, tmp_path: Path, loss: str, kept: int
) -> None:
    """Of a cache that keeps some classes of each word, and the sum of the others."""
    made = DumpConfig(
        data=world.data, teacher=(f"{WORLD}:tagger?seed={SEEDS['a']}&scale=8&name=a",), out=str(tmp_path / "cache"),
        codec=f"topk:k={kept}", allow_code=True, device="cpu", threads=1, workers=0,
    )  # fmt: skip
    dump.run(made, quiet=True)
    config = world.config(tmp_path / "run", f"{loss}:temperature=3", cache=None, epochs=4)
    steps = steps_of(replace(config, cache=str(tmp_path / "cache")))
    assert len(steps) == STEPS
    network, apart = load_user_file(WORLD).tagger(len(NAMES), 7, double=True), []
    for step in steps:
        network.load_state_dict(step.before)
        words = words_of(world.data, step.index, ("a",), 1)
        with torch.no_grad():
            student = network(words.items)
        values = []
        for shift in (0, 1):
            z = words.teacher["a"].roll(shift, 0)
            first = z.topk(kept, dim=1).indices
            p, q = ((one / 3).softmax(dim=1) for one in (z, student))
            ends = [torch.cat([of := one.gather(1, first), 1 - of.sum(dim=1, keepdim=True)], dim=1) for one in (p, q)]
            values.append(float(OF_BUCKETS[loss](ends[0].log(), ends[1].log())))
        assert step.value == pytest.approx(values[0], rel=2e-3)  # logits are kept in float16
        apart.append(abs(values[1] / values[0] - 1))
    assert np.median(apart) > 1e-2


def test_a_mask_that_is_one_word_off_is_seen_in_value_and_gradient(world: World, tmp_path: Path) -> None:
    right = trained(world.config(tmp_path / "right", "kd", "ce", cache="second"))
    among = BatchPositions.among
    with mock.patch.object(BatchPositions, "among", lambda self, counts: (among(self, counts) + 1) % int(counts.sum())):
        wrong = trained(
            world.config(tmp_path / "wrong", "kd", "ce", cache="second"), [one.before for one in right.steps]
        )
    for one, other in zip(right.steps, wrong.steps, strict=True):
        assert one.values["ce"] == other.values["ce"]
        assert relative(other.values["kd"], one.values["kd"]) > 1e-3
        assert relative(joined(other.gradients), joined(one.gradients)) > 1e-3


# -------------------------------------------------------------------------------------------- pieces: sums over a global count


def apart(found: Outcome, wanted: Outcome) -> float:
    """The largest relative difference of any step's values and gradients."""
    pairs = [*zip(found.steps, wanted.steps, strict=True)]
    values = [relative(one.values[name], other.values[name]) for one, other in pairs for name in other.values]
    return max(values + [relative(joined(one.gradients), joined(other.gradients)) for one, other in pairs])


@pytest.mark.parametrize(
    ("pieces", "cache"),
    [(3, "second"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((2, "one"), (8, "one"), (8, "second")))],
)
def test_a_batch_in_pieces_is_the_whole_batch_whatever_the_lengths_of_its_sentences(
    world: World, tmp_path: Path, pieces: int, cache: str
) -> None:
    """Pieces of one sentence too, of which two have no words; the gradient is whole before it is clipped."""
    losses = ("kd", "ce", "dkd:weight=0.5", "mse_logits", "tf_virtual:weight=0.01")
    config = world.config(tmp_path / "whole", *losses, cache=cache, clip_norm=0.5)
    whole = trained(config)
    parts = replace(config, out=str(tmp_path / "parts"), accumulate=pieces)
    assert apart(trained(parts, [one.before for one in whole.steps]), whole) < 1e-9


def test_a_mean_of_means_would_be_another(world: World, tmp_path: Path) -> None:
    """The mean over sentences of their means is not the mean over words."""
    step = trained(world.config(tmp_path / "run", "kd")).steps[0]
    (first, *_) = steps_of(world.config(tmp_path / "index", "kd"))
    words = words_of(world.data, first.index, ("a",), 1)
    network = load_user_file(WORLD).tagger(len(NAMES), 7, double=True)
    with torch.no_grad():
        rows = 16 * kl(at(words.teacher["a"], 4.0), at(network(words.items), 4.0))
    each = [one.mean() for one in rows.split([len(item) for item in words.items]) if len(one)]
    assert step.values["kd"] == pytest.approx(rows.mean().item(), rel=1e-6)
    assert abs(torch.stack(each).mean().item() / rows.mean().item() - 1) > 1e-3


# ----------------------------------------------------------------------------------------- rules, stages, schedules, settings


@pytest.mark.parametrize("rule", ["mean_logits", "mean_probs_at_t", "mean_probs", "vote", "draw"])
def test_members_combine_word_by_word_and_a_sentence_draws_one(world: World, tmp_path: Path, rule: str) -> None:
    config = world.config(tmp_path / "run", "soft_ce:temperature=2", cache="three", combine=rule, seed=3)
    cache = softcache.open(world.caches["three"], quiet=True)
    network = load_user_file(WORLD).tagger(len(NAMES), 7, double=True)
    drawn: set[int] = set()
    for step in steps_of(config):
        network.load_state_dict(step.before)
        words = words_of(world.data, step.index, tuple(SEEDS), 1)
        members = torch.stack(list(words.teacher.values()))  # (3, P, C)
        tempered = (members / 2).softmax(dim=2)
        if rule == "mean_logits":
            p = (members.mean(dim=0) / 2).softmax(dim=1)
        elif rule == "mean_probs_at_t":
            p = tempered.mean(dim=0)
        elif rule == "mean_probs":
            p = (members.softmax(dim=2).mean(dim=0).log() / 2).softmax(dim=1)
        elif rule == "vote":
            votes = F.one_hot(members.argmax(dim=2), len(NAMES)).sum(dim=0).numpy()
            p = F.one_hot(torch.from_numpy(votes.argmax(axis=1)), len(NAMES)).double()
        else:
            draws = cache.gather(step.index.astype(np.int64), np.zeros(len(step.index), np.int64))._draws(3)
            taken = [min(int(3 * draw), 2) for draw in draws.tolist()]
            drawn |= set(taken)
            sentence = np.repeat(np.arange(len(step.index)), [len(item) for item in words.items])
            p = tempered[[taken[i] for i in sentence], np.arange(len(sentence))]
        with torch.no_grad():
            wanted = -4 * (p * at(network(words.items), 2.0)).sum(dim=1).mean()
        assert step.value == pytest.approx(wanted.item(), rel=1e-6)
    assert drawn == ({0, 1, 2} if rule == "draw" else set())


def test_stages_schedules_weighted_classes_and_an_average_go_word_by_word(world: World, tmp_path: Path) -> None:
    weights = tmp_path / "weights.tsv"
    weights.write_text("".join(f"{name}\t{number + 0.5}\n" for number, name in enumerate(NAMES)))
    losses = (
        "kd:temperature=linear(8, 2),weight=linear(1, 0)",
        f"ce:class_weights={weights},weight=linear(0, 1)",
        "ctkd",
    )
    config = world.config(
        tmp_path / "run", *losses, epochs=2, ema=0.5, eval_data=world.data, keep="best",
        stage=("epochs=1", "epochs=1 lr=0.01"), accumulate=3,
    )  # fmt: skip
    result = flow.run(config, quiet=True)
    assert [row["stage"] for row in result.metrics] == [0, 1] and result.metrics[0]["kd.temperature"] > 2
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    positions = open_transfer_set(world.data).positions
    assert positions is not None
    assert (about["positions"], about["labelled_positions"]) == (
        len(positions.labels),
        int((positions.labels >= 0).sum()),
    )


def test_balanced_classes_are_weighed_by_their_words(world: World, tmp_path: Path) -> None:
    first = steps_of(world.config(tmp_path / "run", "ce:class_weights=balanced", cache=None))[0]
    words, transfer_set = words_of(world.data, first.index, (), 1), open_transfer_set(world.data)
    assert transfer_set.positions is not None
    labels = transfer_set.positions.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(NAMES))
    weights = torch.from_numpy(counts.sum() / (len(NAMES) * counts))
    network = load_user_file(WORLD).tagger(len(NAMES), 7, double=True)
    known = words.labels >= 0
    with torch.no_grad():
        rows = -at(network(words.items), 1.0)[known].gather(1, words.labels[known][:, None])[:, 0]
    wanted = (weights[words.labels[known]] * rows).sum() / int(known.sum())
    assert first.value == pytest.approx(wanted.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------------ evaluation


def test_an_evaluation_counts_words_and_compares_them_with_the_cache(world: World, tmp_path: Path) -> None:
    flow.run(world.config(tmp_path / "run", "kd", "ce"), quiet=True)
    for name, every in (("one", 1), ("second", 2)):
        evaluated = EvalConfig(data=world.data, cache=world.caches[name], temperature=2.0)
        found = measure.run(f"{STUDENT}@{tmp_path}/run", evaluated, quiet=True)
        words = words_of(world.data, range(COUNT), ("a",), every)
        network = load_model(f"{STUDENT}@{tmp_path}/run", num_classes=len(NAMES))
        with torch.no_grad():
            student = network(words.items)
        known, said = words.labels >= 0, student.argmax(dim=1)
        assert (found.samples, found.positions, found.labelled) == (COUNT, len(words.labels), int(known.sum()))
        assert found.top1 == pytest.approx((said == words.labels)[known].double().mean().item())
        assert found.nll == pytest.approx(F.cross_entropy(student[known], words.labels[known]).item(), rel=1e-6)
        assert found.agreement == pytest.approx(
            (said[words.recorded] == words.teacher["a"].argmax(dim=1)).double().mean().item()
        )
        wanted = kl(at(words.teacher["a"], 2.0), at(student[words.recorded], 2.0)).mean()
        assert found.kl == pytest.approx(wanted.item(), rel=1e-5)
        assert found.span_f1 is not None and found.to_json()["span_f1"] == found.span_f1


def test_a_cache_of_words_is_measured_like_a_model(world: World) -> None:
    for name, every in (("one", 1), ("second", 2)):
        found = measure.run(world.caches[name], EvalConfig(data=world.data), quiet=True)
        words = words_of(world.data, range(COUNT), ("a",), every)
        labels, said = words.labels[words.recorded], words.teacher["a"].argmax(dim=1)
        assert (found.positions, found.labelled) == (len(labels), int((labels >= 0).sum()))
        assert found.top1 == pytest.approx((said == labels)[labels >= 0].double().mean().item())


def test_the_epoch_with_the_best_spans_is_kept_where_tags_mark_spans(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run", "kd", "ce", epochs=5, eval_data=world.data, keep="best", lr=0.5)
    result = flow.run(config, quiet=True)
    scores = [row["eval_span_f1"] for row in result.metrics]
    assert result.kept_epoch == int(np.argmax(scores)) and result.evaluation is not None
    assert result.evaluation.span_f1 == pytest.approx(max(scores))


# -------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("cache", "losses", "settings", "error", "match"),
    [
        ("one", ("crd",), {}, LossError, r"loss 'crd' remembers each sample"),
        ("one", ("at",), {}, LossError, "loss 'at' compares layers once for each sample"),
        ("one", ("hint",), {}, LossError, "loss 'hint' needs a feature of the teacher"),
        (
            "with a whole one", ("kd",), {}, CacheError,
            r"member 'whole' of the cache has one answer for each sample, and a one for each .* of 'words'.*\n.*--members a",
        ),
        ("with a whole one", ("kd",), {"members": ("whole",)}, CacheError, "are words, and no member of the cache answers"),
    ],
    ids=["memory", "layers", "hint", "two kinds", "none of words"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(
    world: World,
    tmp_path: Path,
    cache: str,
    losses: tuple[str, ...],
    settings: Any,
    error: type[SoftcacheError],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        flow.run(world.config(tmp_path / "run", *losses, cache=cache, **settings), quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_sentences_none_of_which_has_a_word_are_refused(world: World, tmp_path: Path, which: str) -> None:
    (tmp_path / "s.jsonl").write_text('{"words": [], "tags": []}\n' * 3)
    empty = {which: world.data.replace(str(world.path), str(tmp_path))}
    with pytest.raises(SoftcacheError, match="none of its 3 samples has a word"):
        flow.run(world.config(tmp_path / "run", "ce", cache=None, **empty), quiet=True)


def test_a_member_that_is_wrong_about_words_is_told_of_with_words(world: World) -> None:
    found = softcache.open(world.caches["with a whole one"])
    wrong = MemberStatistics(records=200, labelled=200, correct=1)
    found.manifest.statistics.update({"a": wrong, "whole": wrong})
    told = list(_class_warnings(open_transfer_set(world.data), found))
    assert len(told) == 2 and "of 200 labelled words" in told[0] and "labelled samples" in told[1]


def test_one_member_of_a_cache_of_two_kinds_is_learned_from(world: World, tmp_path: Path) -> None:
    both = flow.run(world.config(tmp_path / "a", "kd", cache="with a whole one", members=("a",)), quiet=True)
    alone = flow.run(world.config(tmp_path / "one", "kd"), quiet=True)
    assert both.metrics[0]["kd"] == alone.metrics[0]["kd"]


def test_a_text_that_is_cut_into_other_words_is_refused_with_the_samples_name(world: World, tmp_path: Path) -> None:
    """Whatever else is looked at: every sample's number of words is compared."""
    lines = (world.path / "s.jsonl").read_text().splitlines()
    cut = [
        line if number != 7 else re.sub(r'\["|\[null', lambda at: f'["O", {at[0][1:]}', line)
        for number, line in enumerate(lines)
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(cut) + "\n")
    data = world.data.replace(str(world.path), str(tmp_path))
    with pytest.raises(
        ContentMismatchError, match=r"1 of 40 samples have another number of words .* asked about: .*0*7 \("
    ):
        flow.run(world.config(tmp_path / "run", "kd", data=data), quiet=True)
    with pytest.raises(ContentMismatchError, match=r"hold something else than the teacher saw: .*0*7"):
        measure.run(world.caches["one"], EvalConfig(data=data), quiet=True)


def test_labels_of_words_that_differ_are_refused_or_counted(world: World, tmp_path: Path) -> None:
    text = (world.path / "s.jsonl").read_text()
    (tmp_path / "s.jsonl").write_text(text.replace('"B-LOC"', '"B-PER"', 3))
    data = world.data.replace(str(world.path), str(tmp_path))
    with pytest.raises(
        LabelMismatchError, match=r"3 labels differ from the cache's: .*position \d+ \(data set 1, cache 0\)"
    ):
        flow.run(world.config(tmp_path / "run", "kd", "ce", data=data), quiet=True)
    flow.run(world.config(tmp_path / "run", "kd", "ce", data=data, labels="dataset"), quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["labels_changed"] == 3


def test_words_without_a_label_learn_from_soft_targets_alone(world: World, tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.jsonl", count=12, unlabelled=1.0)
    cache = write_cache(tmp_path / "cache", data, labels=False)
    config = world.config(tmp_path / "run", "kd", data=data)
    assert "kd" in flow.run(replace(config, cache=cache), quiet=True).metrics[0]
    with pytest.raises(LossError, match=r"loss 'ce' needs labels, and no sample of .* has one"):
        flow.run(world.config(tmp_path / "ce", "ce", data=data, cache=None), quiet=True)


@pytest.mark.parametrize(
    ("data", "student", "match"),
    [
        (
            "synthetic:words?count=8",
            "softcache:textcnn",
            "gives one answer for each sample, and in .* each word has a label",
        ),
        (
            "synthetic:texts?count=8",
            "softcache:tagger",
            "gives an answer for each word, and the samples of .* are no words",
        ),
    ],
)
def test_a_student_answers_about_what_has_labels(tmp_path: Path, data: str, student: str, match: str) -> None:
    config = TrainConfig(data=data, student=student, epochs=1, out=str(tmp_path / "run"), threads=1, workers=0)
    with pytest.raises(SoftcacheError, match=match):
        flow.run(config, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["tagger?width=8&embedding=8&layers=2", "encoder_tagger?width=8&heads=2&hidden=8"])
def test_our_own_taggers_learn_in_pieces_and_with_sentences_of_no_words(
    world: World, tmp_path: Path, student: str
) -> None:
    config = world.config(tmp_path / "whole", "kd", "ce", student=f"softcache:{student}&dropout=0")
    whole = trained(config)
    pieces = replace(config, out=str(tmp_path / "parts"), accumulate=8, eval_data=world.data)
    parts = trained(pieces, [one.before for one in whole.steps])
    assert apart(parts, whole) < 1e-5
    assert parts.metrics[0]["eval_span_f1"] > 0


def test_an_epoch_is_judged_by_its_spans_where_tags_mark_some() -> None:
    assert score_of({"eval_top1": 0.9, "eval_span_f1": 0.5}) == 0.5
    assert score_of({"eval_top1": 0.9, "eval_span_f1": None}) == 0.9
    assert score_of({"eval_top1": 0.9}) == 0.9


def test_a_run_does_not_go_on_with_other_labels_of_words(world: World, tmp_path: Path) -> None:
    text = (world.path / "s.jsonl").read_text()
    (tmp_path / "s.jsonl").write_text(text)
    data = world.data.replace(str(world.path), str(tmp_path))
    config = world.config(tmp_path / "run", "ce", cache=None, data=data, epochs=2)
    with stopped_after(1), pytest.raises(KeyboardInterrupt):
        flow.run(config, quiet=True)
    (tmp_path / "s.jsonl").write_text(text.replace('"B-LOC"', '"B-PER"', 1))
    with pytest.raises(TrainingError, match="began with other samples, labels"):
        flow.run(config, quiet=True)
    (tmp_path / "s.jsonl").write_text(text)
    whole = flow.run(replace(config, out=str(tmp_path / "whole")), quiet=True)
    assert [row["ce"] for row in flow.run(config, quiet=True).metrics] == [row["ce"] for row in whole.metrics]

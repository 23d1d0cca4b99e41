"""Parity: at every step of training, loss and gradient from the cache are the live teacher's, within the stated bounds.

The live side is written out here in float64: it renders nothing from the cache, runs the teachers on the pixels that the
student sees, combines them by the documented formulas and takes the textbook losses. Both students have the same weights
before each step. `pytest tests/test_parity.py -rP` shows the worst ratios of difference to bound.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QuickDump
from torch import Tensor

from softcache.data.join import batches
from softcache.data.loading import ViewedSet, epoch_order, load_batches
from softcache.data.transfer_set import open_transfer_set
from softcache.losses.schedules import Moment
from softcache.models import load_model
from softcache.spec import load_user_file
from softcache.targets.cache import Cache
from softcache.train import objective
from softcache.train import terms as terms_module

STEPS, BATCH, SEED = 50, 16, 11
MEMBERS = {"a": 1, "b": 2, "c": 3}  # name -> seed of its network
EQUAL, WEIGHTED = {"a": 1, "b": 1}, {"a": 5, "b": 3, "c": 2}  # whole numbers: a tie of votes is a tie
ARITHMETIC = 1e-4  # what float32 may move a logit by, between a batch at dump and another batch now


# --- the live side ---------------------------------------------------------------------------------------------------


def live_combined(
    logits: Mapping[str, Tensor], rule: str, weights: Mapping[str, int], temperature: float, link: str, draws: Tensor
) -> Tensor:
    """The soft target of an ensemble at T, (B, C) float64 probabilities; for `logits`-losses see `live_logits`."""
    share = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    soften = torch.sigmoid if link == "sigmoid" else (lambda z: z.softmax(dim=1))
    if rule == "mean_probs_at_t":
        return sum_of(share[name] * soften(logits[name] / temperature) for name in share)
    if rule == "mean_probs":  # mixed at 1, tempered afterwards
        mixed = sum_of(share[name] * soften(logits[name]) for name in share)
        level = mixed.log() - (1 - mixed).log() if link == "sigmoid" else mixed.log()
        return soften(level / temperature)
    if rule == "vote":
        if link == "sigmoid":
            yes = sum_of(weights[name] * (logits[name] > 0).double() for name in weights)
            return (2 * yes > sum(weights.values())).double()
        ballots = {name: F.one_hot(logits[name].argmax(dim=1), logits[name].shape[1]) for name in weights}
        votes = sum_of(weights[name] * ballots[name] for name in weights).numpy()
        return F.one_hot(torch.from_numpy(votes.argmax(axis=1)), votes.shape[1]).double()  # the first of equals
    return soften(live_logits(logits, rule, weights, draws) / temperature)


def live_logits(logits: Mapping[str, Tensor], rule: str, weights: Mapping[str, int], draws: Tensor) -> Tensor:
    """(B, C) float64 logits of the two rules that keep the members' level."""
    total, names = sum(weights.values()), list(weights)
    if rule == "mean_logits":
        return sum_of(weights[name] / total * logits[name] for name in names)
    assert rule == "draw"
    ends = np.cumsum([weights[name] for name in names]) / total
    chosen = [int(np.flatnonzero(u < ends)[0]) for u in draws.tolist()]
    return torch.stack([logits[names[m]][row] for row, m in enumerate(chosen)])


def sum_of(terms: Any) -> Tensor:
    total: Tensor = sum(terms)
    return total


def live_draws(keys: list[str], views: np.ndarray) -> Tensor:
    """(B,) in [0, 1): the upper 53 bits of Philox4x64-10 with key (seed, BLAKE2b-64 of `member#0`), counter (id, view, 0, 0)."""

    def hash64(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    numbers = []
    for key, view in zip(keys, views.tolist(), strict=True):
        counter = (hash64(key) | view << 64) - 1  # NumPy counts up before it draws
        word = np.random.Philox(key=SEED | hash64("member#0") << 64, counter=counter % 2**256).random_raw()
        numbers.append((word >> 11) / 2**53)
    return torch.tensor(numbers, dtype=torch.float64)


def live_loss(name: str, student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The textbook form in float64; `target` holds probabilities at T, for mse_logits logits."""
    if name == "mse_logits":
        return ((student - target) ** 2).mean()
    if name == "bce":
        yes, no = F.logsigmoid(student / temperature), F.logsigmoid(-student / temperature)
        return temperature**2 * -(target * yes + (1 - target) * no).mean()
    log_q = (student / temperature).log_softmax(dim=1)
    cross = -(target * log_q).sum(dim=1)
    entropy = -torch.special.xlogy(target, target).sum(dim=1)
    return temperature**2 * (cross - entropy if name == "kd" else cross).mean()


# --- one walk, both sides --------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What both sides found in one step; rows are those that are compared."""

    cached_loss: float
    live_loss: float
    cached_gradient: Tensor  # of all weights, flat
    live_gradient: Tensor
    cached_pull: Tensor  # (B, C) gradient with respect to the student's logits
    live_pull: Tensor
    student: Tensor  # (B, C) logits
    target: Tensor  # (B, C) live teacher: probabilities, for mse_logits logits
    eps: Tensor  # (B,) bound on what the codec moved the combined logits
    left_out: int  # rows whose vote hangs on less than the codec's error


def survives(logits: Mapping[str, Tensor], eps: Mapping[str, Tensor], link: str) -> Tensor:
    """(B,) bool: every member's vote stays what it is when its logits move by eps."""
    kept = torch.ones(len(next(iter(logits.values()))), dtype=torch.bool)
    for name, z in logits.items():
        room = eps[name][:, None] + ARITHMETIC
        if link == "sigmoid":
            kept &= (z.abs() > room).all(dim=1)
        else:
            first, second = z.topk(2, dim=1).values.T
            kept &= first - second > 2 * room[:, 0]
    return kept


def walk(
    cache: Cache, data: str, toy: Path, loss: str, rule: str, weights: Mapping[str, int], level: float = 0.0
) -> list[Step]:
    """STEPS steps of one student from the cache, as train makes them, each beside the live teachers'."""
    transfer_set = open_transfer_set(data)
    joined = cache.join(transfer_set)
    terms = terms_module.parse_terms([loss], has_cache=True)
    (term,) = terms
    teacher = terms_module.CachedTeacher(cache, rule, {name: float(weight) for name, weight in weights.items()}, SEED)
    terms_module.check_term(teacher, term)
    lesson = objective.Objective(terms, teacher=teacher)
    temperature = 1.0 if term.temperature is None else term.temperature.at(Moment())
    link = "sigmoid" if term.name == "bce" else "softmax"
    networks = {name: load_user_file(toy).network(4, (8, 8), MEMBERS[name], level=level).eval() for name in weights}

    torch.manual_seed(3)
    student = load_model("softcache:mlp?hidden=12", num_classes=4, input_shape=(8, 8))
    beside = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    viewed = ViewedSet(transfer_set, cache.policy, [student.input.collate, np.stack])
    steps: list[Step] = []
    epoch = 0
    while len(steps) < STEPS:  # whole epochs
        order = epoch_order(len(transfer_set), SEED, epoch)
        for batch in load_batches(viewed, batches(order, epoch % cache.num_views, BATCH)):
            inputs, pixels = batch.inputs
            with torch.no_grad():
                images = torch.from_numpy(pixels)[:, None].float() / 255
                live = {name: network(images).double() for name, network in networks.items()}
            rows = joined.rows[batch.index].astype(np.int64)
            eps = {name: torch.from_numpy(cache.eps(name, rows, batch.views)).double() for name in weights}
            kept = survives(live, eps, link) if rule == "vote" else torch.ones(len(rows), dtype=torch.bool)
            index, views, live = batch.index[kept], batch.views[kept], {name: z[kept] for name, z in live.items()}
            eps = {name: e[kept] for name, e in eps.items()}

            beside.load_state_dict(student.state_dict())
            targets = joined.gather_samples(index, views, members=list(weights))
            logits = student(inputs)[kept]
            logits.retain_grad()
            given = objective.Given(objective.Labels(torch.zeros(len(index))), targets)
            cached = lesson.total(lesson(logits, {}, given, Moment()), Moment())
            optimizer.zero_grad()
            cached.backward()

            draws = live_draws([transfer_set.keys[int(i)] for i in index], views)
            if term.name == "mse_logits":
                target = live_logits(live, rule, weights, draws)
            else:
                target = live_combined(live, rule, weights, temperature, link, draws)
            other = beside(inputs)[kept]
            other.retain_grad()
            expected = live_loss(term.name, other.double(), target, temperature)
            beside.zero_grad()
            expected.backward()

            steps.append(
                Step(
                    cached.item(),
                    expected.item(),
                    flat_gradient(student),
                    flat_gradient(beside),
                    of(logits.grad),
                    of(other.grad),
                    other.detach().double(),
                    target,
                    combined_eps(rule, link, eps, weights),
                    int((~kept).sum()),
                )
            )
            optimizer.step()
        epoch += 1
    return steps


def flat_gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([of(p.grad).flatten() for p in model.parameters()])


def of(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.double()


def combined_eps(rule: str, link: str, eps: Mapping[str, Tensor], weights: Mapping[str, int]) -> Tensor:
    """(B,) bound on what member errors of eps move the combined logits by, up to a level that softmax does not see.

    A mean of logits moves by the mean of the errors, a drawn member by its own. In a mean of softmax probabilities a
    member's log-probabilities move by its error and its normaliser's: twice. A mean of sigmoids moves by the largest error:
    its derivatives with respect to the members' logits are positive and sum to E[p (1 - p)] / (E p (1 - E p)) <= 1.
    A vote that survives does not move.
    """
    if rule == "vote":
        return torch.zeros_like(next(iter(eps.values())))
    if rule == "mean_logits":
        return sum_of(weights[name] * e for name, e in eps.items()) / sum(weights.values())
    largest = torch.stack(list(eps.values())).amax(dim=0)
    return 2 * largest if rule.startswith("mean_probs") and link == "softmax" else largest


# --- the bounds ------------------------------------------------------------------------------------------------------


def loss_room(name: str, step: Step, temperature: float) -> float:
    """How far the codec may move the loss: the bounds of the design, each row with its own eps, averaged."""
    eps, s = step.eps[:, None], step.student
    if name == "mse_logits":
        return (2 * eps * (s - step.target).abs() + eps**2).mean().item()
    if name == "bce":  # a sigmoid at T moves by at most eps / 4T, and the loss is linear in it with slope T s
        return (eps * s.abs() / 4).mean().item()
    spread = lambda z: z.amax(dim=1) - z.amin(dim=1)  # noqa: E731
    if name == "soft_ce":  # sum |p - p'| <= eps / T, and the loss is linear in p with slopes -T s
        return (step.eps * spread(s) / 2).mean().item()
    teacher = temperature * step.target.clamp(min=1e-300).log()  # its logits, up to a level
    return (step.eps * spread(teacher - s) / 2 + step.eps**2 / 2).mean().item()


PULL = {"kd": 1.0, "soft_ce": 1.0, "bce": 1 / 4, "mse_logits": 2.0}  # L1 per row of B x gradient, in eps


def check(steps: list[Step], name: str, temperature: float, codec: str, what: str) -> None:
    """Every step within its bounds; prints how much of them was used."""
    worst_loss = worst_gradient = 0.0
    for step in steps:
        difference = abs(step.cached_loss - step.live_loss)
        slack = 1e-5 * abs(step.live_loss) + 1e-7
        room = slack + (loss_room(name, step, temperature) if codec == "float16" else 0.0)
        worst_loss = max(worst_loss, difference / room)
        if codec == "float16":
            rows = len(step.live_pull)
            moved = (step.cached_pull - step.live_pull).abs().sum(dim=1) * rows
            allowed = PULL[name] * step.eps + 1e-5 * step.live_pull.abs().sum(dim=1) * rows + 1e-6
            worst_gradient = max(worst_gradient, (moved / allowed).max().item())
        else:
            moved_by = (step.cached_gradient - step.live_gradient).norm() / step.live_gradient.norm()
            worst_gradient = max(worst_gradient, moved_by.item() / 1e-5)
    left_out, compared = sum(s.left_out for s in steps), sum(len(s.student) for s in steps)
    print(
        f"{codec} {what}: {len(steps)} steps, worst difference / bound: loss {worst_loss:.3f}, "
        f"gradient {worst_gradient:.3f}; rows compared {compared}, votes too close to call {left_out}"
    )
    assert worst_loss <= 1
    assert worst_gradient <= 1
    assert left_out < compared / 5
    assert len({step.live_loss for step in steps}) == len(steps)  # the student moved
    if codec == "float16" and "vote" not in what:
        assert min(step.eps.max().item() for step in steps) > 1e-4  # there was an error to bound
        assert any(step.cached_loss != step.live_loss for step in steps)


CODECS = ("float32", "float16")


def dumped(quick_dump: QuickDump, toy: Path, data: str, codec: str, *, level: float = 0.0, **settings: Any) -> Cache:
    teachers = [f"{toy}:network?name={name}&seed={seed}&level={level}" for name, seed in MEMBERS.items()]
    return quick_dump(data, teachers, codec=codec, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("loss", "temperature"),
    [
        ("kd", 1.0),
        ("kd", 4.0),
        ("kd", 20.0),
        ("soft_ce", 1.0),
        ("soft_ce", 4.0),
        ("mse_logits", 1.0),
        ("bce", 1.0),
        ("bce", 4.0),
    ],
)
def test_one_teacher(loss: str, temperature: float, codec: str, quick_dump: QuickDump, toy: Path) -> None:
    data = f"{toy}:images?multi_label={loss == 'bce'}"
    cache = dumped(quick_dump, toy, data, codec)
    term = loss if loss == "mse_logits" else f"{loss}:temperature={temperature}"
    check(walk(cache, data, toy, term, "mean_logits", {"b": 1}), loss, temperature, codec, term)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_one_teacher_over_several_views(codec: str, quick_dump: QuickDump, toy: Path) -> None:
    data = f"{toy}:images"
    cache = dumped(quick_dump, toy, data, codec, policy=("crop_flip:padding=2",), views=3)
    steps = walk(cache, data, toy, "kd:temperature=4", "mean_logits", {"a": 1})
    check(steps, "kd", 4.0, codec, "kd:temperature=4 over 3 views")


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("weights", [EQUAL, WEIGHTED], ids=["two equal members", "three weighted members"])
@pytest.mark.parametrize(
    ("loss", "temperature", "rule"),
    [
        *(("kd", 4.0, rule) for rule in ("mean_logits", "mean_probs_at_t", "mean_probs", "vote", "draw")),
        *(("soft_ce", 2.0, rule) for rule in ("mean_logits", "mean_probs_at_t", "mean_probs", "vote", "draw")),
        *(("bce", 2.0, rule) for rule in ("mean_logits", "mean_probs_at_t", "mean_probs", "vote", "draw")),
        *(("mse_logits", 1.0, rule) for rule in ("mean_logits", "draw")),
    ],
)
def test_a_live_ensemble(
    loss: str,
    temperature: float,
    rule: str,
    weights: Mapping[str, int],
    codec: str,
    quick_dump: QuickDump,
    toy: Path,
) -> None:
    data = f"{toy}:images?multi_label={loss == 'bce'}"
    cache = dumped(quick_dump, toy, data, codec, policy=("shift",), views=2)
    term = loss if loss == "mse_logits" else f"{loss}:temperature={temperature}"
    what = f"{term} {rule} of {weights}"
    check(walk(cache, data, toy, term, rule, weights), loss, temperature, codec, what)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_votes_that_hang_on_the_codec_are_counted(codec: str, quick_dump: QuickDump, toy: Path) -> None:
    """Logits around 100 lose up to 1 / 32 in float16: some members then have no clear favourite, the others still agree."""
    data = f"{toy}:images?count=300"
    cache = dumped(quick_dump, toy, data, codec, level=100.0)
    steps = walk(cache, data, toy, "kd:temperature=4", "vote", WEIGHTED, level=100.0)
    check(steps, "kd", 4.0, codec, "kd:temperature=4 vote around 100")
    assert (sum(step.left_out for step in steps) > 0) == (codec == "float16")

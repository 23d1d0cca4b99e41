"""Every loss against a plain float64 formula, its gradient against the formula's own, and the terms a configuration makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.errors import ConfigError, LossError
from softcache.losses import INPUTS, LOSSES, LossTerm, bce, ce, kd, kd_lower_bound, make_term, mse_logits, soft_ce
from softcache.losses.schedules import Moment, Schedule

# ---------------------------------------------------------------------------------------------------- oracles, in float64


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def log1p_exp(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def kd_oracle(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    log_p, log_q = log_softmax(teacher / t), log_softmax(student / t)
    return float(t * t * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def soft_ce_oracle(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    return float(-t * t * (np.exp(log_softmax(teacher / t)) * log_softmax(student / t)).sum(axis=1).mean())


def mse_oracle(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(((student - teacher) ** 2).sum() / student.size)


def bce_oracle(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    p = sigmoid(teacher / t)  # -p log q - (1 - p) log(1 - q) with q = sigmoid(s / T)
    return float(t * t * (p * log1p_exp(-student / t) + (1 - p) * log1p_exp(student / t)).mean())


def ce_oracle(student: np.ndarray, labels: np.ndarray) -> float:
    if labels.ndim == 2:
        return float((labels * log1p_exp(-student) + (1 - labels) * log1p_exp(student)).mean())
    rows = np.flatnonzero(labels >= 0)
    return float(-log_softmax(student)[rows, labels[rows]].sum() / max(1, len(rows)))


ORACLES: dict[str, Callable[..., float]] = {
    "kd": kd_oracle,
    "soft_ce": soft_ce_oracle,
    "mse_logits": mse_oracle,
    "bce": bce_oracle,
    "ce": ce_oracle,
}
SIZES = [(1, 1), (1, 2), (5, 1), (7, 10), (3, 1000)]
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
# what takes two arguments; kd_lower_bound takes four, and has tests of its own
OF_ROWS = list(ORACLES)
AGAINST_TEACHER = [name for name in OF_ROWS if name != "ce"]
TEMPERED = [name for name in OF_ROWS if "temperature" in LOSSES[name].defaults]


def pair(batch: int, classes: int, *, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits in float64, with levels of their own."""
    rng = np.random.default_rng([seed, batch, classes])
    student, teacher = rng.normal(2.0, scale, (batch, classes)), rng.normal(-1.0, scale, (batch, classes))
    return torch.from_numpy(student), torch.from_numpy(teacher)


def settings(name: str) -> list[dict[str, float]]:
    return [{"temperature": t} for t in TEMPERATURES] if name in TEMPERED else [{}]


def target_of(name: str, batch: int, classes: int) -> Tensor:
    if name == "ce":
        return torch.from_numpy(np.random.default_rng([9, batch, classes]).integers(0, classes, batch))
    return pair(batch, classes)[1]


# ------------------------------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OF_ROWS)
def test_value_equals_the_formula(name: str, size: tuple[int, int]) -> None:
    student, target = pair(*size)[0], target_of(name, *size)
    for values in settings(name):
        wanted = ORACLES[name](student.numpy(), target.numpy(), *values.values())
        exact = LOSSES[name].function(student, target, **values)
        assert exact.dtype == torch.float64 and exact.shape == ()
        assert exact.item() == pytest.approx(wanted, rel=1e-12, abs=1e-13)
        single = target.float() if target.is_floating_point() else target
        rounded = LOSSES[name].function(student.float(), single, **values)
        assert rounded.dtype == torch.float32
        assert rounded.item() == pytest.approx(wanted, rel=2e-5, abs=2e-5)


def gradient(loss: Callable[..., Tensor], student: Tensor, target: Tensor, **values: float) -> np.ndarray:
    student = student.clone().requires_grad_()
    loss(student, target, **values).backward()
    assert student.grad is not None
    return student.grad.numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits))


@pytest.mark.parametrize("t", TEMPERATURES)
def test_gradients_are_those_of_the_formulas(t: float) -> None:
    student, teacher = pair(6, 10)
    s, z, batch, size = student.numpy(), teacher.numpy(), 6, 60
    difference = softmax(s / t) - softmax(z / t)
    tempered = {"temperature": t}
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-14}
    np.testing.assert_allclose(gradient(kd, student, teacher, **tempered), t * difference / batch, **close)
    np.testing.assert_allclose(gradient(soft_ce, student, teacher, **tempered), t * difference / batch, **close)
    wanted = t * (sigmoid(s / t) - sigmoid(z / t)) / size
    np.testing.assert_allclose(gradient(bce, student, teacher, **tempered), wanted, **close)
    np.testing.assert_allclose(gradient(mse_logits, student, teacher), 2 * (s - z) / size, **close)
    labels = torch.tensor([3, -1, 0, 9, -1, 3])
    one_hot = np.eye(10)[labels.numpy()] * (labels.numpy() >= 0)[:, None]
    wanted = (softmax(s) * (labels.numpy() >= 0)[:, None] - one_hot) / 4  # 4 of 6 rows are labelled
    np.testing.assert_allclose(gradient(ce, student, labels), wanted, **close)


@pytest.mark.parametrize("name", OF_ROWS)
def test_gradient_is_that_of_the_value(name: str) -> None:
    student, target = pair(3, 5)[0].requires_grad_(), target_of(name, 3, 5)
    for values in settings(name):
        assert torch.autograd.gradcheck(lambda s, v=values: LOSSES[name].function(s, target, **v), (student,))


def test_at_a_high_temperature_kd_becomes_the_squared_difference_of_centred_logits() -> None:
    student, teacher = pair(4, 10)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = (centred**2).sum(1).mean().item() / (2 * 10)  # Hinton et al. (2015), section 2.1
    assert kd(student, teacher, 1e4).item() == pytest.approx(limit, rel=1e-2)


def test_soft_ce_is_kd_plus_the_entropy_of_the_target() -> None:
    student, teacher = pair(6, 10)
    for t in TEMPERATURES:
        log_p = log_softmax(teacher.numpy() / t)
        entropy = -t * t * (np.exp(log_p) * log_p).sum(axis=1).mean()
        assert soft_ce(student, teacher, t).item() == pytest.approx(kd(student, teacher, t).item() + entropy, rel=1e-12)


def test_kd_is_not_symmetric_and_the_teacher_comes_second() -> None:
    student, teacher = pair(6, 10)
    forward, backward = kd(student, teacher, 1.0).item(), kd(teacher, student, 1.0).item()
    assert abs(forward - backward) > 0.01
    assert forward == pytest.approx(kd_oracle(student.numpy(), teacher.numpy(), 1.0), rel=1e-12)


@pytest.mark.parametrize("loss", [kd, mse_logits])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equal_student_and_teacher_cost_nothing(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    logits = pair(5, 10)[0].to(dtype).requires_grad_()
    value = loss(logits, logits.detach().clone())
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", TEMPERED)
def test_at_equality_the_gradient_vanishes_at_any_temperature(name: str) -> None:
    logits = pair(5, 10)[0]
    for t in TEMPERATURES:
        assert np.abs(gradient(LOSSES[name].function, logits, logits.clone(), temperature=t)).max() < 1e-15


@pytest.mark.parametrize("name", ["kd", "soft_ce"])
def test_softmax_losses_do_not_see_the_level(name: str) -> None:
    student, teacher = pair(5, 10)
    moved = LOSSES[name].function(student + 7.0, teacher - 3.0, 2.0)
    assert moved.item() == pytest.approx(LOSSES[name].function(student, teacher, 2.0).item(), rel=1e-12)
    assert not LOSSES[name].needs_level


@pytest.mark.parametrize("name", ["mse_logits", "bce"])
def test_losses_that_see_the_level_say_so(name: str) -> None:
    student, teacher = pair(5, 10)
    assert LOSSES[name].needs_level
    assert abs((LOSSES[name].function(student, teacher + 1) - LOSSES[name].function(student, teacher)).item()) > 0.01


# --------------------------------------------------------------------------------------------------------- kd_lower_bound


def classifier_of(teacher: Tensor, kept: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a top-k cache keeps of float64 rows, exactly: ids, logits, and the others' log-sum-exp at T."""
    logits, ids = teacher.topk(kept, dim=1)
    return ids, logits, (teacher / t).scatter(1, ids, -torch.inf).logsumexp(dim=1)


def lower_bound_oracle(student: np.ndarray, teacher: np.ndarray, kept: int, t: float) -> float:
    """Buckets summed class by class, as probabilities."""
    total = 0.0
    for s, z in zip(student, teacher, strict=True):
        p, q = softmax(z / t), softmax(s / t)
        order = np.argsort(-z)
        head, rest = order[:kept], order[kept:]
        pairs = [(p[c], q[c]) for c in head] + ([(p[rest].sum(), q[rest].sum())] if len(rest) else [])
        total += sum(a * math.log(a / b) for a, b in pairs if a > 0)
    return t * t * total / len(student)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("classes", "kept"), [(2, 1), (10, 3), (10, 9), (10, 10), (1000, 10)])
def test_lower_bound_is_the_kl_of_the_buckets_and_at_most_kd(classes: int, kept: int, t: float) -> None:
    student, teacher = pair(6, classes)
    value = kd_lower_bound(student, *classifier_of(teacher, kept, t), t)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(lower_bound_oracle(student.numpy(), teacher.numpy(), kept, t), rel=1e-10)
    whole = kd(student, teacher, t).item()
    assert 0 <= value.item() <= whole * (1 + 1e-12)
    if classes - kept > 1 and t >= 1:
        assert value.item() < 0.999 * whole  # something is hidden in the tail
    ids, logits, tail = classifier_of(teacher, kept, t)
    rounded = kd_lower_bound(student.float(), ids, logits.float(), tail.float(), t)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(value.item(), rel=2e-5, abs=2e-5)


def test_lower_bound_never_exceeds_kd_on_random_rows() -> None:
    for seed in range(200):
        student, teacher = pair(1, 20, seed=seed, scale=1 + seed % 7)
        for kept in (1, 5, 19):
            for t in (1.0, 4.0):
                bound = kd_lower_bound(student, *classifier_of(teacher, kept, t), t).item()
                assert bound <= kd(student, teacher, t).item() + 1e-12


@pytest.mark.parametrize("t", TEMPERATURES)
def test_lower_bound_is_kd_where_nothing_is_in_the_tail_or_both_spread_it_alike(t: float) -> None:
    student, teacher = pair(5, 8)
    exact: dict[str, Any] = {"rel": 1e-10, "abs": 1e-13}
    # every class kept; the tail's number does not matter then
    ids, logits, _ = classifier_of(teacher, 8, t)
    for tail in (-torch.inf, 0.0):
        value = kd_lower_bound(student, ids, logits, torch.full((5,), tail, dtype=torch.float64), t)
        assert value.item() == pytest.approx(kd(student, teacher, t).item(), **exact)
    # classes far below on both sides
    low = torch.full((5, 3), -1e5, dtype=torch.float64)
    wide_student, wide_teacher = torch.cat([student, low], 1), torch.cat([teacher, low], 1)
    value = kd_lower_bound(wide_student, *classifier_of(wide_teacher, 8, t), t)
    assert value.item() == pytest.approx(kd(student, teacher, t).item(), **exact)
    # the same proportions over the tail
    like = teacher.clone().scatter_(1, classifier_of(teacher, 3, t)[0], student[:, :3])
    value = kd_lower_bound(like, *classifier_of(teacher, 3, t), t)
    assert value.item() == pytest.approx(kd(like, teacher, t).item(), **exact)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_lower_bounds_gradient_is_that_of_its_buckets(t: float) -> None:
    """T (q - p) / B for a class of the head; for the rest q's share of it, times T (q_rest - p_rest) / B."""
    student, teacher = pair(4, 12)
    ids, logits, tail = classifier_of(teacher, 5, t)
    student = student.requires_grad_()
    kd_lower_bound(student, ids, logits, tail, t).backward()
    assert student.grad is not None
    p, q = softmax(teacher.numpy() / t), softmax(student.detach().numpy() / t)
    wanted = np.empty_like(p)
    for row in range(4):
        head = ids[row].numpy()
        rest = np.setdiff1d(np.arange(12), head)
        wanted[row, head] = t * (q - p)[row, head] / 4
        wanted[row, rest] = t * q[row, rest] / q[row, rest].sum() * (q[row, rest].sum() - p[row, rest].sum()) / 4
    np.testing.assert_allclose(student.grad.numpy(), wanted, rtol=1e-9, atol=1e-14)
    for kept in (1, 5, 12):
        parts = classifier_of(teacher, kept, t)
        assert torch.autograd.gradcheck(lambda s, parts=parts: kd_lower_bound(s, *parts, t), (student,))


def test_lower_bound_does_not_see_the_level() -> None:
    student, teacher = pair(5, 10)
    ids, logits, tail = classifier_of(teacher, 4, 2.0)
    moved = kd_lower_bound(student + 7.0, ids, logits - 3.0, tail - 1.5, 2.0)  # the tail's level is divided by T
    assert moved.item() == pytest.approx(kd_lower_bound(student, ids, logits, tail, 2.0).item(), rel=1e-12)
    assert not LOSSES["kd_lower_bound"].needs_level


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 0.0, 1.0]),
        ([1e4, -1e4, 0.0, 5.0], [1e4, -1e4, 0.0, 1.0]),
        ([0.0, 0.0, 0.0, 1e4], [9.0, 8.0, 0.0, -1e4]),
        ([50.0, 40.0, 0.0, 0.0], [50.0, 40.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1e9, -1e9]),
    ],
    ids=["far apart", "same peak", "all in the tail", "a rest of 1e-22", "nothing in the tail"],
)
def test_lower_bound_holds_at_extreme_logits(student: list[float], teacher: list[float], dtype: torch.dtype) -> None:
    s, z = torch.tensor([student], dtype=dtype), torch.tensor([teacher], dtype=torch.float64)
    for t in (1.0, 4.0):
        ids, logits, tail = (part.to(dtype) if part.is_floating_point() else part for part in classifier_of(z, 2, t))
        moved = s.clone().requires_grad_()
        value = kd_lower_bound(moved, ids, logits, tail, t)
        value.backward()
        assert moved.grad is not None and moved.grad.isfinite().all()
        log_p, log_q = log_softmax(z.numpy() / t)[0], log_softmax(s.double().numpy() / t)[0]
        head, rest = ids[0].numpy(), np.setdiff1d(np.arange(4), ids[0].numpy())
        pairs = [(log_p[c], log_q[c]) for c in head]
        pairs.append((np.logaddexp.reduce(log_p[rest]), np.logaddexp.reduce(log_q[rest])))
        wanted = t * t * sum(math.exp(a) * (a - b) for a, b in pairs)
        assert value.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_small_rest_is_not_rounded_away() -> None:
    """The student's rest is 1e-20 of the whole: 1 - (the head's share) would be zero in float32, its logarithm infinite."""
    student, teacher = torch.tensor([[50.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ids, logits, tail = torch.tensor([[0]]), torch.zeros(1, 1), (torch.zeros(1) + 3).log()
    rest = 50.0 - math.log(math.exp(0) + math.exp(1) + math.exp(2))
    wanted = 0.25 * math.log(0.25) + 0.75 * (math.log(0.75) + rest)
    assert kd_lower_bound(student, ids, logits, tail, 1.0).item() == pytest.approx(wanted, rel=1e-5)
    assert kd_lower_bound(student, ids, logits, tail, 1.0).item() <= kd(student, teacher, 1.0).item()


def test_a_teacher_with_nothing_in_its_tail_costs_no_nan() -> None:
    student = pair(3, 6)[0].requires_grad_()
    ids, tail = torch.arange(3).expand(3, 3), torch.full((3,), -torch.inf)
    value = kd_lower_bound(student, ids, torch.zeros(3, 3), tail, 2.0)
    value.backward()
    teacher = torch.cat([torch.zeros(3, 3), torch.full((3, 3), -1e9)], dim=1)
    assert value.item() == pytest.approx(kd(student, teacher, 2.0).item(), rel=1e-9)
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_lower_bound_of_half_types_is_computed_in_float32(half: torch.dtype) -> None:
    student, teacher = pair(8, 100)
    ids, logits, tail = classifier_of(teacher, 10, 4.0)
    value = kd_lower_bound(student.to(half), ids, logits.float(), tail.float(), 4.0)
    assert value.dtype == torch.float32
    wanted = lower_bound_oracle(student.to(half).double().numpy(), teacher.numpy(), 10, 4.0)
    assert value.item() == pytest.approx(wanted, rel=1e-5)


def test_lower_bound_as_a_term() -> None:
    term = make_term("kd_lower_bound", weight="0.5", temperature="2")
    assert term.weight.at(Moment()) == 0.5 and values_of(term) == {"temperature": 2.0}
    assert LOSSES["kd_lower_bound"].defaults == {"temperature": 4.0}
    student, teacher = pair(4, 10)
    value = term.loss.function(student, *classifier_of(teacher, 3, 2.0), **values_of(term))
    assert value.item() == pytest.approx(lower_bound_oracle(student.numpy(), teacher.numpy(), 3, 2.0), rel=1e-10)


@pytest.mark.parametrize("t", [0.0, -1.0])
def test_lower_bound_refuses_a_temperature_that_is_not_positive(t: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {t}"):
        kd_lower_bound(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2), t)


@pytest.mark.parametrize(
    ("ids", "logits", "tail"),
    [((4, 2), (4, 3), (4,)), ((3, 2), (3, 2), (4,)), ((4, 2), (4, 2), (3,)), ((4, 2), (4, 2), (4, 1))],
    ids=str,
)
def test_lower_bound_refuses_other_shapes(ids: tuple[int, ...], logits: tuple[int, ...], tail: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"student logits \(4, 10\).*must be \(B, C\), \(B, k\), \(B, k\) and \(B,\)"):
        kd_lower_bound(torch.zeros(4, 10), torch.zeros(ids, dtype=torch.int64), torch.zeros(logits), torch.zeros(tail))


# ----------------------------------------------------------------------------------------------------------- number types


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_ROWS)
def test_half_types_are_computed_in_float32(name: str, half: torch.dtype) -> None:
    """The value is the float32 one of the rounded logits, not something rounded again on the way."""
    student, target = pair(64, 100, scale=5.0)[0].to(half), target_of(name, 64, 100)
    target = target.to(half) if target.is_floating_point() else target
    for values in settings(name):
        value = LOSSES[name].function(student, target, **values)
        single = target.float() if target.is_floating_point() else target
        assert value.dtype == torch.float32
        assert value.item() == LOSSES[name].function(student.float(), single, **values).item()
        exact = target.double().numpy() if target.is_floating_point() else target.numpy()
        wanted = ORACLES[name](student.double().numpy(), exact, *values.values())
        assert value.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", AGAINST_TEACHER)
def test_the_students_type_decides_where_the_two_differ(name: str) -> None:
    student, teacher = pair(4, 10)
    loss = LOSSES[name].function
    assert loss(student, teacher.float()).dtype == torch.float64
    assert loss(student.float(), teacher).dtype == torch.float32
    assert loss(student.half(), teacher).dtype == torch.float32
    assert loss(student, teacher.float()).item() == loss(student, teacher.float().double()).item()


def test_multi_hot_labels_of_any_type() -> None:
    student = pair(4, 6)[0]
    hot = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (4, 6)))
    wanted = ce_oracle(student.numpy(), hot.numpy())
    for labels in (hot, hot.bool(), hot.float(), hot.to(torch.uint8)):
        assert ce(student, labels).item() == pytest.approx(wanted, rel=1e-12)
    assert ce(student.half(), hot.bool()).dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- extremes

BIG = 1e4
EXTREMES = {
    "far apart": ([[BIG, -BIG, 0.0]], [[-BIG, BIG, 0.0]]),
    "same peak": ([[BIG, -BIG, 0.0]], [[BIG, -BIG, 1.0]]),
    "all at the top": ([[BIG, BIG, BIG]], [[-BIG, -BIG, -BIG]]),
    "ties": ([[0.0, 0.0, 0.0]], [[5.0, 5.0, -5.0]]),
    "a vote": ([[1.0, 2.0, 3.0]], [[0.0, -1e9, -1e9]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("name", AGAINST_TEACHER)
def test_extreme_logits_give_finite_values_and_gradients(name: str, case: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor(rows, dtype=dtype) for rows in EXTREMES[case])
    for values in settings(name):
        wanted = ORACLES[name](student.double().numpy(), teacher.double().numpy(), *values.values())
        assert LOSSES[name].function(student, teacher, **values).item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert np.isfinite(gradient(LOSSES[name].function, student, teacher, **values)).all()


def test_one_class_leaves_softmax_losses_nothing_to_learn() -> None:
    student, teacher = pair(5, 1)
    assert kd(student, teacher).item() == 0.0
    assert soft_ce(student, teacher).item() == 0.0
    assert ce(student, torch.zeros(5, dtype=torch.int64)).item() == 0.0
    assert not gradient(kd, student, teacher).any()


def test_extreme_hard_labels() -> None:
    student = torch.tensor([[BIG, -BIG], [BIG, -BIG]])
    assert ce(student, torch.tensor([0, 1])).item() == pytest.approx(BIG)
    assert ce(student, torch.tensor([[1, 0], [0, 1]])).item() == pytest.approx(BIG / 2)


# ------------------------------------------------------------------------------------------------------------ hard labels


def test_ce_averages_over_labelled_rows_only() -> None:
    student = pair(6, 4)[0]
    labels = torch.tensor([-1, 2, -1, 0, 3, -1])
    labelled = labels >= 0
    assert ce(student, labels).item() == pytest.approx(ce(student[labelled], labels[labelled]).item(), rel=1e-14)
    assert ce(student, labels).item() == pytest.approx(ce_oracle(student.numpy(), labels.numpy()), rel=1e-12)
    assert not gradient(ce, student, labels)[~labelled.numpy()].any()


def test_ce_without_any_label_is_zero_with_a_zero_gradient() -> None:
    student = pair(3, 4)[0].requires_grad_()
    value = ce(student, torch.full((3,), -1))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None and not student.grad.any()


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", AGAINST_TEACHER)
@pytest.mark.parametrize("shape", [(4, 9), (5, 10), (10,), (1, 10), (4, 1)], ids=str)
def test_other_shapes_are_refused_with_both(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"differ in shape: \(4, 10\) vs .*same classes"):
        LOSSES[name].function(torch.zeros(4, 10), torch.zeros(shape))


@pytest.mark.parametrize("name", TEMPERED)
@pytest.mark.parametrize("t", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(name: str, t: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {t}"):
        LOSSES[name].function(torch.zeros(2, 3), torch.zeros(2, 3), t)


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(4, 9), ValueError),
        (torch.tensor([0, 1, 2, 10]), IndexError),
        (torch.tensor([0, 1, 2, -2]), IndexError),
    ],
    ids=["too few", "other classes", "class too large", "below -1"],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, fault: type[Exception]) -> None:
    with pytest.raises(fault):
        ce(torch.zeros(4, 10), labels)


# ------------------------------------------------------------------------------------------------------------------ terms


def values_of(term: LossTerm) -> dict[str, Any]:
    return {key: value.at(Moment()) if isinstance(value, Schedule) else value for key, value in term.settings.items()}


def test_make_term_turns_strings_into_numbers_and_fills_in_defaults() -> None:
    term = make_term("kd", weight="0.9", temperature="8", standardized="true")
    assert term.weight.at(Moment()) == 0.9 and values_of(term) == {"temperature": 8.0, "standardized": True}
    assert values_of(make_term("kd")) == {"temperature": 4.0, "standardized": False}
    assert make_term("kd").weight.at(Moment()) == 1.0
    assert make_term("ce").temperature is None and values_of(make_term("ce")) == {"smoothing": 0.0, "class_weights": ""}
    crd = make_term("crd", negatives="512", layer="avgpool", student="fc")
    assert crd.settings["negatives"] == 512 and crd.settings["nce_temperature"] == 0.07
    assert crd.placement == {"layer": "avgpool", "student": "fc"}


def test_a_scalar_of_a_term_may_be_a_schedule() -> None:
    term = make_term("kd", weight="linear(4, 1)", temperature="cosine(8, 2)")
    ends = [term.weight.at(Moment(epoch, 0, 10, 20)) for epoch in (0, 10, 20)]
    assert ends == [4.0, 2.5, 1.0]
    assert term.describe() == {
        "name": "kd", "weight": "linear(4, 1)", "temperature": "cosine(8, 2)", "standardized": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("kdd", {}, r"unknown loss 'kdd'\n.*did you mean 'kd' or 'dkd'.*softcache losses"),
        ("hinge", {}, r"unknown loss 'hinge'"),
        ("kd", {"temprature": 4}, r"loss 'kd' has no setting 'temprature'\n.*did you mean 'temperature'\?"),
        ("kd", {"wieght": 4}, r"no setting 'wieght'\n.*did you mean 'weight'"),
        ("kd", {"layer": "fc"}, "loss 'kd' has no setting 'layer'"),
        ("ce", {"temperature": 4}, "loss 'ce' has no setting 'temperature'"),
        ("mse_logits", {"temperature": 4}, "loss 'mse_logits' has no setting 'temperature'"),
        ("kd", {"temperature": "four"}, "loss 'kd': temperature: 'four' is neither a number nor a schedule"),
        ("kd", {"temperature": "linaer(4, 1)"}, r"neither a number nor a schedule\n.*did you mean 'linear'"),
        ("kd", {"temperature": "nan"}, "loss 'kd': temperature: 'nan' is not a finite number"),
        ("kd", {"weight": "inf"}, "loss 'kd': weight: 'inf' is not a finite number"),
        ("ce", {"weight": ""}, "loss 'ce': weight: '' is neither a number"),
        ("kd", {"temperature": 0}, "loss 'kd': temperature must be > 0, got 0"),
        ("kd", {"temperature": "linear(4, 0)"}, r"temperature must be > 0, got linear\(4, 0\)"),
        ("kd", {"temperature": "warmup(5, 4)"}, "temperature must be > 0"),
        ("bce", {"temperature": "-2"}, "loss 'bce': temperature must be > 0, got -2"),
        ("kd", {"standardized": "perhaps"}, "standardized: 'perhaps' is not true or false"),
        ("crd", {"negatives": "linear(8, 2)"}, "negatives: .* is not a whole number"),
        ("hint", {"adapter": "conv"}, "loss 'hint': unknown adapter 'conv'"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_a_term_that_makes_no_sense_is_refused(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises((LossError, ConfigError), match=message):
        make_term(name, **values)


def test_a_loss_names_its_needs_by_its_arguments() -> None:
    for name, loss in LOSSES.items():
        assert set(loss.inputs) <= set(INPUTS), name
        assert loss.over in ("samples", "labels", "batch") and loss.source
        assert loss.has_features == bool(loss.features)
        assert not loss.needs("labels") or loss.over == "labels" or name == "shifted_kd"
    assert LOSSES["dkd"].inputs == ("student_logits", "teacher_logits", "labels")
    assert LOSSES["crd"].sizes == ("student_shape", "teacher_shape", "num_samples", "sample_labels", "seed")
    assert LOSSES["ctkd"].is_scheduled("reversal") and not LOSSES["ctkd"].is_scheduled("highest")
    assert not LOSSES["kd"].is_scheduled("standardized")

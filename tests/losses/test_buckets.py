"""Losses over the k largest classes and all others together: the buckets summed as probabilities, and at most the whole rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.losses import LOSSES

Row = np.ndarray  # probabilities of the buckets of one sample


def kl(p: Row, q: Row) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def jsd(p: Row, q: Row, beta: float = 0.5) -> float:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew(p: Row, q: Row, alpha: float = 0.1) -> float:
    return kl(p, alpha * p + (1 - alpha) * q)


# of the teacher's p and the student's q; the power of T; further settings
ORACLES: dict[str, tuple[Callable[..., float], int, tuple[dict[str, float], ...]]] = {
    "kd_lower_bound": (kl, 2, ({},)),
    "reverse_kl_lower_bound": (lambda p, q: kl(q, p), 2, ({},)),
    "jsd_lower_bound": (jsd, 2, ({}, {"beta": 0.9})),
    "skew_kl_lower_bound": (skew, 2, ({}, {"alpha": 0.7})),
    "skew_reverse_kl_lower_bound": (lambda p, q, **how: skew(q, p, **how), 2, ({}, {"alpha": 0.7})),
    "tvd_lower_bound": (lambda p, q: float(np.abs(p - q).sum() / 2), 1, ({},)),
}
TEMPERATURES = [0.5, 1.0, 4.0]


def logits_of(rows: int, classes: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, rows, classes]).normal(seed, 3.0, (rows, classes)))


def kept(teacher: Tensor, k: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest: ids, logits, and the others' log-sum-exp at T."""
    logits, ids = teacher.topk(k, dim=1)
    return ids, logits, (teacher / t).scatter(1, ids, -torch.inf).logsumexp(dim=1)


def buckets(logits: Row, ids: Row, t: float) -> Row:
    powers = np.exp((logits - logits.max()) / t)
    powers /= powers.sum()
    return np.append(powers[ids], np.delete(powers, ids).sum())


def test_every_loss_that_takes_some_classes_has_an_oracle() -> None:
    assert ORACLES.keys() == {name for name, loss in LOSSES.items() if loss.needs("head_ids")}


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (12, 3), (12, 11), (12, 12)])
@pytest.mark.parametrize("name", ORACLES)
def test_the_value_is_that_of_the_buckets_and_at_most_that_of_the_rows(
    name: str, classes: int, k: int, t: float
) -> None:
    oracle, power, ways = ORACLES[name]
    student, teacher = logits_of(5, classes, 1), logits_of(5, classes, 2)
    given = kept(teacher, k, t)
    for how in ways:
        value = LOSSES[name].function(student, *given, t, **how)
        rows = zip(teacher.numpy(), student.numpy(), given[0].numpy(), strict=True)
        wanted = t**power * np.mean([oracle(buckets(z, ids, t), buckets(s, ids, t), **how) for z, s, ids in rows])
        assert value.dtype == torch.float64 and value.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        whole = LOSSES[name.removesuffix("_lower_bound")].function(student, teacher, temperature=t, **how).item()
        assert value.item() <= whole * (1 + 1e-12)
        assert (value.item() == pytest.approx(whole, rel=1e-9)) == (k >= classes - 1)
        single = LOSSES[name].function(student.float(), given[0], given[1].float(), given[2].float(), t, **how)
        assert single.dtype == torch.float32 and single.item() == pytest.approx(wanted, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    teacher = logits_of(3, 6, 2)
    for k in (2, 6):
        given = kept(teacher, k, 2.0)
        student = logits_of(3, 6, 1).requires_grad_()
        assert torch.autograd.gradcheck(lambda s, g=given: LOSSES[name].function(s, *g, 2.0), (student,))


@pytest.mark.parametrize("name", ORACLES)
def test_a_small_rest_is_summed_and_not_what_is_left_of_one(name: str) -> None:
    """The student's rest is 1e-20 of the whole, the teacher's three quarters."""
    student, ids, tail = torch.tensor([[50.0, 0.0, 1.0, 2.0]]), torch.tensor([[0]]), torch.tensor([3.0]).log()
    student.requires_grad_()
    value = LOSSES[name].function(student, ids, torch.zeros(1, 1), tail, 1.0)
    p, q = np.full(4, 0.25), np.exp(np.array([50.0, 0.0, 1.0, 2.0]) - 50)
    p, q = (np.array([one[0], one[1:].sum()]) for one in (p, q / q.sum()))
    assert value.item() == pytest.approx(ORACLES[name][0](p, q), rel=1e-5)
    value.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", [name for name in ORACLES if name != "reverse_kl_lower_bound"])
def test_a_teacher_with_nothing_in_its_tail_costs_no_nan(name: str) -> None:
    student = logits_of(3, 6, 1).float().requires_grad_()
    ids, tail = torch.arange(3).expand(3, 3), torch.full((3,), -torch.inf)
    value = LOSSES[name].function(student, ids, torch.zeros(3, 3), tail, 2.0)
    value.backward()
    teacher = torch.cat([torch.zeros(3, 3), torch.full((3, 3), -1e9)], dim=1)
    whole = LOSSES[name.removesuffix("_lower_bound")].function(student, teacher, temperature=2.0)
    assert value.item() <= whole.item() * (1 + 1e-6)
    assert student.grad is not None and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", ORACLES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    given: dict[str, Any] = {"head_ids": torch.zeros(4, 2, dtype=torch.int64), "head_logits": torch.zeros(4, 2)}
    given |= {"tail_logsumexp": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"student logits \(3, 10\).*must be \(B, C\), \(B, k\), \(B, k\) and \(B,\)"):
        LOSSES[name].function(torch.zeros(3, 10), **given)
    for t in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be > 0, got {t}"):
            LOSSES[name].function(torch.zeros(4, 10), **given, temperature=t)

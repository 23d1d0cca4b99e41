"""Rows of logits that a codec must hold or refuse, and the float64 arithmetic its promises are checked against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CLASSES = (10, 100, 1000, 21841, 32768, 70000, 151936)
TEMPERATURES = (1.0, 2.0, 4.0, 10.0, 20.0)
Maker = Callable[[np.random.Generator, int, int], np.ndarray]  # (generator, rows, classes) -> (rows, classes)


def _low_rank(rng: np.random.Generator, count: int, classes: int) -> np.ndarray:
    width = min(16, classes)
    return rng.normal(0, 1, (count, width)) @ rng.normal(0, 1, (width, classes)) + rng.normal(0, 0.1, (1, classes))


def _with_one(rows: np.ndarray, rng: np.random.Generator, value: float) -> np.ndarray:
    rows[np.arange(len(rows)), rng.integers(0, rows.shape[1], len(rows))] += value
    return rows


ROWS: dict[str, Maker] = {
    "normal": lambda rng, n, c: rng.normal(0, 4, (n, c)),
    "peaked": lambda rng, n, c: _with_one(rng.normal(0, 2, (n, c)), rng, 15.0),
    "heavy tails": lambda rng, n, c: np.clip(rng.standard_cauchy((n, c)), -6e4, 6e4),
    "low rank": _low_rank,
    "levels": lambda rng, n, c: rng.normal(0, 4, (n, c)) + rng.choice([-3e4, -1000, 50, 1000, 3e4], (n, 1)),
    "a level far away": lambda rng, n, c: rng.normal(0, 4, (n, c)) + rng.choice([-1e7, 1e6, 1e30], (n, 1)),
    "ties": lambda rng, n, c: rng.choice([-1.1, 0.3, 7.7], (n, c)),
    "all tied but one": lambda rng, n, c: _with_one(np.full((n, c), 0.1), rng, 9.0),
    "all tied but one, below": lambda rng, n, c: _with_one(np.full((n, c), 0.1), rng, -9.0),
    "constants": lambda rng, n, c: np.repeat(rng.normal(0, 10, (n, 1)), c, axis=1),
    "nearly constant": lambda rng, n, c: 1.0 + rng.integers(0, 3, (n, c)) * 2.0**-23,
    "zeros": lambda rng, n, c: np.zeros((n, c)),
    "minus zeros": lambda rng, n, c: np.full((n, c), -0.0),
    "zeros of both signs": lambda rng, n, c: np.where(rng.integers(0, 2, (n, c)), 0.0, -0.0),
    "sorted": lambda rng, n, c: np.sort(rng.normal(0, 4, (n, c)), axis=1),
    "evenly spaced": lambda rng, n, c: rng.permuted(np.tile(np.linspace(-8, 8, c), (n, 1)), axis=1),
    "huge range": lambda rng, n, c: rng.choice([-1, 1], (n, c)) * 10.0 ** rng.uniform(-40, 4.5, (n, c)),
    "largest of float16": lambda rng, n, c: rng.choice([-65504.0, 65504.0, 65519.99], (n, c)),
    "above float16": lambda rng, n, c: rng.normal(0, 1e6, (n, c)),
    "largest of float32": lambda rng, n, c: rng.choice([-1, 1], (n, c)) * np.finfo(np.float32).max,
    "range above float32": lambda rng, n, c: rng.uniform(-3.4e38, 3.4e38, (n, c)),
    "float16 denormals": lambda rng, n, c: rng.uniform(-(2.0**-14), 2.0**-14, (n, c)),
    "below float16": lambda rng, n, c: rng.uniform(-(2.0**-25), 2.0**-25, (n, c)),
    "float32 denormals": lambda rng, n, c: rng.uniform(-(2.0**-126), 2.0**-126, (n, c)),
    "one class far above": lambda rng, n, c: _with_one(rng.normal(0, 3, (n, c)), rng, 3e4),
    "one class far below": lambda rng, n, c: _with_one(rng.normal(0, 3, (n, c)), rng, -3e4),
    "one class too far below": lambda rng, n, c: _with_one(rng.normal(0, 3, (n, c)), rng, -1e9),
    "half way between": lambda rng, n, c: 1.0 + (2 * rng.integers(0, 1000, (n, c)) + 1) * 2.0**-11,
}


def given(kind: str, count: int, classes: int, *, seed: int = 0) -> Tensor:
    """(count, classes) float32 logits of one kind of ROWS; equal for equal arguments."""
    rng = np.random.default_rng([seed, count, classes, *kind.encode()])
    return torch.from_numpy(ROWS[kind](rng, count, classes).astype(np.float32))


def kl(given: Tensor, decoded: Tensor, temperature: float) -> np.ndarray:
    """(B,) float64 KL(softmax(given / T) || softmax(decoded / T)), exact to about 1e-10 of itself however small it is.

    With d = (decoded - given) / T and p the first softmax, KL = log E_p[exp(d - E_p[d])]; nothing large is subtracted.
    """
    x, y = given.double().numpy(), decoded.double().numpy()
    scaled = (x - x.max(axis=1, keepdims=True)) / temperature
    p = np.exp(scaled)
    p /= p.sum(axis=1, keepdims=True)
    d = (y - x) / temperature
    u = d - (p * d).sum(axis=1, keepdims=True)
    small = np.log1p((p * (np.expm1(np.clip(u, -1, 1)) - np.clip(u, -1, 1))).sum(axis=1))
    with np.errstate(divide="ignore"):
        shifted = np.log(p) + u
    peak = shifted.max(axis=1, keepdims=True)
    large = peak[:, 0] + np.log(np.exp(shifted - peak).sum(axis=1))
    return np.where(np.abs(u).max(axis=1) <= 1, small, large)

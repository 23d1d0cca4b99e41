"""Numbers of embeddings and values, each against a loop written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softcache.evaluate import neighbours as module


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def nearest(x: np.ndarray, i: int, count: int) -> list[int]:
    order = sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine(x[i], x[j]))
    return order[:count]


def test_neighbours_are_those_of_a_loop_whatever_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, teacher = drawn(40, 6), drawn(40, 9, seed=1)
    monkeypatch.setattr(module, "ROWS", 7)
    a, b = own.double().numpy(), teacher.double().numpy()
    assert [row.tolist() for row in module.nearest(own, 3)] == [nearest(a, i, 3) for i in range(40)]
    shared = [len(set(nearest(a, i, 10)) & set(nearest(b, i, 10))) / 10 for i in range(40)]
    assert module.shared_neighbours(own, teacher) == pytest.approx(np.mean(shared))
    labels = torch.arange(40) % 3
    right = [any(int(labels[j]) == int(labels[i]) for j in nearest(a, i, 5)) for i in range(40)]
    assert module.class_recall(own, labels, 5) == pytest.approx(np.mean(right))
    assert module.mean_cosine(own, drawn(40, 6, seed=2)) == pytest.approx(
        np.mean([cosine(x, y) for x, y in zip(a, drawn(40, 6, seed=2).double().numpy(), strict=True)])
    )


def test_rank_correlation_shares_the_ranks_of_ties() -> None:
    x, y = torch.tensor([1.0, 2.0, 2.0, 4.0, 9.0]), torch.tensor([2.0, 1.0, 3.0, 3.0, 3.0])
    rx, ry = np.array([0, 1.5, 1.5, 3, 4]), np.array([1, 0, 3, 3, 3])
    assert module.ranks(x).tolist() == rx.tolist() and module.ranks(y).tolist() == ry.tolist()
    assert module.spearman(x, y) == pytest.approx(np.corrcoef(rx, ry)[0, 1])
    assert module.spearman(x, -(x**3)) == pytest.approx(-1.0)
    assert np.isnan(module.spearman(x, torch.ones(5)))


def test_a_linear_probe_is_least_squares_on_the_other_half() -> None:
    labels = torch.arange(60) % 3
    values = torch.nn.functional.one_hot(labels, 3).float() @ drawn(3, 4) + 0.4 * drawn(60, 4, seed=3)
    half = np.array([(i // 3) % 2 for i in range(60)])
    x, truth, right = values.double().numpy(), np.eye(3)[labels.numpy()], 0
    for held in (0, 1):
        fit, ask = half != held, half == held
        mean, share = x[fit].mean(axis=0), truth[fit].mean(axis=0)
        gram = (x[fit] - mean).T @ (x[fit] - mean)
        gram += 1e-3 * np.trace(gram) / 4 * np.eye(4)
        weight = np.linalg.solve(gram, (x[fit] - mean).T @ (truth[fit] - share))
        right += int((((x[ask] - mean) @ weight + share).argmax(axis=1) == labels.numpy()[ask]).sum())
    assert module.linear_probe(values, labels, 3) == right / 60 > 0.6


def test_r_squared_and_mean_error_are_those_of_numpy_and_unknown_rows_are_left_out() -> None:
    own, truth = drawn(30, 2), drawn(30, 2, seed=4)
    truth[5, 1] = torch.nan
    found = module.of_values(own, truth, "")
    keep = [i for i in range(30) if i != 5]
    a, b = own.double().numpy()[keep], truth.double().numpy()[keep]
    assert found["r2"] == pytest.approx(
        np.mean(1 - ((a - b) ** 2).sum(axis=0) / ((b - b.mean(axis=0)) ** 2).sum(axis=0))
    )
    assert found["mean_error"] == pytest.approx(np.abs(a - b).mean())
    assert module.explained(truth[keep], truth[keep]).tolist() == [1.0, 1.0]

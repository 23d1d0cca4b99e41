"""How good embeddings and values are: by their own neighbours, by labels, and beside those of a teacher. All in float64."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10  # of the teacher, that are looked for among as many of the student
FEW = 5  # nearest ones, among which a sample of the same class is looked for
MOST = 10_000  # samples that are compared with one another, spread evenly: the time grows with their square
PAIRED = 1_000  # samples of whose pairs similarities are ranked
ROWS = 1024  # that are compared with all others at once
RIDGE = 1e-3  # of the mean variance of a number, in a linear probe


def unit_rows(values: Tensor) -> Tensor:
    """(N, D) float64, each row of length 1; a row of zeros stays."""
    rows = values.double()
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 0, rows / torch.where(length > 0, length, 1.0), 0.0)


def mean_cosine(own: Tensor, teacher: Tensor) -> float:
    """Mean over rows of the cosine between (N, D) and (N, D)."""
    return float((unit_rows(own) * unit_rows(teacher)).sum(dim=1).mean())


def nearest(values: Tensor, count: int) -> Tensor:
    """(N, count) int64: of each of (N, D) rows the others with the largest cosines, the nearest first; fewer where N is small."""
    rows = unit_rows(values)
    count, found = min(count, len(rows) - 1), []
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS] @ rows.T
        part[torch.arange(len(part)), torch.arange(first, first + len(part))] = -torch.inf  # not itself
        found.append(part.topk(count, dim=1).indices)
    return torch.cat(found)


def shared_neighbours(own: Tensor, teacher: Tensor) -> float:
    """recall@10: of the teacher's ten nearest the share that is among the student's ten nearest. The widths may differ."""
    a, b = nearest(own, NEIGHBOURS), nearest(teacher, NEIGHBOURS)
    return float((a[:, :, None] == b[:, None, :]).any(dim=1).double().mean())


def class_recall(values: Tensor, labels: Tensor, count: int) -> float:
    """Share of rows that have one of their own class among the `count` nearest others: recall@count."""
    found = labels[nearest(values, count)]
    return float((found == labels[:, None]).any(dim=1).double().mean())


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of (n,) and (n,), equal numbers sharing their mean rank; NaN where one of them is constant.

    Source: Spearman, "The Proof and Measurement of Association between Two Things" (1904).
    """
    a, b = (ranks(one.double()) for one in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else float("nan")


def ranks(values: Tensor) -> Tensor:
    """(n,) float64 ranks from 0 on; equal numbers share the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[place]


def similarity_spearman(own: Tensor, teacher: Tensor) -> float:
    """Rank correlation between the student's and the teacher's cosines, over all pairs of at most 1,000 rows spread evenly."""
    place = spread(len(own), PAIRED)
    a, b = (unit_rows(one[place]) for one in (own, teacher))
    above = torch.triu_indices(len(place), len(place), 1)
    return spearman((a @ a.T)[above[0], above[1]], (b @ b.T)[above[0], above[1]])


def spread(count: int, most: int) -> Tensor:
    """(n,) int64 places, at most so many, spread evenly over `count`."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most


def linear_probe(values: Tensor, labels: Tensor, num_classes: int) -> float:
    """Share of labelled rows that a linear map fitted on the other half of them classifies rightly.

    Least squares on one-hot labels with a small ridge, on numbers of mean 0: in closed form, so the same for everybody.
    The halves are every second row of each class.
    """
    half = halves_of(labels, num_classes)
    right = 0
    for held in (0, 1):
        fitted, asked = values[half != held].double(), values[half == held].double()
        mean, truth = fitted.mean(dim=0), torch.nn.functional.one_hot(labels[half != held], num_classes).double()
        centred, share = fitted - mean, truth.mean(dim=0)
        gram = centred.T @ centred
        ridge = RIDGE * float(gram.diagonal().mean()) or 1.0
        gram.diagonal().add_(ridge)
        weight = torch.linalg.solve(gram, centred.T @ (truth - share))
        right += int((((asked - mean) @ weight + share).argmax(dim=1) == labels[half == held]).sum())
    return right / len(labels)


def halves_of(labels: Tensor, num_classes: int) -> Tensor:
    """(n,) int64 0 or 1: every second row of each class."""
    half = torch.zeros(len(labels), dtype=torch.int64)
    for one in range(num_classes):
        place = (labels == one).nonzero()[:, 0]
        half[place] = torch.arange(len(place)) % 2
    return half


def explained(own: Tensor, truth: Tensor) -> Tensor:
    """(K,) R squared of (N, K) beside (N, K): 1 - squared error / squared distance from the mean; NaN where that is 0."""
    residual = (own.double() - truth.double()).square().sum(dim=0)
    total = (truth.double() - truth.double().mean(dim=0)).square().sum(dim=0)
    return torch.where(total > 0, 1 - residual / torch.where(total > 0, total, 1.0), torch.nan)


def of_embeddings(own: Tensor, labels: Tensor, num_classes: int, teacher: Tensor | None) -> dict[str, float]:
    """What is told of (N, D) embeddings.

    Args:
        labels: (N,) int64 class indices, -1 = none.
        num_classes: of the labels; 0: there are none.
        teacher: (N, D') of the same samples.
    """
    found: dict[str, float] = {}
    place = spread(len(own), MOST)
    if teacher is not None and len(own) > 1:
        if teacher.shape[1] == own.shape[1]:
            found["cosine"] = mean_cosine(own, teacher)
        found["recall_at_10"] = shared_neighbours(own[place], teacher[place])
        found["spearman"] = similarity_spearman(own, teacher)
    known = place[labels[place] >= 0]
    if num_classes > 1 and len(known) > 2:
        found["nearest_neighbour"] = class_recall(own[known], labels[known], 1)
        found["class_recall_at_5"] = class_recall(own[known], labels[known], FEW)
        found["linear_probe"] = linear_probe(own[known], labels[known], num_classes)
    return found


def of_values(own: Tensor, truth: Tensor, after: str) -> dict[str, float]:
    """What is told of (N, K) values beside others: means over the values.

    Args:
        after: what stands behind each name: "" or "_teacher".
    """
    known = truth.isfinite().all(dim=1)
    own, truth = own[known], truth[known]
    if len(own) < 2:
        return {}
    rank = [spearman(own[:, k], truth[:, k]) for k in range(own.shape[1])]
    return {
        f"r2{after}": float(explained(own, truth).mean()),
        f"spearman{after}": sum(rank) / len(rank),
        f"mean_error{after}": float((own.double() - truth.double()).abs().mean()),
    }

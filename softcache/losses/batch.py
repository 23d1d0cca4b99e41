"""Losses on the relations between the logits of a batch. They see the global batch: callers gather it over processes first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.losses.features import inner_products
from softcache.losses.logits import checked

EPS = 1e-8  # of DIST's authors: added to the product of the two norms


def dist(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """T**2 (beta (1 - mean correlation of rows) + gamma (1 - mean correlation of columns)) of the softmax outputs at T.

    A correlation is Pearson's, with 1e-8 added to the product of the two norms, as in the authors' code: columns of classes
    that hardly occur count for less, and on 1000 peaked classes the value moves by some 2e-3.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The authors use 4 on CIFAR and 1 on ImageNet.
        beta: weight of the rows (between classes).
        gamma: weight of the columns (within a class).

    Returns:
        Scalar in [0, 2 T**2 (beta + gamma)], without unit; zero at equality, but for that 1e-8. A row or column whose variance
        is nothing but rounding, on either side, has correlation 0 and no gradient (the authors: one of up to 1e8). A batch of
        one has no columns, so that this part is zero; so are both for one class. Ratio to the textbook form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST, 2022).
    """
    q, p = _probabilities(student_logits, teacher_logits, temperature)
    if q.shape[1] == 1:
        return 0.0 * q.sum()
    distance = beta * (1 - _correlations(q, p).mean())
    if q.shape[0] > 1:
        distance = distance + gamma * (1 - _correlations(q.T, p.T).mean())
    return temperature**2 * distance


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row of a with that of b: (n, m), (n, m) -> (n,)."""
    centred = [x - x.mean(dim=1, keepdim=True) for x in (a, b)]
    norms = [torch.linalg.vector_norm(x, dim=1) for x in centred]  # no gradient at zero
    rounding = 8 * torch.finfo(a.dtype).eps
    pairs = zip((a, b), norms, strict=True)
    varies, other_varies = (norm > rounding * torch.linalg.vector_norm(x, dim=1) for x, norm in pairs)
    correlations = (centred[0] * centred[1]).sum(dim=1) / (norms[0] * norms[1] + EPS)
    return torch.where(varies & other_varies, correlations, 0.0)


def batch_correlation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Squared difference of the B x B matrices of P P' (samples by samples), summed and divided by B.

    P are the softmax outputs at T, (B, C). One of the two terms that MLKD adds to `kd`.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The authors add the terms at T = 2, 3, 4, 5 and 6, each a loss of its own here.

    Returns:
        Scalar >= 0, without unit; zero at equality. No T**2. It grows with the batch, as B times the mean square; of one
        sample it is the square of the difference of |p|**2. Ratio to the paper's form: 1. Published weight 0.9, which the
        authors' code halves: 0.45 here.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Jin, Wang, Lin, "Multi-Level Logit Distillation" (MLKD, 2023). The authors' code multiplies the finished scalar
        by the share of rows whose confidence is not above the median, 1/2, and adds it up for the weak views alone.
    """
    q, p = _probabilities(student_logits, teacher_logits, temperature)
    half = inner_products(q - p, q + p)  # q q' - p p' is its symmetric part, without the rounding of the two
    return (0.5 * (half + half.T)).square().sum() / len(q)


def class_correlation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Squared difference of the C x C matrices of P' P (classes by classes), summed and divided by C.

    P are the softmax outputs at T, (B, C). The other term that MLKD adds to `kd`. Computed from B x B matrices, so that many
    classes cost no more than a batch.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The authors add the terms at T = 2, 3, 4, 5 and 6, each a loss of its own here.

    Returns:
        Scalar >= 0, without unit; zero at equality. No T**2. It grows as B**2. Ratio to the paper's form: 1. Published weight
        0.9, which the authors' code halves: 0.45 here.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Jin, Wang, Lin, "Multi-Level Logit Distillation" (MLKD, 2023), see `batch_correlation`.
    """
    q, p = _probabilities(student_logits, teacher_logits, temperature)
    u, v = q - p, q + p  # q' q - p' p = (u' v + v' u) / 2
    cross = inner_products(u, v)  # |u' v|**2 = <u u', v v'>, and <u' v, v' u> = <u v', (u v')'>
    return 0.5 * ((inner_products(u, u) * inner_products(v, v)).sum() + (cross * cross.T).sum()) / q.shape[1]


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Softmax outputs of student and teacher at T, (B, C) each."""
    student, teacher = checked(student_logits, teacher_logits, temperature)
    return F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)

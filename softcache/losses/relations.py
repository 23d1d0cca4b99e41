"""Losses between two batches: how its samples relate to one another. They need all samples of the batch at once.

The two widths may differ in all of them, since only relations are compared; features of any shape are flattened. A batch of
one has no relations: the value is zero, with a zero gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.losses.features import SHORTEST, inner_products, unit
from softcache.losses.logits import at_least_float32

PKT_EPS = 1e-7


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) and (B, m), at least float32 and in the student's dtype; ValueError unless both have B rows."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} do not fit: "
            "both must be (B, ...), one row for each sample"
        )
    student = at_least_float32(student).flatten(1)
    return student, at_least_float32(teacher).to(student.dtype).flatten(1)


def _no_relations(student: Tensor) -> Tensor:
    return (student * 0.0).sum()


def rkd_distance(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 (Huber, beta 1) between the batches' pair distances, each divided by its batch's mean.

    Args:
        student_features: (B, ...) raw embeddings, any float dtype; half types are computed in float32.
        teacher_features: (B, ...), another width allowed.

    Returns:
        Scalar >= 0, without unit; zero when the batches are equal up to a similarity. The mean over B x B, the zero diagonal
        included, as the authors' code: (B - 1) / B of the mean over pairs. The distances' mean is over pairs of two different
        rows of the batch; a batch of identical samples has distances of zero. A pair of identical samples has a zero gradient.
        Published weight 25.

    Raises:
        ValueError: the batch sizes differ.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (2019), equations 4 to 7.
    """
    student, teacher = _rows(student_features, teacher_features)
    if len(student) < 2:
        return _no_relations(student)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(rows: Tensor) -> Tensor:
    # differences, not |a|**2 + |b|**2 - 2 a.b: that loses close pairs of features far from the origin
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # (B, B)
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / torch.where(mean < SHORTEST, 1.0, mean)


def rkd_angle(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 (Huber, beta 1) between the cosines of the angles that triplets of the batch form.

    Args:
        student_features: (B, ...) raw embeddings, any float dtype; half types are computed in float32.
        teacher_features: (B, ...), another width allowed.

    Returns:
        Scalar >= 0; zero when the batches are equal up to a similarity. The mean over B x B x B, triplets with a sample
        twice included, as the authors' code. Identical samples have no direction between them: cosine 0, with a zero
        gradient. Takes memory for B x B x D and B x B x B values, several times. Without unit. Published weight 50.

    Raises:
        ValueError: the batch sizes differ.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (2019), equations 8 and 9.
    """
    student, teacher = _rows(student_features, teacher_features)
    if len(student) < 2:
        return _no_relations(student)
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def _angles(rows: Tensor) -> Tensor:
    directions = unit(rows[None, :] - rows[:, None])  # (B, B, D), [j, i] from sample j to sample i
    return inner_products(directions, directions)  # (B, B, B), [j, i, k] at sample j


def pkt(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """KL between the batches' similarities as probabilities: (1 + cos) / 2 of each pair, each row divided by its sum.

    Args:
        student_features: (B, ...), any float dtype; half types are computed in float32.
        teacher_features: (B, ...), another width allowed.

    Returns:
        Scalar, in nats; zero when all cosines are equal. The mean over B x B of p log((p + 1e-7) / (q + 1e-7)), as the
        authors' code and three frameworks have it: 1 / B of the KL averaged over rows; the 1e-7 can take it below zero by
        at most 1e-7. A zero vector has cosine 0 with everything. Published weight 30000, tuned at B = 64.

    Raises:
        ValueError: the batch sizes differ.

    Source: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (2018), equations 3 to 6.
    """
    student, teacher = _rows(student_features, teacher_features)
    if len(student) < 2:
        return _no_relations(student)
    q, p = _neighbours(student), _neighbours(teacher)
    return (p * ((p + PKT_EPS) / (q + PKT_EPS)).log()).mean()


def _neighbours(rows: Tensor) -> Tensor:
    directions = unit(rows)
    similarities = (1 + inner_products(directions, directions)).clamp(min=0)  # rounding can take -1 a little lower
    return similarities / similarities.sum(dim=1, keepdim=True)  # (B, B)


def relational_kl(student_features: Tensor, teacher_features: Tensor, temperature: float = 0.1) -> Tensor:
    """KL between the batches' similarities as softmax distributions: of each sample over all others, cosines divided by T.

    Args:
        student_features: (B, ...), any float dtype; half types are computed in float32.
        teacher_features: (B, ...), another width allowed.
        temperature: > 0, of the cosines, which lie in [-1, 1]: small ones look at the nearest neighbours.

    Returns:
        Scalar >= 0, in nats, averaged over the batch; zero when all cosines are equal. A sample is not compared with itself. No
        T**2. A zero vector has cosine 0 with everything. The paper's form has a queue of earlier embeddings of the teacher in the
        place of the batch's other samples, a temperature of its own for each of the two, and the cross-entropy, which has the
        same gradient.

    Raises:
        ValueError: the batch sizes differ, or temperature is not positive.

    Source: Fang et al., "SEED: Self-supervised Distillation for Visual Representation" (2021), section 3.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    student, teacher = _rows(student_features, teacher_features)
    if len(student) < 2:
        return _no_relations(student)
    log_q, log_p = (_log_similarities(rows, temperature) for rows in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum() / len(student)


def _log_similarities(rows: Tensor, temperature: float) -> Tensor:
    """(B, B - 1) log-softmax of each row's cosines with all others."""
    directions, count = unit(rows), len(rows)
    cosines = inner_products(directions, directions) / temperature
    others = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    return F.log_softmax(cosines[others].reshape(count, count - 1), dim=1)


def cc(student_features: Tensor, teacher_features: Tensor, gamma: float = 0.4) -> Tensor:
    """Mean squared difference of the batches' correlations: a Gaussian kernel of unit vectors, as its Taylor sum of order 2.

    exp(-gamma |x - y|**2) = exp(-2 gamma) exp(2 gamma x.y), of which the second factor is summed up to (2 gamma x.y)**2 / 2.

    Args:
        student_features: (B, ...), any float dtype; half types are computed in float32.
        teacher_features: (B, ...), another width allowed; the authors embed both in one width first.
        gamma: > 0.

    Returns:
        Scalar >= 0, without unit; zero when all cosines are equal. The mean over B x B: ratio to the paper's equation: 1, and
        to Knowledge-Distillation-Zoo's. RepDistiller has another function under this name (products of neighbouring rows'
        absolute differences, which depend on the order of the batch), so its weight 0.02 does not carry over.

    Raises:
        ValueError: the batch sizes differ, or gamma is not positive.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation" (2019), equations 5 to 9.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    student, teacher = _rows(student_features, teacher_features)
    if len(student) < 2:
        return _no_relations(student)
    return F.mse_loss(_correlations(student, gamma), _correlations(teacher, gamma))


def _correlations(rows: Tensor, gamma: float) -> Tensor:
    directions = unit(rows)
    exponent = 2 * gamma * inner_products(directions, directions)  # (B, B)
    return math.exp(-2 * gamma) * (1 + exponent + exponent.square() / 2)


def sp(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared distance (Frobenius) of the batches' Grams, each row scaled to length 1, over B**2.

    Args:
        student_features: (B, ...), flattened; any float dtype, half types are computed in float32.
        teacher_features: (B, ...), another size allowed.

    Returns:
        Scalar >= 0, without unit; zero when the Grams' rows are proportional, so when the features are equal; a zero row stays
        zero. Ratio to the paper's form: 1. Published weight 3000.

    Raises:
        ValueError: the batch sizes differ.

    Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation" (2019), equations 2 to 4.
    """
    student, teacher = _rows(student_features, teacher_features)
    if len(student) < 2:
        return _no_relations(student)
    student_gram, teacher_gram = (unit(inner_products(rows, rows)) for rows in (student, teacher))  # (B, B)
    return F.mse_loss(student_gram, teacher_gram)

"""Losses that need the hard label of a sample: cross-entropy itself, and what it does to a teacher's logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.losses.logits import at_least_float32, checked, kd, kl_rows, standardize


def ce(
    student_logits: Tensor, labels: Tensor, smoothing: float = 0.0, *, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy with hard labels, averaged over the labelled rows.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        labels: (B,) int64 class index, -1 = no label; or (B, C) of 1 and 0, -1 = unknown, then binary cross-entropy averaged
            over what is known of batch and classes.
        smoothing: in [0, 1), the share of the target that all C classes get evenly; of one label per row.
        class_weights: (C,) >= 0, with which each class counts, as torch's `weight`; of one label per row. Train it as
            `class_weights=balanced` (samples / (classes * samples of the class), as scikit-learn) or as a file.

    Returns:
        Scalar >= 0, in nats; zero (with a zero gradient) when no row of the batch is labelled. Ratio to the textbook form: 1.
        With class_weights the mean is over the labelled rows all the same, so that pieces and processes come to one value;
        torch's mean divides by the weights of the rows' labels instead.

    Raises:
        ValueError: labels of another shape, smoothing outside [0, 1), or either of the two settings with (B, C) labels.
        IndexError: a label beyond the classes.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7, for smoothing;
        Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs" (1990).

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, -5.0]])
        >>> round(ce(logits, torch.tensor([1, -1])).item(), 3)  # the second row has no label
        0.693
    """
    student = at_least_float32(student_logits)
    _check_softened(labels, smoothing, class_weights)
    if labels.ndim == 2:
        known = labels >= 0
        target = torch.where(known, labels, 0).to(student.dtype)
        rows = F.binary_cross_entropy_with_logits(student, target, reduction="none")
        return torch.where(known, rows, 0.0).sum() / known.sum().clamp(min=1)
    labelled = labels >= 0
    weight = None if class_weights is None else class_weights.to(student)
    total = F.cross_entropy(student, labels, weight=weight, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
    return total / labelled.sum().clamp(min=1)


def mixed_ce(
    student_logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    shares: Tensor,
    smoothing: float = 0.0,
    *,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of views that are a blend of two samples: shares x ce(labels) + (1 - shares) x ce(partner labels).

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        labels, partner_labels: (B,) int64 class index, -1 = no label; or (B, C) of 1 and 0, -1 = unknown, then binary
            cross-entropy.
        shares: (B,) in [0, 1], weight of a sample's own label.
        smoothing, class_weights: as `ce`.

    Returns:
        Scalar >= 0, in nats, over the labelled weight of the batch: equal to `ce` where every share is 1. Zero when nothing
        is labelled. Ratio to the textbook form: 1.

    Raises:
        ValueError: labels of another shape.
        IndexError: a label beyond the classes.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix" (2019).
    """
    student = at_least_float32(student_logits)
    _check_softened(labels, smoothing, class_weights)
    weights = torch.stack([shares, 1 - shares]).to(student.dtype)  # (2, B)
    if labels.ndim == 2:
        several = torch.stack([labels, partner_labels])  # (2, B, C)
        weights = torch.where(several >= 0, weights[:, :, None], 0.0)
        target = torch.where(several >= 0, several, 0).to(student.dtype)
        rows = F.binary_cross_entropy_with_logits(student.expand(2, -1, -1), target, reduction="none")
        total = weights.sum()
        return (weights * rows).sum() / torch.where(total > 0, total, 1.0)
    pair = torch.stack([labels, partner_labels])  # (2, B)
    weight = None if class_weights is None else class_weights.to(student)
    losses = torch.stack(
        [
            F.cross_entropy(student, one, weight, ignore_index=-1, reduction="none", label_smoothing=smoothing)
            for one in pair
        ]
    )
    weights = torch.where(pair >= 0, weights, 0.0)
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total > 0, total, 1.0)


def _check_softened(labels: Tensor, smoothing: float, class_weights: Tensor | None) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}; 0.1 is usual")
    if labels.ndim == 2 and (smoothing or class_weights is not None):
        raise ValueError(
            "smoothing and class_weights are of data with one label per sample; this has several: leave them out"
        )


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    *,
    standardized: bool = False,
) -> Tensor:
    """T**2-scaled decoupled KL, averaged over the labelled rows: alpha KL of (label, rest) + beta KL within the rest.

    With alpha = 1 and beta = 1 - p_label of the teacher a row is that of `kd`. The authors let the whole term rise over the
    first epochs, min(epoch / 20, 1): that is a schedule of its weight, such as warmup(20).

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        labels: (B,) int64 class index; rows below 0 have none and are left out.
        temperature: > 0.
        alpha, beta: weights of the two parts. The authors take alpha = 1 and beta from 0.5 to 8, by the pair of networks.
        standardized: as for `kd`, over the whole row.

    Returns:
        Scalar >= 0, in nats; zero when the two distributions are equal, when no row is labelled, and for one class. Ratio to
        the textbook form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (2022); the authors' code masks the label by -1000 in
        place of leaving it out, and takes the logarithm of probabilities. standardized: Sun et al., "Logit Standardization in
        Knowledge Distillation" (2024).
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    own = _own_class(student, labels)
    rest = torch.arange(student.shape[1] - 1, device=own.device)
    rest = rest + (rest >= own)  # (B, C - 1): every class but the row's own
    if rest.shape[1] == 0:
        return 0.0 * student.sum()

    def decoupled(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = (standardize(logits) if standardized else logits) / temperature
        others = logits.gather(1, rest)
        label_or_not = torch.cat([logits.gather(1, own), others.logsumexp(dim=1, keepdim=True)], dim=1)  # (B, 2)
        return F.log_softmax(label_or_not, dim=1), F.log_softmax(others, dim=1)

    (log_q2, log_q), (log_p2, log_p) = decoupled(student), decoupled(teacher)
    rows = alpha * kl_rows(log_p2, log_q2) + beta * kl_rows(log_p, log_q)
    return temperature**2 * _mean_of_labelled(rows, labels)


def wsld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """T**2-scaled soft cross-entropy, each row weighted by 1 - exp(-CE_student / CE_teacher), averaged over labelled rows.

    Both cross-entropies are with the hard label, at temperature 1. The weight carries no gradient, and 1e-7 is added to
    CE_teacher, as in the authors' code. Rows that the student has learned weigh little.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        labels: (B,) int64 class index; rows below 0 have none and are left out.
        temperature: > 0, of the soft cross-entropy. The authors: 4 with weight 2.25 on CIFAR, 2 with 2.5 on ImageNet.

    Returns:
        Scalar >= 0, in nats; at equality (1 - 1 / e) times `soft_ce` (but for that 1e-7), not zero; zero when no row is
        labelled. Ratio to the textbook form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit.

    Source: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective" (2021).
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    own = _own_class(student, labels).squeeze(1)
    student_ce, teacher_ce = (F.cross_entropy(logits, own, reduction="none").detach() for logits in (student, teacher))
    weights = -torch.expm1(-student_ce / (teacher_ce + 1e-7))  # (B,)
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    return -(temperature**2) * _mean_of_labelled(weights * (p * log_q).sum(dim=1), labels)


def shifted_kd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """`kd` with the teacher put right: where its first class is not the label, their two logits change places.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax. Of equal largest logits the smaller class is
            exchanged.
        labels: (B,) int64 class index; rows below 0 have none and keep the teacher's logits.
        temperature: > 0. The T**2 factor is that of `kd`.

    Returns:
        Scalar >= 0, in nats, averaged over all rows; at equality zero only where the teacher is right. Ratio to the textbook
        form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit.

    Source: Wen, Lai, Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision" (2019),
        probability shift.
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    top, first = teacher.max(dim=1, keepdim=True)  # (B, 1)
    own = torch.where(labels[:, None] >= 0, _own_class(student, labels), first)
    shifted = teacher.scatter(1, first, teacher.gather(1, own)).scatter(1, own, top)
    return kd(student, shifted, temperature)


def tf_virtual(student_logits: Tensor, labels: Tensor, temperature: float = 20.0, correct: float = 0.99) -> Tensor:
    """T**2-scaled KL from a virtual teacher that gives the label `correct`, averaged over the labelled rows.

    The virtual teacher's probabilities (`correct` for the label, the rest evenly) are tempered like those of any teacher,
    as p ** (1 / T), and so are the student's. The authors' other method, learning from oneself, is `kd` on a cache made by
    an earlier run of the student.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        labels: (B,) int64 class index; rows below 0 have none and are left out.
        temperature: > 0; the authors' code has 10 to 40.
        correct: in (0, 1); the authors' code has 0.99.

    Returns:
        Scalar >= 0, in nats; zero when the student gives the virtual teacher's probabilities, when no row is labelled, and
        for one class. Ratio to the textbook form: T**2, which the paper writes for no loss and its code gives to `kd`.

    Raises:
        ValueError: temperature is not positive, correct is not in (0, 1), or the shapes do not fit.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization" (2020), Tf-KD_reg.
        The authors' code is another function: it takes softmax(probabilities / T) for the target, which is nearly uniform,
        does not temper the student, has no T**2 and averages over B x C. Its weights (0.1 to 0.95, and a factor up to 100)
        belong to that, and to no temperature here.
    """
    if not 0 < correct < 1:
        raise ValueError(f"correct must be in (0, 1), got {correct}")
    student, _ = checked(student_logits, student_logits, temperature)
    own = _own_class(student, labels)
    share = (1 - correct) / max(student.shape[1] - 1, 1)
    virtual = torch.full_like(student, math.log(share)).scatter(1, own, math.log(correct))
    log_q, log_p = (F.log_softmax(logits / temperature, dim=1) for logits in (student, virtual))
    return temperature**2 * _mean_of_labelled(kl_rows(log_p, log_q), labels)


def _own_class(student_logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 1) class to gather, 0 for rows without a label."""
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"labels must be ({len(student_logits)},) class indices, one for each row; got {tuple(labels.shape)}"
        )
    return labels.clamp(min=0)[:, None]


def _mean_of_labelled(rows: Tensor, labels: Tensor) -> Tensor:
    """Mean of (B,) rows over those with a label; zero, with a zero gradient, if there are none."""
    labelled = labels >= 0
    return torch.where(labelled, rows, 0.0).sum() / labelled.sum().clamp(min=1)

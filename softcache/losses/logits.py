"""Losses between student logits and teacher logits or labels. Every one is a plain function of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Half types as float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _checked(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both at least float32 and in one dtype; ValueError for other shapes or a temperature that is not positive."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student_logits.shape)} vs "
            f"{tuple(teacher_logits.shape)}; both must be (B, C) over the same classes"
        )
    student = at_least_float32(student_logits)
    return student, at_least_float32(teacher_logits).to(student.dtype)


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T**2-scaled KL(teacher || student), summed over classes, averaged over the batch.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor keeps gradients comparable across temperatures.

    Returns:
        Scalar >= 0, in nats; zero when the two distributions are equal. Ratio to the textbook form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """
    student, teacher = _checked(student_logits, teacher_logits, temperature)
    return temperature**2 * _mean_kl(student / temperature, teacher / temperature)


def _mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), averaged over rows."""
    log_q = F.log_softmax(student_logits, dim=-1)  # (B, C)
    log_p = F.log_softmax(teacher_logits, dim=-1)  # (B, C)
    p, q = log_p.exp(), log_q.exp()
    # q - p sums to zero, and takes the rounding of log_p - log_q with it: at T=20 that is most of a float32 KL's error
    return (p * (log_p - log_q) + (q - p)).sum(dim=-1).mean()


def kd_lower_bound(
    student_logits: Tensor, head_ids: Tensor, head_logits: Tensor, tail_logsumexp: Tensor, temperature: float = 4.0
) -> Tensor:
    """T**2-scaled KL(teacher || student) over k + 1 buckets: k classes and all others together.

    Merging classes cannot raise a KL divergence (data processing inequality), so it is at most `kd` of the whole rows,
    and equal to it where the teacher has no probability in the other classes, or the student spreads them as the teacher
    does. It says nothing about how the student spreads the rest.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        head_ids: (B, k) int64, k different classes in each row.
        head_logits: (B, k) of the teacher, before softmax.
        tail_logsumexp: (B,) log of the sum over the teacher's other classes of exp(logit / temperature), at the level of
            head_logits; -inf where there are none.
        temperature: > 0, the one of tail_logsumexp. The T**2 factor is that of `kd`.

    Returns:
        Scalar >= 0, in nats.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit each other.

    Source: Hinton, Vinyals, Dean (2015), section 2, for the whole rows; Cover, Thomas, "Elements of Information Theory"
        (2006), section 2.7 (log sum inequality), for the bound.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    rows, classes = student_logits.shape
    if head_ids.shape != head_logits.shape or len(head_ids) != rows or tail_logsumexp.shape != (rows,):
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, head ids {tuple(head_ids.shape)}, head logits "
            f"{tuple(head_logits.shape)} and tail {tuple(tail_logsumexp.shape)} do not fit: they must be (B, C), (B, k), "
            "(B, k) and (B,)"
        )
    student = at_least_float32(student_logits)
    student_buckets = student.gather(1, head_ids) / temperature  # (B, k)
    teacher_buckets = head_logits.to(student.dtype) / temperature
    if head_ids.shape[1] < classes:
        # log(1 - the head's share) would lose a small rest: it is summed by itself
        rest = (student / temperature).scatter_(1, head_ids, -torch.inf).logsumexp(dim=1)
        # finite, since 0 * -inf is not a number
        tail = tail_logsumexp.to(student.dtype).clamp(min=torch.finfo(student.dtype).min / 2)
        student_buckets = torch.cat([student_buckets, rest[:, None]], dim=1)  # (B, k + 1)
        teacher_buckets = torch.cat([teacher_buckets, tail[:, None]], dim=1)
    return temperature**2 * _mean_kl(student_buckets, teacher_buckets)


def soft_ce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T**2-scaled cross-entropy against the soft target: `kd` plus T**2 times the target's entropy; the same gradient.

    Args: as `kd`.

    Returns:
        Scalar >= 0, in nats; at equality T**2 times the mean entropy of the soft targets, not zero.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Hinton, Vinyals, Dean (2015), section 2.
    """
    student, teacher = _checked(student_logits, teacher_logits, temperature)
    log_q = F.log_softmax(student / temperature, dim=-1)  # (B, C)
    p = F.softmax(teacher / temperature, dim=-1)  # (B, C)
    return -(temperature**2) * (p * log_q).sum(dim=-1).mean()


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of raw logits, over batch and classes. Needs the teacher's level, not only its softmax.

    Args:
        student_logits, teacher_logits: (B, C).

    Returns:
        Scalar >= 0; zero when the logits are equal. The mean over B x C: 1 / C of the summed form.

    Raises:
        ValueError: the shapes differ.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?" (2014), equation 1 (there: half the sum over classes).
    """
    student, teacher = _checked(student_logits, teacher_logits)
    return F.mse_loss(student, teacher)


def bce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T**2-scaled binary cross-entropy against sigmoid targets, averaged over batch and classes (multi-label).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C); the soft target of each class is sigmoid(logit / T).
        temperature: > 0.

    Returns:
        Scalar >= 0, in nats; at equality T**2 times the mean binary entropy of the targets, not zero.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.
    """
    student, teacher = _checked(student_logits, teacher_logits, temperature)
    target = torch.sigmoid(teacher / temperature)
    return temperature**2 * F.binary_cross_entropy_with_logits(student / temperature, target)


def ce(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels, averaged over the labelled rows.

    Args:
        student_logits: (B, C).
        labels: (B,) int64 class index, -1 = no label; or (B, C) multi-hot, then binary cross-entropy averaged over
            batch and classes.

    Returns:
        Scalar >= 0, in nats; zero (with a zero gradient) when no row of the batch is labelled.
    """
    student = at_least_float32(student_logits)
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(student, labels.to(student.dtype))
    labelled = labels >= 0
    total = F.cross_entropy(student, labels, ignore_index=-1, reduction="sum")
    return total / labelled.sum().clamp(min=1)


def mixed_ce(student_logits: Tensor, labels: Tensor, partner_labels: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of views that are a blend of two samples: shares x ce(labels) + (1 - shares) x ce(partner labels).

    Args:
        student_logits: (B, C).
        labels, partner_labels: (B,) int64 class index, -1 = no label; or (B, C) multi-hot, then binary cross-entropy.
        shares: (B,) in [0, 1], weight of a sample's own label.

    Returns:
        Scalar >= 0, in nats, over the labelled weight of the batch: equal to `ce` where every share is 1. Zero when nothing
        is labelled.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix" (2019).
    """
    student = at_least_float32(student_logits)
    weights = torch.stack([shares, 1 - shares]).to(student.dtype)  # (2, B)
    if labels.ndim == 2:
        mixture = weights[0, :, None] * labels + weights[1, :, None] * partner_labels
        return F.binary_cross_entropy_with_logits(student, mixture)
    pair = torch.stack([labels, partner_labels])  # (2, B)
    losses = torch.stack([F.cross_entropy(student, one, ignore_index=-1, reduction="none") for one in pair])
    weights = torch.where(pair >= 0, weights, 0.0)
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total > 0, total, 1.0)

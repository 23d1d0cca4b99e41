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
    log_q = F.log_softmax(student / temperature, dim=-1)  # (B, C)
    log_p = F.log_softmax(teacher / temperature, dim=-1)  # (B, C)
    p, q = log_p.exp(), log_q.exp()
    # q - p sums to zero, and takes the rounding of log_p - log_q with it: at T=20 that is most of a float32 KL's error
    return temperature**2 * (p * (log_p - log_q) + (q - p)).sum(dim=-1).mean()


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

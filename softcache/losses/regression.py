"""Losses between numbers that have a meaning of their own: the values of a teacher (scores, measures)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcache.losses.features import aligned


def mse(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference over all numbers of a batch.

    Args:
        student_features, teacher_features: (B, K), any float dtype; half types are computed in float32.

    Returns:
        Scalar >= 0, in squared units of the values; zero when the two are equal. The mean over B x K. Ratio to the textbook
        form: 1.

    Raises:
        ValueError: the shapes differ.

    Source: as in Bucilua et al., "Model Compression" (2006), section 2, of a regression.
    """
    student, teacher = aligned(student_features, teacher_features, "(B, K) of one shape")
    return F.mse_loss(student, teacher)


def huber(student_features: Tensor, teacher_features: Tensor, delta: float = 1.0) -> Tensor:
    """Mean Huber loss over all numbers of a batch: half the square up to `delta`, beyond it delta (|difference| - delta / 2).

    Args:
        student_features, teacher_features: (B, K), any float dtype; half types are computed in float32.
        delta: > 0, in units of the values.

    Returns:
        Scalar >= 0, in squared units of the values; zero when the two are equal. The mean over B x K. Ratio to the textbook
        form: 1; torch's `smooth_l1_loss` is 1 / delta of it.

    Raises:
        ValueError: the shapes differ, or delta is not positive.

    Source: Huber, "Robust Estimation of a Location Parameter" (1964), section 2.
    """
    if delta <= 0:
        raise ValueError(f"delta must be > 0, got {delta}")
    student, teacher = aligned(student_features, teacher_features, "(B, K) of one shape")
    return F.huber_loss(student, teacher, delta=delta)

"""Divergences over k + 1 buckets: the k largest classes of the teacher, and all others together.

Merging classes cannot raise an f-divergence (data processing inequality), so each of these is at most its whole form, and
equal to it where the teacher has no probability in the other classes, or the student spreads them as the teacher does. They
say nothing about how the student spreads the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.losses.divergences import skew_kl_rows, tvd_rows
from softcache.losses.logits import at_least_float32, jsd_rows, kl_rows


def bucketed(
    student_logits: Tensor, head_ids: Tensor, head_logits: Tensor, tail_logsumexp: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(B, k + 1) log-probabilities at T of the buckets: the teacher's p and the student's q; (B, k) where k classes are all."""
    if not temperature > 0:
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
    return F.log_softmax(teacher_buckets, dim=-1), F.log_softmax(student_buckets, dim=-1)


def kd_lower_bound(
    student_logits: Tensor,
    head_ids: Tensor,
    head_logits: Tensor,
    tail_logsumexp: Tensor,
    temperature: float = 4.0,
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
    log_p, log_q = bucketed(student_logits, head_ids, head_logits, tail_logsumexp, temperature)
    return temperature**2 * kl_rows(log_p, log_q).mean()


def reverse_kl_lower_bound(
    student_logits: Tensor,
    head_ids: Tensor,
    head_logits: Tensor,
    tail_logsumexp: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """T**2-scaled KL(student || teacher) over k + 1 buckets: at most reverse_kl of the whole rows.

    It goes beyond all bounds where a teacher has nothing in its tail and the student has.

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

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (2024), for the whole rows;
        Cover, Thomas, "Elements of Information Theory" (2006), section 2.7 (log sum inequality), for the bound.
    """
    log_p, log_q = bucketed(student_logits, head_ids, head_logits, tail_logsumexp, temperature)
    return temperature**2 * kl_rows(log_q, log_p).mean()


def jsd_lower_bound(
    student_logits: Tensor,
    head_ids: Tensor,
    head_logits: Tensor,
    tail_logsumexp: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """T**2-scaled generalised Jensen-Shannon divergence over k + 1 buckets: at most jsd of the whole rows.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        head_ids: (B, k) int64, k different classes in each row.
        head_logits: (B, k) of the teacher, before softmax.
        tail_logsumexp: (B,) log of the sum over the teacher's other classes of exp(logit / temperature), at the level of
            head_logits; -inf where there are none.
        temperature: > 0, the one of tail_logsumexp. The T**2 factor is that of `kd`.
        beta: in (0, 1), the teacher's share of the mixture, as in jsd.

    Returns:
        Scalar in [0, T**2 log 2], in nats.

    Raises:
        ValueError: temperature is not positive, beta is not in (0, 1), or the shapes do not fit each other.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD, 2024), equation 1, for the whole rows; Cover,
        Thomas, "Elements of Information Theory" (2006), section 2.7 (log sum inequality), for the bound.
    """
    log_p, log_q = bucketed(student_logits, head_ids, head_logits, tail_logsumexp, temperature)
    return temperature**2 * jsd_rows(log_p, log_q, beta).mean()


def skew_kl_lower_bound(
    student_logits: Tensor,
    head_ids: Tensor,
    head_logits: Tensor,
    tail_logsumexp: Tensor,
    temperature: float = 1.0,
    alpha: float = 0.1,
) -> Tensor:
    """T**2-scaled KL(teacher || blend) over k + 1 buckets: at most skew_kl of the whole rows.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        head_ids: (B, k) int64, k different classes in each row.
        head_logits: (B, k) of the teacher, before softmax.
        tail_logsumexp: (B,) log of the sum over the teacher's other classes of exp(logit / temperature), at the level of
            head_logits; -inf where there are none.
        temperature: > 0, the one of tail_logsumexp. The T**2 factor is that of `kd`.
        alpha: in (0, 1), the teacher's share of the blend, as in skew_kl.

    Returns:
        Scalar in [0, T**2 log(1 / alpha)], in nats.

    Raises:
        ValueError: temperature is not positive, alpha is not in (0, 1), or the shapes do not fit each other.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024), section 3.1, for the whole
        rows; Cover, Thomas, "Elements of Information Theory" (2006), section 2.7 (log sum inequality), for the bound.
    """
    log_p, log_q = bucketed(student_logits, head_ids, head_logits, tail_logsumexp, temperature)
    return temperature**2 * skew_kl_rows(log_p, log_q, alpha).mean()


def skew_reverse_kl_lower_bound(
    student_logits: Tensor,
    head_ids: Tensor,
    head_logits: Tensor,
    tail_logsumexp: Tensor,
    temperature: float = 1.0,
    alpha: float = 0.1,
) -> Tensor:
    """T**2-scaled KL(student || blend) over k + 1 buckets: at most skew_reverse_kl of the whole rows.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        head_ids: (B, k) int64, k different classes in each row.
        head_logits: (B, k) of the teacher, before softmax.
        tail_logsumexp: (B,) log of the sum over the teacher's other classes of exp(logit / temperature), at the level of
            head_logits; -inf where there are none.
        temperature: > 0, the one of tail_logsumexp. The T**2 factor is that of `kd`.
        alpha: in (0, 1), the student's share of the blend, as in skew_reverse_kl.

    Returns:
        Scalar in [0, T**2 log(1 / alpha)], in nats.

    Raises:
        ValueError: temperature is not positive, alpha is not in (0, 1), or the shapes do not fit each other.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024), section 3.1, for the whole
        rows; Cover, Thomas, "Elements of Information Theory" (2006), section 2.7 (log sum inequality), for the bound.
    """
    log_p, log_q = bucketed(student_logits, head_ids, head_logits, tail_logsumexp, temperature)
    return temperature**2 * skew_kl_rows(log_q, log_p, alpha).mean()


def tvd_lower_bound(
    student_logits: Tensor,
    head_ids: Tensor,
    head_logits: Tensor,
    tail_logsumexp: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """T-scaled total variation distance over k + 1 buckets: at most tvd of the whole rows.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        head_ids: (B, k) int64, k different classes in each row.
        head_logits: (B, k) of the teacher, before softmax.
        tail_logsumexp: (B,) log of the sum over the teacher's other classes of exp(logit / temperature), at the level of
            head_logits; -inf where there are none.
        temperature: > 0, the one of tail_logsumexp. The factor is T, as in tvd.

    Returns:
        Scalar in [0, T], without unit.

    Raises:
        ValueError: temperature is not positive, or the shapes do not fit each other.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (2023), section 3, for the whole
        rows; the triangle inequality for the bound.
    """
    log_p, log_q = bucketed(student_logits, head_ids, head_logits, tail_logsumexp, temperature)
    return temperature * tvd_rows(log_p, log_q).mean()

"""Losses between student logits and teacher logits, row by row. Every one is a plain function of tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Half types as float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def checked(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both at least float32 and in one dtype; ValueError for other shapes or a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student_logits.shape)} vs "
            f"{tuple(teacher_logits.shape)}; both must be (B, C) over the same classes"
        )
    if student_logits.ndim != 2:
        raise ValueError(f"logits must be (B, C), got {tuple(student_logits.shape)}; flatten all axes but the classes")
    student = at_least_float32(student_logits)
    return student, at_least_float32(teacher_logits).to(student.dtype)


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, C) log-probabilities at T: the teacher's p and the student's q; ValueError as `checked`."""
    student, teacher = checked(student_logits, teacher_logits, temperature)
    return F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(student / temperature, dim=-1)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row: (B, C) log-probabilities -> (B,)."""
    p, q = log_p.exp(), log_q.exp()
    # q - p sums to zero, and takes the rounding of log_p - log_q with it: at T=20 that is most of a float32 KL's error
    return (p * (log_p - log_q) + (q - p)).sum(dim=-1)


def blended(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Logarithm of share p + (1 - share) q, of log-probabilities; share in (0, 1)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jsd_rows(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) of each row, m = beta p + (1 - beta) q: (B, C) log-probabilities -> (B,)."""
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}; use kd for 0 and reverse_kl for 1")
    log_m = blended(log_p, log_q, beta)
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), averaged over rows."""
    return kl_rows(F.log_softmax(teacher_logits, dim=-1), F.log_softmax(student_logits, dim=-1)).mean()


def standardize(logits: Tensor) -> Tensor:
    """(B, C) -> (B, C) of mean 0 and deviation 1 in each row: (z - mean) / (std + 1e-7), std with C - 1.

    A row of equal logits (or of one class) has no deviation: it gives zeros, and no gradient (the authors: one 1e7 times too
    large, for a student whose last layer starts from zero).

    Source: Sun et al., "Logit Standardization in Knowledge Distillation" (2024); 1e-7 and C - 1 are those of the authors' code.
    """
    centred = logits - logits.amax(dim=1, keepdim=True).detach()  # exactly zero where all are equal, as a mean is not
    centred = centred - centred.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)  # torch.std has no gradient for one class
    return torch.where(norm > 0, centred / (norm / max(logits.shape[1] - 1, 1) ** 0.5 + 1e-7), 0.0)


def kd(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, *, standardized: bool = False
) -> Tensor:
    """T**2-scaled KL(teacher || student), summed over classes, averaged over the batch.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor keeps gradients comparable across temperatures.
        standardized: logits of mean 0 and deviation 1 in each row before the division by T (`standardize`); T**2 stays. The
            authors use weight 9 and T = 2.

    Returns:
        Scalar >= 0, in nats; zero when the two distributions are equal. Ratio to the textbook form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; Sun et al., "Logit
        Standardization in Knowledge Distillation" (2024).

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(kd(student, teacher, temperature=1.0).item(), 3), round(kd(student, teacher, temperature=4.0).item(), 3)
        (0.328, 0.485)
        >>> kd(teacher, teacher).item()
        0.0
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    return temperature**2 * mean_kl(student / temperature, teacher / temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T**2-scaled KL(student || teacher), summed over classes, averaged over the batch: it seeks modes, `kd` covers them.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor is that of `kd`.

    Returns:
        Scalar >= 0, in nats; zero when the two distributions are equal. Ratio to the textbook form: T**2, to make its
        gradient as large as that of `kd`.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (2024), for one prediction in place of a
        sequence.
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    return temperature**2 * mean_kl(teacher / temperature, student / temperature)


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """T**2-scaled generalised Jensen-Shannon divergence, summed over classes, averaged over the batch.

    beta KL(p || m) + (1 - beta) KL(q || m) with the teacher's p, the student's q and m = beta p + (1 - beta) q.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor is that of `kd`.
        beta: in (0, 1), the teacher's share of the mixture. As it goes to 0, jsd / beta becomes KL(p || q); as it goes to 1,
            jsd / (1 - beta) becomes KL(q || p).

    Returns:
        Scalar in [0, T**2 log 2], in nats; zero when the two distributions are equal. Ratio to the textbook form: T**2.

    Raises:
        ValueError: temperature is not positive, beta is not in (0, 1), or the shapes differ.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD, 2024), equation 1, without T**2.
    """
    log_p, log_q = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * jsd_rows(log_p, log_q, beta).mean()


def hard(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher ranks first, averaged over the batch.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C); of equal largest logits the smaller class counts.

    Returns:
        Scalar >= 0, in nats; at equality the mean of -log of the largest probability, not zero. Ratio to the textbook form:
        1.

    Raises:
        ValueError: the shapes differ.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention" (DeiT, 2021),
        section 4, equation 3 (there: on an output of its own, with weight 1/2).
    """
    student, teacher = checked(student_logits, teacher_logits)
    return F.cross_entropy(student, teacher.argmax(dim=1))


def soft_ce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T**2-scaled cross-entropy against the soft target: `kd` plus T**2 times the target's entropy; the same gradient.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor is that of `kd`.

    Returns:
        Scalar >= 0, in nats; at equality T**2 times the mean entropy of the soft targets, not zero. Ratio to the textbook
        form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Hinton, Vinyals, Dean (2015), section 2.
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    log_q = F.log_softmax(student / temperature, dim=-1)  # (B, C)
    p = F.softmax(teacher / temperature, dim=-1)  # (B, C)
    return -(temperature**2) * (p * log_q).sum(dim=-1).mean()


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of raw logits, over batch and classes. Needs the teacher's level, not only its softmax.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, at the level that the teacher gave.

    Returns:
        Scalar >= 0, in squared units of the logits; zero when they are equal. The mean over B x C: 1 / C of the summed form.

    Raises:
        ValueError: the shapes differ.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?" (2014), equation 1 (there: half the sum over classes).

    Example:
        >>> mse_logits(torch.zeros(2, 4), torch.full((2, 4), 3.0)).item()
        9.0
    """
    student, teacher = checked(student_logits, teacher_logits)
    return F.mse_loss(student, teacher)


def bce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T**2-scaled binary cross-entropy against sigmoid targets, averaged over batch and classes: kd for multi-label teachers.

    Its gradient is that of the binary KL divergence at T of each class, which it exceeds by the targets' entropy.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C); the soft target of each class is sigmoid(logit / T).
        temperature: > 0.

    Returns:
        Scalar >= 0, in nats; at equality T**2 times the mean binary entropy of the targets, not zero. The mean over B x C:
        1 / C of the form summed over classes.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Hinton, Vinyals, Dean (2015), section 2, with one two-way softmax for each class.
    """
    student, teacher = checked(student_logits, teacher_logits, temperature)
    target = torch.sigmoid(teacher / temperature)
    return temperature**2 * F.binary_cross_entropy_with_logits(student / temperature, target)

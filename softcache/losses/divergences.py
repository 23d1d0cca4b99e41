"""Further divergences of the student's probabilities from the teacher's: skewed KL both ways, and total variation."""

from __future__ import annotations

from torch import Tensor

from softcache.losses.logits import blended, kl_rows, log_probabilities


def skew_kl_rows(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) of each row: (B, C) log-probabilities -> (B,); with p and q exchanged the reverse one."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}; use kd or reverse_kl for 0")
    return kl_rows(log_p, blended(log_p, log_q, alpha))


def tvd_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q| of each row: (B, C) log-probabilities -> (B,)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """T**2-scaled KL(teacher || blend), averaged over the batch; the blend is alpha teacher + (1 - alpha) student.

    The share of the teacher in the blend keeps the value below T**2 log(1 / alpha) and the gradient small where the student
    has almost no probability.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor is that of `kd`.
        alpha: in (0, 1), the teacher's share of the blend; as it goes to 0 this becomes `kd`. The authors take 0.1.

    Returns:
        Scalar in [0, T**2 log(1 / alpha)], in nats; zero when the two distributions are equal. Ratio to the textbook form: T**2.

    Raises:
        ValueError: temperature is not positive, alpha is not in (0, 1), or the shapes differ.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024), section 3.1, without T**2.
    """
    log_p, log_q = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * skew_kl_rows(log_p, log_q, alpha).mean()


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """T**2-scaled KL(student || blend), averaged over the batch; the blend is alpha student + (1 - alpha) teacher.

    It seeks modes, as reverse_kl does, and stays finite where the teacher has no probability.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0. The T**2 factor is that of `kd`.
        alpha: in (0, 1), the student's share of the blend; as it goes to 0 this becomes reverse_kl. The authors take 0.1.

    Returns:
        Scalar in [0, T**2 log(1 / alpha)], in nats; zero when the two distributions are equal. Ratio to the textbook form: T**2.

    Raises:
        ValueError: temperature is not positive, alpha is not in (0, 1), or the shapes differ.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (2024), section 3.1, without T**2.
    """
    log_p, log_q = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * skew_kl_rows(log_q, log_p, alpha).mean()


def tvd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T-scaled total variation distance, averaged over the batch: half the sum over classes of |teacher - student|.

    The factor is T and not T**2: the distance is of the first order in the difference of the logits, where a KL is of the
    second, and its gradient falls as 1 / T.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64.
        teacher_logits: (B, C), same classes in the same order, before softmax.
        temperature: > 0.

    Returns:
        Scalar in [0, T], without unit; zero when the two distributions are equal. Ratio to the textbook form: T.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (2023), section 3, for one
        prediction in place of a sequence, without T.
    """
    return temperature * tvd_rows(*log_probabilities(student_logits, teacher_logits, temperature)).mean()

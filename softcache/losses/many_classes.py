"""`kd` for very many classes: in pieces, whose own memory does not grow with the number of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIMIT = 64 * 2**20
ARRAYS = 5  # of a piece, alive at a time: three at work, decoded teacher rows, and one to spare for what torch needs
CACHED = 2**18  # logits
HALF_SCALE = 2.0**14  # of a gradient kept in a half type: probabilities would be lost below 6e-8

TeacherRows = Callable[[int, int], Tensor]


def chunked_kd(
    student_logits: Tensor, teacher: Tensor | TeacherRows, temperature: float = 4.0, *, limit: int = LIMIT
) -> Tensor:
    """`kd`, value and gradient, with temporaries of its own below `limit` bytes at any number of classes.

    The limit is beyond the student's logits, their gradient and the teacher's rows. The gradient is made together with the
    value, piece by piece, and scaled in place by backward; a second backward through the same graph makes it anew. It has no
    gradient of its own.

    Args:
        student_logits: (B, C), any float dtype; half types are computed in float32, float64 stays float64. Kept until backward.
        teacher: (B, C) of any float dtype, or a function of (first row, last row, not included) that gives those rows, which
            is how a compact cache is decoded in pieces; it may be called again by a second backward.
        temperature: > 0. The T**2 factor is that of `kd`.
        limit: bytes. A piece is at least one logit, and a function that gives rows is asked for one row at least.

    Returns:
        Scalar >= 0, in nats; zero when the two distributions are equal. Ratio to the textbook form: 1.

    Raises:
        ValueError: temperature is not positive, or the shapes differ.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; Milakov, Gimelshein,
        "Online Normalizer Calculation for Softmax" (2018), for log-sum-exp in pieces.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if student_logits.ndim != 2:
        raise ValueError(f"logits must be (B, C), got {tuple(student_logits.shape)}; flatten all axes but the classes")
    if isinstance(teacher, Tensor):
        _check_shape(teacher, tuple(student_logits.shape))
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    value: Tensor = _ChunkedKd.apply(student_logits, teacher, temperature, limit, with_gradient)
    return value


class _ChunkedKd(torch.autograd.Function):
    """The value and, where asked for, the gradient up to a factor, which backward knows."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | TeacherRows, temperature: float, limit: int, with_gradient: bool
    ) -> Tensor:
        ctx.arguments = teacher, temperature, limit
        ctx.gradient = _empty(student) if with_gradient else None
        ctx.save_for_backward(student)
        return _kd_in_pieces(student, teacher, temperature, limit, ctx.gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (student,) = ctx.saved_tensors
        teacher, temperature, limit = ctx.arguments
        gradient, ctx.gradient = ctx.gradient, None  # the caller's from here on: it may be changed
        if gradient is None:
            gradient = _empty(student)
            _kd_in_pieces(student, teacher, temperature, limit, gradient)
        factor = upstream * (temperature / len(student) / _scale(student))
        for piece in gradient.view(-1).split(_piece_size(student, limit)):
            piece.copy_(piece.to(factor.dtype) * factor)
        return gradient, None, None, None, None


def _kd_in_pieces(
    student: Tensor, teacher: Tensor | TeacherRows, temperature: float, limit: int, gradient: Tensor | None
) -> Tensor:
    """The value of `kd`; fills `gradient` with (student's - teacher's probabilities) x _scale."""
    batch, classes = student.shape
    dtype = _computed_in(student)
    size = _piece_size(student, limit)
    height, width = max(1, size // classes), min(classes, size)
    value = torch.zeros(batch, dtype=dtype, device=student.device)
    for top in range(0, batch, height):
        rows = slice(top, min(top + height, batch))
        filled = None if gradient is None else gradient[rows]
        value[rows] = _kl_in_pieces(student[rows], _rows_of(teacher, rows, classes), temperature, dtype, width, filled)
    return temperature**2 * value.mean()


def _kl_in_pieces(
    student: Tensor, teacher: Tensor, temperature: float, dtype: torch.dtype, width: int, gradient: Tensor | None
) -> Tensor:
    """KL(teacher || student) at T of each of some rows, in pieces of `width` classes."""
    q_total = _logsumexp(student, temperature, dtype, width)
    p_total = _logsumexp(teacher, temperature, dtype, width)
    value = torch.zeros(len(student), dtype=dtype, device=student.device)
    for left in range(0, student.shape[1], width):
        columns = slice(left, left + width)
        log_q = _tempered(student[:, columns], temperature, dtype).sub_(q_total)
        log_p = _tempered(teacher[:, columns], temperature, dtype).sub_(p_total)
        p = log_p.exp()
        value += log_p.sub_(log_q).mul_(p).sum(dim=1)
        q_less_p = log_q.exp_().sub_(p)
        value += q_less_p.sum(dim=1)  # takes the rounding of the logarithms with it, as in kl_rows
        if gradient is not None:
            gradient[:, columns] = q_less_p.mul_(_scale(student))
        del log_q, log_p, p, q_less_p  # before the next piece is made
    return value


def _rows_of(teacher: Tensor | TeacherRows, rows: slice, classes: int) -> Tensor:
    if isinstance(teacher, Tensor):
        return teacher[rows]
    decoded = teacher(rows.start, rows.stop)
    _check_shape(decoded, (rows.stop - rows.start, classes))
    return decoded


def _logsumexp(rows: Tensor, temperature: float, dtype: torch.dtype, width: int) -> Tensor:
    """(rows, 1) log of the sum over all classes of exp(logit / T), in pieces of `width` classes."""
    total = torch.full((len(rows), 1), -torch.inf, dtype=dtype, device=rows.device)
    for piece in rows.split(width, dim=1):
        total = torch.logaddexp(total, _tempered(piece, temperature, dtype).logsumexp(dim=1, keepdim=True))
    return total


def _tempered(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """A new tensor of logits / T."""
    return logits / temperature if logits.dtype == dtype else logits.to(dtype).div_(temperature)


def _empty(student: Tensor) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _computed_in(student: Tensor) -> torch.dtype:
    return torch.float32 if student.dtype in (torch.float16, torch.bfloat16) else student.dtype


def _scale(student: Tensor) -> float:
    return HALF_SCALE if student.dtype == torch.float16 else 1.0


def _piece_size(student: Tensor, limit: int) -> int:
    """Logits in a piece: what the limit allows, and on a CPU what its caches hold."""
    size = max(1, limit // (ARRAYS * _computed_in(student).itemsize))
    return min(size, CACHED) if student.device.type == "cpu" else size


def _check_shape(teacher: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(teacher.shape) != wanted:
        raise ValueError(
            f"student and teacher logits differ in shape: {wanted} vs {tuple(teacher.shape)}; "
            "both must be (B, C) over the same classes"
        )

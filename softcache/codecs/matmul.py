"""Float32 products that are float32: outside autocast, without TF32, and with a bound on what the order of sums changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24  # of float32


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products in here are computed in float32, whatever autocast or matmul precision is set; both are put back."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    newer = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # from torch 2.9 on
    before = [backend.fp32_precision for backend in newer]
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting was used alone, and says otherwise
        general = "highest"
    torch.set_float32_matmul_precision("highest")  # the newer ones as well: torch refuses settings that differ
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(general)
        for backend, precision in zip(newer, before, strict=True):
            backend.fp32_precision = precision


PIECE = 2**24  # numbers of a matrix in 16 bits that are widened at once


def affine(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """(B, C) float32 values @ matrix.T + offset, of (B, n), (C, n) and (C,) float32; the matrix may also be of a half type."""
    with full_float32(values.device):
        if matrix.dtype == torch.float32:
            return torch.addmm(offset, values, matrix.T)
        made = values.new_empty(len(values), len(matrix))
        rows = max(1, PIECE // max(1, matrix.shape[1]))
        for at in range(0, len(matrix), rows):
            made[:, at : at + rows] = torch.addmm(offset[at : at + rows], values, matrix[at : at + rows].float().T)
        return made


def affine_rounding(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """(B,) bound on how far two devices' `affine` of the same numbers may lie apart, over all orders of its sums.

    Each is within gamma = n u / (1 - n u) times the sum of its terms' sizes from the exact value, with n additions and
    products in float32, fused or not. Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1.
    """
    sizes = affine(values.abs(), matrix.abs(), offset.abs()).amax(dim=1)  # (B,), itself within gamma
    return _apart(sizes, matrix.shape[1])


def largest_norms(matrix: Tensor, offset: Tensor) -> tuple[float, float]:
    """The largest length of a row of a matrix of any float dtype, and the largest size of an offset."""
    rows = max(1, PIECE // max(1, matrix.shape[1]))
    lengths = [float(matrix[at : at + rows].double().norm(dim=1).max()) for at in range(0, len(matrix), rows)]
    return max(lengths, default=0.0), float(offset.abs().max()) if len(offset) else 0.0


def affine_rounding_by_norms(values: Tensor, norms: tuple[float, float], count: int) -> Tensor:
    """`affine_rounding` without a second product: by Cauchy's and Schwarz' inequality, from `largest_norms`; it is larger."""
    longest, offset = norms
    sizes = (values.double().norm(dim=1) * longest + offset).float() * (1 + 2.0**-22)
    return _apart(sizes, count)


def _apart(sizes: Tensor, terms: int) -> Tensor:
    """(B,) from the sums of the terms' sizes."""
    n = terms + 2  # the offset is a term as well; one more for the rounding of this bound
    gamma = n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)
    return 2 * gamma / (1 - gamma) * sizes + 2 * n * 2.0**-149  # what products below float32's least step lose

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


def affine(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """(B, C) float32 values @ matrix.T + offset, of (B, n), (C, n) and (C,) float32."""
    with full_float32(values.device):
        return torch.addmm(offset, values, matrix.T)


def affine_rounding(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """(B,) bound on how far two devices' `affine` of the same numbers may lie apart, over all orders of its sums.

    Each is within gamma = n u / (1 - n u) times the sum of its terms' sizes from the exact value, with n additions and
    products in float32, fused or not. Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1.
    """
    n = matrix.shape[1] + 2  # the offset is a term as well; one more for the rounding of this bound
    gamma = n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)
    sizes = affine(values.abs(), matrix.abs(), offset.abs()).amax(dim=1)  # (B,), itself within gamma
    return 2 * gamma / (1 - gamma) * sizes + 2 * n * 2.0**-149  # what products below float32's least step lose

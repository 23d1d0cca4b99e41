"""What `lowrank` is fitted with: a basis over classes, quantisers for coordinates in it, and who gets how many bits."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # coordinates of one width: their codes fill whole bytes
MAX_BITS = 14  # of one coordinate
MAX_RANK = 1024
LEAST_VARIANCE = 1e-10  # of a direction, relative to the first: what is below is float32's rounding
CHUNK = 4096  # classes that are multiplied in float64 at once
# quantisers see an eighth of the rows this much longer: later rows go further than the probe's
STRETCH, STRETCHED = 1.8, 1 / 8
# half of a quantiser's range, in deviations of its coordinate
LOADS = (1.0, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8, 3.1, 3.5, 3.9, 4.4, 5.0, 5.7, 6.5, 7.5, 8.7, 10.0)


def principal_components(rows: Tensor, *, levels: bool = True) -> tuple[Tensor, Tensor]:
    """Mean over the rows and main directions around it.

    Args:
        rows: (P, C) float32.
        levels: each row has its own mean over classes taken off first.

    Returns:
        (C,) mean and (C, r) float32 orthonormal basis, largest variance first; r is a multiple of GROUP, filled with zeros.
    """
    if levels:
        rows = rows - rows.mean(dim=1, keepdim=True)
    mean = rows.mean(dim=0)
    rows = rows - mean
    wide = rows.shape[1] > len(rows)  # then the inner products of rows are fewer than those of classes
    if wide:
        products = sum(part.double() @ part.double().T for part in rows.split(CHUNK, dim=1))
    else:
        products = sum(part.double().T @ part.double() for part in rows.split(CHUNK))
    assert isinstance(products, Tensor)
    variances, vectors = torch.linalg.eigh(products)
    variances, vectors = variances.flip(0)[:MAX_RANK], vectors.flip(1)[:, :MAX_RANK]
    kept = int((variances > (LEAST_VARIANCE * variances[0]).clamp(min=1e-30)).sum())
    basis = vectors[:, :kept]
    if wide:
        scaled = basis / variances[:kept].sqrt()
        basis = torch.cat([part.double().T @ scaled for part in rows.split(CHUNK, dim=1)])
    padding = -kept % GROUP if kept else GROUP
    return mean, torch.nn.functional.pad(basis.float(), (0, padding))


def quantise(values: Tensor, step: Tensor, bits: Tensor) -> Tensor:
    """(..., r) codes in [0, 2**bits) as float32: which cell of width `step`, half of them below 0, or the nearest end."""
    half = 2.0 ** (bits - 1)
    return torch.clamp((values / step).floor(), -half, half - 1) + half


def dequantise(codes: Tensor, bits: Tensor) -> Tensor:
    """(..., r) the middles of the cells, in steps; exact."""
    return codes + (0.5 - 2.0 ** (bits - 1))


def quantisers(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """For each number of bits, the step of each coordinate that leaves the least squared error, and that error.

    Args:
        coordinates: (n, r) float32 of some rows.

    Returns:
        (MAX_BITS + 1, r) steps and mean squared errors; those with 0 bits are 0 and the coordinate's own mean square.
    """
    deviation = coordinates.square().mean(dim=0).sqrt().clamp(min=1e-20)  # (r,)
    scaled = coordinates / deviation
    loads = torch.zeros(MAX_BITS + 1, coordinates.shape[1], device=coordinates.device)
    errors = torch.full_like(loads, torch.inf)
    errors[0] = (1 - STRETCHED + STRETCHED * STRETCH**2) * (deviation > 1e-20)
    for number in range(1, MAX_BITS + 1):
        bits = torch.tensor(float(number), device=scaled.device)
        for load in LOADS:
            step = load / 2.0 ** (bits - 1)
            error = torch.zeros_like(deviation)
            for length, weight in ((1.0, 1 - STRETCHED), (STRETCH, STRETCHED)):
                values = scaled * length
                error += weight * (dequantise(quantise(values, step, bits), bits) * step - values).square().mean(dim=0)
            better = error < errors[number]
            loads[number] = torch.where(better, step, loads[number])
            errors[number] = torch.where(better, error, errors[number])
    return loads * deviation, errors * deviation.square()


def allot(errors: Tensor, size: int) -> Tensor:
    """(r / GROUP,) int64 bits of each group's coordinates, `size` bytes in all: one more where it lowers the error most.

    Args:
        errors: (MAX_BITS + 1, r) of each coordinate with each number of bits.
    """
    by_group = errors.unflatten(1, (-1, GROUP)).sum(dim=2)
    gains = (
        (by_group[:-1] - by_group[1:]).cummin(dim=0).values
    )  # falling, so that the largest ones are the first of a group
    best = gains.flatten().argsort(descending=True, stable=True)[:size]
    return torch.bincount(best % gains.shape[1], minlength=gains.shape[1])

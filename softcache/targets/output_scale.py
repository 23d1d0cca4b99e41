"""The scale of an output without classes, as its dump measured it: so that unlike sizes and units count alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from softcache.errors import CacheError


def scale_factor(constants: Mapping[str, Tensor], kind: str, what: str) -> Tensor:
    """What (x - mean) is multiplied with: (W,) numbers, or a matrix (W, W) from the right.

    Args:
        constants: mean, deviation and maybe whitening of `measure_scale`.
        kind: "member": one number, the root of the mean variance; "each": each number's own deviation; "whiten".
        what: whose, for messages.

    Raises:
        CacheError: the cache does not hold what it needs, or all of its rows were alike.
    """
    if "mean" not in constants or "deviation" not in constants:
        raise CacheError(
            f"the cache holds no scale of {what}",
            tip="leave scale= out, or dump it again: an embedding or values have one from version 0.9 on",
        )
    deviation = constants["deviation"].double()
    size = float(deviation.square().mean().sqrt())
    if not size > 0:
        raise CacheError(f"{what} gave the same numbers for every sample: they have no scale", tip="leave scale= out")
    if kind == "member":
        return torch.full_like(deviation, 1 / size).float()
    if kind == "each":
        return _inverse(deviation).float()
    if "whitening" not in constants:
        raise CacheError(
            f"the cache holds nothing that whitens {what}",
            tip="dump it with --whiten, or use scale=each or scale=member",
        )
    return (_inverse(deviation)[:, None] * constants["whitening"].double()).float()


def scaled(values: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """(B, W) of (B, W): (x - mean) times the factor, at least in the factor's number type."""
    shifted = values.to(torch.promote_types(values.dtype, factor.dtype)) - mean
    return shifted * factor if factor.ndim == 1 else shifted @ factor.to(shifted.dtype)


def _inverse(deviation: Tensor) -> Tensor:
    """1 / deviation; 1 for a number that is always the same."""
    return torch.where(deviation > 0, 1 / torch.where(deviation > 0, deviation, 1.0), 1.0)

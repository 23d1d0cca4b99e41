"""Mixing steps: a view blended with its partner, another sample's view of the same index.

Everything comes from the sample's own draws: its partner's row first, then the share. So a mixed view does not depend on the
batch, the order, the workers or the ranks that render it. Blends are integer arithmetic.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from softcache.data.philox import Draws
from softcache.data.step_parameters import Range
from softcache.data.view_steps import UNIT

LEVELS = 4096  # steps of a mixing share
Alpha = Annotated[float, Range(0.01, 100)]


def draw_partner(draws: Draws, count: int) -> int:
    """A row of a sample table of `count` rows: the first draw of a mixing step. It may be the sample's own."""
    return draws.integer(0, count - 1)


def mixup(pair: tuple[Tensor, Tensor], draws: Draws, *, alpha: Alpha = 0.2) -> tuple[Tensor, float]:
    """k/4096 of the view plus the rest of its partner, rounded to the nearest level; k/4096 from Beta(alpha, alpha).

    Args:
        pair: the view and its partner, uint8 (C, H, W) each.
        draws: behind the draw of the partner.

    Returns:
        The blend, and the weight of the view's own label.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018).
    """
    share = quantised_beta(alpha, draws)
    own, partner = (image.to(torch.int32) for image in pair)
    blend = (share * own + (LEVELS - share) * partner + LEVELS // 2) >> 12
    return blend.to(torch.uint8), share / LEVELS


def cutmix(pair: tuple[Tensor, Tensor], draws: Draws, *, alpha: Alpha = 1.0) -> tuple[Tensor, float]:
    """A box of the partner pasted into the view: of area 1 - lambda, its middle anywhere, clipped; lambda from Beta.

    Args, returns: as for `mixup`; the weight of the own label is what is left of the view, 1 - area / (H W).

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (2019).
    """
    own, partner = pair
    height, width = own.shape[1:]
    share = quantised_beta(alpha, draws)
    side = math.isqrt((LEVELS - share) * (UNIT * UNIT // LEVELS))  # sqrt(1 - lambda) of height and width
    top, bottom = _clipped(draws.integer(0, UNIT - 1), side, height)
    left, right = _clipped(draws.integer(0, UNIT - 1), side, width)
    mixed = own.clone()
    mixed[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    left_over = height * width - (bottom - top) * (right - left)
    return mixed, left_over / (height * width)


def _clipped(middle: int, side: int, pixels: int) -> tuple[int, int]:
    """First and last border of a box about `middle`, both in 1/65536, inside 0..pixels; rounded, halves up."""
    edges = (middle - side // 2, middle - side // 2 + side)
    first, last = ((min(max(edge, 0), UNIT) * pixels + UNIT // 2) // UNIT for edge in edges)
    return first, last


def quantised_beta(alpha: float, draws: Draws) -> int:
    """0..4096: the nearest 1/4096 to a number from Beta(alpha, alpha)."""
    return math.floor(LEVELS * symmetric_beta(alpha, draws) + 0.5)


def symmetric_beta(alpha: float, draws: Draws) -> float:
    """A number from Beta(alpha, alpha), made of uniform numbers alone.

    alpha > 1/2: two of them, by Ulrich's formula. Else pairs, until one is accepted (Jöhnk): at least 3 of 4 are.

    Source: Devroye, "Non-Uniform Random Variate Generation" (1986), sections IX.3.5 and IX.4.2.
    """
    if alpha > 0.5:
        radius = math.sqrt(1 - (1 - draws.uniform()) ** (2 / (2 * alpha - 1)))
        return 0.5 + 0.5 * radius * math.cos(2 * math.pi * draws.uniform())
    while True:
        # logarithms, since u ** (1 / alpha) may vanish
        log_x, log_y = (math.log(1 - draws.uniform()) / alpha for _ in range(2))
        if math.exp(log_x) + math.exp(log_y) <= 1:
            return 1 / (1 + math.exp(min(log_y - log_x, 700.0)))

"""A transform that adds to an image what it drew from every global generator."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def make(scale: int = 1) -> Callable[[Tensor], Tensor]:
    made = random.random()

    def noise(image: Tensor) -> Tensor:
        drawn = [made, random.random(), np.random.random(), float(torch.rand(1))]
        moved = image.long() + scale * torch.tensor([int(256 * x) for x in drawn])
        return (moved % 256).to(torch.uint8)

    return noise

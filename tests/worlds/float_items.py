"""Pictures as floats: scaled to [0, 1], normalised once already, or with the values of their bytes; and vectors of any range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALES = {
    "unit": lambda x: x / 255,
    "normalised": lambda x: (x / 255 - 0.5) / 0.25,
    "bytes": lambda x: x,
    "overshot": lambda x: x / 255 * 1.3 - 0.15,  # as a cubic kernel leaves them
}


class Floats(torch.utils.data.Dataset):
    class_names = ("ant", "bee", "cat")

    def __init__(self, items: Tensor) -> None:
        self.items, self.labels = items, [i % 3 for i in range(len(items))]
        self.sample_keys = [f"float/{i}" for i in range(len(items))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.items[i], self.labels[i]


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8)).astype(np.uint8)


def pictures(scale: str = "unit", count: int = 24) -> Floats:
    """1 x 8 x 8; `scale` is one of SCALES, or uint8."""
    made = torch.from_numpy(pixels(count))
    return Floats(made if scale == "uint8" else SCALES[scale](made.float()))


def vectors(spread: float = 1.0, count: int = 24) -> Floats:
    """6 standardised features."""
    return Floats(torch.randn(count, 6, generator=torch.Generator().manual_seed(0)) * spread)

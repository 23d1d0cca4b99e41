"""520 small images of twelve classes, and networks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


class Toy:
    class_names = tuple(f"class-{i}" for i in range(12))

    def __init__(self, count: int = 520, shift: int = 0) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, 6, 6), dtype=np.uint8) + np.uint8(shift)
        self.labels = np.arange(count) % 12
        self.sample_keys = [f"toy/{i:04d}.png" for i in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy(shift: int = 0) -> Toy:
    return Toy(shift=shift)


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 12))

"""Images of which some have no label, and images with several labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Some(torch.utils.data.Dataset):
    class_names = ("ant", "bee", "cat", "dog")

    def __init__(self, count: int, multi: bool, prefix: str) -> None:
        draw = np.random.default_rng(8)
        self.images = draw.integers(0, 256, (99, 8, 8)).astype(np.uint8)[:count]
        self.labels = (draw.integers(0, 2, (99, 4)).astype(bool) if multi else draw.integers(-1, 4, 99))[:count]
        self.sample_keys = [f"{prefix}/{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), self.labels[i]


def some(count: int = 40, multi: bool = False, prefix: str = "some") -> Some:
    return Some(count, multi, prefix)

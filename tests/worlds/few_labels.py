"""Random images of which a quarter has the first class, or none has a label; and a transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Function = Callable[[np.ndarray], np.ndarray]


class Unlabelled(torch.utils.data.Dataset):
    def __init__(self, count: int, classes: int) -> None:
        self.images = np.random.default_rng(1).integers(0, 256, (count, 8, 8)).astype(np.uint8)
        self.sample_keys = [f"u/{i}" for i in range(count)]
        self.class_names = [f"kind {i}" for i in range(classes)]
        self.labels = np.full(count, -1)
        self.labels[: count // 4] = 0 if classes == 4 else -1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), self.labels[i]


def unlabelled(count: int = 40, classes: int = 50) -> Unlabelled:
    return Unlabelled(count, classes)


def inverted() -> Function:
    return lambda image: 255 - image

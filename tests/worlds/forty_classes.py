"""600 images of forty classes, and a teacher that subtracts pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


class Toy:
    class_names = tuple(f"class-{i}" for i in range(40))

    def __init__(self) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (600, 8, 8), dtype=np.uint8)
        self.labels = np.arange(600) % 40
        self.sample_keys = [f"toy/{i:04d}.png" for i in range(600)]

    def __len__(self) -> int:
        return 600

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy() -> Toy:
    return Toy()


def teacher() -> Function:
    return lambda batch: batch[:, :40] - batch[:, 20:60]

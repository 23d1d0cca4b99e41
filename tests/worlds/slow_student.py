"""Images, a teacher, and a student that can be told to take its time."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Toy:
    class_names = ("ant", "bee", "cat", "dog")

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 256, (180, 8, 8), dtype=np.uint8)
        self.labels = draw.integers(0, 4, 180)
        self.sample_keys = [f"toy/{i}" for i in range(180)]

    def __len__(self) -> int:
        return 180

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy() -> Toy:
    return Toy()


def teacher(num_classes: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


class Slow(nn.Module):
    """A student with dropout, BatchNorm and a pause in every training step."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, num_classes)
        )
        self.seconds = float(os.environ.get("STUDENT_PAUSE_S", "0"))

    def forward(self, batch: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.seconds)
        return self.layers(batch)


def student(num_classes: int) -> Slow:
    return Slow(num_classes)

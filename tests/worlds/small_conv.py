"""Images of which some have no label, and small convolutional students and a teacher."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Toy:
    """Images of which some have no label; those of the first half seldom have one."""

    class_names: tuple[str, ...] = ("ant", "bee", "cat", "dog", "eel")

    def __init__(self, count: int, seed: int, rare: bool) -> None:
        draw = np.random.default_rng(seed)
        self.images = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        truth = self.images.reshape(count, 8, 8)[:, 0, :5].argmax(axis=1)
        known = draw.random(count) < (0.03 if rare else np.where(np.arange(count) < count // 2, 0.1, 0.9))
        self.labels = np.where(known, truth, -1)
        self.sample_keys = [f"toy/{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy(count: int = 301, seed: int = 0, rare: bool = False) -> Toy:
    return Toy(count, seed, rare)


def turned() -> Toy:
    """Two of the classes, the other way round."""
    made = Toy(300, 5, False)
    made.labels, made.class_names = np.arange(300) % 2, ("bee", "ant")
    return made


class Net(nn.Module):
    def __init__(self, width: int, num_classes: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.pause_s = float(os.environ.get("STUDENT_PAUSE_S", "0"))
        wide, bias, normed = 2 * width, not norm, nn.BatchNorm2d if norm else nn.Identity
        self.early = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=bias), normed(width), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, wide, 3, 2, padding=1, bias=bias), normed(wide), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.pause_s:
            time.sleep(self.pause_s)
        maps = self.late(self.early(images.reshape(-1, 1, 8, 8) - 0.5))
        return self.head(self.dropout(maps.mean(dim=(2, 3))))


def net(num_classes: int, norm: bool = False, dropout: float = 0.0) -> Net:
    return Net(6, num_classes, norm, dropout)


def renamed(num_classes: int) -> nn.Module:
    """The same network, its layers below `body`."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net(6, num_classes, False, 0.0)

        def forward(self, images: Tensor) -> Tensor:
            return self.body(images)

    return Renamed()


def teacher(num_classes: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Net(8, num_classes, False, 0.0)
        nn.init.normal_(made.head.weight, std=5.0)
    return made

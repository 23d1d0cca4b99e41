"""Data and teachers of the golden caches. Everything is arithmetic, so that it is the same wherever it is made."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

SIZE = 6


def words(seed: int, count: int) -> np.ndarray:
    """(count,) uint64 of NumPy's raw Philox stream, which no version of it may change."""
    return np.random.Philox(key=seed).random_raw(count)


class Images:
    """Grey 6 x 6 images with keys, labels and class names."""

    def __init__(self, count: int, classes: int, multi_label: bool) -> None:
        self.images = (words(1, count * SIZE * SIZE) % 256).astype(np.uint8).reshape(count, SIZE, SIZE)
        drawn = words(2, count * classes).reshape(count, classes)
        self.labels = drawn % 3 == 0 if multi_label else (drawn[:, 0] % classes).astype(np.int64)
        self.sample_keys = [f"golden/{i:04d}.png" for i in range(count)]
        self.class_names = tuple(f"class {i}" for i in range(classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, object]:
        return self.images[index].copy(), self.labels[index]


class Network(nn.Module):
    """Two small layers whose weights are small whole numbers / 64 and / 12; the features of the first one lie in `hidden`."""

    def __init__(self, classes: int, width: int, seed: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(SIZE * SIZE, width)
        self.head = nn.Linear(width, classes)
        for number, part in enumerate(self.parameters()):
            drawn = words(100 * seed + number, part.numel()) % 33
            scale = 64 if number < 2 else 12
            part.data = torch.from_numpy(drawn.astype(np.float32) - 16).reshape(part.shape) / scale

    def collate(self, items: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1) / 256

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(batch)))


def images(count: int = 20, classes: int = 12, multi_label: bool = False) -> Images:
    return Images(count, classes, multi_label)


def network(classes: int = 12, width: int = 8, seed: int = 1) -> Network:
    return Network(classes, width, seed)

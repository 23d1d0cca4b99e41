"""Colour images of 101 classes, and a network with modules of every shape that features are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 101


class Images(torch.utils.data.Dataset):
    """Random 9 x 8 colour images, some without a label; a few are dark."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(3)
        self.images = draw.integers(0, 256, (count, 9, 8, 3)).astype(np.uint8)
        self.images[7::60] //= 8
        self.labels = draw.integers(-1, CLASSES, count)
        self.sample_keys = [f"wide/{i:04d}" for i in range(count)]
        self.class_names = tuple(f"class {i}" for i in range(CLASSES))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), self.labels[i]


class Net(nn.Module):
    """Modules of every shape that features are made of, and a final linear layer; `odd` bends dark images off it."""

    def __init__(self, num_classes: int, odd: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.point1, self.point2 = nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1)
        self.tokens = nn.Flatten(2)
        self.body = nn.Linear(36, 12)
        self.head = nn.Linear(12, num_classes)
        nn.init.normal_(self.body.weight)
        nn.init.normal_(self.head.weight, std=2)
        self.odd = nn.Linear(216, num_classes) if odd else None

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(item) for item in items]).permute(0, 3, 1, 2) / 255

    def forward(self, batch: Tensor) -> Tensor:
        first = self.conv1(batch)
        second = self.conv2(first.relu())
        self.point1(first), self.point2(second)
        logits = self.head(self.body(self.tokens(second).flatten(1)).tanh())
        if self.odd is None:
            return logits
        dark = batch.mean(dim=(1, 2, 3))[:, None] < 0.2
        return torch.where(dark, logits + 100 * self.odd(batch.flatten(1)), logits)


def images(count: int = 300) -> Images:
    return Images(count)


def net(num_classes: int, seed: int = 0, odd: bool = False) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(num_classes, odd)

"""Images and small networks of a kind that softcache does not build itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[[np.ndarray], np.ndarray]


CLASSES = ("ant", "bee", "cat")


class Images:
    class_names = CLASSES

    def __init__(self, count: int, size: int) -> None:
        draw = np.random.default_rng(0)
        self.labels = np.arange(count) % 3
        self.items = draw.integers(0, 128, (count, size, size, 3)).astype(np.uint8)
        self.items += (40 * self.labels[:, None, None, None]).astype(np.uint8)
        self.sample_keys = [f"some/{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.items[i].copy(), int(self.labels[i])


def images(count: int = 24, size: int = 16) -> Images:
    return Images(count, size)


class Vit(nn.Module):
    """Patches by a convolution, a class token, transformer blocks."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        blocks = [nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        return self.head(self.norm(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1)))[:, 0])


def vit(num_classes: int, width: int = 8) -> Vit:
    torch.manual_seed(0)
    return Vit(width, num_classes)


class NoHead(nn.Module):
    """Maps of classes, averaged: no linear layer gives the logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(8, num_classes, 3, 2, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv2(self.conv1(x)))


def no_head(num_classes: int) -> NoHead:
    torch.manual_seed(0)
    return NoHead(num_classes)


class Probabilities(nn.Module):
    output = "probs"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)).softmax(1)


def probabilities(num_classes: int) -> Probabilities:
    torch.manual_seed(0)
    return Probabilities(num_classes)


class Functional(nn.Module):
    """Pooled by a function: no module gives what the last layer takes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean(dim=(2, 3)))


def functional(num_classes: int) -> Functional:
    torch.manual_seed(0)
    return Functional(num_classes)

"""Vectors of eight numbers, and linear networks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Points:
    """Vectors of eight numbers, some without a label; `kind` multi: five yes-or-no labels each."""

    class_names = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")

    def __init__(self, count: int, seed: int, kind: str) -> None:
        draw = np.random.default_rng(seed)
        self.x = draw.normal(size=(count, 8)).astype(np.float32)
        truth = (self.x[:, :7] + draw.normal(size=(count, 7))).argmax(axis=1)
        self.labels = np.where(draw.random(count) < 0.8, truth, -1)
        if kind == "multi":
            self.labels = (draw.random((count, 7)) < 0.4).astype(np.uint8)
        self.sample_keys = [f"{seed}/{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return torch.from_numpy(self.x[i]), self.labels[i]


def points(count: int = 103, seed: int = 0, kind: str = "single") -> Points:
    return Points(count, seed, kind)


class Net(nn.Module):
    class_names: tuple[str, ...]

    def __init__(self, num_classes: int, scale: float, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.fc = nn.Linear(8, num_classes)
        with torch.no_grad():
            self.fc.weight.mul_(scale)
            self.fc.weight += scale * torch.eye(num_classes, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def net(num_classes: int, scale: float = 1.5, seed: int = 0) -> Net:
    return Net(num_classes, scale, seed)


def turned(num_classes: int, names: str = "") -> Net:
    """The same network, its classes the other way round, or other ones."""
    made = Net(num_classes, 1.5, 0)
    with torch.no_grad():
        made.fc.weight.copy_(made.fc.weight.flip(0))
        made.fc.bias.copy_(made.fc.bias.flip(0))
    made.class_names = tuple(names.split("+")) if names else Points.class_names[::-1]
    return made


def wider(num_classes: int) -> Net:
    """The same network with a class more, the others the other way round."""
    net, made = Net(num_classes, 1.5, 0), Net(num_classes + 1, 1.5, 0)
    with torch.no_grad():
        made.fc.weight[1:], made.fc.bias[1:] = net.fc.weight.flip(0), net.fc.bias.flip(0)
    made.class_names = ("hen", *Points.class_names[::-1])
    return made


def broken(num_classes: int) -> Net:
    made = Net(num_classes, 1.0, 0)
    with torch.no_grad():
        made.fc.bias[2] = float("nan")
    return made

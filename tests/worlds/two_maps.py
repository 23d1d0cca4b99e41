"""Images with labels of some kind, teachers, and students."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = ("ant", "bee", "cat", "dog")


class Images:
    class_names = CLASSES

    def __init__(self, labels: str, count: int) -> None:
        draw = np.random.default_rng(0)
        self.items = draw.integers(0, 256, (count, 8, 8)).astype(np.uint8)
        self.labels = {
            "all": draw.integers(0, 4, count),
            "none": np.full(count, -1),
            "many": draw.integers(0, 2, (count, 4)).astype(bool),
            "ants": np.zeros(count, np.int64),
        }[labels]
        self.sample_keys = [f"some/{i:02d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.items[i], self.labels[i]


def images(labels: str = "all", count: int = 20) -> Images:
    return Images(labels, count)


class Net(nn.Module):
    """Two stages of maps, 8 x 8 and 4 x 4, and a linear layer; or what is not one, at the end."""

    def __init__(self, num_classes: int, widths: tuple[int, ...], seed: int, end: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stage1 = nn.Conv2d(1, widths[0], 3, padding=1)
            self.stage2 = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(widths[1])
            self.fc = nn.Linear(widths[1], num_classes)
        self.end, self.output = end, "log_probs" if end == "log_probs" else "logits"

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(item) for item in items])[:, None].float() / 255

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stage2(self.stage1(x).relu()))
        logits = self.fc(x.mean(dim=(2, 3)))
        return {"linear": logits, "scaled": 2 * logits, "log_probs": logits.log_softmax(1)}[self.end]


def teacher(num_classes: int, seed: int = 1, end: str = "linear") -> Net:
    return Net(num_classes, (4, 8), seed, end)


def student(num_classes: int, end: str = "linear") -> Net:
    return Net(num_classes, (3, 6), 3, end)


def narrow() -> Net:
    """For three classes, whatever the data has."""
    return Net(3, (3, 6), 3, "linear")


class Small(nn.Module):
    """One map of 2 x 2, which is smaller than the teacher's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 6, 4, stride=4)
        self.fc = nn.Linear(24, num_classes)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(item) for item in items])[:, None].float() / 255

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


def small(num_classes: int) -> Small:
    return Small(num_classes)

"""Images with all, some, no or several labels, and teachers of each output kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[[np.ndarray], np.ndarray | Tensor]


CLASSES = ("ant", "bee", "cat", "dog")


class Toy:
    class_names: tuple[str, ...] = CLASSES

    def __init__(self, labels: str, count: int) -> None:
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        truth = self.images.reshape(count, -1)[:, :4].argmax(axis=1)
        some = np.where(np.arange(count) % 3 == 0, truth, -1)
        many = self.images.reshape(count, -1)[:, :4] > 127
        self.labels = {"all": truth, "some": some, "none": np.full(count, -1), "many": many}[labels]
        self.sample_keys = [f"toy/{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy(labels: str = "all", count: int = 90) -> Toy:
    return Toy(labels, count)


def five_classes() -> Toy:
    data = Toy("none", 90)
    data.class_names = (*CLASSES, "elk")
    return data


def turned() -> Toy:
    data = Toy("none", 90)
    data.class_names = CLASSES[::-1]
    return data


def mirrored() -> Toy:
    data = Toy("all", 90)
    data.class_names = CLASSES[::-1]
    data.labels = 3 - data.labels
    return data


class Said:
    """A function that says what it gives."""

    def __init__(self, output: str | None, function: Function) -> None:
        self.output, self.function = output, function

    def __call__(self, batch: np.ndarray) -> np.ndarray | Tensor:
        return self.function(batch)


def sharp() -> Said:
    return Said("logits", lambda batch: batch[:, :4] / 30 - 3)


def blunt() -> Said:
    return Said("logits", lambda batch: (batch[:, :4] + batch[:, 4:8]) / 60)


def likely() -> Said:
    return Said("log_probs", lambda batch: torch.as_tensor(batch[:, :4] / 30).log_softmax(1))


def wild(num_classes: int) -> nn.Module:
    class Wild(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, num_classes)

        def forward(self, batch: Tensor) -> Tensor:
            return self.fc(batch.flatten(1)) * 1e38 * 1e3

    return Wild()

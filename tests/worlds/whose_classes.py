"""Images whose brightest pixel is their class, and teachers that read the pixels in any order and call them anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 12


class Pixels:
    """(1, 12) images: of class c the pixel c is bright, in noise."""

    def __init__(self, names: str, count: int, noise: int, first: int, seed: int, numbered: bool) -> None:
        draw = np.random.default_rng(seed)
        self.class_names: Sequence[str] = names.split("+")
        self.labels = draw.integers(0, len(self.class_names), count)
        self.images = draw.integers(0, max(1, noise), (count, 1, WIDTH)).astype(np.uint8)
        self.images[np.arange(count), 0, self.labels] += 100
        self.labels = self.labels + first
        self.sample_keys = [f"pixels/{i:04d}" for i in range(count)]
        if numbered:
            del self.class_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        return self.images[index], self.labels[index]


def data(
    names: str = "ant+bee+cat+dog",
    count: int = 64,
    noise: int = 120,
    first: int = 0,
    seed: int = 0,
    numbered: bool = False,
) -> Pixels:
    return Pixels(names, count, noise, first, seed, numbered)


class Reader(nn.Module):
    """Logits are pixels / 10, in an order of its own."""

    def __init__(self, order: Sequence[int], names: Sequence[str] | None) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.tensor(order).float())
        if names:
            self.class_names = tuple(names)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])

    def forward(self, batch: Tensor) -> Tensor:
        return batch.flatten(1).float()[:, self.order.long()] / 10


def reader(order: str = "0+1+2+3", names: str = "") -> Reader:
    return Reader([int(place) for place in order.split("+")], names.split("+") if names else None)


def same(value: float = 1.0, count: int = 4) -> Callable[[np.ndarray], np.ndarray]:
    """The same logits for all samples."""
    return lambda batch: np.tile(value * np.arange(count, dtype=np.float32), (len(batch), 1))


class Estimator:
    """predict_proba of the pixels' softmax, and a `predict` that may decide otherwise."""

    def __init__(self, values: Sequence[Any], shifted: bool) -> None:
        self.classes_, self.shifted = np.asarray(values), shifted

    def predict_proba(self, batch: np.ndarray) -> np.ndarray:
        powers = np.exp(batch[:, : len(self.classes_)] / 10)
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def predict(self, batch: np.ndarray) -> np.ndarray:
        largest = self.predict_proba(batch).argmax(axis=1)
        return np.asarray(self.classes_[(largest + self.shifted) % len(self.classes_)])


def estimator(values: str = "1+2+3+4", kind: str = "int", shifted: bool = False) -> Estimator:
    make = {"int": int, "float": float, "str": str}[kind]
    return Estimator([make(value) for value in values.split("+")], shifted)

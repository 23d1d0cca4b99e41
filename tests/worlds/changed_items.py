"""Data sets that are no images, and images of which some were changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Items(torch.utils.data.Dataset):
    class_names = ("ant", "bee", "cat", "dog")

    def __init__(self, items: Any, prefix: str) -> None:
        self.items, self.labels = items, [i % 4 for i in range(len(items))]
        self.sample_keys = [f"{prefix}/{i}" for i in range(len(items))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.items[i], self.labels[i]


def images(count: int = 300, changed: int = -1, by: int = 99) -> Items:
    images = np.random.default_rng(0).integers(0, 156, (count, 6, 6)).astype(np.uint8)
    if changed >= 0:
        images[changed] += by
    return Items(images, "image")


def vectors(count: int = 40, changed: int = -1) -> Items:
    items = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    if changed >= 0:
        items[changed, 2] += 1e-6
    return Items(items, "vector")


def texts(count: int = 40, changed: int = -1) -> Items:
    return Items([f"word{i % 7} and word{i % 5}" + "!" * (i == changed) for i in range(count)], "text")


class Lengths(nn.Module):
    """A teacher of strings."""

    def collate(self, items: Sequence[str]) -> Tensor:
        return torch.tensor([[len(item), item.count("a"), item.count("3"), 1.0] for item in items])

    def forward(self, batch: Tensor) -> Tensor:
        return batch


def lengths() -> Lengths:
    return Lengths()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 4)

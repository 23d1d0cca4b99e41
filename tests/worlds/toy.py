"""A user's file. Data: `{toy}:images?count=40`. Teachers: `{toy}:exact?seed=1`, `{toy}:network?seed=1`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASS_NAMES = ("ant", "bee", "cat", "dog")


class Images(torch.utils.data.Dataset):
    """Random 8 x 8 images with keys, labels and class names; no two are alike."""

    def __init__(self, count: int, seed: int, rgb: bool, multi_label: bool) -> None:
        draw = np.random.default_rng(seed)
        self.images = draw.integers(0, 256, (count, 8, 8, 3) if rgb else (count, 8, 8)).astype(np.uint8)
        self.labels = draw.integers(0, 2, (count, 4)).astype(bool) if multi_label else draw.integers(0, 4, count)
        self.sample_keys = [f"toy/{i:04d}" for i in range(count)]
        self.class_names = CLASS_NAMES

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), self.labels[i]


class Exact(nn.Module):
    """A linear teacher of whole numbers / 1024: exact in float32, so equal for any batch, order and thread count."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight).float() / 1024)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])  # pixels as they are, 0..255

    def forward(self, batch: Tensor) -> Tensor:
        return batch.flatten(1).float() @ self.weight.T


def images(count: int = 40, seed: int = 0, rgb: bool = False, multi_label: bool = False) -> Images:
    return Images(count, seed, rgb, multi_label)


def exact(num_classes: int, input_shape: tuple[int, ...], seed: int = 0) -> Exact:
    return Exact(np.random.default_rng(seed).integers(-8, 9, (num_classes, prod(input_shape))))


def network(
    num_classes: int, input_shape: tuple[int, ...], seed: int = 0, scale: float = 4.0, level: float = 0.0
) -> nn.Sequential:
    """A network whose logits spread by about `scale` around `level`, and depend on the batch in their last bits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, last = nn.Linear(prod(input_shape), 32), nn.Linear(32, num_classes)
        nn.init.normal_(first.weight, std=0.3)
        nn.init.normal_(last.weight, std=scale / 32**0.5)
        nn.init.constant_(last.bias, level)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)

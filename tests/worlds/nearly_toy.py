"""Data sets that are nearly the toy's, and a teacher that takes its time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASS_NAMES = ("ant", "bee", "cat", "dog")


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int, names: tuple[str, ...], keys: list[str], label: int, changed: list[int]) -> None:
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 256, (count, 8, 8)).astype(np.uint8)
        self.images[changed] ^= 255
        self.labels = np.full(count, label)
        self.sample_keys, self.class_names = keys, names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), self.labels[i]


def images(count: int = 40, first: int = 0, label: int = -1, reverse: bool = False, changed: str = "") -> Images:
    keys = [f"some/{i}" for i in range(first, first + count)]
    return Images(count, CLASS_NAMES[:: -1 if reverse else 1], keys, label, [int(i) for i in changed.split("-") if i])


class Slow(nn.Module):
    """Whole numbers / 1024 of the pixels, after a pause: exact in any order."""

    class_names = CLASS_NAMES

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.random.default_rng(5).integers(-8, 9, (4, 64))).float() / 1024)
        self.seconds = float(os.environ.get("TEACHER_PAUSE_S", "0"))

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])

    def forward(self, batch: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return batch.flatten(1).float() @ self.weight.T


def slow() -> Slow:
    return Slow()


class Wide(torch.utils.data.Dataset):
    """Unlabelled grey images, 120 classes."""

    num_classes = 120

    def __init__(self, count: int) -> None:
        self.images = np.random.default_rng(2).integers(0, 256, (count, 8, 8)).astype(np.uint8)
        self.class_names = [f"class {i}" for i in range(120)]
        self.sample_keys = [f"wide/{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), -1


def wide(count: int = 40) -> Wide:
    return Wide(count)


class Bent(nn.Module):
    """120 logits out of six numbers; where the first pixel is bright, something without any structure is added."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 120)
        nn.init.normal_(self.first.weight, std=0.5, generator=generator)
        nn.init.normal_(self.last.weight, std=2.0, generator=generator)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.last.bias)
        self.odd = nn.Parameter(torch.randn(64, 120, generator=generator) * 40)
        self.bright = 200 if seed % 2 else 999

    def forward(self, batch: Tensor) -> Tensor:
        pixels = batch.flatten(1)
        bright = pixels[:, :1] > (self.bright / 255)
        return (
            self.last(torch.tanh(self.first(pixels - pixels.mean(1, keepdim=True))))
            + bright * torch.sin(pixels @ self.odd) * 3
        )


def bent(seed: int = 1) -> Bent:
    return Bent(seed)

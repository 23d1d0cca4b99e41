"""Images, teachers (exact in float16 or not) and students of small maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = ("ant", "bee", "cat", "dog", "elk")


class Images:
    """Random images; every fifth has no label."""

    class_names = CLASSES

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.items = draw.integers(0, 256, (78, 8, 8)).astype(np.uint8)
        self.labels = np.where(np.arange(78) % 5 == 3, -1, draw.integers(0, 5, 78))
        self.sample_keys = [f"some/{i:02d}" for i in range(78)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.items[i], self.labels[i]


def images() -> Images:
    return Images()


class Whole(nn.Module):
    """Whole numbers up to 5 in size, over 4."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.step).round().clamp(-5, 5) / 4


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT  # (B, H W, C)


class Net(nn.Module):
    """Three stages of maps, tokens made of the last, and a linear layer on their mean."""

    stage1: nn.Module
    stage2: nn.Module
    stage3: nn.Module

    def __init__(
        self,
        classes: int,
        widths: tuple[int, ...],
        strides: tuple[int | tuple[int, int], ...],
        seed: int,
        whole: bool = False,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = 1
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
                conv = nn.Conv2d(before, width, 3, stride=stride, padding=1)
                after = Whole((16, 4, 4)[i - 1]) if whole else nn.Identity()
                setattr(self, f"stage{i}", nn.Sequential(conv, after))
                before = width
            self.tokens = Tokens()
            self.fc = nn.Linear(before, classes)
            if whole:
                for name, parameter in self.named_parameters():
                    top = 4 if name.startswith("fc") else 3
                    parameter.data = torch.randint(1 - top, top, parameter.shape).float()

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(item) for item in items])[:, None].float() // 32  # whole numbers up to 7

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(x).relu())
        return self.fc(self.tokens(self.stage3(x.relu())).mean(dim=1))


def teacher(seed: int = 1, whole: bool = True) -> Net:
    return Net(5, (4, 8, 8), (1, 2, 2), seed, whole)


def student(num_classes: int, wide: bool = False) -> Net:
    return Net(num_classes, (4, 8, 8) if wide else (3, 5, 6), (1, 2, 2), 9)


def small(num_classes: int) -> Net:
    """Its maps are 4 x 4, 2 x 2 and 2 x 2."""
    return Net(num_classes, (3, 5, 6), (2, 2, 1), 9)


def long(num_classes: int) -> Net:
    """Its maps are 8 x 8, 8 x 4 and 8 x 2."""
    return Net(num_classes, (3, 5, 6), (1, (1, 2), (1, 2)), 9)

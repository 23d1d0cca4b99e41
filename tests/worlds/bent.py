"""24 classes, some samples without a label; a teacher whose logits some rows break out of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int, multi: bool) -> None:
        draw = np.random.default_rng(3)
        self.images = draw.integers(0, 256, (count, 6, 6)).astype(np.uint8)
        self.labels = draw.integers(-1, 24, count) if not multi else draw.integers(0, 8, (count, 24)) == 0
        self.sample_keys = [f"some/{i}" for i in range(count)]
        self.class_names = ["3", *(f"class {i}" for i in range(1, 24))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i].copy(), self.labels[i]


def images(count: int = 520, multi: bool = False) -> Images:
    return Images(count, multi)


class Bent(nn.Module):
    """24 logits out of six numbers; where the mean pixel is bright, something without any structure is added."""

    def __init__(self, seed: int, bright: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(36, 6), nn.Linear(6, 24)
        nn.init.normal_(self.first.weight, std=0.5, generator=generator)
        nn.init.normal_(self.last.weight, std=2.0, generator=generator)
        nn.init.normal_(self.last.bias, generator=generator)
        nn.init.zeros_(self.first.bias)
        self.odd = nn.Parameter(torch.randn(36, 24, generator=generator) * 40)
        self.bright = bright

    def forward(self, batch: Tensor) -> Tensor:
        pixels = batch.flatten(1)
        hidden = torch.tanh(self.first(pixels - pixels.mean(1, keepdim=True)))
        logits = self.last(hidden)
        if self.bright:
            logits = logits + (pixels.mean(1, keepdim=True) > 0.55) * torch.sin(pixels @ self.odd) * 3
        return logits


def bent(seed: int = 1, bright: bool = False) -> Bent:
    return Bent(seed, bright)

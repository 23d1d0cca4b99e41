"""Samples that carry the logits which each of several networks gives for them: whatever numbers a test wants to be measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Given:
    """Rows of (K, C) logits out of a .npz file with `logits` (N, K, C) and `labels`, which may have NaN for the unknown."""

    def __init__(self, path: str) -> None:
        with np.load(path) as stored:
            logits, self.labels = stored["logits"], stored["labels"]
        self.x = torch.from_numpy(logits.reshape(len(logits), -1))
        self.class_names = tuple(f"c{i}" for i in range(logits.shape[2]))
        self.sample_keys = [f"given/{i}" for i in range(len(logits))]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.x[i], self.labels[i]


def given(path: str) -> Given:
    return Given(path)


class Pick(nn.Module):
    def __init__(self, num_classes: int, index: int) -> None:
        super().__init__()
        self.first, self.count = index * num_classes, num_classes
        self.one = nn.Parameter(torch.ones(1))  # a network without weights is none

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first : self.first + self.count] * self.one


def pick(num_classes: int, index: int = 0) -> Pick:
    return Pick(num_classes, index)

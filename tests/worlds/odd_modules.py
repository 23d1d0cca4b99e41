"""Networks with inputs and outputs of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def plain(num_classes: int, input_shape: tuple[int, ...] | None = None, width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, num_classes))


class Lengths(nn.Module):
    output = "probs"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(1, num_classes)

    def collate(self, items: Sequence[str]) -> dict[str, Tensor]:
        return {"lengths": torch.tensor([[float(len(item))] for item in items])}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc(batch["lengths"]).softmax(1)


class Odd(nn.Module):
    output = "scores"


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def not_a_module() -> Any:
    return print

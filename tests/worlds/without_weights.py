"""A teacher that has no weights: it is known by its first outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Sums:
    """An 8 x 8 image in four pieces, each summed: exact in float32."""

    def collate(self, items: Sequence[Any]) -> Tensor:
        return torch.stack([torch.as_tensor(item) for item in items]).float()

    def __call__(self, batch: Tensor) -> Tensor:
        return batch.reshape(len(batch), 4, -1).sum(dim=2)


def sums() -> Sums:
    return Sums()

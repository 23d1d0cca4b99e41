"""Images and texts of 40 classes; teachers with a final layer, without one, and with logits beyond float16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[[np.ndarray], np.ndarray]


CLASSES = tuple(f"c{i:02d}" for i in range(40))


class Data:
    class_names = CLASSES

    def __init__(self, items: np.ndarray | list[str], multi_label: bool = False) -> None:
        draw = np.random.default_rng(1)
        self.items = items
        self.labels = (
            draw.integers(0, 2, (len(items), 40)).astype(bool) if multi_label else draw.integers(0, 40, len(items))
        )
        self.sample_keys = [f"some/{'ä' * 20}-{i:04d}.png" for i in range(len(items))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.items[i], self.labels[i]


def images(count: int = 400, multi_label: bool = False, marked: tuple[int, ...] = ()) -> Data:
    items = np.random.default_rng(0).integers(0, 250, (count, 8, 8)).astype(np.uint8)
    items[list(marked), 4, 4] = 255
    return Data(items, multi_label)


def texts(count: int = 300) -> Data:
    draw = np.random.default_rng(2)
    return Data([" ".join(draw.choice(["one", "two", "three", "four"], draw.integers(1, 9))) for _ in range(count)])


class Narrow(nn.Module):
    def __init__(self, seed: int, factor: float, spikes: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.fc = nn.Linear(64, 6), nn.Linear(6, 40)
            nn.init.normal_(self.body.weight, std=0.4)
            nn.init.normal_(self.fc.weight, std=2.0 * factor)
        self.spikes = spikes

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1).float() / 255

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.body(x - 0.5).tanh())
        if self.spikes:
            marked = x.amax(dim=1, keepdim=True) == 1
            logits = logits + marked * self.spikes * torch.sin(torch.arange(1, 41) * (1 + 97 * x[:, 20:21]))
        return logits


def narrow(seed: int = 1, factor: float = 1.0, spikes: float = 0.0) -> Narrow:
    return Narrow(seed, factor, spikes)


class Words(Narrow):
    def collate(self, items: Sequence[Any]) -> Tensor:
        return torch.stack([torch.tensor([hash_of(text, i) for i in range(64)]) for text in items])


def hash_of(text: str, i: int) -> float:
    return sum(ord(c) * (i + 3) % 17 for c in text) % 23 / 23


def words() -> Words:
    return Words(1, 1.0)


def function() -> Function:
    weight = np.random.default_rng(5).integers(-9, 10, (64, 40))
    return lambda batch: np.sin(batch.astype(np.float64) @ weight * 0.37) * 3

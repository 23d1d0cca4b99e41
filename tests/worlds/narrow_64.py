"""300 images and teachers of 64 classes: structured ones with a final layer, unstructured ones without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[[np.ndarray], np.ndarray]

CLASSES = tuple(f"c{i:02d}" for i in range(64))


class Data:
    class_names = CLASSES

    def __init__(self, count: int, marked: Sequence[int], multi_label: bool) -> None:
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 250, (count, 8, 8)).astype(np.uint8)
        self.images[list(marked), 4, 4] = 255  # in the middle, so that every view shows it
        self.labels = draw.integers(0, 2, (count, 64)).astype(bool) if multi_label else draw.integers(-1, 64, count)
        self.sample_keys = [f"some/{i:03d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def images(count: int = 300, marked: tuple[int, ...] = (), multi_label: bool = False) -> Data:
    return Data(count, marked, multi_label)


class Narrow(nn.Module):
    """64 logits out of 6 numbers. Where a pixel is 255: those 6 are `value`, or the logits get `spikes` off any plane."""

    def __init__(self, seed: int, value: float, spikes: float, gives: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.fc = nn.Linear(64, 6), nn.Linear(6, 64)
            nn.init.normal_(self.body.weight, std=0.4)
            nn.init.normal_(self.fc.weight, std=2.0)
        self.value, self.spikes, self.output = value, spikes, gives

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1).float() / 255

    def forward(self, x: Tensor) -> Tensor:
        marked = x.amax(dim=1, keepdim=True) == 1
        hidden = self.body(x - 0.5).tanh()
        if self.value:
            hidden = torch.where(marked, self.value, hidden)
        logits = self.fc(hidden)
        if self.spikes:
            logits = logits + marked * self.spikes * torch.sin(torch.arange(1, 65) * (1 + 97 * x[:, 20:21]))
        return logits.softmax(dim=1) if self.output == "probs" else logits


def narrow(seed: int = 1, value: float = 0.0, spikes: float = 0.0, gives: str = "logits") -> Narrow:
    return Narrow(seed, value, spikes, gives)


def noise(scale: float = 3.0) -> Function:
    """Logits without structure, as a function: whole numbers of pixels, so that any batch gives the same bits."""
    weight = np.random.default_rng(5).integers(-9, 10, (64, 64))

    def logits(batch: np.ndarray) -> np.ndarray:
        return np.sin(batch.astype(np.float64) @ weight * 0.37) * scale

    return logits


def student(num_classes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

"""Data and teachers of the dump tests. Weights are small whole numbers, so that sums are exact in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
CLASSES = ("ant", "bee", "cat", "dog")


Function = Callable[[np.ndarray], np.ndarray]


class Toy:
    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], keys: list[str]) -> None:
        self.images, self.labels, self.class_names, self.sample_keys = images, labels, class_names, keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy(count: int = 300, flipped: bool = False, multi: bool = False, twice: bool = False) -> Toy:
    """Images and labels from the arrays beside this file; `flipped`: the classes in the opposite order."""
    images, labels = np.load(HERE / "images.npy")[:count], np.load(HERE / "labels.npy")[:count]
    names, keys = CLASSES, [f"toy/{i:04d}.png" for i in range(count)]
    if flipped:
        labels, names = np.where(labels < 0, -1, 3 - labels), CLASSES[::-1]
    if multi:
        labels = np.stack([labels == 0, labels == 1, images[:, 0, 0] > 99, images[:, 0, 1] > 200], axis=1)
    if twice:
        keys[17] = keys[4]
    return Toy(images, labels, names, keys)


def weights() -> Any:
    generator = np.random.default_rng(11)
    return generator.integers(-3, 4, (4, 64)), generator.integers(-50, 50, 4)


class Exact(nn.Module):
    """Whole-number logits of the raw pixels, up to a few thousand."""

    class_names: tuple[str, ...]

    def __init__(self, sign: int = 1, classes: int = 4) -> None:
        super().__init__()
        weight, bias = weights()
        self.fc = nn.Linear(64, classes)
        with torch.no_grad():
            self.fc.weight.copy_(sign * torch.from_numpy(weight)[:classes])
            self.fc.bias.copy_(torch.from_numpy(bias)[:classes])

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)).float().reshape(-1) for item in items])

    def forward(self, batch: Tensor) -> Tensor:
        return self.fc(batch)


def exact(sign: int = 1) -> Exact:
    return Exact(sign)


def opposite() -> Exact:
    net = Exact()
    net.class_names = CLASSES[::-1]
    return net


def others() -> Exact:
    net = Exact()
    net.class_names = ("ant", "bee", "cow", "dog")
    return net


def three() -> Exact:
    return Exact(classes=3)


class ByConvolution(Exact):
    """The same logits without a final nn.Linear: under autocast they come out in the half type."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.fc.weight.data
        del self.fc
        self.conv = nn.Conv1d(64, 4, 1, bias=False)
        self.conv.weight.data = weight[:, :, None].clone()

    def forward(self, batch: Tensor) -> Tensor:
        return self.conv(batch[:, :, None])[:, :, 0]


def convolution() -> ByConvolution:
    return ByConvolution()


class Said:
    """A function that says what it gives."""

    def __init__(self, output: str | None, function: Function) -> None:
        self.output, self.function = output, function

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self.function(batch)


def slow(seconds: float = 0.015) -> Said:
    """The exact logits, after a pause."""
    weight, bias = weights()

    def run(batch: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return batch @ weight.T.astype(np.float32) + bias.astype(np.float32)

    return Said("logits", run)


def softmax_of(kind: str = "log_probs", declared: bool = True) -> Said:
    weight, bias = weights()

    def run(batch: np.ndarray) -> np.ndarray:
        logits = (batch.astype(np.float64) @ weight.T + bias) / 500
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits if kind == "log_probs" else np.exp(logits)

    return Said(kind if declared else None, run)


def yes_no() -> Said:
    """Multi-label probabilities: pixel / 255 of the first four pixels, so that 0 and 1 occur."""
    return Said("probs", lambda batch: batch[:, :4].astype(np.float64) / 255)


def bad(value: float, pixel: int = 255) -> Said:
    """Logits that are fine until the first pixel is `pixel`."""

    def run(batch: np.ndarray) -> np.ndarray:
        logits = np.tile(np.arange(4, dtype=np.float32), (len(batch), 1))
        logits[batch[:, 0] == pixel, 2] = value
        return logits

    return Said("logits", run)


def two() -> Function:
    """Two classes: the first two pixels."""
    return lambda batch: np.stack([batch[:, 0], batch[:, 1]], axis=1)


def neighbours() -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    data = toy(120)
    known = data.labels >= 0
    return KNeighborsClassifier(3).fit(data.images[known].reshape(known.sum(), -1), data.labels[known])


def ridge() -> Any:
    from sklearn.linear_model import RidgeClassifier

    data = toy(120)
    known = data.labels >= 0
    names = np.array(CLASSES[::-1])[data.labels[known]]  # fitted on strings: sorted by name
    return RidgeClassifier().fit(data.images[known].reshape(known.sum(), -1), names)


def student(num_classes: int, class_names: Sequence[str]) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

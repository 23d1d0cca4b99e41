"""Images with and without classes, with numbers in the place of labels; teachers that give embeddings and values."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASS_NAMES = ("ant", "bee", "cat")


class Images(torch.utils.data.Dataset):
    """8 x 8 images; labels by `kind`: "none", "classes", or "score", a number with a fraction."""

    def __init__(self, count: int, seed: int, kind: str) -> None:
        draw = np.random.default_rng(seed)
        place = draw.integers(0, 3, count)
        patterns = np.random.default_rng(7).uniform(60, 195, (3, 8, 8))
        self.images = np.clip(patterns[place] + draw.normal(0, 30, (count, 8, 8)), 0, 255).astype(np.uint8)
        self.sample_keys = [f"n/{seed}/{i:04d}" for i in range(count)]
        if kind == "classes":
            self.labels, self.class_names = place, CLASS_NAMES
        elif kind == "score":
            self.labels = self.images.mean(axis=(1, 2)) / 100

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        image = self.images[i].copy()
        return (image, self.labels[i]) if hasattr(self, "labels") else image


class Embedder(nn.Module):
    """(B, D) of a batch of images: tanh of a linear map, `times` some number; `loud`: every 100th ten times as large."""

    def __init__(self, width: int, inputs: int, seed: int, loud: bool, times: float) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, inputs, generator=draw) / inputs**0.5)
        self.scale: Tensor
        self.register_buffer("scale", torch.where(torch.arange(width) % 100 == 0, 10.0 if loud else 1.0, 1.0) * times)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])

    def forward(self, batch: Tensor) -> Tensor:
        return torch.tanh((batch.flatten(1).to(self.weight.dtype) / 128 - 1) @ self.weight.T) * self.scale


class Whole(nn.Module):
    """(B, 2) whole numbers of a batch: its sum, and the number of bright pixels."""

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])

    def forward(self, batch: Tensor) -> Tensor:
        flat = batch.flatten(1).long()
        return torch.stack([flat.sum(dim=1), (flat > 127).sum(dim=1)], dim=1).float()


def images(count: int = 60, seed: int = 0, kind: str = "none") -> Images:
    return Images(count, seed, kind)


def embedder(
    input_shape: tuple[int, ...], width: int = 12, seed: int = 0, loud: bool = False, times: float = 1.0
) -> Embedder:
    return Embedder(width, prod(input_shape), seed, loud, times)


def whole() -> Whole:
    return Whole()


def maps() -> nn.Module:
    """No vector: (B, 4, 8, 8)."""
    net = nn.Conv2d(1, 4, 3, padding=1)
    net.collate = lambda items: torch.stack([torch.as_tensor(i)[None].float() for i in items])  # type: ignore[assignment]
    return net


class Backbone(nn.Module):
    """A network whose own output is no tensor: {"maps": (B, 4, 8, 8), "said": "..."}; `shaky`: no two passes are alike."""

    def __init__(self, shaky: bool) -> None:
        super().__init__()
        self.stem, self.pooled, self.shaky = nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), shaky
        draw = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draw)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item))[None] for item in items])

    def forward(self, batch: Tensor) -> dict[str, Any]:
        maps = torch.tanh(self.stem(batch.to(self.stem.weight.dtype) / 255))
        self.pooled(maps + torch.randn(()) if self.shaky else maps)
        return {"maps": maps, "said": "nothing"}


def backbone(shaky: bool = False) -> Backbone:
    return Backbone(shaky)


def classifier(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """A network that ends with a linear layer, of classes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 6), nn.Tanh(), nn.Linear(6, num_classes))


class Chosen:
    """A regression of scikit-learn's kind: (B,) of a batch, one number a sample."""

    def predict(self, batch: np.ndarray) -> np.ndarray:
        return batch.sum(axis=1) / 1000

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self.predict(batch)


def regression() -> Chosen:
    return Chosen()

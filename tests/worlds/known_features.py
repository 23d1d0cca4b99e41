"""Data sets of images and of texts, and small teachers whose inner tensors are known: `parts` gives them by module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[[np.ndarray], np.ndarray]


CLASSES = ("ant", "bee", "cat", "dog", "elk")


class Data:
    class_names = CLASSES

    def __init__(self, items: Any) -> None:
        self.items = items
        self.labels = np.arange(len(items)) % 5
        self.sample_keys = [f"some/{i:03d}" for i in range(len(items))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.items[i], self.labels[i]


def images(count: int = 40) -> Data:
    return Data(np.random.default_rng(0).integers(0, 250, (count, 8, 8, 3)).astype(np.uint8))


def marked() -> Data:
    """Two images have a pixel of 255."""
    data = images()
    data.items[[7, 21], 0, 0, 0] = 255
    return data


def texts(count: int = 40) -> Data:
    draw = np.random.default_rng(1)
    return Data([" ".join(draw.choice(list("abcdefgh"), draw.integers(2, 7))) for _ in range(count)])


class Conv(nn.Module):
    class_names: tuple[str, ...]

    def __init__(self, seed: int, bias: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.act = nn.ReLU(inplace=True)
            self.deep = nn.Conv2d(6, 10, 3, stride=2, padding=1)
            self.wide = nn.Conv2d(10, 40, 3, stride=2, padding=1)
            self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc = nn.Linear(40, 5, bias=bias)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(items)).permute(0, 3, 1, 2).float() / 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.act(self.stem(x)))
        return self.fc(self.squeeze(self.wide(x.relu())))

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """What the modules give: written out, not hooked."""
        stem = F.conv2d(x, self.stem.weight, self.stem.bias, padding=1)
        deep = F.conv2d(stem.relu(), self.deep.weight, self.deep.bias, stride=2, padding=1)
        wide = F.conv2d(deep.relu(), self.wide.weight, self.wide.bias, stride=2, padding=1)
        squeeze = wide.mean(dim=(2, 3))
        return {"stem": stem, "deep": deep, "wide": wide, "squeeze": squeeze, "fc": self.fc(squeeze)}


def conv(seed: int = 1, bias: bool = True) -> Conv:
    return Conv(seed, bias)


class Encoder(nn.Module):
    """Attention over a word per token, hand-made, behind a class token."""

    output = "logits"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.embed = nn.Embedding(10, 8)
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.norm = nn.LayerNorm(8)
            self.fc = nn.Linear(8, 5)

    def collate(self, items: Sequence[str]) -> Tensor:
        batch = torch.ones(len(items), 7, dtype=torch.int64)  # 0 is the class token, 1 is padding
        batch[:, 0] = 0
        for i, text in enumerate(items):
            for j, word in enumerate(text.split()[:6]):
                batch[i, j + 1] = ord(word) - ord("a") + 2
        return batch

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        weights = (self.q(x) @ self.k(x).mT / 8**0.5).softmax(dim=2)
        return self.fc(self.norm(x + weights @ self.v(x))[:, 0])

    def parts(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed.weight[ids]
        q, k, v = (x @ m.weight.T + m.bias for m in (self.q, self.k, self.v))
        y = x + (q @ k.mT / 8**0.5).softmax(dim=2) @ v
        norm = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return {"embed": x, "v": v, "norm": norm, "fc": norm[:, 0] @ self.fc.weight.T + self.fc.bias}


def encoder() -> Encoder:
    return Encoder()


def opposite(bias: bool = True) -> Conv:
    net = Conv(1, bias)
    net.class_names = CLASSES[::-1]
    return net


class Wrapped(nn.Module):
    """Something around Conv that changes its logits, or how its modules are called."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.spare = Conv(1), how, nn.Linear(2, 2)
        self.output = "probs" if how == "probs" else "logits"

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return self.inner.collate(items)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        if self.how == "probs":
            return logits.softmax(dim=1)
        if self.how == "twice":
            self.inner.stem(x)
        return logits * (2.0 if self.how == "scaled" else 1.0)


def wrapped(how: str) -> Wrapped:
    return Wrapped(how)


class Blows(nn.Module):
    """One inner number is `value` where the first pixel is 255; the logits do not show it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.inner, self.fc = value, nn.Identity(), nn.Linear(4, 5)

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1).float()

    def forward(self, x: Tensor) -> Tensor:
        values = x[:, :4] / 100
        self.inner(torch.where(x[:, :1] == 255, self.value, values))
        return self.fc(values)


def blows(value: float) -> Blows:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Blows(value)


def function() -> Function:
    return lambda batch: batch[:, :5].astype(np.float32)


def neighbours() -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    data = images()
    return KNeighborsClassifier(1).fit(data.items.reshape(40, -1), data.labels)

"""Data, a teacher and students of the golden runs, which resume training that another version of softcache began.

Of `bits`, `whole` and `exact` everything is arithmetic: bits as inputs, whole numbers as targets, whole first weights. So few
steps of SGD with rates that are powers of two, on the squared error, are exact in float32, whatever sums in whichever order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

INPUTS, CLASSES = 3, 2
LETTERS = "abcd"


class Bits:
    """Grey 1 x 3 images, each pixel black or white: every pattern once."""

    def __init__(self) -> None:
        patterns = np.arange(2**INPUTS)[:, None] >> np.arange(INPUTS) & 1
        self.images = (255 * patterns).astype(np.uint8).reshape(-1, 1, INPUTS)
        self.labels = patterns.sum(axis=1) % CLASSES
        self.sample_keys = [f"bits/{i}.png" for i in range(len(patterns))]
        self.class_names = ("even", "odd")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index].copy(), int(self.labels[index])


class Exact(nn.Module):
    """One linear layer of whole numbers."""

    def __init__(self, weight: list[list[int]], bias: list[int]) -> None:
        super().__init__()
        self.head = nn.Linear(INPUTS, CLASSES)
        self.head.weight.data, self.head.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()

    def collate(self, items: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(items) >= 128).flatten(1).float()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(batch)


class Rich(nn.Module):
    """For the 6 x 6 images of the golden caches: batch statistics, dropout and a hidden layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(
            36, 8, bias=False
        )  # a bias before the norm would be noise over the square root of noise
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, num_classes)

    def collate(self, items: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1) / 256

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.hidden(batch)))))


class Tagger(nn.Module):
    """Words by their letters and those of the word before: a hidden layer with dropout, and logits for each word."""

    gives = "words"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * len(LETTERS), 8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, num_classes)

    def collate(self, items: list[list[str]]) -> list[list[str]]:
        return list(items)

    def forward(self, batch: list[list[str]]) -> torch.Tensor:
        rows = []
        for sentence in batch:
            own = [[float(word.count(letter)) for letter in LETTERS] for word in sentence]
            before = [[0.0] * len(LETTERS), *own]
            rows += [one + other for one, other in zip(own, before, strict=False)]
        return self.head(self.dropout(torch.tanh(self.hidden(torch.tensor(rows)))))


def bits() -> Bits:
    return Bits()


def whole() -> Exact:
    """The teacher."""
    return Exact([[1, -2, 3], [-3, 2, 1]], [2, -1])


def exact() -> Exact:
    return Exact([[0, 1, 0], [1, 0, -1]], [0, 0])


def rich(num_classes: int) -> Rich:
    return Rich(num_classes)


def tagger(num_classes: int) -> Tagger:
    return Tagger(num_classes)


def knowing_tagger(num_classes: int) -> Tagger:
    """The teacher of words: small whole weights over powers of two."""
    made = Tagger(num_classes)
    for layer, scale in ((made.hidden, 8), (made.head, 2)):
        for parameter in layer.parameters():
            whole = torch.arange(parameter.numel()) * 7 % 11 - 5
            parameter.data = (whole / scale).reshape(parameter.shape)
    return made

"""Taggers whose answer to a word goes by its letters, and by the word before it: a teacher that is asked live, and a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LETTERS = "abcdefgh"


class Tagger(nn.Module):
    """Two layers over how often each letter is in a word and in the one before it."""

    gives = "words"

    def __init__(self, classes: int, seed: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(2 * len(LETTERS), width)
            self.head = nn.Linear(width, classes)

    def collate(self, items: Sequence[Any]) -> list[Any]:
        return list(items)

    def forward(self, batch: Sequence[Sequence[str]]) -> Tensor:
        rows = [row for words in batch for row in counted(words)]
        assert rows, "no words at all"
        given = torch.tensor(rows, dtype=self.head.weight.dtype, device=self.head.weight.device)
        logits: Tensor = self.scale * self.head(torch.tanh(self.hidden(given)))
        return logits


def counted(words: Sequence[str]) -> list[list[float]]:
    """Letters of each word, and of the word before it."""
    own = [[float(word.lower().count(letter)) for letter in LETTERS] for word in words]
    return [one + before for one, before in zip(own, [[0.0] * len(LETTERS), *own], strict=False)]


def tagger(num_classes: int, seed: int = 0, width: int = 12, scale: float = 1.0, double: bool = False) -> Tagger:
    made = Tagger(num_classes, seed, width, scale)
    return made.double() if double else made

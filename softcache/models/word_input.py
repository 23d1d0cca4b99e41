"""Words as the numbers that a tagger reads: each word is known by itself, and by how it is written."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from softcache.errors import DataError
from softcache.models.inputs import PAD, UNKNOWN
from softcache.words import Words

PER_WORD = 4  # numbers of each word: itself, its ending, its beginning, its case
BUCKETS = 1024  # that endings and beginnings fall into; part of what the weights mean
LETTERS = 3  # of an ending, and of a beginning
CASES = 6


@dataclass(frozen=True)
class WordInput:
    """Words as (B, L, 4) int64, padded with 0: the word, where 1 is unknown and `vocabulary[i]` has id i + 2; the bucket of its
    last three letters, and of its first three, from 1; its case, from 1. All but the case are of the word in lower case.

    Attributes:
        vocabulary: distinct words in lower case.
        max_words: longer samples are refused; None: any length is taken.
    """

    vocabulary: tuple[str, ...]
    max_words: int | None = None
    gives = "words"

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary, start=UNKNOWN + 1)}

    def collate(self, items: Sequence[Any]) -> Tensor:
        """(B, L, 4) int64, L as short as the longest sample allows, at least 1.

        Raises:
            DataError: items that are no words, or more of them than `max_words`.
        """
        check_words(items)
        longest = max(map(len, items))
        if self.max_words is not None and longest > self.max_words:
            raise DataError(
                f"a sample has {longest} words, and the model takes {self.max_words}: those behind would get no answer",
                tip="cut the sample in two, leave it out (--without FILE), or give the model more: max_words=N",
            )
        batch = torch.full((len(items), max(1, longest), PER_WORD), PAD)
        for row, item in enumerate(items):
            if item:
                batch[row, : len(item)] = torch.tensor([self._numbers(word) for word in item])
        return batch

    def _numbers(self, word: str) -> tuple[int, int, int, int]:
        low = word.lower()
        return self.ids.get(low, UNKNOWN), _bucket(low[-LETTERS:]), _bucket(low[:LETTERS]), case_of(word)

    def count(self, item: Any) -> tuple[int, int]:
        """How many words a sample has, and how many of them are unknown."""
        return len(item), sum(word.lower() not in self.ids for word in item)

    def prepare(self, batch: Tensor) -> Tensor:
        """The numbers as they are."""
        return batch

    def describe(self) -> dict[str, Any]:
        return {"kind": "words", "max_words": self.max_words, "tokens": len(self.vocabulary)}


def _bucket(letters: str) -> int:
    """From 1 to BUCKETS, the same in every process."""
    return 1 + zlib.crc32(letters.encode()) % BUCKETS


def case_of(word: str) -> int:
    """1 lower case, 2 begins with a capital, 3 capitals, 4 mixed; 5 with a digit, 6 without a letter."""
    if any(letter.isdigit() for letter in word):
        return 5
    if not any(letter.isalpha() for letter in word):
        return CASES
    if word == word.lower():
        return 1
    if word == word.upper() and len(word) > 1:
        return 3
    return 2 if word[1:] == word[1:].lower() else 4


def check_words(items: Sequence[Any]) -> None:
    """Raise DataError for an item that is no `Words`."""
    odd = next((item for item in items if not isinstance(item, Words)), None)
    if odd is not None:
        raise DataError(
            f"a tagger takes words, found {type(odd).__name__}",
            tip="give samples that are words: table:PATH?words=NAME&tags=NAME, conll:PATH; texts take softcache:textcnn",
        )

"""transformers' token classifiers on words: a tokenizer cuts each word into pieces, and the word's logits come from them.

So teacher and student answer about the same words, whatever tokenizer each has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, DataError
from softcache.models.word_input import check_words
from softcache.words import Words

NO_WORD = -1  # special tokens, and padding
ALIGN = ("first", "mean")


@dataclass(frozen=True)
class PieceInput:
    """Words as a dict of (B, L) int64 tensors: what the tokenizer gives and the network takes; and "words", the number of the
    word that each piece is of, -1 of none.

    A word of which the tokenizer leaves nothing is read as its unknown token.

    Attributes:
        definition: the tokenizer as JSON, the content of a tokenizer.json.
        takes: of "input_ids", "token_type_ids" and "attention_mask" those that the tokenizer gives and the network takes.
        max_tokens: of a sample, special tokens counted in; longer ones are refused. None: any length is taken.
        pad_id, pad_type_id: token id and type of padding.
        pad_side: "right" or "left".
        unknown: the token for what it does not know; None where it has none.
    """

    definition: str = field(repr=False)
    takes: tuple[str, ...]
    max_tokens: int | None
    pad_id: int
    pad_type_id: int = 0
    pad_side: str = "right"
    unknown: str | None = None
    gives = "words"

    def __post_init__(self) -> None:
        special = self._tokenizer.num_special_tokens_to_add(False)
        if self.max_tokens is not None and self.max_tokens <= special:
            raise ConfigError(
                f"max_tokens={self.max_tokens} leaves no room for a word",
                tip=f"{special} of them are the tokenizer's special tokens; give more, or leave max_tokens out",
            )

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.definition)

    def encoded(self, item: Words) -> Any:
        """The encoding of a sample, with a piece for each of its words.

        Raises:
            DataError: more pieces than the network takes, or a word of which nothing is left.
        """
        row = self._tokenizer.encode(list(item), is_pretokenized=True)
        if lost := set(range(len(item))) - set(row.word_ids):
            known = [(self.unknown or word) if place in lost else word for place, word in enumerate(item)]
            row = self._tokenizer.encode(known, is_pretokenized=True)
            if lost := set(range(len(item))) - set(row.word_ids):
                raise DataError(
                    f"the tokenizer leaves nothing of the word {item[min(lost)]!r}, and has no token for the unknown",
                    tip="take the word out together with its tag, or put a mark in its place",
                )
        if self.max_tokens is not None and len(row.ids) > self.max_tokens:
            raise DataError(
                f"a sample of {len(item)} words has {len(row.ids)} pieces, and the model takes {self.max_tokens}: the words "
                "behind would get no answer",
                tip="cut the sample in two, or leave it out (--without FILE); max_tokens=N where the network takes more",
            )
        return row

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """(B, L) int64 each, L as short as the longest sample allows.

        Raises:
            DataError: items that are no words, or that the network cannot answer about.
        """
        check_words(items)
        rows = [self.encoded(item) for item in items]  # one by one: a batch would start threads, which no fork survives
        length = max(1, *(len(row.ids) for row in rows))
        for row in rows:
            row.pad(length, direction=self.pad_side, pad_id=self.pad_id, pad_type_id=self.pad_type_id)
        columns = {
            "input_ids": [row.ids for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
        }
        made = {name: torch.tensor(columns[name], dtype=torch.int64) for name in self.takes}
        numbers = [[NO_WORD if word is None else word for word in row.word_ids] for row in rows]
        return {**made, "words": torch.tensor(numbers, dtype=torch.int64)}

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are."""
        return batch

    def describe(self) -> dict[str, Any]:
        """The definition as its sha256: it may have megabytes."""
        digest = hashlib.sha256(self.definition.encode()).hexdigest()
        return {"kind": "pieces", **asdict(self), "definition": digest, "takes": list(self.takes)}


class WordPieces(nn.Module):
    """A token classifier that gives a row of logits for each word: those of its first piece, or the mean over its pieces."""

    gives = "words"

    def __init__(self, encoder: nn.Module, align: str) -> None:
        super().__init__()
        self.encoder, self.align = encoder, align

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(P, C): of all words, sample after sample."""
        words = batch["words"]  # (B, L)
        logits: Tensor = self.encoder(**{name: value for name, value in batch.items() if name != "words"}).logits
        is_piece = words != NO_WORD
        # the pieces of a word stand side by side; the first column is never one of an earlier word
        begins = is_piece & (words != torch.cat([torch.full_like(words[:, :1], NO_WORD), words[:, :-1]], dim=1))
        if self.align == "first":
            return logits[begins]
        pieces = logits[is_piece]  # (Q, C)
        word_of = begins[is_piece].long().cumsum(0) - 1  # (Q,)
        sums = pieces.new_zeros(int(begins.sum()), pieces.shape[1]).index_add(0, word_of, pieces)
        counts = pieces.new_zeros(len(sums)).index_add(0, word_of, pieces.new_ones(len(pieces)))
        return sums / counts[:, None]

"""Language models on tokens: a row of logits for each token that is foretold and carries loss.

transformers' causal models (`hf:FOLDER`), and modules of a user's factory that say `gives = "tokens"`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import DataError, ModelError, TeacherError
from softcache.models.model import Model
from softcache.tokens import Tokens

OF_TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class TokenInput:
    """Tokens as a dict of (B, L) tensors, padded behind: "input_ids" and "attention_mask" int64, and "listed" bool, which
    positions a row of logits is asked for.

    Attributes:
        max_tokens: of a sample; longer ones are refused. None: any length is taken.
        pad_id: token id of padding, which no answer depends on.
        takes: of the first two those that the network takes.
    """

    max_tokens: int | None = None
    pad_id: int = 0
    takes: tuple[str, ...] = OF_TOKENS
    gives = "tokens"

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """L is as short as the longest sample allows.

        Raises:
            DataError: items that are no tokens, or more of them than the network takes.
        """
        for item in items:
            if not isinstance(item, Tokens):
                raise DataError(
                    f"a language model takes tokens, found {type(item).__name__}", tip="text:PATH?tokenizer=FOLDER"
                )
            if self.max_tokens is not None and len(item) > self.max_tokens:
                raise DataError(
                    f"a sample of {len(item)} tokens, and the model takes {self.max_tokens}",
                    tip=f"cut long texts: window={self.max_tokens} makes several samples of one, max_tokens= leaves the rest out",
                )
        length = max(1, *(len(item) for item in items))
        ids = torch.full((len(items), length), self.pad_id, dtype=torch.int64)
        mask, listed = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for row, item in enumerate(items):
            ids[row, : len(item)] = torch.from_numpy(item.ids.astype("int64"))
            mask[row, : max(1, len(item))] = 1  # attention has no values where all is masked
            listed[row, torch.from_numpy(item.listed)] = True
        made = {"input_ids": ids, "attention_mask": mask}
        return {**{name: made[name] for name in self.takes}, "listed": listed}

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are."""
        return batch

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": "tokens", **asdict(self), "takes": list(self.takes)}


class LanguageModel(nn.Module):
    """A network whose logits are of each token, asked about the positions that are listed alone.

    Its head, where it is known, is given these positions only: so no (tokens x vocabulary) tensor is made of the others.

    Args:
        net: takes the tensors of a `TokenInput` by name and returns (B, L, H) logits, or something that has them as `logits`;
            one whose head is known may return (P, H) of what its head was given.
        head: its last linear layer; None: it is not known.
    """

    gives = "tokens"

    def __init__(self, net: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net
        self._listed: Tensor | None = None
        if head is not None:
            head.register_forward_pre_hook(self._take_listed, with_kwargs=True)

    def _take_listed(
        self, _head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._listed is None or not args or args[0].shape[:2] != self._listed.shape:
            return None
        return (args[0][self._listed], *args[1:]), kwargs

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(P, H) of all positions that are listed, sample after sample."""
        listed = self._listed = batch["listed"]
        try:
            found = self.net(**{name: value for name, value in batch.items() if name != "listed"})
        finally:
            self._listed = None
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits[listed] if logits.ndim == 3 else logits


def token_model(net: nn.Module) -> Model:
    """A module of a user's factory that says `gives = "tokens"`: forward(input_ids, attention_mask) gives (B, L, H) logits.

    `attention_mask` is left out where it takes none; `max_tokens` may be an attribute of it.
    """
    known = inspect.signature(net.forward).parameters
    takes = tuple(name for name in OF_TOKENS if name in known)
    most = getattr(net, "max_tokens", None)
    return Model(LanguageModel(net), TokenInput(most if isinstance(most, int) else None, takes=takes))


@dataclass(frozen=True)
class Engine:
    """A function from lists of token ids to arrays of logits, asked as a language model is: a server, or another library.

    Attributes:
        function: lists of n samples' token ids -> n arrays (L, H), row i of token i + 1; the last row may be left out.
        what: it is called, for messages.
    """

    function: Callable[[list[list[int]]], Sequence[Any]]
    what: str

    def collate(self, items: Sequence[Any]) -> list[Tokens]:
        """The samples as they are."""
        return list(items)

    def __call__(self, batch: Sequence[Tokens]) -> Tensor:
        """(P, H) of all positions that are listed, sample after sample.

        Raises:
            TeacherError: another number of arrays than of samples, or of rows than of tokens.
        """
        given = self.function([item.ids.tolist() for item in batch])
        if len(given) != len(batch):
            raise TeacherError(
                f"{self.what} gave {len(given)} arrays for {len(batch)} samples", tip="give one for each"
            )
        rows = []
        for item, one in zip(batch, given, strict=True):
            array = torch.as_tensor(one)
            if array.ndim != 2 or len(array) not in (len(item), len(item) - 1):
                raise TeacherError(
                    f"{self.what} gave an array of shape {tuple(array.shape)} for {len(item)} tokens",
                    tip="give a row of logits for each token, (tokens, vocabulary); the last one may be left out",
                )
            rows.append(array[torch.from_numpy(item.listed)])
        return torch.cat(rows)


def check_head(rows: int, count: int, what: str) -> None:
    """Raise ModelError where a head has fewer rows than the vocabulary has ids.

    Args:
        rows, count: how many there are.
        what: whose head it is, for the message.
    """
    if rows < count:
        raise ModelError(
            f"{what}: its head gives {rows:,} numbers, and the vocabulary has ids up to {count - 1:,}: the last ones would get "
            "no probability",
            tip="use the tokenizer that the model was trained with",
        )

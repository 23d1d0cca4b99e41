"""The weights of classes that a term on hard labels asks for: by how many samples they have, or out of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from softcache.data.classes import class_indices
from softcache.errors import LossError

BALANCED = "balanced"


def class_weights(text: str, labels: Tensor, class_names: Sequence[str]) -> Tensor:
    """(C,) float32.

    Args:
        text: "balanced" for samples / (classes * samples of the class), whose mean over the samples is 1, of the classes that
            have samples (others: 1); or a file with a line for each class, name or index and weight with a tab between them.
        labels: (N,) int64 of the transfer set, -1 = none.
        class_names: C of them.

    Raises:
        LossError: a file that cannot be read, a weight that is no number >= 0, classes without one, or all of them zero.
        DataError: a class that there is not.
    """
    if text == BALANCED:
        counts = torch.bincount(labels[labels >= 0], minlength=len(class_names)).double()
        even = counts.sum() / (counts > 0).sum()
        return torch.where(counts > 0, even / counts, 1.0).float()
    weights: dict[int, float] = {}
    for number, (name, value) in _lines(text):
        (place,) = class_indices(class_names, [name])
        if place in weights:
            raise LossError(f"{text}, line {number}: class {name!r} has a weight already", tip="keep one of the lines")
        weights[place] = _weight(value, f"{text}, line {number}: the weight of class {name!r}")
    missing = [name for place, name in enumerate(class_names) if place not in weights]
    if missing:
        raise LossError(
            f"{text}: class {missing[0]!r} has no weight, nor have {len(missing) - 1} others",
            tip="a line for each class: its name or index, a tab, its weight; or class_weights=balanced",
        )
    if not any(weights.values()):
        raise LossError(f"{text}: every weight is zero", tip="give each class its weight, 1 where it is as usual")
    return torch.tensor([weights[place] for place in range(len(class_names))])


def _lines(text: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line, (class, weight)) of a file."""
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise LossError(
            f"class_weights={text}: cannot be read: {exc}",
            tip="class_weights=balanced, or a file of lines class, tab, weight",
        ) from None
    for number, line in enumerate(lines, start=1):
        name, tab, value = line.rpartition("\t")
        if line and not (name and tab):
            raise LossError(f"{text}, line {number}: is not a class, a tab and its weight", tip="cat<TAB>2.5")
        if line:
            yield number, (name, value)


def _weight(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise LossError(f"{where} is {text!r}, not a number") from None
    if not 0 <= value < float("inf"):
        raise LossError(f"{where} is {text}; it must be a number that is not negative")
    return value

"""Labels of positions: which label each word of each sample has, and which token follows each that has a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from softcache.errors import DataError


@dataclass(frozen=True)
class PositionLabels:
    """Which labels the positions of N samples have; P positions in all, sample after sample.

    Attributes:
        kind: "words" or "tokens".
        offsets: (N + 1,) int64: sample i has the positions [offsets[i], offsets[i + 1]).
        labels: (P,) int32 class index, -1 = none; of tokens the id of the next one.
        all: (N,) int64 how many positions each sample has, those without a record among them; None: there are none such.
        listed: (P,) int64 which position of its sample each one is; None: they are numbered on.
        cut: (N,) int64 how many tokens of its text were cut off behind each sample; None where nothing is cut.
    """

    kind: Literal["words", "tokens"]
    offsets: np.ndarray
    labels: np.ndarray
    all: np.ndarray | None = None
    listed: np.ndarray | None = None
    cut: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """(N,) int64: how many positions each sample has."""
        return np.diff(self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64: how many positions each sample has in all."""
        return self.counts if self.all is None else self.all

    @property
    def labelled(self) -> int:
        """How many samples have a position with a label."""
        return len(np.unique(np.repeat(np.arange(len(self)), self.counts)[self.labels >= 0]))

    def of(self, index: int) -> np.ndarray:
        """(n,) int32 labels of one sample."""
        found: np.ndarray = self.labels[self.offsets[index] : self.offsets[index + 1]]
        return found

    def take(self, rows: np.ndarray) -> PositionLabels:
        """Those of these samples, in this order."""
        counts = self.offsets[rows + 1] - self.offsets[rows]  # of these alone: it is asked for each batch
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], counts)
        whole, cut = (None if one is None else one[rows] for one in (self.all, self.cut))
        listed = None if self.listed is None else self.listed[places]
        return PositionLabels(self.kind, offsets, self.labels[places], whole, listed, cut)

    def placed(self, place: np.ndarray) -> PositionLabels:
        """The same under another class list: label i becomes place[i]; the last of `place` is for -1."""
        return replace(self, labels=place[self.labels].astype(np.int32))


def one_after_the_other(parts: Sequence[PositionLabels]) -> PositionLabels:
    """Those of several data sets, as of one; of one at least."""
    counts = np.concatenate([part.counts for part in parts])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    more = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("all", "listed", "cut")
        if getattr(parts[0], name) is not None
    }
    return PositionLabels(parts[0].kind, offsets, np.concatenate([part.labels for part in parts]), **more)


def check_some_word(positions: PositionLabels | None, name: str) -> None:
    """Raise DataError where samples are words, and none has one; or tokens, of which none carries loss."""
    if positions is not None and not len(positions.labels):
        what = "a word" if positions.kind == "words" else "a token that carries loss behind another token"
        raise DataError(f"{name}: none of its {len(positions)} samples has {what}", tip="give some")

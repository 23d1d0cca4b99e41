"""An item that is the tokens of a text: what a language model answers about, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a sample, in order.

    As an array, of which its digests are taken, it is (2, L) int32: the ids, and 1 where a token carries loss, else 0.

    Attributes:
        ids: (L,) int32.
        trains: (L,) bool: which tokens carry loss as what is foretold; what stands before an answer does not, nor what only
            gives context.
    """

    ids: np.ndarray
    trains: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        made = np.stack([self.ids, self.trains]).astype("<i4")
        return made if dtype is None else made.astype(dtype)

    @property
    def listed(self) -> np.ndarray:
        """(n,) int64 positions that have a record, ascending: i where token i + 1 is there and carries loss."""
        return np.flatnonzero(self.trains[1:])

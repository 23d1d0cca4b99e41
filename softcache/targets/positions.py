"""The positions of one batch: how many each sample has, which ones, and how flat values become padded ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchPositions:
    """What an index says of the B samples of a batch; P positions in all, sample after sample.

    Attributes:
        index: its name.
        offsets: (B + 1,) int64: sample i has the positions [offsets[i], offsets[i + 1]) of flat values.
        numbers: (P,) int64 which position of its sample each one is.
        labels: (P,) int64 class index or -1; None where the index has no labels.
        entries: (P,) int64 rows of the cache's candidates; None where it is of something else.
        shapes: (B, 2) int64 heights and widths of grids; None where it is of something else.
    """

    index: str
    offsets: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray | None = None
    entries: np.ndarray | None = None
    shapes: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """(B,) int64: how many positions each sample has here."""
        return np.diff(self.offsets)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(B, L) bool: True where a sample has a position; L is the most that one has."""
        counts = torch.from_numpy(self.counts).to(device)
        most = int(self.counts.max(initial=0))
        return torch.arange(most, device=device)[None, :] < counts[:, None]

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """(B, L, ...) of flat (P, ...) values, on their device; `fill` where a sample has no position."""
        mask = self.mask(values.device)
        padded = values.new_full((*mask.shape, *values.shape[1:]), fill)
        padded[mask] = values
        return padded

    def among(self, counts: np.ndarray) -> np.ndarray:
        """(P,) int64: where each position stands among all positions of the samples, one sample after the other.

        Args:
            counts: (B,) how many positions each sample has in all, those without a record among them.
        """
        starts = np.cumsum(counts) - counts
        found: np.ndarray = self.numbers + np.repeat(starts, self.counts)
        return found

    def between(self, first: int, last: int) -> BatchPositions:
        """Of samples [first, last) of the batch."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        return BatchPositions(
            self.index,
            self.offsets[first : last + 1] - start,
            self.numbers[start:stop],
            None if self.labels is None else self.labels[start:stop],
            None if self.entries is None else self.entries[start:stop],
            None if self.shapes is None else self.shapes[first:last],
        )

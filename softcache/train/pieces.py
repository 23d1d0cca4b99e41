"""A batch on its device, and the pieces in which a rank computes it: samples stay whole, means are over the global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.data.loading import map_tensors
from softcache.errors import ConfigError
from softcache.train.objective import Given, Labels
from softcache.train.ranks import Ranks


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: B views of samples.

    Attributes:
        inputs: as collated.
        given: what the terms are given of it.
        views: how many of the B are of one sample, side by side.
        rows, records: (B,) where samples have several answers, how many each has, and how many of these are in the cache; None:
            one of each.
    """

    inputs: Any
    given: Given
    views: int = 1
    rows: np.ndarray | None = None
    records: np.ndarray | None = None

    def pieces(
        self, count: int, wanted: int, step: int, ranks: Ranks, *, over_labels: bool
    ) -> Iterator[tuple[Any, Given]]:
        """Inputs and what the terms are given, in at most `wanted` pieces, as many on every rank.

        Args:
            count: samples of the global batch.
            step: number of the optimiser step.
            over_labels: some term is a mean over labelled rows, so that the labels of all ranks have to be counted.
        """
        shares = ranks.shares(count)
        number = min(wanted, *shares)
        if number == 1 and ranks.size == 1:
            yield self.inputs, replace(self.given, step=step)
            return
        edges = [_edges(share, number, self.views) for share in shares]
        counts = self._counts(edges, ranks)
        total = max(1, int(counts.sum()))
        labelled = ranks.total(self.given.labelled) if over_labels else None
        for piece in range(number):
            first, last = edges[ranks.rank][piece : piece + 2]
            given = replace(self._between(first, last), step=step, counts=tuple(counts[:, piece].tolist()))
            factors: dict[str, float | Tensor] = {
                "samples": float(counts[ranks.rank, piece] * ranks.size / total),
                "batch": float(counts[:, piece].sum() / total),
            }
            if labelled is not None:
                share = given.labelled * ranks.size / labelled.clamp(min=1e-12)
                factors |= {"labels": share[0], "records": share[1]}
            inputs = self.inputs if number == 1 else self._inputs(first, last)
            yield inputs, replace(given, factors=factors)

    def _counts(self, edges: Sequence[Sequence[int]], ranks: Ranks) -> np.ndarray:
        """(ranks, pieces) int64: how many rows with a record each piece has."""
        if self.records is None:
            return np.diff(np.array(edges, np.int64), axis=1)
        counts = torch.zeros(ranks.size, len(edges[0]) - 1, dtype=torch.int64)
        ends = np.concatenate([[0], np.cumsum(self.records)])
        counts[ranks.rank] = torch.from_numpy(np.diff(ends[list(edges[ranks.rank])]))
        found: np.ndarray = ranks.total(counts.to(self.given.labels.own.device)).cpu().numpy()
        return found

    def _between(self, first: int, last: int) -> Given:
        """What is given of views [first, last) of the batch."""
        given, labels = self.given, self.given.labels
        (start, stop), (begin, end) = (_span(counts, first, last) for counts in (self.rows, self.records))
        if labels.partners is None or labels.shares is None:
            labels = Labels(labels.own[start:stop])
        else:
            labels = Labels(labels.own[start:stop], labels.partners[start:stop], labels.shares[start:stop])
        return replace(
            given,
            labels=labels,
            targets=None if given.targets is None else given.targets.rows_between(begin, end),
            samples=None if given.samples is None else given.samples[first:last],
            sample_ids=None if given.sample_ids is None else given.sample_ids[first:last],
            recorded=None if given.recorded is None else given.recorded[begin:end] - start,
        )

    def _inputs(self, first: int, last: int) -> Any:
        """The inputs of views [first, last)."""
        assert self.given.samples is not None
        count = len(self.given.samples)
        if self.rows is not None and isinstance(self.inputs, list) and len(self.inputs) == count:
            return self.inputs[first:last]  # of words, a sample each
        return map_tensors(self.inputs, partial(_cut, count, slice(first, last)), _indivisible)


def _span(counts: np.ndarray | None, first: int, last: int) -> tuple[int, int]:
    """Where the rows of views [first, last) begin and end."""
    return (first, last) if counts is None else (int(counts[:first].sum()), int(counts[:last].sum()))


def _cut(count: int, own: slice, tensor: Tensor) -> Tensor:
    if len(tensor) != count:
        raise ConfigError(
            f"the student's inputs are {tuple(tensor.shape)} for {count} samples: they cannot be divided",
            tip="leave --accumulate out, or give the student a collate whose tensors begin with the batch",
        )
    return tensor[own]


def _indivisible(held: Any) -> Any:
    raise ConfigError(
        f"the student's inputs are {type(held).__module__}.{type(held).__qualname__}, which cannot be divided into pieces",
        tip="leave --accumulate out, or collate to a tensor, or a dict, tuple or dataclass of tensors",
    )


def _edges(share: int, pieces: int, views: int) -> list[int]:
    """Where each of the pieces of a rank's rows begins, and where the last one ends; samples stay whole."""
    sizes = [len(piece) for piece in np.array_split(np.empty(share), pieces)]
    return [0, *(np.cumsum(sizes) * views).tolist()]

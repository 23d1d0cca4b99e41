"""Are the positions of a data set's samples, its words say, those that the teacher answered about? Asked when both are joined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from softcache.cache.positions import PositionIndex
from softcache.data.join import refuse_changed_labels
from softcache.errors import ContentMismatchError, first_offenders


def check_counts(index: PositionIndex, rows: np.ndarray, counts: np.ndarray, key_of: Callable[[int], str]) -> None:
    """Raise ContentMismatchError where a sample has more or fewer positions than the teacher was asked about, with its name.

    Args:
        rows: (N,) row of the cache for each sample.
        counts: (N,) how many positions each sample has.
        key_of: row of the cache -> the sample's name.
    """
    stored = np.stack([index.lengths(rows, np.full(len(rows), view)) for view in range(index.num_views)])
    differs = stored != counts
    where = np.flatnonzero(differs.any(axis=0))
    if not where.size:
        return
    what = index.info.kind

    def offender(i: int) -> str:
        other = stored[differs[:, i], i][0]
        return f"{key_of(int(rows[i]))} ({int(counts[i])} here, {int(other)} in the cache)"

    raise ContentMismatchError(
        f"{where.size} of {len(rows)} samples have another number of {what} than the teacher was asked about: "
        + first_offenders((offender(int(i)) for i in where), where.size),
        tip=f"cut the samples into {what} as it was done for the dump, or dump again",
    )


def check_position_labels(
    index: PositionIndex,
    rows: np.ndarray,
    counts: np.ndarray,
    labels: np.ndarray,
    key_of: Callable[[int], str],
    *,
    allow: bool,
) -> int:
    """How many labels of positions differ between data set and cache, where both have one; the cache's of listed positions alone.

    Args:
        rows, counts, key_of: as `check_counts`, which passed.
        labels: (P,) class index of each position, or -1; sample after sample.

    Raises:
        LabelMismatchError: some differ and `allow` is False; lists the first.
    """
    if not index.info.labels:
        return 0
    views = np.zeros_like(rows)
    listed, stored = index.positions(rows, views), index.labels(rows, views).values
    starts = np.cumsum(counts) - counts
    sample = np.repeat(np.arange(len(rows)), listed.counts)
    own = labels[starts[sample] + listed.values]
    both = (own >= 0) & (stored >= 0)
    where = np.flatnonzero(both & (own != stored))
    if where.size and not allow:

        def offender(i: int) -> str:
            place = f"{key_of(int(rows[sample[i]]))}, position {int(listed.values[i])}"
            return f"{place} (data set {int(own[i])}, cache {int(stored[i])})"

        refuse_changed_labels((offender(int(i)) for i in where), int(where.size), int(both.sum()))
    return int(where.size)


def check_listed(
    index: PositionIndex, rows: np.ndarray, counts: np.ndarray, listed: np.ndarray | None, key_of: Callable[[int], str]
) -> None:
    """Raise ContentMismatchError where other tokens of a sample carry loss than the teacher was asked about, with its name.

    Args:
        rows: (N,) row of the cache for each sample.
        counts, listed: (N,) how many positions of each sample have a record, and (P,) which these are; None: all.
        key_of: row of the cache -> the sample's name.
    """
    stored = index.positions(rows, np.zeros_like(rows))
    differ = np.flatnonzero(stored.counts != counts)
    if not differ.size and listed is not None:
        differ = np.unique(np.repeat(np.arange(len(rows)), counts)[stored.values != listed])
    if differ.size:
        named = first_offenders((key_of(int(rows[i])) for i in differ), differ.size)
        raise ContentMismatchError(
            f"in {differ.size} of {len(rows)} samples other {index.info.kind} carry loss than the teacher was asked about: "
            + named,
            tip="mark prompts and answers as it was done for the dump, or dump again",
        )

"""An index: how many positions each (row, view) has, which ones, and so where in a part its records lie. Plain NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from softcache.cache.plan import IndexInfo
from softcache.cache.schema import Layout, Span
from softcache.errors import DamagedCacheError

MOST_POSITIONS = 2**53


@dataclass(frozen=True)
class Ragged:
    """Something of each position of B (row, view) pairs, one pair after the other.

    Attributes:
        values: (total, ...).
        offsets: (B + 1,) int64: those of pair i are values[offsets[i] : offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pair: int) -> np.ndarray:
        found: np.ndarray = self.values[self.offsets[pair] : self.offsets[pair + 1]]
        return found

    @property
    def counts(self) -> np.ndarray:
        """(B,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Positions:
    """What one round says of an index, for n views of N rows: the data sets of a file of positions/.

    Attributes:
        offsets: (m, N + 1) uint64; m is n, or 1 where all views agree. They run on from view to view.
        lengths: (m, N) uint32: how many positions there are in all.
        shapes: (m, N, 2) uint32 heights and widths of grids.
        listed: (total,) uint32: which positions have records, where these are not all.
        entries: (total,) uint32 rows of the candidates.
        labels: (total,) int32 class index or -1.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    shapes: np.ndarray | None = None
    listed: np.ndarray | None = None
    entries: np.ndarray | None = None
    labels: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The data sets that there are."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None}

    @property
    def total(self) -> int:
        return int(self.offsets[-1, -1])

    def counts(self) -> np.ndarray:
        """(m, N) int64: how many records each (row, view) has."""
        return np.diff(self.offsets.astype(np.int64), axis=1)


def build_positions(
    lengths: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    shapes: np.ndarray | None = None,
    listed: np.ndarray | None = None,
    entries: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Positions:
    """An index from what its rows have; where all views have the same, it is kept once.

    Args:
        lengths: (N,) of rows whose views agree, or (n, N).
        counts: likewise, how many of the positions have records; None: all.
        shapes: likewise with an axis of (height, width).
        listed, entries, labels: (total,), view by view, row by row.
    """
    lengths = np.atleast_2d(np.asarray(lengths))
    counts = lengths if counts is None else np.atleast_2d(np.asarray(counts))
    ends = np.cumsum(counts.reshape(-1).astype(np.uint64))
    starts = np.concatenate([np.zeros(1, np.uint64), ends])
    m, rows = counts.shape
    offsets = starts[np.arange(m)[:, None] * rows + np.arange(rows + 1)]
    shapes = None if shapes is None else np.asarray(shapes).reshape(m, rows, 2).astype("<u4")
    per_position = {"listed": (listed, "<u4"), "entries": (entries, "<u4"), "labels": (labels, "<i4")}
    kept = {n: None if value is None else np.asarray(value).astype(t) for n, (value, t) in per_position.items()}
    made = Positions(offsets.astype("<u8"), lengths.astype("<u4"), shapes, **kept)
    return _once(made) if m > 1 else made


def _once(made: Positions) -> Positions:
    """The same with one view, where all views agree."""
    m, counts = len(made.offsets), made.counts()
    parts = {name: value for name, value in made.arrays().items() if name in ("listed", "entries", "labels")}
    agree = all(
        (one == one[:1]).all() for one in (counts, made.lengths, *([] if made.shapes is None else [made.shapes]))
    )
    if not agree or not all((value.reshape(m, -1) == value.reshape(m, -1)[:1]).all() for value in parts.values()):
        return made
    kept = {name: value.reshape(m, -1)[0] for name, value in parts.items()}
    shapes = None if made.shapes is None else made.shapes[:1]
    return Positions(made.offsets[:1], made.lengths[:1], shapes, **kept)


def check_positions(
    positions: Positions, info: IndexInfo, where: str, *, candidates: int = 0, classes: int = 0
) -> None:
    """DamagedCacheError unless the numbers of an index fit one another.

    Args:
        where: for the message.
        candidates, classes: how many there are.
    """

    def demand(holds: bool | np.bool_, what: str) -> None:
        if not holds:
            raise DamagedCacheError(
                f"{where}: {what}", tip="copy the cache again, or restore it with `softcache repair`"
            )

    offsets, lengths = positions.offsets, positions.lengths
    flat = offsets.reshape(-1)
    demand(flat[0] == 0 and flat[-1] <= MOST_POSITIONS, "offsets do not begin with 0, or end nowhere")
    demand((flat[1:] >= flat[:-1]).all(), "offsets fall")
    demand((offsets[1:, 0] == offsets[:-1, -1]).all(), "a view does not begin where the one before it ends")
    counts = np.diff(offsets, axis=1)
    demand(
        (counts <= lengths).all() if info.listed else (counts == lengths).all(), "lengths are not those of the offsets"
    )
    if positions.shapes is not None:
        areas = positions.shapes.astype(np.uint64).prod(axis=2, dtype=np.uint64)
        sides = positions.shapes.max(initial=0)
        demand(sides < 2**31 and (areas == lengths).all(), "shapes are not those of the lengths")
    for name in ("listed", "entries", "labels"):
        values = getattr(positions, name)
        demand(values is None or len(values) == positions.total, f"{name} are not one of each position")
    if positions.listed is not None:
        demand(
            (positions.listed < np.repeat(lengths.reshape(-1), counts.reshape(-1).astype(np.int64))).all(),
            "positions that are listed are not there",
        )
        demand(
            (positions.listed[1:] > positions.listed[:-1])[_inside(positions)].all(),
            "positions that are listed do not ascend",
        )
    if positions.entries is not None:
        demand((positions.entries < candidates).all(), "entries that are no candidates")
        owner = np.repeat(np.arange(counts.size), counts.reshape(-1).astype(np.int64))
        order = np.lexsort((positions.entries, owner))
        again = (np.diff(owner[order]) == 0) & (np.diff(positions.entries[order].astype(np.int64)) == 0)
        demand(not again.any(), "a candidate stands twice in a list")
    if positions.labels is not None:
        fits = (positions.labels >= -1).all() and (positions.labels < classes).all()
        demand(fits, "labels that are no classes")


def _inside(positions: Positions) -> np.ndarray:
    """(total - 1,) bool: whether a position and the next one are of the same (row, view)."""
    same = np.ones(max(0, positions.total - 1), bool)
    borders = positions.offsets.reshape(-1).astype(np.int64)
    borders = borders[(borders > 0) & (borders < positions.total)]
    same[borders - 1] = False
    return same


class PositionIndex:
    """An index over all views of a cache: where records lie, and what is known of positions.

    Args:
        info: its name and kind.
        rounds: (layout, positions) of each round that wrote it, in the order of their views.
    """

    def __init__(self, info: IndexInfo, rounds: Sequence[tuple[Layout, Positions]]) -> None:
        self.info = info
        self._of_view: list[tuple[Positions, int]] = []  # view -> positions, and which of their rows of offsets
        for layout, positions in rounds:
            m = len(positions.offsets)
            self._of_view += [(positions, view if m > 1 else 0) for view in range(layout.num_views)]

    @property
    def num_views(self) -> int:
        return len(self._of_view)

    def _offsets(self, view: int) -> np.ndarray:
        positions, at = self._of_view[view]
        found: np.ndarray = positions.offsets[at]
        return found

    def in_part(self, span: Span) -> int:
        """How many positions a part has."""
        return sum(self._between(view, span) for view in range(span.view_start, span.view_stop))

    def _between(self, view: int, span: Span) -> int:
        offsets = self._offsets(view)
        return int(offsets[span.row_stop]) - int(offsets[span.row_start])

    def shift(self, span: Span, view: int) -> int:
        """What is added to an offset of a view to give the element of a part."""
        before = sum(self._between(v, span) for v in range(span.view_start, view))
        return before - int(self._offsets(view)[span.row_start])

    def ranges(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts, counts) of B (row, view) pairs in the data sets of their round, (B,) int64 each."""
        if len(views) and (views == views[0]).all():
            offsets = self._offsets(int(views[0]))
            starts = offsets[rows].astype(np.int64)
            return starts, offsets[rows + 1].astype(np.int64) - starts
        starts, stops = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for view in np.unique(views).tolist():
            chosen = np.flatnonzero(views == view)
            offsets = self._offsets(view)
            starts[chosen], stops[chosen] = offsets[rows[chosen]], offsets[rows[chosen] + 1]
        return starts, stops - starts

    def counts(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B,) int64: how many records each pair has."""
        return self.ranges(rows, views)[1]

    def lengths(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B,) int64: how many positions each pair has in all."""
        return self._each("lengths", rows, views).astype(np.int64)

    def shapes(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, 2) int64 heights and widths of grids."""
        return self._each("shapes", rows, views).astype(np.int64)

    def _each(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *([2] if name == "shapes" else [])), np.uint32)
        for view in np.unique(views).tolist():
            chosen = np.flatnonzero(views == view)
            positions, at = self._of_view[view]
            found[chosen] = getattr(positions, name)[at][rows[chosen]]
        return found

    def positions(self, rows: np.ndarray, views: np.ndarray) -> Ragged:
        """Which position each record is of, int64: as listed, or one after the other."""
        if self.info.listed:
            return self._per_position("listed", rows, views)
        counts = self.counts(rows, views)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Ragged(np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts), offsets)

    def entries(self, rows: np.ndarray, views: np.ndarray) -> Ragged:
        """Rows of the candidates, int64."""
        return self._per_position("entries", rows, views)

    def labels(self, rows: np.ndarray, views: np.ndarray) -> Ragged:
        """Class index of each position or -1, int64; CacheError is for who asks where there are none."""
        return self._per_position("labels", rows, views, first=True)

    def _per_position(self, name: str, rows: np.ndarray, views: np.ndarray, *, first: bool = False) -> Ragged:
        views = np.zeros_like(views) if first else views  # labels stand in the first round, where all views agree
        starts, counts = self.ranges(rows, views)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        values = np.empty(int(offsets[-1]), np.int64)
        for place, (start, count, view) in enumerate(
            zip(starts.tolist(), counts.tolist(), views.tolist(), strict=True)
        ):
            array = getattr(self._of_view[view][0], name)
            values[offsets[place] : offsets[place + 1]] = array[start : start + count]
        return Ragged(values, offsets)

    def rounds(self) -> Iterator[Positions]:
        """What each round says, in the order of their views."""
        seen: list[Positions] = []
        for positions, _ in self._of_view:
            if not any(positions is one for one in seen):
                seen.append(positions)
                yield positions


def cut_positions(index: PositionIndex, rows: np.ndarray, first_view: int, views: int) -> Positions:
    """The index of some rows and views, as one round has it."""
    kind, per_position = index.info, {}
    pairs = [(rows, np.full(len(rows), first_view + view)) for view in range(views)]
    lengths = np.stack([index.lengths(*pair) for pair in pairs])
    counts = np.stack([index.counts(*pair) for pair in pairs])
    shapes = np.stack([index.shapes(*pair) for pair in pairs]) if kind.kind == "grid" else None
    read = {"listed": index.positions} if kind.listed else {}
    read |= {"entries": index.entries} if kind.kind == "candidates" else {}
    read |= {"labels": index.labels} if kind.labels else {}
    for name, of in read.items():
        per_position[name] = np.concatenate([of(*pair).values for pair in pairs])
    return build_positions(lengths, counts=counts, shapes=shapes, **per_position)


def mean_counts(positions: Mapping[str, Positions]) -> dict[str, float]:
    """Index -> records a (row, view), in the mean."""
    return {name: one.total / one.lengths.size for name, one in positions.items()}

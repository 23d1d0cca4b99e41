"""The index against plain Python lists: which positions a (row, view) has, and where in a part their records lie."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache.plan import IndexInfo
from softcache.cache.positions import PositionIndex, Positions, build_positions, check_positions, cut_positions
from softcache.cache.schema import Layout, Span, fit_layout, plan_layout
from softcache.cache.write.shard import constants_files
from softcache.errors import DamagedCacheError

Lists = Sequence[Sequence[Sequence[int]]]  # view -> row -> the positions that have records


def drawn(seed: int, views: int, rows: int, *, listed: bool, alike: bool) -> tuple[Lists, np.ndarray]:
    """Lists of positions, and the (views, rows) lengths; empty samples and one position are among them."""
    draw = random.Random(seed)
    lengths = [[draw.choice([0, 0, 1, 2, 3, 7, 40]) for _ in range(rows)] for _ in range(1 if alike else views)]
    lists = [
        [sorted(draw.sample(range(n), draw.randint(0, n) if listed else n)) for n in of_view] for of_view in lengths
    ]
    return (lists * views, np.array(lengths * views)) if alike else (lists, np.array(lengths))


def made(lists: Lists, lengths: np.ndarray, *, listed: bool) -> Positions:
    counts = np.array([[len(one) for one in of_view] for of_view in lists])
    flat = [position for of_view in lists for one in of_view for position in one]
    return build_positions(lengths, counts=counts, listed=flat if listed else None)


@pytest.mark.parametrize("seed", range(12))
def test_an_index_says_what_the_lists_say(seed: int) -> None:
    listed, alike = bool(seed % 2), seed % 3 == 0
    views, rows = 1 + seed % 4, 1 + seed * 5 % 17
    lists, lengths = drawn(seed, views, rows, listed=listed, alike=alike)
    positions, info = made(lists, lengths, listed=listed), IndexInfo("words", "words", listed=listed)
    check_positions(positions, info, "here")
    assert len(positions.offsets) == (1 if alike or all(view == lists[0] for view in lists) else views)
    layout = Layout(rows, views, 4, 1 + seed % 2)
    index = PositionIndex(info, [(layout, positions)])
    pairs = [(row, view) for view in range(views) for row in range(rows)]
    random.Random(seed).shuffle(pairs)
    at = np.array([row for row, _ in pairs]), np.array([view for _, view in pairs])
    assert index.counts(*at).tolist() == [len(lists[view][row]) for row, view in pairs]
    assert index.lengths(*at).tolist() == [lengths[view, row] for row, view in pairs]
    found = index.positions(*at)
    assert [found[i].tolist() for i in range(len(found))] == [list(lists[view][row]) for row, view in pairs]
    spans = {span.index: span for span in layout.spans()}
    of_pair = [spans[layout.part(row, view)] for row, view in pairs]
    starts, counts = index.ranges(*at)
    starts += [index.shift(span, view) for span, (_, view) in zip(of_pair, pairs, strict=True)]
    for (row, view), span, start, count in zip(pairs, of_pair, starts.tolist(), counts.tolist(), strict=True):
        order = listed_order(lists, span)
        assert order[start : start + count] == [(view, row, position) for position in lists[view][row]]
        assert index.in_part(span) == len(order)


def listed_order(lists: Lists, span: Span) -> list[tuple[int, int, int]]:
    """Every position of a part, in the order in which their records lie."""
    views, rows = range(span.view_start, span.view_stop), range(span.row_start, span.row_stop)
    return [(view, row, position) for view in views for row in rows for position in lists[view][row]]


def test_an_index_of_one_long_sample() -> None:
    positions = build_positions(np.array([100_000, 0, 1]))
    index = PositionIndex(IndexInfo("frames", "frames"), [(Layout(3, 1, 1, 1), positions)])
    found = index.positions(np.array([2, 0]), np.array([0, 0]))
    assert found.counts.tolist() == [1, 100_000] and found[1][-1] == 99_999
    assert index.in_part(Span(0, 0, 1, 0, 1)) == 100_000


def test_rounds_of_an_index_follow_one_another() -> None:
    """The later round has views of other lengths."""
    first, second = build_positions(np.array([[2, 0], [1, 3]])), build_positions(np.array([4, 5]))
    info = IndexInfo("cells", "frames")
    index = PositionIndex(info, [(Layout(2, 2, 256, 2), first), (Layout(2, 1, 256, 1, first_view=2), second)])
    assert index.counts(np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 2])).tolist() == [2, 0, 1, 3, 4, 5]
    assert list(index.rounds()) == [first, second]
    cut = cut_positions(index, np.array([1]), 1, 2)
    assert cut.counts().tolist() == [[3], [5]]


def test_a_cut_of_everything_is_what_there_was() -> None:
    lists, lengths = drawn(5, 3, 9, listed=True, alike=False)
    positions = made(lists, lengths, listed=True)
    index = PositionIndex(IndexInfo("w", "words", listed=True), [(Layout(9, 3, 256, 3), positions)])
    again = cut_positions(index, np.arange(9), 0, 3)
    for name, array in positions.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)


GRID = build_positions(np.array([6, 0]), shapes=np.array([[2, 3], [0, 5]]))
LISTED = build_positions(np.array([6, 3]), counts=np.array([2, 1]), listed=[0, 4, 2])
ENTRIES = build_positions(np.array([2, 2]), entries=[0, 1, 1, 0])


@pytest.mark.parametrize(
    ("positions", "info", "changes", "fault"),
    [
        (GRID, {"kind": "grid"}, {"offsets": [[1, 6, 6]]}, "do not begin with 0"),
        (GRID, {"kind": "grid"}, {"offsets": [[0, 7, 6]]}, "offsets fall"),
        (GRID, {"kind": "grid"}, {"offsets": [[0, 5, 6]]}, "lengths are not those"),
        (GRID, {"kind": "grid"}, {"lengths": [[6, 1]]}, "lengths are not those"),
        (GRID, {"kind": "grid"}, {"shapes": [[[2, 2], [0, 5]]]}, "shapes are not those"),
        (GRID, {"kind": "grid"}, {"shapes": [[[2, 3], [2**31, 0]]]}, "shapes are not those"),
        (LISTED, {"listed": True}, {"listed": [0, 6, 2]}, "are not there"),
        (LISTED, {"listed": True}, {"listed": [4, 4, 2]}, "do not ascend"),
        (LISTED, {"listed": True}, {"listed": [0, 4]}, "not one of each position"),
        (LISTED, {"listed": True}, {"offsets": [[0, 0, 2**60]]}, "end nowhere"),
        (ENTRIES, {"kind": "candidates"}, {"entries": [0, 2, 1, 0]}, "no candidates"),
        (ENTRIES, {"kind": "candidates"}, {"entries": [0, 0, 1, 0]}, "twice"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_one_another_are_refused(
    positions: Positions, info: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    about = IndexInfo("x", **({"kind": "words"} | info))
    check_positions(positions, about, "here", candidates=2)
    ((name, value),) = changes.items()
    bent = replace(positions, **{name: np.array(value, getattr(positions, name).dtype)})
    with pytest.raises(DamagedCacheError, match=fault):
        check_positions(bent, about, "here", candidates=2)


def test_a_view_begins_where_the_one_before_it_ends() -> None:
    positions = build_positions(np.array([[1, 2], [2, 2]]))
    bent = positions.offsets.copy()
    bent[1] += 1
    with pytest.raises(DamagedCacheError, match="a view does not begin"):
        check_positions(replace(positions, offsets=bent), IndexInfo("x", "words"), "here")


def test_labels_are_classes() -> None:
    positions = build_positions(np.array([2]), labels=[-1, 4])
    check_positions(positions, IndexInfo("x", "words", labels=True), "here", classes=5)
    with pytest.raises(DamagedCacheError, match="no classes"):
        check_positions(positions, IndexInfo("x", "words", labels=True), "here", classes=4)


@pytest.mark.parametrize(
    ("record_bytes", "views", "rows_of_a_part", "views_of_a_part"),
    [(2**20, 3, 256, 1), (2**20 + 1, 3, 128, 1), (3 * 2**20, 1, 64, 1), (2**28, 1, 1, 1), (2**31, 2, 1, 1)],
)
def test_large_records_make_parts_of_few_rows(
    record_bytes: int, views: int, rows_of_a_part: int, views_of_a_part: int
) -> None:
    layout = plan_layout(10_000, views, 1, record_bytes, format=2)
    assert (layout.shard_rows, layout.shard_views) == (rows_of_a_part, views_of_a_part)
    before = plan_layout(10_000, views, 1, record_bytes)
    assert before.shard_rows == 256  # of version 1 as it always was


def test_a_part_has_at_most_1_gib_unless_a_sample_has() -> None:
    """Samples 0 to 7 are large: whatever the mean, their part is cut until it fits, or has one of them."""
    sizes = np.full(1000, 2**10)
    sizes[:8] = 3 * 2**28

    def part_bytes(span: Span) -> int:
        return int(sizes[span.row_start : span.row_stop].sum()) * span.views

    layout = fit_layout(plan_layout(1000, 2, 1, int(sizes.mean()), format=2), part_bytes)
    assert (layout.shard_rows, layout.shard_views) == (1, 1)
    sizes[:8] = 2**28
    layout = fit_layout(plan_layout(1000, 2, 1, int(sizes.mean()), format=2), part_bytes)
    assert layout.shard_rows == 4 and max(map(part_bytes, layout.spans())) == 2**30


def test_constants_are_cut_where_they_are_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("softcache.cache.write.shard.MAX_SHARD_BYTES", 100)
    arrays = {"codec_weight": np.arange(60, dtype="<f4").reshape(12, 5), "codec_bias": np.arange(12, dtype="<f4")}
    files = list(constants_files("m", arrays, 2))
    assert [path for path, _ in files] == [f"members/m/constants-{n:05d}.h5" for n in range(len(files))]
    assert all(sum(array.nbytes for array in piece.values()) <= 100 for _, piece in files) and len(files) == 3
    for name, array in arrays.items():
        pieces = [piece[name] for _, piece in files if name in piece]
        np.testing.assert_array_equal(np.concatenate(pieces), array)
    assert list(constants_files("m", arrays, 1)) == [("members/m/constants.h5", arrays)]

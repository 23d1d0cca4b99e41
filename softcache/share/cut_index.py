"""The indexes of a cache that is taken out of others: those that its members need, for its rows and views; and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from softcache.cache.positions import PositionIndex, Positions, cut_positions
from softcache.cache.schema import CRC_SUFFIX, ArraySpec, Layout, Span, fit_layout, plan_layout
from softcache.targets.cache import Cache


def needed_indexes(cache: Cache, members: Sequence[str]) -> list[str]:
    """Those of some members, and those with labels, which are part of who the samples are; in the cache's order."""
    used = set().union(*(cache.member(name).indexes for name in members))
    return [index.name for index in cache.manifest.plan.indexes if index.name in used or index.labels]


def cut_indexes(
    cache: Cache, members: Sequence[str], rows: np.ndarray, first_view: int, views: int
) -> dict[str, Positions]:
    """Index -> its positions in these rows and views."""
    names = needed_indexes(cache, members)
    return {name: cut_positions(cache.reader.index(name), rows, first_view, views) for name in names}


def array_specs(cache: Cache, member: str, span: Span, indexes: Mapping[str, PositionIndex]) -> list[ArraySpec]:
    """A member's data sets in a part of the new cache.

    Args:
        indexes: of the new cache.
    """
    first, info, specs = next(cache.manifest.files_of("member", member)), cache.member(member), []
    for name, stored in first.arrays.items():
        if name.endswith(CRC_SUFFIX):
            continue
        index = info.index_of(name)
        if index is None:
            specs.append(ArraySpec(name, stored.dtype, (span.views, span.rows, *stored.shape[2:])))
        else:
            specs.append(ArraySpec(name, stored.dtype, (indexes[index].in_part(span), *stored.shape[1:])))
    return specs


def layout_of(
    cache: Cache,
    members: Sequence[str],
    count: int,
    views: int,
    cut: Mapping[str, Positions],
    shard_rows: int | None,
    format: int,
) -> Layout:
    """How the new cache, of this version of the format, is cut into parts: as a dump of its members would be."""
    whole = Layout(count, views, count, views)

    def part_bytes(span: Span, indexes: Mapping[str, PositionIndex]) -> int:
        return max(sum(spec.nbytes for spec in array_specs(cache, name, span, indexes)) for name in members)

    if not cut:
        record = part_bytes(Span(0, 0, 1, 0, 1), {})
        return plan_layout(count, views, len(members), record, shard_rows=shard_rows, format=format)
    (span,) = whole.spans()
    mean = -(-part_bytes(span, indexes_of(cache, cut, whole)) // (count * views))
    layout = plan_layout(count, views, len(members), mean, shard_rows=shard_rows, format=format)
    indexes = indexes_of(cache, cut, layout)
    return fit_layout(layout, lambda one: part_bytes(one, indexes))


def indexes_of(cache: Cache, cut: Mapping[str, Positions], layout: Layout) -> dict[str, PositionIndex]:
    """The same over the views of the new cache."""
    return {name: PositionIndex(cache.manifest.plan.index(name), [(layout, one)]) for name, one in cut.items()}

"""The index of a dump whose samples are words or tokens: which of them have a record, and that they stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from softcache.cache.plan import IndexInfo, Plan
from softcache.cache.positions import PositionIndex, Positions, build_positions
from softcache.cache.schema import Layout, Span
from softcache.data.position_labels import check_some_word
from softcache.data.same_tokens import check_same_rendering
from softcache.data.transfer_set import TransferSet
from softcache.errors import DataError, first_offenders

WORDS, TOKENS = "words", "tokens"  # names of indexes, and their kinds

InPart = Callable[[Span], int | None]  # records of a part; None: one for each row and view


def one_each(_span: Span) -> None:
    """Of samples that have one answer each."""


def index_of(transfer_set: TransferSet) -> IndexInfo | None:
    """The index that a dump of this set writes; None where samples have one answer each.

    Raises:
        DataError: no sample has a word, or a token that carries loss.
    """
    positions = transfer_set.positions
    if positions is None:
        return None
    check_some_word(positions, transfer_set.name)
    if positions.kind == TOKENS:  # the last token of a sample has no next one, so some are never listed
        return IndexInfo(TOKENS, TOKENS, listed=True)
    return IndexInfo(WORDS, WORDS, labels=bool((positions.labels >= 0).any()))


def in_rows(transfer_set: TransferSet, order: np.ndarray) -> Positions | None:
    """The numbers of the index, its rows in their order; None where there is none."""
    info = index_of(transfer_set)
    if info is None or transfer_set.positions is None:
        return None
    found = transfer_set.positions.take(order)
    return build_positions(
        found.lengths,
        counts=found.counts,
        listed=found.listed if info.listed else None,
        labels=found.labels if info.labels else None,
    )


def records_of(positions: Positions | None, layout: Layout) -> InPart:
    """How many records each part of a layout has."""
    if positions is None:
        return one_each
    return PositionIndex(IndexInfo(WORDS, WORDS), [(layout, positions)]).in_part


def bytes_of_a_row(record_bytes: int, positions: Positions | None) -> int:
    """Of one row in one view, in the mean."""
    return record_bytes if positions is None else max(1, -(-record_bytes * positions.total // positions.lengths.size))


def part_bytes(record_bytes: int, positions: Positions | None, layout: Layout) -> Callable[[Span], int]:
    """How large a part of a member is whose records have so many bytes."""
    in_part = records_of(positions, layout)

    def of(span: Span) -> int:
        records = in_part(span)
        return record_bytes * (span.rows * span.views if records is None else records)

    return of


def check_has_index(transfer_set: TransferSet, plan: Plan, tokenizer: bytes | None) -> None:
    """Raise DataError where a cache of words or tokens is extended by other samples, or the other way round.

    Args:
        tokenizer: the cache's, where it has one.

    Raises:
        RenderingError: tokens of another vocabulary, or rendered otherwise.
    """
    known = next((index.name for index in plan.indexes if index.name in (WORDS, TOKENS)), None)
    found = None if transfer_set.positions is None else transfer_set.positions.kind
    if known is not None and found != known:
        raise DataError(
            f"{transfer_set.name}: the cache has answers about {known}, and these samples are none",
            tip="give --data as it was when the cache was made: "
            + ("words=NAME of a table, or conll:" if known == WORDS else "text:"),
        )
    if known is None and found is not None:
        raise DataError(
            f"{transfer_set.name}: its samples are {found}, and the cache has one answer for each sample",
            tip="make a cache of its own: another --out",
        )
    check_same_rendering(plan, tokenizer, transfer_set)


def check_same_positions(index: PositionIndex, transfer_set: TransferSet, order: np.ndarray, key_of: Any) -> None:
    """A resumed or extended dump must see as many words, with the labels, as the index has; and the same tokens listed.

    Args:
        key_of: row -> the sample's key.

    Raises:
        DataError: names the first samples that differ.
    """
    assert transfer_set.positions is not None
    found = transfer_set.positions.take(order)
    rows, views = np.arange(len(order)), np.zeros(len(order), np.int64)
    counts, what = index.counts(rows, views), index.info.kind
    differ = np.flatnonzero((counts != found.counts) | (index.lengths(rows, views) != found.lengths))
    how = f"have another number of {what} than"
    if not differ.size and found.listed is not None:
        listed = index.positions(rows, views).values
        differ = np.unique(np.repeat(rows, counts)[listed != found.listed])
        how = "have records of other tokens than"
    elif not differ.size:
        labels = index.labels(rows, views).values if index.info.labels else np.full(len(found.labels), -1)
        differ = np.unique(np.repeat(rows, counts)[labels != found.labels])
        how = "have words with other labels than"
    if differ.size:
        named = first_offenders((key_of(int(row)) for row in differ), differ.size)
        raise DataError(
            f"{differ.size} samples {how} this cache was started with: {named}",
            tip="restore them, or choose another --out",
        )

"""Words and tags of a map-style data set, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from softcache.data.classes import dataset_classes
from softcache.data.position_labels import PositionLabels, one_after_the_other
from softcache.data.tables import ITEM_COLUMNS, TAG_COLUMNS, WORD_COLUMNS, Table, only
from softcache.data.tagged_words import TagsFound
from softcache.errors import ClassMismatchError, ContentMismatchError, DataError
from softcache.words import Words, as_words


def gives_words(dataset: Any) -> bool:
    """Whether its samples are words with tags, as it says, or as its first sample shows."""
    if getattr(dataset, "words", None) is True:
        return True
    try:
        sample = dataset[0]
    except Exception:  # told where all samples are read
        return False
    if isinstance(dataset, Table) and dataset.item is not None:
        return are_strings(dataset.item_of(sample))
    return isinstance(sample, Mapping) and not set(ITEM_COLUMNS) & set(sample) and bool(set(WORD_COLUMNS) & set(sample))


def are_strings(item: Any) -> bool:
    """Whether an item is a list of strings, as words are."""
    item = item.tolist() if isinstance(item, np.ndarray) else item
    return isinstance(item, Words | list) and all(isinstance(one, str) for one in item)


def are_tagged(item: Any, label: Any) -> bool:
    """Whether an item is a list of strings, and its label is a list of as many."""
    return are_strings(item) and not isinstance(label, str) and hasattr(label, "__len__") and len(label) == len(item)


def looks_like_words(dataset: Any) -> bool:
    """Whether its first sample is a list of strings beside a list with as many labels: words, though it does not say so."""
    try:
        sample = dataset[0]
        return isinstance(sample, tuple) and len(sample) == 2 and are_tagged(*sample)
    except Exception:  # anything else
        return False


def tags_of(dataset: Any, keys: Sequence[str], name: str) -> tuple[PositionLabels, tuple[str, ...]]:
    """The tags of all samples, each of which is read once, and the names of the classes.

    Args:
        dataset: its `class_names`, or as many numbers as its `num_classes` says, are what tags that are numbers count.
        name: for messages.

    Raises:
        DataError: a sample that holds no words, or not a tag for each.
    """
    known = dataset_classes(dataset)
    count = getattr(dataset, "num_classes", None)
    if known is None and isinstance(count, int):
        known = tuple(str(number) for number in range(count))
    found = TagsFound(name, known)
    for row in range(len(dataset)):
        where = f"{name}, sample {keys[row]}"
        found.add(where, *words_and_tags(dataset[row], where))
    return found.done()


def words_and_tags(sample: Any, where: str) -> tuple[Words, Any]:
    """The words of a sample, and its tags or None."""
    if isinstance(sample, Mapping):
        own, tags = only(WORD_COLUMNS, tuple(sample)), only(TAG_COLUMNS, tuple(sample))
        if own is None:
            raise DataError(
                f"{where}: a dict of {', '.join(map(repr, sample))}; which one holds the words?",
                tip="give it 'words', and 'tags' with one for each word",
            )
        return as_words(sample[own], where), None if tags is None else sample[tags]
    if isinstance(sample, tuple) and not isinstance(sample, Words) and len(sample) == 2:
        return as_words(sample[0], where), sample[1]
    return as_words(sample, where), None


def positions_of(dataset: Any, class_names: Sequence[str] = ()) -> PositionLabels | None:
    """How many words each sample has, with their labels: through `Subset` and `ConcatDataset` too; None where they are no words.

    A data set that does not keep them is read for this once, sample after sample.

    Args:
        class_names: what tags are names or indices of, where the data set says nothing; none: words have no labels.

    Raises:
        ContentMismatchError: a sample that holds no words, or not a tag for each.
        ClassMismatchError: a tag that is none of the classes.
    """
    return _positions_at(dataset, np.arange(len(dataset)), class_names)


def _positions_at(dataset: Any, rows: np.ndarray, class_names: Sequence[str]) -> PositionLabels | None:
    """Those of these samples, in this order."""
    if isinstance(dataset, Subset):
        return _positions_at(dataset.dataset, np.asarray(dataset.indices, np.int64)[rows], class_names)
    if isinstance(dataset, ConcatDataset):
        return _positions_of_parts(dataset, rows, class_names)
    if (kept := kept_positions(dataset)) is not None:
        return kept.take(rows)
    if len(rows) and (gives_words(dataset) or looks_like_words(dataset)):
        return _read_positions(dataset, rows, class_names)
    return None


def _positions_of_parts(
    dataset: ConcatDataset[Any], rows: np.ndarray, class_names: Sequence[str]
) -> PositionLabels | None:
    ends = np.asarray(dataset.cumulative_sizes)
    number = np.searchsorted(ends, rows, side="right")
    found, places = [], []
    for part in np.unique(number).tolist():
        mine = np.flatnonzero(number == part)
        one = _positions_at(dataset.datasets[part], rows[mine] - (ends[part - 1] if part else 0), class_names)
        if one is None:
            return None
        found.append(one)
        places.append(mine)
    return one_after_the_other(found).take(np.argsort(np.concatenate(places))) if found else None


def kept_positions(dataset: Any) -> PositionLabels | None:
    """What a TransferSet of words keeps of them; None for anything else."""
    found = getattr(dataset, "positions", None)
    return found if isinstance(found, PositionLabels) else None


def _read_positions(dataset: Any, rows: np.ndarray, class_names: Sequence[str]) -> PositionLabels:
    known = dataset.class_names if isinstance(dataset, Table) else dataset_classes(dataset)
    found = TagsFound(type(dataset).__name__, known if class_names else None, empty="unlabelled")
    try:
        for row in rows.tolist():
            where = f"{type(dataset).__name__}, sample {row}"
            words, tags = (
                _table_row(dataset, row, where) if isinstance(dataset, Table) else words_and_tags(dataset[row], where)
            )
            found.add(where, words, tags if class_names else None)
    except DataError as exc:
        raise ContentMismatchError(exc.message, tip=exc.tip) from None
    try:
        return found.done(() if found.known is not None else tuple(class_names))[0]
    except DataError as exc:
        raise ClassMismatchError(exc.message, tip=exc.tip) from None


def _table_row(table: Table, row: int, where: str) -> tuple[Words, Any]:
    """As it is stored: of the columns that were named, else of those that are called so."""
    if table.item is None:
        return words_and_tags(table[row], where)
    item, tags = table.plain(row)
    return as_words(item, where), tags

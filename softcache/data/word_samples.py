"""Words and tags of a map-style data set, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softcache.data.classes import dataset_classes
from softcache.data.position_labels import PositionLabels
from softcache.data.tables import ITEM_COLUMNS, TAG_COLUMNS, WORD_COLUMNS, only
from softcache.data.tagged_words import TagsFound
from softcache.errors import DataError
from softcache.words import Words, as_words


def gives_words(dataset: Any) -> bool:
    """Whether its samples are words with tags, as it says, or as its first sample shows."""
    if getattr(dataset, "words", None) is True:
        return True
    try:
        sample = dataset[0]
    except Exception:  # told where all samples are read
        return False
    return isinstance(sample, Mapping) and not set(ITEM_COLUMNS) & set(sample) and bool(set(WORD_COLUMNS) & set(sample))


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

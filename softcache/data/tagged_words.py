"""The tags of words, gathered row by row, under one class list; and words that are held in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.data.classes import folded
from softcache.data.label_column import FOUND
from softcache.data.position_labels import PositionLabels
from softcache.data.sources import StringTable
from softcache.data.tables import is_missing, value_name
from softcache.errors import ConfigError, DataError, first_offenders, nearest
from softcache.words import Words

NO_LABEL = (-1, -100)  # as a number; -100 is what torch's cross entropy passes over
NONE = tuple(map(str, NO_LABEL))  # as strings, where all tags are numbers


class TagsFound:
    """Words and tags of rows as they pass; holds numbers alone.

    Args:
        path: of the data, for messages.
        known: the classes by their index, where the data name them (a ClassLabel).
        empty: "unlabelled": an empty tag is no label; "": it is refused.
    """

    def __init__(self, path: str, known: Sequence[str] | None = None, empty: str = "") -> None:
        self.path, self.known, self.empty = path, known, empty
        self._counts, self._tags = array("q"), array("i")
        self._numbers: dict[str, int] = {}  # of the names, as they come
        self._first: dict[str, tuple[str, int]] = {}  # where each stands first, and how often

    def add(self, where: str, words: Words, tags: Any) -> None:
        """One row: its words, and as many tags; None: it has none.

        Raises:
            DataError: another number of tags than of words, or what is no tag.
        """
        self._counts.append(len(words))
        if hasattr(tags, "tolist"):
            tags = tags.tolist()
        if tags is None:
            self._tags.extend([-1] * len(words))
            return
        if isinstance(tags, str) or not isinstance(tags, Sequence):
            raise DataError(f"{where}: tags are a list, found {tags!r:.60}", tip="give a tag for each word, in a list")
        if len(tags) != len(words):
            raise DataError(
                f"{where}: {len(tags)} tags for {len(words)} words, which begin with {' '.join(words[:5])!r}",
                tip="give one tag for each word, null where there is none",
            )
        self._tags.extend(self._number(where, tag) for tag in tags)

    def _number(self, where: str, tag: Any) -> int:
        if isinstance(tag, int | float | np.number) and tag in NO_LABEL:
            return -1
        text = isinstance(tag, str)
        name = (
            str(tag) if text else "" if is_missing(tag) else self._name(where, tag)
        )  # str: NumPy has strings of its own
        if name == "" and tag is not None and not self.empty:
            raise DataError(f"{where}: a tag is empty", tip="empty=unlabelled takes such words as unlabelled")
        if name == "":
            return -1
        first, count = self._first.get(name, (where, 0))
        self._first[name] = first, count + 1
        return self._numbers.setdefault(name, len(self._numbers))

    def _name(self, where: str, tag: Any) -> str:
        if isinstance(tag, bool) or not isinstance(tag, int | float | np.generic):
            raise DataError(f"{where}: the tag {tag!r:.60} is neither a string nor a number", tip="mend it")
        name = value_name(tag)
        if self.known is None:
            return name
        if not (name.isdecimal() and int(name) < len(self.known)):
            raise DataError(
                f"{where}: tag {name} is no index of the {len(self.known)} classes", tip="mend it; -1 is no label"
            )
        return self.known[int(name)]

    def done(self, classes: tuple[str, ...] = ()) -> tuple[PositionLabels, tuple[str, ...]]:
        """The labels and the class names: those that the data name, or `classes`, or those found, sorted.

        Args:
            classes: as of `tsv`. Tags that are numbers count the classes given, where none of these is a number.

        Raises:
            DataError: a tag that is not in `classes`, or two that differ by case or spaces alone.
        """
        names = self._named(classes)
        index = {name: number for number, name in enumerate(names)}
        numeric = all(name in NONE or name.isdecimal() for name in self._numbers)
        if numeric and classes not in ((), FOUND) and not any(name.isdecimal() for name in names):
            index = {str(number): number for number in range(len(names))}
        if numeric or self.known is not None:
            index = dict.fromkeys(NONE, -1) | index
        place = np.full(len(self._numbers) + 1, -1, np.int32)
        for name, number in self._numbers.items():
            if name not in index:
                among = f"one of the {len(names)} classes" if self.known is not None else "in classes="
                raise DataError(f"{self._first[name][0]}: tag {name!r} is not {among}", tip=nearest(name, names))
            place[number] = index[name]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.frombuffer(self._counts, np.int64))])
        labels = PositionLabels("words", offsets, np.frombuffer(self._tags, np.int32) if self._tags else place[:0])
        return labels.placed(place), names

    def _named(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        if self.known is not None and classes:
            raise ConfigError(
                f"{self.path}: classes= for tags whose column names its classes itself",
                tip=f"leave it out: they are {first_offenders(self.known, len(self.known))}",
            )
        if len(set(classes)) < len(classes):
            raise ConfigError(f"{self.path}: classes={','.join(classes)} names a class twice", tip="keep one of them")
        if self.known is not None:
            return tuple(self.known)
        if classes not in ((), FOUND):
            return classes
        found = [name for name in self._numbers if name not in NONE]
        if classes == ():
            self._refuse_accidents(found)
        return tuple(sorted(found, key=int) if all(map(str.isdecimal, found)) else sorted(self._numbers))

    def _refuse_accidents(self, found: Sequence[str]) -> None:
        seen: dict[str, str] = {}
        for name in found:
            other = seen.setdefault(folded(name), name)
            if other != name and len(name.strip()) > 1:
                where, count = self._first[name]
                raise DataError(
                    f"{where}: tag {name!r} differs from {other!r} by case or spaces only "
                    f"({count} and {self._first[other][1]} words)",
                    tip="make them equal, or say that they are two classes: classes=* keeps the tags as they are found",
                )


@dataclass(frozen=True)
class WordsReader:
    """Items that are words held in memory.

    Attributes:
        words: of all samples, one after the other.
        offsets: (N + 1,) int64, where each sample begins.
    """

    words: StringTable
    offsets: np.ndarray
    digest_kind = "item"

    def read(self, row: int) -> tuple[Words, None]:
        return Words(self.words[place] for place in range(int(self.offsets[row]), int(self.offsets[row + 1]))), None

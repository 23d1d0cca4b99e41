"""The labels of a column of text: which classes there are, and what is dirt and no class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.data.classes import folded, value_of
from softcache.data.label_kind import yes_or_no
from softcache.errors import ConfigError, DataError, first_offenders, nearest

FOUND = ("*",)  # classes=*: the labels found, whatever they look like
NUMBERS = ("none",)  # classes=none: the labels are numbers that are no classes
NOT_A_NUMBER = ("nan", "na", "n/a", "null")
MANY = 200  # so many labels, nearly all of them different, are no classes
HEADER_LABEL = re.compile(
    r"(.*[ _.-])?(labels?|class|classes|category|categories|targets?|gold|sentiment|polarity|tag|intent|emotion|topic"
    r"|ratings?|stars|score)([ _.-]?(id|ids|name|names|text|idx|index|no))?"
)
HEADER_TEXT = re.compile(
    r"(.*[ _.-])?(texts?|sentences?|reviews?|tweets?|questions?|content|body|messages?|comments?|title|headline|description"
    r"|document|utterance|query|input|premise|sms|string)([ _.-]?(id|ids|text|body|clean|en|a|b|[0-9]))?"
)


@dataclass(frozen=True)
class LabelColumn:
    """A column as it was read.

    Attributes:
        path: of the file, for messages.
        found: the label of each row; "" where it has none.
        texts: the text of each row.
        lines: of the file, in which each row begins; of other tables the numbers of the rows.
        may_be_header: nobody said whether the first line names the columns.
        line_word: what `lines` counts.
    """

    path: str
    found: Sequence[Any]
    texts: Sequence[str]
    lines: Sequence[int] | np.ndarray
    may_be_header: bool
    line_word: str = "line"

    def line(self, name: Any) -> str:
        """Where a label stands first."""
        return f"{self.path}, {self.line_word} {self.lines[list(self.found).index(name)]}"


def read_labels(column: LabelColumn, classes: tuple[str, ...], empty: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int32 labels, -1 = none, and the class names.

    Args:
        classes: the class list; (): the labels found, sorted, by number where all are whole numbers; ("*",): the same, and
            nothing is refused for what it looks like.
        empty: what an empty label is, or `nan` among numbers: "unlabelled" or "class"; "": refused.

    Raises:
        DataError: a label that is not in `classes`; without `classes`, a header, and what is no class label.
    """
    found, path = column.found, column.path
    _refuse_twice(path, classes)
    if column.may_be_header and classes in ((), FOUND):
        _refuse_header(column)
    if "" in found and not empty:
        raise DataError(
            f"{column.line('')}: the label is empty, as in {list(found).count('')} of {len(found)} rows",
            tip="empty=unlabelled takes these samples as unlabelled, empty=class as a class of its own",
        )
    unlabelled = _blanks(found) if empty == "unlabelled" else set()
    labels = [name for name in found if name not in unlabelled]
    if not classes:
        _refuse_accidents(column, labels)
        _refuse_no_classes(column, labels)
    # int("01") or int(" 1") would give two spellings one class
    numeric = all(name == "-1" or (name.isdecimal() and name == str(int(name))) for name in set(labels))
    if classes in ((), FOUND):
        classes = tuple(sorted(set(labels) - {"-1"}, key=int) if numeric else sorted(set(labels)))
    index = {name: number for number, name in enumerate(classes)} | dict.fromkeys(unlabelled, -1)
    if numeric:
        index.setdefault("-1", -1)
    for name in dict.fromkeys(found):
        if name not in index:
            tip = nearest(name, classes)
            if column.may_be_header and name == found[0]:
                tip += "; header=true if the first line names the columns"
            raise DataError(f"{column.line(name)}: label {name!r} is not in classes=", tip=tip)
    return np.array([index[name] for name in found], np.int32), classes


def read_several(
    column: LabelColumn, names: Sequence[str], classes: tuple[str, ...], empty: str = ""
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N, C) bool labels of C columns of 0 and 1, int8 with -1 where some are not known; and the class names.

    Args:
        column: its `found` has C values a row; -1 is not known.
        classes: as many names; (): those of the columns.
        empty: "unlabelled": an empty cell is not known; else it is refused.

    Raises:
        DataError: a value that is none of these, or -1 that may be no; another number of classes.
    """
    _refuse_twice(column.path, classes)
    classes = tuple(names) if classes in ((), FOUND) else classes
    if len(classes) != len(names):
        raise DataError(
            f"{column.path}: {len(classes)} classes= for {len(names)} columns of labels", tip="make them equal"
        )
    meant = {"1": 1.0, "0": 0.0, "-1": -1.0} | ({"": np.nan} if empty == "unlabelled" else {})
    known = {value: meant.get(value_of(value)) for row in column.found for value in row if isinstance(value, str)}
    for row in column.found:
        for value, name in zip(row, names, strict=True):
            if not isinstance(value, str) or known[value] is None:
                raise DataError(
                    f"{column.line(row)}: {value!r} in the column {name!r} is neither 0 nor 1",
                    tip="several columns of labels say of each class whether a sample has it, -1 where it is not known, and "
                    "with empty=unlabelled an empty cell too; label=NAME takes one column",
                )
    return yes_or_no(np.array([[known[value] for value in row] for row in column.found], float), column.path), classes


def read_values(column: LabelColumn) -> np.ndarray:
    """(N, K) float64 numbers of one column, or of several; NaN where a cell is empty.

    Args:
        column: its `found` has one value a row, or K of them.

    Raises:
        DataError: what is no finite number.
    """
    rows = [row if isinstance(row, list | tuple) else [row] for row in column.found]
    values = np.full((len(rows), len(rows[0])), np.nan)
    for place, row in enumerate(rows):
        for k, value in enumerate(row):
            if value != "":
                if not _is_number(str(value)) or not np.isfinite(float(value)):
                    raise DataError(
                        f"{column.line(column.found[place])}: {value!r} is no number",
                        tip="classes=none takes labels as numbers that are no classes; leave it out where they are classes",
                    )
                values[place, k] = float(value)
    return values


def read_lists(column: LabelColumn, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N, C) bool labels of a column of lists of class names, and the class names: those found, sorted, or `classes`.

    Rows of one length that hold nothing but 0 and 1 are no names: they say of each of so many classes whether a sample has it.

    Raises:
        DataError: a row that has no list, a name that is not in `classes`, or numbers with fractions.
    """
    _refuse_twice(column.path, classes)
    wrong = next((row for row in column.found if not isinstance(row, list)), None)
    if wrong is not None:
        raise DataError(
            f"{column.line(wrong)}: the label is {wrong!r}, and a list in other rows",
            tip="give each sample a list of its classes, [] where it has none of them",
        )
    kinds, lengths = {name for row in column.found for name in row}, {len(row) for row in column.found}
    if len(lengths) == 1 and min(lengths) > 1 and {value_of(name) for name in kinds} <= {"0", "1", "-1"}:
        return read_several(column, [str(number) for number in range(min(lengths))], classes)
    odd = next((name for name in sorted(kinds) if not name.isdecimal()), None)
    if classes == () and odd is not None and all(map(_is_number, kinds)):
        row = next(row for row in column.found if odd in row)
        raise DataError(
            f"{column.line(row)}: {odd!r} among the labels is no class",
            tip="give a list of classes, or in each row a 0 or 1 for each of them; classes=* takes it as a class",
        )
    if classes in ((), FOUND):
        numeric = all(name.isdecimal() for name in kinds)
        classes = tuple(sorted(kinds, key=int) if numeric else sorted(kinds))
    index = {name: number for number, name in enumerate(classes)}
    labels = np.zeros((len(column.found), len(classes)), np.bool_)
    for number, row in enumerate(column.found):
        for name in row:
            if name not in index:
                raise DataError(f"{column.line(row)}: label {name!r} is not in classes=", tip=nearest(name, classes))
            labels[number, index[name]] = True
    return labels, classes


def _refuse_twice(path: str, classes: tuple[str, ...]) -> None:
    if len(set(classes)) < len(classes):
        raise ConfigError(f"{path}: classes={','.join(classes)} names a class twice", tip="keep one of them")


def _refuse_header(column: LabelColumn) -> None:
    """A class that only the first line has, and lines that repeat it, may be the names of the columns."""
    label, text = column.found[0], column.texts[0]
    others = [i for i, name in enumerate(column.found) if name != label]
    if not others or any(column.texts[i] != text for i, name in enumerate(column.found) if name == label):
        return
    rest = {column.found[i] for i in others}
    words, called = text.split(), HEADER_TEXT.fullmatch(text.casefold().strip()) is not None
    among_numbers = all(_is_number(name) for name in rest) and not _is_number(label)
    looks = (
        (HEADER_LABEL.fullmatch(label.casefold().strip()) is not None and (called or len(words) == 1))
        or (called and len(label.split()) == 1)
        or (among_numbers and 0 < len(words) <= 3 and label.casefold() not in NOT_A_NUMBER)
    )
    if label and looks:
        raise DataError(
            f"{column.line(label)}: {text!r} with label {label!r} looks like the names of the columns, "
            "and would become a sample and a class of its own",
            tip="add header=true if it names the columns, header=false if it is a sample",
        )


def _refuse_accidents(column: LabelColumn, labels: Sequence[str]) -> None:
    """Two names that differ by spaces, case or the composition of letters; or by `.0` of a number."""
    counts = Counter(labels)
    first: dict[str, str] = {}
    for name in counts:
        for key in {folded(name), value_of(name) if "." in name or name.isdecimal() else folded(name)}:
            other = first.setdefault(key, name)
            letters = len(name.strip()) == len(other.strip()) == 1 and name == name.strip() and other == other.strip()
            padded = name.isdecimal() and other.isdecimal()  # 01 and 1 are two spellings, as codes have them
            if other != name and not letters and not padded:
                rows = f"{counts[other]} and {counts[name]} rows"
                raise DataError(
                    f"{column.line(name)}: label {name!r} differs from {other!r} by case, spaces or spelling only ({rows})",
                    tip="make them equal, or say that they are two classes: classes=* keeps the labels as they are found",
                )


def _refuse_no_classes(column: LabelColumn, labels: Sequence[str]) -> None:
    """Numbers with fractions, NaN among numbers, and labels nearly all of which differ."""
    kinds, count = Counter(labels), len(labels)
    where, tip = f"{column.path}: the label column", "name another column with label=; classes=* takes it as it is"
    scores = "; classes=none takes numbers that are no classes (scores, measures)"
    numbers = [name for name in kinds if _is_number(name)]
    if blanks := sorted(_blanks(labels) - {""}):
        raise DataError(
            f"{column.line(blanks[0])}: label {blanks[0]!r} among numbers says that there is none",
            tip="empty=unlabelled takes these samples as unlabelled; classes=* takes it as a class",
        )
    shown = first_offenders(map(repr, kinds), len(kinds), limit=3)
    if len(numbers) == len(kinds) and any(not float(name).is_integer() for name in kinds):
        if len(kinds) > 50 or (count >= 20 and len(kinds) >= 0.9 * count):
            raise DataError(f"{where} holds {len(kinds)} different numbers with fractions: {shown}", tip=tip + scores)
        return
    words = sum(len(name.split()) for name in kinds) / max(1, len(kinds))
    if len(kinds) >= 0.9 * count and (count >= MANY or (count >= 20 and words >= 4)):
        raise DataError(f"{where} holds {len(kinds)} different labels in {count} rows: {shown}", tip=tip)


def _blanks(found: Sequence[str]) -> set[str]:
    """The labels that say there is none: empty ones, and `nan` and its like where all others are numbers."""
    kinds = set(found)
    words = {name for name in kinds if name.casefold() in NOT_A_NUMBER}
    others = kinds - words - {""}
    return ({""} & kinds) | (words if others and all(_is_number(name) for name in others) else set())


def _is_number(name: str) -> bool:
    try:
        return float(name) == float(name)
    except ValueError:
        return False

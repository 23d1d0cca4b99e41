"""Data sets of named columns, by what they can do: Hugging Face's `datasets.Dataset`, and pandas' DataFrame."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from softcache.errors import ClassMismatchError, ConfigError, DataError, JoinError, first_offenders, nearest
from softcache.spec import split_list

ITEM_COLUMNS = ("item", "image", "text")
LABEL_COLUMNS = ("label", "labels")
WORD_COLUMNS = ("words", "tokens")
TAG_COLUMNS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "label")
PART = 4096  # rows that are looked at together
Items = str | tuple[str, ...] | None  # the column of the items; two of pairs of texts


class Table(Dataset[dict[str, Any]]):
    """The rows of a table as a map-style data set of dicts.

    Args:
        rows: a `datasets.Dataset`, whose format (`with_format`, `set_transform`) is that of the samples; or a DataFrame.
        key: the column that names its samples; None where something else does.
        item: the column of what the teacher saw, or two of them for pairs of texts, "premise,hypothesis"; None: the only one of
            item, image and text, where there is one.
        label: the column of the labels; None: label or labels, where there is one.

    Raises:
        JoinError: no such column.
    """

    def __init__(self, rows: Any, *, key: str | None = None, item: str | None = None, label: str | None = None) -> None:
        self.rows = rows
        self.columns = tuple(str(name) for name in (rows.columns if is_frame(rows) else rows.column_names))
        items = () if item is None else names_of(item, self.columns)
        for name in (key, label, *items):
            if name is not None and name not in self.columns:
                raise JoinError(f"the data set has no column {name!r}", tip=nearest(name, self.columns))
        if len(items) > 2:
            raise JoinError(
                f"item={item} names {len(items)} columns", tip="an item has one column, a pair of texts has two"
            )
        self.key, self.label = key, label or only(LABEL_COLUMNS, self.columns)
        self.item: Items = (items[0] if len(items) == 1 else items) or only(ITEM_COLUMNS, self.columns)
        # as it is stored: neither formatted nor transformed
        self._plain = rows.with_format(None) if hasattr(rows, "with_format") else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _row(self.rows, index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one reading, which is several times faster where the table reads so."""
        read = getattr(self.rows, "__getitems__", None)
        return [_row(self.rows, index) for index in indices] if read is None else list(read(list(indices)))

    def plain(self, index: int) -> tuple[Any, Any]:
        """The item and the label of one row as they are stored; None for what has no column."""
        row = _row(self._plain, index)
        return self.item_of(row), None if self.label is None else row[self.label]

    def item_of(self, row: Mapping[str, Any]) -> Any:
        """The item of a row: what its column holds, a pair of two columns, a picture for the bytes of a file of one."""
        if self.item is None:
            return None
        if isinstance(self.item, tuple):
            return tuple(row[name] for name in self.item)
        return _picture(row[self.item])

    def labels(self, class_names: Sequence[str]) -> np.ndarray | None:
        """(N,) class indices among these names, -1 where there is none; None where the table has no labels of this kind."""
        if self.label is None:
            return None
        values = self.column(self.label)
        return labels_by_name(values, class_names) if self.class_names is None else indices_of(values)

    def column(self, name: str) -> list[Any]:
        """All values of a column as they are stored."""
        if is_frame(self.rows):
            return list(self.rows[next(own for own in self.rows.columns if str(own) == name)].tolist())
        return list(self._plain[name][:])

    def several(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values of some columns as they are stored, row after row; a part at a time, where the table can."""
        if is_frame(self.rows):
            yield from zip(*map(self.column, names), strict=True)
            return
        alone = self._plain.select_columns(list(names))
        for first in range(0, len(self), PART):
            part = alone[first : first + PART]
            yield from zip(*(part[name] for name in names), strict=True)

    def missing(self, name: str) -> list[int]:
        """The rows that have no text in a column of texts, and of a DataFrame nothing in any column."""
        if is_frame(self.rows):
            return [row for row, value in enumerate(self.column(name)) if is_missing(value) and value != -1]
        if "string" not in str(getattr(self.rows.features.get(name), "dtype", "")):
            return []
        alone = self._plain.select_columns([name])  # a part at a time: texts may take more room than there is
        parts = ((first, alone[first : first + PART][name]) for first in range(0, len(self), PART))
        return [first + i for first, values in parts for i, value in enumerate(values) if value is None]

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of a ClassLabel, whose labels are indices; None where labels name their classes themselves."""
        if self.label is None or is_frame(self.rows):
            return None
        feature = (getattr(self.rows, "features", None) or {}).get(self.label)
        feature = feature[0] if isinstance(feature, list) and feature else feature  # a list of what it holds
        names = getattr(
            getattr(feature, "feature", feature), "names", None
        )  # of a list of labels, those of its elements
        return list(names) if isinstance(names, list | tuple) else None


def with_columns(dataset: Any, *, key: str | None, item: str | None, label: str | None) -> Any:
    """The data set with its tables as map-style data sets, inside `Subset` and `ConcatDataset` too.

    Raises:
        JoinError: columns were named, and the data set has none.
    """
    if isinstance(dataset, Subset):
        return _with(dataset, {"dataset": with_columns(dataset.dataset, key=key, item=item, label=label)})
    if isinstance(dataset, ConcatDataset):
        parts = [with_columns(part, key=key, item=item, label=label) for part in dataset.datasets]
        return _with(dataset, {"datasets": parts})
    if isinstance(dataset, Table):
        return dataset
    if is_table(dataset):
        return Table(dataset, key=key, item=item, label=label)
    named = next((name for name in (key, item, label) if name is not None), None)
    if named is not None:
        raise JoinError(
            f"{type(dataset).__name__} has no columns, so there is none called {named!r}",
            tip="key=, item= and label= are of Hugging Face's data sets and of DataFrames; for others give keys=[...]",
        )
    return dataset


def is_table(dataset: Any) -> bool:
    """Whether it is a `datasets.Dataset` or a DataFrame, by what it has."""
    return is_frame(dataset) or (
        isinstance(getattr(dataset, "column_names", None), list | tuple)
        and hasattr(dataset, "features")
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
    )


def item_column(dataset: Any) -> Items:
    """The column, or the two, of the items of a table, or of what was selected from one; None for everything else."""
    while isinstance(dataset, Subset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    return dataset.item if isinstance(dataset, Table) else None


def is_frame(rows: Any) -> bool:
    """Whether it is a DataFrame, by what it has."""
    return hasattr(rows, "iloc") and hasattr(rows, "columns")


def _picture(item: Any) -> Any:
    """The picture in the bytes of a file, as a column of bytes or of {bytes, path} has it; anything else as it is."""
    data = item.get("bytes") if isinstance(item, Mapping) and set(item) == {"bytes", "path"} else item
    if not isinstance(data, bytes):
        return item
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, ValueError):
        return item


def _row(rows: Any, index: int) -> dict[str, Any]:
    if is_frame(rows):
        return {str(name): value for name, value in rows.iloc[int(index)].items()}
    return dict(rows[int(index)])


def names_of(text: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The column, or several, that a text names: `premise,hypothesis`, `"a, b",c`; one that is called so as a whole wins."""
    return (text,) if text in columns else split_list(text)


def only(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The one of some names that a table has; None where it has none or several."""
    found = [name for name in names if name in columns]
    return found[0] if len(found) == 1 else None


def check_words(words: str, tags: str, item: str, label: str, empty: str, name: str) -> None:
    """Raise ConfigError for parameters of words beside those of other items."""
    if tags and not words:
        raise ConfigError(f"{name}: tags={tags} without words=", tip="words=NAME names the column of lists of words")
    other = next((f"{what}={value}" for what, value in (("item", item), ("label", label)) if value), None)
    if words and other:
        raise ConfigError(
            f"{name}: words={words} and {other}", tip="items are words or something else; labels of words are tags=NAME"
        )
    if words and empty == "class":
        raise ConfigError(f"{name}: empty=class, and an empty tag is no class", tip="empty=unlabelled")


def check_two_columns(words: int | str, tags: int | str = "", *, name: str) -> None:
    """Raise ConfigError where words and their tags are one column."""
    if words == tags:
        raise ConfigError(f"{name}: words= and tags= are the same column", tip="tags=none where there are no tags")


def tag_column(words: str, key: str, columns: Sequence[str], name: str) -> str:
    """The column of tags as it is called, else of two columns the other one; DataError where nobody can tell."""
    rest = [column for column in columns if column not in (words, key)]
    found = only(TAG_COLUMNS, rest) or (rest[0] if len(rest) == 1 else None)
    if found is None:
        raise DataError(
            f"{name}: which of its columns holds the tags? There are {first_offenders(map(repr, rest), len(rest))}",
            tip="name it: tags=NAME; tags=none where there are none",
        )
    return found


def _with(dataset: Any, changed: dict[str, Any]) -> Any:
    """A copy of a data set with some of its attributes changed; itself where they are what they were."""
    if all(_same(getattr(dataset, name), value) for name, value in changed.items()):
        return dataset
    made = copy.copy(dataset)
    made.__dict__.update(changed)
    return made


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def labels_by_name(found: Sequence[Any], class_names: Sequence[str]) -> np.ndarray | None:
    """(N,) class index of each label of a column, -1 where there is none; None where they are of another kind.

    Whole numbers are the names of classes where all of them are, and indices of classes otherwise.

    Raises:
        ClassMismatchError: some labels are names of classes, and some of none.
    """
    place = {name: number for number, name in enumerate(class_names)}
    values = [None if is_missing(value) else value for value in found]
    if any(not isinstance(value, str | int | float | np.generic) for value in values if value is not None):
        return None
    names = [None if value is None else value_name(value) for value in values]
    unknown = [name for name in names if name is not None and name not in place]
    if not unknown:
        return np.array([-1 if name is None else place[name] for name in names], np.int64)
    if all(value is None or isinstance(value, int | np.integer) for value in values):
        return indices_of(values)
    if len(unknown) < sum(name is not None for name in names):
        raise ClassMismatchError(
            f"the data set has a label {unknown[0]!r}, which is no class of the cache",
            tip=nearest(unknown[0], class_names),
        )
    return None


def indices_of(found: Sequence[Any]) -> np.ndarray | None:
    """(N,) of labels that are class indices, -1 where there is none; None where they are no whole numbers."""
    values = [-1 if is_missing(value) else value for value in found]
    if not all(isinstance(value, int | np.integer) for value in values):
        return None
    return np.array([int(value) for value in values], np.int64)


def is_missing(value: Any) -> bool:
    """None, NaN, and the -1 that stands for no label."""
    if isinstance(value, float | np.floating):
        return bool(np.isnan(value))
    return value is None or (isinstance(value, int | np.integer) and value == -1)


def refuse_missing(item: Any, where: str) -> None:
    """Raise DataError for an item, or a part of one, that is not there: None, or the NaN that a table reads an empty text as."""
    for one in item if isinstance(item, tuple) else (item,):
        if is_missing(one) and one != -1:
            raise DataError(f"{where}: the item is {one!r}", tip="give each sample one, or leave it out")


def value_name(value: Any) -> str:
    """The name that a value stands for: 3 and 3.0 are both "3"."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value)

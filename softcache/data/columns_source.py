"""Tables of named columns as sources: Hugging Face's data sets, Parquet, and DataFrames that a user's factory returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from softcache.data.label_column import NUMBERS, LabelColumn, read_labels, read_lists, read_several, read_values
from softcache.data.sources import Source, StringTable, image_array, numbered
from softcache.data.tables import (
    WORD_COLUMNS,
    Table,
    check_two_columns,
    check_words,
    indices_of,
    is_frame,
    is_missing,
    names_of,
    only,
    refuse_missing,
    tag_column,
    value_name,
)
from softcache.data.tagged_words import TagsFound
from softcache.errors import ConfigError, DataError, JoinError, first_offenders
from softcache.words import as_words


@dataclass(frozen=True)
class ColumnsReader:
    """Items of a table; pictures come as arrays, everything else as the table gives it."""

    table: Table
    name: str
    of_words: bool = False
    digest_kind = "item"

    def read(self, row: int) -> tuple[Any, None]:
        item = self.table.item_of(self.table[row])
        if self.of_words:
            return as_words(item, f"{self.name}, row {row}"), None
        if isinstance(item, Image.Image):
            return image_array(item, f"{self.name}, row {row}"), None
        refuse_missing(item, f"{self.name}, row {row}")
        return item, None


def source_of_columns(
    rows: Any,
    name: str,
    prefix: str,
    *,
    item: str = "",
    label: str = "",
    key: str = "",
    words: str = "",
    tags: str = "",
    classes: tuple[str, ...] = (),
    empty: str = "",
) -> Source:
    """A table as a source.

    Args:
        rows: a `datasets.Dataset` or a DataFrame.
        name: for messages.
        prefix: of keys by position.
        item, key: columns; item "": the only one of item, image and text, or the only column.
        label: column of class indices, names, or lists of them; several of 0 and 1, "rude,loud"; "none" where there are no
            labels; "": label or labels.
        words, tags: columns of lists, of words and of their tags, as of `table`.
        classes, empty: as of `tsv`; not for a column that names its classes itself.

    Raises:
        DataError: no such column, or nobody can tell which one is meant; labels that are none; an empty table.
    """
    if not len(rows):
        raise DataError(f"{name}: the data set is empty", tip="give one with rows")
    check_words(words, tags, item, label, empty, name)
    if words:
        return _source_of_words(rows, name, prefix, words, tags, key, classes, empty)
    try:
        whole = Table(rows)
        several = names_of(label, whole.columns)
        only_label = several[0] if len(several) == 1 and label != "none" else None
        table = Table(rows, key=key or None, item=item or None, label=only_label)
        columns = [Table(rows, label=one) for one in several] if len(several) > 1 else []
    except JoinError as exc:
        raise DataError(f"{name}: {exc.message.removeprefix('the data set has ')}", tip=exc.tip) from None
    if label == "none":
        table.label = None
    _check_known(table, name, item, asked=bool(label))
    reader = ColumnsReader(table, name)
    _check_whole(table, name)
    keys = numbered(prefix, range(len(rows))) if table.key is None else StringTable(_key_names(table, name))
    texts = _Items(reader)
    if columns:
        values = [one.column(place) for one, place in zip(columns, several, strict=True)]
        found = [[_label_name(value) for value in row] for row in zip(*values, strict=True)]
        column = LabelColumn(name, found, texts, range(len(rows)), False, "row")
        if classes == NUMBERS:
            return _of_numbers(reader, keys, column)
        return Source(reader, keys, *read_several(column, several, classes, empty))
    if classes == NUMBERS and table.label is not None:
        found_labels = [_label_name(value) for value in table.column(table.label)]
        return _of_numbers(reader, keys, LabelColumn(name, found_labels, texts, range(len(rows)), False, "row"))
    return Source(reader, keys, *_labels(table, name, texts, classes, empty))


def _source_of_words(
    rows: Any, name: str, prefix: str, words: str, tags: str, key: str, classes: tuple[str, ...], empty: str
) -> Source:
    """Lists of words and of their tags; every row is looked at."""
    columns = Table(rows).columns
    if not tags:
        tags = tag_column(words, key, columns, name)
    try:
        table = Table(rows, key=key or None, item=words, label=None if tags == "none" else tags)
    except JoinError as exc:
        raise DataError(f"{name}: {exc.message.removeprefix('the data set has ')}", tip=exc.tip) from None
    if not isinstance(table.item, str):
        raise ConfigError(f"{name}: words={words} names several columns", tip="words are one column of lists")
    if tags == "none":
        table.label = None
    check_two_columns(table.item, table.label or "", name=name)
    found = TagsFound(name, table.class_names, empty)
    for row, (one, *said) in enumerate(table.several((words, tags) if table.label else (words,))):
        where = f"{name}, row {row}"
        found.add(where, as_words(one, where), said[0] if said else None)
    labels, names = found.done(classes)
    keys = numbered(prefix, range(len(rows))) if table.key is None else StringTable(_key_names(table, name))
    reader = ColumnsReader(table, name, of_words=True)
    return Source(reader, keys, np.full(len(keys), -1, np.int32), names, positions=labels)


def _of_numbers(reader: ColumnsReader, keys: StringTable, column: LabelColumn) -> Source:
    """Labels that are numbers and no classes."""
    return Source(reader, keys, np.full(len(column.found), -1, np.int32), (), read_values(column))


def _labels(
    table: Table, name: str, texts: Sequence[str], classes: tuple[str, ...], empty: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and class names."""
    if table.label is None:
        return np.full(len(table), -1, np.int32), classes
    values, known = table.column(table.label), table.class_names
    if known is not None and classes:
        raise ConfigError(
            f"{name}: classes= for the column {table.label!r}, which names its classes itself",
            tip=f"leave it out: they are {first_offenders(known, len(known))}",
        )
    if any(isinstance(value, list | tuple | np.ndarray) for value in values):
        named = [[_class_name(one, known) for one in value] if not is_missing(value) else "" for value in values]
        column = LabelColumn(name, named, texts, range(len(values)), False, "row")
        return read_lists(column, tuple(known) if known is not None else classes)
    if known is not None:
        labels = indices_of(values)
        assert labels is not None  # a ClassLabel holds whole numbers
        return labels.astype(np.int32), tuple(known)
    odd = next(
        (value for value in values if not (is_missing(value) or isinstance(value, str | int | float | np.generic))),
        None,
    )
    if odd is not None:
        raise DataError(
            f"{name}: the column {table.label!r} holds {type(odd).__name__}, for example {str(odd)[:60]!r}",
            tip="a label is a string, a number, or a list of them",
        )
    found = [_label_name(value) for value in values]
    return read_labels(LabelColumn(name, found, texts, range(len(found)), False, "row"), classes, empty)


def _check_known(table: Table, name: str, item: str, *, asked: bool) -> None:
    """Raise DataError where nobody can tell which column is the item, or which of several is the label."""
    told = f"There are {first_offenders(map(repr, table.columns), len(table.columns))}"
    if table.item is None:
        if len(table.columns) > 1:
            tip = "item=NAME; label=NAME for the label"
            if words := only(WORD_COLUMNS, table.columns):
                tip += f"; of lists of words words={words}&tags=NAME"
            raise DataError(f"{name}: which of its columns is the item? {told[0].upper()}{told[1:]}", tip=tip)
        table.item = table.columns[0]
    used = {table.key, *((table.item,) if isinstance(table.item, str) else table.item)}
    if table.label is None and not asked and set(table.columns) - used:
        raise DataError(
            f"{name}: which of its columns is the label? {told}",
            tip="label=NAME; label=none where there are no labels",
        )


def _check_whole(table: Table, name: str) -> None:
    """Raise DataError for rows without an item, as far as a look at the columns tells."""
    for column in (table.item,) if isinstance(table.item, str) else table.item or ():
        missing = table.missing(column)
        if missing:
            way = (
                f"dropna(subset=[{column!r}])"
                if is_frame(table.rows)
                else f"filter(lambda row: row[{column!r}] is not None)"
            )
            raise DataError(
                f"{name}: {len(missing)} of {len(table)} rows have nothing in the column {column!r}: row "
                + first_offenders(map(str, missing), len(missing)),
                tip=f"leave them out: {way}",
            )


def _key_names(table: Table, name: str) -> Iterator[str]:
    for row, value in enumerate(table.column(str(table.key))):
        if is_missing(value) or value == "":
            raise DataError(f"{name}, row {row}: the sample's key is {value!r}", tip="give each sample one of its own")
        yield str(value)


def _label_name(value: Any) -> str:
    return "" if value is None or (isinstance(value, float | np.floating) and np.isnan(value)) else value_name(value)


def _class_name(value: Any, known: Sequence[str] | None) -> str:
    is_place = known is not None and 0 <= int(value) < len(known)
    return known[int(value)] if known is not None and is_place else value_name(value)


@dataclass(frozen=True)
class _Items(Sequence[str]):
    """The items as texts by position, for messages."""

    reader: ColumnsReader

    def __len__(self) -> int:
        return len(self.reader.table)

    def __getitem__(self, row: Any) -> Any:
        return str(self.reader.read(row)[0])

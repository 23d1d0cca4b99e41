"""Text files as sources: `table:` reads TSV, CSV and JSON lines, `tsv:` tab-separated text as it always has; one reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softcache.data.hf_datasets import hf_dataset, is_columns_file
from softcache.data.label_column import NUMBERS, LabelColumn, read_labels, read_lists, read_several, read_values
from softcache.data.sources import PACKINGS, Source, StringTable, numbered
from softcache.data.tables import (
    ITEM_COLUMNS,
    LABEL_COLUMNS,
    WORD_COLUMNS,
    check_two_columns,
    check_words,
    names_of,
    only,
    tag_column,
    value_name,
)
from softcache.data.tagged_words import TagsFound
from softcache.data.text_rows import TSV, Layout, Record, TextFile, TextRows, find_rows, layout_of, records
from softcache.errors import ConfigError, DataError, first_offenders, nearest, warn_once
from softcache.spec import convert
from softcache.words import Words, as_words

Empty = Literal["", "unlabelled", "class"]
Place = int | str  # of a column: its number, of JSON lines its name
CONLL_ENDINGS = (".conll", ".conllu", ".bio", ".iob", ".iob2")
LOOKED_AT = 4096  # rows of TSV, for quotes
NAMED_WITHIN = 100  # JSON lines, by which the columns are known


@dataclass(frozen=True)
class RowReader:
    """Items that are texts of a file, or pairs of them, read where they lie.

    Attributes:
        rows: of the file.
        columns: of the text; of two the item is a tuple.
    """

    rows: TextRows
    columns: tuple[Place, ...]
    digest_kind = "item"

    def read(self, row: int) -> tuple[str | tuple[str, ...], None]:
        cells = self.rows[row]
        texts = tuple(cells[column] for column in self.columns)
        return (texts[0] if len(texts) == 1 else texts), None


@dataclass(frozen=True)
class WordRowReader:
    """Items that are lists of words in one column of a file, read where they lie."""

    rows: TextRows
    column: Place
    digest_kind = "item"

    def read(self, row: int) -> tuple[Words, None]:
        where = f"{self.rows.file.shown}, row {row}"
        return as_words(list_of(self.rows[row][self.column], where), where), None


def list_of(cell: Any, where: str) -> Any:
    """What a cell holds: of JSON lines itself, of text a JSON list.

    Raises:
        DataError: a text that is no JSON list.
    """
    if not isinstance(cell, str):
        return cell
    try:
        found = json.loads(cell)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise DataError(
            f"{where}: {cell[:60]!r} is no JSON list",
            tip='write lists as JSON, ["a", "word"]: json.dumps of each in pandas; JSON lines and Parquet hold lists as they are',
        )
    return found


def tsv(
    path: Path,
    text: str = "0",
    label: str = "1",
    key: str = "",
    header: str = "",
    classes: tuple[str, ...] = (),
    empty: Empty = "",
) -> Source:
    """Tab-separated UTF-8 text, plain or packed, taken as it is (no quoting); keys are the file's stem and the row.

    Args:
        path: the file.
        text: column of the text: a number from 0, or a name from the header; two of them for pairs, `premise,hypothesis`.
        label: column of the label, likewise; "none" where there is none; of several, each 0 or 1, each is a class.
        key: column of the samples' keys, likewise.
        header: "true" where the first line names the columns, "false" where it does not. Empty: it does where it has the names
            that are asked for; else it does not, and is refused where it looks as if it did.
        classes: the class list. Empty: the labels found, sorted; by number where all are whole numbers; what is no class
            label is refused. "*": the labels found, whatever they look like. In a column of whole numbers -1 means no label.
            "none": the labels are numbers that are no classes (scores, measures), which `eval` compares values with.
        empty: what an empty label means: that the sample is "unlabelled", or a "class" of its own. Empty: it is refused.
    """
    file = TextFile(path)
    if path.name.removesuffix(path.suffix if path.suffix in PACKINGS else "").endswith((".csv", ".jsonl", ".json")):
        warn_once(
            f"{path}: is read as tab-separated text, whatever its name says; table:{path} reads CSV and JSON lines"
        )
    return _source(file, TSV, _Wanted(path, text, label, key, header), classes, empty)


def table(
    path: Path,
    text: str = "",
    label: str = "",
    key: str = "",
    header: str = "",
    classes: tuple[str, ...] = (),
    empty: Empty = "",
    separator: str = "",
    quotes: str = "",
    words: str = "",
    tags: str = "",
) -> Source:
    """A file of rows and columns: CSV, TSV or JSON lines in UTF-8, plain or packed; with the extra `datasets` Parquet or Arrow.
    Columns as `tsv` has them.

    Args:
        path: the file; its ending says how it is written, where it says nothing its first rows.
        text: empty: the only column called item or text, else of two columns the first one.
        label: empty: the only column called label or labels, else of two columns the second one.
        key, header, classes, empty: as of `tsv`.
        separator: between the columns of CSV, one letter or `tab`. Empty: of comma, semicolon, tab and | the one that divides.
        quotes: "true" where cells may stand in quotes, "false" where quotes are letters. Empty: true of CSV, false of TSV.
        words: column of lists of words, in CSV and TSV as JSON (["a", "word"]); then each word has a label.
        tags: column of their tags, a list with one for each word, null or -1 or -100 where there is none: names, or indices of
            `classes`. "none" where there are no tags. Empty: the only column called tags, ner_tags, pos_tags, chunk_tags, labels
            or label, else of two columns the other one.
    """
    check_words(words, tags, text, label, empty, str(path))
    if path.suffix.lower() in CONLL_ENDINGS:
        raise ConfigError(
            f"{path}: by its ending it has a word a line, and blank lines between sentences; a table has a sample a line",
            tip=f"read it as conll:{path}",
        )
    if is_columns_file(path):
        if separator or quotes or header:
            raise ConfigError(f"{path}: separator=, quotes= and header= are of text files", tip="leave them out")
        named = {"text": text, "label": label, "key": key, "words": words, "tags": tags}
        return hf_dataset(str(path), **named, classes=classes, empty=empty)  # type: ignore[arg-type]
    file = TextFile(path)
    layout = layout_of(file, separator, bool(convert(quotes, bool, f"{path}: quotes")) if quotes else None)
    if words:
        return _source_of_words(file, layout, _Wanted(path, words, tags, key, header, of_words=True), classes, empty)
    source = _source(file, layout, _Wanted(path, text, label, key, header), classes, empty)
    if layout == TSV and not quotes:
        _tell_quotes(path, source.reader)
    return source


def _source(file: TextFile, layout: Layout, wanted: _Wanted, classes: tuple[str, ...], empty: Empty) -> Source:
    found = records(file, layout)
    ahead = list(islice(found, NAMED_WITHIN if layout.is_json else 1))
    columns = wanted.columns(ahead, layout)
    body: Iterator[Record] = chain(ahead[1:] if columns.has_header else ahead, found)
    picked = _Picked(file.shown, columns)
    rows, lines = find_rows(file, layout, picked.look, body, columns.count)
    if not len(rows):
        raise _no_rows(file.shown, 1 + columns.has_header)
    reader = RowReader(rows, columns.text)
    keys = StringTable(picked.keys) if columns.key is not None else numbered(stem(wanted.path), range(len(rows)))
    if not columns.label:
        return Source(reader, keys, np.full(len(rows), -1, np.int32), classes)
    column = LabelColumn(file.shown, picked.labels, _Texts(reader), lines, columns.may_be_header)
    if classes == NUMBERS:
        return Source(reader, keys, np.full(len(rows), -1, np.int32), (), read_values(column))
    if len(columns.label) > 1:
        names = [
            columns.names[place] if isinstance(place, int) and columns.names else str(place) for place in columns.label
        ]
        labels, class_names = read_several(column, names, classes, empty)
    elif any(isinstance(one, list) for one in picked.labels):
        labels, class_names = read_lists(column, classes)
    else:
        labels, class_names = read_labels(column, classes, empty)
    return Source(reader, keys, labels, class_names)


def _source_of_words(file: TextFile, layout: Layout, wanted: _Wanted, classes: tuple[str, ...], empty: Empty) -> Source:
    """Rows whose items are lists of words."""
    found = records(file, layout)
    ahead = list(islice(found, NAMED_WITHIN if layout.is_json else 1))
    columns = wanted.columns(ahead, layout)
    if len(columns.text) != 1 or len(columns.label) > 1:
        raise ConfigError(f"{file.shown}: words= and tags= are one column each", tip="each cell holds a list")
    check_two_columns(columns.text[0], *columns.label, name=file.shown)
    body = chain(ahead[1:] if columns.has_header else ahead, found)
    tags = TagsFound(file.shown, empty=empty)
    picked = _PickedWords(file.shown, columns, tags)
    rows, _ = find_rows(file, layout, picked.look, body, columns.count)
    if not len(rows):
        raise _no_rows(file.shown, 1 + columns.has_header)
    labels, names = tags.done(classes)
    keys = StringTable(picked.keys) if columns.key is not None else numbered(stem(wanted.path), range(len(rows)))
    none = np.full(len(rows), -1, np.int32)
    return Source(WordRowReader(rows, columns.text[0]), keys, none, names, positions=labels)


def _tell_quotes(path: Path, reader: Any) -> None:
    """Warn where a text among the first ones is written as CSV writes quotes inside quotes, in a file that undoes none."""
    for row in range(min(LOOKED_AT, len(reader.rows))):
        item, _ = reader.read(row)
        for text in (item,) if isinstance(item, str) else item:
            inside = text[1:-1].replace('""', "") if text[:1] == text[-1:] == '"' else text
            if len(text) > 2 and '""' in text[1:-1] and '"' not in inside:
                warn_once(
                    f"{path}: texts stand in quotes, as in row {row}, and they stay there: quotes=true takes them off, "
                    "quotes=false says that they belong to the texts"
                )
                return


def stem(path: Path) -> str:
    """What keys by position begin with: the file's name without .tsv and how it is packed."""
    return path.name.removesuffix(path.suffix if path.suffix in PACKINGS else "").removesuffix(".tsv")


def _no_rows(shown: str, line: int) -> DataError:
    return DataError(f"{shown}, line {line}: the file ends before the first row", tip="give a file with rows")


@dataclass(frozen=True)
class _Texts(Sequence[str]):
    """The texts by position, for a look at some of them; pairs as one."""

    reader: RowReader

    def __len__(self) -> int:
        return len(self.reader.rows)

    def __getitem__(self, row: Any) -> Any:
        item, _ = self.reader.read(row)
        return item if isinstance(item, str) else " ".join(item)


@dataclass(frozen=True)
class _Columns:
    """Which columns are what.

    Attributes:
        text: one or two.
        label: (), one, or several.
        key: None where keys are positions.
        names: of all columns; () where there is no header.
        count: of all columns.
        has_header, may_be_header: whether the first row names them; whether nobody said so.
    """

    text: tuple[Place, ...]
    label: tuple[Place, ...]
    key: Place | None
    names: tuple[str, ...]
    count: int
    has_header: bool
    may_be_header: bool


@dataclass(frozen=True)
class _Wanted:
    """The columns as the user names them; "" where they do not."""

    path: Path
    text: str
    label: str
    key: str
    header: str
    of_words: bool = False

    def columns(self, ahead: Sequence[Record], layout: Layout) -> _Columns:
        """Which they are, by the first rows.

        Raises:
            DataError: no such column, or nobody can tell which one is meant.
        """
        if not ahead:
            raise _no_rows(str(self.path), 1)
        first = ahead[0][2]
        if layout.is_json:
            names, has_header, told = tuple(dict.fromkeys(name for *_, row in ahead for name in row)), False, True
        else:
            has_header, told = self._has_header(list(first))
            names = tuple(first) if has_header else ()
        count = len(names) if layout.is_json else len(first)
        find = _Finder(self.path, names, () if names else tuple(first), count, layout)
        text, label = self._defaults(names, count, names or tuple(first))
        labels = () if label == "none" else find.several(label, "tags" if self.of_words else "label")
        texts = find.several(text, "words" if self.of_words else "text")
        if len(texts) > 2:
            raise DataError(
                f"{self.path}: text={text} names {len(texts)} columns", tip="a text has one column, a pair has two"
            )
        key = find.one(self.key, "key") if self.key else None
        return _Columns(texts, labels, key, names, count, has_header, not told)

    def _has_header(self, first: Sequence[str]) -> tuple[bool, bool]:
        """Whether the first row names the columns, and whether that is certain."""
        if self.header:
            return bool(convert(self.header, bool, f"{self.path}: header")), True
        asked = [part for one in (self.text, self.label, self.key) for part in names_of(one, first)]
        asked = [name for name in asked if name and not name.isdecimal() and name != "none"]
        if asked:
            found = any(name in first for name in asked)  # one that is not is told by the names that there are
            return found, found
        found = self.text == self.label == "" and all(only(names, first) for names in (ITEM_COLUMNS, LABEL_COLUMNS))
        return found, found

    def _defaults(self, names: Sequence[str], count: int, first: Sequence[str]) -> tuple[str, str]:
        """The columns of text and label: as given, else as they are called, else of two columns the first and the second."""
        if self.of_words:
            columns = names or [str(number) for number in range(count)]
            return self.text, self.label or tag_column(self.text, self.key, columns, str(self.path))
        text, label = self.text or only(ITEM_COLUMNS, names) or "", self.label or only(LABEL_COLUMNS, names) or ""
        if count > 2 and not (text and label):
            what = "label" if text else "text"
            tip = f"name it: {what}=NAME" + ("" if text else ", and the label's: label=NAME")
            tip += "; label=none where there are no labels" if not label else ""
            if words := only(WORD_COLUMNS, first):
                tip += f"; of lists of words words={words}&tags=NAME"
            raise DataError(
                f"{self.path}: which of its columns is the {what}? There are {first_offenders(map(repr, first), len(first))}",
                tip=tip,
            )
        others = [name for name in names or map(str, range(count)) if name not in (text, label)]
        text = text or (others.pop(0) if others else "0")
        return text, label or (others.pop(0) if others else "1")


@dataclass(frozen=True)
class _Finder:
    """Finds columns by name or number."""

    path: Path
    names: tuple[str, ...]
    first: tuple[str, ...]
    count: int
    layout: Layout

    def several(self, wanted: str, what: str) -> tuple[Place, ...]:
        return tuple(self.one(part, what) for part in names_of(wanted, self.names))

    def one(self, wanted: str, what: str) -> Place:
        if wanted.isdecimal() and int(wanted) < self.count and not self.layout.is_json:
            return int(wanted)
        if self.names.count(wanted) > 1:
            raise DataError(
                f"{self.path}, line 1: two columns are called {wanted!r}", tip="name it by its number from 0"
            )
        if wanted in self.names:
            return wanted if self.layout.is_json else self.names.index(wanted)
        circle = "" if self.layout != TSV or self.count > 1 else f"; table:{self.path} reads CSV and JSON lines"
        if wanted.isdecimal():
            raise DataError(
                f"{self.path}, line 1: no column {wanted} for the {what}, there are {self.count}",
                tip=f"columns count from 0{circle}"
                + (f"; {what}=none where there is none" if what == "label" and not circle else ""),
            )
        tip = nearest(wanted, self.names)
        if not self.names:
            tip = "add header=true if the first line names the columns: "
            tip += first_offenders((repr(cell[:40]) for cell in self.first), len(self.first))
        raise DataError(f"{self.path}, line 1: no column {wanted!r} for the {what}", tip=tip + circle)


def _key_of(shown: str, line: int, cells: Any, column: Place) -> str:
    """The name of a sample; DataError for a cell that is none."""
    found = cells.get(column) if type(cells) is dict else cells[column]
    if found in ("", None) or not isinstance(found, str | int | float):
        raise DataError(f"{shown}, line {line}: the sample's key is {found!r}", tip="give each sample one of its own")
    return value_name(found)


class _PickedWords:
    """Of rows of words their tags and keys are kept as they pass."""

    def __init__(self, shown: str, columns: _Columns, tags: TagsFound) -> None:
        self.shown, self.columns, self.tags = shown, columns, tags
        self.keys: list[str] = []

    def look(self, line: int, cells: Any) -> None:
        where = f"{self.shown}, line {line}"
        get = cells.get if type(cells) is dict else cells.__getitem__
        words = as_words(list_of(get(self.columns.text[0]), where), where)
        said = get(self.columns.label[0]) if self.columns.label else None
        self.tags.add(where, words, None if said is None else list_of(said, where))
        if self.columns.key is not None:
            self.keys.append(_key_of(self.shown, line, cells, self.columns.key))


class _Picked:
    """What is kept of the rows as they pass: labels and keys; texts stay where they are."""

    def __init__(self, shown: str, columns: _Columns) -> None:
        self.shown, self.columns = shown, columns
        self.labels: list[Any] = []
        self.keys: list[str] = []
        self._same: dict[str, str] = {}  # one string for each label, however often it comes

    def look(self, line: int, cells: Any) -> None:
        if type(cells) is dict:
            for column in self.columns.text:
                self._check_text(line, cells, column)
        label = self.columns.label
        if len(label) == 1:
            self.labels.append(self._label(line, cells, label[0]))
        elif label:
            self.labels.append([self._label(line, cells, column) for column in label])
        if self.columns.key is not None:
            self.keys.append(_key_of(self.shown, line, cells, self.columns.key))

    def _check_text(self, line: int, cells: Any, column: Place) -> None:
        found = cells.get(column)
        if not isinstance(found, str):
            what = "missing" if found is None else f"{found!r:.80}, which is no string"
            tip = "give each sample a text, or leave it out"
            if isinstance(found, list):
                tip = f"words with a tag each are words={column}&tags=NAME"
            raise DataError(f"{self.shown}, line {line}: the text {column!r} is {what}", tip=tip)

    def _label(self, line: int, cells: Any, column: Place) -> Any:
        found = cells.get(column) if type(cells) is dict else cells[column]
        if type(found) is str:
            return self._same.setdefault(found, found)
        if isinstance(found, list) and all(isinstance(one, str | int | float) for one in found):
            return [value_name(one) for one in found]
        if found is None or (isinstance(found, float) and math.isnan(found)):
            return ""
        if not isinstance(found, str | int | float):
            raise DataError(
                f"{self.shown}, line {line}: the label is {found!r}",
                tip="a label is a string, a number, or a list of them",
            )
        name = value_name(found)
        return self._same.setdefault(name, name)

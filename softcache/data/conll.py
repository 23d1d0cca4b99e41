"""The source `conll:PATH`: a word a line with its tags, and blank lines between sentences; also CoNLL-U."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from softcache.data.sources import PACKINGS, Source, StringTable, numbered
from softcache.data.tagged_words import TagsFound, WordsReader
from softcache.data.text_rows import TextFile, decoded
from softcache.errors import ConfigError, DataError
from softcache.words import as_words

DOCUMENT = "-DOCSTART-"  # begins a document, and is no word
UNSAID = "_"  # in a column: nothing is said
COMMENT = re.compile(r"#\s*[\w.:-]+(\s+\w+)?\s*=")  # as CoNLL-U has them: # sent_id = 1
NOT_A_WORD = re.compile(
    r"[0-9]+[-.][0-9]+"
)  # first column of CoNLL-U: words written as one (3-4), and words left out (5.1)
LONGEST = 100_000  # words of a sentence


def conll(
    path: Path, words: str = "", tags: str = "", classes: tuple[str, ...] = (), empty: Literal["", "unlabelled"] = ""
) -> Source:
    """Sentences of a file in UTF-8, plain or packed: a line a word, columns divided by tabs or by spaces, a blank line between
    sentences. Keys are the file's name and the number of the sentence. -DOCSTART- lines end a sentence, and
    are passed over as comments are.

    Args:
        words: column of the words, from 0; of negative ones -1 is the last. Empty: 0, of CoNLL-U (10 columns, numbered words) 1.
        tags: column of the tags; "none" where there is none. Empty: -1, of CoNLL-U 3, the universal parts of speech.
        classes: the class list; empty: the tags found, sorted. A tag `_` is no label.
        empty: what an empty tag means: that the word is "unlabelled". Empty: it is refused.

    Raises:
        DataError: a line with another number of columns, named; no words, or no sentences that blank lines divide.
    """
    file = TextFile(path)
    form = _form_of(file)
    place_of_words = form.column(words or ("1" if form.numbered else "0"), "words")
    tags = tags or ("3" if form.numbered else "-1" if form.count > 1 else "none")
    place_of_tags = None if tags == "none" else form.column(tags, "tags")
    if place_of_tags == place_of_words:
        raise ConfigError(f"{file.shown}: words={words or place_of_words} and tags={tags} are one column", tip=form.tip)
    found = TagsFound(file.shown, empty=empty)
    offsets = array("q", [0])

    def all_words() -> Iterator[str]:
        for line, rows in _sentences(file, form):
            where = f"{file.shown}, the sentence at line {line}"
            item = as_words([cells[place_of_words] for cells in rows], where)
            said = [] if place_of_tags is None else [cells[place_of_tags] for cells in rows]
            found.add(where, item, None if place_of_tags is None else [None if t == UNSAID else t for t in said])
            offsets.append(offsets[-1] + len(item))
            yield from item

    table = StringTable(all_words())
    if len(offsets) == 1:
        raise DataError(f"{file.shown}: holds no words", tip="give a file with a word and its tag a line")
    labels, names = found.done(classes)
    name = path.name.removesuffix(path.suffix if path.suffix in PACKINGS else "")
    keys = numbered(name, range(len(labels)))
    reader = WordsReader(table, np.frombuffer(offsets, np.int64))
    return Source(reader, keys, np.full(len(labels), -1, np.int32), names, positions=labels)


@dataclass(frozen=True)
class _Form:
    """How a file is written.

    Attributes:
        shown: the file, for messages.
        tabs: columns are divided by tabs; else by spaces.
        count: of columns.
        numbered: as CoNLL-U: ten columns, of which the first one numbers the words.
    """

    shown: str
    tabs: bool
    count: int
    numbered: bool

    def cells(self, line: str) -> list[str]:
        return _cells(line, tabs=self.tabs)

    @property
    def tip(self) -> str:
        return f"its columns are 0 to {self.count - 1}: words=0&tags=-1; tags=none where there are no tags"

    def column(self, text: str, what: str) -> int:
        try:
            place = int(text)
        except ValueError:
            raise ConfigError(f"{self.shown}: {what}={text} is no number of a column", tip=self.tip) from None
        if not -self.count <= place < self.count:
            raise ConfigError(f"{self.shown}: no column {place} for the {what}, there are {self.count}", tip=self.tip)
        return place % self.count


def _cells(line: str, *, tabs: bool) -> list[str]:
    return line.split("\t") if tabs else [cell for cell in line.split(" ") if cell]


def _lines(file: TextFile) -> Iterator[tuple[int, str]]:
    """(number, line without its end), a blank one as an empty string."""
    for number, line in enumerate(file.lines(), start=1):
        text = decoded(file, line, number).removesuffix("\n").removesuffix("\r")
        yield number, text if text.strip() else ""


def _form_of(file: TextFile) -> _Form:
    """By the first line that holds a word."""
    for _, line in _lines(file):
        if line and not line.startswith((DOCUMENT, "# ")) and not COMMENT.match(line):
            cells = _cells(line, tabs="\t" in line)
            return _Form(file.shown, "\t" in line, len(cells), len(cells) == 10 and _is_number(cells[0]))
    raise DataError(f"{file.shown}: holds no words", tip="give a file with a word and its tag a line")


def _is_number(cell: str) -> bool:
    return cell.isdecimal() or NOT_A_WORD.fullmatch(cell) is not None


def _sentences(file: TextFile, form: _Form) -> Iterator[tuple[int, list[list[str]]]]:
    """(number of its first line, the cells of its words) of each sentence that has words."""
    rows: list[list[str]] = []
    first = 0
    for number, line in _lines(file):
        if not line or line.startswith(DOCUMENT):
            if rows:
                yield first, rows
            rows = []
            continue
        cells = form.cells(line)
        if COMMENT.match(line) or (not rows and len(cells) != form.count and (line + " ").startswith("# ")):
            continue  # inside a sentence # is a word, whose line lacks columns
        if len(cells) != form.count:
            raise DataError(
                f"{file.shown}, line {number}: {len(cells)} columns, where the first word has {form.count}: {line[:60]!r}",
                tip=f"give each line as many, divided by {'tabs' if form.tabs else 'spaces'}; a blank line ends a sentence",
            )
        if form.numbered and NOT_A_WORD.fullmatch(cells[0]):
            continue
        first = number if not rows else first
        rows.append(cells)
        if len(rows) > LONGEST:
            raise DataError(
                f"{file.shown}: the sentence at line {first} has more than {LONGEST:,} words",
                tip="a blank line ends a sentence; a file with a sentence a line is a table:",
            )
    if rows:
        yield first, rows

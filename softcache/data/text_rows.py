"""The rows of a text file where they lie: TSV, CSV and JSON lines, found once and read from the disk when they are asked for."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from softcache.data.sources import PACKINGS, read_unpacked
from softcache.errors import ConfigError, DataError

SEPARATORS = (",", ";", "\t", "|")
LOOKED_AT = 2**16  # bytes by which a layout is told
BOM = "\ufeff"
Cells = list[str] | dict[str, Any]
Record = tuple[int, int, Cells]  # offset of its first byte, number of its first line, what it holds
# what people give in the place of text, by the first bytes of it
OTHERS = (
    (b"\x1f\x8b", "is packed by gzip", "let its name end in .gz"),
    (b"BZh", "is packed by bzip2", "let its name end in .bz2"),
    (b"\xfd7zXZ\0", "is packed by xz", "let its name end in .xz"),
    (b"PK\x03\x04", "is a workbook or a zip archive", "save the sheet as CSV in UTF-8, or unpack the archive"),
    (b"\xff\xfe", "is UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16", "save it as UTF-8"),
)


@dataclass(frozen=True)
class Layout:
    """How rows are written.

    Attributes:
        separator: between columns; "" where each line is a JSON object.
        quotes: cells may stand in double quotes, as in CSV; a quote inside them is doubled, and blank lines are no rows.
    """

    separator: str
    quotes: bool = False

    @property
    def is_json(self) -> bool:
        return not self.separator


TSV, CSV, JSON_LINES = Layout("\t"), Layout(",", quotes=True), Layout("")


class TextFile:
    """The bytes of a file by their offset: read from the disk when they are asked for; held in memory where it is packed.

    Pickles as its name: another process opens it anew, and unpacks it anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.shown = str(path)
        self._open()
        self._stamp = self._found_stamp()

    def _open(self) -> None:
        self._held: bytes | None = read_unpacked(self.path) if self.path.suffix in PACKINGS else None
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # not a map: a file that shrinks kills nobody
            weakref.finalize(self, os.close, self._file)
            os.pread(self._file, 1, 0)
        except FileNotFoundError:
            raise DataError(
                f"{self.shown}: there is no such file", tip="give the path as seen from the current folder"
            ) from None
        except IsADirectoryError:
            raise DataError(
                f"{self.shown}: is a folder",
                tip=f"name a file; of pictures imagefolder:{self.shown}, of Parquet hf-dataset:{self.shown}",
            ) from None
        except OSError as exc:
            raise DataError(f"{self.shown}: cannot be read: {exc}", tip="check the file") from exc

    def _found_stamp(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    @property
    def size(self) -> int:
        return self._stamp[0] if self._held is None else len(self._held)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from one offset to another.

        Raises:
            DataError: the file has become shorter.
        """
        if self._held is not None:
            return self._held[start:stop]
        found = os.pread(self._file, stop - start, start)
        while 0 < len(found) < stop - start:
            more = os.pread(self._file, stop - start - len(found), start + len(found))
            if not more:
                break
            found += more
        if len(found) < stop - start:
            self._changed()
        return found

    def lines(self) -> Iterator[bytes]:
        """Line after line, with its end; only \\n ends one."""
        if self._held is not None:
            yield from io.BytesIO(self._held)
            return
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            yield from file

    def _changed(self) -> None:
        raise DataError(f"{self.shown}: the file changed while it was in use", tip="start again, and leave it as it is")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shown": self.shown, "_stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        if self._found_stamp() != self._stamp:
            self._changed()


class TextRows(Sequence[Cells]):
    """Rows by position: a list of cells each, of JSON lines a dict.

    Args:
        file: where they lie.
        layout: how they are written.
        starts: (N + 1,) int64 offsets: row i lies between the i-th and the next one.
    """

    def __init__(self, file: TextFile, layout: Layout, starts: np.ndarray) -> None:
        self.file, self.layout, self.starts = file, layout, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: Any) -> Any:
        start, stop = int(self.starts[row]), int(self.starts[row + 1])
        text = self.file.read(start, stop).decode("utf-8")
        if start == 0:
            text = text.removeprefix(BOM)
        if self.layout.is_json:
            return json.loads(text)
        if not self.layout.quotes:
            return cells_of(text, self.layout.separator)
        text = text.rstrip("\r\n")  # of blank lines behind it
        if '"' not in text:
            return text.split(self.layout.separator)
        with _cells_of_any_length():
            return next(csv.reader([text], delimiter=self.layout.separator, strict=True))


def cells_of(line: str, separator: str) -> list[str]:
    """The cells of a line whose quotes are letters like others."""
    return line.removesuffix("\n").removesuffix("\r").split(separator)


def records(file: TextFile, layout: Layout) -> Iterator[Record]:
    """Row after row, with its place.

    Raises:
        DataError: what is no UTF-8, no CSV or no JSON object, with its line.
    """
    if layout.is_json:
        return _objects(file)
    return _quoted(file, layout.separator) if layout.quotes else _plain(file, layout.separator)


def _plain(file: TextFile, separator: str) -> Iterator[Record]:
    start = 0
    for number, line in enumerate(file.lines(), start=1):
        text = decoded(file, line, number)
        if text:  # else a byte order mark was all of the file
            yield start, number, cells_of(text, separator)
        start += len(line)


def _quoted(file: TextFile, separator: str) -> Iterator[Record]:
    consumed = number = 0

    def fed() -> Iterator[str]:
        nonlocal consumed, number
        for line in file.lines():
            consumed, number = consumed + len(line), number + 1
            yield decoded(file, line, number)

    reader = csv.reader(fed(), delimiter=separator, strict=True)
    while True:
        start, first = consumed, number + 1
        try:
            with _cells_of_any_length():
                cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            raise _no_csv(file, first, exc) from None
        if cells:
            yield start, first, cells


def _no_csv(file: TextFile, line: int, exc: csv.Error) -> DataError:
    if "new-line" in str(exc):
        return DataError(
            f"{file.shown}, line {line}: a carriage return outside quotes, where some programs would end the row",
            tip="write the file with line ends of Unix or Windows, and with quotes around cells that hold a carriage return",
        )
    why = (
        "the quotes that begin here are never closed" if "end of data" in str(exc) else "letters follow a closing quote"
    )
    return DataError(
        f"{file.shown}, line {line}: {why}, so nobody can tell where the cell ends",
        tip='inside a quoted cell a quote is written twice (""); quotes=false takes quotes as letters like others',
    )


def _objects(file: TextFile) -> Iterator[Record]:
    start = 0
    for number, line in enumerate(file.lines(), start=1):
        text = decoded(file, line, number)
        if text.strip():
            yield start, number, _object(file, text, number)
        start += len(line)


def _object(file: TextFile, text: str, number: int) -> dict[str, Any]:
    tip = 'each line is one object: {"text": "...", "label": "..."}'
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        if number == 1 and text.lstrip()[:1] == "[":
            tip = "it begins as a list does; write one object a line: jq -c '.[]', or orient='records', lines=True in pandas"
        raise DataError(f"{file.shown}, line {number}: no JSON ({exc})", tip=tip) from None
    if not isinstance(found, dict):
        raise DataError(f"{file.shown}, line {number}: a JSON {type(found).__name__}, and no object", tip=tip)
    return found


def decoded(file: TextFile, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as exc:
        begins = file.read(0, min(8, file.size))
        for magic, what, tip in OTHERS:
            if begins.startswith(magic):
                raise DataError(f"{file.shown}: {what}, and not UTF-8 text", tip=tip) from None
        raise DataError(
            f"{file.shown}, line {number}: not UTF-8 ({exc.reason})", tip="convert the file to UTF-8"
        ) from None


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """csv refuses cells of more than 131,072 letters, unless the process says otherwise."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- which layout ----------------------------------------------------------------------------------------------------


def layout_of(file: TextFile, separator: str, quotes: bool | None) -> Layout:
    """How a file is written, by the ending of its name, and by its first rows where that does not say it.

    Args:
        separator: as the user gives it; "": by the first rows.
        quotes: whether cells may stand in quotes; None: in CSV they may, in tab-separated text not.

    Raises:
        DataError: two separators divide its first rows alike.
    """
    if separator:
        if separator != "tab" and (len(separator) != 1 or separator in '"\r\n'):
            raise ConfigError(f"{file.shown}: separator={separator}", tip="give one letter, or tab")
        return Layout("\t" if separator == "tab" else separator, quotes=quotes is not False)
    begins = file.read(0, min(LOOKED_AT, file.size)).decode("utf-8", errors="replace").removeprefix(BOM)
    ending = _ending(file.path)
    if ending in (".jsonl", ".ndjson", ".json") or (ending != ".csv" and begins.lstrip()[:1] == "{"):
        return JSON_LINES
    if ending in (".tsv", ".tab") or (ending != ".csv" and "\t" in begins.partition("\n")[0]):
        return Layout("\t", quotes=bool(quotes))
    fitting = [one for one in SEPARATORS if _divides(begins, one, whole=file.size <= LOOKED_AT)]
    if len(fitting) > 1:
        shown = " and ".join("a tab" if one == "\t" else repr(one) for one in fitting)
        raise DataError(
            f"{file.shown}: {shown} divide its first rows into equal numbers of columns",
            tip=f"say which one does: separator={fitting[0]}",
        )
    return Layout(fitting[0] if fitting else ",", quotes=quotes is not False)


def _divides(begins: str, separator: str, *, whole: bool) -> bool:
    """Whether a separator divides every row of a text into the same number of columns, more than one."""
    rows, reader = [], csv.reader(io.StringIO(begins, newline=""), delimiter=separator)
    with _cells_of_any_length():
        with suppress(csv.Error):
            rows = [row for row in islice(reader, 1000) if row]
    counts = {len(row) for row in (rows if whole or len(rows) < 2 else rows[:-1])}  # the last one may be cut off
    return len(counts) == 1 and counts.pop() > 1


def _ending(path: Path) -> str:
    """Of a name, without how it is packed."""
    return (path.with_suffix("") if path.suffix in PACKINGS else path).suffix.lower()


# --- all rows once ---------------------------------------------------------------------------------------------------


def find_rows(
    file: TextFile, layout: Layout, look: Callable[[int, Any], None], rows: Iterator[Record], count: int
) -> tuple[TextRows, np.ndarray]:
    """Where the rows lie, and the line in which each begins, (N,) int64; `look` sees every row once.

    Args:
        look: (line, cells), which refuses and collects.
        rows: of `records`, a header taken off.
        count: of columns; of JSON lines it says nothing.

    Raises:
        DataError: a row of another number of columns.
    """
    starts, lines = array("q"), array("q")
    for start, line, cells in rows:
        if len(cells) != count and not layout.is_json:
            raise _ragged(file, layout, line, cells, count)
        starts.append(start)
        lines.append(line)
        look(line, cells)
    starts.append(file.size)
    return TextRows(file, layout, np.frombuffer(starts, np.int64)), np.frombuffer(lines, np.int64)


def _ragged(file: TextFile, layout: Layout, line: int, cells: Any, count: int) -> DataError:
    tip = "each line needs the same number of tabs"
    if layout.quotes:
        tip = "a cell that holds the separator stands in double quotes; separator= names another one"
    elif any(cell.startswith('"') for cell in cells):
        tip += "; table:PATH?quotes=true where cells stand in quotes"
    return DataError(f"{file.shown}, line {line}: {len(cells)} columns, but line 1 has {count}", tip=tip)

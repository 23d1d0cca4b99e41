"""The source `images:PATH`: pictures of one folder, however deep, with labels from a table or without any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softcache.data.label_column import LabelColumn, read_labels
from softcache.data.sources import (
    IMAGE_EXTENSIONS,
    KEEPS_EMPTY,
    ImageFileReader,
    Source,
    StringTable,
    image_files,
    no_folder,
    utf8_keys,
)
from softcache.data.text_rows import LOOKED_AT, Layout, TextFile, records
from softcache.errors import DataError, first_offenders, note_once


def flat_images(path: Path, labels: str = "", classes: tuple[str, ...] = ()) -> Source:
    """Every picture below a folder; keys are paths relative to it. Hidden files and folders are passed over.

    Args:
        path: the folder.
        labels: a file with a line for each picture, its name and its label with a tab or a comma between them; a name is a key,
            with or without its ending. Pictures without a line have no label, and a line without a picture is none.
        classes: the class list, or how many classes there are, of which samples without labels belong to none. Empty: those of
            `labels`; without labels the classes of whoever asks about them: a teacher that names its own, a cache.
    """
    if not path.is_dir():
        raise DataError(f"{path}: {no_folder(path)}", tip="images:PATH wants a folder with pictures")
    table = utf8_keys(path, [file.relative_to(path).as_posix() for file in image_files(path)])
    if not len(table):
        raise DataError(
            f"{path}: holds no picture ({', '.join(IMAGE_EXTENSIONS)})", tip="name the folder that the pictures lie in"
        )
    _tell_others(path, labels)
    if len(classes) == 1 and classes[0].isdecimal():
        classes = tuple(map(str, range(int(classes[0]))))
    found = np.full(len(table), -1, np.int32)
    if labels:
        found, classes = _labelled(Path(labels).expanduser(), table, classes)
    return Source(ImageFileReader(os.path.abspath(path), table), table, found, classes)


def _tell_others(path: Path, labels: str) -> None:
    """Say once which files are no pictures by their names, which are left out."""
    others = [
        Path(place, name)
        for place, _, names in os.walk(path, followlinks=True)
        for name in names
        if not name.startswith(".") and name not in KEEPS_EMPTY and not name.lower().endswith(IMAGE_EXTENSIONS)
    ]
    others = [file for file in others if not labels or not os.path.exists(labels) or not file.samefile(labels)]
    if others:
        named = first_offenders(sorted(file.relative_to(path).as_posix() for file in others), len(others))
        note_once(f"{path}: files that are no pictures by their names are left out: {named}")


def _labelled(file: Path, keys: StringTable, classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int32 labels, -1 where the file has no line for a picture, and the class names."""
    known = {key: row for row, key in enumerate(keys)}
    stems: dict[str, list[int]] = {}
    for key, row in known.items():
        stems.setdefault(os.path.splitext(key)[0], []).append(row)
    rows: dict[int, tuple[str, int]] = {}  # label and line of each
    unknown = []
    for number, name, label in _lines(file):
        place = known.get(name)
        if place is None and len(stems.get(name, ())) == 1:
            place = stems[name][0]
        if place is None:
            unknown.append(name)
        elif place in rows:
            raise DataError(f"{file}, line {number}: {name} has a label already", tip="keep one line for each picture")
        else:
            rows[place] = label, number
    if not rows:
        raise DataError(
            f"{file}: names none of the {len(keys)} pictures; its first name is {unknown[0] if unknown else 'missing'!r}",
            tip=f"write a line for each picture, as in {keys[0]!r}, a tab or a comma, and its label",
        )
    if len(rows) < len(keys) or unknown:
        note_once(f"{file}: has labels of {len(rows)} of {len(keys)} pictures, and {len(unknown)} lines of others")
    order = sorted(rows)
    found_labels, lines = [rows[row][0] for row in order], [rows[row][1] for row in order]
    column = LabelColumn(str(file), found_labels, [keys[row] for row in order], lines, may_be_header=False)
    values, names = read_labels(column, classes, "")
    found = np.full(len(keys), -1, np.int32)
    found[order] = values
    return found, names


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number, name and label of each line; either may stand in quotes, as in CSV, and a name without them may hold commas."""
    file = TextFile(path)
    begins = file.read(0, min(LOOKED_AT, file.size)).partition(b"\n")[0]
    separator = "\t" if b"\t" in begins else ","
    for _, number, cells in records(file, Layout(separator, quotes=True)):
        assert isinstance(cells, list)
        *names, label = cells
        if not names and not label.strip():
            continue
        if not names:
            raise DataError(f"{path}, line {number}: {label[:60]!r} is no name and label", tip="put a tab between them")
        yield number, separator.join(names).strip().removeprefix("./"), label.strip()

"""Whose classes are these? How the columns of a teacher, cache, student and data set are matched; nothing else decides it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from softcache.data.imagenet import ids_of_words, ilsvrc_ids, wordnet_ids
from softcache.errors import ClassMismatchError, DataError, ModelError, first_offenders, nearest, note_once

_WORDNET_ID = re.compile(r"n[0-9]{8}")
_INDICES = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_MAP_TIP = "say which class is which: --classes-map FILE, a line for each: data's class, tab, model's class"


# ------------------------------------------------------------------------------------------------- names, and choices of them


def class_indices(class_names: Sequence[str], wanted: Sequence[int | str]) -> list[int]:
    """The classes that are named, as rising indices.

    Args:
        class_names: C names.
        wanted: names, indices, and ranges of indices such as 0-4; a name wins over an index.

    Raises:
        DataError: a class that is not there, or a range of which nobody can say whether it counts places or names.
    """
    return sorted({index for one in wanted for index in _indices_of(one, class_names)})


def _indices_of(wanted: int | str, class_names: Sequence[str]) -> Sequence[int]:
    if wanted in class_names:
        return [list(class_names).index(str(wanted))]
    ends = _INDICES.fullmatch(str(wanted))
    if ends:
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if ends[2] and all(_is_whole(name) for name in class_names):
            found: Sequence[int] = _numbers_between(first, last, class_names)
        else:
            found = range(first, last + 1) if last < len(class_names) else ()
        if found:
            return found
    raise DataError(f"no class {wanted!r} among {len(class_names)} classes", tip=nearest(str(wanted), class_names))


def _numbers_between(first: int, last: int, class_names: Sequence[str]) -> list[int]:
    """A range of classes that are called by numbers; DataError where the places that it may count are other classes."""
    named = [place for place, name in enumerate(class_names) if first <= int(name) <= last]
    places = list(range(first, last + 1)) if last < len(class_names) else named
    if named != places:
        meant = [", ".join(class_names[i] for i in these) or "none" for these in (places, named)]
        raise DataError(
            f"the range {first}-{last} may count places or numbers, and these classes are called by numbers: "
            f"at these places stand {meant[0]}, with these numbers {meant[1]}",
            tip="name each class, with commas between them",
        )
    return named


def _is_whole(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def are_numbers(class_names: Sequence[str]) -> bool:
    """Whether a list is just 0, 1, ..., C - 1: it was made by counting, and names nothing."""
    return list(class_names) == [str(number) for number in range(len(class_names))]


def told_apart(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names, of which the second of one name gets ` (2)`, and so on: ImageNet has two classes called crane."""
    counts: Counter[str] = Counter()
    names: list[str] = []
    for name in class_names:
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return tuple(names)


def dataset_classes(dataset: Any) -> tuple[str, ...] | None:
    """The class names that a data set declares; None where it declares none. Tuples of synonyms are told apart."""
    for name in ("class_names", "classes"):
        found = getattr(dataset, name, None)
        if isinstance(found, Sequence | np.ndarray) and not isinstance(found, str):
            if any(isinstance(one, tuple) for one in found):
                return told_apart([", ".join(one) if isinstance(one, tuple) else str(one) for one in found])
            return tuple(str(one) for one in found)
    return None


def folded(name: str) -> str:
    """A name without what differs by accident only: case, spaces, and how letters with accents are composed."""
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


def value_of(name: str) -> str:
    """A name that is a number or a truth value as whole number (`1.0` and `True` are `1`); any other as it is."""
    if name in ("True", "False"):
        return str(int(name == "True"))
    try:
        number = float(name)
    except ValueError:
        return name
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else name


# ------------------------------------------------------------------------------------------------------- a model and its data


@dataclass(frozen=True)
class Match:
    """Which of a model's outputs belongs to which class of the data.

    Attributes:
        columns: C numbers, the output for each class; None where they stand as the classes do. A range where classes are ids of
            tokens, of which the outputs have more.
        outputs: how many the model has; None where that is not known before it runs.
        how: for people: by what they were matched.
        declared: by a --classes-map.
    """

    columns: tuple[int, ...] | range | None
    outputs: int | None
    how: str
    declared: bool = False

    @property
    def permutation(self) -> list[int] | None:
        """The columns where they are all of the model's outputs in another order; None where they stand, or are a choice."""
        if (
            self.columns is None
            or isinstance(self.columns, range)
            or sorted(self.columns) != list(range(self.outputs or 0))
        ):
            return None
        return list(self.columns)

    @property
    def is_choice(self) -> bool:
        """Whether only some of the outputs are taken."""
        return self.columns is not None and self.permutation is None


def match_classes(
    what: str, own: Sequence[str] | None, class_names: Sequence[str], classes_map: Mapping[str, str] | None = None
) -> Match:
    """Find each class of the data among a model's.

    In this order: as a map declares it, by name, by value (numbers written in two ways), by name but for case and spaces,
    ImageNet's words by their WordNet ids, and by number where one of the two lists is just 0, 1, ..., C - 1.

    Args:
        what: whose classes, for messages.
        own: the model's classes, in the order of its outputs; None where it names none.
        class_names: the C classes of the data.
        classes_map: data's class -> model's class, or the number of its output; a class that has no line keeps its name.

    Raises:
        ModelError: a class of the data that the model does not know.
    """
    names = list(class_names)
    if classes_map and (
        own is None or any(target in own for target in classes_map.values()) or _all_numbers(classes_map)
    ):
        columns = _mapped(what, own, names, classes_map)
        outputs = None if own is None else len(own)
        return Match(columns if columns != tuple(range(outputs or -1)) else None, outputs, "by --classes-map", True)
    if own is None:
        return Match(None, len(names), "by position: it names no classes")
    own = told_apart(own)
    for how, key in _WAYS:
        found = _found([key(name) for name in own], [key(name) for name in names])
        if found is not None and (len(own) == len(names) or not are_numbers(own)):
            return _match(found, own, how)
    if (found := _found_by_wordnet_id(own, names)) is not None:
        return _match(found, own, "by WordNet id")
    if (found := _found_by_number(own, names)) is not None:
        return _match(found, own, "by number: one of the two lists only counts")
    raise _unknown(what, own, names)


_WAYS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("by name", str),
    ("by value", value_of),
    ("by name, but for case and spaces", folded),
)


def _match(columns: tuple[int, ...], own: Sequence[str], how: str) -> Match:
    return Match(None if columns == tuple(range(len(own))) else columns, len(own), how)


def _found(own: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """The place of each name; None where one is not there, or where two are one."""
    place = {name: i for i, name in enumerate(own)}
    if len(place) < len(own) or len(set(names)) < len(names) or not place.keys() >= set(names):
        return None
    return tuple(place[name] for name in names)


def _found_by_wordnet_id(own: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Where one list has WordNet ids, or both have words, and the other is ILSVRC's 1,000 classes."""

    def ids(these: Sequence[str]) -> tuple[str, ...] | None:
        return tuple(these) if all(_WORDNET_ID.fullmatch(name) for name in these) else wordnet_ids(these)

    own_ids, data_ids = ids(own), ids(names)
    if own_ids == ilsvrc_ids() and data_ids is None:
        data_ids = ids_of_words(names)
    return None if own_ids is None or data_ids is None else _found(own_ids, data_ids)


def _found_by_number(own: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Where one of two lists of one length counts 0, 1, ..., C - 1, and the other has names that are no numbers."""
    if len(own) != len(names):
        return None
    values = [value_of(name) for name in own]
    if are_numbers(sorted(values, key=lambda value: (len(value), value))) and not any(_is_whole(n) for n in names):
        return tuple(values.index(str(number)) for number in range(len(names)))
    if are_numbers(names) and not any(_is_whole(value) for value in values):
        return tuple(range(len(names)))
    return None


def _all_numbers(classes_map: Mapping[str, str]) -> bool:
    return all(_is_whole(target) for target in classes_map.values())


def _mapped(
    what: str, own: Sequence[str] | None, names: Sequence[str], classes_map: Mapping[str, str]
) -> tuple[int, ...]:
    if unknown := [name for name in classes_map if name not in names]:
        raise DataError(f"--classes-map: the data has no class {unknown[0]!r}", tip=nearest(unknown[0], names))
    columns = []
    for place, name in enumerate(names):
        wanted = classes_map.get(name, name)
        if own is not None and wanted in own:
            columns.append(list(own).index(wanted))
        elif name in classes_map and _is_whole(wanted) and (own is None or int(wanted) < len(own)):
            columns.append(int(wanted))
        elif own is None and name not in classes_map:
            raise ModelError(
                f"--classes-map has no line for class {name!r}, and {what} names no classes",
                tip=f"write its line: the class, a tab, the number of the output, for example {place}",
            )
        else:
            said = "--classes-map calls it so" if name in classes_map else "and it has no line in --classes-map"
            known = nearest(wanted, own) if own is not None else "it names no classes: write the numbers of its outputs"
            raise ModelError(f"{what} has no class {wanted!r}: {said}", tip=known)
    twice = next((names[i] for i, column in enumerate(columns) if column in columns[:i]), None)
    if twice is not None:
        raise ModelError(
            f"--classes-map gives class {twice!r} an output of {what} that another class has already",
            tip="one output for each class",
        )
    return tuple(columns)


def _unknown(what: str, own: Sequence[str], names: Sequence[str]) -> ModelError:
    """What to say where the lists cannot be matched."""
    missing = [name for name in names if name not in own]
    surplus = [name for name in own if name not in names]
    tip = f"use the model's own data set, or give the data set the model's class names; or {_MAP_TIP}"
    if are_numbers(names) and missing == ["0"]:
        tip = f"class 0 may be there only because labels count from 1: give the data set class_names; or {_MAP_TIP}"
    if len(own) > len(names) and missing:
        named = first_offenders(map(repr, missing), len(missing), limit=3)
        return ModelError(f"{what} knows {len(own):,} classes, and of the data's not {named}", tip=tip)
    few = first_offenders(map(repr, surplus or missing), min(3, len(surplus or missing)), limit=3)
    count = f"{len(own):,} classes where the data has {len(names):,}: " if len(own) != len(names) else ""
    if not surplus and not missing:
        return ModelError(f"{what}: {len(own)} outputs for {len(names)} classes, called by numbers alone", tip=tip)
    return ModelError(f"{what} knows other classes than the data has, {count}for example {few}", tip=tip)


def read_classes_map(path: str | Path | None) -> dict[str, str]:
    """The lines of a --classes-map, `data's class<TAB>model's class`; empty for None.

    Raises:
        DataError: a file that cannot be read, a line of another form, or a class that stands in two lines.
    """
    if path is None:
        return {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: cannot be read as a map of classes: {exc}", tip="--classes-map wants UTF-8") from exc
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        data, tab, model = line.partition("\t")
        if not (data and tab and model) or "\t" in model:
            raise DataError(f"{path}, line {number}: is not one class, a tab, another class", tip=_MAP_TIP)
        if data in found:
            raise DataError(f"{path}, line {number}: class {data!r} stands there twice", tip="keep one of the lines")
        found[data] = model
    if not found:
        raise DataError(f"{path}: holds no line", tip=_MAP_TIP)
    return found


# -------------------------------------------------------------------------------------------------------- two lists of one data


def check_classes(
    dataset: Any, class_names: Sequence[str], owner: str = "the cache", classes_map: Mapping[str, str] | None = None
) -> None:
    """Raise ClassMismatchError unless the data set, and every part of it, has its owner's classes in the same order.

    Where one of two lists of one length only counts 0, 1, ..., C - 1 they are matched by number, which is said once.

    Args:
        classes_map: data's class -> owner's class, for those that are called otherwise.
    """
    if _check_part(dataset, class_names, owner, classes_map or {}):
        note_once(f"classes are matched by number: one of data set and {owner} only counts 0 to {len(class_names) - 1}")


def _check_part(dataset: Any, class_names: Sequence[str], owner: str, classes_map: Mapping[str, str]) -> bool:
    """Whether they had to be matched by number."""
    if isinstance(dataset, Subset):
        return _check_part(dataset.dataset, class_names, owner, classes_map)
    if isinstance(dataset, ConcatDataset):
        by_number = [_check_part(part, class_names, owner, classes_map) for part in dataset.datasets]  # each of them
        return any(by_number)
    found = dataset_classes(dataset)
    count = getattr(dataset, "num_classes", None) if found is None else len(found)
    if isinstance(count, int) and count != len(class_names):
        raise ClassMismatchError(
            f"the data set has {count} classes, {owner} {len(class_names)}",
            tip="use data with one class list; --keep-labels chooses samples and leaves the class list whole",
        )
    if found is None:
        return False
    called = tuple(classes_map.get(name, name) for name in found)
    if called == tuple(class_names):
        return False
    if are_numbers(called) != are_numbers(class_names) and _found_by_number(class_names, called) is not None:
        return True
    where = next(i for i, (one, other) in enumerate(zip(called, class_names, strict=True)) if one != other)
    same = sorted(called) == sorted(class_names)
    raise ClassMismatchError(
        f"the data set's class {where} is {called[where]!r}, {owner}'s is {class_names[where]!r}: "
        + ("the same classes in another order" if same else "another class list"),
        tip="the logits of one class would teach another; use one class list, in one order"
        + ("" if same else f"; or {_MAP_TIP}"),
    )


def places_in(found: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """Where the classes of data that lacks some stand in a whole list; None where it has others, all, or another order."""
    if len(found) >= len(class_names) or not set(found) <= set(class_names):
        return None
    places = [list(class_names).index(name) for name in found]
    return places if places == sorted(places) else None

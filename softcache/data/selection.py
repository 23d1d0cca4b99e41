"""Which samples: by class, or by a list of keys. The same words choose from a transfer set and from a cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softcache.errors import DataError, ModelError, nearest

_WORDNET_ID = re.compile(r"n[0-9]{8}")
_INDICES = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def of_classes(labels: np.ndarray, class_names: Sequence[str], wanted: Sequence[int | str]) -> np.ndarray:
    """(N,) bool: the samples that have one of these classes.

    Args:
        labels: (N,) class indices, -1 = none; or (N, C) bool.
        class_names: C names.
        wanted: classes by name, index, or a range of indices such as 0-4; a name wins over an index.

    Raises:
        DataError: a class that is not there.
    """
    classes = class_indices(class_names, wanted)
    if labels.ndim == 2:
        return np.asarray(labels[:, classes].any(axis=1))
    return np.isin(labels, classes)


def class_indices(class_names: Sequence[str], wanted: Sequence[int | str]) -> list[int]:
    """The classes that are named, as rising indices; DataError for one that is not there."""
    return sorted({index for one in wanted for index in _indices_of(one, class_names)})


def class_order(what: str, declared: Sequence[str] | None, class_names: Sequence[str]) -> list[int] | None:
    """The permutation that brings a model's classes into the data's order; None when nothing is to be done.

    Data whose classes are called by WordNet ids, in their order, has ImageNet's classes as every model of them counts them.

    Args:
        what: whose classes, for messages.
        declared: the model's classes, as many as the data's; None where it names none.

    Raises:
        ModelError: the names are not the data's.
    """
    if declared is None or list(declared) == list(class_names) or _are_wordnet_ids(class_names):
        return None
    if sorted(declared) != sorted(class_names):
        unknown = sorted(set(declared) - set(class_names))[:3] or sorted(set(class_names) - set(declared))[:3]
        raise ModelError(
            f"{what} knows other classes than the data has, for example {', '.join(map(repr, unknown))}",
            tip="use the model's own data set, or give the data set the model's class names",
        )
    place = {class_name: i for i, class_name in enumerate(declared)}
    return [place[class_name] for class_name in class_names]


def _are_wordnet_ids(class_names: Sequence[str]) -> bool:
    return list(class_names) == sorted(class_names) and all(_WORDNET_ID.fullmatch(name) for name in class_names)


def _indices_of(wanted: int | str, class_names: Sequence[str]) -> Sequence[int]:
    if wanted in class_names:
        return [list(class_names).index(str(wanted))]
    ends = _INDICES.fullmatch(str(wanted))
    if ends and int(ends[1]) <= int(ends[2] or ends[1]) < len(class_names):
        return range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    raise DataError(f"no class {wanted!r} among {len(class_names)} classes", tip=nearest(str(wanted), class_names))


def read_keys(path: Path) -> list[str]:
    """The different lines of a file that are not empty, in its order; DataError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: cannot be read as a list of keys: {exc}", tip="--samples wants UTF-8 text") from exc
    wanted = dict.fromkeys(lines)
    wanted.pop("", None)
    return list(wanted)

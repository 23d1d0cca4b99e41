"""Whose classes are these? How the columns of a teacher, cache, student and data set are matched; nothing else decides it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from softcache.errors import ClassMismatchError, DataError, ModelError, nearest

_WORDNET_ID = re.compile(r"n[0-9]{8}")
_INDICES = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


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


def dataset_classes(dataset: Any) -> tuple[str, ...] | None:
    """The class names that a data set declares; None where it declares none."""
    for name in ("class_names", "classes"):
        found = getattr(dataset, name, None)
        if isinstance(found, Sequence | np.ndarray) and not isinstance(found, str):
            return tuple(", ".join(one) if isinstance(one, tuple) else str(one) for one in found)  # tuple: synonyms
    return None


def check_classes(dataset: Any, class_names: Sequence[str], owner: str = "the cache") -> None:
    """Raise ClassMismatchError unless the data set, and every part of it, has its owner's classes in the same order."""
    if isinstance(dataset, Subset):
        return check_classes(dataset.dataset, class_names, owner)
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            check_classes(part, class_names, owner)
        return None
    found = dataset_classes(dataset)
    count = getattr(dataset, "num_classes", None) if found is None else len(found)
    if isinstance(count, int) and count != len(class_names):
        raise ClassMismatchError(
            f"the data set has {count} classes, {owner} {len(class_names)}",
            tip="use data with one class list; --keep-labels chooses samples and leaves the class list whole",
        )
    if found is None or found == tuple(class_names):
        return None
    where = next(i for i, (one, other) in enumerate(zip(found, class_names, strict=True)) if one != other)
    same = sorted(found) == sorted(class_names)
    raise ClassMismatchError(
        f"the data set's class {where} is {found[where]!r}, {owner}'s is {class_names[where]!r}: "
        + ("the same classes in another order" if same else "another class list"),
        tip="the logits of one class would teach another; use one class list, in one order",
    )


def check_same_classes(one: Any, other: Any) -> None:
    """Raise ClassMismatchError unless both transfer sets have the same classes in the same order."""
    check_classes(one, other.class_names, owner=other.name)

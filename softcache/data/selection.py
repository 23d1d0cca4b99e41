"""Which samples: by class, or by a list of keys. The same words choose from a transfer set and from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softcache.data.classes import class_indices
from softcache.data.label_kind import has_several, is_yes
from softcache.errors import DataError


def of_classes(labels: np.ndarray, class_names: Sequence[str], wanted: Sequence[int | str]) -> np.ndarray:
    """(N,) bool: the samples that have one of these classes.

    Args:
        labels: (N,) class indices, -1 = none; or (N, C) bool, or numbers with -1 = unknown.
        class_names: C names.
        wanted: classes by name, index, or a range of indices such as 0-4; a name wins over an index.

    Raises:
        DataError: a class that is not there.
    """
    classes = class_indices(class_names, wanted)
    if has_several(labels):
        return np.asarray(is_yes(labels[:, classes]).any(axis=1))
    return np.isin(labels, classes)


def read_keys(path: Path) -> list[str]:
    """The different lines of a file that are not empty, in its order; DataError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        tip = "--samples and --without want UTF-8 text, a key on each line"
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise DataError(f"{path}: cannot be read as a list of keys: {why}", tip=tip) from exc
    wanted = dict.fromkeys(lines)
    wanted.pop("", None)
    return list(wanted)

"""The scale of a model's items: what is not uint8 counts as scaled to [0, 1], and is looked at first of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from softcache.errors import DataError, warn
from softcache.models.inputs import ImageInput, Input, VectorInput, array_of
from softcache.models.model import Model
from softcache.models.weights import (
    METADATA_KEY,
    path_alone,
    path_and_choice,
    read_metadata,
    split_weights,
    weights_file,
)
from softcache.spec import parse_spec

ITEMS_KEY = "softcache_items"  # of a student's metadata: one of the three
UINT8, SCALED, OTHERWISE = "uint8", "scaled", "not scaled"
OVERSHOOT = 0.25  # a cubic kernel that resizes a picture leaves [0, 1] by less
LARGEST_DEVIATION = 0.5  # of numbers in [0, 1]


def scale_of(taken: Input, items: Sequence[Any]) -> str | None:
    """Which of UINT8, SCALED (to [0, 1]) and OTHERWISE the items are; None where the model does not scale any."""
    if not isinstance(taken, ImageInput | VectorInput):
        return None
    if all(array_of(item).dtype == np.uint8 for item in items):
        return UINT8
    low, high = _range(items)
    return SCALED if low >= -OVERSHOOT and high <= 1 + OVERSHOOT else OTHERWISE


def check_scale(
    model: Model, text: str, items: Sequence[Any], *, learns: bool = False, lenient: bool = False
) -> str | None:
    """Refuse items in another scale than the model normalises; what is only told, on stderr too, comes back.

    A normalisation whose mean or deviation no numbers in [0, 1] have, as mean=0&std=1, is of the items as they are: then
    there is nothing to compare. A network of vectors that learns from its first step on may get them in any scale.

    Args:
        text: what the user named the model with.
        items: some rendered samples.
        learns: it is a student.
        lenient: tell, and do not refuse.

    Raises:
        DataError: with the cure.
    """
    taken, found = model.input, scale_of(model.input, items)
    if found is None or not isinstance(taken, ImageInput | VectorInput):
        return None
    has_weights, is_saved, learned = _weights_of(text)
    if learned is not None:
        if not _differ(taken, learned, found):
            return None
        return _told(
            f"{text}: learned from items that were {_SAID[learned]}; these have {_range_text(items)}",
            "give it the items as it was trained on them: the same transform, the same number type",
            lenient=lenient,
        )
    if found != OTHERWISE or not _is_of_scaled(taken):
        return None
    if isinstance(taken, VectorInput) and (is_saved or (learns and not has_weights)):
        return None
    if is_saved:  # by a version that did not look: it may be right
        cure = "which is right if it was trained on such items; else leave Normalize out of the data's transform"
    else:
        cure = "leave Normalize out of the data's transform, or give uint8; or take the items as they are: "
        cure += _as_it_is(text)
    mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in (taken.mean, taken.std))
    return _told(
        f"{text}: takes numbers that are not uint8 as scaled to [0, 1], and normalises them (mean {mean}; std {std}); "
        f"the items have {_range_text(items)}, as if they were normalised already, or not scaled",
        cure,
        lenient=lenient or is_saved,
    )


def check_same_scale(taken: Input, learned: Sequence[Any], evaluated: Sequence[Any]) -> None:
    """Raise DataError where a model would be evaluated on numbers of another scale than it learns from."""
    scales = [scale_of(taken, items) for items in (learned, evaluated)]
    if None not in scales and _differ(taken, *scales):  # type: ignore[arg-type]
        raise DataError(
            f"the evaluation data has {_range_text(evaluated)}, the training data {_range_text(learned)}: the student would "
            "be measured on other inputs than it learned from",
            tip="give both the same transform: ToTensor and Normalize in both, or in neither",
        )


_SAID = {UINT8: "uint8", SCALED: "scaled to [0, 1]", OTHERWISE: "not scaled to [0, 1]"}


def _differ(taken: Input, learned: str, found: str) -> bool:
    """Whether items of two scales cannot be of one kind; of vectors only uint8 tells, since features have any range."""
    if learned == found or OTHERWISE not in (learned, found):
        return False
    return UINT8 in (learned, found) or not isinstance(taken, VectorInput)


def _told(message: str, tip: str, *, lenient: bool) -> str:
    if not lenient:
        raise DataError(message, tip=tip)
    warn(f"{message}; {tip}")
    return message


def _range_text(items: Sequence[Any]) -> str:
    low, high = _range(items)
    return f"numbers from {low:.3g} to {high:.3g}" if low < high else "uint8 numbers"


def _range(items: Sequence[Any]) -> tuple[float, float]:
    """The smallest and the largest number of what is not uint8; (0, 0) without any."""
    arrays = [array for array in map(array_of, items) if array.dtype != np.uint8 and array.size]
    low = [np.fmin.reduce(array, axis=None) for array in arrays]
    high = [np.fmax.reduce(array, axis=None) for array in arrays]
    found = float(np.fmin.reduce(low, initial=np.inf)), float(np.fmax.reduce(high, initial=-np.inf))
    return found if found[0] <= found[1] else (0.0, 0.0)


def _is_of_scaled(taken: ImageInput | VectorInput) -> bool:
    """Whether numbers in [0, 1] can have this mean and this deviation."""
    return all(0 <= mean <= 1 for mean in taken.mean) and max(taken.std) <= LARGEST_DEVIATION


def _weights_of(text: str) -> tuple[bool, bool, str | None]:
    """Whether a model's text names weights, whether they are a saved student, and what it learned from (None: not told)."""
    path = path_alone(text) or split_weights(text)[1]
    if not path:
        spec = parse_spec(text)
        return "weights" in spec.parameters, False, None
    if not os.path.exists(path_and_choice(path)[0]):  # the name of published weights
        return True, False, None
    file = weights_file(path)
    known = read_metadata(file) if file.suffix == ".safetensors" else {}
    return True, METADATA_KEY in known, known.get(ITEMS_KEY)


def _as_it_is(text: str) -> str:
    """The model's text with a normalisation that changes nothing."""
    head, weights = split_weights(text)
    if parse_spec(head).is_factory:
        return "an input of the factory's own with mean 0 and std 1"
    return parse_spec(head).having(mean="0", std="1").text + (f"@{weights}" if weights else "")

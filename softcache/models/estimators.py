"""Teachers that are no torch modules: scikit-learn's estimators, each in its natural form of output, and plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.errors import ModelError, TeacherError
from softcache.models.inputs import has_vocabulary

METHODS = {"predict_proba": "probs", "decision_function": "logits", "predict_log_proba": "log_probs"}


@dataclass(frozen=True)
class ArrayCollate:
    """Items of a scikit-learn style teacher: texts and words as a list, else (B, features) float32, every item flattened."""

    def __call__(self, items: Sequence[Any]) -> Any:
        if items and has_vocabulary(items[0]):
            return list(items)
        return np.stack([np.asarray(item, dtype=np.float32).ravel() for item in items])


@dataclass(frozen=True)
class Callee:
    """What is called in a teacher's place.

    Attributes:
        run: a collated batch -> one row per sample, one column per class.
        collate: items -> batch.
        output: what the columns are: "logits", "log_probs" or "probs".
        classes: their names, in order; None where it names none.
        decide: a collated batch -> (B,) the column that its own `predict` decides for; None where it has none, or where what
            it says is no column.
    """

    run: Callable[[Any], Any]
    collate: Callable[[Sequence[Any]], Any]
    output: str
    classes: tuple[str, ...] | None
    decide: Callable[[Any], np.ndarray | None] | None


def callee_of(made: Any, text: str, *, output: str | None, multi_label: bool) -> Callee:
    """How to call what a factory returned: an estimator, one of an estimator's methods, or any other function.

    Args:
        text: the spec, for messages.
        output: what the spec says that it gives.

    Raises:
        ModelError: it neither is callable nor has one of an estimator's methods.
    """
    owner = made.__self__ if inspect.ismethod(made) else made
    method, wanted = getattr(made, "__name__", None), output or getattr(made, "output", None)
    if inspect.ismethod(made) and method == "predict" and any(hasattr(owner, name) for name in METHODS):
        raise ModelError(
            f"{text!r} returned the `predict` of {type(owner).__name__}: classes, and no number for each of them",
            tip="return the fitted classifier itself",
        )
    values = _class_values(owner)
    named = getattr(made, "class_names", None)
    known = values if named is None else list(named)
    classes = None if known is None else tuple(map(class_name, known))
    run, kind = _run_of(made, text, wanted)
    if run is not made or (inspect.ismethod(made) and method in METHODS):
        run = _Form(run, kind, owner, len(classes) if classes else None, multi_label)
    collate = getattr(made, "collate", None) or getattr(owner, "collate", None) or ArrayCollate()
    decide = None if multi_label else _decision_of(owner, known if values is None else values)
    return Callee(run, collate, kind, classes, decide)


def class_name(value: Any) -> str:
    """What a class is called that an estimator knows by a value."""
    return str(value.item() if isinstance(value, np.generic) else value)


def _class_values(owner: Any) -> list[Any] | None:
    """`classes_`, as a list; None where there are none, or one list for each of several outputs."""
    found = getattr(owner, "classes_", None)
    if found is None or _is_multi_output(owner):
        return None
    return list(np.asarray(found[0] if isinstance(found, list) and np.ndim(found[0]) else found).ravel())


def _is_multi_output(owner: Any) -> bool:
    found = getattr(owner, "classes_", None)
    return isinstance(found, list) and len(found) > 1 and all(np.ndim(one) == 1 for one in found)


def _run_of(made: Any, text: str, wanted: str | None) -> tuple[Callable[[Any], Any], str]:
    """What is called, and what it gives."""
    if callable(made):
        return made, wanted or METHODS.get(getattr(made, "__name__", "") if inspect.ismethod(made) else "", "logits")
    there = {kind: method for method, kind in METHODS.items() if hasattr(made, method)}
    if (wanted is None and there) or wanted in there:
        kind = wanted or next(iter(there))
        return getattr(made, there[kind]), kind
    if there:  # what is said of it is looked at with its first batch
        return getattr(made, next(iter(there.values()))), str(wanted)
    raise ModelError(
        f"{text!r} returned {type(made).__name__}, which neither is callable nor has predict_proba or decision_function",
        tip="return a torch module, a fitted classifier, or a function from a batch to (batch, classes)",
    )


@dataclass(frozen=True)
class _Form:
    """An estimator's method, with what it gives brought into rows of one column per class."""

    method: Callable[[Any], Any]
    kind: str
    owner: Any
    count: int | None
    multi_label: bool

    def __call__(self, batch: Any) -> Any:
        given = self.method(batch)
        if isinstance(given, list | tuple):
            return self._of_several(given)
        values = np.asarray(given)
        if values.ndim == 2 and values.shape[1] == 1 and self.count == 2:
            values = values[:, 0]
        if values.ndim == 1 and self.count == 2 and not self.multi_label:
            return _two_columns(values, self.kind)
        if self.kind == "logits" and self.count and _is_one_vs_one(self.owner, values.shape, self.count):
            return _from_pairs(values, self.count)
        return values

    def _of_several(self, given: Sequence[Any]) -> np.ndarray:
        """One array for each of several outputs: of each the column of its class 1."""
        if len(given) == 1 and not self.multi_label:
            return np.asarray(given[0])
        if not self.multi_label:
            raise TeacherError(
                f"{type(self.owner).__name__} gives {len(given)} answers to each sample, and the data has one label for each",
                tip="use a classifier that was fitted on one label per sample",
            )
        known = getattr(self.owner, "classes_", None) or [np.arange(np.shape(one)[1]) for one in given]
        columns = []
        for values, classes in zip(given, known, strict=True):
            place = [i for i, value in enumerate(classes) if class_name(value) in ("1", "1.0", "True")]
            yes = np.asarray(values)[:, place[0]] if place else np.zeros(len(values))
            columns.append(yes if place or self.kind == "probs" else np.full(len(values), -np.inf))
        return np.stack(columns, axis=1)


def _two_columns(values: np.ndarray, kind: str) -> np.ndarray:
    """(B, 2) of the one number that tells of the second of two classes."""
    if kind == "probs":
        return np.stack([1 - values, values], axis=1)
    if kind == "log_probs":
        return np.stack([np.log1p(-np.exp(values)), values], axis=1)
    return np.stack([-values / 2, values / 2], axis=1)  # softmax sees the difference alone


def _is_one_vs_one(owner: Any, shape: Sequence[int], count: int) -> bool:
    """Whether there is a column for each pair of classes; of three classes these are three as well."""
    while (inner := getattr(owner, "best_estimator_", None) or _last_step(owner)) is not None:
        owner = inner
    pairs = count * (count - 1) // 2
    said = getattr(owner, "decision_function_shape", None) == "ovo" and type(owner).__name__ in ("SVC", "NuSVC")
    return count > 2 and tuple(shape[1:]) == (pairs,) and (said or pairs != count)


def _last_step(owner: Any) -> Any:
    steps = getattr(owner, "steps", None)
    return steps[-1][1] if isinstance(steps, list) and steps else None


def _from_pairs(values: np.ndarray, count: int) -> np.ndarray:
    """(B, count) of (B, pairs) of decisions between two classes, > 0 for the first: votes, and confidences between votes.

    As scikit-learn joins them for `decision_function_shape="ovr"`.
    """
    votes, confidence = np.zeros((2, len(values), count))
    column = 0
    for first in range(count):
        for second in range(first + 1, count):
            of_first = values[:, column] > 0
            votes[:, first] += of_first
            votes[:, second] += ~of_first
            confidence[:, first] += values[:, column]
            confidence[:, second] -= values[:, column]
            column += 1
    return np.asarray(votes + confidence / (3 * (np.abs(confidence) + 1)))


def _decision_of(owner: Any, known: Sequence[Any] | None) -> Callable[[Any], np.ndarray | None] | None:
    predict = getattr(owner, "predict", None)
    if not callable(predict) or isinstance(owner, type):
        return None

    def decide(batch: Any) -> np.ndarray | None:
        found = np.asarray(predict(batch))
        if found.ndim == 2 and found.shape[1] == 1:
            found = found[:, 0]
        if found.ndim != 1:
            return None
        place = {class_name(value): i for i, value in enumerate(known or ())}
        columns = [place.get(class_name(value), -1) for value in found]
        if -1 in columns and found.dtype.kind in "iu" and getattr(owner, "classes_", None) is None:
            return found.astype(np.int64)  # an object of its own making, which counts its columns
        return None if -1 in columns else np.array(columns, np.int64)

    return decide

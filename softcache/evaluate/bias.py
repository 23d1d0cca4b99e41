"""What is added to the logits of some classes after training, where the transfer set had fewer samples of them than life has.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from softcache.data.classes import class_indices
from softcache.data.label_kind import has_several, is_known, is_yes
from softcache.errors import ConfigError
from softcache.spec import unquoted


def parse_bias(texts: Sequence[str], class_names: Sequence[str]) -> dict[str, float]:
    """`3=3.5` -> {class: number}; ConfigError for what is no number, DataError for a class that is not there."""
    bias: dict[str, float] = {}
    for text in texts:
        label, equals, value = text.rpartition("=")
        try:
            number = float(value) if equals else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"--bias {text!r} is not CLASS=NUMBER", tip="write --bias 3=3.5, or 7=-7.6,8=-7.6")
        for name in (class_names[i] for i in class_indices(class_names, [unquoted(label, text)])):
            if name in bias:
                raise ConfigError(f"--bias names class {name!r} twice", tip="add the two numbers up")
            bias[name] = number
    return bias


def best_shift(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """The number to add to the logits of some classes that makes fewest errors: the middle of the widest best interval.

    Args:
        logits: (N, C).
        labels: (N,) class indices; those below 0 do not count. Or (N, C) of several labels, those below 0 likewise.
        classes: indices; not all of them, where a sample has one class.

    Raises:
        ConfigError: all classes, which changes nothing; or no labelled sample would be told otherwise by any number.
    """
    turning, gain = (_of_labels if has_several(labels) else _of_classes)(logits.double(), labels, classes)
    if not bool((gain != 0).any()):
        raise ConfigError("no shift of these classes changes how many samples are right", tip="choose other classes")
    order = turning.argsort()
    places, right = turning[order], gain[order].cumsum(dim=0)
    distinct = torch.cat([places[1:] > places[:-1], torch.ones(1, dtype=torch.bool)])  # after the last of equal places
    places, right = places[distinct], right[distinct]
    inner = right[:-1]  # between a place and the next
    within = int(inner.max()) if len(inner) else -len(right)
    if max(0, int(right[-1])) > within:  # beyond all places, where there is no middle
        return float(places[-1] + 1.0 if right[-1] > 0 else places[0] - 1.0)
    width = torch.where(inner == inner.max(), places[1:] - places[:-1], -1.0)
    at = int(width.argmax())
    return float((places[at] + places[at + 1]) / 2)


def _of_classes(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of each labelled sample: above which shift it is told to be of the chosen classes, and what that gains (-1, 0, 1)."""
    if len(set(classes)) == logits.shape[1]:
        raise ConfigError("the same number for all classes changes nothing", tip="leave some of them out of --fit-bias")
    chosen = torch.zeros(logits.shape[1], dtype=torch.bool)
    chosen[list(classes)] = True
    known = is_known(labels)
    logits, labels = logits[known], labels[known]
    inside, best_inside = logits.masked_fill(~chosen, -math.inf).max(dim=1)
    outside, best_outside = logits.masked_fill(chosen, -math.inf).max(dim=1)
    return outside - inside, (best_inside == labels).long() - (best_outside == labels).long()


def _of_labels(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of each known yes or no of the chosen labels: above which shift yes is told, and what that gains (-1 or 1)."""
    logits, labels = logits[:, list(classes)], labels[:, list(classes)]
    known = is_known(labels)
    return -logits[known], 2 * is_yes(labels)[known].long() - 1

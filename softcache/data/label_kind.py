"""The two kinds of labels, and what logits say under each. Whoever counts, compares or combines asks here.

    one class per sample    labels (N,) whole numbers, -1 = none          softmax over the classes
    several labels          labels (N, C), a yes or no for each label     a sigmoid for each label

Of several labels some may be unknown: then the rows are int8 of 1, 0 and -1, else bool.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import DataError

Labels = TypeVar("Labels", np.ndarray, Tensor)


def has_several(labels: np.ndarray | Tensor) -> bool:
    """Whether these labels are of the second kind."""
    return labels.ndim == 2


def is_known(labels: Labels) -> Labels:
    """Bool of the labels' shape: where there is a label, or an answer to a yes-or-no question."""
    return labels >= 0


def is_yes(labels: Labels) -> Labels:
    """(N, C) bool of several labels: yes; what is unknown is no yes."""
    return labels > 0


def yes_or_no(array: np.ndarray, name: str) -> np.ndarray:
    """(N, C) labels of (N, C) numbers: 1 is yes, 0 is no, NaN or -1 is not known: bool, or int8 with -1 where some are not.

    Args:
        name: of the data, for the message.

    Raises:
        DataError: 1 and -1 without a 0, of which -1 may be no.
    """
    minus, yes = array == -1, array == 1
    if minus.any() and yes.any() and not (array == 0).any():
        raise DataError(
            f"{name}: its labels are 1 and -1 and never 0, so that -1 may be no, or what is not known",
            tip="write 0 for no, and NaN for what is not known; 1 is yes, 0 is no, NaN or -1 what is not known",
        )
    unknown = minus | (np.isnan(array) if array.dtype.kind == "f" else False)
    return np.where(unknown, np.int8(-1), yes.astype(np.int8)) if unknown.any() else yes


def link_of(*, multi_label: bool) -> str:
    """How logits become probabilities: "softmax", or "sigmoid" for several labels per sample."""
    return "sigmoid" if multi_label else "softmax"


def answers(logits: Tensor, *, multi_label: bool) -> Tensor:
    """What (B, C) logits say: (B,) the largest class, of equals the smallest index; or (B, C) bool, yes where above 0."""
    return logits > 0 if multi_label else logits.argmax(dim=1)


def log_soft_target(logits: Tensor, temperature: float, *, multi_label: bool) -> Tensor:
    """(B, C) logarithms of the soft target at a temperature, in nats; of several labels that of yes."""
    tempered = logits / temperature
    return F.logsigmoid(tempered) if multi_label else F.log_softmax(tempered, dim=1)

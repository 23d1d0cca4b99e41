"""The losses, on one screen. Adding one: a function in logits.py, a line in LOSSES, a row in the test table."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softcache.errors import LossError, nearest
from softcache.losses.logits import bce, ce, kd, kd_lower_bound, mixed_ce, mse_logits, soft_ce

__all__ = [
    "LOSSES",
    "Loss",
    "LossTerm",
    "bce",
    "ce",
    "kd",
    "kd_lower_bound",
    "make_term",
    "mixed_ce",
    "mse_logits",
    "soft_ce",
]


@dataclass(frozen=True)
class Loss:
    """One loss and what it needs, so that a misfit is refused before the first step.

    Attributes:
        function: (student_logits, teacher_logits or labels, **parameters) -> scalar; with form "head" (student_logits,
            head_ids, head_logits, tail_logsumexp, **parameters). Parameters are the arguments that have a default.
        target: "teacher" (logits from the cache) or "labels".
        needs_level: the teacher's absolute level matters (softmax does not cancel it).
        link: how an ensemble's members become probabilities for it: "softmax" or "sigmoid".
        form: what it takes of the teacher: whole rows of "logits", or the "head" that a top-k cache keeps.
        mixed: of a loss on labels, the same for views mixed with a partner: (student_logits, labels, partner_labels, shares)
            -> scalar; None where it is defined by one label alone.
    """

    function: Callable[..., Tensor]
    target: str
    needs_level: bool = False
    link: str = "softmax"
    form: str = "logits"
    mixed: Callable[..., Tensor] | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameter -> default value, from the function's own signature."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


LOSSES: dict[str, Loss] = {
    "kd": Loss(kd, "teacher"),
    "soft_ce": Loss(soft_ce, "teacher"),
    "mse_logits": Loss(mse_logits, "teacher", needs_level=True),
    "bce": Loss(bce, "teacher", needs_level=True, link="sigmoid"),
    "kd_lower_bound": Loss(kd_lower_bound, "teacher", form="head"),
    "ce": Loss(ce, "labels", mixed=mixed_ce),
}


@dataclass(frozen=True)
class LossTerm:
    """A loss with its weight and its parameters, as the configuration names it."""

    name: str
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]

    @property
    def temperature(self) -> float:
        return float(self.parameters.get("temperature", 1.0))

    def __call__(self, student_logits: Tensor, *target: Tensor) -> Tensor:
        """The unweighted value of the term; `target` is what the loss's form takes."""
        return self.loss.function(student_logits, *target, **self.parameters)


def make_term(name: str, *, weight: Any = 1.0, **parameters: Any) -> LossTerm:
    """A checked term: strings become numbers, defaults are filled in.

    Raises:
        LossError: unknown loss or parameter, or a value that is not a finite number.
    """
    if name not in LOSSES:
        raise LossError(f"unknown loss {name!r}", tip=nearest(name, LOSSES))
    defaults = LOSSES[name].defaults
    for key in parameters:
        if key not in defaults:
            raise LossError(f"loss {name!r} has no parameter {key!r}", tip=nearest(key, ["weight", *defaults]))
    values = {key: _number(name, key, parameters.get(key, default)) for key, default in defaults.items()}
    if values.get("temperature", 1.0) <= 0:
        raise LossError(f"loss {name!r}: temperature must be > 0, got {values['temperature']}")
    return LossTerm(name, _number(name, "weight", weight), values)


def _number(name: str, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise LossError(f"loss {name!r}: {key}={value!r} is not a finite number")
    return number

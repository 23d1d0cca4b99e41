"""A scalar over training: a number, or a schedule of it by epochs or steps.

`0.9`, `linear(8, 2)`, `cosine(1, 0, until=5)`, `cubic(0, 0.8)`, `step(1, at=150/180/210, gamma=0.1)`,
`piecewise(0:4, 10:1)`, `warmup(5, cosine)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from softcache.errors import ConfigError, nearest
from softcache.spec import split_outside

STEPS = "steps"
HELD = -1  # the step of a moment that stands for its whole epoch


@dataclass(frozen=True)
class Moment:
    """Where in its stage a run is, before an optimiser step.

    Attributes:
        epoch: counted from 0.
        step: within the epoch, counted from 0.
        steps: of one epoch.
        epochs: of the stage.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 1
    epochs: int = 1


@dataclass(frozen=True)
class Place:
    """A point of a stage, in epochs or in steps."""

    value: float
    in_steps: bool = False

    @classmethod
    def parse(cls, text: str, where: str) -> Place:
        """`5`, `7.5` epochs or `300steps`."""
        in_steps = text.endswith(STEPS)
        tip = "a place is a number of epochs, 15 or 7.5, or of steps, 500steps"
        return cls(_number(text.removesuffix(STEPS), where, lowest=0.0, tip=tip), in_steps)

    def epochs(self, steps: int) -> float:
        return self.value / steps if self.in_steps else self.value


class Curve(Protocol):
    """The shape of a schedule. Positions are in epochs; a curve begins at `begin`, the end of a warm-up around it, or 0."""

    def at(self, position: float, begin: float, moment: Moment) -> float: ...

    @property
    def bounds(self) -> tuple[float, float]: ...

    @property
    def follows_length(self) -> bool: ...

    @property
    def falls(self) -> bool: ...


@dataclass(frozen=True)
class Constant:
    value: float

    def at(self, position: float, begin: float, moment: Moment) -> float:
        return self.value

    @property
    def bounds(self) -> tuple[float, float]:
        return self.value, self.value

    @property
    def follows_length(self) -> bool:
        return False

    @property
    def falls(self) -> bool:
        return False


@dataclass(frozen=True)
class Ramp:
    """From `first` to `last` between two places: in a straight line, along half a cosine, or fast at first as a cubic.

    Source of the cubic: Zhu, Gupta, "To prune, or not to prune" (2017), for the share of weights that are zero.
    """

    first: float
    last: float
    shape: str
    start: Place | None = None
    until: Place | None = None

    def at(self, position: float, begin: float, moment: Moment) -> float:
        start = begin if self.start is None else self.start.epochs(moment.steps)
        until = moment.epochs if self.until is None else self.until.epochs(moment.steps)
        done = min(1.0, max(0.0, (position - start) / max(1e-12, until - start)))
        share = {"linear": done, "cosine": 0.5 * (1 - math.cos(math.pi * done)), "cubic": 1 - (1 - done) ** 3}[
            self.shape
        ]
        return self.first + (self.last - self.first) * share

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.first, self.last), max(self.first, self.last)

    @property
    def follows_length(self) -> bool:
        return self.until is None

    @property
    def falls(self) -> bool:
        return self.last < self.first


@dataclass(frozen=True)
class Steps:
    """A value that is multiplied by `gamma` at each place."""

    value: float
    places: tuple[Place, ...]
    gamma: float

    def at(self, position: float, begin: float, moment: Moment) -> float:
        passed = sum(position >= place.epochs(moment.steps) for place in self.places)
        return float(self.value * self.gamma**passed)

    @property
    def bounds(self) -> tuple[float, float]:
        values = [self.value * self.gamma**passed for passed in range(len(self.places) + 1)]
        return min(values), max(values)

    @property
    def follows_length(self) -> bool:
        return False

    @property
    def falls(self) -> bool:
        values = [self.value * self.gamma**passed for passed in range(len(self.places) + 1)]
        return any(after < before for before, after in pairwise(values))


@dataclass(frozen=True)
class Piecewise:
    """Straight lines between points; constant before the first and after the last."""

    points: tuple[tuple[Place, float], ...]

    def at(self, position: float, begin: float, moment: Moment) -> float:
        points = [(place.epochs(moment.steps), value) for place, value in self.points]
        for (before, low), (after, high) in pairwise(points):
            if before <= position < after:
                return low + (high - low) * (position - before) / (after - before)
        return points[0][1] if position < points[0][0] else points[-1][1]

    @property
    def bounds(self) -> tuple[float, float]:
        values = [value for _, value in self.points]
        return min(values), max(values)

    @property
    def follows_length(self) -> bool:
        return False

    @property
    def falls(self) -> bool:
        return any(after < before for (_, before), (_, after) in pairwise(self.points))


@dataclass(frozen=True)
class Warmup:
    """A straight rise from 0 to what another curve has at the end of the rise, then that curve.

    The first step is never at 0: it counts as taken. Held over whole epochs (by=epoch), the first epoch is at 0.
    """

    length: Place
    after: Curve

    def at(self, position: float, begin: float, moment: Moment) -> float:
        length = begin + self.length.epochs(moment.steps)
        if position >= length:
            return self.after.at(position, length, moment)
        reached = self.after.at(length, length, moment)
        taken = position if moment.step == HELD else position + 1 / moment.steps
        return reached * min(1.0, (taken - begin) / (length - begin))

    @property
    def bounds(self) -> tuple[float, float]:
        lowest, highest = self.after.bounds
        return min(0.0, lowest), max(0.0, highest)

    @property
    def follows_length(self) -> bool:
        return self.after.follows_length

    @property
    def falls(self) -> bool:
        return self.after.falls or self.after.bounds[0] < 0


@dataclass(frozen=True)
class Schedule:
    """A scalar over the epochs and steps of a stage.

    Attributes:
        text: as the user wrote it; what a run records.
        curve: its shape.
        by_epoch: the value is held over each epoch.
    """

    text: str
    curve: Curve = field(compare=False)
    by_epoch: bool = field(default=False, compare=False)

    @classmethod
    def parse(cls, value: object, where: str) -> Schedule:
        """A number, or `name(arguments)`; `where` begins the message of an error.

        `by=epoch` among the arguments holds the value over each epoch. A place is a number of epochs, or `300steps`.

        Raises:
            ConfigError: an unknown schedule (with near names), missing or impossible arguments.
        """
        text = " ".join(str(value).split())
        curve, by_epoch = _parse(text, where)
        return cls(text, curve, by_epoch)

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value that it takes, or could take in a longer stage."""
        return self.curve.bounds

    @property
    def follows_length(self) -> bool:
        """Whether its value at a place depends on how long the stage is."""
        return self.curve.follows_length

    @property
    def falls(self) -> bool:
        """Whether it becomes smaller anywhere."""
        return self.curve.falls

    @property
    def recorded(self) -> float | str:
        """The number, or the text of a schedule: what a run writes down."""
        return self.bounds[0] if self.is_constant else self.text

    @property
    def is_constant(self) -> bool:
        return isinstance(self.curve, Constant)

    def at(self, moment: Moment) -> float:
        """The value at a point of training."""
        if self.by_epoch:
            moment = Moment(moment.epoch, HELD, moment.steps, moment.epochs)
            return self.curve.at(float(moment.epoch), 0.0, moment)
        return self.curve.at(moment.epoch + moment.step / moment.steps, 0.0, moment)


# ---------------------------------------------------------------------------------------------------------------- parsing


def _parse(text: str, where: str) -> tuple[Curve, bool]:
    name, opened, rest = text.partition("(")
    name = name.strip()
    if not opened and _is_number(name):
        return Constant(_number(name, where)), False
    if name not in SCHEDULES:
        raise ConfigError(
            f"{where}: {text!r} is neither a number nor a schedule",
            tip=f"{nearest(name, SCHEDULES)}; write a number, or for example linear(8, 2)",
        )
    if opened and not rest.endswith(")"):
        raise ConfigError(f"{where}: {text!r} has no closing bracket", tip="put it in quotes: 'linear(8, 2)'")
    values: list[str] = []
    named: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in split_outside(rest[:-1] if opened else "", ","))):
        key, equals, value = part.partition("=")
        if equals and key.strip().isidentifier():
            named[key.strip()] = value.strip()
        else:
            values.append(part)
    by = named.pop("by", "step")
    if by not in ("step", "epoch"):
        raise ConfigError(f"{where}: {text!r}: by={by!r} is neither step nor epoch")
    kind = SCHEDULES[name]
    for key in named:
        if key not in kind.keys:
            raise ConfigError(f"{where}: {name} has no argument {key!r}", tip=nearest(key, (*kind.keys, "by")))
    if not kind.least <= len(values) <= kind.most:
        raise ConfigError(f"{where}: {text!r} has {len(values)} values", tip=f"write {kind.usage}")
    return kind.make(values, named, f"{where}: {text!r}"), by == "epoch"


def _ramp(shape: str) -> Callable[[Sequence[str], Mapping[str, str], str], Curve]:
    def make(values: Sequence[str], named: Mapping[str, str], where: str) -> Curve:
        if len(values) == 1:
            raise ConfigError(f"{where} has one value", tip="write where it begins and where it ends: linear(8, 2)")
        first, last = (_number(value, where) for value in values) if values else (1.0, 0.0)
        start, until = (Place.parse(named[key], where) if key in named else None for key in ("start", "until"))
        return Ramp(first, last, shape, start, until)

    return make


def _steps(values: Sequence[str], named: Mapping[str, str], where: str) -> Curve:
    if "at" not in named:
        raise ConfigError(f"{where} does not say at which epochs", tip=f"write {SCHEDULES['step'].usage}")
    places = tuple(Place.parse(part, where) for part in named["at"].split("/"))
    return Steps(_number(values[0] if values else "1", where), places, _number(named.get("gamma", "0.1"), where))


def _piecewise(values: Sequence[str], named: Mapping[str, str], where: str) -> Curve:
    pairs = [value.partition(":") for value in values]
    if not all(colon for _, colon, _ in pairs):
        raise ConfigError(f"{where}: a point is epoch:value", tip=f"write {SCHEDULES['piecewise'].usage}")
    points = tuple((Place.parse(place, where), _number(value, where)) for place, _, value in pairs)
    if any(a.in_steps != b.in_steps or a.value >= b.value for (a, _), (b, _) in pairwise(points)):
        raise ConfigError(f"{where}: the points do not rise", tip="give them in order, all in epochs or all in steps")
    return Piecewise(points)


def _warmup(values: Sequence[str], named: Mapping[str, str], where: str) -> Curve:
    after, by_epoch = _parse(values[1] if len(values) > 1 else "1", where)
    if by_epoch:
        raise ConfigError(f"{where}: by=epoch stands inside", tip="write warmup(5, linear(1, 0), by=epoch)")
    length = Place.parse(values[0], where)
    return Warmup(length, after) if length.value else after


def _constant(values: Sequence[str], named: Mapping[str, str], where: str) -> Curve:
    return Constant(_number(values[0] if values else "1", where))


@dataclass(frozen=True)
class _Kind:
    make: Callable[[Sequence[str], Mapping[str, str], str], Curve]
    usage: str
    least: int
    most: int
    keys: tuple[str, ...] = ()


SCHEDULES: dict[str, _Kind] = {
    "constant": _Kind(_constant, "constant(0.5)", 0, 1),
    "linear": _Kind(_ramp("linear"), "linear(8, 2) or linear(8, 2, start=1, until=10)", 0, 2, ("start", "until")),
    "cosine": _Kind(_ramp("cosine"), "cosine(1, 0) or cosine(1, 0, start=5, until=100)", 0, 2, ("start", "until")),
    "cubic": _Kind(_ramp("cubic"), "cubic(0, 0.8) or cubic(0, 0.8, until=15)", 0, 2, ("start", "until")),
    "step": _Kind(_steps, "step(1, at=150/180/210, gamma=0.1)", 0, 1, ("at", "gamma")),
    "piecewise": _Kind(_piecewise, "piecewise(0:4, 10:1) or piecewise(0steps:0, 300steps:1)", 1, 1000),
    "warmup": _Kind(_warmup, "warmup(5, cosine(1, 0)) or warmup(20, 0.5, by=epoch)", 1, 2),
}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, where: str, lowest: float = -math.inf, tip: str = "") -> float:
    number = float(text) if _is_number(text) else math.nan
    if not math.isfinite(number) or number < lowest:
        least = "" if lowest == -math.inf else f" of at least {lowest:g}"
        if not tip and text.endswith("%") and _is_number(text[:-1]):
            tip = f"a share is written as a number: {float(text[:-1]) / 100:g}"
        raise ConfigError(f"{where}: {text!r} is not a finite number{least}", tip=tip)
    return number

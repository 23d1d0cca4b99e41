"""The parameters of a view step: their names, types, defaults and ranges are those of the step's own signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from softcache.errors import ConfigError, nearest
from softcache.spec import convert


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included; NaN and infinity never are."""

    low: float
    high: float = float("inf")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value < float("inf")

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high == float("inf") else f"between {self.low} and {self.high}"


MOST_PIXELS = 2**14  # of a side: a policy may be somebody else's, and a view is held in memory
Size = Annotated[int, Range(1, MOST_PIXELS)]  # pixels
Pixels = Annotated[int, Range(0, MOST_PIXELS)]
Share = Annotated[float, Range(0, 1)]  # of an area, or a probability

FIRST_PARAMETER = 2  # of a step's function, after the image and its draws


@cache
def _signature(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Parameter name -> (annotation, default)."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[FIRST_PARAMETER:]
    return {parameter.name: (hints[parameter.name], parameter.default) for parameter in parameters}


def read_parameters(function: Callable[..., Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of the step `name` in the order of its signature, converted and checked; defaults filled in.

    Args:
        function: of the step; annotations may be `Annotated[type, Range]`.
        given: values, or strings of them.

    Raises:
        ConfigError: an unknown parameter, a missing one, a value of another type or out of its range, or X_min > X_max.
    """
    known = _signature(function)
    for key in given:
        if key not in known:
            raise ConfigError(f"view step {name!r} has no parameter {key!r}", tip=nearest(key, known) if known else "")
    values = {}
    for key, (hint, default) in known.items():
        if key in given:
            plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
            values[key] = convert(str(given[key]), plain, f"view step {name!r}: {key}")
        elif default is inspect.Parameter.empty:
            raise ConfigError(f"view step {name!r}: parameter {key!r} is missing", tip=f"write {name}:{key}=...")
        else:
            values[key] = default
        for allowed in getattr(hint, "__metadata__", ()):
            if values[key] not in allowed:
                raise ConfigError(f"view step {name!r}: {key}={values[key]} must be {allowed}")
    for key, low in values.items():
        high = values.get(f"{key.removesuffix('_min')}_max") if key.endswith("_min") else None
        if high is not None and low > high:
            raise ConfigError(f"view step {name!r}: {key}={low} must be at most {key.removesuffix('_min')}_max={high}")
    return values

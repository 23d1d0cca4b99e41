"""What a setting is: a field with its help; checked, converted, and gathered from a file, `--set` and flags.

Precedence: defaults < --config file.toml < --set key=value < flags.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from softcache.config.lines import settings_text, table_text
from softcache.config.toml import parse_toml, read_toml
from softcache.errors import ConfigError, nearest
from softcache.spec import convert, split_list

Config = TypeVar("Config")
A_LINE = 'a line of it is epochs = 3, or loss = "kd": texts stand in quotes'


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    positional: bool = False,
    repeat: bool = False,
) -> Any:
    """A setting with its help text.

    Args:
        default: `...` makes it required.
        choices: the only values it may have.
        metavar: what stands for its value in help; the name of a positional one.
        positional: on the command line it is a word of its own, not a flag.
        repeat: of a list: each use of the flag is one value, with commas of its own; otherwise commas separate values. A
            positional one takes all words that are left.
    """
    return field(
        default=None if default is ... else default,
        metadata={
            "help": help,
            "choices": tuple(choices),
            "metavar": metavar,
            "required": default is ...,
            "positional": positional,
            "repeat": repeat,
        },
    )


SETTINGS = "stage"  # the setting whose values are lines of settings
_QUOTED = re.compile(r'(^|,) *"')  # a name in quotes, in a list


class Settings:
    """What checks and converts its own fields, made in Python too: `epochs="2"`, `out=Path(...)`, `loss="kd"`.

    Raises:
        ConfigError: a value of another type, an unknown choice, a required setting missing.
    """

    def __post_init__(self) -> None:
        hints, kind = typing.get_type_hints(type(self)), type(self).__name__
        for one in fields(self):  # type: ignore[arg-type]
            where, given = f"{kind}: {one.name}", getattr(self, one.name)
            if one.metadata["required"] and given in (None, ""):
                raise ConfigError(f"{where} is missing", tip=f"{one.name}: {one.metadata['help']}")
            value = _own(given, hints[one.name], where, settings=one.name == SETTINGS)
            _check_choice(one, value, where)
            object.__setattr__(self, one.name, value)


def _own(value: Any, hint: Any, where: str, *, settings: bool) -> Any:
    """A value of Python's as the type of its field; ConfigError where it is none."""
    if value is None and (type(None) in typing.get_args(hint) or hint is str):
        return None  # of a required one it is told below
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if (
        isinstance(value, str)
        and (hint is str or str in typing.get_args(hint))
        and typing.get_origin(hint) is not tuple
    ):
        return value  # "none" too
    if typing.get_origin(hint) is tuple and not isinstance(value, str | dict) and isinstance(value, Iterable):
        value = tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
    if isinstance(value, bytes) or (value is not None and hint is str and not isinstance(value, int | float)):
        raise ConfigError(f"{where}: {value!r} is no text")
    return coerce(value, hint, where, settings=settings)


def _check_choice(one: Field[Any], value: Any, where: str) -> None:
    choices = one.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{where} cannot be {value!r}", tip=nearest(str(value), choices))


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """A config and, per field, where its value came from."""

    config: Config
    origins: Mapping[str, str]


def resolve(
    kind: type[Config], *, file: str | None = None, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> Resolved[Config]:
    """One config out of all sources.

    Args:
        kind: a config dataclass.
        file: a TOML file.
        sets: "key=value" strings.
        flags: values given on the command line, strings or tuples of strings.

    Raises:
        ConfigError: unknown key (with near names), a value of another type, an unknown choice, a required one missing.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for origin, source in _sources(file, sets, flags or {}):
        for key, value in source.items():
            name = key.replace("-", "_")
            name = f"{name}_" if f"{name}_" in known else name  # a Python keyword
            if name not in known:
                raise ConfigError(f"{origin}: unknown setting {key!r}", tip=nearest(name, known))
            values[name] = coerce(value, hints[name], _place(known[name], origin), settings=name == SETTINGS)
            origins[name] = origin
    for name, f in known.items():
        if name in values:
            _check_choice(f, values[name], _place(f, origins[name]))
        if f.metadata["required"] and not values.get(name):
            place, metavar = _place(f, "flag"), f.metadata["metavar"]
            usage = place if f.metadata["positional"] else f"{place} {metavar}"
            raise ConfigError(f"{place} is missing", tip=f"{usage}: {f.metadata['help']}")
    return Resolved(kind(**values), origins)


def _place(one: Field[Any], origin: str) -> str:
    """How a message names a setting: as it was given."""
    if origin != "flag":
        return f"{origin}: {one.name}"
    return str(one.metadata["metavar"]) if one.metadata["positional"] else flag_of(one.name)


def _sources(file: str | None, sets: Sequence[str], flags: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        sources.append((file, parse_toml(read_toml(Path(file)), file, tip=A_LINE)))
    for pair in sets:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r} is not key=value")
        sources.append(("--set", {key: value}))
    sources.append(("flag", flags))
    return sources


def flag_of(name: str) -> str:
    """How a field is written on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")


def coerce(value: Any, hint: Any, where: str, *, settings: bool = False) -> Any:
    """A value from TOML or the command line as the type of its field; tables become `name:key=value,...` strings.

    Args:
        settings: each text is a line of settings, `epochs=5 loss=kd`, and so is each table.
    """
    if isinstance(value, str):
        is_list = typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str
        if is_list and _QUOTED.search(value) and not settings:
            return split_list(value)
        whole = is_list and (":" in value or settings)  # it holds commas of its own
        return (value,) if whole else convert(value, hint, where)
    if isinstance(value, list | tuple):
        if typing.get_origin(hint) is not tuple:
            raise ConfigError(f"{where}: {list(value)!r} is a list, not one value")
        element = (typing.get_args(hint) or (str,))[0]
        written = settings_text if settings else table_text
        return tuple(written(v, where) if isinstance(v, dict) else coerce(v, element, where) for v in value)
    if isinstance(value, dict):
        raise ConfigError(f"{where}: is a table, not a value")
    return convert(str(value), hint, where)

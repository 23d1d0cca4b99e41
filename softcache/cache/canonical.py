"""Canonical JSON: one sequence of bytes for one value, so that a sha256 can be its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8, sorted keys, no spaces; ValueError for anything but strings, booleans, null and integers below 2**53."""
    _check_canonical(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _check_canonical(value: Any) -> None:
    kind = type(value)
    if kind is str or value is None or kind is bool or (kind is int and -(2**53) < value < 2**53):
        return  # nearly all of them, so it is asked first, and in the way that is fast
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"JSON key {key!r} is not a string")
            _check_canonical(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_canonical(inner)
    elif not (
        isinstance(value, str) or (isinstance(value, int) and -(2**53) < value < 2**53)
    ):  # of a type made from them
        raise ValueError(f"{str(value)[:60]!r} has no canonical JSON form; write seeds and non-integers as strings")


def differences(wanted: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, wanted, found) of every leaf that differs between two JSON values."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in sorted({*wanted, *found}):
            yield from differences(wanted.get(key), found.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            yield from differences(one, other, f"{prefix}[{index}]")
    elif wanted != found:
        yield prefix, wanted, found

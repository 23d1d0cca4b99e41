"""The strict reader of JSON: what has the shape passes, and every other value is refused with the name of its field."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from softcache.cache.canonical import canonical_json
from softcache.cache.strict_json import MAX_STRING, SHA256, AnyKeys, Either, Pair, check_shape, read_shape

SHAPE: Any = {
    "name": str,
    "whole": bool,
    "rows?": Pair(int),
    "sizes": [int],
    "parts": [{"path": str, "sha256?": SHA256}],
    "of": AnyKeys({"count": int}),
    "more": Either([str]),
}
RIGHT: dict[str, Any] = {
    "name": "a", "whole": True, "rows": [0, 5], "sizes": [0, 2**52], "parts": [{"path": "x", "sha256": "a" * 64}, {"path": ""}],
    "of": {"any key": {"count": 3}}, "more": None,
}  # fmt: skip


def changed(at: tuple[Any, ...], value: Any) -> Any:
    """RIGHT with another value in one place; without it where the value is `...`."""
    if not at:
        return value
    found = copy.deepcopy(RIGHT)
    holder = found
    for key in at[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return found


def test_what_has_the_shape_is_read() -> None:
    assert read_shape(canonical_json(RIGHT), SHAPE) == RIGHT
    for at, value in ((("rows",), ...), (("more",), ["x", "y"]), (("of",), {}), (("parts",), [])):
        check_shape(changed(at, value), SHAPE)


@pytest.mark.parametrize(
    ("at", "value", "named"),
    [
        (("name",), ..., "name: missing"),
        (("parts", 1, "path"), ..., r"parts\[1\]\.path: missing"),
        (("name",), 1, "name: '1' is not a string"),
        (("name",), "x" * (MAX_STRING + 1), "name: .* is not a string"),
        (("whole",), 1, "whole: '1' is not true or false"),
        (("sizes",), [1, True], r"sizes\[1\]: 'True' is not an integer, not negative"),
        (("sizes",), [-1], r"sizes\[0\]: '-1' is not an integer"),
        (("sizes",), {}, "sizes: .* is not an array"),
        (("rows",), [1], "rows: .* is not an array of two"),
        (("rows",), [1, "2"], r"rows\[1\]: '2' is not an integer"),
        (("parts", 0, "sha256"), "A" * 64, r"parts\[0\]\.sha256: .* is not 64 hex digits"),
        (("parts", 0, "sha256"), "a" * 64 + "\n", r"parts\[0\]\.sha256: .* is not 64 hex digits"),
        (("parts", 0), [], r"parts\[0\]: .* is not an object"),
        (("of",), [], "of: .* is not an object"),
        (("of",), {"k": {"count": None}}, r"of\.k\.count: 'None' is not an integer"),
        (("more",), [None], r"more\[0\]: 'None' is not a string"),
        (("other",), 1, "^other: no field of this format"),
        (("parts", 1, "other"), 1, r"parts\[1\]\.other: no field of this format"),
        (("rows?",), [0, 1], r"^rows\?: no field of this format"),
        (("parts", 1, "sha256?"), "x", r"parts\[1\]\.sha256\?: no field of this format"),
        ((), None, "the whole: 'None' is not an object"),
    ],
)  # fmt: skip
def test_what_has_not_is_refused_by_name(at: tuple[Any, ...], value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_shape(changed(at, value), SHAPE)


@pytest.mark.parametrize(
    "data", [b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":1.0}', b'{"a":NaN}', b"[" * 100_000]
)
def test_other_bytes_than_the_canonical_ones_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"canonical|not an integer|nested too deeply"):
        read_shape(data, AnyKeys(int))


@pytest.mark.parametrize("value", [2**53, -(2**53), 1.0, b"x", {1: 2}, {"a": {"b": [object()]}}])
def test_what_has_no_canonical_form_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"no canonical JSON form|is not a string"):
        canonical_json(value)

"""JSON that is exactly what FORMAT.md says, or a ValueError that names the field: no other byte, field or type passes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softcache.cache.canonical import canonical_json

MAX_BYTES = 64 * 2**20
MAX_STRING = 2**16

# A shape is one of: a type (`int` means not negative), [shape] for an array, {name: shape} for an object with exactly these
# fields (`name?` may be missing), or one of the classes below.
Shape = Any


@dataclass(frozen=True)
class Either:
    """null, or the shape."""

    shape: Shape


@dataclass(frozen=True)
class AnyKeys:
    """An object with any keys."""

    shape: Shape


@dataclass(frozen=True)
class Matching:
    """A string that matches a pattern as a whole."""

    pattern: str
    meaning: str


@dataclass(frozen=True)
class Pair:
    """An array of two."""

    shape: Shape


DECIMAL = Matching(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[-+]?[0-9]{1,4})?", "a number in decimal")
WHOLE = Matching(r"-?[0-9]{1,40}", "a whole number in decimal")
SHA256 = Matching(r"[0-9a-f]{64}", "64 hex digits")
_TYPES = {int: "an integer, not negative", str: "a string", bool: "true or false"}

STATISTICS: Shape = {
    "records": int,
    "labelled": int,
    "correct": int,
    "entropy_sum": DECIMAL,
    "max_eps": DECIMAL,
    "floored": int,
    "dense": int,
    "measured": int,
    "agreed": int,
    "kl": AnyKeys({"sum": DECIMAL, "worst": DECIMAL}),
    "feature_errors": AnyKeys(DECIMAL),
}

FILE: Shape = {
    "path": str,
    "kind": str,
    "bytes": int,
    "sha256": SHA256,
    "arrays": AnyKeys({"offset": int, "dtype": str, "shape": [int]}),
    "member?": str,
    "rows?": Pair(int),
    "views?": Pair(int),
    "statistics?": STATISTICS,
}

MEMBER: Shape = {
    "name": str,
    "model": str,
    "fingerprint": str,
    "output": str,
    "compute_dtype": str,
    "class_order": Either([int]),
    "codec": {
        "name": str,
        "parameters": AnyKeys(str),
        "fields": [{"name": str, "offset": int, "dtype": str, "shape": [int]}],
    },
    "features": [{"name": str, "stored": str, "arrays": [str], "dtype": str, "shapes": [[int]]}],
    "promise": Either({"max_kl": DECIMAL, "at_temperature": DECIMAL}),
}

ROUND: Shape = {
    "layout": {
        "num_rows": int,
        "num_views": int,
        "shard_rows": int,
        "shard_views": int,
        "first_view": int,
        "first_part": int,
    },
    "members": [str],
    "new_views": bool,
    "made_with": {
        "softcache": str,
        "torch": str,
        "torchvision": str,
        "numpy": str,
        "pillow": str,
        "hdf5": str,
        "device": str,
        "batch_size": int,
        "threads": int,
        "autocast": str,
    },
}

PLAN: Shape = {
    "format": int,
    "license": Either(str),
    "parent": Either({"id": SHA256, "statistics": AnyKeys(STATISTICS)}),
    "class_names": [str],
    "samples": {
        "source": str,
        "count": int,
        "fingerprint": str,
        "digest_kind": str,
        "has_keys": bool,
        "multi_label": bool,
        "order": str,
        "order_seed": WHOLE,
    },
    "views": {
        "count": int,
        "first": int,
        "root_seed": WHOLE,
        "replay": str,
        "steps": [{"name": str, "version": int, "parameters": AnyKeys(str)}],
    },
    "members": [MEMBER],
    "rounds": [ROUND],
}

_SUMS: Shape = {"sum": DECIMAL, "worst": DECIMAL}
STATISTICS_2: Shape = {**STATISTICS, "error": Either(_SUMS), "kept?": AnyKeys(DECIMAL)}
FILE_2: Shape = {**FILE, "statistics?": STATISTICS_2, "checksums": SHA256, "index?": str}
MEMBER_2: Shape = {
    **MEMBER,
    "output": Either(str),
    "codec": Either(MEMBER["codec"]),
    "features": [{**MEMBER["features"][0], "index": Either(str)}],
    "promise": Either({"max_kl?": DECIMAL, "at_temperature?": DECIMAL, "max_relative_error?": DECIMAL}),
    "index": Either(str),
    "width": int,
    "value_names": [str],
    "input": AnyKeys(str),
}
PLAN_2: Shape = {
    **{name: shape for name, shape in PLAN.items() if name != "parent"},
    "parents": [{"id": SHA256, "statistics": AnyKeys(STATISTICS_2)}],
    "samples": {**PLAN["samples"], "has_masks": bool},
    "views": {**PLAN["views"], "digests": [str]},
    "vocabulary": Either({"count": int, "tokenizer": SHA256}),
    "rendering": Either(AnyKeys(str)),
    "indexes": [{"name": str, "kind": str, "listed": bool, "labels": bool}],
    "members": [MEMBER_2],
    "rounds": [{**ROUND, "indexes": [str], "made_with": {**ROUND["made_with"], "batch_tokens": Either(int)}}],
}
LIST: Shape = {
    "path": str,
    "bytes": int,
    "sha256": SHA256,
    "round": int,
    "of": str,
    "member": Either(str),
    "parts": Pair(int),
    "files": int,
    "file_bytes": int,
    "statistics": Either(STATISTICS_2),
}

# by version; those of version 2 are in FORMAT.md from section 19 on
MANIFEST: Mapping[int, Shape] = {1: {**PLAN, "files": [FILE]}, 2: {**PLAN_2, "lists": [LIST]}}
PLANNED: Mapping[int, Shape] = {  # plan.json
    1: {"plan": PLAN, "base": Either(SHA256), "files": [FILE]},
    2: {"plan": PLAN_2, "base": Either(SHA256), "files": [FILE_2]},
}
JOURNALED: Mapping[int, Shape] = {1: {"span": int, "files": [FILE]}, 2: {"span": int, "files": [FILE_2]}}  # a line
LISTED: Shape = [FILE_2]


def read_canonical(data: bytes) -> Any:
    """The value whose canonical JSON is exactly `data`; ValueError for anything else."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        value = json.loads(data.decode("utf-8"), parse_float=_refuse, parse_constant=_refuse)
        if canonical_json(value) == data:
            return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    raise ValueError("not canonical JSON: keys out of order or twice, spaces, or another form of a string or number")


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:40]} is not an integer")


def read_shape(data: bytes, shape: Shape) -> Any:
    """The value of canonical JSON that has this shape; ValueError that names the first field that has not."""
    value = read_canonical(data)
    check_shape(value, shape)
    return value


def check_shape(value: Any, shape: Shape, where: str = "") -> None:
    """ValueError unless the value has the shape; names the field."""
    kind = type(shape)
    if kind is type:
        _demand(_is_plain(value, shape), where, _TYPES[shape], value)
    elif kind is Matching:
        _demand(_matches(value, shape), where, shape.meaning, value)
    elif kind is Either:
        if value is not None:
            check_shape(value, shape.shape, where)
    elif kind is Pair:
        _demand(type(value) is list and len(value) == 2, where, "an array of two", value)
        _check_items(value, shape.shape, where)
    elif kind is AnyKeys:
        _demand(type(value) is dict, where, "an object", value)
        for key, inner in value.items():
            check_shape(inner, shape.shape, f"{where}.{key[:80]}")
    elif kind is dict:
        _demand(type(value) is dict, where, "an object", value)
        _check_object(value, shape, where)
    else:
        _demand(type(value) is list, where, "an array", value)
        _check_items(value, shape[0], where)


def _is_plain(value: Any, kind: Any) -> bool:
    """Whether it is exactly of this type, for True is an int to Python; not negative, and not endless."""
    return type(value) is kind and (kind is not int or value >= 0) and (kind is not str or len(value) <= MAX_STRING)


def _matches(value: Any, shape: Matching) -> bool:
    return type(value) is str and re.fullmatch(shape.pattern, value) is not None


def _check_object(value: Mapping[str, Any], shape: Mapping[str, Shape], where: str) -> None:
    found = 0
    for name, inner in shape.items():
        field = name.removesuffix("?")
        if field in value:
            found += 1
            one, kind = value[field], type(inner)
            if (kind is type and _is_plain(one, inner)) or (kind is Matching and _matches(one, inner)):
                continue  # nearly all of them: no name has to be made for each
            check_shape(one, inner, f"{where}.{field}" if where else field)
        elif field == name:
            raise ValueError(f"{where}.{field}: missing".lstrip("."))
    if found < len(value):
        fields = {name.removesuffix("?") for name in shape}
        other = next(name for name in value if name not in fields)
        raise ValueError(f"{where}.{other[:80]}: no field of this format".lstrip("."))


def _check_items(values: Sequence[Any], shape: Shape, where: str) -> None:
    if shape is int and all(type(value) is int and value >= 0 for value in values):
        return  # a permutation of very many classes: no name has to be made for each
    for index, value in enumerate(values):
        check_shape(value, shape, f"{where}[{index}]")


def _demand(fits: bool, where: str, meaning: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{where or 'the whole'}: {str(value)[:60]!r} is not {meaning}")

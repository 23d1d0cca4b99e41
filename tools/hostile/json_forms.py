"""JSON that no writer writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hostile.forge import Forge, assign, case, dumps
from hostile.honest import PLAIN, ROWS


def _documents(data: bytes) -> dict[str, bytes]:
    """Other documents, and other bytes around this one."""
    return {
        "empty": b"",
        "null": b"null",
        "a list": b"[]",
        "a string": b'"manifest"',
        "an empty object": b"{}",
        "only the format": dumps({"format": json.loads(data)["format"]}),
        "cut off": data[:-1],
        "half of it": data[: len(data) // 2],
        "something behind it": data + b"{}",
        "a line break behind it": data + b"\n",
        "a NUL behind it": data + b"\0",
        "spaces": data.replace(b":", b": ", 5),
        "a byte order mark": b"\xef\xbb\xbf" + data,
        "pickle": b"\x80\x04\x95",
        "XML": b"<manifest/>",
    }


def _texts(data: bytes) -> dict[str, bytes]:
    """The same text otherwise encoded, otherwise escaped, or with keys that are not sorted or not once there."""
    text = data.decode()
    return {
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32-le"),
        "not UTF-8": data.replace(b'"ant"', b'"\xff\xfe"'),
        "over-long UTF-8": data.replace(b'"ant"', b'"\xc0\xaf"'),
        "a lone surrogate, escaped": data.replace(b'"ant"', b'"\\ud800"'),
        "a lone surrogate, as bytes": data.replace(b'"ant"', b'"\xed\xa0\x80"'),
        "another escape of a letter": data.replace(b'"ant"', b'"\\u0061nt"'),
        "an escaped slash": data.replace(b"members/plain", b"members\\/plain"),
        "keys not sorted": data[:-1] + b',"aaa":1}',
        "a key twice, the same": data.replace(b'"format":1', b'"format":1,"format":1'),
        "a key twice, another value": data.replace(b'"format":1', b'"format":7,"format":1'),
        "a key twice, in a file": data.replace(b'"kind":"samples"', b'"kind":"samples","kind":"probe"'),
    }


def _numbers(data: bytes) -> dict[str, bytes]:
    text, number = data.decode(), f'"count":{ROWS}'
    assert number in text
    return {
        "NaN": text.replace(number, '"count":NaN').encode(),
        "Infinity": text.replace(number, '"count":Infinity').encode(),
        "-Infinity": text.replace(number, '"count":-Infinity').encode(),
        "1e999": text.replace(number, '"count":1e999').encode(),
        "-0": text.replace(number, '"count":-0').encode(),
        "-0 as an offset": data.replace(b'"offset":0', b'"offset":-0'),
        "300.0": text.replace(number, '"count":300.0').encode(),
        "3e2": text.replace(number, '"count":3e2').encode(),
        "a leading zero": text.replace(number, '"count":0300').encode(),
        "a plus sign": text.replace(number, '"count":+300').encode(),
        "hexadecimal": text.replace(number, '"count":0x12c').encode(),
        "2^53": text.replace(number, f'"count":{2**53}').encode(),
        "2^63": text.replace(number, f'"count":{2**63}').encode(),
        "2^64": text.replace(number, f'"count":{2**64}').encode(),
        "-2^63": text.replace(number, f'"count":{-(2**63)}').encode(),
        "a number of a million digits": text.replace(number, '"count":' + "9" * 10**6).encode(),
        "a number of a hundred digits": text.replace(number, '"count":' + "9" * 100).encode(),
        "a decimal of a million digits": data.replace(b'"order_seed":"0"', b'"order_seed":"' + b"9" * 10**6 + b'"'),
        "a seed in Arabic digits": text.replace('"order_seed":"0"', '"order_seed":"\u0663"').encode(),
    }


def _bombs(data: bytes) -> dict[str, bytes]:
    """Deep and long ones."""
    return {
        "a hundred thousand arrays": b"[" * 100_000 + b"]" * 100_000,
        "a hundred thousand objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a hundred thousand arrays, open": b"[" * 100_000,
        "depth in a field": data.replace(b'"class_order":null', b'"class_order":' + b"[" * 50_000 + b"]" * 50_000),
        "depth of 500 in a field": data.replace(b'"class_order":null', b'"class_order":' + b"[" * 500 + b"]" * 500),
        "a string of ten million bytes": data.replace(b'"toy"', b'"' + b"x" * 10**7 + b'"'),
        "an array of 200,000": data.replace(b'"class_order":null', b'"class_order":[' + b"1," * 200_000 + b"1]"),
    }


def _versions(data: bytes) -> dict[str, bytes]:
    return {
        "a later format": data.replace(b'"format":1', b'"format":2'),
        "an earlier format": data.replace(b'"format":1', b'"format":0'),
        "format true": data.replace(b'"format":1', b'"format":true'),
        "format 1.0": data.replace(b'"format":1', b'"format":1.0'),
        "format a string": data.replace(b'"format":1', b'"format":"1"'),
        "format a huge number": data.replace(b'"format":1', b'"format":9007199254740991'),
    }


@case("json/form")
def form(forge: Forge) -> Iterator[tuple[str, bytes]]:
    data = dumps(forge.entry)
    for make in (_documents, _texts, _numbers, _bombs, _versions):
        for what, changed in make(data).items():
            assert changed != data, what
            yield what, changed


def _walk(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(place, value) of everything in a JSON value; of an array's elements the first only."""
    if at:
        yield at, value
    if isinstance(value, dict):
        for key in value:
            yield from _walk(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from _walk(value[0], (*at, 0))


def _changed_at(entry: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    copy = json.loads(dumps(entry))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    change(inner, at[-1])
    return dumps(copy)


# where keys are free, one of them more or less is another description, not a broken one
FREE = {"kl", "feature_errors", "parameters", "statistics"}


@case("json/a field is missing")
def a_field_is_missing(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for at, _value in _walk(forge.entry):
        if isinstance(at[-1], str) and not (len(at) > 1 and at[-2] in FREE - {"statistics"}):
            yield ".".join(map(str, at)), _changed_at(forge.entry, at, lambda inner, key: inner.pop(key))


@case("json/a field too many")
def a_field_too_many(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for at, value in _walk({"top": forge.entry}):
        if isinstance(value, dict) and at[-1] not in FREE - {"statistics"}:
            changed = _changed_at({"top": forge.entry}, at, lambda inner, key: inner[key].update(zzz=1))
            yield ".".join(map(str, at)), dumps(json.loads(changed)["top"])


NULLABLE = {"license", "parent", "class_order", "promise"}
WRONG: list[Any] = [None, True, 1, -1, 2**53, 2**70, 1.5, "x\0", [], {}, [None], {"": {}}, [[]]]


def _same_kind(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return value is None and isinstance(other, str)  # a licence may be any string
    return isinstance(value, str | list | dict) or (isinstance(value, int) and 0 <= other < 2**53)


@case("json/a value of the wrong type")
def a_value_of_the_wrong_type(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for at, value in _walk(forge.entry):
        for wrong in WRONG:
            if not _same_kind(value, wrong) and not (wrong is None and at[-1] in NULLABLE):
                entry = json.loads(dumps(forge.entry))
                assign(*at, to=wrong)(entry)
                yield f"{'.'.join(map(str, at))} = {wrong!r}", dumps(entry)


@case("json/a hash of another form")
def a_hash_of_another_form(forge: Forge) -> Iterator[tuple[str, bytes]]:
    honest = forge.file(PLAIN)["sha256"]
    for bad in [
        "",
        honest[:-1],
        honest + "0",
        honest.upper(),
        "0x" + honest[2:],
        honest[:-1] + "g",
        honest[:-1] + "\n",
        " " + honest,
    ]:
        forge.file(PLAIN)["sha256"] = bad
        yield repr(bad), dumps(forge.entry)

"""Changes of bytes and of JSON, drawn at random."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
NUMBERS += [2**52, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    "",
    "x",
    "\0",
    "../x",
    "/etc/passwd",
    "A",
    "0",
    "-1",
    "1e999",
    "nan",
    "\u0430",
    "a" * 70,
    "|O",
    "<f8",
    "<u4",
    "{}",
]


def mutate_bytes(data: bytes, draw: random.Random, places: Sequence[int]) -> bytes:
    """One to three changes of bytes, at or near one of the places."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = min(max(0, draw.choice(places) + draw.randint(-4, 4)), max(0, len(changed) - 1))
        kind = draw.randrange(9)
        if not changed:
            changed = bytearray(b"\0")
        if kind <= 1:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[at] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        elif kind <= 4:  # a number of a header
            width = draw.choice([1, 2, 4, 8])
            number = draw.choice(NUMBERS) % 2 ** (8 * width)
            changed[at : at + width] = number.to_bytes(width, "little")[: len(changed) - at]
        elif kind == 5:
            del changed[at : at + draw.choice([1, 2, 8, 100, 4096])]
        elif kind == 6:
            changed[at:at] = draw.randbytes(draw.choice([1, 2, 8, 100, 4096]))
        elif kind == 7:
            size, source = draw.choice([1, 4, 16, 64, 512]), draw.randrange(len(changed))
            changed[at : at + size] = changed[source : source + size]
        else:
            del changed[at:]
    return bytes(changed)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """One to three changes of a copy: of values, keys, types and numbers."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        holder = copy
        while True:
            keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
                holder = holder[key]
                continue
            _mutate_at(holder, key, draw, copy)
            break
    return copy


def _mutate_at(holder: Any, key: Any, draw: random.Random, whole: Any) -> None:
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice([*TEXTS, "format", "offset", "bytes", key + "x"])] = holder.pop(key)
    elif kind == 1:
        holder.insert(draw.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
    elif kind == 2:
        holder[key] = draw.choice(
            [None, True, False, [], {}, draw.choice(NUMBERS), draw.choice(TEXTS), [1], {"a": 1}, -1]
        )
    elif kind == 3:
        other = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 4 and isinstance(holder, list):
        draw.shuffle(holder)
    elif isinstance(holder[key], bool):
        holder[key] = not holder[key]
    elif isinstance(holder[key], int):
        step = draw.choice([-4096, -256, -1, 1, 256, 4096])
        holder[key] = draw.choice([holder[key] + step, holder[key] * 2, -holder[key], draw.choice(NUMBERS)])
    elif isinstance(holder[key], str):
        text = holder[key]
        at = draw.randrange(len(text) + 1)
        holder[key] = draw.choice(
            [text[:at] + draw.choice(TEXTS) + text[at:], text[:at], text[at:], draw.choice(TEXTS)]
        )
    else:
        holder[key] = draw.choice([*TEXTS, *NUMBERS, None])

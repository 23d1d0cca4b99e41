"""Settings written as one line: `kd:temperature=4` of a table, `epochs=5 loss=kd` of a stage, `1/3` of a part."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from softcache.errors import ConfigError


def table_text(table: Mapping[str, Any], where: str) -> str:
    """A table of one thing with its settings as text, `name:key=value,...`; ConfigError where it has no name."""
    if "name" not in table:
        raise ConfigError(f"{where}: a table needs a name", tip='write name = "kd"')
    rest = ",".join(f"{key}={value}" for key, value in table.items() if key != "name")
    return f"{table['name']}:{rest}" if rest else str(table["name"])


def settings_text(table: Mapping[str, Any], where: str) -> str:
    """A table of settings as one line, `epochs=5 loss=hint loss=ce`: what `--stage` takes."""
    parts = []
    for key, value in table.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            text = table_text(one, f"{where}: {key}") if isinstance(one, dict) else str(one)
            parts.append(shlex.quote(f"{key}={text}"))
    return " ".join(parts)


def parse_settings(text: str, where: str) -> dict[str, list[str]]:
    """`epochs=5 loss=hint loss=ce` -> {"epochs": ["5"], "loss": ["hint", "ce"]}; ConfigError for anything else."""
    found: dict[str, list[str]] = {}
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise ConfigError(f"{where}: {text!r}: {exc}") from None
    for word in _closed(words):
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{where}: {word!r} is not key=value", tip="write 'epochs=5 lr=0.01 loss=kd'")
        if re.search(r"[;,]\s*(epochs|lr|loss|freeze|schedule|optimizer)=", value):
            raise ConfigError(
                f"{where}: {word!r}: settings stand apart by spaces", tip="write 'epochs=5 lr=0.01 loss=kd'"
            )
        found.setdefault(key.replace("-", "_"), []).append(value)
    return found


def _closed(words: Sequence[str]) -> list[str]:
    """The words, those within one pair of brackets put together again: a schedule may be written with spaces."""
    closed: list[str] = []
    for word in words:
        if closed and closed[-1].count("(") > closed[-1].count(")"):
            closed[-1] += f" {word}"
        else:
            closed.append(word)
    return closed


def parse_part(text: str | None) -> tuple[int, int]:
    """`i/n` -> (i, n), counted from 1."""
    if text is None:
        return 1, 1
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise ConfigError(f"--part {text!r} is not i/n", tip="write 1/3, 2/3 and 3/3 for three processes")
    return int(index), int(count)

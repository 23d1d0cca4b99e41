"""TOML: settings read from a file, and written as one."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from softcache.errors import ConfigError

MOST_TOML = 2**24  # bytes


def read_toml(path: Path) -> bytes:
    """The bytes of a TOML file, no more than `parse_toml` takes; ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_TOML + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from None


def parse_toml(data: bytes, where: str, *, tip: str = "") -> dict[str, Any]:
    """What TOML says; ConfigError for what is none, has more than MOST_TOML bytes, or is deeper than Python reads."""
    if len(data) > MOST_TOML:
        raise ConfigError(f"{where}: has more than {MOST_TOML:,} bytes", tip="give settings, no data")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{where}: not TOML: {exc}", tip=tip) from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply", tip=tip) from None


def to_toml(config: Any) -> str:
    """The settings that are not None, as a TOML file that `--config` reads back."""
    lines = []
    for f in fields(config):
        value = getattr(config, f.name)
        if value is not None:
            lines.append(f"{f.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)

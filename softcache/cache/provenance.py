"""provenance.json: who made a cache, from where, how fast. For people, and for commands that repeat the dump; never trusted."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softcache.cache.dump_folder import work_folder
from softcache.cache.schema import PROVENANCE
from softcache.errors import DamagedCacheError
from softcache.files.inside import read_inside

MAX_BYTES = 2**20


def provenance_path(path: Path, round_number: int = 0) -> Path:
    """Where a round tells of itself: the first beside the manifest, extensions in their work folders."""
    return (path if round_number == 0 else work_folder(path, round_number)) / PROVENANCE


def read_provenance(path: Path, round_number: int = 0) -> dict[str, Any]:
    """What it says, as an object of strings, numbers and one object `command`; empty where it is gone or is no such thing."""
    relative = str(provenance_path(path, round_number).relative_to(path))
    try:
        told = json.loads(read_inside(path, relative, MAX_BYTES))
    except (FileNotFoundError, DamagedCacheError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("command"), dict) else {}


def told_data(path: Path) -> str | None:
    """The transfer set that the dump was given."""
    data = read_provenance(path).get("command", {}).get("data")
    return data if isinstance(data, str) else None


def told_of_copies(command: Mapping[str, Any], started: float, records: int) -> dict[str, Any]:
    """What is told of a cache whose records are copies of other caches'.

    Args:
        command: what was asked for.
        started: by the monotonic clock.
        records: how many were copied by this process.
    """
    seconds = time.monotonic() - started
    return {
        "command": dict(command),
        "host": platform.node(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "views_per_s": round(records / max(1e-9, seconds), 1),
        "python": platform.python_version(),
    }

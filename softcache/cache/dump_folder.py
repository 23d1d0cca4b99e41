"""The folder of a dump under way: its plan, and the journals of its parts. Nothing here is needed once it is committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.cache.canonical import canonical_json
from softcache.cache.file_entry import StoredFile
from softcache.cache.plan import Plan
from softcache.cache.schema import WORK
from softcache.cache.strict_json import JOURNALED, MAX_BYTES, PLANNED, check_shape, read_canonical, read_shape
from softcache.errors import DamagedCacheError
from softcache.files.durable import explained
from softcache.files.inside import read_inside

PLAN = "plan.json"
MAX_JOURNAL_BYTES = 2**32  # a hundred thousand parts take some hundred MB


@dataclass(frozen=True)
class Planned:
    """What a dump fixed before its first row.

    Attributes:
        plan: of the whole cache as it will be; its last round is the one being written.
        base: id of the manifest that is extended; None for a new cache.
        files: written with the plan: samples, probe, constants of new members.
    """

    plan: Plan
    base: str | None
    files: Sequence[StoredFile]

    def to_bytes(self) -> bytes:
        files = [file.to_json() for file in self.files]
        return canonical_json({"plan": self.plan.to_json(), "base": self.base, "files": files})


def work_folder(path: Path, round_number: int) -> Path:
    """Where the round keeps plan, journals and locks: `dump/`, and `dump/extend-N/` for the N-th extension."""
    return path / WORK if round_number == 0 else path / WORK / f"extend-{round_number}"


def read_planned(path: Path, round_number: int) -> Planned | None:
    """The plan of a round of the cache in `path`; None when it has not been made yet."""
    work = work_folder(path, round_number)
    file, data = work / PLAN, _read(path, work / PLAN)
    if data is None:
        return None
    try:
        entry = read_canonical(data)
        check_shape(entry, PLANNED[_version(entry)])
        return Planned(
            Plan.from_json(entry["plan"]), entry["base"], tuple(StoredFile.from_json(f) for f in entry["files"])
        )
    except ValueError as exc:
        raise DamagedCacheError(f"{file}: is damaged ({exc})", tip="start again with another --out") from None


def _version(entry: Any) -> int:
    """The format of a plan; ValueError where it is none that is written here."""
    plan = entry.get("plan") if isinstance(entry, dict) else None
    found = plan.get("format") if isinstance(plan, dict) else None
    if type(found) is not int or found not in PLANNED:
        raise ValueError(f"plan.format: {str(found)[:20]!r}")
    return found


def _read(path: Path, file: Path, limit: int = MAX_BYTES) -> bytes | None:
    """A file below the cache in `path`; None when it is not there."""
    with explained("read", file):
        try:
            return read_inside(path, file.relative_to(path).as_posix(), limit)
        except (FileNotFoundError, NotADirectoryError):
            return None


def read_journals(path: Path, round_number: int) -> dict[int, list[dict[str, Any]]]:
    """Span number -> its different journal entries, over all parts: one, unless a span was written twice.

    A line torn by a crash is skipped: its span is done again.
    """
    entries: dict[int, list[dict[str, Any]]] = {}
    planned = read_planned(path, round_number)
    if planned is None:
        return entries
    shape = JOURNALED[planned.plan.format]
    for journal in sorted(work_folder(path, round_number).glob("part-*.jsonl")):
        for line in (_read(path, journal, MAX_JOURNAL_BYTES) or b"").split(b"\n"):
            try:
                entry = read_shape(line, shape)
            except ValueError:
                continue
            known = entries.setdefault(entry["span"], [])
            if entry not in known:
                known.append(entry)
    return entries

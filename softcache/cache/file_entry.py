"""What the manifest says about a file: where its data sets lie. Reading needs no more, so nothing here knows HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from softcache.cache.plan import Plan
from softcache.cache.schema import FORMAT_VERSION, PROVISIONAL_FORMAT, ArraySpec, index_path
from softcache.cache.statistics import MemberStatistics


@dataclass(frozen=True)
class StoredArray:
    """Where one data set lies in its file."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ArraySpec("", self.dtype, self.shape).nbytes

    def to_json(self) -> dict[str, Any]:
        return {"offset": self.offset, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class StoredFile:
    """What the manifest, or a list that it names, says about one file: its size, its sha256 and its data sets.

    `checksums` is the sha256 of the checksums that lie in it, and `index` whose positions it holds: of version 2.
    """

    path: str
    kind: str  # "samples", "probe", "views", "constants", "member" or "dense"; "positions", "candidates" or "tokenizer"
    nbytes: int
    sha256: str
    arrays: Mapping[str, StoredArray]
    member: str | None = None
    rows: tuple[int, int] | None = None
    views: tuple[int, int] | None = None
    statistics: MemberStatistics | None = None
    checksums: str | None = None
    index: str | None = None

    @property
    def format(self) -> int:
        """The version of its entry."""
        return FORMAT_VERSION if self.checksums is None else PROVISIONAL_FORMAT

    @property
    def binding(self) -> str:
        """The digest by which a reader knows that it is this file."""
        return self.sha256 if self.checksums is None else self.checksums

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "path": self.path,
            "kind": self.kind,
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
        }
        if self.member is not None:
            entry["member"] = self.member
        if self.rows is not None:
            entry["rows"] = list(self.rows)
        if self.views is not None:
            entry["views"] = list(self.views)
        if self.statistics is not None:
            entry["statistics"] = self.statistics.to_json(self.format)
        if self.checksums is not None:
            entry["checksums"] = self.checksums
        if self.index is not None:
            entry["index"] = self.index
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> StoredFile:
        """Of an entry that has passed the strict reader."""
        arrays = {name: StoredArray(a["offset"], a["dtype"], tuple(a["shape"])) for name, a in entry["arrays"].items()}
        return cls(
            path=entry["path"],
            kind=entry["kind"],
            nbytes=entry["bytes"],
            sha256=entry["sha256"],
            arrays=arrays,
            member=entry.get("member"),
            rows=tuple(entry["rows"]) if "rows" in entry else None,
            views=tuple(entry["views"]) if "views" in entry else None,
            statistics=MemberStatistics.from_json(entry["statistics"]) if "statistics" in entry else None,
            checksums=entry.get("checksums"),
            index=entry.get("index"),
        )


SETUP, VIEWS, MEMBER = "setup", "views", "member"  # whose files a list has


@dataclass(frozen=True)
class FileList:
    """What the manifest says of a list.

    Attributes:
        path, nbytes, sha256: of the list itself.
        round: which wrote it.
        of: "setup", "views" or "member".
        member: whose files it has, where `of` is "member".
        parts: [a, b): of which parts; [0, 0) for "setup".
        files, file_bytes: how many it has, and their bytes.
        statistics: of a member's, over its files.
    """

    path: str
    nbytes: int
    sha256: str
    round: int
    of: str
    member: str | None
    parts: tuple[int, int]
    files: int
    file_bytes: int
    statistics: MemberStatistics | None

    def to_json(self) -> dict[str, Any]:
        entry = {name: value for name, value in vars(self).items() if name not in ("nbytes", "statistics")}
        told = None if self.statistics is None else self.statistics.to_json(PROVISIONAL_FORMAT)
        return entry | {"bytes": self.nbytes, "parts": list(self.parts), "statistics": told}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Of an entry that has passed the strict reader."""
        plain = {name: entry[name] for name in ("path", "sha256", "round", "of", "member", "files", "file_bytes")}
        told = None if entry["statistics"] is None else MemberStatistics.from_json(entry["statistics"])
        return cls(nbytes=entry["bytes"], parts=(entry["parts"][0], entry["parts"][1]), statistics=told, **plain)


def part_of(file: StoredFile) -> int | None:
    """The number of the part that a file belongs to; None for samples, probe, positions and constants."""
    return None if file.rows is None else int(Path(file.path).stem.rpartition("-")[2])


def round_of(plan: Plan, file: StoredFile) -> int:
    """The number of the round that wrote a file."""
    part = part_of(file)
    for number, one in enumerate(plan.rounds):
        if file.index is not None:  # positions: named after their round
            if file.path == index_path(file.index, number):
                return number
        elif part is not None:
            if part < one.layout.first_part + len(one.layout):
                return number
        elif file.member is None or file.member in one.members:
            return number
    raise AssertionError(file.path)

"""What the manifest says about a file: where its data sets lie. Reading needs no more, so nothing here knows HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softcache.cache.schema import ArraySpec
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
    """What the manifest says about one file: its size, its sha256 and its data sets."""

    path: str
    kind: str  # "samples", "probe", "views", "constants", "member" or "dense"
    nbytes: int
    sha256: str
    arrays: Mapping[str, StoredArray]
    member: str | None = None
    rows: tuple[int, int] | None = None
    views: tuple[int, int] | None = None
    statistics: MemberStatistics | None = None

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
        if self.rows is not None and self.views is not None:
            entry |= {"rows": list(self.rows), "views": list(self.views)}
        if self.statistics is not None:
            entry["statistics"] = self.statistics.to_json()
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
        )

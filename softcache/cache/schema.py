"""Names, dtypes and sizes of the on-disk format: FORMAT.md in code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import numpy as np

FORMAT_VERSION = 1

ALIGNMENT = 4096  # bytes; every data set starts on such a border
BLOCK_BYTES = 65536  # one CRC-32 per block of this many bytes of a data set
ROW_UNIT = 256  # rows per shard are a multiple of this
TARGET_SHARDS = 64
MIN_SHARD_ROWS = 1024
MAX_SHARD_BYTES = 256 * 2**20
PROBE_RECORDS = 64

MANIFEST = "manifest.json"
MANIFESTS = "manifests"
PROVENANCE = "provenance.json"
CARD = "README.md"
SAMPLES = "samples.h5"
PROBE = "probe.h5"
WORK = "dump"  # plan, journals and locks of the dump that made the cache, and below it of every extension

CRC_SUFFIX = "_crc32"

MEMBER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
ARRAY_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class ArraySpec:
    """One data set of a shard: its name, its little-endian NumPy dtype string and its full shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * prod(self.shape))

    @property
    def checksums(self) -> ArraySpec:
        """The CRC-32 data set that stands beside this one."""
        blocks = -(-self.nbytes // BLOCK_BYTES)
        return ArraySpec(self.name + CRC_SUFFIX, "<u4", (blocks,))


@dataclass(frozen=True)
class Span:
    """Rows [row_start, row_stop) of views [view_start, view_stop): what one shard of a member holds."""

    index: int
    row_start: int
    row_stop: int
    view_start: int
    view_stop: int

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def views(self) -> int:
        return self.view_stop - self.view_start


@dataclass(frozen=True)
class Layout:
    """How the rows and views that one round of dumping adds are cut into spans, row ranges outermost.

    Attributes:
        num_rows: of the whole cache.
        num_views: of this round.
        shard_rows: rows of a full span, a multiple of 256; the last one may be shorter.
        shard_views: views of a full span.
        first_view: the round's views are [first_view, first_view + num_views).
        first_part: number of its first span; earlier rounds have the smaller ones.
    """

    num_rows: int
    num_views: int
    shard_rows: int
    shard_views: int
    first_view: int = 0
    first_part: int = 0

    @property
    def row_ranges(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    @property
    def view_ranges(self) -> int:
        return -(-self.num_views // self.shard_views)

    def __len__(self) -> int:
        return self.row_ranges * self.view_ranges

    def spans(self) -> list[Span]:
        """In the order of their numbers."""
        return [self._span(index) for index in range(len(self))]

    def _span(self, index: int) -> Span:
        rows, views = divmod(index, self.view_ranges)
        return Span(
            self.first_part + index,
            rows * self.shard_rows,
            min((rows + 1) * self.shard_rows, self.num_rows),
            self.first_view + views * self.shard_views,
            self.first_view + min((views + 1) * self.shard_views, self.num_views),
        )


def plan_layout(
    num_rows: int,
    num_views: int,
    num_members: int,
    record_bytes: int,
    *,
    shard_rows: int | None = None,
    first_view: int = 0,
    first_part: int = 0,
) -> Layout:
    """The layout that gives about 64 shards for the whole dump, from the plan's totals alone.

    Args:
        num_rows: samples.
        num_views: views per sample.
        num_members: ensemble members; each has a shard of its own per span.
        record_bytes: bytes of one record of the largest member.
        shard_rows: overrides the derived number (rounded up to a multiple of 256).
        first_view, first_part: where a round that extends a cache begins.

    Returns:
        At least 1,024 rows a span (fewer only where the set is smaller), at most 256 MiB a shard; views of one row range
        share a shard while they fit.
    """

    def round_up(rows: int) -> int:
        return max(1, -(-rows // ROW_UNIT)) * ROW_UNIT

    if shard_rows is not None:
        rows = round_up(shard_rows)
    else:
        rows = max(MIN_SHARD_ROWS, round_up(-(-num_rows * num_members // TARGET_SHARDS)))
        fitting = MAX_SHARD_BYTES // max(1, record_bytes * num_views) // ROW_UNIT * ROW_UNIT
        rows = min(rows, max(fitting, MIN_SHARD_ROWS))
    views = min(num_views, max(1, MAX_SHARD_BYTES // max(1, record_bytes * rows)))
    if shard_rows is None and record_bytes * rows > MAX_SHARD_BYTES:  # one view of 1,024 rows is too large: fewer rows
        rows = max(ROW_UNIT, MAX_SHARD_BYTES // record_bytes // ROW_UNIT * ROW_UNIT)
    return Layout(num_rows, num_views, rows, views, first_view, first_part)


def member_shard_path(member: str, index: int) -> str:
    return f"members/{member}/part-{index:05d}.h5"


def view_shard_path(index: int) -> str:
    return f"views/part-{index:05d}.h5"


def dense_shard_path(member: str, index: int) -> str:
    return f"members/{member}/dense-{index:05d}.h5"


def constants_path(member: str) -> str:
    return f"members/{member}/constants.h5"

"""Names, dtypes and sizes of the on-disk format: FORMAT.md in code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

FORMAT_VERSION = 1  # of what is written where nothing of version 2 is used
PROVISIONAL_FORMAT = 2  # may still change: readers say so
FORMATS = (FORMAT_VERSION, PROVISIONAL_FORMAT)

ALIGNMENT = 4096  # bytes; every data set starts on such a border
BLOCK_BYTES = 65536  # one CRC-32 per block of this many bytes of a data set
ROW_UNIT = 256  # rows per shard are a multiple of this
TARGET_SHARDS = 64
MIN_SHARD_ROWS = 1024
MAX_SHARD_BYTES = 256 * 2**20
MAX_PART_BYTES = 2**30  # of version 2: of a part of more than one row of one view
MAX_LIST_BYTES = 16 * 2**20  # of one file list
LIST_BYTES = 2**20  # of one that is written here: a reader reads whole lists
PROBE_RECORDS = 64

MANIFEST = "manifest.json"
MANIFESTS = "manifests"
PROVENANCE = "provenance.json"
CARD = "README.md"
SAMPLES = "samples.h5"
PROBE = "probe.h5"
CANDIDATES = "candidates.h5"
TOKENIZER = "tokenizer.json"
PULLING = "pull.json"  # what is being pulled into a folder; gone once all is there
MERGING = "merge.json"  # below WORK: which caches are being merged; gone once all is there
WORK = "dump"  # plan, journals and locks of the dump that made the cache, and below it of every extension

CRC_SUFFIX = "_crc32"
OUTPUT_PREFIX = "output_"  # of constants: the scale of an output without classes

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

    def part(self, row: int, view: int) -> int:
        """The number of the part that holds a row in a view of this round."""
        ranges = (view - self.first_view) // self.shard_views
        return self.first_part + row // self.shard_rows * self.view_ranges + ranges

    def parts(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The same of (B,) rows and views."""
        found: np.ndarray = self.first_part + rows // self.shard_rows * self.view_ranges
        return found + (views - self.first_view) // self.shard_views

    def spans(self) -> list[Span]:
        """In the order of their numbers."""
        return [self.span(index) for index in range(len(self))]

    def span(self, index: int) -> Span:
        """Its span number `index`, counted from 0."""
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
    format: int = FORMAT_VERSION,
) -> Layout:
    """The layout that gives about 64 shards for the whole dump, from the plan's totals alone.

    Args:
        num_rows: samples.
        num_views: views per sample.
        num_members: ensemble members; each has a shard of its own per span.
        record_bytes: bytes of one record of the largest member.
        shard_rows: overrides the derived number (rounded up to a multiple of 256).
        first_view, first_part: where a round that extends a cache begins.
        format: of version 2 fewer than 256 rows of large records are a part.

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
    if format != FORMAT_VERSION and shard_rows is None and record_bytes * ROW_UNIT > MAX_SHARD_BYTES:
        rows, views = 1 << max(0, (MAX_SHARD_BYTES // record_bytes).bit_length() - 1), 1
    return Layout(num_rows, num_views, rows, views, first_view, first_part)


def fit_layout(layout: Layout, part_bytes: Callable[[Span], int]) -> Layout:
    """The same with smaller parts, as far as one of several rows or views would have more than 1 GiB; of version 2.

    Args:
        part_bytes: of the largest member's data sets in a part.
    """
    while any(
        span.rows * span.views > 1 and part_bytes(span) > MAX_PART_BYTES for span in layout.spans()
    ):  # a step makes most parts half as large
        if layout.shard_views > 1:
            layout = replace(layout, shard_views=-(-layout.shard_views // 2))
        else:
            half = layout.shard_rows // 2
            layout = replace(layout, shard_rows=half // ROW_UNIT * ROW_UNIT if half >= ROW_UNIT else half)
    return layout


def layout_of_view(layouts: Sequence[Layout], view: int) -> Layout:
    """The layout that has a view, of those of one member in the order of their views."""
    return next(layout for layout in reversed(layouts) if layout.first_view <= view)


def member_name(wanted: str, taken: Sequence[str]) -> str:
    """A valid member name that is not taken yet: lower case, `-2`, `-3`, ... appended where needed."""
    name = re.sub(r"[^a-z0-9_-]+", "-", wanted.lower()).strip("-_")[:56] or "teacher"
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


def member_shard_path(member: str, index: int) -> str:
    return f"members/{member}/part-{index:05d}.h5"


def view_shard_path(index: int) -> str:
    return f"views/part-{index:05d}.h5"


def dense_shard_path(member: str, index: int) -> str:
    return f"members/{member}/dense-{index:05d}.h5"


def part_path(kind: str, member: str | None, index: int) -> str:
    """Of a file of a part: of the kinds `views`, `member` and `dense`."""
    if member is None:
        return view_shard_path(index)
    return dense_shard_path(member, index) if kind == "dense" else member_shard_path(member, index)


def constants_path(member: str) -> str:
    return f"members/{member}/constants.h5"


def numbered_constants_path(member: str, number: int) -> str:
    """Of version 2, where a member may have several files of constants."""
    return f"members/{member}/constants-{number:05d}.h5"


def index_path(index: str, round_number: int) -> str:
    return f"positions/{index}-r{round_number:05d}.h5"


def list_path(round_number: int, number: int) -> str:
    return f"files-r{round_number:05d}-{number:05d}.json"

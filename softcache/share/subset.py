"""softcache subset: some samples, views and members of a cache as a smaller cache of its own. Read it top to bottom.

Records are copied as they are stored: nothing is rendered, no teacher and no data set is needed, and every target is the
parent's bit for bit. Only what is known of the parts is measured anew, from the stored rows.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from softcache.cache.card import card
from softcache.cache.dump_folder import read_planned
from softcache.cache.manifest import Manifest, known_ids
from softcache.cache.plan import Parent, Plan, Round
from softcache.cache.positions import Positions
from softcache.cache.provenance import told_data, told_of_copies
from softcache.cache.samples import SampleTable
from softcache.cache.schema import ArraySpec, Span
from softcache.cache.write.writer import CacheWriter, Setup
from softcache.data.identity import sample_ids
from softcache.data.join import find_ids
from softcache.data.selection import of_classes, read_keys
from softcache.errors import CacheError, ConfigError, DataError, DumpError, first_offenders, nearest
from softcache.files.durable import require_room
from softcache.report.progress import Meter
from softcache.share.copy_records import (
    BATCH_LOGITS,
    BATCH_ROWS,
    copy_records,
    measured_of,
    numbers_a_row,
    one_thread,
    span_bytes,
)
from softcache.share.cut_index import array_specs, cut_indexes, indexes_of, layout_of
from softcache.targets.cache import Cache
from softcache.targets.cache import open as open_cache


@dataclass(frozen=True)
class Choice:
    """What of a cache is wanted; what is left empty is wanted whole.

    Attributes:
        views: `A-B`, both included, or one number.
        members: names.
        keep_labels, drop_labels: classes by name, index or range of indices, as for `train` and `eval`.
        samples: a text file of keys, or of ids in hex, one a line.
        without: likewise, of samples that are left out.
    """

    views: str | None = None
    members: Sequence[str] = ()
    keep_labels: Sequence[str] = ()
    drop_labels: Sequence[str] = ()
    samples: Path | None = None
    without: Path | None = None


@dataclass(frozen=True)
class Chosen:
    """The same, found in the cache.

    Attributes:
        rows: (n,) int64 rows of the parent, ascending: the order of the child's.
        first_view, views: the parent's views [first_view, first_view + views).
        members: names, in the parent's order.
    """

    rows: np.ndarray
    first_view: int
    views: int
    members: Sequence[str]


def run(
    path: Path | str, out: Path, choice: Choice, *, id: str | None = None, quiet: bool = False, **how: Any
) -> Manifest:
    """Write the chosen part of the cache in `path` to `out`; goes on with a subset that was interrupted.

    Args:
        path: a folder, or a place as it is written.
        id: of the parent's manifest; None: the newest, or the one that an interrupted subset began with.
        how: as `cut` takes it.

    Raises:
        SoftcacheError: and its children; whatever was finished before stays and is resumed by the same command.
    """
    if isinstance(path, Path):
        _refuse_same_folder(path, out)
    cache = open_cache(path, id=id or begun_with(path, out), quiet=quiet)
    return cut(cache, path, out, choice, quiet=quiet, **how)


def cut(
    cache: Cache,
    path: Path | str,
    out: Path,
    choice: Choice,
    *,
    license: str | None = None,
    quiet: bool = False,
    shard_rows: int | None = None,
    batch_rows: int = BATCH_ROWS,
    batch_logits: int = BATCH_LOGITS,
) -> Manifest:
    """The same of a cache that is open.

    Args:
        path: where it lies, for what is told of the making.
        license: of the child; None: the parent's.
        quiet: no progress.
        shard_rows: of the child's shards; None: as the layout derives them.
        batch_rows, batch_logits: how many of them are held in memory at once.

    Raises:
        SoftcacheError: as `run`.
    """
    started = time.monotonic()
    chosen = choose(cache, choice)
    cut = cut_indexes(cache, chosen.members, chosen.rows, chosen.first_view, chosen.views)
    plan = make_plan(cache, chosen, license, shard_rows, cut)
    layout = plan.rounds[0].layout
    batch = max(1, min(batch_rows, batch_logits // numbers_a_row(plan, cut)))
    setup = Setup(
        cut_samples(cache.samples, chosen.rows),
        cut_probe(cache.reader.probe(), chosen),
        {name: cache.reader.constants(name) for name in chosen.members},
        cut,
        cache.reader.candidates() if any(index.kind == "candidates" for index in plan.indexes) else {},
        cache.reader.tokenizer(),
    )
    indexes = indexes_of(cache, cut, layout)

    def specs_of(span: Span) -> dict[str, list[ArraySpec]]:
        return {name: array_specs(cache, name, span, indexes) for name in chosen.members}

    with CacheWriter(out, plan, lambda: setup) as writer, one_thread():
        spans = writer.my_spans()
        finished = len(plan.rounds[0].layout) - len(spans)
        if finished and spans and not quiet:
            print(f"resuming {out}: {finished} of {finished + len(spans)} spans are there already", file=sys.stderr)
        total = sum(span.rows * span.views for span in spans)
        require_room(out, sum(span_bytes(span, specs_of(span)) for span in spans), "the shards need")
        with Meter(f"subset {out}", total, unit="views", quiet=quiet) as meter:
            for span in spans:
                _write_span(writer, span, specs_of(span), cache, chosen, batch, meter)
        manifest = writer.commit(card, told_of_copies(_asked(path, choice), started, total))
    if manifest is None:
        raise DumpError(f"{out}: some spans are missing", tip="run the same command again")
    return manifest


def choose(cache: Cache, choice: Choice) -> Chosen:
    """What the choice means in this cache.

    Raises:
        ConfigError: views that are not there; samples chosen under a policy that mixes.
        CacheError: a member that is not there.
        DataError: a class or a key that is not there, or no sample left.
    """
    for name in choice.members:
        if name not in cache.members:
            raise CacheError(f"{cache.reader.path}: no member {name!r}", tip=nearest(name, cache.members))
    members = [name for name in cache.members if name in choice.members or not choice.members]
    first, views = _views(choice.views, cache.num_views)
    rows = _rows(cache, choice)
    if len(rows) < len(cache) and cache.policy.mixing is not None:
        raise ConfigError(
            f"{cache.reader.path}: its views are mixed ({cache.policy}) with partners drawn from the whole sample table, so "
            "samples cannot be left out of the cache",
            tip="choose them in training: train --cache on the whole cache with --keep-labels, --drop-labels, --samples or "
            "--without; views and members can be chosen here",
        )
    return Chosen(rows, first, views, members)


def _views(text: str | None, count: int) -> tuple[int, int]:
    """(first, how many) of `A-B` or `A`."""
    if text is None:
        return 0, count
    ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
    if not first <= last < count:
        raise ConfigError(
            f"--views {text}: is no range of this cache's views, 0 to {count - 1}",
            tip="write one contiguous range, both ends included, such as 0-9; or one view, such as 3",
        )
    return first, last - first + 1


def _rows(cache: Cache, choice: Choice) -> np.ndarray:
    """(n,) int64 rows, ascending."""
    table = cache.samples
    wanted = np.ones(len(table), dtype=bool)
    if choice.samples is not None:
        wanted &= _listed(table, choice.samples)
    if choice.without is not None:
        wanted &= ~_listed(table, choice.without)
    if (choice.keep_labels or choice.drop_labels) and any(one.labels for one in cache.manifest.plan.indexes):
        raise ConfigError(
            "--keep-labels and --drop-labels choose samples by their class, and here words have classes",
            tip="--samples FILE and --without FILE choose by key",
        )
    if choice.keep_labels or choice.drop_labels:
        labels = table.labels_of(np.arange(len(table)))
        if choice.keep_labels:
            wanted &= of_classes(labels, cache.class_names, choice.keep_labels)
        if choice.drop_labels:
            wanted &= ~of_classes(labels, cache.class_names, choice.drop_labels)
    if not wanted.any():
        raise DataError(
            f"{cache.reader.path}: none of its {len(table)} samples is selected",
            tip="loosen --keep-labels, --drop-labels, --samples or --without",
        )
    return np.flatnonzero(wanted)


def _listed(table: SampleTable, path: Path) -> np.ndarray:
    """(N,) bool: the rows whose keys, or ids in hex, the file lists."""
    keys = read_keys(path)
    rows = find_ids(table.ids, sample_ids(keys))
    by_id = [place for place in np.flatnonzero(rows < 0) if re.fullmatch("[0-9a-f]{16}", keys[place])]
    rows[by_id] = find_ids(table.ids, np.array([int(keys[place], 16) for place in by_id], np.uint64))
    unknown = [keys[place] for place in np.flatnonzero(rows < 0)]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} of {len(keys)} keys are not in the cache: {first_offenders(unknown, len(unknown))}",
            tip=f"take out these lines, or write the keys as this cache has them, one a line: {table.key(0)!r}",
        )
    listed = np.zeros(len(table), dtype=bool)
    listed[rows] = True
    return listed


def make_plan(
    cache: Cache,
    chosen: Chosen,
    license: str | None,
    shard_rows: int | None = None,
    cut: Mapping[str, Positions] = MappingProxyType({}),
) -> Plan:
    """The child's plan: the parent's, cut, in one round. The writer adds the samples' fingerprint."""
    parent = cache.manifest.plan
    layout = layout_of(cache, chosen.members, len(chosen.rows), chosen.views, cut, shard_rows, parent.format)
    whole = len(chosen.rows) == len(cache)
    return replace(
        parent,
        samples=replace(
            parent.samples, count=len(chosen.rows), order=parent.samples.order if whole else "selected", fingerprint=""
        ),
        views=replace(parent.views, count=chosen.views, first=parent.views.first + chosen.first_view),
        members=tuple(member for member in parent.members if member.name in chosen.members),
        rounds=(Round(layout, tuple(chosen.members), True, parent.made_with, tuple(cut)),),
        indexes=tuple(index for index in parent.indexes if index.name in cut),
        license=parent.license if license is None else license,
        parents=(Parent(cache.id, {name: measured_of(cache.manifest, name) for name in chosen.members}),),
    )


def cut_samples(table: SampleTable, rows: np.ndarray) -> SampleTable:
    """The table of these rows, in their order."""
    key_bytes, offsets = table.key_bytes, table.key_offsets
    if table.has_keys:
        starts, stops = offsets[:-1][rows], offsets[1:][rows]
        keys = np.ascontiguousarray(key_bytes).data
        joined = b"".join(keys[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))
        key_bytes = np.frombuffer(joined, np.uint8)
        offsets = np.concatenate([np.zeros(1, "<u8"), np.cumsum(stops - starts, dtype="<u8")])
    return replace(
        table,
        ids=table.ids[rows],
        labels=table.labels[rows],
        digests=table.digests[rows],
        key_bytes=key_bytes,
        key_offsets=offsets,
        mask_digests=None if table.mask_digests is None else table.mask_digests[rows],
    )


def cut_probe(probe: dict[str, np.ndarray], chosen: Chosen) -> dict[str, np.ndarray]:
    """The probe's records whose rows and views are chosen, numbered as in the child; empty where there are none."""
    if not probe:
        return {}
    rows = find_ids(chosen.rows.astype(np.uint64), probe["rows"])
    views = probe["views"].astype(np.int64) - chosen.first_view
    kept = np.flatnonzero((rows >= 0) & (views >= 0) & (views < chosen.views))
    if not kept.size:
        return {}
    ends = np.cumsum([0, *probe["shapes"].clip(min=1).prod(axis=1, dtype=np.int64)])
    return {
        "rows": rows[kept].astype(np.uint64),
        "views": views[kept].astype(np.uint32),
        "shapes": probe["shapes"][kept],
        "pixels": np.concatenate([probe["pixels"][ends[i] : ends[i + 1]] for i in kept]),
    }


def _write_span(
    writer: CacheWriter,
    span: Span,
    specs: Mapping[str, Sequence[ArraySpec]],
    cache: Cache,
    chosen: Chosen,
    batch: int,
    meter: Meter,
) -> None:
    """Every record of a part, in the parent's own order of rows."""
    wanted: list[tuple[str | None, str]] = [(None, name) for name in cache.manifest.plan.views.digests]
    wanted += [(member, name) for member in chosen.members for name in cache.reader.array_kinds(member)]
    with writer.span(span, specs) as out:
        for view in range(span.view_start, span.view_stop):
            rows = chosen.rows[span.row_start : span.row_stop]
            cache.reader.will_read(wanted, rows, np.full(len(rows), chosen.first_view + view))
            for start in range(span.row_start, span.row_stop, batch):
                rows = chosen.rows[start : min(start + batch, span.row_stop)]
                views = np.full(len(rows), chosen.first_view + view)
                digests = cache.manifest.plan.views.digests
                out.append(None, {name: cache.reader.gather(None, name, rows, views) for name in digests})
                for name in chosen.members:
                    copy_records(out, name, cache, rows, views)
                meter.add(len(rows))


def _refuse_same_folder(path: Path, out: Path) -> None:
    parent, child = path.resolve(), out.resolve()
    if child.is_relative_to(parent):
        raise ConfigError(
            f"{out}: lies in the cache itself, which is never changed", tip="choose another folder for OUT"
        )


def begun_with(path: Path | str, out: Path) -> str | None:
    """The id that an interrupted subset in `out` took its records from, where this cache has it."""
    planned = read_planned(out, 0) if out.is_dir() else None
    before = planned.plan.parent if planned else None
    return before.id if before and (isinstance(path, str) or before.id in known_ids(path)) else None


def _asked(path: Path | str, choice: Choice) -> dict[str, Any]:
    """The command, for provenance.json."""
    command = {name: str(value) if isinstance(value, Path) else value for name, value in vars(choice).items()}
    return {"cache": str(path), **command, "data": None if isinstance(path, str) else told_data(path)}

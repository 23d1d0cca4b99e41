"""Caches of different samples of the same teachers as one: their rows one after the other, each record as it is stored."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.card import card
from softcache.cache.manifest import Manifest
from softcache.cache.plan import Parent, Plan, Round
from softcache.cache.plan_rules import width_of
from softcache.cache.positions import Positions, build_positions, cut_positions
from softcache.cache.provenance import told_of_copies
from softcache.cache.samples import SampleTable
from softcache.cache.schema import OUTPUT_PREFIX, PROBE_RECORDS, PROVISIONAL_FORMAT, ArraySpec, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Setup
from softcache.errors import CacheError, DumpError
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
from softcache.share.cut_index import array_specs, indexes_of, layout_of
from softcache.share.merge_rules import (
    matched_members,
    refuse_unlike,
    refuse_unlike_constants,
    shared_fields,
)
from softcache.targets.cache import Cache

Names = Sequence[Mapping[str, str]]  # of each cache: its names of members -> the first one's


def check(caches: Sequence[Cache]) -> Names:
    """CacheError, naming the first field that differs, unless the caches are of the same teachers, stored alike."""
    first = caches[0]
    one, names = first.manifest.plan, [{name: name for name in first.members}]
    _check_alone(first)
    for cache in caches[1:]:
        a, b, other = first.reader.path, cache.reader.path, cache.manifest.plan
        refuse_unlike(a, b, shared_fields(one, other))
        refuse_unlike(a, b, [("samples.has_keys", one.samples.has_keys, other.samples.has_keys)])
        refuse_unlike(
            a, b, [(f"views.{n}", getattr(one.views, n), getattr(other.views, n)) for n in ("first", "count")]
        )
        refuse_unlike(a, b, [("made_with.autocast", _made_with(one, "autocast"), _made_with(other, "autocast"))])
        names.append(matched_members(a, b, one, other))
        for theirs, ours in names[-1].items():
            refuse_unlike_constants(first, ours, cache, theirs)
    return names


def _check_alone(cache: Cache) -> None:
    """CacheError where samples of such a cache are merged with no others; the others are known to be like it."""
    path = cache.reader.path
    if cache.policy.mixing is not None:
        raise CacheError(
            f"{path}: cannot be merged with other samples: its views are mixed ({cache.policy}) with partners among its own, and "
            "in the merged cache a sample would have another partner",
            tip="dump all samples at once, or without the step that mixes",
        )
    for index in cache.manifest.plan.indexes:
        if index.kind == "candidates":
            raise CacheError(
                f"{path}: cannot be merged with other samples: index {index.name!r} is of candidates, whose lists are not merged",
                tip="dump all at once",
            )


def _made_with(plan: Plan, what: str) -> str:
    """Of all its rounds."""
    return ", ".join(dict.fromkeys(str(one.made_with[what]) for one in plan.rounds))


def notes_of(caches: Sequence[Cache], names: Names) -> list[str]:
    """What is tolerated, and is to be told: records that were made otherwise, and what whitens no more."""
    notes = []
    for what in caches[0].manifest.plan.made_with:
        told = [_made_with(cache.manifest.plan, what) for cache in caches]
        if len(set(told)) > 1:
            each = ", ".join(f"{one} in {cache.reader.path}" for one, cache in zip(told, caches, strict=True))
            notes.append(f"the records were made with different {what.replace('_', ' ')}: {each}")
    for name in caches[0].members:
        theirs = [next(b for b, a in of_cache.items() if a == name) for of_cache in names]
        constants = [cache.reader.constants(one) for cache, one in zip(caches, theirs, strict=True)]
        whitens = OUTPUT_PREFIX + "whitening"
        if any(whitens in found for found in constants) and whitens not in pooled_scale(
            constants, list(map(len, caches))
        ):
            notes.append(
                f"member {name!r}: what whitens it (--whiten) is left out, since each cache has its own; a mean and a deviation "
                "of the whole are there, for scale=member and scale=each"
            )
    return notes


def write(
    caches: Sequence[Cache],
    names: Names,
    out: Path,
    license: str | None,
    command: Mapping[str, Any],
    *,
    started: float,
    quiet: bool,
    shard_rows: int | None = None,
) -> Manifest:
    """The merged cache in `out`; goes on with one that was interrupted.

    Args:
        names: from `check`.
        command: what was asked for; `started`: when, by the monotonic clock.
        shard_rows: of its shards; None: as the layout derives them.
    """
    first, members = caches[0], caches[0].members
    cut = _positions(caches)
    plan = _plan(caches, names, license, cut, shard_rows)
    layout = plan.rounds[0].layout
    indexes = indexes_of(first, cut, layout)
    batch = max(1, min(BATCH_ROWS, BATCH_LOGITS // numbers_a_row(plan, cut)))

    def specs_of(span: Span) -> dict[str, list[ArraySpec]]:
        return {name: array_specs(first, name, span, indexes) for name in members}

    with CacheWriter(out, plan, lambda: _setup(caches, names, cut)) as writer, one_thread():
        spans = writer.my_spans()
        if len(spans) < len(layout) and spans and not quiet:
            print(
                f"resuming {out}: {len(layout) - len(spans)} of {len(layout)} spans are there already", file=sys.stderr
            )
        require_room(out, sum(span_bytes(span, specs_of(span)) for span in spans), "the shards need")
        total = sum(span.rows * span.views for span in spans)
        with Meter(f"merge {out}", total, unit="views", quiet=quiet) as meter:
            for span in spans:
                _write_span(writer, span, specs_of(span), caches, names, batch, meter)
        manifest = writer.commit(card, told_of_copies(command, started, total))
    if manifest is None:
        raise DumpError(f"{out}: some spans are missing", tip="run the same command again")
    return manifest


def _plan(
    caches: Sequence[Cache], names: Names, license: str | None, cut: Mapping[str, Positions], shard_rows: int | None
) -> Plan:
    """Of version 2, in one round. The writer adds the samples' fingerprint."""
    first, count = caches[0], sum(map(len, caches))
    plan = first.manifest.plan
    layout = layout_of(first, first.members, count, plan.views.count, cut, shard_rows, PROVISIONAL_FORMAT)
    sources = dict.fromkeys(cache.manifest.plan.samples.source for cache in caches)
    samples = replace(
        plan.samples, source=" + ".join(sources), count=count, fingerprint="", order="merged", order_seed="0"
    )
    members = tuple(
        replace(one, width=0 if one.output is None else width_of(one, plan)) for one in plan.members
    )  # version 1 does not say it
    parents, counted = [], set[str]()
    for cache, of_cache in zip(caches, names, strict=True):
        told, before = cache.manifest, {one.id for one in cache.manifest.plan.parents}
        again = bool(before & counted)  # what was measured when they were one cache is counted once
        counted |= before
        statistics = {b: MemberStatistics() if again else measured_of(told, a) for a, b in of_cache.items()}
        parents.append(Parent(cache.id, statistics))
    return replace(
        plan,
        format=PROVISIONAL_FORMAT,
        samples=samples,
        members=members,
        rounds=(Round(layout, tuple(first.members), True, plan.made_with, tuple(cut)),),
        license=license,
        parents=tuple(parents),
    )


def _setup(caches: Sequence[Cache], names: Names, cut: Mapping[str, Positions]) -> Setup:
    first = caches[0]
    constants = {name: first.reader.constants(name) for name in first.members}
    for name, found in constants.items():
        theirs = [
            cache.reader.constants(next(b for b, a in of_cache.items() if a == name))
            for cache, of_cache in zip(caches, names, strict=True)
        ]
        kept = {key: value for key, value in found.items() if not key.startswith(OUTPUT_PREFIX)}
        constants[name] = kept | pooled_scale(theirs, [len(cache) for cache in caches])
    probes = [cache.reader.probe() for cache in caches]
    tables = [cache.samples for cache in caches]
    return Setup(joined_samples(tables), joined_probes(probes, tables), constants, cut, {}, first.reader.tokenizer())


def joined_samples(tables: Sequence[SampleTable]) -> SampleTable:
    """All rows, table after table."""
    first = tables[0]
    offsets = first.key_offsets
    if first.has_keys:
        sizes = np.concatenate([np.diff(table.key_offsets) for table in tables])
        offsets = np.concatenate([np.zeros(1, "<u8"), np.cumsum(sizes, dtype="<u8")])
    masks = [table.mask_digests for table in tables if table.mask_digests is not None]
    return replace(
        first,
        ids=np.concatenate([table.ids for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
        digests=np.concatenate([table.digests for table in tables]),
        key_bytes=np.concatenate([table.key_bytes for table in tables]),
        key_offsets=offsets,
        mask_digests=np.concatenate(masks) if masks else None,
    )


def joined_probes(probes: Sequence[Mapping[str, np.ndarray]], tables: Sequence[SampleTable]) -> dict[str, np.ndarray]:
    """The records of all probes with the rows that they have now; where these are too many, evenly spread ones."""
    starts = np.cumsum([0, *map(len, tables)])
    rows, views, shapes, pixels = [], [], [], []
    for probe, start in zip(probes, starts.tolist(), strict=False):
        ends = np.cumsum([0, *probe["shapes"].clip(min=1).prod(axis=1, dtype=np.int64)]) if probe else np.zeros(1, int)
        for number in range(len(ends) - 1):
            rows.append(int(probe["rows"][number]) + start)
            views.append(int(probe["views"][number]))
            shapes.append(probe["shapes"][number])
            pixels.append(probe["pixels"][ends[number] : ends[number + 1]])
    count = min(PROBE_RECORDS, len(rows))
    kept = [number * len(rows) // count for number in range(count)]
    if not kept:
        return {}
    return {
        "rows": np.array([rows[number] for number in kept], np.uint64),
        "views": np.array([views[number] for number in kept], np.uint32),
        "shapes": np.stack([shapes[number] for number in kept]),
        "pixels": np.concatenate([pixels[number] for number in kept]),
    }


def pooled_scale(constants: Sequence[Mapping[str, np.ndarray]], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Mean and deviation over the rows of all caches, from those of each, by its number of samples; empty without them.

    What whitens is the first one's where it is the same in all, and else left out: a matrix for other numbers whitens nothing.
    """
    mean_of, deviation_of, whitening_of = (OUTPUT_PREFIX + name for name in ("mean", "deviation", "whitening"))
    if not all(mean_of in found and deviation_of in found for found in constants):
        return {}
    share = np.array(counts, np.float64)[:, None] / sum(counts)
    means, deviations = (
        np.stack([found[name] for found in constants]).astype(np.float64) for name in (mean_of, deviation_of)
    )
    mean = (share * means).sum(axis=0)
    variance = (share * (deviations**2 + (means - mean) ** 2)).sum(axis=0)
    pooled = {mean_of: mean.astype("<f4"), deviation_of: np.sqrt(variance).astype("<f4")}
    whitening = [found.get(whitening_of) for found in constants]
    if whitening[0] is not None and all(one is not None and np.array_equal(one, whitening[0]) for one in whitening):
        pooled[whitening_of] = whitening[0]
    return pooled


def _positions(caches: Sequence[Cache]) -> dict[str, Positions]:
    """Index -> the positions of all rows, cache after cache in each view."""
    found = {}
    for index in caches[0].manifest.plan.indexes:
        each = [
            cut_positions(cache.reader.index(index.name), np.arange(len(cache)), 0, cache.num_views) for cache in caches
        ]
        found[index.name] = joined_positions(each)
    return found


def joined_positions(each: Sequence[Positions]) -> Positions:
    """The rows of all, in each view one cache after the other."""
    views = max(len(one.offsets) for one in each)  # 1 where all views of every cache agree

    def over_views(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, (views, *values.shape[1:]))

    def per_position(name: str) -> np.ndarray | None:
        if getattr(each[0], name) is None:
            return None
        pieces = []
        for view in range(views):
            for one in each:
                at = view if len(one.offsets) > 1 else 0
                pieces.append(getattr(one, name)[int(one.offsets[at, 0]) : int(one.offsets[at, -1])])
        return np.concatenate(pieces)

    return build_positions(
        np.concatenate([over_views(one.lengths) for one in each], axis=1),
        counts=np.concatenate([over_views(one.counts()) for one in each], axis=1),
        shapes=None
        if each[0].shapes is None
        else np.concatenate([over_views(one.shapes) for one in each if one.shapes is not None], axis=1),
        listed=per_position("listed"),
        labels=per_position("labels"),
    )


def _write_span(
    writer: CacheWriter,
    span: Span,
    specs: Mapping[str, Sequence[ArraySpec]],
    caches: Sequence[Cache],
    names: Names,
    batch: int,
    meter: Meter,
) -> None:
    """Every record of a part."""
    with writer.span(span, specs) as out:
        for view in range(span.view_start, span.view_stop):
            for number, rows in _batches(span, [len(cache) for cache in caches], batch):
                cache, views = caches[number], np.full(len(rows), view)
                digests = cache.manifest.plan.views.digests
                out.append(None, {name: cache.reader.gather(None, name, rows, views) for name in digests})
                for theirs, ours in names[number].items():
                    copy_records(out, theirs, cache, rows, views, called=ours)
                meter.add(len(rows))


def _batches(span: Span, counts: Sequence[int], batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a cache, rows of it) of the rows of a part, in order; a batch never crosses from one cache into the next."""
    start = 0
    for number, count in enumerate(counts):
        first, stop = max(span.row_start, start), min(span.row_stop, start + count)
        for begin in range(first, stop, batch):
            yield number, np.arange(begin, min(begin + batch, stop)) - start
        start += count

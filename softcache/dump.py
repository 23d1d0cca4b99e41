"""The dump recipe: teachers x views x transfer set -> cache. Read it top to bottom.

transfer set -> views -> loader -> every teacher -> codec, on the device -> shards -> manifest
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import softcache
from softcache.cache.card import card
from softcache.cache.manifest import Manifest, MemberInfo, Plan, SampleInfo, ViewInfo
from softcache.cache.samples import SampleTable, build_table, seeded_order
from softcache.cache.schema import ArraySpec, Span, plan_layout
from softcache.cache.shard import HDF5_VERSION
from softcache.cache.writer import CacheWriter, Part, planned_threads
from softcache.codecs import Codec, make_codec
from softcache.config import DumpConfig, parse_part, split_term
from softcache.data.identity import check_unique, sample_ids
from softcache.data.loading import LoadedBatch, Pair, ViewedSet, load_batches
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy, make_step
from softcache.encode import Encoded, encode
from softcache.errors import ConfigError, DataError, DumpError, ModelError, first_offenders
from softcache.machine import autocast_dtype, describe_device, pick_device, pick_threads, pick_workers
from softcache.progress import DumpProgress
from softcache.teacher import Teacher, open_teacher

CHECKED_SAMPLES = 64  # of the first batch, which is run twice


@dataclass(frozen=True)
class DumpResult:
    """What a dump left behind: the manifest, or None while other parts are still missing."""

    path: Path
    manifest: Manifest | None
    samples_per_s: float
    wait_share: float  # of the time, spent waiting for the loader


def run(config: DumpConfig, *, quiet: bool = False) -> DumpResult:
    """Run the teachers once over the transfer set and commit the cache; resumes a dump that was interrupted.

    Raises:
        SoftcacheError: and its children; whatever was finished before stays and is resumed by the same command.
    """
    started = time.monotonic()
    device = pick_device(config.device)
    threads = pick_threads(config.threads if config.threads is not None else planned_threads(Path(config.out)))
    torch.set_num_threads(threads)
    part = _part(config)

    transfer_set = open_transfer_set(config.data, **config.selection())
    ids = sample_ids(transfer_set.keys)
    check_unique(transfer_set.keys, ids)
    count = len(transfer_set)
    natural = config.order == "natural"
    order = np.arange(count) if natural else seeded_order(count, config.order_seed)
    policy = Policy(tuple(make_step(*split_term(step, "--policy")) for step in config.policy), config.view_seed)
    for flag, value in (("batch-size", config.batch_size), ("shard-rows", config.shard_rows)):
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    if config.views < 1:
        raise ConfigError(f"--views {config.views}: at least one view is needed")
    if config.views > 1 and not policy.is_random:
        raise ConfigError(
            f"--views {config.views}, but every view of this policy is the same ({policy})",
            tip="add a random step such as --policy crop_flip, or leave --views out",
        )

    viewed = ViewedSet(transfer_set, policy, ())
    first_item, _ = viewed.render(int(order[0]), 0)
    teachers = _open_teachers(config, transfer_set, first_item, device)
    codec = make_codec(config.codec)
    for teacher in teachers:
        _check_first_batch(teacher, viewed, order)

    plan = _plan(config, transfer_set, policy, teachers, codec, device, threads)
    workers = pick_workers(config.workers, device)

    def make_samples() -> SampleTable:
        digests = _content_digests(transfer_set, workers=workers, quiet=quiet)
        return build_table(
            transfer_set.keys,
            ids,
            transfer_set.labels,
            digests,
            transfer_set.num_classes,
            order,
            store_keys=not config.no_keys,
        )

    with CacheWriter(Path(config.out), plan, make_samples, part=part) as writer:
        _check_same_samples(writer.samples, ids[order], transfer_set, order)
        spans = writer.my_spans()
        finished = len(plan.layout) - len(spans)
        if finished and spans and not quiet and part.count == 1:
            print(f"resuming {config.out}: {finished} of {len(plan.layout)} spans are there already", file=sys.stderr)
        clock = DumpProgress(writer, sum(span.rows * span.views for span in spans), quiet=quiet)
        _write_spans(writer, spans, transfer_set, policy, order, teachers, codec, config.batch_size, workers, clock)
        for teacher in teachers:
            teacher.check_at_end()
        manifest = writer.commit(card, _provenance(config, started, clock))
        if manifest is None and part.count == 1:
            raise DumpError(f"{config.out}: some spans are missing", tip="run the same command again")
        return DumpResult(Path(config.out), manifest, clock.samples_per_s, clock.wait_share)


def _write_spans(
    writer: CacheWriter,
    spans: Sequence[Span],
    transfer_set: TransferSet,
    policy: Policy,
    order: np.ndarray,
    teachers: Sequence[Teacher],
    codec: Codec,
    batch_size: int,
    workers: int,
    clock: DumpProgress,
) -> None:
    """Every batch of every span, through every teacher, into its shards. A batch never crosses a span's border."""
    viewed = ViewedSet(transfer_set, policy, [teacher.collate for teacher in teachers], digests=True)
    pairs = [_pairs(span, order, batch_size) for span in spans]
    pinned = teachers[0].device.type == "cuda"
    loaded = load_batches(viewed, (batch for span in pairs for batch in span), workers=workers, pin_memory=pinned)
    row_of = np.empty(len(order), np.int64)
    row_of[order] = np.arange(len(order))
    for span in spans:
        with writer.span(span, {t.name: _array_specs(codec, span, t.num_classes) for t in teachers}) as out:
            pending: list[Encoded] = []  # the previous batch, copied to the host while the device computes the next
            for _ in range(-(-span.rows // batch_size) * span.views):
                batch = clock.wait_for(loaded)
                rows = row_of[batch.index]
                _check_unchanged(writer.samples, rows, batch)
                out.append(None, {"pixel_digests": batch.pixel_digests})
                encoded = [
                    encode(teacher, codec, inputs, transfer_set.labels[batch.index], writer.samples, rows)
                    for teacher, inputs in zip(teachers, batch.inputs, strict=True)
                ]
                for done in pending:
                    done.append_to(out)
                pending = encoded
                clock.count(len(rows))
            for done in pending:
                done.append_to(out)


def _pairs(span: Span, order: np.ndarray, batch_size: int) -> Iterator[list[Pair]]:
    """(index, view) of the span's records in stored order: view by view, row by row."""
    for view in range(span.view_start, span.view_stop):
        for start in range(span.row_start, span.row_stop, batch_size):
            yield [(int(i), view) for i in order[start : min(start + batch_size, span.row_stop)]]


def _array_specs(codec: Codec, span: Span, num_classes: int) -> list[ArraySpec]:
    arrays = codec.arrays(num_classes).items()
    return [ArraySpec(name, dtype, (span.views, span.rows, *tail)) for name, (dtype, tail) in arrays]


def _open_teachers(
    config: DumpConfig, transfer_set: TransferSet, first_item: Any, device: torch.device
) -> list[Teacher]:
    shape = None if isinstance(first_item, str) else tuple(getattr(first_item, "shape", ())) or None
    teachers: list[Teacher] = []
    for text in config.teacher:
        teachers.append(
            open_teacher(
                text,
                taken=[t.name for t in teachers],
                num_classes=transfer_set.num_classes,
                class_names=transfer_set.class_names,
                multi_label=transfer_set.multi_label,
                input_shape=shape,
                device=str(device),
                autocast=autocast_dtype(config.autocast),
            )
        )
    for teacher, text in zip(teachers, config.teacher, strict=True):
        if not teacher.has_weights:
            raise ModelError(
                f"teacher {text!r} has no weights: its logits would be random numbers",
                tip=f"write {text}@WEIGHTS, or name a run folder",
            )
    return teachers


def _check_first_batch(teacher: Teacher, viewed: ViewedSet, order: np.ndarray) -> None:
    indices = [int(i) for i in order[:CHECKED_SAMPLES]]
    items = [viewed.render(i, 0)[0] for i in indices]
    teacher.check_first_batch(teacher.collate(items))


def _plan(
    config: DumpConfig,
    transfer_set: TransferSet,
    policy: Policy,
    teachers: Sequence[Teacher],
    codec: Codec,
    device: torch.device,
    threads: int,
) -> Plan:
    """Everything that is fixed before the first row; the transfer set's fingerprint is added by the writer."""
    import PIL
    import torchvision

    num_classes = transfer_set.num_classes
    record = sum(
        int(np.dtype(dtype).itemsize * np.prod(tail, dtype=np.int64))
        for dtype, tail in codec.arrays(num_classes).values()
    )
    return Plan(
        samples=SampleInfo(
            source=transfer_set.name,
            count=len(transfer_set),
            fingerprint="",
            digest_kind=transfer_set.digest_kind,
            has_keys=not config.no_keys,
            multi_label=transfer_set.multi_label,
            order=config.order,
            order_seed=str(config.order_seed),
        ),
        class_names=tuple(transfer_set.class_names),
        views=ViewInfo(config.views, str(config.view_seed), "derived", policy.to_json()),
        members=tuple(
            MemberInfo(
                name=teacher.name,
                model=teacher.model_spec,
                fingerprint=teacher.fingerprint or "",
                output=teacher.output,
                compute_dtype=teacher.compute_dtype,
                class_order=teacher.class_order,
                codec={"name": codec.name, "parameters": {}},
            )
            for teacher in teachers
        ),
        layout=plan_layout(len(transfer_set), config.views, len(teachers), record, shard_rows=config.shard_rows),
        made_with={
            "softcache": softcache.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "hdf5": HDF5_VERSION,
            "device": describe_device(device),
            "batch_size": config.batch_size,
            "threads": threads,
            "autocast": config.autocast,
        },
    )


def _content_digests(transfer_set: TransferSet, *, workers: int, quiet: bool) -> np.ndarray:
    """(N, 16) uint8 digests of what every sample holds, read once before the first row is written."""
    count = len(transfer_set)
    viewed = ViewedSet(transfer_set, Policy(), (), digests=True)
    pairs = ([(i, 0) for i in range(start, min(start + 1024, count))] for start in range(0, count, 1024))
    digests = np.empty((count, 16), np.uint8)
    with tqdm(total=count, unit="sample", desc="reading samples", disable=quiet, leave=False) as bar:
        for batch in load_batches(viewed, pairs, workers=workers):
            assert batch.content_digests is not None
            digests[batch.index] = batch.content_digests
            bar.update(len(batch.index))
    return digests


def _check_same_samples(table: SampleTable, ids: np.ndarray, transfer_set: TransferSet, order: np.ndarray) -> None:
    """A resumed dump must see the samples and labels it was planned with."""
    from softcache.cache.samples import pack_labels

    if not np.array_equal(table.ids, ids):
        raise DataError(
            f"{transfer_set.name}: its samples are not the ones this dump was started with",
            tip="restore the data set, or choose another --out",
        )
    where = np.flatnonzero((table.labels != pack_labels(transfer_set.labels)[order]).reshape(len(ids), -1).any(axis=1))
    if where.size:
        raise DataError(
            f"{where.size} labels changed since this dump was started: "
            + first_offenders((table.key(int(r)) for r in where), where.size),
            tip="restore the labels, or choose another --out",
        )


def _check_unchanged(table: SampleTable, rows: np.ndarray, batch: LoadedBatch) -> None:
    """What the teacher is about to see must be what samples.h5 says."""
    where = np.flatnonzero((table.digests[rows] != batch.content_digests).any(axis=1))
    if where.size:
        raise DataError(
            f"{where.size} samples changed since this dump was started: "
            + first_offenders((table.key(int(rows[i])) for i in where), where.size),
            tip="restore them, or start again with another --out",
        )


def _part(config: DumpConfig) -> Part:
    """From --part, or this process's rank under torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.part is None and world > 1:
        return Part(int(os.environ["RANK"]) + 1, world)
    return Part(*parse_part(config.part))


def _provenance(config: DumpConfig, started: float, clock: DumpProgress) -> dict[str, Any]:
    clock.close()
    return {
        "command": vars(config),
        "host": platform.node(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.monotonic() - started, 3),
        "views_per_s": round(clock.samples_per_s, 1),
        "python": platform.python_version(),
    }

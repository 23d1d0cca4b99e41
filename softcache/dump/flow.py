"""The dump recipe: teachers x views x transfer set -> cache. Read it top to bottom.

transfer set -> views -> loader -> every teacher -> codec, on the device -> shards -> manifest
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.card import card
from softcache.cache.manifest import Manifest
from softcache.cache.plan import Plan
from softcache.cache.reader import CacheReader
from softcache.cache.samples import SampleTable, build_table
from softcache.cache.schema import Span
from softcache.cache.write.rewriter import Rewriter
from softcache.cache.write.shard import HDF5_VERSION
from softcache.cache.write.writer import CacheWriter, Part, Setup
from softcache.config import DumpConfig, StorageOptions, parse_part
from softcache.data.drift import check_drift, make_probe
from softcache.data.identity import check_unique, pixel_digest, sample_ids
from softcache.data.loading import LoadedBatch, Pair, Partners, ViewedSet, load_batches
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.dump.choose_codec import CHECKED_SAMPLES, Prober, choose_storages
from softcache.dump.encode import Encoded, encode
from softcache.dump.job import extension_job, make_plan, match_members, new_job
from softcache.dump.layout import Storage
from softcache.dump.progress import DumpProgress
from softcache.dump.teacher import Teacher, open_teacher
from softcache.errors import ConfigError, DataError, DumpError, ModelError, first_offenders
from softcache.machine import autocast_dtype, describe_device, pick_device, pick_threads, pick_workers
from softcache.report.progress import Progress
from softcache.report.tables import size, table
from softcache.version import __version__


@dataclass(frozen=True)
class DumpResult:
    """What a dump left behind: the manifest, or None while other parts are still missing."""

    path: Path
    manifest: Manifest | None
    samples_per_s: float
    wait_share: float  # of the time, spent waiting for the loader
    seconds: float


def run(config: DumpConfig, *, quiet: bool = False) -> DumpResult:
    """Run the teachers once over the transfer set and commit the cache; resumes a dump that was interrupted.

    Raises:
        SoftcacheError: and its children; whatever was finished before stays and is resumed by the same command.
    """
    started = time.monotonic()
    out, part = Path(config.out), _part(config)
    device = pick_device(config.device)
    transfer_set, ids = open_samples(config)
    job = extension_job(config, transfer_set) if config.extend else new_job(config, transfer_set, out)
    made_before = job.planned.plan.rounds[-1].made_with if job.planned else {}
    threads = pick_threads(config.threads if config.threads is not None else made_before.get("threads"))
    torch.set_num_threads(threads)

    viewed = ViewedSet(transfer_set, job.policy, (), partners=Partners(transfer_set, job.order))
    prober = Prober(viewed, job.order, config.batch_size)
    teachers = match_members(job, open_teachers(config, prober, transfer_set, device))
    if not teachers:
        assert job.base is not None
        print(f"{out}: nothing to add, every teacher is a member already", file=sys.stderr)
        return DumpResult(out, job.base, 0.0, 0.0, time.monotonic() - started)
    if not job.new_views:  # looked at before anything is planned: a refusal is then nothing to clear away
        PixelCheck(CacheReader(out, id=job.base_id), job.order, viewed).check_first(prober)
    storages = choose_storages(config, job, teachers, prober, out)
    plan = make_plan(config, job, transfer_set, teachers, storages, _made_with(config, device, threads))
    plan = replace(plan, license=job.base.plan.license if job.base else config.license)
    workers = pick_workers(config.workers, device)
    if not quiet:
        print(sizes(plan, storages), file=sys.stderr)

    def make_setup() -> Setup:
        constants = {name: storages[name].constants() for name in storages if job.base is None or not job.new_views}
        if job.base is not None:
            return Setup(CacheReader(out).samples, {}, constants)
        samples = make_samples(
            transfer_set, ids, job.order, store_keys=not config.no_keys, workers=workers, quiet=quiet
        )
        return Setup(samples, make_probe(renderer(viewed, job.order), len(ids), job.views), constants)

    with CacheWriter(out, plan, make_setup, part=part, base=job.base) as writer:
        _check_same_samples(writer.samples, ids[job.order], transfer_set, job.order)
        storages = {n: s.with_constants(writer.constants(n)) for n, s in storages.items()}
        spans = writer.my_spans()
        finished = len(plan.rounds[-1].layout) - len(spans)
        if finished and spans and not quiet and part.count == 1:
            print(f"resuming {out}: {finished} of {finished + len(spans)} spans are there already", file=sys.stderr)
        clock = DumpProgress(writer, sum(span.rows * span.views for span in spans), quiet=quiet)
        pixels = None if job.new_views else PixelCheck(CacheReader(out, id=job.base_id), job.order, viewed)
        write_spans(writer, spans, viewed, job.order, teachers, storages, config.batch_size, workers, clock, pixels)
        for teacher in teachers:
            teacher.check_at_end()
        manifest = writer.commit(card, _provenance(config, started, clock))
        if manifest is None and part.count == 1:
            raise DumpError(f"{out}: some spans are missing", tip="run the same command again")
        seconds = time.monotonic() - started
        return DumpResult(out, manifest, clock.samples_per_s, clock.wait_share, seconds)


def write_spans(
    writer: CacheWriter | Rewriter,
    spans: Sequence[Span],
    viewed: ViewedSet,
    order: np.ndarray,
    teachers: Sequence[Teacher],
    storages: Mapping[str, Storage],
    batch_size: int,
    workers: int,
    clock: DumpProgress,
    pixels: PixelCheck | None,
) -> None:
    """Every batch of every span, through every teacher, into its shards. A batch never crosses a span's border.

    Args:
        order: (N,) position in the transfer set of each row.
        pixels: compares what is rendered with the digests that are there; None where the views are new.
    """
    labels = viewed.transfer_set.labels
    collates = [teacher.collate for teacher in teachers]
    viewed = ViewedSet(viewed.transfer_set, viewed.policy, collates, digests=True, partners=viewed.partners)
    pairs = [_pairs(span, order, batch_size) for span in spans]
    pinned = any(teacher.device.type == "cuda" for teacher in teachers)
    loaded = load_batches(viewed, (batch for span in pairs for batch in span), workers=workers, pin_memory=pinned)
    row_of = np.empty(len(order), np.int64)
    row_of[order] = np.arange(len(order))
    for span in spans:
        with writer.span(span, {name: storage.array_specs(span) for name, storage in storages.items()}) as out:
            pending: list[Encoded] = []  # the previous batch, copied to the host while the device computes the next
            for _ in range(-(-span.rows // batch_size) * span.views):
                batch = clock.wait_for(loaded)
                rows = row_of[batch.index]
                _check_unchanged(writer.samples, rows, batch)
                if pixels is None:
                    out.append(None, {"pixel_digests": batch.pixel_digests})
                else:
                    pixels.check(rows, batch)
                encoded = [
                    encode(teacher, storages[teacher.name], inputs, labels[batch.index], writer.samples, rows)
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


def open_samples(config: StorageOptions) -> tuple[TransferSet, np.ndarray]:
    """The transfer set and its sample ids, all different; the numbers of the config that need no data are checked."""
    for flag, value in (("batch-size", config.batch_size), ("shard-rows", config.shard_rows)):
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    transfer_set = open_transfer_set(config.data, **config.selection())
    ids = sample_ids(transfer_set.keys)
    check_unique(transfer_set.keys, ids)
    return transfer_set, ids


def open_teachers(
    config: StorageOptions, prober: Prober, transfer_set: TransferSet, device: torch.device
) -> list[Teacher]:
    """The teachers of the config, each checked on the first batch of the cache's rows."""
    (item,) = prober.items(0, 1)
    shape = None if isinstance(item, str) else tuple(getattr(item, "shape", ())) or None
    teachers: list[Teacher] = []
    for text in config.teacher:
        teacher = open_teacher(
            text,
            taken=[t.name for t in teachers],
            num_classes=transfer_set.num_classes,
            class_names=transfer_set.class_names,
            multi_label=transfer_set.multi_label,
            input_shape=shape,
            device=str(device),
            autocast=autocast_dtype(config.autocast),
        )
        if not teacher.has_weights:
            raise ModelError(
                f"teacher {text!r} has no weights: its logits would be random numbers",
                tip=f"write {text}@WEIGHTS, or name a run folder",
            )
        teachers.append(teacher)
    for teacher in teachers:
        teacher.check_first_batch(prober.first_batch(teacher))
    return teachers


def list_modules(config: StorageOptions) -> str:
    """The modules of every teacher with their output shapes on one batch, as a table: what --features can name."""
    transfer_set, _ = open_samples(config)
    job = new_job(config, transfer_set)
    viewed = ViewedSet(transfer_set, job.policy, (), partners=Partners(transfer_set, job.order))
    prober = Prober(viewed, job.order, config.batch_size)
    texts = []
    for teacher in open_teachers(config, prober, transfer_set, pick_device(config.device)):
        modules = teacher.list_modules(prober.first_batch(teacher))
        rows = [
            [
                m.name,
                m.kind,
                " x ".join(map(str, m.shape[1:])) if m.shape else f"({m.gives})",
                "" if m.calls == 1 else m.calls,
            ]
            for m in modules
        ]
        texts.append(f"{teacher.name}\n" + table(["module", "type", "output of one sample", "calls, if not 1"], rows))
    return "\n\n".join(texts)


def _made_with(config: StorageOptions, device: torch.device, threads: int) -> dict[str, Any]:
    """What equal bytes depend on."""
    import PIL
    import torchvision

    return {
        "softcache": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "hdf5": HDF5_VERSION,
        "device": describe_device(device),
        "batch_size": config.batch_size,
        "threads": threads,
        "autocast": config.autocast,
    }


def sizes(plan: Plan, storages: Mapping[str, Storage]) -> str:
    """What this round will write, as a table: bytes of a record and of the whole, for each member and each thing kept."""
    layout = plan.rounds[-1].layout
    records = layout.num_rows * layout.num_views
    rows, total = [], 0
    for name, storage in storages.items():
        parts = [(storage.codec.text, storage.codec_bytes)]
        parts += [(f"{f.name} as {f.codec.form}, {f.codec.dtype}", f.nbytes) for f in storage.features]
        rows += [[name, what, f"{nbytes:,}", size(nbytes * records)] for what, nbytes in parts]
        total += sum(nbytes for _, nbytes in parts)
    title = (
        f"{layout.num_rows:,} samples x {layout.num_views} views, {len(layout)} parts; {size(total * records)} in all"
    )
    return title + "\n" + table(["member", "stored", "bytes a record", "bytes"], rows)


def renderer(viewed: ViewedSet, order: np.ndarray) -> Callable[[int, int], Any]:
    """(row, view) -> the rendered item."""
    return lambda row, view: viewed.render(int(order[row]), view)


def make_samples(
    transfer_set: TransferSet, ids: np.ndarray, order: np.ndarray, *, store_keys: bool, workers: int, quiet: bool
) -> SampleTable:
    """Who the samples are, in the order of rows; every one is read once for its digest."""
    return build_table(
        transfer_set.keys,
        ids,
        transfer_set.labels,
        _content_digests(transfer_set, workers=workers, quiet=quiet),
        transfer_set.num_classes,
        order,
        store_keys=store_keys,
    )


def _content_digests(transfer_set: TransferSet, *, workers: int, quiet: bool) -> np.ndarray:
    """(N, 16) uint8 digests of what every sample holds, read once before the first row is written."""
    count = len(transfer_set)
    viewed = ViewedSet(transfer_set, Policy(), (), digests=True)
    pairs = ([(i, 0) for i in range(start, min(start + 1024, count))] for start in range(0, count, 1024))
    digests = np.empty((count, 16), np.uint8)
    with Progress("reading samples", count, unit="sample", quiet=quiet) as progress:
        for batch in load_batches(viewed, pairs, workers=workers):
            assert batch.content_digests is not None
            digests[batch.index] = batch.content_digests
            progress.add(len(batch.index))
    return digests


class PixelCheck:
    """A new member must see what the others saw: every view's pixels against the cache's digests. A rounding is told once."""

    def __init__(self, reader: CacheReader, order: np.ndarray, viewed: ViewedSet) -> None:
        self._reader, self._render, self._told = reader, renderer(viewed, order), False

    def check_first(self, prober: Prober) -> None:
        """The first rows of view 0."""
        digests = np.array([pixel_digest(item) for item in prober.items(0, CHECKED_SAMPLES)], dtype=np.uint32)
        rows = np.arange(len(digests))
        check_drift(self._reader, rows, np.zeros_like(rows), digests, self._render)

    def check(self, rows: np.ndarray, batch: LoadedBatch) -> None:
        assert batch.pixel_digests is not None
        drift = check_drift(self._reader, rows, batch.views, batch.pixel_digests, self._render)
        if drift is not None and not self._told:
            self._told = True
            print(f"softcache: warning: {drift}", file=sys.stderr)


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

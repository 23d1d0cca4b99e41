"""The dump flow: teachers x views x transfer set -> cache. Read it top to bottom.

transfer set -> views -> loader -> every teacher -> codec, on the device -> shards -> manifest
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.card import card
from softcache.cache.manifest import Manifest
from softcache.cache.reader import CacheReader
from softcache.cache.samples import SampleTable
from softcache.cache.schema import Span
from softcache.cache.write.rewriter import Rewriter
from softcache.cache.write.writer import CacheWriter, Part, Setup, refuse_foreign_folder
from softcache.config import DumpConfig, parse_part
from softcache.config.unused import check_used
from softcache.data.class_counts import described, listed_warnings
from softcache.data.drift import make_probe
from softcache.data.loading import Pair, Partners, ViewedSet, load_batches
from softcache.data.reading import Collate
from softcache.dump.choose_codec import Prober, choose_storages
from softcache.dump.class_report import ClassReport
from softcache.dump.encode import Encoded, encode
from softcache.dump.job import extension_job, is_of_version_1, make_plan, match_members, new_job
from softcache.dump.layout import Storage, bytes_of_spans, sizes
from softcache.dump.made_with import left_out_before, made_with, provenance, told_of
from softcache.dump.open_teachers import build_teachers, check_teachers, left_out_of
from softcache.dump.pixels import PixelCheck, renderer
from softcache.dump.position_index import InPart, check_same_positions, index_of, one_each, records_of
from softcache.dump.progress import DumpProgress
from softcache.dump.row_batches import batch_tokens_of, cut_rows, tokens_of
from softcache.dump.samples import check_same_samples, check_unchanged, make_samples, open_samples
from softcache.dump.teacher import Teacher
from softcache.dump.token_teachers import token_lines
from softcache.errors import DataError, DumpError, printable
from softcache.files.durable import require_room
from softcache.machine import as_fresh, pick_device, pick_threads, pick_workers


@dataclass(frozen=True)
class DumpResult:
    """What a dump left behind.

    Attributes:
        path: the cache's folder.
        manifest: of the finished cache; None while other parts are still missing.
        samples_per_s: records that this process made in a second.
        wait_share: of the time, in [0, 1], spent waiting for the loader.
        seconds: of the whole call.
    """

    path: Path
    manifest: Manifest | None
    samples_per_s: float
    wait_share: float
    seconds: float


@as_fresh()
def run(config: DumpConfig, *, quiet: bool = False) -> DumpResult:
    """Run the teachers once over the transfer set and commit the cache; resumes a dump that was interrupted.

    Torch's settings and random states are afterwards as they were.

    Args:
        config: what `softcache dump` has as flags.
        quiet: nothing on stderr.

    Raises:
        ConfigError: settings that cannot be, before anything is written.
        DataError, ModelError: the transfer set or a teacher cannot be opened.
        TeacherError: logits that are not finite, not repeatable, or none.
        CodecRangeError, CodecFitError: logits that the codec cannot hold, or a promise that a record breaks.
        DumpError: the folder, the plan, the disk or another process is in the way. Whatever was finished before an error stays,
            and is resumed by the same call.

    Example:
        >>> from softcache import dump
        >>> from softcache.config import DumpConfig
        >>> result = dump.run(DumpConfig(data="synthetic:images?count=64", teacher=("runs/teacher",), out="caches/b"), quiet=True)
        >>> result.manifest.id == softcache.open("caches/b").id
        True
    """
    started = time.monotonic()
    check_used(config)
    out, part = Path(config.out), _part(config)
    if not config.extend:
        refuse_foreign_folder(out)
    device = pick_device(config.device)
    transfer_set, ids = open_samples(config)
    if config.extend:
        job = extension_job(config, transfer_set)
    else:
        job = new_job(config, transfer_set, out, first_view=config.first_view)
    made_before = job.planned.plan.rounds[-1].made_with if job.planned else {}
    wanted = config.threads if config.threads is not None else made_before.get("threads")
    threads = pick_threads(
        wanted, shared=False
    )  # it is part of the plan, which is the same for any number of processes
    torch.set_num_threads(threads)

    viewed = ViewedSet(transfer_set, job.policy, (), partners=Partners(transfer_set, job.order))
    most_tokens = batch_tokens_of(config, transfer_set)
    prober = Prober(viewed, job.order, config.batch_size, batch_tokens=most_tokens)
    workers = pick_workers(config.workers, device)
    reads_all = (
        job.base is None and job.planned is None and part.count == 1
    )  # of several parts the first one, see make_setup

    def read(collates: Sequence[Collate]) -> SampleTable:
        return make_samples(
            transfer_set,
            ids,
            job.order,
            policy=job.policy,
            collates=collates,
            store_keys=not config.no_keys,
            workers=workers,
            quiet=quiet,
            misfits=config.misfits,
        )

    opened: list[Teacher] = []
    try:
        opened = build_teachers(config, prober, transfer_set, device)
        check_teachers(opened, prober)
    except DataError:  # of one of the samples by which they are tried, maybe: then all of its kind are named
        if reads_all:
            read([teacher.collate for teacher in opened if job.positions is not None])
        raise
    teachers = match_members(job, opened)
    if not teachers:
        assert job.base is not None
        print(f"{out}: nothing to add, every teacher is a member already", file=sys.stderr)
        return DumpResult(out, job.base, 0.0, 0.0, time.monotonic() - started)
    if not job.new_views:  # looked at before anything is planned: a refusal is then nothing to clear away
        PixelCheck(CacheReader(out, id=job.base_id), job.order, viewed).check_first()

    @cache
    def read_samples() -> SampleTable:
        fits = config.batch_size > 1 or job.positions is not None
        return read([teacher.collate for teacher in teachers] if fits else ())

    if reads_all:
        read_samples()  # what does not fit is told before a teacher runs over many samples
    storages = choose_storages(config, job, teachers, prober, out)
    plan = make_plan(config, job, transfer_set, teachers, storages, made_with(config, device, threads, most_tokens))
    plan = replace(plan, license=job.base.plan.license if job.base else config.license)
    lost = left_out_of(teachers, prober)
    if not quiet:
        records = None if job.positions is None else job.positions.total
        print(sizes(plan, storages, records), printable(described(transfer_set)), sep="\n", file=sys.stderr)
        if job.base is None and plan.format != int(config.format):
            others = ", ".join(dict.fromkeys(t.index or t.output for t in teachers if not is_of_version_1(t)))
            print(f"written as format version {plan.format}, which is provisional: {others}", file=sys.stderr)
        for name, one in lost.items():
            print(f"teacher {name!r}: {one.text()}", file=sys.stderr)
        for line in token_lines(teachers):
            print(line, file=sys.stderr)

    index = index_of(transfer_set)

    def make_setup() -> Setup:
        constants = {name: storages[name].constants() for name in storages if job.base is None or not job.new_views}
        if job.base is not None:
            return Setup(CacheReader(out).samples, {}, constants)
        probe = make_probe(renderer(viewed, job.order), len(ids), job.views)
        positions = {} if index is None or job.positions is None else {index.name: job.positions}
        tokenizer = None if transfer_set.rendering is None else transfer_set.rendering.vocabulary.definition
        return Setup(read_samples(), probe, constants, positions, tokenizer=tokenizer)

    with CacheWriter(out, plan, make_setup, part=part, base=job.base) as writer:
        check_same_samples(writer.samples, ids[job.order], transfer_set, job.order)
        if index is not None:
            check_same_positions(writer.index(index.name), transfer_set, job.order, writer.samples.key)
        in_part = records_of(job.positions, plan.rounds[-1].layout)
        storages = {n: s.with_constants(writer.constants(n)) for n, s in storages.items()}
        spans = writer.my_spans()
        finished = len(plan.rounds[-1].layout) - len(spans)
        if finished and spans and not quiet and part.count == 1:
            print(f"resuming {out}: {finished} of {finished + len(spans)} spans are there already", file=sys.stderr)
        require_room(out, bytes_of_spans(spans, storages, in_part), "the shards to be written need")
        clock = DumpProgress(writer, sum(span.rows * span.views for span in spans), quiet=quiet)
        pixels = None if job.new_views else PixelCheck(CacheReader(out, id=job.base_id), job.order, viewed)
        report = ClassReport(transfer_set, teachers, job.first_view)
        write_spans(
            writer,
            spans,
            viewed,
            job.order,
            teachers,
            storages,
            config.batch_size,
            workers,
            clock,
            pixels,
            report,
            in_part=in_part,
            batch_tokens=most_tokens,
        )
        for teacher in teachers:
            teacher.check_at_end()
        told = provenance(config, started, clock) | told_of(teachers, lost)
        unread = left_out_before(out, len(plan.rounds) - 1) | {name: one.text() for name, one in lost.items()}
        if not quiet and (answers := report.text()):
            print(printable(answers), file=sys.stderr)
        told["classes"] = report.facts(listed_warnings(report.warnings()))
        manifest = writer.commit(partial(card, left_out=unread), told)
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
    report: ClassReport | None = None,
    *,
    in_part: InPart = one_each,
    batch_tokens: int | None = None,
) -> None:
    """Every batch of every span, through every teacher, into its shards. A batch never crosses a span's border.

    Args:
        order: (N,) position in the transfer set of each row.
        pixels: compares what is rendered with the digests that are there; None where the views are new.
        report: is shown the answers at its view.
        in_part: how many records a part has.
        batch_tokens: a batch has so many tokens at most, in place of `batch_size` samples.
    """
    transfer_set = viewed.transfer_set
    collates = [teacher.collate for teacher in teachers]
    viewed = ViewedSet(transfer_set, viewed.policy, collates, digests=True, partners=viewed.partners)
    tokens = tokens_of(transfer_set, order)
    cuts = [_cuts(span, batch_size, tokens, batch_tokens) for span in spans]
    pairs = [_pairs(span, order, cut) for span, cut in zip(spans, cuts, strict=True)]
    pinned = any(teacher.device.type == "cuda" for teacher in teachers)
    loaded = load_batches(viewed, (batch for span in pairs for batch in span), workers=workers, pin_memory=pinned)
    row_of = np.empty(len(order), np.int64)
    row_of[order] = np.arange(len(order))
    for span, cut in zip(spans, cuts, strict=True):
        with writer.span(
            span, {name: storage.array_specs(span, in_part(span)) for name, storage in storages.items()}
        ) as out:
            pending: list[Encoded] = []  # the previous batch, copied to the host while the device computes the next
            for _ in range(len(cut) * span.views):
                batch = clock.wait_for(loaded)
                rows = row_of[batch.index]
                check_unchanged(writer.samples, rows, batch)
                if pixels is None:
                    out.append(None, {writer.plan.views.digests[0]: batch.pixel_digests})
                else:
                    pixels.check(rows, batch)
                labels, of_records = _labels_and_rows(transfer_set, batch.index, rows)
                encoded = [
                    encode(
                        teacher,
                        storages[teacher.name],
                        inputs,
                        labels,
                        writer.samples,
                        of_records,
                        int(batch.views[0]),
                        writer.plan.format,
                    )
                    for teacher, inputs in zip(teachers, batch.inputs, strict=True)
                    if len(of_records)  # samples without words are not asked about
                ]
                _append(pending, out, report)
                pending = encoded
                clock.count(len(rows))
            _append(pending, out, report)


def _labels_and_rows(transfer_set: Any, index: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each record of a batch its label and its row: of each sample, or of each of its words or tokens."""
    if transfer_set.positions is None:
        return transfer_set.labels[index], rows
    found = transfer_set.positions.take(index)
    return found.labels, np.repeat(rows, found.counts)


def _append(pending: Sequence[Encoded], out: Any, report: ClassReport | None) -> None:
    """Write what came of a batch, and show its answers to the report."""
    for done in pending:
        done.append_to(out)
        if report is not None:
            report.add(done)


def _cuts(span: Span, batch_size: int, tokens: np.ndarray | None, most: int | None) -> Sequence[range]:
    """The batches of a span's rows, counted from its first one."""
    own = None if tokens is None else tokens[span.row_start : span.row_stop]
    return cut_rows(span.rows, batch_size, own, most)


def _pairs(span: Span, order: np.ndarray, cuts: Sequence[range]) -> Iterator[list[Pair]]:
    """(index, view) of the span's records in stored order: view by view, row by row."""
    for view in range(span.view_start, span.view_stop):
        for cut in cuts:
            yield [(int(i), view) for i in order[span.row_start + cut.start : span.row_start + cut.stop]]


def _part(config: DumpConfig) -> Part:
    """From --part, or this process's rank under torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.part is None and world > 1:
        return Part(int(os.environ["RANK"]) + 1, world)
    return Part(*parse_part(config.part))

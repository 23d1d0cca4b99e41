"""The dump's side of a cache: plan first, then shards with a journal, the manifest last.

What the manifest does not name does not exist. A process killed at any moment loses at most the spans it was writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from softcache.cache import files
from softcache.cache.canonical import canonical_json, differences
from softcache.cache.locks import release_lock, take_lock
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import Plan
from softcache.cache.samples import SampleTable, table_from_arrays
from softcache.cache.schema import (
    CARD,
    MANIFEST,
    MANIFESTS,
    PROBE,
    PROVENANCE,
    SAMPLES,
    WORK,
    ArraySpec,
    Span,
    constants_path,
    dense_shard_path,
    member_shard_path,
    view_shard_path,
)
from softcache.cache.shard import ShardWriter, StoredFile, sha256_of, write_shard
from softcache.cache.statistics import MemberStatistics
from softcache.cache.work import PLAN, Planned, read_journals, read_planned, work_folder
from softcache.errors import CacheError, DiskSpaceError, DumpError, LockedError, PlanMismatchError


@dataclass(frozen=True)
class Part:
    """Which of how many processes this one is: `index` counts from 1."""

    index: int = 1
    count: int = 1

    def owns(self, span: int) -> bool:
        return span % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass(frozen=True)
class Setup:
    """What is written once, before the first row.

    Attributes:
        samples: who the samples are.
        probe: the arrays of probe.h5; empty where the views are not images, and where a cache is extended.
        constants: member -> arrays that its codec was fitted to and of its final linear layer.
    """

    samples: SampleTable
    probe: Mapping[str, np.ndarray] = field(default_factory=dict)
    constants: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


class CacheWriter:
    """Writes the spans of one part of one round. Use as a context manager: it holds the part's lock.

    Args:
        path: the cache folder; made when it does not exist.
        plan: its last round is the one to write; for a new cache without the transfer set's fingerprint, which is filled in.
        make_setup: called once per round, by whichever process comes first.
        part: this process.
        base: the manifest that this round extends; None for a new cache.

    Raises:
        PlanMismatchError: the round was started with another plan; lists what differs.
        LockedError: a living process writes the same part.
        DumpError: the folder holds something that is not ours.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        make_setup: Callable[[], Setup],
        *,
        part: Part | None = None,
        base: Manifest | None = None,
    ) -> None:
        self.path, self.part, self.base = path, part or Part(), base
        self.work = work_folder(path, len(plan.rounds) - 1)
        self._refuse_foreign_folder()
        files.make_folder(self.work)
        files.make_folder(path / MANIFESTS)
        with _waiting_lock(self.work / "setup.lock"):
            self._refuse_other_split()
            self._lock = _take_lock(self.work / f"part-{self.part}.lock", self.part, path)
            try:
                self.planned, self.samples = self._begin(plan, make_setup)
            except BaseException:
                release_lock(self._lock)
                raise
        self._journal = self.work / f"part-{self.part}.jsonl"
        self.bytes_written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        release_lock(self._lock)

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    def _refuse_foreign_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise DumpError(f"{self.path}: is a file", tip="choose another --out")
        if self.base is not None or not self.path.is_dir() or (self.path / WORK).is_dir():
            return
        if any(self.path.iterdir()):
            raise DumpError(
                f"{self.path}: holds files that no dump wrote", tip="choose another --out, or empty the folder"
            )

    def _refuse_other_split(self) -> None:
        """A living process that splits the same dump into another number of parts would write the same spans."""
        for lock in sorted(self.work.glob("part-*.lock")):
            if not lock.stem.endswith(f"-of-{self.part.count}"):
                release_lock(_take_lock(lock, self.part, self.path, announce=False))

    def _begin(self, plan: Plan, make_setup: Callable[[], Setup]) -> tuple[Planned, SampleTable]:
        found = read_planned(self.work)
        if found is None:
            setup = make_setup()
            plan = replace(plan, samples=replace(plan.samples, fingerprint=setup.samples.fingerprint()))
            planned = Planned(plan, self.base.id if self.base else None, self._write_setup(setup))
            files.write_whole(self.work / PLAN, planned.to_bytes())
            return planned, setup.samples
        wanted = replace(plan, samples=replace(plan.samples, fingerprint=found.plan.samples.fingerprint))
        changed = list(differences(*(json.loads(canonical_json(p.to_json())) for p in (wanted, found.plan))))
        if found.base != (self.base.id if self.base else None):
            changed.append(("the cache it extends", self.base.id[:12] if self.base else None, (found.base or "")[:12]))
        if changed:
            listing = "; ".join(f"{name} was {old!r}, is now {new!r}" for name, new, old in changed[:6])
            raise PlanMismatchError(
                f"{self.path}: was started with another plan: {listing}",
                tip="repeat the command it was started with to resume it, or "
                + (f"delete {self.work} to give it up" if self.base else "choose another --out"),
            )
        # imported here: the reader is the other side of the format, and only a resume needs it
        from softcache.cache.reader import MappedFile

        (file,) = (f for f in (*found.files, *(self.base.files if self.base else ())) if f.kind == "samples")
        mapped = MappedFile(self.path, file)
        table = table_from_arrays(mapped.array, list(file.arrays), found.plan.samples, len(found.plan.class_names))
        return found, table

    def _write_setup(self, setup: Setup) -> list[StoredFile]:
        written = []
        if self.base is None:
            arrays = setup.samples.arrays()
            written.append(write_shard(self.path / SAMPLES, arrays, kind="samples", relative_path=SAMPLES))
            if setup.probe:
                written.append(write_shard(self.path / PROBE, setup.probe, kind="probe", relative_path=PROBE))
        for member, constants in setup.constants.items():
            if constants:
                relative = constants_path(member)
                written.append(
                    write_shard(
                        self.path / relative, constants, kind="constants", relative_path=relative, member=member
                    )
                )
        return written

    def constants(self, member: str) -> dict[str, np.ndarray]:
        """What was fitted for a member, as it lies on disk: the same for every part and every resume."""
        from softcache.cache.reader import read_constants

        stored = [*(self.base.files if self.base else ()), *self.planned.files]
        return read_constants(self.path, stored, member)

    def finished_spans(self) -> dict[int, dict[str, Any]]:
        """Journal entries of every span whose files are there, over all parts."""
        finished = {}
        for index, entries in read_journals(self.work).items():
            there = [e for e in entries if all(_has_size(self.path / f["path"], int(f["bytes"])) for f in e["files"])]
            if len(there) > 1:  # written twice, with other bytes: the entry that fits the files is the one that holds
                there = [e for e in there if all(sha256_of(self.path / f["path"]) == f["sha256"] for f in e["files"])]
            if there:
                finished[index] = there[-1]
        return finished

    def my_spans(self) -> list[Span]:
        """The spans of this part that are still to be written."""
        done, layout = self.finished_spans(), self.plan.rounds[-1].layout
        return [span for span in layout.spans() if self.part.owns(span.index) and span.index not in done]

    @contextmanager
    def span(self, span: Span, member_arrays: Mapping[str, Sequence[ArraySpec]]) -> Iterator[SpanWriter]:
        """Write one span: `with writer.span(span, {member: data sets}) as out: out.append(...)`; committed at the end."""
        out = SpanWriter(self, span, member_arrays)
        try:
            yield out
            entry = out.finish()
        except BaseException:
            out.discard()
            raise
        files.append_line(self._journal, canonical_json(entry))
        self.bytes_written += sum(file["bytes"] for file in entry["files"])

    def commit(self, card: Callable[[Manifest], str], provenance: Mapping[str, Any]) -> Manifest | None:
        """Write the manifest if every span of every part is journaled; None when some are missing.

        It becomes the newest unless the cache was extended since.

        The manifest is a function of plan, base and journals alone: whoever commits, its bytes are the same.
        """
        done, layout = self.finished_spans(), self.plan.rounds[-1].layout
        if any(span.index not in done for span in layout.spans()):
            return None
        stored = [*(self.base.files if self.base else ()), *self.planned.files]
        for span in layout.spans():
            stored += [StoredFile.from_json(file) for file in done[span.index]["files"]]
        data = Manifest(self.plan, stored).to_bytes()
        manifest = Manifest.from_bytes(data, self.path / MANIFEST)
        told = self.path / PROVENANCE if self.base is None else self.work / PROVENANCE
        if not told.exists():
            files.write_whole(told, json.dumps(dict(provenance), indent=1).encode())
        files.write_whole(self.path / MANIFESTS / f"{manifest.id}.json", data)
        with _waiting_lock(self.path / WORK / "commit.lock"):
            if not self._was_extended():
                files.write_whole(self.path / CARD, card(manifest).encode("utf-8"))
                files.write_whole(self.path / MANIFEST, data)
        return manifest

    def _was_extended(self) -> bool:
        """Whether a later round is there already: its manifest stays the newest."""
        try:
            return len(read_manifest(self.path).plan.rounds) > len(self.plan.rounds)
        except CacheError:  # none yet, or a damaged one
            return False


class SpanWriter:
    """The open shards of one span: one per member, and one with the pixel digests where its views are new.

    Records that a codec keeps dense are gathered here and written beside the shard when it is finished.
    """

    def __init__(self, writer: CacheWriter, span: Span, member_arrays: Mapping[str, Sequence[ArraySpec]]) -> None:
        self.span_info, self._writer = span, writer
        self._statistics = {name: MemberStatistics() for name in member_arrays}
        self._shards: dict[str | None, ShardWriter] = {}
        self._dense: dict[str, list[np.ndarray]] = {}
        planned = sum(spec.nbytes + spec.checksums.nbytes for specs in member_arrays.values() for spec in specs)
        free = files.free_bytes(writer.path)
        if free < planned:
            raise DiskSpaceError(
                f"{writer.path}: the next shards need {planned / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB left",
                tip="free some space and run the same command again: finished shards are kept",
            )
        try:
            if writer.plan.rounds[-1].new_views:
                pixels = [ArraySpec("pixel_digests", "<u4", (span.views, span.rows))]
                self._open(None, view_shard_path(span.index), "views", pixels)
            for name, specs in member_arrays.items():
                self._open(name, member_shard_path(name, span.index), "member", specs)
        except BaseException:
            self.discard()
            raise

    def _open(self, member: str | None, relative: str, kind: str, specs: Sequence[ArraySpec]) -> None:
        self._shards[member] = ShardWriter(self._writer.path / relative, specs, kind=kind, tag=str(self._writer.part))

    def append(self, member: str | None, arrays: Mapping[str, Any], statistics: MemberStatistics | None = None) -> None:
        """Append records in view-major order: (n, ...) per data set. `member=None` is the table of pixel digests."""
        for name, rows in arrays.items():
            self._shards[member].append(name, rows)
        if member is not None and statistics is not None:
            self._statistics[member] += statistics

    def append_dense(self, member: str, rows: np.ndarray) -> int:
        """Keep (n, C) float16 rows; returns the number of the first one, counted from 1 within the span."""
        kept = self._dense.setdefault(member, [])
        first = sum(map(len, kept)) + 1
        kept.append(rows)
        return first

    def finish(self) -> dict[str, Any]:
        """Close, check and name every shard; returns the journal entry."""
        span, stored = self.span_info, []
        place = {"rows": (span.row_start, span.row_stop), "views": (span.view_start, span.view_stop)}
        for member, shard in self._shards.items():
            if member is None:
                stored.append(shard.finish(relative_path=view_shard_path(span.index), **place))
                continue
            relative = member_shard_path(member, span.index)
            stored.append(
                shard.finish(relative_path=relative, member=member, statistics=self._statistics[member], **place)
            )
            if member in self._dense:
                relative = dense_shard_path(member, span.index)
                rows = {"logits": np.concatenate(self._dense[member])}
                stored.append(
                    write_shard(
                        self._writer.path / relative,
                        rows,
                        kind="dense",
                        relative_path=relative,
                        tag=str(self._writer.part),
                        member=member,
                        **place,
                    )
                )
        return {"span": span.index, "files": [file.to_json() for file in stored]}

    def discard(self) -> None:
        for shard in self._shards.values():
            shard.discard()


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock while the plan is made; wait for whoever holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _take_lock(path: Path, part: Part, cache: Path, *, announce: bool = True) -> int:
    """The part's lock, or LockedError naming who holds it. The kernel releases it when the process ends, however it ends."""
    try:
        fd = take_lock(path)
    except BlockingIOError:
        holder = path.read_text("utf-8", "replace").strip() or "unknown"
        raise LockedError(
            f"{cache}: part {part.index} of {part.count} is being written by another process: {holder}",
            tip="wait for it, end it, or give this process a part of its own with --part i/n",
        ) from None
    if not announce:
        return fd
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"host {socket.gethostname()}, pid {os.getpid()}, since {started}\n".encode(), 0)
    return fd

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from softcache.cache import files
from softcache.cache.locks import release_lock, take_lock
from softcache.cache.manifest import (
    Manifest,
    MemberStatistics,
    Plan,
    canonical_json,
    differences,
    read_journals,
    read_manifest,
)
from softcache.cache.samples import SampleTable, table_from_arrays
from softcache.cache.schema import (
    MANIFEST,
    MANIFESTS,
    PLAN,
    PROVENANCE,
    SAMPLES,
    WORK,
    ArraySpec,
    Span,
    member_shard_path,
    view_shard_path,
)
from softcache.cache.shard import ShardWriter, StoredFile, sha256_of, write_shard
from softcache.errors import DamagedCacheError, DiskSpaceError, DumpError, LockedError, PlanMismatchError


@dataclass(frozen=True)
class Part:
    """Which of how many processes this one is: `index` counts from 1."""

    index: int = 1
    count: int = 1

    def owns(self, span: int) -> bool:
        return span % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


class CacheWriter:
    """Writes the spans of one part. Use as a context manager: it holds the part's lock.

    Args:
        path: the cache folder; made when it does not exist.
        plan: without the transfer set's fingerprint (it is filled in from the sample table).
        make_samples: called once per cache, by whichever process comes first.
        part: this process.

    Raises:
        PlanMismatchError: the folder was started with another plan; lists what differs.
        LockedError: a living process writes the same part.
        DumpError: the folder holds something that is not ours.
    """

    def __init__(
        self, path: Path, plan: Plan, make_samples: Callable[[], SampleTable], *, part: Part | None = None
    ) -> None:
        self.path, self.part = path, part or Part()
        self._refuse_foreign_folder()
        files.make_folder(path / WORK)
        files.make_folder(path / MANIFESTS)
        with _waiting_lock(path / WORK / "setup.lock"):
            self._refuse_other_split()
            self._lock = _take_lock(path / WORK / f"part-{self.part}.lock", self.part)
            try:
                self.plan, self.samples_file, self.samples = self._begin(plan, make_samples)
            except BaseException:
                release_lock(self._lock)
                raise
        self._journal = path / WORK / f"part-{self.part}.jsonl"
        self.bytes_written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        release_lock(self._lock)

    def _refuse_foreign_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise DumpError(f"{self.path}: is a file", tip="choose another --out")
        if self.path.is_dir() and not (self.path / WORK).is_dir() and any(self.path.iterdir()):
            raise DumpError(
                f"{self.path}: holds files that no dump wrote", tip="choose another --out, or empty the folder"
            )

    def _refuse_other_split(self) -> None:
        """A living process that splits the same dump into another number of parts would write the same spans."""
        for lock in sorted((self.path / WORK).glob("part-*.lock")):
            if not lock.stem.endswith(f"-of-{self.part.count}"):
                release_lock(_take_lock(lock, self.part, announce=False))

    def _begin(self, plan: Plan, make_samples: Callable[[], SampleTable]) -> tuple[Plan, StoredFile, SampleTable]:
        plan_path = self.path / PLAN
        if not plan_path.exists():
            table = make_samples()
            file = write_shard(self.path / SAMPLES, table.arrays(), kind="samples", relative_path=SAMPLES)
            plan = replace(plan, samples=replace(plan.samples, fingerprint=table.fingerprint()))
            files.write_whole(plan_path, canonical_json({"plan": plan.to_json(), "samples_file": file.to_json()}))
            return plan, file, table
        try:
            stored = json.loads(plan_path.read_bytes())
        except ValueError as exc:
            raise DamagedCacheError(f"{plan_path}: is damaged ({exc})", tip="start again with another --out") from None
        found = Plan.from_json(stored["plan"])
        wanted = replace(plan, samples=replace(plan.samples, fingerprint=found.samples.fingerprint))
        changed = list(differences(json.loads(canonical_json(wanted.to_json())), stored["plan"]))
        if changed:
            listing = "; ".join(f"{name} was {old!r}, is now {new!r}" for name, new, old in changed[:6])
            raise PlanMismatchError(
                f"{self.path}: was started with another plan: {listing}",
                tip="repeat the command it was started with to resume it, or choose another --out",
            )
        file = StoredFile.from_json(stored["samples_file"])
        # imported here: the reader is the other side of the format, and only a resume needs it
        from softcache.cache.reader import MappedFile

        mapped = MappedFile(self.path, file)
        table = table_from_arrays(mapped.array, list(file.arrays), found.samples, len(found.class_names))
        return found, file, table

    def finished_spans(self) -> dict[int, dict[str, Any]]:
        """Journal entries of every span whose files are there, over all parts."""
        finished = {}
        for index, entries in read_journals(self.path).items():
            there = [e for e in entries if all(_has_size(self.path / f["path"], int(f["bytes"])) for f in e["files"])]
            if len(there) > 1:  # written twice, with other bytes: the entry that fits the files is the one that holds
                there = [e for e in there if all(sha256_of(self.path / f["path"]) == f["sha256"] for f in e["files"])]
            if there:
                finished[index] = there[-1]
        return finished

    def my_spans(self) -> list[Span]:
        """The spans of this part that are still to be written."""
        done = self.finished_spans()
        return [span for span in self.plan.layout.spans() if self.part.owns(span.index) and span.index not in done]

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

        The manifest is a function of plan and journal alone: whoever commits, its bytes are the same.
        """
        done = self.finished_spans()
        if len(done) < len(self.plan.layout):
            return None
        stored, statistics = [self.samples_file], {m.name: MemberStatistics() for m in self.plan.members}
        for index in range(len(self.plan.layout)):
            stored += [StoredFile.from_json(file) for file in done[index]["files"]]
            for name, entry in done[index]["statistics"].items():
                statistics[name] += MemberStatistics.from_json(entry)
        data = Manifest(self.plan, stored, statistics).to_bytes()
        manifest = Manifest.from_bytes(data, self.path / MANIFEST)
        if not (self.path / PROVENANCE).exists():
            files.write_whole(self.path / PROVENANCE, json.dumps(dict(provenance), indent=1).encode())
        files.write_whole(self.path / "README.md", card(manifest).encode("utf-8"))
        files.write_whole(self.path / MANIFESTS / f"{manifest.id}.json", data)
        files.write_whole(self.path / MANIFEST, data)
        return manifest

    def committed(self) -> Manifest | None:
        """The manifest, when this cache is already complete."""
        return read_manifest(self.path) if (self.path / MANIFEST).exists() else None


class SpanWriter:
    """The open shards of one span: one per member, and one with the pixel digests of the views."""

    def __init__(self, writer: CacheWriter, span: Span, member_arrays: Mapping[str, Sequence[ArraySpec]]) -> None:
        self.span_info, self._statistics = span, {name: MemberStatistics() for name in member_arrays}
        self._shards: dict[str | None, ShardWriter] = {}
        pixels = [ArraySpec("pixel_digests", "<u4", (span.views, span.rows))]
        planned = sum(spec.nbytes + spec.checksums.nbytes for specs in member_arrays.values() for spec in specs)
        free = files.free_bytes(writer.path)
        if free < planned:
            raise DiskSpaceError(
                f"{writer.path}: the next shards need {planned / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB left",
                tip="free some space and run the same command again: finished shards are kept",
            )
        try:
            self._open(writer, None, view_shard_path(span.index), "views", pixels)
            for name, specs in member_arrays.items():
                self._open(writer, name, member_shard_path(name, span.index), "logits", specs)
        except BaseException:
            self.discard()
            raise

    def _open(
        self, writer: CacheWriter, member: str | None, relative: str, kind: str, specs: Sequence[ArraySpec]
    ) -> None:
        self._shards[member] = ShardWriter(writer.path / relative, specs, kind=kind, tag=str(writer.part))

    def append(self, member: str | None, arrays: Mapping[str, Any], statistics: MemberStatistics | None = None) -> None:
        """Append records in view-major order: (n, ...) per data set. `member=None` is the table of pixel digests."""
        for name, rows in arrays.items():
            self._shards[member].append(name, rows)
        if member is not None and statistics is not None:
            self._statistics[member] += statistics

    def finish(self) -> dict[str, Any]:
        """Close, check and name every shard; returns the journal entry."""
        span, stored = self.span_info, []
        for member, shard in self._shards.items():
            relative = view_shard_path(span.index) if member is None else member_shard_path(member, span.index)
            stored.append(
                shard.finish(
                    relative_path=relative,
                    member=member,
                    rows=(span.row_start, span.row_stop),
                    views=(span.view_start, span.view_stop),
                )
            )
        return {
            "span": span.index,
            "files": [file.to_json() for file in stored],
            "statistics": {name: s.to_json() for name, s in self._statistics.items()},
        }

    def discard(self) -> None:
        for shard in self._shards.values():
            shard.discard()


def planned_threads(path: Path) -> int | None:
    """The thread count a dump under way was started with: its other ranks and its resumes take it over."""
    try:
        return int(json.loads((path / PLAN).read_bytes())["plan"]["made_with"]["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def _take_lock(path: Path, part: Part, *, announce: bool = True) -> int:
    """The part's lock, or LockedError naming who holds it. The kernel releases it when the process ends, however it ends."""
    try:
        fd = take_lock(path)
    except BlockingIOError:
        holder = path.read_text("utf-8", "replace").strip() or "unknown"
        raise LockedError(
            f"{path.parent.parent}: part {part.index} of {part.count} is being written by another process: {holder}",
            tip="wait for it, end it, or give this process a part of its own with --part i/n",
        ) from None
    if not announce:
        return fd
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"host {socket.gethostname()}, pid {os.getpid()}, since {started}\n".encode(), 0)
    return fd

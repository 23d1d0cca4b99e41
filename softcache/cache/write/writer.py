"""The dump's side of a cache: plan first, then shards with a journal, the manifest last.

What the manifest does not name does not exist. A process killed at any moment loses at most the spans it was writing.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.canonical import canonical_json, differences
from softcache.cache.checksums import sha256_of
from softcache.cache.dump_folder import PLAN, Planned, read_journals, read_planned, work_folder
from softcache.cache.file_entry import StoredFile
from softcache.cache.file_lists import ListedFiles, make_lists
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import Plan
from softcache.cache.plan_rules import check_plan
from softcache.cache.positions import PositionIndex, Positions, check_positions
from softcache.cache.reader import read_candidates, read_constants, read_index, read_samples
from softcache.cache.samples import SampleTable
from softcache.cache.schema import (
    CANDIDATES,
    CARD,
    FORMAT_VERSION,
    MANIFEST,
    MANIFESTS,
    MERGING,
    PROBE,
    PROVENANCE,
    SAMPLES,
    TOKENIZER,
    WORK,
    ArraySpec,
    Span,
    dense_shard_path,
    index_path,
    member_shard_path,
    view_shard_path,
)
from softcache.cache.statistics import MemberStatistics
from softcache.cache.strict_json import JOURNALED, PLANNED, read_shape
from softcache.cache.write.shard import ShardWriter, constants_files, write_plain, write_shard
from softcache.errors import CacheError, DumpError, LockedError, PlanMismatchError, SoftcacheError
from softcache.files import durable
from softcache.files.durable import OpenFile
from softcache.files.inside import open_inside, refuse_linked_folders
from softcache.files.locks import holder_of, release_lock, sign, take_lock, waiting_lock

PACKAGES = {
    "softcache",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
}  # of what equal bytes depend on, which can be installed
VERSION = re.compile(r"[0-9][0-9A-Za-z.+]{0,30}")


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
        positions: of each index that this round writes; of version 2, as what follows.
        candidates: the arrays of candidates.h5; empty where there are none.
        tokenizer: tokenizer.json, where the classes are its ids.
    """

    samples: SampleTable
    probe: Mapping[str, np.ndarray] = field(default_factory=dict)
    constants: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    positions: Mapping[str, Positions] = field(default_factory=dict)
    candidates: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokenizer: bytes | None = None

    def fingerprint(self, plan: Plan) -> str:
        """Of the transfer set."""
        labelled = [self.positions[index.name] for index in plan.indexes if index.labels]
        return self.samples.fingerprint(self.candidates, labelled)


def refuse_foreign_folder(path: Path) -> None:
    """Raise DumpError where a new cache cannot begin: a file, or a folder of somebody else's files."""
    if path.exists() and not path.is_dir():
        raise DumpError(f"{path}: is a file", tip="choose another --out")
    if not path.is_dir():
        return
    with durable.explained("listing", path):
        occupied = any(path.iterdir())
    # looked for after the listing: a process that begins at the same moment makes this folder before anything else
    if occupied and not (path / WORK).is_dir():
        raise DumpError(f"{path}: holds files that no dump wrote", tip="choose another --out, or empty the folder")


def refuse_unfinished_merge(path: Path) -> None:
    """PlanMismatchError where files of other caches are still being copied into a folder."""
    if (path / WORK / MERGING).exists():
        raise PlanMismatchError(
            f"{path}: a merge is not finished there",
            tip="finish it with its own `softcache merge` command, choose another folder, or delete this one",
        )


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
        round_number = len(plan.rounds) - 1
        self._round, self.work = round_number, work_folder(path, round_number)
        self.tag = f"{round_number}-{self.part}"  # of its temporary files
        if base is None:
            refuse_foreign_folder(path)
            refuse_unfinished_merge(path)
        refuse_linked_folders(path)
        durable.make_folder(self.work)
        durable.make_folder(path / MANIFESTS)
        lock: OpenFile | None = None
        try:
            with waiting_lock(self.work / "setup.lock"):
                self._refuse_other_split()
                lock = self._take_lock(self.work / f"part-{self.part}.lock")
                sign(lock)
                self._remove_leftovers(round_number)
                self.planned, self.samples = self._begin(plan, make_setup)
        except BaseException:
            if lock is not None:
                release_lock(lock)
            raise
        self._lock = lock
        self._journal = self.work / f"part-{self.part}.jsonl"
        self.bytes_written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        release_lock(self._lock)

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    def _refuse_other_split(self) -> None:
        """A living process that splits the same dump into another number of parts would write the same spans."""
        for lock in sorted(self.work.glob("part-*.lock")):
            if not lock.stem.endswith(f"-of-{self.part.count}"):
                release_lock(self._take_lock(lock))

    def _take_lock(self, path: Path) -> OpenFile:
        """The lock of a part, or LockedError naming who holds it."""
        try:
            return take_lock(path)
        except BlockingIOError:
            raise LockedError(
                f"{self.path}: part {self.part.index} of {self.part.count} is being written by another process: "
                f"{holder_of(path)}",
                tip="wait for it, end it, or give this process a part of its own with --part i/n",
            ) from None

    def _folders(self) -> Iterator[Path]:
        """Every folder of the cache that a round may write into, those that are there."""
        yield from (self.path, self.path / WORK, self.work, self.path / MANIFESTS, self.path / "views")
        members = self.path / "members"
        yield members
        if members.is_dir():
            yield from (folder for folder in sorted(members.iterdir()) if folder.is_dir())

    def _remove_leftovers(self, round_number: int) -> None:
        """What killed processes left unfinished: of this part, and of parts of another split, none of which lives."""
        for folder in filter(Path.is_dir, self._folders()):
            for file in folder.glob(f"*.tmp-{round_number}-*"):
                if file.name.endswith(f".tmp-{self.tag}") or not file.name.endswith(f"-of-{self.part.count}"):
                    durable.remove(file)

    def _begin(self, plan: Plan, make_setup: Callable[[], Setup]) -> tuple[Planned, SampleTable]:
        found = read_planned(self.path, self._round)
        if found is None:
            setup = make_setup()
            fingerprint = self.base.plan.samples.fingerprint if self.base else setup.fingerprint(plan)
            plan = replace(plan, samples=replace(plan.samples, fingerprint=fingerprint))
            if not self.base and (self.path / MANIFEST).exists():  # one that was copied has no plan beside it
                there = read_manifest(self.path)
                if canonical_json(there.plan.to_json()) != canonical_json(plan.to_json()):
                    raise PlanMismatchError(
                        f"{self.path}: holds another cache, id {there.id[:12]}...",
                        tip="choose another folder for the new one",
                    )
            check_plan(plan)
            self._check_positions(plan, setup)
            planned = Planned(plan, self.base.id if self.base else None, self._write_setup(plan, setup))
            data = planned.to_bytes()
            read_shape(
                data, PLANNED[plan.format]
            )  # what no reader would take is found before the first row is paid for
            durable.write_whole(self.work / PLAN, data, tag=self.tag)
            return planned, setup.samples
        wanted = replace(plan, samples=replace(plan.samples, fingerprint=found.plan.samples.fingerprint))
        changed = list(differences(*(json.loads(canonical_json(p.to_json())) for p in (wanted, found.plan))))
        if found.base != (self.base.id if self.base else None):
            changed.append(("the cache it extends", self.base.id[:12] if self.base else None, (found.base or "")[:12]))
        if changed:
            listing = "; ".join(f"{name} was {old!r}, is now {new!r}" for name, new, old in changed[:6])
            if not self.base and (self.path / MANIFEST).exists():
                raise PlanMismatchError(
                    f"{self.path}: holds another cache, id {read_manifest(self.path).id[:12]}...: {listing}",
                    tip="choose another folder for the new one",
                )
            raise PlanMismatchError(
                f"{self.path}: was started with another plan: {listing}",
                tip=self._way_on({name: old for name, _, old in changed}),
            )
        return found, read_samples(BoundFiles(self.path, [*found.files, *self._base_setup()]), found.plan)

    def _way_on(self, before: Mapping[str, Any]) -> str:
        """What to do with a round that was begun otherwise: told what it was, of all that is another now."""
        packages = {name.rpartition(".made_with.")[2]: str(version) for name, version in before.items()}
        if set(packages) <= PACKAGES and all(VERSION.fullmatch(version) for version in packages.values()):
            wanted = " ".join(f"{name}=={version.partition('+')[0]}" for name, version in packages.items())
            finish = f"finish it with what it was begun with: pip install {wanted}"
        else:
            finish = "repeat the command it was started with to resume it"
        if self.base:
            return f"{finish}; or delete {self.work} to give it up"
        return f"{finish}; or choose another --out, or delete {self.path}, in which nothing is finished"

    def _check_positions(self, plan: Plan, setup: Setup) -> None:
        """What no reader would take is found before the first row is paid for."""
        if not plan.rounds[-1].indexes:
            return
        known = setup.candidates or read_candidates(BoundFiles(self.path, self._base_setup()))
        counts = {"candidates": len(known.get("ids", ())), "classes": plan.num_classes}
        for name in plan.rounds[-1].indexes:
            check_positions(setup.positions[name], plan.index(name), f"index {name!r}", **counts)

    def _write_setup(self, plan: Plan, setup: Setup) -> list[StoredFile]:
        """In the order of the manifest, or of a list."""
        written, number = [], len(plan.rounds) - 1
        write = partial(self._write_file, plan.format)
        if self.base is None:
            written.append(write(SAMPLES, setup.samples.arrays(), kind="samples"))
            if setup.probe:
                written.append(write(PROBE, setup.probe, kind="probe"))
            if setup.candidates:
                written.append(write(CANDIDATES, setup.candidates, kind="candidates"))
            if setup.tokenizer is not None:
                written.append(write_plain(self.path / TOKENIZER, setup.tokenizer, TOKENIZER, self.tag))
        layout = plan.rounds[-1].layout
        views = (layout.first_view, layout.first_view + layout.num_views)
        for name in plan.rounds[-1].indexes:
            positions = setup.positions[name].arrays()
            written.append(write(index_path(name, number), positions, kind="positions", index=name, views=views))
        for member, constants in setup.constants.items():
            for relative, arrays in constants_files(member, constants, plan.format):
                written.append(write(relative, arrays, kind="constants", member=member))
        return written

    def _write_file(self, format: int, relative: str, arrays: Mapping[str, np.ndarray], **about: Any) -> StoredFile:
        return write_shard(self.path / relative, arrays, relative_path=relative, tag=self.tag, format=format, **about)

    def constants(self, member: str) -> dict[str, np.ndarray]:
        """What was fitted for a member, as it lies on disk: the same for every part and every resume."""
        return read_constants(BoundFiles(self.path, [*self._base_setup(), *self.planned.files]), member)

    def index(self, name: str) -> PositionIndex:
        """An index over the views of this round and of those before it."""
        return read_index(BoundFiles(self.path, [*self._base_setup(), *self.planned.files]), self.plan, name)

    def _base_setup(self) -> list[StoredFile]:
        """The files of the cache that is extended which belong to no part."""
        return [] if self.base is None else list(BoundFiles(self.path, self.base.files).setup_files())

    def finished_spans(self) -> dict[int, dict[str, Any]]:
        """Journal entries of every span whose files are there, over all parts."""
        finished = {}
        for index, entries in read_journals(self.path, self._round).items():
            there = [e for e in entries if self._belongs(index, e)]
            there = [e for e in there if all(_has_size(self.path, f["path"], int(f["bytes"])) for f in e["files"])]
            if len(there) > 1:  # written twice, with other bytes: the entry that fits the files is the one that holds
                there = [e for e in there if all(_has_sha256(self.path, f["path"], f["sha256"]) for f in e["files"])]
            if there:
                finished[index] = there[-1]
        return finished

    def _belongs(self, index: int, entry: Mapping[str, Any]) -> bool:
        """Whether a journal's entry names the files of its span, and nothing else."""
        one = self.plan.rounds[-1]
        wanted = {member_shard_path(member, index) for member in one.members}
        wanted |= {view_shard_path(index)} if one.new_views else set()
        found = {file["path"] for file in entry["files"]}
        return wanted <= found <= wanted | {dense_shard_path(member, index) for member in one.members}

    def my_spans(self) -> list[Span]:
        """The spans of this part that are still to be written."""
        done, layout = self.finished_spans(), self.plan.rounds[-1].layout
        return [span for span in layout.spans() if self.part.owns(span.index) and span.index not in done]

    def span(self, span: Span, member_arrays: Mapping[str, Sequence[ArraySpec]]) -> AbstractContextManager[SpanWriter]:
        """Write one span: `with writer.span(span, {member: data sets}) as out: out.append(...)`; committed at the end."""
        return written_span(self, span, member_arrays, self._note)

    def _note(self, entry: Mapping[str, Any]) -> None:
        """A span is finished: one line in the journal."""
        line = canonical_json(entry)
        read_shape(line, JOURNALED[self.plan.format])
        durable.append_line(self._journal, line)
        self.bytes_written += sum(file["bytes"] for file in entry["files"])

    def commit(self, card: Callable[[Manifest], str], provenance: Mapping[str, Any]) -> Manifest | None:
        """Write the manifest if every span of every part is journaled; None when some are missing.

        It becomes the newest unless the cache was extended since.

        The manifest is a function of plan, base and journals alone: whoever commits, its bytes are the same.
        """
        done, layout = self.finished_spans(), self.plan.rounds[-1].layout
        if any(span.index not in done for span in layout.spans()):
            return None
        written = list(self.planned.files)
        for span in layout.spans():
            written += [StoredFile.from_json(file) for file in done[span.index]["files"]]
        data = self._manifest_bytes(written)
        manifest = Manifest.from_bytes(data, self.path / MANIFEST)
        self._sync_folders([*(self.base.files if self.base else ()), *written])
        told = self.path / PROVENANCE if self.base is None else self.work / PROVENANCE
        if not told.exists():
            durable.write_whole(told, json.dumps(dict(provenance), indent=1).encode(), tag=self.tag)
        durable.write_whole(self.path / MANIFESTS / f"{manifest.id}.json", data, tag=self.tag)
        with waiting_lock(self.path / WORK / "commit.lock"):
            if not self._was_extended():
                durable.write_whole(self.path / CARD, card(manifest).encode("utf-8"), tag=self.tag)
                durable.write_whole(self.path / MANIFEST, data, tag=self.tag)
        return manifest

    def _manifest_bytes(self, written: Sequence[StoredFile]) -> bytes:
        """The manifest with the files of this round; of version 2 their lists are written first."""
        before = self.base.files if self.base else ()
        if self.plan.format == FORMAT_VERSION:
            return Manifest(self.plan, [*before, *written]).to_bytes()
        lists = list(before.lists) if isinstance(before, ListedFiles) else []
        made = make_lists(self.plan, self._round, written)
        for about, data in made:
            durable.write_whole(self.path / about.path, data, tag=self.tag)
            lists.append(about)
        files = ListedFiles(self.path, self.plan, lists)
        for number in range(len(lists) - len(made), len(lists)):
            files.read(number)  # what no reader would take is not published
        return Manifest(self.plan, files).to_bytes()

    def _sync_folders(self, stored: Sequence[StoredFile]) -> None:
        """A process that died between making a folder and syncing its parent left that to us."""
        folders = {self.path}
        for file in stored:
            folders |= {self.path / folder for folder in Path(file.path).parents}
        for folder in sorted(folders):
            durable.sync_folder(folder)
        with suppress(SoftcacheError):  # the folder around the cache may be somebody else's, not ours to open
            durable.sync_folder(self.path.parent)

    def _was_extended(self) -> bool:
        """Whether a later round is there already: its manifest stays the newest."""
        try:
            return len(read_manifest(self.path).plan.rounds) > len(self.plan.rounds)
        except CacheError:  # none yet, or a damaged one
            return False


class SpanTarget(Protocol):
    """What writes spans: a new round, or a repair."""

    @property
    def path(self) -> Path:
        """The folder that the files go into."""

    @property
    def tag(self) -> str:
        """Of temporary files."""

    @property
    def plan(self) -> Plan:
        """Its last round is the one that is written."""

    @property
    def bytes_written(self) -> int:
        """So far."""


class SpanWriter:
    """The open shards of one span: one per member, and one with the pixel digests where its views are new.

    Records that a codec keeps dense are gathered here and written beside the shard when it is finished.
    """

    def __init__(self, writer: SpanTarget, span: Span, member_arrays: Mapping[str, Sequence[ArraySpec]]) -> None:
        self.span_info, self._writer = span, writer
        self._statistics = {name: MemberStatistics() for name in member_arrays}
        self._shards: dict[str | None, ShardWriter] = {}
        self._dense: dict[str, list[np.ndarray]] = {}
        planned = sum(spec.nbytes + spec.checksums.nbytes for specs in member_arrays.values() for spec in specs)
        durable.require_room(writer.path, planned, "the next shards need")
        try:
            if writer.plan.rounds[-1].new_views:
                digests = [ArraySpec(one, "<u4", (span.views, span.rows)) for one in writer.plan.views.digests]
                self._open(None, view_shard_path(span.index), "views", digests)
            for name, specs in member_arrays.items():
                self._open(name, member_shard_path(name, span.index), "member", specs)
        except BaseException:
            self.discard()
            raise

    def _open(self, member: str | None, relative: str, kind: str, specs: Sequence[ArraySpec]) -> None:
        format = self._writer.plan.format
        path = self._writer.path / relative
        self._shards[member] = ShardWriter(path, specs, kind=kind, tag=self._writer.tag, format=format)

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

    def append_dense_of(self, member: str, rows: np.ndarray, records: np.ndarray, at: np.ndarray, offset: int) -> None:
        """Keep (n, C) float16 rows, and write each one's number into byte `offset` on of its record, `records[at]`."""
        first = self.append_dense(member, rows)
        numbers = np.arange(first, first + len(at), dtype="<u4")
        records[at, offset : offset + 4] = numbers.view(np.uint8).reshape(len(at), 4)

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
                        tag=self._writer.tag,
                        format=self._writer.plan.format,
                        member=member,
                        **place,
                    )
                )
        return {"span": span.index, "files": [file.to_json() for file in stored]}

    def discard(self) -> None:
        for shard in self._shards.values():
            shard.discard()


@contextmanager
def written_span(
    target: SpanTarget,
    span: Span,
    member_arrays: Mapping[str, Sequence[ArraySpec]],
    finished: Callable[[Mapping[str, Any]], None],
) -> Iterator[SpanWriter]:
    """The open shards of a span; at the end they get their names, and `finished` their journal entry."""
    out = SpanWriter(target, span, member_arrays)
    try:
        yield out
        entry = out.finish()
    except BaseException:
        out.discard()
        raise
    finished(entry)


def _has_size(root: Path, relative: str, size: int) -> bool:
    """Whether it is a file of this size; a link is none."""
    with durable.explained("stat", root / relative):
        try:
            found = os.lstat(root / relative)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _has_sha256(root: Path, relative: str, digest: str) -> bool:
    with durable.explained("read", root / relative):
        fd = open_inside(root, relative)
        try:
            return sha256_of(fd) == digest
        finally:
            os.close(fd)

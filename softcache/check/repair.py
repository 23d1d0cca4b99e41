"""softcache repair: make damaged files again, from the teacher or from another copy, and prove that they are the same bytes.

Nothing is guessed: a file takes its place only when its sha256 is the one that the manifest has named since the dump.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.bound_files import BoundFiles
from softcache.cache.card import card
from softcache.cache.dump_folder import read_journals, read_planned
from softcache.cache.file_entry import FileList, StoredFile
from softcache.cache.file_lists import make_lists
from softcache.cache.manifest import Manifest, known_ids, read_manifest
from softcache.cache.plan import Plan
from softcache.cache.provenance import provenance_path, read_provenance
from softcache.cache.reader import CacheReader, read_samples
from softcache.cache.samples import SampleTable, first_order
from softcache.cache.schema import CARD, MANIFEST, MANIFESTS, MAX_LIST_BYTES, PROBE, SAMPLES, TOKENIZER, index_path
from softcache.cache.strict_json import MAX_BYTES
from softcache.cache.write.rewriter import Rewriter
from softcache.cache.write.shard import constants_files
from softcache.check.replay import told_unasked
from softcache.check.verify import damaged_files
from softcache.config import DumpConfig
from softcache.data.drift import make_probe
from softcache.data.join import find_ids
from softcache.data.loading import Partners, ViewedSet
from softcache.data.transfer_set import TransferSet
from softcache.data.views import Policy
from softcache.dump.choose_codec import Prober, storage_of
from softcache.dump.flow import write_spans
from softcache.dump.job import order_of
from softcache.dump.made_with import left_out_before
from softcache.dump.open_teachers import open_teachers
from softcache.dump.pixels import PixelCheck, renderer
from softcache.dump.position_index import TOKENS, WORDS, check_has_index, in_rows, index_of, records_of
from softcache.dump.progress import DumpProgress
from softcache.dump.samples import make_samples, open_samples
from softcache.dump.teacher import Teacher
from softcache.errors import (
    CacheError,
    ConfigError,
    DamagedCacheError,
    LinkedCacheError,
    ModelError,
    SoftcacheError,
    UntrustedError,
)
from softcache.files import durable
from softcache.files.inside import read_inside, refuse_linked_folders
from softcache.machine import pick_device, pick_workers

MOST_THREADS = 2**10


@dataclass
class Repaired:
    """What a repair did.

    Attributes:
        mended: files that are again what the manifest says.
        left: files that are not, each with the reason.
    """

    path: str
    mended: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 1 if self.left else 0

    def text(self) -> str:
        if not self.mended and not self.left:
            return f"{self.path}: nothing is damaged"
        lines = [f"{self.path}: {len(self.mended)} files mended, {len(self.left)} left"]
        lines += [f"  mended  {name}: the same bytes as at the dump" for name in self.mended]
        lines += [f"  left    {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Means:
    """What a repair may use beside the cache.

    Attributes:
        source: another copy of the cache.
        data, teachers: the transfer set and the teachers; None and () take those that provenance.json names, with `allow_code`
            only.
        device, workers: as in a dump.
        allow_code: believe what the cache names: open that data and those teachers, run transforms of its views.
        classes_map: as the dump was given it, where it was.
    """

    source: Path | None = None
    data: str | None = None
    teachers: Sequence[str] = ()
    device: str = "auto"
    workers: int | None = None
    allow_code: bool = False
    classes_map: str | None = None


def run(path: Path, means: Means, *, quiet: bool = False) -> Repaired:
    """Mend a cache.

    Raises:
        CacheError: it, or the other copy, is no cache, or no manifest of it is left.
    """
    result = Repaired(str(path))
    if means.source is not None and not means.source.is_dir():
        raise CacheError(
            f"--from {means.source}: there is no such folder", tip="give the folder of another copy of the cache"
        )
    manifest = restore_manifest(path, result, means.source)
    restore_lists(path, manifest, result, means.source)
    damaged = [file.path for file in damaged_files(path, manifest, quiet=quiet)]
    if not damaged:
        return result
    sizes = {file.path: file.nbytes for file in manifest.known_files()}
    durable.require_room(path, sum(sizes[name] for name in damaged), "the damaged files need")
    with Rewriter(path, manifest, damaged) as out:
        if means.source is not None:
            left = [name for name in damaged if not out.copy(means.source, name)]
            result.left |= dict.fromkeys(left, f"is not whole in {means.source} either")
        else:
            why = _make_again(path, manifest, out, means, damaged, quiet=quiet)
            result.left |= {name: why for name in damaged if name not in out.mended}
        made_with = ", ".join(f"{k} {v}" for k, v in manifest.plan.made_with.items())
        result.left |= dict.fromkeys(out.differing, f"came out as other bytes; it was made with {made_with}")
        result.mended += out.mended
    return result


def _make_again(
    path: Path, manifest: Manifest, out: Rewriter, means: Means, damaged: Sequence[str], *, quiet: bool
) -> str:
    """Round by round; returns why the rest could not be done."""
    if manifest.plan.parents and len(manifest.plan.rounds) > 1:
        parents = ", ".join(parent.id[:12] for parent in manifest.plan.parents)
        return (
            f"was copied, as a whole or in part, out of {parents}: make it as it was made, or give --from another copy"
        )
    if manifest.plan.parent is not None:
        parent = manifest.plan.parent.id[:12]
        return f"was taken out of the cache {parent}: run that `softcache subset` again, or give --from another copy"
    if manifest.plan.parents:
        parents = ", ".join(parent.id[:12] for parent in manifest.plan.parents)
        return f"was merged of the caches {parents}: run that `softcache merge` again, or give --from another copy"
    written = {(WORDS, WORDS, False), (TOKENS, TOKENS, True)}
    if any((index.name, index.kind, index.listed) not in written for index in manifest.plan.indexes):
        return "was not written by a dump of this version: give --from another copy"
    try:
        for number in range(len(manifest.plan.rounds)):
            if out.concerns(number):
                _mend_round(path, manifest, number, out, means, damaged, quiet=quiet)
    except UntrustedError:
        raise
    except SoftcacheError as exc:
        return f"{exc.message}; {exc.tip}"
    return "was not written by any dump of this cache"


def restore_manifest(path: Path, result: Repaired, source: Path | None = None) -> Manifest:
    """The cache's manifest; mended where it can be, from its own immutable copy or from another copy of the cache."""
    refuse_linked_folders(path)
    try:
        manifest = read_manifest(path)
    except LinkedCacheError:
        raise
    except DamagedCacheError:
        candidates = [one for folder in (path, source) if folder is not None for one in _whole_manifests(folder)]
        if not candidates:
            raise
        manifest = max(candidates, key=lambda one: len(one.plan.rounds))
        durable.write_whole(path / MANIFEST, manifest.to_bytes(), tag="repair")
        result.mended.append(MANIFEST)
    kept = f"{MANIFESTS}/{manifest.id}.json"
    if not _has_sha256(path, kept, manifest.id):
        durable.make_folder(path / MANIFESTS)
        durable.write_whole(path / kept, manifest.to_bytes(), tag="repair")
        result.mended.append(kept)
    if not (path / CARD).is_file():
        unread = left_out_before(path, len(manifest.plan.rounds))
        durable.write_whole(path / CARD, card(manifest, unread).encode(), tag="repair")
    return manifest


def restore_lists(path: Path, manifest: Manifest, result: Repaired, source: Path | None) -> None:
    """Mend the lists of a cache of version 2: from another copy, or from the journals of the dumps that wrote them."""
    damaged = manifest.list_faults()
    rounds = {one.round for one, _ in damaged}
    again = {about.path: data for number in sorted(rounds) for about, data in _lists_again(path, manifest, number)}
    for one, why in damaged:
        candidates = [again[one.path]] if one.path in again else []
        if source is not None:
            with suppress(FileNotFoundError, DamagedCacheError):
                candidates.append(read_inside(source, one.path, MAX_LIST_BYTES))
        data = next((data for data in candidates if sha256(data).hexdigest() == one.sha256), None)
        if data is None:
            result.left[one.path] = f"{why}; neither another copy nor the journals below dump/ have it"
        else:
            durable.write_whole(path / one.path, data, tag="repair")
            result.mended.append(one.path)


def _lists_again(path: Path, manifest: Manifest, number: int) -> Iterator[tuple[FileList, bytes]]:
    """The lists of a round, from what its dump noted of every file; none where that is not there any more."""
    with suppress(DamagedCacheError):
        planned, journals = read_planned(path, number), read_journals(path, number)
        parts = [span.index for span in manifest.plan.rounds[number].layout.spans()]
        if planned is not None and all(len(journals.get(part, ())) == 1 for part in parts):
            noted = (file for part in parts for entry in journals[part] for file in entry["files"])
            yield from make_lists(planned.plan, number, [*planned.files, *map(StoredFile.from_json, noted)])


def _has_sha256(path: Path, relative: str, digest: str) -> bool:
    try:
        return sha256(read_inside(path, relative, MAX_BYTES)).hexdigest() == digest
    except (FileNotFoundError, DamagedCacheError):
        return False


def _whole_manifests(folder: Path) -> list[Manifest]:
    """Those of manifests/ that are what their names say."""
    found = []
    for one in known_ids(folder):
        try:
            found.append(read_manifest(folder, id=one))
        except CacheError:
            continue
    return found


def _mend_round(
    path: Path, manifest: Manifest, number: int, out: Rewriter, means: Means, damaged: Sequence[str], *, quiet: bool
) -> None:
    """Everything damaged that one dump wrote, in the order in which one thing needs another."""
    plan, one = manifest.plan, manifest.plan.rounds[number]
    config = _config_of(path, manifest, number, means, selected=SAMPLES in damaged)
    torch.set_num_threads(_threads(path, one.made_with["threads"]))
    transfer_set, ids = open_samples(config)
    if SAMPLES not in damaged:  # then they say themselves which of the data they are
        transfer_set = _those_of(read_samples(BoundFiles(path, manifest.files), plan), transfer_set, ids)
    if number == 0 and SAMPLES in damaged:
        order = first_order(plan.samples.count, plan.samples.order, int(plan.samples.order_seed))
        table = make_samples(
            transfer_set,
            ids,
            order,
            policy=Policy(),
            collates=(),
            store_keys=plan.samples.has_keys,
            workers=0,
            quiet=quiet,
        )
        out.write(SAMPLES, table.arrays())
    out.samples = read_samples(BoundFiles(path, manifest.files), plan)
    order = order_of(out.samples, transfer_set)
    check_has_index(transfer_set, plan, None if TOKENIZER in damaged else CacheReader(path).tokenizer())
    positions = in_rows(transfer_set, order)
    if number == 0 and transfer_set.rendering is not None:
        out.write_plain(TOKENIZER, transfer_set.rendering.vocabulary.definition)
    index = index_of(transfer_set)
    if index is not None and positions is not None and index_path(index.name, number) in damaged:
        out.write(index_path(index.name, number), positions.arrays())
    viewed = ViewedSet(
        transfer_set,
        Policy.of_cache(plan.views, allow_code=means.allow_code),
        (),
        partners=Partners(transfer_set, order),
    )
    if number == 0 and PROBE in damaged:
        render = renderer(viewed, order)
        out.write(PROBE, make_probe(render, plan.samples.count, one.layout.num_views))
    spans = out.spans_of(number)
    unfitted = {m for m in one.members if _first_round(plan, m) == number and _lost_constants(manifest, m, damaged)}
    wanted = unfitted.union(*map(out.members_of, spans))
    most_tokens = one.made_with.get("batch_tokens")
    prober = Prober(viewed, order, config.batch_size, batch_tokens=most_tokens)
    storages = {}
    if (
        wanted
        and not means.teachers
        and (refusal := told_unasked(path, means.allow_code, teacher=_told(path, number)["teacher"]))
    ):
        raise refusal
    for teacher in _teachers_of(manifest, wanted, config, prober, transfer_set):
        constants = None if teacher.name in unfitted else CacheReader(path).constants(teacher.name)
        of_member = manifest.files_of("constants", teacher.name)
        names = {name for file in of_member for name in file.arrays}
        storage = storage_of(plan.member(teacher.name), teacher, constants, prober, names)
        if teacher.name in unfitted:
            for relative, arrays in constants_files(teacher.name, storage.constants(), plan.format):
                out.write(relative, arrays)
        storages[teacher] = storage
    clock = DumpProgress(out, sum(span.rows * span.views for span in spans), quiet=quiet or not spans)
    pixels = None if one.new_views else PixelCheck(CacheReader(path), order, viewed)
    for span in spans:
        chosen = [teacher for teacher in storages if teacher.name in out.members_of(span)]
        kept = {teacher.name: storages[teacher] for teacher in chosen}
        workers = pick_workers(means.workers, pick_device(config.device))
        in_part = records_of(positions, one.layout)
        write_spans(
            out,
            [span],
            viewed,
            order,
            chosen,
            kept,
            config.batch_size,
            workers,
            clock,
            pixels,
            in_part=in_part,
            batch_tokens=most_tokens,
        )
    clock.close()


def _threads(path: Path, told: Any) -> int:
    """Of the dump, on which its bytes may depend."""
    if not 1 <= int(told) <= MOST_THREADS:
        raise CacheError(f"{path}: says that it was made by {told} threads", tip="--from another copy of the cache")
    return int(told)


def _lost_constants(manifest: Manifest, member: str, damaged: Sequence[str]) -> bool:
    return any(file.path in damaged for file in manifest.files_of("constants", member))


def _first_round(plan: Plan, member: str) -> int:
    """The round that fitted a member's codec and wrote its constants."""
    return next(number for number, one in enumerate(plan.rounds) if member in one.members)


def _those_of(table: SampleTable, transfer_set: TransferSet, ids: np.ndarray) -> TransferSet:
    """The data's samples that the cache has, where it has more; as it is where some of the cache's are missing."""
    found = find_ids(ids, table.ids)
    return transfer_set.select(np.sort(found)) if len(ids) > len(table) and (found >= 0).all() else transfer_set


def _told(path: Path, number: int) -> dict[str, Any]:
    """What provenance.json says of a round's command: "data", "samples", "without" (str or None), and lists of strings."""
    command = read_provenance(path, number).get("command", {})
    told: dict[str, Any] = {}
    for key in ("data", "samples", "without"):
        told[key] = command[key] if isinstance(command.get(key), str) else None
    for key in ("teacher", "keep_labels", "drop_labels"):
        value = command.get(key)
        told[key] = tuple(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else ()
    return told


def _config_of(path: Path, manifest: Manifest, number: int, means: Means, *, selected: bool) -> DumpConfig:
    """The settings of the dump that wrote a round: what the manifest fixes, then what was asked, then what may be believed.

    Args:
        selected: with the classes that were chosen, which are told where samples.h5 can no longer tell them.
    """
    made_with = manifest.plan.rounds[number].made_with
    told = _told(path, number)
    if means.data is None:
        asked = {"data": told["data"], **({} if means.teachers else {"teacher": told["teacher"]})}
        if refusal := told_unasked(path, means.allow_code, **asked):
            raise refusal
    data = means.data or told["data"]
    if data is None:
        raise ConfigError(
            f"{provenance_path(path, number)} does not say which data this cache was made from",
            tip="give --data, and --teacher for each teacher",
        )
    return DumpConfig(
        out=str(path),
        data=data,
        keep_labels=told["keep_labels"] if selected else (),
        drop_labels=told["drop_labels"] if selected else (),
        samples=told["samples"] if selected and means.allow_code else None,
        without=told["without"] if selected and means.allow_code else None,
        classes_map=means.classes_map,
        teacher=tuple(means.teachers) or (told["teacher"] if means.allow_code else ()),
        allow_code=means.allow_code,
        device=means.device,
        batch_size=int(made_with["batch_size"]),
        threads=int(made_with["threads"]),
        autocast=str(made_with["autocast"]),
    )


def _teachers_of(
    manifest: Manifest, names: set[str], config: DumpConfig, prober: Prober, transfer_set: TransferSet
) -> list[Teacher]:
    """The teachers of these members, found by their fingerprints; ModelError when one is not at hand."""
    if not names:
        return []
    opened = open_teachers(config, prober, transfer_set, pick_device(config.device), again=True)
    teachers = {teacher.fingerprint: teacher for teacher in opened}
    found = []
    for name in sorted(names):
        member = manifest.plan.member(name)
        if member.fingerprint not in teachers:
            raise ModelError(
                f"the teacher of member {name!r} ({member.model}) is not among the ones given",
                tip="give it with --teacher as it was at the dump, or --from another copy of the cache",
            )
        teachers[member.fingerprint].name = name
        found.append(teachers[member.fingerprint])
    return found

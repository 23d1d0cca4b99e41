"""softcache verify: is this cache whole? Quick: names and sizes. Full: every byte, and the HDF5 structure around the data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.checksums import Damage, bad_blocks, damage_of, digest_of_sums, sha256_of
from softcache.cache.file_entry import StoredFile
from softcache.cache.hdf5_check import structure_faults
from softcache.cache.manifest import Manifest, known_ids, read_manifest
from softcache.cache.open_file import open_checked
from softcache.cache.reader import read_candidates, read_index, read_samples
from softcache.cache.schema import CANDIDATES, CRC_SUFFIX, MANIFESTS, SAMPLES, part_path
from softcache.cache.signatures import allowed_signers_of, count_of, read_signatures
from softcache.cache.strict_json import MAX_BYTES
from softcache.errors import DamagedCacheError, DriftError, LinkedCacheError, UnfinishedCacheError, first_offenders
from softcache.files.inside import read_inside
from softcache.report.progress import Meter

WHOLE, DAMAGED, UNFINISHED = 0, 1, 3


@dataclass
class Verdict:
    """What a check found.

    Attributes:
        state: "whole", "damaged" or "unfinished".
        full: whether every byte was read; else "whole" is what names and sizes tell.
        faults: one sentence each, naming file, data set, block, rows and samples.
        files, nbytes: how many files the manifest names, and their bytes.
        id: of the manifest.
        notes: what else there is to say of a whole cache.
        damaged: the files that are not as the manifest says.
        damage: the blocks of them that are known to be wrong.
    """

    path: str
    state: str
    faults: list[str] = field(default_factory=list)
    full: bool = False
    files: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    id: str = ""
    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"whole": WHOLE, "damaged": DAMAGED, "unfinished": UNFINISHED}[self.state]

    def text(self) -> str:
        if self.state == "whole":
            extent = "whole" if self.full else "whole by names and sizes"
            head = f"{self.path}: {extent}; {self.files} files, {self.nbytes / 1e6:,.1f} MB in {self.seconds:.2f} s, id {self.id}"
            return "\n".join([head, *(f"  {note}" for note in self.notes)])
        lines = [f"{self.path}: {self.state}", *(f"  {fault}" for fault in self.faults)]
        if self.state == "damaged":
            lines.append(f"  next: softcache repair {self.path} makes what is damaged again; or copy it again")
        return "\n".join(lines)


def run(
    path: Path,
    *,
    full: bool,
    quiet: bool = False,
    replay: int = 0,
    data: str | None = None,
    allow_code: bool = False,
    signed_by: Path | None = None,
) -> Verdict:
    """Check a cache. A folder that is no cache, or holds links, raises CacheError; damage is a verdict, not an exception.

    So does one that nobody of a list of signers has signed, where one is given.

    Args:
        full: every byte against its sha256, and the structure too.
        replay: how many records to render again; their pixels must be what the teacher saw.
        data: the transfer set for that; None: the one that provenance.json names, with `allow_code` only.
        allow_code: believe what the cache names, for that: open that data set, run transforms of its views.
        signed_by: a list of allowed signers.
    """
    started = time.monotonic()
    try:
        manifest = read_manifest(path)
    except UnfinishedCacheError as exc:
        return Verdict(str(path), "unfinished", [exc.message])
    except LinkedCacheError:  # such a store is not damaged: it is refused, with how to copy it
        raise
    except DamagedCacheError as exc:
        return Verdict(str(path), "damaged", [exc.message])
    verdict = Verdict(str(path), "whole", full=full, files=len(manifest.files), nbytes=manifest.nbytes, id=manifest.id)
    verdict.notes += _signature_notes(path, manifest.id, signed_by)
    verdict.faults += _copy_faults(path)
    for one, why in manifest.list_faults():
        verdict.damaged.append(one.path)
        verdict.faults.append(f"{one.path}: {why}")
    for file, found in _checked(path, manifest, full=full, quiet=quiet):
        verdict.damaged.append(file.path)
        verdict.faults += [f"{file.path}: {_told(path, manifest, one)}" for one in found]
        verdict.damage += [one for one in found if isinstance(one, Damage)]
    if full and not verdict.faults:
        verdict.faults += _sample_faults(path, manifest)
    if full and not verdict.faults:
        verdict.faults += _index_faults(path, manifest)
    if replay and not verdict.faults:
        # imported here: only a replay needs torch and the data set
        from softcache.check.replay import Replay

        try:
            verdict.notes.append(Replay(path, data, allow_code=allow_code, quiet=quiet).check(replay))
        except DriftError as exc:
            verdict.faults.append(f"replay: {exc.message}; {exc.tip}")
    if verdict.faults:
        verdict.state = "damaged"
    verdict.seconds = time.monotonic() - started
    return verdict


def _signature_notes(path: Path, id: str, signed_by: Path | None) -> Iterator[str]:
    """Who has signed it; SignatureError where somebody must have, and has not."""
    data = read_signatures(path, id)
    if signed_by is not None:
        yield f"signed by {', '.join(allowed_signers_of(data, id, signed_by))}"
    elif data:
        count = count_of(data)
        yield f"{count} signature{'s' * (count != 1)}, not looked at: --signed-by FILE"


def damaged_files(path: Path, manifest: Manifest, *, quiet: bool = False) -> list[StoredFile]:
    """The files whose bytes are not the manifest's."""
    return [file for file, _ in _checked(path, manifest, full=True, quiet=quiet)]


def _copy_faults(path: Path) -> Iterator[str]:
    """Every manifest that the cache has had must be what its name says."""
    for one in known_ids(path):
        try:
            found = sha256(read_inside(path, f"{MANIFESTS}/{one}.json", MAX_BYTES)).hexdigest()
        except LinkedCacheError:
            raise
        except DamagedCacheError as exc:
            yield exc.message
            continue
        if found != one:
            yield f"{MANIFESTS}/{one}.json: has sha256 {found}"


def _sample_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """What the table of samples says against itself or the manifest: every id once, and the fingerprint."""
    files, plan = BoundFiles(path, manifest.files), manifest.plan
    try:
        table, candidates = read_samples(files, plan), read_candidates(files)
        labelled = [next(read_index(files, plan, one.name).rounds()) for one in plan.indexes if one.labels]
    except DamagedCacheError as exc:
        yield exc.message
        return
    if table.has_duplicates():
        yield f"{SAMPLES}: a sample id stands there twice"
    elif candidates and len(np.unique(candidates["ids"])) < len(candidates["ids"]):
        yield f"{CANDIDATES}: a candidate's id stands there twice"
    elif table.fingerprint(candidates, labelled) != plan.samples.fingerprint:
        yield f"{SAMPLES}: its samples have another fingerprint than the manifest's"


def _index_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """Indexes whose numbers do not fit one another, and parts that have other positions than their index says."""
    files, plan = BoundFiles(path, manifest.files), manifest.plan
    indexes = {}
    for one in plan.indexes:
        try:
            indexes[one.name] = read_index(files, plan, one.name)
        except DamagedCacheError as exc:
            yield exc.message
            return
    for number, span in ((n, span) for n, one in enumerate(plan.rounds) if indexes for span in one.layout.spans()):
        for member in plan.rounds[number].members:
            file = manifest.part_file("member", member, span.index)
            for name, stored in file.arrays.items() if file is not None else ():
                index = None if name.endswith(CRC_SUFFIX) else plan.member(member).index_of(name)
                if index is not None and stored.shape[0] != (wanted := indexes[index].in_part(span)):
                    yield f"{part_path('member', member, span.index)}: {name!r} has {stored.shape[0]} positions, not {wanted}"


Found = str | Damage


def _checked(
    path: Path, manifest: Manifest, *, full: bool, quiet: bool
) -> Iterator[tuple[StoredFile, Sequence[Found]]]:
    """(file, what is wrong with it) of every file that is not as the manifest says."""
    whole, stopped = [], Event()
    pool = ThreadPoolExecutor(os.cpu_count())  # hashing lets other threads run
    try:
        with Meter(f"verify {path}", manifest.nbytes, unit="B", quiet=quiet or not full) as meter:
            files = manifest.known_files()
            checked = pool.map(lambda one: _file_faults(path, one, full, stopped), files)
            for file, found in zip(files, checked, strict=True):
                meter.add(file.nbytes)
                if found:
                    yield file, found
                else:
                    whole.append(file)
    finally:  # after Ctrl-C nobody waits for files of many GB
        stopped.set()
        pool.shutdown(cancel_futures=True)
    if full:  # HDF5 is opened where every byte is known to be the writer's
        hdf5 = (file for file in whole if file.kind != "tokenizer")
        for file, faults in structure_faults(path, hdf5):
            if faults:
                yield file, faults


def _file_faults(path: Path, file: StoredFile, full: bool, stopped: Event) -> Sequence[Found]:
    try:
        fd = open_checked(path, file)
    except LinkedCacheError:
        raise
    except DamagedCacheError as exc:
        return [exc.message.removeprefix(f"{path / file.path}: ")]
    try:
        found = sha256_of(fd, stop=stopped.is_set) if full else file.sha256
        if found == file.sha256:
            if not full or file.checksums is None or digest_of_sums(fd, file) == file.checksums:
                return []
            return [f"its checksums have another sha256 than the manifest's {file.checksums}"]
        # the checksums say where: they need no look while the whole file's hash is right
        names = [name for name in file.arrays if not name.endswith(CRC_SUFFIX)]
        damage = [damage_of(file, name, block) for name in names for block in bad_blocks(fd, file, name)]
        return [*damage, f"sha256 is {found}, the manifest says {file.sha256}"]
    finally:
        os.close(fd)


def _told(path: Path, manifest: Manifest, found: Found) -> str:
    """A fault as a sentence; samples are named where samples.h5 can still tell them."""
    if isinstance(found, str) or found.rows is None:
        return str(found)
    try:
        samples: Any = read_samples(BoundFiles(path, manifest.files), manifest.plan)
    except DamagedCacheError:
        return str(found)
    keys = (samples.key(row) for row in range(*found.rows))
    return f"{found}; samples {first_offenders(keys, found.rows[1] - found.rows[0])}"

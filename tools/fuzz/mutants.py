"""Mutants of one honest cache, one after the other, through parser, gate, reader and structural check."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

import softcache
from fuzz.mutations import mutate_bytes, mutate_json
from fuzz.refit import guarded_parts, refitted, with_fitting_metadata
from golden.indexed import make_indexed
from hostile.forge import dumps, relisted
from hostile.honest import make_honest
from hostile.judge import read_stored, same
from softcache.cache.file_entry import StoredFile
from softcache.cache.hdf5_check import Limits, structure_faults
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.mapped_file import MappedFile
from softcache.cache.reader import CacheReader
from softcache.errors import SoftcacheError

HANG_S = 1.0  # of the processor: other work on the machine is no mutant's fault
STUCK_S = 60.0  # on the clock
BATCH = 500  # files per call of the structural check


@dataclass
class Tally:
    """What became of the mutants, and what must not happen."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""


class Fuzz:
    """One honest cache, and mutants of it one after the other in the same folder.

    Args:
        folder: scratch space, in memory if possible.
        findings: where mutants are written that did what must not happen.
    """

    def __init__(self, folder: Path, seed: int, findings: Path, format: int = 1) -> None:
        self.root, self.seed, self.kept, self.format = folder / "cache", seed, findings, format
        self.batch_root = folder / "batch"
        self.batch_root.mkdir(parents=True)
        make_honest_of(self.root, format)
        self.manifest_bytes = (self.root / "manifest.json").read_bytes()
        self.entry = json.loads(self.manifest_bytes)
        self.manifest = read_manifest(self.root)
        self.honest = read_stored(CacheReader(self.root))
        self.files = {file.path: (self.root / file.path).read_bytes() for file in self.manifest.files}
        self.lists = {
            one.path: (self.root / one.path).read_bytes() for one in getattr(self.manifest.files, "lists", ())
        }
        self.guarded = {f.path: guarded_parts(self.files[f.path], f) for f in self.manifest.files}
        self.places = {f.path: self._places(f) for f in self.manifest.files}
        self.batch: list[tuple[str, StoredFile]] = []
        self.tally = Tally()
        warm = softcache.open(self.root)  # what torch loads at its first use is no mutant's fault
        decode(warm, warm.members)
        self.memory_before = resident_bytes()

    def _places(self, file: StoredFile) -> list[int]:
        """Where to change bytes: half of the time in HDF5's metadata, else anywhere."""
        metadata = [at for start, stop in self.guarded[file.path] for at in range(start, stop + 4)]
        return metadata + random.Random(0).choices(range(file.nbytes), k=max(1, len(metadata)))

    def run(self, mutants: int) -> None:
        for number in range(mutants):
            draw = random.Random(f"{self.seed}/{number}")
            if number % 4 == 3 and self.lists:
                self._list_mutant(number, draw)
            elif number % 2:
                self._manifest_mutant(number, draw)
            else:
                self._file_mutant(number, draw)
            if number % 10000 == 9999:
                print(f"{number + 1} mutants, {resident_bytes() / 2**20:.0f} MiB resident", file=sys.stderr, flush=True)
        self._flush_batch()
        assert self._read(CacheReader(self.root)) == "the same numbers", (
            "a mutant was left behind: what came after it is void"
        )

    # -------------------------------------------------------------------------------------------------------- one mutant

    def _try(self, name: str, data: bytes, do: Callable[[], str]) -> str:
        """Run one step; count what it says, and keep the mutant where it is what must not happen."""
        started, worked = time.monotonic(), time.process_time()
        try:
            outcome = do()
        except SoftcacheError as exc:
            outcome = f"refused: {type(exc).__name__}"
        except Exception as exc:
            outcome = f"CRASH: {type(exc).__name__}"
            self._keep(name, data, traceback.format_exc())
        seconds, waited = time.process_time() - worked, time.monotonic() - started
        if seconds > self.tally.slowest_s:
            self.tally.slowest_s, self.tally.slowest = seconds, name
        if seconds > HANG_S or waited > STUCK_S:
            self.tally.counts["HANG"] += 1
            self._keep(name, data, f"{seconds:.2f} s of the processor, {waited:.2f} s on the clock")
        self.tally.counts[f"{name.partition(' #')[0]}: {outcome}"] += 1
        if outcome == "OTHER NUMBERS":
            self._keep(name, data, outcome)
        return outcome

    def _keep(self, name: str, data: bytes, why: str, *, folder: Path | None = None) -> None:
        """The mutant and what it did; a finding, unless it goes to a folder of its own."""
        if folder is None:
            self.tally.findings.append(f"{name}: {why.strip().splitlines()[-1]}")
        folder = folder or self.kept
        folder.mkdir(parents=True, exist_ok=True)
        stem = name.replace(" ", "_").replace("#", "").replace("/", "-")
        (folder / f"{stem}.bin").write_bytes(data)
        (folder / f"{stem}.txt").write_text(f"seed {self.seed}\n{name}\n{why}\n")

    def _manifest_mutant(self, number: int, draw: random.Random) -> None:
        if draw.random() < 0.6:
            data = dumps(mutate_json(self.entry, draw))
        else:
            data = mutate_bytes(self.manifest_bytes, draw, range(len(self.manifest_bytes)))
        if data == self.manifest_bytes:
            return
        name = f"#{number}"
        self._try(f"manifest as it is {name}", data, lambda: self._open_as_it_is(data))
        try:
            fitted = dumps(json.loads(data))  # canonical again
        except (ValueError, RecursionError):
            fitted = data
        if fitted != self.manifest_bytes:
            self._try(f"manifest recomputed {name}", fitted, lambda: self._open_recomputed(fitted))

    def _list_mutant(self, number: int, draw: random.Random) -> None:
        """A list of version 2: as it is, and with a manifest that names it as it is now."""
        relative = draw.choice(list(self.lists))
        honest = self.lists[relative]
        if draw.random() < 0.7:
            data = dumps(mutate_json(json.loads(honest), draw))
        else:
            data = mutate_bytes(honest, draw, range(len(honest)))
        if data == honest:
            return
        (self.root / relative).write_bytes(data)
        try:
            self._try(f"list as it is #{number}", data, lambda: self._read(CacheReader(self.root)))
            entry = json.loads(self.manifest_bytes)
            about = next(one for one in entry["lists"] if one["path"] == relative)
            about.update(bytes=len(data), sha256=sha256(data).hexdigest())
            with suppress(Exception):  # what fits as well as it can
                about.update(files=len(json.loads(data)), file_bytes=sum(file["bytes"] for file in json.loads(data)))
            fitted = dumps(entry)
            self._try(f"list recomputed #{number}", data, lambda: self._open_recomputed(fitted))
        finally:
            (self.root / relative).write_bytes(honest)

    def _open_as_it_is(self, data: bytes) -> str:
        Manifest.from_bytes(data, self.root / "manifest.json")
        (self.root / "manifest.json").write_bytes(data)  # it parses: now with the folder that its id must be in
        try:
            return self._read(CacheReader(self.root, check_blocks="always"))
        finally:
            (self.root / "manifest.json").write_bytes(self.manifest_bytes)

    def _open_recomputed(self, data: bytes) -> str:
        Manifest.from_bytes(data, self.root / "manifest.json")
        with self._published(data):
            cache = softcache.open(self.root, quiet=True)
            outcome = self._read(cache.reader)
            decode(cache, cache.members)
        return "the same numbers" if outcome == "the same numbers" else "another description of the same bytes"

    def _published(self, data: bytes) -> Published:
        return Published(self.root, data, self.manifest_bytes)

    def _read(self, reader: CacheReader) -> str:
        return "the same numbers" if same(read_stored(reader), self.honest) else "OTHER NUMBERS"

    def _file_mutant(self, number: int, draw: random.Random) -> None:
        file = draw.choice(list(self.manifest.files))
        honest = self.files[file.path]
        data = mutate_bytes(honest, draw, self.places[file.path])
        if len(data) == len(honest) and draw.random() < 0.8:
            data = with_fitting_metadata(data, honest, self.guarded[file.path])
        if data == honest:
            return
        path, name = self.root / file.path, f"{file.path} #{number}"
        path.write_bytes(data)
        try:
            self._try(f"file as it is #{name}", data, lambda: self._read_file(file))
            fitted, entry = refitted(data, file)
            path.write_bytes(fitted)
            self._try(f"file recomputed #{name}", fitted, lambda: self._open_file(file, entry))
        finally:
            path.write_bytes(honest)
        (self.batch_root / f"{number}.h5").write_bytes(fitted)
        self.batch.append((name, replace(entry, path=f"{number}.h5")))
        if len(self.batch) == BATCH:
            self._flush_batch()

    def _read_file(self, file: StoredFile) -> str:
        """Read all that is in one file, every block checked; not the hash of it, which nothing else would be seen behind."""
        reader = CacheReader(self.root, check_blocks="always", check_files=False)
        return "the same numbers" if same(part_of(reader, file), part_of_honest(self.honest, file)) else "OTHER NUMBERS"

    def _open_file(self, file: StoredFile, entry: StoredFile) -> str:
        if self.lists:
            changed, lists = relisted(self.manifest, {entry.path: entry})
        else:
            changed, lists = (
                replace(self.manifest, files=[entry if f is file else f for f in self.manifest.files]),
                {},
            )
        with self._published(changed.to_bytes()), put_in_place(self.root, lists):
            cache = softcache.open(self.root, quiet=True)
            found = same(part_of(cache.reader, file), part_of_honest(self.honest, file))
            decode(cache, [file.member] if file.member else cache.members[:1])
        return "the same numbers" if found else "the numbers that were put there"

    # ------------------------------------------------------------------------------------------------ in the HDF5 library

    def _flush_batch(self) -> None:
        """The files whose hashes fit, through the child process."""
        started = time.monotonic()
        found = structure_faults(self.batch_root, [file for _, file in self.batch], limits=Limits(deaths=BATCH))
        for (name, _), (file, faults) in zip(self.batch, found, strict=True):
            data = (self.batch_root / file.path).read_bytes()
            seconds, started = time.monotonic() - started, time.monotonic()
            outcome = "as the manifest says" if not faults else "refused"
            if faults and "did not survive" in faults[0]:
                outcome = f"refused: {faults[0]}"
                self._keep(name, data, faults[0], folder=self.kept / "ended-the-child")  # refused: no finding
            elif seconds > HANG_S:
                self.tally.counts["child: slow"] += 1
            self.tally.counts[f"child: {outcome}"] += 1
        self.batch.clear()
        shutil.rmtree(self.batch_root)
        self.batch_root.mkdir()


def make_honest_of(path: Path, format: int) -> None:
    """The honest cache of a version."""
    if format == 1:
        make_honest(path)
    else:
        make_indexed(path, shard_rows=32)


@contextmanager
def put_in_place(root: Path, files: Mapping[str, bytes]) -> Iterator[None]:
    """Other bytes in these files; those of before at the end."""
    before = {name: (root / name).read_bytes() for name in files}
    try:
        for name, data in files.items():
            (root / name).write_bytes(data)
        yield
    finally:
        for name, data in before.items():
            (root / name).write_bytes(data)


class Published:
    """A manifest in place of the honest one, with its copy under its id; put back at the end."""

    def __init__(self, root: Path, data: bytes, honest: bytes) -> None:
        self._file, self._data, self._honest = root / "manifest.json", data, honest
        self._copy = root / "manifests" / f"{sha256(data).hexdigest()}.json"

    def __enter__(self) -> None:
        self._file.write_bytes(self._data)
        self._copy.write_bytes(self._data)

    def __exit__(self, *_: object) -> None:
        self._file.write_bytes(self._honest)
        if self._data != self._honest:
            self._copy.unlink()


def part_of(reader: CacheReader, file: StoredFile) -> dict[str, np.ndarray]:
    """What reading gives of the data sets of one file, for every record."""
    plan = reader.manifest.plan
    if file.kind == "samples":
        return {f"samples/{name}": value for name, value in reader.samples.arrays().items()}
    if file.kind == "probe":
        return {f"probe/{name}": value for name, value in reader.probe().items()}
    if file.kind == "constants" and file.member:
        return {f"{file.member}/{name}": value for name, value in reader.constants(file.member).items()}
    if file.kind == "positions" and file.index:
        rounds = enumerate(reader.index(file.index).rounds())
        return {f"{file.index}-{n}/{name}": value for n, one in rounds for name, value in one.arrays().items()}
    if file.kind == "candidates":
        return {f"candidates/{name}": value for name, value in reader.candidates().items()}
    if file.kind == "dense":
        MappedFile(reader.files, next(f for f in reader.manifest.files if f.path == file.path)).arrays()
        return {}
    views, rows = (part.reshape(-1) for part in np.mgrid[: plan.views.count, : plan.samples.count])
    if file.member is None:
        return {f"None/{name}": reader.gather(None, name, rows, views) for name in plan.views.digests}
    found = {}
    for name in reader.array_kinds(file.member):
        plain = reader.index_of(file.member, name) is None
        at = (file.member, name, rows, views)
        found[f"{file.member}/{name}"] = reader.gather(*at) if plain else reader.slices(*at).values
    return found


def part_of_honest(honest: dict[str, np.ndarray], file: StoredFile) -> dict[str, np.ndarray]:
    if file.kind == "dense":
        return {}
    if file.kind in ("samples", "probe", "candidates"):
        return {name: value for name, value in honest.items() if name.startswith(f"{file.kind}/")}
    if file.kind == "positions":
        return {name: value for name, value in honest.items() if re.match(rf"{file.index}-\d+/", name)}
    constants = file.kind == "constants"
    return {
        name: value
        for name, value in honest.items()
        if name.startswith(f"{file.member}/") and ("codec_" in name or "head_" in name) == constants
    }


def decode(cache: softcache.Cache, members: Sequence[str]) -> None:
    """Every record's logits and features, as a training loop would get them."""
    views, rows = (part.reshape(-1) for part in np.mgrid[: cache.num_views, : len(cache)])
    features = sorted({name for member in members for name in cache.features[member]})
    targets = cache.gather(rows, views, members=members, features=features)
    for member in members:
        if member in cache.codecs:
            targets.output(member)
        for name in cache.features[member]:
            targets.feature(name, member)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

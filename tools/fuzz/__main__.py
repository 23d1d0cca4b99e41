"""Mutants of a small cache's manifest and files, through parser, gate, reader and structural check.

Each mutant is tried twice: as it is, and with sizes, hashes, checksums and id recomputed to fit. What must not happen: an error
that is not ours, other numbers from a file that was changed behind the manifest's back, more than a second for one, memory that
grows. A file goes through the HDF5 library only in the structural check's child process, and there only once its hash fits.

python tools/fuzz --mutants 100000 --seed 0
python tools/fuzz --flips 10000 --truncations 1000      single damages instead: is each of them found?
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import softcache
from softcache.cache.file_entry import StoredFile
from softcache.cache.hdf5_check import Limits, structure_faults
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.reader import CacheReader, MappedFile
from softcache.cache.schema import BLOCK_BYTES
from softcache.check import verify
from softcache.errors import SoftcacheError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile.forge import dumps
from hostile.honest import make_honest
from hostile.judge import read_everything, read_stored, same
from hostile.metadata import header_end, lookup3

HANG_S = 1.0
BATCH = 500  # files per call of the structural check

# ---------------------------------------------------------------------------------------------------------- mutations

NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
NUMBERS += [2**52, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    "",
    "x",
    "\0",
    "../x",
    "/etc/passwd",
    "A",
    "0",
    "-1",
    "1e999",
    "nan",
    "\u0430",
    "a" * 70,
    "|O",
    "<f8",
    "<u4",
    "{}",
]


def mutate_bytes(data: bytes, draw: random.Random, places: Sequence[int]) -> bytes:
    """One to three changes of bytes, at or near one of the places."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = min(max(0, draw.choice(places) + draw.randint(-4, 4)), max(0, len(changed) - 1))
        kind = draw.randrange(9)
        if not changed:
            changed = bytearray(b"\0")
        if kind <= 1:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[at] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        elif kind <= 4:  # a number of a header
            width = draw.choice([1, 2, 4, 8])
            number = draw.choice(NUMBERS) % 2 ** (8 * width)
            changed[at : at + width] = number.to_bytes(width, "little")[: len(changed) - at]
        elif kind == 5:
            del changed[at : at + draw.choice([1, 2, 8, 100, 4096])]
        elif kind == 6:
            changed[at:at] = draw.randbytes(draw.choice([1, 2, 8, 100, 4096]))
        elif kind == 7:
            size, source = draw.choice([1, 4, 16, 64, 512]), draw.randrange(len(changed))
            changed[at : at + size] = changed[source : source + size]
        else:
            del changed[at:]
    return bytes(changed)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """One to three changes of a copy: of values, keys, types and numbers."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        holder = copy
        while True:
            keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
                holder = holder[key]
                continue
            _mutate_at(holder, key, draw, copy)
            break
    return copy


def _mutate_at(holder: Any, key: Any, draw: random.Random, whole: Any) -> None:
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice([*TEXTS, "format", "offset", "bytes", key + "x"])] = holder.pop(key)
    elif kind == 1:
        holder.insert(draw.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
    elif kind == 2:
        holder[key] = draw.choice(
            [None, True, False, [], {}, draw.choice(NUMBERS), draw.choice(TEXTS), [1], {"a": 1}, -1]
        )
    elif kind == 3:
        other = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 4 and isinstance(holder, list):
        draw.shuffle(holder)
    elif isinstance(holder[key], bool):
        holder[key] = not holder[key]
    elif isinstance(holder[key], int):
        step = draw.choice([-4096, -256, -1, 1, 256, 4096])
        holder[key] = draw.choice([holder[key] + step, holder[key] * 2, -holder[key], draw.choice(NUMBERS)])
    elif isinstance(holder[key], str):
        text = holder[key]
        at = draw.randrange(len(text) + 1)
        holder[key] = draw.choice(
            [text[:at] + draw.choice(TEXTS) + text[at:], text[:at], text[at:], draw.choice(TEXTS)]
        )
    else:
        holder[key] = draw.choice([*TEXTS, *NUMBERS, None])


# --------------------------------------------------------------------------------------- checksums of HDF5's own metadata


SIGNATURES = (
    b"\x89HDF",
    b"OHDR",
    b"OCHK",
    b"FRHP",
    b"FHDB",
    b"FHIB",
    b"BTHD",
    b"BTLF",
    b"BTIN",
    b"SMTB",
    b"FSHD",
    b"FSSE",
)


def guarded_parts(data: bytes, file: StoredFile) -> list[tuple[int, int]]:
    """(start, stop) of the parts of a file's metadata that are followed by their checksum."""
    found = []
    for signature in SIGNATURES:
        at = data.find(signature)
        while at >= 0:
            if not any(a.offset <= at < a.offset + a.nbytes for a in file.arrays.values()):
                for stop in _ends(data, at, signature):
                    if lookup3(data[at:stop]) == int.from_bytes(data[stop : stop + 4], "little"):
                        found.append((at, stop))
                        break
            at = data.find(signature, at + 1)
    return found


def _ends(data: bytes, at: int, signature: bytes) -> Sequence[int]:
    """Where a part may end: known for the superblock and for object headers, tried out for the few others."""
    if signature == b"\x89HDF":
        return [at + 44]
    if signature == b"OHDR":
        return [header_end(data, at)]
    return range(at + 8, min(at + 600, len(data) - 4))


# ---------------------------------------------------------------------------------------------------------------- the run


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

    def __init__(self, folder: Path, seed: int, findings: Path) -> None:
        self.root, self.seed, self.kept = folder / "cache", seed, findings
        self.batch_root = folder / "batch"
        self.batch_root.mkdir(parents=True)
        make_honest(self.root)
        self.manifest_bytes = (self.root / "manifest.json").read_bytes()
        self.entry = json.loads(self.manifest_bytes)
        self.manifest = read_manifest(self.root)
        self.honest = read_stored(CacheReader(self.root))
        self.files = {file.path: (self.root / file.path).read_bytes() for file in self.manifest.files}
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
            if number % 2:
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
        started = time.monotonic()
        try:
            outcome = do()
        except SoftcacheError as exc:
            outcome = f"refused: {type(exc).__name__}"
        except Exception as exc:
            outcome = f"CRASH: {type(exc).__name__}"
            self._keep(name, data, traceback.format_exc())
        seconds = time.monotonic() - started
        if seconds > self.tally.slowest_s:
            self.tally.slowest_s, self.tally.slowest = seconds, name
        if seconds > HANG_S:
            self.tally.counts["HANG"] += 1
            self._keep(name, data, f"{seconds:.2f} s")
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
            cache = softcache.open(self.root)
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
        """Read all that is in one file, every block checked."""
        reader = CacheReader(self.root, check_blocks="always")
        return "the same numbers" if same(part_of(reader, file), part_of_honest(self.honest, file)) else "OTHER NUMBERS"

    def _open_file(self, file: StoredFile, entry: StoredFile) -> str:
        changed = replace(self.manifest, files=[entry if f is file else f for f in self.manifest.files])
        with self._published(changed.to_bytes()):
            cache = softcache.open(self.root)
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


def with_fitting_metadata(data: bytes, honest: bytes, guarded: Sequence[tuple[int, int]]) -> bytes:
    """The same bytes with the checksums of changed HDF5 metadata made to fit, so that the library looks further."""
    fitted = bytearray(data)
    for start, stop in guarded:
        if data[start : stop + 4] != honest[start : stop + 4]:
            fitted[stop : stop + 4] = lookup3(bytes(fitted[start:stop])).to_bytes(4, "little")
    return bytes(fitted)


def refitted(data: bytes, file: StoredFile) -> tuple[bytes, StoredFile]:
    """The file with checksums that fit its data, as far as they lie in it, and the manifest's entry of it."""
    fitted = bytearray(data)
    for name, array in file.arrays.items():
        sums = file.arrays.get(f"{name}_crc32")
        if sums is None or sums.offset + sums.nbytes > len(fitted):
            continue
        starts = range(array.offset, array.offset + array.nbytes, BLOCK_BYTES)
        stop = array.offset + array.nbytes
        values = [zlib.crc32(fitted[at : min(at + BLOCK_BYTES, stop)]) for at in starts]
        fitted[sums.offset : sums.offset + sums.nbytes] = np.array(values, "<u4").tobytes()
    return bytes(fitted), replace(file, nbytes=len(fitted), sha256=sha256(fitted).hexdigest())


def part_of(reader: CacheReader, file: StoredFile) -> dict[str, np.ndarray]:
    """What reading gives of the data sets of one file, for every record."""
    plan = reader.manifest.plan
    if file.kind == "samples":
        return {f"samples/{name}": value for name, value in reader.samples.arrays().items()}
    if file.kind == "probe":
        return {f"probe/{name}": value for name, value in reader.probe().items()}
    if file.kind == "constants" and file.member:
        return {f"{file.member}/{name}": value for name, value in reader.constants(file.member).items()}
    if file.kind == "dense":
        MappedFile(reader.path, next(f for f in reader.manifest.files if f.path == file.path)).arrays()
        return {}
    views, rows = (part.reshape(-1) for part in np.mgrid[: plan.views.count, : plan.samples.count])
    names = ["pixel_digests"] if file.member is None else reader.array_kinds(file.member)
    return {f"{file.member}/{name}": reader.gather(file.member, name, rows, views) for name in names}


def part_of_honest(honest: dict[str, np.ndarray], file: StoredFile) -> dict[str, np.ndarray]:
    if file.kind == "dense":
        return {}
    if file.kind in ("samples", "probe"):
        return {name: value for name, value in honest.items() if name.startswith(f"{file.kind}/")}
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
        targets.logits(member)
        for name in cache.features[member]:
            targets.feature(name, member)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# -------------------------------------------------------------------------------------------------------- single damages


def damages(root: Path, flips: int, truncations: int, seed: int) -> dict[str, int]:
    """Flip bits and cut files one at a time; what was found, and what was not."""
    honest = read_everything(root)
    files = [*read_manifest(root).files, None]  # None: the manifest
    draw, counts = random.Random(seed), Counter[str]()
    real = verify.structure_faults
    # it comes after the hashes and can only find more: left out, so that a run takes milliseconds
    verify.structure_faults = _not_looked_at  # type: ignore[assignment]
    try:
        for number in range(flips + truncations):
            file = draw.choice(files)
            path = root / (file.path if file else "manifest.json")
            data = path.read_bytes()
            if number < flips:
                changed = bytearray(data)
                places: Sequence[int] = range(len(data))
                if file and number % 2:  # most of such small files is padding: half of the flips go to the data sets
                    places = draw.choice(
                        [range(a.offset, a.offset + a.nbytes) for a in file.arrays.values() if a.nbytes]
                    )
                changed[draw.choice(places)] ^= 1 << draw.randrange(8)
            else:
                changed = bytearray(data[: draw.randrange(len(data))])
            path.write_bytes(changed)
            kind = "flips" if number < flips else "truncations"
            counts[kind] += 1
            counts[f"{kind} found by verify --full"] += found_by_verify(root, full=True)
            if number >= flips:
                counts[f"{kind} found by verify --quick"] += found_by_verify(root, full=False)
            counts[f"{kind} {reading_of(root, honest)} with check_blocks=always"] += 1
            path.write_bytes(data)
    finally:
        verify.structure_faults = real
    assert same(read_everything(root), honest)
    return dict(counts)


def _not_looked_at(root: Path, files: object) -> Iterator[tuple[StoredFile, list[str]]]:
    return iter(())


def found_by_verify(root: Path, *, full: bool) -> bool:
    try:
        return verify.run(root, full=full, quiet=True).state == "damaged"
    except SoftcacheError:  # a flip may make it a cache of another version
        return True


def reading_of(root: Path, honest: dict[str, np.ndarray]) -> str:
    try:
        found = read_everything(root, check_blocks="always")
    except SoftcacheError:
        return "refused"
    return "read as before (no data was hit)" if same(found, honest) else "SILENTLY WRONG"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=0)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--truncations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), help="folder for mutants that did wrong"
    )
    args = parser.parse_args()
    faulthandler.dump_traceback_later(24 * 3600, exit=True)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="softcache-fuzz-", dir=memory if memory.is_dir() else None))
    bad = 0
    try:
        if args.mutants:
            bad += mutants_report(folder, args.mutants, args.seed, args.findings)
        if args.flips or args.truncations:
            make_honest(folder / "damaged")
            bad += damages_report(damages(folder / "damaged", args.flips, args.truncations, args.seed))
    finally:
        shutil.rmtree(folder)
    return 1 if bad else 0


def mutants_report(folder: Path, mutants: int, seed: int, findings: Path) -> int:
    started = time.monotonic()
    fuzz = Fuzz(folder, seed, findings)
    fuzz.run(mutants)
    growth = (resident_bytes() - fuzz.memory_before) / 2**20
    tally = fuzz.tally
    for name, count in sorted(tally.counts.items()):
        print(f"{count:>8}  {name}")
    total = sum(count for name, count in tally.counts.items() if not name.startswith("child") and name != "HANG")
    crashes = sum(count for name, count in tally.counts.items() if "CRASH" in name)
    wrong = sum(count for name, count in tally.counts.items() if "OTHER NUMBERS" in name)
    hangs = tally.counts["HANG"]
    print(f"{mutants} mutants, {total} runs in {time.monotonic() - started:.0f} s (seed {seed})")
    print(f"crashes {crashes}, hangs over {HANG_S:g} s {hangs}, silently other numbers {wrong}")
    print(f"slowest {tally.slowest_s:.2f} s ({tally.slowest}); resident memory grew by {growth:.1f} MiB")
    for finding in tally.findings[:40]:
        print(f"  {finding}")
    return crashes + wrong + hangs + (growth >= 50)


def damages_report(counts: dict[str, int]) -> int:
    for name, count in sorted(counts.items()):
        print(f"{count:>8}  {name}")
    missed = sum(
        counts.get(kind, 0) - counts.get(f"{kind} found by verify {how}", 0)
        for kind, how in (("flips", "--full"), ("truncations", "--full"), ("truncations", "--quick"))
    )
    silent = sum(count for name, count in counts.items() if "SILENTLY" in name)
    print(f"not found by verify: {missed}; silently wrong batches: {silent}")
    return missed + silent


if __name__ == "__main__":
    sys.exit(main())

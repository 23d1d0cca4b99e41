"""What must hold, whatever happened: the old cache, the new one or "unfinished"; and a resume to the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from faults.report import demand
from faults.small_dump import FORMAT, ROWS, codes_at, logits_at, write_cache, write_part
from faults.watched import Call, Recorder, layer
from golden import indexed
from softcache.cache.dump_folder import read_journals
from softcache.cache.manifest import read_manifest
from softcache.cache.reader import CacheReader
from softcache.cache.write.writer import Part
from softcache.errors import CacheError, DamagedCacheError, UnfinishedCacheError


@dataclass(frozen=True)
class Expected:
    """An undisturbed run.

    Attributes:
        ids: of the dump, and of its extension.
        old, new: relative path -> bytes, before and after the extension; without `dump/` and provenance.json.
        calls: of the file layer, all of them.
    """

    ids: tuple[str, str]
    old: Mapping[str, bytes]
    new: Mapping[str, bytes]
    calls: Sequence[Call]


def contents(path: Path) -> dict[str, bytes]:
    """Relative path -> bytes of everything that is a function of the plan."""
    found = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {n: p.read_bytes() for n, p in found.items() if not n.startswith("dump/") and n != "provenance.json"}


def undisturbed(root: Path) -> Expected:
    root.mkdir(exist_ok=True)
    path, recorder = root / "cache", Recorder(root)
    with layer(recorder):
        write_part(path, Part(1, 2))
        first = write_part(path, Part(2, 2))
        old = contents(path)
        second = write_part(path, Part(), extend=True)
    assert first is not None and second is not None
    expected = Expected((first.id, second.id), old, contents(path), recorder.calls)
    demand(judge(path, expected) == "new", "an undisturbed run is not whole")
    return expected


def judge(path: Path, expected: Expected) -> str:
    """What a reader meets: "nothing", "unfinished", "old" or "new". Broken if it is anything else, or not what it says it is."""
    found = contents(path) if path.is_dir() else {}
    for name, data in found.items():
        if ".tmp-" not in name:
            demand(data in (expected.old.get(name), expected.new.get(name)), f"{name} is there, with other bytes")
    for number in range(2):
        for entries in read_journals(path, number).values():
            for file in (file for entry in entries for file in entry["files"]):
                demand(file["path"] in found, f"{file['path']} was finished, and is lost")
    try:
        manifest = read_manifest(path)
    except UnfinishedCacheError:
        return "unfinished"
    except DamagedCacheError:
        raise
    except CacheError:
        demand(not (path / "dump").exists(), "a dump under way is not recognised")
        return "nothing"
    demand(manifest.id in expected.ids, f"the id is {manifest.id}")
    for one in getattr(manifest.files, "lists", ()):
        demand(hashlib.sha256(found.get(one.path, b"")).hexdigest() == one.sha256, f"{one.path} is not whole")
    for file in manifest.files:
        data = found.get(file.path, b"")
        demand(
            len(data) == file.nbytes and hashlib.sha256(data).hexdigest() == file.sha256, f"{file.path} is not whole"
        )
    read_everything(path, manifest.id)
    return ("old", "new")[expected.ids.index(manifest.id)]


def read_everything(path: Path, id: str | None = None) -> int:
    """Every record of the cache through the reader; Broken if one is not the one that was written. Returns the views."""
    reader = CacheReader(path, id=id, check_blocks="always")
    views = reader.manifest.plan.views.count
    if FORMAT["version"] == 2:
        return _read_indexed(reader)
    at = np.repeat(np.arange(ROWS), views), np.tile(np.arange(views), ROWS)
    demand(np.array_equal(reader.gather("plain", "logits", *at), logits_at(*at)), "other logits")
    demand(np.array_equal(reader.gather(None, "pixel_digests", *at), at[0] * 3 + at[1]), "other pixel digests")
    records = reader.gather("compact", "records", *at)
    demand(np.array_equal(records[:, 8:], codes_at(*at)), "other codes")
    numbers = np.ascontiguousarray(records[:, 4:8]).view("<u4")[:, 0]
    kept = np.flatnonzero(numbers)
    dense = reader.dense("compact", at[0][kept], at[1][kept], numbers[kept])
    demand(np.array_equal(dense, logits_at(*at)[kept].astype("<f2")) and len(kept) == 7 * views, "other dense rows")
    demand(len(reader.samples) == ROWS, "other samples")
    return views


def _read_indexed(reader: CacheReader) -> int:
    """The same of version 2."""
    plan, rows = reader.manifest.plan, np.arange(indexed.ROWS)
    for member in (member.name for member in plan.members):
        for name in indexed.MEMBERS[member][1]:
            for view in range(plan.views.count):
                at, plain = (rows, np.full(len(rows), view)), indexed.index_of(member, name) is None
                found = reader.gather(member, name, *at) if plain else reader.slices(member, name, *at).values
                wanted = indexed.records_of(member, name, rows.tolist(), view)
                demand(found.tobytes() == wanted.tobytes(), f"other records of {member}")
    demand(len(reader.samples) == indexed.ROWS, "other samples")
    return plan.views.count


def resume(path: Path, expected: Expected) -> None:
    """The same call again must end in the bytes of an undisturbed run, leave what was finished alone, and clear up."""
    finished = {
        name: (path / name).stat().st_ino
        for number in range(2)
        for entries in read_journals(path, number).values()
        for name in (file["path"] for entry in entries for file in entry["files"])
    }
    write_cache(path)
    ended = contents(path)
    demand(ended.keys() == expected.new.keys(), f"resumed to other files: {sorted(ended.keys() ^ expected.new.keys())}")
    for name, data in ended.items():
        demand(data == expected.new[name], f"{name} was resumed to other bytes")
    demand(judge(path, expected) == "new", "resumed, but not whole")
    left = [str(p.relative_to(path)) for p in path.rglob("*.tmp-*")]
    demand(not left, f"left behind: {left}")
    for name, inode in finished.items():
        demand((path / name).stat().st_ino == inode, f"{name} was finished, and is written again")

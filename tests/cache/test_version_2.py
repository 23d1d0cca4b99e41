"""Version 2: a stranger's reader made from FORMAT.md alone, caches written from arrays, class caches in the other container."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump

import softcache
from softcache import cli, dump, train
from softcache.cache import file_lists
from softcache.cache.canonical import canonical_json
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import Plan
from softcache.cache.reader import CacheReader
from softcache.cache.schema import Layout, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Part
from softcache.check import inspect, repair, verify
from softcache.check.repair import Means
from softcache.codecs import make_codec
from softcache.config import DumpConfig, TrainConfig
from softcache.dump.encode import measured_rows
from softcache.errors import CacheError, DamagedCacheError, LockedError
from softcache.share import merge

sys.path.append(str(Path(__file__).parents[2] / "tools"))
indexed = importlib.import_module("golden.indexed")

GOLDEN = Path(__file__).parents[1] / "golden" / "indexed"
FORMAT = (Path(softcache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
ROWS, VIEWS = indexed.ROWS, 3

# --- a stranger's reader of version 2: nothing below this line up to the next one may know softcache


class StrangersReader:
    """Records by (member, data set, key, view), read as FORMAT.md says from section 19 on."""

    def __init__(self, folder):
        with open(f"{folder}/manifest.json", "rb") as file:
            data = file.read()
        self.folder, self.id, self.manifest = folder, hashlib.sha256(data).hexdigest(), json.loads(data)
        if self.manifest["format"] != 2:
            raise ValueError("another version")
        self.members = {member["name"]: member for member in self.manifest["members"]}
        self.files, self.arrays = {}, {}
        for one in self.manifest["lists"]:
            if one["of"] == "setup":
                self.read_list(one)
        samples = self.open("samples.h5")
        self.row = {int(number): row for row, number in enumerate(samples["ids"])}

    def read_list(self, one):
        with open(f"{self.folder}/{one['path']}", "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != one["sha256"]:
            raise ValueError(f"{one['path']} is another list")
        self.files.update({entry["path"]: entry for entry in json.loads(data)})

    def open(self, path):
        if path not in self.arrays:
            entry = self.files[path]
            with open(f"{self.folder}/{path}", "rb") as file:
                data = file.read()
            sums = b"".join(
                self.cut(data, entry, name).tobytes() for name in sorted(entry["arrays"]) if "_crc32" in name
            )
            if hashlib.sha256(sums).hexdigest() != entry["checksums"]:
                raise ValueError(f"{path} is another file")
            self.arrays[path] = {name: self.cut(data, entry, name) for name in entry["arrays"]}
        return self.arrays[path]

    def cut(self, data, entry, name):
        array = entry["arrays"][name]
        count = int(np.prod(array["shape"]))
        return np.frombuffer(data, array["dtype"], count, array["offset"]).reshape(array["shape"])

    def offsets(self, index, view):
        """The offsets of a view, and the data sets of its round."""
        for number, one in enumerate(self.manifest["rounds"]):
            at = view - one["layout"]["first_view"]
            if index in one["indexes"] and 0 <= at < one["layout"]["num_views"]:
                found = self.open(f"positions/{index}-r{number:05d}.h5")
                return found["offsets"][at if len(found["offsets"]) > 1 else 0].astype(int), found
        raise KeyError((index, view))

    def records(self, member, name, key, view):
        """What is stored: of a data set with an index one record a position."""
        row = self.row[int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")]
        for number, one in enumerate(self.manifest["rounds"]):
            cut = one["layout"]
            at = view - cut["first_view"]
            if not (0 <= at < cut["num_views"] and (member in one["members"] if member else one["new_views"])):
                continue
            ranges = -(-cut["num_views"] // cut["shard_views"])
            part = cut["first_part"] + row // cut["shard_rows"] * ranges + at // cut["shard_views"]
            for made in self.manifest["lists"]:
                if (made["round"], made["member"]) == (number, member) and made["parts"][0] <= part < made["parts"][1]:
                    self.read_list(made)
            values = self.open(f"{f'members/{member}' if member else 'views'}/part-{part:05d}.h5")[name]
            index = self.index_of(member, name)
            a = row // cut["shard_rows"] * cut["shard_rows"]
            b, v0 = (
                min(a + cut["shard_rows"], cut["num_rows"]),
                cut["first_view"] + at // cut["shard_views"] * cut["shard_views"],
            )
            if index is None:
                return values[view - v0, row - a]
            before = [self.offsets(index, v)[0] for v in range(v0, view)]
            own = self.offsets(index, view)[0]
            start = sum(o[b] - o[a] for o in before) + own[row] - own[a]
            return values[start : start + own[row + 1] - own[row]]
        raise KeyError((member, view))

    def index_of(self, member, name):
        if member is None:
            return None
        for number, feature in enumerate(self.members[member]["features"]):
            if name.startswith(f"feature{number}"):
                return feature["index"]
        return self.members[member]["index"]

    def positions(self, index, name, key, view):
        """What an index says of each position."""
        row = self.row[int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")]
        offsets, found = self.offsets(index, view)
        return found[name][offsets[row] : offsets[row + 1]]


# --- from here on softcache may be known again


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is new in version 2, in three rounds."""
    path = tmp_path_factory.mktemp("indexed") / "cache"
    indexed.make_indexed(path)
    return path


def test_the_stranger_knows_only_what_it_may(cache: Path) -> None:
    source = Path(__file__).read_text(encoding="utf-8").split("\n# --- a stranger's ")[1]
    source = source.split("\n", 1)[1].split("\n# --- from here")[0]
    assert "softcache" not in source.replace("softcache\n", "", 1) and len(source.splitlines()) <= 110
    names: dict[str, Any] = {"json": json, "np": np, "hashlib": hashlib}
    exec(source, names)
    reader = names["StrangersReader"](cache)
    assert reader.id == read_manifest(cache).id


def test_the_stranger_reads_what_was_written(cache: Path) -> None:
    reader = StrangersReader(cache)
    for member, (_, arrays) in indexed.MEMBERS.items():
        for name in arrays:
            for row in range(ROWS):
                for view in range(VIEWS):
                    wanted = indexed.records_of(member, name, [row], view)
                    found = reader.records(member, name, f"toy/{row:04d}", view)
                    assert found.tobytes() == wanted.tobytes(), (member, name, row, view)
    for row in range(ROWS):
        key = f"toy/{row:04d}"
        assert reader.positions("words", "labels", key, 0).tolist() == indexed.labels_of(row)
        for view in range(VIEWS):
            assert reader.positions("list", "entries", key, view).tolist() == indexed.entries_of(row)
            assert reader.positions("coarse", "listed", key, view).tolist() == indexed.listed_of("coarse", row, view)
            assert reader.records(None, "token_digests", key, view) == row * 3 + view + 1


def test_the_stranger_reads_merged_samples(quick_dump: QuickDump, tmp_path: Path) -> None:
    halves = [quick_dump(out=name, keep_labels=labels) for name, labels in (("low", ("0-1",)), ("high", ("2-3",)))]
    merge.run([cache.reader.path for cache in halves], tmp_path / "merged", quiet=True)
    reader = StrangersReader(tmp_path / "merged")
    assert reader.manifest["samples"]["order"] == "merged"
    assert [one["id"] for one in reader.manifest["parents"]] == [cache.id for cache in halves]
    for half in halves:
        for row in range(len(half)):
            wanted = half.reader.gather("exact", "logits", np.array([row]), np.array([0]))
            assert reader.records("exact", "logits", half.samples.key(row), 0).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("check_blocks", ["first", "always", "never"])
def test_the_reader_gives_what_was_written(cache: Path, mode: Any, check_blocks: Any) -> None:
    reader = CacheReader(cache, mode=mode, check_blocks=check_blocks)
    draw = np.random.default_rng(0)
    rows, views = draw.integers(0, ROWS, 50), draw.integers(0, VIEWS, 50)
    for member, (_, arrays) in indexed.MEMBERS.items():
        for name in arrays:
            wanted = [indexed.records_of(member, name, [row], view) for row, view in zip(rows, views, strict=True)]
            if indexed.index_of(member, name) is None:
                assert reader.gather(member, name, rows, views).tobytes() == b"".join(w.tobytes() for w in wanted)
                continue
            for _ in range(2):  # the second time the blocks are known
                found = reader.slices(member, name, rows, views)
                assert [found[i].tobytes() for i in range(50)] == [w.tobytes() for w in wanted]
                assert found.values.dtype == np.dtype(arrays[name][0])
    with pytest.raises(IndexError, match=r"row 0\.\.20 is outside"):
        reader.slices("tagger", "logits", np.array([0, ROWS]), np.array([0, 0]))
    with pytest.raises(IndexError, match=r"view 0\.\.3 is outside"):
        reader.slices("tagger", "logits", np.array([0, 0]), np.array([0, 3]))
    assert reader.slices("tagger", "logits", rows[:0], views[:0]).values.shape == (0, 5)


def test_any_split_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    indexed.make_indexed(tmp_path / "split", parts=3)
    assert named_bytes(tmp_path / "split") == named_bytes(cache)


def named_bytes(path: Path) -> dict[str, bytes]:
    """Of all files that the newest manifest names, and itself."""
    manifest = read_manifest(path)
    lists = [one.path for one in manifest.files.lists]  # type: ignore[attr-defined]
    names = ["manifest.json", *lists, *(file.path for file in manifest.files)]
    return {name: (path / name).read_bytes() for name in names}


def test_the_golden_cache_is_read_to_its_numbers() -> None:
    told, reader = json.loads(GOLDEN.with_suffix(".json").read_text()), CacheReader(GOLDEN)
    assert reader.manifest.id == told["id"]
    rows, strange = np.arange(ROWS), StrangersReader(GOLDEN)
    for named, by_view in told["records"].items():
        member, name = named.split("/")
        for view, text in enumerate(by_view):
            at = (rows, np.full(ROWS, view))
            index = reader.index_of(member, name)
            found = reader.gather(member, name, *at) if index is None else reader.slices(member, name, *at).values
            assert found.tobytes().hex() == text
            own = [strange.records(member, name, f"toy/{row:04d}", view).tobytes().hex() for row in range(ROWS)]
            assert "".join(own) == text
    assert verify.run(GOLDEN, full=True, quiet=True).faults == []


def test_the_vectors_of_the_page() -> None:
    (body,) = re.findall(r"^```json2 positions\n(.*?)^```$", FORMAT, re.M | re.S)
    vector = json.loads(body)
    layout, offsets = Layout(**vector["layout"]), np.array(vector["offsets"], np.uint64)
    from softcache.cache.plan import IndexInfo
    from softcache.cache.positions import PositionIndex, Positions

    positions = Positions(offsets, np.diff(offsets, axis=1).astype("<u4"))
    index = PositionIndex(IndexInfo("x", "words"), [(layout, positions)])
    for one in vector["slices"]:
        part = layout.part(one["row"], one["view"])
        span = next(span for span in layout.spans() if span.index == part)
        starts, counts = index.ranges(np.array([one["row"]]), np.array([one["view"]]))
        start = int(starts[0]) + index.shift(span, one["view"])
        assert (part, [start, start + int(counts[0])]) == (one["part"], one["elements"])


def test_the_fields_are_those_of_the_page(cache: Path) -> None:
    entry = json.loads((cache / "manifest.json").read_bytes())
    text = FORMAT[FORMAT.index("## 20.") : FORMAT.index("## 22.")]
    before = FORMAT[FORMAT.index("## 4.") : FORMAT.index("## 5.")]
    documented = set(re.findall(r"^\| `([^`]+)` \|", text + before, re.M))

    def names(value: Any, shape: str = "") -> set[str]:
        if isinstance(value, list):
            return set().union(*(names(one, f"{shape}[]") for one in value)) if value else set()
        if isinstance(value, dict):
            inner = {key: f"{shape}.{key}".lstrip(".") for key in value}
            return set(inner.values()) | set().union(*(names(one, inner[key]) for key, one in value.items()))
        return set()

    free = re.compile(r"(parameters|input|rendering|statistics|made_with|promise|kl|feature_errors)\.")
    found = {name for name in names(entry) if not free.search(name)}
    assert found - documented == set()
    listed = json.loads((cache / "files-r00000-00002.json").read_bytes())
    assert {f"files[].{name}" for name in names(listed[0]) if "." not in name} <= documented | {"files[].checksums"}
    assert canonical_json(entry) == (cache / "manifest.json").read_bytes()
    assert "parent" not in entry and "files" not in entry


def test_the_files_are_those_of_the_page(cache: Path) -> None:
    for file in read_manifest(cache).files:
        with h5py.File(cache / file.path, "r") as handle:
            assert handle.attrs["softcache_format"] == 2 and handle.attrs["softcache_kind"].decode() == file.kind
            sums = b"".join(handle[name][()].tobytes() for name in sorted(handle) if name.endswith("_crc32"))
        assert file.checksums == hashlib.sha256(sums).hexdigest()
        assert file.sha256 == hashlib.sha256((cache / file.path).read_bytes()).hexdigest()


def test_a_later_round_changes_no_list(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    first = indexed.make_indexed(path, rounds=1)
    before = named_bytes(path)
    indexed.make_indexed(path)
    assert all((path / name).read_bytes() == data for name, data in before.items() if name != "manifest.json")
    older = CacheReader(path, id=first.id)
    assert older.manifest.plan.views.count == 2
    assert len(older.slices("tagger", "logits", np.arange(ROWS), np.ones(ROWS, int))) == ROWS
    assert named_bytes(path) == named_bytes(cache)


def test_the_fingerprint_is_of_masks_candidates_and_labels_too(cache: Path) -> None:
    """By the words of section 24."""
    strange = StrangersReader(cache)
    samples, docs = strange.open("samples.h5"), strange.open("candidates.h5")
    order, of_docs = np.argsort(samples["ids"]), np.argsort(docs["ids"])
    data = b"".join(samples[name][order].tobytes() for name in ("ids", "labels", "digests", "mask_digests"))
    data += b"".join(docs[name][of_docs].tobytes() for name in ("ids", "digests"))
    data += np.array([indexed.length_of("words", int(row), 0) for row in order], "<u4").tobytes()
    data += b"".join(np.array(indexed.labels_of(int(row)), "<i4").tobytes() for row in order)
    assert strange.manifest["samples"]["fingerprint"] == hashlib.sha256(data).hexdigest()


# --- damage


def changed(path: Path, name: str, at: int, bit: int = 1) -> None:
    data = bytearray((path / name).read_bytes())
    data[at] ^= bit
    (path / name).write_bytes(data)


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def first_byte(path: Path, relative: str, name: str) -> int:
    return next(file for file in read_manifest(path).files if file.path == relative).arrays[name].offset


def test_a_changed_list_is_refused_when_it_is_needed_and_no_earlier(copy: Path) -> None:
    changed(copy, "files-r00000-00002.json", 40)
    reader = CacheReader(copy)
    assert len(reader.slices("segmenter", "records", np.arange(3), np.zeros(3, int))) == 3
    with pytest.raises(DamagedCacheError, match=r"files-r00000-00002\.json: is not the list"):
        reader.slices("tagger", "logits", np.arange(3), np.zeros(3, int))
    verdict = verify.run(copy, full=False, quiet=True)
    assert (verdict.state, verdict.damaged) == ("damaged", ["files-r00000-00002.json"])


def test_a_missing_list_is_refused(copy: Path) -> None:
    os.unlink(copy / "files-r00000-00002.json")
    with pytest.raises(DamagedCacheError, match="names this list, but it is not there"):
        CacheReader(copy).slices("tagger", "logits", np.arange(3), np.zeros(3, int))
    assert verify.run(copy, full=True, quiet=True).state == "damaged"


@pytest.mark.parametrize("source", [True, False])
def test_lists_are_mended_from_journals_or_a_copy(copy: Path, cache: Path, source: bool) -> None:
    os.unlink(copy / "files-r00000-00002.json")
    changed(copy, "files-r00002-00000.json", 9)
    if source:
        shutil.rmtree(copy / "dump")
    done = repair.run(copy, Means(source=cache if source else None), quiet=True)
    assert done.mended == ["files-r00000-00002.json", "files-r00002-00000.json"] and not done.left
    assert named_bytes(copy) == named_bytes(cache)


def test_a_list_that_nobody_has_is_said(copy: Path) -> None:
    changed(copy, "files-r00000-00002.json", 9)
    shutil.rmtree(copy / "dump")
    done = repair.run(copy, Means(), quiet=True)
    assert list(done.left) == ["files-r00000-00002.json"] and done.exit_code == 1
    assert "neither another copy nor the journals" in done.text()


def test_files_are_mended_from_another_copy(copy: Path, cache: Path) -> None:
    changed(copy, "positions/cells-r00000.h5", first_byte(copy, "positions/cells-r00000.h5", "shapes"))
    changed(copy, "members/tagger/part-00000.h5", first_byte(copy, "members/tagger/part-00000.h5", "logits"))
    refused = repair.run(copy, Means(), quiet=True)
    assert len(refused.left) == 2 and "--from another copy" in refused.text()
    done = repair.run(copy, Means(source=cache), quiet=True)
    assert sorted(done.mended) == ["members/tagger/part-00000.h5", "positions/cells-r00000.h5"]
    assert named_bytes(copy) == named_bytes(cache)


def test_a_changed_block_is_refused_when_it_is_read(copy: Path) -> None:
    relative = "members/tagger/part-00000.h5"
    changed(copy, relative, first_byte(copy, relative, "logits") + 4)
    with pytest.raises(DamagedCacheError, match=r"part-00000\.h5: data set 'logits', block 0, rows 0 to 7 .*toy/0000"):
        CacheReader(copy).slices("tagger", "logits", np.arange(3), np.zeros(3, int))
    verdict = verify.run(copy, full=True, quiet=True)
    assert verdict.damaged == [relative]


def test_a_file_in_another_ones_place_is_refused_without_reading_it(copy: Path) -> None:
    """Parts of one size: the checksums in the file are another list."""
    own, other = "members/embedder/part-00000.h5", "members/embedder/part-00001.h5"
    files = {file.path: file for file in read_manifest(copy).files}
    assert files[own].nbytes == files[other].nbytes
    shutil.copy(copy / other, copy / own)
    with pytest.raises(DamagedCacheError, match="the sha256 of its checksums is"):
        CacheReader(copy).gather("embedder", "logits", np.arange(3), np.zeros(3, int))
    unchecked = CacheReader(copy, check_files=False).gather("embedder", "logits", np.arange(3), np.zeros(3, int))
    assert unchecked.tobytes() == indexed.records_of("embedder", "logits", range(3), 1).tobytes()


def test_a_part_of_other_positions_than_its_index_is_refused(copy: Path) -> None:
    """Sizes, hashes and lists made to fit: the index is another one."""
    forge = importlib.import_module("hostile.forge").Forge(copy)
    path = "positions/list-r00000.h5"
    offsets, lengths = forge.read(path, "offsets").copy(), forge.read(path, "lengths").copy()
    entries = forge.read(path, "entries")
    offsets[:, 1:] += np.uint64(1)
    lengths[:, 0] += 1
    forge.replace(path, {"offsets": offsets, "lengths": lengths, "entries": np.insert(entries, 0, 0)})
    forge.save()
    with pytest.raises(DamagedCacheError, match="has 14 positions, its index 'list' has 15 there"):
        CacheReader(copy).slices("ranker", "logits", np.arange(3), np.zeros(3, int))
    assert verify.run(copy, full=True, quiet=True).state == "damaged"


# --- many parts


def many_parts(path: Path, parts: int) -> Manifest:
    """A plain member over one row a part."""
    plan = indexed.plan_of(1)
    layout = Layout(parts, 1, 1, 1)
    (member,) = (one for one in plan.members if one.name == "ranker")
    plan = replace(
        plan,
        samples=replace(plan.samples, count=parts, has_masks=False),
        views=replace(plan.views, count=1, digests=("pixel_digests",)),
        members=(replace(member, index=None),),
        rounds=(replace(plan.rounds[0], layout=layout, members=("ranker",), indexes=()),),
        indexes=(),
    )
    return write_plain(path, plan)


def write_plain(path: Path, plan: Plan) -> Manifest:
    from softcache.cache.samples import build_table
    from softcache.cache.schema import ArraySpec
    from softcache.cache.write.writer import Setup

    count = plan.samples.count
    keys = [f"k{i}" for i in range(count)]
    ids = np.arange(count).astype("<u8")
    table = build_table(
        keys, ids, np.full(count, -1), np.zeros((count, 16), np.uint8), 5, np.arange(count), store_keys=True
    )
    with CacheWriter(path, plan, lambda: Setup(table)) as writer:
        for span in writer.my_spans():
            specs = [ArraySpec("logits", "<f4", (1, span.rows, 1)), ArraySpec("eps", "<f2", (1, span.rows))]
            with writer.span(span, {"ranker": specs}) as out:
                rows = np.arange(span.row_start, span.row_stop)
                out.append(None, {"pixel_digests": rows.astype("<u4")})
                arrays = {"logits": rows.astype("<f4")[:, None], "eps": np.zeros(span.rows, "<f2")}
                out.append("ranker", arrays, MemberStatistics(records=span.rows))
        made = writer.commit(lambda manifest: "# card\n", {})
    assert made is not None
    return made


@pytest.mark.slow
def test_lists_are_cut_and_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 parts, with lists of some 4 kB and 8 files open at most."""
    monkeypatch.setattr(file_lists, "LIST_BYTES", 4096)
    manifest = many_parts(tmp_path / "cache", 60)
    monkeypatch.setattr("softcache.cache.reader.MAPPED_AT_ONCE", 8)
    monkeypatch.setattr("softcache.cache.part_table.OPEN_PARTS", {"mmap": 8, "pread": 8})
    lists = [one for one in manifest.files.lists if one.member == "ranker"]  # type: ignore[attr-defined]
    assert len(lists) >= 10 and all(one.nbytes <= 4096 for one in lists)
    assert [one.parts[0] for one in lists[1:]] == [one.parts[1] for one in lists[:-1]]
    for mode in ("mmap", "pread"):
        reader = CacheReader(tmp_path / "cache", mode=mode)  # type: ignore[arg-type]
        read = reader.manifest.files._read  # type: ignore[attr-defined]
        assert reader.samples.key(59) == "k59" and set(read) == {0}
        assert reader.manifest.statistics["ranker"].records == 60 and set(read) == {0}
        found = reader.gather("ranker", "logits", np.array([59, 3, 59]), np.zeros(3, int))
        assert found[:, 0].tolist() == [59, 3, 59] and len(read) < 5
        everything = reader.gather("ranker", "logits", np.arange(60)[::-1], np.zeros(60, int))
        assert everything[:, 0].tolist() == list(range(60))[::-1]
        assert reader.gather(None, "pixel_digests", np.arange(60), np.zeros(60, int)).tolist() == list(range(60))
    assert verify.run(tmp_path / "cache", full=True, quiet=True).faults == []


# --- class caches in the other container


@pytest.mark.slow
def test_a_class_cache_of_version_2_gives_the_same(quick_dump: QuickDump, tmp_path: Path, toy: Path) -> None:
    settings: dict[str, Any] = {"policy": ("crop_flip",), "views": 2, "codec": "int8", "shard_rows": 256}
    plain, other = quick_dump(out="plain", **settings), quick_dump(out="other", format="2", **settings)
    assert (plain.manifest.plan.format, other.manifest.plan.format) == (1, 2)
    rows, views = np.arange(40).repeat(2), np.tile([0, 1], 40)
    for name in ("records", "eps"):
        one, two = (c.reader.gather("exact", name, rows, views) for c in (plain, other))
        assert one.tobytes() == two.tobytes()
    assert torch.equal(plain.gather(rows, views).logits(), other.gather(rows, views).logits())
    assert plain.samples.fingerprint() == other.samples.fingerprint() == other.manifest.plan.samples.fingerprint
    assert verify.run(other.reader.path, full=True, quiet=True).state == "whole"
    config = {"data": f"{toy}:images", "student": "softcache:mlp?hidden=4", "loss": ("kd",), "epochs": 1}
    for name in ("plain", "other"):
        run = TrainConfig(**config, cache=str(tmp_path / name), out=str(tmp_path / f"run-{name}"), threads=1, workers=0)
        train.run(run, quiet=True)
    one, two = ((tmp_path / f"run-{name}" / "metrics.jsonl").read_text() for name in ("plain", "other"))
    clock = re.compile(r'"(seconds|[a-z_]*_per_s|wait[a-z_]*)": [0-9.e+-]+')
    assert clock.sub("", one) == clock.sub("", two)


@pytest.mark.slow
def test_a_dump_in_parts_has_the_id_of_one_process(quick_dump: QuickDump, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": f"{WORLDS / 'toy.py'}:images?count=600", "format": "2", "shard_rows": 256}
    whole = quick_dump(out="whole", **settings)
    for part in ("2/2", "1/2"):
        dump.run(
            DumpConfig(
                **settings, teacher=(f"{WORLDS / 'toy.py'}:exact",), out=str(tmp_path / "parts"), codec="float32", part=part,
                threads=1, workers=0,
            ),
            quiet=True,
        )  # fmt: skip
    assert named_bytes(tmp_path / "parts") == named_bytes(whole.reader.path)


def test_without_the_flag_a_cache_is_of_version_1(quick_dump: QuickDump) -> None:
    cache = quick_dump()
    assert json.loads((cache.reader.path / "manifest.json").read_bytes())["format"] == 1
    assert not list(cache.reader.path.glob("files-*"))


def test_version_2_is_provisional_and_says_so(quick_dump: QuickDump, capsys: pytest.CaptureFixture[str]) -> None:
    cache = quick_dump(format="2")
    assert "is of format version 2, which is provisional" in capsys.readouterr().err
    assert "version 2 (provisional)" in inspect.report(cache.reader.path)
    card = (cache.reader.path / "README.md").read_text()
    assert "known by the latter, and each block by its CRC-32" in card and "| format version | 2 |" in card


def test_an_extension_keeps_the_version(quick_dump: QuickDump, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"policy": ("crop_flip",), "codec": "float16"}
    grown = quick_dump(format="2", views=1, **settings)
    lists = {path.name: path.read_bytes() for path in grown.reader.path.glob("files-*")}
    more = quick_dump(extend=True, views=2, codec=None)
    assert more.manifest.plan.format == 2 and more.num_views == 2
    assert lists.items() <= {path.name: path.read_bytes() for path in grown.reader.path.glob("files-*")}.items()
    whole = quick_dump(out="whole", format="2", views=2, **settings)
    at = (np.arange(40).repeat(2), np.tile([0, 1], 40))
    for name in ("logits", "eps"):
        assert more.reader.gather("exact", name, *at).tobytes() == whole.reader.gather("exact", name, *at).tobytes()
    with pytest.raises(softcache.errors.ConfigError, match="--format cannot be given with --extend"):
        quick_dump(extend=True, views=3, format="2", codec=None)


def test_a_damaged_class_cache_is_mended_by_its_teacher(quick_dump: QuickDump, toy: Path) -> None:
    path = quick_dump(format="2", codec="linear_head", teacher=[f"{toy}:network"]).reader.path
    before = named_bytes(path)
    for relative, name in (
        ("members/network/part-00000.h5", "eps"),
        ("members/network/constants-00000.h5", "codec_bias"),
    ):
        changed(path, relative, first_byte(path, relative, name))
    done = repair.run(path, Means(data=f"{toy}:images", teachers=(f"{toy}:network",), device="cpu"), quiet=True)
    assert sorted(done.mended) == ["members/network/constants-00000.h5", "members/network/part-00000.h5"], done.text()
    assert named_bytes(path) == before


def test_a_subset_of_version_2_is_of_version_2(quick_dump: QuickDump, tmp_path: Path) -> None:
    parent = quick_dump(format="2", policy=("crop_flip",), views=2)
    assert cli.main(["subset", str(parent.reader.path), str(tmp_path / "child"), "--views", "1", "--quiet"]) == 0
    child = softcache.open(tmp_path / "child")
    assert child.manifest.plan.format == 2 and child.manifest.plan.parents[0].id == parent.id
    rows = np.arange(40)
    one, two = parent.gather(rows, np.ones(40, int)).logits(), child.gather(rows, np.zeros(40, int)).logits()
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("count", "wanted"), [(1, [0]), (32, list(range(32))), (64, list(range(0, 64, 2))), (33, None)]
)
def test_measured_rows_are_spread_over_the_batch(count: int, wanted: list[int] | None) -> None:
    chosen = measured_rows(count, 2)
    found = list(range(count))[chosen] if isinstance(chosen, slice) else chosen
    assert found == wanted if wanted else (len(set(found)) == 32 and found[0] == 0 and found[-1] == 31 * 33 // 32)
    assert measured_rows(count, 1) == slice(32)


# --- a dump of arrays under way


def test_an_interrupted_dump_goes_on_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    path, calls = tmp_path / "cache", iter(range(10**6))

    def stop_at(number: int) -> Callable[[], None]:
        def look() -> None:
            if next(calls) == number:
                raise Interrupted

        return look

    for number in (3, 9):
        with pytest.raises(Interrupted):
            indexed.write_round(path, 1, at_row=stop_at(number))
    assert "of 6 spans are written" in verify.run(path, full=False, quiet=True).faults[0]
    indexed.make_indexed(path)
    assert named_bytes(path) == named_bytes(cache)


def test_positions_that_no_reader_takes_are_refused_before_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "labels_of", lambda row: [7] * indexed.length_of("words", row, 0))
    with pytest.raises(DamagedCacheError, match="index 'words': labels that are no classes"):
        indexed.write_round(tmp_path / "cache", 1)
    assert not list((tmp_path / "cache").rglob("part-*.h5"))


def test_a_second_writer_of_a_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with CacheWriter(path, indexed.plan_of(1), lambda: indexed.setup_of(1)):
        with pytest.raises(LockedError):
            indexed.write_round(path, 1, Part(1, 1))


def test_an_index_that_is_not_there_is_said(cache: Path) -> None:
    with pytest.raises(CacheError, match="no index 'tokens'"):
        CacheReader(cache).index("tokens")
    assert CacheReader(cache).index("words").in_part(Span(0, 0, ROWS, 0, 1)) == sum(
        indexed.length_of("words", row, 0) for row in range(ROWS)
    )


@pytest.mark.parametrize("number", range(4))
def test_the_topset_vectors_of_the_page(number: int) -> None:
    """Against the code, and against a reader of the page: bits, a byte each, float16."""
    (body,) = re.findall(r"^```json2 topset\n(.*?)^```$", FORMAT, re.M | re.S)
    vector = json.loads(body)[number]
    record, classes = bytes.fromhex(vector["record"]), len(vector["given"])
    kept, tails = min(int(vector["parameters"]["k"]), classes), len(vector["tails"])
    step, gaps = np.frombuffer(record, "<f4", 1), np.frombuffer(record, "<f2", tails, 4)
    values, bits = record[4 + 2 * tails :][:kept], int.from_bytes(record[4 + 2 * tails + kept :], "little")
    ids, low = list(range(kept)), (classes // kept).bit_length() - 1
    if classes > kept:
        ones = [at for at in range(8 * len(record)) if bits >> kept * low + at & 1]
        ids = [(at - i << low) + (bits >> i * low) % (1 << low) for i, at in enumerate(ones)]
    row = {c: float((np.float32(min(value, 254)) - 254) * step[0]) for c, value in zip(ids, values, strict=True)}
    largest = ids[values.index(255)]
    assert [largest, *(c for c in ids if c != largest)] == vector["ids"]
    assert [row[c] for c in vector["ids"]] == pytest.approx(vector["logits"], rel=1e-6)
    codec = make_codec("topset", vector["parameters"], classes)
    arrays = {"records": torch.tensor([list(record)], dtype=torch.uint8)}
    assert codec.encode(torch.tensor([vector["given"]]))["records"].tolist() == [list(record)]
    assert codec.head(arrays)[0][0].tolist() == vector["ids"]
    assert codec.head(arrays)[1][0].tolist() == pytest.approx(vector["logits"], rel=1e-6)
    for (t, tail), gap in zip(vector["tails"].items(), gaps, strict=True):
        assert codec.tail_logsumexp(arrays, float(t)).item() == pytest.approx(tail, abs=6e-6)
        assert np.log(classes - kept) - float(gap) == pytest.approx(tail, abs=6e-6)

"""The reader: what h5py sees in the files is what a gather gives, from any process, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import QuickDump

import softcache
from softcache.cache import schema
from softcache.cache.manifest import Manifest, canonical_json
from softcache.cache.schema import plan_layout
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import CacheError, DamagedCacheError, UnfinishedCacheError
from softcache.targets.cache import Cache

MODES = ("mmap", "pread")


def by_h5py(cache: Cache, member: str | None, name: str) -> np.ndarray:
    """(V, N, ...) of one data set, put together by h5py from the shards that the manifest lists."""
    plan = cache.manifest.plan
    whole = None
    for file in cache.manifest.files_of("views" if member is None else "member", member):
        with h5py.File(cache.reader.path / file.path, "r") as handle:
            part = handle[name][()]
        if whole is None:
            whole = np.zeros((plan.views.count, plan.samples.count, *part.shape[2:]), part.dtype)
        assert file.rows is not None
        assert file.views is not None
        whole[file.views[0] : file.views[1], file.rows[0] : file.rows[1]] = part
    assert whole is not None
    return whole


def some_places(cache: Cache, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random rows and views with repeats, the corners among them."""
    draw = np.random.default_rng(seed)
    rows, views = draw.integers(0, len(cache), count), draw.integers(0, cache.num_views, count)
    rows[:4], views[:4] = [0, len(cache) - 1, 0, len(cache) - 1], [0, cache.num_views - 1, cache.num_views - 1, 0]
    return rows, views


def reopened(cache: Cache, mode: Any) -> Cache:
    return softcache.open(cache.reader.path, mode=mode)


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def split_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards so small that 5 views of one row range need two of them."""
    monkeypatch.setattr(schema, "MAX_SHARD_BYTES", 3 * 256 * (4 * 4 + 2))


SHAPES = {
    # rows, views, shard_rows -> shards
    "one shard": (40, 1, None, 1),
    "several views in one shard": (40, 3, None, 1),
    "last shard of one row": (513, 1, 256, 3),
    "several shards and views": (600, 2, 256, 3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_is_what_h5py_sees(shape: str, codec: str, mode: str, quick_dump: QuickDump, toy: Path) -> None:
    rows, views, shard_rows, shards = SHAPES[shape]
    policy = ("shift",) if views > 1 else ()
    teachers = [f"{toy}:network?seed=1&name=a", f"{toy}:network?seed=2&name=b"]
    made = quick_dump(
        f"{toy}:images?count={rows}", teachers, codec=codec, policy=policy, views=views, shard_rows=shard_rows
    )
    check_gathers(made, mode, shards)


@pytest.mark.parametrize("mode", MODES)
def test_views_of_one_row_range_split_over_shards(
    mode: str, split_views: None, quick_dump: QuickDump, toy: Path
) -> None:
    made = quick_dump(
        f"{toy}:images?count=300", [f"{toy}:network"], policy=("shift",), views=5, shard_rows=256, out="split"
    )
    spans = [(s.rows, s.view_start, s.view_stop) for s in made.manifest.plan.rounds[0].layout.spans()]
    assert spans == [(256, 0, 3), (256, 3, 5), (44, 0, 3), (44, 3, 5)]
    check_gathers(made, mode, 4)


def check_gathers(made: Cache, mode: str, shards: int) -> None:
    cache = reopened(made, mode)
    rows, views = some_places(cache, 500)
    assert len(list(cache.manifest.files_of("views"))) == shards
    for member in (None, *cache.members):
        for name in ["pixel_digests"] if member is None else ["logits", "eps"]:
            oracle = by_h5py(cache, member, name)
            for chosen in (slice(None), slice(0), slice(1), np.argsort(rows), np.argsort(-rows), [3] * 20):
                found = cache.reader.gather(member, name, rows[chosen], views[chosen])
                assert found.dtype == oracle.dtype
                np.testing.assert_array_equal(found, oracle[views[chosen], rows[chosen]])
    targets = cache.gather(rows, views)
    for member in cache.members:
        oracle = by_h5py(cache, member, "logits")[views, rows]
        assert torch.equal(targets.logits(member), torch.from_numpy(oracle.astype(np.float32)))
        np.testing.assert_array_equal(cache.eps(member, rows, views), by_h5py(cache, member, "eps")[views, rows])
    with h5py.File(cache.reader.path / "samples.h5") as handle:
        np.testing.assert_array_equal(targets.sample_ids, handle["ids"][()][rows])
        np.testing.assert_array_equal(targets.labels, handle["labels"][()][rows])
    differing = [by_h5py(cache, m, "logits") for m in cache.members]
    assert len({array.tobytes() for array in differing}) == len(differing)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shard_rows", [None, 256])
def test_empty_batches_and_places_outside(shard_rows: int | None, mode: str, quick_dump: QuickDump, toy: Path) -> None:
    made = quick_dump(f"{toy}:images?count=300", policy=("shift",), views=2, shard_rows=shard_rows)
    cache = reopened(made, mode)
    none = np.zeros(0, np.int64)
    assert cache.gather(none, none).logits().shape == (0, 4)
    assert cache.eps("exact", none, none).shape == (0,)
    joined = cache.join(open_transfer_set(f"{toy}:images?count=300"))
    assert joined.gather(torch.zeros(0, dtype=torch.int64)).logits().shape == (0, 4)
    for row, view, message in [
        (300, 0, r"row 5\.\.300 is outside 0\.\.299"),
        (-1, 0, r"row -1\.\.5 is outside 0\.\.299"),
        (0, 2, r"view 0\.\.2 is outside 0\.\.1"),
        (0, -1, r"view -1\.\.0 is outside 0\.\.1"),
    ]:
        with pytest.raises(IndexError, match=message):
            cache.gather(np.array([5, row]), np.array([0, view]))
    for record in (600, -1):
        with pytest.raises(IndexError, match="view"):
            joined.gather(np.array([0, record]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_any_integers_name_rows(kind: Any, quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(f"{toy}:images?count=300", policy=("shift",), views=3, shard_rows=256)
    rows, views = np.array([250, 3, 255]), np.array([2, 0, 1])
    wanted = cache.gather(rows, views).logits()
    assert torch.equal(cache.gather(rows.astype(kind), views.astype(kind)).logits(), wanted)
    one_shard = quick_dump(f"{toy}:images?count=300", policy=("shift",), views=3, out="one")
    assert torch.equal(one_shard.gather(rows.astype(kind), views.astype(kind)).logits(), wanted)


def test_members_are_chosen_by_name(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(teacher=[f"{toy}:exact?name=a", f"{toy}:exact?name=b&seed=1"])
    places = some_places(cache, 9)
    both, one = cache.gather(*places), cache.gather(*places, members=["b"])
    assert both.members == ("a", "b")
    assert one.members == ("b",)
    assert torch.equal(one.logits(), both.logits("b"))
    assert not torch.equal(both.logits("a"), both.logits("b"))
    for attempt in (lambda: cache.gather(*places, members=["c"]), lambda: both.logits("c"), lambda: cache.member("c")):
        with pytest.raises(CacheError, match=r"no member 'c'"):
            attempt()
    with pytest.raises(CacheError, match=r"2 members: a, b[\s\S]*combined"):
        both.logits()


# --- processes -------------------------------------------------------------------------------------------------------


def logits_through(given: Any, records: np.ndarray) -> np.ndarray:
    """What a worker reads through the cache, or the joined data set, that it was handed."""
    if isinstance(given, Cache):
        views, rows = np.divmod(records, len(given))
        return given.gather(rows, views).logits().numpy()
    return given.gather(records).logits().numpy()


@pytest.mark.parametrize("mode", MODES)
def test_pickles_of_cache_and_joined(mode: str, quick_dump: QuickDump, toy: Path) -> None:
    cache = reopened(quick_dump(policy=("shift",), views=2), mode)
    joined = cache.join(open_transfer_set(f"{toy}:images").select(np.arange(39, 9, -3))).for_view(1)
    records = np.array([joined[i][1] for i in range(len(joined))])
    wanted = logits_through(joined, records)
    assert len(pickle.dumps(cache)) < 1000  # by path and id: no rows travel
    for given in (cache, joined):
        copy = pickle.loads(pickle.dumps(given))
        np.testing.assert_array_equal(logits_through(copy, records), wanted)
    copy = pickle.loads(pickle.dumps(joined))
    assert (copy.cache.id, copy.cache.reader.mode, copy.view) == (cache.id, mode, 1)
    np.testing.assert_array_equal(copy[4][0][0], joined[4][0][0])
    assert copy[4][1] == joined[4][1]


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("mode", MODES)
def test_workers_read_for_themselves(mode: str, method: str, quick_dump: QuickDump, toy: Path) -> None:
    cache = reopened(quick_dump(policy=("shift",), views=2), mode)
    joined = cache.join(open_transfer_set(f"{toy}:images"))
    records = np.random.default_rng(0).integers(0, 80, 500)
    wanted = logits_through(joined, records)  # the maps are open before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        handed = [(given, records[i::4]) for i, given in enumerate([cache, joined, cache, joined])]
        for i, found in enumerate(pool.starmap(logits_through, handed)):
            np.testing.assert_array_equal(found, wanted[i::4])
    np.testing.assert_array_equal(logits_through(joined, records), wanted)


def test_many_opens_hold_no_descriptors(quick_dump: QuickDump, toy: Path) -> None:
    made = quick_dump(f"{toy}:images?count=600", shard_rows=256)
    places = some_places(made, 9)

    def descriptors_after(count: int, mode: str) -> int:
        for _ in range(count):
            reopened(made, mode).gather(*places)
        return len(os.listdir("/proc/self/fd"))

    for mode in MODES:
        few = descriptors_after(1, mode)
        assert descriptors_after(20, mode) == few


READ_ALL = """
import sys
import softcache
from softcache.data.transfer_set import open_transfer_set
import softcache.train

cache = softcache.open(sys.argv[1])
joined = cache.join(open_transfer_set(sys.argv[2]), check_content="full")
records = [joined[i][1] for i in range(len(joined))]
print(joined.gather(records).logits().shape[0], "h5py" in sys.modules)
"""


@pytest.mark.slow
def test_reading_imports_no_hdf5_library(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump()
    command = [sys.executable, "-c", READ_ALL, str(cache.reader.path), f"{toy}:images"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["40", "False"], done.stderr


# --- nothing is written ----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Every path below a folder with the hash of its bytes and its modification time."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("mode", MODES)
def test_reading_leaves_every_file_alone(mode: str, quick_dump: QuickDump, toy: Path) -> None:
    made = quick_dump(policy=("shift",), views=2)
    root = made.reader.path
    before = contents(root)
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        cache = reopened(made, mode)
        joined = cache.join(open_transfer_set(f"{toy}:images"), check_content="full")
        joined.gather(np.arange(80))
        first = joined.rows[:1].astype(np.int64)
        cache.check_pixels([joined[0][0][0]], first, np.array([0]), lambda row, view: None)
        assert len(cache.reader.probe()["rows"]) == 64
        pickle.loads(pickle.dumps(joined)).gather(np.arange(80))
        assert contents(root) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_what_is_gathered_may_be_changed_and_the_cache_stays(quick_dump: QuickDump) -> None:
    cache = quick_dump()
    rows, views = np.arange(40), np.zeros(40, np.int64)
    wanted = cache.gather(rows, views).logits().clone()
    cache.gather(rows, views).logits().zero_()
    cache.gather(rows, views).labels.zero_()
    assert torch.equal(cache.gather(rows, views).logits(), wanted)
    with pytest.raises(ValueError, match="read-only"):
        cache.samples.labels[0] = 3


# --- damage, and folders that are no cache ---------------------------------------------------------------------------


def read_everything(path: Path, mode: str) -> None:
    cache = softcache.open(path, mode=mode)  # type: ignore[arg-type]
    cache.samples.key(0)
    cache.gather(np.array([0]), np.array([0]))
    cache.reader.gather(None, "pixel_digests", np.array([0]), np.array([0]))
    cache.reader.probe()


def truncate(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def change_manifest(path: Path, change: Any) -> None:
    entry = json.loads((path / "manifest.json").read_bytes())
    change(entry)
    (path / "manifest.json").write_bytes(canonical_json(entry))


def entry_of(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the manifest says about its only file of a kind."""
    (entry,) = (file for file in manifest["files"] if file["kind"] == kind)
    return entry


def shard(path: Path) -> Path:
    return path / "members/exact/part-00000.h5"


DAMAGE = {
    "a truncated shard": (lambda p: truncate(shard(p)), DamagedCacheError, r"exact/part-00000\.h5: has \d+ bytes, the"),
    "a cut shard": (lambda p: truncate(shard(p), 4000), DamagedCacheError, r"part-00000\.h5: has \d+ bytes, the"),
    "an empty shard": (lambda p: os.truncate(shard(p), 0), DamagedCacheError, r"part-00000\.h5: has 0 bytes"),
    "a longer shard": (lambda p: os.truncate(shard(p), 10**6), DamagedCacheError, r"part-00000\.h5: has 1000000 bytes"),
    "a missing shard": (lambda p: shard(p).unlink(), DamagedCacheError, r"exact/part-00000\.h5: .*it is not there"),
    "no pixel digests": (lambda p: (p / "views/part-00000.h5").unlink(), DamagedCacheError, "views/part-00000"),
    "truncated samples": (lambda p: truncate(p / "samples.h5"), DamagedCacheError, r"samples\.h5: has \d+ bytes"),
    "truncated probe": (lambda p: truncate(p / "probe.h5"), DamagedCacheError, r"probe\.h5: has \d+ bytes"),
    "no probe": (lambda p: (p / "probe.h5").unlink(), DamagedCacheError, r"probe\.h5: .*it is not there"),
    "no samples": (lambda p: (p / "samples.h5").unlink(), DamagedCacheError, r"samples\.h5: .*it is not there"),
    "no manifest, no plan": (
        lambda p: [(p / "manifest.json").unlink(), shutil.rmtree(p / "dump")],
        CacheError,
        r"no manifest\.json, so this is not a softcache cache[\s\S]*--out[\s\S]*softcache eval",
    ),
    "no folder": (lambda p: shutil.rmtree(p), CacheError, "there is no such folder"),
    "half a manifest": (
        lambda p: truncate(p / "manifest.json", 300),
        DamagedCacheError,
        r"manifest\.json: is no manifest that can be trusted",
    ),
    "an empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), DamagedCacheError, "Expecting value"),
    "a list": (lambda p: (p / "manifest.json").write_text("[1]"), DamagedCacheError, "format: missing"),
    "a huge manifest": (
        lambda p: os.truncate(p / "manifest.json", 2**26 + 1),
        DamagedCacheError,
        "more than 67,108,864 bytes",
    ),
    "another file size in it": (
        lambda p: change_manifest(p, lambda m: entry_of(m, "member").update(bytes=entry_of(m, "member")["bytes"] + 1)),
        DamagedCacheError,
        r"its bytes have sha256 [0-9a-f]{64}, which is no id in manifests/",
    ),
    "a data set past the end": (
        lambda p: change_manifest(p, lambda m: entry_of(m, "member")["arrays"]["logits"].update(offset=4096 * 10**6)),
        DamagedCacheError,
        r"part-00000\.h5: data sets reach past the end",
    ),
    "a negative offset": (
        lambda p: change_manifest(p, lambda m: entry_of(m, "member")["arrays"]["logits"].update(offset=-4096)),
        DamagedCacheError,
        r"arrays\.logits\.offset: '-4096' is not an integer, not negative",
    ),
    "another shape in it": (
        lambda p: change_manifest(p, lambda m: entry_of(m, "member")["arrays"]["logits"].update(shape=[1, 39, 4])),
        DamagedCacheError,
        r"'logits' is of shape \(1, 39, 4\), its part of \(1, 40\)",
    ),
    "another count in it": (
        lambda p: change_manifest(p, lambda m: m["samples"].update(count=41)),
        DamagedCacheError,
        r"rounds\[0\]: num_rows is not samples\.count",
    ),
    "a shard less in it": (
        lambda p: change_manifest(p, lambda m: m["files"].remove(entry_of(m, "member"))),
        DamagedCacheError,
        r"files\[3\]: 'members/exact/part-00000\.h5' should stand here, not the end",
    ),
    "no class names in it": (
        lambda p: change_manifest(p, lambda m: m.pop("class_names")),
        DamagedCacheError,
        "class_names: missing",
    ),
    "a later format": (
        lambda p: change_manifest(p, lambda m: m.update(format=7)),
        CacheError,
        r"written in format version 7; this softcache reads versions 1 and 2[\s\S]*install a newer softcache",
    ),
    "an earlier format": (
        lambda p: change_manifest(p, lambda m: m.update(format=0)),
        CacheError,
        r"written in format version 0, before the format was frozen; this softcache reads versions 1 and 2[\s\S]*dump again",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(damage: str, mode: str, quick_dump: QuickDump, toy: Path) -> None:
    path = quick_dump().reader.path
    read_everything(path, mode)
    harm, error, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(error, match=message) as caught:
        read_everything(path, mode)
    assert type(caught.value) is error
    assert str(path) in str(caught.value) or "samples.h5" in str(caught.value)


def test_a_file_that_shrinks_under_an_open_reader(quick_dump: QuickDump) -> None:
    cache = reopened(quick_dump(), "pread")
    rows, views = np.arange(40), np.zeros(40, np.int64)
    cache.gather(rows, views)
    os.truncate(shard(cache.reader.path), 100)
    with pytest.raises(DamagedCacheError, match="became shorter"):
        cache.gather(rows, views)


def test_not_a_cache(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CacheError, match="is not a softcache cache"):
        softcache.open(tmp_path)
    with pytest.raises(CacheError, match="there is no such folder"):
        softcache.open(tmp_path / "notes.txt")
    with pytest.raises(CacheError, match="unknown read mode 'hdf5'"):
        softcache.open(tmp_path, mode="hdf5")  # type: ignore[arg-type]


def test_an_unfinished_dump_says_how_far_it_is_and_how_to_resume(quick_dump: QuickDump, toy: Path) -> None:
    settings: dict[str, Any] = {"data": f"{toy}:images?count=1000", "shard_rows": 256}
    for part, message in [
        (1, r"1 of 4 spans are written \(25 %\)"),
        (3, r"2 of 4 spans .*\(50 %\)"),
        (4, "3 of 4 .*75 %"),
    ]:
        with pytest.raises(
            UnfinishedCacheError, match=message + r"[\s\S]*same `softcache dump` command again to resume"
        ):
            quick_dump(part=f"{part}/4", **settings)
    assert len(quick_dump(part="2/4", **settings)) == 1000


def test_an_id_pins_a_manifest(quick_dump: QuickDump) -> None:
    old = quick_dump()
    path, rows, views = old.reader.path, np.arange(3), np.zeros(3, np.int64)
    renamed = json.loads(old.manifest.to_bytes())
    renamed["samples"]["source"] = "the same data, later"
    data = canonical_json(renamed)
    new = Manifest.from_bytes(data, path)
    (path / f"manifests/{new.id}.json").write_bytes(data)
    (path / "manifest.json").write_bytes(data)

    assert softcache.open(path).id == new.id != old.id
    for pinned in (
        softcache.open(path, id=old.id),
        softcache.open(path, id=old.id[:10]),
        pickle.loads(pickle.dumps(old)),
    ):
        assert pinned.id == old.id
        assert pinned.manifest.plan.samples.source != "the same data, later"
        assert torch.equal(pinned.gather(rows, views).logits(), old.gather(rows, views).logits())
    with pytest.raises(CacheError, match=rf"0 manifests match id 'zz'; known: .*{old.id[:12]}"):
        softcache.open(path, id="zz")
    with pytest.raises(CacheError, match="2 manifests match id ''"):
        softcache.open(path, id="")
    (path / f"manifests/{old.id}.json").write_bytes(data)
    with pytest.raises(DamagedCacheError, match=f"its bytes have sha256 {new.id}"):
        softcache.open(path, id=old.id)


# --- how a dump is cut into shards -----------------------------------------------------------------------------------


def test_layouts_cover_everything_once_in_shards_of_a_good_size() -> None:
    draw, full_sized, whole_set = random.Random(0), 0, 0
    for _ in range(600):
        rows, views = int(10 ** draw.uniform(0, 7)), draw.choice([1, 1, 2, 5, 8, 40])
        members, record = draw.choice([1, 2, 3, 8]), int(10 ** draw.uniform(0.5, 5.9))
        if rows * views * record > 1e12:
            continue  # more shards than a test should walk
        layout = plan_layout(rows, views, members, record)
        spans = layout.spans()
        assert (spans[0].row_start, spans[0].view_start) == (0, 0)
        assert (spans[-1].row_stop, spans[-1].view_stop) == (rows, views)
        for span, following in pairwise(spans):  # one begins where the other ends, views innermost
            assert following.view_start == span.view_stop % views
            assert following.row_start == (span.row_start if span.view_stop < views else span.row_stop)
        for span in spans:
            assert min(span.rows, span.views) > 0
            assert span.rows % 256 == 0 or span.row_stop == rows
            assert span.rows * span.views * record <= 256 * 2**20
        if 1024 * record <= 256 * 2**20:
            assert spans[0].rows >= min(1024, rows)
        if 1024 * record * views <= 256 * 2**20:
            assert layout.shard_views == views  # the views of one row range stay together while they fit
        wanted = rows * members / 64
        if wanted > 1024 and (wanted + 256) * record * views <= 256 * 2**20:
            full_sized += 1
            assert 48 <= members * len(spans) <= 64 + members  # of the members together
        elif rows <= 1024 and 1024 * record * views <= 256 * 2**20:
            whole_set += 1
            assert len(spans) == 1
    assert min(full_sized, whole_set) > 40


@pytest.mark.parametrize(("asked", "given"), [(1, 256), (256, 256), (257, 512), (1000, 1024)])
def test_rows_per_shard_by_hand(asked: int, given: int) -> None:
    assert plan_layout(10_000, 3, 2, 100, shard_rows=asked).shard_rows == given

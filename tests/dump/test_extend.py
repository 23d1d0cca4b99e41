"""Extending a cache by views or members gives what one dump would have given, row for row, and disturbs nobody."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from training import stopped_after

import softcache
import softcache.errors
from softcache import cli
from softcache.cache.schema import CRC_SUFFIX
from softcache.cache.write import writer
from softcache.check import verify
from softcache.config import DumpConfig, TrainConfig
from softcache.dump import flow as dump
from softcache.errors import (
    ClassMismatchError,
    ConfigError,
    DataError,
    LockedError,
    ModelError,
    PlanMismatchError,
    SoftcacheError,
)
from softcache.files import durable
from softcache.train import flow as train

MIXED = ("crop_flip:padding=1", "cutmix")


@pytest.fixture(scope="session")
def pieces() -> Path:
    return WORLDS / "nearly_toy.py"


@pytest.fixture
def extend(quick_dump: QuickDump) -> QuickDump:
    """`quick_dump` that adds to a cache: the codec is the cache's own unless one is given."""

    def make(data: str = "", teacher: Sequence[str] = (), out: str = "cache", **settings: Any) -> softcache.Cache:
        return quick_dump(data, teacher, out, **({"codec": None, "extend": True} | settings))

    return make


def everywhere(cache: softcache.Cache) -> tuple[np.ndarray, np.ndarray]:
    """(row, view) of every record."""
    rows, views = np.divmod(np.arange(len(cache) * cache.num_views), cache.num_views)
    return rows, views


def contents(cache: softcache.Cache, views: int | None = None) -> dict[str, np.ndarray]:
    """Everything that is stored, by (member and) data set: (records, ...) of the first `views` views, and constants."""
    rows, view = everywhere(cache)
    chosen = view < (cache.num_views if views is None else views)
    rows, view = rows[chosen], view[chosen]
    found = {"pixel_digests": cache.reader.gather(None, "pixel_digests", rows, view)}
    for member in cache.members:
        for name in cache.reader.array_kinds(member):
            stored = cache.reader.gather(member, name, rows, view)
            for field in cache.codecs[member].fields:
                if (
                    name == "records" and field.name == "dense"
                ):  # where among the dense rows of its file: that depends on how files are cut
                    stored[:, field.offset : field.offset + 4] = stored[:, field.offset : field.offset + 4].any(
                        axis=1, keepdims=True
                    )
            found[f"{member}/{name}"] = stored
        for name, array in cache.reader.constants(member).items():
            found[f"{member}/constants/{name}"] = array
        if cache.codecs[member].complete:
            found[f"{member}/decoded"] = cache.gather(rows, view, members=[member]).logits().numpy()
    for name, array in cache.samples.arrays().items():
        found[f"samples/{name}"] = np.asarray(array)
    return found


def assert_equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape, name
        assert array.tobytes() == other[name].tobytes(), name


def state_of(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Path -> (sha256, mtime, inode) of all files of a cache but those that are a copy of the newest state."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative not in ("manifest.json", "README.md") and not relative.startswith("dump/"):
            about = path.stat()
            found[relative] = (hashlib.sha256(path.read_bytes()).hexdigest(), about.st_mtime_ns, about.st_ino)
    return found


def hashes_of(folder: Path) -> dict[str, str]:
    """Path -> sha256 of what a manifest covers, with the manifests themselves."""
    return {name: sha for name, (sha, _, _) in state_of(folder).items() if name != "provenance.json"}


# ---- any split gives the same cache ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_split_gives_the_same_id_and_bytes(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    """Eight views and mixing; three parts, in any order, one of them twice."""
    settings: dict[str, Any] = {"policy": MIXED, "views": 8, "view_seed": 3, "shard_rows": 256}
    data = f"{toy}:images?count=520"
    whole = quick_dump(data, out="whole", **settings)
    assert len(whole.manifest.plan.rounds[0].layout) == 3
    for part in ("2/3", "2/3", "3/3"):
        with pytest.raises(softcache.errors.UnfinishedCacheError):
            quick_dump(data, out="parts", part=part, **settings)
    parts = quick_dump(data, out="parts", part="1/3", **settings)
    assert parts.id == whole.id
    assert hashes_of(tmp_path / "parts") == hashes_of(tmp_path / "whole")
    digests = contents(whole)["pixel_digests"].reshape(520, 8)
    assert len(np.unique(digests)) == digests.size  # every view of every sample is another picture


@pytest.mark.slow
def test_parts_of_an_extension(quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path) -> None:
    data = f"{toy}:images?count=520"
    old = quick_dump(data, policy=("shift:pixels=1", "mixup"), views=1, shard_rows=256)
    shutil.copytree(tmp_path / "cache", tmp_path / "alone")
    alone = extend(data, out="alone", views=3, shard_rows=256)
    for part in ("3/3", "1/3"):
        assert extend(data, views=3, shard_rows=256, part=part).id == old.id  # readers meanwhile see the old cache
    assert extend(data, views=3, shard_rows=256, part="2/3").id == alone.id != old.id
    assert hashes_of(tmp_path / "cache") == hashes_of(tmp_path / "alone")
    assert extend(data, views=3, shard_rows=256, part="1/3").id == alone.id  # repeated: nothing to add


# ---- extending equals dumping all at once ---------------------------------------------------------------------------

# (codec, seed of the teacher): only an even one ends with the linear layer that linear_head asks for
CODECS = [
    ("float32", 1),
    ("float16", 3),
    ("int8", 5),
    ("headtail:k=4,bits=4", 7),
    ("lowrank:max_kl=1e-3", 9),
    ("topk:k=5", 11),
    ("linear_head", 2),
]


FAST_TIER = ("int8", "lowrank:max_kl=1e-3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "seed"),
    [pytest.param(*case, id=case[0], marks=() if case[0] in FAST_TIER else pytest.mark.slow) for case in CODECS],
)
def test_more_views_are_those_of_one_dump(
    quick_dump: QuickDump, extend: QuickDump, pieces: Path, codec: str, seed: int
) -> None:
    data, teacher = f"{pieces}:wide", [f"{pieces}:bent?seed={seed}"]
    settings: dict[str, Any] = {"policy": MIXED, "view_seed": 7}
    at_once = quick_dump(data, teacher, "at-once", codec=codec, views=5, **settings)
    grown = quick_dump(data, teacher, codec=codec, views=2, **settings)
    first = contents(grown)
    extend(data, teacher, views=3)
    grown = extend(data, teacher, views=5)
    assert (grown.num_views, len(grown.manifest.plan.rounds)) == (5, 3)
    assert_equal(contents(grown), contents(at_once))
    assert_equal(first, contents(grown, views=2))
    assert grown.id != at_once.id  # its files are cut in another way
    if codec.startswith("lowrank"):  # rows of both kinds, in old files and in new ones
        dense = [file.statistics.dense for file in grown.manifest.files if file.statistics is not None]
        assert len(dense) == 3 and all(0 < count < 80 for count in dense), dense
    if not grown.codecs["bent"].bounded:
        return
    rows, views = everywhere(grown)  # what is stored is what the teacher would say, within the bound that is stored
    live = quick_dump(data, teacher, "live", codec="float32", views=5, **settings)
    error = (grown.gather(rows, views).logits() - live.gather(rows, views).logits()).abs().amax(dim=1).numpy()
    assert (error <= grown.eps("bent", rows, views)).all()


@pytest.mark.slow
def test_views_then_a_member_then_views(quick_dump: QuickDump, extend: QuickDump, pieces: Path, tmp_path: Path) -> None:
    """Four views of one, a second member over them, then eight of both: as one dump of eight views of both."""
    data, a, b = f"{pieces}:wide", f"{pieces}:bent?seed=2", f"{pieces}:bent?seed=3"
    settings: dict[str, Any] = {"codec": "int8", "features": ("first:flatten",), "feature_dtype": "int8"}
    at_once = quick_dump(data, [a, b], "at-once", policy=MIXED, views=8, **settings)
    quick_dump(data, [a], policy=MIXED, views=4, **settings)
    extend(data, [b], **settings)
    grown = extend(data, [b, a], views=8)  # in whatever order: a member is known by its weights
    assert grown.members == at_once.members == ("bent", "bent-2")
    assert_equal(contents(grown), contents(at_once))
    assert [(r.members, r.new_views) for r in grown.manifest.plan.rounds] == [
        (("bent",), True),
        (("bent-2",), False),
        (("bent", "bent-2"), True),
    ]
    features = [cache.gather(*everywhere(cache), features=["first:flatten"]) for cache in (grown, at_once)]
    for member in grown.members:
        assert torch.equal(*(targets.feature("first:flatten", member) for targets in features))
    assert verify.run(tmp_path / "cache", full=True, quiet=True, replay=320, allow_code=True).state == "whole"


@pytest.mark.slow
def test_members_with_codecs_of_their_own(quick_dump: QuickDump, extend: QuickDump, pieces: Path) -> None:
    """Each as a dump of its own would store it; more views keep each one's codec and what was fitted for it."""
    data, teachers = f"{pieces}:wide", [f"{pieces}:bent?seed={seed}&name=m{seed}" for _, seed in CODECS]
    quick_dump(data, teachers[:1], codec=CODECS[0][0], policy=MIXED, views=1)
    for teacher, (codec, _) in zip(teachers[1:], CODECS[1:], strict=True):
        extend(data, [teachers[0], teacher], codec=codec)  # known ones may be named again
    found = contents(extend(data, teachers, views=2))
    for teacher, (codec, seed) in zip(teachers, CODECS, strict=True):
        alone = contents(quick_dump(data, [teacher], f"alone-{seed}", codec=codec, policy=MIXED, views=2))
        mine = {name: array for name, array in found.items() if not name.startswith("m") or f"m{seed}/" in name}
        assert_equal(mine, alone)


def test_a_member_is_named_as_in_one_dump(quick_dump: QuickDump, extend: QuickDump, toy: Path) -> None:
    first, second = f"{toy}:exact?seed=1", f"{toy}:exact?seed=2"
    for out in ("cache", "other"):
        quick_dump(teacher=[first], out=out)
    third, fourth = f"{toy}:exact?seed=3", f"{toy}:exact?seed=4&name=mine"
    assert extend(teacher=[second]).members == ("exact", "exact-2")
    assert extend(teacher=[first, second], out="other").members == ("exact", "exact-2")
    assert extend(teacher=[third, fourth]).members == ("exact", "exact-2", "exact-3", "mine")


def test_a_teacher_that_is_two_members_gives_views_to_both(quick_dump: QuickDump, extend: QuickDump, toy: Path) -> None:
    twice = [f"{toy}:exact", f"{toy}:exact"]
    quick_dump(teacher=twice, policy=MIXED, views=1)
    grown = extend(teacher=twice, views=2)
    first, second = (grown.gather(*everywhere(grown)).logits(member) for member in grown.members)
    assert torch.equal(first, second)


# ---- the old cache is left alone ------------------------------------------------------------------------------------


def test_old_files_and_the_old_id_stay(quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = [f"{toy}:network"]  # its codec has constants, which lie in a file of their own
    open_before = quick_dump(teacher=first, codec="linear_head", policy=MIXED, views=2)
    old, before, stored = open_before.id, state_of(folder), contents(open_before)
    for settings in ({"teacher": first, "views": 3}, {"teacher": [f"{toy}:exact"], "codec": "int8"}):
        extend(**settings)
        now = state_of(folder)
        assert {name: now[name] for name in before} == before  # neither their bytes, nor their times, nor their inodes
        for mode in ("mmap", "pread"):
            pinned = softcache.open(folder, id=old, mode=mode)
            assert (pinned.id, pinned.num_views, pinned.members) == (old, 2, ("network",))
            assert_equal(contents(pinned), stored)
    assert_equal(contents(open_before), stored)
    newest = softcache.open(folder)
    assert (newest.num_views, newest.members) == (3, ("network", "exact"))
    names = [file.path for file in newest.manifest.files]
    assert len(names) == len(set(names))
    assert len(list((folder / "manifests").iterdir())) == 3
    with pytest.raises(IndexError, match="view 2"):
        open_before.gather(np.array([0]), np.array([2]))


@pytest.mark.slow
def test_a_repeated_extension_changes_nothing(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_dump(policy=MIXED, views=2)
    extend(views=3)
    extend(teacher=[f"{toy}:network"], codec="int8")

    def everything() -> dict[str, tuple[bytes, int]]:
        folder = tmp_path / "cache"
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}

    before = everything()
    capsys.readouterr()
    for settings in ({"views": 3}, {"teacher": [f"{toy}:network"], "codec": "int8"}, {"teacher": [f"{toy}:exact"]}):
        extend(**settings)
        assert "nothing to add" in capsys.readouterr().err
    assert everything() == before


def test_a_repeated_first_dump_does_not_take_the_extension_back(quick_dump: QuickDump, extend: QuickDump) -> None:
    old = quick_dump(policy=MIXED, views=2).id
    new = extend(views=3).id
    assert quick_dump(policy=MIXED, views=2).id == new != old


@pytest.mark.slow
def test_the_manifest_of_an_extension_is_a_function_of_what_was_asked(quick_dump: QuickDump, extend: QuickDump) -> None:
    ids = set()
    for out in "ab":
        quick_dump(policy=MIXED, views=2, out=out)
        ids.add(extend(views=4, out=out).id)
    assert len(ids) == 1


# ---- runs that were begun before ------------------------------------------------------------------------------------


def train_config(folder: Path, toy: Path, out: str, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"epochs": 5, "batch_size": 16, "threads": 1, "workers": 0, "lr": 0.01, "seed": 4}
    defaults |= {"cache": str(folder / "cache"), "loss": ("kd:temperature=3", "ce:weight=0.5")}
    return TrainConfig(
        data=f"{toy}:images", student="softcache:mlp?hidden=8", out=str(folder / out), **(defaults | settings)
    )


def outcome(out: Path) -> tuple[str, list[dict[str, Any]], str]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return hashlib.sha256((out / "student.safetensors").read_bytes()).hexdigest(), metrics, json.dumps(pinned(out))


def pinned(out: Path) -> str:
    found: str = json.loads((out / "run.json").read_text())["cache"]
    return found


@pytest.mark.slow
def test_a_run_goes_on_with_the_cache_it_began_with(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path
) -> None:
    """Stopped in epoch 3 of 5, the cache then grows from two views to four and by a member; bit for bit as without."""
    old = quick_dump(policy=MIXED, views=2).id
    train.run(train_config(tmp_path, toy, "alone"), quiet=True)
    with stopped_after(8), pytest.raises(KeyboardInterrupt):  # two checkpoints an epoch and one at its end
        train.run(train_config(tmp_path, toy, "stopped", checkpoint_every=1), quiet=True)
    extend(views=4)
    new = extend(teacher=[f"{toy}:network"], codec="int8").id
    train.run(train_config(tmp_path, toy, "stopped"), quiet=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "alone")
    assert pinned(tmp_path / "stopped") == old
    # by its id, whole or in short; without, a run takes the newest
    train.run(train_config(tmp_path, toy, "by-id", cache_id=old[:10]), quiet=True)
    assert outcome(tmp_path / "by-id") == outcome(tmp_path / "alone")
    train.run(train_config(tmp_path, toy, "newest"), quiet=True)
    assert pinned(tmp_path / "newest") == new
    assert [row["view"] for row in outcome(tmp_path / "newest")[1]] == [0, 1, 2, 3, 0]
    assert [row["view"] for row in outcome(tmp_path / "stopped")[1]] == [0, 1, 0, 1, 0]


# ---- an extension that is interrupted -------------------------------------------------------------------------------


class Stop(BaseException):
    """What no handler catches, as a kill."""


def stop_at_call(patch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> None:
    original, calls = getattr(place, name), 0

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Stop
        return original(*arguments, **more)

    patch.setattr(place, name, counted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("views", marks=pytest.mark.slow), "member"])
def test_an_interrupted_extension_is_resumed(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path, kind: str
) -> None:
    """At every file that it publishes: readers see the old cache, and the same command ends where it would have."""
    data = f"{toy}:images?count=300"
    settings: dict[str, Any] = (
        {"views": 2} if kind == "views" else {"teacher": [f"{toy}:network"], "codec": "linear_head"}
    )
    settings["shard_rows"] = 256
    old = quick_dump(data, policy=("shift:pixels=1",), views=1, shard_rows=256)
    shutil.copytree(tmp_path / "cache", tmp_path / "old")
    new = extend(data, **settings)
    stops = 0
    for number in range(1, 40):
        out = f"stopped-{number}"
        shutil.copytree(tmp_path / "old", tmp_path / out)
        with pytest.MonkeyPatch.context() as patch:
            stop_at_call(patch, durable, "sync_folder", number)
            try:
                extend(data, out=out, **settings)
                break
            except Stop:
                stops += 1
        assert softcache.open(tmp_path / out).id in (old.id, new.id)
        assert softcache.open(tmp_path / out, id=old.id).num_views == 1
        assert extend(data, out=out, **settings).id == new.id
        assert hashes_of(tmp_path / out) == hashes_of(tmp_path / "cache")
    assert stops > 6


def half_done(extend: QuickDump, **settings: Any) -> None:
    """An extension that stopped before its first shard."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, dump, "encode", 1)
        with pytest.raises(Stop):
            extend(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param({"views": 5}, "views.count was '?4'?, is now '?5'?", id="more views"),
        pytest.param({"views": 4, "batch_size": 32}, "batch_size was 256, is now 32", id="batch size"),
        pytest.param({"views": 4, "shard_rows": 512}, "shard_rows was 1024, is now 512", id="rows of a shard"),
        pytest.param({"teacher": "network", "codec": "int8"}, "members", id="a member instead"),
    ],
)
def test_another_plan_for_a_half_done_extension(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    old = quick_dump(policy=MIXED, views=2).id
    half_done(extend, views=4)
    if "teacher" in other:
        other = {**other, "teacher": [f"{toy}:{other['teacher']}"]}
    with pytest.raises(PlanMismatchError, match=message) as caught:
        extend(**other)
    assert "extend-1" in caught.value.tip  # what to delete in order to give it up
    assert softcache.open(tmp_path / "cache").id == old
    done = extend(views=4)
    assert (done.num_views, verify.run(tmp_path / "cache", full=True, quiet=True).state) == (4, "whole")


@pytest.mark.slow
def test_what_was_fixed_stays_fixed_on_resume(
    quick_dump: QuickDump, extend: QuickDump, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that were not asked for are those of the beginning, and a codec is not fitted anew."""
    data, teacher = f"{pieces}:wide", [f"{pieces}:bent"]
    quick_dump(data, [f"{pieces}:bent?seed=3"], policy=MIXED, views=2)
    settings: dict[str, Any] = {"data": data, "teacher": teacher, "codec": "lowrank:max_kl=1e-3"}
    half_done(extend, **settings)
    asked: list[int | None] = []

    def picked(threads: int | None, *, shared: bool) -> int:
        asked.append(threads)
        return 1

    monkeypatch.setattr(dump, "pick_threads", picked)
    monkeypatch.setattr("softcache.codecs.lowrank.LowRankCodec.fit", lambda self, probe: pytest.fail("fitted anew"))
    assert extend(**settings, threads=None).members == ("bent", "bent-2")
    assert asked == [1]


@pytest.mark.slow
def test_a_given_up_extension_leaves_the_cache_usable(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path
) -> None:
    """What the tip says: delete its folder, and extend otherwise."""
    quick_dump(policy=MIXED, views=2)
    half_done(extend, teacher=[f"{toy}:network"], codec="linear_head")
    shutil.rmtree(tmp_path / "cache" / "dump" / "extend-1")
    grown = extend(teacher=[f"{toy}:network"], codec="int8")
    assert_equal(contents(grown), contents(two_at_once(quick_dump, toy)))
    assert verify.run(tmp_path / "cache", full=True, quiet=True).state == "whole"


def two_at_once(quick_dump: QuickDump, toy: Path) -> softcache.Cache:
    """A fresh cache of the same two members, the second with int8."""
    quick_dump(policy=MIXED, views=2, out="fresh")
    settings: dict[str, Any] = {"codec": "int8", "extend": True, "out": "fresh"}
    return quick_dump(teacher=[f"{toy}:network"], **settings)


def test_an_extension_while_another_process_extends(quick_dump: QuickDump, extend: QuickDump, tmp_path: Path) -> None:
    old = quick_dump(policy=MIXED, views=2).id
    half_done(extend, views=4)
    fd = os.open(tmp_path / "cache" / "dump" / "extend-1" / "part-1-of-1.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)  # as the other process would hold it
    for settings in ({"views": 4}, {"views": 5}, {"views": 4, "part": "1/2"}):
        with pytest.raises(LockedError, match="another process"):
            extend(**settings)
    assert softcache.open(tmp_path / "cache").id == old
    os.close(fd)
    assert extend(views=4).num_views == 4


def test_a_manifest_that_came_between_is_not_overwritten(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path
) -> None:
    """Two parts; the first is done, and its commit comes after the second has committed and a further round was added."""
    quick_dump(policy=MIXED, views=2)
    extend(views=3, part="1/2")
    late: list[Callable[[], Any]] = []
    commit = writer.CacheWriter.commit

    def held_back(self: Any, *arguments: Any) -> Any:
        late.append(lambda: commit(self, *arguments))
        return softcache.open(tmp_path / "cache").manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.CacheWriter, "commit", held_back)
        extend(views=3, part="2/2")
    extend(views=3, part="2/2")
    newest = extend(views=4).id
    late[0]()
    assert softcache.open(tmp_path / "cache").id == newest


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param({"data": "images?count=41", "views": 3}, DataError, "41 samples, the cache has 40", id="more"),
        pytest.param({"data": "images?count=39", "views": 3}, DataError, "toy/0039", id="fewer samples"),
        pytest.param({"data": "images?seed=1", "views": 3}, DataError, "labels", id="other labels"),
        pytest.param({"policy": ("erase",), "views": 3}, ConfigError, "--policy cannot be given", id="policy"),
        pytest.param({"policy": MIXED, "views": 3}, ConfigError, "--policy cannot be given", id="its own policy"),
        pytest.param({"view_seed": 1, "views": 3}, ConfigError, "--view-seed cannot be given", id="seed of views"),
        pytest.param({"order": "natural", "views": 3}, ConfigError, "--order cannot be given", id="order"),
        pytest.param({"no_keys": True, "views": 3}, ConfigError, "--no-keys cannot be given", id="keys"),
        pytest.param({"views": 1}, ConfigError, "--views 1: the cache has 2 already", id="fewer views"),
        pytest.param({"views": 0}, ConfigError, "--views 0: the cache has 2 already", id="no views"),
        pytest.param({"teacher": ["exact"], "views": 3}, ModelError, "member 'exact-2'.* is not among", id="missing"),
        pytest.param(
            {"teacher": ["exact", "exact?seed=2", "network"], "views": 3}, ModelError, "'network' is no", id="extra"
        ),
        pytest.param(
            {"teacher": ["exact", "exact?seed=3"], "views": 3}, ModelError, "'exact-2'.* is not among", id="weights"
        ),
        pytest.param({"views": 3, "codec": "int8"}, ConfigError, "--codec cannot be given with more", id="codec"),
        pytest.param(
            {"views": 3, "codec": "float32"}, ConfigError, "--codec cannot be given with more", id="same codec"
        ),
        pytest.param(
            {"views": 3, "features": ("x:flatten",)}, ConfigError, "--features cannot be given", id="features"
        ),
        pytest.param({"teacher": ["network?name=exact"]}, ModelError, "has a member 'exact' already", id="name"),
        pytest.param({"teacher": ["network"], "codec": "int9"}, ConfigError, "int9", id="unknown codec"),
    ],
)
def test_what_an_extension_refuses(
    quick_dump: QuickDump,
    extend: QuickDump,
    toy: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[SoftcacheError],
    message: str,
) -> None:
    both = [f"{toy}:exact", f"{toy}:exact?seed=2"]
    old = quick_dump(teacher=both, policy=MIXED, views=2).id
    settings = dict(settings)
    data = f"{toy}:{settings.pop('data', 'images')}"
    teacher = [f"{toy}:{name}" for name in settings.pop("teacher", [])] or both
    with pytest.raises(error, match=message):
        extend(data, teacher, **settings)
    assert softcache.open(tmp_path / "cache").id == old
    assert extend(teacher=both, views=3).num_views == 3  # a refusal leaves nothing behind that would be in the way


def test_views_that_would_all_be_the_same_are_refused(quick_dump: QuickDump, extend: QuickDump) -> None:
    quick_dump(policy=("resize:size=6",))
    with pytest.raises(ConfigError, match="every view of this cache's policy is the same"):
        extend(views=2)


def test_what_is_not_there_cannot_be_extended(extend: QuickDump, tmp_path: Path) -> None:
    with pytest.raises(SoftcacheError, match="no such folder"):
        extend(views=2)
    assert not (tmp_path / "cache").exists()


def test_an_unfinished_cache_cannot_be_extended(quick_dump: QuickDump, extend: QuickDump, toy: Path) -> None:
    data = f"{toy}:images?count=300"
    with pytest.raises(SoftcacheError):
        quick_dump(data, policy=MIXED, shard_rows=256, part="1/2")
    with pytest.raises(softcache.errors.UnfinishedCacheError, match="not finished"):
        extend(data, views=2)


def test_a_sample_that_changed_is_refused(quick_dump: QuickDump, extend: QuickDump, pieces: Path) -> None:
    quick_dump(f"{pieces}:images", [f"{pieces}:slow"], policy=MIXED, views=2)
    with pytest.raises(DataError, match=r"2 samples changed .*some/(7|30)"):
        extend(f"{pieces}:images?changed=7-30", [f"{pieces}:slow"], views=3)


@pytest.mark.parametrize("kind", ["views", "member"])
def test_another_order_of_the_classes_is_refused(
    quick_dump: QuickDump, extend: QuickDump, pieces: Path, toy: Path, kind: str
) -> None:
    """No label tells them apart here, and the teacher would be permuted into the order of the data set."""
    quick_dump(f"{pieces}:images", [f"{pieces}:slow"], policy=MIXED, views=2)
    settings: dict[str, Any] = {"views": 3} if kind == "views" else {"codec": "float32"}
    teacher = f"{pieces}:slow" if kind == "views" else f"{toy}:network"
    with pytest.raises(ClassMismatchError, match="the same classes in another order"):
        extend(f"{pieces}:images?reverse=true", [teacher], **settings)


def test_a_member_without_float32_is_not_continued_in_half(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path
) -> None:
    """Views of one member must be of one kind: a teacher whose last layer now computes in bfloat16 is refused."""
    teacher = [f"{toy}:exact"]  # a matrix product of its own, no nn.Linear that autocast could be kept from
    old = quick_dump(teacher=teacher, policy=MIXED, views=2).id
    with pytest.raises(ModelError, match=r"compute_dtype was 'float32', is now 'bfloat16'"):
        extend(teacher=teacher, views=3, autocast="bf16")
    assert softcache.open(tmp_path / "cache").id == old


# ---- processes ------------------------------------------------------------------------------------------------------


def run_cli(argv: Sequence[str], *, ranks: int = 1) -> None:
    command = [sys.executable, "-m", "softcache"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "softcache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_ranks_give_the_same_cache_and_the_same_extension(
    quick_dump: QuickDump, extend: QuickDump, toy: Path, tmp_path: Path
) -> None:
    data = f"{toy}:images?count=520"
    common = ["--data", data, "--teacher", f"{toy}:exact", "--shard-rows", "256", "--threads", "1", "--quiet"]
    common += ["--workers", "0", "--out", str(tmp_path / "ranks")]
    policy = [word for step in MIXED for word in ("--policy", step)]
    alone = quick_dump(data, policy=MIXED, views=8, shard_rows=256)
    run_cli(["dump", *common, *policy, "--codec", "float32", "--views", "8"], ranks=2)
    assert softcache.open(tmp_path / "ranks").id == alone.id
    grown = extend(data, views=10, shard_rows=256)
    run_cli(["dump", *common, "--extend", "--views", "10"], ranks=2)
    assert softcache.open(tmp_path / "ranks").id == grown.id
    assert hashes_of(tmp_path / "ranks") == hashes_of(tmp_path / "cache")


def _extend_slowly(config: DumpConfig, pause_s: float) -> None:
    os.environ["TEACHER_PAUSE_S"] = str(pause_s)
    torch.set_num_threads(1)
    dump.run(config, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["views", "member"])
def test_a_killed_extension_is_resumed(
    quick_dump: QuickDump, extend: QuickDump, pieces: Path, toy: Path, tmp_path: Path, kind: str
) -> None:
    """SIGKILL after the first, second, ... shard: the old cache is there all the time, the new one comes out the same."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["softcache.dump", "torchvision"])
    data, slow = f"{pieces}:images?count=1100", f"{pieces}:slow"
    first = slow if kind == "views" else f"{toy}:exact"
    old = quick_dump(data, [first], policy=("shift:pixels=1",), views=1, shard_rows=256)
    shutil.copytree(tmp_path / "cache", tmp_path / "killed")
    settings: dict[str, Any] = {"views": 2, "codec": None} if kind == "views" else {"codec": "float32"}
    settings |= {"shard_rows": 256, "batch_size": 32}
    new = extend(data, [slow], **settings)
    config = DumpConfig(
        data=data, teacher=(slow,), out=str(tmp_path / "killed"), extend=True, threads=1, workers=0, **settings
    )
    journal = tmp_path / "killed" / "dump" / "extend-1" / "part-1-of-1.jsonl"
    for wanted in (1, 2, 3):
        process = context.Process(target=_extend_slowly, args=(config, 0.02))
        process.start()
        started = time.monotonic()
        while not journal.exists() or len(journal.read_bytes().splitlines()) < wanted:
            assert process.is_alive() and time.monotonic() - started < 60
            time.sleep(0.005)
        process.kill()
        process.join()
        assert softcache.open(tmp_path / "killed").id == old.id
    dump.run(replace(config, part=None), quiet=True)
    assert softcache.open(tmp_path / "killed").id == new.id
    assert hashes_of(tmp_path / "killed") == hashes_of(tmp_path / "cache")


def test_the_command_line(quick_dump: QuickDump, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = quick_dump(policy=MIXED, views=2).id
    argv = ["dump", "--data", f"{toy}:images", "--teacher", f"{toy}:exact", "--out", str(tmp_path / "cache")]
    argv += ["--threads", "1", "--quiet", "--extend", "--json", "--views"]
    assert cli.main([*argv, "3"]) == 0
    new = json.loads(capsys.readouterr().out)["id"]
    assert softcache.open(tmp_path / "cache").id == new != old
    assert cli.main([*argv, "2"]) == 2
    assert "--views 2: the cache has 3 already" in capsys.readouterr().err


def test_checksums_cover_every_new_data_set(quick_dump: QuickDump, extend: QuickDump, tmp_path: Path) -> None:
    """A flipped bit in a new shard is found, and named."""
    quick_dump(policy=MIXED, views=2)
    manifest = extend(views=4).manifest
    (new,) = (f for f in manifest.files if f.kind == "member" and f.views == (2, 4))
    stored = new.arrays["logits"]
    assert f"logits{CRC_SUFFIX}" in new.arrays
    path = tmp_path / "cache" / new.path
    data = bytearray(path.read_bytes())
    data[stored.offset + 5] ^= 1
    path.write_bytes(data)
    verdict = verify.run(tmp_path / "cache", full=True, quiet=True)
    assert verdict.state == "damaged" and f"{new.path}: data set 'logits', block 0" in verdict.faults[0]

"""A file of a cache is the one that the manifest names: whatever else lies there is refused, and nothing is hashed twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QuickDump

import softcache
from softcache import cli
from softcache.cache import bound_files
from softcache.errors import CacheError, DamagedCacheError
from softcache.files import home
from softcache.targets.cache import Cache

GOLDEN = Path(__file__).resolve().parents[1] / "golden/v1"
OTHER = "is not the file that the manifest names: its size is right, its sha256 is"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered yet; and files count as settled as soon as they are written."""
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bound_files, "SETTLED_NS", -(10**9))
    return tmp_path / "home"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes of the files that were hashed, in their order."""
    found: list[int] = []

    def noted(fd: int, *how: Any) -> str:
        found.append(os.fstat(fd).st_ino)
        return plain(fd, *how)

    plain = bound_files.binding_digest
    monkeypatch.setattr(bound_files, "binding_digest", noted)
    return found


def read_all(cache: Cache) -> None:
    """Every file that a reader ever opens."""
    rows, views = np.arange(len(cache)), np.full(len(cache), cache.num_views - 1)
    cache.gather(rows, views).rows_between(0, 1)
    cache.reader.gather(None, "pixel_digests", rows, views)
    cache.samples.key(0)
    cache.reader.probe()
    for member in cache.members:
        cache.reader.constants(member)


# --- another file in its place ---------------------------------------------------------------------------------------

# what is crossed -> (file, settings of this cache, settings of the other one)
TWO = {"teacher": ["{toy}:network?seed=1&name=net"]}
CROSSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a part of another teacher": ("members/net/part-00000.h5", {}, {"teacher": ["{toy}:network?seed=2&name=net"]}),
    "a part of other data": ("members/net/part-00001.h5", {}, {"data": "{toy}:images?count=512&seed=3"}),
    "views of another seed": ("views/part-00000.h5", {"policy": ("crop_flip",)}, {"view_seed": 5}),
    "samples of another order": ("samples.h5", {}, {"order_seed": 9}),
    "a probe of other data": ("probe.h5", {}, {"data": "{toy}:images?count=512&seed=3"}),
    "constants of another fit": (
        "members/net/constants.h5",
        {"codec": "linear_head"},
        {"teacher": ["{toy}:network?seed=2&name=net"]},
    ),
}


@pytest.fixture
def world(quick_dump: QuickDump, toy: Path) -> Any:
    """world(out, **settings): 512 samples in 2 parts, 2 views."""

    def made(out: str, **settings: Any) -> Path:
        settings = {"data": "{toy}:images?count=512", "policy": ("shift",), "views": 2} | TWO | settings
        data = settings.pop("data").format(toy=toy)
        teachers = [text.format(toy=toy) for text in settings.pop("teacher")]
        return quick_dump(data, teachers, out=out, shard_rows=256, **settings).reader.path

    return made


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A small cache, whole and never opened before."""
    return Path(shutil.copytree(GOLDEN / "float16", tmp_path / "whole"))


@pytest.mark.parametrize("crossed", CROSSED)
def test_a_file_of_another_cache_of_the_same_layout_is_refused(crossed: str, world: Any) -> None:
    relative, own, others = CROSSED[crossed]
    path, other = world("own", **own), world("other", **{**own, **others})
    for mode in ("mmap", "pread"):
        read_all(softcache.open(path, mode=mode))
    assert (path / relative).stat().st_size == (other / relative).stat().st_size
    shutil.copy(other / relative, path / relative)
    for mode in ("mmap", "pread"):
        with pytest.raises(DamagedCacheError, match=rf"{relative}: {OTHER}[\s\S]*--check-files no"):
            read_all(softcache.open(path, mode=mode, check_blocks="always"))
        read_all(softcache.open(path, mode=mode, check_files=False))  # nothing else sees it


def test_files_of_one_cache_in_one_anothers_place(world: Any) -> None:
    """Two members, two parts of one member, and a hard link: each is a file of this very cache."""
    path = world("own", teacher=["{toy}:network?seed=1&name=a", "{toy}:network?seed=2&name=b"])
    first = path / "members/a/part-00000.h5"
    for other in ("members/b/part-00000.h5", "members/a/part-00001.h5"):
        os.replace(first, path / "aside")
        os.link(path / other, first)
        cache = softcache.open(path)
        with pytest.raises(DamagedCacheError, match=rf"members/a/part-00000\.h5: {OTHER}"):
            cache.gather(np.array([0]), np.array([0]))
        cache.gather(np.array([0]), np.array([0]), members=["b"])  # the other member is whole
        os.replace(path / "aside", first)
    read_all(softcache.open(path))


def test_damage_is_told_as_damage_and_names_its_samples(world: Any) -> None:
    path = world("own")
    part = path / "members/net/part-00001.h5"
    data = bytearray(part.read_bytes())
    (file,) = (one for one in softcache.open(path).manifest.files if one.path.endswith("net/part-00001.h5"))
    data[file.arrays["logits"].offset] ^= 1
    part.write_bytes(data)
    with pytest.raises(DamagedCacheError, match=r"part-00001\.h5: data set 'logits', block 0, rows .*; samples toy/"):
        softcache.open(path).gather(np.array([0]), np.array([0]))


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_the_command_line_refuses_it_and_its_flag_lets_it_pass(
    verb: str, world: Any, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = world("own"), world("other", teacher=["{toy}:network?seed=2&name=net"])
    shutil.copy(other / "members/net/part-00000.h5", path / "members/net")
    data = ["--data", f"{toy}:images?count=512", "--threads", "1", "--quiet"]
    argv = ["eval", str(path), *data]
    if verb == "train":
        run = ["--student", "softcache:mlp?hidden=2", "--epochs", "1", "--out", str(tmp_path / "run")]
        argv = ["train", "--cache", str(path), *data, *run, "--loss", "kd"]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert OTHER in told and "--check-files no" in told and "Traceback" not in told
    assert cli.main([*argv, "--check-files", "no"]) == 0
    if verb == "train":
        assert json.loads((tmp_path / "run/run.json").read_text())["config"]["check_files"] == "no"


# --- once ------------------------------------------------------------------------------------------------------------


def test_no_file_is_hashed_twice_until_somebody_writes_it(whole: Path, hashed: list[int]) -> None:
    path = whole
    read_all(softcache.open(path))
    assert (
        len(hashed) == len(set(hashed)) == len(softcache.open(path).manifest.files)
    )  # each once, however often it was opened
    hashed.clear()
    read_all(softcache.open(path))
    moved = path.rename(path.with_name("moved"))
    (moved.parent / "link").symlink_to(moved)
    read_all(softcache.open(moved.parent / "link"))
    assert hashed == []
    part = moved / "members/network/part-00000.h5"
    data = part.read_bytes()
    part.write_bytes(data)  # the same bytes: nobody can know that
    read_all(softcache.open(moved))
    assert hashed == [part.stat().st_ino]
    shutil.copy(part, part.with_name("copy"))
    os.replace(part.with_name("copy"), part)
    read_all(softcache.open(moved))
    assert hashed[1:] == [part.stat().st_ino]


def test_a_cache_that_grew_is_hashed_only_where_it_grew(
    quick_dump: QuickDump, toy: Path, hashed: list[int], own_home: Path
) -> None:
    teacher = [f"{toy}:network?name=net"]
    path = quick_dump(teacher=teacher, codec=None, policy=("shift",), views=1).reader.path
    old = {file.path for file in softcache.open(path).manifest.files}
    (memory,) = own_home.glob("checked/*.json")
    kept = memory.read_bytes()
    grown = quick_dump(teacher=teacher, codec=None, views=3, extend=True)
    memory.write_bytes(kept)  # as it was before
    hashed.clear()
    read_all(softcache.open(path))
    new = {(path / file.path).stat().st_ino for file in grown.manifest.files if file.path not in old}
    assert set(hashed) == new and len(hashed) == len(new) == 2


def test_a_file_that_is_replaced_between_two_opens_is_seen(world: Any) -> None:
    path, other = world("own"), world("other", teacher=["{toy}:network?seed=2&name=net"])
    part = Path("members/net/part-00000.h5")
    cache = softcache.open(path)
    there = os.stat(path / part)
    shutil.copy(other / part, path / part)  # written over, with the times of the right one
    os.utime(path / part, ns=(there.st_atime_ns, there.st_mtime_ns))
    for reader in (cache, pickle.loads(pickle.dumps(cache)), softcache.open(path)):
        with pytest.raises(DamagedCacheError, match=OTHER):
            reader.gather(np.array([0]), np.array([0]))


def test_what_was_just_written_is_not_remembered(
    whole: Path, hashed: list[int], own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the file system's clock it could be written again, and look the same."""
    monkeypatch.setattr(bound_files, "SETTLED_NS", 10**15)
    for _ in range(2):
        hashed.clear()
        read_all(softcache.open(whole))
        assert len(hashed) == len(set(hashed)) >= 4
    assert not list(own_home.rglob("*.json"))


def test_a_home_that_cannot_be_written_is_told_once(
    whole: Path, hashed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "file/home"))
    for _ in range(2):
        hashed.clear()
        cache = softcache.open(whole)
        count = len(hashed)
        read_all(pickle.loads(pickle.dumps(cache)))  # the verdict travels: a worker hashes nothing
        assert len(hashed) == count >= 4
    told = capsys.readouterr().err
    assert told.count("cannot be written, so the files of a cache are hashed anew") == 1
    assert "SOFTCACHE_HOME" in told


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"files": 3}',
        b'{"files": [[1, 2], "x", {}, [1, 2, 3, 4, 5, 6], ["1", 2, 3, 4, 5, "0"]]}',
        b"[" * 100_000,
    ],
    ids=["empty", "cut", "list", "number", "entries", "deep"],
)
def test_a_damaged_memory_counts_for_nothing(damage: bytes, whole: Path, hashed: list[int], own_home: Path) -> None:
    path = whole
    softcache.open(path)
    (memory,) = own_home.glob("checked/*.json")
    hashed.clear()
    memory.write_bytes(damage)
    read_all(softcache.open(path))
    assert len(hashed) == len(set(hashed)) >= 4
    hashed.clear()
    read_all(softcache.open(path))
    assert hashed == []  # it was mended


def test_several_that_open_at_once_hash_once(whole: Path, hashed: list[int]) -> None:
    threads = [threading.Thread(target=lambda: read_all(softcache.open(whole))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashed) == len(set(hashed)) == len(softcache.open(whole).manifest.files)


def gather_in_worker(given: Any, queue: Any) -> None:
    def refuse(fd: int, *how: Any) -> str:
        raise AssertionError("a worker hashes")

    bound_files.binding_digest = refuse
    try:
        read_all(given)
        queue.put("read")
    except BaseException as exc:
        queue.put(repr(exc))


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_workers_hash_nothing(method: str, whole: Path, own_home: Path) -> None:
    cache = softcache.open(whole)
    shutil.rmtree(own_home)  # nothing is remembered: only what the parent knows helps
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=gather_in_worker, args=(cache, queue))
    process.start()
    assert queue.get(timeout=60) == "read"
    process.join()


def test_where_it_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "own"))
    assert home.home() == tmp_path / "own"
    monkeypatch.delenv("SOFTCACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home.home() == tmp_path / "xdg/softcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home.home() == tmp_path / ".cache/softcache"


def test_a_dump_of_crossed_parts_cannot_be_resumed_into_a_cache(world: Any, tmp_path: Path) -> None:
    """The samples of an unfinished dump are bound to its plan."""
    part = {"part": "1/2"}
    for out, seed in (("own", 0), ("other", 4)):
        with pytest.raises(CacheError, match="not finished"):
            world(out, order_seed=seed, **part)
    shutil.copy(tmp_path / "other/samples.h5", tmp_path / "own/samples.h5")
    with pytest.raises(DamagedCacheError, match=rf"samples\.h5: {OTHER}"):
        world("own", part="2/2")

"""A cache that is opened where it lies reads as the whole one does, and what it fetches is right, fetched once, and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from far_caches import BLOCK, KINDS, Server, all_pairs, check_alike, far, folder, read_all, serving

import softcache
from softcache.cache.file_entry import StoredFile
from softcache.cache.source import Touched
from softcache.errors import ConfigError, DamagedCacheError, DiskSpaceError, RemoteError
from softcache.files import durable
from softcache.remote import patience, prune
from softcache.remote.holed import holed_name, marks_path
from softcache.remote.places import parse_place
from softcache.remote.source import StoreSource
from softcache.remote.store import Store, shared_store

V2 = "version 2"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(patience, "NOBODY_S", 0.1)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(folder()) as running:
        yield running


def url_of(server: Server, kind: str, id: str | None = None) -> str:
    cache = far(kind)
    return f"{server.url}/{cache.name}@{id or softcache.open(cache, quiet=True).id}"


def remote(server: Server, kind: str = V2, **how: Any) -> softcache.Cache:
    return softcache.open(url_of(server, kind), quiet=True, **how)


def local(kind: str = V2) -> softcache.Cache:
    return softcache.open(far(kind), quiet=True)


def source_of(cache: softcache.Cache) -> StoreSource:
    source = cache.reader.files.source
    assert isinstance(source, StoreSource)
    return source


def large_file(cache: softcache.Cache) -> StoredFile:
    """The first part of a member, which has blocks."""
    return next(cache.manifest.files_of("member", cache.members[0]))


def data_ranges(server: Server, path: str) -> list[tuple[int, int]]:
    """[start, stop) of every range of a file that was asked for."""
    asked = [given for name, given in server.asked if name == path and given]
    ends = [given.removeprefix("bytes=").split("-") for given in asked]
    return [(int(start), int(last) + 1) for start, last in ends]


# ---- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one != V2)) for one in KINDS])
@pytest.mark.parametrize("mode", ["mmap", "pread"])
def test_every_record_is_the_local_ones(server: Server, kind: str, mode: Any) -> None:
    pairs = all_pairs(local(kind))
    check_alike(read_all(remote(server, kind, mode=mode), *pairs), read_all(local(kind), *pairs))
    asked = len(server.asked)
    again = remote(server, kind, mode=mode)
    check_alike(read_all(again, *pairs), read_all(local(kind), *pairs))
    assert len(server.asked) == asked  # all of it is in the store
    assert not source_of(again).fetched


def test_of_version_2_little_is_fetched_for_little(server: Server) -> None:
    cache = remote(server)
    file = large_file(cache)
    cache.gather(np.array([3]), np.array([1]), members=["one"])
    fetched = source_of(cache).fetched
    views = sum(one.nbytes for one in cache.manifest.files_of("views"))
    logits = cache.manifest.part_file("member", "one", 0).arrays["logits"]  # type: ignore[union-attr]
    assert (
        fetched["records"] == logits.nbytes < file.nbytes / 3
    )  # less than a chunk, so all of that data set, and no other
    assert views not in fetched.values()
    sparse = shared_store().path_of(holed_name(file))
    assert sparse.stat().st_size == file.nbytes


@pytest.mark.slow
def test_of_version_1_a_file_is_fetched_whole_and_hashed_before_its_first_row(server: Server) -> None:
    server.always[f"{far('version 1').name}/members/one/part-00000.h5"] = "corrupt"
    with pytest.raises(RemoteError, match=r"members/one/part-00000\.h5: came twice with other bytes"):
        remote(server, "version 1").gather(np.array([3]), np.array([1]), members=["one"])
    server.always.clear()
    cache = remote(server, "version 1")
    cache.gather(np.array([3]), np.array([1]), members=["one"])
    whole = shared_store().path_of(large_file(cache).sha256)
    assert whole.read_bytes() == (far("version 1") / large_file(cache).path).read_bytes()


def test_a_server_without_ranges_gives_whole_files(server: Server) -> None:
    cache = local()
    for file in cache.manifest.files:
        server.always[f"{far(V2).name}/{file.path}"] = "whole"
    pairs = all_pairs(cache)
    found = remote(server)
    check_alike(read_all(found, *pairs), read_all(cache, *pairs))
    assert source_of(found).fetched["checksums"] == 0


def test_it_pickles_by_its_place(server: Server) -> None:
    cache = remote(server)
    copy = pickle.loads(pickle.dumps(cache))
    rows, views = np.array([5, 1599, 5]), np.array([0, 3, 1])
    check_alike(read_all(copy, rows, views), read_all(local(), rows, views))


def _read_in_child(cache: softcache.Cache, answers: Any) -> None:
    pairs = all_pairs(cache)
    found = read_all(cache, *pairs)
    if answers is not None:
        answers.put({key: value.tobytes() for key, value in found.items()})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_two_processes_fetch_each_block_once(server: Server, how: str) -> None:
    cache = remote(server)
    if how == "fork":
        cache.gather(np.array([0]), np.array([0]))  # maps and marks are there before
    context: Any = multiprocessing.get_context(how)
    answers = context.Queue()
    children = [context.Process(target=_read_in_child, args=(cache, answers)) for _ in range(2)]
    for child in children:
        child.start()
    found = [answers.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    wanted = read_all(local(), *all_pairs(local()))
    assert found[0] == found[1] == {key: value.tobytes() for key, value in wanted.items()}
    counts: dict[tuple[str, int], int] = {}
    for file in local().manifest.files_of("member", "one"):
        path = f"{far(V2).name}/{file.path}"
        array = file.arrays["feature0"]
        for start, stop in data_ranges(server, path):
            for byte in range(array.offset, array.offset + array.nbytes, BLOCK):
                if start <= byte < stop:
                    counts[path, byte] = counts.get((path, byte), 0) + 1
    assert set(counts.values()) == {1}
    assert len(counts) == sum(
        -(-f.arrays["feature0"].nbytes // BLOCK) for f in local().manifest.files_of("member", "one")
    )
    whole = [path for path, given in server.asked if given is None or not path.endswith(".h5")]
    assert len(whole) == len(set(whole))


# ---- what comes wrong -------------------------------------------------------------------------------------------------


class OneWrong:
    """Serves as usual, but of one file the block that begins at an offset is wrong the first so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: str, at: int, times: int) -> None:
        self.asked = 0
        from softcache.remote.web import Web

        usual = Web.read

        def read(web: Web, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
            place = start
            for piece in usual(web, name, start, stop):
                if name == path and place <= at < place + len(piece):
                    self.asked += 1
                    if self.asked <= times:
                        piece = piece[: at - place] + bytes([piece[at - place] ^ 1]) + piece[at - place + 1 :]
                yield piece
                place += len(piece)

        monkeypatch.setattr(Web, "read", read)


def wrong_block(monkeypatch: pytest.MonkeyPatch, times: int) -> tuple[OneWrong, StoredFile]:
    file = large_file(local())
    return OneWrong(monkeypatch, file.path, file.arrays["feature0"].offset + 2 * BLOCK + 5, times), file


def read_feature(cache: softcache.Cache) -> np.ndarray:
    rows, views = all_pairs(cache)
    return cache.stored("one", "feature0", rows, views)


def test_a_bad_block_is_asked_for_once_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, file = wrong_block(monkeypatch, 1)
    assert (read_feature(remote(server)) == read_feature(local())).all()
    assert wrong.asked == 2
    again = [one for one in data_ranges(server, f"{far(V2).name}/{file.path}") if one[1] - one[0] == BLOCK]
    start = file.arrays["feature0"].offset + 2 * BLOCK
    assert again == [(start, start + BLOCK)]  # it alone


def test_twice_bad_it_is_refused_and_named_and_nothing_of_it_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, file = wrong_block(monkeypatch, 2)
    cache = remote(server)
    with pytest.raises(RemoteError, match=rf"{file.path}: block 2 of data set 'feature0' came twice"):
        read_feature(cache)
    assert wrong.asked == 2
    assert (read_feature(cache) == read_feature(local())).all()  # the third time it is right


def test_a_liars_checksums_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    file = large_file(local())
    OneWrong(monkeypatch, file.path, file.arrays["feature0_crc32"].offset, 100)
    with pytest.raises(RemoteError, match=rf"{file.path}: its checksums came twice with other bytes than the manifest"):
        read_feature(remote(server))
    assert not shared_store().path_of(holed_name(file)).exists()


def test_a_manifest_of_another_id_is_refused(server: Server) -> None:
    with pytest.raises(RemoteError, match="has a cache with id"):
        softcache.open(f"{server.url}/{far(V2).name}", id="0123456789abcdef", quiet=True)
    with pytest.raises(RemoteError, match="no cache with id"):
        softcache.open(url_of(server, V2, "0" * 64), quiet=True)


@pytest.mark.parametrize("kind", [pytest.param("version 1", marks=pytest.mark.slow), V2])
def test_bytes_that_rot_in_the_store_are_found_and_fetched_anew(server: Server, kind: str) -> None:
    cache = remote(server, kind)
    file = large_file(cache)
    read_feature(cache)
    path = shared_store().path_of(holed_name(file) if kind == V2 else file.sha256)
    with path.open("r+b") as stored:
        stored.seek(file.arrays["feature0"].offset + BLOCK)
        stored.write(b"rot")
    if kind != V2:
        with pytest.raises(DamagedCacheError, match="block 1") as caught:
            read_feature(remote(server, kind))
        assert "the file is fetched anew" in caught.value.tip
    assert (read_feature(remote(server, kind)) == read_feature(local(kind))).all()


def test_a_full_disk_is_told_before_anything_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = remote(server)
    cache.gather(np.array([0]), np.array([0]))
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 1000)
    asked = len(server.asked)
    with pytest.raises(DiskSpaceError, match="what is to be fetched needs"):
        read_feature(cache)
    assert len(server.asked) == asked


def test_a_store_that_cannot_be_written_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RemoteError, match="cannot be kept there") as caught:
        remote(server)
    assert "SOFTCACHE_HOME" in caught.value.tip


# ---- going on ---------------------------------------------------------------------------------------------------------


def test_what_was_fetched_before_a_kill_stays_and_is_gone_on_with(server: Server) -> None:
    """Of a process that died between the writing of a block and its mark, or between the file and the manifest."""
    cache = remote(server)
    file = large_file(cache)
    read_feature(cache)
    marks = marks_path(shared_store().path_of(holed_name(file)))
    marks.write_bytes(bytes(len(marks.read_bytes())))  # written, and not marked
    part = shared_store().cache_folder(cache.id)
    (part / "manifest.json").unlink()  # entered half
    server.asked.clear()
    assert (read_feature(remote(server)) == read_feature(local())).all()
    names = {path.removeprefix(f"{far(V2).name}/") for path, _ in server.asked}
    others = {name for name in names if name.endswith(".h5")} - {file.path}
    assert not others  # nothing but the unmarked file, manifest and lists
    assert data_ranges(server, f"{far(V2).name}/{file.path}")


def _open_and_read(url: str, answers: Any) -> None:
    _read_in_child(softcache.open(url, quiet=True), answers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["version 1", V2])
def test_killed_at_any_moment_it_goes_on(server: Server, kind: str) -> None:
    """Each process is killed when the server has been asked some more; the last one reads all of it."""
    context = multiprocessing.get_context("fork")
    url, answers = url_of(server, kind), context.Queue()
    for more in (1, 2, 3, 5, 8):
        asked = len(server.asked)
        child = context.Process(target=_open_and_read, args=(url, None))
        child.start()
        while len(server.asked) < asked + more and child.is_alive():
            time.sleep(0.001)
        child.kill()
        child.join()
    last = context.Process(target=_open_and_read, args=(url, answers))
    last.start()
    found = answers.get(timeout=60)
    last.join()
    assert found == {key: value.tobytes() for key, value in read_all(local(kind), *all_pairs(local(kind))).items()}


def test_offline_it_opens_by_its_id_and_says_only_of_what_is_missing(tmp_path: Path) -> None:
    with serving(folder()) as server:
        url = url_of(server, V2)
        first = softcache.open(url, quiet=True)
        wanted = first.gather(np.array([1, 2]), np.array([0, 0]), members=["one"]).logits()
    cache = softcache.open(url, quiet=True)
    assert (cache.gather(np.array([1, 2]), np.array([0, 0]), members=["one"]).logits() == wanted).all()
    assert softcache.open(url[: url.index("@") + 17], quiet=True).id == cache.id  # the beginning will do
    with pytest.raises(RemoteError, match="nobody answers"):
        cache.gather(np.array([1]), np.array([0]), members=["two"])
    with pytest.raises(RemoteError, match="nobody answers") as caught:
        softcache.open(url.partition("@")[0], quiet=True)
    assert url in caught.value.tip


@pytest.mark.slow
def test_without_an_id_the_newest_is_opened_and_said(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{server.url}/{far('version 1').name}"
    cache = softcache.open(url)
    assert cache.id == local("version 1").id
    assert f"{url}@{cache.id}" in capsys.readouterr().err


def test_a_folder_is_a_place_too(tmp_path: Path) -> None:
    cache = softcache.open(f"file:{far(V2)}@{local().id}", quiet=True)
    assert (read_feature(cache) == read_feature(local())).all()
    origin = shared_store().origin(cache.id)
    assert origin["url"] == f"file:{far(V2)}" and origin["opened"] >= origin["fetched"] > 0


# ---- what goes --------------------------------------------------------------------------------------------------------


def let_go(cache: softcache.Cache) -> None:
    """As the end of a process does."""
    from softcache.remote import store

    lock = shared_store().cache_folder(cache.id) / "lock"
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(lock):
                os.close(int(name))
        except OSError:
            continue
    store._KEPT.discard(lock)


def all_of_it(caches: list[prune.Kept]) -> list[prune.Kept]:
    return caches


@pytest.mark.slow
def test_nothing_goes_of_a_cache_that_is_open(server: Server) -> None:
    used, unused = remote(server), remote(server, "version 1")
    wanted = read_feature(used)
    read_feature(unused)
    let_go(unused)
    gone, freed = prune.prune(shared_store(), all_of_it)
    assert [one.id for one in gone] == [unused.id]
    assert freed > 0
    names = {path.name[:64] for path in prune._files(shared_store())}
    assert names <= {file.sha256 for file in used.manifest.files}
    asked = len(server.asked)
    assert (read_feature(used) == wanted).all()
    assert (read_feature(remote(server)) == wanted).all()
    assert len(server.asked) == asked


def _read_until(url: str, ready: Any, stop: Any, faults: Any) -> None:
    try:
        cache = softcache.open(url, quiet=True)
        draw = np.random.default_rng(os.getpid())
        ready.release()
        while not stop.is_set():
            rows = draw.integers(0, len(cache), 64)
            views = draw.integers(0, cache.num_views, 64)
            cache.gather(rows, views, features=cache.features["one"])
            time.sleep(0.001)
    except BaseException as exc:
        faults.put(repr(exc))
        ready.release()


@pytest.mark.slow
def test_pruning_under_eight_readers_breaks_none(server: Server) -> None:
    context = multiprocessing.get_context("fork")
    ready, stop, faults = context.Semaphore(0), context.Event(), context.Queue()
    readers = [
        context.Process(target=_read_until, args=(url_of(server, kind), ready, stop, faults))
        for kind in (V2, "version 1")
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    prunes = 0
    for _ in readers:
        while not ready.acquire(timeout=0.05):
            prune.prune(shared_store(), all_of_it)
            prunes += 1
    for _ in range(10):
        assert prune.prune(shared_store(), all_of_it)[0] == []
    stop.set()
    for reader in readers:
        reader.join()
    assert faults.empty(), faults.get()
    assert {one.id for one in prune.prune(shared_store(), all_of_it)[0]} == {local(V2).id, local("version 1").id}
    assert list(prune._files(shared_store())) == []


@pytest.mark.slow
def test_where_an_open_cache_cannot_be_read_any_more_no_file_goes(server: Server) -> None:
    cache = remote(server)
    wanted = read_feature(cache)
    manifest = shared_store().cache_folder(cache.id) / "manifests" / f"{cache.id}.json"
    manifest.chmod(0o600)
    manifest.write_text("{}")
    files = sorted(prune._files(shared_store()))
    prune.prune(shared_store(), all_of_it)
    assert sorted(prune._files(shared_store())) == files
    assert (read_feature(cache) == wanted).all()
    let_go(cache)
    prune.prune(shared_store(), all_of_it)
    assert list(prune._files(shared_store())) == []


@pytest.mark.slow
def test_more_than_the_bound_is_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first = remote(server, "version 1")
    read_feature(first)
    let_go(first)
    monkeypatch.setenv(prune.LIMIT, "0.0001")
    second = remote(server)  # which is in use
    assert [one.id for one in prune.listed(shared_store())] == [second.id]
    monkeypatch.setenv(prune.LIMIT, "many")
    with pytest.raises(ConfigError, match="is no number of GiB"):
        remote(server)


@pytest.mark.parametrize(
    ("chosen", "gone"),
    [
        ({"ids": ("aa",)}, "a"),
        ({"keep": 150}, "ab"),
        ({"keep": 1000}, ""),
        ({"older": 2}, "ab"),
        ({"older": 4}, "a"),
        ({}, "abc"),
    ],
)
def test_what_prune_is_asked_for(
    chosen: dict[str, Any], gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    caches = [
        prune.Kept(2 * name, "", 100, 100, round(now - days * prune.DAY_S), False, frozenset())
        for name, days in (("c", 1), ("a", 5), ("b", 3))
    ]
    monkeypatch.setattr(prune, "_sizes", lambda store: {"x": 300})
    assert sorted(one.id for one in prune.chosen_by(Store(tmp_path), **chosen)(caches)) == [2 * name for name in gone]


def test_an_id_that_is_not_there_is_refused(server: Server) -> None:
    remote(server)
    with pytest.raises(ConfigError, match="is not in the store, or somebody has it open"):
        prune.prune(shared_store(), prune.chosen_by(shared_store(), ids=("0123",)))


def test_sources_ask_for_no_block_twice(server: Server) -> None:
    """Neighbours come together, and what is there is not asked for again."""
    cache = remote(server)
    file = large_file(cache)
    sparing = StoreSource(Store(shared_store().root.with_name("other")), parse_place(url_of(server, V2)), sparing=True)
    server.asked.clear()
    sparing.need([Touched(file, "feature0", [1, 1, 2]), Touched(file, "feature0", (4,))])
    path, base = f"{far(V2).name}/{file.path}", file.arrays["feature0"].offset
    inner = [
        (a - base, b - base) for a, b in data_ranges(server, path) if base <= a < base + file.arrays["feature0"].nbytes
    ]
    assert sorted(inner) == [(BLOCK, 3 * BLOCK), (4 * BLOCK, 5 * BLOCK)]
    server.asked.clear()
    sparing.need([Touched(file, "feature0", range(1, 5))])
    assert data_ranges(server, path) == [(base + 3 * BLOCK, base + 4 * BLOCK)]
    assert json.loads(json.dumps(sparing.fetched))["records"] == 4 * BLOCK
    shutil.rmtree(sparing.store.root)

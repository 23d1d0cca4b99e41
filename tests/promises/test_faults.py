"""Faults while a cache is written: kills, power cuts, failing calls, full disks, crowds; at length: tools/faults."""

from __future__ import annotations

import ast
import errno
import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

import softcache
from softcache.cache.dump_folder import read_journals
from softcache.cache.schema import ALIGNMENT, BLOCK_BYTES, FORMAT_VERSION, ArraySpec
from softcache.cache.write.shard import ShardWriter
from softcache.cache.write.writer import CacheWriter, Part
from softcache.errors import DiskSpaceError, DumpError, LockedError, SoftcacheError
from softcache.files import durable, locks
from softcache.files.locks import holder_of, release_lock, sign, take_lock

TOOL = Path(__file__).resolve().parents[2] / "tools" / "faults"
MEMORY = Path("/dev/shm")  # an fsync costs nothing there


@pytest.fixture(scope="module")
def tool() -> Any:
    """What tools/faults is made of, in one namespace."""
    sys.path.append(str(TOOL.parent))
    names = ("small_dump", "watched", "promise", "prefixes", "strace", "failing_calls")
    return SimpleNamespace(
        **{k: v for name in names for k, v in vars(importlib.import_module(f"faults.{name}")).items()}
    )


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder on a fast file system, where there is one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def expected(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed run of the tool's small dump."""
    return tool.undisturbed(tmp_path_factory.mktemp("undisturbed"))


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a sub-command of the tool counted, in a process of its own: it forks, and a process with threads should not."""
    argv = [sys.executable, str(TOOL), "--folder", str(folder), *arguments, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["failures"] == [] and done.returncode == 0, done.stdout
    return report["counts"]  # type: ignore[no-any-return]


# ---- kills, power cuts, every call -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_between_calls_and_at_random_times(quick: Path) -> None:
    counts = command(quick, "kill", "--count", "24")
    assert counts["kills"] >= 24 and counts["trials"] == counts["as promised"]
    assert sum(n for name, n in counts.items() if name.startswith(("killed after", "killed half"))) >= 12
    assert counts["a reader then met: unfinished"]


@pytest.mark.slow
def test_power_cuts(tool: Any, quick: Path) -> None:
    """Whatever was not synced is lost, or torn, or both: the old state or the new one, and a resume."""
    report = tool.prefixes(
        quick,
        seed=1,
        at=lambda calls: tool.one_of_each(calls)[::4],
        resumed_at=lambda calls: tool.one_of_each(calls)[::16],
    )
    assert report.failures == []
    for how in tool.SURVIVALS:
        assert report.counts[f"{how}: unfinished"] and report.counts[f"{how}: old"]
    assert report.counts["all: new"] and report.counts["resumed"]
    assert report.counts["killed, resumed, power cut: new"] == 10


@pytest.mark.whole
def test_a_power_cut_after_every_call(tool: Any, quick: Path) -> None:
    report = tool.prefixes(quick, seed=2, resumed_at=lambda calls: tool.one_of_each(calls)[::8])
    assert report.failures == []
    assert report.counts["calls of the file layer"] > 400


@pytest.mark.slow
def test_faults_of_calls(tool: Any, quick: Path) -> None:
    report = tool.errnos(quick, (errno.ENOSPC, errno.EIO), at=lambda calls: tool.one_of_each(calls)[::4], in_turn=True)
    assert report.failures == []
    assert report.counts["handled"] == report.counts["trials"] > 30
    assert report.counts["ENOSPC: DiskSpaceError"] and report.counts["EIO and on: DumpError"]
    # a lock that cannot be closed, or the folder around the cache that cannot be synced, is nobody's loss
    went_on = sum(n for name, n in report.counts.items() if "went on" in name and "short" not in name)
    assert went_on <= 0.1 * report.counts["trials"]


@pytest.mark.whole
def test_a_fault_of_every_third_call(tool: Any, quick: Path) -> None:
    report = tool.errnos(quick, at=lambda calls: tool.everywhere(calls)[::3], in_turn=True)
    assert report.failures == []
    assert report.counts["handled"] == report.counts["trials"] == -(-report.counts["calls of the file layer"] // 3)


@pytest.mark.slow
def test_the_kernel_sees_what_the_file_layer_records(quick: Path, tool: Any) -> None:
    if not tool.may_trace():
        pytest.skip("strace is not installed, or not allowed")
    counts = command(quick, "strace")
    assert counts["recorded calls"] == counts["calls that the kernel saw"] > 300


@pytest.mark.slow
def test_a_full_disk(quick: Path) -> None:
    counts = command(quick, "fulldisk", "--steps", "5")
    assert counts["trials"] == counts["as promised"] == 5
    assert sum(n for name, n in counts.items() if name.startswith("DiskSpaceError")) >= 4


@pytest.mark.slow
def test_several_dumpers_and_readers_at_once(quick: Path) -> None:
    counts = command(quick, "many", "--dumpers", "4", "--readers", "4")
    assert counts["trials"] == counts["as promised"]
    assert counts["one part, dump: committed"] >= 1
    assert counts["one part, readers: 2 views"] and counts["two for each part, readers: 3 views"]


def test_only_the_file_layer_writes() -> None:
    """No module of the cache but the file layer makes a call that changes a disk."""
    writing = re.compile(
        r"(os|files\.os)\.(write|pwrite|pwritev|writev|fsync|fdatasync|ftruncate|truncate|posix_fallocate|replace|rename|unlink"
        r"|remove|mkdir|makedirs|rmdir|link|symlink|chmod)|.*\.(write_bytes|write_text|mkdir|unlink|rename|touch|rmdir)"
        r"|shutil\.(copy.*|move)|tempfile\..*"
    )
    flags = re.compile(r"os\.O_(CREAT|WRONLY|RDWR|TRUNC|APPEND)")
    package = Path(softcache.__file__).parent
    for path in sorted([*package.glob("cache/**/*.py"), *package.glob("files/*.py")]):
        found = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        guilty = sorted(name for name in found if writing.fullmatch(name) or flags.fullmatch(name))
        # home.py: what is remembered outside of every cache, and found again where it is lost
        assert (path.name in ("durable.py", "home.py")) == bool(guilty), f"{path.name}: {guilty}"


# ---- single faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, DiskSpaceError, "No space left"),
        (errno.EDQUOT, DiskSpaceError, "Disk quota exceeded"),
        (errno.EFBIG, DiskSpaceError, "File too large"),
        (errno.EROFS, DumpError, "not writable: Read-only file system"),
        (errno.EACCES, DumpError, "not writable: Permission denied"),
        (errno.EPERM, DumpError, "not writable: Operation not permitted"),
        (errno.EIO, DumpError, "Input/output error"),
        (errno.ESTALE, DumpError, "Stale file handle"),
        (errno.ENOTDIR, DumpError, "Not a directory"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_what_a_fault_is_called(code: int, kind: type[SoftcacheError], words: str) -> None:
    with pytest.raises(DumpError, match=rf"^/some/path: {words}.* \(rename\)") as caught:
        with durable.explained("rename", Path("/some/path")):
            raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    tip = caught.value.tip
    assert (
        "another folder" in tip
        if code == errno.ENOTDIR
        else "what was finished is kept" in tip and "same command" in tip
    )


def failing(monkeypatch: pytest.MonkeyPatch, tool: Any, faults: dict[str, int]) -> None:
    """The named calls of the file layer fail from now on."""

    def on_call(number: int, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if name in faults:
            raise OSError(faults[name], os.strerror(faults[name]))
        return real(*args)

    monkeypatch.setattr(durable, "os", tool.Layer(on_call))


def test_the_first_fault_is_the_one_that_is_told(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file cannot be removed either; the next writer of the part removes it."""
    with monkeypatch.context() as patch:
        failing(patch, tool, {"pwrite": errno.ENOSPC, "unlink": errno.EACCES})
        with pytest.raises(DiskSpaceError, match="No space left"):
            tool.write_part(tmp_path / "cache", Part())
        with pytest.raises(DiskSpaceError, match=r"whole\.json"):
            durable.write_whole(tmp_path / "whole.json", b"{}")
    assert (tmp_path / "whole.json.tmp-0").exists()
    durable.write_whole(tmp_path / "whole.json", b"{}")
    assert [p.name for p in tmp_path.glob("whole*")] == ["whole.json"]


def test_a_write_that_takes_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: 0)
        patch.setattr(os, "write", lambda *_: 0)
        with pytest.raises(DiskSpaceError):
            durable.write_whole(tmp_path / "whole", b"data")
        with pytest.raises(DiskSpaceError):
            durable.append_line(tmp_path / "journal", b"line")


def test_a_folder_without_permission(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, tool, {"mkdir": errno.EROFS})
    with pytest.raises(DumpError, match=r"cache: not writable: Read-only file system \(mkdir\)"):
        tool.write_part(tmp_path / "cache", Part())
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DumpError, match=r"file: File exists \(mkdir\)") as caught:
        tool.write_part(tmp_path / "file" / "cache", Part())
    assert "another folder" in caught.value.tip


def test_a_disk_that_gives_other_bytes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path / "part.h5", [ArraySpec("logits", "<f4", (1, 4))], kind="member")
    writer.append("logits", np.ones((1, 4), "<f4"))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: bytes(len(pread(*args))))
    with pytest.raises(SoftcacheError, match=r"block 0 of logits reads back other bytes"):
        writer.finish(relative_path="part.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [1, 256, 40_000])
def test_a_shard_is_what_h5py_writes(tmp_path: Path, rows: int) -> None:
    """Byte for byte: the file that h5py makes on a disk by itself, with the same settings and the same rows."""
    values = np.random.default_rng(rows).integers(0, 256, (2, rows, 3)).astype("|u1")
    sums = [zlib.crc32(values.tobytes()[i : i + BLOCK_BYTES]) for i in range(0, values.nbytes, BLOCK_BYTES)]
    writer = ShardWriter(
        tmp_path / "ours.h5",
        [ArraySpec("records", "|u1", values.shape), ArraySpec("none", "<f4", (0, 2))],
        kind="member",
    )
    writer.append("records", values.reshape(-1, 3))
    stored = writer.finish(relative_path="ours.h5")
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, ALIGNMENT)
    creation.set_obj_track_times(False)
    handle = h5py.h5f.create(str(tmp_path / "theirs.h5").encode(), h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    with h5py.File(handle) as file:
        file.attrs.create("softcache_format", FORMAT_VERSION, dtype="<u4")
        file.attrs.create("softcache_kind", np.bytes_("member"))
        empty = np.zeros(0, "<u4")
        for name, array in {
            "records": values,
            "records_crc32": np.array(sums, "<u4"),
            "none": np.zeros((0, 2), "<f4"),
            "none_crc32": empty,
        }.items():
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            layout.set_obj_track_times(False)
            kind = h5py.h5t.py_create(array.dtype)
            made = h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(array.shape), dcpl=layout)
            if array.size:
                made.write(h5py.h5s.ALL, h5py.h5s.ALL, array)
    assert (tmp_path / "ours.h5").read_bytes() == (tmp_path / "theirs.h5").read_bytes()
    assert stored.nbytes == (tmp_path / "ours.h5").stat().st_size


# ---- what is left behind, and what is found ------------------------------------------------------------------------------


def test_leftovers_of_dead_writers_are_removed(tool: Any, expected: Any, tmp_path: Path) -> None:
    """Of the same part and of another split; a part of this split may be alive, and another round is not ours."""
    path = tmp_path / "cache"
    tool.write_part(path, Part(1, 2))
    left = {
        tag: path / "members/plain" / f"part-00001.h5.tmp-{tag}"
        for tag in ("0-2-of-2", "0-1-of-3", "0-1-of-2", "1-2-of-2")
    }
    for file in left.values():
        file.write_bytes(b"half a shard")
    (path / "manifests" / "x.json.tmp-0-2-of-2").write_text("{")
    with CacheWriter(path, tool._plan(1), lambda: pytest.fail("planned anew"), part=Part(2, 2)):
        assert [tag for tag, file in left.items() if file.exists()] == ["0-1-of-2", "1-2-of-2"]
    tool.write_cache(path)
    assert tool.contents(path) == expected.new
    assert not list(path.rglob("*.tmp-*"))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(50), id="zeros"),
        pytest.param(b"{}", id="no entry"),
        pytest.param(b'{"files":[],"span":0}', id="no files"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(None, id="another span's files"),
    ],
)
def test_a_journal_line_that_is_none_is_done_again(
    tool: Any, expected: Any, tmp_path: Path, line: bytes | None
) -> None:
    path = tmp_path / "cache"
    tool.write_part(path, Part(1, 2))
    journal = path / "dump" / "part-1-of-2.jsonl"
    if line is None:
        entry = json.loads(journal.read_bytes())
        line = json.dumps({**entry, "span": 1}, sort_keys=True, separators=(",", ":")).encode()
    journal.write_bytes(line)
    tool.write_cache(path)
    assert tool.contents(path) == expected.new


@pytest.mark.parametrize("harm", ["gone", "cut", "none"])
def test_finished_shards_are_left_alone_and_missing_ones_made_again(
    tool: Any, expected: Any, tmp_path: Path, harm: str
) -> None:
    path = tmp_path / "cache"
    tool.write_part(path, Part(1, 2))
    shard = path / "members" / "plain" / "part-00000.h5"
    before = shard.stat().st_ino
    if harm != "none":
        shard.rename(tmp_path / "kept")  # so that its inode is not given to the new one
        (shard.write_bytes if harm == "cut" else lambda data: None)((tmp_path / "kept").read_bytes()[:5000])
    tool.write_cache(path)
    assert tool.contents(path) == expected.new
    assert (shard.stat().st_ino == before) == (harm == "none")


def test_a_torn_journal_line_does_not_swallow_the_next(tool: Any, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    tool.write_part(path, Part(2, 2))
    whole = (path / "dump" / "part-2-of-2.jsonl").read_bytes()
    (path / "dump" / "part-1-of-2.jsonl").write_bytes(whole[: len(whole) // 2])
    tool.write_part(path, Part(1, 2))
    assert sorted(read_journals(path, 0)) == [0, 1]
    tool.write_cache(path)
    assert tool.contents(path) == expected.new


@pytest.mark.parametrize("name", ["members", "members/compact", "views", "manifests", "dump"])
def test_links_inside_a_cache_are_not_written_through(tool: Any, tmp_path: Path, name: str) -> None:
    path, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    tool.write_part(path, Part())
    (path / name).rename(elsewhere)
    (path / name).symlink_to(elsewhere)
    before = sorted(p.name for p in elsewhere.rglob("*"))
    with pytest.raises(SoftcacheError, match="symbolic link"):
        tool.write_part(path, Part())
    assert sorted(p.name for p in elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", ["dump/part-1-of-1.lock", "dump/part-1-of-1.jsonl", "samples.h5.tmp-0-1-of-1"])
def test_files_that_are_links_are_not_written_through(tool: Any, tmp_path: Path, name: str) -> None:
    path, precious = tmp_path / "cache", tmp_path / "precious"
    precious.write_text("precious")
    (path / "dump").mkdir(parents=True)
    (path / name).symlink_to(precious)
    if name.endswith("-of-1"):  # a temporary file: only the link itself is removed
        tool.write_part(path, Part())
    else:
        with pytest.raises(SoftcacheError, match="symbolic link"):
            tool.write_part(path, Part())
    assert precious.read_text() == "precious"


def test_a_cache_reached_through_a_link(tool: Any, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    tool.write_cache(tmp_path / "cache")
    assert tool.contents(tmp_path / "disk") == expected.new


# ---- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("fails_at", [1, 2], ids=["setup", "part"])
def test_a_folder_without_locks_is_refused(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails_at: int
) -> None:
    calls, flock = 0, fcntl.flock

    def without(fd: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(code, os.strerror(code))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(
        DumpError, match=r"this file system has no locks .*two processes could write the same files"
    ) as caught:
        tool.write_part(tmp_path / "cache", Part())
    assert "local disk" in caught.value.tip and "copy the finished" in caught.value.tip
    assert not (tmp_path / "cache" / "dump" / "plan.json").exists()
    assert tool.open_below(tmp_path) == []
    assert tool.write_part(tmp_path / "cache", Part()) is not None


def test_another_fault_of_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(DumpError, match=r"lock: Input/output error \(flock\)"):
        take_lock(tmp_path / "lock")


def test_a_second_dump_is_told_who_writes(tool: Any, tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache", tool._plan(1), tool._setup):
        with pytest.raises(LockedError) as caught:
            tool.write_part(tmp_path / "cache", Part())
    told = rf"part 1 of 1 is being written by another process: host {os.uname().nodename}, pid {os.getpid()}, since \d{{4}}-"
    assert re.search(told, caught.value.message)
    assert tool.write_part(tmp_path / "cache", Part()) is not None


def test_a_lock_of_a_dead_process_is_taken(tool: Any, tmp_path: Path) -> None:
    lock = tmp_path / "cache" / "dump" / "part-1-of-1.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(
        "host elsewhere, pid 1, since 2001-01-01T00:00:00+0000, and a longer text than ours, by a good deal\n"
    )
    with CacheWriter(tmp_path / "cache", tool._plan(1), tool._setup):
        assert holder_of(lock).startswith(f"host {os.uname().nodename}, pid {os.getpid()}, since ")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\x00",
        b"\x1b[2Jhost me, pid 1",
        bytes(10**6),
        b"host a\nb, pid 1, since 2020",
        b"host h, pid x, since 1",
    ],
    ids=["empty", "no text", "control", "zeros", "two lines", "pid"],
)
def test_a_lock_with_another_text(tool: Any, tmp_path: Path, text: bytes) -> None:
    lock = tmp_path / "cache" / "dump" / "part-1-of-1.lock"
    lock.parent.mkdir(parents=True)
    held = take_lock(lock)
    lock.write_bytes(text)
    with pytest.raises(LockedError, match=rf"by another process: {locks.UNKNOWN}\n"):
        tool.write_part(tmp_path / "cache", Part())
    release_lock(held)
    assert holder_of(tmp_path / "nowhere") == locks.UNKNOWN
    assert tool.write_part(tmp_path / "cache", Part()) is not None


def test_a_lock_that_cannot_be_signed_is_released(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(patch, tool, {"pwrite": errno.ENOSPC})
        with pytest.raises(DiskSpaceError, match=r"part-1-of-1\.lock: No space left"):
            tool.write_part(tmp_path / "cache", Part())
    assert tool.open_below(tmp_path) == []
    held = take_lock(tmp_path / "cache" / "dump" / "part-1-of-1.lock")
    sign(held)
    release_lock(held)
    assert tool.write_part(tmp_path / "cache", Part()) is not None


@pytest.mark.slow
def test_killed_while_a_cache_of_version_2_is_written(quick: Path) -> None:
    counts = command(quick, "kill", "--count", "8", "--format", "2")
    assert counts["kills"] >= 8 and counts["trials"] == counts["as promised"]

"""A cache in a file system of fsspec: one in memory, and the local one, which makes new files only where it is asked to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs

from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST
from softcache.check import verify
from softcache.errors import ConfigError, MissingExtraError, RemoteError
from softcache.remote import filesystems, patience
from softcache.remote.filesystems import FileSystem
from softcache.remote.places import parse_place
from softcache.remote.transport import Sending
from softcache.share import pull, push

GOLDEN = Path(__file__).parents[1] / "golden"
CACHE, OTHER = GOLDEN / "v1" / "extended", GOLDEN / "indexed"
MEMORY = "fsspec+memory:///caches/a"

pytestmark = needs("fsspec", "fsspec")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty one."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(patience, "HOPELESS_S", 0.2)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_pushed_and_pulled_it_is_the_same(tmp_path: Path, kind: str) -> None:
    place = parse_place(MEMORY if kind == "memory" else f"fsspec+file://{tmp_path}/there")
    done = push.run(CACHE, place, quiet=True)
    transport = FileSystem(place)
    for one in push.files_of(read_manifest(CACHE)):
        assert transport.digest(one.path) == one.sha256
    assert transport.whole("push.json") is None
    manifest, _, _ = pull.run(parse_place(place.url, done.id), tmp_path / "a", quiet=True)
    assert manifest.id == done.id
    assert verify.run(tmp_path / "a", full=True, quiet=True).state == "whole"
    assert push.run(CACHE, place, quiet=True).sent_files == 0
    with pytest.raises(RemoteError, match="holds another cache"):
        push.run(OTHER, place, quiet=True)


def test_a_push_that_was_cut_goes_on_by_what_is_there(memory: Any) -> None:
    place, files = parse_place(MEMORY), push.files_of(read_manifest(CACHE))
    memory.pipe_file("/caches/a/push.json", json.dumps({"id": read_manifest(CACHE).id}).encode())
    memory.pipe_file(f"/caches/a/{files[0].path}", (CACHE / files[0].path).read_bytes())
    memory.pipe_file(f"/caches/a/{files[1].path}", bytes(files[1].nbytes))  # as long, and another one
    assert push.run(CACHE, place, quiet=True).sent_files == len(files) - 1
    assert memory.cat_file(f"/caches/a/{files[1].path}") == (CACHE / files[1].path).read_bytes()


def test_of_two_who_push_at_once_one_is_told(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    current, told = push.current, []

    def looked(transport: Any) -> bytes | None:
        monkeypatch.setattr(push, "current", current)
        with pytest.raises(RemoteError, match="is not finished there") as caught:
            push.run(OTHER, parse_place(MEMORY), quiet=True)
        told.append(caught.value)
        return current(transport)

    monkeypatch.setattr(push, "current", looked)
    push.run(CACHE, parse_place(MEMORY), quiet=True)
    assert told and memory.cat_file(f"/caches/a/{MANIFEST}") == (CACHE / MANIFEST).read_bytes()
    transport = FileSystem(parse_place(MEMORY))
    assert not transport.publish({}, {MANIFEST: b"later"}, b"another one")
    real = FileSystem.replace

    def meanwhile(self: FileSystem, path: str, data: bytes) -> None:
        """After the first look, and before the last."""
        if path == "README.md":
            memory.pipe_file(f"/caches/a/{MANIFEST}", b"somebody else's")
        real(self, path, data)

    mine = (CACHE / MANIFEST).read_bytes()
    monkeypatch.setattr(FileSystem, "replace", meanwhile)
    assert not transport.publish({}, {"README.md": b"", MANIFEST: b"later"}, mine)
    assert memory.cat_file(f"/caches/a/{MANIFEST}") == b"somebody else's"
    memory.pipe_file(f"/caches/a/{MANIFEST}", mine)
    assert transport.publish({}, {MANIFEST: b"later"}, (CACHE / MANIFEST).read_bytes())
    assert memory.cat_file(f"/caches/a/{MANIFEST}") == b"later"
    assert not [name for name in memory.find("/caches") if "tmp" in name]


def test_a_claim_is_made_once_by_the_file_system_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both looked before either wrote."""
    transport = FileSystem(parse_place(f"fsspec+file://{tmp_path}/there"))
    monkeypatch.setattr(transport._fs, "exists", lambda path: False)
    assert transport.create("push.json", b"first") and not transport.create("push.json", b"second")
    assert (tmp_path / "there" / "push.json").read_bytes() == b"first"


def test_somebody_elses_folder_is_not_pushed_into(memory: Any) -> None:
    memory.pipe_file("/caches/a/notes.txt", b"mine")
    with pytest.raises(RemoteError, match=r"is not empty, and holds no whole cache \(notes.txt\)"):
        push.run(CACHE, parse_place(MEMORY), quiet=True)
    assert memory.find("/caches") == ["/caches/a/notes.txt"]


def test_ranges_are_read_in_blocks(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "BLOCK", 100_000)
    data = bytes(range(256)) * 1000
    (tmp_path / "large").write_bytes(data)
    transport, noted = FileSystem(parse_place(MEMORY)), []
    transport.put([Sending("a/large", tmp_path / "large", "")], noted.append)
    assert noted == [len(data)] and transport.size("a/large") == len(data) and transport.size("none") is None
    for start, stop in [(0, None), (0, 5), (70_000, 240_001), (250_000, None), (0, 10**9)]:
        pieces = [*transport.read("a/large", start, stop)]
        assert b"".join(pieces) == data[start:stop] and max(map(len, pieces)) <= 1 << 16


def test_what_it_raises_is_told_in_a_line_without_secrets(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> bytes:
        raise OSError("cannot reach sftp://me:geheim@host/a?sig=geheim\nand more: geheim")

    push.run(CACHE, parse_place(MEMORY), quiet=True)
    monkeypatch.setattr(type(memory), "cat_file", broken)
    place = parse_place(MEMORY)
    for run in (lambda: pull.run(place, tmp_path / "a", quiet=True), lambda: push.run(CACHE, place, quiet=True)):
        with pytest.raises(RemoteError, match=r"OSError: cannot reach sftp:\.\.\.host/a\.\.\.") as caught:
            run()
        assert "geheim" not in repr(caught.value)


def test_what_fsspec_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"fsspec cannot reach it \(ValueError: Protocol not known: nosuch"):
        FileSystem(parse_place("fsspec+nosuch://host/a"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="needs the package 'fsspec'"):
        FileSystem(parse_place(MEMORY))

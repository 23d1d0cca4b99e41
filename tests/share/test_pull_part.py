"""A part that is pulled is what `subset` makes of the whole cache, byte for byte, and little else is fetched for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from far_caches import BLOCK, Server, far, folder, serving
from signing import Key

import softcache
from softcache import cli
from softcache.cache.file_lists import ListedFiles
from softcache.cache.manifest import Manifest, read_manifest
from softcache.errors import DumpError, RemoteError, SignatureError
from softcache.remote import patience
from softcache.remote.places import parse_place
from softcache.share import pull_part, sign, subset
from softcache.share.subset import Choice

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


def files_of(root: Path) -> dict[str, bytes]:
    """Every file but what tells of the making."""
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "provenance.json" and not name.startswith("dump/")}


def pulled(server: Server, kind: str, out: Path, choice: Choice, **how: Any) -> pull_part.PulledPart:
    return pull_part.run(parse_place(f"{server.url}/{far(kind).name}"), out, choice, quiet=True, **how)


def keys_file(tmp_path: Path, kind: str, every: int) -> Path:
    table = softcache.open(far(kind), quiet=True).samples
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"{table.key(row)}\n" for row in range(0, len(table), every)))
    return path


CHOICES = [
    ("version 1", {"members": ("two",), "views": "1-2"}),
    ("version 1", {"keep_labels": ("ant", "2")}),
    (V2, {"members": ("two",), "views": "1-2"}),
    (V2, {"samples": 7}),
    (V2, {"drop_labels": ("bee",), "views": "3"}),
    ("words", {"members": ("b",)}),
    ("words", {"without": 3}),
]


QUICK = CHOICES[2]


@pytest.mark.parametrize(
    ("kind", "asked"), [pytest.param(*one, marks=[pytest.mark.slow] * (one != QUICK)) for one in CHOICES], ids=str
)
def test_it_is_the_subset_byte_for_byte(server: Server, tmp_path: Path, kind: str, asked: dict[str, Any]) -> None:
    given = {k: keys_file(tmp_path, kind, v) if k in ("samples", "without") else v for k, v in asked.items()}
    done = pulled(server, kind, tmp_path / "part", Choice(**given))
    wanted = subset.run(far(kind), tmp_path / "wanted", Choice(**given), quiet=True)
    assert done.manifest.id == wanted.id
    assert done.parent == read_manifest(far(kind)).id
    assert files_of(tmp_path / "part") == files_of(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir() if "pulling" in path.name) == []


@pytest.mark.slow
def test_little_more_is_fetched_than_the_part_has(server: Server, tmp_path: Path) -> None:
    """1.02 x the records of the part, and two blocks a file and data set."""
    done = pulled(server, V2, tmp_path / "part", Choice(members=("two",), views="1-2"))
    parent: Manifest = read_manifest(far(V2))
    touched = [file for kind, name in (("member", "two"), ("views", None)) for file in parent.files_of(kind, name)]
    sets = sum(len(file.arrays) // 2 for file in touched)
    records = sum(
        array.nbytes
        for kind, name in (("member", "two"), ("views", None))
        for file in done.manifest.files_of(kind, name)
        for array in file.arrays.values()
    )
    assert 0 < done.records <= 1.02 * records + 2 * BLOCK * sets
    assert done.records < 0.72 * sum(file.nbytes for file in touched)  # and so less than the member has
    sent = sum(server.sent.values())
    assert sent == done.records + done.others  # all that was moved is told
    assert isinstance(parent.files, ListedFiles)
    moved = {path.removeprefix(f"{far(V2).name}/") for path in server.sent}
    assert not [path for path in moved if path.startswith("members/one/part")]


@pytest.mark.slow
def test_one_that_was_stopped_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, out = Choice(members=("two",)), tmp_path / "part"
    last = list(read_manifest(far(V2)).files_of("member", "two"))[-1]
    server.always[f"{far(V2).name}/{last.path}"] = "down"
    monkeypatch.setattr(patience, "HOPELESS_S", 0.5)
    with pytest.raises(RemoteError, match=f"{last.path}: 503"):
        pulled(server, V2, out, choice)
    assert (tmp_path / ".part.pulling").is_dir()
    server.always.clear()
    server.asked.clear()
    done = pulled(server, V2, out, choice)
    assert done.manifest.id == subset.run(far(V2), tmp_path / "wanted", choice, quiet=True).id
    assert files_of(out) == files_of(tmp_path / "wanted")
    again = {path.removeprefix(f"{far(V2).name}/") for path, _ in server.asked if path.endswith(".h5")}
    assert again <= {last.path, *(file.path for file in read_manifest(far(V2)).files_of("views"))}
    assert not (tmp_path / ".part.pulling").exists()


@needs("cryptography", "sign")
def test_where_a_signature_is_asked_for_whole_files_are_fetched(server: Server, tmp_path: Path) -> None:
    key, id = Key(tmp_path / "key"), read_manifest(far(V2)).id
    (tmp_path / "signers").write_text(f"carol {key.public}\n")
    choice = Choice(members=("two",), views="0")
    with pytest.raises(SignatureError):
        pulled(server, V2, tmp_path / "part", choice, signed_by=tmp_path / "signers")
    assert not [path for path in server.sent if path.endswith((".h5", "0.json"))]
    signed = far(V2) / "manifests" / f"{id}.sig"
    sign.run(far(V2), key.file)
    try:
        done = pulled(server, V2, tmp_path / "part", choice, signed_by=tmp_path / "signers")
    finally:
        signed.unlink()
    assert done.names == ("carol",)
    assert {given for path, given in server.asked if path.endswith(".h5")} <= {
        f"bytes=0-{file.nbytes - 1}" for file in read_manifest(far(V2)).files
    }
    assert done.manifest.id == subset.run(far(V2), tmp_path / "wanted", choice, quiet=True).id


def test_a_folder_of_other_things_is_refused_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "letter.txt").write_text("")
    with pytest.raises(DumpError, match="holds files that no dump wrote"):
        pulled(server, V2, tmp_path / "part", Choice(views="0"))
    assert not server.asked


@pytest.mark.slow
def test_the_command_says_what_was_fetched(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, id = f"{server.url}/{far(V2).name}", read_manifest(far(V2)).id
    argv = ["pull", f"{url}@{id}", str(tmp_path / "part"), "--members", "two", "--views", "1-2"]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["parent"], told["views"], told["members"]) == (id, 2, ["two"])
    assert told["fetched_records"] + told["fetched_others"] == sum(server.sent.values())
    argv[2] = str(tmp_path / "again")
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "of records, and" in text
    assert "which find accidents and no forger" in text
    assert f"out of {id}" in text
    assert cli.main(["pull", url, str(tmp_path / "third"), "--views", "9"]) == 2
    assert "is no range of this cache's views" in capsys.readouterr().err

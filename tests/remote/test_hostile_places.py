"""A remote that means ill: refused within bounds; nothing outside the folder is touched, nothing left opens as a cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST
from softcache.errors import CacheError, RemoteError, SoftcacheError
from softcache.files import durable
from softcache.remote import patience, web
from softcache.remote.places import parse_place
from softcache.share import pull

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from faults.web_server import HOSTILE, serving

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN, LISTED = GOLDEN / "v1" / "extended", GOLDEN / "indexed"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "HOPELESS_S", 1.0)
    monkeypatch.setattr(patience, "NOBODY_S", 0.1)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(web, "STALL_S", 2.0)
    monkeypatch.setattr(web, "HEAD_S", 1.0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where it is pulled to; beside it lies what is not to be touched."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "samples.h5").write_text("mine")
    return tmp_path / "mine" / "here" / "a"


def refused(url: str, out: Path, message: str = ".", id: str | None = None) -> SoftcacheError:
    """Why; nothing outside the folder is touched, and what is in it is no cache."""
    with pytest.raises(SoftcacheError, match=message) as caught:
        pull.run(parse_place(url, id), out, quiet=True)
    assert (out.parents[1] / "samples.h5").read_text() == "mine"
    beside = {
        path for path in out.parents[2].rglob("*") if out not in (path, *path.parents) and "served" not in path.parts
    }
    assert beside <= {out.parents[1], out.parents[1] / "samples.h5", out.parent}
    with pytest.raises(CacheError):
        read_manifest(out)
    return caught.value


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", [MANIFEST, "samples.h5"])
@pytest.mark.parametrize("fault", HOSTILE)
def test_an_answer_that_is_to_do_harm_is_given_up(out: Path, fault: str, path: str) -> None:
    with serving(GOLDEN) as server:
        server.always[f"indexed/{path}"] = fault
        error = refused(f"{server.url}/indexed", out)
    assert isinstance(error, RemoteError) and path in error.message
    assert "secrets" not in repr(error)
    assert ("comes packed" in error.message) == (fault == "packed bomb")  # and is not unpacked


@pytest.mark.slow
def test_a_manifest_without_an_end_is_given_up_after_the_most_that_one_may_have(out: Path) -> None:
    with serving(GOLDEN) as server:
        server.always["indexed/manifest.json"] = "endless"
        refused(f"{server.url}/indexed", out, r"has more than 67,108,864 bytes")


BOMBS = {
    "deep": "[" * 200_000,
    "deep and closed": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "a number of many digits": '{"format": ' + "9" * 1_000_000 + "}",
    "a power": '{"format": 1e999999999}',
    "names twice": '{"format": 1, "format": 2}',
    "no text": "\xff\xfe",
    "text without an end": '"' + "a" * 5_000_000,
    "nothing": "",
    "a list": "[]",
    "null": "null",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_manifest_that_is_a_bomb_is_refused(out: Path, bomb: str, pinned: bool) -> None:
    """Also where whoever sends it sends its id too."""
    served, data = out.parents[2] / "served", bomb.encode("latin-1")
    (served / "manifests").mkdir(parents=True)
    id = hashlib.sha256(data).hexdigest()
    (served / MANIFEST).write_bytes(data)
    (served / "manifests" / f"{id}.json").write_bytes(data)
    refused(f"file:{served}", out, "manifest", id if pinned else None)


def spoiled(cache: Path, served: Path, spoil: Callable[[Any], None]) -> str:
    """A cache whose manifest is another one, right in itself as far as its id goes."""
    shutil.copytree(cache, served)
    told = json.loads((served / MANIFEST).read_text())
    spoil(told)
    data = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    (served / MANIFEST).write_bytes(data)
    id = hashlib.sha256(data).hexdigest()
    (served / "manifests" / f"{id}.json").write_bytes(data)
    return id


ESCAPES = [
    "../samples.h5",
    "/samples.h5",
    "members/../../../samples.h5",
    "./samples.h5",
    "~/samples.h5",
    "C:\\samples.h5",
    "\\\\host\\share\\samples.h5",
    "CON",
    "nul.h5",
    "Samples.h5",
    "samples.h5 ",
    "samples.h5\x00",
    "samples.h5:stream",
    "manifest.json",
    "pull.json",
    "README.md",
    "samples.h5.pulling",
    "manifests/x.json",
    "http://127.0.0.1/samples.h5",
    "",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_that_leads_elsewhere_is_refused_before_any_file(out: Path, path: str) -> None:
    served = out.parents[2] / "served"

    def spoil(told: Any) -> None:
        told["files"][0]["path"] = path

    id = spoiled(PLAIN, served, spoil)
    with serving(served) as server:
        refused(server.url, out, "is no manifest that can be trusted", id)
        assert [asked for asked, _ in server.asked if asked.endswith(".h5")] == []


@pytest.mark.parametrize("path", ESCAPES[:6])
def test_a_path_of_a_list_that_leads_elsewhere_is_refused(out: Path, path: str) -> None:
    """The list has the sha256 that the manifest names, and the manifest the id that was asked for."""
    served = out.parents[2] / "served"

    def spoil(told: Any) -> None:
        one = told["lists"][0]
        listed = json.loads((served / one["path"]).read_text())
        listed[0]["path"] = path
        data = json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()
        (served / one["path"]).write_bytes(data)
        one.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    id = spoiled(LISTED, served, spoil)
    with serving(served) as server:
        refused(server.url, out, id=id)
        assert [asked for asked, _ in server.asked if asked.endswith(".h5")] == []


@pytest.mark.parametrize(
    "change",
    [
        {"path": "manifest.json"},
        {"path": "files-r00000-00001.json"},  # two lists of one name
        {"bytes": 1 << 60},
        {"bytes": 0},
        {"files": 1 << 40},
        {"parts": [0, 1 << 40]},
    ],
    ids=str,
)
def test_lists_that_name_each_other_or_too_much_are_refused(out: Path, change: dict[str, Any]) -> None:
    served = out.parents[2] / "served"
    id = spoiled(LISTED, served, lambda told: told["lists"][0].update(change))
    refused(f"file:{served}", out, "is no manifest that can be trusted|does not add up", id)


@pytest.mark.parametrize("nbytes", [1 << 50, 0, -1, 1 << 70])
def test_a_file_of_an_impossible_size_is_refused_before_it_is_fetched(out: Path, nbytes: int) -> None:
    served = out.parents[2] / "served"
    id = spoiled(PLAIN, served, lambda told: told["files"][0].update(bytes=nbytes))
    with serving(served) as server:
        refused(server.url, out, id=id)
        assert [asked for asked, _ in server.asked if asked.endswith(".h5")] == []


def test_links_in_a_shared_folder_give_nothing_away(out: Path) -> None:
    served = out.parents[2] / "served"
    shutil.copytree(PLAIN, served)
    (served / "samples.h5").unlink()
    (served / "samples.h5").symlink_to(out.parents[1] / "samples.h5")
    refused(f"file:{served}", out, "samples.h5")
    assert not [path for path in out.rglob("*") if path.is_file() and "mine" in path.read_text("latin-1")]


def test_devices_and_folders_in_the_place_of_files_are_refused(out: Path) -> None:
    served = out.parents[2] / "served"
    shutil.copytree(PLAIN, served)
    (served / "samples.h5").unlink()
    (served / "samples.h5").mkdir()
    refused(f"file:{served}", out, "samples.h5")


def many_files(served: Path, parts: int) -> str:
    """A manifest and lists, right in themselves, of a cache of as many parts of one row, none of which is there. Its id."""
    from bench.positions import write

    with mock.patch.object(durable, "sync"), mock.patch.object(durable, "sync_folder"):
        write(served / "wide", parts, 1, 1 << 17)
        write(served / "thin", 1, 1, 1)
    told, thin = (json.loads((served / name / MANIFEST).read_text()) for name in ("wide", "thin"))
    told["rounds"][0]["layout"]["shard_rows"] = 1
    (setup, *_), (_, *groups) = told["lists"], thin["lists"]
    (served / "lists" / "manifests").mkdir(parents=True)
    shutil.copy(served / "wide" / setup["path"], served / "lists")
    told["lists"] = [setup]
    for group in groups:
        (entry,) = json.loads((served / "thin" / group["path"]).read_text())
        for first in range(0, parts, 2000):
            numbers = range(first, min(first + 2000, parts))
            path = f"files-r00000-{len(told['lists']):05d}.json"
            named = [{**entry, "path": entry["path"].replace("00000", f"{n:05d}"), "rows": [n, n + 1]} for n in numbers]
            data = json.dumps(named, sort_keys=True, separators=(",", ":")).encode()
            (served / "lists" / path).write_bytes(data)
            one = {
                **group,
                "path": path,
                "parts": [first, first + len(numbers)],
                "files": len(numbers),
                "bytes": len(data),
            }
            one |= {"sha256": hashlib.sha256(data).hexdigest(), "file_bytes": entry["bytes"] * len(numbers)}
            if one["statistics"]:
                one["statistics"] = {**one["statistics"], "records": len(numbers)}
            told["lists"].append(one)
    data = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    (served / "lists" / MANIFEST).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2000, pytest.param(100_000, marks=pytest.mark.whole)])
def test_many_files_that_are_not_there_are_given_up_at_the_first(out: Path, parts: int) -> None:
    served = out.parents[2] / "served"
    id = many_files(served, parts)
    with serving(served / "lists") as server:
        refused(server.url, out, "is not there", id[:12])
        asked = [path for path, _ in server.asked if path.endswith(".h5")]
    assert 0 < len(asked) < 100
    assert not [path for path in out.rglob("*") if path.suffix == ".h5"]
    shutil.rmtree(served)


def test_a_cache_of_another_id_is_refused_before_any_file(out: Path) -> None:
    with serving(GOLDEN) as server:
        refused(f"{server.url}/indexed", out, "has a cache with id", "0" * 12)
        shutil.copytree(LISTED, out.parents[2] / "served")
        (out.parents[2] / "served" / "manifests" / f"{'0' * 64}.json").write_bytes((LISTED / MANIFEST).read_bytes())
        refused(f"file:{out.parents[2] / 'served'}", out, "has a cache with id", "0" * 64)
        assert not out.exists()

"""A pulled cache is the cache that was named, byte for byte, whatever a server does; or there is an error, and no cache."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softcache import cli
from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST, PULLING
from softcache.check import verify
from softcache.errors import CacheError, RemoteError, SoftcacheError, UnfinishedCacheError
from softcache.files import durable
from softcache.remote import named, patience, web
from softcache.remote.fetch import PARTIAL
from softcache.remote.places import parse_place
from softcache.share import pull, push

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from faults.web_server import FAULTS, Server, serving

GOLDEN = Path(__file__).parents[1] / "golden"
CACHES = {"version 1": GOLDEN / "v1" / "extended", "version 2": GOLDEN / "indexed"}


SLOW = ("stall", "drip", "slow head")


def param(fault: str) -> Any:
    return pytest.param(fault, marks=() if fault in ("cut", "corrupt") else pytest.mark.slow)


@pytest.fixture(autouse=True)
def impatient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times: only where something is slow on purpose so short that a busy machine may be too slow as well."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    slow, hopeless = params.get("fault") in SLOW, "always" in request.node.name or "is_not_the_one" in request.node.name
    monkeypatch.setattr(patience, "HOPELESS_S", (4.0 if slow else 1.0) if hopeless else 60.0)
    monkeypatch.setattr(patience, "NOBODY_S", 0.1)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "SLOW_S", 1.0 if slow else 30.0)
    monkeypatch.setattr(web, "STALL_S", 1.0 if slow else 10.0)
    monkeypatch.setattr(web, "HEAD_S", 1.0 if slow else 10.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(GOLDEN) as running:
        yield running


def pulled(server: Server, out: Path, cache: str = "indexed", id: str | None = None) -> tuple[Any, int]:
    manifest, nbytes, _ = pull.run(parse_place(f"{server.url}/{cache}", id), out, quiet=True)
    return manifest, nbytes


def error_of(server: Server, out: Path, id: str | None = None) -> SoftcacheError | None:
    """Why it could not be pulled; None where it could."""
    try:
        pulled(server, out, id=id)
    except SoftcacheError as exc:
        return exc
    return None


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the card and what stands beside it, and what a dump left."""
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    left = ("README.md", "croissant.json", "provenance.json", "push.lock")
    return {path: data for path, data in found.items() if path not in left and not path.startswith("dump/")}


def newest(root: Path) -> dict[str, bytes]:
    """As `contents`, without the manifests of earlier states."""
    kept = f"manifests/{read_manifest(root).id}.json"
    return {path: data for path, data in contents(root).items() if not path.startswith("manifests/") or path == kept}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("pinned", [True, False])
def test_it_is_the_cache_byte_for_byte(server: Server, tmp_path: Path, cache: Path, pinned: bool) -> None:
    id = read_manifest(cache).id
    name = cache.relative_to(GOLDEN).as_posix()
    manifest, nbytes = pulled(server, tmp_path / "a", name, id if pinned else None)
    assert manifest.id == id
    assert contents(tmp_path / "a") == newest(cache)
    assert nbytes == manifest.nbytes == sum(file.nbytes for file in manifest.files)
    assert verify.run(tmp_path / "a", full=True, quiet=True).state == "whole"
    server.asked.clear()
    assert pulled(server, tmp_path / "a", name)[1] == 0  # once more: all is there
    assert [path for path, _ in server.asked] == [f"{name}/{MANIFEST}", f"{name}/manifests/{id}.sig"]


@pytest.mark.parametrize("fault", [param(fault) for fault in FAULTS])
def test_one_wrong_answer_is_found_and_asked_for_again(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults["indexed/samples.h5"] = [fault]
    hopeless = fault in ("changed", "packed", "to a file", "to ftp")
    if hopeless:
        why = {"changed": "came twice with other bytes", "packed": "comes packed"}.get(fault, "which is not followed")
        with pytest.raises(RemoteError, match=rf"samples\.h5: .*{why}"):
            pulled(server, tmp_path / "a")
        with pytest.raises(UnfinishedCacheError, match="not all of the cache has been pulled"):
            read_manifest(tmp_path / "a")
        server.changed.clear()
    manifest, _ = pulled(server, tmp_path / "a")
    assert contents(tmp_path / "a") == newest(GOLDEN / "indexed")
    others = [path for path, _ in server.asked if not path.endswith((MANIFEST, ".sig", "samples.h5"))]
    # nothing else was asked for twice, but for what was under way when all had to end
    assert (
        hopeless
        or fault in SLOW
        or len(others) == len({*others}) == len(manifest.files.lists) + len(manifest.files) - 1
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", [param(fault) for fault in FAULTS])
def test_always_wrong_it_ends_soon_with_an_error_or_with_the_right_bytes(
    server: Server, tmp_path: Path, fault: str
) -> None:
    server.always["indexed/samples.h5"] = fault
    error = error_of(server, tmp_path / "a")
    if error is not None:
        assert fault in SLOW or "samples.h5" in error.message  # a busy machine may be slow with any
        assert not (tmp_path / "a" / MANIFEST).exists()
        assert not (tmp_path / "a" / "samples.h5").exists()
    else:
        assert fault in (
            "whole",
            "long",
            "endless",
            "cut",
        )  # what is right comes all the same: half, and half of the rest, ...
        assert contents(tmp_path / "a") == newest(GOLDEN / "indexed")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("busy", "down", "cut", "no answer")])
def test_a_manifest_that_is_not_the_one_asked_for_is_refused_before_any_file(
    server: Server, tmp_path: Path, fault: str
) -> None:
    id = read_manifest(GOLDEN / "indexed").id
    server.always[f"indexed/manifests/{id}.json"] = fault
    error = error_of(server, tmp_path / "a", id=id)
    if error is not None:
        assert isinstance(error, RemoteError)
        assert {path for path, _ in server.asked} == {f"indexed/manifests/{id}.json"}
        assert not (tmp_path / "a").exists()
    else:  # what a server does with ranges is nothing to a file that is asked for whole
        assert fault in ("whole", "other range", "shifted")


def test_what_came_before_a_stop_is_not_fetched_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.always["indexed/samples.h5"] = "down"
    monkeypatch.setattr(patience, "HOPELESS_S", 1.0)
    with pytest.raises(RemoteError, match=r"samples\.h5: 503"):
        pulled(server, tmp_path / "a")
    size = (GOLDEN / "indexed/samples.h5").stat().st_size
    (tmp_path / "a" / f"samples.h5{PARTIAL}").write_bytes((GOLDEN / "indexed/samples.h5").read_bytes()[:5000])
    sent = {path: count for path, count in server.sent.items() if path.startswith("indexed/members")}
    server.always.clear()
    pulled(server, tmp_path / "a")
    assert ("indexed/samples.h5", f"bytes=5000-{size - 1}") in server.asked
    assert {p: n for p, n in server.sent.items() if p in sent} == sent
    assert contents(tmp_path / "a") == newest(GOLDEN / "indexed")


def test_a_server_without_ranges_is_asked_from_the_beginning(server: Server, tmp_path: Path) -> None:
    server.faults["indexed/samples.h5"] = ["cut", "whole", "cut", "whole"]
    pulled(server, tmp_path / "a")
    assert contents(tmp_path / "a") == newest(GOLDEN / "indexed")
    asked = [given for path, given in server.asked if path == "indexed/samples.h5"]
    assert len(asked) == 5 and asked[0] == asked[2] == asked[4] != asked[1]


def test_a_beginning_that_is_wrong_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / PULLING).write_text(f'{{"id": "{read_manifest(GOLDEN / "indexed").id}"}}')
    (tmp_path / "a" / f"samples.h5{PARTIAL}").write_bytes(b"no such bytes")
    pulled(server, tmp_path / "a")
    assert contents(tmp_path / "a") == newest(GOLDEN / "indexed")


def test_nothing_is_written_through_links(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    out = tmp_path / "a"
    out.mkdir()
    (out / PULLING).write_text(f'{{"id": "{read_manifest(GOLDEN / "indexed").id}"}}')
    (out / f"samples.h5{PARTIAL}").symlink_to(outside / "precious")
    pulled(server, out)
    shutil.rmtree(out)
    out.mkdir()
    (out / PULLING).write_text(f'{{"id": "{read_manifest(GOLDEN / "indexed").id}"}}')
    os.link(outside / "precious", out / f"samples.h5{PARTIAL}")
    pulled(server, out)
    shutil.rmtree(out)
    out.mkdir()
    (out / PULLING).write_text(f'{{"id": "{read_manifest(GOLDEN / "indexed").id}"}}')
    (out / "members").symlink_to(outside)
    with pytest.raises(SoftcacheError, match="symbolic link"):
        pulled(server, out)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"precious": "mine"}


def test_a_cache_that_has_grown_is_pulled_by_its_new_files(tmp_path: Path) -> None:
    from golden import indexed

    indexed.make_indexed(tmp_path / "served" / "a", rounds=2)
    with serving(tmp_path / "served") as server:
        old, _ = pulled(server, tmp_path / "mine", "a")
        indexed.make_indexed(tmp_path / "grown", rounds=3)
        shutil.copytree(tmp_path / "grown", tmp_path / "served" / "a", dirs_exist_ok=True)
        new, nbytes = pulled(server, tmp_path / "mine", "a")
    assert new.id != old.id
    assert nbytes == new.nbytes - old.nbytes
    assert newest(tmp_path / "mine") == newest(tmp_path / "grown")
    with pytest.raises(CacheError, match="holds another cache"):
        pull.run(parse_place(f"file:{CACHES['version 1']}"), tmp_path / "mine", quiet=True)
    assert newest(tmp_path / "mine") == newest(tmp_path / "grown")
    assert not (tmp_path / "mine" / PULLING).exists()


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"notes.txt": "mine"}, "is not empty, and holds no cache"),
        ({PULLING: '{"id": "' + 64 * "0" + '"}'}, "a pull of another cache"),
        (None, "is a file, not a folder"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, there: dict[str, str] | None, message: str) -> None:
    out = tmp_path / "a"
    if there is None:
        out.write_text("mine")
    else:
        out.mkdir()
        for name, text in there.items():
            (out / name).write_text(text)
    before = out.read_text() if there is None else contents(out)
    with pytest.raises(CacheError, match=message):
        pull.run(parse_place(f"file:{GOLDEN / 'indexed'}"), out, quiet=True)
    assert (out.read_text() if there is None else contents(out)) == before


def test_a_hostile_manifest_reaches_nothing(tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(CACHES["version 1"], served)
    text = (served / MANIFEST).read_text()
    (served / MANIFEST).write_text(text.replace("samples.h5", "../../x.h5"))
    with pytest.raises(RemoteError, match="is no manifest that can be trusted"):
        pull.run(parse_place(f"file:{served}"), tmp_path / "a", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served"]


def test_an_endless_manifest_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "MAX_BYTES", 1 << 20)
    server.always["indexed/manifest.json"] = "endless"
    with pytest.raises(RemoteError, match="too many for it"):
        pulled(server, tmp_path / "a")


def test_pushed_and_pulled_it_is_the_same_and_known_files_stay(tmp_path: Path) -> None:
    from golden import indexed

    place = parse_place(f"file:{tmp_path / 'there'}")
    first, grown = tmp_path / "first", tmp_path / "grown"
    indexed.make_indexed(first, rounds=2)
    indexed.make_indexed(grown, rounds=3)
    done = push.run(first, place, quiet=True)
    assert (done.sent_files, done.sent_bytes) == (done.files, done.nbytes)
    again = push.run(first, place, quiet=True)
    assert (again.sent_files, again.id) == (0, done.id)
    later = push.run(grown, place, quiet=True)
    assert later.sent_files == later.files - done.files > 0
    pull.run(parse_place(f"file:{tmp_path / 'there'}@{later.id[:12]}"), tmp_path / "a", quiet=True)
    assert contents(tmp_path / "a") == newest(grown)
    pull.run(parse_place(f"file:{tmp_path / 'there'}@{done.id}"), tmp_path / "b", quiet=True)  # an older state
    assert newest(tmp_path / "b") == newest(first)


def test_a_push_that_was_cut_goes_on(tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "positions").mkdir(parents=True)
    shutil.copy(GOLDEN / "indexed/samples.h5", there)
    (there / "candidates.h5").write_bytes(
        bytes((GOLDEN / "indexed/candidates.h5").stat().st_size)
    )  # as long, and another one
    (there / "positions" / "list.tmp-push-0").write_bytes(b"left by a kill")
    with pytest.raises(RemoteError, match="is not empty, and holds no whole cache"):
        push.run(GOLDEN / "indexed", parse_place(f"file:{there}"), quiet=True)
    (there / "push.json").write_text(json.dumps({"id": read_manifest(CACHES["version 1"]).id}))
    with pytest.raises(RemoteError, match="a push of another cache"):
        push.run(GOLDEN / "indexed", parse_place(f"file:{there}"), quiet=True)
    (there / "push.json").write_text(json.dumps({"id": read_manifest(GOLDEN / "indexed").id}))
    done = push.run(GOLDEN / "indexed", parse_place(f"file:{there}"), quiet=True)
    assert done.sent_files == done.files - 1
    assert contents(there) == newest(GOLDEN / "indexed")
    assert verify.run(there, full=True, quiet=True).state == "whole"


def test_another_cache_is_not_pushed_over_and_damage_not_passed_on(tmp_path: Path) -> None:
    place = parse_place(f"file:{tmp_path / 'there'}")
    push.run(CACHES["version 2"], place, quiet=True)
    before = contents(tmp_path / "there")
    with pytest.raises(RemoteError, match="holds another cache"):
        push.run(CACHES["version 1"], place, quiet=True)
    assert contents(tmp_path / "there") == before
    bent = tmp_path / "bent"
    shutil.copytree(CACHES["version 1"], bent)
    data = bytearray((bent / "samples.h5").read_bytes())
    data[5000] ^= 1
    (bent / "samples.h5").write_bytes(data)
    with pytest.raises(CacheError, match="has other bytes than the manifest names"):
        push.run(bent, parse_place(f"file:{tmp_path / 'new'}"), quiet=True)
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_of_two_who_push_at_once_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from golden import indexed

    first, grown = tmp_path / "first", tmp_path / "grown"
    indexed.make_indexed(first, rounds=2)
    indexed.make_indexed(grown, rounds=3)
    place, current = parse_place(f"file:{tmp_path / 'there'}"), push.current
    told = []

    def looked(transport: Any) -> bytes | None:
        """While the first one works the second one comes."""
        with pytest.raises(RemoteError, match="somebody else pushes there") as caught:
            push.run(grown, place, quiet=True)
        told.append(caught.value)
        return current(transport)

    monkeypatch.setattr(push, "current", looked)
    push.run(first, place, quiet=True)
    assert len(told) == 1
    assert newest(tmp_path / "there")[MANIFEST] == (first / MANIFEST).read_bytes()
    assert verify.run(tmp_path / "there", full=True, quiet=True).state == "whole"
    # where a place has no locks, the last step sees that another manifest is there
    monkeypatch.setattr(push, "current", lambda transport: None)
    with pytest.raises(RemoteError, match="somebody else pushed there at the same time"):
        push.run(grown, place, quiet=True)
    assert newest(tmp_path / "there")[MANIFEST] == (first / MANIFEST).read_bytes()


def test_somebody_elses_folder_is_not_pushed_into(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(RemoteError, match=r"holds no whole cache \(README.md\)"):
        push.run(CACHES["version 1"], parse_place(f"file:{tmp_path / 'project'}"), quiet=True)
    assert (tmp_path / "project" / "README.md").read_text() == "mine"


def test_what_was_lost_or_damaged_on_either_side_is_sent_again(tmp_path: Path) -> None:
    place = parse_place(f"file:{tmp_path / 'there'}")
    push.run(CACHES["version 2"], place, quiet=True)
    (tmp_path / "there" / "samples.h5").unlink()
    assert push.run(CACHES["version 2"], place, quiet=True).sent_files == 1
    pull.run(place, tmp_path / "a", quiet=True)
    data = bytearray((tmp_path / "a" / "samples.h5").read_bytes())
    data[5000] ^= 1
    (tmp_path / "a" / "samples.h5").write_bytes(data)
    assert pull.run(place, tmp_path / "a", quiet=True)[1] == len(data)
    assert contents(tmp_path / "a") == newest(CACHES["version 2"])


def test_an_extension_under_way_is_not_pulled_over(tmp_path: Path) -> None:
    from golden import indexed

    place = parse_place(f"file:{tmp_path / 'grown'}")
    indexed.make_indexed(tmp_path / "grown", rounds=3)
    indexed.make_indexed(tmp_path / "mine", rounds=2)
    shutil.copytree(tmp_path / "grown" / "dump" / "extend-2", tmp_path / "mine" / "dump" / "extend-2")
    with pytest.raises(CacheError, match="an extension of its cache is under way"):
        pull.run(place, tmp_path / "mine", quiet=True)


def test_a_pull_that_had_no_room_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = parse_place(f"file:{CACHES['version 1']}")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "free_bytes", lambda folder: 10)
        with pytest.raises(SoftcacheError, match=r"the disk has 0\.0 MB left"):
            pull.run(place, tmp_path / "a", quiet=True)
    (tmp_path / "a" / PULLING).write_bytes(b"")  # as a full disk leaves it
    pull.run(place, tmp_path / "a", quiet=True)
    assert contents(tmp_path / "a") == newest(CACHES["version 1"])


def test_a_cut_manifest_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.faults["indexed/manifest.json"] = ["cut", "cut"]
    pulled(server, tmp_path / "a")
    assert contents(tmp_path / "a") == newest(GOLDEN / "indexed")


def test_a_page_in_the_place_of_signatures_is_none(tmp_path: Path) -> None:
    served = tmp_path / "served" / "a"
    shutil.copytree(CACHES["version 1"], served)
    id = read_manifest(served).id
    (served / "manifests" / f"{id}.sig").write_text("<html>" + "x" * 100_000)
    with serving(tmp_path / "served") as server:
        pulled(server, tmp_path / "b", "a")
    assert not (tmp_path / "b" / "manifests" / f"{id}.sig").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, there = CACHES["version 1"], f"file:{tmp_path / 'there'}"
    assert cli.main(["push", str(cache), there]) == 0
    told = capsys.readouterr().out
    id = read_manifest(cache).id
    assert f"softcache pull {there}@{id[:16]}" in told
    assert cli.main(["pull", f"{there}@{id[:16]}", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.endswith(f"id {id}\n")
    assert cli.main(["pull", there, str(tmp_path / "b"), "--id", "0" * 16]) == 2
    assert "has a cache with id" in capsys.readouterr().err

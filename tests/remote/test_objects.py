"""A cache in a bucket: by obstore's store in memory, which checks conditions as the large ones do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import needs

from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST
from softcache.check import verify
from softcache.errors import MissingExtraError, RemoteError
from softcache.remote import objects, patience
from softcache.remote.objects import KEPT_SHA256, Objects
from softcache.remote.places import parse_place
from softcache.remote.transport import Sending
from softcache.share import pull, push

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from golden.indexed import make_indexed

GOLDEN = Path(__file__).parents[1] / "golden"
CACHES = {"version 1": GOLDEN / "v1" / "extended", "version 2": GOLDEN / "indexed"}
PLACE = parse_place("s3://bucket/caches/a")


@pytest.fixture
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One in memory, whatever the URL."""
    request.applymarker(needs("obstore", "cloud"))
    memory = pytest.importorskip("obstore.store").MemoryStore()
    monkeypatch.setattr(objects, "_store", lambda place: memory)
    monkeypatch.setattr(patience, "HOPELESS_S", 1.0)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    return memory


def there(store: Any) -> dict[str, bytes]:
    """What lies there but for the card and what it shows."""
    names = [one["path"] for several in store.list() for one in several]
    return {name: bytes(store.get(name).bytes()) for name in names if name.startswith(("manifest", "member", "sample"))}


def whole(cache: Path) -> set[str]:
    """Names of what is to lie there."""
    manifest = read_manifest(cache)
    return {one.path for one in push.files_of(manifest)} | {MANIFEST, f"manifests/{manifest.id}.json"}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_pushed_and_pulled_it_is_the_same(store: Any, tmp_path: Path, cache: Path) -> None:
    done = push.run(cache, PLACE, quiet=True)
    assert all((cache / path).read_bytes() == bytes(store.get(path).bytes()) for path in whole(cache))
    assert not [one for several in store.list("push.json") for one in several]
    manifest, _, _ = pull.run(parse_place(PLACE.url, done.id), tmp_path / "a", quiet=True)
    assert manifest.id == done.id
    assert verify.run(tmp_path / "a", full=True, quiet=True).state == "whole"
    assert push.run(cache, PLACE, quiet=True).sent_files == 0


def test_an_extension_sends_its_new_files_and_what_was_damaged_is_sent_again(store: Any, tmp_path: Path) -> None:
    make_indexed(tmp_path / "first", rounds=2)
    make_indexed(tmp_path / "grown", rounds=3)
    first = push.run(tmp_path / "first", PLACE, quiet=True)
    grown = push.run(tmp_path / "grown", PLACE, quiet=True)
    assert grown.sent_files == grown.files - first.files > 0
    with pytest.raises(RemoteError, match="holds a later state"):
        push.run(tmp_path / "first", PLACE, quiet=True)
    assert "push.json" not in [one["path"] for several in store.list() for one in several]
    store.put("samples.h5", b"short", attributes={KEPT_SHA256: "0" * 64})
    assert push.run(tmp_path / "grown", PLACE, quiet=True).sent_files == 1


def test_a_push_that_was_cut_goes_on_by_the_hashes_that_are_kept(store: Any) -> None:
    cache, names = CACHES["version 1"], {one.path: one for one in push.files_of(read_manifest(CACHES["version 1"]))}
    store.put("push.json", json.dumps({"id": read_manifest(cache).id}).encode())
    first, second, third, *_ = names
    for path, data, sha256 in (
        (first, (cache / first).read_bytes(), names[first].sha256),
        (second, bytes(names[second].nbytes), None),  # as long, and of somebody who kept no hash
        (third, (cache / third).read_bytes(), "0" * 64),
    ):
        store.put(path, data, attributes={} if sha256 is None else {KEPT_SHA256: sha256})
    done = push.run(cache, PLACE, quiet=True)
    assert done.sent_files == done.files - 1
    assert all((cache / path).read_bytes() == bytes(store.get(path).bytes()) for path in whole(cache))


@pytest.mark.parametrize("begun", [False, True], ids=["into nothing", "both extend"])
def test_of_two_who_push_at_once_one_is_told(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    if begun:
        make_indexed(tmp_path / "first", rounds=2)
        push.run(tmp_path / "first", PLACE, quiet=True)
        make_indexed(tmp_path / "grown", rounds=3)
        mine, other = tmp_path / "grown", tmp_path / "first"
    else:
        mine, other = CACHES["version 1"], CACHES["version 2"]
    current, told = push.current, []

    def looked(transport: Any) -> bytes | None:
        """While the first one works the second one comes."""
        monkeypatch.setattr(push, "current", current)
        with pytest.raises(RemoteError, match=r"is not finished there|somebody else pushes there") as caught:
            push.run(other, PLACE, quiet=True)
        told.append(caught.value)
        return current(transport)

    monkeypatch.setattr(push, "current", looked)
    push.run(mine, PLACE, quiet=True)
    assert len(told) == 1
    assert bytes(store.get(MANIFEST).bytes()) == (mine / MANIFEST).read_bytes()


@pytest.mark.parametrize("begun", [False, True])
def test_the_store_itself_refuses_the_manifest_of_whoever_comes_second(
    store: Any, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Between the last look and the last step."""
    import obstore

    transport, real, looks = Objects(PLACE), obstore.get, []
    if begun:
        store.put(MANIFEST, b"first")

    def looked(store: Any, path: str, **options: Any) -> Any:
        """Once by `publish`, and where there is one once more by the last step."""
        looks.append(path)
        try:
            return real(store, path, **options)
        finally:
            if len(looks) == 1 + begun:
                obstore.put(store, MANIFEST, b"somebody else's")

    monkeypatch.setattr(obstore, "get", looked)
    assert not transport.publish({}, {MANIFEST: b"mine"}, b"first" if begun else None)
    assert bytes(store.get(MANIFEST).bytes()) == b"somebody else's"
    monkeypatch.setattr(obstore, "get", real)
    assert transport.publish({"manifests/1.json": b"x"}, {MANIFEST: b"mine"}, b"somebody else's")
    assert bytes(store.get(MANIFEST).bytes()) == b"mine"
    with pytest.raises(RemoteError, match="has other bytes than its name says"):
        transport.publish({"manifests/1.json": b"y"}, {MANIFEST: b"later"}, b"mine")
    assert bytes(store.get(MANIFEST).bytes()) == b"mine"
    # a claim is made by one of two
    assert transport.create("push.json", b"{}") and not transport.create("push.json", b"{}")


def test_somebody_elses_bucket_is_not_pushed_into(store: Any) -> None:
    store.put("notes.txt", b"mine")
    with pytest.raises(RemoteError, match=r"is not empty, and holds no whole cache \(notes.txt\)"):
        push.run(CACHES["version 1"], PLACE, quiet=True)
    assert [one["path"] for several in store.list() for one in several] == ["notes.txt"]


def test_a_large_file_goes_in_parts_and_is_read_by_ranges(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART", 1 << 16)
    data = bytes(range(256)) * 1000
    (tmp_path / "large").write_bytes(data)
    transport, noted = Objects(PLACE), []
    transport.put([Sending("large", tmp_path / "large", "ab")], noted.append)
    assert sum(noted) == len(data) and len(noted) == 4
    assert (transport.size("large"), transport.digest("large")) == (len(data), "ab")
    assert (transport.size("none"), transport.digest("none")) == (None, None)
    for start, stop in [(0, None), (0, 5), (70_000, 140_001), (250_000, None)]:
        pieces = [*transport.read("large", start, stop)]
        assert b"".join(pieces) == data[start:stop] and max(map(len, pieces)) <= 1 << 16


def test_other_bytes_are_refused_and_what_is_not_there_is_told(store: Any, tmp_path: Path) -> None:
    push.run(CACHES["version 1"], PLACE, quiet=True)
    size = store.head("samples.h5")["size"]
    store.put("samples.h5", bytes(size))
    with pytest.raises(RemoteError, match=r"samples\.h5: came twice with other bytes"):
        pull.run(PLACE, tmp_path / "a", quiet=True)
    store.delete("samples.h5")
    with pytest.raises(RemoteError, match=r"samples\.h5: is not there"):
        pull.run(PLACE, tmp_path / "a", quiet=True)
    assert not (tmp_path / "a" / MANIFEST).exists()
    shutil.rmtree(tmp_path / "a")


SECRET = "c2VjcmV0" * 5


@pytest.mark.parametrize(("kind", "scheme"), [("AWS", "s3"), ("AZURE", "az")])
def test_where_nobody_answers_it_ends_and_no_secret_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scheme: str
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr(patience, "HOPELESS_S", 0.1)
    told = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    told |= {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_SAS_KEY": f"sv=1&sig={SECRET}"}
    told |= {"AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:9", "AWS_ALLOW_HTTP": "true", "AZURE_ALLOW_HTTP": "true"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "READ_S", "1s")
    place = parse_place(f"{scheme}://bucket/a")
    for run in (
        lambda: pull.run(place, tmp_path / "a", quiet=True),
        lambda: push.run(CACHES["version 1"], place, quiet=True),
    ):
        with pytest.raises(RemoteError, match=r"error sending request|error trying to connect") as caught:
            run()
        assert SECRET not in repr(caught.value) and "sig=" not in repr(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_without_its_package_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="gs: needs the package 'obstore'"):
        Objects(parse_place("gs://bucket/a"))

"""A cache on a hub: one commit is read, what is pushed becomes visible at once, and the token goes to the hub alone."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import needs

from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST
from softcache.check import verify
from softcache.errors import MissingExtraError, RemoteError, UnfinishedCacheError
from softcache.remote import hub, patience
from softcache.remote.places import parse_place
from softcache.share import pull, push, show

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from faults.hub_server import SIGNED, TOKEN, HubServer, Repository
from faults.hub_server import hub as running_hub
from golden.indexed import make_indexed

GOLDEN = Path(__file__).parents[1] / "golden"
CACHES = {"version 1": GOLDEN / "v1" / "extended", "version 2": GOLDEN / "indexed"}
SHOWN = (".gitattributes", "README.md", "croissant.json", "preview.parquet")
PLACE = parse_place("hf:team/cache")

SELDOM = ("shifted", "busy", "packed", "page", "to a file")

pytestmark = [
    needs("huggingface_hub", "hub"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the package's own call
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, and a token for it in the environment; the package speaks the protocol that needs no binary of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(patience, "HOPELESS_S", 1.0)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running
        assert not [heard for where, heard in running.heard if where == "files" and heard]  # whatever a test does


def there(server: HubServer, name: str = "team/cache") -> dict[str, str]:
    """path -> sha256 of what lies there but for the card and what a hub puts there."""
    return {
        path: sha256(data).hexdigest()
        for path, data in server.contents(name).items()
        if path.rpartition("/")[2] not in SHOWN
    }


def digests(cache: Path) -> dict[str, str]:
    """As `there`."""
    return {path: sha256(data).hexdigest() for path, data in whole(cache).items()}


def whole(cache: Path) -> dict[str, bytes]:
    """What is to lie there."""
    found = {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    kept = (
        MANIFEST,
        f"manifests/{read_manifest(cache).id}.json",
        *(one.path for one in push.files_of(read_manifest(cache))),
    )
    return {path: data for path, data in found.items() if path in kept}


def hashes(cache: Path) -> set[str]:
    """Of the large files."""
    return {sha256(data).hexdigest() for path, data in whole(cache).items() if path.endswith(".h5")}


@pytest.mark.parametrize(
    ("cache", "folder"),
    [("version 1", ""), pytest.param("version 2", "/caches/a", marks=pytest.mark.slow)],
)
def test_pushed_and_pulled_it_is_the_same(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str, folder: str
) -> None:
    if folder:
        server.repositories["team/cache"] = Repository()
        server.repositories["team/cache"].commit({"README.md": b"of something else"})
    place = parse_place(f"hf:team/cache{folder}")
    done = push.run(CACHES[cache], place, quiet=True)
    start = len(folder) or 0
    lies = {path[start:]: data for path, data in there(server).items() if path.startswith(folder[1:])}
    assert lies == digests(CACHES[cache])
    assert len(server.repositories["team/cache"].commits) == 2  # all of it in one
    assert server.repositories["team/cache"].private == (not folder)
    assert ("open to you and your team alone" in capsys.readouterr().err) == (not folder)
    assert pull.run(parse_place(place.url, done.id), tmp_path / "a", quiet=True)[0].id == done.id
    assert verify.run(tmp_path / "a", full=True, quiet=True).state == "whole"
    server.uploads.clear()
    assert push.run(CACHES[cache], place, quiet=True).sent_files == 0
    assert not server.uploads and len(server.repositories["team/cache"].commits) == 2
    with pytest.raises(RemoteError, match="has a cache with id"):
        pull.run(parse_place(place.url, "0" * 16), tmp_path / "b", quiet=True)


@pytest.mark.slow
def test_an_extension_sends_its_new_files_alone_and_the_old_state_stays(server: HubServer, tmp_path: Path) -> None:
    make_indexed(tmp_path / "first", rounds=2)
    make_indexed(tmp_path / "grown", rounds=3)
    first = push.run(tmp_path / "first", PLACE, quiet=True)
    server.uploads.clear()
    grown = push.run(tmp_path / "grown", PLACE, quiet=True)
    assert grown.sent_files == grown.files - first.files > 0
    assert {*server.uploads} == hashes(tmp_path / "grown") - hashes(tmp_path / "first")
    old, _, _ = pull.run(parse_place("hf:team/cache", first.id), tmp_path / "old", quiet=True)
    new, _, _ = pull.run(parse_place("hf:team/cache", grown.id[:16]), tmp_path / "new", quiet=True)
    assert (old.id, new.id) == (first.id, grown.id)


@pytest.mark.slow
def test_a_push_that_was_cut_goes_on(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CACHES["version 2"]
    monkeypatch.setattr(hub, "IN_ONE_COMMIT", 3)
    monkeypatch.setattr(hub.Hub, "at_once", 2)
    real = push.publish
    monkeypatch.setattr(push, "publish", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push.run(cache, PLACE, quiet=True)  # sent, and not committed
    sent = [*server.uploads]
    assert sent
    monkeypatch.setattr(push, "publish", real)
    commits = server.repositories["team/cache"].commits
    committed = hub.Hub._committed

    def cut(self: Any, message: str, operations: list[Any]) -> bool:
        if len(commits) == 2:
            raise KeyboardInterrupt
        return committed(self, message, operations)

    monkeypatch.setattr(hub.Hub, "_committed", cut)
    with pytest.raises(KeyboardInterrupt):
        push.run(cache, PLACE, quiet=True)  # the first commit of several
    assert len(commits) == 2 and "push.json" in commits[-1][1]
    with pytest.raises(RemoteError, match=f"no {MANIFEST}, so no cache"):
        pull.run(PLACE, tmp_path / "a", quiet=True)
    with pytest.raises(RemoteError, match="a push of another cache"):
        push.run(CACHES["version 1"], PLACE, quiet=True)
    monkeypatch.setattr(hub.Hub, "_committed", committed)
    push.run(cache, PLACE, quiet=True)
    assert there(server) == digests(cache)  # push.json is gone
    assert server.uploads == sent  # nothing was sent twice


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["into nothing", "both extend"])
def test_of_two_who_push_at_once_one_is_told_and_nothing_of_theirs_is_there(
    server: HubServer, tmp_path: Path, begun: bool
) -> None:
    make_indexed(tmp_path / "first", rounds=2)
    make_indexed(tmp_path / "grown", rounds=3)
    if begun:
        push.run(tmp_path / "first", PLACE, quiet=True)
        other, files = tmp_path / "grown", {"notes.txt": b"what somebody else committed"}
    else:
        push.run(CACHES["version 1"], parse_place("hf:team/other"), quiet=True)
        other, files = tmp_path / "first", server.repositories["team/other"].commits[-1][1]

    def meanwhile() -> None:
        server.before_commit = lambda: None
        kept = server.repositories["team/cache"]
        kept.commit({**kept.commits[-1][1], **files})

    server.before_commit = meanwhile
    with pytest.raises(RemoteError, match="somebody else pushed there at the same time"):
        push.run(other, PLACE, quiet=True)
    if not begun:
        assert there(server) == digests(CACHES["version 1"])
        with pytest.raises(RemoteError, match="holds another cache"):
            push.run(other, PLACE, quiet=True)
    else:
        push.run(other, PLACE, quiet=True)  # it extends what is there
        assert there(server)["notes.txt"] and digests(other).items() <= there(server).items()


def test_what_is_committed_while_it_is_pulled_is_not_mixed_in(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = whole(CACHES["version 1"])
    server.lay("team/cache", files)
    missing = pull.missing_of

    def committed(*given: Any, **named: Any) -> Any:
        kept = server.repositories["team/cache"]
        kept.commit(dict.fromkeys(files, b"another one"))
        return missing(*given, **named)

    monkeypatch.setattr(pull, "missing_of", committed)
    manifest, _, _ = pull.run(PLACE, tmp_path / "a", quiet=True)
    assert manifest.id == read_manifest(CACHES["version 1"]).id
    assert len(server.repositories["team/cache"].commits) > 1


@pytest.mark.parametrize("inside", [False, True])
def test_what_the_package_says_is_told_in_a_line_without_secrets(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    from huggingface_hub import HfApi

    def broken(*given: Any, **named: Any) -> None:
        text = f"cannot send to http://me:geheim@host/a?{SIGNED} with {TOKEN}\nand more: geheim"
        if inside:
            raise RuntimeError("of no use") from OSError(text)
        raise ValueError(text)

    monkeypatch.setattr(HfApi, "create_repo" if not inside else "create_commit", broken)
    with pytest.raises(
        RemoteError, match=r"did not take it \(\w+: cannot send to http:\.\.\.host/a\.\.\. with \.\.\.\)"
    ) as caught:
        push.run(CACHES["version 1"], PLACE, quiet=True)
    assert all(one not in repr(caught.value) for one in ("geheim", SIGNED, TOKEN))


@pytest.mark.parametrize("fault", ["corrupt", "cut", *(pytest.param(one, marks=pytest.mark.slow) for one in SELDOM)])
def test_a_wrong_answer_of_where_large_files_lie_is_found(server: HubServer, tmp_path: Path, fault: str) -> None:
    server.lay("team/cache", whole(CACHES["version 1"]))
    server.faults["samples.h5"] = [fault] * 2
    if fault not in ("cut", "busy"):
        server.always["samples.h5"] = fault
        with pytest.raises(RemoteError, match=r"samples\.h5: ") as caught:
            pull.run(PLACE, tmp_path / "a", quiet=True)
        assert TOKEN not in repr(caught.value) and SIGNED not in repr(caught.value)
        with pytest.raises(UnfinishedCacheError):
            read_manifest(tmp_path / "a")
        server.always.clear()
        server.faults.clear()
    pull.run(PLACE, tmp_path / "a", quiet=True)
    assert digests(tmp_path / "a") == digests(CACHES["version 1"])


def test_other_bytes_of_the_same_size_are_refused(server: HubServer, tmp_path: Path) -> None:
    server.lay("team/cache", whole(CACHES["version 1"]))
    data = server.contents("team/cache")["samples.h5"]
    oid = server.repositories["team/cache"].commits[-1][1]["samples.h5"]
    server.large[str(oid)] = bytes(len(data))  # under the hash of the other ones: a hub that is wrong, or lies
    with pytest.raises(RemoteError, match=r"samples\.h5: came twice with other bytes"):
        pull.run(PLACE, tmp_path / "a", quiet=True)
    assert not (tmp_path / "a" / MANIFEST).exists()


@pytest.mark.parametrize("status", [403, 500])
def test_what_a_hub_refuses_is_said_without_the_token(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push.run(CACHES["version 1"], PLACE, quiet=True)  # the error is one of a hub that has answered before
    server.refused = [status] * 50
    with pytest.raises(RemoteError, match=str(status)) as caught:
        push.run(CACHES["version 2"], parse_place("hf:team/new"), quiet=True)
    told = capsys.readouterr()
    for text in (repr(caught.value), str(caught.value), told.out, told.err):
        assert TOKEN not in text and SIGNED not in text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert ("hf auth" in caught.value.tip) == (status in (401, 403))


def test_a_private_repository_asks_for_a_token(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.lay("team/cache", whole(CACHES["version 1"]))
    server.repositories["team/cache"].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(RemoteError, match=r"is not open to you \(401") as caught:
        pull.run(PLACE, tmp_path / "a", quiet=True)
    assert "hf auth whoami" in caught.value.tip and "xxx" not in repr(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RemoteError, match=r"hf:team/none: there is no such repository of data"):
        pull.run(parse_place("hf:team/none"), tmp_path / "a", quiet=True)


def test_somebody_elses_repository_is_not_pushed_into(server: HubServer) -> None:
    server.repositories["team/cache"] = Repository()
    server.repositories["team/cache"].commit({".gitattributes": b"", "README.md": b"mine"})
    with pytest.raises(RemoteError, match=r"is not empty, and holds no whole cache \(README.md\)"):
        push.run(CACHES["version 1"], PLACE, quiet=True)
    assert server.contents("team/cache")["README.md"] == b"mine"


def test_a_hub_that_is_none_is_told(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["team/cache"] = Repository(commits=[("../../x", {})])
    with pytest.raises(RemoteError, match="does not answer as a hub does"):
        pull.run(PLACE, tmp_path / "a", quiet=True)


def test_without_its_package_what_is_open_is_read_and_a_push_says_what_is_missing(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.lay("team/cache", whole(CACHES["version 1"]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    server.heard.clear()
    pull.run(PLACE, tmp_path / "a", quiet=True)
    assert digests(tmp_path / "a") == digests(CACHES["version 1"])
    assert not [heard for _, heard in server.heard if heard]
    with pytest.raises(MissingExtraError, match="pushing to a hub needs the package"):
        push.run(CACHES["version 1"], PLACE, quiet=True)


def test_a_new_card_is_a_commit_of_its_own_with_what_it_shows(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CACHES["version 1"], tmp_path / "cache")
    push.run(tmp_path / "cache", PLACE, quiet=True)
    assert b"\nviewer: false\n" in server.contents("team/cache")["README.md"]
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: object())  # as where pyarrow is
        patch.setattr(show, "to_parquet", lambda columns, cells: b"PAR1 \x00\xff")
        made = show.run(tmp_path / "cache", quiet=True).files
    assert push.run(tmp_path / "cache", PLACE, quiet=True).sent_files == 0
    lies = server.contents("team/cache")
    assert {path: lies[path] for path in made} == {path: (tmp_path / "cache" / path).read_bytes() for path in made}
    assert len(made) == 3 and len(server.repositories["team/cache"].commits) == 3
    push.run(tmp_path / "cache", PLACE, quiet=True)
    assert len(server.repositories["team/cache"].commits) == 3

"""Learning from a cache that lies somewhere else is learning from the same cache in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import WORLDS
from far_caches import ROWS, Server, far, folder, serving

from softcache import cli
from softcache.cache.manifest import read_manifest
from softcache.remote import patience

TOY = WORLDS / "toy.py"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(patience, "NOBODY_S", 0.1)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(folder()) as running:
        yield running


def train(cache: str, out: Path, epochs: int = 1) -> int:
    words = f"train --cache {cache} --data {TOY}:images?count={ROWS} --student softcache:mlp?hidden=4 --epochs {epochs}"
    return cli.main(
        [
            *words.split(),
            "--batch-size",
            "512",
            "--workers",
            "0",
            "--threads",
            "1",
            "--quiet",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )


def weights(out: Path) -> bytes:
    return (out / "student.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["version 1", "version 2"])
def test_the_student_is_the_same_to_the_last_bit(server: Server, tmp_path: Path, kind: str) -> None:
    url = f"{server.url}/{far(kind).name}"
    assert train(url, tmp_path / "far") == 0
    assert train(str(far(kind)), tmp_path / "near") == 0
    assert weights(tmp_path / "far") == weights(tmp_path / "near")
    about = json.loads((tmp_path / "far" / "run.json").read_text())
    assert about["config"]["cache"] == url
    assert about["cache"] == read_manifest(far(kind)).id


@pytest.mark.slow
def test_a_run_goes_on_offline_with_the_id_it_began_with(tmp_path: Path) -> None:
    far("version 2")
    with serving(folder()) as server:
        url = f"{server.url}/{far('version 2').name}"
        assert train(url, tmp_path / "far", epochs=4) == 0  # all views are in the store then
        whole = weights(tmp_path / "far")
        (tmp_path / "far" / "student.safetensors").unlink()
    assert train(url, tmp_path / "far", epochs=4) == 0  # nobody answers any more, and no id was given
    assert weights(tmp_path / "far") == whole


@pytest.mark.slow
def test_a_cache_that_lies_somewhere_else_is_measured_as_one(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", f"{TOY}:images?count={ROWS}", "--threads", "1", "--json"]
    told = []
    for cache in (f"{server.url}/{far('version 2').name}", str(far("version 2"))):
        assert cli.main(["eval", cache, *argv]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["top1"] == told[1]["top1"]
    assert told[0]["nll"] == told[1]["nll"]


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "URL"],
        ["repair", "URL"],
        ["repair", "x", "--from", "URL"],
        ["push", "URL", "file:there"],
        ["sign", "URL", "--key", "key"],
        ["card", "URL"],
        ["merge", "URL", "a", "b"],
        ["merge", "a", "b", "URL"],
        ["pull", "file:there", "URL"],
        ["subset", "x", "URL", "--views", "0"],
        ["dump", "--data", "digits", "--teacher", "x", "--out", "URL"],
        ["dump", "--data", "digits", "--teacher", "x", "--out", "URL", "--extend"],
    ],
    ids=" ".join,
)
def test_verbs_that_need_a_folder_say_so_of_a_url(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://example.org/caches/a"
    assert cli.main([url if word == "URL" else word for word in words]) == 2
    told = capsys.readouterr().err
    assert f"{url}: {words[0]}" in told
    assert "works on a folder of this machine" in told
    assert f"softcache pull {url} FOLDER" in told

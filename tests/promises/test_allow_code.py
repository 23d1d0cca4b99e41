"""A cache may name code: transforms, factories. Whoever opens somebody else's cache runs none of it unasked."""

from __future__ import annotations

import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import WORLDS

import softcache
from softcache import cli
from softcache.errors import ConfigError
from softcache.spec import call_factory, load_factory, parse_spec


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A cache whose views are made by a transform, and the folder in which that leaves a mark when it is called."""
    shutil.copy(WORLDS / "leaves_marks.py", tmp_path / "theirs.py")
    argv = ["dump", "--data", f"{tmp_path}/theirs.py:images", "--teacher", f"{tmp_path}/theirs.py:teacher", "--quiet"]
    argv += ["--policy", f"{tmp_path}/theirs.py:darker", "--out", str(tmp_path / "cache"), "--threads", "1"]
    assert cli.main(argv) == 0
    for mark in tmp_path.glob("called-*"):
        mark.unlink()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("verb", ["train", "verify", "views", "eval", "extend"])
def test_code_that_a_cache_names_is_called_only_if_its_user_says_so(
    verb: str, allowed: bool, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, data = str(shared / "cache"), ["--data", f"{shared}/theirs.py:images"]
    argv = {
        "train": ["train", "--cache", cache, *data, "--student", "softcache:mlp?hidden=4", "--out", f"{shared}/run"],
        "verify": ["verify", cache, "--replay", "8", *data],
        "views": ["views", cache, "--sample", "k3", "--out", f"{shared}/v.png", *data],
        "eval": ["eval", f"{shared}/hard", "--cache", cache, *data],
        "extend": [
            "dump",
            "--extend",
            "--out",
            cache,
            *data,
            "--teacher",
            f"{shared}/theirs.py:teacher",
            "--views",
            "2",
        ],
    }[verb]
    if verb == "eval":
        hard = [
            "train",
            *data,
            "--student",
            "softcache:mlp?hidden=4",
            "--epochs",
            "1",
            "--out",
            f"{shared}/hard",
            "--quiet",
        ]
        assert cli.main(hard) == 0
    code = cli.main(
        [*argv, *(["--allow-code"] if allowed else []), *(["--epochs", "1", "--quiet"] if verb == "train" else [])]
    )
    said = capsys.readouterr().err
    assert (shared / "called-transform").exists() == allowed, said
    assert code == (0 if allowed else 2)
    if not allowed:
        assert "darker" in said and "--allow-code" in said


def test_a_factory_in_provenance_is_not_called_unasked(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify = ["verify", str(shared / "cache"), "--replay", "8"]
    assert cli.main(verify) == 2
    said = capsys.readouterr().err
    assert f"--data {shared}/theirs.py:images" in said and f"{shlex.join(['softcache', *verify])} --allow-code" in said
    assert not list(shared.glob("called-*"))
    assert cli.main(["verify", str(shared / "cache"), "--replay", "8", "--allow-code"]) == 0
    assert len(list(shared.glob("called-*"))) == 2


def test_the_library_asks_too(shared: Path) -> None:
    images = call_factory(load_factory(parse_spec(f"{shared}/theirs.py:images")), {}, "images")
    cache = softcache.open(shared / "cache")
    assert cache.gather(np.array([0]), np.array([0])).logits().shape == (1, 2)  # numbers need no code
    with pytest.raises(ConfigError, match="made by code that it names"):
        cache.join(images)[0]
    again = pickle.loads(pickle.dumps(softcache.open(shared / "cache", allow_code=True)))
    assert int(again.join(images)[3][0].max()) == 45

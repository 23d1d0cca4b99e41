"""Caches of every released format version stay readable: they are read on every run, and give what they always gave."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache
from softcache import cli
from softcache.cache.manifest import canonical_json
from softcache.cache.schema import FORMAT_VERSION, FORMATS
from softcache.check import verify
from softcache.check.replay import Replay
from softcache.codecs import CODECS
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import CacheError
from softcache.losses import kd
from softcache.spec import call_factory, load_factory, parse_spec

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
PIECES = GOLDEN / "pieces.py"
CACHES = sorted(path for version in GOLDEN.glob("v*") for path in version.iterdir() if path.is_dir())
IDS = [f"{path.parent.name}/{path.name}" for path in CACHES]
# decoded by a matrix product, whose order of sums is the machine's own; eps bounds it
BY_PRODUCT = {"lowrank", "linear_head"}


def golden(path: Path) -> tuple[softcache.Cache, dict[str, Any]]:
    return softcache.open(path), json.loads(path.with_suffix(".json").read_text())


def data_of(cache: softcache.Cache, path: Path) -> str:
    """The transfer set that a golden cache was made from."""
    query = {"lowrank": "?count=300&classes=64", "multi-label": "?multi_label=true"}.get(path.name, "")
    return f"{PIECES}:images{query}"


def test_every_codec_has_its_golden() -> None:
    """In the version that is frozen; another one has some."""
    stored = {
        int(version.name.removeprefix("v")): {
            m.codec["name"]
            for path in version.iterdir()
            if path.is_dir()
            for m in softcache.open(path).manifest.plan.members
        }
        for version in GOLDEN.glob("v*")
    }
    frozen = {name for name, kind in CODECS.items() if kind(10).format == FORMAT_VERSION}
    assert stored[FORMAT_VERSION] == frozen and tuple(sorted(stored)) == FORMATS
    assert all(names and names <= set(CODECS) for names in stored.values())
    assert {name for name, kind in CODECS.items() if kind(10).format != FORMAT_VERSION} <= set().union(*stored.values())


@pytest.mark.parametrize("path", CACHES, ids=IDS)
def test_it_reads_back_to_the_stored_numbers(path: Path) -> None:
    cache, wanted = golden(path)
    assert cache.id == wanted["id"]
    rows, views = np.array(wanted["rows"]), np.array(wanted["views"])
    features = sorted({name for member in wanted["members"].values() for name in member["features"]})
    targets = cache.gather(rows, views, features=features)
    assert [f"{int(i):016x}" for i in targets.sample_ids] == wanted["sample_ids"]
    assert [cache.samples.key(int(row)) for row in rows] == wanted["keys"]
    assert targets.labels.int().tolist() == wanted["labels"]
    assert cache.reader.gather(None, "pixel_digests", rows, views).tolist() == wanted["pixel_digests"]
    assert list(cache.members) == list(wanted["members"])
    for member, numbers in wanted["members"].items():
        codec = cache.codecs[member]
        slack = 2e-5 if codec.name in BY_PRODUCT else 0.0
        if codec.complete:
            assert (targets.logits(member) - torch.tensor(numbers["logits"])).abs().max() <= slack
        if codec.bounded:
            assert cache.eps(member, rows, views).tolist() == numbers["eps"]
        log_probs = torch.tensor(numbers["log_probs at T=2"])
        assert (targets.log_probs(member, 2.0) - log_probs).abs().max() <= 1e-5
        for name, values in numbers["features"].items():
            assert targets.feature(name, member).tolist() == values


@pytest.mark.parametrize("path", CACHES, ids=IDS)
def test_it_is_within_its_bound_of_the_live_teacher(path: Path) -> None:
    """In float64, from views rendered anew."""
    cache, wanted = golden(path)
    replay = Replay(path, data_of(cache, path))
    rows, views = np.array(wanted["rows"]), np.array(wanted["views"])
    items = [replay.rendered(int(row), int(view)) for row, view in zip(rows, views, strict=True)]
    images = torch.from_numpy(np.stack([rendered.item for rendered in items if rendered is not None])).double() / 256
    for member, numbers in wanted["members"].items():
        spec = parse_spec(
            f"{PIECES}:network?seed={2 if member == 'second' else 1}"
            + ("&classes=64&width=4" if path.name == "lowrank" else "")
        )
        teacher = call_factory(load_factory(spec), spec.parameters, spec.text).double()
        with torch.no_grad():
            given = teacher(images.flatten(1))
        if numbers["eps"] is not None:
            stored = torch.tensor(numbers["logits"], dtype=torch.float64)
            assert ((stored - given).abs().amax(dim=1) <= torch.tensor(numbers["eps"]) + 2e-6).all()
        if numbers["logits"] is None:  # the largest are kept, by topk in their order
            found = torch.tensor(numbers["log_probs at T=2"]).topk(5, dim=1).indices
            best = given.topk(5, dim=1).indices
            same = (
                torch.equal(found, best)
                if path.name == "topk"
                else torch.equal(found.sort().values, best.sort().values)
            )
            assert same  # a byte holds no order of what is nearly equal


@pytest.mark.slow
@pytest.mark.parametrize("path", CACHES, ids=IDS)
def test_it_is_whole_and_renders_what_the_teacher_saw(path: Path) -> None:
    cache, _ = golden(path)
    verdict = verify.run(path, full=True, quiet=True, replay=1000, data=data_of(cache, path))
    assert (verdict.state, verdict.faults) == ("whole", [])
    assert "bit for bit" in verdict.notes[0]


def test_the_subset_names_its_parent() -> None:
    (parent,) = {json.loads((version / "float16.json").read_text())["id"] for version in GOLDEN.glob("v1")}
    plan = softcache.open(GOLDEN / "v1/subset").manifest.plan
    assert plan.parent is not None and (plan.parent.id, plan.views.first) == (parent, 1)


def test_a_student_learns_from_a_golden_cache() -> None:
    cache = softcache.open(GOLDEN / "v1/float16")
    joined = cache.join(open_transfer_set(f"{PIECES}:images"))
    images = torch.stack([torch.from_numpy(joined[i][0][0]).flatten() / 256 for i in range(len(joined))])
    logits = joined.gather([joined[i][1] for i in range(len(joined))]).logits()
    student = torch.nn.Linear(36, 12)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss = kd(student(images), logits, temperature=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("found", "message", "tip"),
    [
        (3, "format version 3; this softcache reads versions 1 and 2", "install a newer softcache"),
        (0, "format version 0, before the format was frozen; this softcache reads versions 1 and 2", "dump again"),
    ],
)
def test_another_version_says_what_was_found_what_is_read_and_what_to_do(
    found: int, message: str, tip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(GOLDEN / "v1/float32", tmp_path / "cache"))
    entry = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(canonical_json(entry | {"format": found, "anything": "else"}))
    with pytest.raises(CacheError, match=message) as caught:
        softcache.open(path)
    assert tip in caught.value.tip
    assert cli.main(["verify", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_goldens_are_not_written_again() -> None:
    before = {path: path.read_bytes() for path in GOLDEN.rglob("*.json")}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/golden/make_caches.py")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "written once" in done.stderr
    assert {path: path.read_bytes() for path in GOLDEN.rglob("*.json")} == before

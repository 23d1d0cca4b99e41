"""A subset is a cache of its own: the parent's targets bit for bit, fewer of them, and whatever a cache can do it can do."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump

import softcache
from softcache import cli, dump, train
from softcache.cache.reader import CacheReader
from softcache.cache.statistics import MemberStatistics
from softcache.check import verify
from softcache.config import DumpConfig, TrainConfig
from softcache.errors import (
    CacheError,
    ConfigError,
    DamagedCacheError,
    PlanMismatchError,
    UnfinishedCacheError,
)
from softcache.share import copy_records, subset
from softcache.share.subset import Choice

sys.path.append(str(Path(__file__).parents[2] / "tools"))

CODECS = (
    "float32",
    "float16",
    "int8",
    "headtail:k=3,bits=4",
    "topk:k=3",
    "topset:k=3",
    "lowrank:max_kl=0.001,at_temperature=4",
    "linear_head:dtype=float16",
    "linear_head:dtype=int8",
)
SLOW = ("int8", "headtail:k=3,bits=4", "linear_head:dtype=int8")  # nothing about them that the others do not have
CROPPED = ("crop_flip:padding=1",)
ROWS, VIEWS = 520, 3  # two full parts of 256 rows and a short one


@pytest.fixture(scope="module")
def pieces() -> str:
    return str(WORLDS / "bent.py")


def dumped(pieces: str, out: Path, **settings: Any) -> softcache.Cache:
    defaults: dict[str, Any] = {
        "data": f"{pieces}:images",
        "teacher": (f"{pieces}:bent?name=a", f"{pieces}:bent?seed=2&name=b"),
        "policy": CROPPED,
        "views": VIEWS,
        "codec": "float16",
        "shard_rows": 256,
        "threads": 1,
        "workers": 0,
    }
    return softcache.open(dump.run(DumpConfig(**(defaults | settings), out=str(out)), quiet=True).path)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, pieces: str) -> Callable[[str], softcache.Cache]:
    """codec -> a cache of two members and three views in several parts, with a feature, made once."""
    made: dict[str, softcache.Cache] = {}

    def parent(codec: str) -> softcache.Cache:
        if codec not in made:
            bright = "&bright=true" if codec.startswith("lowrank") else ""  # so that some records are dense
            teachers = (f"{pieces}:bent?name=a{bright}", f"{pieces}:bent?seed=2&name=b{bright}")
            out = tmp_path_factory.mktemp("parents") / "cache"
            made[codec] = dumped(
                pieces, out, teacher=teachers, codec=codec, features=("first:flatten",), license="cc-by-4.0"
            )
        return made[codec]

    return parent


@pytest.fixture
def plain(parents: Callable[[str], softcache.Cache]) -> softcache.Cache:
    return parents("float16")


SMALL_PARTS = {"shard_rows": 256}  # so that few samples make several


def cut(parent: softcache.Cache, out: Path, sizes: Mapping[str, int] | None = None, **choice: Any) -> softcache.Cache:
    subset.run(parent.reader.path, out, Choice(**choice), quiet=True, **(sizes or {}))
    return softcache.open(out)


def rows_of(child: softcache.Cache, parent: softcache.Cache) -> np.ndarray:
    """The parent's row of each of the child's, found the slow way."""
    place = {int(one): row for row, one in enumerate(parent.samples.ids)}
    return np.array([place[int(one)] for one in child.samples.ids])


def check_same(child: softcache.Cache, parent: softcache.Cache, first_view: int = 0) -> None:
    """Every stored value, every decoded target and every digest is the parent's."""
    rows = rows_of(child, parent)
    assert (np.diff(rows) > 0).all()  # the parent's order
    mine = np.arange(len(child))
    for view in range(child.num_views):
        here, there = (mine, np.full(len(rows), view)), (rows, np.full(len(rows), view + first_view))
        digests = [c.reader.gather(None, "pixel_digests", *at) for c, at in ((child, here), (parent, there))]
        assert np.array_equal(*digests)
        features = [f.name for member in child.members for f in child.member(member).features]
        for member in child.members:
            found = child.gather(*here, members=[member], features=features)
            wanted = parent.gather(*there, members=[member], features=features)
            assert torch.equal(found.log_probs(member, 2.0), wanted.log_probs(member, 2.0))
            if child.codecs[member].complete:
                assert torch.equal(found.logits(member), wanted.logits(member))
            for name in features:
                assert torch.equal(found.feature(name, member), wanted.feature(name, member))
            first = next(child.manifest.files_of("member", member))
            for name in (name for name in first.arrays if not name.endswith("_crc32")):
                stored = child.reader.gather(member, name, *here)
                if name == "records":
                    stored = without_dense_number(child, member, stored)
                    original = without_dense_number(parent, member, parent.reader.gather(member, name, *there))
                else:
                    original = parent.reader.gather(member, name, *there)
                assert stored.tobytes() == original.tobytes()


def without_dense_number(cache: softcache.Cache, member: str, records: np.ndarray) -> np.ndarray:
    """Which dense row a record is differs; whether it is one does not."""
    masked = records.copy()
    for field in cache.codecs[member].fields:
        if field.name == "dense":
            part = masked[:, field.offset : field.offset + 4]
            part[:] = part.any(axis=1, keepdims=True)
    return masked


def files_of(path: Path) -> dict[str, bytes]:
    """Everything of a cache that its id covers, and the card."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "provenance.json" and file.relative_to(path).parts[0] != "dump"
    }


# --------------------------------------------------------------------------------------------------- what a subset holds


@pytest.mark.slow
@pytest.mark.parametrize("codec", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in CODECS])
def test_every_target_is_the_parents(parents: Callable[[str], softcache.Cache], codec: str, tmp_path: Path) -> None:
    parent = parents(codec)
    child = cut(parent, tmp_path / "child", SMALL_PARTS, views="1-2", members=("b",), drop_labels=("0-11",))
    labels = parent.samples.labels
    assert 256 < len(child) == int(((labels < 0) | (labels > 11)).sum()) < ROWS
    assert (child.num_views, child.members) == (2, ("b",))
    check_same(child, parent, first_view=1)
    assert verify.run(child.reader.path, full=True, quiet=True).state == "whole"
    plan, before = child.manifest.plan, parent.manifest.plan
    assert plan.class_names == before.class_names and plan.members == (before.member("b"),)
    assert (plan.views.first, plan.views.count, plan.views.steps) == (1, 2, before.views.steps)
    assert len(plan.rounds) == 1 and len(plan.rounds[0].layout) > 1 and plan.made_with == before.made_with
    assert plan.samples == replace(
        before.samples, count=len(child), order="selected", fingerprint=plan.samples.fingerprint
    )
    assert plan.parent is not None and plan.parent.id == parent.id
    assert plan.parent.statistics == {"b": parent.manifest.statistics["b"]}
    for name, array in parent.reader.constants("b").items():
        assert np.array_equal(child.reader.constants("b")[name], array)
    dense = child.manifest.statistics["b"].dense
    assert (dense > 0) == codec.startswith("lowrank")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "topk:k=3", "topset:k=3", "lowrank:max_kl=0.001,at_temperature=4"])
def test_statistics_are_those_of_the_stored_records(
    parents: Callable[[str], softcache.Cache], codec: str, tmp_path: Path
) -> None:
    child = cut(parents(codec), tmp_path / "child", SMALL_PARTS, views="0-1", drop_labels=("0-5",))
    for file in child.manifest.files_of("member", "a"):
        assert file.rows is not None and file.views is not None and file.statistics is not None
        rows, views = (part.ravel() for part in np.meshgrid(np.arange(*file.rows), np.arange(*file.views)))
        targets = child.gather(rows, views, members=["a"])
        log_p = targets.log_probs("a", 1.0).double().numpy()
        labels, s = child.samples.labels_of(rows), file.statistics
        assert (s.records, s.labelled) == (len(rows), int((labels >= 0).sum()))
        assert s.correct == int((log_p.argmax(axis=1) == labels).sum())
        assert s.entropy_sum == pytest.approx(float(-(np.exp(log_p) * log_p).sum()), rel=1e-9)
        eps = child.reader.gather("a", "eps", rows, views) if child.codecs["a"].bounded else np.zeros(1)
        assert s.max_eps == float(eps.max())
        error = child.reader.gather("a", "feature0_error", rows, views)
        assert dict(s.feature_errors) == {"first:flatten": float(error.max())}
        kept = [f for f in child.manifest.files_of("dense", "a") if (f.rows, f.views) == (file.rows, file.views)]
        assert s.dense == sum(f.arrays["logits"].shape[0] for f in kept)
        if codec.startswith("topset"):
            ids, head, _ = targets.head("a", 1.0)
            log_mass = [
                targets.log_probs("a", t).double().gather(1, ids).logsumexp(dim=1) for t in (1.0, 2.0, 4.0, 8.0)
            ]
            assert list(s.kept.values()) == pytest.approx([float(one.exp().sum()) for one in log_mass], rel=1e-5)
            assert (
                bool((head[:, 0] == 0).all())
                and log_p[np.arange(len(ids)), ids[:, 0]].tolist() == log_p.max(axis=1).tolist()
            )
        assert (s.kept == {}) == (not codec.startswith("topset"))
        assert (s.floored, s.measured, s.agreed, dict(s.kl)) == (0, 0, 0, {})


def test_the_sample_table_is_cut(plain: softcache.Cache, tmp_path: Path) -> None:
    child = cut(plain, tmp_path / "child", keep_labels=("class 7", "9-11"))
    rows = [row for row in range(len(plain)) if int(plain.samples.labels[row]) in (7, 9, 10, 11)]
    mine, theirs = child.samples, plain.samples
    assert [mine.key(i) for i in range(len(mine))] == [theirs.key(row) for row in rows]
    assert np.array_equal(mine.labels, theirs.labels[rows]) and np.array_equal(mine.digests, theirs.digests[rows])
    hasher, order = hashlib.sha256(), sorted(range(len(rows)), key=lambda i: int(mine.ids[i]))
    for array in (mine.ids, mine.labels, mine.digests):
        for i in order:
            hasher.update(array[i].tobytes())
    assert child.manifest.plan.samples.fingerprint == hasher.hexdigest()


def test_the_probe_is_cut_and_numbered_anew(plain: softcache.Cache, tmp_path: Path) -> None:
    child = cut(plain, tmp_path / "child", views="1-2", drop_labels=("0-11",))
    probe, whole = child.reader.probe(), plain.reader.probe()
    rows = rows_of(child, plain)
    kept = [i for i in range(64) if int(whole["rows"][i]) in rows and int(whole["views"][i]) in (1, 2)]
    assert 0 < len(kept) < 64
    assert rows[probe["rows"].astype(int)].tolist() == whole["rows"][kept].tolist()
    assert (probe["views"] + 1).tolist() == whole["views"][kept].tolist()
    pixels = whole["pixels"].reshape(64, -1)[kept]
    assert np.array_equal(probe["pixels"], pixels.ravel()) and np.array_equal(probe["shapes"], whole["shapes"][kept])
    (tmp_path / "one.txt").write_text(next(plain.samples.key(r) for r in range(ROWS) if r not in whole["rows"]))
    alone = cut(plain, tmp_path / "alone", samples=tmp_path / "one.txt")
    assert alone.reader.probe() == {} and not (tmp_path / "alone" / "probe.h5").exists()
    assert verify.run(tmp_path / "alone", full=True, quiet=True).state == "whole"


def test_everything_chosen_is_a_copy_in_one_round(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    quick_dump(policy=CROPPED, views=1)
    more = {"extend": True, "codec": None}
    quick_dump(**more, views=2)
    parent = quick_dump(**more, teacher=[f"{toy}:exact?seed=2&name=second"])
    assert len(parent.manifest.plan.rounds) == 3
    child = cut(parent, tmp_path / "copy")
    check_same(child, parent)
    plan = child.manifest.plan
    assert len(plan.rounds) == 1 and plan.samples == parent.manifest.plan.samples
    assert verify.run(tmp_path / "copy", full=True, replay=80, data=f"{toy}:images").notes


# ------------------------------------------------------------------------------------------------------------- choosing


def keys_of(cache: softcache.Cache, where: Callable[[int], bool]) -> list[str]:
    return [cache.samples.key(row) for row in range(len(cache)) if where(int(cache.samples.labels[row]))]


@pytest.mark.parametrize(
    ("choice", "where"),
    [
        pytest.param({"keep_labels": ("5",)}, lambda label: label == 5, id="index"),
        pytest.param({"keep_labels": ("3",)}, lambda label: label == 0, id="a name wins over an index"),
        pytest.param({"keep_labels": ("2-4", "class 9")}, lambda label: label in (2, 3, 4, 9), id="range and name"),
        pytest.param({"keep_labels": ("0-23",)}, lambda label: label >= 0, id="unlabelled samples are dropped"),
        pytest.param({"drop_labels": ("1-23",)}, lambda label: label <= 0, id="or stay"),
        pytest.param(
            {"keep_labels": ("0-9",), "drop_labels": ("5",)}, lambda label: 0 <= label < 10 and label != 5, id="both"
        ),
    ],
)
def test_samples_by_class(
    plain: softcache.Cache, pieces: str, choice: Mapping[str, Any], where: Callable[[int], bool], tmp_path: Path
) -> None:
    child = cut(plain, tmp_path / "child", **choice)
    found = [child.samples.key(row) for row in range(len(child))]
    assert found == keys_of(plain, where) and found
    from softcache.data.transfer_set import open_transfer_set

    assert set(open_transfer_set(f"{pieces}:images", **choice).keys) == set(found)  # the same words, the same samples


def test_several_labels_per_sample(pieces: str, tmp_path: Path) -> None:
    parent = dumped(pieces, tmp_path / "parent", data=f"{pieces}:images?multi=true&count=60")
    labels = parent.samples.labels_of(np.arange(60))
    kept = cut(parent, tmp_path / "kept", keep_labels=("3", "7-8"))
    assert rows_of(kept, parent).tolist() == np.flatnonzero(labels[:, [0, 7, 8]].any(axis=1)).tolist()
    dropped = cut(parent, tmp_path / "dropped", drop_labels=("4",))
    assert rows_of(dropped, parent).tolist() == np.flatnonzero(~labels[:, 4]).tolist()
    s = kept.manifest.statistics["a"]
    assert (s.labelled, s.correct, s.accuracy) == (0, 0, None) and s.entropy_sum > 0
    check_same(kept, parent)


@pytest.mark.parametrize("no_keys", [False, True])
def test_samples_by_a_list(quick_dump: QuickDump, tmp_path: Path, no_keys: bool) -> None:
    parent = quick_dump(no_keys=no_keys, order="natural")
    by_id = f"{int(parent.samples.ids[7]):016x}"
    (tmp_path / "list.txt").write_text(f"toy/0021\n\n{by_id}\ntoy/0003\ntoy/0021\n")
    child = cut(parent, tmp_path / "child", samples=tmp_path / "list.txt")
    assert rows_of(child, parent).tolist() == [3, 7, 21]
    assert child.samples.has_keys is not no_keys
    assert child.samples.key(2) == (f"{int(parent.samples.ids[21]):016x}" if no_keys else "toy/0021")
    check_same(child, parent)


MISTAKES = [
    (["--views", "3"], r"--views 3: is no range of this cache's views, 0 to 2", "both ends included"),
    (["--views", "2-1"], r"--views 2-1: is no range", "0-9"),
    (["--views", "0,2"], r"--views 0,2: is no range", "one contiguous range"),
    (["--views", "-1"], r"--views: expected one argument|--views -1: is no range", None),
    (["--members", "a,c"], r"no member 'c'", "known: a, b"),
    (["--members", ","], r"--members names nothing", "leave it out"),
    (["--keep-labels", "class 99"], r"no class 'class 99' among 24 classes", "did you mean"),
    (["--keep-labels", "20-24"], r"no class '20-24' among 24 classes", None),
    (["--drop-labels", "9-2"], r"no class '9-2' among 24 classes", None),
    (["--keep-labels", "5", "--drop-labels", "5"], r"none of its 520 samples is selected", "loosen --keep-labels"),
    (["--samples", "none.txt"], r"none.txt: cannot be read as a list of keys", "UTF-8"),
    (["--samples", "empty.txt"], r"none of its 520 samples is selected", "loosen"),
    (
        ["--samples", "unknown.txt"],
        r"2 of 3 keys are not in the cache: other/1, 00000000000000ff",
        "as this cache has them",
    ),
    (["--id", "abc"], r"0 manifests match id 'abc'", None),
    (["--codec", "int8"], r"unrecognized arguments: --codec int8", "--help"),
]


@pytest.mark.parametrize(("arguments", "message", "tip"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes(
    plain: softcache.Cache,
    arguments: Sequence[str],
    message: str,
    tip: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("unknown.txt").write_text("some/1\nother/1\n00000000000000ff\n")
    assert cli.main(["subset", str(plain.reader.path), "child", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert tip is None or tip in error
    assert not Path("child").exists()


def test_out_must_be_a_place_of_its_own(
    plain: softcache.Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plain.reader.path
    before = files_of(path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "link").symlink_to(path)
    for out, said in {
        path: "lies in the cache itself",
        path / "inner": "lies in the cache itself",
        tmp_path / "link": "lies in the cache itself",
        tmp_path / "file": "is a file",
        tmp_path / "full": "holds files that no dump wrote",
    }.items():
        assert cli.main(["subset", str(path), str(out), "--views", "0"]) == 2
        assert said in capsys.readouterr().err
    assert files_of(path) == before
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_the_command_tells_what_it_wrote(
    plain: softcache.Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "subset",
        str(plain.reader.path),
        str(tmp_path / "child"),
        "--members",
        "b",
        "--members",
        "a",
        "--views",
        "2",
    ]
    assert cli.main([*argv, "--keep-labels", "0-4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    child = softcache.open(tmp_path / "child")
    assert found == {
        "path": str(tmp_path / "child"),
        "id": child.id,
        "parent": plain.id,
        "bytes": child.manifest.nbytes,
        "samples": len(child),
        "views": 1,
        "members": ["a", "b"],
    }
    assert cli.main([*argv, "--keep-labels", "0-4"]) == 0  # again: it is there already
    shown = capsys.readouterr().out
    assert f"{len(child)} samples x 1 view of a, b" in shown and child.id in shown and plain.id in shown
    assert cli.main(["inspect", str(tmp_path / "child")]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"taken out of +{plain.id}", shown) and re.search(r"licence +cc-by-4\.0", shown)


def test_the_licence_is_the_parents_unless_another_is_given(plain: softcache.Cache, tmp_path: Path) -> None:
    assert cut(plain, tmp_path / "same", views="0").manifest.plan.license == "cc-by-4.0"
    argv = ["subset", str(plain.reader.path), str(tmp_path / "other"), "--views", "0", "--license", "for us only"]
    assert cli.main([*argv, "--json"]) == 0
    assert softcache.open(tmp_path / "other").manifest.plan.license == "for us only"


# ----------------------------------------------------------------------------------------------------- living with it


def trained(pieces: str, cache: Path, out: Path, data: str = "images", **settings: Any) -> list[Mapping[str, Any]]:
    config = TrainConfig(
        data=f"{pieces}:{data}",
        student="softcache:mlp?hidden=4",
        cache=str(cache),
        epochs=settings.pop("epochs", 1),
        threads=1,
        out=str(out),
        **({"loss": ("kd:temperature=4",)} | settings),
    )
    return list(train.run(config, quiet=True).metrics)


def test_a_subset_of_a_subset(plain: softcache.Cache, pieces: str, tmp_path: Path) -> None:
    child = cut(plain, tmp_path / "child", views="1-2", drop_labels=("5",), members=("b",))
    (tmp_path / "list.txt").write_text("".join(f"{child.samples.key(row)}\n" for row in range(0, len(child), 3)))
    grandchild = cut(child, tmp_path / "grandchild", views="1", samples=tmp_path / "list.txt")
    check_same(grandchild, child, first_view=1)
    check_same(grandchild, plain, first_view=2)
    plan = grandchild.manifest.plan
    assert plan.views.first == 2 and plan.parent is not None and plan.parent.id == child.id
    assert plan.parent.statistics == {"b": plain.manifest.statistics["b"]}  # what was measured at the dump
    verdict = verify.run(tmp_path / "grandchild", full=True, replay=10_000, data=f"{pieces}:images")
    assert verdict.state == "whole"
    assert verdict.notes == [f"replay: {len(grandchild)} views render bit for bit as the teacher saw them"]
    metrics = trained(pieces, tmp_path / "grandchild", tmp_path / "run", samples=str(tmp_path / "list.txt"))
    assert metrics[0]["loss"] > 0


def test_views_that_do_not_begin_with_the_first_train_as_in_the_parent(
    plain: softcache.Cache, pieces: str, tmp_path: Path
) -> None:
    """The same pixels, the same targets: the same losses as the parent's view 1 gives."""
    cut(plain, tmp_path / "child", views="1")
    settings = {"members": ("a",), "check_content": "full"}
    mine = trained(pieces, tmp_path / "child", tmp_path / "run", view=0, **settings)
    theirs = trained(pieces, plain.reader.path, tmp_path / "other", view=1, **settings)
    assert [row["loss"] for row in mine] == [row["loss"] for row in theirs]
    other = trained(pieces, plain.reader.path, tmp_path / "third", view=0, **settings)
    assert [row["loss"] for row in mine] != [row["loss"] for row in other]


@pytest.mark.slow
def test_under_mixing_views_and_members_can_be_chosen_but_no_samples(pieces: str, tmp_path: Path) -> None:
    parent = dumped(
        pieces, tmp_path / "parent", data=f"{pieces}:images?count=50", policy=(*CROPPED, "cutmix"), features=()
    )
    with pytest.raises(ConfigError, match=r"mixed .* with partners drawn from the whole sample table") as caught:
        cut(parent, tmp_path / "fewer", keep_labels=("0-9",))
    assert "train --cache on the whole cache" in caught.value.tip
    assert not (tmp_path / "fewer").exists()
    child = cut(parent, tmp_path / "child", views="1-2", members=("a",), drop_labels=())
    check_same(child, parent, first_view=1)
    verdict = verify.run(tmp_path / "child", full=True, replay=100, data=f"{pieces}:images?count=50")
    assert verdict.notes == ["replay: 100 views render bit for bit as the teacher saw them"]
    assert trained(pieces, tmp_path / "child", tmp_path / "run", "images?count=50")[0]["loss"] > 0


@pytest.mark.parametrize("first", [0, 1])
def test_a_subset_grows_by_the_parents_next_views(quick_dump: QuickDump, toy: Path, tmp_path: Path, first: int) -> None:
    parent = quick_dump(policy=CROPPED, views=3)
    cut(parent, tmp_path / "child", views=str(first), keep_labels=("0-1",))
    child = quick_dump(out="child", extend=True, codec=None, views=3 - first, keep_labels=("0-1",))
    assert child.num_views == 3 - first and child.manifest.plan.views.first == first
    check_same(child, parent, first_view=first)
    assert child.manifest.plan.parent is not None and child.manifest.plan.parent.id == parent.id
    verdict = verify.run(tmp_path / "child", full=True, replay=1000, data=f"{toy}:images")
    assert verdict.state == "whole" and "bit for bit" in verdict.notes[0]
    grandchild = cut(child, tmp_path / "grandchild", views="1")
    check_same(grandchild, parent, first_view=first + 1)


def test_a_moved_renamed_read_only_subset_opens_verifies_and_trains(
    plain: softcache.Cache, pieces: str, tmp_path: Path
) -> None:
    made = cut(plain, tmp_path / "child", views="0-1")
    (tmp_path / "another disk").mkdir()
    moved = tmp_path / "another disk" / "renamed"
    shutil.move(tmp_path / "child", moved)
    for path in [moved, *moved.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [moved, *moved.rglob("*")]}
    try:
        cache = softcache.open(moved)
        assert cache.id == made.id
        check_same(cache, plain)
        assert verify.run(moved, full=True, replay=20, data=f"{pieces}:images").state == "whole"
        assert trained(pieces, moved, tmp_path / "run", epochs=2)[-1]["loss"] > 0
        after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [moved, *moved.rglob("*")]}
        assert after == before
        again = cut(cache, tmp_path / "again", views="1")
        check_same(again, plain, first_view=1)
    finally:
        for path in [moved, *(path for path in moved.rglob("*") if path.is_dir())]:
            path.chmod(0o755)


# ------------------------------------------------------------------------------------------- bytes, interruptions, damage


@pytest.mark.parametrize("codec", ["float16", "lowrank:max_kl=0.001,at_temperature=4"])
def test_the_same_choice_gives_the_same_bytes(
    parents: Callable[[str], softcache.Cache],
    codec: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice: dict[str, Any] = {"views": "0-1", "drop_labels": ("0-5",), "sizes": SMALL_PARTS}
    one = cut(parents(codec), tmp_path / "one", **choice)
    measure, threads = copy_records.stored_statistics, set()

    def watched(*arguments: Any) -> MemberStatistics:
        threads.add(torch.get_num_threads())
        return measure(*arguments)

    monkeypatch.setattr(copy_records, "stored_statistics", watched)
    torch.set_num_threads(2)
    try:
        two = cut(parents(codec), tmp_path / "two", **choice)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == {1}  # larger sums than these would differ in their last bits
    assert one.id == two.id and files_of(tmp_path / "one") == files_of(tmp_path / "two")
    other = cut(parents(codec), tmp_path / "other", **(choice | {"views": "1-2"}))
    assert other.id != one.id


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C when that many parts are written."""
    write, written = subset._write_span, []

    def interrupted(*arguments: Any) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(None)
        write(*arguments)

    monkeypatch.setattr(subset, "_write_span", interrupted)


def test_an_interrupted_subset_goes_on(
    parents: Callable[[str], softcache.Cache],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent = parents("lowrank:max_kl=0.001,at_temperature=4")

    def ask(out: str) -> None:
        choice = Choice(views="0-1", drop_labels=("5",))
        subset.run(parent.reader.path, tmp_path / out, choice, **SMALL_PARTS)

    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            ask("cut")
    with pytest.raises(
        UnfinishedCacheError, match=r"the subset is not finished: 1 of 2 spans(.|\n)*`softcache subset`"
    ):
        softcache.open(tmp_path / "cut")
    with pytest.raises(PlanMismatchError, match="started with another plan"):
        cut(parent, tmp_path / "cut", SMALL_PARTS, views="0-2", drop_labels=("5",))
    first = tmp_path / "cut" / "members" / "a" / "part-00000.h5"
    written = first.stat().st_mtime_ns
    capsys.readouterr()
    ask("cut")
    assert "1 of 2 spans are there already" in capsys.readouterr().err
    assert first.stat().st_mtime_ns == written
    ask("whole")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_it_goes_on_from_the_parent_it_began_with(
    quick_dump: QuickDump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = quick_dump(policy=CROPPED, views=1)
    with monkeypatch.context() as patch:
        interrupt(patch, after=0)
        with pytest.raises(KeyboardInterrupt):
            cut(parent, tmp_path / "child")
    assert quick_dump(extend=True, codec=None, views=2).id != parent.id
    child = cut(parent, tmp_path / "child")
    assert child.num_views == 1 and child.manifest.plan.parent is not None
    assert child.manifest.plan.parent.id == parent.id
    newer = cut(parent, tmp_path / "newer")
    assert newer.num_views == 2
    older = subset.run(parent.reader.path, tmp_path / "older", Choice(), id=parent.id[:10], quiet=True)
    assert older.id == child.id


def test_few_rows_are_held_at_once(plain: softcache.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, sizes = CacheReader.gather, []

    def watched(self: CacheReader, member: str | None, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        sizes.append(len(rows))
        return gather(self, member, name, rows, views)

    monkeypatch.setattr(CacheReader, "gather", watched)
    child = cut(plain, tmp_path / "child", {"batch_rows": 100}, drop_labels=("7",))
    assert max(sizes) == 100
    sizes.clear()
    cut(plain, tmp_path / "smaller", {"batch_rows": 100, "batch_logits": 24 * 17}, drop_labels=("7",))
    assert max(sizes) == 17
    check_same(child, plain)


def test_a_parent_read_out_of_order_would_be_seen(
    plain: softcache.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are asked for in ascending order within a view, so that a disk is read from front to back."""
    gather, asked = CacheReader.gather, []

    def watched(self: CacheReader, member: str | None, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        if member == "a" and name == "eps":
            asked.append((int(views[0]), rows.tolist()))
            assert len(set(views.tolist())) == 1
        return gather(self, member, name, rows, views)

    monkeypatch.setattr(CacheReader, "gather", watched)
    cut(plain, tmp_path / "child", drop_labels=("7",))
    for view in range(VIEWS):
        rows = [row for one, batch in asked if one == view for row in batch]
        assert rows == sorted(rows) and len(rows) > 256


DAMAGED = {
    "samples.h5": "ids",
    "probe.h5": "pixels",
    "members/a/constants.h5": "codec_basis",
    "members/a/part-00001.h5": "records",
    "members/a/dense-00001.h5": "logits",
    "views/part-00002.h5": "pixel_digests",
}


@pytest.mark.parametrize("relative", DAMAGED)
def test_a_damaged_parent_is_refused(parents: Callable[[str], softcache.Cache], tmp_path: Path, relative: str) -> None:
    parent = parents("lowrank:max_kl=0.001,at_temperature=4")
    shutil.copytree(parent.reader.path, tmp_path / "parent")
    (file,) = (file for file in parent.manifest.files if file.path == relative)
    data = bytearray((tmp_path / "parent" / relative).read_bytes())
    data[file.arrays[DAMAGED[relative]].offset + 5] ^= 16
    (tmp_path / "parent" / relative).write_bytes(data)
    with pytest.raises(DamagedCacheError, match=relative):
        subset.run(tmp_path / "parent", tmp_path / "child", Choice(drop_labels=("5",)), quiet=True)
    assert not (tmp_path / "child" / "manifest.json").exists()


def test_what_is_not_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such folder"):
        subset.run(tmp_path / "none", tmp_path / "child", Choice(), quiet=True)
    assert not (tmp_path / "child").exists()


def test_provenance_keeps_the_data_set(plain: softcache.Cache, pieces: str, tmp_path: Path) -> None:
    cut(plain, tmp_path / "child", views="0", drop_labels=("5",))
    told = json.loads((tmp_path / "child" / "provenance.json").read_text())
    assert told["command"]["data"] == f"{pieces}:images" and told["command"]["drop_labels"] == ["5"]
    assert {"host", "finished", "seconds", "views_per_s", "python"} < set(told)
    shutil.copytree(tmp_path / "child", tmp_path / "bare", ignore=shutil.ignore_patterns("provenance.json", "dump"))
    cut(softcache.open(tmp_path / "bare"), tmp_path / "grandchild")
    assert json.loads((tmp_path / "grandchild" / "provenance.json").read_text())["command"]["data"] is None


# --- of version 2: whatever has an index


@pytest.mark.parametrize(
    ("views", "members", "indexes"),
    [
        (
            "1-2",
            ("tagger", "segmenter", "ranker", "embedder", "layers", "strided"),
            ["words", "cells", "list", "coarse"],
        ),
        ("0", ("strided",), ["words", "coarse"]),  # labels of words are part of who the samples are
    ],
)
def test_a_subset_of_a_cache_of_indexes(
    tmp_path: Path, views: str, members: tuple[str, ...], indexes: list[str]
) -> None:
    indexed = importlib.import_module("golden.indexed")
    parent = Path(__file__).parents[1] / "golden" / "indexed"
    keys, first = [f"toy/{row:04d}" for row in (2, 3, 8, 9, 11, 19)], int(views[0])
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    choice = Choice(views=views, members=members, samples=tmp_path / "keys.txt")
    manifest = subset.run(parent, tmp_path / "child", choice, quiet=True, batch_rows=2)
    assert verify.run(tmp_path / "child", full=True, quiet=True).faults == []
    child = CacheReader(tmp_path / "child")
    assert [index.name for index in manifest.plan.indexes] == indexes
    assert bool(child.candidates()) == ("list" in indexes)
    rows = np.arange(len(keys))
    for view in range(manifest.plan.views.count):
        for member in members:
            for name in indexed.MEMBERS[member][1]:
                at = (rows, np.full(len(rows), view))
                plain = indexed.index_of(member, name) is None
                found = child.gather(member, name, *at) if plain else child.slices(member, name, *at).values
                wanted = indexed.records_of(member, name, [int(key[-4:]) for key in keys], first + view)
                assert found.tobytes() == wanted.tobytes(), (member, name, view)
    labels = child.index("words").labels(rows, np.zeros_like(rows)).values.tolist()
    assert labels == [label for key in keys for label in indexed.labels_of(int(key[-4:]))]
    counted = {name: s.records for name, s in manifest.statistics.items()}
    of_strided = [(int(key[-4:]), first + view) for key in keys for view in range(manifest.plan.views.count)]
    assert counted["strided"] == sum(len(indexed.listed_of("coarse", *place)) for place in of_strided)

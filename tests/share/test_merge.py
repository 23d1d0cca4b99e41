"""Merged caches are what one dump would have been: members and views in its bytes, other samples record for record."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from words_cache import sentences

import softcache
from softcache import cli, dump, train
from softcache.cache.canonical import canonical_json
from softcache.cache.plan_rules import GateError, check_plan
from softcache.cache.positions import Positions, build_positions
from softcache.cache.reader import CacheReader
from softcache.check import repair, verify
from softcache.check.repair import Means
from softcache.config import DumpConfig, TrainConfig
from softcache.data import views as view_steps
from softcache.data.identity import pixel_digest
from softcache.data.transfer_set import open_transfer_set
from softcache.dump.output_scale import measure_scale
from softcache.errors import (
    CacheError,
    DamagedCacheError,
    DiskSpaceError,
    PlanMismatchError,
    UnfinishedCacheError,
)
from softcache.files import durable
from softcache.share import diff, merge, subset
from softcache.share.merge_samples import joined_positions, pooled_scale
from softcache.share.subset import Choice

sys.path.append(str(Path(__file__).parents[2] / "tools"))

TOY, BENT = WORLDS / "toy.py", WORLDS / "bent.py"
POLICY = ("shift:pixels=1",)
OTHER = WORLDS / "numbers.py"
DATA_OF_EMBEDDERS, EMBEDDER = f"{OTHER}:images", f"{OTHER}:embedder?output=embedding"
A, B = f"{TOY}:exact?name=a", f"{TOY}:exact?seed=2&name=b"
LOWRANK = "lowrank:max_kl=0.001,at_temperature=4"


def merged(out: Path, *caches: softcache.Cache, **settings: Any) -> softcache.Cache:
    merge.run([cache.reader.path for cache in caches], out, quiet=True, **settings)
    return softcache.open(out, quiet=True)


def files_of(path: Path) -> dict[str, bytes]:
    """Everything of a cache that its id covers, its manifests and its card."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "provenance.json" and file.relative_to(path).parts[0] != "dump"
    }


def is_whole(path: Path) -> None:
    verdict = verify.run(path, full=True, quiet=True)
    assert verdict.state == "whole", verdict.faults


# ------------------------------------------------------------------------------------------------------- members and views

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"codec": "float32"},
    "version 2": {"codec": "int8", "format": "2", "license": "cc-by-4.0"},
    "several parts, dense rows and a feature": {
        "codec": LOWRANK,
        "data": f"{BENT}:images",
        "teacher": f"{BENT}:bent?bright=true",
        "features": ("first:flatten",),
        "shard_rows": 256,
    },
}


LISTED = [pytest.param(kind, id=name, marks=[pytest.mark.slow] * ("data" in kind)) for name, kind in KINDS.items()]


def dumps_of(quick_dump: QuickDump, kind: Mapping[str, Any]) -> Callable[..., softcache.Cache]:
    """make(out, seed of a teacher, ...): a dump of a kind; the extension of one keeps what the cache has fixed."""
    settings = {"teacher": f"{TOY}:exact?", "policy": POLICY, "views": 2} | kind
    teacher = settings.pop("teacher")

    def make(out: str, *seeds: int, **more: Any) -> softcache.Cache:
        asked = settings | more
        if asked.get("extend"):  # what the cache has fixed is not asked for again
            fixed = {"policy", "format", "license"} | ({"codec", "features"} if "views" in more else {"views"})
            asked = {"codec": None} | {key: value for key, value in asked.items() if key not in fixed}
        joint = "" if teacher.endswith("?") else "&"
        specs = [f"{teacher}{joint}seed={seed}&name=teacher-{seed}" for seed in seeds]
        return quick_dump(teacher=specs, out=out, **asked)

    return make


@pytest.mark.parametrize("kind", LISTED)
def test_members_are_those_of_a_dump_and_its_extension(
    quick_dump: QuickDump, tmp_path: Path, kind: Mapping[str, Any]
) -> None:
    make = dumps_of(quick_dump, kind)
    first = make("one", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "extended")
    extended = make("extended", 2, extend=True)
    made = merged(tmp_path / "merged", first, make("two", 2))
    assert made.id == extended.id and made.members == ("teacher-1", "teacher-2")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "extended")
    is_whole(tmp_path / "merged")
    assert softcache.open(tmp_path / "merged", id=first.id).members == ("teacher-1",)  # its files are all there


@pytest.mark.parametrize("kind", LISTED)
def test_views_are_those_of_a_dump_and_its_extension(
    quick_dump: QuickDump, tmp_path: Path, kind: Mapping[str, Any]
) -> None:
    make = dumps_of(quick_dump, kind)
    first = make("one", 1, 2)
    shutil.copytree(tmp_path / "one", tmp_path / "extended")
    extended = make("extended", 1, 2, extend=True, views=5)
    later = make("later", 2, 1, first_view=2, views=3)  # the members in another order
    made = merged(tmp_path / "merged", first, later)
    assert made.id == extended.id and made.num_views == 5
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "extended")
    is_whole(tmp_path / "merged")


def test_taggers_are_those_of_a_dump_and_its_extension(quick_dump: QuickDump, tmp_path: Path) -> None:
    """The index of their words is there once."""
    data = sentences(tmp_path / "s.jsonl")
    one, other = ([f"{WORLDS / 'words.py'}:tagger?seed={seed}&scale=8&name=t{seed}"] for seed in (1, 2))
    first = quick_dump(data=data, teacher=one, out="one")
    shutil.copytree(tmp_path / "one", tmp_path / "extended")
    extended = quick_dump(data=data, teacher=other, out="extended", extend=True)
    made = merged(tmp_path / "merged", first, quick_dump(data=data, teacher=other, out="two"))
    assert made.id == extended.id and files_of(tmp_path / "merged") == files_of(tmp_path / "extended")
    is_whole(tmp_path / "merged")


@pytest.mark.slow
def test_three_caches_are_merged_in_their_order(quick_dump: QuickDump, tmp_path: Path) -> None:
    make = dumps_of(quick_dump, KINDS["float32"])
    first, later = make("one", 1), make("later", 1, first_view=2)
    other = make("other", 2, views=4)
    made = merge.run([tmp_path / name for name in ("one", "later", "other")], tmp_path / "merged", quiet=True)
    assert made.how == "views and members"
    shutil.copytree(tmp_path / "one", tmp_path / "extended")
    make("extended", 1, extend=True, views=4)
    extended = make("extended", 2, extend=True)
    assert made.manifest.id == extended.id
    with pytest.raises(CacheError, match=r"one with .*later and .*cannot be merged: views.count is 4 in .* and 2 in"):
        merged(tmp_path / "x", first, later, make("short", 3))
    assert other.id != extended.id


@pytest.mark.slow
def test_views_of_a_subset_are_merged_again(quick_dump: QuickDump, tmp_path: Path) -> None:
    parent = dumps_of(quick_dump, KINDS["float32"])("whole", 1, views=4)
    parts = []
    for views in ("0-1", "2-3"):
        subset.run(parent.reader.path, tmp_path / views, Choice(views=views), quiet=True)
        parts.append(softcache.open(tmp_path / views))
    made = merged(tmp_path / "merged", *parts)
    rows = np.arange(len(made))
    for view in range(4):
        views = np.full(len(rows), view)
        assert torch.equal(made.gather(rows, views).logits(), parent.gather(rows, views).logits())
    plan = made.manifest.plan
    assert plan.parent is not None and plan.parent.id == parent.id
    assert plan.parent.statistics == {"teacher-1": parent.manifest.statistics["teacher-1"]}
    with pytest.raises(CacheError, match=r"views.first is 2 in the first and 0 in the second"):
        merged(tmp_path / "turned", *reversed(parts))


def test_a_name_that_is_taken_gets_a_number(quick_dump: QuickDump, tmp_path: Path) -> None:
    """As an extension names a teacher that nobody named."""
    first = quick_dump(out="one", teacher=[f"{TOY}:exact"])
    shutil.copytree(tmp_path / "one", tmp_path / "extended")
    extended = quick_dump(out="extended", teacher=[f"{TOY}:exact?seed=2"], extend=True)
    made = merged(tmp_path / "merged", first, quick_dump(out="two", teacher=[f"{TOY}:exact?seed=2"]))
    assert made.members == ("exact", "exact-2") and made.id == extended.id


# ---------------------------------------------------------------------------------------------------------------- samples

HALVES = (("0-1",), ("2-3",))


def halves(quick_dump: QuickDump, labels: Sequence[Sequence[str]] = HALVES, **settings: Any) -> list[softcache.Cache]:
    settings = {"policy": POLICY, "views": 2, "teacher": [A, B]} | settings
    return [quick_dump(out=f"half-{number}", keep_labels=one, **settings) for number, one in enumerate(labels)]


PLAIN = [f"{BENT}:bent?name=a", f"{BENT}:bent?seed=2&name=b"]  # whose final layer gives the logits
BENT_HALVES: dict[str, Any] = {
    "data": f"{BENT}:images",
    "teacher": [f"{BENT}:bent?name=a&bright=true", f"{BENT}:bent?seed=2&name=b"],
    "features": ("first:flatten",),
    "labels": (("0-11",), ("12-23",)),
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"codec": "float32"}, id="float32"),
        pytest.param({"codec": "headtail:k=2,bits=4", "format": "2"}, id="version 2"),
        pytest.param(BENT_HALVES | {"codec": "topk:k=3"}, id="topk, with a feature", marks=pytest.mark.slow),
        pytest.param(
            BENT_HALVES | {"codec": "linear_head:dtype=int8", "no_keys": True, "teacher": PLAIN},
            id="without keys",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_record_of_other_samples_is_its_parents(
    quick_dump: QuickDump, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    parents = halves(quick_dump, **settings)
    made = merged(tmp_path / "merged", *parents, shard_rows=256)
    is_whole(tmp_path / "merged")
    assert made.samples.ids.tolist() == [int(one) for parent in parents for one in parent.samples.ids]
    start = 0
    for parent in parents:
        theirs, mine = np.arange(len(parent)), np.arange(start, start + len(parent))
        start += len(parent)
        assert [made.samples.key(row) for row in mine] == [parent.samples.key(row) for row in theirs]
        assert np.array_equal(made.samples.labels[mine], parent.samples.labels)
        assert np.array_equal(made.samples.digests[mine], parent.samples.digests)
        for view in range(2):
            views = np.full(len(theirs), view)
            names = [("a", name) for name in parent.reader.array_kinds("a")] + [(None, "pixel_digests")]
            for member, name in names:
                x = made.reader.gather(member, name, mine, views)
                assert x.tobytes() == parent.reader.gather(member, name, theirs, views).tobytes(), name
            for member in ("a", "b"):
                features = [feature.name for feature in parent.member(member).features]
                found = made.gather(mine, views, members=[member], features=features)
                wanted = parent.gather(theirs, views, members=[member], features=features)
                assert torch.equal(found.log_probs(member, 2.0), wanted.log_probs(member, 2.0))
                for feature in features:
                    assert torch.equal(found.feature(feature, member), wanted.feature(feature, member))
    plan = made.manifest.plan
    assert (plan.format, plan.samples.order, plan.samples.count) == (2, "merged", start)
    assert [one.id for one in plan.parents] == [parent.id for parent in parents]
    for one, parent in zip(plan.parents, parents, strict=True):
        assert one.statistics == parent.manifest.statistics
    for name, array in parents[0].reader.constants("a").items():
        assert np.array_equal(made.reader.constants("a")[name], array)


def test_teachers_are_known_by_their_weights_whatever_they_are_called(quick_dump: QuickDump, tmp_path: Path) -> None:
    first = quick_dump(out="low", keep_labels=("0-1",), teacher=[A, B])
    swapped = [f"{TOY}:exact?seed=2&name=a", f"{TOY}:exact?name=b"]
    second = quick_dump(out="high", keep_labels=("2-3",), teacher=swapped)
    made = merged(tmp_path / "merged", first, second)
    rows, zeros = np.arange(len(second)), np.zeros(len(second), np.int64)
    found = made.gather(made.find([second.samples.key(row) for row in rows]), zeros)
    assert torch.equal(found.logits("a"), second.gather(rows, zeros).logits("b"))
    assert made.manifest.plan.parents[1].statistics["a"] == second.manifest.statistics["b"]
    assert made.manifest.plan.member("a").fingerprint == second.manifest.plan.member("b").fingerprint


def test_statistics_are_those_of_the_stored_records(quick_dump: QuickDump, tmp_path: Path) -> None:
    made = merged(tmp_path / "merged", *halves(quick_dump))
    rows, views = np.divmod(np.arange(len(made) * 2), 2)
    logits = made.gather(rows, views, members=["a"]).logits("a").double().numpy()
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    s, labels = made.manifest.statistics["a"], made.samples.labels_of(rows)
    assert (s.records, s.labelled, s.measured, s.floored) == (len(rows), len(rows), 0, 0)
    assert s.correct == int((logits.argmax(axis=1) == labels).sum())
    assert s.entropy_sum == pytest.approx(float(-(p * np.log(np.maximum(p, 1e-300))).sum()), rel=1e-6)


@pytest.mark.slow
def test_dense_rows_are_counted_anew(quick_dump: QuickDump, tmp_path: Path) -> None:
    """A codec that was fitted, on the same rows: of a subset and its rest."""
    whole = quick_dump(**{k: v for k, v in BENT_HALVES.items() if k != "labels"}, codec=LOWRANK, policy=POLICY)
    parts = []
    for name, choice in (("low", Choice(keep_labels=("0-11",))), ("rest", Choice(drop_labels=("0-11",)))):
        subset.run(whole.reader.path, tmp_path / name, choice, quiet=True)
        parts.append(softcache.open(tmp_path / name))
    made = merged(tmp_path / "merged", *parts, shard_rows=256)
    is_whole(tmp_path / "merged")
    assert made.manifest.statistics["a"].dense == whole.manifest.statistics["a"].dense > 0
    rows = whole.find([made.samples.key(row) for row in range(len(made))])
    zeros = np.zeros(len(rows), np.int64)
    found = made.gather(np.arange(len(rows)), zeros).logits("a")
    assert torch.equal(found, whole.gather(rows, zeros).logits("a"))
    before = made.manifest.plan.measured_before("a")
    assert before == whole.manifest.statistics["a"]  # once, though both parts were measured then


def test_what_whitens_no_more_and_was_made_otherwise_is_told_and_recorded(
    quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by = {"data": DATA_OF_EMBEDDERS, "teacher": [EMBEDDER], "codec": "float32", "whiten": True}
    keys = open_transfer_set(DATA_OF_EMBEDDERS).keys
    for number, chosen in enumerate((keys[:40], keys[40:])):
        (tmp_path / f"{number}.txt").write_text("".join(f"{key}\n" for key in chosen))
        size = {"batch_size": 8 + number}
        quick_dump(out=f"w{number}", samples=str(tmp_path / f"{number}.txt"), **made_by, **size)
    capsys.readouterr()
    assert cli.main(["merge", *(str(tmp_path / name) for name in ("w0", "w1", "out"))]) == 0
    told = capsys.readouterr().err
    assert "what whitens it (--whiten) is left out" in told
    assert f"different batch size: 8 in {tmp_path / 'w0'}, 9 in {tmp_path / 'w1'}" in told
    notes = json.loads((tmp_path / "out" / "provenance.json").read_text())["command"]["notes"]
    assert len(notes) == 2 and all(note in told for note in notes)
    found = softcache.open(tmp_path / "out", quiet=True).reader.constants("embedder")
    assert {"output_mean", "output_deviation"} <= {*found} and "output_whitening" not in found


def test_words_of_other_sentences_are_merged(quick_dump: QuickDump, tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.jsonl")
    teacher = [f"{WORLDS / 'words.py'}:tagger?seed=1&scale=8&name=a"]
    keys = open_transfer_set(data).keys
    parents = []
    for number, chosen in enumerate((keys[:17], keys[17:])):
        (tmp_path / f"{number}.txt").write_text("".join(f"{key}\n" for key in chosen))
        parents.append(quick_dump(data=data, teacher=teacher, out=f"{number}", samples=str(tmp_path / f"{number}.txt")))
    made = merged(tmp_path / "merged", *parents)
    is_whole(tmp_path / "merged")
    for parent in parents:
        rows, zeros = np.arange(len(parent)), np.zeros(len(parent), np.int64)
        mine = made.find([parent.samples.key(row) for row in rows])
        x, y = made.gather(mine, zeros), parent.gather(rows, zeros)
        assert torch.equal(x.per_position("words").logits("a"), y.per_position("words").logits("a"))
        assert np.array_equal(x.positions["words"].labels, y.positions["words"].labels)
    whole = quick_dump(data=data, teacher=teacher, out="whole")
    assert made.manifest.plan.samples.fingerprint == whole.manifest.plan.samples.fingerprint
    found, wanted = (one.manifest.statistics["a"] for one in (made, whole))
    assert (found.records, found.labelled, found.correct) == (wanted.records, wanted.labelled, wanted.correct)


@pytest.mark.slow
def test_probes_keep_their_pixels_and_say_where_they_are(quick_dump: QuickDump, tmp_path: Path) -> None:
    parents = halves(quick_dump)
    made = merged(tmp_path / "merged", *parents)
    probe = made.reader.probe()
    assert 0 < len(probe["rows"]) <= 64 and len(set(probe["rows"] >= len(parents[0]))) == 2
    verdict = verify.run(tmp_path / "merged", full=True, replay=1000, data=f"{TOY}:images")
    assert verdict.state == "whole" and "bit for bit" in verdict.notes[0]
    side = probe["pixels"].reshape(len(probe["rows"]), 8, 8)
    digests = made.reader.gather(None, "pixel_digests", probe["rows"].astype(int), probe["views"].astype(int))
    assert digests.tolist() == [pixel_digest(picture) for picture in side]


def test_a_pooled_scale_is_that_of_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, 3, generator=draw, dtype=torch.float64) * n + n for n in (5, 11, 4)]
    each = [{f"output_{k}": v.numpy() for k, v in measure_scale(x, whiten=True).items()} for x in pieces]
    found = pooled_scale(each, [len(x) for x in pieces])
    wanted = measure_scale(torch.cat(pieces), whiten=False)
    assert set(found) == {"output_mean", "output_deviation"}
    for name, value in wanted.items():
        assert np.allclose(found[f"output_{name}"], value.numpy(), rtol=1e-5)
    same = pooled_scale([each[0], each[0]], [5, 5])
    assert np.array_equal(same["output_whitening"], each[0]["output_whitening"])
    assert pooled_scale([each[0], {}], [5, 5]) == {}


def test_every_kind_of_index_is_merged_but_that_of_candidates(tmp_path: Path) -> None:
    indexed = importlib.import_module("golden.indexed")
    parent, members = WORLDS.parent / "golden" / "indexed", ("tagger", "segmenter", "embedder", "layers", "strided")
    halves, rows = [], [[2, 3, 8, 9, 19], [0, 4, 5, 11]]
    for number, chosen in enumerate(rows):
        (tmp_path / "keys.txt").write_text("".join(f"toy/{row:04d}\n" for row in chosen))
        for name, kept in (("all", ()), ("some", members)):
            choice = Choice(members=kept, samples=tmp_path / "keys.txt")
            subset.run(parent, tmp_path / f"{name}-{number}", choice, quiet=True)
        halves.append(softcache.open(tmp_path / f"some-{number}", quiet=True))
    made = merged(tmp_path / "merged", *halves)
    is_whole(tmp_path / "merged")
    order = [int(made.samples.key(row)[-4:]) for row in range(len(made))]
    assert sorted(order) == sorted(rows[0] + rows[1])
    everything = np.arange(len(made))
    for view in range(3):
        at = (everything, np.full(len(made), view))
        for member in members:
            for name in indexed.MEMBERS[member][1]:
                plain = indexed.index_of(member, name) is None
                read = made.reader.gather if plain else lambda *where: made.reader.slices(*where).values
                assert read(member, name, *at).tobytes() == indexed.records_of(member, name, order, view).tobytes()
        shapes = made.reader.index("cells").shapes(*at).tolist()
        assert shapes == [list(indexed.shape_of("cells", row, view)) for row in order]
        listed = made.reader.index("coarse").positions(*at).values.tolist()
        assert listed == [place for row in order for place in indexed.listed_of("coarse", row, view)]
    labels = made.reader.index("words").labels(everything, np.zeros_like(everything)).values.tolist()
    assert labels == [label for row in order for label in indexed.labels_of(row)]
    with pytest.raises(CacheError, match="all-0: cannot be merged with other samples: index 'list' is of candidates"):
        merge.run([tmp_path / "all-0", tmp_path / "all-1"], tmp_path / "out", quiet=True)


@pytest.mark.parametrize("views", [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_joined_positions_are_those_of_a_plain_loop(views: tuple[int, int]) -> None:
    draw, made, rows_of = np.random.default_rng(0), [], []
    for count, m in zip((4, 3), views, strict=True):
        lengths = draw.integers(0, 4, (m, count))
        labels = draw.integers(-1, 5, int(lengths.sum()))
        made.append(build_positions(lengths, labels=labels))
        ends = np.cumsum([0, *lengths.reshape(-1)])
        of_view = [[labels[ends[v * count + r] : ends[v * count + r + 1]] for r in range(count)] for v in range(m)]
        rows_of.append([of_view[v if m > 1 else 0] for v in range(3)])
    found: Positions = joined_positions(made)
    for view in range(3):
        at = view if len(found.offsets) > 1 else 0
        wanted = [row for one in rows_of for row in one[view]]
        assert found.lengths[at].tolist() == [len(row) for row in wanted]
        assert found.labels is not None
        for row, labels in enumerate(wanted):
            start, stop = found.offsets[at, row : row + 2].astype(int)
            assert found.labels[start:stop].tolist() == labels.tolist()


# ---------------------------------------------------------------------------------------------------------------- refusals

# what the second cache has otherwise -> the first field that differs, and what to do
UNLIKE: dict[str, tuple[dict[str, Any], str, str]] = {
    "format": ({"format": "2"}, r"format is 1 in the first and 2 in the second", "with --format 2"),
    "licence": ({"license": "mit"}, r"license is missing in the first and 'mit' in the second", "--license"),
    "policy": (
        {"policy": ("shift:pixels=2",)},
        r"views.steps\[0\].parameters.pixels is '1' in .* and '2' in",
        "--policy",
    ),
    "other policy": (
        {"policy": ("rotate:degrees=5",)},
        r"views.steps\[0\].name is 'shift' in .* and 'rotate'",
        "--policy",
    ),
    "seed of views": ({"view_seed": 7}, r"views.root_seed is '0' in the first and '7' in the second", "--view-seed"),
    "number of views": ({"views": 3}, r"views.count is 2 in the first and 3 in the second", "softcache subset --views"),
    "a gap between the views": (
        {"first_view": 3},
        r"views.first is 0 in the first and 3 in the second",
        "--first-view",
    ),
    "views in part": ({"first_view": 1}, r"views.first is 0 in the first and 1 in the second", "order of their views"),
    "row order": ({"order": "natural"}, r"samples.order is 'permuted' in the first and 'natural' in", "--order"),
    "seed of the row order": ({"order_seed": 3}, r"samples.order_seed is '0' in the first and '3' in", "--order-seed"),
    "the same teacher": (
        {"teacher": [A], "codec": "int8"},
        r"member 'a' of the second has the weights of 'a'",
        "subset --members",
    ),
    "several labels": ({"data": f"{TOY}:images?multi_label=true"}, r"samples.multi_label is False in .* and True", ""),
    "some of the samples": (
        {"keep_labels": ("0-2",)},
        r"\d+ samples are in both \(toy/.*\), of 40 in .* and \d+ in",
        "--without",
    ),
    "other contents": (
        {"data": f"{TOY}:images?seed=1"},
        r"samples.fingerprint differs: \d+ of 40 samples have another label",
        "diff",
    ),
    "later views of another teacher": (
        {"first_view": 2, "teacher": [B]},
        r"members.a.fingerprint is '[0-9a-f]+' in the first",
        "the same teachers",
    ),
    "later views of more teachers": (
        {"first_view": 2, "teacher": [A, B]},
        r"other members, by their weights: 'b' only in .*second",
        "subset --members",
    ),
    "later views in another codec": (
        {"first_view": 2, "teacher": [A], "codec": "int8"},
        r"members.a.codec.fields is a list of 0 \(\) in the first and a list of 3",
        "same --codec",
    ),
}
UNLIKE_SAMPLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "another teacher": ({"teacher": [B]}, r"members.a.fingerprint is", "the same teachers"),
    "codec": ({"codec": "int8"}, r"members.a.codec.fields is a list of 0 \(\) in the first and a list of 3", ""),
    "without keys": ({"no_keys": True}, r"samples.has_keys is True in the first and False in the second", "--no-keys"),
    "number of views": ({"views": 1}, r"views.count is 2 in the first and 1 in the second", "--views"),
    "other views": ({"first_view": 2}, r"views.first is 0 in the first and 2 in the second", "order of their views"),
    "seed of views": ({"view_seed": 7}, r"views.root_seed is '0' in the first and '7' in the second", "--view-seed"),
    "licence": ({"license": "mit"}, r"license is missing in the first and 'mit' in the second", "--license"),
    "output": ({"teacher": [f"{A}&output=log_probs"]}, r"members.a.(fingerprint|output) is", ""),
    "half types": (
        {"autocast": "bf16"},
        r"made_with.autocast is 'none' in the first and 'bf16' in the sec",
        "--autocast",
    ),
}
FIRST: dict[str, Any] = {"policy": POLICY, "views": 2, "teacher": [A]}


def refused(first: Path, second: Path, capsys: pytest.CaptureFixture[str], message: str, tip: str) -> None:
    """By the command: exit code 2, what and what to do, nothing written."""
    capsys.readouterr()
    out = second.parent / "out"
    assert cli.main(["merge", str(first), str(second), str(out)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert tip in error and "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(("settings", "message", "tip"), UNLIKE.values(), ids=UNLIKE)
def test_what_is_unlike_is_named(
    quick_dump: QuickDump,
    parents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: Any,
    message: str,
    tip: str,
) -> None:
    quick_dump(out="second", **(FIRST | {"teacher": [B]} | settings))
    refused(parents / "one", tmp_path / "second", capsys, message, tip)


@pytest.mark.parametrize(("settings", "message", "tip"), UNLIKE_SAMPLES.values(), ids=UNLIKE_SAMPLES)
def test_what_is_unlike_of_other_samples_is_named(
    quick_dump: QuickDump,
    parents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: Any,
    message: str,
    tip: str,
) -> None:
    quick_dump(out="second", keep_labels=("2-3",), **(FIRST | settings))
    refused(parents / "low", tmp_path / "second", capsys, message, tip)


@pytest.mark.slow
def test_fitted_constants_and_mixed_views_are_refused(
    quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bent: dict[str, Any] = {"data": f"{BENT}:images", "teacher": PLAIN[:1], "codec": LOWRANK}
    quick_dump(out="first", keep_labels=("0-11",), **bent)
    quick_dump(out="second", keep_labels=("12-23",), **bent)
    first, second = tmp_path / "first", tmp_path / "second"
    refused(
        first, second, capsys, r"the constant codec_\w+ of member 'a' differs|members.a.codec", "is not fitted to its"
    )
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    mixed = FIRST | {"policy": (*POLICY, "mixup")}
    quick_dump(out="first", keep_labels=("0-1",), **mixed)
    quick_dump(out="second", keep_labels=("2-3",), **mixed)
    refused(first, second, capsys, r"its views are mixed \(shift.* \| mixup", "dump all samples at once")


@pytest.mark.slow
def test_members_over_mixed_views_are_merged(quick_dump: QuickDump, tmp_path: Path) -> None:
    mixed = FIRST | {"policy": (*POLICY, "mixup")}
    first, second = quick_dump(out="one", **mixed), quick_dump(out="two", **(mixed | {"teacher": [B]}))
    assert merged(tmp_path / "merged", first, second).members == ("a", "b")


def test_pixels_must_be_the_same(quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest names the same steps, and a library renders them otherwise."""
    quick_dump(out="first", **FIRST)
    kind = view_steps.STEPS["shift"]

    def brighter(by: int) -> Any:
        def shift(image: torch.Tensor, draws: Any, *, pixels: int = 2) -> torch.Tensor:
            moved: torch.Tensor = kind.function(image, draws, pixels=pixels)
            return moved.clamp(max=255 - by) + by

        return replace(kind, function=shift)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(view_steps.STEPS, "shift", brighter(9))
        quick_dump(out="second", **(FIRST | {"teacher": [B]}))
    refused(
        tmp_path / "first",
        tmp_path / "second",
        capsys,
        r"40 of 40 samples have other pixel digests in view 0 of the second",
        "dump --extend",
    )
    shutil.rmtree(tmp_path / "second")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(view_steps.STEPS, "shift", brighter(1))
        quick_dump(out="second", **(FIRST | {"teacher": [B]}))
    made = merge.run([tmp_path / "first", tmp_path / "second"], tmp_path / "out", quiet=True)
    assert len(made.notes) == 2 and "by 1 of 255 at most" in made.notes[1] and made.notes[1] in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["command"]["notes"] == list(made.notes)


def test_folders_that_cannot_be(quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick_dump(out="one", **FIRST)
    quick_dump(out="two", **(FIRST | {"teacher": [B]}))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    before = files_of(tmp_path / "one")
    for words, said in (
        (["one", "two"], "2 folders: two caches are the least"),
        (["one", "copy", "out"], "are the same cache, id"),
        (["one", "one", "out"], "are the same cache, id"),
        (["one", "two", "one"], "lies in the cache"),
        (["one", "two", "two/inner"], "lies in the cache"),
        (["one", "two", "link"], "lies in the cache"),
        (["one", "two", "file"], "is a file"),
        (["one", "two", "full"], "holds files that no dump wrote"),
        (["one", "two", "copy"], "holds another cache"),
        (["one", "nothing", "out"], "there is no such folder"),
    ):
        assert cli.main(["merge", *(str(tmp_path / word) for word in words)]) == 2
        assert said in capsys.readouterr().err, words
    assert files_of(tmp_path / "one") == before and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_parent_that_is_not_whole_is_refused_before_anything_is_written(
    quick_dump: QuickDump, tmp_path: Path
) -> None:
    first = quick_dump(out="one", **FIRST)
    for format in ("1", "2"):
        second = quick_dump(out=f"two-{format}", **(FIRST | {"teacher": [B], "format": format}))
        file = next(second.manifest.files_of("member", "b"))
        path = tmp_path / f"two-{format}" / file.path
        data = bytearray(path.read_bytes())
        data[file.arrays["logits"].offset + 5] ^= 16
        path.write_bytes(data)
        one = first if format == "1" else quick_dump(out="one-2", **(FIRST | {"format": "2"}))
        with pytest.raises(DamagedCacheError, match=r"part-00000\.h5"):
            merge.run([one.reader.path, second.reader.path], tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()
    (tmp_path / "one-2" / "manifest.json").unlink()
    with pytest.raises(UnfinishedCacheError):
        merge.run([first.reader.path, tmp_path / "one-2"], tmp_path / "out", quiet=True)


def test_same_and_other_samples_are_not_merged_at_once(quick_dump: QuickDump, parents: Path, tmp_path: Path) -> None:
    quick_dump(out="other", keep_labels=("0-1",), **(FIRST | {"teacher": [B]}))
    low, high, other = parents / "low", parents / "high", tmp_path / "other"
    for paths in ([low, high, other], [low, other, high]):
        with pytest.raises(
            CacheError, match=f"{paths[2]} cannot be merged with the caches before it: some of all these"
        ):
            merge.run(paths, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_licence_that_is_given_holds(quick_dump: QuickDump, tmp_path: Path) -> None:
    first = quick_dump(out="one", license="mit", **FIRST)
    second = quick_dump(out="two", license="cc-by-4.0", **(FIRST | {"teacher": [B]}))
    assert merged(tmp_path / "out", first, second, license="for us only").manifest.plan.license == "for us only"


# ------------------------------------------------------------------------------------------ interruptions, room, damage


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` to be merged by members, `low` and `high` by samples."""
    root = tmp_path_factory.mktemp("parents")
    common: dict[str, Any] = {"data": f"{TOY}:images", "policy": POLICY, "views": 2, "codec": "float32", "threads": 1}
    for name, teacher, more in (
        ("one", A, {}),
        ("two", B, {"format": "1"}),
        ("low", A, {"keep_labels": ("0-1",)}),
        ("high", A, {"keep_labels": ("2-3",)}),
        ("one-2", A, {"format": "2"}),
        ("two-2", B, {"format": "2"}),
    ):
        config = DumpConfig(**(common | more), teacher=(teacher,), out=str(root / name), workers=0)
        dump.run(config, quiet=True)
    return root


@contextmanager
def stopping(files: int) -> Iterator[None]:
    """Ctrl-C when that many files have got their names."""
    publish, done = durable.publish, 0

    def stopped(temporary: Path, final: Path) -> None:
        nonlocal done
        if done == files:
            raise KeyboardInterrupt
        done += 1
        publish(temporary, final)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "publish", stopped)
        yield


PAIRS = {"members": ("one", "two"), "members of version 2": ("one-2", "two-2"), "samples": ("low", "high")}


@pytest.mark.parametrize(
    "pair", [pytest.param(p, id=n, marks=[pytest.mark.slow] * (n != "members")) for n, p in PAIRS.items()]
)
def test_stopped_at_any_file_it_goes_on_to_the_same_bytes(parents: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    paths = [parents / name for name in pair]
    whole = merge.run(paths, tmp_path / "whole", quiet=True).manifest
    after, stopped = 0, True
    while stopped:
        out, stopped = tmp_path / f"out-{after}", False
        try:
            with stopping(after):
                merge.run(paths, out, quiet=True)
        except KeyboardInterrupt:
            stopped = True
            with pytest.raises(CacheError):
                softcache.open(out, quiet=True)
            assert not list(out.rglob("*.tmp-*"))
        assert merge.run(paths, out, quiet=True).manifest.id == whole.id
        assert files_of(out) == files_of(tmp_path / "whole")
        after += 1
    assert after > 7 and verify.run(tmp_path / "whole", full=True, quiet=True).state == "whole"


def begun(parents: Path, out: Path, pair: tuple[str, str], files: int) -> None:
    """A merge that was stopped after so many files."""
    with pytest.raises(KeyboardInterrupt), stopping(files):
        merge.run([parents / name for name in pair], out, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_an_unfinished_merge_says_what_it_is(parents: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    begun(parents, tmp_path / "out", pair, files=4)
    with pytest.raises(UnfinishedCacheError, match=r"the merge is not finished(.|\n)*`softcache merge`"):
        softcache.open(tmp_path / "out")
    assert verify.run(tmp_path / "out", full=False).state == "unfinished"
    for other in PAIRS.values():
        if other != pair:
            with pytest.raises((PlanMismatchError, CacheError)):
                merge.run([parents / name for name in other], tmp_path / "out", quiet=True)
    with pytest.raises(PlanMismatchError):
        subset.run(parents / "one", tmp_path / "out", Choice(views="0"), quiet=True)
    begun_with_less = [parents / name for name in pair]
    with pytest.raises(PlanMismatchError, match=r"licence|another plan"):
        merge.run(begun_with_less, tmp_path / "out", quiet=True, license="another")


def test_a_finished_cache_is_never_said_to_be_one_to_delete(parents: Path, tmp_path: Path) -> None:
    first, *others = PAIRS.values()
    done = merge.run([parents / name for name in first], tmp_path / "out", quiet=True)
    for other in others:
        with pytest.raises((PlanMismatchError, CacheError), match="holds another cache") as raised:
            merge.run([parents / name for name in other], tmp_path / "out", quiet=True)
        assert "delete" not in (raised.value.tip or "")
    assert softcache.open(tmp_path / "out").id == done.manifest.id


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_what_was_copied_is_looked_at_again(parents: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    """Somebody has been at the folder of an interrupted merge by members; of samples the journal's sizes say so."""
    begun(parents, tmp_path / "out", pair, files=4)
    found = sorted((tmp_path / "out").rglob("*.h5"))
    data = found[0].read_bytes()
    found[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if "one" in pair[0] else data)
    merge.run([parents / name for name in pair], tmp_path / "out", quiet=True)
    assert verify.run(tmp_path / "out", full=True, quiet=True).state == "whole"


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_room_is_asked_for_before_writing(
    parents: Path, tmp_path: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 1_000)
    with pytest.raises(DiskSpaceError, match=r"MB, the disk has 0\.0 MB left"):
        merge.run([parents / name for name in pair], tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").rglob("part-*.h5"))


# -------------------------------------------------------------------------------------------------------- living with it


@pytest.mark.slow
def test_a_merged_cache_is_mended_by_its_teachers_or_from_a_copy(parents: Path, tmp_path: Path) -> None:
    for name, pair in (("members", PAIRS["members"]), ("samples", PAIRS["samples"])):
        merge.run([parents / one for one in pair], tmp_path / name, quiet=True)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-copy")
        file = sorted((tmp_path / name / "members").rglob("part-*.h5"))[-1]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        means = Means(data=f"{TOY}:images", teachers=(A, B), device="cpu", workers=0)
        done = repair.run(tmp_path / name, means, quiet=True)
        if name == "members":
            assert done.mended == ["members/b/part-00001.h5"] and not done.left
        else:
            assert re.search(r"was merged of the caches .*: run that `softcache merge` again", done.text())
            done = repair.run(tmp_path / name, Means(source=tmp_path / f"{name}-copy"), quiet=True)
            assert len(done.mended) == 1 and not done.left
        is_whole(tmp_path / name)


@pytest.mark.slow
def test_merged_samples_are_looked_at_cut_compared_and_learned_from(
    parents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge.run([parents / "low", parents / "high"], tmp_path / "all", quiet=True)
    ids = [softcache.open(parents / name).id for name in ("low", "high")]
    assert cli.main(["inspect", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^merged of +{id}$", shown, re.MULTILINE) for id in ids)
    card = (tmp_path / "all" / "README.md").read_text()
    assert f"Merged of the caches `{ids[0]}`, `{ids[1]}`" in card
    assert "records in the caches that this one was merged of" in card
    cache = softcache.open(tmp_path / "all", quiet=True)
    subset.run(tmp_path / "all", tmp_path / "views", Choice(views="1"), quiet=True)
    subset.run(tmp_path / "all", tmp_path / "few", Choice(keep_labels=("1-2",)), quiet=True)
    for name, order in (("views", "merged"), ("few", "selected")):
        is_whole(tmp_path / name)
        plan = softcache.open(tmp_path / name, quiet=True).manifest.plan
        assert plan.samples.order == order and plan.parent is not None and plan.parent.id == cache.id
        told, before = plan.parent.statistics["a"], cache.manifest.plan.measured_before("a")
        assert told == before and told.measured == cache.manifest.statistics["a"].records
    found = diff.run(tmp_path / "all", parents / "one", quiet=True)
    (member,) = found.members
    assert found.samples == (40, 0, 0) and member.agreement == 1.0 and member.kl["1"] == 0.0
    losses = []
    for name in ("all", "one"):
        config = TrainConfig(
            data=f"{TOY}:images",
            student="softcache:mlp?hidden=4",
            cache=str(tmp_path / "all" if name == "all" else parents / "one"),
            loss=("kd:temperature=4",),
            epochs=2,
            threads=1,
            check_content="full",
            out=str(tmp_path / f"run-{name}"),
        )
        losses.append([row["loss"] for row in train.run(config, quiet=True).metrics])
    assert losses[0] == losses[1]  # the same targets by sample, whatever rows they stand in


@pytest.mark.slow
def test_merged_caches_are_merged_again_and_extended(parents: Path, quick_dump: QuickDump, tmp_path: Path) -> None:
    first = parents / "low"
    parts = []
    for name, labels in (("two", ("2",)), ("three", ("3",))):
        parts.append(quick_dump(out=name, keep_labels=labels, **FIRST).reader.path)
    merge.run(parts, tmp_path / "inner", quiet=True)
    merge.run([first, tmp_path / "inner"], tmp_path / "outer", quiet=True)
    flat = merge.run([first, *parts], tmp_path / "flat", quiet=True)
    x, y = (CacheReader(tmp_path / name) for name in ("outer", "flat"))
    rows, zeros = np.arange(40), np.zeros(40, np.int64)
    assert np.array_equal(x.gather("a", "logits", rows, zeros), y.gather("a", "logits", rows, zeros))
    assert x.samples.ids.tolist() == y.samples.ids.tolist() and len(flat.manifest.plan.parents) == 3
    grown = quick_dump(out="outer", extend=True, codec=None, views=3, teacher=[A])
    assert grown.num_views == 3
    is_whole(tmp_path / "outer")


def test_the_command_tells_what_it_made(parents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["merge", *(str(parents / name) for name in PAIRS["members"]), str(tmp_path / "out")]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    made = softcache.open(tmp_path / "out")
    assert found == {
        "path": str(tmp_path / "out"),
        "id": made.id,
        "merged": "members",
        "bytes": made.manifest.nbytes,
        "samples": 40,
        "views": 2,
        "members": ["a", "b"],
        "notes": [],
    }
    assert cli.main(argv) == 0  # again: it is there already
    shown = capsys.readouterr().out
    assert "40 samples x 2 views of a, b" in shown and "merged by their members" in shown and made.id in shown


def test_rules_of_merged_manifests(parents: Path, tmp_path: Path) -> None:
    plan = merge.run([parents / "low", parents / "high"], tmp_path / "all", quiet=True).manifest.plan
    check_plan(plan)
    one, other = plan.parents
    for parents_of, message in (
        ((), "samples.order: merged, of no cache"),
        ((one, replace(other, id=one.id)), "parents: one twice"),
        ((one, replace(other, statistics={"nobody": other.statistics["a"]})), "of members that are not there"),
    ):
        wrong = replace(plan, parents=parents_of)
        with pytest.raises(GateError, match=message):
            check_plan(wrong)
        manifest = json.loads((tmp_path / "all" / "manifest.json").read_bytes())
        manifest["parents"] = wrong.to_json()["parents"]
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(tmp_path / "all", tmp_path / "changed")
        (tmp_path / "changed" / "manifest.json").write_bytes(canonical_json(manifest))
        with pytest.raises(DamagedCacheError, match=message):
            softcache.open(tmp_path / "changed")

"""Targets of positions: flat, cut by offsets, and padded with a mask; members over several indexes are not combined."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import softcache
from softcache import cli
from softcache.check import inspect
from softcache.errors import CacheError, LossError
from softcache.losses import make_term
from softcache.targets.teacher import CachedTeacher
from softcache.train.terms import check_term

sys.path.append(str(Path(__file__).parents[2] / "tools"))
indexed = importlib.import_module("golden.indexed")
PATH = Path(__file__).parents[1] / "golden" / "indexed"
ROWS, VIEWS = np.array([3, 0, 7, 3, 12]), np.array([1, 0, 2, 2, 0])  # sample 0 has no word


@pytest.fixture(scope="module")
def cache() -> softcache.Cache:
    return softcache.open(PATH, quiet=True)


@pytest.fixture(scope="module")
def targets(cache: softcache.Cache) -> softcache.Targets:
    return cache.gather(ROWS, VIEWS, features=["trunk:map"])


def wanted(member: str, name: str, row: int, view: int) -> np.ndarray:
    found: np.ndarray = indexed.records_of(member, name, [row], view).astype(np.float32)
    return found


@pytest.mark.parametrize(("member", "width"), [("tagger", 5), ("ranker", 1), ("strided", 5)])
def test_flat_values_are_cut_by_offsets(targets: softcache.Targets, member: str, width: int) -> None:
    flat, at = targets.flat(member), targets.at(member)
    assert flat.shape == (at.offsets[-1], width) and torch.equal(flat, targets.output(member))
    for place, (row, view) in enumerate(zip(ROWS, VIEWS, strict=True)):
        own = flat[at.offsets[place] : at.offsets[place + 1]].numpy()
        np.testing.assert_array_equal(own, wanted(member, "logits", row, view))
        assert at.numbers[at.offsets[place] : at.offsets[place + 1]].tolist() == indexed.listed_of(at.index, row, view)


def test_records_of_int8_decode_position_by_position(targets: softcache.Targets) -> None:
    flat, at = targets.flat("segmenter"), targets.at("segmenter")
    for place, (row, view) in enumerate(zip(ROWS, VIEWS, strict=True)):
        raw = indexed.records_of("segmenter", "records", [row], view)
        lowest, step = raw[:, :4].copy().view("<f4"), raw[:, 4:8].copy().view("<f4")
        np.testing.assert_array_equal(flat[at.offsets[place] : at.offsets[place + 1]], raw[:, 8:] * step + lowest)
    assert at.shapes is not None
    assert at.shapes.tolist() == [list(indexed.shape_of("cells", *place)) for place in zip(ROWS, VIEWS, strict=True)]


def test_padded_values_stand_where_the_mask_says(targets: softcache.Targets) -> None:
    padded, mask = targets.padded("tagger", fill=-7.0)
    counts = [indexed.length_of("words", int(row), 0) for row in ROWS]
    assert mask.sum(dim=1).tolist() == counts == targets.at("tagger").counts.tolist()
    assert padded.shape == (5, max(counts), 5) and torch.equal(padded[mask], targets.flat("tagger"))
    assert (padded[~mask] == -7).all() and not mask[1].any()
    for place, (row, view) in enumerate(zip(ROWS, VIEWS, strict=True)):
        np.testing.assert_array_equal(padded[place, : counts[place]], wanted("tagger", "logits", row, view))


def test_labels_and_candidates_come_with_the_positions(cache: softcache.Cache, targets: softcache.Targets) -> None:
    words, listed = targets.at("tagger"), targets.at("ranker")
    assert words.labels is not None and listed.entries is not None
    assert words.labels.tolist() == [label for row in ROWS for label in indexed.labels_of(row)]
    assert listed.entries.tolist() == [entry for row in ROWS for entry in indexed.entries_of(row)]
    assert len(cache.reader.candidates()["ids"]) == indexed.CANDIDATES


def test_features_have_positions_of_their_own(targets: softcache.Targets) -> None:
    flat = targets.flat("layers", "trunk:map")
    own = [wanted("layers", "feature0", row, view) for row, view in zip(ROWS, VIEWS, strict=True)]
    np.testing.assert_array_equal(flat, np.concatenate(own))
    assert targets.at("layers", "trunk:map").index == "cells" and targets.at("embedder", "trunk:map").index == "words"
    padded, mask = targets.padded("embedder", "trunk:map")
    assert torch.equal(padded[mask], targets.flat("embedder", "trunk:map"))


def test_a_member_of_one_record_a_sample_is_read_as_before(targets: softcache.Targets) -> None:
    own = np.concatenate([wanted("embedder", "logits", row, view) for row, view in zip(ROWS, VIEWS, strict=True)])
    np.testing.assert_array_equal(targets.embedding("embedder"), own)
    with pytest.raises(CacheError, match="member 'embedder' has one record for each sample"):
        targets.padded("embedder")
    with pytest.raises(CacheError, match="member 'layers' holds no logits of classes: it gave features alone"):
        targets.logits("layers")


def test_rows_between_keeps_every_position_with_its_sample(targets: softcache.Targets) -> None:
    some = targets.rows_between(1, 4)
    for member in ("tagger", "segmenter", "ranker", "strided"):
        whole, at = targets.flat(member), targets.at(member)
        assert torch.equal(some.flat(member), whole[at.offsets[1] : at.offsets[4]])
        assert some.at(member).counts.tolist() == at.counts[1:4].tolist()
    start, stop = targets.at("layers", "trunk:map").offsets[[1, 4]]
    assert torch.equal(some.flat("layers", "trunk:map"), targets.flat("layers", "trunk:map")[start:stop])
    assert torch.equal(some.embedding("embedder"), targets.embedding("embedder")[1:4])


@pytest.mark.parametrize(("member", "index"), [("tagger", "words"), ("segmenter", "cells"), ("strided", "coarse")])
def test_a_row_for_each_position_gives_the_same_numbers(targets: softcache.Targets, member: str, index: str) -> None:
    """Of a batch and of any rows of it; one drawn member stays that of its sample."""
    each, at = targets.per_position(index), targets.at(member)
    assert each.members == tuple(name for name in targets.members if targets.index_of.get(name) == index)
    assert torch.equal(each.logits(member), targets.flat(member)) and len(each.rows) == at.offsets[-1]
    assert torch.equal(each.rows_between(2, 5).logits(member), targets.flat(member)[2:5])
    assert each.rows.tolist() == np.repeat(ROWS, at.counts).tolist()
    assert torch.equal(each._draws(3), targets._draws(3, index))


def test_a_feature_over_the_index_of_its_member_comes_with_it(cache: softcache.Cache) -> None:
    targets = cache.gather(ROWS, VIEWS, members=["layers", "embedder", "segmenter"], features=["trunk:map"])
    assert targets.per_position("cells").members == ("segmenter",) and not targets.per_position("cells").features


def test_places_among_all_positions_count_those_without_a_record(targets: softcache.Targets) -> None:
    """Of the coarse grid every second position is listed."""
    at, lengths = (
        targets.at("strided"),
        [indexed.length_of("coarse", int(r), int(v)) for r, v in zip(ROWS, VIEWS, strict=True)],
    )
    wanted = [sum(lengths[:i]) + number for i, (r, v) in enumerate(zip(ROWS, VIEWS, strict=True))
              for number in indexed.listed_of("coarse", int(r), int(v))]  # fmt: skip
    assert at.among(np.array(lengths)).tolist() == wanted
    words = targets.at("tagger")
    assert words.among(words.counts).tolist() == list(range(int(words.offsets[-1])))


def test_members_over_several_indexes_are_not_combined(targets: softcache.Targets) -> None:
    with pytest.raises(CacheError, match=r"several indexes cannot be combined \(tagger: words, segmenter: cells\)"):
        targets.combined(weights={"tagger": 1.0, "segmenter": 1.0})
    one = targets.combined(weights={"tagger": 1.0})
    assert torch.equal(one, targets.flat("tagger"))


def test_a_sample_draws_one_member_for_all_its_positions(targets: softcache.Targets) -> None:
    draws = targets._draws(0, "words")
    offsets = targets.at("tagger").offsets
    assert len(draws) == offsets[-1]
    assert all(len(set(draws[a:b].tolist())) <= 1 for a, b in pairwise(offsets))


def test_eps_is_one_number_a_position(cache: softcache.Cache) -> None:
    assert cache.eps("tagger", ROWS, VIEWS).shape == (sum(indexed.length_of("words", int(row), 0) for row in ROWS),)
    assert cache.eps("embedder", ROWS, VIEWS).shape == (5,)
    with pytest.raises(CacheError, match="codec 'none' of member 'layers' has no bound"):
        cache.eps("layers", ROWS, VIEWS)


def test_a_loss_of_classes_is_refused_with_the_members_name(cache: softcache.Cache) -> None:
    for member, error, what in (
        (
            "tagger",
            CacheError,
            r"member 'tagger' of the cache has an answer for each position of the index 'words'.*\n.*words=",
        ),
        ("embedder", LossError, "loss 'kd' is on classes, and no member gave any: 'embedder' gave embedding"),
    ):
        teacher = CachedTeacher(cache, weights={member: 1.0})
        with pytest.raises(error, match=what):
            check_term(teacher, make_term("kd"))


def test_members_over_two_indexes_are_not_learned_from_together(cache: softcache.Cache) -> None:
    """Nor one that answers about words with one that answers about whole samples; each refusal names who would do."""
    for index, members, what in (
        (
            "words",
            ("tagger", "segmenter"),
            r"member 'segmenter' .* of 'cells', and tagger of 'words': .*\n.*--members tagger",
        ),
        (
            "words",
            ("tagger", "embedder"),
            r"member 'embedder' .* one answer for each sample, and tagger one for each position",
        ),
        (
            None,
            ("tagger", "embedder"),
            r"member 'tagger' .* of the index 'words', and the samples .*\n.*--members embedder",
        ),
    ):
        teacher = CachedTeacher(cache, weights=dict.fromkeys(members, 1.0), index=index)
        with pytest.raises(CacheError, match=what):
            teacher.check_index()
    CachedTeacher(cache, weights={"tagger": 1.0}, index="words").check_index()


def test_inspect_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect.report(PATH)
    assert "words: words, with labels" in report and "coarse: some grid" in report
    assert "embedder" in inspect.soft_target(PATH, "toy/0003").outputs
    assert cli.main(["inspect", str(PATH), "--json"]) == 0
    assert '"indexes"' in capsys.readouterr().out

"""Spans: by hand, by the rules of conlleval written here as its own two tables, and as an evaluation counts them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from softcache.evaluate.evaluation import Evaluation, span_table, summary
from softcache.evaluate.spans import marks_of, span_scores, spans_of
from softcache.evaluate.sums import Sums


def tags(text: str) -> list[tuple[str, str]]:
    return [(one[0], one[2:]) for one in text.split()]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB1
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("S-PER S-PER O B-LOC I-LOC E-LOC", [("PER", 0, 1), ("PER", 1, 2), ("LOC", 3, 6)]),
        ("B-LOC E-LOC I-LOC", [("LOC", 0, 2), ("LOC", 2, 3)]),
        ("O I-PER E-PER E-PER O", [("PER", 1, 3), ("PER", 3, 4)]),
        ("B-PER E-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("O O", []),
        ("", []),
        ("I-PER", [("PER", 0, 1)]),
    ],
)
def test_spans_of_a_sentence_by_hand(text: str, wanted: list[tuple[str, int, int]]) -> None:
    assert spans_of(tags(text)) == wanted


ENDS = {"BB", "BS", "BO", "IB", "IS", "IO"} | {f"{a}{b}" for a in "ES" for b in "BIESO"}  # conlleval's endOfChunk
STARTS = {f"{a}{b}" for a in "BIESO" for b in "BS"} | {"EE", "EI", "SE", "SI", "OE", "OI"}  # and its startOfChunk


def conlleval(sentence: Sequence[tuple[str, str]]) -> list[tuple[str, int, int]]:
    """The two tables that conlleval goes by, and its rule that another type ends one chunk and starts another."""
    found, first, before = [], -1, ("O", "")
    for place, (letter, kind) in enumerate([*sentence, ("O", "")]):
        pair = before[0] + letter
        if first >= 0 and (pair in ENDS or (before[0] != "O" and before[1] != kind)):
            found.append((before[1], first, place))
            first = -1
        if pair in STARTS or (letter != "O" and before[1] != kind):
            first = place
        before = (letter, kind)
    return found


def test_every_sentence_of_four_words_is_read_as_conlleval_reads_it() -> None:
    letters = [("O", ""), *itertools.product("BIES", ("A", "B"))]
    for sentence in itertools.product(letters, repeat=4):
        assert spans_of(sentence) == conlleval(sentence), sentence


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["O", "B-PER", "I-PER"], "O B-PER I-PER"),
        (["I-PER", "I-LOC", "O"], "I-PER I-LOC O"),
        (["B-a-b", "I-a-b"], "B-a-b I-a-b"),
        (["O", "U-X", "L-X", "B-X", "I-X"], "O S-X E-X B-X I-X"),
        (["B-X", "M-X", "E-X", "S-X", "O"], "B-X I-X E-X S-X O"),
        (["B", "I", "O"], "B I O"),
        (["NOUN", "VERB"], None),
        (["O", "S", "E"], None),  # points of the compass are no spans
        (["B", "E", "S"], None),
        (["O", "B-PER", "NOUN"], None),
        (["O-PER", "B-PER"], None),
        (["O", "B", "I-PER"], None),
        ([], None),
    ],
)
def test_which_classes_mark_spans(names: list[str], wanted: str | None) -> None:
    assert marks_of(names) == (None if wanted is None else tags(wanted))


def counted(said: list[int], labels: list[int], counts: list[int], names: Sequence[str]) -> Evaluation:
    sums = Sums(len(names), multi_label=False, class_names=names)
    ends = np.cumsum(counts)
    for stop, count in zip(ends, counts, strict=True):  # a batch of one sentence each
        place = slice(int(stop - count), int(stop))
        logits = torch.nn.functional.one_hot(torch.tensor(said[place], dtype=torch.int64), len(names)).float()
        sums.add_positions(
            logits.reshape(-1, len(names)), torch.tensor(labels[place], dtype=torch.int64), np.array([count])
        )
    return sums.result(len(counts), 0.0, 1.0, names)


NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def test_words_and_spans_are_counted_by_hand() -> None:
    """Three sentences, one of them without words; a word without a label counts for nothing, and is outside."""
    labels = [3, 4, 0, 1, 2, 0, 1, -1, 0]
    said = [3, 4, 0, 1, 0, 3, 1, 2, 0]
    found = counted(said, labels, [5, 0, 4], NAMES)
    assert (found.samples, found.positions, found.labelled, found.errors, found.wrong_samples) == (3, 9, 8, 2, 2)
    # PER 0-2 and LOC 6-7 are right; LOC 3-4 is too short; PER 5-6 is not there
    assert found.spans == {"LOC": (1, 2, 2), "PER": (1, 2, 1)}
    assert found.span_f1 == pytest.approx(2 * 2 / (4 + 3))
    told = found.to_json()
    assert (told["span_precision"], told["span_recall"]) == (2 / 4, 2 / 3)
    assert found.columns()["eval_span_f1"] == found.span_f1
    assert "57.14 % (2 right of 4 told and 3 there)" in summary("m", found) and "right words" in summary("m", found)
    assert "66.67 %" in span_table(found)


def test_a_sentence_ends_every_span() -> None:
    found = counted([3, 4], [3, 4], [1, 1], NAMES)
    assert found.spans["PER"] == (2, 2, 2)
    assert counted([3, 4], [3, 4], [2], NAMES).spans["PER"] == (1, 1, 1)


def test_without_spans_there_is_no_score() -> None:
    none = counted([0, 0], [0, 0], [2], NAMES)
    assert none.span_f1 is None and none.columns()["eval_span_f1"] is None and "span F1" not in summary("m", none)
    assert span_scores({"A": (0, 0, 3)}) == {"precision": None, "recall": 0.0, "f1": 0.0}
    parts = counted([0, 1], [1, 1], [2], ("NOUN", "VERB"))
    assert parts.spans == {} and "eval_span_f1" not in parts.columns()

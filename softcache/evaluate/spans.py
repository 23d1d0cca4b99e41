"""Spans of words (names, chunks) that tags mark: found by conlleval's rules, right where both ends and the type are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

OUTSIDE = "O"
_MARK = re.compile(r"([BIEOSLUM])(?:-(.+))?", re.DOTALL)
_AS = {"L": "E", "U": "S", "M": "I"}  # BILOU and BMES write the same with other letters

Tag = tuple[str, str]  # one of B, I, E, S and O, and the type
Span = tuple[str, int, int]  # type, first word, the word behind the last one


def marks_of(class_names: Sequence[str]) -> list[Tag] | None:
    """What each class marks, where all of them are O, or a letter of a span with its type (`B-PER`); None where they are not.

    IOB1, IOB2, IOBES, BILOU and BMES are alike in this. Letters without types are taken where O and B or I are among them.
    """
    found = [_MARK.fullmatch(name) for name in class_names]
    if not found or not all(found):
        return None
    marks = [(one[1], one[2] or "") for one in found if one is not None]
    typed = [letter for letter, kind in marks if kind]
    bare = [letter for letter, kind in marks if not kind]
    if any(kind and letter == OUTSIDE for letter, kind in marks):
        return None
    if typed:
        fits = all(letter == OUTSIDE for letter in bare)
    else:
        fits = OUTSIDE in bare and bool({"B", "I"} & set(bare))
    return [(_AS.get(letter, letter), kind) for letter, kind in marks] if fits else None


def spans_of(tags: Sequence[Tag]) -> list[Span]:
    """The spans of one sentence, in order.

    A word begins one where its letter is B or S, and where it is another letter and the word before it is outside, ended a span
    (E, S) or is of another type: what should begin with B and does not is a span all the same. A span ends before a word that
    begins one, before O, and behind E and S.
    """
    spans: list[Span] = []
    first: int | None = None
    before: Tag = (OUTSIDE, "")
    for place, tag in enumerate([*tags, (OUTSIDE, "")]):
        begins = _begins(before, tag)
        if first is not None and (begins or tag[0] == OUTSIDE):
            spans.append((before[1], first, place))
            first = None
        first = place if begins else first
        before = tag
    return spans


def _begins(before: Tag, tag: Tag) -> bool:
    """Whether a word begins a span, behind the word before it."""
    letter, kind = tag
    if letter == OUTSIDE:
        return False
    return letter in "BS" or before[0] in "OES" or before[1] != kind


class SpanCounts:
    """How many spans of each type were right, told and there, over the sentences of an evaluation.

    Args:
        marks: what each class marks.
    """

    def __init__(self, marks: Sequence[Tag]) -> None:
        self._marks = [*marks, (OUTSIDE, "")]  # the last one is for -1
        self.right, self.told, self.there = Counter[str](), Counter[str](), Counter[str]()

    def add(self, said: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> None:
        """The words of some sentences, one after the other.

        Args:
            said, labels: (P,) class indices. A word whose label is -1 is outside in both.
            counts: (B,) words of each sentence.
        """
        said = np.where(labels < 0, -1, said)
        ends = np.cumsum(counts)
        for start, stop in zip((ends - counts).tolist(), ends.tolist(), strict=True):
            told, there = (set(spans_of([self._marks[i] for i in one[start:stop]])) for one in (said, labels))
            for counter, spans in ((self.right, told & there), (self.told, told), (self.there, there)):
                counter.update(kind for kind, _, _ in spans)

    def by_type(self) -> dict[str, tuple[int, int, int]]:
        """Type -> how many were right, told and there."""
        kinds = sorted({kind for _, kind in self._marks if kind} | set(self.told) | set(self.there))
        return {kind: (self.right[kind], self.told[kind], self.there[kind]) for kind in kinds}


def span_scores(by_type: Mapping[str, tuple[int, int, int]]) -> dict[str, float | None]:
    """Micro-averaged "precision", "recall" and "f1"; None where nothing is there to divide by: no span was told, or is there."""
    right, told, there = (sum(one[i] for one in by_type.values()) for i in range(3))
    return {
        "precision": right / told if told else None,
        "recall": right / there if there else None,
        "f1": 2 * right / (told + there) if told + there else None,
    }

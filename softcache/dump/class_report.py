"""Is a teacher right? Its answers against the labels, collected while a dump writes them, and what they say of its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softcache.data.class_counts import STANDARD_ERRORS, chance_warning, offset_warning, unknown_warning
from softcache.data.label_kind import has_several, is_known
from softcache.data.transfer_set import TransferSet
from softcache.dump.encode import Encoded
from softcache.dump.teacher import Teacher
from softcache.report.tables import percent

MANY_CLASSES = 1000  # of more than these another order is not looked for
FEW_ROWS = 8  # fewer may be alike by chance


class Answers:
    """One teacher's answers against the labels, over one view of the rows that this process writes.

    Attributes:
        labelled, correct: what can be told right or wrong, and how much is right: samples, or known answers to several labels.
    """

    def __init__(self, teacher: Teacher, num_classes: int) -> None:
        self.teacher, self.num_classes = teacher, num_classes
        self.rows = self.labelled = self.correct = self.flat = self.same = 0
        small = num_classes <= MANY_CLASSES and not teacher.multi_label
        small = (
            small and teacher.index != "tokens"
        )  # which are not in another order by accident: their tokenizer is compared
        self.halves = np.zeros((2, num_classes, num_classes), np.int32) if small else None  # label, largest

    def add(self, measured: Mapping[str, np.ndarray], labels: np.ndarray, ids: np.ndarray) -> None:
        """A batch.

        Args:
            measured: `largest` (B,), the largest column of each row; `alike` (B,), 1 where all columns of a row are equal, plus 2
                where the row is the teacher's first one again; `decided` (2,), of several labels how many are right and known.
            labels: (B,) class indices, -1 = none; or (B, C), several per sample.
            ids: (B,) uint64 sample ids, which say in which half a row is.
        """
        largest, alike = measured["largest"], measured["alike"]
        self.rows += len(largest)
        self.flat += int((alike & 1).sum())
        self.same += int((alike >= 2).sum())
        if has_several(labels):
            self.correct += int(measured["decided"][0])
            self.labelled += int(measured["decided"][1])
            return
        known = is_known(labels)
        largest, labels, half = largest[known], labels[known], (ids[known] & np.uint64(1)).astype(np.int64)
        self.labelled += len(labels)
        self.correct += int((largest == labels).sum())
        if self.halves is not None:
            np.add.at(self.halves, (half, labels, largest), 1)

    @property
    def top1(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    def text(self) -> str:
        """For people: how its classes were matched, and how often it is right."""
        counted = f"{percent(self.top1)} of {self.labelled:,}"
        words = "" if self.teacher.index is None else f" {self.teacher.index}"
        right = f"{counted} decisions right" if self.teacher.multi_label else f"top-1 {counted}{words}"
        right = "no labels to compare with" if self.top1 is None else right
        return f"teacher {self.teacher.name}: {right}; classes matched {self.teacher.match.how}"

    def warnings(self, class_names: Sequence[str]) -> list[str]:
        """What is odd; empty for most teachers."""
        what = f"teacher {self.teacher.name!r}"
        one_each = not self.teacher.multi_label  # whose chance is no 1 / C, but how often each label is a yes
        counted = self.correct, self.labelled, self.num_classes
        chance = chance_warning(what, *counted, self.teacher.asked) if one_each else None
        found = [chance, self._constant(what)]
        found.append(self._other_order(what, class_names))
        return [text for text in found if text is not None]

    def _constant(self, what: str) -> str | None:
        if self.rows < FEW_ROWS or self.num_classes < 2:
            return None
        if self.same == self.rows:
            return f"{what} gives the same logits to all {self.rows:,} {self.teacher.asked}: they say nothing of any of them"
        if 2 * self.flat > self.rows:
            return f"{what} gives all classes the same logit for {self.flat:,} of {self.rows:,} {self.teacher.asked}"
        return None

    def _other_order(self, what: str, class_names: Sequence[str]) -> str | None:
        """An order of the columns that was found on one half of the rows and explains the other half far better."""
        if self.halves is None or self.num_classes < 2:
            return None
        first, second = self.halves.astype(np.int64)
        order = best_order(first)
        moved = np.flatnonzero(order != np.arange(self.num_classes))
        now, then = int(second[moved, moved].sum()), int(second[moved, order[moved]].sum())
        if then < 2 * now or then - now < STANDARD_ERRORS * np.sqrt(then + now) or not then:
            return None
        told = sorted(((int(i), int(order[i])) for i in moved), key=lambda pair: -second[pair])[:3]
        named = ", ".join(f"{class_names[i]!r} is told by the column of {class_names[column]!r}" for i, column in told)
        return (
            f"{what}: another order of its columns explains the labels far better: of {int(second.sum()):,} "
            f"{self.teacher.asked} that it was not found on, {then + int(np.trace(second)) - now:,} instead of "
            f"{int(np.trace(second)):,} are right; {named}. "
            "If its columns stand in another order, say so: --classes-map FILE"
        )

    def facts(self) -> dict[str, Any]:
        """What provenance.json keeps."""
        match = self.teacher.match
        told: dict[str, Any] = {"matched": match.how, "labelled": self.labelled, "correct": self.correct}
        if match.columns is None or isinstance(match.columns, range):
            return told
        return told | {"columns": list(match.columns)}


class ClassReport:
    """The answers of every teacher of a dump, at one view."""

    def __init__(self, transfer_set: TransferSet, teachers: Sequence[Teacher], view: int) -> None:
        self.transfer_set, self.view = transfer_set, view
        self.answers = {one.name: Answers(one, transfer_set.num_classes) for one in teachers if one.has_classes}
        self.others = [one for one in teachers if not one.has_classes]

    def add(self, done: Encoded) -> None:
        """A batch that was written, of one teacher; counted at the report's view alone, since views of a sample are no others."""
        if done.view == self.view and done.member in self.answers:
            measured = {name: done.measured[name].numpy() for name in ("largest", "alike", "decided")}
            self.answers[done.member].add(measured, done.labels, done.samples.ids[done.rows])

    def warnings(self) -> list[str]:
        """Of the labels and of every teacher, each once."""
        of_labels = (offset_warning(self.transfer_set), unknown_warning(self.transfer_set))
        names = self.transfer_set.class_names
        found = [text for answers in self.answers.values() for text in answers.warnings(names)]
        return [text for text in of_labels if text is not None] + found

    def text(self) -> str:
        lines = [answers.text() for answers in self.answers.values() if answers.rows]
        return "\n".join([*lines, *(_other_text(one) for one in self.others)])

    def facts(self, warnings: Sequence[str]) -> dict[str, Any]:
        """What provenance.json keeps."""
        members = {name: answers.facts() for name, answers in self.answers.items()}
        return {"members": members, "warnings": list(warnings)}


def _other_text(teacher: Teacher) -> str:
    """What a teacher without classes gives."""
    if teacher.output == "values":
        return f"teacher {teacher.name}: values {', '.join(teacher.value_names)}"
    if not teacher.has_output:
        return f"teacher {teacher.name}: features alone"
    return f"teacher {teacher.name}: embeddings of {teacher.width:,} numbers"


def best_order(counts: np.ndarray) -> np.ndarray:
    """(C,) the column for each row, each taken once, for which the sum of the counts is largest; a tie keeps the diagonal.

    Args:
        counts: (C, C) integers >= 0.
    """
    count = len(counts)
    gain = (count + 1) * counts + np.eye(count, dtype=np.int64)  # so that the diagonal wins a tie
    return _assigned(-gain.astype(np.float64))


def _assigned(costs: np.ndarray) -> np.ndarray:
    """(n,) the column of each row, for which the sum of costs (n, n) is least, by shortest augmenting paths.

    Source: R. Jonker, A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
    Computing 38 (1987).
    """
    count = len(costs)
    potential = costs.min(axis=0)  # of the columns
    row_of, column_of = np.full(count, -1), np.full(count, -1)
    for column, row in enumerate(costs.argmin(axis=0)):  # what suits both is taken at once
        if column_of[row] < 0 and costs[row, column] - potential[column] <= (costs[row] - potential).min():
            row_of[column], column_of[row] = row, column
    for start in np.flatnonzero(column_of < 0):
        distance = costs[start] - potential
        before = np.full(count, start)
        done = np.zeros(count, bool)
        while True:
            column = int(np.where(done, np.inf, distance).argmin())
            least = distance[column]
            if row_of[column] < 0:
                break
            done[column] = True
            row = row_of[column]
            through = least + costs[row] - potential - (costs[row, column] - potential[column])
            nearer = ~done & (through < distance)
            distance[nearer], before[nearer] = through[nearer], row
        potential[done] += distance[done] - least
        while True:  # along the path back to its start
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return column_of

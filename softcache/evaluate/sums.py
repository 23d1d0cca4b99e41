"""What is counted over the batches of an evaluation: each kind of label has its own numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.data.label_kind import answers, has_several, is_known, is_yes
from softcache.data.transfer_set import TransferSet
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.spans import SpanCounts, marks_of

CALIBRATION_BINS = 15


def labels_of(transfer_set: TransferSet, index: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels of some samples, one each or a row of several; or of all their words (P,), and then how many words each has (B,)."""
    if transfer_set.positions is None:
        return transfer_set.labels[index], None
    own = transfer_set.positions.take(index)
    return own.labels, own.counts


class Sums:
    """Running sums over the batches of one evaluation, in float64: what float32 rounds together would count as a tie.

    Args:
        num_classes: C.
        multi_label: the data has several labels per sample: a yes-or-no decision is what is counted, not a sample.
        class_names: of data with labels of positions: where they mark spans, these are counted too.
    """

    def __init__(self, num_classes: int, *, multi_label: bool, class_names: Sequence[str] = ()) -> None:
        self.num_classes, self.multi_label = num_classes, multi_label
        self.labelled = self.decisions = self.right = self.within_five = self.wrong_samples = 0
        self.compared = self.agreed = 0
        self.nll = self.kl = 0.0
        self.bins = np.zeros((CALIBRATION_BINS, 3))  # count, confidence, right
        self.of_class = np.zeros((num_classes, 2), np.int64)  # errors, and of how many
        self.of_yes = np.zeros((num_classes, 2), np.int64)  # of several labels: the same where the answer is yes
        self.positions: int | None = None
        marks = marks_of(class_names)
        self.spans = None if marks is None else SpanCounts(marks)

    @classmethod
    def of(cls, transfer_set: TransferSet) -> Sums:
        """For a data set; tags of words may mark spans."""
        names = () if transfer_set.positions is None else transfer_set.class_names
        return cls(transfer_set.num_classes, multi_label=transfer_set.multi_label, class_names=names)

    def add(self, logits: Tensor, labels: np.ndarray, counts: np.ndarray | None) -> None:
        """A batch's logits against what `labels_of` gives of it."""
        wanted = torch.from_numpy(labels).to(logits.device)
        if counts is None:
            self.add_labels(logits, wanted)
        else:
            self.add_positions(logits, wanted, counts)

    def add_labels(self, logits: Tensor, labels: Tensor) -> None:
        """A batch's logits (B, C) against its labels, of the kind that was said."""
        assert has_several(labels) == self.multi_label
        if self.multi_label:
            self._add_decisions(logits.double(), labels)
        else:
            known = is_known(labels)
            if bool(known.any()):
                self._add_classes(logits[known].double(), labels[known].long())

    def add_positions(self, logits: Tensor, labels: Tensor, counts: np.ndarray) -> None:
        """A batch's logits (P, C) of all positions against their labels (P,), -1 = none; `counts` (B,) of each sample."""
        self.positions = (self.positions or 0) + len(labels)
        self.add_labels(logits, labels)
        said, own = (one.cpu().numpy() for one in (answers(logits, multi_label=False), labels))
        # a sample is wrong where a position of it is; the positions were counted as if they were samples
        wrong = (own >= 0) & (said != own)
        of_sample = np.repeat(np.arange(len(counts)), counts)
        self.wrong_samples += len(np.unique(of_sample[wrong])) - int(wrong.sum())
        if self.spans is not None:
            self.spans.add(said, own, counts)

    def _add_classes(self, logits: Tensor, labels: Tensor) -> None:
        said = answers(logits, multi_label=False)
        right = said == labels
        self.labelled += len(labels)
        self.decisions += len(labels)
        self.right += int(right.sum())
        self.wrong_samples += int((~right).sum())
        own = labels.cpu().numpy()
        self.of_class[:, 0] += np.bincount(own[(~right).cpu().numpy()], minlength=self.num_classes)
        self.of_class[:, 1] += np.bincount(own, minlength=self.num_classes)
        of_label = logits.gather(1, labels[:, None])
        equal = (logits == of_label).cumsum(dim=1).gather(1, labels[:, None]).squeeze(1)  # up to the label, with it
        self.within_five += int(((logits > of_label).sum(dim=1) + equal <= 5).sum())
        self.nll += float(F.cross_entropy(logits, labels, reduction="sum"))
        self._add_confidence(logits.softmax(dim=1).amax(dim=1), right)

    def _add_decisions(self, logits: Tensor, labels: Tensor) -> None:
        known, yes = is_known(labels), is_yes(labels)
        wrong = (answers(logits, multi_label=True) != yes) & known
        self.labelled += int(known.any(dim=1).sum())
        self.decisions += int(known.sum())
        self.right += int((known & ~wrong).sum())
        self.wrong_samples += int(wrong.any(dim=1).sum())
        for counts, asked in ((self.of_class, known), (self.of_yes, yes)):
            for place, counted in enumerate((wrong & asked, asked)):
                counts[:, place] += counted.sum(dim=0).cpu().numpy()
        losses = F.binary_cross_entropy_with_logits(logits, yes.double(), reduction="none")
        self.nll += float(losses[known].sum())
        self._add_confidence(logits.abs().sigmoid()[known], ~wrong[known])

    def _add_confidence(self, confidence: Tensor, right: Tensor) -> None:
        sure = confidence.cpu().numpy()
        place = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
        for column, values in enumerate((np.ones_like(sure), sure, right.cpu().numpy())):
            self.bins[:, column] += np.bincount(place, values, minlength=CALIBRATION_BINS)

    def add_targets(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        """A batch's logits (B, C) against those of a teacher, of labelled samples and others."""
        own, target = logits.double(), teacher_logits.double()
        same = answers(own, multi_label=self.multi_label) == answers(target, multi_label=self.multi_label)
        self.compared += same.numel()
        self.agreed += int(same.sum())
        own, target = own / temperature, target / temperature
        if self.multi_label:
            both = [(F.logsigmoid(sign * target), F.logsigmoid(sign * own)) for sign in (1, -1)]  # of yes, of no
        else:
            both = [(target.log_softmax(dim=1), own.log_softmax(dim=1))]
        self.kl += sum(float((log_p.exp() * (log_p - log_q)).sum()) for log_p, log_q in both)

    def result(self, samples: int, seconds: float, temperature: float, class_names: Sequence[str]) -> Evaluation:
        """What they come to.

        Args:
            samples: how many there were, labelled or not.
            temperature: of the comparison with a teacher.
            class_names: C names.
        """
        n, several = self.decisions, self.multi_label
        filled = self.bins[:, 0] > 0
        gaps = np.abs(self.bins[filled, 1] - self.bins[filled, 2])

        def by_name(counts: np.ndarray) -> dict[str, tuple[int, int]]:
            pairs = zip(class_names, counts.tolist(), strict=True)
            return {name: (errors, among) for name, (errors, among) in pairs}

        return Evaluation(
            samples=samples,
            labelled=self.labelled,
            seconds=seconds,
            multi_label=several,
            decisions=n,
            wrong_samples=self.wrong_samples if n else None,
            top1=self.right / n if n else None,
            top5=self.within_five / n if n and not several and self.num_classes > 5 else None,
            nll=self.nll / n if n else None,
            calibration_error=float(gaps.sum() / n) if n else None,
            agreement=self.agreed / self.compared if self.compared else None,
            kl=self.kl / self.compared if self.compared else None,
            temperature=temperature,
            class_errors=by_name(self.of_class),
            yes_errors=by_name(self.of_yes) if several else {},
            positions=self.positions,
            spans={} if self.spans is None else self.spans.by_type(),
        )

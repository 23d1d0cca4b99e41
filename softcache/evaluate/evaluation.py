"""What was measured of one model over one data set, and its tables: each number with what it is a share of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from softcache.evaluate.spans import span_scores
from softcache.report.tables import percent, table

OTHER_NUMBERS = {
    "cosine": "cosine to the teacher",
    "recall_at_10": "teacher's 10 nearest found (recall@10)",
    "spearman": "Spearman",
    "nearest_neighbour": "nearest neighbour right (recall@1)",
    "class_recall_at_5": "own class among 5 nearest (recall@5)",
    "linear_probe": "linear probe",
    "r2": "R squared",
    "mean_error": "mean absolute error",
    "r2_teacher": "R squared to the teacher",
    "spearman_teacher": "Spearman to the teacher",
    "mean_error_teacher": "mean absolute error to the teacher",
}
SHARES = ("recall_at_10", "nearest_neighbour", "class_recall_at_5", "linear_probe")  # of samples


@dataclass(frozen=True)
class Evaluation:
    """Measured over one data set; shares are of 1, `nll` and `kl` in nats. None where it does not apply.

    What is counted, a decision, is the class of a labelled sample; of data with several labels per sample, each known yes or no;
    of data with labels of words, the class of a labelled word. A model says the class with the largest logit, of equals the
    first, and yes where a logit is above 0.

    Attributes:
        samples, labelled: how many there were, and how many had a label (several: at least one that is known; of words: how many
            words had one).
        multi_label: the data has several labels per sample.
        decisions: how many `top1`, `errors`, `nll` and `calibration_error` are over; None: as many as are labelled.
        wrong_samples: how many samples have a wrong decision.
        top1: share of decisions that are right.
        top5: share of labelled samples whose label is among the five largest, of equals the first ones; one class per sample,
            and more than five classes.
        nll: mean negative log-likelihood of a decision: cross-entropy, or of several labels binary cross-entropy.
        calibration_error: expected calibration error in 15 equal bins of confidence (Guo et al. 2017), which is the
            probability of what the model says: of several labels that of the yes or the no.
        agreement: share of all samples where the model says what the cache says; of several labels, of all samples' labels; of
            words, of all that have a record.
        kl: mean KL(cache || model) at `temperature` over the same, not scaled by T**2; of several labels the binary one.
        bias: class -> what was added to its logits.
        class_errors: class -> (errors, of how many with this label); of several labels: label -> (errors, of how many known).
        yes_errors: several labels alone: label -> (those that are yes and were told no, of how many that are yes).
        numbers: of a model whose outputs are no classes, by the names in OTHER_NUMBERS.
        positions: of data with labels of words, how many words there were; else None.
        spans: where the classes mark spans (`B-PER`, `I-PER`, `O`): type -> how many were right, told and there. A span is right
            where its type, its first and its last word are.
    """

    samples: int
    labelled: int
    seconds: float
    top1: float | None = None
    top5: float | None = None
    nll: float | None = None
    calibration_error: float | None = None
    agreement: float | None = None
    kl: float | None = None
    temperature: float = 1.0
    bias: Mapping[str, float] = field(default_factory=dict)
    class_errors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    multi_label: bool = False
    decisions: int | None = None
    wrong_samples: int | None = None
    yes_errors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    positions: int | None = None
    spans: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def span_f1(self) -> float | None:
        """Micro-averaged F1 of exact spans; None where the classes mark none, or none is told or there."""
        return span_scores(self.spans)["f1"]

    @property
    def counted(self) -> int:
        """Of how many decisions the errors are."""
        return self.labelled if self.decisions is None else self.decisions

    @property
    def errors(self) -> int | None:
        """Decisions that are wrong."""
        return None if self.top1 is None else round((1 - self.top1) * self.counted)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        found = {**asdict(self), "errors": self.errors}
        return found | (
            {f"span_{name}": value for name, value in span_scores(self.spans).items()} if self.spans else {}
        )

    def columns(self) -> dict[str, Any]:
        """What a run's row of metrics has of it."""
        if self.numbers:
            return {f"eval_{name}": value for name, value in self.numbers.items()}
        found = {"eval_top1": self.top1, "eval_nll": self.nll, "eval_errors": self.errors}
        found |= {"eval_span_f1": self.span_f1} if self.spans else {}
        return found | ({"eval_wrong_samples": self.wrong_samples} if self.multi_label else {})

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) lines for a table, without what does not apply."""
        several = self.multi_label
        words = self.positions is not None
        each = " a decision" if several else " a word" if words else ""
        asked = self.samples * len(self.class_errors)
        of_all = self.samples if self.positions is None else self.positions
        facts = [
            ("samples", f"{self.samples:,}"),
            ("words", f"{self.positions:,}" if words else None),
            ("with a label", None if self.labelled in (0, of_all) else f"{self.labelled:,}"),
            ("known yes or no", f"{self.counted:,} of {asked:,}" if several and self.counted < asked else None),
            ("right decisions" if several else "right words" if words else "top-1", self._right()),
            ("top-5", None if self.top5 is None else percent(self.top5)),
            ("NLL", None if self.nll is None else f"{self.nll:.4f} nats{each}"),
            ("calibration error", None if self.calibration_error is None else percent(self.calibration_error)),
            *self._span_rows(),
            (
                "agreement with the cache",
                None
                if self.agreement is None
                else f"{percent(self.agreement)} of the {'decisions' if several else 'words' if words else 'samples'}",
            ),
            (
                f"KL to the cache at T={self.temperature:g}",
                None if self.kl is None else f"{self.kl:.5f} nats{each}",
            ),
            *(
                (text, percent(self.numbers[name]) if name in SHARES else f"{self.numbers[name]:.4f}")
                for name, text in OTHER_NUMBERS.items()
                if name in self.numbers
            ),
            ("bias", ", ".join(f"{name} {value:+g}" for name, value in self.bias.items()) or None),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return [(name, value) for name, value in facts if value is not None]

    def _right(self) -> str | None:
        """The share that is right, and how many are wrong of how many."""
        if self.top1 is None:
            return None
        if self.positions is not None:
            samples = f"in {self.wrong_samples:,} of {self.samples:,} samples"
            return f"{percent(self.top1)} ({self.errors:,} errors in {self.counted:,}, {samples})"
        if not self.multi_label:
            return f"{percent(self.top1)} ({self.errors:,} errors in {self.counted:,})"
        samples = f"in {self.wrong_samples:,} of {self.labelled:,} samples"
        return f"{percent(self.top1)} ({self.errors:,} errors in {self.counted:,}, {samples})"

    def _span_rows(self) -> list[tuple[str, str | None]]:
        scores = span_scores(self.spans)
        if not self.spans or scores["f1"] is None:
            return []
        right, told, there = (sum(one[i] for one in self.spans.values()) for i in range(3))
        return [
            ("span F1", f"{percent(scores['f1'])} ({right:,} right of {told:,} told and {there:,} there)"),
            *((f"span {name}", _percent(scores[name])) for name in ("precision", "recall")),
        ]


def summary(title: str, result: Evaluation) -> str:
    """The readable table of one evaluation."""
    return table([title, ""], result.rows())


def class_table(result: Evaluation) -> str:
    """The errors on each class; of several labels also how many of them are a yes that was told no, and the other way round."""
    rows = []
    for name, (errors, among) in result.class_errors.items():
        own: list[Any] = [name, among, errors, percent(errors / among) if among else "-"]
        if result.multi_label:
            missed, yes = result.yes_errors[name]
            own += [f"{missed:,} of {yes:,}", f"{errors - missed:,} of {among - yes:,}"]
        rows.append(own)
    if result.multi_label:
        return table(["label", "known", "errors", "share", "yes, told no", "no, told yes"], rows)
    what = "samples" if result.positions is None else "words"
    return table(["class", what, "errors", "share"], rows)


def span_table(result: Evaluation) -> str:
    """The spans of each type."""
    rows: list[list[Any]] = []
    for name, counts in result.spans.items():
        scores = span_scores({name: counts})
        shown = [_percent(scores[one]) for one in ("precision", "recall", "f1")]
        rows.append([name or "(no type)", *counts, *shown])
    return table(["span", "right", "told", "there", "precision", "recall", "F1"], rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)

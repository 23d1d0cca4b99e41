"""What was measured over one member's records while they were written: a fact of each file, summed for the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from softcache.cache.schema import FORMAT_VERSION


@dataclass(frozen=True)
class Divergence:
    """KL(given || stored) at one temperature, over the measured records: sum and worst, in nats."""

    sum: float = 0.0
    worst: float = 0.0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(self.sum + other.sum, max(self.worst, other.worst))

    def to_json(self) -> dict[str, str]:
        return {"sum": repr(self.sum), "worst": repr(self.worst)}

    @classmethod
    def from_json(cls, entry: Mapping[str, str]) -> Divergence:
        return cls(float(entry["sum"]), float(entry["worst"]))


@dataclass(frozen=True)
class MemberStatistics:
    """Measured over records of one member while they were written.

    Attributes:
        records: rows x views.
        labelled: records of samples with one class label.
        correct: of those, where the largest logit is the label's.
        entropy_sum: of softmax(logits) at T=1, in nats.
        max_eps: the largest |stored - given| of any logit; 0 where the codec has no such bound.
        floored: probabilities of exactly zero that were stored as the floor's logarithm.
        dense: records that a lossy codec could not hold within its promise and that are kept as float16.
        measured: records that the next two were measured on.
        agreed: of those, where the largest stored logit is the largest given one.
        kl: temperature -> divergence.
        feature_errors: feature -> the largest relative L2 error of a record.
        kept: temperature -> the sum over records of the stored probability of the classes kept, where a codec keeps some; of
            version 2 alone.
        error: relative L2 error of the stored numbers over the measured records, of outputs without classes; else None.
    """

    records: int = 0
    labelled: int = 0
    correct: int = 0
    entropy_sum: float = 0.0
    max_eps: float = 0.0
    floored: int = 0
    dense: int = 0
    measured: int = 0
    agreed: int = 0
    kl: Mapping[str, Divergence] = field(default_factory=dict)
    feature_errors: Mapping[str, float] = field(default_factory=dict)
    error: Divergence | None = None
    kept: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: MemberStatistics) -> MemberStatistics:
        return MemberStatistics(
            self.records + other.records,
            self.labelled + other.labelled,
            self.correct + other.correct,
            self.entropy_sum + other.entropy_sum,
            max(self.max_eps, other.max_eps),
            self.floored + other.floored,
            self.dense + other.dense,
            self.measured + other.measured,
            self.agreed + other.agreed,
            {t: self.kl.get(t, Divergence()) + other.kl.get(t, Divergence()) for t in {**self.kl, **other.kl}},
            {
                name: max(self.feature_errors.get(name, 0.0), other.feature_errors.get(name, 0.0))
                for name in {**self.feature_errors, **other.feature_errors}
            },
            other.error if self.error is None else self.error if other.error is None else self.error + other.error,
            self._kept_with(other),
        )

    def _kept_with(self, other: MemberStatistics) -> Mapping[str, float]:
        """Of both together; nothing where of some records it is not known."""
        if not self.records or not other.records:
            return other.kept if not self.records else self.kept
        return {t: total + other.kept[t] for t, total in self.kept.items() if t in other.kept}

    @property
    def entropy(self) -> float:
        return self.entropy_sum / max(1, self.records)

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    @property
    def agreement(self) -> float | None:
        return self.agreed / self.measured if self.measured else None

    @property
    def mean_kept(self) -> dict[float, float]:
        """Temperature -> the mean probability of the classes kept."""
        return {float(t): total / max(1, self.records) for t, total in self.kept.items()}

    def mean_kl(self, temperature: str) -> float:
        return self.kl[temperature].sum / max(1, self.measured)

    def to_json(self, format: int = FORMAT_VERSION) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "records": self.records,
            "labelled": self.labelled,
            "correct": self.correct,
            "entropy_sum": repr(self.entropy_sum),
            "max_eps": repr(self.max_eps),
            "floored": self.floored,
            "dense": self.dense,
            "measured": self.measured,
            "agreed": self.agreed,
            "kl": {t: d.to_json() for t, d in self.kl.items()},
            "feature_errors": {name: repr(value) for name, value in self.feature_errors.items()},
        }
        if format != FORMAT_VERSION:
            entry["error"] = None if self.error is None else self.error.to_json()
            if self.kept:
                entry["kept"] = {t: repr(total) for t, total in self.kept.items()}
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        return cls(
            int(entry["records"]),
            int(entry["labelled"]),
            int(entry["correct"]),
            float(entry["entropy_sum"]),
            float(entry["max_eps"]),
            int(entry["floored"]),
            int(entry["dense"]),
            int(entry["measured"]),
            int(entry["agreed"]),
            {str(t): Divergence.from_json(d) for t, d in entry["kl"].items()},
            {str(name): float(value) for name, value in entry["feature_errors"].items()},
            None if entry.get("error") is None else Divergence.from_json(entry["error"]),
            {str(t): float(total) for t, total in entry.get("kept", {}).items()},
        )

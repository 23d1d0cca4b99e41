"""What a student is asked to do: weighted loss terms, against hard labels or against the stored outputs of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softcache.data.label_kind import is_known
from softcache.errors import LossError
from softcache.losses import CLASS_WEIGHTS, CLASSIFIER, OUTPUT, Loss, LossTerm
from softcache.losses.schedules import Moment, Schedule
from softcache.models import Model
from softcache.models.graft import graft
from softcache.models.projector import Projector
from softcache.targets.batch import Targets
from softcache.targets.ensemble import KEEPS_LEVEL
from softcache.targets.teacher import CachedTeacher
from softcache.train.pairs import Pair, Student, pairs_of
from softcache.train.ranks import Ranks
from softcache.train.stages import Stage
from softcache.train.term_modules import Sizes, TermModules
from softcache.train.terms import check_pairs, named_terms

MANY_CLASSES = 32768  # from here on whole float32 copies of the batch's logits are avoided
HEAD_INPUTS = ("head_ids", "head_logits", "tail_logsumexp")  # in the order in which targets give them


@dataclass(frozen=True)
class Labels:
    """The hard labels of one batch, on the device.

    Attributes:
        own: (B,) int64 class index or -1, of each row that the student gives; or (B, C) bool, int8 with -1 = unknown.
        partners: the same of the samples that the views are mixed with; None for views that are not mixed.
        shares: (B,) float32 weight of the own label; None likewise.
    """

    own: Tensor
    partners: Tensor | None = None
    shares: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """() float64 labelled weight of the batch, of several labels that of all that are known: what a mean divides by."""
        known = is_known(self.own)
        if self.partners is None or self.shares is None:
            return known.sum(dtype=torch.float64)
        shares = self.shares.double().reshape(-1, *[1] * (known.ndim - 1))  # (B,) or (B, 1)
        return (shares * known + (1 - shares) * is_known(self.partners)).sum()


@dataclass(frozen=True)
class Given:
    """What the terms are given of one batch, or of a piece of it, beside the student's outputs.

    A row is a sample, or where samples have several answers a position of one: P rows, sample after sample, and no padding.

    Attributes:
        labels: of the rows.
        targets: of the cache, None without one; a row for each that has a record.
        samples: (B,) int64 positions in the transfer set; for losses with a memory of them.
        sample_ids: (B,) int64, the bits of the uint64 ids; likewise.
        step: number of the optimiser step, over all stages.
        counts: rows with a record of this piece on each rank.
        factors: what the mean over a rank's own rows is multiplied with, so that the mean over ranks, summed over pieces, is the
            mean over the global batch: by the kind of mean (`mean_of`). Empty: 1.
        recorded: (Q,) int64 which of the rows have a record in the cache; None: all of them.
    """

    labels: Labels
    targets: Targets | None = None
    samples: Tensor | None = None
    sample_ids: Tensor | None = None
    step: int = 0
    counts: tuple[int, ...] = ()
    factors: Mapping[str, float | Tensor] = field(default_factory=dict)
    recorded: Tensor | None = None

    def of_records(self, rows: Tensor) -> Tensor:
        """(Q, ...) of the rows (P, ...) that have a record."""
        return rows if self.recorded is None else rows[self.recorded]

    @property
    def labelled(self) -> Tensor:
        """(2,) float64 labelled weight of the rows, and of those that have a record: what a mean divides by."""
        records = self.labels if self.recorded is None else Labels(self.labels.own[self.recorded])
        return torch.stack([self.labels.weight.double(), records.weight.double()])

    def are_none(self, loss: Loss) -> bool:
        """Whether nothing is left of this piece that a loss could be of: samples without a word, on this rank, or on all."""
        if loss.over == "batch" and self.counts:
            return not sum(self.counts)
        return not len(self.of_records(self.labels.own) if loss.has_teacher else self.labels.own)


def mean_of(loss: Loss) -> str:
    """What the mean of a loss runs over: "samples", "batch", "labels", or "records" for labelled rows that have one."""
    return "records" if loss.over == "labels" and loss.has_teacher else loss.over


class Objective(nn.Module):
    """The weighted terms of one stage.

    Args:
        terms: what to learn.
        term_modules: what each term has of its own; stages may share them. None: made here, for losses on logits and labels.
        teacher: of a run with a cache.
        ranks: who computes the rest of the batch.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        term_modules: Sequence[TermModules] | None = None,
        teacher: CachedTeacher | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.terms = dict(named_terms(terms))
        made = [TermModules(term, teacher=teacher) for term in terms] if term_modules is None else term_modules
        self.term_modules = nn.ModuleList(made)
        self.teacher, self.ranks = teacher, ranks or Ranks()

    @property
    def pairs(self) -> list[Pair]:
        return [pair for own in self.term_modules for pair in own.pairs]  # type: ignore[union-attr]

    @property
    def over_labels(self) -> bool:
        """Some term is a mean over the labelled samples."""
        return any(term.loss.over == "labels" for term in self.terms.values())

    @property
    def class_weights(self) -> dict[str, list[float]]:
        """Term -> the weights of its classes, of those that have some."""
        given = zip(self.terms, self.term_modules, strict=True)
        return {name: own.class_weights.tolist() for name, own in given if own.class_weights is not None}  # type: ignore[operator]

    @property
    def feature_names(self) -> list[str]:
        """Features to read of the cache."""
        return list(dict.fromkeys(pair.stored for pair in self.pairs if pair.stored not in (CLASSIFIER, OUTPUT)))

    def forward(
        self, student_logits: Tensor, outputs: Mapping[str, Tensor], given: Given, moment: Moment
    ) -> dict[str, Tensor]:
        """Term -> () unweighted value on this rank's rows; the mean over ranks is the value on the global batch."""
        batch = _Batch(student_logits, given, self.teacher)
        outputs = {layer: given.of_records(value) for layer, value in outputs.items()}
        values = {}
        for (name, term), own in zip(self.terms.items(), self.term_modules, strict=True):
            assert isinstance(own, TermModules)
            if given.are_none(term.loss):
                values[name] = _nothing(student_logits, own)
                continue
            settings = term.settings_at(moment)
            if CLASS_WEIGHTS in settings:
                settings[CLASS_WEIGHTS] = own.class_weights
            calls = own.calls(outputs, given.targets)
            found = [self._value(term, settings, core, features, batch) for core, features in calls]
            value = found[0] if len(found) == 1 else torch.stack(found).sum()
            factor = given.factors[mean_of(term.loss)] if given.factors else 1.0
            values[name] = value if isinstance(factor, float) and factor == 1.0 else value * factor
        return values

    def total(self, values: Mapping[str, Tensor], moment: Moment) -> Tensor:
        """The weighted sum of the terms."""
        return torch.stack([term.weight.at(moment) * values[name] for name, term in self.terms.items()]).sum()

    def scalars(self, moment: Moment) -> dict[str, float]:
        """What changes over the stage, by `term.setting`."""
        found = {}
        for name, term in self.terms.items():
            for key, value in {"weight": term.weight, **term.settings}.items():
                if isinstance(value, Schedule) and not value.is_constant:
                    found[f"{name}.{key}"] = value.at(moment)
        return found

    def _value(
        self,
        term: LossTerm,
        settings: Mapping[str, Any],
        core: Callable[..., Tensor],
        features: Mapping[str, Any],
        batch: _Batch,
    ) -> Tensor:
        """One call of a loss, with the inputs that it names."""
        loss, given = term.loss, batch.given
        if loss.many_classes is not None and self._has_many_classes(term, settings):
            return loss.many_classes(batch.rows(term), batch.teacher_rows, settings["temperature"])
        if loss.mixed is not None and given.labels.partners is not None:
            labels = {
                "labels": given.labels.own,
                "partner_labels": given.labels.partners,
                "shares": given.labels.shares,
            }
            return loss.mixed(batch.student_logits, **labels, **settings)
        inputs = {
            name: features[name] if name in features else batch.find(name, term, settings) for name in loss.inputs
        }
        if loss.over == "batch" and self.ranks.size > 1:
            inputs = {name: self._of_all_ranks(name, value, given) for name, value in inputs.items()}
        changing = {key: value for key, value in settings.items() if key not in loss.fixed}
        try:
            return core(**inputs, **changing)
        except ValueError as exc:
            raise LossError(f"loss {term.name!r}: {exc}") from exc

    def _of_all_ranks(self, name: str, value: Any, given: Given) -> Any:
        if name in ("step", "classifier_weight", "classifier_bias"):
            return value
        if isinstance(value, list):
            return [self.ranks.gather(one, given.counts) for one in value]
        return self.ranks.gather(value, given.counts)

    def _has_many_classes(self, term: LossTerm, settings: Mapping[str, Any]) -> bool:
        assert self.teacher is not None
        plain = all(value == term.loss.defaults[key] for key, value in settings.items() if key != "temperature")
        return plain and self.teacher.cache.num_classes >= MANY_CLASSES and self.teacher.combine in KEEPS_LEVEL


def _nothing(student_logits: Tensor, own: nn.Module) -> Tensor:
    """() zero, in which all that learns has a part: other ranks wait for its gradient."""
    return 0.0 * torch.stack([student_logits.sum(), *(parameter.sum() for parameter in own.parameters())]).sum()


class _Batch:
    """The inputs of losses on one batch, by the names of INPUTS; the teacher's logits are made once for each temperature."""

    def __init__(self, student_logits: Tensor, given: Given, teacher: CachedTeacher | None) -> None:
        self.student_logits, self.given, self._teacher = student_logits, given, teacher
        self._logits: dict[tuple[float, str], Tensor] = {}
        self._heads: dict[float, tuple[Tensor, Tensor, Tensor]] = {}

    def find(self, name: str, term: LossTerm, settings: Mapping[str, Any]) -> Any:
        """One input that is no feature."""
        if name == "student_logits":
            return self.rows(term)
        if name == "labels":
            labels = self.given.labels.own
            return self.given.of_records(labels) if term.loss.has_teacher else labels
        if name in ("samples", "sample_ids", "step"):
            return getattr(self.given, name)
        assert self.given.targets is not None and self._teacher is not None
        temperature = settings.get("temperature", 1.0)
        if name in HEAD_INPUTS:
            if temperature not in self._heads:
                self._heads[temperature] = self.given.targets.head(self._teacher.class_members[0], temperature)
            return self._heads[temperature][HEAD_INPUTS.index(name)]
        assert name == "teacher_logits", name
        link = term.loss.link if term.loss.link == "sigmoid" else self.given.targets.link
        asked = (temperature, link)
        if asked not in self._logits:
            self._logits[asked] = self._teacher.logits(self.given.targets, temperature, link)
        return self._logits[asked]

    def rows(self, term: LossTerm) -> Tensor:
        """(B, C) of the student: of a term that learns from the teacher, those that have a record."""
        return self.given.of_records(self.student_logits) if term.loss.has_teacher else self.student_logits

    def teacher_rows(self, first: int, last: int) -> Tensor:
        """(last - first, C) logits of some rows, decoded when they are asked for."""
        assert self.given.targets is not None and self._teacher is not None
        return self._teacher.logits(self.given.targets.rows_between(first, last), 1.0)


def build_objectives(
    stages: Sequence[Stage], model: Model, inputs: Any, teacher: CachedTeacher | None, sizes: Sizes, ranks: Ranks
) -> tuple[list[Objective], Student | None]:
    """The objective of each stage, and the student as probed with a batch of inputs (None where no term taps it).

    A term that stands in several stages with the same layers and fixed settings keeps what it learned in the earlier ones.
    A loss that grafts the teacher's classifier onto the student does so now.

    Raises:
        LossError: a feature that is not in the cache, layers or widths that do not fit.
    """
    student = None
    terms = [term for stage in stages for term in stage.terms]
    if any(term.loss.has_features for term in terms):
        width = None if model.has_classes else model.num_classes
        student = Student(model.net, model.input.prepare(inputs), width)
        grafting = {tuple(term.placement.items()): term for term in terms if term.loss.graft}
        if len(grafting) > 1:
            raise LossError("the student can take over one teacher's classifier, and two terms ask for it")
        for term in grafting.values():
            _graft(term, model, student, teacher, inputs)
            student = Student(model.net, model.input.prepare(inputs))
    made: dict[Any, TermModules] = {}
    objectives = []
    for stage in stages:
        modules = []
        for name, term in named_terms(stage.terms):
            fixed = [(key, term.settings[key]) for key in (*term.loss.fixed, CLASS_WEIGHTS) if key in term.settings]
            key = (name, *sorted(term.placement.items()), *fixed)
            if key not in made:
                pairs = []
                if term.loss.has_features:
                    assert teacher is not None and student is not None
                    grafted = model.graft.features if term.loss.graft and model.graft is not None else None
                    pairs = pairs_of(term, teacher.cache, teacher.members, student, layer=grafted)
                    if teacher.index is not None:
                        check_pairs(term, pairs)
                made[key] = TermModules(term, pairs, sizes, teacher)
            modules.append(made[key])
        objectives.append(Objective(stage.terms, modules, teacher, ranks))
    return objectives, student


def _graft(term: LossTerm, model: Model, student: Student, teacher: CachedTeacher | None, inputs: Any) -> None:
    assert teacher is not None
    (pair, *more) = pairs_of(term, teacher.cache, teacher.members, student)
    if more:
        raise LossError(f"loss {term.name!r} projects one layer", tip="name it: layer=LAYER")
    weight, bias = teacher.classifier()
    if len(pair.student_shapes[0]) != len(pair.teacher_shape):
        raise LossError(
            f"loss {term.name!r}: layer {'+'.join(pair.student)} of the student gives {pair.student_shapes[0]}, {pair.stored} "
            f"of the teacher {pair.teacher_shape}: a projector goes from a map to a map, or from a vector to a vector",
            tip="student=head puts it in front of the student's final linear layer; dump LAYER:map for a map",
        )
    layer = student.classifier_name if pair.student == (CLASSIFIER,) else pair.student[0]
    projector = Projector(pair.student_shapes[0], pair.teacher_shape)
    graft(model, layer, projector, weight, bias, inputs)

"""What a student is asked to do: weighted loss terms, against hard labels or against the stored outputs of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softcache.ensemble import KEEPS_LEVEL, check_rule
from softcache.errors import ConfigError, LossError
from softcache.features import FeatureSpec
from softcache.losses import HEAD, VECTORS, Loss, LossTerm, make_term
from softcache.losses.adapters import make_adapter
from softcache.losses.schedules import Moment, Schedule
from softcache.pairing import SIZED, Pair
from softcache.ranks import Ranks
from softcache.spec import split_term
from softcache.targets import Cache, Targets


@dataclass(frozen=True)
class Labels:
    """The hard labels of one batch, on the device.

    Attributes:
        own: (B,) int64 class index or -1, or (B, C) bool.
        partners: the same of the samples that the views are mixed with; None for views that are not mixed.
        shares: (B,) float32 weight of the own label; None likewise.
    """

    own: Tensor
    partners: Tensor | None = None
    shares: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """() float64 labelled weight of the batch: what a mean over labels divides by."""
        if self.own.ndim == 2:
            return torch.tensor(float(len(self.own)), dtype=torch.float64, device=self.own.device)
        if self.partners is None or self.shares is None:
            return (self.own >= 0).sum(dtype=torch.float64)
        shares = self.shares.double()
        return (shares * (self.own >= 0) + (1 - shares) * (self.partners >= 0)).sum()


@dataclass(frozen=True)
class Given:
    """What the terms are given of one batch, or of a part of it, beside the student's outputs.

    Attributes:
        labels: of the rows.
        targets: of the cache, None without one.
        samples: (B,) int64 positions in the transfer set; for losses with a memory of them.
        sample_ids: (B,) int64, the bits of the uint64 ids; likewise.
        step: number of the optimiser step, over all stages.
        counts: rows of this part on each rank.
        factors: what the mean over a rank's own rows is multiplied with, so that the mean over ranks, summed over parts, is the
            mean over the global batch: by the kind of mean (Loss.over). Empty: 1.
    """

    labels: Labels
    targets: Targets | None = None
    samples: Tensor | None = None
    sample_ids: Tensor | None = None
    step: int = 0
    counts: tuple[int, ...] = ()
    factors: Mapping[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """How a cache's members are the teacher of a run.

    Attributes:
        cache: where they are.
        combine: the rule.
        weights: member -> weight; None for all equally.
        draw_seed: of the rule "draw".
        classes: indices of the classes that the student has; None for all.
    """

    cache: Cache
    combine: str = "mean_logits"
    weights: Mapping[str, float] | None = None
    draw_seed: int = 0
    classes: tuple[int, ...] | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return self.cache.members if self.weights is None else tuple(self.weights)

    def logits(self, targets: Targets, temperature: float, link: str = "softmax") -> Tensor:
        """(B, C) of the combined members; of the student's classes only, where it has not all."""
        combined = targets.combined(
            self.combine, weights=self.weights, temperature=temperature, link=link, draw_seed=self.draw_seed
        )
        return combined if self.classes is None else combined[:, list(self.classes)]

    def classifier(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight and (C,) bias of the only member's final linear layer.

        Raises:
            LossError: several members, or one whose layer is not in the cache.
        """
        if len(self.members) != 1:
            raise LossError(
                "a loss on the teacher's classifier takes one teacher", tip="choose one with --members NAME"
            )
        head = self.cache.head(self.members[0])
        if head is None:
            raise LossError(
                f"the cache does not keep the final linear layer of member {self.members[0]!r}",
                tip="dump a teacher that ends with an nn.Linear which gives its logits",
            )
        weight, bias = head
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        chosen = slice(None) if self.classes is None else list(self.classes)
        return weight[chosen], bias[chosen]


@dataclass(frozen=True)
class Sizes:
    """What learned parts and memories are made for.

    Attributes:
        num_samples: of the transfer set.
        num_classes: C of the student.
        sample_labels: (num_samples,) int64, -1 = none.
        seed: of the run.
    """

    num_samples: int = 0
    num_classes: int = 0
    sample_labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    seed: int = 0


class Parts(nn.Module):
    """What a term has of its own: an adapter for each pair of layers, and the loss's module where it has state.

    Raises:
        LossError: widths or sizes that do not fit.
    """

    def __init__(
        self,
        term: LossTerm,
        pairs: Sequence[Pair] = (),
        sizes: Sizes = Sizes(),
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        loss = term.loss
        self.pairs = tuple(pairs)
        kind = term.placement.get("adapter", loss.adapter)
        self.adapters = nn.ModuleList()
        shapes = []
        for pair in self.pairs:
            try:
                adapter = _adapter(loss, kind, pair)
                shapes.append(_adapted_shape(pair, adapter))
            except LossError as exc:
                exc.add_note(
                    f"loss {term.name!r}: layer {'+'.join(pair.student)} of the student, {pair.stored} of the teacher"
                )
                raise
            self.adapters.append(adapter)
        joint = loss.needs("student_levels")
        self.cores = nn.ModuleList()
        if loss.module is not None:
            each: list[tuple[tuple[int, ...] | None, Pair | None]] = [(None, None)]
            if pairs and not joint:
                each = list(zip(shapes, pairs, strict=True))
            for one in each:
                self.cores.append(_core(term, *one, shapes, self.pairs, sizes))
        elif not joint:
            for own, pair in zip(shapes, pairs, strict=True):
                if (loss.widths or not _is_free(pair.reduction)) and own != pair.teacher_shape:
                    raise LossError(
                        f"loss {term.name!r}: layer {'+'.join(pair.student)} of the student gives {own}, "
                        f"{pair.stored} of the teacher {pair.teacher_shape}",
                        tip="name layers that fit: layer=, student="
                        + ("" if len(pair.student) > 1 else "; or add adapter=linear"),
                    )
        if loss.needs("classifier_weight", "classifier_bias"):
            assert teacher is not None
            weight, bias = teacher.classifier()
            for pair in self.pairs:
                if pair.teacher_shape != weight.shape[1:]:
                    raise LossError(
                        f"loss {term.name!r}: {pair.stored} of the teacher is {pair.teacher_shape}, its classifier takes "
                        f"{weight.shape[1]} numbers",
                        tip="it needs what the final linear layer takes: dump --codec linear_head, or the features before it",
                    )
            self.register_buffer("classifier_weight", weight, persistent=False)
            self.register_buffer("classifier_bias", bias, persistent=False)

    def student_tensor(self, index: int, outputs: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) of one pair, as the loss gets it: a map is adapted, then reduced; a vector the other way round."""
        pair = self.pairs[index]
        raw = [outputs[layer] for layer in pair.student]
        if pair.reduction in VECTORS:
            vector = raw[0] if pair.student == (HEAD,) else FeatureSpec(("",), pair.student_reduction).reduce(raw[0])
            return self.adapters[index](vector)
        layers = tuple(pair.student)
        maps = [self.adapters[index](raw[0])] if len(raw) == 1 else raw
        return FeatureSpec(layers, pair.student_reduction).reduce(*maps)


def _is_free(reduction: str) -> bool:
    return reduction in VECTORS


def _adapter(loss: Loss, kind: str, pair: Pair) -> nn.Module:
    """Between a student's layer and the teacher's: to its width where that matters, to its size where that does."""
    if len(pair.student) > 1:
        return nn.Identity()
    own = pair.student_shapes[0]
    if pair.reduction in VECTORS:
        spec = FeatureSpec(("",), pair.student_reduction)
        vector = own if pair.student == (HEAD,) else spec.reduced_shape(own)
        if not loss.widths and kind == "identity":
            return nn.Identity()
        return make_adapter(kind, vector, pair.teacher_shape)
    teacher = pair.teacher_shapes[0]
    if len(own) != len(teacher):
        raise LossError(f"it gives {own}, the teacher's layer {teacher}", tip="name another layer: student=LAYER")
    if len(own) < 3:
        return make_adapter(kind, own, teacher) if loss.widths else nn.Identity()
    width = teacher[0] if loss.widths or kind != "identity" else own[0]
    size = teacher[1:] if pair.reduction in SIZED else own[1:]
    return make_adapter(kind, own, (width, *size))


def _adapted_shape(pair: Pair, adapter: nn.Module) -> tuple[int, ...]:
    """Of one record of a student's layer as the loss gets it."""
    if pair.reduction in VECTORS:
        own = pair.student_shapes[0]
        spec = FeatureSpec(("",), pair.student_reduction)
        vector = own if pair.student == (HEAD,) else spec.reduced_shape(own)
        return tuple(adapter(torch.zeros(2, *vector)).shape[1:])
    with torch.no_grad():
        shapes = pair.student_shapes
        if len(shapes) == 1:
            shapes = (tuple(adapter(torch.zeros(2, *shapes[0])).shape[1:]),)
    return FeatureSpec(pair.student, pair.student_reduction).reduced_shape(*shapes)


def _core(
    term: LossTerm,
    own: tuple[int, ...] | None,
    pair: Pair | None,
    shapes: Sequence[tuple[int, ...]],
    pairs: Sequence[Pair],
    sizes: Sizes,
) -> nn.Module:
    """The module of a loss that has state, built for the shapes it will see."""
    known: dict[str, Any] = {
        "student_shape": own,
        "teacher_shape": None if pair is None else pair.teacher_shape,
        "student_shapes": list(shapes),
        "teacher_shapes": [one.teacher_shape for one in pairs],
        **vars(sizes),
    }
    module = term.loss.module
    assert module is not None
    fixed = {name: term.settings[name] for name in term.loss.fixed}
    try:
        return module(**{name: known[name] for name in term.loss.sizes}, **fixed)
    except ValueError as exc:
        raise LossError(f"loss {term.name!r}: {exc}") from exc


class Objective(nn.Module):
    """The weighted terms of one stage.

    Args:
        terms: what to learn.
        parts: what each term has of its own; stages may share them. None: made here, for losses on logits and labels.
        teacher: of a run with a cache.
        ranks: who computes the rest of the batch.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        parts: Sequence[Parts] | None = None,
        teacher: Teacher | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.terms = dict(named_terms(terms))
        self.parts = nn.ModuleList([Parts(term, teacher=teacher) for term in terms] if parts is None else parts)
        self.teacher, self.ranks = teacher, ranks or Ranks()

    @property
    def pairs(self) -> list[Pair]:
        return [pair for part in self.parts for pair in part.pairs]  # type: ignore[union-attr]

    @property
    def over_labels(self) -> bool:
        """Some term is a mean over the labelled samples."""
        return any(term.loss.over == "labels" for term in self.terms.values())

    @property
    def feature_names(self) -> list[str]:
        """Features to read of the cache."""
        return list(dict.fromkeys(pair.stored for pair in self.pairs if pair.stored != HEAD))

    def forward(
        self, student_logits: Tensor, outputs: Mapping[str, Tensor], given: Given, moment: Moment
    ) -> dict[str, Tensor]:
        """Term -> () unweighted value on this rank's rows; the mean over ranks is the value on the global batch."""
        logits: dict[tuple[float, str], Tensor] = {}
        values = {}
        for (name, term), parts in zip(self.terms.items(), self.parts, strict=True):
            assert isinstance(parts, Parts)
            settings = {key: v.at(moment) if isinstance(v, Schedule) else v for key, v in term.settings.items()}
            find = partial(self._find, term, settings, student_logits, given, logits)
            if term.loss.needs("student_features"):
                pairs = range(len(parts.pairs))
                value = torch.stack(
                    [self._pair_value(term, parts, i, settings, find, outputs, given) for i in pairs]
                ).sum()
            else:
                extra: dict[str, Any] = {}
                if term.loss.needs("student_levels"):
                    assert given.targets is not None
                    extra["student_levels"] = [parts.student_tensor(i, outputs) for i in range(len(parts.pairs))]
                    extra["teacher_levels"] = [pair.teacher_tensor(given.targets) for pair in parts.pairs]
                value = self._value(term, parts, 0, settings, find, extra, given)
            factor = given.factors[term.loss.over] if given.factors else 1.0
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

    def _pair_value(
        self,
        term: LossTerm,
        parts: Parts,
        index: int,
        settings: Mapping[str, Any],
        find: Any,
        outputs: Mapping[str, Tensor],
        given: Given,
    ) -> Tensor:
        assert given.targets is not None
        pair = parts.pairs[index]
        student = parts.student_tensor(index, outputs)
        teacher = pair.teacher_tensor(given.targets)
        features = {"student_features": student, "teacher_features": teacher}
        return self._value(term, parts, index, settings, find, features, given)

    def _value(
        self,
        term: LossTerm,
        parts: Parts,
        index: int,
        settings: Mapping[str, Any],
        find: Any,
        extra: Mapping[str, Any],
        given: Given,
    ) -> Tensor:
        loss = term.loss
        if loss.many_classes is not None and self._has_many_classes(term, settings):
            return self._of_many_classes(term, settings, find("student_logits"), given)
        if "labels" in loss.inputs and loss.mixed is not None and given.labels.partners is not None:
            inputs = {"student_logits": find("student_logits"), "labels": given.labels.own}
            inputs |= {"partner_labels": given.labels.partners, "shares": given.labels.shares}
            return loss.mixed(**inputs, **settings)
        inputs = {name: extra[name] if name in extra else find(name, parts=parts) for name in loss.inputs}
        if loss.over == "batch":
            inputs = {name: self._gathered(name, value, given) for name, value in inputs.items()}
        changing = {key: value for key, value in settings.items() if key not in loss.fixed}
        compute: Callable[..., Any] = loss.function if loss.module is None else parts.cores[index]
        try:
            found: Tensor = compute(**inputs, **changing)
        except ValueError as exc:
            raise LossError(f"loss {term.name!r}: {exc}") from exc
        return found

    def _find(
        self,
        term: LossTerm,
        settings: Mapping[str, Any],
        student_logits: Tensor,
        given: Given,
        logits: dict[tuple[float, str], Tensor],
        name: str,
        parts: Parts | None = None,
    ) -> Any:
        """One input of a loss."""
        if name == "student_logits":
            return student_logits
        if name == "labels":
            return given.labels.own
        if name in ("samples", "sample_ids", "step"):
            return getattr(given, name)
        if name in ("classifier_weight", "classifier_bias"):
            return getattr(parts, name)
        assert given.targets is not None and self.teacher is not None
        temperature = settings.get("temperature", 1.0)
        if name in ("head_ids", "head_logits", "tail_logsumexp"):
            found = given.targets.head(self.teacher.members[0], temperature)
            return found[("head_ids", "head_logits", "tail_logsumexp").index(name)]
        assert name == "teacher_logits", name
        asked = (temperature, term.loss.link)
        if asked not in logits:
            logits[asked] = self.teacher.logits(given.targets, temperature, term.loss.link)
        return logits[asked]

    def _gathered(self, name: str, value: Any, given: Given) -> Any:
        if self.ranks.size == 1 or name in ("step", "classifier_weight", "classifier_bias"):
            return value
        if isinstance(value, list):
            return [self.ranks.gather(one, given.counts) for one in value]
        return self.ranks.gather(value, given.counts)

    def _has_many_classes(self, term: LossTerm, settings: Mapping[str, Any]) -> bool:
        assert self.teacher is not None
        plain = all(value == term.loss.defaults[key] for key, value in settings.items() if key != "temperature")
        return plain and self.teacher.cache.num_classes >= MANY_CLASSES and self.teacher.combine in KEEPS_LEVEL

    def _of_many_classes(
        self, term: LossTerm, settings: Mapping[str, Any], student_logits: Tensor, given: Given
    ) -> Tensor:
        """The same value as the loss, decoding and computing some rows and classes at a time."""
        assert term.loss.many_classes is not None and self.teacher is not None and given.targets is not None
        teacher, targets = self.teacher, given.targets

        def rows(first: int, last: int) -> Tensor:
            return teacher.logits(targets.rows_between(first, last), 1.0)

        return term.loss.many_classes(student_logits, rows, settings["temperature"])


MANY_CLASSES = 32768  # from here on whole float32 copies of the batch's logits are avoided


def named_terms(terms: Sequence[LossTerm]) -> Iterator[tuple[str, LossTerm]]:
    """Each term with a name of its own: a second `kd` is `kd-2`."""
    seen: dict[str, int] = {}
    for term in terms:
        seen[term.name] = number = seen.get(term.name, 0) + 1
        yield (term.name if number == 1 else f"{term.name}-{number}"), term


def parse_terms(texts: Sequence[str], *, has_cache: bool) -> list[LossTerm]:
    """`kd:temperature=4,weight=0.9` strings -> checked terms; by default kd at 4 with a cache, ce without."""
    if not texts:
        texts = ["kd:temperature=4"] if has_cache else ["ce"]
    terms = []
    for text in texts:
        name, values = split_term(text, "--loss")
        term = make_term(name, **values)
        if term.loss.has_teacher and not has_cache:
            raise LossError(
                f"loss {name!r} learns from a teacher, and there is no cache",
                tip="add --cache DIR, or train on hard labels with --loss ce",
            )
        terms.append(term)
    return terms


def parse_members(texts: Sequence[str]) -> dict[str, float] | None:
    """`a=0.7`, `b` -> {member: weight}, 1 where none is given; None for all members equally."""
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            weights[name] = float(value) if equals else 1.0
        except ValueError:
            raise ConfigError(f"--members {text!r}: {value!r} is not a number") from None
        if not 0 <= weights[name] < float("inf"):
            raise ConfigError(f"--members {text!r}: a weight must be a number that is not negative")
    if weights and not sum(weights.values()):
        raise ConfigError("--members: all weights are zero")
    return weights or None


def check_mixed(terms: Sequence[LossTerm], policy: str) -> None:
    """Raise LossError for a loss on one hard label when views are mixed with partners."""
    for term in terms:
        if term.loss.needs("labels") and term.loss.mixed is None:
            raise LossError(
                f"loss {term.name!r} is defined by one hard label, and these views are mixed ({policy})",
                tip="use ce, which weighs both labels, or losses on the teacher's logits",
            )


def check_labels(terms: Sequence[LossTerm], *, labelled: int, multi_label: bool, name: str) -> None:
    """Raise LossError for a loss on hard labels when no sample has one, or every sample may have several."""
    for term in terms:
        if term.loss.needs("labels") and term.weight.bounds != (0.0, 0.0):
            if not labelled:
                raise LossError(
                    f"loss {term.name!r} needs labels, and no sample of {name} has one",
                    tip="leave the term out: soft targets need no labels",
                )
            if multi_label and not term.loss.multi_label:
                raise LossError(
                    f"loss {term.name!r} is defined by one label per sample, and {name} may have several",
                    tip="use ce or bce, which take each class for itself",
                )


def check_term(teacher: Teacher, term: LossTerm) -> None:
    """Raise LossError when the logits in a cache cannot serve a loss term under a combination rule."""
    check_rule(teacher.combine)
    cache, rule, loss = teacher.cache, teacher.combine, term.loss
    on_logits, on_head = loss.needs("teacher_logits"), loss.needs("head_ids")
    for name in teacher.members:
        info = cache.member(name)  # an unknown member is refused here, whatever the term
        if not on_logits and not on_head:
            continue
        codec = cache.codecs[name]
        for temperature in (1.0, 1.0) if term.temperature is None else term.temperature.bounds:
            if not codec.serves(temperature):
                lowest, highest = codec.temperatures or (0.0, 0.0)
                raise LossError(
                    f"codec {codec.name!r} of member {name!r} serves temperatures from {lowest:g} to {highest:g}, "
                    f"{term.name} asks for {temperature:g}",
                    tip="choose another temperature, or dump with --codec headtail or int8, which keep every class",
                )
        if on_logits and not codec.complete:
            raise LossError(
                f"loss {term.name!r} needs the logits of every class; codec {codec.name!r} of member {name!r} keeps some",
                tip="use kd_lower_bound, or dump with --codec headtail or int8, which keep every class",
            )
        if on_head and codec.complete:
            raise LossError(
                f"loss {term.name!r} is for caches that keep some classes; member {name!r} has them all",
                tip="use kd, of which it is a lower bound",
            )
        if on_head and len(teacher.members) > 1:
            raise LossError(
                f"loss {term.name!r} takes one teacher: the members' classes differ", tip="choose one with --members"
            )
        has_level = codec.keeps_level and (info.output == "logits" or cache.manifest.plan.samples.multi_label)
        if loss.needs_level and not has_level:
            raise LossError(
                f"loss {term.name!r} needs the level of the logits; member {name!r} gave {info.output}, "
                "which do not have one",
                tip="use kd or soft_ce, or dump a teacher that gives logits",
            )
    if on_head and teacher.classes is not None:
        raise LossError(
            f"loss {term.name!r} takes every class", tip="leave --classes out, or dump with --codec headtail"
        )
    if not on_logits or len(teacher.members) == 1:
        return
    if loss.needs_level and loss.link == "softmax" and rule not in KEEPS_LEVEL:
        raise LossError(
            f"loss {term.name!r} needs the level of the logits, which the rule {rule!r} does not keep",
            tip=f"combine with one of {', '.join(KEEPS_LEVEL)}, or use kd",
        )
    if loss.any_temperature and rule == "mean_probs_at_t":
        raise LossError(
            f"loss {term.name!r} finds its own temperature, and the rule {rule!r} combines at a given one",
            tip=f"combine with one of {', '.join(KEEPS_LEVEL)} or mean_probs",
        )

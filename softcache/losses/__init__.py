"""The losses, on one screen. Adding one: a function, a line in LOSSES, a row in its test table.

A loss is a plain function of tensors, or an nn.Module where it has learned parts or memory. Its arguments say what it needs:
those without a default are tensors that the trainer provides (INPUTS), those with one are settings.
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from softcache.errors import LossError, nearest
from softcache.features.spec import SCALES
from softcache.losses.adapters import ADAPTERS
from softcache.losses.batch import batch_correlation, class_correlation, dist
from softcache.losses.buckets import (
    jsd_lower_bound,
    kd_lower_bound,
    reverse_kl_lower_bound,
    skew_kl_lower_bound,
    skew_reverse_kl_lower_bound,
    tvd_lower_bound,
)
from softcache.losses.contrast import Crd
from softcache.losses.ctkd import Ctkd
from softcache.losses.divergences import skew_kl, skew_reverse_kl, tvd
from softcache.losses.features import Vid, ab, at, cosine, fsp, fsp_average, hint, ickd, nst, simkd, srrl
from softcache.losses.head_loss import HeadLoss, HeadTerm, head_loss
from softcache.losses.labelled import ce, dkd, mixed_ce, shifted_kd, tf_virtual, wsld
from softcache.losses.logits import bce, hard, jsd, kd, mse_logits, reverse_kl, soft_ce
from softcache.losses.many_classes import chunked_kd
from softcache.losses.regression import huber, mse
from softcache.losses.relations import cc, pkt, relational_kl, rkd_angle, rkd_distance, sp
from softcache.losses.review_kd import ReviewKd
from softcache.losses.schedules import Moment, Schedule
from softcache.spec import convert

__all__ = [
    "CLASSIFIER", "INPUTS", "LOSSES", "OUTPUT", "VECTORS", "Crd", "Ctkd", "HeadLoss", "HeadTerm", "Loss", "LossTerm",
    "ReviewKd", "Vid", "ab", "at", "batch_correlation", "bce", "cc", "ce", "chunked_kd", "class_correlation", "cosine",
    "dist", "dkd", "fsp", "fsp_average", "hard", "head_loss", "head_term", "hint", "huber", "ickd", "jsd",
    "jsd_lower_bound", "kd", "kd_lower_bound", "make_term", "mixed_ce", "mse", "mse_logits", "nst", "pkt", "relational_kl",
    "reverse_kl", "reverse_kl_lower_bound", "rkd_angle", "rkd_distance", "shifted_kd", "simkd", "skew_kl",
    "skew_kl_lower_bound", "skew_reverse_kl", "skew_reverse_kl_lower_bound", "soft_ce", "sp", "srrl", "tf_virtual", "tvd",
    "tvd_lower_bound", "wsld",
]  # fmt: skip

INPUTS = {
    "student_logits": "(B, C) of the student",
    "teacher_logits": "(B, C) of the combined members",
    "head_ids": "(B, k) classes that a top-k cache keeps",
    "head_logits": "(B, k) their logits",
    "tail_logsumexp": "(B,) the rest at the temperature",
    "labels": "(B,) class index, -1 = none",
    "partner_labels": "(B,) of the samples that views are mixed with",
    "shares": "(B,) weight of the own label in a mixed view",
    "student_features": "(B, ...) of a layer of the student",
    "teacher_features": "(B, ...) of a layer of the teacher",
    "student_maps": "list of (B, C, H, W), early to late",
    "teacher_maps": "list of (B, C, H, W), early to late",
    "classifier_weight": "(C, D) of the teacher's final linear layer",
    "classifier_bias": "(C,) of the same",
    "samples": "(B,) position of each sample in the transfer set",
    "sample_ids": "(B,) bits of the sample ids, as int64",
    "step": "number of the optimiser step",
}
CLASSIFIER = "head"  # in place of a layer: the input of the final linear layer; settings and saved runs write it so
OUTPUT = "output"  # in place of a layer: what an embedding network gives, or one of values, and the member's record
LAYER_VECTORS = (CLASSIFIER, "pool", "flatten", "cls", "mean_tokens")
VECTORS = (*LAYER_VECTORS, OUTPUT)
LOW_MASS = "allow_low_mass"  # a setting of terms on the k largest classes that says what may be refused, and not how
CLASS_WEIGHTS = "class_weights"  # a setting that is a tensor: terms hold what it is made of, "balanced" or a file
PLACEMENT = ("member", "layer", "student", "adapter", "scale")  # settings of every loss on features


def middle(layers: Sequence[str]) -> str:
    """The layer halfway; of two the earlier, so that it is the same one where only the middle and the last are stored."""
    return layers[(len(layers) - 1) // 2]


@dataclass(frozen=True)
class Loss:
    """One loss and what it needs, so that a misfit is refused before the first step.

    Attributes:
        function: of the inputs and settings that its signature names -> scalar; or an nn.Module class, whose `forward` is
            that function and whose constructor takes sizes (no default) and settings that cannot change (default).
        source: the paper, in a line.
        over: what its mean runs over, which is how several processes share it: "samples", "labels" (the labelled samples),
            or "batch": it relates samples to one another, and needs all of the batch at once.
        needs_level: the teacher's absolute level matters (softmax does not cancel it).
        any_temperature: it uses temperatures of its own making, so that the cache must serve all of them.
        link: how an ensemble's members become probabilities for it: "softmax" or "sigmoid".
        many_classes: the same for very many classes, of (student_logits, (first, last) -> rows of teacher logits, temperature);
            used where every other setting is at its default.
        mixed: the same for views mixed with a partner; None where it is defined by one hard label alone, or needs none.
        multi_label: it is meant for several labels per sample too, though it takes labels or logits: each for itself.
        needs_positive: it divides by the teacher's probabilities, so that none may be zero.
        features: reductions of the teacher's layer that serve it, first the cheapest that gives the authors' own loss; "head"
            is the input of its final linear, and "output" its own output where that is an embedding, or values.
        reduction: of the student's layer, where it is not that of the teacher's.
        layers: which layers by default: "head", the "last" map, the "middle" one, or all "map_ends".
        least_maps: how many of the teacher's maps it takes at the least: 2 where it relates them to one another.
        widths: the student's layer must have the teacher's number of channels, or an adapter.
        adapter: between the student's layer and the teacher's, by default.
        graft: the adapter is a projector that stays in the student, in front of the teacher's own classifier.
    """

    function: Callable[..., Tensor] | type[nn.Module]
    source: str
    over: str = "samples"
    needs_level: bool = False
    any_temperature: bool = False
    link: str = "softmax"
    many_classes: Callable[..., Tensor] | None = None
    mixed: Callable[..., Tensor] | None = None
    multi_label: bool = False
    needs_positive: bool = False
    features: tuple[str, ...] = ()
    reduction: str = ""
    layers: str = "head"
    least_maps: int = 1
    widths: bool = False
    adapter: str = "identity"
    graft: bool = False

    @property
    def module(self) -> type[nn.Module] | None:
        return self.function if isinstance(self.function, type) else None

    @cached_property
    def _call(self) -> Mapping[str, inspect.Parameter]:
        if self.module is None:
            return inspect.signature(self.function).parameters
        return {p.name: p for p in list(inspect.signature(self.module.forward).parameters.values())[1:]}

    @cached_property
    def _make(self) -> Mapping[str, inspect.Parameter]:
        if self.module is None:
            return {}
        return {p.name: p for p in list(inspect.signature(self.module.__init__).parameters.values())[1:]}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What it must be given, names out of INPUTS."""
        return tuple(name for name, p in self._call.items() if p.default is p.empty)

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """What its constructor must be given; empty for a function."""
        return tuple(name for name, p in self._make.items() if p.default is p.empty)

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """Settings of the constructor -> default."""
        return {name: p.default for name, p in self._make.items() if p.default is not p.empty}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Every setting -> default value, from the signatures."""
        return self.fixed | {name: p.default for name, p in self._call.items() if p.default is not p.empty}

    @cached_property
    def choices(self) -> dict[str, Any]:
        """Settings that take one of a few words -> Literal of these."""
        hints = typing.get_type_hints(self.function if self.module is None else self.module.forward)
        return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}

    def is_scheduled(self, name: str) -> bool:
        """Whether a setting may change over training: the floats of the call, not those of the constructor."""
        return name not in self.fixed and isinstance(self.defaults[name], float)

    def needs(self, *names: str) -> bool:
        """Whether any of these is among its inputs."""
        return bool(set(names) & set(self.inputs))

    @cached_property
    def has_teacher(self) -> bool:
        """It learns from a cache."""
        return self.needs(
            "teacher_logits", "teacher_features", "teacher_maps", "head_ids", "classifier_weight", "classifier_bias"
        )

    @cached_property
    def takes_several(self) -> bool:
        """It fits data with several labels per sample: no softmax over them, no class that a sample is of."""
        of_classes = self.needs("teacher_logits", "head_ids", "labels", "classifier_weight")
        return self.multi_label or not (of_classes or "sample_labels" in self.sizes)

    @property
    def reads_output(self) -> bool:
        """It compares what a member without classes gave: an embedding, or values."""
        return OUTPUT in self.features

    @cached_property
    def has_features(self) -> bool:
        return self.needs("teacher_features", "teacher_maps")


LOSSES: dict[str, Loss] = {
    # logits
    "kd": Loss(kd, "Hinton, Vinyals, Dean 2015; standardized: Sun et al. 2024", many_classes=chunked_kd),
    "soft_ce": Loss(soft_ce, "Hinton, Vinyals, Dean 2015"),
    "reverse_kl": Loss(reverse_kl, "Gu et al. 2024", needs_positive=True),
    "jsd": Loss(jsd, "Agarwal et al. 2024"),
    "skew_kl": Loss(skew_kl, "Ko et al. 2024"),
    "skew_reverse_kl": Loss(skew_reverse_kl, "Ko et al. 2024"),
    "tvd": Loss(tvd, "Wen et al. 2023"),
    "mse_logits": Loss(mse_logits, "Ba, Caruana 2014", needs_level=True, multi_label=True),
    "bce": Loss(
        bce, "Hinton, Vinyals, Dean 2015; a softmax of two for each class", needs_level=True, link="sigmoid", multi_label=True,
    ),
    "hard": Loss(hard, "Touvron et al. 2021"),
    "kd_lower_bound": Loss(kd_lower_bound, "Hinton, Vinyals, Dean 2015; log sum inequality"),
    "reverse_kl_lower_bound": Loss(
        reverse_kl_lower_bound, "Gu et al. 2024; log sum inequality", needs_positive=True,
    ),
    "jsd_lower_bound": Loss(jsd_lower_bound, "Agarwal et al. 2024; log sum inequality"),
    "skew_kl_lower_bound": Loss(skew_kl_lower_bound, "Ko et al. 2024; log sum inequality"),
    "skew_reverse_kl_lower_bound": Loss(skew_reverse_kl_lower_bound, "Ko et al. 2024; log sum inequality"),
    "tvd_lower_bound": Loss(tvd_lower_bound, "Wen et al. 2023; triangle inequality"),
    "ctkd": Loss(Ctkd, "Li et al. 2023", any_temperature=True),
    "dist": Loss(dist, "Huang et al. 2022", over="batch"),
    "batch_correlation": Loss(batch_correlation, "Jin et al. 2023", over="batch"),
    "class_correlation": Loss(class_correlation, "Jin et al. 2023", over="batch"),
    # logits and hard labels
    "ce": Loss(ce, "Bridle 1990; smoothing: Szegedy et al. 2016", over="labels", mixed=mixed_ce, multi_label=True),
    "dkd": Loss(dkd, "Zhao et al. 2022; standardized: Sun et al. 2024", over="labels", needs_positive=True),
    "wsld": Loss(wsld, "Zhou et al. 2021", over="labels"),
    "shifted_kd": Loss(shifted_kd, "Wen et al. 2019"),
    "tf_virtual": Loss(tf_virtual, "Yuan et al. 2020", over="labels"),
    # vectors
    "hint": Loss(hint, "Romero et al. 2015", features=(*VECTORS, "map"), widths=True, adapter="linear"),
    "cosine": Loss(cosine, "Sanh et al. 2019", features=(*VECTORS, "map"), widths=True, adapter="linear"),
    "rkd_distance": Loss(rkd_distance, "Park et al. 2019", over="batch", features=(*VECTORS, "map")),
    "rkd_angle": Loss(rkd_angle, "Park et al. 2019", over="batch", features=(*VECTORS, "map")),
    "pkt": Loss(pkt, "Passalis, Tefas 2018", over="batch", features=(*VECTORS, "map")),
    "cc": Loss(cc, "Peng et al. 2019", over="batch", features=(*VECTORS, "map"), adapter="linear"),
    "relational_kl": Loss(relational_kl, "Fang et al. 2021", over="batch", features=(*VECTORS, "map")),
    "crd": Loss(Crd, "Tian, Krishnan, Isola 2020", over="batch", features=(*VECTORS, "map")),
    "srrl": Loss(srrl, "Yang et al. 2021", features=(*LAYER_VECTORS, "map"), widths=True, adapter="linear"),
    # values
    "mse": Loss(mse, "Bucilua et al. 2006", features=(OUTPUT,), widths=True),
    "huber": Loss(huber, "Huber 1964", features=(OUTPUT,), widths=True),
    # maps, or what is kept of them
    "fitnet": Loss(hint, "Romero et al. 2015", features=("map",), layers="middle", widths=True, adapter="linear"),
    "at": Loss(at, "Zagoruyko, Komodakis 2017", features=("attention", "map"), layers="map_ends"),
    "sp": Loss(
        sp, "Tung, Mori 2019", over="batch", features=("flatten", "map", "pool", "cls", "mean_tokens", CLASSIFIER, OUTPUT),
        layers="last",
    ),
    "nst": Loss(nst, "Huang, Wang 2017", features=("spatial_gram", "map"), layers="map_ends"),
    "vid": Loss(Vid, "Ahn et al. 2019", features=("map",), layers="map_ends", widths=True, adapter="mlp"),
    "ab": Loss(
        ab, "Heo et al. 2019", features=("sign", "map"), reduction="map", layers="map_ends", widths=True, adapter="linear"
    ),
    "fsp": Loss(fsp, "Yim et al. 2017", features=("fsp",), layers="map_ends", least_maps=2, widths=True),
    "fsp_average": Loss(
        fsp_average, "Yim et al. 2017; averages: Tian et al. 2020", features=("map",), layers="map_ends", least_maps=2,
        widths=True,
    ),
    "ickd": Loss(ickd, "Liu et al. 2021", features=("gram", "map"), layers="last", widths=True, adapter="linear"),
    "reviewkd": Loss(ReviewKd, "Chen et al. 2021", features=("map",), layers="map_ends"),
    "simkd": Loss(simkd, "Chen et al. 2022", features=("map", *LAYER_VECTORS), layers="last", graft=True),
}  # fmt: skip


@dataclass(frozen=True)
class LossTerm:
    """A loss with its weight and its settings, as the configuration names it.

    Attributes:
        name: in LOSSES.
        weight: in the sum of the terms.
        settings: of the loss; a scalar that may change over training is a Schedule.
        allow_low_mass: of a loss on the k largest classes: train where they hold little at its temperature.
        placement: of a loss on features: member, layer, student (its layer), adapter, scale, where they were said.
    """

    name: str
    weight: Schedule
    settings: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, str] = field(default_factory=dict)
    allow_low_mass: bool = False

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]

    @property
    def temperature(self) -> Schedule | None:
        return self.settings.get("temperature")

    def settings_at(self, moment: Moment) -> dict[str, Any]:
        """Every setting's value at a point of training."""
        return {key: v.at(moment) if isinstance(v, Schedule) else v for key, v in self.settings.items()}

    def describe(self) -> dict[str, Any]:
        """As a run records it."""
        values = {key: value.recorded if isinstance(value, Schedule) else value for key, value in self.settings.items()}
        if not values.get(CLASS_WEIGHTS):
            values.pop(CLASS_WEIGHTS, None)
        allowed = {LOW_MASS: True} if self.allow_low_mass else {}
        return {"name": self.name, "weight": self.weight.recorded, **values, **self.placement, **allowed}


def make_term(name: str, *, weight: Any = 1.0, **settings: Any) -> LossTerm:
    """A checked term: strings become numbers and schedules, defaults are filled in.

    Raises:
        LossError: unknown loss or setting, or a temperature that is not always positive.
        ConfigError: a value that is no finite number and no schedule.
    """
    if name not in LOSSES:
        raise LossError(f"unknown loss {name!r}", tip=f"{nearest(name, LOSSES)}; `softcache losses` lists them")
    loss = LOSSES[name]
    placement = PLACEMENT if loss.has_features else ()
    extra = (*placement, *((LOW_MASS,) if loss.needs("head_ids") else ()))
    for key in settings:
        if key not in loss.defaults and key not in extra:
            known = ["weight", *loss.defaults, *extra]
            raise LossError(f"loss {name!r} has no setting {key!r}", tip=nearest(key, known))
    values = {key: _setting(loss, name, key, settings.get(key, default)) for key, default in loss.defaults.items()}
    placed = {key: str(settings[key]) for key in placement if key in settings}
    if placed.get("adapter", loss.adapter) not in ADAPTERS:
        raise LossError(
            f"loss {name!r}: unknown adapter {placed['adapter']!r}", tip=nearest(placed["adapter"], ADAPTERS)
        )
    if placed.get("scale", SCALES[0]) not in SCALES:
        raise LossError(f"loss {name!r}: unknown scale {placed['scale']!r}", tip=nearest(placed["scale"], SCALES))
    allowed = convert(str(settings.get(LOW_MASS, "false")), bool, f"loss {name!r}: {LOW_MASS}")
    term = LossTerm(name, Schedule.parse(weight, f"loss {name!r}: weight"), values, placed, allowed)
    if term.temperature is not None and not term.temperature.bounds[0] > 0:
        raise LossError(
            f"loss {name!r}: temperature must be > 0, got {term.temperature.text}",
            tip="4 is usual; a schedule stays above 0 throughout, as in linear(8, 2)",
        )
    return term


def head_term(
    term: LossTerm,
    moment: Moment | None = None,
    *,
    count: float | Tensor | None = None,
    class_weights: Tensor | None = None,
) -> HeadTerm:
    """A term as `head_loss` takes it, with its weight and settings at a point of training.

    Args:
        term: of a loss on logits, labels or both.
        moment: of the schedules; None: the beginning.
        count: what the term's sum is divided by, see `HeadTerm`.
        class_weights: (C,) what the term's setting of that name stands for.

    Raises:
        LossError: a loss that relates positions to one another, looks at layers or learns a part of its own; or a term with
            class_weights, and none given.
    """
    loss, found = term.loss, term.settings_at(moment or Moment())
    function, why = loss.function, ""
    if isinstance(function, type):
        why = "learns a part of its own, as a temperature, and the gradient of the head is made before that part's"
    elif loss.has_features:
        why = "looks at more than the logits of a position"
    elif loss.over == "batch":
        why = "relates positions to one another, and a head over a vocabulary is computed some positions at a time"
    if isinstance(function, type) or why:
        raise LossError(
            f"loss {term.name!r} {why}",
            tip="use kd, reverse_kl, jsd, skew_kl, tvd, ce and others that take each row alone",
        )
    if CLASS_WEIGHTS in found:
        if found[CLASS_WEIGHTS] and class_weights is None:
            raise LossError(
                f"loss {term.name!r} has class_weights, and no tensor of them was given", tip="give class_weights="
            )
        found[CLASS_WEIGHTS] = class_weights
    return HeadTerm(term.name, function, loss.over, term.weight.at(moment or Moment()), found, count)


def __getattr__(name: str) -> Any:
    if name == "HEAD":
        warnings.warn("softcache.losses.HEAD is now CLASSIFIER", DeprecationWarning, stacklevel=2)
        return CLASSIFIER
    raise AttributeError(f"module 'softcache.losses' has no attribute {name!r}")


def _setting(loss: Loss, name: str, key: str, value: Any) -> Any:
    where = f"loss {name!r}: {key}"
    if key == CLASS_WEIGHTS:
        return "" if str(value).lower() in ("", "none") else str(value)
    if loss.is_scheduled(key):
        return Schedule.parse(value, where)
    return convert(str(value), loss.choices.get(key, type(loss.defaults[key])), where)

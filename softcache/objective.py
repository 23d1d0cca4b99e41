"""What a student is asked to do: weighted loss terms, each against hard labels or against the combined members of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softcache.ensemble import KEEPS_LEVEL, check_rule
from softcache.errors import ConfigError, LossError
from softcache.losses import LossTerm, make_term
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


def loss_parts(
    terms: Sequence[LossTerm],
    student_logits: Tensor,
    labels: Labels,
    targets: Targets | None,
    combine: str,
    weights: Mapping[str, float] | None,
    draw_seed: int = 0,
) -> dict[str, Tensor]:
    """The unweighted value of each term on one batch, by the term's name in the run (kd, ce, kd-2, ...)."""
    teachers: dict[tuple[float, str], Tensor] = {}
    parts: dict[str, Tensor] = {}
    for name, term in named_terms(terms):
        if term.loss.target == "labels":
            parts[name] = _label_loss(term, student_logits, labels)
            continue
        assert targets is not None
        if term.loss.form == "head":
            member = next(iter(targets.arrays if weights is None else weights))
            parts[name] = term(student_logits, *targets.head(member, term.temperature))
            continue
        asked = (term.temperature, term.loss.link)
        if asked not in teachers:
            teachers[asked] = targets.combined(
                combine, weights=weights, temperature=term.temperature, link=term.loss.link, draw_seed=draw_seed
            )
        parts[name] = term(student_logits, teachers[asked])
    return parts


def _label_loss(term: LossTerm, student_logits: Tensor, labels: Labels) -> Tensor:
    if labels.partners is None or term.loss.mixed is None:
        return term(student_logits, labels.own)
    return term.loss.mixed(student_logits, labels.own, labels.partners, labels.shares, **term.parameters)


def total_loss(terms: Sequence[LossTerm], parts: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of the terms."""
    return torch.stack([term.weight * parts[name] for name, term in named_terms(terms)]).sum()


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
        if term.loss.target == "teacher" and not has_cache:
            raise LossError(
                f"loss {name!r} learns from a teacher's logits, and there is no cache",
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
        if term.loss.target == "labels" and term.loss.mixed is None:
            raise LossError(
                f"loss {term.name!r} is defined by one hard label, and these views are mixed ({policy})",
                tip="use ce, which weighs both labels, or losses on the teacher's logits",
            )


def check_term(cache: Cache, term: LossTerm, rule: str, weights: Mapping[str, float] | None = None) -> None:
    """Raise LossError when a cache cannot serve a loss term under a combination rule."""
    check_rule(rule)
    chosen = cache.members if weights is None else tuple(weights)
    for name in chosen:
        info = cache.member(name)  # an unknown member is refused here, whatever the term
        if term.loss.target != "teacher":
            continue
        codec = cache.codecs[name]
        if not codec.serves(term.temperature):
            lowest, highest = codec.temperatures or (0.0, 0.0)
            raise LossError(
                f"codec {codec.name!r} of member {name!r} serves temperatures from {lowest:g} to {highest:g}, "
                f"{term.name} asks for {term.temperature:g}",
                tip="choose another temperature, or dump with a codec that keeps every class (headtail, int8)",
            )
        if term.loss.form == "logits" and not codec.complete:
            raise LossError(
                f"loss {term.name!r} needs the logits of every class; codec {codec.name!r} of member {name!r} keeps some",
                tip="use kd_lower_bound, or dump with a codec that keeps every class (headtail, int8)",
            )
        if term.loss.form == "head" and codec.complete:
            raise LossError(
                f"loss {term.name!r} is for caches that keep some classes; member {name!r} has them all",
                tip="use kd, of which it is a lower bound",
            )
        if term.loss.form == "head" and len(chosen) > 1:
            raise LossError(
                f"loss {term.name!r} takes one teacher: the members' classes differ", tip="choose one with --members"
            )
        has_level = codec.keeps_level and (info.output == "logits" or cache.manifest.plan.samples.multi_label)
        if term.loss.needs_level and not has_level:
            raise LossError(
                f"loss {term.name!r} needs the level of the logits; member {name!r} gave {info.output}, "
                "which do not have one",
                tip="use kd or soft_ce, or dump a teacher that gives logits",
            )
    if term.loss.needs_level and term.loss.link == "softmax" and rule not in KEEPS_LEVEL and len(chosen) > 1:
        raise LossError(
            f"loss {term.name!r} needs the level of the logits, which the rule {rule!r} does not keep",
            tip=f"combine with one of {', '.join(KEEPS_LEVEL)}, or use kd",
        )

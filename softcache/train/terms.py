"""The loss terms that a run names, and whether its cache and its data can serve them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from softcache.errors import LossError
from softcache.losses import LossTerm, make_term
from softcache.spec import split_term
from softcache.targets.ensemble import KEEPS_LEVEL, check_rule
from softcache.targets.teacher import CachedTeacher


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


def check_term(teacher: CachedTeacher, term: LossTerm) -> None:
    """Raise LossError when the logits in a cache cannot serve a loss term under a combination rule."""
    check_rule(teacher.combine)
    cache, rule, loss = teacher.cache, teacher.combine, term.loss
    on_logits, on_head = loss.needs("teacher_logits"), loss.needs("head_ids")
    for name in teacher.members:
        info = cache.member(name)  # an unknown member is refused here, whatever the term
        if not on_logits and not on_head:
            continue
        codec = cache.codecs[name]
        for temperature in (1.0,) if term.temperature is None else term.temperature.bounds:
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

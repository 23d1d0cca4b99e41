"""Does a loss fit: the kind of label, the rule by which members combine, how their logits are stored. Refused before a step.

A value must be finite, and mean what the loss says: a vote has no logits and a probability of zero for all classes but one, a
cache that keeps some classes has no row of logits, and a softmax over several yes-or-no questions is no soft target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softcache.cache.plan import CLASS_OUTPUTS
from softcache.errors import LossError
from softcache.losses import LOSSES, LOW_MASS, LossTerm
from softcache.targets.ensemble import KEEPS_LEVEL, check_rule

LEAST_KEPT = 0.5  # of the probability
SEVERAL = [name for name, loss in LOSSES.items() if loss.takes_several and not loss.has_features]


@dataclass(frozen=True)
class Stored:
    """How a cache has a member.

    Attributes:
        codec: the `Codec`, as a cache's `codecs` have it.
        output: what the teacher gave: logits, probs or log_probs; embedding or values; empty of features alone.
        floored: probabilities of (nearly) zero that are stored as the floor's logarithm.
        records: how many there are.
        kept: temperature -> the mean probability of the classes that are kept, where it is known.
        of_words: whether they are of words, not of samples.
    """

    name: str
    codec: Any
    output: str = "logits"
    floored: int = 0
    records: int = 0
    kept: Mapping[float, float] = field(default_factory=dict)
    of_words: bool = False

    @property
    def has_classes(self) -> bool:
        return self.output in CLASS_OUTPUTS


def check_kind(terms: Sequence[LossTerm], *, multi_label: bool, name: str) -> None:
    """Raise LossError for a loss of one class per sample where samples have several labels.

    Args:
        name: of the data, for the message.
    """
    for term in terms:
        if multi_label and not term.loss.takes_several:
            raise LossError(
                f"loss {term.name!r} is defined by one class per sample, and the samples of {name} have several labels, each "
                "a yes or no",
                tip=f"use one that takes each label for itself: --loss bce learns from the teacher, as kd does of one class; "
                f"{', '.join(one for one in SEVERAL if one != 'bce')} and losses on features fit too",
            )


def check_fit(term: LossTerm, rule: str, members: Sequence[Stored], *, multi_label: bool) -> None:
    """Raise LossError where members that are stored so, combined by a rule, cannot serve a loss on logits.

    Args:
        members: those that are learned from; of them those with classes are combined.
        multi_label: the cache's samples have several labels.
    """
    check_rule(rule)
    on_logits, on_head = term.loss.needs("teacher_logits"), term.loss.needs("head_ids")
    if on_logits or on_head or term.loss.graft or term.loss.needs("classifier_weight"):
        _check_classes(term, members)
    members = [member for member in members if member.has_classes]
    if not on_logits and not on_head:
        return
    for member in members:
        _check_stored(term, member, multi_label=multi_label)
    if on_head and len(members) > 1:
        raise LossError(
            f"loss {term.name!r} takes one teacher: the members' classes differ", tip="choose one with --members"
        )
    if rule == "vote":
        _check_vote(term)
    if len(members) == 1:  # the mean of one is the member
        return
    if term.loss.needs_level and not multi_label and term.loss.link == "softmax" and rule not in KEEPS_LEVEL:
        raise LossError(
            f"loss {term.name!r} needs the level of the logits, which the rule {rule!r} does not keep",
            tip=f"combine with one of {', '.join(KEEPS_LEVEL)}, or use kd",
        )
    if term.loss.any_temperature and rule == "mean_probs_at_t":
        raise LossError(
            f"loss {term.name!r} finds its own temperature, and the rule {rule!r} combines at a given one",
            tip=f"combine with one of {', '.join(KEEPS_LEVEL)} or mean_probs",
        )


def _check_classes(term: LossTerm, members: Sequence[Stored]) -> None:
    """LossError for a loss on classes where none of the members gave any; it learns from those that did."""
    others = [
        f"{member.name!r} gave {member.output or 'features alone'}" for member in members if not member.has_classes
    ]
    if not others or len(others) < len(members):
        return
    on_output = (
        "mse or huber" if any(member.output == "values" for member in members) else "cosine, hint or relational_kl"
    )
    tip = f"learn from what they gave: --loss {on_output}"
    if any(member.of_words for member in members):  # of which a student learns classes alone
        tip = "dump a teacher that gives each word logits, or learn from labels: --loss ce"
    raise LossError(f"loss {term.name!r} is on classes, and no member gave any: {', '.join(others)}", tip=tip)


def _check_stored(term: LossTerm, member: Stored, *, multi_label: bool) -> None:
    codec, loss = member.codec, term.loss
    lowest, highest = (1.0, 1.0) if term.temperature is None else term.temperature.bounds
    if not codec.serves(lowest, highest):
        ends = [t for t in (lowest, highest) if not codec.serves(t)]
        asked = f"{ends[0]:g}" if ends else f"all from {lowest:g} to {highest:g}"
        raise LossError(
            f"codec {codec.name!r} of member {member.name!r} serves {codec.served}, {term.name} asks for {asked}",
            tip="choose another temperature, or dump with --codec headtail or int8, which keep every class",
        )
    if loss.needs("teacher_logits") and not codec.complete:
        raise LossError(
            f"loss {term.name!r} needs the logits of every class; codec {codec.name!r} of member {member.name!r} keeps some",
            tip="use kd_lower_bound, or dump with --codec headtail or int8, which keep every class",
        )
    if loss.needs("head_ids") and codec.complete:
        raise LossError(
            f"loss {term.name!r} is for caches that keep some classes; member {member.name!r} has them all",
            tip="use kd, of which it is a lower bound",
        )
    _check_kept(term, member)
    has_level = codec.keeps_level and (member.output == "logits" or multi_label)
    if loss.needs_level and not has_level:
        raise LossError(
            f"loss {term.name!r} needs the level of the logits; member {member.name!r} gave {member.output}, "
            "which do not have one",
            tip="use kd or soft_ce, or dump a teacher that gives logits",
        )


def _check_kept(term: LossTerm, member: Stored) -> None:
    """Refused at T > 1 where less than half of the probability is in the classes kept: it only falls with the temperature."""
    highest = 1.0 if term.temperature is None else term.temperature.bounds[1]
    known = [t for t in member.kept if t <= highest]
    if highest <= 1 or not known or term.allow_low_mass or not term.loss.needs("head_ids"):
        return
    kept = member.kept[max(known)]
    if kept < LEAST_KEPT:
        raise LossError(
            f"loss {term.name!r} at T={highest:g}: the classes that member {member.name!r} keeps hold {kept:.1%} of the "
            f"probability at T={max(known):g}, and of the rest the student would learn one number",
            tip="train at temperature=1, or dump with a larger k or --codec linear_head:group=64; "
            f"{LOW_MASS}=true in the loss trains all the same",
        )


def _check_vote(term: LossTerm) -> None:
    """A vote is one class for certain: it has no logits, and no probability but 0 and 1."""
    why = ""
    if term.loss.needs("head_ids"):
        why = "takes a teacher as it is stored"
    elif term.loss.needs_positive:
        why = "divides by the teacher's probabilities, and those of a vote are zero for all classes but one"
    elif term.loss.needs_level and term.loss.link == "softmax":
        why = "needs logits, and a vote has none"
    elif term.settings.get("standardized"):
        why = "with standardized=true needs logits, and a vote has none"
    if why:
        raise LossError(
            f"loss {term.name!r} {why}",
            tip="combine with mean_logits, mean_probs_at_t or draw, or learn from the votes with kd, soft_ce or hard",
        )


def fit_warnings(terms: Sequence[LossTerm], members: Sequence[Stored], num_classes: int) -> Iterator[str]:
    """Losses that divide by a teacher's probabilities, where some of them were zero and are stored as a floor."""
    for term in terms:
        for member in members if term.loss.needs_positive else ():
            share = member.floored / max(1, member.records * num_classes)
            if share > 0:
                yield (
                    f"loss {term.name!r} divides by the teacher's probabilities, and {share:.1%} of those of member "
                    f"{member.name!r} were (nearly) zero and are stored as 6e-8: there its value is that of this floor; kd has "
                    "no such places"
                )

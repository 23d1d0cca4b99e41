"""The loss terms that a run names, and whether its cache and its data can serve them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from softcache.errors import LossError
from softcache.losses import CLASSIFIER, OUTPUT, LossTerm, make_term
from softcache.spec import split_term
from softcache.targets.teacher import CachedTeacher
from softcache.train.fits import Stored, check_fit
from softcache.train.pairs import Pair


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


def check_labels(terms: Sequence[LossTerm], *, labelled: int, name: str) -> None:
    """Raise LossError for a loss on hard labels when no sample has one, nor any of its words."""
    for term in terms:
        if term.loss.needs("labels") and term.weight.bounds != (0.0, 0.0) and not labelled:
            raise LossError(
                f"loss {term.name!r} needs labels, and no sample of {name} has one",
                tip="soft targets need no labels: learn from a cache (--cache DIR) without this term, or give the data labels",
            )


def check_term(teacher: CachedTeacher, term: LossTerm) -> None:
    """Raise LossError when the logits in a cache cannot serve a loss term under a combination rule."""
    members = stored_members(teacher)  # an unknown member is refused here, whatever the term
    check_fit(term, teacher.combine, members, multi_label=teacher.cache.multi_label)
    if term.loss.needs("head_ids") and teacher.classes is not None:
        raise LossError(
            f"loss {term.name!r} takes every class", tip="leave --classes out, or dump with --codec headtail"
        )


def check_positions(terms: Sequence[LossTerm]) -> None:
    """Raise LossError for a loss that cannot learn from several answers a sample: one on layers, or with a memory of samples."""
    for term in terms:
        loss = term.loss
        if loss.needs("samples", "sample_ids"):
            raise LossError(
                f"loss {term.name!r} remembers each sample, and here a sample has an answer for each of its words",
                tip="use a loss without a memory: kd, soft_ce, dist, ...",
            )
        if loss.has_features and not {CLASSIFIER, OUTPUT} & set(loss.features):
            raise _of_layers(term)


def check_pairs(term: LossTerm, pairs: Sequence[Pair]) -> None:
    """Raise LossError for layers that give one record a sample, where a sample has several answers."""
    per_position = ((CLASSIFIER,), (OUTPUT,))
    if not all(pair.stored in (CLASSIFIER, OUTPUT) and pair.student in per_position for pair in pairs):
        raise _of_layers(term)


def _of_layers(term: LossTerm) -> LossError:
    return LossError(
        f"loss {term.name!r} compares layers once for each sample, and here a sample has an answer for each of its words",
        tip="use losses on logits (kd, soft_ce, dist, ...) and ce",
    )


def stored_members(teacher: CachedTeacher) -> list[Stored]:
    """How the cache has the members that are learned from."""
    teacher.check_index()
    cache, found = teacher.cache, []
    for name in teacher.members:
        info, statistics = cache.member(name), cache.manifest.statistics[name]
        found.append(
            Stored(
                name,
                cache.codecs.get(name),
                info.output or "",
                statistics.floored,
                statistics.records,
                statistics.mean_kept,
                of_words=info.index is not None,
            )
        )
    return found

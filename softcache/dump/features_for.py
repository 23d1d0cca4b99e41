"""Which features of a teacher losses need: the cheapest that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from softcache.codecs import Codec
from softcache.dump.teacher import Teacher
from softcache.errors import LossError, nearest
from softcache.losses import CLASSIFIER, LOSSES, OUTPUT, Loss, middle


def features_for(losses: Sequence[str], teacher: Teacher, batch: Any, codec: Codec | None) -> list[str]:
    """The cheapest features of a teacher that serve these losses, as `--features` would name them, early to late.

    Args:
        losses: names in LOSSES.
        batch: collated inputs, to see what the teacher's modules give.
        codec: of the logits; linear_head keeps the input of the final linear layer already. None: features alone are kept.

    Raises:
        LossError: an unknown loss, or one that this teacher or this codec cannot serve.
    """
    check_names(losses)
    for name in losses:
        _check(name, teacher, codec)
    layered = [name for name in losses if LOSSES[name].has_features]
    if not layered:
        return []
    ends = teacher.map_ends(batch)
    found: dict[str, None] = {}
    for name in layered:
        found |= dict.fromkeys(_features(name, ends, teacher, batch, codec))

    def place(feature: str) -> int:
        layer = feature.rpartition(":")[0].partition("+")[0]
        return ends.index(layer) if layer in ends else len(ends)

    # sp takes what it needs out of a map that is there for another loss: the same numbers
    doubled = {f"{layer}:flatten" for layer in ends if f"{layer}:map" in found}
    return sorted(found.keys() - doubled, key=lambda feature: (place(feature), list(found).index(feature)))


def check_names(names: Sequence[str]) -> None:
    """Raise LossError for a name that is no loss, or one that learns from no teacher."""
    for name in names:
        if name not in LOSSES:
            raise LossError(
                f"--for {name}: unknown loss", tip=f"{nearest(name, LOSSES)}; `softcache losses` lists them"
            )
        if not LOSSES[name].has_teacher:
            raise LossError(f"--for {name}: it learns from hard labels alone", tip="leave it out")


def _check(name: str, teacher: Teacher, codec: Codec | None) -> None:
    """Raise LossError for a loss that no feature could serve."""
    loss = LOSSES[name]
    if not teacher.has_classes and (
        loss.graft or loss.needs("teacher_logits", "head_ids", "classifier_weight", "classifier_bias")
    ):
        raise LossError(
            f"--for {name}: it is on classes, and teacher {teacher.name!r} gives {teacher.output}",
            tip="leave it out: what the teacher gives is stored as it is",
        )
    if (teacher.has_classes or codec is None) and loss.features == (OUTPUT,):
        raise LossError(
            f"--for {name}: it is of teachers that give an embedding or values, and {teacher.name!r} gives {teacher.output}",
            tip="leave it out, or say what the teacher gives: output=values",
        )
    if codec is None:
        return
    if loss.needs("teacher_logits") and not codec.complete:
        raise LossError(
            f"--for {name}: it needs the logits of every class, codec {codec.name!r} keeps some",
            tip="dump with --codec headtail or int8",
        )
    if loss.needs("head_ids") and codec.complete:
        raise LossError(
            f"--for {name}: it takes a cache that keeps some classes, codec {codec.name!r} keeps all",
            tip="dump with --codec topk:k=10, or train with kd, of which it is a lower bound",
        )
    if loss.needs_level and teacher.output != "logits" and not teacher.multi_label:
        raise LossError(
            f"--for {name}: it needs the level of the logits, and teacher {teacher.name!r} gives {teacher.output}",
            tip="use kd or soft_ce, or a teacher that gives logits",
        )


def _features(name: str, ends: Sequence[str], teacher: Teacher, batch: Any, codec: Codec | None) -> list[str]:
    loss = LOSSES[name]
    if not teacher.has_classes and teacher.has_output and loss.reads_output:
        return []  # the output is the member's record
    on_classifier = loss.graft or loss.needs("classifier_weight", "classifier_bias")
    if on_classifier and teacher.find_classifier(batch) is None:
        raise LossError(
            f"--for {name}: it needs the teacher's classifier, and {teacher.name!r} does not end with an nn.Linear",
            tip="use a teacher whose last layer gives its logits, or another loss; `softcache losses` lists them",
        )
    pooled = teacher.classifier_feature(batch, of_map=True) if loss.graft else None
    if pooled is not None:
        return [f"{pooled.layers[0]}:map"]
    if loss.layers == CLASSIFIER or (CLASSIFIER in loss.features and (loss.graft or not ends)):
        return [] if codec is not None and codec.needs_classifier else [_classifier_feature(name, teacher, batch)]
    return _maps(name, loss, ends, teacher)


def _classifier_feature(name: str, teacher: Teacher, batch: Any) -> str:
    feature = teacher.classifier_feature(batch)
    if feature is not None:
        return str(feature)
    if teacher.find_classifier(batch) is None:
        raise LossError(
            f"--for {name}: teacher {teacher.name!r} has no final nn.Linear, of which it takes the input",
            tip="name a layer yourself: --features LAYER:pool; --list-modules prints them",
        )
    raise LossError(
        f"--for {name}: no module of teacher {teacher.name!r} gives the input of its final linear layer",
        tip="dump with --codec linear_head, which keeps it, or name another layer: --features LAYER:pool",
    )


def _maps(name: str, loss: Loss, ends: Sequence[str], teacher: Teacher) -> list[str]:
    kind = loss.features[0]
    if len(ends) < loss.least_maps:
        have = f"maps of one size only ({ends[0]})" if ends else "no modules that give maps"
        raise LossError(
            f"--for {name}: teacher {teacher.name!r} has {have}",
            tip="use a loss on vectors or logits; `softcache losses` lists them",
        )
    if kind == "fsp":
        return [f"{first}+{second}:fsp" for first, second in pairwise(ends)]
    chosen = {"last": ends[-1:], "middle": [middle(ends)], "map_ends": ends}[loss.layers]
    return [f"{layer}:{kind}" for layer in chosen]

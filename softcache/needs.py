"""Which features of a teacher losses need: the cheapest that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from softcache.codecs import Codec
from softcache.errors import LossError, nearest
from softcache.losses import HEAD, LOSSES, Loss
from softcache.teacher import Teacher


def features_for(losses: Sequence[str], teacher: Teacher, batch: Any, codec: Codec) -> list[str]:
    """The cheapest features of a teacher that serve these losses, as `--features` would name them.

    Raises:
        LossError: an unknown loss, or one that this teacher or this codec cannot serve.
    """
    found: dict[str, None] = {}
    for name in losses:
        if name not in LOSSES:
            raise LossError(
                f"--for {name}: unknown loss", tip=f"{nearest(name, LOSSES)}; `softcache losses` lists them"
            )
        loss = LOSSES[name]
        if not loss.has_teacher:
            raise LossError(f"--for {name}: it learns from hard labels alone", tip="leave it out")
        if loss.needs("teacher_logits") and not codec.complete:
            raise LossError(
                f"--for {name}: it needs the logits of every class, codec {codec.name!r} keeps some",
                tip="dump with --codec headtail or int8",
            )
        if loss.has_features and not (codec.needs_head and HEAD in loss.features and loss.layers == HEAD):
            found |= dict.fromkeys(_layers_for(name, loss, teacher, batch))
    return list(found)


def _layers_for(name: str, loss: Loss, teacher: Teacher, batch: Any) -> list[str]:
    if loss.layers == HEAD:
        feature = teacher.head_feature(batch)
        if feature is None:
            raise LossError(
                f"--for {name}: no module of teacher {teacher.name!r} gives the input of its final linear layer",
                tip="name a layer yourself: --features LAYER:pool; --list-modules prints them",
            )
        return [str(feature)]
    stages = teacher.stages(batch)
    kind = loss.features[0]
    if loss.layers == "stages" and kind == "fsp":
        stages = [f"{first}+{second}" for first, second in pairwise(stages)]
    if not stages:
        raise LossError(
            f"--for {name}: teacher {teacher.name!r} has no modules that give maps",
            tip="use a loss on vectors or logits; `softcache losses` lists them",
        )
    chosen = {"last": stages[-1:], "middle": [stages[len(stages) // 2]], "stages": stages}[loss.layers]
    return [f"{layer}:{kind}" for layer in chosen]

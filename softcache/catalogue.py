"""softcache losses: what a student can learn by, what each loss needs of the cache, and where it comes from."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from softcache.errors import LossError, nearest
from softcache.losses import HEAD, INPUTS, LOSSES, VECTORS, Loss
from softcache.report import table

WHERE = {
    HEAD: "the input of the final linear layer",
    "last": "the last map",
    "middle": "a map halfway",
    "stages": "the last map of each stage",
}


@dataclass(frozen=True)
class Entry:
    """One loss, for people and machines.

    Attributes:
        name: as `--loss` takes it.
        needs: of the cache and the data, in words.
        settings: with their defaults; `weight` is a setting of every loss.
        scheduled: which of them may change over training.
        features: reductions of the teacher's layer that serve it, cheapest first.
        layer: which layer by default; None where it takes none.
        adapter: by default; None likewise.
        over: what its mean runs over.
        source: the paper.
        text: its documentation.
    """

    name: str
    needs: str
    settings: dict[str, Any]
    scheduled: tuple[str, ...]
    features: tuple[str, ...]
    layer: str | None
    adapter: str | None
    over: str
    source: str
    text: str


def entry(name: str) -> Entry:
    """What is known of a loss; LossError with near names where there is none of that name."""
    if name not in LOSSES:
        raise LossError(f"unknown loss {name!r}", tip=f"{nearest(name, LOSSES)}; `softcache losses` lists them")
    loss = LOSSES[name]
    layered = loss.has_features
    return Entry(
        name,
        _needs(loss),
        loss.defaults,
        ("weight", *(key for key in loss.defaults if loss.is_scheduled(key))),
        loss.features,
        loss.layers if layered else None,
        loss.adapter if layered else None,
        loss.over,
        loss.source,
        inspect.getdoc(loss.function) or "",
    )


def to_json(name: str | None) -> Any:
    """One loss, or all of them, as plain data."""
    return asdict(entry(name)) if name else [asdict(entry(one)) for one in LOSSES]


def listing() -> str:
    """All losses as a table."""
    rows = []
    for name in LOSSES:
        one = entry(name)
        settings = ", ".join(f"{key}={value}" for key, value in one.settings.items())
        rows.append([name, one.needs, settings, one.source])
    return (
        table(["loss", "needs", "settings", "source"], rows, words=True)
        + "\n\nsoftcache losses NAME explains one; softcache dump --for NAME,NAME stores what they need of the teacher"
    )


def explanation(name: str) -> str:
    """One loss: its documentation, what it needs, how to name it."""
    one, loss = entry(name), LOSSES[name]
    facts = [("needs", one.needs), ("mean over", "the whole batch at once" if one.over == "batch" else one.over)]
    facts += [("scheduled", ", ".join(one.scheduled))]
    if loss.has_features:
        facts += [
            ("stored as", " or ".join(f"LAYER:{kind}" for kind in one.features if kind != HEAD)),
            ("layer", f"layer=... of the teacher (default: {WHERE[loss.layers]}); several with / between"),
            ("student", "student=... its layer (default: the same place)"),
            ("adapter", f"adapter=identity, linear or mlp (default: {one.adapter})"),
            ("dump", f"softcache dump --for {name} ..."),
        ]
    elif loss.needs("teacher_logits"):
        facts += [("dump", "any codec that keeps every class: float16, int8, headtail, lowrank, linear_head")]
    elif loss.needs("head_ids"):
        facts += [("dump", "softcache dump --codec topk:k=10 ...")]
    settings = "".join(f",{key}={value}" for key, value in one.settings.items())
    facts += [("train", f"softcache train ... --loss {name}:weight=1.0{settings}")]
    facts += [("source", one.source)]
    inputs = [(key, INPUTS[key]) for key in loss.inputs]
    return (
        f"{name}\n\n{one.text}\n\n"
        + table(["", ""], facts, words=True)
        + "\n\n"
        + table(["input", ""], inputs, words=True)
    )


def _needs(loss: Loss) -> str:
    wanted = []
    if loss.needs("teacher_logits"):
        wanted.append("logits with their level" if loss.needs_level else "logits")
    if loss.needs("head_ids"):
        wanted.append("logits of a top-k cache")
    if loss.has_features:
        kinds = [kind for kind in loss.features if kind != HEAD]
        vectors = set(kinds) & set(VECTORS)
        what = (
            "a vector" if loss.layers == HEAD else " or ".join(kind for kind in kinds if kind not in vectors) or "a map"
        )
        wanted.append(what)
    if loss.needs("classifier_weight"):
        wanted.append("the classifier")
    if loss.graft:
        wanted.append("the classifier")
    if loss.needs("labels"):
        wanted.append("labels")
    return ", ".join(wanted)

"""softcache losses: what a student can learn by, what each loss needs of the cache, and where it comes from."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from softcache.errors import LossError, nearest
from softcache.losses import CLASSIFIER, INPUTS, LOSSES, OUTPUT, Loss
from softcache.report.tables import table

WIDTH = 130  # of a terminal, at most
SETTINGS_WIDTH = 48  # of a column of it
UNBROKEN: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
WHERE = {
    CLASSIFIER: "the input of the final linear layer",
    "last": "the last map",
    "middle": "a map halfway",
    "map_ends": "the last map of each size",
}
GROUPS = {
    "logits": "on the teacher's logits: any cache with a codec that keeps every class",
    "logits and labels": "on the teacher's logits and hard labels: the same, and data with labels",
    "labels": "on hard labels alone: no cache needed",
    "vectors": "on a vector, the input of the teacher's final linear layer: softcache dump --for NAME, or --codec linear_head",
    "maps": "on maps of the teacher, or on what is made of them: softcache dump --for NAME",
}


@dataclass(frozen=True)
class Entry:
    """One loss, for people and machines.

    Attributes:
        name: as `--loss` takes it.
        group: in GROUPS.
        needs: of the cache and the data, in words.
        stored: what `dump --for` keeps of the teacher beside its logits, in words; "" where nothing is.
        settings: with their defaults; `weight` is a setting of every loss.
        scheduled: which of them may change over training.
        features: reductions of the teacher's layer that serve it, first the cheapest that gives the authors' own loss.
        layer: which layer by default; None where it takes none.
        adapter: by default; None likewise.
        over: what its mean runs over.
        multi_label: it fits data with several labels per sample, too.
        source: the paper.
        text: its documentation.
    """

    name: str
    group: str
    needs: str
    stored: str
    settings: dict[str, Any]
    scheduled: tuple[str, ...]
    features: tuple[str, ...]
    layer: str | None
    adapter: str | None
    over: str
    multi_label: bool
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
        _group(loss),
        _needs(loss),
        _stored(loss),
        loss.defaults,
        ("weight", *(key for key in loss.defaults if loss.is_scheduled(key))),
        loss.features,
        loss.layers if layered else None,
        loss.adapter if layered else None,
        loss.over,
        loss.takes_several,
        loss.source,
        inspect.getdoc(loss.function) or "",
    )


def to_json(name: str | None) -> Any:
    """One loss, or all of them, as plain data."""
    return asdict(entry(name)) if name else [asdict(entry(one)) for one in LOSSES]


def listing() -> str:
    """All losses as a table, by what they learn from."""
    entries = sorted(map(entry, LOSSES), key=lambda one: list(GROUPS).index(one.group))
    rows = [[one.name, one.stored or _kept(one), _short_settings(one), one.source.partition(";")[0]] for one in entries]
    head, rule, *lines = table(["loss", "kept by the dump", "settings", "source"], rows, words=True).splitlines()
    shown = [head, rule]
    for number, (one, line) in enumerate(zip(entries, lines, strict=True)):
        if number == 0 or one.group != entries[number - 1].group:
            shown += ["", GROUPS[one.group]]
        shown.append(line)
    usage = [
        ("softcache losses NAME", "explains one: formula, settings, published weight"),
        ("softcache dump --for NAME,NAME", "keeps what these losses need of the teacher, as cheaply as can be"),
        (
            "softcache train --loss NAME:weight=W,key=value --loss NAME",
            "adds up terms; every loss has a weight, by default 1",
        ),
    ]
    return "\n".join([*shown, "", *_aligned(usage)])


def explanation(name: str) -> str:
    """One loss: its documentation, what it needs, how to name it."""
    one, loss = entry(name), LOSSES[name]
    facts = [("needs", one.needs), ("mean over", "the whole batch at once" if one.over == "batch" else one.over)]
    if loss.has_features:
        kinds = [f"LAYER:{kind}" for kind in one.features if kind not in (CLASSIFIER, OUTPUT)]
        whole = ["the member's embedding or values"] if loss.reads_output else []
        facts += [
            ("stored", f"{one.stored}, as {' or '.join([*kinds, *whole])}"),
            ("layer", f"of the teacher: {_where(loss)}; {_chosen(loss)}"),
            ("student", "its layer at the same place; student=NAME chooses"),
        ]
        if not loss.graft:
            facts += [("adapter", f"between the two: {loss.adapter}; adapter=identity, linear or mlp chooses")]
    if loss.reads_output:
        facts += [
            (
                "scale",
                f"{'both sides' if loss.widths else 'the teacher'} as given; scale=member, each or whiten chooses",
            )
        ]
    if loss.graft:
        facts += [
            (
                "graft",
                "a learned projector behind that layer and the teacher's own classifier, frozen, become part of the student",
            )
        ]
    fits = (
        "one class per sample, or several labels, each a yes or no" if one.multi_label else "one class per sample alone"
    )
    facts += [("data", fits)]
    if loss.needs_positive:
        facts += [("rules", "not of votes (--combine vote): it divides by the teacher's probabilities")]
    if loss.needs("labels") and loss.mixed is None:
        facts += [("views", "not those mixed with a partner (mixup, cutmix): it is defined by one label")]
    facts += [("schedules", f"{', '.join(one.scheduled)} may change over training, as in weight=linear(1, 0)")]
    settings = f",{_settings(one)}" if one.settings else ""
    given = f"{name}:weight=W{settings}"
    if loss.has_teacher:
        kept = f"--for {name}" if not loss.needs("head_ids") else f"--codec topk:k=10 --for {name}"
        hard = "" if loss.needs("labels") or loss.graft else "--loss ce "
        facts += [
            ("dump", f"softcache dump --data DATA --teacher TEACHER {kept} --out CACHE"),
            ("train", f"softcache train --cache CACHE --data DATA --student MODEL --out RUN \\\n{hard}--loss {given}"),
        ]
    else:
        facts += [("train", f"softcache train --data DATA --student MODEL --out RUN --loss {given}")]
    facts += [("", "W: the published weight where one is named above; settings are shown with their defaults")]
    facts += [("source", one.source)]
    inputs = [(key, INPUTS[key]) for key in loss.inputs]
    return "\n".join([name, "", one.text, "", *_aligned(facts), "", "inputs, in your own loop:", *_aligned(inputs)])


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Two columns, the second one wrapped; its own line breaks are kept."""
    rows = list(rows)
    width = max(len(key) for key, _ in rows) + 2
    lines = []
    for key, value in rows:
        wrapped = [line for part in value.splitlines() for line in textwrap.wrap(part, WIDTH - width, **UNBROKEN)]
        lines += [key.ljust(width) + wrapped[0], *(" " * width + line for line in wrapped[1:])]
    return lines


def _short_settings(one: Entry) -> str:
    """With their defaults where a table has room for them; the page of the loss has it."""
    told = _settings(one)
    return told if len(told) <= SETTINGS_WIDTH else ",".join(one.settings)


def _settings(one: Entry) -> str:
    """As `--loss` takes them."""
    return ",".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in one.settings.items()
    )


def _group(loss: Loss) -> str:
    if loss.has_features:
        return "vectors" if loss.layers == CLASSIFIER else "maps"
    if not loss.has_teacher:
        return "labels"
    return "logits and labels" if loss.needs("labels") else "logits"


def _kept(one: Entry) -> str:
    """Of the logits, for a loss that takes nothing else."""
    loss = LOSSES[one.name]
    if loss.needs("head_ids"):
        return "top-k logits"
    return ("logits, level" if loss.needs_level else "logits") if loss.has_teacher else "-"


def _stored(loss: Loss) -> str:
    if not loss.has_features:
        return ""
    if loss.features == (OUTPUT,):
        return "output"
    what = "vector" if loss.layers == CLASSIFIER else f"{loss.features[0]}, {loss.layers.replace('_', ' ')}"
    return what + (", classifier" if _takes_classifier(loss) else "")


def _needs(loss: Loss) -> str:
    wanted = []
    if loss.needs("teacher_logits"):
        wanted.append(
            "logits of every class" + (", with their level: a teacher that gives logits" if loss.needs_level else "")
        )
    if loss.needs("head_ids"):
        wanted.append("logits of a top-k cache")
    if loss.has_features:
        wanted.append(f"{_where(loss)} of the teacher")
    if _takes_classifier(loss):
        wanted.append("the teacher's classifier: it must end with an nn.Linear")
    if loss.needs("labels"):
        wanted.append("hard labels")
    return "; ".join(wanted)


def _where(loss: Loss) -> str:
    """Which layer of the teacher, by default."""
    if loss.features == (OUTPUT,):
        return "the output, values or an embedding,"
    return (
        "the map that the classifier averages, or the input of the final linear layer"
        if loss.graft
        else WHERE[loss.layers]
    )


def _chosen(loss: Loss) -> str:
    """How other layers are named."""
    if loss.graft:
        return "layer=NAME chooses"
    if loss.needs("student_maps"):
        return "layer=NAME/NAME chooses, early to late"
    one = "NAME+NAME" if loss.features[0] == "fsp" else "NAME"
    return f"layer={one} chooses, {one}/{one} several, which are summed"


def _takes_classifier(loss: Loss) -> bool:
    return loss.graft or loss.needs("classifier_weight", "classifier_bias")

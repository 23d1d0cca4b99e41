"""softcache shrink --scan: how much worse a model is when one layer alone loses some of its channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softcache.config import ShrinkConfig
from softcache.config.unused import check_used
from softcache.data.label_kind import answers, is_known
from softcache.data.loading import ViewedSet, to_device
from softcache.errors import ConfigError
from softcache.machine import as_fresh
from softcache.models.masks import refuse_unknown
from softcache.models.shrunk import DENSE
from softcache.report.progress import Meter
from softcache.report.tables import percent, table
from softcache.students.channels import Group, without_effect
from softcache.students.importance import check_importance, importances
from softcache.students.opened import Opened, open_all, spread_over
from softcache.students.prune import free_groups
from softcache.students.shrink import Method

LOST = (0.3, 0.5, 0.7)  # of a layer's channels
STRUCTURED = "prune:structured"


@dataclass(frozen=True)
class Layer:
    """One group of channels: the layers that give them, how many there are, and what is right without 30, 50, 70 % of them."""

    layers: tuple[str, ...]
    channels: int
    right: tuple[float, ...]


@dataclass(frozen=True)
class Scan:
    """A finished one.

    Attributes:
        source: the model.
        measured: what `right` counts: a data set's labels, or the whole model's own answers.
        samples: how many were looked at; of a tagger how many words, as `counted` says.
        importance: by which the channels were chosen.
        whole: what is right of the whole model.
        layers: in the network's order.
    """

    source: str
    measured: str
    samples: int
    importance: str
    whole: float
    layers: tuple[Layer, ...]
    counted: str = "samples"

    def text(self) -> str:
        """For people."""
        rows = [[_short(one.layers), one.channels, *map(percent, one.right)] for one in self.layers]
        lost = [f"-{share:.0%}" for share in LOST]
        said = f"{self.measured}, {self.samples:,} {self.counted}: {percent(self.whole)} with all channels"
        how = f"the least important by {self.importance} of one layer alone, neither healed nor BatchNorm measured anew"
        most = max(self.layers, key=lambda one: self.whole - one.right[-1])
        hint = f"next: softcache shrink {self.source} --by {STRUCTURED},amount=0.5,keep={most.layers[0]} --data ... --out ..."
        return "\n".join([said, "", table(["layer", "channels", *lost], rows), "", how, hint])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lost": LOST}


def _short(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@as_fresh()
def scan(config: ShrinkConfig, *, quiet: bool = False) -> Scan:
    """What each layer can do without. Nothing is written.

    Raises:
        ConfigError: neither data nor evaluation data, or another method than prune:structured.
        ModelError: a network whose channels cannot be told apart.
    """
    importance, keep = _chosen(config)
    check_used(config)
    opened = open_all(config, quiet=quiet)
    samples = opened.samples
    if opened.eval_set is None and not samples.given:
        raise ConfigError("--scan needs samples", tip="--eval-data DATA, or --data DATA to count answers that stay")
    check_importance(importance, samples, f"--scan {STRUCTURED}")
    net = samples.model.net
    refuse_unknown(keep, net, "--scan")
    groups = free_groups(net, samples, keep, "--scan")
    values = importances(net, samples, groups, importance)
    batches = _batches(opened)
    with Meter(f"scan {config.model}", len(groups), unit="layers", quiet=quiet) as meter:
        whole = [_answers(opened, inputs) for inputs, _ in batches]
        judged = [own if labels is None else labels for own, (_, labels) in zip(whole, batches, strict=True)]
        layers = []
        for group, value in zip(groups, values, strict=True):
            right = []
            for share in LOST:
                gone = value.argsort(stable=True)[: round(share * len(value))].tolist()
                with without_effect(net, [group.units[i] for i in gone]):
                    right.append(_right([_answers(opened, inputs) for inputs, _ in batches], judged))
            layers.append(Layer(_givers(net, group), len(group.units), tuple(right)))
            meter.add()
    return Scan(
        config.model,
        f"right on {config.eval_data}" if opened.eval_set is not None else "answers that stay",
        sum(len(own) for own in whole),
        importance,
        _right(whole, judged),
        tuple(layers),
        "words" if samples.model.gives == "words" else "samples",
    )


def _chosen(config: ShrinkConfig) -> tuple[str, tuple[str, ...]]:
    """The importance and the layers to keep, of the one method that may be given."""
    if not config.by:
        return "l2", ()
    method = Method.parse(config.by[0])
    if len(config.by) > 1 or method.name != STRUCTURED or set(method.settings) - {"importance", "keep"}:
        raise ConfigError(
            f"--scan with --by {' --by '.join(config.by)}: it takes the channels of one layer after the other, 30, 50 and 70 %",
            tip=f"leave --by out, or say how channels are chosen: --by {STRUCTURED},importance=taylor,keep=NAMES",
        )
    return method.settings.get("importance", "l2"), tuple(filter(None, method.settings.get("keep", "").split(",")))


def _givers(net: nn.Module, group: Group) -> tuple[str, ...]:
    """The convolutions and linear layers that give a group's channels, in the network's order."""
    return tuple(
        name for name, module in net.named_modules() if (name, "out") in group.sides and isinstance(module, DENSE)
    )


def _batches(opened: Opened) -> list[tuple[Any, Tensor | None]]:
    """Inputs and labels of the evaluation data; of other samples no labels: the model is compared with itself."""
    samples, data = opened.samples, opened.eval_set
    if data is None:
        return [(inputs, None) for inputs in samples.batches()]
    viewed, places = ViewedSet(data, opened.policy, ()), spread_over(data)
    found: list[tuple[Any, Tensor | None]] = []
    for at in np.array_split(places, -(-len(places) // samples.batch_size)):
        inputs = samples.model.input.collate([viewed.render(int(i), 0) for i in at])
        own = data.labels[at] if data.positions is None else data.positions.take(at).labels
        labels = torch.from_numpy(np.array(own, dtype=np.int64)).to(opened.device)
        found.append((to_device(inputs, opened.device), labels))
    return found


def _answers(opened: Opened, inputs: Any) -> Tensor:
    with torch.inference_mode():
        return answers(opened.samples.model(inputs), multi_label=opened.multi_label)


def _right(found: Sequence[Tensor], judged: Sequence[Tensor]) -> float:
    """The share of what is known that is right."""
    pairs = list(zip(found, judged, strict=True))
    known = sum(int(is_known(labels).sum()) for _, labels in pairs)
    return sum(int(((own == labels) & is_known(labels)).sum()) for own, labels in pairs) / max(1, known)

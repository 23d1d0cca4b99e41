"""How much each channel of a network matters: by its filters' weights, by what it is on some samples, by what they would lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.data.label_kind import has_several, is_known
from softcache.errors import ConfigError
from softcache.features.taps import eval_mode
from softcache.models.shrunk import DENSE
from softcache.students.channels import Group
from softcache.students.samples import Samples

KINDS = ("l2", "l1", "taylor", "activation")
SOURCES = {
    "taylor": "soft targets or labels of some samples: --data DATA with labels, or --data DATA --cache CACHE",
    "activation": "some samples: --data DATA",
}


def check_importance(kind: str, samples: Samples, what: str) -> None:
    """Raise ConfigError for a kind that is none, or that lacks what it goes by."""
    if kind not in KINDS:
        known = ", ".join(f"importance={one}" for one in KINDS)
        raise ConfigError(f"{what}: there is no importance {kind!r}", tip=known)
    if kind == "taylor" and samples.model.gives == "words":
        raise ConfigError(
            f"{what},importance=taylor: goes by one answer for each sample, and the model gives one for each word",
            tip="importance=activation goes by what the samples are inside the network, l2 by the weights",
        )
    if kind in SOURCES and (not samples.given or (kind == "taylor" and samples.answers is None)):
        missing = "there are no samples" if not samples.given else "the data have no labels"
        raise ConfigError(f"{what},importance={kind}: {missing}", tip=f"it goes by {SOURCES[kind]}")


def importances(net: nn.Module, samples: Samples, groups: Sequence[Group], kind: str) -> list[Tensor]:
    """(channels,) float64 of each group: the larger, the more is lost without a channel.

    l1, l2: the norm of all filters that give a channel, over the layers of the group.
    activation: its mean size where it is taken, over samples and positions.
    taylor: how the loss of a sample would change if nobody listened to the channel, to the first order, squared and averaged over
        the samples. The class of a sample is drawn from its soft target where there is a cache, since of a teacher's own targets
        the gradient is zero; so the average is that of the Fisher information.

    Sources: Li and others, "Pruning Filters for Efficient ConvNets" (2017); Molchanov and others, "Importance Estimation for
    Neural Network Pruning" (2019); Theis and others, "Faster gaze prediction with dense networks and Fisher pruning" (2018).
    """
    if kind in ("l1", "l2"):
        return [filter_norms(net, group, kind) for group in groups]
    totals = [torch.zeros(len(group.units), dtype=torch.float64) for group in groups]
    places = [_places(group) for group in groups]
    names = {name for of_group in places for name in of_group}
    found = _gradients(net, samples, names) if kind == "taylor" else _sizes(net, samples, names)
    for values in found:
        for total, of_group in zip(totals, places, strict=True):
            each = [values[name][:, at.to(values[name].device)].sum(2) for name, at in of_group.items()]
            together = torch.stack(each).sum(0).double().cpu()  # (batch, channels)
            total += (together.square() if kind == "taylor" else together).sum(0)
    return totals


def filter_norms(net: nn.Module, group: Group, norm: str) -> Tensor:
    """(channels,) float64: the norm of all filters that give a channel, over the layers of the group."""
    power = 1 if norm == "l1" else 2
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for name, side in group.sides:
        module: Any = net.get_submodule(name)
        if side != "out" or not isinstance(module, DENSE):
            continue
        each = module.weight.detach().double().cpu().abs().pow(power).flatten(1).sum(1)  # (out,)
        total += torch.stack([each[list(unit[name, side])].sum() for unit in group.units])
    return total.pow(1 / power)


def _places(group: Group) -> dict[str, Tensor]:
    """Of the layers that take a group's channels: (channels, places of each) int64."""
    return {
        name: torch.tensor([unit[name, side] for unit in group.units]) for name, side in group.sides if side == "in"
    }


@contextmanager
def _taken(net: nn.Module, names: set[str], *, learns: bool) -> Iterator[dict[str, Tensor]]:
    """What each of these layers is given, when the network runs; to `learns`, a tensor of its own in the graph."""
    taken: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given = args[0]
        if learns:  # of its own, so that the gradient is that of this layer alone
            given = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
        taken[name] = given
        return (given, *args[1:])

    with ExitStack() as hooks:
        for name in names:
            hook = net.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: note(name, args))
            hooks.callback(hook.remove)
        yield taken


def _sizes(net: nn.Module, samples: Samples, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Of each batch and layer, (batch, channels) mean sizes of what it is given."""
    with torch.no_grad(), eval_mode(samples.model), _taken(net, names, learns=False) as taken:
        for inputs, _ in samples.answered_batches():
            answers = samples.model(inputs)
            count = 1 if samples.model.gives == "words" else len(answers)  # of words, all of a batch together
            yield {name: _by_channel(net, name, given.abs(), count).mean(2) for name, given in taken.items()}


def _gradients(net: nn.Module, samples: Samples, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Of each batch and layer, (batch, channels): what is given times its gradient, summed over positions."""
    with torch.enable_grad(), eval_mode(samples.model), _taken(net, names, learns=True) as taken:
        for inputs, answers in samples.answered_batches():
            logits = samples.model(inputs)
            given = list(taken.values())
            found = torch.autograd.grad(_loss(logits, answers), given, allow_unused=True)
            products = [torch.zeros_like(x) if g is None else x.detach() * g for x, g in zip(given, found, strict=True)]
            yield {
                name: _by_channel(net, name, product, len(logits)).sum(2)
                for name, product in zip(taken, products, strict=True)
            }
            taken.clear()


def _loss(logits: Tensor, answers: Tensor | None) -> Tensor:
    """Summed over the samples that have an answer, so that each gradient is its own."""
    assert answers is not None
    if not has_several(answers):
        return F.cross_entropy(logits, answers.long(), ignore_index=-1, reduction="sum")
    known = is_known(answers)
    return F.binary_cross_entropy_with_logits(logits[known], answers[known].to(logits.dtype), reduction="sum")


def _by_channel(net: nn.Module, name: str, values: Tensor, count: int) -> Tensor:
    """(count, channels, positions) of what a layer is given; windows of a picture lie in its first axis."""
    rows = values.unflatten(0, (count, -1))
    axis = rows.ndim - 1 if isinstance(net.get_submodule(name), nn.Linear) else 2
    return rows.movedim(axis, 1).flatten(2)

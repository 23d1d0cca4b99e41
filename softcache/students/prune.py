"""Weights set to zero, and channels left out, by how small they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError
from softcache.models.masks import hold, prunable, smallest
from softcache.models.shrunk import DENSE, Shrunk, is_below, shrink_by
from softcache.students.channels import Group, Side, channel_groups, kept_without, without_effect
from softcache.students.samples import Samples

MULTIPLE = 8  # of which the widths are that are left
CLOSE = 1e-3  # of the largest logit: what rounding may change


def prune_weights(
    net: nn.Module, *, amount: float, scope: str = "global", keep: tuple[str, ...] = ()
) -> tuple[Shrunk, str]:
    """Set the smallest weights of convolutions and linear layers to zero; biases stay. The tensors keep their shapes.

    The choice is that of torch.nn.utils.prune: `l1_unstructured` in each layer, `global_unstructured` by L1 over all.

    Args:
        net: changed in place.
        amount: share of the weights.
        scope: "layer": that share of each one; "global": of all together, the smallest wherever they are.
        keep: names of modules that stay as they are.

    Raises:
        ConfigError: an amount out of range, a scope that is none, or nothing to choose from.
    """
    _check_amount("prune:unstructured", amount)
    if scope not in ("layer", "global"):
        raise ConfigError(f"prune:unstructured,scope={scope}: is none", tip="scope=global or scope=layer")
    weights = list(prunable(net, keep).values())
    if not weights:
        raise ConfigError("prune:unstructured: the network has no convolution and no linear layer to choose weights of")
    for together in [weights] if scope == "global" else [[weight] for weight in weights]:
        count = round(amount * sum(weight.numel() for weight in together))
        for weight, mask in zip(together, smallest(together, count), strict=True):
            hold(weight, mask)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    count = sum(weight.numel() for weight in weights)
    return Shrunk(), f"{zeros:,} of {count:,} weights are zero ({scope}); train --prune held holds them there"


def _check_amount(what: str, amount: float) -> None:
    if not 0 < amount < 1:
        raise ConfigError(
            f"{what},amount={amount:g}: is a share, more than 0 and less than 1",
            tip="amount=0.5 takes half of them, amount=0.95 leaves one of twenty",
        )


# ------------------------------------------------------------------------------------------------------------------ channels


def prune_channels(
    net: nn.Module, samples: Samples, *, amount: float, importance: str = "l2", keep: tuple[str, ...] = ()
) -> tuple[Shrunk, str]:
    """Leave out the least important channels of each group of layers; the tensors become smaller.

    Args:
        net: changed in place.
        amount: share of a group's channels; what is left is a multiple of 8, and at least 8.
        importance: "l1" or "l2": the norm of the filters that give a channel.
        keep: names of modules none of whose channels are left out.

    Raises:
        ConfigError: an amount out of range, an importance that is none, or no group that is wide enough.
        ModelError: a network whose channels cannot be told apart.

    Source: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets" (2017).
    """
    _check_amount("prune:structured", amount)
    if importance not in ("l1", "l2"):
        raise ConfigError(f"prune:structured,importance={importance}: is none", tip="importance=l1 or importance=l2")

    def choose(group: Group, count: int) -> list[int]:
        values = importances(net, group, importance)
        return sorted(values.argsort(descending=True, stable=True)[:count].tolist())

    return leave_channels(net, samples, amount, choose, keep, "prune:structured")


def leave_channels(
    net: nn.Module, samples: Samples, amount: float, choose: Any, keep: Sequence[str], what: str
) -> tuple[Shrunk, str]:
    """Leave out a share of every group's channels.

    Args:
        choose: of a group and a number, the positions of so many channels that stay.
        what: the method, for messages.

    Raises:
        ConfigError, ModelError: as `prune_channels`.
    """
    groups = channel_groups(net, samples.run)
    if not groups:
        raise ModelError(
            f"{what}: {samples.what} has no channels that can be left out: all of them reach the logits, or a layer that "
            "mixes them otherwise than a convolution or a linear layer does",
            tip="`softcache help SMALLER` lists the networks that it works with; prune:unstructured takes any",
        )
    free = [group for group in groups if not any(is_below(name, keep) for name, _ in group.sides)]
    dropped = {group: _left_out(group, amount, choose) for group in free}
    thinner = [group for group in free if dropped[group]]
    if not thinner:
        widest = max((len(group.units) for group in free), default=0)
        raise ConfigError(
            f"{what}: no channels can be left out of {samples.what}: of {len(free)} groups of layers the widest has "
            f"{widest}, and multiples of {MULTIPLE} are left",
            tip="take more of them, a wider network, or another method: lowrank, prune:unstructured",
        )
    if not _works_without(net, samples, [unit for group in thinner for unit in dropped[group]]):
        # as where code cuts its channels in halves: those of the other groups
        thinner = [group for group in thinner if _works_without(net, samples, dropped[group])]
    gone = [unit for group in thinner for unit in dropped[group]]
    if not gone or not _works_without(net, samples, gone):
        raise ModelError(
            f"{what}: {samples.what} does not work with fewer channels: its code counts on those that it was built with",
            tip="`softcache help SMALLER` lists the networks that it works with; lowrank and prune:unstructured take any",
        )
    record = Shrunk(kept=kept_without(net, gone))
    shrink_by(net, record)
    names = sum(len(group.units) for group in groups)
    return record, f"{len(gone):,} of {names:,} channels left out, in {len(thinner)} of {len(groups)} groups of layers"


def _left_out(group: Group, amount: float, choose: Any) -> list[Mapping[Side, tuple[int, ...]]]:
    count = left_of(len(group.units), amount)
    chosen = set(range(count) if count == len(group.units) else choose(group, count))
    return [unit for i, unit in enumerate(group.units) if i not in chosen]


def _works_without(net: nn.Module, samples: Samples, gone: Sequence[Mapping[Side, tuple[int, ...]]]) -> bool:
    """Whether the smaller network gives what the whole one gives when nobody listens to these channels."""
    with without_effect(net, gone):
        expected = samples.run(2)
    small = copy.deepcopy(net)
    try:
        shrink_by(small, Shrunk(kept=kept_without(net, gone)))
        samples.model.net = small
        found = samples.run(2)
    except Exception:  # of somebody else's code
        return False
    finally:
        samples.model.net = net
    return torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))


def left_of(count: int, amount: float) -> int:
    """How many of so many channels are left: the nearest multiple of 8, at least 8, at most all."""
    return min(count, max(MULTIPLE, MULTIPLE * math.floor((1 - amount) * count / MULTIPLE + 0.5)))


def importances(net: nn.Module, group: Group, norm: str) -> Tensor:
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

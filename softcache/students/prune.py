"""Weights set to zero, and channels left out, by how small they are."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from softcache.errors import ConfigError, ModelError
from softcache.models.masks import hold, prunable, smallest
from softcache.models.shrunk import Shrunk, is_below, shrink_by
from softcache.students.channels import Group, Side, channel_groups, kept_without, without_effect
from softcache.students.cost import multiply_adds
from softcache.students.importance import check_importance, importances
from softcache.students.samples import Samples

MULTIPLE = 8  # of which the widths are that are left
CLOSE = 1e-3  # of the largest logit: what rounding may change


def prune_weights(
    net: nn.Module, *, amount: float, scope: str = "global", keep: tuple[str, ...] = ()
) -> tuple[Shrunk, str]:
    """Set the smallest weights of convolutions, linear layers and attention to zero; the tensors keep their shapes.

    The choice is that of torch.nn.utils.prune: `l1_unstructured` in each layer, `global_unstructured` by L1 over all.

    Args:
        net: changed in place.
        amount: share of the weights.
        scope: "layer": that share of each one; "global": of all together, the smallest wherever they are.
        keep: names of modules that stay as they are.

    Raises:
        ConfigError: an amount out of range, a scope that is none, or nothing to choose from.
    """
    check_weights(amount=amount, scope=scope)
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


def check_weights(*, amount: float, scope: str = "global", keep: tuple[str, ...] = ()) -> None:
    """Raise ConfigError for settings of `prune_weights` that make no sense, whatever the network."""
    _check_amount("prune:unstructured", amount)
    if scope not in ("layer", "global"):
        raise ConfigError(f"prune:unstructured: there is no scope {scope!r}", tip="scope=global or scope=layer")


def _check_amount(what: str, amount: float) -> None:
    if not 0 < amount < 1:
        raise ConfigError(
            f"{what},amount={amount:g}: an amount is a share, more than 0 and less than 1",
            tip="amount=0.5 takes half of them, amount=0.95 leaves one of twenty",
        )


# ------------------------------------------------------------------------------------------------------------------ channels


def prune_channels(
    net: nn.Module,
    samples: Samples,
    *,
    amount: float | None = None,
    target: str | None = None,
    importance: str = "l2",
    keep: tuple[str, ...] = (),
    round_to: int = MULTIPLE,
) -> tuple[Shrunk, str]:
    """Leave out the least important channels of each group of layers; the tensors become smaller.

    Args:
        net: changed in place.
        amount: share of a group's channels; what is left is a multiple of `round_to`, and at least so many.
        target: "params:0.5" or "macs:0.5": the smallest amount that leaves at most this share of them.
        importance: "l1" or "l2": the norm of the filters that give a channel; "activation" and "taylor": by the samples.
        keep: names of modules none of whose channels are left out.
        round_to: 1 for a network of a few channels.

    Raises:
        ConfigError: an amount out of range, an importance that is none, or no group that is wide enough.
        ModelError: a network whose channels cannot be told apart.

    Sources: those of `softcache.students.importance.importances`.
    """
    what = "prune:structured"
    check_channels(samples, amount=amount, target=target, importance=importance, round_to=round_to)
    groups = free_groups(net, samples, keep, what)
    values = dict(zip(groups, importances(net, samples, groups, importance), strict=True))

    def choose(group: Group, count: int) -> list[int]:
        return sorted(values[group].argsort(descending=True, stable=True)[:count].tolist())

    if target is not None:
        cut = Cut(1.0, choose, round_to)
        groups = _workable(net, samples, groups, cut, what)
        amount = _amount_for(net, samples, groups, cut, target)
    assert amount is not None
    record, said = leave_channels(net, samples, groups, Cut(amount, choose, round_to), what)
    return record, said if target is None else f"{said}; that is amount={amount:.3f} of each"


def check_channels(
    samples: Samples,
    *,
    amount: float | None = None,
    target: str | None = None,
    importance: str = "l2",
    keep: tuple[str, ...] = (),
    round_to: int = MULTIPLE,
) -> None:
    """Raise ConfigError for settings of `prune_channels` that make no sense, whatever the network."""
    what = "prune:structured"
    if (amount is None) == (target is None):
        raise ConfigError(
            f"{what} wants either an amount or a target",
            tip="amount=0.5 leaves half of the channels; target=params:0.5 or target=macs:0.5 half of what they cost",
        )
    if amount is not None:
        _check_amount(what, amount)
    if target is not None:
        _target(target)
    if round_to < 1:
        raise ConfigError(f"{what},round_to={round_to}: must be at least 1", tip="8 suits processors, 1 small networks")
    check_importance(importance, samples, what)


def _target(text: str) -> tuple[str, float]:
    """What is to become less, and the share of it that may be left."""
    kind, _, written = text.partition(":")
    share = float(written) if re.fullmatch(r"0?\.\d+", written) else 0.0
    if kind not in COSTS or not 0 < share < 1:
        raise ConfigError(
            f"prune:structured,target={text}: a target is params or macs, and a share of more than 0 and less than 1",
            tip="target=params:0.5 leaves half of the parameters, target=macs:0.5 half of the multiply-adds",
        )
    return kind, share


@dataclass(frozen=True)
class Cut:
    """What is left of a group.

    Attributes:
        amount: the share of its channels that goes.
        choose: of a group and a number, the positions of so many channels that stay.
        multiple: of which the width is that is left.
    """

    amount: float
    choose: Callable[[Group, int], list[int]]
    multiple: int = MULTIPLE

    def of(self, group: Group) -> list[Mapping[Side, tuple[int, ...]]]:
        """The channels of a group that go."""
        count = left_of(len(group.units), self.amount, self.multiple)
        chosen = set(range(count) if count == len(group.units) else self.choose(group, count))
        return [unit for i, unit in enumerate(group.units) if i not in chosen]


def free_groups(net: nn.Module, samples: Samples, keep: Sequence[str], what: str) -> list[Group]:
    """The groups of channels that may be left out, but for those that have a layer to keep.

    Args:
        what: the method, for messages.

    Raises:
        ModelError: there are none.
    """
    groups = channel_groups(net, samples.run)
    if not groups:
        raise ModelError(
            f"{what}: {samples.what} has no channels that can be left out: all of them reach the logits, or a layer that "
            "mixes them otherwise than a convolution or a linear layer does",
            tip="`softcache help SMALLER` lists the networks that it works with; prune:unstructured takes any",
        )
    return [group for group in groups if not any(is_below(name, keep) for name, _ in group.sides)]


def leave_channels(
    net: nn.Module, samples: Samples, groups: Sequence[Group], cut: Cut, what: str
) -> tuple[Shrunk, str]:
    """Leave out a share of every group's channels.

    Args:
        what: the method, for messages.

    Raises:
        ConfigError, ModelError: as `prune_channels`.
    """
    thinner = _workable(net, samples, groups, cut, what)
    gone = [unit for group in thinner for unit in cut.of(group)]
    record = Shrunk(kept=kept_without(net, gone))
    shrink_by(net, record)
    names = sum(len(group.units) for group in groups)
    return record, f"{len(gone):,} of {names:,} channels left out, in {len(thinner)} of {len(groups)} groups of layers"


def _workable(net: nn.Module, samples: Samples, groups: Sequence[Group], cut: Cut, what: str) -> list[Group]:
    """The groups that lose channels, and without them the network works."""
    thinner = [group for group in groups if cut.of(group)]
    if not groups:
        raise ConfigError(
            f"{what}: every layer of {samples.what} that has channels to leave out is to be kept",
            tip="keep fewer layers",
        )
    if not thinner:
        widest = max(len(group.units) for group in groups)
        fewer = ", round_to=1" if what.startswith("prune") and cut.multiple > 1 else ""
        raise ConfigError(
            f"{what}: no channels can be left out of {samples.what}: of {len(groups)} groups of layers the widest has "
            f"{widest}, and multiples of {cut.multiple} are left",
            tip=f"take more of them{fewer}, a wider network, or another method: lowrank, prune:unstructured",
        )
    if not _works_without(net, samples, [unit for group in thinner for unit in cut.of(group)]):
        # as where code cuts its channels in halves: those of the other groups
        thinner = [group for group in thinner if _works_without(net, samples, cut.of(group))]
        if not thinner or not _works_without(net, samples, [unit for group in thinner for unit in cut.of(group)]):
            raise ModelError(
                f"{what}: {samples.what} does not work with fewer channels: its code counts on those that it was built with",
                tip="`softcache help SMALLER` lists the networks that it works with; lowrank and prune:unstructured take any",
            )
    return thinner


def _amount_for(net: nn.Module, samples: Samples, groups: Sequence[Group], cut: Cut, target: str) -> float:
    """The smallest amount, to a thousandth, that leaves at most this share of the parameters or multiply-adds."""
    kind, share = _target(target)

    def left(amount: float) -> float:
        one = replace(cut, amount=amount)
        gone = [unit for group in groups for unit in one.of(group)]
        with _smaller(net, samples, gone):
            return COSTS[kind](samples) / whole

    whole = COSTS[kind](samples)
    low, high = 0.0, 1.0
    if (least := left(high)) > share:
        raise ConfigError(
            f"prune:structured,target={target}: with {cut.multiple} channels in each group {least:.3f} of them are left",
            tip="ask for more than that; keep fewer layers; or carve blocks first: --by carve:depth=0.5",
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= share else (middle, high)
    return high


def _parameters(samples: Samples) -> int:
    return sum(parameter.numel() for parameter in samples.model.parameters())


COSTS: dict[str, Callable[[Samples], int]] = {"params": _parameters, "macs": multiply_adds}


@contextmanager
def _smaller(net: nn.Module, samples: Samples, gone: Sequence[Mapping[Side, tuple[int, ...]]]) -> Iterator[None]:
    """While it is entered, the samples' model is a copy without these channels."""
    small = copy.deepcopy(net)
    shrink_by(small, Shrunk(kept=kept_without(net, gone)))
    samples.model.net = small
    try:
        yield
    finally:
        samples.model.net = net


def _works_without(net: nn.Module, samples: Samples, gone: Sequence[Mapping[Side, tuple[int, ...]]]) -> bool:
    """Whether the smaller network gives what the whole one gives when nobody listens to these channels."""
    with without_effect(net, gone):
        expected = samples.run(2)
    try:
        with _smaller(net, samples, gone):
            found = samples.run(2)
    except Exception:  # of somebody else's code
        return False
    return torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))


def left_of(count: int, amount: float, multiple: int = MULTIPLE) -> int:
    """How many of so many channels are left: the nearest multiple of 8, or of another number, at least that, at most all."""
    return min(count, max(multiple, multiple * math.floor((1 - amount) * count / multiple + 0.5)))

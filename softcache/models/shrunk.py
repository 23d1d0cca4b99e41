"""The record of what was made smaller in a network: saved beside its weights, and done again before they are loaded.

Four things, always in this order, in the names of the network's own modules, which they keep:

    cut      blocks taken out of an nn.Sequential or nn.ModuleList
    kept     of convolutions, linear layers and BatchNorm the channels that are left
    factors  convolutions and linear layers in the place of which two stand, with so many channels between them
    quantised  convolutions and linear layers whose weights are int8, and the BatchNorm that is folded into each

A record may come from anybody: `Shrunk.from_json` believes plain names and numbers, `shrink_by` modules of the kinds below and
channels that they have, and the weights have to fit what comes of it to the last tensor.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ModelError
from softcache.models.fake_quantise import BITS, Quantised, quantise, without_norm
from softcache.models.norms import is_batch_norm, width_of

MOST_NAMES = 2**14  # modules that a record may name
STRETCH, ROOM = 64, 2**24  # the whole network has at most so many times the numbers of its weights, or so many more
FIRST, SECOND = "first", "second"  # the two modules that stand for one

DENSE = (nn.Linear, nn.Conv2d)
SIDES = ("in", "out")
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

Channels = tuple[int, ...]


@dataclass(frozen=True)
class Shrunk:
    """What is left out of a network; empty: nothing.

    Attributes:
        cut: names of the blocks that are taken out.
        kept: module -> "in" or "out" -> the channels that are left, ascending, as the whole module counts them. BatchNorm and
            depthwise convolutions have "out" alone.
        factors: module -> channels between the two that stand for it.
        quantised: module -> how it is quantised; after it nothing else can be left out.
    """

    cut: tuple[str, ...] = ()
    kept: Mapping[str, Mapping[str, Channels]] = field(default_factory=dict)
    factors: Mapping[str, int] = field(default_factory=dict)
    quantised: Mapping[str, Quantised] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        kept = {name: {side: list(sides[side]) for side in SIDES if side in sides} for name, sides in self.kept.items()}
        told: dict[str, Any] = {"cut": list(self.cut), "kept": kept, "factors": dict(self.factors)}
        if self.quantised:  # so that earlier versions read the records of what they can load
            layers = {name: how.to_json() for name, how in self.quantised.items()}
            told["quantised"] = {"bits": BITS, "layers": layers}
        return told

    @classmethod
    def from_json(cls, told: Any) -> Shrunk:
        """What `to_json` gave; TypeError or ValueError for anything else."""
        if not isinstance(told, dict) or set(told) - {"quantised"} != {"cut", "kept", "factors"}:
            raise ValueError("a record of other parts than cut, kept, factors and quantised")
        cut, kept, factors = told["cut"], told["kept"], told["factors"]
        quantised = dict(_quantised(told["quantised"])) if "quantised" in told else {}
        if not isinstance(cut, list) or not isinstance(kept, dict) or not isinstance(factors, dict):
            raise TypeError("cut, kept or factors")
        if len(cut) + len(kept) + len(factors) + len(quantised) > MOST_NAMES or not all(
            isinstance(name, str) for name in cut
        ):
            raise ValueError("too many names, or some that are none")
        return cls(tuple(cut), {name: _sides(sides) for name, sides in kept.items()}, dict(_ranks(factors)), quantised)

    def then(self, later: Shrunk) -> Shrunk:
        """Both, one after the other: `later` speaks of the network that this one left.

        Channels between two factors are not told apart, so that `later` keeps all of them.
        """
        cut = (*self.cut, *later.cut)
        kept = {name: dict(sides) for name, sides in self.kept.items()}
        for name, sides in later.kept.items():
            whole, _, last = name.rpartition(".")
            for side, channels in sides.items():
                own = kept.setdefault(whole if whole in self.factors and last in (FIRST, SECOND) else name, {})
                own[side] = tuple(own[side][i] for i in channels) if side in own else channels
        factors = {**self.factors, **later.factors}
        return Shrunk(
            cut,
            {name: sides for name, sides in kept.items() if not is_below(name, cut)},
            {name: rank for name, rank in factors.items() if not is_below(name, cut)},
            {**self.quantised, **later.quantised},
        )

    def of_whole(self, state: Mapping[str, Tensor], before: Shrunk | None = None) -> dict[str, Tensor]:
        """The tensors of a whole network, with the channels that are left; those of another size are as they were.

        Args:
            before: what was left out of the network of these tensors. Where it has all of the channels, they are taken by what
                they were in the whole one, and else its own are left as they are.
        """
        left = dict(state)
        for name, sides in self.kept.items():
            known = {} if before is None else before.kept.get(name, {})
            for tensor in left.keys() & {f"{name}.{one}" for one in TENSORS}:
                for axis, side in enumerate(("out", "in")):
                    places = _places(sides.get(side, ()), known.get(side))
                    if places and left[tensor].ndim > axis and places[-1] < left[tensor].shape[axis]:
                        left[tensor] = left[tensor].index_select(axis, torch.tensor(places))
        return left


def _places(channels: Channels, known: Channels | None) -> Channels:
    """Where channels stand among those that are there (None: all of them); nowhere, where some are not."""
    if known is None:
        return channels
    place = {channel: i for i, channel in enumerate(known)}
    return tuple(place[channel] for channel in channels) if place.keys() >= set(channels) else ()


def _sides(told: Any) -> dict[str, Channels]:
    if not isinstance(told, dict) or not told or not set(told) <= set(SIDES):
        raise ValueError("channels of other sides than in and out")
    found = {}
    for side, channels in told.items():
        if not isinstance(channels, list) or not channels or any(type(channel) is not int for channel in channels):
            raise TypeError("channels that are no numbers")
        found[side] = tuple(channels)
    return found


def _ranks(told: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
    for name, rank in told.items():
        if type(rank) is not int or rank < 1:
            raise TypeError("a rank that is no number, or none at all")
        yield name, rank


def _quantised(told: Any) -> Iterator[tuple[str, Quantised]]:
    if not isinstance(told, dict) or set(told) != {"bits", "layers"} or not isinstance(told["layers"], dict):
        raise ValueError("quantised layers of other parts than bits and layers")
    if told["bits"] != BITS or type(told["bits"]) is not int:
        raise ValueError(f"weights of {str(told['bits'])[:20]} bits; {BITS} are known")
    norms = []
    for name, how in told["layers"].items():
        yield name, (one := Quantised.from_json(how))
        norms += [one.norm] if one.norm is not None else []
    if len(set(norms)) < len(norms):
        raise ValueError("a BatchNorm that is folded into two layers")


def is_below(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a module, or a tensor, is one of these or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


class Factored(nn.Sequential):
    """Two modules in the place of a convolution or a linear layer; it has the attributes of the one.

    The first is of the same kind and has no bias; the second is linear, or a 1x1 convolution.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__(OrderedDict({FIRST: first, SECOND: second}))

    @property
    def weight(self) -> Tensor:
        """That of the one: what reads it, as a transformer layer's fast path does, reads their product."""
        one: Any
        two: Any
        one, two = self[0].weight, self[1].weight
        return (two.flatten(1) @ one.flatten(1)).view(len(two), *one.shape[1:])

    @property
    def bias(self) -> Any:
        return self[1].bias


# ----------------------------------------------------------------------------------------------------------------- applying


def shrink_by(net: nn.Module, record: Shrunk, *, most: int | None = None) -> None:
    """Make a network smaller as a record says; what is left keeps its names and its values.

    Args:
        net: changed in place, on any device. What stands for a module in two is at first not its product.
        most: how many numbers there are to be loaded in all: no layer is made of more. None: the record is believed.

    Raises:
        ModelError: a module that is not there, of another kind, or without such channels. Then the network is of no use.
    """
    for name in record.cut:
        _cut(net, name)
    for name, sides in record.kept.items():
        keep_channels(_module(net, name), name, sides)
    for name, rank in record.factors.items():
        put(net, name, factored(_module(net, name), name, rank, most=most))
    for name, how in record.quantised.items():
        quantise(_module(net, name), name, how)
    for how in record.quantised.values():
        if how.norm is not None:
            put(net, how.norm, without_norm(_module(net, how.norm), how.norm))


def check_whole_size(net: nn.Module, stored: int, where: str) -> None:
    """Refuse a network that is far larger than what is left of it can be, before any memory is taken for it.

    Args:
        net: whole, and on the meta device.
        stored: how many numbers there are to be loaded.

    Raises:
        ModelError: with both.
    """
    whole = sum(tensor.numel() for tensor in net.state_dict().values())
    if whole > STRETCH * stored + ROOM:
        raise ModelError(
            f"{where}: was cut out of a network of {whole:,} numbers, and holds {stored:,}: more than {STRETCH} times as many",
            tip="copy it again; if it is right, name the model yourself: MODEL@WEIGHTS",
        )


def put(net: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module of a network."""
    parent, _, child = name.rpartition(".")
    net.get_submodule(parent)._modules[child] = module


def _module(net: nn.Module, name: str) -> nn.Module:
    try:
        found = net.get_submodule(name)
    except AttributeError:
        found = net
    if found is net:
        raise ModelError(f"its record of what was cut names {name[:100]!r}, which is no module of it")
    return found


def _cut(net: nn.Module, name: str) -> None:
    module, parent = _module(net, name), net.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, nn.Sequential | nn.ModuleList) or isinstance(parent, Factored):
        raise ModelError(f"its record cuts {name!r}, which is no block of a stack ({type(module).__name__})")
    # the others keep their names, so that they are still those of the whole network
    del parent._modules[name.rpartition(".")[2]]


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution that takes each channel for itself."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def is_plain(module: nn.Module) -> bool:
    """Whether it is one of the kinds whose channels can be told apart: its tensors are all that the kind has."""
    if not (isinstance(module, DENSE) or is_batch_norm(module)) or any(list(m.parameters()) for m in module.children()):
        return False  # an activation inside, as in timm's BatchNorm, has no channels of its own
    return {*module._parameters, *module._buffers} <= TENSORS


def keep_channels(module: nn.Module, name: str, sides: Mapping[str, Channels]) -> None:
    """Leave some channels of a convolution, a linear layer or BatchNorm, in place.

    Raises:
        ModelError: another kind of module, or channels that it has not.
    """
    if not is_plain(module):
        raise ModelError(
            f"its record chooses channels of {name!r}, a {type(module).__name__}, which has none to choose"
        )
    if is_batch_norm(module) or is_depthwise(module):
        _keep_each(module, _chosen(sides, "out", _width(module), name, only=True))
        return
    assert isinstance(module, nn.Conv2d | nn.Linear)
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ModelError(f"its record chooses channels of {name!r}, a convolution of {module.groups} groups")
    is_conv = isinstance(module, nn.Conv2d)
    for side, axis in (("out", 0), ("in", 1)):
        if side not in sides:
            continue
        channels = _chosen(sides, side, module.weight.shape[axis], name)
        _take(module, "weight", channels, axis)
        if side == "out":
            _take(module, "bias", channels, 0)
        setattr(module, f"{side}_{'channels' if is_conv else 'features'}", len(channels))


def _width(module: nn.Module) -> int:
    return width_of(module) if is_batch_norm(module) else int(module.out_channels)  # type: ignore[arg-type]


def _chosen(sides: Mapping[str, Channels], side: str, count: int, name: str, *, only: bool = False) -> Channels:
    channels = sides.get(side, ())
    if only and set(sides) != {side}:
        raise ModelError(f"its record chooses other channels of {name!r} than it gives")
    if len(channels) > count or not 0 <= channels[0] <= channels[-1] < count:
        raise ModelError(f"its record keeps channels of {name!r} that it has not: there are {count:,}")
    if any(a >= b for a, b in pairwise(channels)):
        raise ModelError(f"its record keeps channels of {name!r} in another order, or twice")
    return channels


def _keep_each(module: Any, channels: Channels) -> None:
    """Of BatchNorm, or a depthwise convolution."""
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        _take(module, tensor, channels, 0)
    if isinstance(module, nn.Conv2d):
        module.in_channels = module.out_channels = module.groups = len(channels)
    elif hasattr(module, "num_features"):
        module.num_features = len(channels)


def _take(module: nn.Module, name: str, channels: Channels, axis: int) -> None:
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    left = tensor.detach().index_select(axis, torch.tensor(channels, device=tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(left, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, left)


def factored(module: nn.Module, name: str, rank: int, *, most: int | None = None) -> Factored:
    """Two modules of random weights in the place of one, with `rank` channels between them; its bias is kept.

    Raises:
        ModelError: no linear layer or convolution of one group, or more numbers than there are.
    """
    if not (is_plain(module) and isinstance(module, DENSE)) or getattr(module, "groups", 1) != 1:
        raise ModelError(
            f"its record puts two modules in the place of {name!r}, a {type(module).__name__}, which has no rank"
        )
    numbers = rank * (len(module.weight) + module.weight[0].numel())
    if most is not None and numbers > most:
        raise ModelError(
            f"its record gives {name!r} a rank of {rank:,}: {numbers:,} numbers, of {most:,} that there are"
        )
    where: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    second: nn.Module
    if isinstance(module, nn.Linear):
        first: Any = nn.Linear(module.in_features, rank, bias=False, **where)
        second = nn.Linear(rank, module.out_features, bias=module.bias is not None, **where)
    else:
        first = copy.copy(module)  # of the user's kind of convolution, with its padding and stride
        first._parameters = {"weight": nn.Parameter(torch.empty(rank, *module.weight.shape[1:], **where)), "bias": None}
        first.out_channels = rank
        nn.init.kaiming_uniform_(first.weight, a=5**0.5)
        second = nn.Conv2d(rank, module.out_channels, 1, bias=module.bias is not None, **where)
    if module.bias is not None:
        with torch.no_grad():
            second.bias.copy_(module.bias)  # type: ignore[union-attr]
    return Factored(first, second)

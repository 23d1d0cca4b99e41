"""Weights of a network that are held at zero, one by one: which may be, which go first, and how they stay there.

A mask is a bool tensor of a weight's shape: True where the weight is free, False where it is held. Nothing of it is saved in a
student: its weights are zero there. Pure torch, no wrapped modules: a network with masks is the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, nearest
from softcache.models.shrunk import is_below

# of a convolution or a linear layer, and those of torch's attention, which are linear layers without a module of their own
WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(net: nn.Module, keep: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights that may become zero, by their names: of convolutions, linear layers and attention, of whatever library.

    Biases and normalisation are none, nor is an embedding, whose weight is a table; one that two modules share is there once.

    Args:
        keep: names of modules whose weights stay.
    """
    found: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Embedding) or is_below(name, keep):
            continue
        for own in WEIGHTS:
            weight = module._parameters.get(own)
            if weight is not None and weight.ndim > 1 and not any(weight is other for other in found.values()):
                found[f"{name}.{own}" if name else own] = weight
    return found


def refuse_unknown(keep: Iterable[str], net: nn.Module, where: str) -> None:
    """Raise ConfigError for the name of a module to keep that is none; `where` begins the message."""
    modules = [name for name, _ in net.named_modules() if name]
    for name in keep:
        if name not in modules:
            raise ConfigError(f"{where}: there is no module {name!r} to keep", tip=nearest(name, modules))


def smallest(weights: Sequence[Tensor], count: int, left: Sequence[Tensor] = ()) -> list[Tensor]:
    """Masks of these weights, which hold the `count` smallest of all of them together, of equal ones the first.

    The choice is that of torch.nn.utils.prune's L1Unstructured, and depends on no processor's way of sorting.

    Args:
        left: their masks so far; what is held goes first.
    """
    sizes = torch.cat([weight.detach().abs().reshape(-1) for weight in weights])
    if left:
        sizes.masked_fill_(~torch.cat([mask.reshape(-1) for mask in left]), -1.0)
    free = torch.ones_like(sizes, dtype=torch.bool)
    if count:
        edge = sizes.kthvalue(count).values
        smaller = sizes < edge  # a weight that is no number is not held: it would no longer be seen
        equal = (sizes == edge).nonzero().flatten()
        free &= ~smaller
        free[equal[: count - int(smaller.sum())]] = False
    parts = free.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def hold(weight: Tensor, mask: Tensor) -> None:
    """Set what a mask holds to zero, in place."""
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)


class Masks:
    """The masks of a network while it learns. They only ever hold more: what was held once stays at zero.

    Args:
        net: whose weights they are.
        average: another one of the same kind, whose weights follow.

    Attributes:
        weights: those that may be held, by name.
        left: their masks.
        zeros: how many weights of each are held.
    """

    def __init__(self, net: nn.Module, average: nn.Module | None = None) -> None:
        self.weights = prunable(net)
        self._averages = {} if average is None else prunable(average)
        self.left = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.zeros = dict.fromkeys(self.weights, 0)

    @property
    def sparsity(self) -> float:
        """Which share of all weights that may be held is held."""
        return sum(self.zeros.values()) / max(1, sum(mask.numel() for mask in self.left.values()))

    @property
    def nbytes(self) -> int:
        """Of the masks, in memory as in a checkpoint."""
        return sum(mask.nbytes for mask in self.left.values())

    def count(self, names: Sequence[str]) -> tuple[int, int]:
        """How many weights these are, and how many of them are held."""
        return sum(self.left[name].numel() for name in names), sum(self.zeros[name] for name in names)

    def prune(self, names: Sequence[str], count: int) -> None:
        """Hold `count` of these weights: what is held already, and the smallest of the others over all of them."""
        if count > self.count(names)[1]:
            weights, left = ([where[name] for name in names] for where in (self.weights, self.left))
            self._grow(dict(zip(names, smallest(weights, count, left), strict=True)))

    def hold_zeros(self, names: Sequence[str]) -> None:
        """Hold those of these weights that are zero; not where a whole tensor is, as a layer may begin."""
        zero = {name: self.weights[name].detach() == 0 for name in names}
        self._grow({name: ~found for name, found in zero.items() if not bool(found.all())})

    def _grow(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.left[name] &= mask
        self._counted()
        self.apply()

    def _counted(self) -> None:
        held = [(~mask).sum() for mask in self.left.values()]
        self.zeros = dict(zip(self.left, torch.stack(held).tolist() if held else [], strict=True))

    def apply(self) -> None:
        """Set what is held to zero, whatever an optimiser's step made of it; in the average too."""
        for name, count in self.zeros.items():
            for weights in (self.weights, self._averages):
                if count and name in weights:
                    hold(weights[name], self.left[name])

    def apply_to_gradients(self) -> None:
        """Let weights that are held have no part in the gradient's length, nor in what an optimiser remembers."""
        for name, count in self.zeros.items():
            gradient = self.weights[name].grad
            if count and gradient is not None:
                hold(gradient, self.left[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by the names of their weights."""
        return dict(self.left)

    def load_state_dict(self, state: Any) -> None:
        """Put back what `state_dict` gave.

        Raises:
            TypeError, ValueError: masks of other weights, of other shapes, or none.
        """
        if not isinstance(state, dict):
            raise TypeError("its masks are no table")
        if odd := sorted(map(str, state.keys() ^ self.left.keys())):
            raise ValueError(f"it has other masks than the student has weights: {odd[0]!r}")
        for name, mask in self.left.items():
            if not isinstance(state[name], Tensor) or state[name].dtype != torch.bool:
                raise TypeError(f"the mask of {name!r} is none")
            if state[name].shape != mask.shape:
                raise ValueError(f"the mask of {name!r} has shape {tuple(state[name].shape)}, not {tuple(mask.shape)}")
        for name, mask in self.left.items():
            mask.copy_(state[name])
        self._counted()

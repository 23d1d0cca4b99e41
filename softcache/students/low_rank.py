"""A network whose convolutions and linear layers are products of two smaller ones, where that saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.models import final_linear
from softcache.models.shrunk import DENSE, Factored, Shrunk, factored, is_below, is_plain, put
from softcache.students.samples import Samples

POSITIONS = 256  # of a layer's answers to one batch that are looked at


class SavesNothing(ConfigError):
    """With these weights two layers would have more of them than one, in every layer; with others they might not."""


def check_low_rank(*, energy: float | None = None, rank: float | None = None, keep: tuple[str, ...] = ()) -> None:
    """Raise ConfigError for settings of `low_rank` that make no sense, whatever the network."""
    if (energy is None) == (rank is None):
        raise ConfigError(
            "lowrank wants either energy or rank", tip="--by lowrank:energy=0.95, or --by lowrank:rank=0.25"
        )
    for name, share in (("energy", energy), ("rank", rank)):
        if share is not None and not 0 < share < 1:
            raise ConfigError(
                f"lowrank:{name}={share:g}: {name} is a share, more than 0 and less than 1",
                tip="energy=0.95 leaves 95 % of what a layer answers, rank=0.25 a quarter of its largest rank",
            )


def low_rank(
    net: nn.Module,
    samples: Samples,
    *,
    energy: float | None = None,
    rank: float | None = None,
    keep: tuple[str, ...] = (),
) -> tuple[Shrunk, str]:
    """Put two layers in the place of one, wherever the two have fewer weights: what was done, and a line for people.

    A layer's answers are projected upon their first principal directions, W = U (U^T W): those of its answers to the samples,
    or, without samples, those of its weights. A convolution of k x k becomes one of k x k to fewer channels, and one of 1 x 1.

    Args:
        net: changed in place.
        energy: share of the answers' squares that is left, which gives each layer a rank of its own.
        rank: the rank as a share of the largest possible.
        keep: names of modules that stay as they are; so does the layer that gives the logits.

    Raises:
        ConfigError: neither or both of the two, one out of range, or no layer in which anything is saved.

    Source: Zhang, Zou, He, Sun, "Accelerating Very Deep Convolutional Networks for Classification and Detection" (2015),
    section 3.1, with a factor of k x k before one of 1 x 1.
    """
    check_low_rank(energy=energy, rank=rank)
    last = samples.classifier or final_linear(net, samples.model.num_classes)
    layers = {
        name: layer
        for name, layer in _called(_layers(net), samples).items()
        if layer is not last and not is_below(name, keep)
    }
    if not layers:
        raise ConfigError(
            f"lowrank: {samples.what} has no linear layer and no convolution of one group beside its classifier"
        )
    moments = answers_of(layers, samples) if samples.given else {}
    ranks = {}
    for name, layer in layers.items():
        directions, strength = _directions(layer, moments.get(name))
        most = min(len(layer.weight), layer.weight[0].numel())
        wanted = _enough(strength, energy) if energy is not None else max(1, round(most * float(rank or 0)))
        if wanted * (len(layer.weight) + layer.weight[0].numel()) < layer.weight.numel() and wanted < most:
            ranks[name] = wanted
            put(net, name, _product(layer, name, directions[:, :wanted]))
    if not ranks:
        raise SavesNothing(
            f"lowrank saves nothing in any of the {len(layers)} layers: two would have more weights than one",
            tip="ask for less: a smaller energy or rank",
        )
    by = (
        "by what they answer to the samples"
        if samples.given
        else "by their weights; with --data it is by what they answer"
    )
    return Shrunk(factors=ranks), f"{len(ranks)} of {len(layers)} layers as products of two, {by}"


def _layers(net: nn.Module) -> dict[str, Any]:
    """The layers of which two can be made."""
    inside = [name for name, m in net.named_modules() if isinstance(m, Factored | nn.MultiheadAttention)]
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, DENSE)
        and is_plain(module)
        and getattr(module, "groups", 1) == 1
        and not is_below(name, inside)
    }


def _called(layers: Mapping[str, Any], samples: Samples) -> dict[str, Any]:
    """Those that are called: of a layer whose weight is read in its place, two would be multiplied each time."""
    called: list[Any] = []
    hooks = [layer.register_forward_hook(lambda m, _i, _o: called.append(m)) for layer in layers.values()]
    try:
        samples.run(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if any(layer is one for one in called)}


def answers_of(layers: Mapping[str, Any], samples: Samples) -> dict[str, Tensor]:
    """(out, out) float64 second moments of what each layer gives without its bias; of those that are called."""
    moments: dict[str, Tensor] = {}

    def note(name: str, layer: Any, output: Tensor) -> None:
        rows = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
        rows = rows.reshape(-1, rows.shape[-1])
        if layer.bias is not None:
            rows = rows - layer.bias
        rows = rows[:: max(1, len(rows) // (POSITIONS * 16))].double()
        moments[name] = moments.get(name, torch.zeros((), dtype=torch.float64, device=rows.device)) + rows.T @ rows

    hooks = [
        layer.register_forward_hook(lambda m, _i, output, name=name: note(name, m, output))
        for name, layer in layers.items()
    ]
    try:
        samples.run_all()
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _directions(layer: Any, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, out) principal directions as columns, the strongest first, and (out,) how strong they are."""
    if moment is None:
        weight = layer.weight.detach().flatten(1).double()
        moment = weight @ weight.T
    strength, directions = torch.linalg.eigh(moment)
    return directions.flip(1), strength.flip(0).clamp(min=0)


def _enough(strength: Tensor, energy: float) -> int:
    """How many of the strongest have that share of all."""
    shares = strength.cumsum(0) / strength.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(len(strength), int((shares < energy).sum()) + 1)


def _product(layer: Any, name: str, directions: Tensor) -> Factored:
    """Two layers whose product is the layer's projection upon (out, rank) directions."""
    made = factored(layer, name, directions.shape[1])
    first: Any
    second: Any
    first, second = made[0], made[1]
    with torch.no_grad():
        first.weight.copy_((directions.T @ layer.weight.flatten(1).double()).view_as(first.weight))
        second.weight.copy_(directions.view_as(second.weight))
    return made

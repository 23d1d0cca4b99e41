"""Weights and activations of 8 bits after training: the ends of every activation are chosen by what it is on some samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, first_offenders
from softcache.models import Shrunk
from softcache.models.fake_quantise import INPUT, OUTPUT, Quantised, holder_of
from softcache.models.int8_layers import begin_int8, fix_int8, plan_int8
from softcache.models.norms import what_follows
from softcache.students.samples import Samples

Place = tuple[str, str]  # a layer's name, and which of its activations


def check_int8(samples: Samples, *, keep: tuple[str, ...] = ()) -> None:
    """Raise ConfigError where there are no samples."""
    if not samples.given:
        raise ConfigError(
            "quantise:int8 has to see what each layer is given, and there are no samples",
            tip="--data DATA: the data that the model was trained on; labels are not used",
        )


def quantise_int8(net: nn.Module, samples: Samples, *, keep: tuple[str, ...] = ()) -> tuple[Shrunk, str]:
    """Make a network compute as an int8 program does: what was done, and a line for people.

    The ends of an activation are the smallest and the largest value that the samples show. Ends that leave the outermost out, by
    a percentile or by least squares, were tried: the logits are not nearer to those of floats, and with some networks far away.

    Args:
        net: changed in place.
        keep: names of modules that stay floats.

    Raises:
        ConfigError: no samples, or no layer that can be quantised.
    """
    check_int8(samples)
    plan, floats = plan_int8(net, lambda: samples.run(1), keep)
    if not plan:
        raise ConfigError(
            f"quantise:int8: {samples.what} has no nn.Conv2d and no nn.Linear that could be quantised"
            + (f" beside those below {', '.join(keep)}" if keep else ""),
            tip="keep fewer layers" if keep else "`softcache help SMALLER` lists the networks that it works with",
        )
    ends = ends_of(net, plan, samples)
    begin_int8(net, plan)
    for (name, which), two in ends.items():
        how = plan[name]
        getattr(holder_of(net, name, how) if which == OUTPUT else net.get_submodule(name), which).copy_(two)
    fix_int8(net, plan)
    folded = sum(how.norm is not None for how in plan.values())
    told = f"{len(plan)} layers of int8, {folded} of them with their BatchNorm, on {samples.count:,} samples"
    if floats:
        told += f"; {len(floats)} modules with weights stay floats: " + first_offenders(
            [name or "the network itself" for name in floats], len(floats)
        )
    return Shrunk(quantised=plan), told


def ends_of(net: nn.Module, plan: Mapping[str, Quantised], samples: Samples) -> dict[Place, Tensor]:
    """(2,) float32 ends of every activation of a network that is still in floats: the widest that the samples show."""
    widest: dict[Place, Tensor] = {}

    def widen(place: Place, values: Tensor) -> None:
        low, high = values.float().aminmax()
        two = torch.stack([low.clamp(max=0), high.clamp(min=0)])
        before = widest.get(place, two)
        widest[place] = torch.stack([torch.minimum(before[0], two[0]), torch.maximum(before[1], two[1])])

    _watch(net, plan, samples, widen)
    never = torch.tensor([0.0, 1.0])  # for what is never anything but 0
    return {place: two if two[0] < two[1] else never.to(two) for place, two in widest.items()}


def _seen_behind(net: nn.Module, name: str, how: Quantised, see: Callable[[Tensor], None]) -> Any:
    """A hook that shows what a layer gives, behind the BatchNorm that is folded into it."""
    last = net.get_submodule(name if how.norm is None else how.norm)
    follows = None if how.norm is None else what_follows(last)
    if follows is None:
        return last.register_forward_hook(lambda _m, _a, output: see(output))
    return follows.register_forward_pre_hook(lambda _m, args: see(args[0]))


def _watch(
    net: nn.Module, plan: Mapping[str, Quantised], samples: Samples, see: Callable[[Place, Tensor], None]
) -> None:
    with ExitStack() as hooks:
        for name, how in plan.items():
            layer = net.get_submodule(name)
            hook: Any = layer.register_forward_pre_hook(lambda _m, args, name=name: see((name, INPUT), args[0]))
            hooks.callback(hook.remove)
            if how.output:
                hooks.callback(_seen_behind(net, name, how, partial(see, (name, OUTPUT))).remove)
        samples.run_all()

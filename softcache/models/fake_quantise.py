"""Convolutions and linear layers that compute in floats what an int8 program computes: all numbers rounded to those of 8 bits.

Weights are whole numbers of -128 to 127 times a scale of their output channel (symmetric, so that 0 stays 0). What a layer takes,
and where it says so what it gives, is one of 256 numbers between two ends that are the same for the whole tensor, 0 among them.
The bias is a whole number of 32 bits times both scales. BatchNorm that follows a layer directly is folded into it: its factors go
into the scales, so that the whole numbers are those that they were before.

Two forms. While a layer learns its scales follow its weights, and BatchNorm stands behind it. A fixed one has the scales as a
buffer and no BatchNorm any more; it is what is saved, with int8 weights.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018);
Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), on scales per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softcache.errors import ModelError
from softcache.models.norms import has_statistics, what_follows, without_normalising

BITS = 8
WEIGHTS = (-128, 127)
STEPS = 2**BITS - 1  # between the two ends of an activation
LEAST, MOST = 1e-30, 1e30  # of a scale, and of the ends of a range
BIAS = (
    2**30
)  # a bias has at most so many times the product of its layer's scales, so that a program may hold it as int32
SLOWEST = 0.01  # weight of a batch in the moving averages of the ends

WEIGHT, SCALE, INPUT, OUTPUT, OBSERVED = "weight", "weight_scale", "input_range", "output_range", "observed"


@dataclass(frozen=True)
class Quantised:
    """How one layer is quantised.

    Attributes:
        norm: the BatchNorm that is folded into it, if there is one.
        output: what it gives is rounded too, for those who take it are no quantised layers.
    """

    norm: str | None = None
    output: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"norm": self.norm, "output": self.output}

    @classmethod
    def from_json(cls, told: Any) -> Quantised:
        """What `to_json` gave; TypeError or ValueError for anything else."""
        if not isinstance(told, dict) or set(told) != {"norm", "output"}:
            raise ValueError("a quantised layer of other parts than norm and output")
        if not isinstance(told["norm"], str | None) or type(told["output"]) is not bool:
            raise TypeError("norm or output")
        return cls(**told)


class QuantisedConv2d(nn.Conv2d):
    """A convolution as an int8 program computes it."""

    def forward(self, input: Tensor) -> Tensor:
        return given(self, self._conv_forward(rounded(self, INPUT, input), rounded_weight(self), self.bias))


class QuantisedLinear(nn.Linear):
    """A linear layer as an int8 program computes it."""

    def forward(self, input: Tensor) -> Tensor:
        return given(self, nn.functional.linear(rounded(self, INPUT, input), rounded_weight(self), self.bias))


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: QuantisedConv2d, nn.Linear: QuantisedLinear}


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of the kinds that can be quantised it is, or is made of, with a weight and a bias at most."""
    if "weight" not in module._parameters or not {*module._parameters, *module._buffers} <= {"weight", "bias"}:
        return None
    return next((kind for kind in KINDS if isinstance(module, kind) and type(module) not in KINDS.values()), None)


def quantised_layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantised layers of a network by their names."""
    return ((name, m) for name, m in net.named_modules() if isinstance(m, QuantisedConv2d | QuantisedLinear))


# ---------------------------------------------------------------------------------------------------------------- computing


def scale_and_zero(ends: Tensor) -> tuple[Tensor, Tensor]:
    """() float32 distance of two neighbours of the 256 numbers between two ends, and () int32 which of them is 0.

    Args:
        ends: (2,) lowest and highest; 0 lies between them.
    """
    scale = ((ends[1] - ends[0]) / STEPS).clamp(min=LEAST)
    return scale, (-ends[0] / scale).round().clamp(0, STEPS).to(torch.int32)


def rounded(module: nn.Module, name: str, values: Tensor) -> Tensor:
    """An activation as one of the 256 numbers between the ends in the buffer `name`, which it moves while it observes."""
    ends: Any = getattr(module, name)
    if getattr(module, OBSERVED, None) is not None and module.observes:
        _observe(module, ends, values.detach())
    scale, zero = scale_and_zero(ends)
    return torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, 0, STEPS)


def given(module: nn.Module, output: Tensor) -> Tensor:
    """What a module gives, rounded where it has ends for it."""
    return output if getattr(module, OUTPUT, None) is None else rounded(module, OUTPUT, output)


def rounded_weight(layer: Any) -> Tensor:
    """The weights as they are multiplied: whole numbers times scales."""
    scale = scales(layer)
    zeros = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
    return torch.fake_quantize_per_channel_affine(layer.weight.float(), scale, zeros, 0, *WEIGHTS)


def scales(layer: Any) -> Tensor:
    """(out,) float32 scales of a layer's weights: its own, or while it learns those of which 127 reach its largest weight."""
    if getattr(layer, SCALE) is not None:
        fixed: Tensor = getattr(layer, SCALE)
        return fixed
    return scales_of(layer.weight)


def scales_of(weight: Tensor) -> Tensor:
    """(out,) float32: 127 of them are the largest weight of each output channel."""
    return (weight.detach().float().abs().flatten(1).amax(1) / WEIGHTS[1]).clamp(min=LEAST)


def whole_weights(layer: Any) -> Tensor:
    """The weights as int8, of the weight's shape."""
    scale = scales(layer).view(-1, *[1] * (layer.weight.ndim - 1))
    return (rounded_weight(layer).detach() / scale).round().to(torch.int8)


def _observe(module: Any, ends: Tensor, values: Tensor) -> None:
    """Move both ends towards those of a batch, of all ranks: the first batch sets them, later ones move them a little."""
    low, high = values.float().amin().clamp(max=0), values.float().amax().clamp(min=0)
    if dist.is_available() and dist.is_initialized():
        both = torch.stack([-low, high])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        low, high = -both[0], both[1]
    counted = getattr(module, OBSERVED)
    place = 0 if ends is getattr(module, INPUT, None) else 1
    counted[place] += 1
    ends.lerp_(torch.stack([low, high]).to(ends), torch.clamp(1 / counted[place].to(ends.dtype), min=SLOWEST))


# ------------------------------------------------------------------------------------------------------ from form to form


def quantise(module: nn.Module, name: str, how: Quantised) -> None:
    """Make a layer a fixed quantised one, in place, with values of its own still to be loaded.

    Raises:
        ModelError: another kind of module than those of `KINDS`.
    """
    _begin(module, name)
    layer: Any = module
    where: dict[str, Any] = {"device": layer.weight.device, "dtype": torch.float32}
    if layer.bias is None and how.norm is not None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight), **where))
    layer.register_buffer(SCALE, torch.ones(len(layer.weight), **where))
    layer.register_buffer(INPUT, torch.tensor([0.0, 1.0], **where))
    layer.register_buffer(OUTPUT, torch.tensor([0.0, 1.0], **where) if how.output else None)


def learn(net: nn.Module, name: str, how: Quantised) -> None:
    """Make a layer a quantised one that learns, in place: its ends are to be observed, or given, before it is run.

    Raises:
        ModelError: another kind of module than those of `KINDS`.
    """
    layer: Any = net.get_submodule(name)
    _begin(layer, name)
    layer.register_buffer(SCALE, None)
    _hold(layer, INPUT, layer.weight.device)
    if how.output and how.norm is None:
        _hold(layer, OUTPUT, layer.weight.device)
    elif how.output:
        norm: Any = net.get_submodule(str(how.norm))
        follows = what_follows(norm)
        _hold(norm if follows is None else follows, OUTPUT, norm.running_mean.device)
        if follows is None:
            norm.register_forward_hook(_round_given)
        else:
            follows.register_forward_pre_hook(_round_taken)


def _hold(module: Any, ends: str, where: torch.device) -> None:
    module.register_buffer(ends, torch.zeros(2, device=where))
    module.register_buffer(OBSERVED, torch.zeros(2, dtype=torch.int64, device=where))
    module.observes = False


def _round_given(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return given(module, output)


def _round_taken(module: nn.Module, args: Any) -> Any:
    return given(module, args[0]), *args[1:]


def holder_of(net: nn.Module, name: str, how: Quantised) -> nn.Module:
    """Which module has the ends of what a layer gives, while it learns: itself, its BatchNorm, or what follows in that."""
    norm = net.get_submodule(name if how.norm is None else how.norm)
    return norm if how.norm is None else what_follows(norm) or norm


def fix(net: nn.Module, name: str, how: Quantised) -> None:
    """End a layer's learning, in place: the factors of its BatchNorm go into scales and bias, and the whole numbers stay."""
    layer: Any = net.get_submodule(name)
    norm: Any = None if how.norm is None else net.get_submodule(how.norm)
    wide = (-1, *[1] * (layer.weight.ndim - 1))
    with torch.no_grad():
        scale, weight = scales(layer), rounded_weight(layer)
        whole = weight / scale.view(wide)
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.float()
        if norm is not None:
            factor = torch.rsqrt(norm.running_var.float() + norm.eps)
            factor = factor if norm.weight is None else factor * norm.weight
            bias = (bias - norm.running_mean) * factor + (0 if norm.bias is None else norm.bias)
            scale, weight = scale * factor.abs(), whole.round() * (scale * factor).view(wide)
        step, _ = scale_and_zero(getattr(layer, INPUT))
        scale = torch.maximum(scale, bias.abs() / (step * BIAS)).clamp(min=LEAST)
        layer.weight.copy_((weight / scale.view(wide)).round() * scale.view(wide))
        bias = (bias / (step * scale)).round() * (step * scale)
        if norm is not None and layer.bias is None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        elif layer.bias is not None:
            layer.bias.copy_(bias)
    if norm is not None and how.output:
        holder: Any = holder_of(net, name, how)
        layer.register_buffer(OUTPUT, getattr(holder, OUTPUT))
        if holder is not norm:
            _release(holder)
    elif not how.output:
        layer.register_buffer(OUTPUT, None)
    layer.register_buffer(SCALE, scale)
    layer.register_buffer(OBSERVED, None)
    for ends in (getattr(layer, INPUT), getattr(layer, OUTPUT)):
        if ends is not None and ends[0] == ends[1]:  # of what was never seen, or never anything but 0
            ends.copy_(torch.tensor([0.0, 1.0]))


def _release(module: Any) -> None:
    """Let what followed in a BatchNorm be as it was: the layer itself rounds what it gives."""
    for buffer in (OUTPUT, OBSERVED):
        del module._buffers[buffer]
    del module.observes
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _round_taken]:
        del module._forward_pre_hooks[key]


def loosen(net: nn.Module) -> int:
    """Let the scales of fixed layers follow their weights again; their ends stay: of how many layers."""
    fixed = [layer for _, layer in quantised_layers(net) if getattr(layer, SCALE) is not None]
    for layer in fixed:
        setattr(layer, SCALE, None)
    return len(fixed)


def _begin(module: nn.Module, name: str) -> None:
    kind = kind_of(module)
    if kind is None:
        raise ModelError(
            f"its record quantises {name!r}, a {type(module).__name__}: only nn.Conv2d and nn.Linear can be quantised"
        )
    module.__class__ = KINDS[kind]  # in place: whoever holds the layer goes on holding it


def without_norm(module: Any, name: str) -> nn.Module:
    """What stands in the place of a BatchNorm that is folded; an activation inside of it stays.

    Raises:
        ModelError: another kind of module, or one without statistics.
    """
    if not has_statistics(module):
        raise ModelError(f"its record folds {name!r}, a {type(module).__name__}, which is no BatchNorm with statistics")
    return without_normalising(module)


def check_int8(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are no whole numbers, and scales and ends that no layer has, before they are loaded.

    Args:
        state: as it was saved; of the network's names and shapes.

    Raises:
        ModelError: with the layer's name and the value.
    """
    tip = "copy it again from where it came from"
    for name, layer in quantised_layers(net):
        found, scale = state[f"{name}.{WEIGHT}"], state.get(f"{name}.{SCALE}")
        if scale is None:
            continue  # it learns
        if found.dtype != torch.int8:
            raise ModelError(f"{where}: {name}.{WEIGHT} is {found.dtype}, where its record says int8", tip=tip)
        wrong = scale[~((scale >= LEAST) & (scale <= MOST))]
        if len(wrong) or not scale.is_floating_point():
            raise ModelError(f"{where}: {name}.{SCALE} has a scale of {[*wrong.tolist(), scale.dtype][0]}", tip=tip)
        for ends in (INPUT, OUTPUT):
            if getattr(layer, ends) is not None:
                low, high = state[f"{name}.{ends}"].double().tolist()
                if not (-MOST <= low <= 0 <= high <= MOST and high - low >= LEAST):
                    raise ModelError(
                        f"{where}: {name}.{ends} goes from {low:g} to {high:g}; it must hold 0 and more than that",
                        tip=tip,
                    )


def packed(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state as it is saved: the weights of quantised layers as int8."""
    whole = {f"{name}.{WEIGHT}": whole_weights(layer).cpu() for name, layer in quantised_layers(net)}
    return {name: whole.get(name, tensor) for name, tensor in state.items()}


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved state with the weights of quantised layers as floats: whole numbers times scales."""
    floats = dict(state)
    for name, tensor in state.items():
        scale = (
            state.get(f"{name.removesuffix(WEIGHT)}{SCALE}") if name.endswith(f".{WEIGHT}") or name == WEIGHT else None
        )
        if scale is not None and tensor.dtype == torch.int8 and scale.shape == tensor.shape[:1]:
            floats[name] = tensor.float() * scale.float().view(-1, *[1] * (tensor.ndim - 1))
    return floats

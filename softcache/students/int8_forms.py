"""A quantised model in the forms that other programs read: int8 weights in a graph of torch, or QDQ nodes of ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softcache.models import Model
from softcache.models.fake_quantise import (
    INPUT,
    OUTPUT,
    STEPS,
    QuantisedConv2d,
    quantised_layers,
    scale_and_zero,
    scales,
    whole_weights,
)
from softcache.models.shrunk import put

LEAST_OPSET = 13  # the first whose DequantizeLinear has a scale for each channel
MIDDLE = 128  # of uint8: what stands for 0
MOST_INT32 = 2**31 - 1


def is_quantised(model: Model) -> bool:
    """Whether some of its layers are of int8."""
    return next(quantised_layers(model.net), None) is not None


def for_torch(model: Model) -> Model:
    """A copy whose graph holds int8 weights, which are multiplied by their scales, and rounds activations."""
    return _with(model, _InTorch)


def for_onnx(model: Model) -> Model:
    """A copy whose graph holds 8-bit weights and int32 biases behind DequantizeLinear, and pairs of Q and DQ at activations.

    The weights are moved up by 128, as uint8 with 128 for their 0: the same numbers. Where a processor has no VNNI, onnxruntime
    adds up two products of uint8 and int8 in 16 bits, which overflow; of uint8 and uint8 it does not.
    """
    return _with(model, _InOnnx)


def in_floats(model: Model) -> Model:
    """A copy with the same weights as floats, whose activations are not rounded."""
    return _with(model, _plain)


def _with(model: Model, make: Callable[[Any], nn.Module]) -> Model:
    copied = copy.deepcopy(model).cpu().eval()
    for name, layer in list(quantised_layers(copied.net)):
        put(copied.net, name, make(layer))
    return copied


def _plain(layer: Any) -> nn.Module:
    plain = copy.copy(layer)
    plain.__class__ = nn.Conv2d if isinstance(layer, QuantisedConv2d) else nn.Linear
    return plain


class _InTorch(nn.Module):
    """A layer in operators that every graph has: those of fake quantisation are not among them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = [_plain(layer)]  # in a list: its float weight is no part of the graph
        self.register_buffer("weight", whole_weights(layer))
        self.register_buffer("scale", scales(layer).view(-1, *[1] * (layer.weight.ndim - 1)))
        self.bias, self.has_ends = layer.bias, getattr(layer, OUTPUT) is not None
        for name, ends in (("taken", INPUT), ("given", OUTPUT)) if self.has_ends else (("taken", INPUT),):
            step, zero = scale_and_zero(getattr(layer, ends))
            self.register_buffer(name, torch.stack([step, 1 / step, zero.to(step)]))

    def forward(self, x: Tensor) -> Tensor:
        me: Any = self
        y = _computed(self.layer[0], _rounded(x, me.taken), me.weight.float() * me.scale, self.bias)
        return _rounded(y, me.given) if self.has_ends else y


def _rounded(x: Tensor, numbers: Tensor) -> Tensor:
    """As torch's own fake quantisation does it, to the last bit."""
    step, inverse, zero = numbers.unbind()
    return (((x * inverse).round() + zero).clamp(0, STEPS) - zero) * step


class _InOnnx(nn.Module):
    """A layer between operators of ONNX."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = [_plain(layer)]
        scale, (step, zero) = scales(layer), scale_and_zero(getattr(layer, INPUT))
        self.register_buffer("weight", (whole_weights(layer).to(torch.int16) + MIDDLE).to(torch.uint8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.full((len(scale),), MIDDLE, dtype=torch.uint8))
        self.register_buffer("step", step)
        self.register_buffer("step_zero", zero.to(torch.uint8))
        self.has_bias, self.has_ends = layer.bias is not None, getattr(layer, OUTPUT) is not None
        if self.has_bias:
            self.register_buffer("bias_scale", scale * step)
            whole = (layer.bias.detach().double() / (scale * step).double()).round().clamp(-MOST_INT32, MOST_INT32)
            self.register_buffer("bias", whole.to(torch.int32))
        if self.has_ends:
            out, out_zero = scale_and_zero(getattr(layer, OUTPUT))
            self.register_buffer("out", out)
            self.register_buffer("out_zero", out_zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        me: Any = self
        weight = _dequantised(me.weight, me.scale, me.zero)
        bias = _dequantised(me.bias, me.bias_scale, None) if self.has_bias else None
        y = _computed(self.layer[0], _through_uint8(x, me.step, me.step_zero), weight, bias)
        return _through_uint8(y, me.out, me.out_zero) if self.has_ends else y


def _computed(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a plain layer gives with this weight and bias."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def _through_uint8(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    operator = torch.onnx.ops.symbolic
    whole = operator("QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape)
    return operator("DequantizeLinear", (whole, scale, zero), dtype=torch.float32, shape=x.shape)


def _dequantised(whole: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """A constant of which each output channel has a scale of its own."""
    given: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (whole, scale, *([] if zero is None else [zero])),
        {"axis": 0},
        dtype=torch.float32,
        shape=whole.shape,
    )
    return given

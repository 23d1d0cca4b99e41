"""A teacher that computes in a half type: by autocast, or because its own weights are in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.data.loading import map_tensors
from softcache.features.taps import classifier_of

HALF_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative, of a last layer in a half type


def last_layer(network: nn.Module, inputs: Any) -> nn.Linear | None:
    """The linear layer that gives the logits; where none does, value for value, the last one that it has."""
    try:
        found = classifier_of(network, inputs)
    except Exception:  # it may run under autocast alone
        found = None
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    return found or (layers[-1] if layers else None)


@contextmanager
def last_in_float32(layer: nn.Linear | None) -> Iterator[None]:
    """Within autocast, the layer computes in float32: its rounding would cost more than any codec."""
    if layer is None:
        yield
        return
    before, forward = layer.__dict__.get("forward"), layer.forward
    weight, bias = layer.weight, layer.bias

    def in_float32(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            if weight.dtype in HALF_ROUNDING:  # which no float32 can be multiplied with
                return F.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
            return forward(inputs.float())

    layer.forward = in_float32  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:  # somebody else's, as of a hook
            layer.__dict__["forward"] = before


@dataclass(frozen=True)
class HalfInputs:
    """A hook before a module's forward: its floating-point inputs in the module's own type."""

    dtype: torch.dtype

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def change(one: Tensor) -> Tensor:
            return one.to(self.dtype) if one.is_floating_point() else one

        return map_tensors((args, kwargs), change)


def half_type(network: nn.Module) -> torch.dtype | None:
    """The half type that all its floating-point parameters have; None for every other network."""
    found = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return next(iter(found)) if len(found) == 1 and found <= set(HALF_ROUNDING) else None

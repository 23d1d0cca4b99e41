"""BatchNorm of every kind: torch's own, a library's that has an activation behind it, and one whose statistics are frozen."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FROZEN = {
    "weight",
    "bias",
    "running_mean",
    "running_var",
}  # the buffers of torchvision's and timm's, which learn nothing
COUNTER = "num_batches_tracked"


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises each channel as BatchNorm does, whatever follows in it."""
    if isinstance(module, BATCH_NORMS):
        return True
    return not module._parameters and set(module._buffers) - {COUNTER} == FROZEN and hasattr(module, "eps")


def width_of(norm: Any) -> int:
    """Of how many channels it is."""
    return int(getattr(norm, "num_features", None) or len(norm.running_mean))


def has_statistics(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that normalises by statistics of its own, so that it can be folded into the layer before it."""
    own = {*module._parameters, *module._buffers} - {COUNTER}
    return is_batch_norm(module) and own == FROZEN and module.running_mean is not None


def what_follows(norm: nn.Module) -> nn.Module | None:
    """The module in a BatchNorm that takes what it has normalised; None in one that only normalises."""
    return next(norm.children(), None)


def without_normalising(norm: nn.Module) -> nn.Module:
    """What is left of a BatchNorm that is folded: what follows in it, by the same names."""
    left = OrderedDict(norm.named_children())
    return nn.Sequential(left) if left else nn.Identity()

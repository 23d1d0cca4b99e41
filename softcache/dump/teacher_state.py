"""What a teacher's module holds, and whether it still holds it: tensors of every kind, and state that is no tensor."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softcache.models import Model
from softcache.models import fingerprint as tensors_fingerprint


def fingerprint(network: nn.Module) -> str | None:
    """sha256 in hex over a network's state; None where it holds something that has no bytes of its own.

    Plain tensors count as in `models.fingerprint`; beside them quantised tensors, numbers, strings, bytes and None, in
    mappings and sequences, as modules with `get_extra_state` and quantised modules keep them.
    """
    state = (network.net if isinstance(network, Model) else network).state_dict()
    if all(isinstance(value, Tensor) and _is_plain(value) for value in state.values()):
        return tensors_fingerprint(network)
    return digest_of(state)


def digest_of(value: Any) -> str | None:
    """sha256 in hex over a value of those kinds; None for any other."""
    hasher = hashlib.sha256()
    return hasher.hexdigest() if _add(hasher, value) else None


def _add(hasher: Any, value: Any) -> bool:
    """Feed a value, with its type and length, so that no two read the same; False where it has no bytes of its own."""
    if isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)}\n".encode())
        return all(_add(hasher, one) for key in sorted(value, key=repr) for one in (repr(key), value[key]))
    if isinstance(value, list | tuple):
        hasher.update(f"sequence {len(value)}\n".encode())
        return all(_add(hasher, one) for one in value)
    if isinstance(value, Tensor):
        return _add_tensor(hasher, value)
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    if isinstance(value, bytes):
        hasher.update(f"bytes {len(value)}\n".encode() + value)
        return True
    if value is None or isinstance(value, str | bool | int | float | torch.dtype):
        hasher.update(f"{type(value).__name__} {len(repr(value))}\n{value!r}".encode())
        return True
    return False


def _add_tensor(hasher: Any, tensor: Tensor) -> bool:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scales: Any = [tensor.q_scale(), tensor.q_zero_point()]
        else:
            scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()]
        return _add(hasher, ["quantised", scales, tensor.int_repr()])
    described = json.dumps([str(tensor.dtype), list(tensor.shape)])
    hasher.update(described.encode() + b"\n")
    hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return True


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.is_quantized and tensor.layout == torch.strided and not tensor.is_meta


class StandsStill:
    """A module's buffers and its state that is no tensor, as they were when this was made."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        self._others = _others(network)

    def changed(self) -> str | None:
        """The name of the first one that is no longer as it was; None: they all are."""
        now = dict(self._network.named_buffers())
        for name, before in self._buffers.items():
            if name not in now or not _same(before, now[name]):
                return f"buffer {name!r}"
        others = _others(self._network)
        return next((f"state {name!r}" for name, digest in self._others.items() if others.get(name) != digest), None)


def _others(network: nn.Module) -> dict[str, str | None]:
    """Digests of what `get_extra_state` of its modules gives."""
    state = network.state_dict()
    return {name: digest_of(value) for name, value in state.items() if name.endswith("_extra_state")}


def _same(before: Tensor, now: Tensor) -> bool:
    """Equal in type, shape and numbers; NaN equals NaN."""
    if (before.dtype, before.shape, before.device) != (now.dtype, now.shape, now.device):
        return False
    if before.is_quantized or not before.is_floating_point():
        return torch.equal(before, now)
    return bool(((before == now) | (before.isnan() & now.isnan())).all())

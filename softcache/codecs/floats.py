"""The two float codecs: all classes, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softcache.errors import CodecRangeError

FLOAT16_MAX = 65504


def round_up_to_half(values: Tensor) -> Tensor:
    """(B,) non-negative float32 -> the smallest float16 that is not below it, so that a stored bound stays a bound."""
    half = values.half()
    bits = half.view(torch.int16)
    return torch.where(half.float() < values, bits + 1, bits).view(torch.float16)


@dataclass(frozen=True)
class Float32Codec:
    """Logits as float32: exact."""

    name: ClassVar[str] = "float32"
    keeps_level: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    temperatures: ClassVar[tuple[float, ...] | None] = None

    def arrays(self, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"logits": ("<f4", (num_classes,)), "eps": ("<f2", ())}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        return {"logits": logits, "eps": torch.zeros(len(logits), dtype=torch.float16, device=logits.device)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["logits"].float()


@dataclass(frozen=True)
class Float16Codec:
    """Logits as float16; |error| <= 2**-11 |logit| for normal values. Refuses what float16 cannot hold."""

    name: ClassVar[str] = "float16"
    keeps_level: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    temperatures: ClassVar[tuple[float, ...] | None] = None

    def arrays(self, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"logits": ("<f2", (num_classes,)), "eps": ("<f2", ())}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        stored = logits.half()
        # half() turns what it cannot hold into inf, without an error. On a GPU looking here would stall the teacher: there
        # `eps` comes out infinite, and the dump refuses that.
        if not logits.is_cuda and not bool(stored.isfinite().all()):
            raise CodecRangeError(
                f"float16 holds |logit| <= {FLOAT16_MAX}, found {logits.abs().amax().item():.6g}",
                tip="use --codec float32 (twice the bytes)",
            )
        return {"logits": stored, "eps": round_up_to_half((stored.float() - logits).abs().amax(dim=1))}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["logits"].float()

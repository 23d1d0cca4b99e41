"""`int8`: all classes in one byte each, with a scale of the row's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softcache.codecs.codec import Codec
from softcache.codecs.records import Field, lay_out, read_field, write_fields


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Every class in 8 bits: lowest + step * code, step = (largest - lowest) / 255.

    |error| <= step / 2, and float32's rounding at the row's level; a constant row is exact. With errors spread evenly over
    a step, the mean KL(p_T || p'_T) is about mean(step**2) / (24 T**2).
    Decoding is one product and one sum, each rounded once: the same on every device.
    A row whose range is beyond float32 gets an error beyond float16, which is refused where eps is made.
    """

    name: ClassVar[str] = "int8"

    @property
    def fields(self) -> tuple[Field, ...]:
        return lay_out([("lowest", "<f4", ()), ("step", "<f4", ()), ("codes", "|u1", (self.num_classes,))])

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        lowest, highest = logits.amin(dim=1), logits.amax(dim=1)
        step = step_of(lowest, highest, 255)
        codes = codes_of(logits, lowest, step, 255)
        return {"records": write_fields(self.fields, {"lowest": lowest, "step": step, "codes": codes})}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        lowest, step, codes = (read_field(arrays["records"], field) for field in self.fields)
        return from_codes(codes, lowest, step)


def step_of(lowest: Tensor, highest: Tensor, levels: int) -> Tensor:
    """(B,) float32 (highest - lowest) / levels, without the overflow of a difference beyond float32."""
    return (highest / 2 - lowest / 2) / (levels / 2)


def codes_of(logits: Tensor, lowest: Tensor, step: Tensor, levels: int) -> Tensor:
    """(B, C) float32 whole numbers in [0, levels], those nearest to (logits - lowest) / step; all 0 where the step is 0."""
    divisor = torch.where(step > 0, step, 1)
    return (logits - lowest[:, None]).div_(divisor[:, None]).round_().clamp_(0, levels)


def from_codes(codes: Tensor, lowest: Tensor, step: Tensor) -> Tensor:
    """(B, C) float32 lowest + step * codes."""
    # not addcmul: fused or not, by device and by place in the batch, it would round differently
    return codes.float().mul_(step[:, None]).add_(lowest[:, None])

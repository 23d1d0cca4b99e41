"""`int8`: all classes in one byte each, with a scale of the row's own, or of each group of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softcache.codecs.codec import Codec
from softcache.codecs.records import Field, lay_out, read_field, write_fields
from softcache.errors import CodecRangeError, ConfigError


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Every class in 8 bits: lowest + step * code, step = (largest - lowest) / 255.

    |error| <= step / 2, and float32's rounding at the row's level; a constant row is exact. With errors spread evenly over
    a step, the mean KL(p_T || p'_T) is about mean(step**2) / (24 T**2).
    Decoding is one product and one sum, each rounded once: the same on every device.
    A row whose range is beyond float32 gets an error beyond float16, which is refused where eps is made.

    With `group` each group of so many classes has a step and a lowest of its own, in float16: 4 bytes a group, and a class far
    from the others spoils its group alone. Codes are made with what is stored.

    Attributes:
        group: classes a group; 0: the whole row is one, with a scale in float32.
    """

    name: ClassVar[str] = "int8"

    group: int = 0

    def __post_init__(self) -> None:
        if self.group < 0:
            raise ConfigError(f"codec int8: group={self.group}: must be at least 1, or 0 for one scale a row")

    @property
    def parameters(self) -> dict[str, str]:
        return {"group": str(self.group)} if self.group else {}

    @property
    def format(self) -> int:
        return 2 if self.group else 1

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = ("codes", "|u1", (self.num_classes,))
        if self.group:
            groups = -(-self.num_classes // self.group)
            return lay_out([("lowest", "<f2", (groups,)), ("step", "<f2", (groups,)), codes])
        return lay_out([("lowest", "<f4", ()), ("step", "<f4", ()), codes])

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        if self.group:
            return {"records": write_fields(self.fields, grouped(logits, self.group))}
        lowest, highest = logits.amin(dim=1), logits.amax(dim=1)
        step = step_of(lowest, highest, 255)
        codes = codes_of(logits, lowest, step, 255)
        return {"records": write_fields(self.fields, {"lowest": lowest, "step": step, "codes": codes})}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        lowest, step, codes = (read_field(arrays["records"], field) for field in self.fields)
        if self.group:
            own = torch.arange(self.num_classes, device=codes.device) // self.group
            return codes.float().mul_(step.float()[:, own]).add_(lowest.float()[:, own])
        return from_codes(codes, lowest, step)


def grouped(values: Tensor, group: int) -> dict[str, Tensor]:
    """`lowest` and `step`, (B, G) float16, and (B, W) `codes` of values in groups of their own; the last may be shorter.

    Raises:
        CodecRangeError: a group that float16 cannot hold.
    """
    count, width = values.shape
    groups = -(-width // group)
    filled = torch.cat([values, values[:, -1:].expand(count, groups * group - width)], dim=1)
    cells = filled.reshape(count, groups, group)
    smallest, largest = cells.amin(dim=2), cells.amax(dim=2)
    lowest = -round_up(-smallest)  # not above the smallest
    step = round_up((largest - lowest.float()) / 255)
    # on a GPU looking here would stall the teacher: there `eps` comes out infinite, and the dump refuses that
    if not values.is_cuda and not bool((lowest.isfinite() & step.isfinite()).all()):
        raise CodecRangeError(
            f"float16 holds the scales of groups up to 65504, found {values.abs().amax().item():.6g}",
            tip="leave the groups out (group=0): one scale a row is float32",
        )
    divisor = torch.where(step > 0, step.float(), 1)
    codes = (cells - lowest.float()[:, :, None]).div_(divisor[:, :, None]).round_().clamp_(0, 255)
    return {"lowest": lowest, "step": step, "codes": codes.reshape(count, groups * group)[:, :width]}


def round_up(values: Tensor) -> Tensor:
    """float32 -> the smallest float16 that is not below it."""
    half = values.half()
    bits = half.view(torch.int16)
    # one float16 up: towards zero where it is negative; from -0 to the smallest there is
    next_up = torch.where(half == 0, torch.ones_like(bits), torch.where(half < 0, bits - 1, bits + 1)).view(
        torch.float16
    )
    return torch.where(half.float() < values, next_up, half)


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

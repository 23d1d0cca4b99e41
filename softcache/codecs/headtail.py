"""`headtail`: the largest logits exactly, the others in a few bits with a scale of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softcache.codecs.codec import Codec
from softcache.codecs.int8 import codes_of, from_codes, step_of
from softcache.codecs.packing import id_bits, pack, pack_codes, packed_bytes, unpack_codes, unpack_ids
from softcache.codecs.records import Field, lay_out, read_field, write_fields
from softcache.errors import CodecRangeError, ConfigError

WIDTHS = (8, 6, 4)


@dataclass(frozen=True)
class HeadTailCodec(Codec):
    """The k largest logits to float16's precision below the largest of them, the rest in `bits` bits with their own step.

    |error| <= 2**-11 (largest - logit) in the head, step / 2 in the tail with step = (its largest - its lowest) /
    (2**bits - 1), and float32's rounding at the row's level. Of equal logits the smaller class is in the head first;
    where C <= k every class is. Decoding is one product, one sum and one difference, each rounded once: the same on
    every device. Refuses a head that reaches more than 65504 below its largest.

    Attributes:
        k: classes in the head.
        bits: of a tail class: 8, 6 or 4.
    """

    name: ClassVar[str] = "headtail"

    k: int = 8
    bits: int = 8

    def __post_init__(self) -> None:
        id_bits(self.num_classes)
        if self.k < 1:
            raise ConfigError(f"codec 'headtail': k must be at least 1, got {self.k}")
        if self.bits not in WIDTHS:
            raise ConfigError(f"codec 'headtail': bits must be 8, 6 or 4, got {self.bits}")

    @property
    def of_classes(self) -> bool:
        return True

    @property
    def kept(self) -> int:
        return min(self.k, self.num_classes)

    @property
    def fields(self) -> tuple[Field, ...]:
        return lay_out(
            [
                ("largest", "<f4", ()),
                ("lowest", "<f4", ()),
                ("step", "<f4", ()),
                ("below", "<f2", (self.kept - 1,)),  # largest - logit of the head's others, ascending
                ("ids", "|u1", (packed_bytes(self.kept, id_bits(self.num_classes)),)),
                (
                    "codes",
                    "|u1",
                    (packed_bytes(self.num_classes, self.bits),),
                ),  # of every class; the head's mean nothing
            ]
        )

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        levels = 2**self.bits - 1
        values, ids = largest(logits, min(self.kept + 1, self.num_classes))
        below = values[:, :1] - values[:, 1 : self.kept]
        refuse_beyond_half(below)
        lowest = logits.amin(dim=1)
        step = step_of(lowest, values[:, -1], levels)  # the last one is the tail's largest
        codes = codes_of(logits, lowest, step, levels)
        record = {
            "largest": values[:, 0],
            "lowest": lowest,
            "step": step,
            "below": below,
            "ids": pack(ids[:, : self.kept], id_bits(self.num_classes)),
            "codes": pack_codes(codes.to(torch.uint8), self.bits) if self.bits < 8 else codes,
        }
        return {"records": write_fields(self.fields, record)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        top, lowest, step, below, ids, codes = (read_field(arrays["records"], field) for field in self.fields)
        rows = from_codes(unpack_codes(codes, self.num_classes, self.bits), lowest, step)
        head = torch.cat([top[:, None], top[:, None] - below.float()], dim=1)  # (B, kept)
        return rows.scatter_(1, unpack_ids(ids, self.kept, self.num_classes), head)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, count) values and int64 ids of the largest of (B, C) float32 logits, in descending order.

    Equal logits come in the order of their classes, on any device; torch.topk alone promises neither which of them it
    takes nor their order. On a CPU it is asked first, and rows in which it had a choice are done again.
    """
    if logits.is_cuda or count >= logits.shape[1]:  # on a GPU looking at them would stall the teacher
        return _largest_by_keys(logits, count)
    found, ids = logits.topk(count + 1, dim=1)
    ids, order = ids[:, :count].sort(dim=1)
    values, order = found.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    unclear = (found[:, count - 1] == found[:, count]).nonzero()[:, 0]
    if len(unclear):
        values[unclear], ids[unclear] = _largest_by_keys(logits[unclear], count)
    return values, ids


def _largest_by_keys(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`largest`, in a few passes over numbers twice as wide."""
    # int64 keys in the order of (value, -class): a float's bits, flipped below zero, are in the order of the floats
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0: they are equal
    sign = bits >> 31
    sign &= 0x7FFFFFFF
    bits ^= sign
    keys = bits.long()
    keys <<= 24
    keys |= torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    ids = keys.topk(count, dim=1).indices
    return logits.gather(1, ids), ids


def refuse_beyond_half(below: Tensor) -> None:
    """CodecRangeError where a distance to the row's largest logit is more than float16 holds."""
    # on a GPU looking here would stall the teacher: there the stored infinity makes eps infinite, and the dump refuses that
    if not below.is_cuda and not bool(below.half().isfinite().all()):
        raise CodecRangeError(
            f"codec 'headtail' holds logits up to 65504 below the row's largest in its head, found "
            f"{below.amax().item():.6g}",
            tip="use --codec int8 or float32",
        )

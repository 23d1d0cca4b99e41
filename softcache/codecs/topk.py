"""`topk`: the largest logits and how much probability the others have, in a few bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from softcache.codecs.codec import Codec
from softcache.codecs.headtail import largest
from softcache.codecs.packing import id_bits, pack, packed_bytes, unpack, unpack_ids
from softcache.codecs.records import Field, lay_out, read_field, write_fields
from softcache.errors import CacheError, ConfigError

BETAS = (1.0, 0.5, 0.25, 0.125)  # 1 / T of the stored tails
BELOW_BITS = 13  # a float16 without its sign and its two lowest bits
LARGEST_BELOW = 65408.0


@dataclass(frozen=True)
class TopkCodec(Codec):
    """The k largest logits below the largest of them, their ids, and the tail's log-sum-exp at T in {1, 2, 4, 8}.

    The row's level and the shape of its tail are lost, so that there is no eps: fidelity is the KL measured on `spread`.
    Distances below the largest logit are at most 2.5 * 2**-10 of themselves off (2.5 * 2**-24 below 2**-14), those of the
    tail below log(C - k) 2**-11; both saturate at 65408, where the probability is zero in float64 at any T served.
    Between the stored temperatures the tail's log-sum-exp, a convex function of 1 / T that is log(C - k) at 0, is the
    quartic through the four stored points and that one, held inside the bounds that convexity gives. Of equal logits the
    smaller class is kept first; where C <= k there is no tail, and nothing is lost but the level.

    Attributes:
        k: classes kept.
    """

    name: ClassVar[str] = "topk"
    keeps_level: ClassVar[bool] = False
    complete: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    temperature_range: ClassVar[tuple[float, float] | None] = (1.0, 8.0)

    k: int = 10

    def __post_init__(self) -> None:
        id_bits(self.num_classes)
        if self.k < 1:
            raise ConfigError(f"codec 'topk': k must be at least 1, got {self.k}")

    @property
    def of_classes(self) -> bool:
        return True

    @property
    def kept(self) -> int:
        return min(self.k, self.num_classes)

    @property
    def tail_classes(self) -> int:
        return self.num_classes - self.kept

    @property
    def fields(self) -> tuple[Field, ...]:
        return lay_out(
            [
                (
                    "tails",
                    "<f2",
                    (len(BETAS) if self.tail_classes else 0,),
                ),  # log(C - k) - log-sum-exp, at T = 1, 2, 4, 8
                ("ids", "|u1", (packed_bytes(self.kept, id_bits(self.num_classes)),)),
                (
                    "below",
                    "|u1",
                    (packed_bytes(self.kept - 1, BELOW_BITS),),
                ),  # largest - logit of the others, ascending
            ]
        )

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        values, ids = largest(logits, min(self.kept + 1, self.num_classes))
        ids = ids[:, : self.kept]
        below = values[:, :1] - values[:, 1 : self.kept]
        tails = values[:, :0]
        if self.tail_classes:
            tails = (log(self.tail_classes) - tails_of(logits, values, ids)).clamp(0.0, LARGEST_BELOW)
        record = {
            "tails": tails,
            "ids": pack(ids, id_bits(self.num_classes)),
            "below": pack(_to_codes(below), BELOW_BITS),
        }
        return {"records": write_fields(self.fields, record)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        raise CacheError(
            f"codec 'topk' keeps {self.kept} of {self.num_classes} classes only, not whole rows of logits",
            tip="use --loss kd_lower_bound, or dump with --codec headtail",
        )

    def head(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, k) int64 ids and (B, k) float32 logits of the classes kept, descending; the largest is 0."""
        _, ids, below = (read_field(arrays["records"], field) for field in self.fields)
        distances = _from_codes(unpack(below, self.kept - 1, BELOW_BITS))
        logits = torch.cat([distances.new_zeros(len(distances), 1), -distances], dim=1)
        return unpack_ids(ids, self.kept, self.num_classes), logits

    def tail_logsumexp(self, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
        """(B,) float32 log of the sum over the other classes of exp(logit / T), at the level of `head`; -inf without any.

        Raises:
            ValueError: a temperature outside `temperature_range`.
        """
        if not self.serves(temperature):
            raise ValueError(f"codec 'topk' serves {self.served}, not {temperature:g}")
        if not self.tail_classes:
            return torch.full((len(arrays["records"]),), -torch.inf, device=arrays["records"].device)
        gaps = read_field(arrays["records"], self.fields[0]).float()  # (B, 4)
        return log(self.tail_classes) - _between(gaps, 1.0 / temperature)

    def spread(self, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
        """(B, C) float32 log-probabilities at a temperature, the tail's mass spread evenly over its classes."""
        return spread_evenly(self, arrays, temperature)


def spread_evenly(codec: Codec, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
    """`Codec.spread` of a codec that keeps a head and its tail's log-sum-exp."""
    ids, logits = codec.head(arrays)
    head = logits / temperature
    tail = codec.tail_logsumexp(arrays, temperature)[:, None]
    total = torch.logaddexp(head.logsumexp(dim=1, keepdim=True), tail)
    each = tail - total - log(max(1, codec.num_classes - ids.shape[1]))
    return each.repeat(1, codec.num_classes).scatter_(1, ids, head - total)


def tails_of(logits: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """(B, 4) log-sum-exp over the classes that are not in `ids` of (logit - largest) / T, at the T of BETAS.

    Args:
        values: (B, k + 1) largest logits; the last one is the tail's largest.
    """
    power = (logits - values[:, -1:]).mul_(BETAS[-1]).exp_().scatter_(1, ids, 0.0)  # at T=8; squared, at T=4, 2, 1
    sums = [power.sum(dim=1)]
    for _ in BETAS[1:]:
        sums.append(power.square_().sum(dim=1))
    below = values[:, -1:] - values[:, :1]
    return torch.stack(sums[::-1], dim=1).log_() + torch.cat([below * beta for beta in BETAS], dim=1)


def _to_codes(below: Tensor) -> Tensor:
    """(B, n) non-negative float32 -> 13-bit codes: the upper bits of the nearest float16, rounded."""
    halves = below.new_empty(below.shape, dtype=torch.float16).copy_(below.clamp(max=LARGEST_BELOW))
    return (halves.view(torch.int16) + 2) >> 2


def _from_codes(codes: Tensor) -> Tensor:
    """(B, n) int64 codes -> (B, n) float32."""
    bits = codes.new_empty(codes.shape, dtype=torch.int16).copy_(codes << 2)
    return bits.view(torch.float16).float()


def _between(gaps: Tensor, beta: float) -> Tensor:
    """(B,) the concave function of 1 / T that is 0 at 0 and `gaps` (B, 4) at BETAS, at `beta` between them."""
    nodes = (0.0, *BETAS[::-1])
    points = [torch.zeros_like(gaps[:, 0]), *gaps.flip(1).unbind(1)]
    if beta in nodes:
        return points[nodes.index(beta)]
    curve = torch.zeros_like(points[0])
    for i, node in enumerate(nodes):  # Lagrange's form
        weight = 1.0
        for other in nodes[:i] + nodes[i + 1 :]:
            weight *= (beta - other) / (node - other)
        curve += weight * points[i]

    def line(i: int, j: int) -> Tensor:
        return points[i] + (points[j] - points[i]) * ((beta - nodes[i]) / (nodes[j] - nodes[i]))

    after = next(i for i, node in enumerate(nodes) if node > beta)  # nodes[after - 1] < beta < nodes[after]
    chord = line(after - 1, after)  # a concave function lies above it, and below its neighbours drawn out
    curve = torch.minimum(curve, line(after - 2, after - 1)) if after > 1 else curve
    curve = torch.minimum(curve, line(after, after + 1)) if after + 1 < len(nodes) else curve
    return torch.maximum(curve, chord)

"""`topset`: `topk` for vocabularies: the ids as a set, a byte a value, the others' log-sum-exp at fixed temperatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from softcache.codecs.codec import Codec
from softcache.codecs.headtail import largest
from softcache.codecs.idset import pack_set, set_bytes, unpack_set
from softcache.codecs.packing import id_bits
from softcache.codecs.records import Field, lay_out, read_field, write_fields
from softcache.codecs.topk import BETAS, LARGEST_BELOW, spread_evenly, tails_of
from softcache.errors import CacheError, CodecRangeError, ConfigError, DamagedCacheError

TOP = 255  # the code of the largest alone
LEVELS = 254  # the code of what is equal to it; the k-th has 0


@dataclass(frozen=True)
class TopsetCodec(Codec):
    """The k largest logits, in a byte each between the k-th and the largest, and the log-sum-exp of all others at T = 1, 2, 4, 8.

    |error| <= (largest - k-th) / 508 of each distance below the largest, and float32's rounding; distances saturate at 65408. The
    row's level and the shape of its tail are lost, so that there is no eps. Tails are as those of `topk`, but only the stored
    temperatures are served: between them a tail is made up. Of equal logits the smaller class is kept, and is the largest, first.
    Where C <= k no ids are stored, there is no tail, and every temperature is served.

    Attributes:
        k: classes kept.
        temperatures: how many of the four tails are stored: 4, or 1 (that at T=1), which is all that k log-probabilities tell.
    """

    name: ClassVar[str] = "topset"
    keeps_level: ClassVar[bool] = False
    complete: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    k: int = 50
    temperatures: int = len(BETAS)

    def __post_init__(self) -> None:
        id_bits(self.num_classes)
        if self.k < 1:
            raise ConfigError(f"codec 'topset': k must be at least 1, got {self.k}")
        if self.temperatures not in (1, len(BETAS)):
            raise ConfigError(
                f"codec 'topset': temperatures={self.temperatures}: tails are stored at 4 of them (1, 2, 4 and 8) or at 1"
            )

    @property
    def parameters(self) -> dict[str, str]:
        return {"k": str(self.k)} | ({} if self.temperatures == len(BETAS) else {"temperatures": "1"})

    @property
    def of_classes(self) -> bool:
        return True

    @property
    def format(self) -> int:
        return 2

    @property
    def kept(self) -> int:
        return min(self.k, self.num_classes)

    @property
    def tail_classes(self) -> int:
        return self.num_classes - self.kept

    @property
    def _stored(self) -> tuple[float, ...]:
        return tuple(1 / beta for beta in BETAS[: self.temperatures])

    def serves(self, lowest: float, highest: float | None = None) -> bool:
        alone = highest is None or highest == lowest
        return not self.tail_classes or (alone and lowest in self._stored)

    @property
    def served(self) -> str:
        return "temperatures 1, 2, 4 and 8 alone" if self.temperatures > 1 else "temperature 1 alone"

    @property
    def fields(self) -> tuple[Field, ...]:
        some = bool(self.tail_classes)
        return lay_out(
            [
                ("step", "<f4", ()),
                ("tails", "<f2", (self.temperatures if some else 0,)),  # log(C - k) - log-sum-exp, at T = 1, 2, 4, 8
                ("values", "|u1", (self.kept,)),  # of the classes kept, in ascending order of class
                ("ids", "|u1", (set_bytes(self.kept, self.num_classes) if some else 0,)),
            ]
        )

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        values, ids = largest(logits, min(self.kept + 1, self.num_classes))
        gaps = values[:, :0]
        if self.tail_classes:
            ids = ids[:, : self.kept]
            gaps = log(self.tail_classes) - tails_of(logits, values, ids)[:, : self.temperatures]
        return self._written(values[:, : self.kept], ids, gaps)

    def encode_largest(self, ids: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """What an engine gives that tells some log-probabilities alone -> stored arrays; `temperatures` must be 1.

        The tail is what the k largest leave of 1, computed in float64: it is as exact as they are.

        Args:
            ids: (B, n) int64 different classes of each record, in any order, n >= min(k, C).
            log_probs: (B, n) natural logarithms of their probabilities at T=1, of all C classes.

        Raises:
            CodecRangeError: ids that are no classes or stand there twice, fewer than k, or numbers that are not finite.
        """
        if self.temperatures != 1 and self.tail_classes:
            raise ConfigError(
                "codec 'topset': log-probabilities of some classes tell the tail at T=1 alone",
                tip=f"topset:k={self.k},temperatures=1",
            )
        ids, order = ids.sort(dim=1)
        if ids.shape[1] < self.kept or bool((ids[:, 1:] == ids[:, :-1]).any()):
            raise CodecRangeError(f"codec 'topset' takes {self.kept} different classes a record, found fewer")
        if bool(((ids < 0) | (ids >= self.num_classes)).any()) or not bool(log_probs.isfinite().all()):
            raise CodecRangeError(f"codec 'topset' takes finite log-probabilities of classes below {self.num_classes}")
        values, places = largest(log_probs.float().gather(1, order), self.kept)
        exact = values.double()
        left = (1 - exact.exp().sum(dim=1)).clamp(min=0).log() - exact[:, 0]  # of the tail, below the largest
        gaps = log(self.tail_classes) - left[:, None] if self.tail_classes else values[:, :0]
        return self._written(values, ids.gather(1, places), gaps)

    def _written(self, values: Tensor, ids: Tensor, gaps: Tensor) -> dict[str, Tensor]:
        """Records of the (B, kept) largest, in descending order."""
        ids, order = ids.sort(dim=1)
        below = (values[:, :1] - values).clamp_(max=LARGEST_BELOW).gather(1, order)
        step = below.amax(dim=1) / LEVELS
        codes = LEVELS - (below / torch.where(step > 0, step, 1)[:, None]).round_().clamp_(0, LEVELS)
        record = {
            "step": step,
            "tails": gaps.clamp(0.0, LARGEST_BELOW),
            "values": torch.where(order == 0, TOP, codes).to(torch.uint8),
            "ids": pack_set(ids, self.num_classes) if self.tail_classes else ids[:, :0].to(torch.uint8),
        }
        return {"records": write_fields(self.fields, record)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        raise CacheError(
            f"codec 'topset' keeps {self.kept} of {self.num_classes} classes only, not whole rows of logits",
            tip="use --loss kd_lower_bound, or dump with --codec linear_head or int8",
        )

    def head(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, k) int64 ids and (B, k) float32 logits of the classes kept: the largest, which is 0, then by class.

        Raises:
            DamagedCacheError: bytes that are not k rising ids with one largest, on a CPU. On a GPU looking would stall
                the student: there the logits of such a record are not numbers.
        """
        step, _, codes, packed = (read_field(arrays["records"], field) for field in self.fields)
        if self.tail_classes:
            ids, whole = unpack_set(packed, self.kept, self.num_classes)
        else:
            ids = torch.arange(self.kept, device=codes.device).expand(len(codes), self.kept)
            whole = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
        is_top = codes == TOP
        whole = whole & (is_top.sum(dim=1) == 1)
        if not codes.is_cuda and not bool(whole.all()):
            raise DamagedCacheError(
                f"{int((~whole).sum())} records of codec {self.text!r} are not {self.kept} rising classes below "
                f"{self.num_classes}, one of them the largest",
                tip="the cache was not written by softcache, or was changed; copy it again",
            )
        logits = (codes.float().clamp_(max=LEVELS) - LEVELS) * step[:, None]
        logits = torch.where(whole[:, None], logits, torch.nan)
        top, place = is_top.int().argmax(dim=1, keepdim=True), torch.arange(self.kept, device=codes.device)
        order = torch.where(place == 0, top, torch.where(place <= top, place - 1, place))
        return ids.gather(1, order), logits.gather(1, order)

    def tail_logsumexp(self, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
        """(B,) float32 log of the sum over the other classes of exp(logit / T), at the level of `head`; -inf without any.

        Raises:
            ValueError: a temperature whose tail is not stored.
        """
        if not self.serves(temperature):
            raise ValueError(f"codec 'topset' serves {self.served}, not {temperature:g}")
        if not self.tail_classes:
            return torch.full((len(arrays["records"]),), -torch.inf, device=arrays["records"].device)
        gaps = read_field(arrays["records"], self.fields[1]).float()
        return log(self.tail_classes) - gaps[:, self._stored.index(temperature)]

    def spread(self, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
        """(B, C) float32 log-probabilities at a temperature, the tail's mass spread evenly over its classes."""
        return spread_evenly(self, arrays, temperature)

"""What every codec is: logits in, stored arrays out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from softcache.codecs.records import Field, record_bytes
from softcache.errors import CacheError, CodecFitError


@dataclass(frozen=True)
class Probe:
    """What a codec is fitted on, before the first row is written: some of the rows it will have to hold.

    Attributes:
        logits: (P, C) float32.
        head_input: (P, D) float32 input of the final linear layer; None where there is none.
        classifier_weight, classifier_bias: (C, D) and (C,) of that layer, rows in the cache's class order.
        scale, cap: what the network makes of that layer's output x: scale x, or scale cap tanh(x / cap) where cap is not 0.
    """

    logits: Tensor
    classifier_input: Tensor | None = None
    classifier_weight: Tensor | None = None
    classifier_bias: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0


def constant(constants: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
    """A stored constant on the CPU; CodecFitError unless it is there with this dtype and shape (None: any length)."""
    found = constants.get(name)
    if (
        found is None
        or found.dtype != dtype
        or found.ndim != len(shape)
        or any(wanted not in (None, length) for wanted, length in zip(shape, found.shape, strict=True))
    ):
        kind = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise CodecFitError(
            f"constant {name!r} is {kind}, should be {dtype} {shape}", tip="the cache cannot be decoded"
        )
    return found.cpu()


def widened(weight: Tensor) -> Tensor:
    """A stored weight as float32: of version 2 it may be float16, or bfloat16 as its bits (uint16)."""
    weight = weight.view(torch.bfloat16) if weight.dtype == torch.uint16 else weight
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


@dataclass(frozen=True)
class Codec(ABC):
    """How one member's logits are stored. Subclasses are frozen dataclasses; their fields are the parameters.

    Attributes:
        name: its key in CODECS.
        keeps_level: the row's absolute level survives, so that losses on raw logits may be used.
        complete: every class is stored, so that `decode` gives whole rows of logits.
        bounded: every record gets an `eps`, the bound on |stored - given| over its logits.
        temperature_range: the lowest and highest temperature it can serve; None = any.
        of_classes: it relies on what softmax makes of a row, so that it holds no output without classes.
        needs_classifier: it stores the input of the teacher's final linear layer, and `encode` wants it.
        num_classes: C.
    """

    name: ClassVar[str]
    keeps_level: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    temperature_range: ClassVar[tuple[float, float] | None] = None
    needs_classifier: ClassVar[bool] = False

    num_classes: int

    @classmethod
    def parameter_names(cls) -> list[str]:
        """What can be chosen."""
        return [f.name for f in fields(cls) if f.init and f.repr and f.name != "num_classes"]

    @property
    def parameters(self) -> dict[str, str]:
        """What was chosen, as the manifest keeps it; `make_codec` reads it back."""
        return {name: str(getattr(self, name)) for name in self.parameter_names()}

    @property
    def of_classes(self) -> bool:
        return False

    @property
    def format(self) -> int:
        """The first version of the format that knows these records."""
        return 1

    @property
    def text(self) -> str:
        """`name:key=value,...`, as `--codec` takes it."""
        values = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{values}" if values else self.name

    def serves(self, lowest: float, highest: float | None = None) -> bool:
        """Whether it can be used at a temperature, or at all from `lowest` to `highest`."""
        if self.temperature_range is None:
            return True
        return (
            self.temperature_range[0] <= lowest <= (lowest if highest is None else highest) <= self.temperature_range[1]
        )

    @property
    def served(self) -> str:
        """Which temperatures it serves, for messages."""
        lowest, highest = self.temperature_range or (0.0, float("inf"))
        return f"temperatures from {lowest:g} to {highest:g}"

    @property
    def constants(self) -> dict[str, Tensor]:
        """Fitted arrays that are stored once for all records, on the CPU; empty for most codecs."""
        return {}

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Data set name -> (NumPy dtype string, shape of one record), without `eps`; by default compact records."""
        return {"records": ("|u1", (record_bytes(self.fields),))}

    @property
    def fields(self) -> tuple[Field, ...]:
        """Where the parts of a compact record lie in its bytes; empty for codecs that store plain arrays."""
        return ()

    def fit(self, probe: Probe) -> Self:
        """The same codec with its constants; CodecFitError where it does not suit these rows."""
        return self

    def with_constants(self, constants: Mapping[str, Tensor]) -> Self:
        """The same codec with constants that were stored earlier."""
        return self

    @abstractmethod
    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        """(B, C) finite float32 logits, on any device -> stored arrays on that device.

        A codec that keeps some rows dense also gives `dense` (n, C) float16 and `dense_at` (n,) int64, their positions in
        the batch, and has a field `dense`, zero here, into which the writer puts each such row's number, counted from 1.

        Raises:
            CodecRangeError: numbers that it cannot hold; never a stored infinity.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Stored arrays, with `dense` and `dense_at` of the same batch where there are any -> (B, C) float32 logits."""

    def rounding(self, arrays: Mapping[str, Tensor]) -> Tensor | None:
        """(B,) bound on how far another device may decode the same bytes elsewhere; None where decoding is exact."""
        return None

    def classifier_input(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """(B, D) float32 input of the teacher's final linear layer; CacheError where it is not what is stored."""
        raise CacheError(f"codec {self.name!r} does not keep the input of the final layer", tip="use linear_head")

    def head(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, k) int64 ids and (B, k) float32 logits of the classes kept; CacheError where these are all."""
        raise self._is_complete()

    def tail_logsumexp(self, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
        """(B,) float32 logarithm of the sum over all other classes of exp(logit / T); CacheError where there are none."""
        raise self._is_complete()

    def spread(self, arrays: Mapping[str, Tensor], temperature: float) -> Tensor:
        """(B, C) float32 log-probabilities at T, the mass of what is not kept spread evenly; CacheError where all is kept."""
        raise self._is_complete()

    def _is_complete(self) -> CacheError:
        return CacheError(f"codec {self.name!r} keeps every class", tip="use the logits that it decodes to")

"""How logits become stored arrays and back, each with its error bound. Adding one: a class and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from softcache.codecs.floats import Float16Codec, Float32Codec
from softcache.errors import ConfigError, nearest

__all__ = ["CODECS", "Codec", "Float16Codec", "Float32Codec", "make_codec"]


class Codec(Protocol):
    """What every codec offers.

    Attributes:
        name: its key in CODECS.
        keeps_level: the row's absolute level survives, so that losses on raw logits may be used.
        complete: every class is stored.
        temperatures: the temperatures it can serve; None = any.
    """

    name: str
    keeps_level: bool
    complete: bool
    temperatures: tuple[float, ...] | None

    def arrays(self, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Data set name -> (NumPy dtype string, shape of one record)."""

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """(B, C) float32 logits, on any device -> stored arrays. `eps` bounds |stored - given| of every logit of a row."""

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Stored arrays -> (B, C) float32 logits, on the arrays' device."""


CODECS: dict[str, type[Any]] = {
    "float32": Float32Codec,
    "float16": Float16Codec,
}


def make_codec(name: str) -> Codec:
    """The codec of that name; ConfigError with near names for an unknown one."""
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}", tip=nearest(name, CODECS))
    codec: Codec = CODECS[name]()
    return codec

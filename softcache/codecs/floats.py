"""The two float codecs: all classes, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from softcache.codecs.codec import Codec
from softcache.errors import CodecRangeError

FLOAT16_MAX = 65504


@dataclass(frozen=True)
class Float32Codec(Codec):
    """Logits as float32: exact."""

    name: ClassVar[str] = "float32"

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"logits": ("<f4", (self.num_classes,))}

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": logits}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["logits"].float()


@dataclass(frozen=True)
class Float16Codec(Codec):
    """Logits as float16; |error| <= 2**-11 |logit| for normal values. Refuses what float16 cannot hold."""

    name: ClassVar[str] = "float16"

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"logits": ("<f2", (self.num_classes,))}

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        stored = logits.half()
        # half() turns what it cannot hold into inf, without an error. On a GPU looking here would stall the teacher: there
        # `eps` comes out infinite, and the dump refuses that.
        if not logits.is_cuda and not bool(stored.isfinite().all()):
            raise CodecRangeError(
                f"float16 holds |logit| <= {FLOAT16_MAX}, found {logits.abs().amax().item():.6g}",
                tip="use --codec float32 (twice the bytes)",
            )
        return {"logits": stored}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["logits"].float()

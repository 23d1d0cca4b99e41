"""`linear_head`: the input of the teacher's final linear layer, and that layer once for all records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from softcache.codecs.codec import Codec, Probe, constant, widened
from softcache.codecs.int8 import Int8Codec
from softcache.codecs.matmul import affine, affine_rounding, affine_rounding_by_norms, largest_norms
from softcache.codecs.records import Field
from softcache.errors import CodecFitError, CodecRangeError, ConfigError

TOLERANCE = 1e-3  # of the largest |logit|: TF32, or autocast's bfloat16 input, moves a logit by less
FLOAT16_MAX = 65504
TANH_ROUNDING = (
    2.0**-20
)  # of a capped logit, between two devices: libraries' tanh are within a few units in the last place


class Layer(NamedTuple):
    """The final layer on one device; the weight in 16 bits where records have groups."""

    weight: Tensor
    bias: Tensor


class Scaling(NamedTuple):
    """What the network makes of the layer's output x: scale x, or scale cap tanh(x / cap) where cap is not 0."""

    scale: float = 1.0
    cap: float = 0.0

    def of(self, logits: Tensor) -> Tensor:
        if self.cap:
            logits = (logits / self.cap).tanh_() * self.cap
        return logits if self.scale == 1 else logits * self.scale


@dataclass(frozen=True)
class LinearHeadCodec(Codec):
    """The D numbers that the final nn.Linear turns into logits, in float16 or int8; decoding applies the layer again.

    For many more classes than D; any temperature; the features come with it. `fit` accepts a layer whose W h + b gives the
    probe's logits up to TOLERANCE of the largest of them. Decoding is one float32 product; how far another device's order of
    sums may carry it is counted into eps.

    With `group` the numbers are int8 in groups with a scale each, and the weight is stored, and stays in memory, in 16 bits:
    bfloat16 where that is exact, else float16 (bfloat16 where float16 cannot hold it), so that what a float32 weight loses is in
    eps. There the rounding of sums is bounded by the lengths of h and of the weight's rows, which takes no second product.

    Attributes:
        dtype: "float16", or "int8": lowest + step * code with a row's own lowest and step = (largest - lowest) / 255.
        group: numbers a group of int8; 0: a row has one scale.
    """

    name: ClassVar[str] = "linear_head"
    needs_classifier: ClassVar[bool] = True

    dtype: Literal["float16", "int8"] = "float16"
    group: int = 0
    _layers: dict[str, Layer] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # by device; the one that was given lies under "cpu"
    _scaling: Scaling = field(default=Scaling(), init=False, repr=False, compare=False)
    _norms: list[tuple[float, float]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.group < 0:
            raise ConfigError(f"codec 'linear_head': group={self.group}: must be at least 1, or 0 for one scale a row")
        if self.group:
            object.__setattr__(self, "dtype", "int8")
        if self.dtype not in ("float16", "int8"):
            raise ConfigError(f"codec 'linear_head': dtype must be float16 or int8, got {self.dtype!r}")

    @property
    def parameters(self) -> dict[str, str]:
        return {"group": str(self.group)} if self.group else {"dtype": self.dtype}

    @property
    def format(self) -> int:
        return 2 if self.group else 1

    @property
    def constants(self) -> dict[str, Tensor]:
        """weight (C, D) and bias (C,) of the layer, float32; with groups the weight in 16 bits, and `scaling` (2,)."""
        weight, bias = self._layer(torch.device("cpu"))
        if not self.group:
            return {"weight": weight, "bias": bias}
        weight = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        return {"weight": weight, "bias": bias, "scaling": torch.tensor(self._scaling, dtype=torch.float32)}

    def with_constants(self, constants: Mapping[str, Tensor]) -> Self:
        fitted, weight = replace(self), constants.get("weight")
        if self.group:
            if weight is not None and weight.dtype == torch.uint16:
                weight = weight.view(torch.bfloat16)
            kind = torch.float16 if weight is None or weight.dtype != torch.bfloat16 else torch.bfloat16
            scaling = Scaling(*constant(constants, "scaling", (2,), torch.float32).tolist())
            if not (abs(scaling.scale) < torch.inf and 0 <= scaling.cap < torch.inf):
                raise CodecFitError(f"constant 'scaling' is {list(scaling)}", tip="the cache cannot be decoded")
            object.__setattr__(fitted, "_scaling", scaling)
        else:
            weight, kind = None if weight is None else widened(weight), torch.float32
        checked = {} if weight is None else {"weight": weight}
        weight = constant(checked, "weight", (self.num_classes, None), kind)
        fitted._layers["cpu"] = Layer(weight, constant(constants, "bias", (self.num_classes,), torch.float32))
        return fitted

    def fit(self, probe: Probe) -> Self:
        """The codec with the probe's final layer.

        Raises:
            CodecFitError: there is none, or it does not give the probe's logits.
        """
        if probe.classifier_input is None or probe.classifier_weight is None:
            raise CodecFitError(
                "codec 'linear_head': the teacher has no final nn.Linear whose output are its logits",
                tip="use --codec headtail",
            )
        weight = probe.classifier_weight.float()
        bias = weight.new_zeros(len(weight)) if probe.classifier_bias is None else probe.classifier_bias.float()
        scaling = Scaling(probe.scale, probe.cap) if self.group else Scaling()
        made = scaling.of(affine(probe.classifier_input.float(), weight, bias))
        apart = (made - probe.logits).abs().amax().item()
        allowed = TOLERANCE * probe.logits.abs().amax().item()
        if not apart <= allowed:
            raise CodecFitError(
                f"codec 'linear_head': the last nn.Linear gives numbers up to {apart:.4g} off the logits, and "
                f"{allowed:.4g} is allowed",
                tip="the module's last Linear does not give the logits, or its output is not logits; use --codec headtail",
            )
        if not self.group:
            return self.with_constants({"weight": weight, "bias": bias})
        halved = in_16_bits(weight)
        return self.with_constants(
            {"weight": halved, "bias": bias, "scaling": torch.tensor(scaling, dtype=torch.float32)}
        )

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        if self.dtype == "float16":
            return {"head_input": ("<f2", (self._width,))}
        return super().arrays

    @property
    def fields(self) -> tuple[Field, ...]:
        return () if self.dtype == "float16" else self._numbers.fields

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        if classifier_input is None:
            raise ValueError("codec 'linear_head' encodes the input of the final linear layer, and got none")
        if classifier_input.shape[1] != self._width:
            raise ValueError(f"codec 'linear_head' takes {self._width} inputs per row, got {classifier_input.shape[1]}")
        if self.dtype == "int8":
            return self._numbers.encode(classifier_input.float())
        stored = classifier_input.half()
        # on a GPU looking here would stall the teacher: there eps comes out infinite or NaN, and the dump refuses that
        if not stored.is_cuda and not bool(stored.isfinite().all()):
            raise CodecRangeError(
                f"codec 'linear_head' in float16 holds inputs up to {FLOAT16_MAX} of the final layer, found "
                f"{classifier_input.abs().amax().item():.6g}",
                tip="use --codec linear_head:dtype=int8, or float32",
            )
        return {"head_input": stored}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        values = self.classifier_input(arrays)
        return self._scaling.of(affine(values, *self._layer(values.device)))

    def rounding(self, arrays: Mapping[str, Tensor]) -> Tensor:
        values = self.classifier_input(arrays)
        if not self.group:
            return affine_rounding(values, *self._layer(values.device))
        if not self._norms:
            self._norms.append(largest_norms(*self._layer(torch.device("cpu"))))
        apart = affine_rounding_by_norms(values, self._norms[0], self._width)
        return (apart + TANH_ROUNDING * self._scaling.cap) * abs(self._scaling.scale)

    def classifier_input(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["head_input"].float() if self.dtype == "float16" else self._numbers.decode(arrays)

    @property
    def _numbers(self) -> Int8Codec:
        """How the inputs are stored, where they are int8."""
        return Int8Codec(self._width, group=self.group)

    @property
    def _width(self) -> int:
        return self._layer(torch.device("cpu")).weight.shape[1]

    def _layer(self, device: torch.device) -> Layer:
        if not self._layers:
            raise CodecFitError("codec 'linear_head' is not fitted yet: it has no layer", tip="call fit(probe) first")
        if str(device) not in self._layers:
            self._layers[str(device)] = Layer(*(value.to(device) for value in self._layers["cpu"]))
        return self._layers[str(device)]


def in_16_bits(weight: Tensor) -> Tensor:
    """A float32 weight as bfloat16 where that is exact, else as float16, or bfloat16 where float16 cannot hold it."""
    short, half = weight.bfloat16(), weight.half()
    return short if torch.equal(short.float(), weight) or not bool(half.isfinite().all()) else half

"""`linear_head`: the input of the teacher's final linear layer, and that layer once for all records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from softcache.codecs.codec import Codec, Probe, constant, widened
from softcache.codecs.int8 import codes_of, from_codes, step_of
from softcache.codecs.matmul import affine, affine_rounding
from softcache.codecs.records import Field, lay_out, read_field, write_fields
from softcache.errors import CodecFitError, CodecRangeError, ConfigError

TOLERANCE = 1e-3  # of the largest |logit|: TF32, or autocast's bfloat16 input, moves a logit by less
FLOAT16_MAX = 65504


@dataclass(frozen=True)
class LinearHeadCodec(Codec):
    """The D numbers that the final nn.Linear turns into logits, in float16 or int8; decoding applies the layer again.

    For many more classes than D; any temperature; the features come with it. `fit` accepts a layer whose W h + b gives the
    probe's logits up to TOLERANCE of the largest of them. Decoding is one float32 product; how far another device's order of
    sums may carry it is counted into eps.

    Attributes:
        dtype: "float16", or "int8": lowest + step * code with a row's own lowest and step = (largest - lowest) / 255.
    """

    name: ClassVar[str] = "linear_head"
    needs_classifier: ClassVar[bool] = True

    dtype: Literal["float16", "int8"] = "float16"
    _layers: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # device -> (C, D) weight and (C,) bias; the one that was given lies under "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "int8"):
            raise ConfigError(f"codec 'linear_head': dtype must be float16 or int8, got {self.dtype!r}")

    @property
    def constants(self) -> dict[str, Tensor]:
        """weight (C, D) and bias (C,) of the layer, float32."""
        return dict(zip(("weight", "bias"), self._layer(torch.device("cpu")), strict=True))

    def with_constants(self, constants: Mapping[str, Tensor]) -> Self:
        fitted = replace(self)
        if "weight" in constants:
            constants = {**constants, "weight": widened(constants["weight"])}
        weight = constant(constants, "weight", (self.num_classes, None), torch.float32)
        fitted._layers["cpu"] = (weight, constant(constants, "bias", (self.num_classes,), torch.float32))
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
        made = affine(probe.classifier_input.float(), weight, bias)
        apart = (made - probe.logits).abs().amax().item()
        allowed = TOLERANCE * probe.logits.abs().amax().item()
        if not apart <= allowed:
            raise CodecFitError(
                f"codec 'linear_head': the last nn.Linear gives numbers up to {apart:.4g} off the logits, and "
                f"{allowed:.4g} is allowed",
                tip="the module's last Linear does not give the logits, or its output is not logits; use --codec headtail",
            )
        return self.with_constants({"weight": weight, "bias": bias})

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        if self.dtype == "float16":
            return {"head_input": ("<f2", (self._width,))}
        return super().arrays

    @property
    def fields(self) -> tuple[Field, ...]:
        if self.dtype == "float16":
            return ()
        return lay_out([("lowest", "<f4", ()), ("step", "<f4", ()), ("codes", "|u1", (self._width,))])

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        if classifier_input is None:
            raise ValueError("codec 'linear_head' encodes the input of the final linear layer, and got none")
        if classifier_input.shape[1] != self._width:
            raise ValueError(f"codec 'linear_head' takes {self._width} inputs per row, got {classifier_input.shape[1]}")
        if self.dtype == "int8":
            lowest, highest = classifier_input.float().aminmax(dim=1)
            step = step_of(lowest, highest, 255)
            codes = codes_of(classifier_input.float(), lowest, step, 255)
            return {"records": write_fields(self.fields, {"lowest": lowest, "step": step, "codes": codes})}
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
        return affine(values, *self._layer(values.device))

    def rounding(self, arrays: Mapping[str, Tensor]) -> Tensor:
        values = self.classifier_input(arrays)
        return affine_rounding(values, *self._layer(values.device))

    def classifier_input(self, arrays: Mapping[str, Tensor]) -> Tensor:
        if self.dtype == "float16":
            return arrays["head_input"].float()
        lowest, step, codes = (read_field(arrays["records"], part) for part in self.fields)
        return from_codes(codes, lowest, step)

    @property
    def _width(self) -> int:
        return self._layer(torch.device("cpu"))[0].shape[1]

    def _layer(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self._layers:
            raise CodecFitError("codec 'linear_head' is not fitted yet: it has no layer", tip="call fit(probe) first")
        if str(device) not in self._layers:
            weight, bias = self._layers["cpu"]
            self._layers[str(device)] = (weight.to(device), bias.to(device))
        return self._layers[str(device)]

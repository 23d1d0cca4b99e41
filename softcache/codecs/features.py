"""How a feature is stored: float16 as it is, int8 with a step and an offset per record, or sign bits exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from softcache.codecs.floats import FLOAT16_MAX
from softcache.errors import CacheError, CodecRangeError, ConfigError, nearest
from softcache.features.spec import FeatureSpec, parse_features

FEATURE_DTYPES = ("float16", "int8")
LARGEST_CODE = 255


@dataclass(frozen=True)
class FeatureCodec:
    """One feature's stored form as arrays, and back.

    With x the n values of one record, and x' what decodes:

    - float16: |x' - x| <= max(2**-11 |x|, 2**-25) for every value, so |x' - x|_2 / |x|_2 <= 2**-11 where all values are
      zero or at least 2**-14 in size, and <= sqrt(2**-22 + n 2**-50 / |x|_2**2) always.
    - int8: affine, because a map after ReLU has one sign only, and its step is half of a symmetric one:
      |x' - x| <= (max x - min x) / 509 + 2**-23 max|x| + 2**-141, so |x' - x|_2 / |x|_2 <=
      sqrt(n) (max|x| / 254 + 2**-141) / |x|_2; half the first term where all values have one sign. A constant is exact.
    - sign bits are exact, whatever the dtype.

    Decoding gives the same bits on every device.

    Attributes:
        dtype: "float16" or "int8".
        form: what is stored: "map", or the name of a reduction; "sign" is bytes already.
        shape: of one record, as stored.
    """

    dtype: str
    form: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in FEATURE_DTYPES:
            raise ConfigError(f"features cannot be stored as {self.dtype!r}", tip=nearest(self.dtype, FEATURE_DTYPES))

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix of the data set's name -> (NumPy dtype string, shape of one record); `_scale` holds step and offset."""
        if self.form == "sign":
            return {"": ("|u1", self.shape)}
        if self.dtype == "float16":
            return {"": ("<f2", self.shape)}
        return {"": ("|u1", self.shape), "_scale": ("<f4", (2,))}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """(B, *shape) finite values on any device (uint8 for sign bits) -> stored arrays on that device.

        Raises:
            CodecRangeError: on a CPU, values that are not finite or too large. On a GPU looking would stall the teacher:
                there such a record decodes to numbers that are not finite, and so is its `error`.
        """
        if self.form == "sign":
            return {"": values}
        if self.dtype == "float16":
            stored = values.half()  # what it cannot hold becomes inf
            _refuse(stored, values, f"float16 holds |feature| <= {FLOAT16_MAX}", "store this feature as int8")
            return {"": stored}
        rows = values.float().flatten(1)  # (B, n)
        low = rows.amin(dim=1, keepdim=True)
        scale = _round_up_to_16_bits((rows.amax(dim=1, keepdim=True) - low) / LARGEST_CODE)
        _refuse(
            low + scale * LARGEST_CODE, values, "int8 holds features up to about 1e38", "look at this module's output"
        )
        codes = ((rows - low) / scale).round().clamp(0, LARGEST_CODE)
        return {"": codes.to(torch.uint8).reshape(values.shape), "_scale": torch.cat([scale, low], dim=1)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Stored arrays -> (B, *shape) float32 on their device; sign bits stay uint8."""
        if self.form == "sign":
            return arrays[""]
        if self.dtype == "float16":
            return arrays[""].float()
        codes = arrays[""].float()
        scale, low = (part.reshape(-1, *[1] * len(self.shape)) for part in arrays["_scale"].float().unbind(dim=1))
        return codes * scale + low  # the product is exact, so that a fused multiply-add rounds like two operations

    def error(self, values: Tensor, decoded: Tensor) -> Tensor:
        """(B,) float64 relative L2 error |decoded - values| / |values| of each record; 0 where both are zero.

        It is not finite where a record could not be held. Any two tensors of one shape will do: what the form's reduction
        makes of them has an error of its own.
        """
        given = values.double().flatten(1)
        distance = (decoded.double().flatten(1) - given).norm(dim=1)
        return torch.where(distance == 0, 0.0, distance / given.norm(dim=1))


@dataclass(frozen=True)
class StoredFeature:
    """One stored feature of a member: what it is, how its values are stored, and where they lie.

    Attributes:
        spec: the tapped layers and their reduction.
        shapes: of one record of each layer's output.
        codec: of the values.
        names: suffix of the codec's arrays -> data set.
    """

    spec: FeatureSpec
    shapes: tuple[tuple[int, ...], ...]
    codec: FeatureCodec
    names: Mapping[str, str]

    @classmethod
    def laid_out(cls, spec: FeatureSpec, shapes: Sequence[tuple[int, ...]], dtype: str, prefix: str) -> StoredFeature:
        """As a dump stores it, in data sets whose names begin with `prefix`."""
        codec = FeatureCodec(dtype, spec.stored(*shapes), spec.record_shape(*shapes))
        return cls(spec, tuple(shapes), codec, {suffix: prefix + suffix for suffix in codec.arrays})

    @classmethod
    def described(
        cls, name: str, dtype: str, stored: str, data_sets: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> StoredFeature:
        """As a manifest describes it; CacheError where its entries do not fit one another."""
        layers, _, _ = name.rpartition(":")
        (spec,) = parse_features([name], layers.split("+"))
        sizes = tuple(tuple(int(n) for n in shape) for shape in shapes)
        if len(sizes) != len(spec.layers):
            raise CacheError(f"feature {name!r} has {len(sizes)} shapes for {len(spec.layers)} layers")
        spec.check(*sizes)
        if stored != spec.stored(*sizes):
            raise CacheError(f"feature {name!r} is stored as {stored!r}, should be {spec.stored(*sizes)!r}")
        codec = FeatureCodec(dtype, stored, spec.record_shape(*sizes))
        if len(codec.arrays) != len(data_sets):
            raise CacheError(f"feature {name!r} has {len(data_sets)} data sets, {dtype} takes {len(codec.arrays)}")
        return cls(spec, sizes, codec, dict(zip(codec.arrays, data_sets, strict=True)))

    @property
    def name(self) -> str:
        return str(self.spec)

    @property
    def error_name(self) -> str:
        """The data set of each record's relative L2 error."""
        return f"{self.names['']}_error"

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Data set of values -> (NumPy dtype string, shape of one record)."""
        return {self.names[suffix]: kind for suffix, kind in self.codec.arrays.items()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) float32, as a loss sees it, of a member's stored arrays."""
        stored = {suffix: arrays[name] for suffix, name in self.names.items()}
        return self.spec.read(self.codec.decode(stored), *self.shapes)


def _round_up_to_16_bits(scale: Tensor) -> Tensor:
    """The next larger float32 with 16 significant bits, never zero: times a code of 8 bits it is exact."""
    return ((scale.view(torch.int32) + 0x100) & ~0xFF).view(torch.float32)


def _refuse(stored: Tensor, given: Tensor, limit: str, tip: str) -> None:
    if not stored.is_cuda and not bool(stored.isfinite().all()):
        found = given.abs().amax().item()
        raise CodecRangeError(
            f"{limit}, found {found:.6g}", tip=tip if isfinite(found) else "look at this module's output"
        )

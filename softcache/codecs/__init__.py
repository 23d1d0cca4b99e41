"""How logits become stored arrays and back, each with its error bound. Adding one: a class and a line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softcache.codecs.codec import Codec, Probe
from softcache.codecs.floats import Float16Codec, Float32Codec
from softcache.codecs.headtail import HeadTailCodec
from softcache.codecs.int8 import Int8Codec
from softcache.codecs.linear_head import LinearHeadCodec
from softcache.codecs.lowrank import LowRankCodec
from softcache.codecs.records import Field
from softcache.codecs.topk import TopkCodec
from softcache.codecs.topset import TopsetCodec
from softcache.errors import ConfigError, nearest
from softcache.spec import convert

__all__ = [
    "CODECS",
    "Codec",
    "Field",
    "Float16Codec",
    "Float32Codec",
    "HeadTailCodec",
    "Int8Codec",
    "LinearHeadCodec",
    "LowRankCodec",
    "Probe",
    "TopkCodec",
    "TopsetCodec",
    "codec_constants",
    "make_codec",
    "restore_codec",
]

CODECS: dict[str, type[Codec]] = {
    "float32": Float32Codec,
    "float16": Float16Codec,
    "int8": Int8Codec,
    "headtail": HeadTailCodec,
    "topk": TopkCodec,
    "topset": TopsetCodec,
    "lowrank": LowRankCodec,
    "linear_head": LinearHeadCodec,
}


def make_codec(name: str, parameters: Mapping[str, str], num_classes: int) -> Codec:
    """The codec of that name, not fitted yet.

    Raises:
        ConfigError: an unknown codec or parameter (with near names), or a value that it cannot be.
    """
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}", tip=nearest(name, CODECS))
    kind = CODECS[name]
    hints = inspect.get_annotations(kind.__init__, eval_str=True)
    known = kind.parameter_names()
    values = {}
    for key, text in parameters.items():
        if key not in known:
            raise ConfigError(f"codec {name!r} has no parameter {key!r}", tip=nearest(key, known) if known else "")
        values[key] = convert(text, hints[key], f"codec {name!r}: {key}")
    return kind(num_classes, **values)


def restore_codec(name: str, parameters: Mapping[str, str], num_classes: int, constants: Mapping[str, Tensor]) -> Codec:
    """The codec that a manifest names, with the constants that were stored for it; errors as `make_codec`.

    Raises:
        CodecFitError: the constants are not this codec's.
    """
    return make_codec(name, parameters, num_classes).with_constants(constants)


def codec_constants(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of the arrays in constants.h5 those that are the codec's, under its own names."""
    return {
        n.removeprefix("codec_"): torch.tensor(a, device="cpu") for n, a in stored.items() if n.startswith("codec_")
    }

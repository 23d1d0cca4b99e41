"""How items become the batch a network takes: collating runs in the loader's workers, preparing on the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from softcache.errors import ConfigError, DataError
from softcache.words import Words

PAD, UNKNOWN = 0, 1  # token ids; the vocabulary's first token has id 2
SEPARATOR = "[SEP]"  # in a vocabulary made of pairs the first token: no text is cut into it
_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


class Input(Protocol):
    """Preprocessing, the part of a model that knows what an item is."""

    def collate(self, items: Sequence[Any]) -> Any:
        """One batch on the CPU: a tensor, or a tuple or dict of tensors. Cheap; DataError for a misfit."""

    def prepare(self, batch: Any) -> Any:
        """What the network takes, from a collated batch that is already on the network's device."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts, enough to compare two inputs; "kind" names the class."""


@dataclass(frozen=True)
class ImageInput:
    """Images as (B, C, H, W) float32: uint8 divided by `scale`, then (x - mean) / std; float items count as scaled.

    Items: uint8 or float; NumPy arrays are H x W or H x W x C, torch tensors C x H x W.

    Attributes:
        channels: what the network takes; None takes any number.
        mean, std: one number, or one per channel, on the scale after division.
        scale: divides uint8 values (255, or 16 for scikit-learn's digits).
    """

    channels: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    scale: float = 255.0

    def __post_init__(self) -> None:
        _check_normalisation(self.mean, self.std, self.scale, self.channels, "channels")

    def collate(self, items: Sequence[Any]) -> Tensor:
        """(B, C, H, W), uint8 or float32, not normalised; memory stays as the items lie, so that this is one copy."""
        images = [_channels_first(item) for item in items]
        wanted = self.channels or max(len(self.mean), len(self.std))
        found = images[0].shape[0]
        if found != wanted and not (self.channels is None and wanted == 1):
            raise DataError(
                f"an item of shape {_shape(items[0])} has {found} channel(s), the model takes shape ({wanted}, H, W)",
                tip="add the view step `to_rgb`" if wanted == 3 else f"name the model with in_channels={found}",
            )
        return _stack(images, items, tip="bring all images to one size with the view steps `resize:N` and `to_rgb`")

    def prepare(self, batch: Tensor) -> Tensor:
        """(B, C, H, W) float32, contiguous, whichever way the items lay in memory."""
        return _normalise(batch, self.mean, self.std, self.scale)

    def describe(self) -> dict[str, Any]:
        return {"kind": "image", **_plain(self)}


@dataclass(frozen=True)
class VectorInput:
    """Numeric items as (B, D) float32: uint8 divided by `scale`, then (x - mean) / std; other dtypes count as scaled.

    Attributes:
        features: D, what the network takes; None takes any length.
        mean, std: one number, or one per feature, on the scale after division.
        scale: divides uint8 values (255, or 16 for scikit-learn's digits).
    """

    features: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    scale: float = 255.0

    def __post_init__(self) -> None:
        _check_normalisation(self.mean, self.std, self.scale, self.features, "features")

    def collate(self, items: Sequence[Any]) -> Tensor:
        """(B, D), uint8 or float32, not normalised; an item of any shape is flattened in C order."""
        vectors = [array_of(item).reshape(-1) for item in items]
        wanted = self.features or max(len(self.mean), len(self.std))
        found = vectors[0].shape[0]
        if found != wanted and not (self.features is None and wanted == 1):
            raise DataError(
                f"an item of shape {_shape(items[0])} has {found} numbers, the model takes ({wanted},)",
                tip="use the data and the views the model was made for, or a view step `resize:N`",
            )
        return _stack(vectors, items, tip="bring all items to one size, for images with the view step `resize:N`")

    def prepare(self, batch: Tensor) -> Tensor:
        """(B, D) float32."""
        return _normalise(batch, self.mean, self.std, self.scale)

    def describe(self) -> dict[str, Any]:
        return {"kind": "vector", **_plain(self)}


@dataclass(frozen=True)
class TextInput:
    """Strings, or pairs of them, as (B, L) int64 token ids, padded with 0; 1 is an unknown token, `vocabulary[i]` has id i + 2.

    Between the two texts of a pair stands SEPARATOR, which the vocabulary then has.

    Attributes:
        vocabulary: distinct tokens, as `tokenize` makes them.
        max_tokens: longer texts are cut; of a pair the longer one first, until both are equal.
        min_tokens: shorter batches are padded to this, for the widest kernel of the network.
    """

    vocabulary: tuple[str, ...]
    max_tokens: int = 64
    min_tokens: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(
                f"max_tokens is {self.max_tokens}, the network needs at least {self.min_tokens}",
                tip="raise max_tokens to the widest kernel or above",
            )

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocabulary, start=UNKNOWN + 1)}

    def collate(self, items: Sequence[Any]) -> Tensor:
        """(B, L) int64, min_tokens <= L <= max_tokens, as short as the longest text allows."""
        check_texts(items)
        rows = [[self.ids.get(t, UNKNOWN) for t in self._read(item)[0]] for item in items]
        batch = torch.full((len(rows), max(self.min_tokens, *map(len, rows))), PAD)
        for i, row in enumerate(rows):
            batch[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return batch

    def count(self, item: Any) -> tuple[int, int]:
        """How many tokens a text or a pair has, and how many of those that are read are unknown."""
        tokens, count = self._read(item)
        return count, sum(token not in self.ids for token in tokens)

    def _read(self, item: Any) -> tuple[list[str], int]:
        """The tokens that are read of a text or a pair, and how many there are."""
        if isinstance(item, str):
            tokens = tokenize(item)
            return tokens[: self.max_tokens], len(tokens)
        if SEPARATOR not in self.ids:
            raise DataError(
                "the items are pairs of texts, and the model's vocabulary was made of single ones",
                tip=f"train it on pairs; a vocabulary of your own begins with the line {SEPARATOR}",
            )
        first, second = map(tokenize, item)
        room = self.max_tokens - 1
        mine = max(room - len(second), (room + 1) // 2)  # what the second one leaves free, at least a half
        theirs = max(room - len(first), room // 2)
        return [*first[:mine], SEPARATOR, *second[:theirs]], len(first) + 1 + len(second)

    def prepare(self, batch: Tensor) -> Tensor:
        """The ids as they are."""
        return batch

    def describe(self) -> dict[str, Any]:
        facts = {"max_tokens": self.max_tokens, "min_tokens": self.min_tokens, "tokens": len(self.vocabulary)}
        return {"kind": "text", **facts}


@dataclass(frozen=True)
class AnyInput:
    """For networks of a user's factory: the module's own `collate(items)` if it has one, else a stack of the items.

    Attributes:
        own: the module's bound method; its batch reaches `forward` as it is. With workers that are spawned rather than
            forked it is pickled together with its module.
    """

    own: Callable[[Sequence[Any]], Any] | None = None

    def collate(self, items: Sequence[Any]) -> Any:
        """The module's batch; of words a list of B; else (B, ...) uint8 or float32. A uint8 NumPy array H x W or H x W x C is an
        image and becomes C x H x W; everything else keeps its shape."""
        if self.own is not None:
            return self.own(items)
        if isinstance(items[0], Words):
            return list(items)
        if is_text(items[0]):
            raise DataError("the items are texts", tip="give your module a method collate(items)")
        return _stack(
            [array_of(item, images=True) for item in items], items, tip="give your module a method collate(items)"
        )

    def prepare(self, batch: Any) -> Any:
        """The module's own batch untouched; else float32, uint8 scaled to [0, 1]."""
        if self.own is not None or not isinstance(batch, Tensor):
            return batch
        return batch.float().div_(255) if batch.dtype == torch.uint8 else batch.float()

    def describe(self) -> dict[str, Any]:
        return {"kind": "any", "own_collate": self.own is not None}


def restore_input(description: Mapping[str, Any]) -> Input | None:
    """The image or vector input that `describe` described; None for a kind that its model's spec rebuilds."""
    kinds: dict[str, Callable[..., Input]] = {"image": ImageInput, "vector": VectorInput}
    kind = description["kind"]
    if kind not in kinds:
        return None
    facts = {key: tuple(v) if isinstance(v, list) else v for key, v in description.items() if key != "kind"}
    return kinds[kind](**facts)


def is_text(item: Any) -> bool:
    """Whether an item is a string or a pair of strings."""
    return isinstance(item, str) or is_pair(item)


def is_pair(item: Any) -> bool:
    """Whether an item is a sequence of two strings: premise and hypothesis, question and passage; two `Words` are none."""
    is_two = isinstance(item, tuple | list) and not isinstance(item, Words) and len(item) == 2
    return is_two and all(isinstance(text, str) for text in item)


def has_vocabulary(item: Any) -> bool:
    """Whether items like this one are read by a vocabulary: texts, pairs of them, and words."""
    return is_text(item) or isinstance(item, Words)


def check_texts(items: Sequence[Any]) -> None:
    """Raise DataError for an item that is neither a string nor a pair of strings, and for a batch of both."""
    for item in items:
        if not is_text(item):
            raise DataError(
                f"a text model takes strings, found {_kind(item)}",
                tip="words take a tagger: softcache:tagger, or hf:FOLDER?align=first"
                if isinstance(item, Words)
                else "use an image or a vector model; a pair of texts is two strings",
            )
        if is_pair(item) != is_pair(items[0]):
            raise DataError(
                "some items are pairs of texts and some are single texts", tip="give all of them two texts, or one"
            )


def tokenize(text: str) -> list[str]:
    """Lower-case words (with an inner apostrophe) and single punctuation marks."""
    return _TOKEN.findall(text.lower())


def channels_of(input_shape: tuple[int, ...] | None, in_channels: int | None) -> int:
    """Channels of an image model: as asked, else as the rendered items have, else 3.

    A shape of three numbers is channels last when its last number is at most 4 (NumPy), else channels first (torch).

    Raises:
        ConfigError: `in_channels` is not positive, or the shape is not one of an image.
    """
    if in_channels is not None:
        if in_channels < 1:
            raise ConfigError(f"in_channels must be at least 1, got {in_channels}")
        return in_channels
    if input_shape is None:
        return 3
    if len(input_shape) == 2:
        return 1
    if len(input_shape) == 3 and min(input_shape[0], input_shape[2]) <= 4:
        return input_shape[2] if input_shape[2] <= 4 else input_shape[0]
    raise ConfigError(
        f"items of shape {tuple(input_shape)} are not images (H x W, H x W x C or C x H x W)",
        tip="use softcache:mlp, or say in_channels=... if they are images of many channels",
    )


def _plain(this: ImageInput | VectorInput) -> dict[str, Any]:
    values = {field.name: getattr(this, field.name) for field in fields(this)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _kind(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")


def _shape(item: Any) -> tuple[int, ...]:
    return tuple(np.shape(item))


def array_of(item: Any, *, images: bool = False) -> np.ndarray:
    """The item as uint8 or float32, without a copy where possible; `images` moves channels of uint8 NumPy first."""
    if isinstance(item, Tensor):
        tensor = item.detach().cpu()
        return tensor.numpy() if tensor.dtype == torch.uint8 else tensor.to(torch.float32).numpy()
    _refuse_words(item, "numbers")
    if isinstance(item, bytes) or is_text(item):
        raise DataError("the model takes numbers, found a text", tip="texts need a text model: softcache:textcnn")
    array = np.asarray(item)
    if array.dtype.kind not in "buif":
        raise DataError(
            f"the model takes numbers, found {_kind(item)} of dtype {array.dtype}", tip="use numeric arrays"
        )
    if array.dtype != np.uint8:
        return array.astype(np.float32, copy=False)
    if images and array.ndim in (2, 3):
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array


def _refuse_words(item: Any, taken: str) -> None:
    if isinstance(item, Words):
        raise DataError(
            f"the model takes {taken}, found words",
            tip="words need a tagger: softcache:tagger, or hf:FOLDER?align=first",
        )


def _channels_first(item: Any) -> np.ndarray:
    """An image as (C, H, W), uint8 or float32, as a view where possible."""
    _refuse_words(item, "images")
    if is_text(item):
        raise DataError("the model takes images, found a text", tip="texts need a text model: softcache:textcnn")
    if not isinstance(item, np.ndarray | Tensor):
        raise DataError(
            f"the model takes images as NumPy arrays or torch tensors, found {_kind(item)}",
            tip="let the data set return numpy.asarray(image)",
        )
    is_float = item.is_floating_point() if isinstance(item, Tensor) else item.dtype.kind == "f"
    if not is_float and item.dtype not in (np.uint8, torch.uint8):
        raise DataError(f"images are uint8 or float, found {item.dtype}", tip="convert them: 0..255 as uint8")
    array = array_of(item)
    if array.ndim == 3:
        return array if isinstance(item, Tensor) else array.transpose(2, 0, 1)
    if array.ndim == 2:
        return array[None]
    raise DataError(f"an item of shape {_shape(item)} is not an image", tip="H x W, H x W x C, or a tensor C x H x W")


def _stack(arrays: Sequence[np.ndarray], items: Sequence[Any], *, tip: str) -> Tensor:
    """One tensor of arrays that agree in shape and dtype; DataError naming the first two that do not."""
    for array, item in zip(arrays, items, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(f"items of one batch differ in shape: {_shape(items[0])} and {_shape(item)}", tip=tip)
        if array.dtype != arrays[0].dtype:
            raise DataError(
                f"items of one batch differ in dtype: {arrays[0].dtype} and {array.dtype}",
                tip="uint8 is divided by 255 and floats are not: let the data set return one of them",
            )
    return torch.from_numpy(np.stack(arrays))


def _check_normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, size: int | None, what: str
) -> None:
    lengths = {len(mean), len(std)} - {1}
    if len(lengths) > 1 or 0 in lengths or (size is not None and lengths - {size}):
        wanted = "one number or one for each" + (f" of {size} {what}" if size is not None else f" of the {what}")
        raise ConfigError(f"mean has {len(mean)} and std {len(std)} numbers", tip=f"give {wanted}")
    if min(std) <= 0 or scale <= 0:
        raise ConfigError(f"std and scale must be > 0, got std={std}, scale={scale}")


def _normalise(batch: Tensor, mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> Tensor:
    """(x / scale - mean) / std as one multiply and one add; a batch that is not uint8 is not divided by scale."""
    divisor = scale if batch.dtype == torch.uint8 else 1.0
    factor, shift = _factor_and_shift(mean, std, divisor, batch.ndim - 2, batch.device)
    return batch.to(torch.float32, memory_format=torch.contiguous_format).mul(factor).add_(shift)


# kept, so that a training step copies nothing to the device; a plain dict, which torch.compile can look into
_KEPT: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _factor_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], divisor: float, trailing: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """factor and shift on the device, each (C,) + (1,) * trailing."""
    key = (mean, std, divisor, trailing, device)
    if key not in _KEPT:
        shape = (-1,) + (1,) * trailing
        with torch.inference_mode(False):  # kept tensors must also serve a later step that wants gradients
            factor = torch.tensor([1 / (s * divisor) for s in std], dtype=torch.float32, device=device).reshape(shape)
            shift = torch.tensor([-m / s for m, s in _pairs(mean, std)], dtype=torch.float32, device=device).reshape(
                shape
            )
        if type(factor) is not Tensor:  # torch.export is tracing: its stand-ins must not reach a later step
            return factor, shift
        _KEPT[key] = (factor, shift)
    return _KEPT[key]


def _pairs(mean: tuple[float, ...], std: tuple[float, ...]) -> list[tuple[float, float]]:
    """(mean, std) for each channel, where either may be one number for all."""
    n = max(len(mean), len(std))
    return list(zip(mean * n if len(mean) == 1 else mean, std * n if len(std) == 1 else std, strict=True))

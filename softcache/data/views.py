"""A view: one augmentation of a sample, replayed bit for bit from (root seed, sample id, view index).

A policy is a list of steps. A step's parameters are derived from the counter-based generator, never stored, so a view costs
nothing on disk and the student sees exactly the pixels the teacher saw. Images are uint8: NumPy H x W or H x W x C, or
tensors C x H x W.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.data.philox import Draws, step_key
from softcache.data.sources import image_array
from softcache.errors import ConfigError, DataError, nearest
from softcache.spec import convert


@dataclass(frozen=True)
class StepKind:
    """One kind of step: `function(image, draws, **parameters)` on a uint8 tensor (C, H, W).

    Attributes:
        version: part of a cache's identity; raised when the same parameters would give other pixels.
        random: it draws numbers; left out when a student is evaluated.
    """

    function: Callable[..., Tensor]
    version: int
    random: bool


def to_rgb(image: Tensor, draws: Draws) -> Tensor:
    """Three channels: a grey image three times, the first three of four."""
    if image.shape[0] not in (1, 3, 4):
        raise DataError(
            f"the view step to_rgb takes images of 1, 3 or 4 channels, this one has {image.shape[0]}",
            tip="let the data set return grey, RGB or RGBA images",
        )
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]


def resize(image: Tensor, draws: Draws, *, size: int, height: int = 0) -> Tensor:
    """`size` pixels wide and high (or `height` high), bilinear with antialiasing, the aspect ratio not kept."""
    from torchvision.transforms import functional

    target = [height or size, size]
    return image if list(image.shape[1:]) == target else functional.resize(image, target, antialias=True)


def center_crop(image: Tensor, draws: Draws, *, size: int) -> Tensor:
    """The middle `size` x `size` pixels; a smaller image is padded with zeros."""
    from torchvision.transforms import functional

    return functional.center_crop(image, [size, size])


def shift(image: Tensor, draws: Draws, *, pixels: int = 2) -> Tensor:
    """Moved by up to `pixels` in each direction, uniformly; what comes in is zero (Hinton et al. 2015, MNIST)."""
    dy, dx = draws.integer(-pixels, pixels), draws.integer(-pixels, pixels)
    return _window(image, dy, dx)


def crop_flip(image: Tensor, draws: Draws, *, padding: int = 4, flip: float = 0.5) -> Tensor:
    """A crop of the image's own size out of the image padded with zeros, then mirrored with probability `flip` (CIFAR)."""
    dy, dx = draws.integer(-padding, padding), draws.integer(-padding, padding)
    cropped = _window(image, dy, dx)
    return cropped.flip(-1) if draws.uniform() < flip else cropped


def _window(image: Tensor, dy: int, dx: int) -> Tensor:
    """out[y, x] = image[y + dy, x + dx], zero outside."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    top, bottom = max(0, -dy), min(height, height - dy)
    left, right = max(0, -dx), min(width, width - dx)
    if top < bottom and left < right:
        out[:, top:bottom, left:right] = image[:, top + dy : bottom + dy, left + dx : right + dx]
    return out


STEPS: dict[str, StepKind] = {
    "to_rgb": StepKind(to_rgb, version=1, random=False),
    "resize": StepKind(resize, version=1, random=False),
    "center_crop": StepKind(center_crop, version=1, random=False),
    "shift": StepKind(shift, version=1, random=True),
    "crop_flip": StepKind(crop_flip, version=1, random=True),
}


@dataclass(frozen=True)
class Step:
    """A step with all its parameters, as a policy names it."""

    name: str
    parameters: Mapping[str, Any]

    @property
    def kind(self) -> StepKind:
        return STEPS[self.name]

    def __str__(self) -> str:
        values = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{values}" if values else self.name

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.kind.version,
            "parameters": {key: str(value) for key, value in sorted(self.parameters.items())},
        }


def make_step(name: str, parameters: Mapping[str, Any]) -> Step:
    """A checked step; parameters may be strings. ConfigError for an unknown step or parameter, or a value that it cannot be."""
    if name not in STEPS:
        raise ConfigError(f"unknown view step {name!r}", tip=nearest(name, STEPS))
    function = STEPS[name].function
    known = dict(list(inspect.signature(function).parameters.items())[2:])
    hints = inspect.get_annotations(function, eval_str=True)
    for key in parameters:
        if key not in known:
            raise ConfigError(f"view step {name!r} has no parameter {key!r}", tip=nearest(key, known) if known else "")
    values = {}
    for key, parameter in known.items():
        if key in parameters:
            values[key] = convert(str(parameters[key]), hints[key], f"view step {name!r}: {key}")
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"view step {name!r}: parameter {key!r} is missing", tip=f"write {name}:{key}=...")
        else:
            values[key] = parameter.default
        lowest = 1 if key == "size" else 0
        if not values[key] >= lowest:
            raise ConfigError(f"view step {name!r}: {key}={values[key]} must be at least {lowest}")
    return Step(name, values)


@dataclass(frozen=True)
class Policy:
    """An ordered list of steps and the root seed of their draws. Without steps, a view is the item itself."""

    steps: tuple[Step, ...] = ()
    root_seed: int = 0

    def render(self, item: Any, sample_id: int, view: int) -> Any:
        """The pixels of one view: a uint8 array or tensor in the item's own layout; without steps the item as it is.

        Raises:
            DataError: the policy has steps and the item is not a uint8 image.
        """
        if not self.steps:
            return item
        image = _to_tensor(item)
        for step, key in zip(self.steps, _step_keys(self.steps), strict=True):
            image = step.kind.function(image, Draws(self.root_seed, key, sample_id, view), **step.parameters)
        return _like(image, item)

    @property
    def is_random(self) -> bool:
        """Whether views of different index differ."""
        return any(step.kind.random for step in self.steps)

    def for_evaluation(self) -> Policy:
        """The same policy without its random steps."""
        return Policy(tuple(step for step in self.steps if not step.kind.random), self.root_seed)

    def to_json(self) -> list[dict[str, Any]]:
        return [step.to_json() for step in self.steps]

    @classmethod
    def from_json(cls, steps: Iterable[Mapping[str, Any]], root_seed: int) -> Policy:
        """The policy a manifest or a run folder names; ConfigError when this version renders a step differently."""
        made = []
        for entry in steps:
            step = make_step(str(entry["name"]), entry["parameters"])
            if step.kind.version != entry["version"]:
                raise ConfigError(
                    f"view step {step.name!r} is version {entry['version']} in the cache, {step.kind.version} here: "
                    "it would render other pixels than the teacher saw",
                    tip="install the softcache that made the cache, or dump again",
                )
            made.append(step)
        return cls(tuple(made), root_seed)

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps)) or "the items as they are"


@lru_cache(maxsize=64)
def _keys_of(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(step_key(name, names[:i].count(name)) for i, name in enumerate(names))


def _step_keys(steps: Sequence[Step]) -> tuple[int, ...]:
    return _keys_of(tuple(step.name for step in steps))


def _to_tensor(item: Any) -> Tensor:
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim in (2, 3):
        item = np.ascontiguousarray(item)  # torch knows no negative strides
        image = torch.from_numpy(item if item.flags.writeable else item.copy())
        return image[None] if item.ndim == 2 else image.permute(2, 0, 1)
    if isinstance(item, Tensor) and item.dtype == torch.uint8 and item.ndim == 3:
        return item
    if hasattr(item, "getbands"):  # a PIL image
        return _to_tensor(image_array(item, "a view"))
    shape = getattr(item, "shape", "")
    raise DataError(
        f"a view policy needs uint8 images, got {type(item).__name__} {getattr(item, 'dtype', '')} {tuple(shape) or ''}",
        tip="let the data set return uint8 arrays (H x W x C), or use no --policy",
    )


def _like(image: Tensor, item: Any) -> Any:
    """Back to the layout of the item: arrays channels-last (H x W stays H x W), tensors channels-first."""
    if isinstance(item, Tensor):
        return image.contiguous()
    array = image.permute(1, 2, 0).contiguous().numpy()
    return array[:, :, 0] if array.shape[2] == 1 and getattr(item, "ndim", 2) == 2 else array

"""The steps of a view policy: plain functions of a uint8 image (C, H, W), the draws of one view, and parameters.

Numbers are drawn by our own arithmetic alone; torchvision's functional API only applies them, so it draws none. Boxes are
drawn relative to the image, in units of 1/65536 of its height and width, and become pixels last: a sample that is stored at
another resolution gets the same box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from softcache.data.philox import Draws
from softcache.data.step_parameters import Pixels, Range, Share, Size
from softcache.errors import DataError

UNIT = 65536  # of relative boxes
TRIES = 10  # to find a box that fits, as torchvision has it


def to_rgb(image: Tensor, draws: Draws) -> Tensor:
    """Three channels: a grey image three times, the first three of four."""
    if image.shape[0] not in (1, 3, 4):
        raise DataError(
            f"the view step to_rgb takes images of 1, 3 or 4 channels, this one has {image.shape[0]}",
            tip="let the data set return grey, RGB or RGBA images",
        )
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]


def resize(image: Tensor, draws: Draws, *, size: Size, height: Pixels = 0) -> Tensor:
    """`size` pixels wide and high (or `height` high), bilinear with antialiasing, the aspect ratio not kept."""
    return resized(image, height or size, size)


def center_crop(image: Tensor, draws: Draws, *, size: Size) -> Tensor:
    """The middle `size` x `size` pixels; a smaller image is padded with zeros."""
    from torchvision.transforms import functional

    return functional.center_crop(image, [size, size])


def middle_crop(image: Tensor, draws: Draws, *, size: Size = 224) -> Tensor:
    """The middle `size` x `size` pixels of the image with its shorter side brought to 8/7 of that: 256 for 224 (ImageNet)."""
    height, width = image.shape[1:]
    shorter = size * 8 // 7
    longer = shorter * max(height, width) // min(height, width)
    made = resized(image, *((shorter, longer) if height <= width else (longer, shorter)))
    return center_crop(made, draws, size=size)


def shift(image: Tensor, draws: Draws, *, pixels: Pixels = 2) -> Tensor:
    """Moved by up to `pixels` in each direction, uniformly; what comes in is zero (Hinton et al. 2015, MNIST)."""
    dy, dx = draws.integer(-pixels, pixels), draws.integer(-pixels, pixels)
    return window(image, dy, dx)


def crop_flip(image: Tensor, draws: Draws, *, padding: Pixels = 4, flip: Share = 0.5) -> Tensor:
    """A crop of the image's own size out of the image padded with zeros, then mirrored with probability `flip` (CIFAR)."""
    dy, dx = draws.integer(-padding, padding), draws.integer(-padding, padding)
    cropped = window(image, dy, dx)
    return cropped.flip(-1) if draws.uniform() < flip else cropped


def resized_crop_flip(
    image: Tensor,
    draws: Draws,
    *,
    size: Size = 224,
    scale_min: Share = 0.08,
    scale_max: Share = 1.0,
    flip: Share = 0.5,
) -> Tensor:
    """A box of `scale_min` to `scale_max` of the area, 3:4 to 4:3, resized to `size` x `size`, then mirrored (ImageNet).

    Where no box fits in ten tries: the largest box in the middle whose aspect ratio is allowed.

    Source: Szegedy et al., "Going Deeper with Convolutions" (2015), section 6; the tries are torchvision's.
    """
    mirrored = draws.uniform() < flip  # drawn first, so that the number of tries cannot change it
    aspect = image.shape[2] / image.shape[1]
    box = draw_box(draws, aspect, scale_min, scale_max, 3 / 4, 4 / 3) or middle_box(aspect, 3 / 4, 4 / 3)
    top, bottom, left, right = box.pixels(*image.shape[1:])
    made = resized(image[:, top:bottom, left:right], size, size)
    return made.flip(-1) if mirrored else made


def rotate(image: Tensor, draws: Draws, *, degrees: Annotated[float, Range(0, 180)] = 15.0) -> Tensor:
    """Turned about its middle by up to `degrees` either way, uniformly; bilinear, zero fill, the size stays."""
    return rotated(image, degrees * (2 * draws.uniform() - 1))


def erase(image: Tensor, draws: Draws, *, p: Share = 0.25, scale_min: Share = 0.02, scale_max: Share = 0.33) -> Tensor:
    """With probability `p`, a box of `scale_min` to `scale_max` of the area, 10:33 to 33:10, is set to zero.

    Where no box fits in ten tries the image stays as it is.

    Source: Zhong et al., "Random Erasing Data Augmentation" (2020); fill and tries are torchvision's.
    """
    if draws.uniform() >= p:
        return image
    aspect = image.shape[2] / image.shape[1]
    box = draw_box(draws, aspect, scale_min, scale_max, 0.3, 3.3)
    if box is None:
        return image
    top, bottom, left, right = box.pixels(*image.shape[1:])
    erased = image.clone()
    erased[:, top:bottom, left:right] = 0
    return erased


@dataclass(frozen=True)
class Box:
    """A part of an image, relative to it: all four in units of 1/65536 of its height or width."""

    top: int
    left: int
    height: int
    width: int

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of an image of this size, bottom and right not included; at least one pixel."""
        return *_edges(self.top, self.height, height), *_edges(self.left, self.width, width)


def _edges(start: int, length: int, pixels: int) -> tuple[int, int]:
    """Both edges rounded to the nearest pixel border (halves up); a box that would vanish keeps the pixel it starts in."""
    first, last = ((edge * pixels + UNIT // 2) // UNIT for edge in (start, start + length))
    if first == last:
        first = min(start * pixels // UNIT, pixels - 1)
        last = first + 1
    return first, last


def draw_box(
    draws: Draws, aspect: float, scale_min: float, scale_max: float, ratio_min: float, ratio_max: float
) -> Box | None:
    """A box of a uniform share of the area and a log-uniform ratio of width to height; None where none of ten tries fits.

    Args:
        aspect: width / height of the image in pixels.
    """
    for _ in range(TRIES):
        scale = scale_min + (scale_max - scale_min) * draws.uniform()
        ratio = ratio_min * (ratio_max / ratio_min) ** draws.uniform()
        width = math.floor(UNIT * math.sqrt(scale * ratio / aspect) + 0.5)
        height = math.floor(UNIT * math.sqrt(scale / ratio * aspect) + 0.5)
        if width <= UNIT and height <= UNIT:
            return Box(draws.integer(0, UNIT - height), draws.integer(0, UNIT - width), height, width)
    return None


def middle_box(aspect: float, ratio_min: float, ratio_max: float) -> Box:
    """The largest box in the middle whose ratio of width to height lies between the two."""
    ratio = min(max(aspect, ratio_min), ratio_max)
    width = math.floor(UNIT * min(1.0, ratio / aspect) + 0.5)
    height = math.floor(UNIT * min(1.0, aspect / ratio) + 0.5)
    return Box((UNIT - height) // 2, (UNIT - width) // 2, height, width)


def window(image: Tensor, dy: int, dx: int) -> Tensor:
    """out[y, x] = image[y + dy, x + dx], zero outside."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    top, bottom = max(0, -dy), min(height, height - dy)
    left, right = max(0, -dx), min(width, width - dx)
    if top < bottom and left < right:
        out[:, top:bottom, left:right] = image[:, top + dy : bottom + dy, left + dx : right + dx]
    return out


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing; an image that has the wanted size stays as it is."""
    from torchvision.transforms import functional

    if tuple(image.shape[1:]) == (height, width):
        return image
    return functional.resize(image, [height, width], antialias=True)


def rotated(image: Tensor, angle: float) -> Tensor:
    """Turned counter-clockwise about its middle by `angle` degrees, bilinear, zero fill."""
    from torchvision.transforms import functional
    from torchvision.transforms.functional import InterpolationMode

    return functional.rotate(image, angle, InterpolationMode.BILINEAR)

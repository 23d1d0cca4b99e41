"""Steps that change colours and tones: colour jitter and RandAugment. Applied by torchvision, drawn by us."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from torch import Tensor

from softcache.data.philox import Draws
from softcache.data.step_parameters import Range
from softcache.data.view_steps import rotated
from softcache.errors import DataError

Strength = Annotated[float, Range(0, 10)]


def color_jitter(
    image: Tensor,
    draws: Draws,
    *,
    brightness: Strength = 0.0,
    contrast: Strength = 0.0,
    saturation: Strength = 0.0,
    hue: Annotated[float, Range(0, 0.5)] = 0.0,
) -> Tensor:
    """Brightness, contrast, saturation and hue changed in a random order, as torchvision's ColorJitter.

    The first three by a factor from max(0, 1 - x) to 1 + x, hue by -x to x of the colour circle; a parameter of 0 leaves its
    part out. Saturation and hue do nothing to a grey image.

    Raises:
        DataError: the image is neither grey nor RGB.
    """
    from torchvision.transforms import functional

    _need_grey_or_rgb(image, "color_jitter")
    order = shuffled(4, draws)
    changes = [
        (brightness, functional.adjust_brightness, _factor(brightness, draws.uniform())),
        (contrast, adjust_contrast, _factor(contrast, draws.uniform())),
        (saturation, functional.adjust_saturation, _factor(saturation, draws.uniform())),
        (hue, functional.adjust_hue, hue * (2 * draws.uniform() - 1)),
    ]
    for strength, change, amount in (changes[which] for which in order):
        image = change(image, amount) if strength else image
    return image


def _factor(strength: float, uniform: float) -> float:
    """From max(0, 1 - strength) to 1 + strength."""
    lowest = max(0.0, 1 - strength)
    return lowest + (1 + strength - lowest) * uniform


def shuffled(count: int, draws: Draws) -> list[int]:
    """0 .. count - 1 in random order (Fisher and Yates; count - 1 draws, the last place first)."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = draws.integer(0, last)
        order[last], order[other] = order[other], order[last]
    return order


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """`factor` times the image plus (1 - factor) times its mean grey level, clipped to 0..255 and rounded down.

    torchvision's, but for the mean: its float32 sum over a large image depends on the number of threads, this one is exact.
    """
    from torchvision.transforms import functional

    grey = functional.rgb_to_grayscale(image) if image.shape[0] == 3 else image
    mean = int(grey.long().sum()) / grey.numel()
    return (image.float() * factor + (1 - factor) * mean).clamp_(0, 255).to(image.dtype)


BINS = 31  # strengths of an operation run from none (bin 0) to the strongest (bin 30)


def randaugment(
    image: Tensor,
    draws: Draws,
    *,
    ops: Annotated[int, Range(1, 100)] = 2,
    magnitude: Annotated[int, Range(0, BINS - 1)] = 9,
) -> Tensor:
    """`ops` operations drawn with replacement from OPERATIONS, each at strength `magnitude` of 0..30, half of them mirrored.

    Strengths are those of torchvision's RandAugment. Geometric operations are bilinear (torchvision: nearest), so that the
    last bit of a coordinate cannot choose another pixel, and fill with zeros.

    Raises:
        DataError: the image is neither grey nor RGB.

    Source: Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space" (2020).
    """
    _need_grey_or_rgb(image, "randaugment")
    for _ in range(ops):
        operation = OPERATIONS[draws.integer(0, len(OPERATIONS) - 1)]
        sign = -1 if draws.uniform() < 0.5 else 1  # always drawn, so that every operation takes two draws
        image = operation(image, magnitude / (BINS - 1), sign)
    return image


# Each operation: (image, strength in [0, 1], sign) -> image.


def _identity(image: Tensor, strength: float, sign: int) -> Tensor:
    return image


def _shear_x(image: Tensor, strength: float, sign: int) -> Tensor:
    return _affine(image, shear=[math.degrees(math.atan(sign * 0.3 * strength)), 0.0])


def _shear_y(image: Tensor, strength: float, sign: int) -> Tensor:
    return _affine(image, shear=[0.0, math.degrees(math.atan(sign * 0.3 * strength))])


def _translate_x(image: Tensor, strength: float, sign: int) -> Tensor:
    return _affine(image, translate=[sign * int(150 / 331 * image.shape[2] * strength), 0])


def _translate_y(image: Tensor, strength: float, sign: int) -> Tensor:
    return _affine(image, translate=[0, sign * int(150 / 331 * image.shape[1] * strength)])


def _rotate(image: Tensor, strength: float, sign: int) -> Tensor:
    return rotated(image, sign * 30 * strength)


def _brightness(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.adjust_brightness(image, 1 + sign * 0.9 * strength)


def _color(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.adjust_saturation(image, 1 + sign * 0.9 * strength)


def _contrast(image: Tensor, strength: float, sign: int) -> Tensor:
    return adjust_contrast(image, 1 + sign * 0.9 * strength)


def _sharpness(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.adjust_sharpness(image, 1 + sign * 0.9 * strength)


def _posterize(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.posterize(image, 8 - round(4 * strength))


def _solarize(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.solarize(image, 255 * (1 - strength))


def _autocontrast(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.autocontrast(image)


def _equalize(image: Tensor, strength: float, sign: int) -> Tensor:
    from torchvision.transforms import functional

    return functional.equalize(image)


OPERATIONS: tuple[Callable[[Tensor, float, int], Tensor], ...] = (  # their order is part of the step's version
    _identity,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
    _brightness,
    _color,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
)


def _affine(image: Tensor, *, translate: list[int] | None = None, shear: list[float] | None = None) -> Tensor:
    """Moved by whole pixels, or sheared about the upper left corner (PIL's own origin); bilinear, zero fill."""
    from torchvision.transforms import functional
    from torchvision.transforms.functional import InterpolationMode

    center = [0, 0] if shear else None
    bilinear = InterpolationMode.BILINEAR
    return functional.affine(image, 0.0, translate or [0, 0], 1.0, shear or [0.0, 0.0], bilinear, center=center)


def _need_grey_or_rgb(image: Tensor, name: str) -> None:
    if image.shape[0] not in (1, 3):
        raise DataError(
            f"the view step {name} takes grey or RGB images, this one has {image.shape[0]} channels",
            tip="put to_rgb before it",
        )

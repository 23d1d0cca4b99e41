"""A small convolutional network for small images."""

from __future__ import annotations

from torch import nn

from softcache.errors import ConfigError
from softcache.models.inputs import ImageInput, channels_of
from softcache.models.model import Model


def cnn(
    num_classes: int,
    input_shape: tuple[int, ...] | None = None,
    in_channels: int | None = None,
    width: int = 32,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    scale: float = 255.0,
) -> Model:
    """Three blocks conv3x3-BatchNorm-ReLU of `width`, 2x and 4x channels, average pool, linear.

    Takes images of any size from 4 x 4 (8 x 8 digits, 28 x 28, 32 x 32): two blocks halve, the pool takes the rest.
    `in_channels` wins over `input_shape`; without either it is 3. mean, std, scale: see ImageInput.
    """
    if width < 1:
        raise ConfigError(f"softcache:cnn: width must be at least 1, got {width}")
    channels = channels_of(input_shape, in_channels)
    net = nn.Sequential(
        *_block(channels, width),
        nn.MaxPool2d(2),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )
    return Model(net, ImageInput(channels, mean, std, scale))


def _block(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

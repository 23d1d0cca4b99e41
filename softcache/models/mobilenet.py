"""MobileNetV2 for small images, as the distillation benchmarks use it.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2,
with the differences of Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020): the second row does not
halve the map, so that four halvings are left; ReLU stands for ReLU6; a 1x1 convolution also where the expansion is 1;
channels are cut, not rounded to multiples of 8; no dropout.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.models.images import Tail, he_normal, image_model, small_normal
from softcache.models.model import Model

EXPANSION = 6
# expansion, channels at width 1, blocks, stride of the first
ROWS = (
    (1, 16, 1, 1),
    (EXPANSION, 24, 2, 1),
    (EXPANSION, 32, 3, 2),
    (EXPANSION, 64, 4, 2),
    (EXPANSION, 96, 3, 1),
    (EXPANSION, 160, 3, 2),
    (EXPANSION, 320, 1, 1),
)
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, 3x3 depthwise, 1x1 without ReLU; plus the input where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * c_in
        self.conv = nn.Sequential(
            *(nn.Conv2d(c_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
            *(nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
            *(nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)),
        )
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """A 3x3 stem that halves, seven rows of blocks, of which three halve, a 1x1 convolution, average pool, linear.

    The maps end at `blocks.1`, `blocks.2`, `blocks.4` and `blocks.6`; the last convolution belongs to `tail`.
    """

    def __init__(self, width: float, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels, last = int(STEM * width), int(LAST * max(width, 1.0))
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        for expansion, at_one, n, stride in ROWS:
            c_out = int(at_one * width)
            first = InvertedResidual(channels, c_out, stride, expansion)
            others = (InvertedResidual(c_out, c_out, 1, expansion) for _ in range(n - 1))
            self.blocks.append(nn.Sequential(first, *others))
            channels = c_out
        self.tail = Tail(
            OrderedDict(
                conv2=nn.Conv2d(channels, last, 1, bias=False),
                bn2=nn.BatchNorm2d(last),
                relu=nn.ReLU(),
                avgpool=nn.AdaptiveAvgPool2d(1),
            )
        )
        self.classifier = nn.Linear(last, num_classes)
        he_normal(self)
        small_normal(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)  # (B, 32 width, H/2, W/2)
        for row in self.blocks:
            x = row(x)  # at the end (B, 320 width, H/16, W/16)
        return self.classifier(self.tail(x).flatten(1))  # (B, C)


def mobilenetv2(
    num_classes: int,
    width: float = 0.5,
    input_shape: tuple[int, ...] | None = None,
    in_channels: int | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    scale: float = 255.0,
) -> Model:
    """A MobileNetV2.

    Args:
        num_classes: C.
        width: multiplies the paper's channels; those of the last convolution only where it is above 1. The benchmarks'
            is 0.5.
        input_shape, in_channels, mean, std, scale: as for every model of small images.

    Raises:
        ConfigError: a width that leaves a row without channels.
    """
    if not 1 / 16 <= width < math.inf:
        raise ConfigError(f"softcache:mobilenetv2: width must be at least 1/16, got {width}")
    return image_model(partial(MobileNetV2, width))(num_classes, input_shape, in_channels, mean, std, scale)

"""ShuffleNet V1 and V2 for small images, as the distillation benchmarks use them.

Sources: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices"
(2018), with 3 groups; Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design"
(2018), width 1. The differences are those of Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020): a
1x1 stem that does not halve, no maximum pool, and in V1 a ReLU behind the depthwise convolution too. The layer names of
V1 are theirs, so that their weights load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from softcache.models.images import Tail, image_model

STEM = 24
UNITS = (4, 8, 4)  # in each of three groups, the first of which halves the map
CHANNELS_V1, GROUPS = (240, 480, 960), 3
CHANNELS_V2, LAST_V2 = (116, 232, 464), 1024


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) with the channels of all groups in turn: the first of each, then the second of each, ..."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------- V1


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; then the input is added or, where the map halves, appended."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        own = c_out if stride == 1 else c_out - c_in  # channels beside those of the shortcut
        mid = own // 4
        self.groups = 1 if c_in == STEM else GROUPS  # the stem gives too few channels for groups
        self.conv1 = nn.Conv2d(c_in, mid, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(mid, own, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = channel_shuffle(self.relu1(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        return self.relu3(y + x if self.shortcut is None else torch.cat([y, self.shortcut(x)], 1))


class ShuffleNetV1(nn.Module):
    """A 1x1 stem, three groups that halve, average pool, linear."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = _groups(UnitV1, CHANNELS_V1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(CHANNELS_V1[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 24, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 960, H/8, W/8)
        return self.linear(self.avgpool(x).flatten(1))  # (B, C)


# ---------------------------------------------------------------------------------------------------------------- V2


class UnitV2(nn.Module):
    """One half of the channels as it is, the other through 1x1, 3x3 depthwise and 1x1, then a shuffle of both.

    Where the map halves, both branches take all channels, and the left one is 3x3 depthwise and 1x1.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half = c_out // 2
        self.left = nn.Sequential(*_depthwise(c_in, 2), *_pointwise(c_in, half)) if stride == 2 else None
        first = _pointwise(half if stride == 1 else c_in, half)
        self.right = nn.Sequential(*first, *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.left is None else (self.left(x), x)
        return channel_shuffle(torch.cat([left, self.right(right)], 1), 2)


def _pointwise(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class ShuffleNetV2(nn.Module):
    """A 1x1 stem, three groups that halve, a 1x1 convolution, average pool, linear; that convolution is in `tail`."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = _groups(UnitV2, CHANNELS_V2)
        names, last = ("conv2", "bn2", "relu", "avgpool"), _pointwise(CHANNELS_V2[-1], LAST_V2)
        self.tail = Tail(OrderedDict(zip(names, [*last, nn.AdaptiveAvgPool2d(1)], strict=True)))
        self.linear = nn.Linear(LAST_V2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 24, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 464, H/8, W/8)
        return self.linear(self.tail(x).flatten(1))  # (B, C)


def _groups(unit: Callable[[int, int, int], nn.Module], channels: tuple[int, ...]) -> list[nn.Sequential]:
    groups, c_in = [], STEM
    for c_out, n in zip(channels, UNITS, strict=True):
        groups.append(nn.Sequential(unit(c_in, c_out, 2), *(unit(c_out, c_out, 1) for _ in range(n - 1))))
        c_in = c_out
    return groups


shufflenetv1 = image_model(ShuffleNetV1)
shufflenetv2 = image_model(ShuffleNetV2)

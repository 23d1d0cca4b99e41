"""The CIFAR ResNets of the distillation benchmarks.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), section 4.2, depth 6n+2; the x4
widths are those of Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020), as are the layer names, so
that their weights load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from softcache.models.images import he_normal, image_model
from softcache.models.model import Model

PLAIN = (16, 16, 32, 64)  # stem and three groups
X4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution with BatchNorm where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """A 3x3 stem, three groups of (depth - 2) / 6 blocks at full, half and quarter resolution, average pool, linear."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], in_channels: int, num_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, f"depth must be 6n+2, got {depth}"
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _group(widths[0], widths[1], n, stride=1)
        self.layer2 = _group(widths[1], widths[2], n, stride=2)
        self.layer3 = _group(widths[2], widths[3], n, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, widths[0], H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, widths[3], H/4, W/4)
        return self.fc(self.avgpool(x).flatten(1))  # (B, C)


def _group(c_in: int, c_out: int, n: int, stride: int) -> nn.Sequential:
    first = BasicBlock(c_in, c_out, stride)
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(n - 1)))


def cifar_resnet(depth: int, widths: tuple[int, int, int, int] = PLAIN) -> Callable[..., Model]:
    """The builder of one member of the family, for the table of models."""
    return image_model(partial(CifarResNet, depth, widths))

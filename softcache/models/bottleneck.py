"""ResNet-50 for small images, as the distillation benchmarks use it.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), table 1, with a 3x3 stem that does not
halve and no maximum pool, and the stride in the 3x3 convolution. The layer names are those of Tian, Krishnan, Isola,
"Contrastive Representation Distillation" (2020), so that their weights load.
"""

from __future__ import annotations

from torch import Tensor, nn

from softcache.models.images import he_normal, image_model

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 to `width` channels, 3x3, 1x1 to four times as many, and a shortcut: 1x1 with BatchNorm if the shape changes."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = EXPANSION * width
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.relu3(self.bn3(self.conv3(x)) + shortcut)


class CifarResNet50(nn.Module):
    """A 3x3 stem, groups of 3, 4, 6 and 3 bottlenecks at full to an eighth of the resolution, average pool, linear."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _group(64, 64, 3, stride=1)
        self.layer2 = _group(256, 128, 4, stride=2)
        self.layer3 = _group(512, 256, 6, stride=2)
        self.layer4 = _group(1024, 512, 3, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 64, H, W)
        x = self.layer2(self.layer1(x))  # (B, 512, H/2, W/2)
        x = self.layer4(self.layer3(x))  # (B, 2048, H/8, W/8)
        return self.linear(self.avgpool(x).flatten(1))  # (B, C)


def _group(c_in: int, width: int, n: int, stride: int) -> nn.Sequential:
    first = Bottleneck(c_in, width, stride)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * width, width, 1) for _ in range(n - 1)))


resnet50 = image_model(CifarResNet50)

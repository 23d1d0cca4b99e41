"""Wide residual networks for small images.

Source: Zagoruyko, Komodakis, "Wide Residual Networks" (2016), the basic block without dropout: WRN-depth-width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.models.images import Tail, he_normal, image_model
from softcache.models.model import Model


class PreactivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, and a shortcut.

    The shortcut is the input itself; where the shape changes, a 1x1 convolution of the first ReLU's output.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut


class WideResNet(nn.Module):
    """A 3x3 stem, three groups of (depth - 4) / 6 blocks at full, half and quarter resolution, average pool, linear.

    The groups end before the last BatchNorm and ReLU, which belong to `tail`.
    """

    def __init__(self, depth: int, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        assert depth >= 10 and (depth - 4) % 6 == 0, f"depth must be 6n+4, got {depth}"
        n = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _group(16, 16 * width, n, stride=1)
        self.block2 = _group(16 * width, 32 * width, n, stride=2)
        self.block3 = _group(32 * width, 64 * width, n, stride=2)
        last = [("bn1", nn.BatchNorm2d(64 * width)), ("relu", nn.ReLU()), ("avgpool", nn.AdaptiveAvgPool2d(1))]
        self.tail = Tail(OrderedDict(last))
        self.fc = nn.Linear(64 * width, num_classes)
        he_normal(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.conv1(x))  # (B, 16 width, H, W)
        x = self.block3(self.block2(x))  # (B, 64 width, H/4, W/4)
        return self.fc(self.tail(x).flatten(1))  # (B, C)


def _group(c_in: int, c_out: int, n: int, stride: int) -> nn.Sequential:
    first = PreactivationBlock(c_in, c_out, stride)
    return nn.Sequential(first, *(PreactivationBlock(c_out, c_out, 1) for _ in range(n - 1)))


def wide_resnet(depth: int, width: int) -> Callable[..., Model]:
    """The builder of one member of the family, for the table of models."""
    return image_model(partial(WideResNet, depth, width))


def wrn(
    num_classes: int,
    depth: int = 16,
    width: int = 2,
    input_shape: tuple[int, ...] | None = None,
    in_channels: int | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    scale: float = 255.0,
) -> Model:
    """Any member of the family.

    Args:
        num_classes: C.
        depth: 6n+4 layers with weights, at least 10.
        width: multiplies the 16, 32 and 64 channels of the groups.
        input_shape, in_channels, mean, std, scale: as for every model of small images.

    Raises:
        ConfigError: a depth or width that is none.
    """
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ConfigError(
            f"softcache:wrn: depth={depth}, width={width}",
            tip="depth is one of 10, 16, 22, 28, 34, 40, ..., width >= 1",
        )
    return wide_resnet(depth, width)(num_classes, input_shape, in_channels, mean, std, scale)

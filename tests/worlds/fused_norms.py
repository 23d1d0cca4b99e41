"""A user's network whose BatchNorm is none of torch's own: with an activation inside, as timm's, and frozen, as torchvision's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class NormAct(nn.BatchNorm2d):
    """BatchNorm, what is dropped, and an activation."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class Hidden(nn.BatchNorm2d):
    """BatchNorm and an activation that is no module of it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class OwnLinear(nn.Linear):
    """A library's kind that answers as torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


class Doubled(nn.Conv2d):
    """A library's kind that answers otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class Fused(nn.Module):
    """Takes (B, 1, 8, 8)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), NormAct(16, nn.SiLU())
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), NormAct(16, nn.ReLU(inplace=True))
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 1), FrozenBatchNorm2d(16)
        self.conv4, self.norm4 = nn.Conv2d(16, 16, 3), Hidden(16)
        self.odd = Doubled(16, 16, 1)
        self.flat, self.fc = OwnLinear(16, 16), nn.Linear(16, num_classes)
        frozen: Any = self.norm3
        for tensor in (frozen.weight, frozen.bias, frozen.running_mean):
            tensor.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = x + self.norm3(self.conv3(self.norm2(self.conv2(x))))
        x = self.odd(self.norm4(self.conv4(x)))
        return self.fc(self.flat(x.mean((2, 3))))


def fused(num_classes: int) -> Fused:
    return Fused(num_classes)

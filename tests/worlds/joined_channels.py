"""A user's network whose channels go every way at once: added, concatenated, gated, flattened, depthwise, and normalised."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ways(nn.Module):
    """Takes (B, 1, 8, 8)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.added = nn.Conv2d(width, width, 1)  # to what it takes
        self.squeeze, self.excite = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.branch = nn.Conv2d(width, width, 1)  # beside it
        self.down = nn.Conv2d(2 * width, width, 3, stride=2, padding=1)
        self.flat = nn.Linear(width * 4, 32)
        self.norm = nn.LayerNorm(32)  # after which no channel is by itself
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.added(self.depthwise(x))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([self.branch(x), x], 1)
        x = nn.functional.max_pool2d(torch.relu(self.down(x)), 2)
        return self.fc(self.norm(self.flat(x.flatten(1))))


def ways(num_classes: int, width: int = 16) -> Ways:
    return Ways(num_classes, width)


class Groups(nn.Module):
    """A convolution of two groups, and one on half of its channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 1, groups=2)
        self.of_half = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.grouped(self.first(x)).chunk(2, 1)
        return self.fc(self.of_half(left * right).mean((2, 3)))


def groups(num_classes: int) -> Groups:
    return Groups(num_classes)


class Mixed(nn.Module):
    """Only what `free` gives can be left out."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)  # whose answers are added
        self.normalised = nn.Linear(64, 16)  # made of length 1, all of them together
        self.free = nn.Linear(16, 24)
        self.shown = nn.Linear(24, num_classes)  # among the logits, and taken once more
        self.fc = nn.Linear(num_classes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = nn.functional.normalize(self.normalised(self.dense(x) + self.norm(x)), dim=1)
        x = self.shown(torch.relu(self.free(x)))
        return x + self.fc(x)


def mixed(num_classes: int) -> Mixed:
    return Mixed(num_classes)

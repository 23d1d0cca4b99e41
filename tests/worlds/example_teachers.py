"""Teachers that need no training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def means(num_classes: int) -> nn.Sequential:
    """Of digits: the nearest class mean, a linear layer in closed form."""
    from sklearn.datasets import load_digits

    found = load_digits()
    centres = torch.tensor(np.stack([found.images[found.target == c].mean(axis=0).ravel() for c in range(10)]) / 16)
    layer = nn.Linear(64, num_classes)
    with torch.no_grad():
        layer.weight.copy_(6 * centres)
        layer.bias.copy_(-3 * centres.square().sum(dim=1))
    return nn.Sequential(nn.Flatten(), layer)


class Colours(nn.Module):
    """Of images that are mostly of one colour: how much of it there is."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(3, 4)
        with torch.no_grad():
            self.fc.weight.copy_(20 * torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.8, 0.8, 0.8]]))
            self.fc.bias.copy_(torch.tensor([0.0, 0, 0, -8]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mean(x))


def colours() -> Colours:
    return Colours()

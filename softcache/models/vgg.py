"""The VGG networks of the distillation benchmarks, for small images.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014), with BatchNorm
(Ioffe, Szegedy, 2015) behind every convolution. Average pooling and one linear layer stand in the place of the three
large ones, and the fourth of the five poolings is left out, as in Tian, Krishnan, Isola, "Contrastive Representation
Distillation" (2020). The layer names are theirs, so that their weights load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from softcache.models.images import he_normal, image_model, small_normal
from softcache.models.model import Model


class Vgg(nn.Module):
    """Five blocks of 3x3 convolutions with BatchNorm and ReLU, maximum pools after the first three, average pool, linear.

    Takes images from 8 x 8.

    Args:
        convs: convolutions in each block: 1 makes VGG-8, 2 VGG-13.
        in_channels: of the images.
        num_classes: C.
    """

    def __init__(self, convs: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(in_channels, 64, convs)
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(64, 128, convs)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(128, 256, convs)
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(256, 512, convs)
        self.block4 = _block(512, 512, convs)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        he_normal(self)
        small_normal(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool0(self.block0(x))  # (B, 64, H/2, W/2)
        x = self.pool1(self.block1(x))  # (B, 128, H/4, W/4)
        x = self.pool2(self.block2(x))  # (B, 256, H/8, W/8)
        x = self.block4(self.block3(x))  # (B, 512, H/8, W/8)
        return self.classifier(self.avgpool(x).flatten(1))  # (B, C)


def _block(c_in: int, c_out: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in [c_in] + [c_out] * (convs - 1):
        layers += [nn.Conv2d(c, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


def vgg(convs: int) -> Callable[..., Model]:
    """The builder of the network with so many convolutions in each block, for the table of models."""
    return image_model(partial(Vgg, convs))

"""What the networks for small images share: their builder, their first weights and their end."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from softcache.models.inputs import ImageInput, channels_of
from softcache.models.model import Model


class Tail(nn.Sequential):
    """What is between a network's last group and its final linear layer: it takes a map and gives one position.

    A class of its own, where an nn.Sequential would compute the same: `taps.map_ends` sees a block that reduces the map,
    so that the last group ends before it and not inside.
    """


def image_model(network: Callable[[int, int], nn.Module]) -> Callable[..., Model]:
    """The builder, for the table of models, of a network made from (input channels, classes)."""

    def build(
        num_classes: int,
        input_shape: tuple[int, ...] | None = None,
        in_channels: int | None = None,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        scale: float = 255.0,
    ) -> Model:
        """`in_channels` wins over `input_shape`; without either it is 3. mean, std, scale: see ImageInput."""
        channels = channels_of(input_shape, in_channels)
        return Model(network(channels, num_classes), ImageInput(channels, mean, std, scale))

    return build


def he_normal(net: nn.Module) -> None:
    """Draw the weights of all convolutions anew: normal, of variance 2 / (output channels x kernel area); biases are 0.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers" (2015), the backward case.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_normal(linear: nn.Linear) -> None:
    """Draw the weights of a final linear layer anew: normal, of standard deviation 0.01; biases are 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)

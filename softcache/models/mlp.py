"""Fully connected networks on flattened items."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

from softcache.errors import ConfigError, ModelError
from softcache.models.inputs import VectorInput
from softcache.models.model import Model


def mlp(
    num_classes: int,
    input_shape: tuple[int, ...] | None = None,
    in_features: int | None = None,
    hidden: tuple[int, ...] = (800, 800),
    dropout: float = 0.0,
    init_scale: float = 1.0,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    scale: float = 255.0,
) -> Model:
    """Linear-ReLU-dropout for each width in `hidden`, then a linear layer; `hidden=` (empty) is a linear classifier.

    Args:
        num_classes: C.
        input_shape: shape of one item; its product is the input width D unless `in_features` says it.
        in_features: D.
        hidden: widths of the hidden layers.
        dropout: after each hidden layer.
        init_scale: multiplies every initial weight and bias (torch's nn.Linear defaults).
        mean, std, scale: see VectorInput.

    Raises:
        ModelError: D is unknown, or said twice differently.
        ConfigError: a width, dropout or scale out of range.
    """
    from_shape = math.prod(input_shape) if input_shape is not None else None
    width = in_features or from_shape
    if width is None:
        raise ModelError(
            "softcache:mlp does not know how many numbers an item has",
            tip="add in_features=... to the spec; texts want softcache:textcnn or another model of texts, words softcache:tagger",
        )
    if in_features and from_shape and in_features != from_shape:
        raise ModelError(
            f"softcache:mlp has in_features={in_features}, but items of shape {input_shape} have {from_shape} numbers",
            tip="leave in_features out, or use the data the model was made for",
        )
    if min(hidden, default=1) < 1 or not 0 <= dropout < 1 or init_scale <= 0:
        raise ConfigError(
            f"softcache:mlp: hidden={hidden}, dropout={dropout}, init_scale={init_scale} is out of range",
            tip="widths >= 1, 0 <= dropout < 1, init_scale > 0",
        )
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise((width, *hidden)):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
    layers.append(nn.Linear((width, *hidden)[-1], num_classes))
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(init_scale)
    return Model(net, VectorInput(width, mean, std, scale))

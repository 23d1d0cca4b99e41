"""The classes that a model's weights name, found before the network is built: how many outputs it is to have depends on them."""

from __future__ import annotations

import os

import torch
from torch import nn

from softcache.errors import note_once
from softcache.models.checkpoints import read_state
from softcache.models.from_timm import imagenet_classes, names_timm_weights, timm_classes, timm_model
from softcache.models.from_torchvision import torchvision_classes, torchvision_model, torchvision_weights
from softcache.models.from_transformers import transformer_classes
from softcache.models.model import FEATURES, OTHER_OUTPUTS, final_linear
from softcache.models.weights import (
    names_torchvision_weights,
    path_alone,
    path_and_choice,
    read_saved,
    split_weights,
    weights_file,
)
from softcache.spec import Spec, call_factory, parse_spec, unquoted


def own_classes(text: str, num_classes: int = 0) -> tuple[str, ...] | None:
    """The class names, in the order of the outputs; None where the weights name none, or a factory builds the network.

    A file of weights names none. Where a network of torchvision's or timm's has other outputs in it than the data has classes,
    they are ImageNet's, or that of its larger kin, where they are as many, which is said; else they are called by number.

    Args:
        num_classes: C of the data.
        text: `MODEL`, `MODEL@WEIGHTS` or a run folder, as `load_model` takes it, or with the parameters of a teacher.

    Raises:
        ModelError, ConfigError: no such weights.
    """
    if (path := path_alone(text)) is not None:
        return _saved(path)
    head, weights = split_weights(text)
    spec = parse_spec(head)
    if spec.scheme in ("torchvision", "timm"):  # to a factory it may mean anything
        weights = unquoted(weights, text) or spec.value("weights")
    if not spec.scheme and os.path.exists(spec.name):
        return _saved(spec.name)
    if spec.scheme == "hf":
        return transformer_classes(spec.name)
    if not weights:
        return None
    if names_torchvision_weights(spec, weights):
        return tuple(torchvision_weights(spec.name, weights).meta["categories"])
    if names_timm_weights(spec, weights):
        return timm_classes(spec.name, weights)
    if not os.path.exists(path_and_choice(weights)[0]):
        return None
    return _saved(weights) or _by_outputs(spec, weights, num_classes)


def gives_classes(text: str) -> bool:
    """Whether a teacher's text says nothing else: `output=embedding`, `values` or `features`, `head=none` and `pooling=` do.

    A run folder whose student gives none says it itself.
    """
    if (path := path_alone(text)) is not None:
        saved = read_saved(path)
        return saved is None or saved.output not in OTHER_OUTPUTS
    spec = parse_spec(split_weights(text)[0])
    if spec.value("output") in (*OTHER_OUTPUTS, FEATURES) or spec.value("head") == "none":
        return False
    if spec.scheme == "hf" and "pooling" in spec.parameters:
        return False
    return spec.value("output") != "" or not (not spec.scheme and os.path.exists(spec.name)) or gives_classes(spec.name)


def _by_outputs(spec: Spec, weights: str, num_classes: int) -> tuple[str, ...] | None:
    """What the outputs of a file's tensors are called, where the data has another number of classes."""
    if spec.scheme not in ("torchvision", "timm"):
        return None
    bare = spec.without("weights", "num_classes", "name", "output", "decides", "names", "head")
    builder = torchvision_model(spec.name) if spec.scheme == "torchvision" else timm_model(spec.name)
    with torch.device("meta"):
        net: nn.Module = call_factory(builder, bare.parameters, bare.text, num_classes=2, input_shape=None).net
    linear = final_linear(net, 2)
    name = next((f"{name}.weight" for name, module in net.named_modules() if module is linear), "")
    state = read_state(weights_file(weights), net.state_dict(), path_and_choice(weights)[1]).tensors
    count = len(state[name]) if name in state else num_classes
    if count == num_classes:
        return None
    known = torchvision_classes(spec.name, count) if spec.scheme == "torchvision" else imagenet_classes(count)
    if known is not None:
        note_once(f"{weights} has {count:,} outputs: they are taken to be ImageNet's classes, in their usual order")
    return known or tuple(map(str, range(count)))


def _saved(path: str) -> tuple[str, ...] | None:
    saved = read_saved(path)
    return None if saved is None else saved.class_names or None

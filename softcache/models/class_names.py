"""The classes that a model's weights name, found before the network is built: how many outputs it is to have depends on them."""

from __future__ import annotations

import os

from softcache.models.from_timm import names_timm_weights, timm_classes
from softcache.models.from_torchvision import torchvision_weights
from softcache.models.from_transformers import transformer_classes
from softcache.models.weights import names_torchvision_weights, path_alone, path_and_choice, read_saved, split_weights
from softcache.spec import parse_spec, unquoted


def own_classes(text: str) -> tuple[str, ...] | None:
    """The class names, in the order of the outputs; None where the weights name none, or a factory builds the network.

    Args:
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
    return _saved(weights) if os.path.exists(path_and_choice(weights)[0]) else None


def _saved(path: str) -> tuple[str, ...] | None:
    saved = read_saved(path)
    return None if saved is None else saved.class_names or None

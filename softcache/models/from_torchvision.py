"""torchvision's classification models, with the normalisation their weights were trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from softcache.errors import ConfigError, ModelError, nearest
from softcache.models.inputs import ImageInput
from softcache.models.model import Model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WITH_AUXILIARY = ("googlenet", "inception_v3")


def torchvision_model(name: str) -> Callable[..., Model]:
    """The builder of `torchvision:<name>`; ModelError with the nearest names if torchvision has no such classifier."""
    import torchvision  # a second to import: only who asks for it pays

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(f"torchvision has no classification model {name!r}", tip=nearest(name, known))

    def build(
        num_classes: int,
        weights: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        aux_logits: bool | None = None,
    ) -> Model:
        """`weights` is a name such as IMAGENET1K_V1; torchvision downloads it if it must. mean, std: see ImageInput.

        aux_logits: of googlenet and inception_v3, whether they have their auxiliary classifiers, as published weights do. What
        those give in training is left aside: the logits are the main classifier's.
        """
        extra: dict[str, Any] = {} if aux_logits is None else {"aux_logits": aux_logits}
        if name in WITH_AUXILIARY and weights is None:
            extra["init_weights"] = True  # which torchvision does anyway, with a warning that it will not for ever
        if extra and name not in WITH_AUXILIARY:
            raise ConfigError(f"torchvision:{name} has no auxiliary classifiers", tip="leave aux_logits out")
        if weights is None:
            net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
            return Model(_with_main_logits(net, name), ImageInput(3, mean or IMAGENET_MEAN, std or IMAGENET_STD))
        entry = torchvision_weights(name, weights)
        categories = entry.meta["categories"]
        if len(categories) != num_classes:
            raise ModelError(
                f"torchvision:{name}: weights {weights} have {len(categories)} classes, the data has {num_classes}",
                tip="leave weights out to train from scratch, or use data of the same classes",
            )
        preset = entry.transforms()
        net = torchvision.models.get_model(name, weights=entry, num_classes=num_classes, **extra)
        model = Model(_with_main_logits(net, name), ImageInput(3, mean or tuple(preset.mean), std or tuple(preset.std)))
        model.class_names = tuple(categories)
        return model

    return build


def _with_main_logits(net: nn.Module, name: str) -> nn.Module:
    if name in WITH_AUXILIARY:
        net.register_forward_hook(_main_logits)
    return net


def _main_logits(_net: nn.Module, _args: Any, output: Any) -> Any:
    """Of a network that gives its auxiliary classifiers' logits beside its own, as in training, its own."""
    return getattr(output, "logits", output)


def torchvision_classes(name: str, count: int) -> tuple[str, ...] | None:
    """The classes of torchvision's weights of a model, where they are so many."""
    import torchvision

    table = torchvision.models.get_model_weights(name)
    found = [entry.meta["categories"] for entry in table if len(entry.meta["categories"]) == count]
    return tuple(found[0]) if found else None


def torchvision_weights(name: str, weights: str) -> Any:
    """The entry of torchvision's weight table; ConfigError with the nearest names."""
    import torchvision

    table = torchvision.models.get_model_weights(name)
    if weights not in table.__members__:
        raise ConfigError(f"torchvision:{name} has no weights {weights!r}", tip=nearest(weights, table.__members__))
    return table[weights]

"""torchvision's classification models, with the normalisation their weights were trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softcache.errors import ConfigError, ModelError, nearest
from softcache.models.inputs import ImageInput
from softcache.models.model import Model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    ) -> Model:
        """`weights` is a name such as IMAGENET1K_V1; torchvision downloads it if it must. mean, std: see ImageInput."""
        if weights is None:
            net = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
            return Model(net, ImageInput(3, mean or IMAGENET_MEAN, std or IMAGENET_STD))
        entry = torchvision_weights(name, weights)
        categories = entry.meta["categories"]
        if len(categories) != num_classes:
            raise ModelError(
                f"torchvision:{name}: weights {weights} have {len(categories)} classes, the data has {num_classes}",
                tip="leave weights out to train from scratch, or use data of the same classes",
            )
        preset = entry.transforms()
        net = torchvision.models.get_model(name, weights=entry, num_classes=num_classes)
        model = Model(net, ImageInput(3, mean or tuple(preset.mean), std or tuple(preset.std)))
        model.class_names = tuple(categories)
        return model

    return build


def torchvision_weights(name: str, weights: str) -> Any:
    """The entry of torchvision's weight table; ConfigError with the nearest names."""
    import torchvision

    table = torchvision.models.get_model_weights(name)
    if weights not in table.__members__:
        raise ConfigError(f"torchvision:{name} has no weights {weights!r}", tip=nearest(weights, table.__members__))
    return table[weights]

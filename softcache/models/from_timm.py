"""timm's classification models (extra `timm`), with the normalisation that their configuration names."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from softcache.errors import ConfigError, ModelError, nearest, require_extra
from softcache.models.inputs import ImageInput, channels_of
from softcache.models.model import Model
from softcache.spec import Spec


def timm_model(name: str) -> Callable[..., Model]:
    """The builder of `timm:<name>`.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: timm has no such model; with the nearest names.
    """
    require_extra("timm", "timm", f"the model 'timm:{name}'")
    import timm  # a second to import: only who asks for it pays
    from timm.data import resolve_model_data_config

    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models())  # all of them would be more than a thousand
        tip = nearest(architecture, near) if near else "timm.list_models('*resnet*') lists those of a pattern"
        raise ModelError(f"timm has no model {architecture!r}", tip=tip)
    if dot:
        raise ModelError(f"'timm:{name}' names weights", tip=f"write timm:{architecture}?weights={tag}")

    def build(
        num_classes: int,
        input_shape: tuple[int, ...] | None = None,
        in_channels: int | None = None,
        img_size: int | None = None,
        weights: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Model:
        """`weights` is a tag such as a1_in1k; timm downloads it if it must. mean, std: see ImageInput.

        in_channels wins over input_shape; without either it is 3. img_size: of a transformer that is built for one size.
        Weights that were trained on ImageNet, or on one of its larger kin, have its classes, by WordNet ids; of others they
        are taken to be the data's, in its order.
        """
        if weights is not None:
            _check_weights(name, weights, num_classes)
        channels = channels_of(input_shape, in_channels)
        sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
        try:
            net = timm.create_model(
                name if weights is None else f"{name}.{weights}",
                pretrained=weights is not None,
                num_classes=num_classes,
                in_chans=channels,
                **sized,
            )
        except TypeError as exc:
            if img_size is None:
                raise
            raise ConfigError(f"timm:{name} takes no img_size: {exc}", tip="leave it out: it takes any size") from exc
        config = resolve_model_data_config(net)
        model = Model(
            net, ImageInput(channels, mean or _of(config["mean"], channels), std or _of(config["std"], channels))
        )
        model.class_names = None if weights is None else timm_classes(name, weights)
        return model

    return build


def names_timm_weights(spec: Spec, weights: str) -> bool:
    """True when `weights` is one of timm's tags: not a path, not a file name."""
    return spec.scheme == "timm" and re.fullmatch(r"\w+", weights) is not None and not Path(weights).exists()


def timm_classes(name: str, tag: str) -> tuple[str, ...] | None:
    """The WordNet ids of the classes of weights that were trained on ImageNet or its larger kin; None of others.

    Raises:
        ConfigError: no such weights.
    """
    require_extra("timm", "timm", f"the model 'timm:{name}'")
    return imagenet_classes(_entry(name, tag).num_classes) if "_in" in f"_{tag}" else None


def imagenet_classes(count: int) -> tuple[str, ...] | None:
    """The WordNet ids of ImageNet's classes, or those of its larger kin, where they are so many."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    names = None if subset is None else tuple(ImageNetInfo(subset).label_names())
    return names if names is not None and len(names) == count else None


def _check_weights(name: str, tag: str, num_classes: int) -> None:
    entry = _entry(name, tag)
    if entry.num_classes != num_classes:
        raise ModelError(
            f"timm:{name}: weights {tag} have {entry.num_classes} classes, the data has {num_classes}",
            tip="leave weights out to train from scratch, or use data of the same classes",
        )


def _entry(name: str, tag: str) -> Any:
    """timm's description of weights; ConfigError where it has none."""
    from timm.models import get_arch_pretrained_cfgs

    entries = {full.partition(".")[2]: entry for full, entry in get_arch_pretrained_cfgs(name).items()}
    if tag not in entries:
        raise ConfigError(f"timm:{name} has no weights {tag!r}", tip=nearest(tag, entries))
    return entries[tag]


def _of(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number per channel; for other images than RGB their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),)

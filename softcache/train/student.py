"""The student's network as a run begins with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from softcache.config import TrainConfig
from softcache.data.classes import match_classes, read_classes_map
from softcache.data.loading import item_shape
from softcache.errors import ModelError, printable
from softcache.models import Model, build_vocabulary, load_model
from softcache.models.initialise import initialise, reorder_classes
from softcache.train.batches import Material


def build_student(config: TrainConfig, material: Material) -> tuple[Model, Any, str | None]:
    """The network on the CPU, two samples as it collates them, and what it took from other weights (None: nothing).

    Raises:
        ModelError: no such model, or weights that do not fit.
    """
    transfer_set = material.transfer_set
    item = material.viewed().render(0, 0)
    texts = (transfer_set.load(i)[0] for i in range(len(transfer_set)))
    model = load_model(
        config.student,
        num_classes=transfer_set.num_classes,
        class_names=transfer_set.class_names,
        input_shape=item_shape(item),
        vocabulary=build_vocabulary(texts) if isinstance(item, str) else None,
    )
    sample = model.input.collate([item, item])
    order = _data_order(model, transfer_set.class_names, read_classes_map(config.classes_map))
    if order is not None:
        reorder_classes(model, order, transfer_set.class_names, sample)
    taken = initialise(model, config.init_from, config.init_map) if config.init_from else None
    return model, sample, None if taken is None else taken.text()


def _data_order(model: Model, class_names: Sequence[str], classes_map: Mapping[str, str]) -> Sequence[int] | None:
    """The student's outputs in the data's order, where it knows the same classes in another; None: as they are.

    A start that knows other classes is as good as another: its last layer learns the data's, which is said.
    """
    declared = model.declared_classes
    if declared is None:
        return None
    try:
        return match_classes(model.spec, declared, class_names, classes_map).columns
    except ModelError as exc:
        if classes_map and set(classes_map.values()) & set(declared):
            raise
        said = f"softcache: {exc.message}; its last layer begins with what it learned of those"
        print(printable(said), file=sys.stderr)
        return None

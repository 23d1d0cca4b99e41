"""What trained models cost beside one another: as `shrink` tells it of a model and of what it left, of any."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from softcache.data.loading import ViewedSet, item_shape
from softcache.data.transfer_set import open_transfer_set
from softcache.evaluate.measure import run_policy
from softcache.machine import as_fresh, pick_device, pick_threads
from softcache.models import load_model
from softcache.students.cost import Cost, cost_of
from softcache.students.samples import Samples

BATCH = 64  # as shrink times


@as_fresh()
def costs_beside(
    models: Sequence[str],
    data: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    download: bool = False,
    allow_code: bool = False,
) -> list[Cost]:
    """Of each model, all of them in turns, on an item of the data as the model's own run saw it.

    Args:
        models: run folders, or MODEL@WEIGHTS.
        data: a data spec.

    Raises:
        SoftcacheError: for what cannot be opened.
    """
    where = pick_device(device)
    torch.set_num_threads(pick_threads(threads))
    items = open_transfer_set(data, download=download)
    found = []
    for text in models:
        example = ViewedSet(items, run_policy(text).for_evaluation(), ()).render(0, 0)
        model = load_model(
            text,
            num_classes=items.num_classes,
            class_names=items.class_names,
            input_shape=item_shape(example),
            allow_code=allow_code,
            device=str(where),
        ).eval()
        found.append(Samples.of(model, text, example, 0, lambda _i, item=example: item, BATCH))  # type: ignore[misc]
    return cost_of(found, BATCH)

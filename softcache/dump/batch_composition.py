"""Does a teacher's answer depend on what shares its batch? It is asked again in another composition, before a dump."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from softcache.dump.results import place_of
from softcache.dump.teacher import Teacher
from softcache.errors import TeacherError
from softcache.models.inputs import has_vocabulary
from softcache.tokens import Tokens

# what another composition of the batch may change, of the largest logit: kernels that add up in another order, layer upon layer
FLOAT32_APART = 1e-3
HALF_APART = {torch.float16: 0.01, torch.bfloat16: 0.04}  # the first also for a GPU's float32, which may be TF32
FEW_ROWS = (
    0.1  # whose near-ties inside (a router's choice, a neighbour at the same distance) rounding may decide otherwise
)


def check_batch_composition(teacher: Teacher, items: Sequence[Any]) -> None:
    """Ask the samples of the first batch again, in halves and in another order: logits must be of the sample alone.

    Call it after `check_first_batch`, with the same samples; texts are halved into the shorter and the longer ones, so
    that padding differs.

    Raises:
        TeacherError: more rows than rounding explains are others.
    """
    assert teacher.first_batch is not None, "check_first_batch comes first"
    together, count = teacher.first_batch[1], len(items)
    rows = _rows_of(teacher, items)
    teacher.check_rows(len(together), int(rows[-1]))
    if count < 2:
        return
    before = teacher.autocast, teacher.compute_dtype
    try:
        if teacher.autocast is not None:
            together = _without_autocast(teacher, together)
        order, apart = _in_another_composition(teacher, items)
        taken = [torch.arange(int(rows[i]), int(rows[i + 1])) for i in order]
        _check_alike(teacher, together[torch.cat(taken).to(together.device)], apart)
    finally:
        teacher.autocast, teacher.compute_dtype = before


def _rows_of(teacher: Teacher, items: Sequence[Any]) -> list[int]:
    """Where the rows of each sample begin, and where the last one's end."""
    return [0, *accumulate(1 if teacher.index is None else _rows_of_item(item) for item in items)]


def _rows_of_item(item: Any) -> int:
    return len(item.listed) if isinstance(item, Tokens) else len(item)


def _without_autocast(teacher: Teacher, logits: Tensor) -> Tensor:
    """Those of the first batch without autocast, of which less is rounding; left as it is where the module needs it."""
    assert teacher.first_batch is not None
    autocast, teacher.autocast = teacher.autocast, None
    try:
        return teacher.answers(teacher.first_batch[0])
    except TeacherError:
        teacher.autocast = autocast
        return logits


def _in_another_composition(teacher: Teacher, items: Sequence[Any]) -> tuple[list[int], Tensor]:
    """The logits of the first batch's samples in an order of two halves, and that order."""
    count = len(items)
    order = list(range(count))[::-1]
    if isinstance(items[0], Tokens):
        order.sort(key=lambda i: len(items[i]))
    elif has_vocabulary(items[0]):
        order.sort(key=lambda i: len("".join(items[i])))
    halves = order[: count // 2], order[count // 2 :]
    try:
        return order, torch.cat([teacher.answers(teacher.collated([items[i] for i in half])) for half in halves])
    except TeacherError:  # made for batches of one size: as many samples, half of them, each twice
        order = (halves[1] * 2)[:count]
        return order, teacher.answers(teacher.collated([items[i] for i in order]))


def _check_alike(teacher: Teacher, together: Tensor, apart: Tensor) -> None:
    teacher.check_rows(len(apart), len(together))
    if teacher.has_classes and teacher.output != "logits":  # logarithms of the smallest probabilities are all rounding
        together, apart = ((v.sigmoid() if teacher.multi_label else v.exp()) for v in (together, apart))
    known = (together.isfinite() & apart.isfinite()).all(dim=1)
    together, apart = together[known], apart[known]
    if not together.numel():
        return
    largest = float(together.abs().amax())
    scale = max(1.0, largest) if teacher.has_classes else largest  # an embedding may be small throughout
    differences = (together - apart).abs().amax(dim=1)
    others = int((differences > _tolerance(teacher) * scale).sum())
    if others > FEW_ROWS * len(together):
        raise TeacherError(
            f"teacher {teacher.name!r} gives other {teacher.output} for the same samples in another batch: {others} of "
            f"{len(together)} differ, by up to {float(differences.max()):.3g} where the largest is {scale:.3g}"
            + place_of(teacher.function),
            tip="its logits must depend on the sample alone: BatchNorm with running statistics, nothing sorted or "
            "normalised across the batch, padding masked, nothing random in its collate",
        )


def _tolerance(teacher: Teacher) -> float:
    """Of the largest logit."""
    network = teacher.network
    halves = [teacher.autocast, *(p.dtype for p in (network.parameters() if isinstance(network, nn.Module) else ()))]
    if torch.bfloat16 in halves:
        return HALF_APART[torch.bfloat16]
    return HALF_APART[torch.float16] if torch.float16 in halves or teacher.device.type != "cpu" else FLOAT32_APART

"""A scalar over training: constant, step, cosine, each with a linear warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from softcache.errors import ConfigError, nearest

SCHEDULES = ("constant", "step", "cosine")


def check_schedule(name: str) -> None:
    """ConfigError with near names for an unknown schedule."""
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}", tip=nearest(name, SCHEDULES))


def scheduled(
    name: str,
    epoch: float,
    epochs: float,
    *,
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """The factor on the base value at a point of training.

    Args:
        name: "constant" = 1; "step" = gamma per passed milestone; "cosine" = from 1 to 0 over the epochs after warm-up.
        epoch: position, in epochs, fractions allowed (0 = before the first step).
        epochs: total length.
        warmup_epochs: linear from 0 at the start to the schedule's own value at its end.
        milestones, gamma: of "step", in epochs.
    """
    check_schedule(name)
    if warmup_epochs and epoch < warmup_epochs:
        reached = scheduled(
            name, warmup_epochs, epochs, warmup_epochs=warmup_epochs, milestones=milestones, gamma=gamma
        )
        return reached * epoch / warmup_epochs
    if name == "step":
        return float(gamma ** sum(epoch >= m for m in milestones))
    if name == "cosine":
        done = (epoch - warmup_epochs) / max(1e-12, epochs - warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0

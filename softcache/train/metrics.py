"""An epoch's row of metrics; which epoch is the best so far, and when a stage no longer gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softcache.losses.schedules import Moment
from softcache.train.batches import views_of
from softcache.train.checkpoint import Progress
from softcache.train.session import LiveStage, Prepared


def epoch_row(prepared: Prepared, live: LiveStage, progress: Progress, moment: Moment) -> dict[str, Any]:
    """What an epoch was and the means of its terms over all ranks, before it is evaluated.

    Args:
        moment: of its last step.
    """
    seen, ranks = len(progress.metrics), prepared.ranks
    row: dict[str, Any] = {"epoch": seen} | ({"stage": live.number} if len(prepared.stages) > 1 else {})
    row["lr"] = live.trained.optimizer.param_groups[0]["lr"]
    row["view"] = views_of(seen, prepared.material.cache, prepared.config)[0]
    row |= live.objective.scalars(moment)
    sums = {name: ranks.total(value).item() for name, value in progress.sums.items()}
    return row | {name: value / ranks.size / prepared.steps for name, value in sums.items()}


def is_best(row: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an epoch that was evaluated is better than all before it."""
    return "eval_top1" in row and all((row["eval_top1"] or 0) > (other.get("eval_top1") or 0) for other in past)


def is_stale(metrics: Sequence[Mapping[str, Any]], patience: int | None, stage: int) -> bool:
    """Whether the best evaluation of a stage is `patience` epochs old."""
    if patience is None:
        return False
    scores = [row.get("eval_top1") or 0.0 for row in metrics if row.get("stage", 0) == stage]
    return len(scores) - 1 - scores.index(max(scores)) >= patience

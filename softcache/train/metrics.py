"""An epoch's row of metrics; which epoch is the best so far, and when a stage no longer gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.files.inside import RUN, is_inside
from softcache.losses.schedules import Moment
from softcache.train.batches import views_of
from softcache.train.checkpoint import Progress
from softcache.train.run_folder import BEST
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
    row |= {} if prepared.masks is None else {"sparsity": prepared.masks.sparsity}
    row |= {} if prepared.quantising is None else {"int8": int(live.number >= prepared.quantising.first)}
    sums = {name: ranks.total(value).item() for name, value in progress.sums.items()}
    return row | {name: value / ranks.size / prepared.steps for name, value in sums.items()}


# the first of an epoch's row that there is
SCORES = ("eval_span_f1", "eval_top1", "eval_nearest_neighbour", "eval_cosine", "eval_r2", "eval_r2_teacher")


def score_of(row: Mapping[str, Any]) -> float | None:
    """What an epoch is judged by; None where it was not evaluated, or where nothing could be counted."""
    score = next((row[name] for name in SCORES if row.get(name) is not None), None)
    return None if score is None or math.isnan(score) else float(score)


def best_epoch(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Which of the epochs that were evaluated was the best, of equal ones the first; None where none was evaluated.

    Of a student that loses weights on the way, only epochs in which it had lost as many as ever are compared; of one that becomes
    int8, only those in which it was.
    """
    scores = {
        place: (row.get("int8", 0), row.get("sparsity", 0.0), score)
        for place, row in enumerate(metrics)
        if (score := score_of(row)) is not None
    }
    return max(scores, key=scores.__getitem__, default=None)


def is_stale(metrics: Sequence[Mapping[str, Any]], patience: int | None, stage: int) -> bool:
    """Whether the best evaluation of a stage is `patience` epochs old; never where none could be counted."""
    own = [row for row in metrics if row.get("stage", 0) == stage]
    best = best_epoch(own)
    return patience is not None and best is not None and len(own) - 1 - best >= patience


@dataclass(frozen=True)
class Kept:
    """Which student a finished run keeps.

    Attributes:
        epoch: after which it was so, counted from 0 over all stages.
        path: of its weights; None: those that the run ended with.
        told: why it is not the best, where the best was asked for; else empty.
    """

    epoch: int
    path: str | None = None
    told: str = ""


def kept_student(out: Path, metrics: Sequence[Mapping[str, Any]], keep: str) -> Kept:
    """The best of the epochs that were evaluated where `keep` asks for it and there is one, else the last.

    Raises:
        TrainingError: something else lies where its weights should, such as a link.
    """
    last, best = len(metrics) - 1, best_epoch(metrics)
    if keep != "best":
        return Kept(last)
    if best is None:
        return Kept(last, told="--keep best: no evaluation could count anything; the last epoch's student is kept")
    if not is_inside(out, BEST, RUN):
        return Kept(last, told=f"{out / BEST}: is not there; the last epoch's student is kept, the best was {best}")
    return Kept(best, str(out / BEST))

"""A run as it is prepared, under way, and in one of its stages."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from softcache.config import TrainConfig
from softcache.data.loading import LoadedBatch, Pair, epoch_order, load_batches
from softcache.data.transfer_set import TransferSet
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.measure import evaluate
from softcache.losses.schedules import Moment
from softcache.machine import autocast_dtype, pick_workers
from softcache.models import Initialised, Model
from softcache.models.masks import Masks
from softcache.report.progress import Meter
from softcache.train.batches import Material, views_of, visits
from softcache.train.checkpoint import Progress, Trained, random_states, restore_random_states
from softcache.train.objective import Objective
from softcache.train.pairs import Student
from softcache.train.quantising import Quantising
from softcache.train.ranks import Ranks
from softcache.train.stages import Stage
from softcache.train.stop import Asked, Stop
from softcache.train.tensorboard import Board


@dataclass(frozen=True)
class Prepared:
    """A run with everything made and checked, and nothing learned or written yet.

    Attributes:
        material: the data, joined with the cache.
        model, initialised: the student, and what was taken from other weights (None: nothing).
        sample: two samples, collated, on the CPU.
        student: the student as its terms see it; None where no term looks into it.
        objectives: of each stage.
        term_modules: what the terms of all stages learn or remember.
        fixed: parameters of the student that are frozen for good.
        average: of the student's weights; None without --ema.
        masks: of the student's weights that are held at zero; None where no stage has any.
        quantising: how the student's layers become int8; None where they stay floats.
    """

    config: TrainConfig
    stages: list[Stage]
    device: torch.device
    ranks: Ranks
    quiet: bool
    material: Material
    model: Model
    initialised: Initialised | None
    sample: Any
    student: Student | None
    objectives: list[Objective]
    term_modules: nn.ModuleList
    fixed: list[str]
    average: AveragedModel | None
    masks: Masks | None
    quantising: Quantising | None

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def kept(self) -> Model:
        """The student whose weights are evaluated and saved."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    @property
    def both(self) -> list[Model]:
        """The student that learns, and its average, if there is one."""
        return [self.model] if self.average is None else [self.model, self.kept]

    def saved(self, stage: int) -> Model:
        """The kept student as it is saved after an epoch of a stage."""
        return self.kept if self.quantising is None else self.quantising.fixed(self.kept, stage)

    @cached_property
    def count(self) -> int:
        return len(self.material.transfer_set)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.count // self.config.batch_size)

    @property
    def autocast(self) -> torch.dtype | None:
        return autocast_dtype(self.config.autocast, self.device)

    @property
    def workers(self) -> int:
        return pick_workers(self.config.workers, self.device)

    def measure(self, data: TransferSet) -> Evaluation:
        """How good the kept student is."""
        policy = self.material.policy.for_evaluation()
        beside = self.material.beside
        return evaluate(
            self.kept, data, policy=policy, device=self.device, workers=self.workers, autocast=self.autocast,
            joined=None if beside is None else beside.joined, weights=None if beside is None else {beside.member: 1.0},
        )  # fmt: skip


@dataclass
class Session:
    """A run under way.

    Attributes:
        progress: where it stands.
        saved: what to put back first; empty: nothing.
        evaluation: the last one.
        stop: the signals that ask it to.
    """

    prepared: Prepared
    progress: Progress
    saved: dict[str, Any]
    board: Board | None = None
    evaluation: Evaluation | None = None
    stop: Stop = field(default_factory=Stop)

    @cached_property
    def meter(self) -> Meter:
        """How far the run is, in steps over all its epochs."""
        prepared, progress = self.prepared, self.progress
        total = prepared.steps * sum(stage.config.epochs for stage in prepared.stages)
        done = prepared.steps * len(progress.metrics) + progress.step
        return Meter(f"train {prepared.out}", total, unit="steps", done=done, quiet=prepared.quiet)

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        done, step = len(self.progress.metrics), self.progress.step
        return f"in epoch {done + 1} after step {step} of {self.prepared.steps}" if step else f"after epoch {done}"

    @cached_property
    def batches(self) -> Generator[LoadedBatch]:
        """This rank's share of every batch that is left of the run, by the same workers up to its end.

        What an epoch visits depends on how many were before it, and not on the stage: one that ends early changes nothing.
        """
        prepared = self.prepared
        viewed = prepared.material.viewed([prepared.model.input.collate])
        pin = prepared.device.type == "cuda"
        return load_batches(viewed, self._visits(), workers=prepared.workers, pin_memory=pin)

    def _visits(self) -> Iterator[list[Pair]]:
        prepared, config = self.prepared, self.prepared.config
        first, start = len(self.progress.metrics), self.progress.step
        for seen in range(first, sum(stage.config.epochs for stage in prepared.stages)):
            order = epoch_order(prepared.count, config.seed, seen)
            views = views_of(seen, prepared.material.cache, config)
            yield from visits(order, views, config.batch_size, prepared.ranks, start=start if seen == first else 0)


@dataclass(frozen=True)
class LiveStage:
    """A stage under way.

    Attributes:
        learner: student and objective, over all ranks.
        trained: everything whose state goes from step to step.
        learned: the parameters that learn.
    """

    number: int
    stage: Stage
    objective: Objective
    learner: nn.Module
    trained: Trained
    learned: list[nn.Parameter]


def bytes_of(prepared: Prepared) -> int:
    """What a run needs on the disk at most: a checkpoint beside the next one, and its students."""
    config = prepared.config
    weights, own, averaged = (
        sum(tensor.nbytes for tensor in one.state_dict().values()) if one is not None else 0
        for one in (prepared.model.net, prepared.term_modules, prepared.average)
    )
    states = {"sgd": 1 if config.momentum else 0}.get(config.optimizer, 2)  # of the optimiser, for each weight
    held = 0 if prepared.masks is None else prepared.masks.nbytes
    checkpoint = (1 + states) * (weights + own) + averaged + held
    return 2 * checkpoint + weights * (2 if config.keep == "best" else 1)


def epoch_batches(session: Session, live: LiveStage) -> Iterator[tuple[LoadedBatch, Moment, int]]:
    """This rank's share of each batch that is left of an epoch, when it comes, and the step's number over all epochs."""
    prepared, progress, seen = session.prepared, session.progress, len(session.progress.metrics)
    for step in range(progress.step, prepared.steps):
        # without workers it is rendered here, by code that may draw from the random states that a checkpoint keeps
        with nullcontext() if prepared.workers else session.stop.held():
            loaded = next(session.batches)
        moment = Moment(progress.epoch, step, prepared.steps, live.stage.config.epochs)
        yield loaded, moment, seen * prepared.steps + step


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        path: its folder, with `student.safetensors`.
        metrics: one row per epoch, as in metrics.jsonl.
        evaluation: of the student that is kept; None without evaluation data.
        parameters: how many numbers the student has.
        kept_epoch: after which epoch the student that is kept was so, counted from 0 as in `metrics`.
    """

    path: Path
    metrics: list[dict[str, Any]]
    evaluation: Evaluation | None
    parameters: int
    kept_epoch: int


def evaluated(session: Session, eval_set: TransferSet) -> Evaluation:
    """How good the kept student is, by the first rank; `Asked` on all ranks where that one was asked to stop meanwhile."""
    prepared, ranks, stop = session.prepared, session.prepared.ranks, session.stop
    found, states = None, random_states()
    if ranks.first:
        try:
            with stop.opened():
                found = prepared.measure(eval_set)
        except Asked:
            restore_random_states(states)  # as they are where a run that goes on here begins to evaluate
    found, asked = ranks.agree((found, stop.asked))
    if found is None:
        stop.asked = asked
        raise Asked
    return found

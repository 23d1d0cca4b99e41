"""Training as `train.run` does it, for tests that look at each step or break off between two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from softcache.config import TrainConfig
from softcache.data.transfer_set import TransferSet
from softcache.evaluate.evaluation import Evaluation
from softcache.machine import pick_device
from softcache.train import TrainResult, flow
from softcache.train.refuse import check
from softcache.train.run_folder import claim_folder, only_writer
from softcache.train.session import Prepared, Session

StepFunction = Callable[..., Any]


def some_in_the_quick_tier(values: Sequence[int]) -> list[Any]:
    """Rows of a test that is the same at each of many places: the first and a middle one are quick, all others slow."""
    quick = (values[0], values[len(values) // 2])
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


def run_with(
    config: TrainConfig,
    *,
    step: StepFunction | None = None,
    measure: Callable[[], Evaluation] | None = None,
    look: Callable[[Prepared], None] | None = None,
) -> TrainResult:
    """`train.run` with something else in the place of its step or its evaluation, and a look at what was prepared."""
    check(config)
    with flow.joined_ranks(pick_device(config.device)) as ranks, only_writer(claim_folder(config), ranks):
        prepared = flow.prepare(config, ranks)
        if measure is not None:
            prepared = measured_by(prepared, measure)
        if look is not None:
            look(prepared)
        session: Session = flow.begin(prepared, flow.rehearse(prepared))
        with closing(session.batches), session.stop:
            for live in flow.stages_to_do(session):
                while session.progress.epoch < live.stage.config.epochs:
                    flow.one_epoch(session, live, step=step)
        return flow.finish(session)


def measured_by(prepared: Prepared, measure: Callable[[], Evaluation]) -> Prepared:
    """The same run, whose evaluations are made up."""

    class Measured(Prepared):
        def measure(self, data: TransferSet) -> Evaluation:
            return measure()

    return Measured(**{field.name: getattr(prepared, field.name) for field in fields(prepared)})


@contextmanager
def at_each_save(call: Callable[[Path, Any], None], *, before: bool = False) -> Iterator[None]:
    """Whenever a run saves its progress, `call(run folder, what is trained)` after it, or before; it may break the run off."""
    original = flow.save_progress

    def noted(out: Path, trained: Any, *rest: Any) -> None:
        if before:
            call(out, trained)
        original(out, trained, *rest)
        if not before:
            call(out, trained)

    with mock.patch.object(flow, "save_progress", noted):
        yield


@contextmanager
def stopped_after(saves: int) -> Iterator[None]:
    """A run breaks off when it has saved its progress that often."""
    calls = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == saves:
            raise KeyboardInterrupt

    with at_each_save(counted):
        yield

"""--more-epochs: a run becomes one of more epochs, equal to one that was given them from the start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from softcache.config import TrainConfig
from softcache.errors import ConfigError, TrainingError
from softcache.losses.schedules import Schedule
from softcache.train.checkpoint import Progress
from softcache.train.metrics import best_epoch, is_stale
from softcache.train.run_folder import RUN, claim_folder, holds_run_of
from softcache.train.session import Prepared
from softcache.train.stages import Stage, parse_stages

_EPOCHS = re.compile(r"""(?<!\S)(["']?)epochs=[^\s"']+\1""")  # in a line of settings


def claimed(config: TrainConfig) -> TrainConfig:
    """The settings of the run that is to be in the folder; errors as `claim_folder` and `lengthened` raise them."""
    if config.more_epochs is not None:
        return lengthened(replace(config, more_epochs=None), config.more_epochs)
    claim_folder(config)
    return config


def lengthened(config: TrainConfig, more: int) -> TrainConfig:
    """The settings of the run that `--more-epochs` makes of the one in the folder: its last stage has so many more.

    The same command, given again, means the same run: one that was interrupted goes on.

    Raises:
        ConfigError: there is no run, or what it does in an epoch depends on how many there are.
        TrainingError: the folder holds a run with other settings.
    """
    out, last = Path(config.out), parse_stages(config)[-1]
    before, total = last.config.epochs, last.config.epochs + more
    if config.stage:
        longer = replace(config, stage=(*config.stage[:-1], _with_epochs(config.stage[-1], total)))
    else:
        longer = replace(config, epochs=total)
    if not (out / RUN).exists():
        raise ConfigError(f"--more-epochs {more}: {out} holds no run that could go on", tip=f"give --epochs {total}")
    if holds_run_of(out, longer):
        return longer
    claim_folder(config)
    for what, schedule in _schedules(last):
        if schedule.follows_length:
            raise ConfigError(
                f"--more-epochs {more}: {what}, {schedule.text}, depends on how many epochs there are: {before} of it are not "
                f"the first {before} of {total}",
                tip=f"train {total} epochs into another --out, or a new run that begins at this student: --init-from {out}; "
                "constant, step and piecewise schedules go on, and others with until=",
            )
    return longer


def _with_epochs(settings: str, epochs: int) -> str:
    """A stage's line of settings, with another number of epochs."""
    text, found = _EPOCHS.subn(f"epochs={epochs}", settings)
    return text if found else f"{settings} epochs={epochs}".strip()


def _schedules(stage: Stage) -> Iterator[tuple[str, Schedule]]:
    """Everything in a stage that may change with its epochs, each with its name in words."""
    yield "the learning rate's schedule", stage.factor
    if stage.pruning is not None and stage.pruning.schedule is not None:
        yield stage.pruning.schedule
    for term in stage.terms:
        yield f"the weight of loss {term.name!r}", term.weight
        for key, value in term.settings.items():
            if isinstance(value, Schedule):
                yield f"{key} of loss {term.name!r}", value


def as_in_the_longer(progress: Progress, prepared: Prepared) -> None:
    """Let a run that was lengthened stand where one of this length would stand after as many epochs.

    Raises:
        TrainingError: where that cannot be known: it ended early, or kept the best of other epochs.
    """
    config, metrics, out = prepared.config, progress.metrics, prepared.out
    last = prepared.stages[-1].config
    if progress.stage + 1 < len(prepared.stages) or not 0 < progress.epoch < last.epochs or progress.step:
        return  # at its end, or under way
    again = f"train {last.epochs} epochs into another --out"
    if len(metrics) % config.eval_every and "eval_top1" in metrics[-1]:  # evaluated only for being the last
        if config.keep == "best" and best_epoch(metrics) == len(metrics) - 1:
            raise TrainingError(
                f"{out}: the best student is that of the last epoch, which --eval-every {config.eval_every} alone would not "
                "have evaluated; a longer run would have kept another one",
                tip=f"{again}, or lengthen runs of a multiple of --eval-every",
            )
        metrics[-1] = {name: value for name, value in metrics[-1].items() if not name.startswith("eval_")}
    if "eval_top1" in metrics[-1] and is_stale(metrics, last.patience, progress.stage):
        raise TrainingError(
            f"{out}: --patience {last.patience} ended this run after epoch {len(metrics)}, and would end a longer one there",
            tip=f"train with more --patience into another --out, or begin a new run at this student: --init-from {out}",
        )

"""Save and resume a training run exactly: weights, optimiser, position, metrics and every random state."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from softcache.errors import SoftcacheError, TrainingError
from softcache.files import durable
from softcache.files.inside import RUN, is_inside, open_inside
from softcache.models.masks import Masks
from softcache.models.seal import FORMAT, check_digest, check_format, digest, refuse_stretched
from softcache.train.ranks import Ranks
from softcache.version import __version__

CHECKPOINT = "checkpoint.pt"
# what each optimiser keeps of a parameter that it has moved
STATE = {
    "SGD": {"momentum_buffer"},
    "Adam": {"step", "exp_avg", "exp_avg_sq"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
}


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        stage: counted from 0.
        epoch: of the stage, the next to be done or to be gone on with.
        step: of the epoch, the next to be done.
        sums: running sums of the epoch's values on this rank.
        metrics: one row per finished epoch, over all stages.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """Everything whose state a run carries from step to step.

    Attributes:
        net: of the student.
        term_modules: what the terms of all stages learn or remember.
        optimizer: of the current stage.
        scaler: of gradients in half precision.
        average: of the student's weights, where one is kept.
        masks: of those that are held at zero, where some stage has any.
    """

    net: nn.Module
    term_modules: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None = None
    masks: Masks | None = None

    def named(self) -> dict[str, Any]:
        """By their names in a checkpoint."""
        named = {"parts" if name == "term_modules" else name: value for name, value in vars(self).items()}
        return {name: value for name, value in named.items() if value is not None}


def read_progress(out: Path, ranks: Ranks) -> tuple[Progress, dict[str, Any]]:
    """Where to go on, and the states to put back by `restore`; the beginning, and none, where there is no checkpoint.

    Raises:
        TrainingError: the checkpoint cannot be read, or is of another number of processes.
    """
    path = out / CHECKPOINT
    if not is_inside(out, CHECKPOINT, RUN):
        return Progress(), {}
    state = _load(out)
    try:
        if len(state["random"]) != ranks.size:
            raise TrainingError(
                f"{path}: was saved by {len(state['random'])} processes, these are {ranks.size}",
                tip="resume with as many: their random states belong to the run",
            )
        position = state.pop("progress")
        sums = position.pop("sums")[ranks.rank]
        progress = Progress(sums=sums, **position)
        _check_position(progress)
        return progress, state
    except (LookupError, TypeError, AttributeError) as exc:
        raise TrainingError(
            f"{path}: is no checkpoint of this version ({exc!r})", tip="delete it to start again"
        ) from None


def _check_position(progress: Progress) -> None:
    """TypeError for what no run saved."""
    counts = (progress.stage, progress.epoch, progress.step)
    if any(type(count) is not int or count < 0 for count in counts):
        raise TypeError(f"it stands at {counts}")
    if not isinstance(progress.metrics, list) or not all(map(_is_row, progress.metrics)):
        raise TypeError("its metrics are no rows")
    if (progress.stage or progress.epoch) and not progress.metrics:
        raise TypeError("it has epochs without metrics")
    sums = progress.sums
    if not isinstance(sums, dict) or not all(isinstance(one, Tensor) and one.numel() == 1 for one in sums.values()):
        raise TypeError("its sums are no numbers")


def _is_row(row: Any) -> bool:
    """Whether this is one epoch's row of metrics: numbers by name."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    return all(isinstance(name, str) and isinstance(value, int | float | None) for name, value in row.items())


def restore(out: Path, trained: Trained, state: dict[str, Any], ranks: Ranks) -> None:
    """Put back what `save_progress` saved, and every random state; TrainingError where it does not fit."""
    path = out / CHECKPOINT
    own = [dict(group) for group in trained.optimizer.param_groups]
    try:
        for name, value in trained.named().items():
            if name not in state:
                raise LookupError(f"it holds no {name}")
            value.load_state_dict(state[name])
        _check_optimizer(trained.optimizer, own)
        restore_random_states(state["random"][ranks.rank])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as exc:
        raise TrainingError(f"{path}: does not fit this student: {exc}", tip="choose another --out") from None


def _check_optimizer(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]]) -> None:
    """TypeError or ValueError for a state that its next step would stumble over.

    Args:
        own: its groups as they were made.
    """
    for group, made in zip(optimizer.param_groups, own, strict=True):
        for name in (group.keys() & made.keys()) - {"params", "lr"}:
            if not _alike(group[name], made[name]):
                raise TypeError(f"the optimiser's {name} is {str(group[name])[:40]!r}")
    kept = STATE[type(optimizer).__name__]
    for parameter, state in optimizer.state.items():
        if not kept <= state.keys() | {"momentum_buffer"}:
            raise ValueError(f"the optimiser's state has no {', '.join(kept - state.keys())}")
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"the optimiser's {name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")


def _alike(one: Any, other: Any) -> bool:
    """Whether two settings are of one type, numbers among numbers."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    numbers = (int, float)
    return type(one) is type(other) or (isinstance(one, numbers) and isinstance(other, numbers))


def save_progress(out: Path, trained: Trained, progress: Progress, ranks: Ranks) -> None:
    """The run as it stands; called by all ranks, written by the first. After a crash there is the old file or the new one."""
    sums = {name: value.cpu() for name, value in progress.sums.items()}
    every_sums, every_random = ranks.everyone(sums), ranks.everyone(random_states())
    if not ranks.first:
        return
    state = {name: value.state_dict() for name, value in trained.named().items()}
    state |= {"progress": {**vars(progress), "sums": every_sums}, "random": every_random}
    state |= {"format": FORMAT, "softcache": __version__}
    state["digest"] = digest(state)
    with durable.written_aside(out / CHECKPOINT) as file, durable.streamed(file) as stream:
        torch.save(state, cast(IO[bytes], stream))


def _load(out: Path) -> dict[str, Any]:
    """Read a checkpoint: data only, never code, and only as it was saved."""
    path = out / CHECKPOINT
    try:
        with os.fdopen(open_inside(out, CHECKPOINT, RUN), "rb") as file:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except SoftcacheError:
        raise
    except Exception as exc:  # unpickling bytes that are no pickle can raise almost anything
        # torch's own message for a file that is not plain data proposes to load it with code and all
        reason = "" if isinstance(exc, pickle.UnpicklingError) else f": {exc}"
        raise TrainingError(
            f"{path}: cannot be read as a checkpoint ({type(exc).__name__}{reason})",
            tip="delete it to start the run again",
        ) from None
    if not isinstance(state, dict):
        raise TrainingError(f"{path}: is no checkpoint", tip="delete it to start the run again")
    refuse_stretched(state, path.stat().st_size, path, TrainingError)
    found = state.pop("digest", None)
    check_format(state.get("format"), path, state.get("softcache"), TrainingError)
    check_digest(found, state, path, TrainingError, sealed="format" in state or "softcache" in state)
    return {name: value for name, value in state.items() if name not in ("format", "softcache")}


def seed_all(seed: int) -> None:
    """Seed torch's, NumPy's and Python's global generators: a transform or a network of the user's may draw from any."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's global generators, as plain data."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))

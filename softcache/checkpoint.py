"""Save and resume a training run exactly: weights, optimiser, position, metrics and every random state."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.errors import TrainingError
from softcache.models import Model

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; after a crash there is the old checkpoint or the new one."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        torch.save(state | {"random": random_states()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint (data only, never code) and restore the random states; TrainingError if it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        restore_random_states(state.pop("random"))
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, ValueError, TypeError) as exc:
        # torch's own message for a file that is not plain data proposes to load it with code and all
        reason = "" if isinstance(exc, pickle.UnpicklingError) else f": {exc}"
        raise TrainingError(
            f"{path}: cannot be read as a checkpoint ({type(exc).__name__}{reason})",
            tip="delete it to start the run again",
        ) from None
    return state


def resume_run(
    out: Path, model: Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> dict[str, Any]:
    """Where to go on: the checkpoint's state put back, or the beginning."""
    path = out / CHECKPOINT
    if not path.is_file():
        return {"epoch": 0, "step": 0, "sums": {}, "metrics": []}
    state = load_checkpoint(path)
    try:
        model.net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as exc:
        raise TrainingError(f"{path}: does not fit this student: {exc}", tip="choose another --out") from None
    scaler.load_state_dict(state["scaler"])
    return state


def save_run(
    out: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
    step: int,
    sums: dict[str, Tensor],
    metrics: list[dict[str, Any]],
) -> None:
    """The run as it stands before `step` of `epoch`, with the running sums and metrics that lead there."""
    state = {
        "epoch": epoch,
        "step": step,
        "sums": {name: value.cpu() for name, value in sums.items()},
        "metrics": metrics,
        "model": model.net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    save_checkpoint(out / CHECKPOINT, state)


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
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))

"""A user's file with a small convolutional student and teacher, caches of its data, and runs in one call."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import WORLDS
from safetensors.torch import load_file
from training import run_with

from softcache import dump
from softcache.config import DumpConfig, TrainConfig
from softcache.train import TrainResult, flow

CACHES: dict[str, dict[str, Any]] = {
    "plain": {
        "policy": ("shift:pixels=1",),
        "features": ("early:map", "late:map", "late:pool", "late:flatten"),
        "views": 2,
    },
    "four": {"policy": ("shift:pixels=1",), "views": 4},
    "mixed": {"policy": ("mixup:alpha=1",)},
    "embedding": {"teacher": "teacher?output=embedding", "whiten": True},
}


class World:
    """pieces.py, caches made of it when they are first asked for, and runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.copy(WORLDS / "small_conv.py", path / "pieces.py")

    def spec(self, name: str) -> str:
        return f"{self.path}/pieces.py:{name}"

    def cache(self, name: str) -> str:
        """One of CACHES, of float32 logits."""
        out = self.path / name
        if not out.exists():
            settings = {"teacher": "teacher", **CACHES[name]}
            made = DumpConfig(
                data=self.spec("toy"),
                teacher=(self.spec(settings.pop("teacher")),),
                out=str(out),
                codec="float32",
                threads=1,
                device="cpu",
                **settings,
            )
            dump.run(made, quiet=True)
        return str(out)

    def config(self, out: Path, *losses: str, **settings: Any) -> TrainConfig:
        """By default one epoch of three steps of plain SGD; `cache` is one of CACHES, or None."""
        given: dict[str, Any] = {
            "data": self.spec("toy"),
            "student": self.spec("net"),
            "cache": "plain",
            "loss": losses,
            "batch_size": 128,
            "epochs": 1,
            "optimizer": "sgd",
            "schedule": "constant",
            "lr": 0.05,
            "threads": 1,
            "device": "cpu",
        }
        given |= settings
        if given["cache"] is not None:
            given |= {"cache": self.cache(given["cache"]), "check_content": given.get("check_content", "none")}
        return TrainConfig(out=str(out), **given)

    def train(self, out: Path, *losses: str, **settings: Any) -> TrainResult:
        return flow.run(self.config(out, *losses, **settings), quiet=True)


def weights_of(out: Path, name: str = "student.safetensors") -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(out / name).items()}


# ---------------------------------------------------------------------------------------------------- what a run computed

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """What one optimiser step of one process began with and computed."""

    before: Arrays
    values: dict[str, float]
    gradients: Arrays
    after: Arrays  # buffers: banks, BatchNorm's statistics


@dataclass(frozen=True)
class Outcome:
    steps: list[Step]
    metrics: list[dict[str, Any]]


def arrays(state: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


def trained(config: TrainConfig, starts: Sequence[Arrays] | None = None) -> Outcome:
    """Train and note every step; each begins with the weights and banks in `starts`, where they are given."""
    steps: list[Step] = []

    def noted(prepared: Any, live: Any, *rest: Any) -> dict[str, torch.Tensor]:
        bare = getattr(live.learner, "module", live.learner)
        if starts is not None:
            start = {name: torch.from_numpy(value) for name, value in starts[len(steps)].items()}
            bare.load_state_dict(start)
        before = arrays(bare.state_dict())
        found: list[tuple[Arrays, Arrays]] = []

        def note(*_: Any) -> None:  # before the optimiser changes anything
            gradients = {name: p.grad for name, p in bare.named_parameters() if p.grad is not None}
            found.append((arrays(gradients), arrays(dict(bare.named_buffers()))))

        hook = live.trained.optimizer.register_step_pre_hook(note)
        values = flow.one_step(prepared, live, *rest)
        hook.remove()
        ((gradients, buffers),) = found
        steps.append(Step(before, {name: value.item() for name, value in values.items()}, gradients, buffers))
        return values

    result = run_with(config, step=noted)
    return Outcome(steps, result.metrics)


def relative(found: np.ndarray | float, wanted: np.ndarray | float) -> float:
    """Of the difference, in L2 norm."""
    size = float(np.linalg.norm(wanted))
    difference = float(np.linalg.norm(np.asarray(found, np.float64) - np.asarray(wanted, np.float64)))
    return difference / size if size else difference


def joined(named: Arrays) -> np.ndarray:
    """All of them as one vector."""
    return np.concatenate([named[name].ravel() for name in sorted(named)])

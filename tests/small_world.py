"""A user's file with a small convolutional student and teacher, caches of its data, and runs in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from training import run_with

from softcache import dump
from softcache.config import DumpConfig, TrainConfig
from softcache.train import TrainResult, flow

PIECES = '''
import os
import time

import numpy as np
import torch
from torch import nn


class Toy:
    """Images of which some have no label; those of the first half seldom have one."""

    class_names = ("ant", "bee", "cat", "dog", "eel")

    def __init__(self, count, seed, rare):
        draw = np.random.default_rng(seed)
        self.images = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        truth = self.images.reshape(count, 8, 8)[:, 0, :5].argmax(axis=1)
        known = draw.random(count) < (0.03 if rare else np.where(np.arange(count) < count // 2, 0.1, 0.9))
        self.labels = np.where(known, truth, -1)
        self.sample_keys = [f"toy/{i}" for i in range(count)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def toy(count: int = 301, seed: int = 0, rare: bool = False):
    return Toy(count, seed, rare)


def turned():
    """Two of the classes, the other way round."""
    made = Toy(300, 5, False)
    made.labels, made.class_names = np.arange(300) % 2, ("bee", "ant")
    return made


class Net(nn.Module):
    def __init__(self, width, num_classes, norm, dropout):
        super().__init__()
        self.pause_s = float(os.environ.get("STUDENT_PAUSE_S", "0"))
        wide, bias, normed = 2 * width, not norm, nn.BatchNorm2d if norm else nn.Identity
        self.early = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=bias), normed(width), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, wide, 3, 2, padding=1, bias=bias), normed(wide), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(wide, num_classes)

    def forward(self, images):
        if self.pause_s:
            time.sleep(self.pause_s)
        maps = self.late(self.early(images.reshape(-1, 1, 8, 8) - 0.5))
        return self.head(self.dropout(maps.mean(dim=(2, 3))))


def net(num_classes, norm: bool = False, dropout: float = 0.0):
    return Net(6, num_classes, norm, dropout)


def renamed(num_classes):
    """The same network, its layers below `body`."""
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net(6, num_classes, False, 0.0)

        def forward(self, images):
            return self.body(images)

    return Renamed()


def teacher(num_classes):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Net(8, num_classes, False, 0.0)
        nn.init.normal_(made.head.weight, std=5.0)
    return made
'''

CACHES: dict[str, dict[str, Any]] = {
    "plain": {
        "policy": ("shift:pixels=1",),
        "features": ("early:map", "late:map", "late:pool", "late:flatten"),
        "views": 2,
    },
    "four": {"policy": ("shift:pixels=1",), "views": 4},
    "mixed": {"policy": ("mixup:alpha=1",)},
}


class World:
    """pieces.py, caches made of it when they are first asked for, and runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "pieces.py").write_text(PIECES)

    def spec(self, name: str) -> str:
        return f"{self.path}/pieces.py:{name}"

    def cache(self, name: str) -> str:
        """One of CACHES, of float32 logits."""
        out = self.path / name
        if not out.exists():
            made = DumpConfig(
                data=self.spec("toy"),
                teacher=(self.spec("teacher"),),
                out=str(out),
                codec="float32",
                threads=1,
                device="cpu",
                **CACHES[name],
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
            "check_content": "none",
        }
        given |= settings
        if given["cache"] is not None:
            given["cache"] = self.cache(given["cache"])
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

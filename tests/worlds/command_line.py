"""Data, and teachers and students that are sound, fail, stop the process, or leave a mark where they run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

Function = Callable[[np.ndarray], np.ndarray]


class Toy:
    class_names: tuple[str, ...] = ("ant", "bee", "cat")

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(0)
        self.images, self.labels = draw.integers(0, 256, (count, 4, 4), dtype=np.uint8), draw.integers(0, 3, count)
        self.sample_keys = [f"toy/{i:03d}.png" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.labels[i]


def toy(count: int = 40) -> Toy:
    return Toy(count)


def four() -> Toy:
    """Of one class more."""
    made = Toy(40)
    made.class_names += ("dog",)
    return made


def keyless() -> Iterator[Any]:
    return iter(Toy(40))


def good() -> Function:
    return lambda batch: batch[:, :3] / 50


def nan() -> Function:
    return lambda batch: batch[:, :3] * np.float32("nan")


def wide() -> Function:
    return lambda batch: batch[:, :5]


def interrupted() -> Function:
    def run(batch: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    return run


def terminated() -> Function:
    def run(batch: np.ndarray) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # the signal arrives here
        return batch[:, :3]

    return run


def slow() -> Function:
    def run(batch: np.ndarray) -> np.ndarray:
        if len(list(Path.cwd().glob("caches/slow/members/slow/*.tmp*"))):
            (Path.cwd() / "writing").touch()
            time.sleep(0.2)
        return batch[:, :3] / 50

    return run


def needs_more() -> None:
    pass


def student(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))


class Slow(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(16, num_classes)

    def forward(self, batch: Tensor) -> Tensor:
        if self.training:
            (Path.cwd() / "training").touch()
            time.sleep(0.05)
        return self.fc(batch.flatten(1))


def slow_student(num_classes: int) -> Slow:
    return Slow(num_classes)

"""Teachers and data that fail when a file named `armed` says how; without it they are sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ARMED = Path(__file__).with_name("armed")


def armed() -> str:
    return ARMED.read_text() if ARMED.exists() else ""


class Images:
    class_names = ("ant", "bee", "cat", "dog")

    def __init__(self) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (600, 4, 4)).astype(np.uint8)
        self.labels = np.arange(600) % 4
        self.sample_keys = [f"toy/{i:04d}" for i in range(600)]

    def __len__(self) -> int:
        return 600

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        if armed() == "data raises" and i == 321:
            raise OSError("cannot identify image file")
        if armed() == "data changes" and i == 321:
            changed = ARMED.with_name("seen").exists()
            ARMED.with_name("seen").touch()
            return self.images[i] + np.uint8(changed), self.labels[i]
        if armed() == "data of another size" and i == 321:
            return self.images[i][:3], self.labels[i]
        return self.images[i], self.labels[i]


def images() -> Images:
    return Images()


class Net(nn.Module):
    """A linear layer over whole numbers; the 12th call and those behind it go wrong."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.layer.weight.data = torch.arange(64.0).reshape(4, 16).remainder(7) / 64
        self.layer.bias.data.zero_()
        self.register_buffer("seen", torch.zeros(1))
        self.calls = 0

    def collate(self, items: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1).float()

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        logits = self.layer(batch)
        how = armed() if self.calls >= 12 else ""
        if how == "nan":
            logits[3, 1] = float("nan")
        elif how == "fewer columns":
            logits = logits[:, :3]
        elif how == "fewer rows":
            logits = logits[:-1]
        elif how == "train mode":
            self.train()
        elif how == "learns":
            self.seen += 1
        elif how == "another output":
            logits = logits + 1
        elif how == "raises":
            raise KeyError("stage7")
        elif how == "no memory":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"
            )
        return logits


def teacher() -> Net:
    return Net()

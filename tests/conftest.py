"""Shared by the tests: a user's file with a small data set and small teachers, and a dump of them in one call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import softcache
from softcache import dump
from softcache.config import DumpConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; read when the hub's package is first imported

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # the workers share the cores, their children too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# every shard is synced to the disk: in memory, where there is room for it, that takes no time
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

TOY = '''
"""A user's file. Data: `{toy}:images?count=40`. Teachers: `{toy}:exact?seed=1`, `{toy}:network?seed=1`."""

from math import prod

import numpy as np
import torch
from torch import nn

CLASS_NAMES = ("ant", "bee", "cat", "dog")


class Images(torch.utils.data.Dataset):
    """Random 8 x 8 images with keys, labels and class names; no two are alike."""

    def __init__(self, count, seed, rgb, multi_label):
        draw = np.random.default_rng(seed)
        self.images = draw.integers(0, 256, (count, 8, 8, 3) if rgb else (count, 8, 8)).astype(np.uint8)
        self.labels = draw.integers(0, 2, (count, 4)).astype(bool) if multi_label else draw.integers(0, 4, count)
        self.sample_keys = [f"toy/{i:04d}" for i in range(count)]
        self.class_names = CLASS_NAMES

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].copy(), self.labels[i]


class Exact(nn.Module):
    """A linear teacher of whole numbers / 1024: exact in float32, so equal for any batch, order and thread count."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight).float() / 1024)

    def collate(self, items):
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])  # pixels as they are, 0..255

    def forward(self, batch):
        return batch.flatten(1).float() @ self.weight.T


def images(count: int = 40, seed: int = 0, rgb: bool = False, multi_label: bool = False):
    return Images(count, seed, rgb, multi_label)


def exact(num_classes, input_shape, seed: int = 0):
    return Exact(np.random.default_rng(seed).integers(-8, 9, (num_classes, prod(input_shape))))


def network(num_classes, input_shape, seed: int = 0, scale: float = 4.0, level: float = 0.0):
    """A network whose logits spread by about `scale` around `level`, and depend on the batch in their last bits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), 32), nn.Tanh(), nn.Linear(32, num_classes))
        nn.init.normal_(net[1].weight, std=0.3)
        nn.init.normal_(net[3].weight, std=scale / 32**0.5)
        nn.init.constant_(net[3].bias, level)
    return net
'''

QuickDump = Callable[..., softcache.Cache]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # everything here is tiny


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)  # whichever tests ran before, and in whichever worker


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's .py file: a data set and teachers, see TOY."""
    path = tmp_path_factory.mktemp("user") / "toy.py"
    path.write_text(TOY)
    return path


@pytest.fixture
def quick_dump(tmp_path: Path, toy: Path) -> QuickDump:
    """quick_dump(data=spec, teacher=[spec, ...], out=name, **settings) -> the opened cache; by default exact in float32."""

    def make(data: str = "", teacher: Sequence[str] = (), out: str = "cache", **settings: Any) -> softcache.Cache:
        settings = {"codec": "float32", "threads": 1, "workers": 0} | settings
        config = DumpConfig(
            data=data or f"{toy}:images",
            teacher=tuple(teacher) or (f"{toy}:exact",),
            out=str(tmp_path / out),
            **settings,
        )
        result = dump.run(config, quiet=True)
        return softcache.open(result.path)

    return make

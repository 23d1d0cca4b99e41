"""How a cache was made: what equal bytes depend on, and what is only good to know."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.provenance import read_provenance
from softcache.cache.write.shard import HDF5_VERSION
from softcache.config import DumpConfig, StorageOptions
from softcache.dump.progress import DumpProgress
from softcache.dump.teacher import Teacher
from softcache.machine import describe_device
from softcache.models.left_out import LeftOut
from softcache.version import __version__


def made_with(
    config: StorageOptions, device: torch.device, threads: int, batch_tokens: int | None = None
) -> dict[str, Any]:
    """What equal bytes depend on; `batch_tokens` where batches are made by it."""
    import PIL
    import torchvision

    return {
        "softcache": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "hdf5": HDF5_VERSION,
        "device": describe_device(device),
        "batch_size": config.batch_size,
        "threads": threads,
        "autocast": config.autocast,
        **({} if batch_tokens is None else {"batch_tokens": batch_tokens}),
    }


def told_of(teachers: Sequence[Teacher], left_out: Mapping[str, LeftOut]) -> dict[str, Any]:
    """What was told of the teachers while they were looked at; nothing where there was nothing to tell."""
    warnings = {teacher.name: teacher.warnings for teacher in teachers if teacher.warnings}
    lost = {name: one.to_json() for name, one in left_out.items()}
    chosen = {teacher.name: told for teacher in teachers if (told := getattr(teacher.network, "weights_told", ""))}
    seen = {teacher.name: teacher.told for teacher in teachers if teacher.told}
    named = (("warnings", warnings), ("left_out", lost), ("weights", chosen), ("tokens", seen))
    return {name: told for name, told in named if told}


def left_out_before(path: Path, rounds: int) -> dict[str, str]:
    """Member -> what it does not read of its texts, in words, as the rounds of a cache that is there tell it."""
    found: dict[str, str] = {}
    for number in range(rounds):
        told = read_provenance(path, number).get("left_out")
        for name, one in told.items() if isinstance(told, dict) else ():
            read = LeftOut.from_json(one)
            found |= {str(name): read.text()} if read is not None else {}
    return found


def provenance(config: DumpConfig, started: float, clock: DumpProgress) -> dict[str, Any]:
    """Times, host and speed: part of no id."""
    clock.close()
    return {
        "command": vars(config),
        "host": platform.node(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.monotonic() - started, 3),
        "views_per_s": round(clock.samples_per_s, 1),
        "python": platform.python_version(),
    }

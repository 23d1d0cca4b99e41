"""How a cache was made: what equal bytes depend on, and what is only good to know."""

from __future__ import annotations

import platform
import time
from typing import Any

import numpy as np
import torch

from softcache.cache.write.shard import HDF5_VERSION
from softcache.config import DumpConfig, StorageOptions
from softcache.dump.progress import DumpProgress
from softcache.machine import describe_device
from softcache.version import __version__


def made_with(config: StorageOptions, device: torch.device, threads: int) -> dict[str, Any]:
    """What equal bytes depend on."""
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
    }


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

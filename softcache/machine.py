"""Device, threads, workers and number types: what `auto` means, and what to call it."""

from __future__ import annotations

import os

import torch

from softcache.errors import ConfigError

HALF_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is this rank's GPU, or the CPU. ConfigError where it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}", tip="use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: torch finds no GPU here", tip="use --device cpu")
        if ":" not in name:  # this rank's own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)  # streams, events and pinned memory go by the current device
    return device


def pick_threads(wanted: int | None) -> int:
    """CPU threads for torch: as wanted, else the cores this process may use, shared among the local ranks."""
    if wanted is not None:
        if wanted < 1:
            raise ConfigError(f"--threads {wanted}: at least one is needed")
        return wanted
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def pick_workers(wanted: int | None, device: torch.device) -> int:
    """Loader processes: as wanted, else 0 on a CPU (the teacher needs the cores) and 4 with a GPU."""
    if wanted is not None:
        if wanted < 0:
            raise ConfigError(f"--workers {wanted}: cannot be negative")
        return wanted
    return min(4, len(os.sched_getaffinity(0))) if device.type == "cuda" else 0


def autocast_dtype(name: str) -> torch.dtype | None:
    return HALF_TYPES[name]


def describe_device(device: torch.device) -> str:
    """The kind of device that equal bytes depend on."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"

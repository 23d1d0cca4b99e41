"""Device, threads, workers, number types and precision: what `auto` means, and what to call it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.errors import ConfigError, warn_once

INT8_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
HALF_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is this rank's GPU, or the CPU. ConfigError where it does not exist, or is another kind."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}", tip="use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: softcache computes on cpu and cuda", tip="use --device cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: torch finds no GPU here", tip="use --device cpu")
        device = _own_gpu(name, device.index, torch.cuda.device_count())
        torch.cuda.set_device(device)  # streams, events and pinned memory go by the current device
    return device


def _own_gpu(name: str, index: int | None, count: int) -> torch.device:
    """The GPU of this rank among `count`; the only one that it sees may be that of each rank, under any number."""
    if count == 1 and index in (None, 0):
        return torch.device("cuda", 0)
    if index is None:
        if "LOCAL_RANK" not in os.environ and _number_of("WORLD_SIZE", 1) > 1:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} without a LOCAL_RANK: all ranks would take cuda:0 of {count} GPUs",
                tip="start them with torchrun; under SLURM set LOCAL_RANK to SLURM_LOCALID, or let each task see one GPU",
            )
        index = _number_of("LOCAL_RANK", 0)
        what = f"LOCAL_RANK is {index}"
    else:
        if _number_of("LOCAL_WORLD_SIZE", 1) > 1:
            raise ConfigError(
                f"--device {name}: all {os.environ['LOCAL_WORLD_SIZE']} ranks of this machine would take one of {count} GPUs",
                tip="use --device cuda: each rank takes its own",
            )
        what = f"--device {name}"
    if index >= count:
        raise ConfigError(
            f"{what}: there are {count} GPUs, numbered from 0",
            tip="start as many ranks as there are GPUs, or choose one of them with --device cuda:N",
        )
    return torch.device("cuda", index)


def _number_of(name: str, otherwise: int) -> int:
    """A whole number out of the environment."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r} in the environment, not a whole number", tip="unset it, or use torchrun")
    return int(text)


def pick_threads(wanted: int | None, *, shared: bool = True) -> int:
    """CPU threads for torch: as wanted; else as OMP_NUM_THREADS says; else the cores this process may use.

    Among several local ranks the cores are shared, and OMP_NUM_THREADS says nothing: torchrun sets it to 1.

    Args:
        shared: False where equal results must not depend on how many ranks there are: each then takes all cores.
    """
    if wanted is not None:
        if wanted < 1:
            raise ConfigError(f"--threads {wanted}: at least one is needed")
        return wanted
    ranks = _number_of("LOCAL_WORLD_SIZE", 1)
    asked = (
        os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    )  # a list is one number for each nested level
    if max(ranks, _number_of("WORLD_SIZE", 1)) == 1 and asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // (ranks if shared else 1))


def pick_workers(wanted: int | None, device: torch.device) -> int:
    """Loader processes: as wanted, else 0 on a CPU (the teacher needs the cores) and 4 with a GPU."""
    if wanted is not None:
        if wanted < 0:
            raise ConfigError(f"--workers {wanted}: cannot be negative")
        return wanted
    return min(4, len(os.sched_getaffinity(0))) if device.type == "cuda" else 0


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The half type that is asked for. Of a processor that cannot compute in it, it is said once that this takes long."""
    half = HALF_TYPES[name]
    if half is not None and device.type == "cpu" and not _computes_in(name):
        warn_once(
            f"--autocast {name}: this processor has no instructions for it ({torch.backends.cpu.get_cpu_capability()}), so that "
            "torch takes ten times as long as in float32, or longer; --autocast none is faster and more exact"
        )
    return half


def _computes_in(half: str) -> bool:
    """Whether torch's layers have kernels of a half type on this processor; True where torch does not tell."""
    told = getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", None)
    return told is None or bool(told())


def processor_flags() -> tuple[str, ...]:
    """Which of the instructions that int8 is computed with the processor says that it has; none where that is not told."""
    try:
        told = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    return tuple(flag for flag in INT8_FLAGS if flag in told)


def describe_device(device: torch.device) -> str:
    """The kind of device that equal bytes depend on."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}, {_cuda_arithmetic()}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _cuda_arithmetic() -> str:
    """cuDNN's version, and in what convolutions and matrix products of float32 are computed: TF32 is by default the former's."""
    settings = [getattr(part, "fp32_precision", None) for part in (_convolutions()[0], torch.backends.cuda.matmul)]
    if None in settings:  # before torch 2.9
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        settings = ["tf32" if flag else "ieee" for flag in flags]
    convolutions, products = ("ieee" if setting == "none" else setting for setting in settings)
    return f"cuDNN {torch.backends.cudnn.version()}, convolutions {convolutions}, products {products}"


def _convolutions() -> list[Any]:
    """What says in which precision float32 convolutions and recurrent layers are computed, from torch 2.9 on."""
    backends = (torch.backends.cudnn, torch.backends.mkldnn)
    return [getattr(backend, kind, None) for backend in backends for kind in ("conv", "rnn")]


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions and recurrent layers in here are computed in float32, without TF32; what was set before is put back."""
    newer = [part for part in _convolutions() if hasattr(part, "fp32_precision")]
    before = [part.fp32_precision for part in newer]
    flag = None if newer else torch.backends.cudnn.allow_tf32
    for part in newer:
        part.fp32_precision = "ieee"
    if flag is not None:
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        for part, precision in zip(newer, before, strict=True):
            part.fp32_precision = precision
        if flag is not None:
            torch.backends.cudnn.allow_tf32 = flag


@contextmanager
def as_fresh() -> Iterator[None]:
    """Torch as a fresh process has it: float32, tensors on the CPU, gradients, no autocast. Afterwards all is as it was.

    Put back are also the number of threads and the states of torch's, NumPy's and Python's global generators.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            if on_gpu:
                torch.cuda.set_rng_state_all(on_gpu)

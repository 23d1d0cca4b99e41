"""What a model costs: parameters, multiply-adds, bytes on disk, and time on this machine."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from softcache.models.weights import student_bytes
from softcache.students.samples import Samples

MOST_COMPRESSED, BLOCK = 2**25, 2**20  # bytes
SECONDS, RUNS = 0.5, 5  # of each timing: until so much time is gone, and at least so often


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: how many numbers it has learned; zeros: how many of them are 0.
        multiply_adds: of convolutions, matrix products, attention and recurrent layers, for one sample.
        nbytes, compressed: of its file, as it is and by zlib, which finds zeros.
        seconds_one, seconds_batch: median time for one sample, and for a batch.
    """

    parameters: int
    zeros: int
    multiply_adds: int
    nbytes: int
    compressed: int
    seconds_one: float
    seconds_batch: float


def cost_of(models: Sequence[Samples], batch_size: int) -> list[Cost]:
    """Of each model; their times are taken in turns, so that whatever else the machine does meets all of them."""
    ones = in_turns([lambda s=s: s.run(1) for s in models])  # type: ignore[misc]
    many = in_turns([lambda s=s: s.run(batch_size) for s in models])  # type: ignore[misc]
    return [_cost(samples, *seconds) for samples, *seconds in zip(models, ones, many, strict=True)]


def _cost(samples: Samples, one: float, many: float) -> Cost:
    parameters = list(samples.model.parameters())
    data = student_bytes(samples.model, {})
    return Cost(
        parameters=sum(parameter.numel() for parameter in parameters),
        zeros=sum(int((parameter == 0).sum()) for parameter in parameters),
        multiply_adds=multiply_adds(samples),
        nbytes=len(data),
        compressed=compressed(data),
        seconds_one=one,
        seconds_batch=many,
    )


def compressed(data: bytes) -> int:
    """How many bytes zlib makes of them; of many, judged by blocks that are spread over them."""
    if len(data) <= MOST_COMPRESSED:
        return len(zlib.compress(data, 6))
    begins = range(0, len(data) - BLOCK, len(data) // (MOST_COMPRESSED // BLOCK))
    return round(sum(len(zlib.compress(data[i : i + BLOCK], 6)) for i in begins) * len(data) / (len(begins) * BLOCK))


def multiply_adds(samples: Samples) -> int:
    """Of one sample, counted while the model runs on it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a kernel of its own, in which nothing is counted
    learning = [parameter for parameter in samples.model.parameters() if parameter.requires_grad]
    for (
        parameter
    ) in learning:  # torch's counter looks for the gradients of what a module takes, and a parameter has none here
        parameter.requires_grad_(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with _recurrent_counted(samples.model, counter) as missed:
                samples.run(1)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2 + sum(missed)


@contextmanager
def _recurrent_counted(model: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Multiply-adds of recurrent layers that the counter does not see, since some of torch's kernels are one operation to it."""
    missed: list[int] = []
    seen: list[int] = []

    def begin(_module: nn.Module, _args: Any) -> None:
        seen.append(counter.get_total_flops())

    def end(module: Any, args: Any, named: Any, _output: Any) -> None:
        given = args[0] if args else named["input"]
        missed.append(_recurrent(module, given) - (counter.get_total_flops() - seen.pop()) // 2)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                hooks.callback(module.register_forward_pre_hook(begin).remove)
                hooks.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        yield missed


def _recurrent(module: nn.RNNBase, given: Any) -> int:
    """Multiply-adds of an LSTM, a GRU or a plain one: its weights times what each step is given, and times its state."""
    steps = len(given.data) if isinstance(given, PackedSequence) else given.shape[:-1].numel()  # of all texts together
    return steps * sum(weight.numel() for weights in module.all_weights for weight in weights if weight.ndim == 2)


def in_turns(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The median seconds of each."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    began = time.monotonic()
    while len(times[0]) < RUNS or time.monotonic() - began < SECONDS * len(runs):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [median(taken) for taken in times]

"""Several processes that train one student: what each takes of a batch, and how their tensors come together.

Every process computes its share of a global batch, so that the result is that of one process at the same batch size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from softcache import signals
from softcache.errors import ConfigError, TrainingError

PATIENCE = timedelta(hours=6)  # the others wait while rank 0 evaluates and writes


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; one alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The one that writes, evaluates and talks."""
        return self.rank == 0

    def shares(self, count: int) -> list[int]:
        """How many of `count` samples each rank takes, in order; they differ by one at most."""
        return [count // self.size + (rank < count % self.size) for rank in range(self.size)]

    def own(self, count: int) -> slice:
        """Which of `count` samples are this rank's."""
        shares = self.shares(count)
        first = sum(shares[: self.rank])
        return slice(first, first + shares[self.rank])

    def gather(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum of counts, ...) of every rank's (counts[rank], ...), in rank order; gradients flow back to a rank's own rows.

        The gradient is scaled by the number of ranks: DistributedDataParallel averages over them afterwards, and each
        computes the same loss of all rows.
        """
        return tensor if self.size == 1 else _Gather.apply(tensor, counts, self.rank)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of a tensor of the same shape on each; without gradients."""
        if self.size > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
        return numbers

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give them rank 0's values, in place, on every rank."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

    def agree(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def everyone(self, value: Any) -> list[Any]:
        """What each rank has, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, number: int) -> Callable[[], int]:
        """The largest of every rank's number: asked for now, and known where the result is called."""
        if self.size == 1:
            return lambda: number
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(number, device=device)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

        def known() -> int:
            work.wait()
            return int(tensor)

        return known


ALONE = Ranks()


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, as one group while it is entered; without torchrun one process alone.

    Raises:
        ConfigError: the environment speaks of several processes, and does not say which one this is.
        TrainingError: the others are not there, or end while they are waited for.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield Ranks()
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {size}, and RANK is not set: who the other processes are is not known",
            tip="start them with torchrun --nproc-per-node N -m softcache train ..., or unset WORLD_SIZE",
        )
    try:
        with signals.kills():  # C code waits for the others, and lets no handler of Python's run
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as exc:  # all of torch's errors of this kind
        raise TrainingError(
            f"{size} processes are to train together, and did not find one another: {str(exc).splitlines()[0][:200]}",
            tip="one of them has ended, or MASTER_ADDR and MASTER_PORT are others': start all of them again",
        ) from exc
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        yield ranks
        ranks.everyone(None)  # nobody leaves before rank 0, which writes last
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Rows of all ranks, each rank's own with its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: Sequence[int], rank: int) -> Tensor:
        ctx.first, ctx.count, ctx.size = sum(counts[:rank]), counts[rank], len(counts)
        flags = tensor.dtype == torch.bool
        own = tensor.to(torch.uint8) if flags else tensor
        padded = own.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(own)] = own
        blocks = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(blocks, padded)
        rows = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
        return rows.bool() if flags else rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.first : ctx.first + ctx.count] * ctx.size, None, None

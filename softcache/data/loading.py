"""From samples and views to batches of model inputs: the data set that loader workers run."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from softcache.data.identity import pixel_digest, sample_ids
from softcache.data.views import Policy
from softcache.errors import DataError, SoftcacheError
from softcache.spec import load_user_file, user_files

Pair = tuple[int, int]  # (index in the transfer set, view index)


@dataclass(frozen=True)
class LoadedBatch:
    """What a worker hands over.

    Attributes:
        inputs: one collated input per collate function.
        index: (B,) int64 positions in the transfer set.
        views: (B,) int64 view indices.
        content_digests: (B, 16) uint8, where asked for.
        pixel_digests: (B,) uint32 digests of the rendered items, where asked for.
    """

    inputs: tuple[Any, ...]
    index: np.ndarray
    views: np.ndarray
    content_digests: np.ndarray | None = None
    pixel_digests: np.ndarray | None = None

    def pin_memory(self) -> LoadedBatch:
        """Called by the DataLoader: the inputs in page-locked memory."""
        return replace(self, inputs=map_tensors(self.inputs, torch.Tensor.pin_memory))


@dataclass(frozen=True)
class _Fault:
    """An error on its way out of a worker: raised again, whole, in the main process."""

    error: SoftcacheError


class ViewedSet(Dataset[Any]):
    """A transfer set seen through a view policy, collated for one or several models.

    Args:
        transfer_set: with `load`, `keys` and `__len__`.
        policy: how views are rendered.
        collates: one per model; equal ones should be given once.
        digests: also hash contents and pixels (the dump does).
    """

    def __init__(
        self,
        transfer_set: Any,
        policy: Policy,
        collates: Sequence[Callable[[list[Any]], Any]],
        *,
        digests: bool = False,
    ) -> None:
        self.transfer_set, self.policy, self.collates, self.digests = transfer_set, policy, tuple(collates), digests

    def __len__(self) -> int:
        return len(self.transfer_set)

    def render(self, index: int, view: int) -> tuple[Any, bytes]:
        """One rendered item and its content digest; errors name the sample."""
        key = self.transfer_set.keys[index]
        try:
            item, digest = self.transfer_set.load(index)
            return self.policy.render(item, int(sample_ids([key])[0]), view), digest
        except SoftcacheError as exc:
            exc.add_note(f"while loading sample {key}")
            raise
        except Exception as exc:
            raise DataError(
                f"sample {key}: {type(exc).__name__}: {exc}", tip="repair the sample, or leave it out with --samples"
            ) from exc

    def __getitems__(self, pairs: list[Pair]) -> LoadedBatch | _Fault:
        try:
            rendered = [self.render(index, view) for index, view in pairs]
            items = [item for item, _ in rendered]
            index, views = np.array(pairs, dtype=np.int64).T
            batch = LoadedBatch(tuple(collate(items) for collate in self.collates), index, views)
            if not self.digests:
                return batch
            contents = np.frombuffer(b"".join(digest for _, digest in rendered), np.uint8).reshape(-1, 16)
            pixels = np.array([pixel_digest(item) for item in items], dtype=np.uint32)
            return LoadedBatch(batch.inputs, index, views, contents, pixels)
        except SoftcacheError as exc:
            return _Fault(exc)

    def __reduce__(self) -> tuple[Any, ...]:
        # classes from a user's file must be importable in a spawned worker before they are unpickled
        return _restore, (user_files(), pickle.dumps(self.__dict__))


def _restore(files: Sequence[str], state: bytes) -> ViewedSet:
    for file in files:
        load_user_file(file)
    made = ViewedSet.__new__(ViewedSet)
    made.__dict__.update(pickle.loads(state))
    return made


def load_batches(
    viewed: ViewedSet,
    pairs: Iterable[list[Pair]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[LoadedBatch]:
    """Batches in the order of `pairs`, loaded by worker processes. Faults are raised here, with their tips."""
    loader: DataLoader[Any] = DataLoader(
        viewed,
        batch_sampler=pairs,  # any iterable of index lists
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_end_quietly,
        generator=torch.Generator(),  # its own: the global random state must not depend on loading
    )
    for batch in loader:
        if isinstance(batch, _Fault):
            raise batch.error
        yield batch


def _end_quietly(worker: int) -> None:
    """In a worker: SIGTERM, which a scheduler sends to the whole process group, is for the main process to report."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _as_it_is(batch: Any) -> Any:
    return batch


def map_tensors(inputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tensor, or a tuple, list or dict of them, with every tensor changed."""
    if isinstance(inputs, torch.Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {name: map_tensors(value, change) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(map_tensors(value, change) for value in inputs)
    return inputs


def to_device(inputs: Any, device: torch.device) -> Any:
    """A model's inputs moved to a device."""
    return map_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=True))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) visiting order of one epoch, a function of (seed, epoch) alone; int32 where that suffices."""
    words = np.random.Philox(key=(seed & (2**64 - 1)) | (epoch + 1) << 64).random_raw(count)
    order = np.argsort(words, kind="stable")
    return order.astype(np.int32) if count < 2**31 else order

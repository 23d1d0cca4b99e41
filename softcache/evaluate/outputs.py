"""How good a model is whose outputs are no classes: its embeddings or values over a data set, at view 0."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softcache.data.join import batches
from softcache.data.loading import ViewedSet, load_batches, to_device
from softcache.data.transfer_set import TransferSet
from softcache.data.views import Policy
from softcache.errors import CacheError, ModelError, faults_explained
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.neighbours import of_embeddings, of_values
from softcache.models import Model
from softcache.models.model import CLASS_OUTPUTS, OTHER_OUTPUTS
from softcache.report.progress import track
from softcache.targets.cache import Cache, Joined

PART = 4096  # rows that are gathered at once


@dataclass(frozen=True)
class Beside:
    """The member of a cache that a model is compared with.

    Attributes:
        joined: the same samples, joined to it.
        member: whose outputs; of features alone its only vector.
    """

    joined: Joined
    member: str

    def outputs(self, count: int) -> Tensor:
        """(N, W) float32 of all samples, at view 0."""
        cache, parts = self.joined.cache, []
        vector = None if cache.member(self.member).output is not None else the_vector(cache, self.member)
        for first in range(0, count, PART):
            index = np.arange(first, min(first + PART, count))
            read = {"members": [self.member], "features": [] if vector is None else [vector]}
            targets = self.joined.gather_samples(index, np.zeros_like(index), **read)
            parts.append(targets.output(self.member) if vector is None else targets.feature(vector, self.member))
        return torch.cat(parts)


def vectors_of(cache: Cache, member: str) -> dict[str, int]:
    """The features of a member that are vectors, and how many numbers each has."""
    shapes = {name: one.spec.reduced_shape(*one.shapes) for name, one in cache.features[member].items()}
    return {name: shape[0] for name, shape in shapes.items() if len(shape) == 1}


def the_vector(cache: Cache, member: str) -> str:
    """The only vector of a member of features alone; CacheError where there is none, or several."""
    found = list(vectors_of(cache, member))
    if len(found) != 1:
        raise CacheError(
            f"member {member!r} holds features alone, and {len(found)} of them are vectors: "
            f"{', '.join(found or cache.features[member])}",
            tip="a student learns and is measured by one: dump it with --features LAYER:pool alone",
        )
    return found[0]


def member_of(cache: Cache, wanted: Mapping[str, float] | None, kind: str | None = None) -> str:
    """The member without classes that is meant: the only one, or the only one that was named; else one of features alone.

    Args:
        wanted: members that were named; None: all.
        kind: "embedding" or "values", of what is compared with it.

    Raises:
        CacheError: none, or several.
    """
    kinds = OTHER_OUTPUTS if kind is None else (kind,)
    meant = list(wanted or cache.members)
    found = [name for name in meant if cache.member(name).output in kinds]
    if not found and "embedding" in kinds:
        found = [name for name in meant if cache.member(name).output is None]
    if len(found) != 1:
        gave = ", ".join(f"{name!r} gave {cache.member(name).output or 'features alone'}" for name in cache.members)
        raise CacheError(
            f"{len(found)} members gave {' or '.join(kinds)}: {gave}", tip="name the one that is meant: --members NAME"
        )
    return found[0]


def has_classes(cache: Cache, wanted: Mapping[str, float] | None) -> bool:
    """Whether some of the members that are meant gave classes."""
    return any(cache.member(name).output in CLASS_OUTPUTS for name in wanted or cache.members)


@torch.inference_mode()
def evaluate_outputs(
    model: Model,
    transfer_set: TransferSet,
    policy: Policy,
    *,
    device: torch.device,
    batch_size: int = 512,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    beside: Beside | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run a model over a data set, at view 0 of the policy. Its train or eval mode is put back afterwards.

    Args:
        beside: what it is compared with, where a cache is at hand.
    """
    started, was_training, count = time.monotonic(), model.training, len(transfer_set)
    model.eval()
    viewed = ViewedSet(
        transfer_set, policy, [model.input.collate], partners=None if beside is None else beside.joined.partners
    )
    loaded = load_batches(
        viewed, batches(np.arange(count), 0, batch_size), workers=workers, pin_memory=device.type == "cuda"
    )
    rows = []
    for batch in track(loaded, "eval", -(-count // batch_size), unit="batches", quiet=not progress):
        with (
            faults_explained(ModelError, f"the model {model.spec!r}"),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            rows.append(model(to_device(batch.inputs[0], device)).float().cpu())
        _check(model, rows[-1], len(batch.index))
    model.train(was_training)
    teacher = None if beside is None else beside.outputs(count)
    found = numbers_of(model.output, torch.cat(rows), transfer_set, teacher)
    return Evaluation(count, transfer_set.labelled, time.monotonic() - started, numbers=found)


def evaluate_member(beside: Beside, transfer_set: TransferSet) -> Evaluation:
    """How good what a cache holds of a member is, by the labels or the values of the data."""
    started, count = time.monotonic(), len(transfer_set)
    kind = beside.joined.cache.member(beside.member).output or "embedding"
    found = numbers_of(kind, beside.outputs(count), transfer_set, None)
    return Evaluation(count, transfer_set.labelled, time.monotonic() - started, numbers=found)


def numbers_of(kind: str, own: Tensor, transfer_set: TransferSet, teacher: Tensor | None) -> dict[str, float]:
    """What is told of outputs (N, W) of a kind, by the data's labels and beside a teacher's."""
    if kind == "embedding":
        several = transfer_set.multi_label
        labels = torch.full((len(own),), -1) if several else torch.from_numpy(transfer_set.labels).long()
        return of_embeddings(own, labels, transfer_set.num_classes, teacher)
    found: dict[str, float] = {}
    if transfer_set.values is not None and transfer_set.values.shape == tuple(own.shape):
        found |= of_values(own, torch.from_numpy(transfer_set.values), "")
    if teacher is not None and teacher.shape == own.shape:
        found |= of_values(own, teacher, "_teacher")
    return found


def _check(model: Model, rows: Tensor, count: int) -> None:
    if rows.ndim != 2 or len(rows) != count:
        raise ModelError(
            f"the model {model.spec!r} gives {tuple(rows.shape)} for {count} samples",
            tip=f"its {model.output} must be of shape (batch, {model.num_classes})",
        )
    bad = int((~rows.isfinite().all(dim=1)).sum())
    if bad:
        raise ModelError(
            f"what the model gives is not finite for {bad} of {count} samples: its weights are not, or its numbers overflow",
            tip="if it was being trained: a lower --lr, or --clip-norm 1; if it computes in a half type: --autocast none",
        )

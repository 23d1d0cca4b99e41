"""An exported file beside its model: both over a whole evaluation set, and refused where they differ by more than is allowed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from softcache.codecs.matmul import full_float32
from softcache.data.join import batches
from softcache.data.label_kind import answers
from softcache.data.loading import ViewedSet, load_batches, to_device
from softcache.data.transfer_set import TransferSet
from softcache.data.views import Policy
from softcache.errors import ExportError, ModelError, faults_explained
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.outputs import numbers_of
from softcache.evaluate.sums import Sums, labels_of
from softcache.machine import exact_convolutions
from softcache.models import Model
from softcache.report.progress import track
from softcache.report.tables import percent
from softcache.students.traced_program import Forward, reason_of

ABSOLUTE, RELATIVE = 1e-3, 1e-3  # |difference| of a logit at most this much, and this share of it
# of int8 in another program, whose sums are rounded otherwise: share of samples with the same answer, and of right ones
LEAST_AGREEMENT, MOST_LOST = 0.995, 0.001


@torch.inference_mode()
def compare(
    model: Model,
    exported: Forward,
    transfer_set: TransferSet,
    policy: Policy,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    where: str,
    rounded: bool,
    quiet: bool,
) -> tuple[Evaluation, Evaluation, float, int, float]:
    """Model and file over every sample: two evaluations, agreement, how many answers changed, the largest difference.

    Args:
        rounded: the file computes with int8: its answers are compared instead of its logits.

    The first batch is one sample, so that the file is seen to take batches of other sizes than it was traced with.

    Raises:
        ExportError: a logit differs by more than the bound. An answer that changes within it is a near-tie.
    """
    count, order = len(transfer_set), np.arange(len(transfer_set))
    several = transfer_set.multi_label
    before, after = (Sums.of(transfer_set) for _ in range(2))
    seconds = [0.0, 0.0]
    changed, largest = 0, 0.0
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])  # of a model whose outputs are no classes
    viewed = ViewedSet(transfer_set, policy, [model.input.collate])
    pairs = chain(batches(order[:1], 0, 1), batches(order[1:], 0, batch_size))
    loaded = load_batches(viewed, pairs, workers=workers, pin_memory=False)
    steps = 1 + -(-(count - 1) // batch_size)
    with exact_float32(device):
        for batch in track(loaded, f"verify {where}", steps, unit="batches", quiet=quiet):
            outputs = []
            for place, forward in enumerate((lambda x: model(to_device(x, device)), exported)):
                started = time.monotonic()
                try:
                    outputs.append(forward(batch.inputs[0]).float().cpu())
                except Exception as exc:
                    if place == 0:
                        with faults_explained(ModelError, f"the model {model.spec!r}"):
                            raise
                    raise ExportError(
                        f"{where}: the file cannot take a batch of {len(batch.index)}: {reason_of(exc)}",
                        tip="the network fixes a size that its batches do not have; --to safetensors exports weights alone",
                    ) from None
                seconds[place] += time.monotonic() - started
            reference, found = outputs
            keys = [transfer_set.keys[i] for i in batch.index]
            difference = _differences(reference, found, keys, where, bounded=not rounded)
            largest = max(largest, float(difference.max()))
            if not model.has_classes:
                for own, one in zip(rows, outputs, strict=True):
                    own.append(one)
                continue
            labels = labels_of(transfer_set, batch.index)
            before.add(reference, *labels)
            after.add(found, *labels)
            said = (answers(logits, multi_label=several) for logits in (reference, found))
            changed += int(torch.ne(*said).sum())
    if not model.has_classes:
        told = [numbers_of(model.output, torch.cat(own), transfer_set, None) for own in rows]
        both = (Evaluation(count, transfer_set.labelled, t, numbers=n) for t, n in zip(seconds, told, strict=True))
        return (*both, 1.0, 0, largest)  # type: ignore[return-value]
    names = transfer_set.class_names
    evaluations = [s.result(count, t, 1.0, names) for s, t in zip((before, after), seconds, strict=True)]
    asked = count * (len(names) if several else 1)
    if rounded:
        _check_answers(evaluations[0], evaluations[1], changed, asked, where)
    return (*evaluations, 1 - changed / asked, changed, largest)  # type: ignore[return-value]


def _check_answers(before: Evaluation, after: Evaluation, changed: int, asked: int, where: str) -> None:
    """Raise ExportError for int8 that answers otherwise than the model more often than rounding does; of few, one may."""
    right, kept = before.top1 or 0.0, after.top1 or 0.0  # of several labels neither is counted
    if changed > max(1, (1 - LEAST_AGREEMENT) * asked) or abs(right - kept) * asked > max(1.001, MOST_LOST * asked):
        raise ExportError(
            f"{where}: int8 answers otherwise than the model for {changed:,} of {asked:,}, with a top-1 of {percent(kept)} "
            f"where the model has {percent(right)}; allowed are {percent(1 - LEAST_AGREEMENT)} of them, and a top-1 that "
            f"differs by {percent(MOST_LOST)}",
            tip="try a newer onnxruntime; nothing was written",
        )


def _differences(reference: Tensor, found: Tensor, keys: Sequence[str], where: str, *, bounded: bool) -> Tensor:
    """(B, C) float64 |found - reference|; ExportError where it is over the bound."""
    if reference.shape != found.shape:
        raise ExportError(
            f"{where}: gives {tuple(found.shape)} where the model gives {tuple(reference.shape)}",
            tip="the network fixes the size of a batch; --to safetensors exports weights alone",
        )
    reference, found = reference.double(), found.double()
    difference = torch.where(reference == found, 0.0, (found - reference).abs())  # equal infinities do not differ
    if not bounded and bool(difference.isfinite().all()):
        return difference
    over = ~(difference <= ABSOLUTE + RELATIVE * reference.abs())  # so that NaN is over it
    if over.any():
        row, column = over.nonzero()[0].tolist()
        raise ExportError(
            f"{where}: output {column} of sample {keys[row]} is {found[row, column]:.6g} where the model gives "
            f"{reference[row, column]:.6g}; allowed is a difference of {ABSOLUTE:g} + {RELATIVE:g} |logit|",
            tip="does the network depend on something else than its input? nothing was written",
        )
    return difference


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """A GPU's convolutions and products without TF32, whose rounding is as large as the bound."""
    with exact_convolutions(), full_float32(device):
        yield

"""One batch of one member: teacher, statistics and codec on the device, then the copy to the host and the last checks.

The two halves are apart so that the device computes the next batch while the host writes this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.cache.manifest import MemberStatistics
from softcache.cache.samples import SampleTable
from softcache.codecs import Codec
from softcache.codecs.floats import round_up_to_half
from softcache.errors import CodecRangeError, TeacherError, first_offenders
from softcache.teacher import Teacher


@dataclass
class Encoded:
    """One member's encoded batch on its way to the host."""

    member: str
    codec: Codec
    arrays: Mapping[str, Tensor]
    measured: Tensor  # float64: correct, labelled, entropy sum, finite rows
    floored: int
    samples: SampleTable
    rows: np.ndarray
    ready: Any

    def append_to(self, out: Any) -> None:
        """Check what only the host can see cheaply, and write. Errors name the first samples."""
        if self.ready is not None:
            self.ready.synchronize()
        correct, labelled, entropy, finite = self.measured.tolist()
        host = {name: value.numpy() for name, value in self.arrays.items()}
        if int(finite) < len(self.rows):
            bad = np.flatnonzero(~np.isfinite(host["eps"]))
            keys = (self.samples.key(int(self.rows[i])) for i in bad)
            raise TeacherError(
                f"teacher {self.member!r} gave logits that are not finite for {len(bad)} samples of this batch: "
                + first_offenders(keys, len(bad)),
                tip="look at these samples; under autocast fp16 try --autocast bf16 or none",
            )
        worst = float(host["eps"].max(initial=0.0))
        if not np.isfinite(worst):
            raise CodecRangeError(
                f"codec {self.codec.name!r} cannot hold the logits of teacher {self.member!r}: they are too large",
                tip="use --codec float32",
            )
        out.append(
            self.member,
            host,
            MemberStatistics(len(self.rows), int(labelled), int(correct), entropy, worst, self.floored),
        )


def encode(
    teacher: Teacher, codec: Codec, inputs: Any, labels: np.ndarray, samples: SampleTable, rows: np.ndarray
) -> Encoded:
    """Teacher, statistics and codec, on the teacher's device; the result is on its way to the host when this returns."""
    try:
        output = teacher(inputs)
    except torch.OutOfMemoryError as exc:
        raise TeacherError(
            f"teacher {teacher.name!r} ran out of memory at batch size {len(rows)}",
            tip=f"try --batch-size {max(1, len(rows) // 2)} in a new --out: the batch size is part of the plan",
        ) from exc
    logits = output.logits
    if len(logits) != len(rows):
        raise TeacherError(f"teacher {teacher.name!r} gave {len(logits)} rows for {len(rows)} samples")
    finite = logits.isfinite().all(dim=1)
    try:
        arrays = codec.encode(logits)
    except CodecRangeError as exc:
        if bool(finite.all()):
            exc.add_note(f"teacher {teacher.name!r}")
            raise
        arrays = codec.encode(logits.nan_to_num(0.0, 0.0, 0.0))
    eps = arrays["eps"]
    if teacher.rounds:
        eps = round_up_to_half(eps.float() + output.rounding)
    arrays = {**arrays, "eps": torch.where(finite, eps, torch.full_like(eps, torch.inf))}
    measured = _measure(logits, finite, labels)
    if logits.is_cuda:
        arrays = {name: _to_pinned(value) for name, value in arrays.items()}
        measured = _to_pinned(measured)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(logits.device))
    else:
        ready = None
    return Encoded(teacher.name, codec, arrays, measured, output.floored, samples, rows, ready)


def _measure(logits: Tensor, finite: Tensor, labels: np.ndarray) -> Tensor:
    """(4,) float64: correct, labelled, entropy sum, finite rows."""
    log_p = logits.double().log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).nansum()
    if labels.ndim == 1:
        truth = torch.from_numpy(labels.astype(np.int64)).to(logits.device)
        correct, labelled = (logits.argmax(dim=1) == truth).sum(), (truth >= 0).sum()
    else:
        correct = labelled = torch.zeros((), device=logits.device)
    return torch.stack([correct.double(), labelled.double(), entropy, finite.sum().double()])


def _to_pinned(value: Tensor) -> Tensor:
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)

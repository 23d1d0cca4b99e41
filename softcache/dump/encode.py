"""One batch of one member: teacher, codec and measurements on the device, then the copy to the host and the last checks.

The two halves are apart so that the device computes the next batch while the host writes this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.cache.samples import SampleTable
from softcache.cache.schema import FORMAT_VERSION
from softcache.cache.statistics import Divergence, MemberStatistics
from softcache.codecs import Codec
from softcache.codecs.fidelity import eps_of, kept_at, kept_sums, kl_at, relative_errors, round_up_to_half
from softcache.data.label_kind import answers, has_several, is_known, is_yes
from softcache.dump.layout import Promise, Storage
from softcache.dump.results import not_finite
from softcache.dump.teacher import Teacher
from softcache.errors import CodecFitError, CodecRangeError, TeacherError, first_offenders

MEASURED_ROWS = 32  # of each batch, on which the divergence over the grid of temperatures is measured


def measured_rows(count: int, format: int) -> slice | list[int]:
    """Which rows of a batch are measured: the first ones; of version 2 as many, spread evenly over it."""
    if format == FORMAT_VERSION or count <= MEASURED_ROWS:
        return slice(MEASURED_ROWS)
    return [i * count // MEASURED_ROWS for i in range(MEASURED_ROWS)]


@dataclass
class Encoded:
    """One member's encoded batch on its way to the host; `rows` and `labels` are of each record."""

    member: str
    storage: Storage
    arrays: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]  # dense, dense_at; empty for most codecs
    measured: Mapping[str, Tensor]
    floored: int
    samples: SampleTable
    rows: np.ndarray
    labels: np.ndarray
    view: int
    ready: Any = field(default=None)

    def append_to(self, out: Any) -> None:
        """Check what only the host can see cheaply, and write. Errors name the first samples."""
        if self.ready is not None:
            self.ready.synchronize()
        host = {name: value.numpy() for name, value in self.arrays.items()}
        measured = {name: value.numpy() for name, value in self.measured.items()}
        self._check(host, measured)
        if "dense_at" in self.dense:
            _number_dense_rows(out, self.member, self._codec, host["records"], self.dense)
        out.append(self.member, host, self._statistics(host, measured))

    def _check(self, host: Mapping[str, np.ndarray], measured: Mapping[str, np.ndarray]) -> None:
        promise = self.storage.promise
        codec = "" if self.storage.codec is None else self.storage.codec.name
        if not measured["finite"].all():
            named = self._named(~measured["finite"].astype(bool))
            raise not_finite(self.member, named, has_classes=self.storage.has_classes)
        if "eps" in host and not np.isfinite(host["eps"]).all():
            raise CodecRangeError(
                f"codec {codec!r} cannot hold the {self._what} of teacher {self.member!r}, they are too large, for "
                + self._named(~np.isfinite(host["eps"])),
                tip="use --codec float32",
            )
        for feature in self.storage.features:
            error = host[feature.error_name]
            if not np.isfinite(error).all():
                raise TeacherError(
                    f"feature {feature.name!r} of teacher {self.member!r} is not finite, or too large to be stored, for "
                    + self._named(~np.isfinite(error)),
                    tip="look at these samples; --feature-dtype float16 holds up to 65504",
                )
        if promise is not None:
            limit = promise.max_kl if isinstance(promise, Promise) else promise.max_relative_error
            broken = measured["promised"] > limit
            if broken.any():
                worst, what = float(measured["promised"].max()), "KL" if self.storage.has_classes else "it is"
                raise CodecFitError(
                    f"codec {codec!r} does not keep {promise}: {what} {worst:.3g} for " + self._named(broken),
                    tip=(
                        "use --codec lowrank, which keeps such rows dense, or headtail or float16"
                        if self.storage.has_classes
                        else "use --codec float16 or float32, or lowrank, which keeps such rows dense"
                    )
                    + "; finished shards stay, but another codec needs another --out",
                )

    @property
    def _codec(self) -> Codec:
        assert self.storage.codec is not None
        return self.storage.codec

    @property
    def _what(self) -> str:
        return "logits" if self.storage.has_classes else "numbers"

    def _named(self, where: np.ndarray) -> str:
        return _named(where, self.samples, self.rows, self.storage)

    def _statistics(self, host: Mapping[str, np.ndarray], measured: Mapping[str, np.ndarray]) -> MemberStatistics:
        correct, labelled, entropy, agreed = measured["sums"].tolist()
        error = measured.get("error")
        kept = measured.get("kept")
        kl = measured["kl"]  # (grid, measured rows); empty for multi-label targets
        return MemberStatistics(
            records=len(self.rows),
            labelled=int(labelled),
            correct=int(correct),
            entropy_sum=entropy,
            max_eps=float(host["eps"].max(initial=0.0)) if "eps" in host else 0.0,
            floored=self.floored,
            dense=len(self.dense["dense_at"]) if self.dense else 0,
            measured=kl.shape[1] if error is None else len(error),
            agreed=int(agreed),
            kl={
                f"{t:g}": Divergence(float(r.sum()), float(r.max())) for t, r in zip(self.storage.grid, kl, strict=True)
            }
            if kl.size
            else {},
            feature_errors={f.name: float(host[f.error_name].max()) for f in self.storage.features},
            kept={}
            if kept is None
            else {f"{t:g}": s for t, s in zip(kept_at(self._codec), kept.tolist(), strict=True)},
            error=None if error is None else Divergence(float(error.sum()), float(error.max(initial=0.0))),
        )


def encode(
    teacher: Teacher,
    storage: Storage,
    inputs: Any,
    labels: np.ndarray,
    samples: SampleTable,
    rows: np.ndarray,
    view: int,
    format: int = FORMAT_VERSION,
) -> Encoded:
    """Teacher, codec and measurements, on the teacher's device; the result is on its way to the host when this returns.

    Args:
        labels, rows: (P,) of each record: of each word, where samples have many.
    """
    try:
        output = teacher(inputs)
        teacher.check_rows(len(output.logits), len(rows))
    except TeacherError as exc:
        exc.add_note(f"in the batch of {_listed(samples, rows)}")
        raise
    finite = output.logits.isfinite().all(dim=1)
    logits = torch.where(finite[:, None], output.logits, 0.0)
    codec = storage.codec
    classifier_input = (
        None if output.classifier_input is None else torch.where(finite[:, None], output.classifier_input, 0.0)
    )
    coded: dict[str, Tensor] = {}
    arrays: dict[str, Tensor] = {}
    decoded = None
    if codec is not None:
        coded = _encoded(codec.encode, (logits, classifier_input), f"teacher {teacher.name!r}", samples, rows, storage)
        arrays = {name: coded[name] for name in codec.arrays}
        decoded = codec.decode(coded) if codec.complete else None
        if decoded is not None and codec.bounded:
            eps = eps_of(codec, logits, coded, decoded)
            arrays["eps"] = round_up_to_half(eps + output.rounding if teacher.rounds else eps)
    for feature in storage.features:
        values = output.features[feature.name]
        what = f"feature {feature.name!r} of teacher {teacher.name!r}"
        stored = _encoded(feature.codec.encode, (values,), what, samples, rows, storage)
        arrays |= {feature.names[name]: value for name, value in stored.items()}
        error = feature.codec.error(values, feature.codec.decode(stored))
        arrays[feature.error_name] = round_up_to_half(error.float())
    few = measured_rows(len(rows), format)
    measured = {"finite": finite.to(torch.uint8)}
    if storage.has_classes:
        measured |= _of_classes(teacher, storage, logits, coded, decoded, labels, few)
        if format != FORMAT_VERSION and codec is not None and not codec.complete:
            measured["kept"] = kept_sums(codec, coded)
    else:
        measured |= _of_numbers(storage, logits, decoded, few)
    dense: dict[str, Tensor] = {name: coded[name] for name in ("dense", "dense_at") if name in coded}
    ready = None
    if logits.is_cuda:
        arrays, dense, measured = ({n: _to_pinned(v) for n, v in part.items()} for part in (arrays, dense, measured))
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(logits.device))
    return Encoded(teacher.name, storage, arrays, dense, measured, output.floored, samples, rows, labels, view, ready)


def _of_classes(
    teacher: Teacher,
    storage: Storage,
    logits: Tensor,
    coded: Mapping[str, Tensor],
    decoded: Tensor | None,
    labels: np.ndarray,
    few: slice | list[int],
) -> dict[str, Tensor]:
    """What is measured of logits."""
    measured = {"sums": _sums(logits, decoded, labels, few)}
    measured |= {"largest": answers(logits, multi_label=False).int(), "alike": _alike(teacher, logits)}
    measured["decided"] = _decided(logits, labels)
    measured["kl"] = _divergences(storage, logits, coded, decoded, few, single=not has_several(labels))
    if isinstance(storage.promise, Promise):
        assert storage.codec is not None
        measured["promised"] = kl_at(storage.codec, logits, coded, decoded, storage.promise.temperature)
    return measured


def _of_numbers(storage: Storage, given: Tensor, decoded: Tensor | None, few: slice | list[int]) -> dict[str, Tensor]:
    """What is measured of an output without classes: no class, and the relative error; of features alone nothing."""
    measured = {"sums": given.new_zeros(4, dtype=torch.float64), "kl": given.new_zeros(0, 0)}
    if decoded is None:
        return measured
    measured["error"] = relative_errors(given[few], decoded[few])
    if storage.promise is not None:
        measured["promised"] = relative_errors(given, decoded)
    return measured


def _encoded(
    encode: Callable[..., dict[str, Tensor]],
    values: Sequence[Tensor | None],
    what: str,
    samples: SampleTable,
    rows: np.ndarray,
    storage: Storage,
) -> dict[str, Tensor]:
    """encode(*values); the error for numbers that it cannot hold names the samples that have them."""

    def holds(i: int) -> bool:
        try:
            encode(*(value if value is None else value[i : i + 1] for value in values))
        except CodecRangeError:
            return False
        return True

    try:
        return encode(*values)
    except CodecRangeError as exc:
        bad = np.array([not holds(i) for i in range(len(rows))])
        raise CodecRangeError(
            f"{what}: {exc.message}, for {_named(bad, samples, rows, storage)}", tip=exc.tip
        ) from None


def _named(where: np.ndarray, samples: SampleTable, rows: np.ndarray, storage: Storage) -> str:
    """How many samples, or words, of the batch, and the keys of the first samples."""
    bad = np.flatnonzero(where)
    counted = f"{len(bad)} samples of this batch: " if storage.index is None else f"{len(bad)} words of this batch: "
    return counted + _listed(samples, rows[bad])


def _listed(samples: SampleTable, rows: np.ndarray) -> str:
    found = dict.fromkeys(rows.tolist())  # of many words one sample
    return first_offenders(map(samples.key, found), len(found))


def _divergences(
    storage: Storage,
    logits: Tensor,
    coded: Mapping[str, Tensor],
    decoded: Tensor | None,
    chosen: slice | list[int],
    *,
    single: bool,
) -> Tensor:
    """(grid, n) KL of some rows of the batch; (0, 0) for multi-label targets."""
    if not single:
        return logits.new_zeros(0, 0)
    assert storage.codec is not None
    few = {name: value[chosen] for name, value in coded.items() if name not in ("dense", "dense_at")}
    shown = None if decoded is None else decoded[chosen]
    return torch.stack([kl_at(storage.codec, logits[chosen], few, shown, t) for t in storage.grid])


def _decided(logits: Tensor, labels: np.ndarray) -> Tensor:
    """(2,) int64: how many known answers to several labels are right, and how many are known; zeros for one class a sample."""
    if not has_several(labels):
        return torch.zeros(2, dtype=torch.int64, device=logits.device)
    known, yes = (torch.from_numpy(one).to(logits.device) for one in (is_known(labels), is_yes(labels)))
    return torch.stack([((answers(logits, multi_label=True) == yes) & known).sum(), known.sum()])


def _alike(teacher: Teacher, logits: Tensor) -> Tensor:
    """(B,) uint8: 1 where all columns of a row are equal, plus 2 where the row is the teacher's first one again."""
    flat = logits.amax(dim=1) == logits.amin(dim=1)
    return flat.to(torch.uint8) + 2 * teacher.is_first_again(logits).to(torch.uint8)


def _sums(logits: Tensor, decoded: Tensor | None, labels: np.ndarray, chosen: slice | list[int]) -> Tensor:
    """(4,) float64: correct, labelled, sum of entropies; and of the measured rows, those whose largest class is kept."""
    log_p = logits.log_softmax(dim=1)  # float32: a mean over many rows needs no more
    entropy = -(log_p.exp() * log_p).nansum(dim=1, dtype=torch.float64).sum()
    largest = answers(logits, multi_label=False)
    if not has_several(labels):
        truth = torch.from_numpy(labels.astype(np.int64)).to(logits.device)
        correct, labelled = (largest == truth).sum(), (truth >= 0).sum()
        few = largest[chosen]
        agreed = few >= 0 if decoded is None else few == decoded[chosen].argmax(dim=1)
    else:
        correct = labelled = torch.zeros((), device=logits.device)
        agreed = torch.zeros(1, device=logits.device)
    return torch.stack([correct.double(), labelled.double(), entropy, agreed.sum().double()])


def _number_dense_rows(out: Any, member: str, codec: Codec, records: np.ndarray, dense: Mapping[str, Tensor]) -> None:
    """Hand the dense rows over, and write each one's number into its record."""
    at = dense["dense_at"].numpy()
    if not len(at):
        return
    (place,) = (f for f in codec.fields if f.name == "dense")
    out.append_dense_of(member, dense["dense"].numpy(), records, at, place.offset)


def _to_pinned(value: Tensor) -> Tensor:
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)

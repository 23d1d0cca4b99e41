"""Records as they are stored, from one cache into another, and what they tell of themselves: of `subset` and of `merge`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, Plan
from softcache.cache.plan_rules import width_of
from softcache.cache.positions import Positions
from softcache.cache.schema import FORMAT_VERSION, ArraySpec, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import SpanWriter
from softcache.codecs.fidelity import kept_at, kept_sums
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache

BATCH_ROWS, BATCH_LOGITS = 1024, 1 << 22  # what is held in memory at once; sums of statistics depend on it


def measured_of(manifest: Manifest, member: str) -> MemberStatistics:
    """What was measured when the member was dumped: in this cache, or in those that it was taken out of or merged of."""
    own, before = manifest.statistics[member], manifest.plan.measured_before(member)
    return own if own.measured or before is None else before


def numbers_a_row(plan: Plan, cut: Mapping[str, Positions]) -> int:
    """How many decoded numbers a row of one view has, of the largest member and in the mean."""
    most = 1
    for member in plan.members:
        records = 1.0 if member.index is None else cut[member.index].total / cut[member.index].lengths.size
        most = max(most, round(width_of(member, plan) * records))
    return most


def span_bytes(span: Span, specs: Mapping[str, Sequence[ArraySpec]]) -> int:
    """Of a part's data, digests of its views included."""
    arrays = (spec for of_member in specs.values() for spec in of_member)
    return sum(spec.nbytes + spec.checksums.nbytes for spec in arrays) + 4 * span.views * span.rows


def copy_records(
    out: SpanWriter, member: str, cache: Cache, rows: np.ndarray, views: np.ndarray, *, called: str = ""
) -> None:
    """One member's records of some rows, as they are stored.

    Args:
        called: the member's name in the new cache; empty: the same.
    """
    called = called or member
    targets = cache.gather(rows, views, members=[member])
    coded = targets.arrays[member]
    stored = {
        name: coded[name].numpy() if name in coded else cache.stored(member, name, rows, views)
        for name in cache.reader.array_kinds(member)
    }
    statistics = stored_statistics(cache, member, targets, stored)
    if "dense" in coded:
        # counted anew within the child's part; `stored` is a copy of the parent's bytes
        (place,) = (field for field in cache.codecs[member].fields if field.name == "dense")
        dense, at = coded["dense"].numpy(), coded["dense_at"].numpy()
        out.append_dense_of(called, dense, stored["records"], at, place.offset)
    out.append(called, stored, statistics)


def stored_statistics(cache: Cache, member: str, targets: Targets, stored: dict[str, np.ndarray]) -> MemberStatistics:
    """What the stored records tell of themselves. How far they are from what the teacher gave, they do not know."""
    info = cache.member(member)
    measured = MemberStatistics(
        records=len(targets.rows) if info.index is None else int(targets.at(member).offsets[-1]),
        max_eps=float(stored["eps"].max(initial=0.0)) if "eps" in stored else 0.0,
        dense=len(targets.arrays[member].get("dense", ())),
        feature_errors={
            feature.name: float(stored[f"feature{number}_error"].max(initial=0.0))
            for number, feature in enumerate(info.features)
        },
    )
    if info.output not in CLASS_OUTPUTS or not measured.records:
        return measured
    codec, labels = cache.codecs[member], _labels(cache, targets, member)
    kept: dict[str, float] = {}
    if codec.complete:
        largest = targets.logits(member).argmax(dim=1)
    else:
        if cache.manifest.plan.format != FORMAT_VERSION:
            sums = kept_sums(codec, targets.arrays[member]).tolist()
            kept = {f"{t:g}": total for t, total in zip(kept_at(codec), sums, strict=True)}
        largest = codec.head(targets.arrays[member])[0][:, 0]
    return replace(
        measured,
        labelled=int((labels >= 0).sum()),
        correct=int((largest.numpy() == labels).sum()),
        kept=kept,
        entropy_sum=float(_entropies(targets.log_probs(member, 1.0)).sum()),
    )


def _labels(cache: Cache, targets: Targets, member: str) -> np.ndarray:
    """The one class of each record of a member, or -1: of the sample, or of the position."""
    if cache.member(member).index is None:
        samples, rows = cache.samples, targets.rows
        return np.full(len(rows), -1) if samples.multi_label else samples.labels_of(rows)
    at = targets.at(member)
    return np.full(len(at.numbers), -1) if at.labels is None else at.labels


def _entropies(log_probs: Tensor) -> np.ndarray:
    """(B,) float64 entropy of each row, in nats."""
    log_p = log_probs.double()
    return (-(log_p.exp() * log_p).nansum(dim=1)).numpy()  # a class of probability 0 adds nothing


@contextmanager
def one_thread() -> Iterator[None]:
    """The last bits of a sum may depend on the number of threads, and those of the manifest must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""How much of a teacher's probability the k largest classes keep: what to know before a vocabulary is stored as `topset`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from softcache.codecs import make_codec
from softcache.dump.layout import Storage
from softcache.report.tables import table

SIZES = (16, 32, 50, 64, 100, 128)
TEMPERATURES = (1.0, 2.0, 4.0)
VOCABULARY = 4096  # classes from which on `topset` is compared, and this is told


@dataclass(frozen=True)
class Kept:
    """`topset:k=...` of some rows.

    Attributes:
        record_bytes: of one record.
        shares: temperature -> the mean share of the probability that is in the k classes.
    """

    k: int
    record_bytes: int
    shares: dict[float, float]


def kept_by_size(logits: Sequence[Tensor]) -> list[Kept]:
    """For each of SIZES below C what is kept of (B, C) logits of each member: the least of the members."""
    classes = logits[0].shape[1]
    sizes = [k for k in SIZES if k < classes]
    if not sizes:
        return []
    shares: dict[float, list[float]] = {}
    for t in TEMPERATURES:
        means = []
        for rows in logits:
            best = rows.topk(sizes[-1], dim=1).values.double() / t
            whole = (rows.double() / t).logsumexp(dim=1, keepdim=True)
            means.append((best - whole).exp().cumsum(dim=1).mean(dim=0))
        shares[t] = [min(float(one[k - 1]) for one in means) for k in sizes]
    bytes_of = {k: Storage(make_codec("topset", {"k": str(k)}, classes)).record_bytes for k in sizes}
    return [Kept(k, bytes_of[k], {t: shares[t][at] for t in TEMPERATURES}) for at, k in enumerate(sizes)]


def kept_table(found: Sequence[Kept]) -> Iterator[str]:
    """For people."""
    header = ["topset", "bytes a record", *(f"kept at T={t:g}" for t in TEMPERATURES)]
    rows = [[f"k={one.k}", f"{one.record_bytes:,}", *(f"{one.shares[t]:.1%}" for t in TEMPERATURES)] for one in found]
    yield table(header, rows)
    yield "at T > 1 losses on the k largest are refused where less than half is kept"

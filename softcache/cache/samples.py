"""samples.h5: who the samples are. Row r of this table is row r of every shard."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from softcache.cache.plan import SampleInfo
from softcache.cache.positions import Positions
from softcache.errors import DamagedCacheError


@dataclass(frozen=True)
class SampleTable:
    """N samples in row order. The arrays may be views into a mapped file.

    Attributes:
        ids: (N,) uint64.
        labels: (N,) int32 class index or -1; multi-label: (N, ceil(C / 8)) uint8, bit c of a row in little bit order.
        digests: (N, 16) uint8 content digests.
        key_bytes, key_offsets: UTF-8 blob and (N + 1,) uint64 offsets; both empty when keys were not stored.
        multi_label: which of the two forms `labels` has.
        num_classes: C.
        mask_digests: (N, 16) uint8 content digests of the samples' maps of labels; None where there are none.
    """

    ids: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    key_bytes: np.ndarray
    key_offsets: np.ndarray
    multi_label: bool
    num_classes: int
    mask_digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_keys(self) -> bool:
        return len(self.key_offsets) > 0

    def key(self, row: int) -> str:
        """The key of one row, or its id in hex where keys were not stored."""
        if not self.has_keys:
            return f"{int(self.ids[row]):016x}"
        start, stop = int(self.key_offsets[row]), int(self.key_offsets[row + 1])
        return bytes(self.key_bytes[start:stop]).decode("utf-8", "replace")

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """(B,) int64 class indices, or (B, C) bool for multi-label."""
        if self.multi_label:
            bits = np.unpackbits(self.labels[rows], axis=1, count=self.num_classes, bitorder="little")
            return bits.astype(bool)
        return self.labels[rows].astype(np.int64)

    def arrays(self) -> dict[str, np.ndarray]:
        """The data sets of samples.h5."""
        arrays = {"ids": self.ids, "labels": self.labels, "digests": self.digests}
        if self.has_keys:
            arrays |= {"key_bytes": self.key_bytes, "key_offsets": self.key_offsets}
        if self.mask_digests is not None:
            arrays["mask_digests"] = self.mask_digests
        return arrays

    def fingerprint(
        self, candidates: Mapping[str, np.ndarray] | None = None, labelled: Sequence[Positions] = ()
    ) -> str:
        """sha256 over (id, label, content digest) of every sample in order of id: the same for any row order.

        Args:
            candidates: the arrays of candidates.h5, where there are any.
            labelled: the first round of each index whose positions have labels.
        """
        order = np.argsort(self.ids)  # no id is there twice
        hasher = hashlib.sha256()
        for array in (self.ids, self.labels, self.digests, self.mask_digests):
            if array is not None:
                hasher.update(np.take(array, order, axis=0).data)
        if candidates:
            by_id = np.argsort(candidates["ids"])
            for name in ("ids", "digests"):
                hasher.update(np.take(candidates[name], by_id, axis=0).data)
        for positions in labelled:
            assert positions.labels is not None
            hasher.update(np.take(positions.lengths[0], order).data)
            starts, stops = (positions.offsets[0][at].astype(np.int64).tolist() for at in (order, order + 1))
            for start, stop in zip(starts, stops, strict=True):
                hasher.update(np.ascontiguousarray(positions.labels[start:stop]).data)
        return hasher.hexdigest()

    def has_duplicates(self) -> bool:
        """Whether an id is there twice."""
        ordered = np.sort(self.ids)
        return bool((ordered[1:] == ordered[:-1]).any())


def build_table(
    keys: Sequence[str],
    ids: np.ndarray,
    labels: np.ndarray,
    digests: np.ndarray,
    num_classes: int,
    order: np.ndarray,
    *,
    store_keys: bool,
) -> SampleTable:
    """The table with row r = sample order[r].

    Args:
        keys, ids, labels, digests: in the order of the transfer set; labels (N,) int, or (N, C) of yes and no, -1 = unknown.
        order: (N,) permutation.
        store_keys: False leaves the keys out (private names).
    """
    multi_label = labels.ndim == 2
    blobs = [keys[int(i)].encode("utf-8") for i in order] if store_keys else []
    offsets = np.zeros(len(blobs) + 1 if store_keys else 0, dtype="<u8")
    if blobs:
        np.cumsum([len(b) for b in blobs], out=offsets[1:])
    return SampleTable(
        ids=ids[order].astype("<u8"),
        labels=pack_labels(labels)[order],
        digests=digests[order],
        key_bytes=np.frombuffer(b"".join(blobs), dtype=np.uint8),
        key_offsets=offsets,
        multi_label=multi_label,
        num_classes=num_classes,
    )


def pack_labels(labels: np.ndarray) -> np.ndarray:
    """Labels in stored form: (N,) int32, or (N, ceil(C / 8)) uint8 for (N, C): of what is above 0, so that unknown is no."""
    if labels.ndim == 2:
        return np.packbits(labels > 0, axis=1, bitorder="little")
    return labels.astype("<i4")


def table_from_arrays(arrays: Mapping[str, np.ndarray], info: SampleInfo, num_classes: int) -> SampleTable:
    """The table from the data sets of samples.h5; DamagedCacheError for numbers that no dump writes."""
    empty = np.zeros(0, np.uint8)
    table = SampleTable(
        ids=arrays["ids"],
        labels=arrays["labels"],
        digests=arrays["digests"],
        key_bytes=arrays.get("key_bytes", empty),
        key_offsets=arrays.get("key_offsets", empty.astype("<u8")),
        multi_label=info.multi_label,
        num_classes=num_classes,
        mask_digests=arrays.get("mask_digests"),
    )
    labels = table.labels
    if not table.multi_label and not (int(labels.min()) >= -1 and int(labels.max()) < num_classes):
        raise DamagedCacheError(f"samples.h5: labels {labels.min()} to {labels.max()}, for {num_classes} classes")
    if table.has_keys:
        check_keys(table.key_bytes, table.key_offsets, "samples.h5")
    return table


def check_keys(key_bytes: np.ndarray, ends: np.ndarray, where: str) -> None:
    """DamagedCacheError unless each key ends where the next one begins."""
    if not (ends[0] == 0 and ends[-1] == len(key_bytes) and bool((ends[1:] >= ends[:-1]).all())):
        raise DamagedCacheError(f"{where}: the keys' offsets do not follow one another")


def first_order(count: int, order: str, seed: int) -> np.ndarray:
    """(count,) position in the transfer set of each row of a new cache; `order` is "natural" or "permuted"."""
    return np.arange(count) if order == "natural" else seeded_order(count, seed)


def seeded_order(count: int, seed: int) -> np.ndarray:
    """(count,) permutation of the transfer set that becomes the row order: a stable sort of seeded 64-bit words.

    The words are Philox4x64-10 (Salmon et al. 2011) output with key (seed, 0) from counter 1, NumPy's own convention; only the
    raw stream is used, so that a library upgrade cannot change the order.
    """
    words = np.random.Philox(key=seed & (2**64 - 1)).random_raw(count) if count else np.zeros(0, np.uint64)
    return np.argsort(words, kind="stable")

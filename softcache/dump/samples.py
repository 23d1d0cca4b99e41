"""Whom a dump asks about: the transfer set opened, read once, and found to be the same whenever it is looked at again."""

from __future__ import annotations

import numpy as np

from softcache.cache.samples import SampleTable, build_table, pack_labels
from softcache.config import StorageOptions
from softcache.data.identity import check_unique, sample_ids
from softcache.data.loading import LoadedBatch, ViewedSet, load_batches
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import ConfigError, DataError, first_offenders
from softcache.report.progress import Meter


def open_samples(config: StorageOptions) -> tuple[TransferSet, np.ndarray]:
    """The transfer set and its sample ids, all different; the numbers of the config that need no data are checked."""
    for flag, value in (("batch-size", config.batch_size), ("shard-rows", config.shard_rows)):
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    transfer_set = open_transfer_set(config.data, **config.selection())
    ids = sample_ids(transfer_set.keys)
    check_unique(transfer_set.keys, ids)
    return transfer_set, ids


def make_samples(
    transfer_set: TransferSet, ids: np.ndarray, order: np.ndarray, *, store_keys: bool, workers: int, quiet: bool
) -> SampleTable:
    """Who the samples are, in the order of rows; every one is read once for its digest."""
    return build_table(
        transfer_set.keys,
        ids,
        transfer_set.labels,
        _content_digests(transfer_set, workers=workers, quiet=quiet),
        transfer_set.num_classes,
        order,
        store_keys=store_keys,
    )


def _content_digests(transfer_set: TransferSet, *, workers: int, quiet: bool) -> np.ndarray:
    """(N, 16) uint8 digests of what every sample holds, read once before the first row is written."""
    count = len(transfer_set)
    viewed = ViewedSet(transfer_set, Policy(), (), digests=True)
    pairs = ([(i, 0) for i in range(start, min(start + 1024, count))] for start in range(0, count, 1024))
    digests = np.empty((count, 16), np.uint8)
    with Meter("reading samples", count, unit="samples", quiet=quiet) as meter:
        for batch in load_batches(viewed, pairs, workers=workers):
            assert batch.content_digests is not None
            digests[batch.index] = batch.content_digests
            meter.add(len(batch.index))
    return digests


def check_same_samples(table: SampleTable, ids: np.ndarray, transfer_set: TransferSet, order: np.ndarray) -> None:
    """A resumed dump must see the samples and labels it was planned with."""
    if not np.array_equal(table.ids, ids):
        raise DataError(
            f"{transfer_set.name}: its samples are not the ones this dump was started with",
            tip="restore the data set, or choose another --out",
        )
    where = np.flatnonzero((table.labels != pack_labels(transfer_set.labels)[order]).reshape(len(ids), -1).any(axis=1))
    if where.size:
        raise DataError(
            f"{where.size} labels changed since this dump was started: "
            + first_offenders((table.key(int(r)) for r in where), where.size),
            tip="restore the labels, or choose another --out",
        )


def check_unchanged(table: SampleTable, rows: np.ndarray, batch: LoadedBatch) -> None:
    """What the teacher is about to see must be what samples.h5 says."""
    where = np.flatnonzero((table.digests[rows] != batch.content_digests).any(axis=1))
    if where.size:
        raise DataError(
            f"{where.size} samples changed since this dump was started: "
            + first_offenders((table.key(int(rows[i])) for i in where), where.size),
            tip="restore them, or start again with another --out",
        )

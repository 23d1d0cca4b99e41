"""Whom a dump asks about: the transfer set opened, read once, and found to be the same whenever it is looked at again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softcache.cache.samples import SampleTable, build_table, pack_labels
from softcache.config import StorageOptions
from softcache.data.identity import check_unique, sample_ids
from softcache.data.loading import LoadedBatch
from softcache.data.reading import Collate, read_contents, refuse_misfits
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import ConfigError, DataError, first_offenders
from softcache.files.durable import write_whole
from softcache.models import own_classes
from softcache.models.class_names import gives_classes
from softcache.report.progress import Meter


def open_samples(config: StorageOptions) -> tuple[TransferSet, np.ndarray]:
    """The transfer set and its sample ids, all different; the numbers of the config that need no data are checked."""
    for flag, value in (("batch-size", config.batch_size), ("shard-rows", config.shard_rows)):
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    transfer_set = _with_classes(open_transfer_set(config.data, **config.selection()), config.teacher)
    ids = sample_ids(transfer_set.keys)
    check_unique(transfer_set.keys, ids)
    return transfer_set, ids


def _with_classes(transfer_set: TransferSet, teachers: Sequence[str]) -> TransferSet:
    """The set under the classes of the first teacher that names its own, where itself has neither classes nor labels.

    Where no teacher gives classes it needs none.
    """
    of_classes = list(filter(gives_classes, teachers))
    if transfer_set.num_classes or not of_classes:
        return transfer_set
    for names in filter(None, map(own_classes, of_classes)):
        return transfer_set.under(names, [])
    raise DataError(
        f"{transfer_set.name}: has no classes, and no teacher names any",
        tip="say how many the teacher has, or their names, in its order: classes=10, or classes=cat,dog,...; one that gives an "
        "embedding or scores says so in its spec: output=embedding, output=values, head=none",
    )


def make_samples(
    transfer_set: TransferSet,
    ids: np.ndarray,
    order: np.ndarray,
    *,
    policy: Policy,
    collates: Sequence[Collate],
    store_keys: bool,
    workers: int,
    quiet: bool,
    misfits: str | None = None,
) -> SampleTable:
    """Who the samples are, in the order of rows; every one is read once for its digest.

    Args:
        collates: of the teachers, which must take the samples' views; without any that is not asked.
        misfits: a file for the keys of the samples that cannot be used.

    Raises:
        DataError: samples that cannot be read, or that no batch takes beside the others: all of them are named.
    """
    with Meter("reading samples", len(transfer_set), unit="samples", quiet=quiet) as meter:
        found = read_contents(transfer_set, policy, collates, workers=workers, meter=meter)
    if misfits is not None:
        keys = "".join(f"{transfer_set.keys[place]}\n" for place in sorted(found.misfits))
        write_whole(Path(misfits), keys.encode())
    refuse_misfits(found.misfits, transfer_set.keys)
    return build_table(
        transfer_set.keys,
        ids,
        transfer_set.labels,
        found.digests,
        transfer_set.num_classes,
        order,
        store_keys=store_keys,
    )


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

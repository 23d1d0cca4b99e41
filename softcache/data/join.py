"""The join by sample id: which row of the cache belongs to which sample of a data set. Never by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from softcache.cache.samples import SampleTable, pack_labels
from softcache.data.classes import check_classes
from softcache.data.identity import item_digest, sample_ids
from softcache.data.sources import image_array
from softcache.errors import (
    ClassMismatchError,
    ContentMismatchError,
    JoinError,
    LabelMismatchError,
    MissingSampleError,
    first_offenders,
)

JoinBy = Literal["key", "content"]
ContentCheck = Literal["none", "spread", "full"]
SPREAD = 64  # samples whose content is checked at the start of a run


def dataset_keys(dataset: Any) -> Sequence[str]:
    """The keys of a data set, in its own order.

    Args:
        dataset: anything with `sample_keys`; torchvision's folder and train/test data sets; `Subset` and `ConcatDataset` of them.

    Raises:
        JoinError: an iterable data set, or one whose samples have no names.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise JoinError(
            f"{type(dataset).__name__} can only be iterated, so its samples cannot be found again",
            tip="wrap it in a map-style data set: __len__, __getitem__(index) and sample_keys",
        )
    found = getattr(dataset, "sample_keys", None)
    if found is not None:
        keys: Sequence[str] = found() if callable(found) else found
        return keys
    if isinstance(dataset, Subset):
        keys = dataset_keys(dataset.dataset)
        return [keys[int(i)] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [key for part in dataset.datasets for key in dataset_keys(part)]
    if hasattr(dataset, "samples") and hasattr(dataset, "root"):  # ImageFolder
        return [Path(path).relative_to(dataset.root).as_posix() for path, *_ in dataset.samples]
    # positions are names only where the class says which sample stands where; others have a `split` and are shuffled
    by_torchvision = any(kind.__module__.startswith("torchvision.") for kind in type(dataset).__mro__)
    split = getattr(dataset, "split", None) if by_torchvision else None
    if by_torchvision and split is None and isinstance(getattr(dataset, "train", None), bool):
        split = "train" if dataset.train else "test"
    if isinstance(split, str):
        return [f"{split}/{i:06d}" for i in range(len(dataset))]
    raise JoinError(
        f"{type(dataset).__name__} does not say what its samples are called",
        tip="give it an attribute sample_keys, pass keys=[...] to join, or join by content",
    )


def dataset_labels(dataset: Any) -> np.ndarray | None:
    """(N,) or (N, C) labels where the data set keeps them at hand, else None (samples are not read for this)."""
    if isinstance(dataset, Subset):
        inner = dataset_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) and not all(part.ndim == 1 for part in known):
            return None
        sets: list[Any] = list(dataset.datasets)
        filled = [np.full(len(d), -1) if p is None else p for d, p in zip(sets, parts, strict=True)]
        return np.concatenate(filled) if known else None
    for name in ("labels", "targets", "_labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | tuple):
            found = [-1 if label is None else label for label in found]
        if found is None or not hasattr(found, "__len__") or len(found) != len(dataset):
            continue
        array = np.asarray(found)
        if array.ndim in (1, 2) and array.dtype.kind in "biuf":
            return array
    return None


def dataset_digest(dataset: Any, index: int, kind: str = "item") -> bytes | None:
    """The 16-byte content digest of one sample, where the data set gives digests of this kind ("file", "item"); else None."""
    if isinstance(dataset, Subset):
        return dataset_digest(dataset.dataset, int(dataset.indices[index]), kind)
    if isinstance(dataset, ConcatDataset):
        part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
        start = dataset.cumulative_sizes[part - 1] if part else 0
        return dataset_digest(dataset.datasets[part], index - start, kind)
    gives = hasattr(dataset, "load") and getattr(dataset, "digest_kind", None) == kind
    return dataset.load(index)[1] if gives else None


def find_ids(among: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(B,) int64 place of each uint64 id in `among` (N,), -1 where it is not there."""
    if not len(among):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(among, kind="stable")
    place = order[np.minimum(np.searchsorted(among, ids, sorter=order), len(order) - 1)]
    return np.where(among[place] == ids, place, -1)


def join_rows(table: SampleTable, ids: np.ndarray, key_of: Callable[[int], str]) -> np.ndarray:
    """(N,) row of the cache for each id.

    Raises:
        MissingSampleError: lists the first samples that the cache does not hold.
    """
    rows = find_ids(table.ids, ids)
    missing = np.flatnonzero(rows < 0)
    if missing.size:
        raise MissingSampleError(
            f"{missing.size} of {len(ids)} samples are not in the cache: "
            + first_offenders((key_of(int(i)) for i in missing), missing.size),
            tip="dump them too, choose the cached ones with --samples, or join by content if only the names changed",
        )
    return rows.astype(np.int32 if len(table) < 2**31 else np.int64)


def join_contents(table: SampleTable, digests: np.ndarray, key_of: Callable[[int], str]) -> np.ndarray:
    """(N,) row of the cache for each (N, 16) content digest. JoinError when the cache holds a content twice."""
    stored, wanted = (np.ascontiguousarray(d).view("V16").ravel() for d in (table.digests, digests))
    place = {bytes(content): row for row, content in enumerate(stored)}
    if len(place) < len(stored):
        raise JoinError(
            f"{len(stored) - len(place)} samples of the cache have the same content as another one",
            tip="content does not name a sample here; join by key",
        )
    rows = np.array([place.get(bytes(content), -1) for content in wanted], dtype=np.int64)
    missing = np.flatnonzero(rows < 0)
    if missing.size:
        raise MissingSampleError(
            f"{missing.size} of {len(rows)} samples have a content that the cache does not hold: "
            + first_offenders((key_of(int(i)) for i in missing), missing.size),
            tip="give the items as they were dumped, before any transform",
        )
    return rows


def check_labels(table: SampleTable, rows: np.ndarray, labels: np.ndarray, *, allow: bool) -> int:
    """How many labels differ between data set and cache, where both have one.

    Raises:
        LabelMismatchError: some differ and `allow` is False; lists the first.
    """
    if (labels.ndim == 2) != table.multi_label:
        raise LabelMismatchError("one of data set and cache has several labels per sample, the other has one")
    if table.multi_label and labels.shape[1] != table.num_classes:
        raise ClassMismatchError(
            f"the data set's labels are rows of {labels.shape[1]}, the cache has {table.num_classes}"
        )
    if table.multi_label:
        differs = (pack_labels(labels) != table.labels[rows]).any(axis=1)
    else:
        stored = table.labels[rows]
        differs = (labels != stored) & (labels >= 0) & (stored >= 0)
    where = np.flatnonzero(differs)
    if where.size and not allow:

        def offender(i: int) -> str:
            if table.multi_label:
                return table.key(int(rows[i]))
            return f"{table.key(int(rows[i]))} (data set {int(labels[i])}, cache {int(table.labels[rows[i]])})"

        raise LabelMismatchError(
            f"{where.size} labels differ from the cache's: "
            + first_offenders((offender(int(i)) for i in where), where.size),
            tip="if the labels were corrected on purpose, train with --labels dataset",
        )
    return int(where.size)


def check_contents(
    table: SampleTable, rows: np.ndarray, digest_of: Callable[[int], bytes | None], how: ContentCheck
) -> int:
    """How many samples were compared with the content that the teacher saw: "spread" some, "full" all.

    Raises:
        ContentMismatchError: lists the first samples that differ.
    """
    if how == "none" or not len(rows):
        return 0
    count = len(rows)
    checked = range(count) if how == "full" else np.unique(np.linspace(0, count - 1, min(SPREAD, count)).astype(int))
    different: list[int] = []
    compared = 0
    for i in map(int, checked):
        digest = digest_of(i)
        if digest is None:
            if how == "full":
                raise JoinError("this data set cannot give content digests, so its contents cannot be checked")
            return 0
        compared += 1
        if digest != table.digests[rows[i]].tobytes():
            different.append(i)
    if different:
        raise ContentMismatchError(
            f"{len(different)} of {compared} checked samples hold something else than the teacher saw: "
            + first_offenders((table.key(int(rows[i])) for i in different), len(different)),
            tip="use the data that was dumped, or dump again",
        )
    return compared


def join(
    table: SampleTable,
    dataset: Any,
    class_names: Sequence[str],
    *,
    keys: Sequence[str] | None = None,
    by: JoinBy = "key",
    labels: Literal["cache", "dataset"] = "cache",
    check_content: ContentCheck | None = None,
    digest_kind: str = "item",
    classes_map: Mapping[str, str] | None = None,
) -> tuple[np.ndarray, int]:
    """(N,) rows of the cache, one per sample of the data set, after every check; and the number of labels that differ.

    Args:
        dataset: map-style.
        keys: names of its samples in its order, where it does not know them itself.
        by: "key", or "content": by the digests of what the samples hold.
        labels: "dataset" allows labels that differ from the cache's.
        check_content: "none", "spread" (64 samples) or "full". None: "spread" where the data set gives digests as the dump did.
        digest_kind: of the cache, "file" or "item". Digests of two kinds are never compared.
        classes_map: data set's class -> cache's class, for those that are called otherwise.

    Raises:
        JoinError: and its children, each naming the first offenders.
    """
    check_classes(dataset, class_names, classes_map=classes_map)
    if by == "content":
        digests = [_digest_to_join(dataset, i, digest_kind) for i in range(len(dataset))]
        rows = join_contents(table, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16), lambda i: f"sample {i}")
    else:
        names = keys if keys is not None else dataset_keys(dataset)
        if len(names) != len(dataset):
            raise JoinError(f"{len(names)} keys for {len(dataset)} samples")
        rows = join_rows(table, sample_ids(names), lambda i: names[i])
    found = dataset_labels(dataset)
    changed = 0 if found is None else check_labels(table, rows, found, allow=labels == "dataset")
    how: ContentCheck = check_content or "spread"
    check_contents(table, rows, lambda i: dataset_digest(dataset, i, digest_kind), how)
    return rows, changed


def _digest_to_join(dataset: Any, index: int, kind: str) -> bytes:
    """The digest of one sample's content: as the data set gives it, else of the item it returns."""
    given = dataset_digest(dataset, index, kind)
    if given is not None:
        return given
    if kind != "item":
        raise JoinError(
            "the cache knows contents by the bytes of their files, and this data set gives none",
            tip="join by key, or open the data as it was dumped (imagefolder:PATH)",
        )
    item = item_of(dataset[index])
    return item_digest(image_array(item, f"sample {index}") if isinstance(item, Image.Image) else item)


def item_of(sample: Any) -> Any:
    """The item of what a data set returns: itself, the first of a tuple, or the one a dict names."""
    if isinstance(sample, tuple | list):
        return sample[0]
    if isinstance(sample, dict):
        return next((sample[name] for name in ("item", "image", "text") if name in sample), sample)
    return sample


def replace_item(sample: Any, change: Callable[[Any], Any]) -> Any:
    """The same sample with its item changed."""
    if isinstance(sample, tuple | list):
        return (change(sample[0]), *sample[1:])
    if isinstance(sample, dict):
        name = next((name for name in ("item", "image", "text") if name in sample), None)
        return change(sample) if name is None else {**sample, name: change(sample[name])}
    return change(sample)


def batches(order: np.ndarray, view: int, batch_size: int, *, start: int = 0) -> Iterator[list[tuple[int, int]]]:
    """(index, view) pairs in batches, from batch number `start` on; the last one may be smaller."""
    for first in range(start * batch_size, len(order), batch_size):
        yield [(index, view) for index in order[first : first + batch_size].tolist()]

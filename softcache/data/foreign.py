"""What a data set that is not ours says of its samples: what they are called, their labels, and what they hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from softcache.data.identity import file_digest, item_digest, sample_ids
from softcache.data.sources import image_array
from softcache.data.tables import WORD_COLUMNS, Items, Table, only
from softcache.errors import DataError, JoinError, first_offenders

ITEM_NAMES = ("item", "image", "text")
CHANGES = ("transform", "transforms", "target_transform")  # what a data set may do to its items and labels
LOOKED_BEYOND = 4096  # positions after a data set's end, of which a longer one has at least one


def check_map_style(dataset: Any) -> None:
    """Raise JoinError for what can only be iterated, and for a dict of several data sets."""
    if isinstance(dataset, Mapping):
        raise JoinError(
            f"{type(dataset).__name__} holds several data sets: {first_offenders(map(str, dataset), len(dataset))}",
            tip="join one of them: cache.join(data['train'])",
        )
    for part in parts_of(dataset):
        if part is not dataset:
            check_map_style(part)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise JoinError(
            f"{type(dataset).__name__} can only be iterated, so its samples cannot be found again",
            tip="wrap it in a map-style data set: __len__, __getitem__(index) and sample_keys",
        )


def parts_of(dataset: Any) -> Iterator[Any]:
    """The data sets that a `Subset` or a `ConcatDataset` was made of; the data set itself where it is neither."""
    if isinstance(dataset, Subset):
        yield from parts_of(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from parts_of(part)
    else:
        yield dataset


# --- names -----------------------------------------------------------------------------------------------------------


def dataset_keys(dataset: Any, position: str | None = None) -> Sequence[str]:
    """The keys of a data set, in its own order.

    Args:
        dataset: anything with `sample_keys`; torchvision's folder and train/test data sets; tables with a column of keys;
            `Subset` and `ConcatDataset` of them.
        position: its samples are called by this and their position, `train/000123`; None: as the data set says.

    Raises:
        JoinError: an iterable data set, or one whose samples have no names.
    """
    check_map_style(dataset)
    found = getattr(dataset, "sample_keys", None)
    if found is not None and position is None:
        return checked_keys(found() if callable(found) else found, len(dataset))
    if isinstance(dataset, Subset):
        keys = dataset_keys(dataset.dataset, position)
        return [keys[int(i)] for i in dataset.indices]
    if position is not None:
        return [f"{position}/{i:06d}" for i in range(len(dataset))]
    if isinstance(dataset, ConcatDataset):
        return [key for part in dataset.datasets for key in dataset_keys(part)]
    if isinstance(dataset, Table) and dataset.key is not None:
        return [str(value) for value in dataset.column(dataset.key)]
    if hasattr(dataset, "samples") and hasattr(dataset, "root"):  # ImageFolder
        return [Path(path).relative_to(dataset.root).as_posix() for path, *_ in dataset.samples]
    split = torchvision_split(dataset)
    if split is None:
        raise JoinError(
            f"{type(dataset).__name__} does not say what its samples are called",
            tip="give it an attribute sample_keys, pass keys=[...] to join (key=COLUMN of a table), or join by content",
        )
    if not _is_torchvisions_own(dataset):
        base = next(kind for kind in type(dataset).__mro__ if kind.__module__.startswith("torchvision."))
        raise JoinError(
            f"{type(dataset).__name__} is a class of its own on top of torchvision's {base.__name__}: it may have left out or "
            "moved samples, so their positions are no names",
            tip="give it an attribute sample_keys with the names of the samples that it has; "
            'keys="position" says that sample i is still what the cache knows as sample i',
        )
    return [f"{split}/{i:06d}" for i in range(len(dataset))]


def checked_keys(keys: Sequence[Any], count: int) -> Sequence[str]:
    """The keys, where they are strings and as many as samples; else JoinError."""
    if len(keys) != count:
        raise JoinError(f"{len(keys)} keys for {count} samples", tip="one key per sample, in the data set's order")
    wrong = next((key for key in keys if not isinstance(key, str)), None)
    if wrong is not None:
        raise JoinError(f"sample key {wrong!r} is not a string", tip="use str(...) of what names the sample")
    return keys


def torchvision_split(dataset: Any) -> str | None:
    """What the positions of a data set of torchvision, or of a class made of one, are counted in; None for any other.

    Other data sets have a `split` too, and are shuffled and filtered.
    """
    if not any(kind.__module__.startswith("torchvision.") for kind in type(dataset).__mro__):
        return None
    split = getattr(dataset, "split", None)
    if split is None and isinstance(getattr(dataset, "train", None), bool):
        split = "train" if dataset.train else "test"
    return split if isinstance(split, str) else None


def check_positions(dataset: Any, known: np.ndarray) -> None:
    """Raise JoinError where a data set of torchvision is shorter than the one that was dumped: samples were taken out of it.

    Args:
        known: (N,) uint64 ids of the cache's samples.
    """
    for part in parts_of(dataset):
        split = torchvision_split(part)
        by_position = split is not None and _is_torchvisions_own(part) and not hasattr(part, "sample_keys")
        if not by_position or (hasattr(part, "samples") and hasattr(part, "root")):
            continue
        beyond = [f"{split}/{i:06d}" for i in range(len(part), len(part) + LOOKED_BEYOND)]
        there = np.flatnonzero(np.isin(sample_ids(beyond), known))
        if there.size:
            raise JoinError(
                f"{type(part).__name__} has {len(part)} samples, and the cache knows its {beyond[int(there[0])]}: samples were "
                "taken out of it, so positions no longer say which is which",
                tip="leave the data set whole and choose with torch.utils.data.Subset, or pass keys=[...]",
            )


def _is_torchvisions_own(dataset: Any) -> bool:
    return type(dataset).__module__.startswith("torchvision.")


# --- labels ----------------------------------------------------------------------------------------------------------


def dataset_labels(dataset: Any, class_names: Sequence[str] = ()) -> np.ndarray | None:
    """(N,) or (N, C) labels where the data set keeps them at hand, else None (samples are not read for this).

    Args:
        class_names: of the cache, for labels that are names.
    """
    if isinstance(dataset, Subset):
        inner = dataset_labels(dataset.dataset, class_names)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_labels(part, class_names) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) and not all(part.ndim == 1 for part in known):
            return None
        sets: list[Any] = list(dataset.datasets)
        filled = [np.full(len(d), -1) if p is None else p for d, p in zip(sets, parts, strict=True)]
        return np.concatenate(filled) if known else None
    if isinstance(dataset, Table):
        return dataset.labels(class_names)
    for found in _kept_labels(dataset):
        if isinstance(found, list | tuple):
            found = [-1 if label is None else label for label in found]
        if found is None or not hasattr(found, "__len__") or len(found) != len(dataset):
            continue
        array = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
        if array.ndim in (1, 2) and array.dtype.kind in "biuf":
            return array
    return None


def _kept_labels(dataset: Any) -> Iterator[Any]:
    """What may be a data set's list of labels, the likeliest first."""
    for name in ("labels", "targets", "_labels"):
        yield getattr(dataset, name, None)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        last = dataset.tensors[-1]
        yield last if last.ndim == 1 and not last.is_floating_point() else None
    for name in ("samples", "_samples", "imgs"):  # (path, label) of torchvision's
        pairs = getattr(dataset, name, None)
        if (
            isinstance(pairs, list | tuple)
            and pairs
            and all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs)
        ):
            yield [label for _, label in pairs] if all(isinstance(label, int) for _, label in pairs) else None


# --- what they hold --------------------------------------------------------------------------------------------------


def dataset_digest(dataset: Any, index: int, kind: str = "item") -> bytes | None:
    """The 16-byte content digest of one sample, of that kind ("file", "item"), where it is certain; else None.

    It is where the data set gives digests itself, where its files are to be hashed, and where its items are read as they are
    stored: out of a table, or of a class of torchvision without its transforms.
    """
    if isinstance(dataset, Subset):
        return dataset_digest(dataset.dataset, int(dataset.indices[index]), kind)
    if isinstance(dataset, ConcatDataset):
        part, index = place_in(dataset, index)
        return dataset_digest(part, index, kind)
    if hasattr(dataset, "load") and hasattr(dataset, "digest_kind"):
        return dataset.load(index)[1] if dataset.digest_kind == kind else None
    if kind == "file":
        path = _path_of(dataset, index)
        return None if path is None else file_digest(path.read_bytes())
    if isinstance(dataset, Table) or (_is_torchvisions_own(dataset) and not isinstance(dataset, Subset)):
        return digest_of(plain_sample(dataset, index)[0])
    return None


def place_in(dataset: ConcatDataset[Any], index: int) -> tuple[Any, int]:
    """The part that holds a sample of a `ConcatDataset`, and its index there."""
    part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
    return dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0)


def plain_sample(dataset: Any, index: int) -> tuple[Any, Any]:
    """(item, label) of one sample, without the data set's own transforms; None for a label that is not there."""
    if isinstance(dataset, Subset):
        return plain_sample(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        return plain_sample(*place_in(dataset, index))
    if isinstance(dataset, Table):
        return dataset.plain(index)
    if any(getattr(dataset, name, None) is not None for name in CHANGES):
        dataset = copy.copy(dataset)
        for name in CHANGES:
            if getattr(dataset, name, None) is not None:
                setattr(dataset, name, None)
    sample = dataset[index]
    return content_of(sample), label_of(sample)


def changes_labels(dataset: Any) -> bool:
    """Whether a data set, or a part of it, names a transform that its labels go through."""
    names = ("transforms", "target_transform")
    return any(getattr(part, name, None) is not None for part in parts_of(dataset) for name in names)


def digest_of(item: Any) -> bytes | None:
    """The content digest of an item as a dump makes it; None for one without canonical bytes."""
    try:
        return item_digest(image_array(item, "an image") if isinstance(item, Image.Image) else item)
    except DataError:
        return None


def _path_of(dataset: Any, index: int) -> Path | None:
    """The file of one sample of a folder data set."""
    for name in ("samples", "imgs", "_samples", "_image_files"):
        found = getattr(dataset, name, None)
        if isinstance(found, list | tuple) and len(found) == len(dataset):
            path = found[index][0] if isinstance(found[index], tuple | list) else found[index]
            if isinstance(path, str | Path):
                return Path(path)
    return None


def item_of(sample: Any, column: Items = None) -> Any:
    """The item of what a data set returns: itself, the first of a tuple, or the one a dict names.

    Args:
        column: of a dict, or two of them for a pair; None: item, image or text.
    """
    if isinstance(sample, tuple | list):
        return sample[0]
    if isinstance(column, tuple):
        return tuple(sample[name] for name in column)
    if isinstance(sample, dict):
        return next((sample[name] for name in (column, *ITEM_NAMES) if name in sample), sample)
    return sample


def content_of(sample: Any) -> Any:
    """The item of what a data set returns, as a dump takes it: of a dict of words these."""
    item = item_of(sample)
    words = only(WORD_COLUMNS, tuple(sample)) if item is sample and isinstance(sample, dict) else None
    item = item if words is None else sample[words]
    return item.tolist() if isinstance(item, np.ndarray) and item.dtype.kind in "UO" else item


def label_of(sample: Any, column: str | None = None) -> Any:
    """The label of what a data set returns: the second of a tuple, or the one a dict names; None where there is none."""
    if isinstance(sample, tuple | list):
        return sample[1] if len(sample) > 1 else None
    if isinstance(sample, dict):
        return next((sample[name] for name in (column, "label", "labels") if name in sample), None)
    return None


def replace_item(sample: Any, change: Any, column: Items = None) -> Any:
    """The same sample with its item changed."""
    if isinstance(sample, tuple | list):
        return (change(sample[0]), *sample[1:])
    if isinstance(column, tuple):
        return {**sample, **dict(zip(column, change(item_of(sample, column)), strict=True))}
    if isinstance(sample, dict):
        name = next((name for name in (column, *ITEM_NAMES) if name in sample), None)
        return change(sample) if name is None else {**sample, name: change(sample[name])}
    return change(sample)

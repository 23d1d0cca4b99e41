"""The join by sample id: which row of the cache belongs to which sample of a data set. Never by position."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from PIL import Image

from softcache.cache.samples import SampleTable
from softcache.data.classes import check_classes
from softcache.data.foreign import (
    changes_labels,
    check_positions,
    checked_keys,
    content_of,
    dataset_digest,
    dataset_keys,
    dataset_labels,
    digest_of,
    parts_of,
    plain_sample,
    torchvision_split,
)
from softcache.data.identity import item_digest, sample_ids
from softcache.data.label_kind import has_several, is_known, is_yes
from softcache.data.sources import image_array
from softcache.data.tables import Table, indices_of, labels_by_name
from softcache.data.word_samples import are_tagged, gives_words
from softcache.errors import (
    ClassMismatchError,
    ContentMismatchError,
    JoinError,
    LabelMismatchError,
    MissingSampleError,
    first_offenders,
    warn_once,
)

JoinBy = Literal["key", "content"]
ContentCheck = Literal["none", "spread", "full"]
_NUMBERED = re.compile(r"/[0-9]{6,}")
SPREAD = 64  # samples whose content is checked at the start of a run


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
    if has_several(labels) != table.multi_label:
        raise LabelMismatchError("one of data set and cache has several labels per sample, the other has one")
    if table.multi_label and labels.shape[1] != table.num_classes:
        raise ClassMismatchError(
            f"the data set's labels are rows of {labels.shape[1]}, the cache has {table.num_classes}"
        )
    if table.multi_label:
        known = is_known(labels)
        compared = int(known.any(axis=1).sum())
        differs = ((is_yes(labels) != table.labels_of(rows)) & known).any(axis=1)
    else:
        stored = table.labels[rows]
        both = (labels >= 0) & (stored >= 0)
        compared, differs = int(both.sum()), (labels != stored) & both
    where = np.flatnonzero(differs)
    if where.size and not allow:

        def offender(i: int) -> str:
            if table.multi_label:
                return table.key(int(rows[i]))
            return f"{table.key(int(rows[i]))} (data set {int(labels[i])}, cache {int(table.labels[rows[i]])})"

        refuse_changed_labels((offender(int(i)) for i in where), int(where.size), compared)
    return int(where.size)


def refuse_changed_labels(offenders: Iterable[str], count: int, compared: int) -> NoReturn:
    """Raise LabelMismatchError for so many labels that differ from the cache's, of those that were compared."""
    on_purpose = "if the labels were corrected on purpose, train with --labels dataset"
    raise LabelMismatchError(
        f"{count} labels differ from the cache's: {first_offenders(offenders, count)}",
        tip=on_purpose
        if 2 * count <= compared
        else "most of them differ, so the samples probably stand in another order than their names say, or belong to other "
        f"data: look at what names them (sample_keys, keys=, key=) and at the order of the classes. Only {on_purpose}",
    )


def check_contents(
    table: SampleTable,
    rows: np.ndarray,
    dataset: Any,
    how: ContentCheck,
    *,
    kind: str = "item",
    as_dumped: Callable[[Any], bool] = lambda item: True,
) -> str:
    """Compare what samples hold with what the teacher saw: "spread" some of them, "full" all.

    Args:
        kind: of the cache's digests.
        as_dumped: whether an item is of the kind that the teacher was given, as far as the cache tells. One that is not was
            changed on its way by the data set, and cannot be compared.

    Returns:
        Why nothing could be compared; "" where it was.

    Raises:
        ContentMismatchError: lists the first samples that differ.
    """
    if how == "none" or not len(rows):
        return ""
    different: dict[int, bytes] = {}
    certain, places = True, _places(len(rows), how)
    for i in places:
        digest = dataset_digest(dataset, i, kind)
        if digest is None and kind == "item":
            certain, digest = False, _read_digest(dataset, i)
        if digest is None:
            return _why_none(dataset)
        if digest != table.digests[rows[i]].tobytes():
            different[i] = digest
    if not different:
        return ""
    if not certain:
        if any(_read_digest(dataset, i) != digest for i, digest in list(different.items())[:8]):
            return "its items change from one reading to the next"
        if len(different) == len(places) and not as_dumped(plain_sample(dataset, places[0])[0]):
            return "its items are not of the kind that the teacher was given"
    raise ContentMismatchError(
        f"{len(different)} of {len(places)} checked samples hold something else than the teacher saw: "
        + first_offenders((table.key(int(rows[i])) for i in different), len(different)),
        tip="use the data that was dumped, or dump again; check_content='none' takes the samples as they are",
    )


def _why_none(dataset: Any) -> str:
    nameless = any(isinstance(part, Table) and part.item is None for part in parts_of(dataset))
    return "say which column holds its items: item=NAME" if nameless else "it gives none of the kind that the dump took"


def _places(count: int, how: ContentCheck) -> list[int]:
    """The samples that are looked at."""
    if how == "full":
        return list(range(count))
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(SPREAD, count)).astype(np.int64))]


def _read_digest(dataset: Any, index: int) -> bytes | None:
    """The digest of an item as it is read; None where it cannot be, without the data set's own transforms."""
    try:
        return digest_of(plain_sample(dataset, index)[0])
    except Exception:  # somebody's own class, which may not do without them
        return None


def read_labels(dataset: Any, places: Sequence[int], class_names: Sequence[str]) -> np.ndarray | None:
    """(n,) or (n, C) labels of some samples as they are read, -1 where there is none; None where they give no class labels."""
    try:
        samples = [plain_sample(dataset, i) for i in places]
        # labels of words are no row of classes
        values: list[Any] = [None if are_tagged(*sample) else sample[1] for sample in samples]
    except Exception:  # as above
        return None
    plain = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    if plain and all(getattr(value, "shape", None) == (len(class_names),) for value in plain):
        rows = np.stack([np.asarray(value) for value in plain])
        return rows.astype(bool) if rows.dtype.kind in "bui" else None
    labels = labels_by_name(plain, class_names) if any(isinstance(one, str) for one in plain) else indices_of(plain)
    # numbers beyond the classes are something else: a position, a regression's target
    return (
        None if labels is None or labels.max(initial=-1) >= len(class_names) or labels.max(initial=-1) < 0 else labels
    )


@dataclass(frozen=True)
class Found:
    """What a join found.

    Attributes:
        rows: (N,) row of the cache for each sample.
        changed: how many labels differ.
        watch: no list of labels was at hand, and those of some samples agree as they are read: so may the others be compared.
    """

    rows: np.ndarray
    changed: int
    watch: bool = False


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
    as_dumped: Callable[[Any], bool] = lambda item: True,
    same_pixels: Callable[[Sequence[Any], np.ndarray], bool] = lambda items, rows: False,
    classes_map: Mapping[str, str] | None = None,
) -> Found:
    """Rows of the cache, one per sample of the data set, after every check.

    Args:
        dataset: map-style; its tables as `Table`.
        keys: names of its samples in its order, where it does not know them itself; "position": they are numbered as the cache's.
        by: "key", or "content": by the digests of what the samples hold.
        labels: "dataset" allows labels that differ from the cache's.
        check_content: "none", "spread" (64 samples) or "full". None: "spread", and where it cannot be done that is said.
        digest_kind: of the cache, "file" or "item". Digests of two kinds are never compared.
        as_dumped: as `check_contents` takes it.
        same_pixels: whether these items of these rows have the pixels that the teacher saw.
        classes_map: data set's class -> cache's class, for those that are called otherwise.

    Raises:
        JoinError: and its children, each naming the first offenders.
    """
    if class_names:
        check_classes(dataset, class_names, classes_map=classes_map)
    if by == "content":
        rows = _rows_by_content(table, dataset, digest_kind)
    else:
        names = _names(table, dataset, keys)
        rows = join_rows(table, sample_ids(names), lambda i: names[i])
    kept, watch = dataset_labels(dataset, class_names) if class_names else None, False
    places = np.arange(len(rows))
    if kept is None and class_names:
        places = np.array(_places(len(rows), "spread"))
        kept = read_labels(dataset, places.tolist(), class_names)
        watch = kept is not None and kept.ndim == 1 and labels == "cache" and not changes_labels(dataset)
    changed = 0 if kept is None else check_labels(table, rows[places], kept, allow=labels == "dataset")
    if by == "key":
        how: ContentCheck = check_content or "spread"
        unseen = check_contents(table, rows, dataset, how, kind=digest_kind, as_dumped=as_dumped)
        if unseen and _have_same_pixels(dataset, rows, how, same_pixels):
            unseen = ""
        _tell_unseen(dataset, unseen, check_content, labels_seen=kept is not None or gives_words(dataset))
    return Found(rows, changed, watch and not changed)


def _rows_by_content(table: SampleTable, dataset: Any, kind: str) -> np.ndarray:
    digests = [_digest_to_join(dataset, i, kind) for i in range(len(dataset))]
    contents = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return join_contents(table, contents, lambda i: f"sample {i}")


def _names(table: SampleTable, dataset: Any, keys: Sequence[str] | str | None) -> Sequence[str]:
    """The keys of the samples: as they are given, or as the data set says."""
    if keys is None:
        check_positions(dataset, table.ids)
        return dataset_keys(dataset)
    if not isinstance(keys, str):
        return checked_keys(keys if isinstance(keys, list | tuple) else _listed(keys), len(dataset))
    if keys != "position":
        raise JoinError(
            f"keys={keys!r}", tip='give one key per sample, or keys="position"; a column of a table is key=NAME'
        )
    splits = {split for part in parts_of(dataset) if (split := torchvision_split(part)) is not None}
    return dataset_keys(dataset, splits.pop() if len(splits) == 1 else _numbered_by(table))


def _listed(keys: Any) -> Sequence[str]:
    """Keys in a column or an array as Python's own strings."""
    return list(keys.tolist()) if hasattr(keys, "tolist") else keys


def _numbered_by(table: SampleTable) -> str:
    """What the cache's samples are called before their position; JoinError where they are not numbered."""
    first = table.key(0).rpartition("/")[0] if table.has_keys else ""
    numbered = first and all(_NUMBERED.fullmatch(table.key(r).removeprefix(first)) for r in range(0, len(table), 97))
    if not numbered:
        raise JoinError(
            "the cache's samples are not called by their position"
            + (f": one is {table.key(0)!r}" if table.has_keys else ", as far as it says: it was made with --no-keys"),
            tip="pass keys=[...], one per sample",
        )
    return first


def _have_same_pixels(
    dataset: Any, rows: np.ndarray, how: ContentCheck, same_pixels: Callable[[Sequence[Any], np.ndarray], bool]
) -> bool:
    """Whether samples whose contents cannot be compared have the pixels of the teacher's first view: that decides it too."""
    places = _places(len(rows), how)
    try:
        items = [plain_sample(dataset, i)[0] for i in places]
        arrays = [image_array(item, "an image") if isinstance(item, Image.Image) else item for item in items]
        return same_pixels(arrays, rows[places].astype(np.int64))
    except Exception:  # somebody's own class, and whatever its items are
        return False


def _tell_unseen(dataset: Any, unseen: str, asked: ContentCheck | None, *, labels_seen: bool) -> None:
    """Refuse what was asked for and could not be done; say it where nobody asked."""
    if not unseen and asked != "none":
        return
    name = type(dataset.rows if isinstance(dataset, Table) else dataset).__name__
    if unseen and asked is not None:
        raise JoinError(
            f"{name} cannot give content digests as the dump did, so its contents cannot be checked: {unseen}",
            tip="without check_content= only names, labels and classes are compared",
        )
    if unseen:
        also = "" if labels_seen else ", nor were labels"
        warn_once(f"the contents of {name} were not compared with what the teacher saw{also}: {unseen}")
    elif not labels_seen:
        warn_once(f"{name} gives no class labels that could be compared with the cache's, and contents were not to be")


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
    item = content_of(dataset[index])
    return item_digest(image_array(item, f"sample {index}") if isinstance(item, Image.Image) else item)


def batches(order: np.ndarray, view: int, batch_size: int, *, start: int = 0) -> Iterator[list[tuple[int, int]]]:
    """(index, view) pairs in batches, from batch number `start` on; the last one may be smaller."""
    for first in range(start * batch_size, len(order), batch_size):
        yield [(index, view) for index in order[first : first + batch_size].tolist()]

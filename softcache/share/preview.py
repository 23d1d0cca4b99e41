"""A small table of samples and of what the teachers answered, which a hub's viewer shows; pictures of two, if asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softcache.cache.card.beside import PICTURES
from softcache.cache.card.preview_columns import CLASSES, POSITIONS, ROWS, VALUES, Column, preview_columns
from softcache.cache.plan import CLASS_OUTPUTS
from softcache.data.identity import sample_ids
from softcache.data.images import to_tensor
from softcache.data.join import find_ids
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ContentMismatchError, DataError
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache

BATCH_NUMBERS = 1 << 22  # of one member, held in memory at once
DIGITS = 4  # of a number that is shown
SMALLEST, LARGEST = 160, 512  # pixels of the longer side of a picture


def preview_rows(cache: Cache) -> np.ndarray:
    """(n,) int64 rows, at most ROWS of them, spread over the cache: in their own order a cache may have one class first."""
    return np.unique(np.linspace(0, len(cache) - 1, min(ROWS, len(cache))).astype(np.int64))


def preview_cells(cache: Cache) -> dict[str, list[Any]]:
    """Column -> its cells, of view 0 of `preview_rows`; the columns are those of `preview_columns`."""
    members = [member for member in cache.manifest.plan.members if member.output is not None]
    widest = max([cache.num_classes, *(member.width or 0 for member in members)])
    indexed = bool(cache.manifest.plan.indexes)
    rows = preview_rows(cache)
    cells: dict[str, list[Any]] = {column.name: [] for column in preview_columns(cache.manifest.plan)}
    batch = 1 if indexed else max(1, BATCH_NUMBERS // max(1, widest))
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        targets = cache.gather(chosen, np.zeros(len(chosen), np.int64), members=[member.name for member in members])
        for name, found in _cells(cache, targets):
            if name in cells:
                cells[name] += found
    return cells


def _cells(cache: Cache, targets: Targets) -> Iterator[tuple[str, list[Any]]]:
    """Of a batch: (column, a cell a sample), and perhaps a label that no column has."""
    plan = cache.manifest.plan
    yield "sample", [cache.samples.key(row) for row in targets.rows.tolist()]
    yield "label", [label_text(cache, row) for row in targets.rows.tolist()]
    for index in plan.indexes:
        at = cache.positions(index.name, targets.rows, targets.views)  # of one sample
        yield f"{index.name}_count", [int(count) for count in at.counts]
        if at.labels is not None:
            yield f"{index.name}_labels", [[_class(cache, place) for place in at.labels[:POSITIONS].tolist()]]
    for member in plan.members:
        if member.output is None:
            continue
        if member.index is not None:
            count = int(targets.positions[member.index].counts[0])
            first = targets.per_position(member.index).rows_between(0, min(count, POSITIONS)) if count else None
            yield from _of_positions(cache, member.name, first)
        elif member.output in CLASS_OUTPUTS:
            yield from _of_classes(cache, member.name, targets)
        else:
            found = targets.output(member.name).double()
            if member.output == "values":
                yield f"{member.name}_values", [_short(row) for row in found[:, :VALUES]]
            else:
                yield f"{member.name}_norm", _short(found.norm(dim=1))


def _of_classes(cache: Cache, name: str, targets: Targets) -> Iterator[tuple[str, list[Any]]]:
    shares = targets.log_soft_target(name, 1.0).double().exp()  # (B, C)
    count = min(CLASSES, _stored_classes(cache, name, targets, shares.shape[1]))
    places = shares.sort(dim=1, descending=True, stable=True).indices[:, :count]  # of equal ones the lower number first
    yield f"{name}_classes", [[_class(cache, place) for place in row] for row in places.tolist()]
    yield f"{name}_probabilities", [_short(row) for row in shares.gather(1, places)]
    if not cache.multi_label:
        whole = cache.codecs[name].complete  # of some classes only it is not known
        yield f"{name}_entropy", _short(torch.special.entr(shares).sum(dim=1)) if whole else [None] * len(shares)


def _stored_classes(cache: Cache, name: str, targets: Targets, classes: int) -> int:
    """How many classes of a record are known: of the k largest alone, k."""
    return classes if cache.codecs[name].complete else min(classes, targets.head(name, 1.0)[0].shape[1])


def _of_positions(cache: Cache, name: str, first: Targets | None) -> Iterator[tuple[str, list[Any]]]:
    """Of the first positions of one sample; None where it has none."""
    if cache.member(name).output not in CLASS_OUTPUTS:
        yield f"{name}_norms", [[] if first is None else _short(first.output(name).double().flatten(1).norm(dim=1))]
        return
    shares = torch.zeros(0, 1) if first is None else first.log_soft_target(name, 1.0).double().exp()  # (P, C)
    best = shares.max(dim=1)
    yield f"{name}_classes", [[_class(cache, place) for place in best.indices.tolist()]]
    yield f"{name}_probabilities", [_short(best.values)]


def _short(numbers: Tensor) -> list[float]:
    """As people read them; so that they are the same on every processor."""
    return [float(f"{number:.{DIGITS}g}") for number in numbers.tolist()]


def _class(cache: Cache, place: int) -> str | None:
    """The name of a class, of a vocabulary its number; None of no class."""
    if place < 0:
        return None
    return cache.class_names[place] if cache.class_names else str(place)


def label_text(cache: Cache, row: int) -> str | list[str | None] | None:
    """The name of a sample's class, or those of its classes."""
    label = cache.samples.labels_of(np.array([row]))[0]
    if cache.multi_label:
        return [_class(cache, int(place)) for place in np.flatnonzero(label)]
    return _class(cache, int(label))


def to_parquet(columns: Sequence[Column], cells: Mapping[str, list[Any]]) -> bytes:
    """A Parquet file of these columns: of the same cells and version of pyarrow the same bytes."""
    import pyarrow
    import pyarrow.parquet

    kinds = {"text": pyarrow.string(), "number": pyarrow.float64(), "whole": pyarrow.int64()}
    types = [pyarrow.list_(kinds[one.kind]) if one.many else kinds[one.kind] for one in columns]
    arrays = [pyarrow.array(cells[one.name], type=kind) for one, kind in zip(columns, types, strict=True)]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=[one.name for one in columns]), sink)
    return sink.getvalue()


def pictures_of(cache: Cache, data: str) -> list[tuple[bytes, str]]:
    """(PNG, what it shows) of the first samples of the preview that a transfer set holds, as it has them.

    Raises:
        DataError: it holds none of them, or they are no images.
        ContentMismatchError: what it holds under a name is not what the teachers saw.
    """
    transfer_set, rows = open_transfer_set(data), preview_rows(cache)
    found = find_ids(sample_ids(transfer_set.keys), cache.samples.ids[rows])
    made = []
    for row, index in zip(rows.tolist(), found.tolist(), strict=True):
        if index < 0:
            continue
        key, (item, digest) = cache.samples.key(row), transfer_set.load(index)
        same_kind = transfer_set.digest_kind == cache.manifest.plan.samples.digest_kind
        if same_kind and digest != cache.samples.digests[row].tobytes():
            raise ContentMismatchError(
                f"{transfer_set.name}: sample {key!r} is not what the teachers saw",
                tip="give --pictures the transfer set that was dumped",
            )
        label = label_text(cache, row)
        said = ", ".join(map(str, label)) if isinstance(label, list) else label
        made.append((_png(item, key), key if not said else f"{key}: {said}"))
        if len(made) == PICTURES:
            break
    if not made:
        raise DataError(
            f"{transfer_set.name}: has none of the {len(rows)} samples of the preview",
            tip="give --pictures the transfer set that was dumped",
        )
    return made


def _png(item: Any, key: str) -> bytes:
    """The picture of one sample; a small one with larger pixels, a large one made smaller."""
    try:
        channels = to_tensor(item)
    except DataError:
        channels = torch.zeros(0)
    if channels.ndim != 3 or channels.shape[0] not in (1, 3, 4):
        raise DataError(f"sample {key!r} is no image", tip="leave out --pictures: the preview shows what was answered")
    array = channels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    factor = max(1, SMALLEST // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST, LARGEST))
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    return sink.getvalue()

"""Do views still render to the pixels the teacher saw? Digests tell that they do not, the probe tells by how much.

A decoder of another version may round a pixel value differently, and that hurts nobody; another crop would teach
the wrong pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from softcache.cache.plan import Plan
from softcache.cache.reader import CacheReader
from softcache.cache.schema import PROBE_RECORDS
from softcache.errors import DriftError, first_offenders

TOLERATED_DIFFERENCE = 2  # of 255

Render = Callable[[int, int], Any]  # (row, view) -> rendered item, or None where the sample is not at hand


@dataclass(frozen=True)
class Drift:
    """A tolerated difference.

    Attributes:
        records: how many of the checked views have other pixels.
        checked: how many were checked.
        apart: the largest difference of a pixel value over the probe, of 255; None where the probe could not be rendered.
    """

    records: int
    checked: int
    apart: int | None

    def __str__(self) -> str:
        apart = "by an unknown amount" if self.apart is None else f"by {self.apart} of 255"
        return f"{self.records} of {self.checked} checked views differ from what the teacher saw, {apart}"


def make_probe(render: Render, num_rows: int, num_views: int) -> dict[str, np.ndarray]:
    """The arrays of probe.h5: 64 rendered records, spread over rows and views; empty where items are no uint8 images.

    Returns:
        `rows` (n,) uint64, `views` (n,) uint32, `shapes` (n, 3) uint32 (0 for an axis that an item does not have),
        `pixels` uint8, all items one after the other.
    """
    count = min(PROBE_RECORDS, num_rows * num_views)
    places = [(i * num_rows // count, i % num_views) for i in range(count)]
    rendered = [_pixels(render(row, view)) for row, view in places]
    items = [item for item in rendered if item is not None]
    if not items or len(items) < count:
        return {}
    shapes = np.zeros((count, 3), np.uint32)
    for shape, item in zip(shapes, items, strict=True):
        shape[: item.ndim] = item.shape
    return {
        "rows": np.array([row for row, _ in places], np.uint64),
        "views": np.array([view for _, view in places], np.uint32),
        "shapes": shapes,
        "pixels": np.concatenate([item.reshape(-1) for item in items]),
    }


def check_drift(
    reader: CacheReader,
    rows: np.ndarray,
    views: np.ndarray,
    digests: np.ndarray,
    render: Render,
    *,
    on_drift: str = "error",
) -> Drift | None:
    """Compare pixel digests with the stored ones; where they differ, render the probe and judge.

    Args:
        rows, views: (B,) places in the cache.
        digests: (B,) uint32 of the items as rendered here.
        render: renders a record of the probe.
        on_drift: "warn" tolerates any difference.

    Returns:
        None when all pixels are the teacher's; a Drift where they are at most 2 of 255 apart (to be told once and recorded).

    Raises:
        DriftError: more than that, or another sample behind a key; names the samples and the versions on both sides.
    """
    stored = reader.gather(None, reader.manifest.plan.views.digests[0], rows, views)
    where = np.flatnonzero(stored != digests)
    if not where.size:
        return None
    apart = _largest_difference(reader.probe(), render)
    drift = Drift(int(where.size), len(rows), apart)
    if on_drift == "warn" or (apart is not None and 0 < apart <= TOLERATED_DIFFERENCE):
        return drift
    named = first_offenders((reader.samples.key(int(rows[i])) for i in where), where.size)
    if not reader.probe():  # no pictures
        raise DriftError(
            f"{where.size} of {len(rows)} checked views are not what the teacher saw: {named}",
            tip="they changed, or are cut into other words or tokens: restore them, or leave them out with --without; "
            "--on-drift warn trains on them as they are",
        )
    if apart == 0:
        raise DriftError(
            f"{where.size} of {len(rows)} checked views have other pixels than the teacher saw, while the probe renders as it "
            f"did: these samples changed: {named}",
            tip="restore them, or leave them out with --without; --on-drift warn trains on them as they are",
        )
    by = "" if apart is None else f" (up to {apart} of 255 apart)"
    raise DriftError(
        f"{where.size} of {len(rows)} checked views render to other pixels than the teacher saw{by}: {named}",
        tip=f"{versions(reader.manifest.plan)}; check these and the data set, or train on them as they are with --on-drift warn",
    )


def versions(plan: Plan) -> str:
    """What rendered the cache's views, and what renders here."""
    import PIL
    import torch
    import torchvision

    from softcache.version import __version__

    made = plan.made_with
    here = {
        "softcache": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }
    return (
        "the cache was made with "
        + ", ".join(f"{name} {made[name]}" for name in here)
        + "; here are "
        + ", ".join(f"{name} {version}" for name, version in here.items())
    )


def _largest_difference(probe: Mapping[str, np.ndarray], render: Render) -> int | None:
    """Over the probe's records that can be rendered here: 255 where a shape differs, None where there is none."""
    largest: int | None = None
    if not probe:
        return None
    ends = np.cumsum(probe["shapes"].clip(min=1).prod(axis=1, dtype=np.int64))
    for number, (row, view) in enumerate(zip(probe["rows"].tolist(), probe["views"].tolist(), strict=True)):
        found = _pixels(render(row, view))
        if found is None:
            continue
        shape = tuple(int(n) for n in probe["shapes"][number] if n)
        if found.shape != shape:
            return 255
        stored = probe["pixels"][ends[number] - found.size : ends[number]].reshape(shape)
        largest = max(largest or 0, int(np.abs(stored.astype(np.int16) - found).max(initial=0)))
    return largest


def _pixels(item: Any) -> np.ndarray | None:
    """A rendered uint8 image as an array; None for anything else."""
    array = item.numpy() if isinstance(item, Tensor) else item
    return array if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim in (2, 3) else None

"""What the teachers see: rendered rows, and that a new member sees what the others saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from softcache.cache.reader import CacheReader
from softcache.data.drift import check_drift
from softcache.data.identity import pixel_digest
from softcache.data.loading import LoadedBatch, ViewedSet
from softcache.dump.choose_codec import CHECKED_SAMPLES
from softcache.errors import warn


def renderer(viewed: ViewedSet, order: np.ndarray) -> Callable[[int, int], Any]:
    """(row, view) -> the rendered item."""
    return lambda row, view: viewed.render(int(order[row]), view)


class PixelCheck:
    """A new member must see what the others saw: every view's pixels against the cache's digests. A rounding is told once."""

    def __init__(self, reader: CacheReader, order: np.ndarray, viewed: ViewedSet) -> None:
        self._reader, self._render, self._told = reader, renderer(viewed, order), False

    def check_first(self) -> None:
        """The first rows of view 0."""
        rows = np.arange(min(CHECKED_SAMPLES, len(self._reader.samples)))
        digests = np.array([pixel_digest(self._render(row, 0)) for row in rows.tolist()], dtype=np.uint32)
        check_drift(self._reader, rows, np.zeros_like(rows), digests, self._render)

    def check(self, rows: np.ndarray, batch: LoadedBatch) -> None:
        assert batch.pixel_digests is not None
        drift = check_drift(self._reader, rows, batch.views, batch.pixel_digests, self._render)
        if drift is not None and not self._told:
            self._told = True
            warn(str(drift))

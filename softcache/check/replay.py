"""Rendering a cache's views again, for a picture or a check, outside of any training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.provenance import told_data
from softcache.data.identity import sample_ids
from softcache.data.join import find_ids
from softcache.data.loading import Partners, Rendered, ViewedSet
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ConfigError, DataError, UntrustedError
from softcache.targets.cache import open as open_cache


class Replay:
    """A cache and the transfer set that it was made from.

    Args:
        path: the cache.
        data: the transfer set; None: the one that provenance.json names, with `allow_code` only.
        allow_code: believe what the cache names: open that data set, run transforms of its views.
        quiet: no progress while the cache's files are hashed.

    Raises:
        ConfigError: it is not known which data set that was.
        UntrustedError: nobody but the cache says which it was.
    """

    def __init__(
        self, path: Path | str, data: str | None = None, *, allow_code: bool = False, quiet: bool = False
    ) -> None:
        self.cache = open_cache(path, allow_code=allow_code, quiet=quiet)
        self.transfer_set = open_transfer_set(data or _data_of(path, allow_code=allow_code))
        self._index_of_row = find_ids(sample_ids(self.transfer_set.keys), self.cache.samples.ids)
        partners = Partners(self.transfer_set, self._index_of_row)
        self._viewed = ViewedSet(self.transfer_set, self.cache.policy, (), partners=partners)

    def rendered(self, row: int, view: int) -> Rendered | None:
        """One view of the sample in that row; None where the transfer set does not hold it, or what it is mixed with."""
        index, policy = int(self._index_of_row[row]), self.cache.policy
        if index < 0:
            return None
        if policy.mixing is not None:
            partner = policy.partner(int(self.cache.samples.ids[row]), view, len(self.cache))
            if self._index_of_row[partner] < 0:
                return None
        return self._viewed.render_view(index, view)

    def check(self, count: int) -> str:
        """Render `count` records, spread over rows and views; returns a sentence that tells how they compare.

        Raises:
            DriftError: they are not what the teacher saw.
            DataError: the transfer set holds none of them.
        """
        cache = self.cache
        total = len(cache) * cache.num_views
        records = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
        views, rows = np.divmod(records, len(cache))
        found = [self._item(row, view) for row, view in zip(rows.tolist(), views.tolist(), strict=True)]
        there = np.array([item is not None for item in found])
        if not there.any():
            raise DataError(
                f"{self.transfer_set.name}: none of {len(found)} views can be rendered, their samples are not in it",
                tip="give --data as it was when the cache was made",
            )
        items = [item for item in found if item is not None]
        drift = cache.check_pixels(items, rows[there], views[there], self._item)
        missing = (
            "" if there.all() else f"; {int((~there).sum())} more need samples that {self.transfer_set.name} lacks"
        )
        if drift is None:
            return f"replay: {len(items)} views render bit for bit as the teacher saw them{missing}"
        return f"replay: {drift}: a decoder's rounding{missing}"

    def _item(self, row: int, view: int) -> Any:
        rendered = self.rendered(row, view)
        return None if rendered is None else rendered.item


def told_unasked(path: Path | str, allow_code: bool, **told: Any) -> UntrustedError | None:
    """The refusal of what provenance.json tells, for a user who neither repeated it nor allowed it; None where it is allowed.

    Args:
        told: flag -> what it tells to give it: a string, or several.
    """
    if allow_code:
        return None
    flags = [
        f"--{flag} {shlex.quote(text)}"
        for flag, value in told.items()
        for text in (value if isinstance(value, list | tuple) else [value])
        if isinstance(text, str)
    ]
    said = f"it says that it was made with {' '.join(flags)}" if flags else "it does not say what it was made with"
    return UntrustedError(
        f"{path}: {said}; what a cache says of itself is not opened unasked",
        tip=f"say it yourself: {' '.join(flags) or ' '.join(f'--{flag} ...' for flag in told)}",
    )


def _data_of(path: Path | str, *, allow_code: bool) -> str:
    """The data set that the dump was given."""
    data = None if isinstance(path, str) else told_data(path)  # which is not pushed
    if refusal := told_unasked(path, allow_code, data=data):
        raise refusal
    if data is None:
        raise ConfigError(
            f"{path}: does not say which data set it was made from", tip="add --data DATA: views are rendered anew"
        )
    return data

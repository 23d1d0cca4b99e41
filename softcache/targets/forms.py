"""A joined data set in the form that somebody else's loop takes: dicts, or pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from softcache.data.foreign import item_of, label_of


class JoinedForm(Dataset[Any]):
    """A joined data set whose samples have another form: what `Joined.as_dict` and `Joined.as_pair` give.

    Attributes:
        joined: the `softcache.targets.Joined` that it was made of, for `joined.gather(records)`.
    """

    def __init__(self, joined: Any, form: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        self.joined, self._form = joined, form

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, index: int) -> Any:
        return self._form(self.joined, self.joined[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch in one reading."""
        return [self._form(self.joined, one) for one in self.joined.__getitems__(indices)]

    def set_epoch(self, epoch: int) -> None:
        """As `Joined.set_epoch`."""
        self.joined.set_epoch(epoch)


def as_dict(joined: Any, one: tuple[Any, ...]) -> dict[str, Any]:
    """The sample's own entries, and its key, view and record; partner and share too, where views are mixed."""
    sample, record, *mixed = one
    view, row = divmod(record, len(joined.cache))
    if not isinstance(sample, dict):
        label = label_of(sample)
        sample = {"item": item_of(sample)} | ({} if label is None else {"label": label})
    partner = dict(zip(("partner", "share"), mixed, strict=True)) if mixed else {}
    return {**sample, "key": joined.cache.samples.key(row), "view": view, "record": record, **partner}


def as_pair(joined: Any, one: tuple[Any, ...]) -> tuple[Any, int]:
    """(item, record)."""
    return item_of(one[0], joined.item_column), one[1]

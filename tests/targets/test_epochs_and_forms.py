"""The view follows the epoch in loops that somebody else owns, into workers that stay alive; and samples come in other forms."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QuickDump
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from softcache.data.transfer_set import open_transfer_set
from softcache.targets.cache import Cache, Joined

START_METHODS = [
    "fork",
    pytest.param("spawn", marks=pytest.mark.slow),
    pytest.param("forkserver", marks=pytest.mark.slow),
]


@pytest.fixture
def cache(quick_dump: QuickDump, toy: Any) -> Cache:
    return quick_dump(f"{toy}:images", policy=("shift",), views=2)


@pytest.fixture
def joined(cache: Cache, toy: Any) -> Joined:
    return cache.join(open_transfer_set(f"{toy}:images"))


def teacher_says(items: Tensor) -> Tensor:
    """The teacher `exact` of worlds/toy.py, from pixels alone."""
    weight = np.random.default_rng(0).integers(-8, 9, (4, 64))
    return torch.from_numpy(items.reshape(len(items), -1).numpy().astype(np.int64) @ weight.T / 1024).float()


def views_seen(joined: Joined, loader: DataLoader[Any]) -> list[int]:
    """The views of one pass; every target is of the pixels beside it."""
    seen = set()
    for (items, _), records in loader:
        targets = joined.gather(records)
        assert torch.equal(targets.logits(), teacher_says(items))
        seen |= set(targets.views.tolist())
    return sorted(seen)


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", START_METHODS)
def test_a_new_epoch_reaches_workers_that_stay_alive(method: str, joined: Joined) -> None:
    loader = DataLoader(
        joined,
        8,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=method,
        prefetch_factor=1,
    )
    found = []
    for epoch in range(3):
        joined.set_epoch(epoch)
        found.append(views_seen(joined, loader))
    joined.view = 1  # the other way to say it
    found.append(views_seen(joined, loader))
    assert found == [[0], [1], [0], [1]]


def test_epochs_go_round_the_views(joined: Joined, cache: Cache) -> None:
    for epoch in (0, 1, 2, 5, 8):
        joined.set_epoch(epoch)
        assert joined.view == epoch % 2 == joined[7][1] // len(cache)
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=rf"view {wrong} is outside 0\.\.1"):
            joined.view = wrong
    other = joined.for_view(1)
    joined.set_epoch(0)
    assert (joined.view, other.view) == (0, 1)  # each has its own
    copy = pickle.loads(pickle.dumps(other))
    other.view = 0
    assert copy.view == 1  # a copy that no worker was handed is a copy


class PreparedLoader:
    """A loader that is wrapped as Accelerate does it: it counts the passes and tells them to the data set."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.passes = loader, 0

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self.loader.dataset, "set_epoch"):
            self.loader.dataset.set_epoch(self.passes)
        yield from self.loader
        self.passes += 1


class OwnedLoop:
    """A loop as Lightning's: workers are started before the first epoch, and a hook is called at the beginning of each."""

    def __init__(self, on_epoch_start: Any) -> None:
        self.on_epoch_start = on_epoch_start

    def fit(self, loader: DataLoader[Any], epochs: int) -> Iterator[Any]:
        for epoch in range(epochs):
            passing = iter(loader)
            self.on_epoch_start(epoch)
            yield from passing


@pytest.mark.parametrize("form", ["as_pair", "as_dict"])
def test_a_loader_that_tells_the_epoch_is_heard(form: str, joined: Joined) -> None:
    shaped = getattr(joined, form)()
    workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = PreparedLoader(DataLoader(shaped, 20, **workers))
    found = []
    for _ in range(4):
        for batch in loader:
            items, records = (batch["item"], batch["record"]) if form == "as_dict" else batch
            targets = joined.gather(records)
            assert torch.equal(targets.logits(), teacher_says(items))
            found += sorted(set(targets.views.tolist()))
    assert found == [0, 0, 1, 1, 0, 0, 1, 1]


def test_one_line_in_a_loop_that_owns_its_loader(joined: Joined) -> None:
    """What is prefetched before the hook may still be of the view before; every target is of its own pixels all the same."""
    loader = DataLoader(joined, 20, num_workers=0)
    found = []
    for (items, _), records in OwnedLoop(joined.set_epoch).fit(loader, 4):
        targets = joined.gather(records)
        assert torch.equal(targets.logits(), teacher_says(items))
        found.append(set(targets.views.tolist()))
    assert found == [{0}, {0}, {1}, {1}, {0}, {0}, {1}, {1}]


def test_a_view_that_stands_still_is_told_once(
    joined: Joined, quick_dump: QuickDump, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(joined, 16)
    views_seen(joined, loader)
    assert capsys.readouterr().err == ""  # one pass is what a view is for
    for _ in range(3):
        views_seen(joined, loader)
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1
        and "a second whole pass over view 0, and the cache has 2: call joined.set_epoch(epoch)" in told
    )

    one_view = quick_dump(out="one").join(open_transfer_set(f"{toy}:images"))
    capsys.readouterr()
    moving = joined.for_view(0)
    for epoch in range(6):
        moving.set_epoch(epoch)
        views_seen(moving, DataLoader(moving, 16))
        for _ in DataLoader(one_view, 16):
            one_view.gather(np.arange(40))
    assert capsys.readouterr().err == ""


# --- forms -----------------------------------------------------------------------------------------------------------


class Rows:
    """Samples as dicts, read in batches."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.sample_keys = dataset, list(dataset.keys)
        self.labels = dataset.labels
        self.batches: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, label = self.dataset[index]
        return {"image": item, "label": label, "note": f"n{index}"}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.batches.append(len(indices))
        return [self[index] for index in indices]


def test_samples_as_dicts(joined: Joined, cache: Cache, toy: Any) -> None:
    joined.set_epoch(1)
    shaped = joined.as_dict()
    assert len(shaped) == 40
    one = shaped[5]
    (item, label), record = joined[5]
    assert sorted(one) == ["item", "key", "label", "record", "view"]
    assert (one["key"], one["view"], one["label"], one["record"]) == ("toy/0005", 1, label, record)
    np.testing.assert_array_equal(one["item"], item)

    rows = Rows(open_transfer_set(f"{toy}:images"))
    from_dicts = cache.join(rows).as_dict()
    assert sorted(from_dicts[3]) == ["image", "key", "label", "note", "record", "view"]  # its own entries stay
    for batch in DataLoader(Subset(from_dicts, [9, 1, 39]), 3):
        assert torch.equal(from_dicts.joined.gather(batch["record"]).logits(), teacher_says(batch["image"]))
        assert batch["key"] == ["toy/0009", "toy/0001", "toy/0039"]
    assert 3 in rows.batches  # read at once, through Subset too


def test_samples_as_pairs(joined: Joined) -> None:
    shaped = joined.as_pair()
    seen = 0
    for items, records in DataLoader(shaped, 16, shuffle=True):
        targets = joined.gather(records)
        assert records.dtype == torch.int64 and torch.equal(targets.logits(), teacher_says(items))
        seen += len(records)
    assert seen == len(shaped) == 40


def test_mixed_views_keep_their_partner_in_a_dict(quick_dump: QuickDump, toy: Any) -> None:
    joined = quick_dump(f"{toy}:images?rgb=true", policy=("mixup:alpha=1",)).join(
        open_transfer_set(f"{toy}:images?rgb=true")
    )
    one = joined.as_dict()[2]
    assert (one["record"], one["partner"], one["share"]) == joined[2][1:]


def test_a_key_that_the_cache_does_not_hold_is_told_at_the_gather(cache: Cache) -> None:
    rows = cache.find(["toy/0001", "nobody"])
    with pytest.raises(
        IndexError, match=r"row -1\.\.\d+ is outside 0\.\.39; -1 is what `find` gives for a key that the cache "
    ):
        cache.gather(rows, np.zeros(2, np.int64))

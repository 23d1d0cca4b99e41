"""The join: in whatever order, selection or process a sample comes, it brings its own target; misfits are refused by name."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORLDS, QuickDump
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

import softcache
from softcache import losses, train
from softcache.config import TrainConfig
from softcache.data.drift import Drift
from softcache.data.identity import item_digest
from softcache.data.join import SPREAD, batches
from softcache.data.loading import ViewedSet, epoch_order, load_batches
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import (
    ClassMismatchError,
    ContentMismatchError,
    DriftError,
    JoinError,
    LabelMismatchError,
    MissingSampleError,
    SoftcacheError,
)
from softcache.targets.cache import Cache, Joined

NAMES = ("ant", "bee", "cat", "dog")


class Plain(Dataset[Any]):
    """A data set as users have them: items and labels, whatever attributes the case needs."""

    def __init__(self, items: Any, labels: Any, /, **attributes: Any) -> None:
        self.items, self.own_labels = items, labels
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index], self.own_labels[index]


class Dicts(Plain):
    def __getitem__(self, index: int) -> Any:
        return {"image": self.items[index], "label": self.own_labels[index]}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([1, 2])


def as_array(image: Image.Image) -> np.ndarray:
    return np.array(image)  # a transform that a spawned worker can import


def wanted(items: Any, seed: int = 0) -> Tensor:
    """What the teacher `exact` says about these items: whole numbers / 1024, from the items alone."""
    flat = np.asarray(items).reshape(len(items), -1).astype(np.int64)
    weight = np.random.default_rng(seed).integers(-8, 9, (len(NAMES), flat.shape[1]))
    return torch.from_numpy(flat @ weight.T / 1024).float()


def plain_copy(spec: str, **attributes: Any) -> Plain:
    """The data of a spec as a plain data set, with keys unless `sample_keys=None`."""
    dataset = open_transfer_set(spec)
    items = np.stack([dataset.load(i)[0] for i in range(len(dataset))])
    return Plain(items, np.array(dataset.labels), **({"sample_keys": list(dataset.keys)} | attributes))


def check_every_pair(joined: Joined, batch_size: int = 7, **loading: Any) -> int:
    """Every target in a plain DataLoader is the one of the sample beside it; returns how many were seen."""
    seen = 0
    for (items, labels), records in DataLoader(joined, batch_size, **loading):
        targets = joined.gather(records)
        assert torch.equal(targets.logits(), wanted(items))
        assert torch.equal(targets.labels, torch.as_tensor(labels))
        seen += len(records)
    return seen


# --- its own target, always ------------------------------------------------------------------------------------------

ARRANGED: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda d: d,
    "reversed": lambda d: Subset(d, range(len(d) - 1, -1, -1)),
    "a filtered half": lambda d: Subset(d, [i for i in range(len(d)) if i % 4 in (1, 2)]),
    "concatenated halves, swapped": lambda d: ConcatDataset([Subset(d, range(20, 40)), Subset(d, range(20))]),
    "repeated samples": lambda d: Subset(d, [7, 7, 0, 39, 7, 0]),
    "nested": lambda d: Subset(ConcatDataset([Subset(d, [5, 3, 1]), d]), [42, 2, 0, 3, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("kind", ["plain", "transfer set"])
@pytest.mark.parametrize("arranged", ARRANGED)
def test_every_sample_gets_its_own_target(
    arranged: str, kind: str, shuffle: bool, quick_dump: QuickDump, toy: Path
) -> None:
    whole = plain_copy(f"{toy}:images") if kind == "plain" else open_transfer_set(f"{toy}:images")
    dataset = ARRANGED[arranged](whole)
    joined = quick_dump().join(dataset)
    assert len(joined) == len(dataset)
    generator = torch.Generator().manual_seed(5)
    assert check_every_pair(joined, shuffle=shuffle, generator=generator) == len(dataset)


@pytest.mark.parametrize("order", ["permuted", "natural"])
@pytest.mark.parametrize("views", [1, 3])
def test_every_record_through_the_loading_path_of_train(
    views: int, order: str, quick_dump: QuickDump, toy: Path
) -> None:
    """As train walks: an epoch's order, pairs of (index, view), one gather by position in the data set."""
    policy = ("crop_flip:padding=2",) if views > 1 else ()
    cache = quick_dump(policy=policy, views=views, order=order)
    chosen = open_transfer_set(f"{toy}:images").select(np.array([3, 3, 39, 0, 12, 25, 25, 8, 31]))
    joined = cache.join(chosen)
    viewed = ViewedSet(chosen, cache.policy, [np.stack])
    for epoch in range(views + 1):
        seen: list[int] = []
        order_now = epoch_order(len(chosen), 1, epoch)
        for batch in load_batches(viewed, batches(order_now, epoch % views, 4)):
            targets = joined.gather_samples(batch.index, batch.views)
            assert torch.equal(targets.logits(), wanted(batch.inputs[0]))
            assert targets.labels.tolist() == chosen.labels[batch.index].tolist()
            seen += batch.index.tolist()
        assert sorted(seen) == list(range(9))


def check_with_workers(cache: Cache, toy: Path, workers: int, method: str | None) -> None:
    """Both paths, with loader processes started in one way: the plain DataLoader, and the one of train."""
    chosen = open_transfer_set(f"{toy}:images").select(np.array([*range(39, -1, -2), 5, 5]))
    joined = cache.join(chosen).for_view(1)
    context = method if workers else None
    assert check_every_pair(joined, 3, shuffle=True, num_workers=workers, multiprocessing_context=context) == 22
    viewed = ViewedSet(chosen, cache.policy, [np.stack])
    pairs = batches(epoch_order(22, 0, 0), 1, 5)
    seen = 0
    for batch in load_batches(viewed, pairs, workers=workers, start_method=method):
        assert torch.equal(joined.gather_samples(batch.index, batch.views).logits(), wanted(batch.inputs[0]))
        seen += len(batch.index)
    assert seen == 22


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch counts the cores
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_forked_workers(workers: int, quick_dump: QuickDump, toy: Path) -> None:
    check_with_workers(quick_dump(policy=("shift",), views=2), toy, workers, "fork")


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.whole)])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods(method: str, workers: int, quick_dump: QuickDump, toy: Path) -> None:
    check_with_workers(quick_dump(policy=("shift",), views=2), toy, workers, method)


def test_two_ranks_share_the_samples_and_keep_the_pairs(quick_dump: QuickDump, toy: Path) -> None:
    dataset = open_transfer_set(f"{toy}:images")
    joined = quick_dump().join(dataset)
    for epoch in range(2):
        records: list[int] = []
        for rank in range(2):
            sampler: DistributedSampler[Any] = DistributedSampler(joined, num_replicas=2, rank=rank, seed=3)
            sampler.set_epoch(epoch)
            assert check_every_pair(joined, sampler=sampler) == 20
            records += [joined[i][1] for i in sampler]
        assert sorted(records) == list(range(40))


def test_keys_given_by_hand_and_private_names(quick_dump: QuickDump, toy: Path) -> None:
    nameless = plain_copy(f"{toy}:images", sample_keys=None)
    keys = [f"toy/{i:04d}" for i in range(40)]
    for cache in (quick_dump(), quick_dump(out="private", no_keys=True)):
        joined = cache.join(nameless, keys=keys)
        assert check_every_pair(joined) == 40
        with_method = plain_copy(f"{toy}:images", sample_keys=lambda: keys)
        assert cache.join(with_method).rows.tolist() == joined.rows.tolist()
    assert not cache.samples.has_keys
    hidden = f"{int(cache.samples.ids[joined.rows[4]]):016x}"
    with pytest.raises(LabelMismatchError, match=hidden):
        cache.join(plain_copy(f"{toy}:images", labels=(nameless.own_labels + (np.arange(40) == 4)) % 4))


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plain, Dicts])
@pytest.mark.parametrize("rgb", [False, True])
def test_for_view_renders_what_the_teacher_saw(rgb: bool, kind: type[Plain], quick_dump: QuickDump, toy: Path) -> None:
    spec = f"{toy}:images?rgb={rgb}"
    cache = quick_dump(spec, policy=("crop_flip",), views=3)
    whole = plain_copy(spec)
    joined = cache.join(kind(whole.items, whole.own_labels, sample_keys=whole.sample_keys))
    rendered = []
    for view in range(3):
        now = joined.for_view(view)
        items = []
        for sample, records in DataLoader(now, batch_size=16, shuffle=True):
            images = sample["image"] if kind is Dicts else sample[0]
            targets = now.gather(records)
            assert targets.views.tolist() == [view] * len(records)
            assert torch.equal(targets.logits(), wanted(images))  # the pixels and the target belong together
            items.append(images[targets.rows.argsort()])
            assert cache.check_pixels(list(images.numpy()), targets.rows, targets.views, not_asked) is None
        rendered.append(torch.cat(items))
    assert not torch.equal(rendered[0], rendered[1])
    assert not torch.equal(rendered[1], rendered[2])
    with pytest.raises(IndexError, match=r"view 3 is outside 0\.\.2"):
        joined.for_view(3)


def not_asked(row: int, view: int) -> Any:
    raise AssertionError("the probe is rendered only where pixels differ")


def rendered_by(joined: Joined, change: Callable[[np.ndarray], Any] = lambda item: item) -> Callable[[int, int], Any]:
    """(row, view) -> the item as it renders here."""
    index_of_row = np.argsort(joined.rows)
    return lambda row, view: change(joined.for_view(view)[int(index_of_row[row])][0][0])


def test_pixels_of_another_view_or_one_changed_pixel_are_noticed(quick_dump: QuickDump, toy: Path) -> None:
    """The probe renders as it did, so it is the sample that is another one."""
    cache = quick_dump(policy=("crop_flip",), views=2)
    joined = cache.join(plain_copy(f"{toy}:images"))
    render = rendered_by(joined)
    (item, _), record = joined[11]
    row, one = np.array([record % 40]), np.array([1])
    assert cache.check_pixels([item], row, one - 1, render) is None
    with pytest.raises(DriftError, match=r"1 of 1 .*: these samples changed: toy/0011\n"):
        cache.check_pixels([item], row, one, render)
    item[3, 4] ^= 1
    with pytest.raises(DriftError, match=r"these samples changed: toy/0011\n.*--on-drift warn"):
        cache.check_pixels([item], row, one - 1, render)
    assert cache.check_pixels([item], row, one - 1, render, on_drift="warn") == Drift(1, 1, 0)


@pytest.mark.parametrize(
    ("levels", "tolerated"),
    [pytest.param(1, True, id="1"), pytest.param(2, True, id="2"), pytest.param(3, False, id="3")],
)
def test_a_rounding_is_told_from_other_pixels_by_the_probe(
    levels: int, tolerated: bool, quick_dump: QuickDump, toy: Path
) -> None:
    """Every item is rendered a few levels off: two are a decoder's rounding, more are not what the teacher saw."""
    cache = quick_dump(policy=("crop_flip",), views=2)
    joined = cache.join(plain_copy(f"{toy}:images"))

    def off(item: np.ndarray) -> np.ndarray:
        return np.where(item < 128, item + levels, item - levels).astype(np.uint8)

    rows, views = np.array([3, 0, 39]), np.array([0, 1, 1])
    render = rendered_by(joined, off)
    items = [render(int(row), int(view)) for row, view in zip(rows, views, strict=True)]
    items[1] = rendered_by(joined)(0, 1)  # one that renders as it did
    if tolerated:
        drift = cache.check_pixels(items, rows, views, render)
        assert drift == Drift(2, 3, levels)
        assert f"2 of 3 checked views differ from what the teacher saw, by {levels} of 255" in str(drift)
        return
    first, last = cache.samples.key(3), cache.samples.key(39)
    with pytest.raises(DriftError, match=rf"^2 of 3 .*\(up to 3 of 255 apart\): {first}, {last}\n") as caught:
        cache.check_pixels(items, rows, views, render)
    here = f"softcache {softcache.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    assert caught.value.tip.count(here) == 2  # the cache was made here
    assert cache.check_pixels(items, rows, views, render, on_drift="warn") == Drift(2, 3, 3)


def test_without_a_probe_no_difference_is_tolerated(quick_dump: QuickDump, toy: Path) -> None:
    """None of the probe's samples is at hand: nobody can say how far apart the pixels are."""
    cache = quick_dump(policy=("crop_flip",), views=2)
    joined = cache.join(plain_copy(f"{toy}:images"))
    item = joined[11][0][0] ^ np.uint8(1)
    place = joined.rows[11:12].astype(np.int64), np.array([0])
    with pytest.raises(DriftError, match=r"1 of 1 .* than the teacher saw: toy/0011\n"):
        cache.check_pixels([item], *place, lambda row, view: None)
    drift = cache.check_pixels([item], *place, lambda row, view: None, on_drift="warn")
    assert drift == Drift(1, 1, None) and "by an unknown amount" in str(drift)


# --- refused, each by its own error, through both doors --------------------------------------------------------------


@pytest.fixture
def faults() -> Path:
    return WORLDS / "toy_edited.py"


@pytest.mark.parametrize("door", ["join", "train"])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("one_label", LabelMismatchError, r"1 labels differ.*: toy/0007 \(data set \d, cache \d\)\n.*--labels dataset"),
        ("seven_labels", LabelMismatchError, r"7 labels .*toy/0010 .*toy/0014 \(data set \d, cache \d\) and 2 more"),
        ("one_image", ContentMismatchError, r"1 of 40 checked samples .*: toy/0007\n"),
        ("one_more", MissingSampleError, r"1 of 41 samples are not in the cache: toy/0040\n"),
        ("one_key", MissingSampleError, r"1 of 40 samples are not in the cache: toy/7\n"),
        ("renamed", ClassMismatchError, "class 2 is 'cow', the cache's is 'cat': another class list"),
        ("permuted", ClassMismatchError, "class 1 is 'cat', the cache's is 'bee': the same classes in another order"),
        ("a_class_more", ClassMismatchError, "the data set has 5 classes, the cache 4"),
        ("several_labels", LabelMismatchError, "several labels per sample"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    fault: str,
    error: type[SoftcacheError],
    message: str,
    door: str,
    quick_dump: QuickDump,
    faults: Path,
    tmp_path: Path,
) -> None:
    cache = quick_dump()
    data = f"{faults}:{fault}"
    enter = (lambda: cache.join(open_transfer_set(data))) if door == "join" else (lambda: run_training(data, tmp_path))
    with pytest.raises(error, match=message) as caught:
        enter()
    assert type(caught.value) is error
    assert len(cache.join(open_transfer_set(f"{faults}:good"))) == 40  # the fault made the difference


def run_training(data: str, tmp_path: Path, **settings: Any) -> train.TrainResult:
    config = TrainConfig(
        data=data,
        cache=str(tmp_path / "cache"),
        student="softcache:mlp?hidden=4",
        out=str(tmp_path / "run"),
        epochs=1,
        threads=1,
        **settings,
    )
    return train.run(config, quiet=True)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda items, labels: Stream(), r"Stream can only be iterated[\s\S]*map-style"),
        (lambda items, labels: (pair for pair in zip(items, labels, strict=True)), "can only be iterated"),
        (lambda items, labels: Plain(items, labels), r"Plain does not say what its samples are called[\s\S]*keys="),
        # shuffled and filtered data sets keep a `split`: positions would name other samples
        (lambda items, labels: Plain(items[::-1], labels[::-1], split="toy", train=True), "does not say"),
        (lambda items, labels: Plain(items, labels, sample_keys=["toy/0000"] * 39), "39 keys for 40 samples"),
    ],
    ids=["iterable", "generator", "no keys", "only a split", "wrong number of keys"],
)
def test_data_sets_without_names_are_refused(
    made: Callable[[Any, Any], Any], message: str, quick_dump: QuickDump, toy: Path
) -> None:
    plain = plain_copy(f"{toy}:images")
    with pytest.raises(JoinError, match=message):
        quick_dump().join(made(plain.items, plain.own_labels))


def test_wrong_number_of_keys_by_hand(quick_dump: QuickDump, toy: Path) -> None:
    with pytest.raises(JoinError, match="41 keys for 40 samples"):
        quick_dump().join(plain_copy(f"{toy}:images"), keys=[f"toy/{i:04d}" for i in range(41)])


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"classes": ["ant", "bee", "dog", "cat"]}, ClassMismatchError, "class 2 is 'dog'"),
        ({"class_names": np.array(["ant", "bee"])}, ClassMismatchError, "2 classes, the cache 4"),
        ({"num_classes": 5}, ClassMismatchError, "5 classes, the cache 4"),
        ({"targets": [3] * 40}, LabelMismatchError, "labels differ"),
        ({"_labels": torch.full((40,), 2)}, LabelMismatchError, "labels differ"),
        ({"classes": [("ant",), ("bee",), ("cat",), ("dog",)]}, None, ""),  # tuples of synonyms, as ImageNet has them
        ({"num_classes": 4}, None, ""),
        ({"labels": list(NAMES)}, None, ""),  # names, not one label per sample
        ({"labels": [None] * 40}, None, ""),
        ({"targets": [-1] * 40}, None, ""),
    ],
)
def test_what_plain_data_sets_say_about_classes_and_labels(
    attributes: dict[str, Any], error: type[JoinError] | None, message: str, quick_dump: QuickDump, toy: Path
) -> None:
    cache, dataset = quick_dump(), plain_copy(f"{toy}:images", **attributes)
    arranged = [dataset, Subset(dataset, range(40)), ConcatDataset([plain_copy(f"{toy}:images"), dataset])]
    for one in arranged:
        if error is None:
            assert cache.join(one).labels_changed == 0
        else:
            with pytest.raises(error, match=message):
                cache.join(one)


def test_labels_changed_on_purpose_are_allowed_and_counted(quick_dump: QuickDump, faults: Path, tmp_path: Path) -> None:
    cache = quick_dump()
    changed = open_transfer_set(f"{faults}:seven_labels")
    joined = cache.join(Subset(changed, range(15)), labels="dataset")
    assert joined.labels_changed == 5
    ((items, labels), records) = next(iter(DataLoader(joined, batch_size=15)))
    targets = joined.gather(records)
    assert torch.equal(targets.logits(), wanted(items))
    assert np.flatnonzero(targets.labels != labels).tolist() == [10, 11, 12, 13, 14]  # both sides stay visible
    run_training(f"{faults}:seven_labels", tmp_path, labels="dataset", loss=("kd:temperature=2", "ce"))
    assert json.loads((tmp_path / "run/run.json").read_text())["labels_changed"] == 7


@pytest.mark.slow
def test_how_many_contents_are_checked(quick_dump: QuickDump, toy: Path, faults: Path) -> None:
    """`spread` looks at 64 samples, the first and the last among them; `full` at all; `none` at none."""
    cache = quick_dump(f"{toy}:images?count=200")

    def found(at: int, how: Any) -> str:
        """What the join says when sample `at` is another; nothing when it did not notice."""
        try:
            cache.join(open_transfer_set(f"{faults}:edited?at={at}"), check_content=how)
        except ContentMismatchError as exc:
            return exc.message
        return ""

    for at in (0, 101, 199):
        assert re.search(rf"1 of 200 checked samples .*: toy/{at:04d}$", found(at, "full"))
        assert found(at, "none") == ""
    spread = {at: message for at in range(200) if (message := found(at, "spread"))}
    assert len(spread) == SPREAD
    assert {0, 199} < set(spread)
    assert all(re.search(rf"1 of {SPREAD} checked .*: toy/{at:04d}$", message) for at, message in spread.items())
    cache.join(plain_copy(f"{toy}:images?count=200"), check_content="full")  # its items are hashed as they are read


# --- join by content -------------------------------------------------------------------------------------------------


def test_join_by_content_when_only_the_names_changed(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump()
    plain = plain_copy(f"{toy}:images", sample_keys=None)
    mixed = np.array([39, 4, 4, 17, 0, 4])  # a data set may hold a content twice; the cache has one row for it
    for dataset in (
        Plain(plain.items[mixed], plain.own_labels[mixed]),
        Plain([torch.from_numpy(item) for item in plain.items[mixed]], plain.own_labels[mixed]),
        Subset(open_transfer_set(f"{toy}:images"), mixed.tolist()),
    ):
        joined = cache.join(dataset, by="content")
        assert check_every_pair(joined, 4) == 6
    pictures = cache.join(Plain([Image.fromarray(item) for item in plain.items], plain.own_labels), by="content")
    assert pictures.rows.tolist() == cache.join(plain, by="content").rows.tolist()
    changed = plain.items.copy()
    changed[7, 0, 0] ^= 1
    with pytest.raises(MissingSampleError, match=r"1 of 40 samples have a content .*: sample 7\n"):
        cache.join(Plain(changed, plain.own_labels), by="content")
    with pytest.raises(LabelMismatchError, match="toy/0000"):
        cache.join(Plain(plain.items, plain.own_labels, targets=(plain.own_labels + 1) % 4), by="content")


def test_a_cache_that_holds_a_content_twice_cannot_be_joined_by_content(quick_dump: QuickDump, faults: Path) -> None:
    cache = quick_dump(f"{faults}:alike")
    dataset = open_transfer_set(f"{faults}:alike")
    with pytest.raises(JoinError, match="2 samples of the cache have the same content as another"):
        cache.join(dataset, by="content")
    joined = cache.join(dataset)
    assert check_every_pair(joined) == 40


# --- several labels per sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "transfer set"])
def test_several_labels_per_sample(kind: str, quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    spec = f"{toy}:images?multi_label=true"
    cache = quick_dump(spec)
    dataset: Any = open_transfer_set(spec)
    labels = np.array(dataset.labels)
    if kind == "plain":
        dataset = plain_copy(spec, labels=labels)
    joined = cache.join(Subset(dataset, [8, 39, 8, 1]))
    assert check_every_pair(joined, 3) == 4
    assert joined.gather(np.array([joined[0][1]])).labels.tolist() == [labels[8].tolist()]
    labels[8, 3] ^= True
    with pytest.raises(LabelMismatchError, match=r"1 labels differ from the cache's: toy/0008\n"):
        cache.join(plain_copy(spec, labels=labels))
    assert cache.join(plain_copy(spec, labels=labels), labels="dataset").labels_changed == 1
    with pytest.raises(LabelMismatchError, match="several labels"):
        cache.join(plain_copy(spec, labels=labels[:, 0].astype(int)))
    with pytest.raises(ClassMismatchError, match="rows of 9, the cache has 4"):
        cache.join(plain_copy(spec, labels=np.zeros((40, 9), bool)))
    if kind == "transfer set":
        result = run_training(spec, tmp_path, loss=("bce", "ce:weight=0.5"))
        assert result.metrics[-1]["bce"] > 0


# --- torchvision's own data sets -------------------------------------------------------------------------------------


def write_folder(root: Path) -> None:
    """An image folder of 3 classes with 4, 5 and 6 colour images."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(NAMES[:3]):
        (root / name).mkdir(parents=True)
        for i in range(4 + label):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(root / name / f"{i}.png")


def test_image_folder(quick_dump: QuickDump, tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_folder(root)
    cache = quick_dump(f"imagefolder:{root}", policy=("crop_flip",), views=2)
    theirs = torchvision.datasets.ImageFolder(str(root))
    arrays = torchvision.datasets.ImageFolder(root, transform=as_array)
    weight = np.random.default_rng(0).integers(-8, 9, (3, 8 * 8 * 3))
    for dataset in (arrays, Subset(arrays, [14, 2, 2, 8]), theirs):
        for view in range(2):
            joined = cache.join(dataset).for_view(view)
            for i in range(len(joined)):
                (item, label), record = joined[i]
                targets = joined.gather(np.array([record]))
                logits = weight @ np.asarray(item).reshape(-1).astype(np.int64) / 1024
                assert targets.logits()[0].tolist() == logits.tolist()
                assert targets.labels.tolist() == [label]
    assert cache.join(open_transfer_set(f"imagefolder:{root}"), check_content="full").labels_changed == 0
    assert cache.join(arrays, by="content").rows.tolist() == cache.join(arrays).rows.tolist()
    by_content = cache.join(open_transfer_set(f"imagefolder:{root}"), by="content")
    assert by_content.rows.tolist() == cache.join(arrays).rows.tolist()

    (root / "ant/1.png").rename(root / "ant/9.png")
    with pytest.raises(MissingSampleError, match=r"1 of 15 .*: ant/9\.png"):
        cache.join(torchvision.datasets.ImageFolder(root))
    (root / "ant/9.png").rename(root / "ant/1.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "bee/3.png")
    with pytest.raises(ContentMismatchError, match=r"1 of 15 checked .*: bee/3\.png"):
        cache.join(open_transfer_set(f"imagefolder:{root}"))
    (root / "bee").rename(root / "bull")
    with pytest.raises(ClassMismatchError, match="class 1 is 'bull', the cache's is 'bee'"):
        cache.join(torchvision.datasets.ImageFolder(root))
    (root / "bull").rename(root / "zebra")
    with pytest.raises(ClassMismatchError, match="class 1 is 'cat', the cache's is 'bee'"):
        cache.join(torchvision.datasets.ImageFolder(root))


def test_contents_of_two_kinds_are_never_compared(
    quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache knows files by their bytes; a data set of the same samples that knows decoded items is not accused."""
    root = tmp_path / "images"
    write_folder(root)
    cache = quick_dump(f"imagefolder:{root}")
    as_items = tmp_path / "as_items.py"
    as_items.write_text("import torchvision\ndef folder(root: str): return torchvision.datasets.ImageFolder(root)\n")
    decoded = open_transfer_set(f"{as_items}:folder?root={root}")
    assert decoded.digest_kind == "item"
    assert decoded.load(0)[1] == item_digest(decoded[0][0]) != cache.samples.digests[0].tobytes()
    rows = cache.join(open_transfer_set(f"imagefolder:{root}")).rows.tolist()
    assert cache.join(decoded, check_content="full").rows.tolist() == rows  # they have the pixels that the teacher saw
    assert capsys.readouterr().err == ""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "bee/3.png")
    assert cache.join(decoded).rows.tolist() == rows
    assert "contents of TransferSet were not compared with what the teacher saw" in capsys.readouterr().err
    with pytest.raises(JoinError, match="cannot give content digests"):
        cache.join(decoded, check_content="full")
    with pytest.raises(JoinError, match="bytes of their files"):
        cache.join(decoded, by="content")


def test_mnist_by_torchvision_and_a_filter_in_place(quick_dump: QuickDump, tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    for stem, count in (("train", 30), ("t10k", 30)):
        for part, array in (
            ("images-idx3-ubyte", draw.integers(0, 256, (count, 8, 8))),
            ("labels-idx1-ubyte", draw.integers(0, 10, count)),
        ):
            head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{stem}-{part}").write_bytes(head + array.astype(np.uint8).tobytes())
    cache = quick_dump(f"torchvision:MNIST?root={tmp_path}")
    train_set = torchvision.datasets.MNIST(tmp_path, train=True, transform=as_array)
    weight = np.random.default_rng(0).integers(-8, 9, (10, 64))
    joined = cache.join(Subset(train_set, [29, 3, 3, 11]))
    for (items, labels), records in DataLoader(joined, batch_size=3):
        targets = joined.gather(records)
        assert targets.logits().tolist() == (items.reshape(len(items), -1).long().numpy() @ weight.T / 1024).tolist()
        assert targets.labels.tolist() == labels.tolist()
    with pytest.raises(MissingSampleError, match=r"30 of 30 .*: test/000000, .* and 25 more"):
        cache.join(torchvision.datasets.MNIST(tmp_path, train=False))
    keep = train_set.targets >= 4
    train_set.data, train_set.targets = train_set.data[keep], train_set.targets[keep]
    with pytest.raises(
        JoinError, match=r"MNIST has \d+ samples, and the cache knows its train/0000\d\d: samples were taken out"
    ):
        cache.join(train_set)  # now its positions name other samples


def test_selection_of_a_selection_keeps_the_names(quick_dump: QuickDump, toy: Path) -> None:
    chosen: TransferSet = open_transfer_set(f"{toy}:images", keep_labels=(1, 2))
    again = chosen.select(np.arange(len(chosen))[::-2])
    cache = quick_dump()
    joined = cache.join(again)
    assert check_every_pair(joined) == len(again)
    small = quick_dump(out="small", keep_labels=("1", "2"))
    assert small.class_names == NAMES
    joined = small.join(again)
    assert check_every_pair(joined) == len(again)
    with pytest.raises(MissingSampleError, match="are not in the cache"):
        small.join(open_transfer_set(f"{toy}:images"))


@pytest.mark.parametrize("old", ["head", "head_input"])
def test_old_names_of_the_classifier_warn(quick_dump: QuickDump, toy: Path, old: str) -> None:
    """`head` is the k largest classes now; the final linear layer is the classifier."""
    cache = quick_dump(f"{toy}:images", [f"{toy}:network"], codec="linear_head", max_kl=None)
    member = cache.members[0]
    if old == "head":
        with pytest.warns(DeprecationWarning, match=r"Cache\.head is now Cache\.classifier"):
            found = cache.head(member)
        assert found is not None
        wanted = cache.classifier(member)
        assert wanted is not None and all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        return
    targets = cache.gather(np.arange(3), np.zeros(3, np.int64))
    with pytest.warns(DeprecationWarning, match=r"Targets\.head_input is now Targets\.classifier_input"):
        values = targets.head_input(member)
    assert torch.equal(values, targets.classifier_input(member)) and values.shape == (3, 32)


def test_the_old_name_of_the_classifiers_place_warns() -> None:
    with pytest.warns(DeprecationWarning, match="CLASSIFIER"):
        assert losses.HEAD == losses.CLASSIFIER == "head"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_log_probs_are_those_of_the_logits_at_a_temperature(quick_dump: QuickDump, temperature: float) -> None:
    targets = quick_dump().gather(np.arange(40), np.zeros(40, np.int64))
    (member,) = targets.members
    scaled = targets.logits().double() / temperature
    wanted = scaled - scaled.logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(targets.log_probs(member, temperature).double(), wanted, rtol=1e-5, atol=1e-5)

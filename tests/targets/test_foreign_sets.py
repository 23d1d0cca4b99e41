"""Other people's data sets at the join: what can be compared is, what cannot is said, and refused where it was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORLDS, QuickDump
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from softcache.data.join import SPREAD
from softcache.errors import (
    ClassMismatchError,
    ContentMismatchError,
    JoinError,
    LabelMismatchError,
    MissingSampleError,
)
from softcache.targets.cache import Cache

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from columns import ClassLabel, Frame, HuggingFace, HuggingFaceStream

NAMES = ("ant", "bee", "cat", "dog")


class World:
    """40 images with keys, labels and class names, in every kind of data set."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.images: Any = draw.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
        self.labels: Any = draw.integers(0, 4, 40)  # as worlds/toy.py draws them
        self.keys = [f"toy/{i:04d}" for i in range(40)]
        self.names: Sequence[str] = NAMES

    def table(self, item: str = "image", label: str = "label", key: str = "key") -> HuggingFace:
        columns = {key: self.keys, item: [Image.fromarray(one) for one in self.images], label: self.labels.tolist()}
        return HuggingFace({key: "string", item: "image", label: ClassLabel(self.names)}, columns)

    def frame(self) -> Frame:
        return Frame({"key": self.keys, "item": list(self.images), "label": [self.names[i] for i in self.labels]})

    def tensors(self) -> TensorDataset:
        return TensorDataset(torch.from_numpy(self.images), torch.from_numpy(self.labels))

    def pairs(self) -> list[tuple[Any, int]]:
        return list(zip(self.images, self.labels.tolist(), strict=True))


@pytest.fixture
def cache(quick_dump: QuickDump, toy: Path) -> Cache:
    return quick_dump(f"{toy}:images?rgb=true")


WAYS: dict[str, Callable[[Cache, World], Any]] = {
    "table": lambda cache, world: cache.join(world.table(), key="key"),
    "table, keys by hand": lambda cache, world: cache.join(world.table(), keys=world.table()["key"]),
    "table, selected": lambda cache, world: cache.join(Subset(world.table(), range(39, -1, -1)), key="key"),
    "frame": lambda cache, world: cache.join(world.frame(), key="key"),
    "tensors": lambda cache, world: cache.join(world.tensors(), keys=world.keys),
    "pairs": lambda cache, world: cache.join(world.pairs(), keys=world.keys),
    "two tables": lambda cache, world: cache.join(ConcatDataset([world.table(), world.frame()]), key="key"),
}
OTHERWISE: dict[str, tuple[Callable[[World], None], type[JoinError], str]] = {
    "every label shifted": (lambda w: setattr(w, "labels", (w.labels + 1) % 4), LabelMismatchError, "toy/00"),
    "one label": (
        lambda w: w.labels.__setitem__(0, 3 - w.labels[0]),
        LabelMismatchError,
        r"[12] labels differ.*: toy/0000 ",
    ),
    "rows in another order": (lambda w: setattr(w, "keys", w.keys[::-1]), JoinError, "toy/00"),
    "one image": (
        lambda w: w.images.__setitem__(7, 0),
        ContentMismatchError,
        r"[12] of \d+ checked samples .*: toy/0007",
    ),
    "every image": (lambda w: setattr(w, "images", 255 - w.images), ContentMismatchError, "40 of|64 of"),
    "a name": (lambda w: w.keys.__setitem__(3, "toy/x"), MissingSampleError, "are not in the cache: toy/x"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_right_is_joined_without_a_word(way: str, cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    joined = WAYS[way](cache, World())
    wanted = cache.find(World().keys)
    rows = joined.rows[::-1] if "selected" in way else joined.rows
    assert rows[:40].tolist() == wanted.tolist()
    assert (joined.labels_changed, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize("wrong", OTHERWISE)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_wrong_is_refused(way: str, wrong: str, cache: Cache) -> None:
    world = World()
    change, error, message = OTHERWISE[wrong]
    change(world)
    with pytest.raises(error, match=message):
        WAYS[way](cache, world)


def test_class_names_come_from_the_label_column(cache: Cache) -> None:
    world = World()
    world.names = NAMES[::-1]
    with pytest.raises(ClassMismatchError, match="the same classes in another order"):
        cache.join(world.table(), key="key")
    world.names = ("ant", "bee", "cow", "dog")
    with pytest.raises(ClassMismatchError, match="class 2 is 'cow'"):
        cache.join(world.table(), key="key")
    with pytest.raises(ClassMismatchError, match="'cow', which is no class of the cache"):
        cache.join(world.frame(), key="key")  # its labels are the names themselves


def test_columns_called_otherwise(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    joined = cache.join(world.table("pic", "y", "name"), key="name", item="pic", label="y", check_content="full")
    assert joined.rows.tolist() == cache.find(world.keys).tolist()
    for how in ({"key": "nam"}, {"key": "name", "item": "image"}, {"key": "name", "label": "yy"}):
        with pytest.raises(JoinError, match=r"has no column '\w+'"):
            cache.join(world.table("pic", "y", "name"), **how)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    cache.join(world.table("pic", "y", "name"), key="name")
    assert "item=NAME" in capsys.readouterr().err
    with pytest.raises(JoinError, match="list has no columns, so there is none called 'key'"):
        cache.join(world.pairs(), key="key")
    with pytest.raises(JoinError, match=r"does not say what its samples are called[\s\S]*key=COLUMN"):
        cache.join(world.table())


def test_labels_of_a_column_in_every_form(cache: Cache, quick_dump: QuickDump, tmp_path: Path) -> None:
    """Names, indices, and numbers that are the names of the classes; None and NaN are no label."""
    world = World()
    rows = [str(3 * label) for label in world.labels]  # classes called 0, 3, 6, 9
    (tmp_path / "teacher.py").write_text(
        "import numpy as np\ndef teacher(): return lambda texts: np.array([[len(t), 1.5, 0, 0] for t in texts])\n"
    )
    (tmp_path / "numbers.tsv").write_text("".join(f"text {i}\t{row}\n" for i, row in enumerate(rows)))
    numbered = quick_dump(f"tsv:{tmp_path}/numbers.tsv", [f"{tmp_path}/teacher.py:teacher"], out="numbers")
    keys, texts = [f"numbers/{i:06d}" for i in range(40)], [f"text {i}" for i in range(40)]
    for labels in ([3 * int(i) for i in world.labels], [3.0 * i for i in world.labels], rows):
        frame = Frame({"key": keys, "text": texts, "label": labels})
        assert numbered.join(frame, key="key").labels_changed == 0
        with pytest.raises(LabelMismatchError):
            numbered.join(Frame({"key": keys, "text": texts, "label": [*labels[1:], labels[0]]}), key="key")
    frame = Frame({"key": world.keys, "item": list(world.images), "label": world.labels.tolist()})
    assert cache.join(frame, key="key").labels_changed == 0
    named = [world.names[i] for i in world.labels]
    missing = Frame({"key": world.keys, "item": list(world.images), "label": [None, float("nan"), *named[2:]]})
    assert cache.join(missing, key="key").labels_changed == 0


def test_a_format_of_the_table_is_for_the_student_alone(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    table = World().table()
    table.set_transform(lambda row: {"image": np.asarray(row["image"]) / 255, "label": row["label"]})
    joined = cache.join(table, key="key", check_content="full")
    assert joined[3][0]["image"].dtype == np.float64 and capsys.readouterr().err == ""


def test_a_table_is_read_in_batches(cache: Cache) -> None:
    table = World().table()
    joined = cache.join(table, key="key")
    seen = []
    for samples, records in DataLoader(
        joined, 16, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch, strict=True))
    ):
        targets = joined.gather(np.array(records))
        assert [cache.samples.key(int(row)) for row in targets.rows] == [sample["key"] for sample in samples]
        seen += list(records)
    assert table.read_at_once == [16, 16, 8] and len(set(seen)) == 40


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda w: HuggingFaceStream(w.table()), r"HuggingFaceStream can only be iterated[\s\S]*map-style"),
        (
            lambda w: {"train": w.table(), "test": w.table()},
            r"dict holds several data sets: train, test[\s\S]*data\['train'\]",
        ),
        (lambda w: iter(w.pairs()), "can only be iterated"),
    ],
    ids=["stream", "several", "iterator"],
)
@pytest.mark.parametrize("how", [{"keys": ["a"]}, {"key": "key"}, {}], ids=["keys", "key", "nothing"])
def test_what_cannot_be_indexed_is_refused(made: Any, message: str, how: Any, cache: Cache) -> None:
    with pytest.raises(JoinError, match=message):
        cache.join(made(World()), **how)


def test_keys_that_are_no_strings_are_refused(cache: Cache) -> None:
    with pytest.raises(JoinError, match="sample key 0 is not a string"):
        cache.join(World().tensors(), keys=list(range(40)))  # type: ignore[arg-type]
    assert len(cache.join(World().tensors(), keys=np.array(World().keys))) == 40  # type: ignore[arg-type]


# --- what cannot be compared -----------------------------------------------------------------------------------------


class Read(Dataset[Any]):
    """A data set of somebody's own: what it gives is known when it is read."""

    def __init__(self, world: World, change: Callable[[Any], Any] = lambda item: item, label: Any = None) -> None:
        self.sample_keys, self._world, self._change, self._label = world.keys, world, change, label

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        label = int(self._world.labels[index]) if self._label is None else self._label(index)
        return self._change(self._world.images[index]), label


def scaled(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def flipped(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1].copy() if torch.rand(()) < 0.5 else image


TRANSFORMED: dict[str, Callable[[Any], Any]] = {
    "scaled": scaled,
    "smaller": lambda image: image[::2, ::2].copy(),
    "drawn anew": flipped,
    "without canonical bytes": lambda image: {1, 2},
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_honest_transforms_of_a_data_sets_own_are_not_accused(
    how: str, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its items are not those that the teacher was given: that is said once, and refused where the check was asked for."""
    dataset = Read(World(), TRANSFORMED[how])
    for _ in range(2):
        assert len(cache.join(dataset)) == 40
    told = capsys.readouterr().err
    assert told.count("the contents of Read were not compared with what the teacher saw") == told.count("\n") == 1
    for asked in ("spread", "full"):
        with pytest.raises(JoinError, match=r"Read cannot give content digests as the dump did"):
            cache.join(dataset, check_content=asked)  # type: ignore[arg-type]
    cache.join(dataset, check_content="none")
    assert capsys.readouterr().err == ""


def test_transforms_that_a_data_set_names_are_left_out_of_the_comparison(
    cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    class Named(Read):
        transform: Any = staticmethod(scaled)
        target_transform: Any = staticmethod(lambda label: -7)

        def __getitem__(self, index: int) -> Any:
            item, label = super().__getitem__(index)
            item = item if self.transform is None else self.transform(item)
            return item, label if self.target_transform is None else self.target_transform(label)

    joined = cache.join(Named(World()), check_content="full")
    assert joined[0][0][0].shape == (3, 8, 8) and capsys.readouterr().err == ""
    world = World()
    world.images[9] += 1
    with pytest.raises(ContentMismatchError, match="toy/0009"):
        cache.join(Named(world))


def test_labels_that_no_list_holds_are_compared_as_they_are_read(cache: Cache) -> None:
    world = World()
    assert cache.join(Read(world)).labels_changed == 0
    shifted = Read(world, label=lambda i: (int(world.labels[i]) + 1) % 4)
    with pytest.raises(LabelMismatchError, match=r"40 labels differ[\s\S]*in another order"):
        cache.join(shifted)
    assert cache.join(shifted, labels="dataset").labels_changed == 40
    for label in (lambda i: i, lambda i: None, lambda i: 0.5, lambda i: {"box": 3}):  # no labels
        assert cache.join(Read(world, label=label)).labels_changed == 0


def test_a_wrong_label_beyond_the_first_look_is_refused_when_it_is_read(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(f"{toy}:images?count=200&rgb=true")
    sample = {
        i: int(label) for i, label in enumerate(cache.samples.labels[cache.find([f"toy/{i:04d}" for i in range(200)])])
    }
    looked = set(np.unique(np.linspace(0, 199, SPREAD).astype(int)).tolist())
    beyond = next(i for i in range(200) if i not in looked)
    pairs = [(np.zeros((2, 2)), (label + (i == beyond)) % 4) for i, label in sample.items()]
    keys = [f"toy/{i:04d}" for i in range(200)]
    joined = cache.join(pairs, keys=keys, check_content="none")
    with pytest.raises(LabelMismatchError, match=rf'the label of toy/{beyond:04d} is \d in [\s\S]*labels="dataset"'):
        for _ in DataLoader(joined, 64):
            pass
    for _ in DataLoader(cache.join(pairs, keys=keys, check_content="none", labels="dataset"), 64):
        pass


# --- positions -------------------------------------------------------------------------------------------------------


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, count: int = 60) -> type[Any]:
    """torchvision's CIFAR10 over a few images of our own."""
    import pickle

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(5)
    for name in ("train", "test"):
        data = {
            "data": draw.integers(0, 256, (count, 3072)).astype(np.uint8),
            "labels": draw.integers(0, 10, count).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["train", None]])
    monkeypatch.setattr(kind, "test_list", [["test", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return kind


class LongTail(torchvision.datasets.CIFAR10):
    """The usual class: it replaces data and targets in its constructor."""

    def __init__(self, root: Path, keep: Any) -> None:
        super().__init__(root)
        self.data, self.targets = self.data[keep], [self.targets[i] for i in keep]


class Untouched(torchvision.datasets.CIFAR10):
    """A class that changes nothing but what it is called."""


def test_positions_name_samples_of_torchvisions_own_classes_alone(
    quick_dump: QuickDump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = cifar(tmp_path, monkeypatch)
    cache = quick_dump(f"torchvision:CIFAR10?root={tmp_path}")
    capsys.readouterr()
    rows = cache.join(own(tmp_path), check_content="full").rows.tolist()
    assert cache.join(own(tmp_path, transform=scaled)).rows.tolist() == rows
    order = np.argsort(own(tmp_path).targets, kind="stable")
    for tail in (LongTail(tmp_path, order), LongTail(tmp_path, order[::2]), Untouched(tmp_path)):
        with pytest.raises(JoinError, match=r'class of its own on top of torchvision\'s CIFAR10[\s\S]*keys="position"'):
            cache.join(tail)
        with pytest.raises(JoinError, match="class of its own"):
            cache.join(Subset(tail, [1, 2]))
    # what earlier versions did goes on where it was right, and is refused by its labels where it was not
    assert cache.join(Untouched(tmp_path), keys="position").rows.tolist() == rows
    assert cache.join(Subset(Untouched(tmp_path), [5, 1]), keys="position").rows.tolist() == [rows[5], rows[1]]
    with pytest.raises(
        LabelMismatchError, match=r"labels differ[\s\S]*most of them differ, so the samples probably stand in "
    ):
        cache.join(LongTail(tmp_path, order), keys="position")
    named = cache.join(LongTail(tmp_path, order), keys=[f"train/{i:06d}" for i in order])
    assert named.rows.tolist() == [rows[i] for i in order]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kept", [slice(0, 59), slice(1, 60), slice(0, 60, 2)], ids=["the last", "the first", "half"])
def test_a_torchvision_set_that_lost_samples_has_no_positions(
    kept: slice, quick_dump: QuickDump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cifar(tmp_path, monkeypatch)
    cache = quick_dump(f"torchvision:CIFAR10?root={tmp_path}", no_keys=True)
    shorter = own(tmp_path)
    shorter.data, shorter.targets = shorter.data[kept], shorter.targets[kept]
    with pytest.raises(
        JoinError, match=rf"CIFAR10 has {len(shorter.data)} samples, and the cache knows its train/0000"
    ):
        cache.join(shorter)
    moved = own(tmp_path)
    moved.data, moved.targets = moved.data[::-1].copy(), moved.targets[::-1]
    with pytest.raises(LabelMismatchError):
        cache.join(moved)
    moved.targets = own(tmp_path).targets
    with pytest.raises(ContentMismatchError):
        cache.join(moved)


def test_positions_of_a_factorys_data_go_by_the_name_that_the_cache_has(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(f"{WORLDS}/odd_data_sets.py:Plain")
    pairs = [(np.full((2, 2), i, np.uint8), i % 2) for i in range(4)]
    joined = cache.join(pairs, keys="position", check_content="full")
    assert [cache.samples.key(int(row)) for row in joined.rows] == [f"Plain/{i:06d}" for i in range(4)]
    with pytest.raises(MissingSampleError, match="Plain/000004"):
        cache.join([*pairs, pairs[0]], keys="position")
    with pytest.raises(ContentMismatchError):
        cache.join([pairs[2], *pairs[1:]], keys="position")
    with pytest.raises(JoinError, match="not called by their position: one is 'toy/"):
        quick_dump(f"{toy}:images?rgb=true", out="named").join(World().pairs(), keys="position")
    with pytest.raises(JoinError, match="keys='name'"):
        cache.join(pairs, keys="name")  # type: ignore[arg-type]


def test_caches_that_earlier_versions_made_of_tables_and_text_go_on(quick_dump: QuickDump, tmp_path: Path) -> None:
    """They know a table of a factory by position, and its classes by number."""
    (tmp_path / "table.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})\n"
        "import numpy as np\nfrom columns import HuggingFace\n"
        "def reviews():\n"
        "    texts = [f'text {i * i}' for i in range(30)]\n"
        "    return HuggingFace({}, {'text': texts, 'label': [i % 3 for i in range(30)]})\n"
        "def teacher(): return lambda texts: np.array([[len(t), 1.5, 0] for t in texts])\n"
    )
    cache = quick_dump(f"{tmp_path}/table.py:reviews", [f"{tmp_path}/table.py:teacher"])
    assert (cache.class_names, cache.samples.key(0).startswith("reviews/0000")) == (("0", "1", "2"), True)
    texts, labels = [f"text {i * i}" for i in range(30)], [i % 3 for i in range(30)]
    table = HuggingFace({}, {"text": texts, "label": labels})
    for how in ({"keys": "position"}, {"keys": [f"reviews/{i:06d}" for i in range(30)]}):
        joined = cache.join(table, check_content="full", **how)  # type: ignore[arg-type]
        assert [cache.samples.key(int(row)) for row in joined.rows[:2]] == ["reviews/000000", "reviews/000001"]
    with pytest.raises(ContentMismatchError):
        cache.join(HuggingFace({}, {"text": texts[::-1], "label": labels}), keys="position")
    lines = "".join(f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "reviews.tsv").write_text(lines)
    of_text = quick_dump(f"tsv:{tmp_path}/reviews.tsv", [f"{tmp_path}/table.py:teacher"], out="text")
    assert (
        of_text.join(table, keys="position", check_content="full").rows.tolist()
        == of_text.find([f"reviews/{i:06d}" for i in range(30)]).tolist()
    )


def test_folders_are_compared_by_the_bytes_of_their_files(quick_dump: QuickDump, tmp_path: Path) -> None:
    for folder, seed in (("own", 1), ("other", 2)):
        draw = np.random.default_rng(seed)
        for name in NAMES[:2]:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(draw.integers(0, 256, (6, 6, 3)).astype(np.uint8)).save(
                    tmp_path / folder / name / f"{i}.png"
                )
    cache = quick_dump(f"imagefolder:{tmp_path}/own")
    own, other = (torchvision.datasets.ImageFolder(str(tmp_path / name), transform=scaled) for name in ("own", "other"))
    assert len(cache.join(Subset(own, [4, 1]), check_content="full")) == 2
    for dataset in (other, Subset(other, [0, 5]), ConcatDataset([own, other])):
        for how in (None, "spread", "full"):
            with pytest.raises(ContentMismatchError, match=r"ant/0\.png|bee/2\.png"):
                cache.join(dataset, check_content=how)

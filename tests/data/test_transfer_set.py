"""Transfer sets: every source gives the right items, keys, labels and digests, and says what is wrong with bad data."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORLDS
from PIL import Image
from torch.utils.data import DataLoader

from softcache.data import sources
from softcache.data.identity import check_unique, file_digest, item_digest, sample_ids
from softcache.data.sources import StringTable, image_array
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import ConfigError, DataError, MissingExtraError, SoftcacheError

REPOSITORY = Path(__file__).parents[2]
SHARED = next((p for p in (REPOSITORY / "shared/data", REPOSITORY.parent / "shared/data") if p.is_dir()), None)
needs_shared = pytest.mark.skipif(SHARED is None, reason="the real data sets (shared/data) are not here")


def write_png(path: Path, pixels: Any, mode: str | None = None, **save: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(pixels, np.uint8)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **save)
    return array


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, stem: str, count: int, *, gz: bool = True) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(count).integers(0, 256, (count, 4, 5)).astype(np.uint8)
    labels = (np.arange(count) * 3 % 10).astype(np.uint8)
    for part, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        data = idx_bytes(array)
        name = f"{stem}-{part}" + (".gz" if gz else "")
        (folder / name).write_bytes(gzip.compress(data) if gz else data)
    return images, labels


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def factories(tmp_path: Path) -> str:
    return shutil.copy(WORLDS / "odd_data_sets.py", str(tmp_path / "mine.py"))


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Two classes; in sorted walk order a folder's own files come before its folders."""
    root = tmp_path / "animals"
    for number, name in enumerate(("dog/c.png", "cat/z.PNG", "cat/a.png", *(f"cat/d{n}/b.png" for n in "30142"))):
        write_png(root / name, np.full((3, 4, 3), number * 10))
    write(root / "cat/.hidden.png", "no image")
    write(root / "cat/.ipynb_checkpoints/a.png", "no image")
    write(root / ".git/config.png", "no image")
    write(root / "cat/notes.txt", "no image")
    return root


def check_whole(transfer_set: TransferSet) -> None:
    """What holds for every source."""
    count = len(transfer_set)
    assert len(transfer_set.keys) == len(transfer_set.labels) == count > 0
    assert transfer_set.sample_keys is transfer_set.keys
    assert transfer_set.num_classes == len(transfer_set.class_names)
    check_unique(transfer_set.keys, sample_ids(transfer_set.keys))
    assert transfer_set.labels.dtype == (np.bool_ if transfer_set.multi_label else np.int32)
    for index in (0, count - 1):
        item, digest = transfer_set.load(index)
        assert len(digest) == 16
        if transfer_set.digest_kind == "item":
            assert digest == item_digest(item)
        again, label = transfer_set[index]
        assert item_digest(again) == item_digest(item)
        np.testing.assert_array_equal(label, transfer_set.labels[index])
        if isinstance(item, np.ndarray):
            assert item.dtype == np.uint8
            assert item.flags.writeable  # torch.from_numpy warns about any other
            item[...] = 255 - item  # a caller's own copy
            assert transfer_set.load(index)[1] == digest
    with pytest.raises(IndexError):
        transfer_set[count]
    copy = pickle.loads(pickle.dumps(transfer_set))
    assert copy.load(count - 1)[1] == transfer_set.load(count - 1)[1]
    assert list(copy.keys) == list(transfer_set.keys)
    rows = np.array([count - 1, 0])
    chosen = transfer_set.select(rows)
    assert list(chosen.keys) == [transfer_set.keys[count - 1], transfer_set.keys[0]]
    np.testing.assert_array_equal(chosen.labels, transfer_set.labels[rows])
    assert chosen.load(0)[1] == transfer_set.load(count - 1)[1]
    assert chosen.select(np.array([1])).load(0)[1] == transfer_set.load(0)[1]
    assert (chosen.name, chosen.class_names) == (transfer_set.name, transfer_set.class_names)


# --- digits ---


def test_digits_splits_are_fixed_disjoint_stratified_and_cover_everything() -> None:
    pytest.importorskip("sklearn", reason="needs the extra softcache[demo]")
    train, test = open_transfer_set("digits"), open_transfer_set("digits?split=test")
    assert (len(train), len(test)) == (1297, 500)
    assert not set(train.keys) & set(test.keys)
    assert {*train.keys, *test.keys} == {f"digits/{row:06d}" for row in range(1797)}
    share = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.abs(share - 500 / 1797).max() < 1 / 174  # less than one sample of the smallest class
    # which rows they are, recorded when the split was made: caches hold these keys, so it must not move
    assert item_digest(list(test.keys)).hex() == "bffc385164435312f19687b1f785ee62"
    assert train.class_names == tuple("0123456789")


def test_digits_are_scikit_learns_by_original_row_scaled_to_grey() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra softcache[demo]")
    bunch, test = datasets.load_digits(), open_transfer_set("digits?split=test")
    check_whole(test)
    for index in (0, 77, 499):
        row = int(test.keys[index].removeprefix("digits/"))
        assert test.labels[index] == bunch.target[row]
        np.testing.assert_array_equal(test[index][0], np.round(bunch.images[row] * 255 / 16))


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"softcache\[demo\]"):
        open_transfer_set("digits")


# --- torchvision ---


@pytest.mark.parametrize("gz", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("place", ["FashionMNIST/raw", "raw", ""], ids=["torchvision", "raw", "flat"])
def test_idx_files_are_read_where_they_lie(tmp_path: Path, place: str, gz: bool) -> None:
    images, labels = write_idx(tmp_path / place, "train", 12, gz=gz)
    test_images, _ = write_idx(tmp_path / place, "t10k", 7, gz=gz)
    train = open_transfer_set(f"torchvision:FashionMNIST?root={tmp_path}")
    test = open_transfer_set(f"torchvision:FashionMNIST?root={tmp_path}&train=false")
    check_whole(train)
    np.testing.assert_array_equal(np.stack([item for item, _ in train]), images)
    np.testing.assert_array_equal(np.stack([item for item, _ in test]), test_images)
    np.testing.assert_array_equal(train.labels, labels)
    assert (train.keys[11], test.keys[6]) == ("train/000011", "test/000006")
    assert train.class_names[:2] == ("T-shirt/top", "Trouser")
    assert (train.name, test.name) == ("torchvision:FashionMNIST", "torchvision:FashionMNIST?train=false")


def test_the_name_leaves_local_folders_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "data", "t10k", 2)
    write(tmp_path / "data/x.tsv", "a\tb\n")
    monkeypatch.chdir(tmp_path)
    assert open_transfer_set("torchvision:MNIST?root=data&train=false").name == "torchvision:MNIST?train=false"
    monkeypatch.chdir(tmp_path / "data")
    for path in ("x.tsv", "../data/x.tsv", tmp_path / "data/x.tsv"):
        assert open_transfer_set(f"tsv:{path}?label=1").name == "tsv:x.tsv?label=1"


def test_idx_in_a_read_only_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    write_idx(raw, "train", 3)
    before = sorted(tmp_path.rglob("*"))
    raw.chmod(0o555)
    try:
        mnist = open_transfer_set(f"torchvision:MNIST?root={tmp_path}", download=True)  # nothing to fetch
    finally:
        raw.chmod(0o755)
    assert len(mnist) == 3
    assert mnist.class_names[3] == "3 - three"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("images-idx3-ubyte", b"GIF89a..", "not an IDX file"),
        ("images-idx3-ubyte", idx_bytes(np.zeros((3, 4, 5), np.uint8))[:-1], "75 bytes, but its header asks for 76"),
        ("images-idx3-ubyte", bytes((0, 0, 8, 3, 0)), "5 bytes, but its header asks for 16"),
        ("images-idx3-ubyte", bytes((0, 0, 13, 1)) + bytes(8), "IDX type 0x0d"),
        ("labels-idx1-ubyte", idx_bytes(np.zeros(4, np.uint8)), r"shape \(3, 4, 5\) for labels of shape \(4,\)"),
        ("labels-idx1-ubyte", idx_bytes(np.full(3, 10, np.uint8)), "label 10 of sample train/000000 is outside -1..9"),
    ],
    ids=["magic", "short", "short-header", "type", "counts", "label"],
)
def test_damaged_idx_is_named(tmp_path: Path, part: str, content: bytes, message: str) -> None:
    write_idx(tmp_path, "train", 3, gz=False)
    write(tmp_path / f"train-{part}", content)
    with pytest.raises(DataError, match=message):
        open_transfer_set(f"torchvision:MNIST?root={tmp_path}")


def test_a_gz_file_that_unpacks_to_far_more_than_text_does_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_UNPACKED", 2**20)
    honest = gzip.compress(b"".join(b"text %d\ta\n" % number for number in range(50_000)))
    (tmp_path / "a.tsv.gz").write_bytes(honest)
    assert len(open_transfer_set(f"tsv:{tmp_path}/a.tsv.gz")) == 50_000
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(bytes(2**20 + 1)))
    with pytest.raises(DataError, match=r"b.tsv.gz: [\d,]+ bytes that unpack to more than 1,048,576\n.*without .gz"):
        open_transfer_set(f"tsv:{tmp_path}/b.tsv.gz")


def test_an_idx_header_of_many_axes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0\0\x08\xff" + bytes(4 * 255))
    with pytest.raises(DataError, match="its header says 255 axes"):
        sources.read_idx(tmp_path / "x")


def test_cut_off_gz_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 3)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz: cannot be read"):
        open_transfer_set(f"torchvision:MNIST?root={tmp_path}")


def test_any_torchvision_class_opens_by_name() -> None:
    from torchvision.datasets import FakeData

    fake = open_transfer_set("torchvision:FakeData?size=6&image_size=3,8,5&num_classes=7")
    check_whole(fake)
    oracle = FakeData(6, (3, 8, 5), 7)
    for index in range(6):
        np.testing.assert_array_equal(fake[index][0], np.asarray(oracle[index][0]))
        assert fake.labels[index] == oracle[index][1]
    assert fake.class_names == tuple("0123456")
    assert fake.keys[5] == "all/000005"


def test_imagenet_of_torchvision_opens_though_two_classes_are_called_crane(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets as zoo
    from torch.utils.data import Dataset

    class Stub(Dataset[Any]):
        classes = (("crane",), ("tench", "Tinca tinca"), ("crane",))
        targets = (2, 0, 1)

        def __init__(self, root: str, split: str = "train") -> None:
            self.split = split

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return np.full((2, 2), index, np.uint8), self.targets[index]

    monkeypatch.setattr(zoo, "ImageNet", Stub)
    found = open_transfer_set("torchvision:ImageNet?root=.&split=val")
    assert found.class_names == ("crane", "tench, Tinca tinca", "crane (2)")
    chosen = open_transfer_set("torchvision:ImageNet?root=.", keep_labels=["tench, Tinca tinca", "crane (2)"])
    assert chosen.labels.tolist() == [2, 1]


def write_cifar(root: Path) -> None:
    """Two rows of CIFAR-10 in torchvision's own layout; it is asked not to look at checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = {"data": np.full((2, 3072), number * 20, np.uint8), "labels": [number, 9]}
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_a_torchvision_set_with_splits_gives_keys_labels_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import cifar

    write_cifar(tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    train = open_transfer_set(f"torchvision:CIFAR10?root={tmp_path}")
    test = open_transfer_set(f"torchvision:CIFAR10?root={tmp_path}&train=false")
    check_whole(train)
    assert (train.keys[9], test.keys[1]) == ("train/000009", "test/000001")
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test.labels.tolist() == [5, 9]
    assert train.class_names == tuple("abcdefghij")
    assert test[0][0].shape == (32, 32, 3) and test[0][0].max() == 100


def test_emnist_keys_tell_its_subsets_and_splits_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMNIST takes train= through **kwargs only: it must arrive as a bool, and splits must not share keys."""
    from torchvision.datasets import EMNIST

    raw = tmp_path / "EMNIST/raw"
    for stem, count in (("emnist-letters-train", 3), ("emnist-letters-test", 2), ("emnist-digits-test", 4)):
        write_idx(raw, stem, count, gz=False)
    monkeypatch.setattr(EMNIST, "_check_exists", lambda self: True)
    monkeypatch.setattr(EMNIST, "_check_legacy_exist", lambda self: False)
    spec = f"torchvision:EMNIST?root={tmp_path}"
    assert list(open_transfer_set(f"{spec}&split=letters").keys)[-1] == "letters/train/000002"
    assert list(open_transfer_set(f"{spec}&split=letters&train=false").keys)[-1] == "letters/test/000001"
    assert list(open_transfer_set(f"{spec}&split=digits&train=false").keys)[-1] == "digits/test/000003"


def test_torchvision_is_asked_to_download_only_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    asked: list[Path] = []
    monkeypatch.setattr(CIFAR100, "download", lambda self: asked.append(self.root))
    with pytest.raises(DataError, match="add --download"):
        open_transfer_set(f"torchvision:CIFAR100?root={tmp_path}")
    assert not asked
    with pytest.raises(DataError):  # the stand-in fetches nothing
        open_transfer_set(f"torchvision:CIFAR100?root={tmp_path}", download=True)
    assert asked


# --- image folders ---


def test_imagefolder_follows_torchvisions_order_and_digests_files(animals: Path) -> None:
    from torchvision.datasets import ImageFolder

    found = open_transfer_set(f"imagefolder:{animals}")
    check_whole(found)
    assert list(found.keys) == ["cat/a.png", "cat/z.PNG", *(f"cat/d{n}/b.png" for n in range(5)), "dog/c.png"]
    assert found.labels.tolist() == [0] * 7 + [1]
    assert (found.name, found.class_names, found.digest_kind) == ("imagefolder:animals", ("cat", "dog"), "file")
    for index, key in enumerate(found.keys):
        assert found.load(index)[1] == file_digest((animals / key).read_bytes())
    for hidden in ("cat/.hidden.png", "cat/.ipynb_checkpoints/a.png", ".git/config.png"):
        (animals / hidden).unlink()
    (animals / ".git").rmdir()
    theirs = [Path(path).relative_to(animals).as_posix() for path, _ in ImageFolder(animals).samples]
    assert list(found.keys) == theirs


def test_a_sample_is_read_once(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, reads = open_transfer_set(f"imagefolder:{animals}"), []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or whole(path))
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("the file was opened a second time"))
    found.load(0)
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("L", np.array([[76, 0]])),
        ("1", np.array([[0, 0]])),
        ("LA", np.array([[76, 0]])),
        ("RGB", np.array([[[255, 0, 0], [0, 0, 0]]])),
        ("P", np.array([[[255, 0, 0], [0, 0, 0]]])),
        ("RGBA", np.array([[[255, 0, 0], [0, 0, 0]]])),
        ("CMYK", np.array([[[255, 0, 0], [0, 0, 0]]])),
    ],
)
def test_image_modes(mode: str, expected: np.ndarray) -> None:
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)).convert(mode, dither=Image.Dither.NONE)
    array = image_array(image, "here")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("alpha", [b"\x00\xff", b"\x80\x40"], ids=["one-colour", "per-colour"])
def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path: Path, alpha: bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=alpha)
    np.testing.assert_array_equal(image_array(Image.open(tmp_path / "p.png"), "p"), [[[10, 20, 30], [40, 50, 60]]])


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it
    (tmp_path / "set/a").mkdir(parents=True)
    Image.new("RGB", (8, 4)).save(tmp_path / "set/a/photo.jpg", exif=exif)
    assert open_transfer_set(f"imagefolder:{tmp_path / 'set'}")[0][0].shape == (4, 8, 3)


def test_an_empty_folder_keeps_its_class(animals: Path) -> None:
    for name in ("bee", "eel/nest"):
        (animals / name).mkdir(parents=True)
    write(animals / "bee/.gitkeep", "")
    found = open_transfer_set(f"imagefolder:{animals}")
    check_whole(found)
    assert found.class_names == ("bee", "cat", "dog", "eel")
    assert found.labels.tolist() == [1] * 7 + [2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: root.write_text("a"), "is a file, not a folder"),
        (lambda root: root.mkdir(), "holds no folders"),
        (lambda root: write_png(root / "a.png", np.zeros((2, 2))), "holds no folders"),
        (lambda root: write(root / "cat/notes.txt", ""), r"cat: holds no images, so class 'cat'.* notes.txt is none"),
        (lambda root: write(root / "__MACOSX/cat/._a.png", ""), r"__MACOSX: holds no images"),
        (lambda root: (root / "cat").mkdir(parents=True), r"none of its 1 folders holds an image"),
    ],
    ids=["missing", "a-file", "empty", "flat", "other-files", "archive", "all-empty"],
)
def test_imagefolder_that_cannot_be_opened(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "images")
    with pytest.raises(DataError, match=message):
        open_transfer_set(f"imagefolder:{tmp_path / 'images'}")


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (("train/cat", "test/cat"), True),
        (("Train/cat", "Val/cat"), True),
        (("train", "test"), False),
        (("train/x", "bus/x"), False),
    ],
)
def test_parts_of_a_data_set_that_are_taken_for_classes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], places: tuple[str, str], told: bool
) -> None:
    for place in places:
        write_png(tmp_path / place / "a.png", np.zeros((2, 2)))
    assert len(open_transfer_set(f"imagefolder:{tmp_path}").class_names) == 2
    assert ("look like the parts of a data set" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"not an image"), r"a\.png: cannot be read.* no image that Pillow knows"),
        (lambda path: path.write_bytes(path.read_bytes()[:45]), r"a\.png: cannot be read"),
        (lambda path: path.unlink(), r"a\.png: cannot be read.*No such file"),
        (lambda path: Image.new("I;16", (2, 2)).save(path), r"a\.png: Pillow mode 'I.*more than 8 bits"),
    ],
    ids=["text", "cut-off", "gone", "16-bit"],
)
def test_an_image_that_cannot_be_read_is_named(animals: Path, make: Callable[[Path], Any], message: str) -> None:
    found = open_transfer_set(f"imagefolder:{animals}")
    make(animals / "cat/a.png")
    with pytest.raises(DataError, match=message):
        found.load(0)
    assert found.load(1)


# --- tab-separated text ---


@pytest.mark.parametrize(
    ("content", "query", "texts", "labels", "classes"),
    [
        ("a b\tpos\nc\tneg\n", "", ["a b", "c"], [1, 0], ("neg", "pos")),
        ("a\t10\nb\t9\nc\t10", "", ["a", "b", "c"], [1, 0, 1], ("9", "10")),
        ("a\t1\nb\t-1\nc\t0\n", "", ["a", "b", "c"], [1, -1, 0], ("0", "1")),
        ("a\t01\nb\t1\n", "", ["a", "b"], [0, 1], ("01", "1")),
        ("n\ttag\tsaid\r\n7\tx\thi\r\n", "?text=said&label=tag&header=true", ["hi"], [0], ("x",)),
        ("n\ttag\tsaid\n7\tx\thi\n", "?text=2&label=1&header=true", ["hi"], [0], ("x",)),
        ("x\thi\ny\tho\n", "?text=1&label=0&classes=z,y,x", ["hi", "ho"], [2, 1], ("z", "y", "x")),
        ("only\ntext \n\nhere", "?label=none", ["only", "text ", "", "here"], [-1] * 4, ()),
        ("\"quoted\tx\nit's\u2028one\x85line\ty\n", "", ['"quoted', "it's\u2028one\x85line"], [0, 1], ("x", "y")),
        ("\ufeffa\tx\n", "", ["a"], [0], ("x",)),
    ],
    ids=["words", "numbers", "unlabelled", "not-numbers", "names", "columns", "classes", "none", "verbatim", "bom"],
)
@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
def test_tsv(
    tmp_path: Path, content: str, query: str, texts: list[str], labels: list[int], classes: tuple[str, ...], gz: bool
) -> None:
    data = content.encode()
    path = write(tmp_path / ("said.tsv.gz" if gz else "said.tsv"), gzip.compress(data) if gz else data)
    found = open_transfer_set(f"tsv:{path}{query}")
    check_whole(found)
    assert [item for item, _ in found] == texts
    assert found.labels.tolist() == labels
    assert found.class_names == classes
    assert list(found.keys) == [f"said/{row:06d}" for row in range(len(texts))]
    assert found.name.startswith(f"tsv:{path.name}")


@pytest.mark.parametrize(
    ("content", "query", "message"),
    [
        ("a\tx\nb\n", "", "line 2: 1 columns, but line 1 has 2"),
        ("a\tx\n\nb\ty\n", "", "line 2: 1 columns"),
        ("a\tx\n", "?label=2", "line 1: no column 2 for the label, there are 2"),
        ("a\tx\n", "?text=said", r"line 1: no column 'said' for the text\n.*add header=true"),
        ("text\tx\na\ty\n", "?text=txt&label=x&header=true", r"no column 'txt'[^$]*did you mean 'text'"),
        ("", "", "line 1: the file ends before the first row"),
        ("text\tlabel\n", "?header=true", "line 2: the file ends before the first row"),
        ("a\tSport\nb\tSports\n", "?classes=World,Sports", r"line 1: label 'Sport'[^$]*did you mean 'Sports'"),
        ("h\th\na\tx\nb\ty\n", "?classes=x&header=true", "line 3: label 'y'"),
        (b"a\tx\nb\xff\ty\n", "", "line 2: not UTF-8"),
        ("a\tx\n", "?classes=x,x", "names a class twice"),
        ("a\tx\n", "?header=maybe", "'maybe' is not true or false"),
        ("a\tx\n", "?colour=1", "unknown parameter 'colour'"),
        ("a\tx\n", "?path=b", "'path' is given twice"),
    ],
)
def test_tsv_faults_name_the_line(tmp_path: Path, content: str | bytes, query: str, message: str) -> None:
    path = write(tmp_path / "said.tsv", content)
    with pytest.raises(SoftcacheError, match=message):
        open_transfer_set(f"tsv:{path}{query}")


# --- factories ---


def test_factory_with_plain_samples(factories: str) -> None:
    found = open_transfer_set(f"{factories}:plain?count=3")
    check_whole(found)
    assert list(found.keys) == ["plain/000000", "plain/000001", "plain/000002"]
    assert found.labels.tolist() == [0, 1, 0]
    assert (found.name, found.class_names) == ("mine.py:plain?count=3", ("cat", "dog"))


def test_factory_with_dicts_and_keys(factories: str) -> None:
    found = open_transfer_set(f"{factories}:keyed")
    check_whole(found)
    assert list(found.keys) == ["k0", "k1", "k2", "k3"]
    assert found[3] == ("line 3", 1)


def test_factory_labels_come_from_the_attribute_without_reading(factories: str) -> None:
    assert open_transfer_set(f"{factories}:fast").labels.tolist() == [1, 0, 1, -1]


def test_factory_labels_are_asked_for_where_a_target_transform_changes_them(factories: str) -> None:
    assert open_transfer_set(f"{factories}:transformed").labels.tolist() == [0, 1, 0, 1]


def test_factory_with_several_labels_per_sample_and_tensors(factories: str) -> None:
    import torch

    found = open_transfer_set(f"{factories}:multi")
    check_whole(found)
    assert found.multi_label
    np.testing.assert_array_equal(found.labels, [[0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]])
    assert found.class_names == ("0", "1", "2")
    assert torch.equal(found[2][0], torch.full((3,), 2.0))
    assert len(open_transfer_set(f"{factories}:multi", keep_labels=[0])) == 2
    assert len(open_transfer_set(f"{factories}:multi", drop_labels=["0", "2"])) == 2


def test_factory_with_imagefolder_like_samples(factories: str) -> None:
    assert list(open_transfer_set(f"{factories}:folder").keys) == [f"a/{i}.png" for i in range(4)]


def test_factory_with_images_and_no_labels(factories: str) -> None:
    found = open_transfer_set(f"{factories}:images")
    check_whole(found)
    np.testing.assert_array_equal(found[0][0], np.full((2, 3, 3), (1, 2, 3)))
    assert (found.labels.tolist(), found.class_names) == ([-1], ())


def test_factory_with_a_transfer_set_keeps_it(factories: str, animals: Path) -> None:
    pytest.importorskip("sklearn", reason="needs the extra softcache[demo]")
    found, digits = open_transfer_set(f"{factories}:digits"), open_transfer_set("digits?split=test")
    check_whole(found)
    assert list(found.keys) == list(digits.keys)[:5]
    assert found.load(4)[1] == digits.load(4)[1]
    code = f"from softcache.data.transfer_set import *\ndef files(): return open_transfer_set('imagefolder:{animals}')"
    nested = open_transfer_set(f"{write(animals.parent / 'nested.py', code)}:files")
    assert nested.digest_kind == "file"
    assert nested.load(7)[1] == file_digest((animals / "dog/c.png").read_bytes())


def test_factory_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "somepackage/__init__.py", "")
    shutil.copy(WORLDS / "odd_data_sets.py", tmp_path / "somepackage" / "sets.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_whole(open_transfer_set("somepackage.sets:plain"))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("stream", r"Stream can only be iterated[^$]*map-style"),
        ("generator", r"generator can only be iterated"),
        ("empty", "is empty"),
        ("few_keys", "1 sample_keys for 4 samples"),
        ("number_keys", "sample key 1 is not a string"),
        ("out_of_range", r"label 2 of sample out_of_range/000002 is outside -1\.\.1"),
        ("below", r"label -2 of sample below/000002 is outside"),
        ("halves", "label 0.5 of sample halves/000001 is not a whole number"),
        ("words", "labels of shape .*, for example .*cat"),
        ("ragged", "labels differ in shape"),
        ("twos", "of sample twos/000000 is not 0 or 1"),
        ("columns", "label rows have 3 columns for 2 classes"),
        ("twins", "two classes are called 'cat'"),
        ("row_numbers", "250 different labels in 250 samples"),
        ("triple", "a tuple of 3, expected"),
        ("nameless", r"dict of 'input_ids', 'label'"),
        ("plane", r"has no factory 'plane'[^$]*did you mean 'plain'"),
        ("plain?count=x", "'x' is not a whole number"),
    ],
)
def test_factory_faults(factories: str, factory: str, message: str) -> None:
    with pytest.raises(SoftcacheError, match=message):
        open_transfer_set(f"{factories}:{factory}")


def test_a_users_classes_unpickle_where_the_file_was_never_imported(
    factories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_transfer_set(f"{factories}:keyed")
    data = pickle.dumps(found)
    for name in [name for name in sys.modules if name.startswith("softcache_user_")]:
        monkeypatch.delitem(sys.modules, name)
    assert pickle.loads(data)[1] == ("line 1", 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_read_a_users_data_set(factories: str, method: str) -> None:
    found = open_transfer_set(f"{factories}:keyed")
    loader: DataLoader[Any] = DataLoader(
        found, batch_size=2, num_workers=1, multiprocessing_context=method, collate_fn=list
    )
    assert [text for batch in loader for text, _ in batch] == [f"line {i}" for i in range(4)]


# --- specs and selection ---


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("digit", ConfigError, r"no source is called 'digit'\n.*did you mean 'digits'"),
        ("torchvison:MNIST", ConfigError, "did you mean 'torchvision'"),
        ("digits?split=dev", ConfigError, "digits has no split 'dev'"),
        ("digits?splt=test", ConfigError, r"unknown parameter 'splt'\n.*did you mean 'split'"),
        ("torchvision:MINST?root=.", DataError, r"no data set 'MINST'\n.*'MNIST'"),
        ("torchvision:ImageFolder?root=.", DataError, "no data set 'ImageFolder'"),
        ("torchvision:MNIST", ConfigError, "parameter 'root' is missing"),
        ("torchvision:MNIST?root=nowhere&train=perhaps", ConfigError, "'perhaps' is not true or false"),
        ("torchvision:MNIST?root=nowhere&transform=x", ConfigError, "unknown parameter 'transform'"),
        ("torchvision:MNIST?root=nowhere", DataError, "add --download"),
        ("torchvision:STL10?root=nowhere&split=dev", DataError, "'dev'.*\n  tip: check the parameters"),
        ("tsv:nowhere.tsv", DataError, "nowhere.tsv: there is no such file"),
        ("nowhere.py:make", ConfigError, "there is no file nowhere.py"),
        ("nowhere.sets:make", ConfigError, "no module named 'nowhere'"),
        ("tests", ConfigError, "imagefolder:tests"),
        ("pyproject.toml", ConfigError, "table:pyproject.toml"),
    ],
)
def test_spec_faults(spec: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(kind, match=message):
        open_transfer_set(spec)


@pytest.fixture
def fruit(tmp_path: Path) -> str:
    """Classes whose names are numbers other than their indices, as in a file that counts from 1."""
    path = write(tmp_path / "fruit.tsv", "a\t1\nb\t2\nc\t3\nd\t2\ne\t-1\n")
    return f"tsv:{path}"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_labels": ["2"]}, "bd"),
        ({"keep_labels": [2]}, "c"),
        ({"keep_labels": ["0", "3"]}, "ac"),
        ({"drop_labels": ["2"]}, "ace"),
        ({"keep_labels": ["1", "2"], "drop_labels": ["1"]}, "bd"),
        ({"samples": "fruit/000003\nfruit/000000\r\n\nfruit/000003\n"}, "ad"),
        ({"samples": "fruit/000003\nfruit/000000", "drop_labels": ["1"]}, "d"),
        ({}, "abcde"),
    ],
    ids=["name", "index", "index-text", "drop", "both", "samples", "samples-and-drop", "all"],
)
def test_selection(tmp_path: Path, fruit: str, options: dict[str, Any], kept: str) -> None:
    if "samples" in options:
        options = options | {"samples": write(tmp_path / "keys.txt", options["samples"])}
    found = open_transfer_set(fruit, **options)
    assert "".join(item for item, _ in found) == kept
    assert [key[-1] for key in found.keys] == [str("abcde".index(item)) for item in kept]
    assert found.class_names == ("1", "2", "3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_labels": ["22"]}, r"no class '22' among 3 classes\n.*did you mean '2'"),
        ({"drop_labels": [3]}, "no class 3 among 3"),
        ({"keep_labels": [-1]}, "no class -1 among 3"),
        ({"keep_labels": ["1"], "drop_labels": ["1"]}, "none of its 5 samples is selected"),
        ({"samples": "fruit/000000\nfruit/9\nfruit/8\n"}, "2 of 3 keys are not in the transfer set: fruit/9, fruit/8"),
        ({"samples": ""}, "cannot be read as a list of keys"),
    ],
    ids=["name", "index", "negative", "nothing", "keys", "no-file"],
)
def test_selection_faults(tmp_path: Path, fruit: str, options: dict[str, Any], message: str) -> None:
    if "samples" in options:
        path = tmp_path / "keys.txt"
        options = options | {"samples": write(path, options["samples"]) if options["samples"] else path}
    with pytest.raises(DataError, match=message):
        open_transfer_set(fruit, **options)


def test_string_table_is_a_sequence() -> None:
    words = ["", "é", "train/000001", "\u2028"]
    table = StringTable(words)
    assert list(table) == words
    assert table[-1] == words[-1]
    assert list(table[1:3]) == words[1:3]
    assert list(table.take(np.array([3, 1]))) == ["\u2028", "é"]
    assert "é" in table
    with pytest.raises(IndexError):
        table[4]


# --- CIFAR-100 sheets ---


def write_sheets(root: Path) -> np.ndarray:
    """Two sheets of training rows whose pixels say where they stand."""
    rows = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3)).astype(np.uint8)
    root.mkdir()
    for number in range(2):
        sheet = np.zeros((640, 800, 3), np.uint8)
        for place, row in enumerate(rows[number * 500 : number * 500 + 500]):
            y, x = place // 25 * 32, place % 25 * 32
            sheet[y : y + 32, x : x + 32] = row
        Image.fromarray(sheet).save(root / f"train_{number:03d}.webp", lossless=True)
    np.savez(root / "labels.npz", train=np.arange(1000) % 100, test=np.arange(10))
    return rows


def test_cifar100_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_sheets(tmp_path / "sheets")
    tool = REPOSITORY / "tools/data/cifar100_webp.py"
    found = open_transfer_set(f"{tool}:train?root={tmp_path / 'sheets'}")
    check_whole(found)
    assert len(found) == 1000
    for index in (0, 24, 25, 499, 500, 999):
        np.testing.assert_array_equal(found[index][0], rows[index])
    assert found.keys[999] == "train/000999"
    assert len(found.class_names) == 100
    assert list(found.class_names) == sorted(found.class_names)
    assert found.class_names[::33] == ("apple", "forest", "raccoon", "worm")
    monkeypatch.setenv("SOFTCACHE_CIFAR100", str(tmp_path / "sheets"))
    (tmp_path / "sheets/train_001.webp").unlink()  # not needed for this many
    assert list(open_transfer_set(f"{tool}:train?limit=3").keys) == [f"train/{i:06d}" for i in range(3)]
    with pytest.raises(DataError, match="limit=11 for 10 test rows"):
        open_transfer_set(f"{tool}:test?limit=11")
    monkeypatch.setenv("SOFTCACHE_CIFAR100", str(tmp_path))
    with pytest.raises(DataError, match=r"no CIFAR-100 sheets in [^$]*SOFTCACHE_CIFAR100"):
        open_transfer_set(f"{tool}:test")


# --- the real data, where it is ---


@needs_shared
def test_real_mnist() -> None:
    test = open_transfer_set(f"torchvision:MNIST?root={SHARED}&train=false")
    check_whole(test)
    assert len(test) == 10_000
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@needs_shared
def test_real_text() -> None:
    sst = open_transfer_set(f"tsv:{SHARED}/SST-2/test.tsv.gz?header=true")
    assert (len(sst), sst.class_names, int(sst.labels.sum())) == (872, ("0", "1"), 444)
    assert sst[0] == ("it 's a charming and often affecting journey . ", 1)
    news = open_transfer_set(f"tsv:{SHARED}/ag_news_small/test.tsv.gz?classes=World,Sports,Business,Sci/Tech")
    assert np.bincount(news.labels).tolist() == [1900] * 4


@needs_shared
def test_real_cifar100() -> None:
    root = f"{SHARED}{os.sep}cifar100-webp"
    train = open_transfer_set(f"{REPOSITORY / 'tools/data/cifar100_webp.py'}:train?root={root}&limit=1000")
    check_whole(train)
    assert train.labels[:10].tolist() == [19, 29, 0, 11, 1, 86, 90, 28, 23, 31]
    assert train.class_names[19] == "cattle"

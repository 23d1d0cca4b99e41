"""CIFAR-100 from the lossless WebP sheets in shared/data, as a source: `tools/data/cifar100_webp.py:train?limit=1000`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from softcache.errors import DataError

USUAL_PLACES = ("shared/data/cifar100-webp", "../shared/data/cifar100-webp")
SHEET_ROWS = 500
_ALPHABETICAL = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CLASS_NAMES = tuple(_ALPHABETICAL.split())


@dataclass(frozen=True)
class Cifar100:
    """Rows of one split, decoded.

    Attributes:
        split: "train" or "test".
        images: (N, 32, 32, 3) uint8.
        labels: (N,) fine labels, 0 = apple .. 99 = worm.
    """

    split: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index].copy(), int(self.labels[index])

    def sample_keys(self) -> list[str]:
        """The split and the row."""
        return [f"{self.split}/{row:06d}" for row in range(len(self))]


def train(root: str = "", limit: int = 0) -> Cifar100:
    """The 50,000 rows to train on, or the first `limit` of them."""
    return _open("train", root, limit)


def test(root: str = "", limit: int = 0) -> Cifar100:  # noqa: PT028 - a factory, not a pytest test
    """The 10,000 test rows, which lie sorted by class, or the first `limit` of them."""
    return _open("test", root, limit)


def _open(split: str, root: str, limit: int) -> Cifar100:
    folder = _folder(root)
    with np.load(folder / "labels.npz") as stored:
        labels = stored[split]
    if limit < 0 or limit > len(labels):
        raise DataError(f"limit={limit} for {len(labels)} {split} rows", tip="limit=0 takes all of them")
    count = limit or len(labels)
    sheets = [_sheet(folder / f"{split}_{number:03d}.webp") for number in range(-(-count // SHEET_ROWS))]
    return Cifar100(split, np.concatenate(sheets)[:count], labels[:count].astype(np.int32))


def _folder(root: str) -> Path:
    given = root or os.environ.get("SOFTCACHE_CIFAR100", "")
    places = [Path(given)] if given else [Path(place) for place in USUAL_PLACES]
    for place in places:
        if (place / "labels.npz").is_file():
            return place
    raise DataError(
        f"no CIFAR-100 sheets in {' or '.join(map(str, places))} (looked for labels.npz)",
        tip="give ?root=FOLDER, or set SOFTCACHE_CIFAR100",
    )


def _sheet(path: Path) -> np.ndarray:
    """(500, 32, 32, 3) uint8 from one 800x640 image: 20 lines of 25 images."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    tiles = pixels.reshape(20, 32, 25, 32, 3)  # line, y, place in line, x, colour
    return tiles.swapaxes(1, 2).reshape(SHEET_ROWS, 32, 32, 3)

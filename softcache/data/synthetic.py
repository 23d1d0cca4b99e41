"""Data out of nothing: small learnable sets for trials, where the real ones are not at hand.

`synthetic:images?classes=10&size=28&channels=1&count=512&split=train`, `synthetic:texts?classes=2&count=512`.
"""

from __future__ import annotations

import numpy as np

from softcache.data.sources import ArrayReader, Source, StringTable, TextReader, numbered
from softcache.errors import ConfigError

SEED = 20261121  # part of what the sets are
SPLITS = {"train": 0, "test": 1}
WORDS = 40  # of each class, and as many that say nothing


def images(
    classes: int = 10, size: int = 32, channels: int = 3, count: int = 512, split: str = "train", noise: int = 40
) -> Source:
    """`count` uint8 images (size, size, channels), of one channel (size, size): a smooth pattern per class, in noise."""
    draw = _generator(split, classes, count)
    patterns = np.random.default_rng([SEED, classes]).uniform(60, 195, (classes, 4, 4, channels))
    labels = draw.integers(0, classes, count).astype(np.int32)
    cells = (np.arange(size) * 4 // size).clip(max=3)
    whole = patterns[labels][:, cells][:, :, cells]  # (N, size, size, channels)
    pixels = np.clip(whole + draw.normal(0, noise, whole.shape), 0, 255).astype(np.uint8)
    items = pixels[..., 0] if channels == 1 else pixels
    return Source(ArrayReader(items), numbered(f"synthetic/{split}", range(count)), labels, _names(classes))


def texts(classes: int = 2, count: int = 512, split: str = "train", words: int = 12) -> Source:
    """`count` texts of `words` words, a third of them words of the text's class."""
    draw = _generator(split, classes, count)
    labels = draw.integers(0, classes, count).astype(np.int32)
    said = []
    for label in labels:
        own = draw.random(words) < 1 / 3
        numbers = draw.integers(0, WORDS, words)
        said.append(" ".join(f"c{label}w{n}" if mine else f"w{n}" for mine, n in zip(own, numbers, strict=True)))
    keys = numbered(f"synthetic/{split}", range(count))
    return Source(TextReader(StringTable(said)), keys, labels, _names(classes))


def _generator(split: str, classes: int, count: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ConfigError(f"synthetic data has no split {split!r}", tip="split=train or split=test")
    if classes < 1 or count < 1:
        raise ConfigError(f"synthetic data of {classes} classes and {count} samples", tip="both must be at least 1")
    return np.random.default_rng([SEED, SPLITS[split], classes])


def _names(classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(classes))

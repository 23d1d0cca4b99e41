"""Data out of nothing: small learnable sets for trials, where the real ones are not at hand.

`synthetic:images?classes=10&size=28&channels=1&count=512&split=train`, `synthetic:texts?classes=2&count=512`,
`synthetic:words?count=512&kinds=3`.
"""

from __future__ import annotations

import numpy as np

from softcache.data.position_labels import PositionLabels
from softcache.data.sources import ArrayReader, Source, StringTable, TextReader, numbered
from softcache.data.tagged_words import WordsReader
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


def words(count: int = 512, split: str = "train", kinds: int = 3, most: int = 14) -> Source:
    """`count` sentences of 1 to `most` words with tags O, B-K0, I-K0, ...: a word k0w7 begins a span of its kind, an odd
    word behind it (w3) goes on with the span, and an even one (w4) ends it: a word's tag needs those before it.
    """
    draw = _generator(split, kinds, count)
    if most < 1:
        raise ConfigError(f"synthetic words: most={most}", tip="give at least 1")
    offsets = np.concatenate([[0], np.cumsum(draw.integers(1, most + 1, count))])
    numbers = draw.integers(0, WORDS, offsets[-1])
    drawn = draw.random(offsets[-1])
    said, labels = [], np.zeros(offsets[-1], np.int32)
    inside = 0  # 0: no span; else its kind + 1
    starts = set(offsets.tolist())
    for place, (number, chance) in enumerate(zip(numbers.tolist(), drawn.tolist(), strict=True)):
        inside = 0 if place in starts else inside
        if chance < 0.25:
            inside = 1 + int(chance / 0.25 * kinds)
            said.append(f"k{inside - 1}w{number}")
            labels[place] = 2 * inside - 1
        elif number % 2:  # odd words go on with a span
            said.append(f"w{number}")
            labels[place] = 2 * inside
        else:
            inside = 0
            said.append(f"w{number}")
    names = ("O", *(f"{letter}-K{kind}" for kind in range(kinds) for letter in "BI"))
    keys = numbered(f"synthetic/{split}", range(count))
    none = np.full(count, -1, np.int32)
    positions = PositionLabels("words", offsets, labels)
    return Source(WordsReader(StringTable(said), offsets), keys, none, names, positions=positions)


def _generator(split: str, classes: int, count: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ConfigError(f"synthetic data has no split {split!r}", tip="split=train or split=test")
    if classes < 1 or count < 1:
        raise ConfigError(f"synthetic data of {classes} classes and {count} samples", tip="both must be at least 1")
    return np.random.default_rng([SEED, SPLITS[split], classes])


def _names(classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(classes))

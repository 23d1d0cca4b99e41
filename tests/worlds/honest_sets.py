"""Fifty honest data sets that are small, long-tailed, few-shot, imbalanced or oddly named, and a fair teacher for each."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FAIR = 0.7  # share of samples on which the teacher is right


def spread(*counts: int) -> list[int]:
    """Labels 0, 1, ... as often as said, mixed up."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return [int(label) for label in np.random.default_rng(len(labels)).permutation(labels)]


@dataclass(frozen=True)
class Honest:
    """One of them.

    Attributes:
        names: what its classes are called.
        labels: of each sample, an index into the names; -1 = none.
        kind: "tsv", "imagefolder" or "factory".
        query: of its spec.
        words: of each text.
        declared: whether a factory's set names its classes.
        first: text and label of the first line of a file, before the samples.
    """

    names: Sequence[str]
    labels: Sequence[int]
    kind: str = "tsv"
    query: str = ""
    words: int = 6
    declared: bool = True
    first: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        return [" ".join([f"w{i}", *"abcdefgh"][: self.words]) for i in range(len(self.labels))]

    def images(self) -> list[np.ndarray]:
        return [
            np.full((2, 2), i % 256, np.uint8) + np.array([[0, i // 256], [0, 0]], np.uint8)
            for i in range(len(self.labels))
        ]

    def write(self, folder: Path, number: int) -> str:
        """Its files; the spec."""
        if self.kind == "factory":
            return f"{__file__}:dataset?number={number}"
        if self.kind == "imagefolder":
            for name in self.names:
                (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for i, (image, label) in enumerate(zip(self.images(), self.labels, strict=True)):
                Image.fromarray(image).save(folder / "images" / self.names[label] / f"{i:04d}.png")
            return f"imagefolder:{folder / 'images'}"
        rows = [f"{t}\t{self.names[y] if y >= 0 else '-1'}" for t, y in zip(self.texts(), self.labels, strict=True)]
        content = "\n".join(["\t".join(self.first)] * bool(self.first) + rows) + "\n"
        path = folder / ("set.tsv.gz" if self.query == "gz" else "set.tsv")
        path.write_bytes(gzip.compress(content.encode()) if self.query == "gz" else content.encode())
        return f"tsv:{path}" + ("" if self.query in ("", "gz") else f"?{self.query}")


def numbers(count: int, first: int = 0) -> list[str]:
    return [str(number) for number in range(first, first + count)]


LETTERS = [chr(ord("a") + i) for i in range(26)]
IDS = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
TAIL = spread(120, 60, 30, 15, 8, 4, 2, 1, 1)
TEN = [f"kind {i}" for i in range(10)]

SETS: dict[str, Honest] = {
    "two classes of three": Honest(["neg", "pos"], spread(3, 3)),
    "one sample": Honest(["only"], [0]),
    "one class": Honest(["spam"], [0] * 12),
    "one-shot words": Honest([f"word{i}" for i in range(20)], list(range(20))),
    "one-shot numbers": Honest(numbers(30), list(range(30))),
    "five-way, single words": Honest(["cat", "dog", "cow", "pig", "hen"], spread(1, 1, 1, 1, 1), words=1),
    "long tail": Honest([f"t{i}" for i in range(9)], TAIL),
    "98 to 2": Honest(["ham", "spam"], spread(98, 2)),
    "letters in both cases": Honest([*LETTERS, *(one.upper() for one in LETTERS)], spread(*[2] * 52)),
    "half stars": Honest([f"{i / 2}" for i in range(1, 11)], spread(*[4] * 10)),
    "stars": Honest(numbers(5, 1), spread(3, 5, 9, 14, 20)),
    "three numbers": Honest(["3", "17", "42"], spread(5, 5, 5)),
    "names with commas": Honest(["Paris, Texas", "Rome"], spread(6, 7)),
    "padded codes": Honest(["001", "002", "010"], spread(6, 7, 5)),
    "Chinese": Honest(["正面", "负面"], spread(6, 7), words=1),
    "emoji": Honest(["🙂", "🙁", "😐"], spread(6, 7, 3)),
    "classes called as columns are": Honest(["label", "text", "title"], [1, 0, 0, 2, 1, 2, 0]),
    "one yes first": Honest(["n", "y"], [1] + [0] * 20, words=2),
    "country codes": Honest(["NA", "NO", "US"], spread(5, 6, 7)),
    "none among words": Honest(["none", "null", "some"], spread(5, 6, 7)),
    "none among numbers": Honest(["1", "2", "none"], spread(5, 6, 7)),
    "truth values": Honest(["False", "True"], spread(9, 5)),
    "whole floats": Honest(["0.0", "1.0", "2.0"], spread(9, 5, 4)),
    "programming languages": Honest(["C", "C#", "C++", "c"], spread(9, 5, 4, 3)),
    "German": Honest(["Masse", "Maße", "Maß"], spread(9, 5, 4)),
    "quotes": Honest(['"a"', "a", "'b'"], spread(9, 5, 4)),
    "a brand": Honest(["Target", "Walmart"], [0] + [1] * 9, words=4),
    "age groups": Honest(["0-2", "3-5", "6-9"], spread(9, 5, 4)),
    "years": Honest(numbers(3, 2019), spread(9, 5, 4)),
    "some without a label": Honest(["0", "1"], [0, 1, -1, -1, 1, 0, -1]),
    "gzipped": Honest(["neg", "pos"], spread(8, 9), query="gz"),
    "with a header": Honest(
        ["0", "1"], spread(8, 9), query="header=true&text=text&label=label", first=("text", "label")
    ),
    "declared classes": Honest(["1", "3"], spread(8, 9), query="classes=1,2,3"),
    "sentences as names": Honest([f"what is my balance {i}" for i in range(6)], spread(*[6] * 6)),
    "a hundred classes of two": Honest([f"i{i}" for i in range(100)], spread(*[2] * 100)),
    "folders": Honest(["cat", "dog"], spread(5, 4), "imagefolder"),
    "a folder that is empty": Honest(["cat", "cow", "dog"], [0, 2, 0, 2, 2], "imagefolder"),
    "some of ImageNet": Honest(IDS, spread(3, 3, 3, 3, 3), "imagefolder"),
    "folders called by numbers": Honest(sorted(numbers(12)), spread(*[2] * 12), "imagefolder"),
    "folders with odd names": Honest(["a b", "c,d", "é"], spread(2, 3, 4), "imagefolder"),
    "one image a class": Honest(["x", "y", "z"], [0, 1, 2], "imagefolder"),
    "only counted": Honest(numbers(4), spread(9, 5, 4, 2), "factory", declared=False),
    "counted long tail": Honest(numbers(9), TAIL, "factory", declared=False),
    "novel classes": Honest(numbers(20), [*range(14, 20)] * 3, "factory", declared=False),
    "only positives": Honest(numbers(2), [1] * 9, "factory", declared=False),
    "without the first class": Honest(["background", "cat", "dog", "cow"], [1, 2, 3] * 5, "factory"),
    "names out of order": Honest(["z", "m", "a"], spread(9, 5, 4), "factory"),
    "unlabelled": Honest(["a", "b", "c"], [-1] * 9, "factory"),
    "few of many": Honest(TEN, [2, 7, 7, 3], "factory"),
    "nearly balanced": Honest(TEN, spread(*[12] * 10), "factory"),
}


class Made:
    """A factory's set, of arrays."""

    def __init__(self, honest: Honest) -> None:
        self.images, self.labels = honest.images(), list(honest.labels)
        self.sample_keys = [f"h/{i}" for i in range(len(self.labels))]
        if honest.declared:
            self.class_names = tuple(honest.names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], self.labels[index]


def dataset(number: int) -> Made:
    return Made(list(SETS.values())[number])


class Fair:
    """Knows each sample by what it holds; right on 70 % of them, and says what it calls the classes, in an order of its own."""

    def __init__(self, honest: Honest, class_names: Sequence[str], how: int) -> None:
        draw = np.random.default_rng(how)
        order = draw.permutation(len(class_names)) if how % 2 else np.arange(len(class_names))
        items: Sequence[Any] = honest.texts() if honest.kind == "tsv" else [one.tobytes() for one in honest.images()]
        self.rows: dict[Any, np.ndarray] = {}
        for item, label in zip(items, honest.labels, strict=True):
            name = honest.names[label] if label >= 0 else ""
            scores = draw.normal(size=len(class_names))
            if name in class_names and draw.random() < FAIR:
                scores[list(class_names).index(name)] += 6
            self.rows[item] = scores[order]
        if how % 2:
            self.class_names = tuple(class_names[i] for i in order)

    def collate(self, items: Sequence[Any]) -> list[Any]:
        return [item if isinstance(item, str) else np.asarray(item).tobytes() for item in items]

    def __call__(self, batch: Sequence[Any]) -> np.ndarray:
        return np.stack([self.rows[item] for item in batch]).astype(np.float32)


def fair(number: int, class_names: Sequence[str]) -> Callable[[Any], np.ndarray]:
    return Fair(list(SETS.values())[number], class_names, number)

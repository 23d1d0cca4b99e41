"""Data sets of every kind that can be opened, and of many that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from softcache.data.transfer_set import TransferSet, open_transfer_set


class Plain:
    class_names: tuple[str, ...] | None = ("cat", "dog")

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        if i >= self.count:
            raise IndexError(i)
        return np.full((2, 2), i, np.uint8), i % 2


class Keyed(Plain):
    def __getitem__(self, i: int) -> Any:
        return {"text": f"line {i}", "label": i % 2, "extra": 1}

    def sample_keys(self) -> list[str]:
        return [f"k{i}" for i in range(self.count)]


class Fast(Plain):  # would fail if labels were asked for by reading samples
    labels = torch.tensor([1, 0, 1, -1])

    def __getitem__(self, i: int) -> Any:
        raise RuntimeError("read")


class Transformed(Plain):
    targets = (9, 9, 9, 9)
    target_transform = staticmethod(lambda label: label)


class Multi(Plain):
    class_names = None

    def __getitem__(self, i: int) -> Any:
        return torch.full((3,), float(i)), [i % 2, 1, 0]


class Folder(Plain):
    root = "/somewhere"
    samples = tuple((f"/somewhere/a/{i}.png", 0) for i in range(4))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


class Bad(Plain):
    def __init__(self, sample: Any = None, **attributes: Any) -> None:
        super().__init__()
        self.sample = sample
        self.__dict__.update(attributes)

    def __getitem__(self, i: int) -> Any:
        return self.sample if self.sample is not None else (i, 0)


def plain(count: int = 4) -> Plain:
    return Plain(count)


def keyed() -> Keyed:
    return Keyed()


def fast() -> Fast:
    return Fast()


def transformed() -> Transformed:
    return Transformed()


def multi() -> Multi:
    return Multi()


def folder() -> Folder:
    return Folder()


def stream() -> Stream:
    return Stream()


def generator() -> Iterator[int]:
    return (i for i in range(3))


def images() -> list[tuple[Image.Image, None]]:
    return [(Image.new("RGBA", (3, 2), (1, 2, 3, 4)), None)]


def digits() -> TransferSet:
    return open_transfer_set("digits?split=test").select(np.arange(5))


def empty() -> list[Any]:
    return []


def few_keys() -> Bad:
    return Bad(sample_keys=["a"])


def number_keys() -> Bad:
    return Bad(sample_keys=[1, 2, 3, 4])


def out_of_range() -> Bad:
    return Bad(labels=[0, 1, 2, 0])


def below() -> Bad:
    return Bad(labels=[0, 1, -2, 0])


def halves() -> Bad:
    return Bad(labels=[0, 0.5, 1, 0])


def words() -> Bad:
    return Bad(labels=["cat", "dog", "cat", "dog"])


def ragged() -> list[tuple[int, list[int]]]:
    return [(0, [0, 1]), (1, [0, 1, 1])]


def twos() -> Bad:
    return Bad(labels=np.full((4, 2), 2))


def columns() -> Bad:
    return Bad(labels=np.zeros((4, 3)))


def twins() -> Bad:
    return Bad(class_names=("cat", "cat"))


def triple() -> Bad:
    return Bad(sample=(1, 2, 3))


def nameless() -> Bad:
    return Bad(sample={"input_ids": 1, "label": 0})


def row_numbers() -> Numbered:
    return Numbered()


class Numbered:
    """Labels that count the samples, and no word of classes."""

    labels = tuple(range(250))

    def __len__(self) -> int:
        return 250

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index

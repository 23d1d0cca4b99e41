"""Data whose names and keys give orders to a terminal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Rude:
    class_names, labels = ("\x1b[2Jcat", "dog\u202e"), (0, 1) * 4
    sample_keys = tuple(f"\x1b]0;{i}\x07" for i in range(8))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> np.ndarray:
        return np.full((2, 2), i, np.uint8)


def rude() -> Rude:
    return Rude()


def teacher() -> Callable[[np.ndarray], np.ndarray]:
    return lambda batch: batch[:, :2]

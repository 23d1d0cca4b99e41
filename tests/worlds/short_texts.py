"""Texts, and a teacher that counts their letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def data() -> list[tuple[str, int]]:
    return [(f"text {i}", i % 2) for i in range(9)]


def model(num_classes: int) -> Callable[[Sequence[str]], np.ndarray]:
    return lambda texts: np.array([[len(text), 1.5] for text in texts])

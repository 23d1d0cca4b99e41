"""Shared by the tests of views: the draws as FORMAT.md describes them, from NumPy's Philox, and images to render."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from softcache.data.views import Policy

TOP = 2**64 - 1
SAMPLE, VIEW, SEED = 0xFEDCBA9876543210, 3, 17
LAYOUTS = ["grey", "grey with a channel", "rgb", "rgba", "tensor grey", "tensor rgb"]


def numpy_block(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """NumPy counts up before it generates: start one below."""
    number = (sum(word << 64 * i for i, word in enumerate(counter)) - 1) % 2**256
    return [int(w) for w in np.random.Philox(counter=number, key=key[0] | key[1] << 64).random_raw(4)]


def oracle_words(root_seed: int, name: str, occurrence: int, sample: int, view: int) -> Iterator[int]:
    """The words a step may draw, as the format describes them."""
    key = int.from_bytes(hashlib.blake2b(f"{name}#{occurrence}".encode(), digest_size=8).digest(), "little")
    for block in itertools.count():
        yield from numpy_block((sample, view, block, 0), (root_seed % 2**64, key))


def oracle_integer(word: int, low: int, high: int) -> int:
    return low + word * (high - low + 1) // 2**64


def oracle_uniform(word: int) -> float:
    return float(np.ldexp(word // 2**11, -53))


def policy_of(*steps: str, seed: int = SEED) -> Policy:
    return Policy.parse(steps, seed)


def image_of(layout: str, *, seed: int = 0, height: int = 16, width: int = 13) -> Any:
    channels = 1 if "grey" in layout else 4 if layout == "rgba" else 3
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    if layout.startswith("tensor"):
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return pixels[:, :, 0] if layout == "grey" else pixels


def channels_last(item: Any) -> np.ndarray:
    if isinstance(item, torch.Tensor):
        return item.permute(1, 2, 0).numpy()
    return item[:, :, None] if item.ndim == 2 else item

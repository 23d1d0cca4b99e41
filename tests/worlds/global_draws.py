"""A user's file: images of one size, and transforms that draw from every global generator there is."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3)).astype(np.uint8)
        self.labels = np.arange(count) % 4
        self.sample_keys = [f"toy/{i:04d}" for i in range(count)]
        self.class_names = ("ant", "bee", "cat", "dog")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        if i == 13 and len(self) == 14:
            raise OSError("the disk is gone")
        return self.images[i].copy(), self.labels[i]


def images(count: int = 40) -> Images:
    return Images(count)


class Noise:
    """Adds noise of all three generators; writes into the image it is given; gives what `kind` says."""

    def __init__(self, strength: int, kind: str) -> None:
        self.strength, self.kind = strength, kind
        self.offset = random.randrange(100) + np.random.randint(100) + int(torch.randint(100, ()))

    def __call__(self, image: Tensor) -> Any:
        image += random.randrange(self.strength)
        image[:, :4] += torch.randint(0, self.strength, (4, 24), dtype=torch.uint8)
        image[:, 4:8] += torch.from_numpy(np.random.randint(0, self.strength, (4, 24)).astype(np.uint8))
        image[:, 8:12] = self.offset % 256
        if self.kind == "broken" and random.random() < 2:
            raise RuntimeError("the transform broke")
        if self.kind == "tensor":
            return image
        array = image.permute(1, 2, 0).numpy()
        return {
            "pil": Image.fromarray(array),
            "array": array,
            "floats": image / 255,
            "none": None,
            "flat": array.ravel(),
        }[self.kind]


def noise(strength: int = 30, kind: str = "tensor") -> Noise:
    return Noise(strength, kind)


def not_callable() -> int:
    return 3

"""The data of toy.py after one edit of some kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from softcache.spec import load_user_file

toy: Any = load_user_file(Path(__file__).with_name("toy.py"))


def good() -> Any:
    return toy.images()


def one_label() -> Any:
    data = good()
    data.labels[7] = (data.labels[7] + 1) % 4
    return data


def seven_labels() -> Any:
    data = good()
    data.labels[10:17] = (data.labels[10:17] + 1) % 4
    return data


def one_image() -> Any:
    data = good()
    data.images[7, 2, 3] ^= 1
    return data


def every_image() -> Any:
    data = good()
    data.images ^= 1
    return data


def one_more() -> Any:
    return toy.images(count=41)


def one_key() -> Any:
    data = good()
    data.sample_keys[7] = "toy/7"
    return data


def renamed() -> Any:
    data = good()
    data.class_names = ("ant", "bee", "cow", "dog")
    return data


def permuted() -> Any:
    data = good()
    data.class_names, data.labels = ("ant", "cat", "bee", "dog"), np.array([0, 2, 1, 3])[data.labels]
    return data


def a_class_more() -> Any:
    data = good()
    data.class_names += ("eel",)
    return data


def several_labels() -> Any:
    return toy.images(multi_label=True)


def edited(at: int) -> Any:
    """200 images, one of them changed."""
    data = toy.images(count=200)
    data.images[at] ^= 1
    return data


def alike() -> Any:
    """Three images are the same one."""
    data = good()
    data.images[3] = data.images[9] = data.images[30]
    return data

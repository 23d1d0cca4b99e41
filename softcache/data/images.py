"""uint8 images in the layouts that items come in, and the one layout that steps work on: tensors C x H x W."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.data.sources import image_array
from softcache.errors import DataError


def to_tensor(item: Any) -> Tensor:
    """uint8 (C, H, W) of an array H x W or H x W x C, a tensor C x H x W or a PIL image; memory is shared where it can be.

    Raises:
        DataError: the item is not a uint8 image.
    """
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim in (2, 3):
        item = np.ascontiguousarray(item)  # torch knows no negative strides
        image = torch.from_numpy(item if item.flags.writeable else item.copy())
        return image[None] if item.ndim == 2 else image.permute(2, 0, 1)
    if isinstance(item, Tensor) and item.dtype == torch.uint8 and item.ndim == 3:
        return item
    if hasattr(item, "getbands"):  # a PIL image
        return to_tensor(image_array(item, "a view"))
    raise DataError(
        f"a view policy needs uint8 images, got {describe(item)}",
        tip="let the data set return uint8 arrays (H x W x C), or use no --policy",
    )


def like(image: Tensor, item: Any) -> Any:
    """Back to the layout of the item: arrays channels-last (H x W stays H x W), tensors channels-first."""
    if isinstance(item, Tensor):
        return image.contiguous()
    array = image.permute(1, 2, 0).contiguous().numpy()
    return array[:, :, 0] if array.shape[2] == 1 and getattr(item, "ndim", 2) == 2 else array


def describe(item: Any) -> str:
    """Type, dtype and shape of an item, for messages."""
    shape = tuple(getattr(item, "shape", ()))
    return f"{type(item).__name__} {getattr(item, 'dtype', '')} {shape or ''}".rstrip()

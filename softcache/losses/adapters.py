"""What brings a student's features to the teacher's shape: learned along with the student, left out of its export.

A linear adapter is the affine map y' = W z + b of each vector, token or position z. Shapes here are those of one sample,
without the batch axis: (D,) a vector, (L, D) tokens, (C, H, W) a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import LossError, nearest

ADAPTERS = ("identity", "linear", "mlp")
KINDS = {1: "a vector", 2: "tokens", 3: "a map"}


def make_adapter(kind: str, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
    """The module that maps (B, *student_shape) to (B, *teacher_shape).

    A map larger than the teacher's is first pooled to the teacher's size by adaptive averages, whatever the kind.

    Args:
        kind: "identity" (nothing learned), "linear" (y' = W z + b on the last axis, or a 1x1 convolution), "mlp" (two of
            them with a ReLU between; the hidden width is the teacher's).
        student_shape, teacher_shape: both of a vector (D,), of tokens (L, D), or of a map (C, H, W).

    Raises:
        LossError: an unknown kind, shapes of two kinds, another number of tokens, a map smaller than the teacher's, or
            "identity" between two widths.
    """
    if kind not in ADAPTERS:
        raise LossError(f"unknown adapter {kind!r}", tip=nearest(kind, ADAPTERS))
    if kind == "identity" and tuple(student_shape) == tuple(teacher_shape):
        return nn.Identity()
    source, target = _widths(student_shape, teacher_shape)
    if kind == "identity" and source != target:
        raise LossError(
            f"adapter 'identity': the student's features are {source} wide and the teacher's {target}",
            tip="adapter=linear learns the map between the two",
        )
    is_map = len(teacher_shape) == 3
    layers: list[nn.Module] = []
    if is_map and tuple(student_shape[1:]) != tuple(teacher_shape[1:]):
        layers.append(_FitMap(teacher_shape[1:]))
    if kind != "identity":
        layers.append(_affine(source, target, is_map))
    if kind == "mlp":
        layers += [nn.ReLU(), _affine(target, target, is_map)]
    return nn.Sequential(*layers)


def fit_map(student_map: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *size) adaptive averages of a map (B, C, H, W); the map itself where it has that size.

    Raises:
        LossError: the map is smaller than `size`.
    """
    found = tuple(student_map.shape[2:])
    _check_size(found, size)
    height, width = size
    return student_map if found == (height, width) else F.adaptive_avg_pool2d(student_map, (height, width))


class _FitMap(nn.Module):
    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, student_map: Tensor) -> Tensor:
        return fit_map(student_map, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _affine(source: int, target: int, is_map: bool) -> nn.Module:
    return nn.Conv2d(source, target, 1) if is_map else nn.Linear(source, target)


def _widths(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> tuple[int, int]:
    """Width of the student's and of the teacher's features; LossError unless one can be adapted to the other."""
    axes = len(teacher_shape)
    if len(student_shape) != axes or axes not in KINDS:
        raise LossError(
            f"the student gives {_named(student_shape)} and the teacher {_named(teacher_shape)}: no adapter joins the two",
            tip="name a layer and a reduction that give both alike, such as layer:pool for a map and a vector",
        )
    if axes == 2 and student_shape[0] != teacher_shape[0]:
        raise LossError(
            f"the student gives {student_shape[0]} tokens and the teacher {teacher_shape[0]}",
            tip="reduce both to one vector (layer:cls or layer:mean_tokens)",
        )
    if axes == 3:
        _check_size(student_shape[1:], teacher_shape[1:])
        return student_shape[0], teacher_shape[0]
    return student_shape[-1], teacher_shape[-1]


def _check_size(found: Sequence[int], size: Sequence[int]) -> None:
    if any(mine < theirs for mine, theirs in zip(found, size, strict=True)):
        raise LossError(
            f"the student's map is {' x '.join(map(str, found))}, smaller than the teacher's {' x '.join(map(str, size))}",
            tip="name an earlier layer of the student or a later one of the teacher; only a larger map is pooled to fit",
        )


def _named(shape: Sequence[int]) -> str:
    return f"{KINDS.get(len(shape), 'an output')} {tuple(shape)}"

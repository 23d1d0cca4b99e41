"""ReviewKD: each map of the teacher taught to the student's map and all deeper ones, fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import LossError
from softcache.losses.features import aligned

POOLED_SIZES = (4, 2, 1)


class ReviewKd(nn.Module):
    """Hierarchical context loss between the teacher's maps and the student's, fused from the deepest to the shallowest.

    Args:
        student_shapes, teacher_shapes: of one sample, early to late, as many of the one as of the other: maps (C, H, W), or
            (C,) which counts as a 1 x 1 map (the paper adds the pooled embedding as the last map).
        width: channels of the fused maps (the authors: those of the student's last map, at most 512).

    forward takes student_maps and teacher_maps, lists of (B, *shape) of any float dtype (computed in that of its parameters),
    and gives a scalar >= 0, in squared units of the maps: the sum over maps of `hierarchical_context`. The fusion is learned,
    so equal student and teacher do not give zero. It has batch norm: in training the samples of a batch are not independent,
    and one sample with a 1 x 1 map is refused by torch. Published weights 1 to 8 (5 for CIFAR-100's resnet32x4 and 8x4), warmed
    up over 20 epochs.

    Raises:
        LossError: no maps, or another number of them.
        ValueError (forward): shapes that do not fit.

    Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review" (2021), section 3.
    """

    def __init__(
        self, student_shapes: Sequence[Sequence[int]], teacher_shapes: Sequence[Sequence[int]], *, width: int = 64
    ) -> None:
        super().__init__()
        if not student_shapes or len(student_shapes) != len(teacher_shapes):
            raise LossError(
                f"reviewkd: {len(student_shapes)} maps of the student, {len(teacher_shapes)} of the teacher",
                tip="name as many layers of the one as of the other, early to late",
            )
        deepest = len(student_shapes) - 1
        self.fusions = nn.ModuleList(
            _Fusion(student[0], teacher, width, fuses=number < deepest)
            for number, (student, teacher) in enumerate(zip(student_shapes, teacher_shapes, strict=True))
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        if not len(student_maps) == len(teacher_maps) == len(self.fusions):
            raise ValueError(
                f"{len(student_maps)} maps of the student and {len(teacher_maps)} of the teacher; "
                f"both must be {len(self.fusions)}"
            )
        losses: list[Tensor] = []
        deeper = None
        dtype = next(self.parameters()).dtype
        for fusion, student, teacher in reversed(list(zip(self.fusions, student_maps, teacher_maps, strict=True))):
            matched, deeper = fusion(_as_map(student).to(dtype), deeper)
            losses.append(hierarchical_context(matched, _as_map(teacher)))
        return torch.stack(losses).sum()


class _Fusion(nn.Module):
    """A student's map joined with the deeper ones, each position weighing the two by attention."""

    def __init__(self, channels: int, teacher_shape: Sequence[int], width: int, *, fuses: bool) -> None:
        super().__init__()
        self.size = tuple(teacher_shape[1:]) or (1, 1)
        reduce = nn.Conv2d(channels, width, 1, bias=False)
        match = nn.Conv2d(width, teacher_shape[0], 3, padding=1, bias=False)
        for layer in (reduce, match):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(width))
        self.attend = nn.Conv2d(2 * width, 2, 1) if fuses else None
        self.match = nn.Sequential(match, nn.BatchNorm2d(teacher_shape[0]))

    def forward(self, student: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, *teacher_shape) to match, and (B, width, H, W) for the next shallower map."""
        fused = self.reduce(student)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])
            shares = self.attend(torch.cat([fused, deeper], dim=1)).sigmoid()  # (B, 2, H, W)
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        fused = F.interpolate(fused, self.size)
        return self.match(fused), fused


def hierarchical_context(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of two maps and of their averages over 4 x 4, 2 x 2 and 1 x 1 fields, weighted 1, 1/2, 1/4, 1/8.

    Args:
        student_map, teacher_map: (B, C, H, W) of one shape.

    Returns:
        Scalar >= 0; zero when the maps are equal. Each part is a mean over its elements; the weights are divided by their sum.
        A field as large as the map or larger is left out, and the next takes its weight.

    Raises:
        ValueError: the shapes differ, or are not (B, C, H, W).
    """
    student, teacher = aligned(student_map, teacher_map, "(B, C, H, W) of one shape", axes=(4,))
    parts = [F.mse_loss(student, teacher)]
    for size in POOLED_SIZES:
        if size < min(student.shape[2:]):
            parts.append(F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)))
    weights = [0.5**i for i in range(len(parts))]
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum() / sum(weights)


def _as_map(tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor

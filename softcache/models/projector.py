"""The bridge from a student's features to the shape of its teacher's, and the note of where one was built in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import ConfigError


class Projector(nn.Module):
    """Student features (B, *student_shape) -> (B, *output_shape), in the teacher's channels.

    A map (C, H, W) is first averaged down, per axis, to the teacher's size where it is larger, then goes through
    conv 1x1, BatchNorm, ReLU, conv 3x3, BatchNorm, ReLU, conv 1x1; a vector (D,) through linear, ReLU, linear. Between
    the outer layers there are teacher channels // factor. The end is linear, so that any teacher feature can be reached.

    Args:
        student_shape, teacher_shape: without the batch axis, both maps or both vectors.
        factor: at least 1, at most the teacher's channels.

    Raises:
        ConfigError: shapes of which nothing can be made, or a factor out of range.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (2022), section 3.2.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], factor: int = 2) -> None:
        super().__init__()
        student, teacher = tuple(student_shape), tuple(teacher_shape)
        if len(student) != len(teacher) or len(student) not in (1, 3) or min(student + teacher) < 1:
            raise ConfigError(
                f"a projector cannot go from features {student} to {teacher}",
                tip="give it two maps (C, H, W), or two vectors (D,), as `pool` and `flatten` make them",
            )
        if not 1 <= factor <= teacher[0]:
            raise ConfigError(f"a projector to {teacher[0]} channels cannot divide them by factor={factor}")
        self.student_shape, self.teacher_shape, self.factor = student, teacher, factor
        between = teacher[0] // factor
        layers: list[nn.Module]
        if len(student) == 1:
            layers = [nn.Linear(student[0], between), nn.ReLU(), nn.Linear(between, teacher[0])]
        else:
            layers = [nn.Conv2d(student[0], between, 1, bias=False), nn.BatchNorm2d(between), nn.ReLU()]
            layers += [nn.Conv2d(between, between, 3, padding=1, bias=False), nn.BatchNorm2d(between), nn.ReLU()]
            layers += [nn.Conv2d(between, teacher[0], 1)]
        self.layers = nn.Sequential(*layers)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The teacher's channels at, per axis, the smaller of the two sizes."""
        pairs = zip(self.student_shape[1:], self.teacher_shape[1:], strict=True)
        return (self.teacher_shape[0], *(min(pair) for pair in pairs))

    def forward(self, features: Tensor) -> Tensor:
        if self.output_shape[1:] != self.student_shape[1:]:
            height, width = self.output_shape[1:]
            features = F.adaptive_avg_pool2d(features, (height, width))
        return self.layers(features)

    def describe(self) -> dict[str, Any]:
        """JSON-able: `Projector(**description)` has the same layers."""
        shapes = {"student_shape": list(self.student_shape), "teacher_shape": list(self.teacher_shape)}
        return {**shapes, "factor": self.factor}


@dataclass(frozen=True)
class Graft:
    """What `graft` made of a network: enough to do it again before its weights are loaded.

    Attributes:
        layer: the module that has a projector behind it; where it is `head`, the projector is in front of it.
        head: the linear layer that is the teacher's.
        projector: what `Projector.describe` gave.
        classes, width: shape of the teacher's weight.
        bias: it has one.
    """

    layer: str
    head: str
    projector: Mapping[str, Any]
    classes: int
    width: int
    bias: bool

    @property
    def features(self) -> str:
        """The module that gives the projected features, as `taps` and `--features` name it."""
        return f"{self.layer}.projector"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

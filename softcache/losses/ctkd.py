"""Knowledge distillation at a learned temperature that makes the student's task harder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softcache.losses.logits import checked, mean_kl


class Ctkd(nn.Module):
    """`kd` at a learned temperature, one for all samples, which rises on the loss that the student descends.

    T = lowest + (highest - lowest) sigmoid(parameter). Its gradient is reversed and scaled by `reversal`; the T**2 in front
    of the KL divergence takes part in it, as in the authors' code. The parameter belongs into the student's optimiser.

    Args:
        lowest, highest: limits of T, 0 < lowest < highest. The authors' code: 1 + 20 sigmoid.
        start: first value of the parameter. The authors: 1, which is T = 15.6.

    forward takes student_logits and teacher_logits, both (B, C) of any float dtype (half types are computed in float32), and
    `reversal`, the factor of the temperature's reversed gradient, which the authors let rise from 0 to 1 over the first 10
    epochs, along a cosine. It gives a scalar >= 0, in nats: T**2-scaled KL(teacher || student) at the T of now, summed over
    classes, averaged over the batch; zero when the logits are equal. Ratio to the textbook form: 1. Published weight 0.9,
    beside 0.1 for `ce`.

    Raises:
        ValueError: the limits are not 0 < lowest < highest; in forward: the shapes differ.

    Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (CTKD, 2023), global temperature.
    """

    def __init__(self, *, lowest: float = 1.0, highest: float = 21.0, start: float = 1.0) -> None:
        super().__init__()
        if not 0 < lowest < highest:
            raise ValueError(f"a temperature needs limits 0 < lowest < highest, got {lowest} and {highest}")
        self.lowest, self.highest = lowest, highest
        self.level = nn.Parameter(torch.tensor(float(start)))

    @property
    def temperature(self) -> Tensor:
        """The T of now, a scalar."""
        return self._temperature(self.level)

    def _temperature(self, level: Tensor) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * level.sigmoid()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, *, reversal: float = 1.0) -> Tensor:
        """T**2-scaled KL(teacher || student) at the T of now, (B, C) logits -> () nats; the class says the rest."""
        student, teacher = checked(student_logits, teacher_logits)
        temperature = self._temperature(_Reversed.apply(self.level.to(student.dtype), reversal))
        return temperature**2 * mean_kl(student / temperature, teacher / temperature)


class _Reversed(torch.autograd.Function):
    """The same value; its gradient times -factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None

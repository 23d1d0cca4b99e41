"""What stands once beside the records of an output without classes: its mean and deviation, and what whitens it.

Nothing stored is changed by it: a loss may ask for it (`targets/output_scale.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.01  # added to the variances of the correlations' directions, whose mean is 1: none counts more than ten times


def measure_scale(rows: Tensor, *, whiten: bool) -> dict[str, Tensor]:
    """mean (W,) and deviation (W,) of each number over the rows (n, W); with `whiten` also whitening (W, W). Float32, on the CPU.

    Whitening is for numbers that were divided by their deviations (one that never changes is not): R**(-1/2) of their
    correlations R, with a ridge. It is the one matrix that leaves each number closest to itself, so that it does not depend on
    the signs or the order of directions. Source: ZCA-cor of Kessy, Lewin, Strimmer, "Optimal Whitening and Decorrelation" (2018).
    """
    values = rows.double()
    mean = values.mean(dim=0)
    deviation = (values - mean).square().mean(dim=0).sqrt()
    found = {"mean": mean.float().cpu(), "deviation": deviation.float().cpu()}
    if whiten:
        each = (values - mean) / torch.where(deviation > 0, deviation, 1.0)
        variances, directions = torch.linalg.eigh(each.T @ each / len(values))
        root = (variances.clamp(min=0) + RIDGE).rsqrt()
        found["whitening"] = ((directions * root) @ directions.T).float().cpu()
    return found

"""Losses between two features of the same sample: vectors, maps, and what is made of a map.

The student's features come adapted to the teacher's shape (adapters.py) and reduced as the teacher's are. Each value is the
unweighted one; the docstring names the published weight and the form that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.losses.logits import at_least_float32, kd, mse_logits

SHORTEST = 1e-12  # a vector below this length has no direction
AB_SCALE = 3 / 1000
VARIANCE_FLOOR = 1e-5


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x scaled to length 1 along `dim`; what is shorter than 1e-12 becomes zero, with a zero gradient."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    short = length < SHORTEST
    return torch.where(short, 0.0, x / torch.where(short, 1.0, length))


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, m) of the rows of (..., n, d) and (..., m, d), in their own dtype also within autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def aligned(student: Tensor, teacher: Tensor, wanted: str, axes: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Both at least float32 and in the student's dtype.

    Raises:
        ValueError: the shapes differ, or have another number of axes than those named (none named: at least 2).
    """
    if student.shape != teacher.shape or (student.ndim not in axes if axes else student.ndim < 2):
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} do not fit: "
            f"both must be {wanted}"
        )
    student = at_least_float32(student)
    return student, at_least_float32(teacher).to(student.dtype)


def hint(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference over all elements of two features: FitNet on maps, regression on vectors.

    Args:
        student_features, teacher_features: (B, ...) of one shape, any float dtype; half types are computed in float32.

    Returns:
        Scalar >= 0, in squared units of the features; zero when the two are equal. The mean over all B x n elements: 2 / n of
        the paper's half squared distance of each sample. Published weight 100, of RepDistiller's FitNet on one map, whose
        regressor ends with BatchNorm and ReLU; the linear adapter here has neither.

    Raises:
        ValueError: the shapes differ.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), equation 3.
    """
    student, teacher = aligned(student_features, teacher_features, "(B, ...) of one shape")
    return F.mse_loss(student, teacher)


def simkd(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference between the teacher's features and the student's behind a learned projector.

    The projector stays in the student, in front of the teacher's own classifier, which is frozen: no other loss is needed.

    Args:
        student_features: (B, ...) as the projector gives them, any float dtype; half types are computed in float32.
        teacher_features: (B, ...) of that shape: the map of which the classifier takes the average, or its input vector.

    Returns:
        Scalar >= 0, in squared units of the features; zero when the two are equal. The mean over all B x n elements: 1 / n of
        the paper's squared distance of each sample, and the authors' code. Published weight 1, with no cross-entropy and no
        `kd` beside it.

    Raises:
        ValueError: the shapes differ.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (SimKD, 2022), section 3.2.
    """
    return hint(student_features, teacher_features)


def cosine(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over rows of 1 - cos(student, teacher).

    Args:
        student_features, teacher_features: (B, D), or (B, L, D) of which each token is a row; any float dtype, half types
            are computed in float32.

    Returns:
        Scalar in [0, 2], without unit; zero when the two point the same way, so when they are equal. Ratio to the textbook
        form: 1. Computed as half the squared distance of the unit vectors, which keeps small angles; a zero vector thus costs
        1/2 beside another vector and nothing beside a zero vector, with a zero gradient.

    Raises:
        ValueError: the shapes differ, or are those of maps.

    Source: as in Sanh et al., "DistilBERT" (2019), section 3.
    """
    student, teacher = aligned(student_features, teacher_features, "(B, D) or (B, L, D)", axes=(2, 3))
    return (unit(student) - unit(teacher)).square().sum(dim=-1).mean() / 2


def srrl(
    student_features: Tensor,
    teacher_features: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    *,
    logits: Literal["kl", "mse"] = "kl",
) -> Tensor:
    """Mean squared difference of the vectors, plus the distance of what the teacher's classifier makes of them.

    Args:
        student_features, teacher_features: (B, D), the input of the teacher's final linear layer; any float dtype, half types
            are computed in float32.
        classifier_weight: (C, D) of that layer, frozen.
        classifier_bias: (C,).
        logits: "kl" as in the paper, KL(teacher || student) at T = 1; "mse" as in the authors' code and in SimKD's, the mean
            squared difference of the logits.

    Returns:
        Scalar >= 0; zero when the vectors are equal. The mean over B x D of the squares, in squared units of the features,
        plus the KL in nats, summed over classes and averaged over the batch, or the mean over B x C of the squares of the
        logits. Ratio to the paper's form: 1 in the gradient; its cross entropy is larger by the entropy of the teacher's
        prediction. Published weight 1, which belongs to "mse" and to an adapter that ends with BatchNorm and ReLU.

    Raises:
        ValueError: the shapes do not fit, or another word for `logits`.

    Source: Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning" (2021), section 3, for "kl".
    """
    if logits not in ("kl", "mse"):
        raise ValueError(f"logits must be 'kl' or 'mse', got {logits!r}")
    student, teacher = aligned(student_features, teacher_features, "(B, D)", axes=(2,))
    classes = len(classifier_weight)
    if classifier_weight.shape != (classes, student.shape[1]) or classifier_bias.shape != (classes,):
        raise ValueError(
            f"features {tuple(student.shape)}, classifier weight {tuple(classifier_weight.shape)} and bias "
            f"{tuple(classifier_bias.shape)} do not fit: they must be (B, D), (C, D) and (C,)"
        )
    weight, bias = classifier_weight.to(student.dtype), classifier_bias.to(student.dtype)
    student_logits, teacher_logits = (inner_products(x, weight) + bias for x in (student, teacher))  # (B, C) each
    if logits == "mse":
        return F.mse_loss(student, teacher) + mse_logits(student_logits, teacher_logits)
    return F.mse_loss(student, teacher) + kd(student_logits, teacher_logits, temperature=1.0)


def at(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of attention maps scaled to length 1 over H W; the caller sums over layers.

    Args:
        student_features, teacher_features: (B, H, W) the channels' mean of squares, not yet scaled (reduction `attention`); any
            float dtype, half types are computed in float32.

    Returns:
        Scalar >= 0, without unit; zero when the maps are proportional, so when they are equal; a map of zeros counts as no
        attention. The mean over B x H W, as the authors' code: 1 / (H W) of the squared distance of each sample, where the
        paper's equation 2 has half the distance itself. Published weight 1000.

    Raises:
        ValueError: the shapes differ, or are not (B, H, W).

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention" (2017), section 3.1.
    """
    student, teacher = aligned(student_features, teacher_features, "(B, H, W) attention maps of one size", axes=(3,))
    return F.mse_loss(unit(student.flatten(1)), unit(teacher.flatten(1)))


def nst(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared distance (Frobenius) of the spatial Grams, averaged over the batch: the MMD of the channels' maps.

    With each channel's map scaled to length 1 and the kernel k(a, b) = (a . b)**2, the squared maximum mean discrepancy
    mean k(t, t') + mean k(s, s') - 2 mean k(s, t) is this distance of the Grams sum_c f_c f_c^T / C; the widths may differ.

    Args:
        student_features, teacher_features: (B, H W, H W) (reduction `spatial_gram`); any float dtype, half types
            are computed in float32.

    Returns:
        Scalar >= 0, without unit; zero when the Grams are equal. Ratio to that form with means over the channels' pairs, as
        RepDistiller has it: 1. Published weight 50.

    Raises:
        ValueError: the shapes differ, or are not (B, P, P).

    Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (2017), section 4.2.
    """
    student, teacher = aligned(student_features, teacher_features, "(B, H W, H W) spatial Grams of one size", axes=(3,))
    return (student - teacher).square().sum(dim=(1, 2)).mean()


def fsp(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of FSP matrices over all elements; the caller sums over pairs of layers.

    Args:
        student_features, teacher_features: (B, C1, C2) (reduction `fsp`), of equal widths; any float dtype, half types
            are computed in float32.

    Returns:
        Scalar >= 0, in the fourth power of the maps' unit; zero when the matrices are equal. The mean over B x C1 x C2:
        1 / (C1 C2) of the paper's squared distance of each sample. The reduction pools the larger map by maxima, as in the
        paper; RepDistiller, whose commands have weight 50, pools by averages, which is `fsp_average`.

    Raises:
        ValueError: the shapes differ, or are not (B, C1, C2).

    Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation" (2017), equation 2.
    """
    student, teacher = aligned(
        student_features, teacher_features, "(B, C1, C2) FSP matrices of equal widths", axes=(3,)
    )
    return F.mse_loss(student, teacher)


def fsp_average(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """`fsp` with average pooling, as RepDistiller has it: of maps that follow one another, summed over such pairs.

    An FSP matrix holds the inner products of two maps' channels, over the positions, after the larger map is averaged down
    to the smaller.

    Args:
        student_maps, teacher_maps: at least two (B, C, H, W), early to late, as many of the one as of the other; of each two
            the same widths C. Any float dtype, half types are computed in float32.

    Returns:
        Scalar >= 0, in the fourth power of the maps' unit; zero when the matrices are equal. For each pair the mean over
        B x C1 x C2. RepDistiller's commands have weight 50, and its code multiplies nothing with it: it trains 30 epochs on
        this loss alone, at weight 1, and goes on with cross-entropy.

    Raises:
        ValueError: fewer than two maps, another number of them, or shapes that do not fit.

    Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation" (2017), equations 1 and 2, for maximum pooling; Tian,
        Krishnan, Isola, RepDistiller (2020), for averages.
    """
    if len(student_maps) != len(teacher_maps) or len(student_maps) < 2:
        raise ValueError(
            f"{len(student_maps)} maps of the student and {len(teacher_maps)} of the teacher; "
            "both must be two or more, as many of the one as of the other"
        )
    student, teacher = ([_average_fsp(*pair) for pair in pairwise(maps)] for maps in (student_maps, teacher_maps))
    return torch.stack([fsp(own, other) for own, other in zip(student, teacher, strict=True)]).sum()


def _average_fsp(first: Tensor, second: Tensor) -> Tensor:
    """(B, C1, C2) of two maps, the larger averaged down."""
    height, width = (min(pair) for pair in zip(first.shape[2:], second.shape[2:], strict=True))
    rows1, rows2 = (F.adaptive_avg_pool2d(at_least_float32(x), (height, width)).flatten(2) for x in (first, second))
    return inner_products(rows1, rows2) / rows1.shape[2]


def ickd(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared distance of the channels' Grams, each row scaled to length 1.

    Args:
        student_features, teacher_features: (B, C, C) (reduction `gram`) of equal widths; their scale cancels. Any float dtype;
            half types are computed in float32.

    Returns:
        Scalar in [0, 4], without unit; zero when the Grams are equal; a row of zeros stays zero. The sum over C x C divided by
        B x C, as the authors' CIFAR code: the mean over samples and channels of the squared distance of two unit rows. Published
        weight 2.5, with a 1x1 convolution and BatchNorm on the student's map.

    Raises:
        ValueError: the shapes differ, or are not (B, C, C).

    Source: Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation" (2021), section 3.
    """
    student, teacher = aligned(student_features, teacher_features, "(B, C, C) Grams of equal widths", axes=(3,))
    return (unit(student) - unit(teacher)).square().sum(dim=2).mean()


def ab(student_features: Tensor, teacher_features: Tensor, margin: float = 1.0) -> Tensor:
    """How far the student's pre-activations are from being active by `margin` where the teacher's are, inactive elsewhere.

    Args:
        student_features: (B, ...) before the activation, any float dtype; half types are computed in float32.
        teacher_features: (B, ...) of that shape: the same of the teacher, or its `sign`; > 0 means active.
        margin: > 0.

    Returns:
        Scalar >= 0, in squares of the activations' unit; zero where every unit is on the teacher's side by at least the
        margin; with equal inputs the part of them within the margin remains. The sum over units of
        max(0, margin -+ student)**2, averaged over the batch, times 3 / 1000: RepDistiller's last layer (earlier layers 1/2,
        1/4, ... of it). Ratio to the paper's sum: 0.003. Published weight 1, in 30 epochs of its own before the others.

    Raises:
        ValueError: the shapes differ, or the margin is not positive.

    Source: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries" (2019), equation 5.
    """
    if margin <= 0:
        raise ValueError(f"margin must be > 0, got {margin}")
    student, _ = aligned(student_features, teacher_features, "(B, ...) of one shape")
    missing = torch.where(teacher_features > 0, margin - student, margin + student).clamp(min=0)
    return AB_SCALE * missing.square().sum() / len(student)


class Vid(nn.Module):
    """Negative log likelihood of the teacher's features under a Gaussian around the student's, one learned variance a channel.

    Args:
        teacher_shape: (C, H, W) with a variance for each C; (D,) or (L, D) with one for each D.
        initial_variance: > 1e-5.

    forward takes student_features (adapted: the mean) and teacher_features, both (B, *teacher_shape) of any float dtype (half
    types are computed in float32), and gives a scalar, in nats for each element: the mean over all elements of [(student -
    teacher)**2 / variance + log variance] / 2. With equal inputs that is half the mean log variance, log(5) / 2 = 0.805 at the
    start; it may become negative. Ratio to the paper's sum over elements: 1 / (B n); the constant log(2 pi) / 2 is left out.
    Published weight 1, with a student's map through three 1x1 convolutions.

    Raises:
        ValueError: the shapes differ, or the variance cannot be that small.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (2019), equations 4 to 6.
    """

    def __init__(self, teacher_shape: Sequence[int], *, initial_variance: float = 5.0) -> None:
        super().__init__()
        above = initial_variance - VARIANCE_FLOOR
        if above <= 0:
            raise ValueError(f"initial_variance must be > {VARIANCE_FLOOR}, got {initial_variance}")
        self.teacher_shape = tuple(teacher_shape)
        channels = teacher_shape[0] if len(teacher_shape) == 3 else teacher_shape[-1]
        softplus_inverse = above + math.log(-math.expm1(-above))
        self.alpha = nn.Parameter(torch.full((channels,), softplus_inverse))

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        student, teacher = aligned(student_features, teacher_features, f"(B, *{self.teacher_shape})")
        if tuple(student.shape[1:]) != self.teacher_shape:
            raise ValueError(f"features {tuple(student.shape)} do not fit: they must be (B, *{self.teacher_shape})")
        variance = F.softplus(self.alpha.to(student.dtype)) + VARIANCE_FLOOR  # (C,)
        if len(self.teacher_shape) == 3:
            variance = variance[:, None, None]
        return ((student - teacher).square() / variance + variance.log()).mean() / 2

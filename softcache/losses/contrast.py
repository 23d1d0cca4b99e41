"""Contrastive representation distillation: a student's vector should find its teacher's among many others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import LossError
from softcache.losses.features import inner_products, unit
from softcache.losses.logits import at_least_float32

STUDENT, TEACHER = 0, 1


class Crd(nn.Module):
    """Noise contrastive estimation between the student's embedding and the teacher's, in both directions, over memory banks.

    Each side has a linear embedding to `width`, scaled to length 1, and a bank with the last known embedding of every sample.
    A student's embedding is scored against the teacher's bank at its own sample and at K negatives, and the other way
    round: P = exp(score / temperature) / Z. The loss of a direction is -log(P / (P + K/N)) of the sample itself minus the sum
    of log((K/N) / (P + K/N)) over the negatives.

    Negatives are a pure function of (seed, step, sample id): uniform, with repeats, among the samples of other classes, or
    among all others where the sample has no label. They do not depend on the order of the batch, on ranks or on restarts.

    Args:
        student_shape, teacher_shape: of one sample's features, flattened.
        num_samples: N, size of the transfer set.
        sample_labels: (N,) int64, -1 = no label; an unlabelled sample may be a negative of any other.
        seed: of the negatives and of the banks' first values.
        negatives: K, of each sample and step; may exceed the candidates.
        width: of the embeddings and the banks; the two banks take N x width values each.
        nce_temperature: divides the scores.
        momentum: share of its old value that a bank's entry keeps.

    forward takes student_features (B, ...), teacher_features (B, ...), both of any float dtype (computed in that of its
    parameters), samples (B,) int64 positions in the transfer set, sample_ids (B,) int64 and step, and gives a scalar >= 0 in
    nats: the sum of both directions, averaged over the batch, as the authors' code. Ratio to the paper's equation 18: 1, but for
    the 1e-7 that the code adds to both denominators, about N * 1e-7 for a direction. With equal student and teacher it is not
    zero: both see other embeddings, and the negatives cost something. Published weight 0.8.

    Z is N times the mean of exp(score / temperature) over the first batch in training, kept from then on. In training the
    banks move after the loss is taken, towards the mean embedding of all rows of a sample in the batch; in evaluation
    nothing changes. Embeddings, banks and Z are in the state dict. Each step copies the banks, and takes 2 x B x N values
    for the scores.

    Raises:
        LossError: a setting out of range, labels of another number of samples, or samples of one class only.
        ValueError (forward): shapes that do not fit.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020), section 3 and equation 18.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_normalisers: Tensor
    by_class: Tensor
    own_start: Tensor
    own_count: Tensor

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        num_samples: int,
        sample_labels: Tensor,
        seed: int,
        *,
        negatives: int = 16384,
        width: int = 128,
        nce_temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        if sample_labels.shape != (num_samples,):
            raise LossError(
                f"crd: {num_samples} samples, and labels of shape {tuple(sample_labels.shape)}; one label for each is needed"
            )
        if negatives < 1 or width < 1 or nce_temperature <= 0 or not 0 <= momentum < 1:
            raise LossError(
                f"crd: negatives={negatives}, width={width}, nce_temperature={nce_temperature}, momentum={momentum}: "
                "needed are negatives and width >= 1, a temperature > 0 and a momentum in [0, 1)"
            )
        self.num_samples, self.seed, self.negatives = num_samples, seed, negatives
        self.nce_temperature, self.momentum = nce_temperature, momentum
        self.embed_student = nn.Linear(prod(student_shape), width)
        self.embed_teacher = nn.Linear(prod(teacher_shape), width)
        draw = torch.Generator().manual_seed(seed)
        limit = math.sqrt(3 / width)  # a row's mean square length is 1
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, (2 * torch.rand(num_samples, width, generator=draw) - 1) * limit)
        self.register_buffer("log_normalisers", torch.full((2,), math.inf))  # inf: not known yet
        by_class, own_start, own_count = _own_ranges(sample_labels)
        if int(own_count.max()) == num_samples:
            raise LossError(
                "crd: every sample is of one class, so that no sample has a negative",
                tip="train on more classes, or use another loss between vectors, such as rkd_distance",
            )
        # a function of the labels, so not in the state dict
        self.register_buffer("by_class", by_class, persistent=False)
        self.register_buffer("own_start", own_start, persistent=False)
        self.register_buffer("own_count", own_count, persistent=False)

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, samples: Tensor, sample_ids: Tensor, step: int
    ) -> Tensor:
        batch = len(student_features)
        if len(teacher_features) != batch or samples.shape != (batch,) or sample_ids.shape != (batch,):
            raise ValueError(
                f"student features {tuple(student_features.shape)}, teacher features {tuple(teacher_features.shape)}, samples "
                f"{tuple(samples.shape)} and sample ids {tuple(sample_ids.shape)} do not fit: they must be (B, ...), (B, ...), "
                "(B,) and (B,)"
            )
        student = _embedded(self.embed_student, student_features)  # (B, width)
        teacher = _embedded(self.embed_teacher, teacher_features)
        scored = torch.cat([samples[:, None], self.draw(samples, sample_ids, step)], dim=1)  # (B, 1 + K), its own first
        # all N scores and then the wanted ones: K rows of a bank for each sample would take K * width / N times the memory
        scores = torch.stack(
            [
                inner_products(student, self.teacher_bank).gather(1, scored),
                inner_products(teacher, self.student_bank).gather(1, scored),
            ]
        )
        scores = scores / self.nce_temperature  # (2, B, 1 + K)
        log_z = self._log_normalisers_of(scores.detach())
        odds = scores - log_z[:, None, None] - math.log(self.negatives / self.num_samples)  # log of P / (K/N)
        loss = -(F.logsigmoid(odds[..., 0]).sum() + F.logsigmoid(-odds[..., 1:]).sum()) / batch
        if self.training:
            self.log_normalisers = log_z
            self._remember(samples, student.detach(), teacher.detach())
        return loss

    def draw(self, samples: Tensor, sample_ids: Tensor, step: int) -> Tensor:
        """(B, K) positions of the negatives of each sample at this step, on the device of the ids."""
        start = torch.full_like(sample_ids, _signed(self.seed))
        keys = _mix(_mix(_mix(start) ^ step) ^ sample_ids)  # (B,)
        counter = torch.arange(1, self.negatives + 1, device=keys.device) * _signed(GOLDEN)
        words = _shifted(_mix(keys[:, None] + counter), 32)  # (B, K) of 32 bits each
        start, count = self.own_start[samples, None], self.own_count[samples, None]
        rank = words * (self.num_samples - count) >> 32  # uniform over the others, in the order of by_class
        return self.by_class[rank + torch.where(rank < start, 0, count)]

    def _log_normalisers_of(self, scores: Tensor) -> Tensor:
        """(2,) log Z of both directions: as kept, else estimated from these scores."""
        mean = scores.flatten(1).logsumexp(dim=1) - math.log(scores[0].numel())
        estimate = (mean + math.log(self.num_samples)).to(self.log_normalisers.dtype)
        return torch.where(self.log_normalisers.isinf(), estimate, self.log_normalisers)

    @torch.no_grad()
    def _remember(self, samples: Tensor, student: Tensor, teacher: Tensor) -> None:
        same = samples[:, None] == samples  # (B, B)
        first = same.int().argmax(dim=1)  # of a sample's rows: all write one value, so their order does not matter
        share = same.to(student.dtype) / same.sum(dim=1, keepdim=True)
        for name, embedded in (("student_bank", student), ("teacher_bank", teacher)):
            bank = getattr(self, name)
            moved = self.momentum * bank[samples] + (1 - self.momentum) * inner_products(share, embedded.mT)
            # a new tensor: the old one is needed for the gradient
            setattr(self, name, bank.index_copy(0, samples, unit(moved)[first].to(bank.dtype)))


def _embedded(layer: nn.Linear, features: Tensor) -> Tensor:
    rows = at_least_float32(features).flatten(1).to(layer.weight.dtype)
    return unit(inner_products(rows, layer.weight) + layer.bias)


def _own_ranges(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions sorted by class; where in it each sample's own class starts, and its size (unlabelled: itself alone)."""
    by_class = torch.argsort(labels, stable=True)
    place = torch.empty_like(by_class)
    place[by_class] = torch.arange(len(labels), device=labels.device)
    ordered = labels[by_class]
    start, end = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    labelled = labels >= 0
    return by_class, torch.where(labelled, start, place), torch.where(labelled, end - start, 1)


# ------------------------------------------------------------------- counter-based numbers: splitmix64 in int64, which wraps

GOLDEN = 0x9E3779B97F4A7C15


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _mix(words: Tensor) -> Tensor:
    """The finaliser of splitmix64: int64 -> int64, one to one, every bit depending on every other."""
    words = (words ^ _shifted(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shifted(words, 31)

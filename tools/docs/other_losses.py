"""What other frameworks compute under the names of softcache's losses: written from their definitions, for comparison.

Plain functions of float64 tensors, student first, each for one pair of layers and in that framework's own reduction. None of
it is their code, and none of it uses softcache. `loss_factors.py` says whose each is and measures them against softcache.

Shapes: logits (B, C), labels (B,), vectors (B, D), maps (B, C, H, W).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- logits and labels


def softmax(logits: Tensor, t: float = 1.0) -> Tensor:
    powers = (logits / t - (logits / t).amax(dim=1, keepdim=True)).exp()
    return powers / powers.sum(dim=1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of the sum over classes."""
    return (p * (p.log() - q.log())).sum(dim=1).mean()


def softened_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return t**2 * kl(softmax(teacher, t), softmax(student, t))


def bare_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return kl(softmax(teacher, t), softmax(student, t))


def elementwise_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """The mean over rows and classes alike: what `KLDivLoss()` gives that is told no reduction."""
    p, q = softmax(teacher, t), softmax(student, t)
    return t**2 * (p * (p.log() - q.log())).mean()


def squared_probabilities(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return t**2 * (softmax(student, t) - softmax(teacher, t)).square().mean()


def squared_log_probabilities(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return t**2 * (softmax(student, t).log() - softmax(teacher, t).log()).square().mean()


def squared_mixture(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Logarithms of the student's probabilities against the teacher's probabilities themselves."""
    return t**2 * (softmax(student, t).log() - softmax(teacher, t)).square().mean()


def bare_cross_entropy(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return -(softmax(teacher, t) * softmax(student, t).log()).sum(dim=1).mean()


def bare_reverse_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return kl(softmax(student, t), softmax(teacher, t))


def bare_jsd(student: Tensor, teacher: Tensor, t: float, beta: float = 0.5) -> Tensor:
    q, p = softmax(student, t), softmax(teacher, t)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def skewed_cross_entropy(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """The skewed KL without the teacher's entropy."""
    q, p = softmax(student), softmax(teacher)
    return -(p * (share * p + (1 - share) * q).log()).sum(dim=1).mean()


def skewed_reverse_kl(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    q, p = softmax(student), softmax(teacher)
    return kl(q, (1 - share) * p + share * q)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return (softmax(student) - softmax(teacher)).abs().sum(dim=1).mean() / 2


def standardized_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    q, p = ((z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-7) for z in (student, teacher))
    return softened_kl(q, p, t)


def squared_logits(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def softened_squared_logits(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return (student / t - teacher / t).square().mean()


def first_class(student: Tensor, teacher: Tensor) -> Tensor:
    return label_cross_entropies(student, teacher.argmax(dim=1)).mean()


def label_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,)"""
    return -softmax(logits).log()[torch.arange(len(labels)), labels]


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """(n,) Pearson's, of the rows of two (n, m)."""
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def dist(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    q, p = softmax(student, t), softmax(teacher, t)
    return t**2 * (2 - correlations(q, p).mean() - correlations(q.T, p.T).mean())


def batch_gram(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    q, p = softmax(student, t), softmax(teacher, t)
    return (p @ p.T - q @ q.T).square().sum() / len(p)


def class_gram(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    q, p = softmax(student, t), softmax(teacher, t)
    return (p.T @ p - q.T @ q).square().sum() / p.shape[1]


def masked_batch_gram(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """The finished scalar times the share of rows whose confidence is not above the median."""
    confidence = softmax(teacher).amax(dim=1)
    return ((confidence <= confidence.quantile(0.5)) * batch_gram(student, teacher, t)).mean()


def masked_class_gram(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    confidence = softmax(teacher).sum(dim=0)
    return ((confidence <= confidence.quantile(0.5)) * class_gram(student, teacher, t)).mean()


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, t: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    own = torch.zeros_like(student).scatter(1, labels[:, None], 1.0)
    pairs, rests = [], []
    for logits in (student, teacher):
        of_label = (softmax(logits, t) * own).sum(dim=1, keepdim=True)
        pairs.append(torch.cat([of_label, 1 - of_label], dim=1))
        rests.append(softmax(logits / t - 1000 * own))
    (q2, p2), (q, p) = pairs, rests
    within = torch.where(own > 0, 0.0, p * ((p + own).log() - (q + own).log())).sum(dim=1).mean()
    return t**2 * (alpha * kl(p2, q2) + beta * within)


def summed_decoupled(student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> Tensor:
    return len(labels) * decoupled(student, teacher, labels, t)


def weighted_soft_labels(student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> Tensor:
    ratio = label_cross_entropies(student, labels) / (label_cross_entropies(teacher, labels) + 1e-7)
    soft = -(softmax(teacher, t) * softmax(student, t).log()).sum(dim=1)
    return t**2 * ((1 - (-ratio.detach()).exp()) * soft).mean()


def shifted(rows: Tensor, labels: Tensor) -> Tensor:
    """Of each row the largest number and the label's change places."""
    changed = rows.clone()
    for row, label in enumerate(labels.tolist()):
        first = int(rows[row].argmax())
        changed[row, first], changed[row, label] = rows[row, label], rows[row, first]
    return changed


def bare_shifted_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> Tensor:
    return bare_cross_entropy(student, shifted(teacher, labels), t)


def probability_shift(student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> Tensor:
    """`KLDivLoss` of two lists of probabilities, none of them a logarithm, with the student's as the target."""
    p, q = shifted(softmax(teacher, t), labels), softmax(student, t)
    return t**2 * (q * (q.log() - p)).sum() / len(q)


def teacher_free(student: Tensor, labels: Tensor, t: float, correct: float) -> Tensor:
    """The virtual probabilities are softened as if they were logits, the student is not softened at all."""
    classes = student.shape[1]
    virtual = torch.full_like(student, (1 - correct) / (classes - 1)).scatter(1, labels[:, None], correct)
    p = softmax(virtual, t)
    return (p * (p.log() - softmax(student).log())).mean()


def summed_over_members(student: Tensor, members: list[Tensor], t: float) -> Tensor:
    return torch.stack([softened_kl(student, one, t) for one in members]).sum()


# -------------------------------------------------------------------------------------------------------------- vectors


def unit_rows(x: Tensor, eps: float = 0.0) -> Tensor:
    return x / (x.square().sum(dim=-1, keepdim=True).sqrt() + eps)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def one_minus_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (unit_rows(student) * unit_rows(teacher)).sum(dim=-1)).mean()


def huber(a: Tensor, b: Tensor) -> Tensor:
    gap = (a - b).abs()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def relative_distances(x: Tensor) -> Tensor:
    gaps = (x[:, None] - x).square().sum(dim=2)
    gaps = torch.where(gaps > 0, gaps.clamp(min=1e-12).sqrt(), 0.0)
    return gaps / gaps[gaps > 0].mean()


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    return huber(relative_distances(student), relative_distances(teacher))


def cosines_of_angles(x: Tensor) -> Tensor:
    towards = x[None, :] - x[:, None]
    towards = towards / towards.norm(dim=2, keepdim=True).clamp(min=1e-12)
    return towards @ towards.transpose(1, 2)


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    return huber(cosines_of_angles(student), cosines_of_angles(teacher))


def distances_of_unit_vectors(student: Tensor, teacher: Tensor) -> Tensor:
    return distances(unit_rows(student), unit_rows(teacher))


def angles_of_unit_vectors(student: Tensor, teacher: Tensor) -> Tensor:
    return angles(unit_rows(student), unit_rows(teacher))


def neighbours(x: Tensor, eps: float) -> Tensor:
    similar = (unit_rows(x, eps) @ unit_rows(x, eps).T + 1) / 2
    return similar / similar.sum(dim=1, keepdim=True)


def transfer(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    q, p = neighbours(student, eps), neighbours(teacher, eps)
    return (p * ((p + eps) / (q + eps)).log()).mean()


def transfer_by_rows(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = neighbours(student, 1e-7), neighbours(teacher, 1e-7)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).sum(dim=1).mean()


def taylor(x: Tensor, gamma: float = 0.4) -> Tensor:
    products = x @ x.T
    return math.exp(-2 * gamma) * (1 + 2 * gamma * products + (2 * gamma * products) ** 2 / 2)


def congruence(student: Tensor, teacher: Tensor) -> Tensor:
    return (taylor(unit_rows(student)) - taylor(unit_rows(teacher))).square().mean()


def raw_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    return (taylor(student) - taylor(teacher)).square().sum().sqrt() / len(student) ** 2


def products_of_neighbours(student: Tensor, teacher: Tensor) -> Tensor:
    apart = (student - teacher).abs()
    return (apart[:-1] * apart[1:]).sum(dim=1).mean()


def contrast(scores: Tensor, samples: int, eps: float = 1e-7) -> Tensor:
    """Of (2, B, 1 + K) products of unit vectors over the temperature, a sample's own first; the first batch's Z."""
    negatives = scores.shape[2] - 1
    z = samples * scores.exp().mean(dim=(1, 2), keepdim=True).detach()
    found, noise = scores.exp() / z, negatives / samples
    own = (found[..., 0] / (found[..., 0] + noise + eps)).log()
    others = (noise / (found[..., 1:] + noise + eps)).log()
    return -(own.sum() + others.sum()) / scores.shape[1]


def vectors_and_logits(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return squared(student, teacher) + squared(student @ weight.T + bias, teacher @ weight.T + bias)


# ----------------------------------------------------------------------------------------------------------------- maps


def attention(x: Tensor) -> Tensor:
    return x.square().mean(dim=1).flatten(1)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    return (unit_rows(attention(student)) - unit_rows(attention(teacher))).square().mean()


def summed_attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    summed = (x.square().sum(dim=1).flatten(1) for x in (student, teacher))
    own, other = (unit_rows(x, eps=1e-6) for x in summed)
    return (own - other).square().mean()


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return (unit_rows(attention(student)) - unit_rows(attention(teacher))).norm(dim=1).mean()


def squared_activations(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (unit_rows(x.square().flatten(1)) for x in (student, teacher))
    return (own - other).square().mean()


def batch_similarity(x: Tensor) -> Tensor:
    return x.flatten(1) @ x.flatten(1).T


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    return (unit_rows(batch_similarity(student)) - unit_rows(batch_similarity(teacher))).square().sum() / len(
        student
    ) ** 2


def similarity_by_l1(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (x / x.abs().sum(dim=1, keepdim=True) for x in map(batch_similarity, (student, teacher)))
    return (own - other).square().sum() / len(student) ** 2


def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all pairs of channels of (a . b)**2."""
    return (unit_rows(a.flatten(2)) @ unit_rows(b.flatten(2)).transpose(1, 2)).square().mean()


def selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    return mean_kernel(teacher, teacher) + mean_kernel(student, student) - 2 * mean_kernel(student, teacher)


def likelihood(student: Tensor, teacher: Tensor, variance: float = 5.0) -> Tensor:
    """At the first variance, the same for every channel."""
    return ((student - teacher).square() / variance + math.log(variance)).mean() / 2


def boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """(B, C, H, W)"""
    active = (student - margin).square() * ((student <= margin) & (teacher > 0))
    return active + (student + margin).square() * ((student > -margin) & (teacher <= 0))


def boundaries(student: Tensor, teacher: Tensor) -> Tensor:
    return 3 / 1000 * boundary(student, teacher).sum() / len(student)


def summed_boundaries(student: Tensor, teacher: Tensor) -> Tensor:
    return boundary(student, teacher).sum() / len(student)


def mean_boundaries(student: Tensor, teacher: Tensor) -> Tensor:
    return boundary(student, teacher).mean()


def halved(x: Tensor) -> Tensor:
    """(B, C, H / 2, W / 2, 4) the four positions that become one."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)


def flow(early: Tensor, late: Tensor) -> Tensor:
    """(B, C1, C2) of two maps of one size."""
    return early.flatten(2) @ late.flatten(2).transpose(1, 2) / late[0, 0].numel()


def average_flow(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    own, other = (flow(halved(early).mean(dim=4), late) for early, late in (student, teacher))
    return (own - other).square().mean()


def columns_of_flow(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    own, other = (flow(halved(early).amax(dim=4), late) for early, late in (student, teacher))
    return (own - other).norm(dim=1).sum() / len(own)


def channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (unit_rows(x.flatten(2) @ x.flatten(2).transpose(1, 2)) for x in (student, teacher))
    return (own - other).square().sum() / own[..., 0].numel()


def channel_correlation_over_batch_twice(student: Tensor, teacher: Tensor) -> Tensor:
    return channel_correlation(student, teacher) / len(student)


def hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    """Of maps of 8 x 8: as they are, and averaged to 4 x 4, 2 x 2 and 1 x 1."""
    total, weight = squared(student, teacher), 1.0
    for depth in (1, 2, 3):
        student, teacher = halved(student).mean(dim=4), halved(teacher).mean(dim=4)
        total, weight = total + 0.5**depth * squared(student, teacher), weight + 0.5**depth
    return total / weight

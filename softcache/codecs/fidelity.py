"""How close stored logits are to the given ones: the bound of each record, and the KL divergence at a temperature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.codecs.codec import Codec

GRID = (1.0, 2.0, 4.0, 10.0, 20.0)  # temperatures at which fidelity is reported
KEPT_AT = (1.0, 2.0, 4.0, 8.0)  # at which it is told how much of the probability is kept


def round_up_to_half(values: Tensor) -> Tensor:
    """(B,) non-negative float32 -> the smallest float16 that is not below it, so that a stored bound stays a bound."""
    half = values.half()
    bits = half.view(torch.int16)
    return torch.where(half.float() < values, bits + 1, bits).view(torch.float16)


def eps_of(codec: Codec, given: Tensor, arrays: Mapping[str, Tensor], decoded: Tensor) -> Tensor:
    """(B,) float32 bound on |stored - given| over the logits of each record, on any device that decodes it.

    Args:
        given: (B, C) float32 that went into `codec.encode`.
        arrays: what came out.
        decoded: (B, C), `codec.decode(arrays)`.
    """
    bound = (decoded - given).abs().amax(dim=1)
    # the difference was rounded too: the next number is not below the true one
    bound = torch.where(bound > 0, bound.nextafter(torch.full_like(bound, torch.inf)), bound)
    rounding = codec.rounding(arrays)
    return bound if rounding is None else bound + rounding


def relative_errors(given: Tensor, decoded: Tensor) -> Tensor:
    """(B,) float64 |decoded - given| / |given| of each row, in L2 norm; 0 where both are zero."""
    values = given.double()
    distance = (decoded.double() - values).norm(dim=1)
    return torch.where(distance == 0, 0.0, distance / values.norm(dim=1))


def explained(given: Tensor, decoded: Tensor) -> float:
    """1 - |decoded - given|**2 / |given - mean|**2, summed over the rows (B, W): the share of their variance that is kept."""
    values = given.double()
    whole = float((values - values.mean(dim=0)).square().sum())
    left = float((decoded.double() - values).square().sum())
    return 1 - left / whole if whole else float(left == 0)


def kl_rows(given: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """(B,) KL(softmax(given / T) || softmax(decoded / T)) in nats, float64 inside; never negative.

    Args:
        given, decoded: (B, C) logits.
        temperature: > 0.
    """
    log_p = (given.double() / temperature).log_softmax(dim=1)
    log_q = (decoded.double() / temperature).log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    # q - p sums to zero and takes the rounding of the difference of logarithms with it
    return (p * (log_p - log_q) + (q - p)).sum(dim=1).clamp(min=0)


def binary_kl_rows(logits: Tensor, decoded: Tensor, temperature: float) -> Tensor:
    """(B,) float64 binary KL(given || stored) at a temperature, in nats, mean over the C labels of a record."""
    given, stored = (x.double() / temperature for x in (logits, decoded))
    rows = torch.zeros_like(given)
    for sign in (1, -1):  # of yes, of no
        log_p, log_q = F.logsigmoid(sign * given), F.logsigmoid(sign * stored)
        rows += log_p.exp() * (log_p - log_q)
    return rows.mean(dim=1)


def kl_at(
    codec: Codec, logits: Tensor, coded: Mapping[str, Tensor], decoded: Tensor | None, temperature: float
) -> Tensor:
    """(B,) float64 KL(given || stored) at a temperature, in nats; `decoded` is None where the codec is not complete."""
    if decoded is not None:
        return kl_rows(logits, decoded, temperature)
    return kl_rows(logits / temperature, codec.spread(coded, temperature), 1.0)


def kept_at(codec: Codec) -> tuple[float, ...]:
    """The temperatures at which it is told how much a codec keeps of the probability: none where it keeps all."""
    return () if codec.complete else tuple(t for t in KEPT_AT if codec.serves(t))


def kept_sums(codec: Codec, arrays: Mapping[str, Tensor]) -> Tensor:
    """(n,) float64: at each of `kept_at`, the sum over records of the probability of the classes kept, as it is stored."""
    _, head = codec.head(arrays)
    sums = [head.new_zeros(0, dtype=torch.float64)]
    for t in kept_at(codec):
        inside = (head.double() / t).logsumexp(dim=1)
        sums.append((inside - torch.logaddexp(inside, codec.tail_logsumexp(arrays, t).double())).exp().sum()[None])
    return torch.cat(sums)


def grid_of(codec: Codec) -> tuple[float, ...]:
    """The temperatures at which a codec's fidelity is measured: those of the grid that it serves."""
    return tuple(t for t in GRID if codec.serves(t))

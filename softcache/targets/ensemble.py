"""How ensemble members combine, at training time. Different rules are different teachers; a run records which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import ConfigError, LossError, nearest

COMBINE_RULES = ("mean_logits", "mean_probs_at_t", "mean_probs", "vote", "draw")

KEEPS_LEVEL = ("mean_logits", "draw")  # the others give log-probabilities, whose level means nothing
CERTAIN = 1e9  # a vote is a one-hot target: logits far enough apart for any temperature
SLACK = 1e-6  # of a share of votes, so that equal votes summed in another order still tie


def check_rule(rule: str) -> None:
    """LossError with near names for an unknown combination rule."""
    if rule not in COMBINE_RULES:
        raise LossError(f"unknown combination rule {rule!r}", tip=nearest(rule, COMBINE_RULES))


def parse_members(texts: Sequence[str]) -> dict[str, float] | None:
    """`a=0.7`, `b` -> {member: weight}, 1 where none is given; None for all members equally.

    Raises:
        ConfigError: a weight that is no finite number >= 0, no weight above 0, or a member that is named twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            weight = float(value) if equals else 1.0
        except ValueError:
            raise ConfigError(f"--members {text!r}: {value!r} is not a number") from None
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"--members {text!r}: a weight must be a number that is not negative")
        if name in weights:
            raise ConfigError(f"--members names member {name!r} twice", tip="give it once, with one weight")
        weights[name] = weight
    if weights and not sum(weights.values()):
        raise ConfigError("--members: all weights are zero")
    return weights or None


def combine(
    member_logits: Sequence[Tensor],
    rule: str,
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    link: str = "softmax",
    draws: Tensor | None = None,
) -> Tensor:
    """One teacher's logits out of several members': softmax(result / T) (or sigmoid) is the ensemble's soft target at T.

    Args:
        member_logits: M tensors (B, C), float32 or float64.
        rule: "mean_logits": weighted mean of logits. "mean_probs_at_t": weighted mean of the probabilities at T.
            "mean_probs": weighted mean of the probabilities at 1, tempered afterwards. "vote": one-hot of the class with
            most (weighted) votes, ties to the smaller class; with link "sigmoid" a majority per class, ties to no.
            "draw": one member per row, given by `draws`.
        weights: M non-negative numbers; any sum but zero (they are normalised). None = equal.
        temperature: of the loss that asks; only "mean_probs_at_t" depends on it.
        link: "softmax", or "sigmoid" for multi-label targets.
        draws: (B,) numbers in [0, 1), for "draw": the member whose weight interval holds the number.

    Returns:
        (B, C). Only "mean_logits" and "draw" keep the members' level.

    Raises:
        LossError: an unknown rule, or weights that are not M finite numbers >= 0 with a sum > 0.
    """
    check_rule(rule)
    if not temperature > 0:
        raise LossError(f"temperature must be > 0, got {temperature}")
    logits = torch.stack(list(member_logits))  # (M, B, C)
    exact = torch.tensor([1.0] * len(logits) if weights is None else list(weights), dtype=torch.float64, device="cpu")
    if len(exact) != len(logits) or not bool((exact.isfinite() & (exact >= 0)).all()) or not exact.sum() > 0:
        raise LossError(
            f"{len(logits)} members cannot be weighted by {exact.tolist()}",
            tip="give each member a number >= 0, and at least one of them more than 0",
        )
    share = (exact / exact.sum()).to(logits)  # (M,)
    if rule == "mean_logits":
        return _weighted(logits, share)
    if rule == "draw":
        assert draws is not None, "the rule 'draw' needs draws"
        ends = exact.cumsum(0)
        borders = (ends / ends[-1])[:-1].to(logits.device)  # float64: exactly 1 where only zero weights follow
        member = torch.bucketize(draws.double().to(borders.device), borders, right=True)  # (B,)
        return logits[member, torch.arange(logits.shape[1], device=logits.device)]
    if rule == "vote":
        return _vote(logits, share, link)
    t = temperature if rule == "mean_probs_at_t" else 1.0
    log_share = share.log()[:, None, None]
    if link == "sigmoid":
        log_yes = torch.logsumexp(log_share + F.logsigmoid(logits / t), dim=0)
        log_no = torch.logsumexp(log_share + F.logsigmoid(-logits / t), dim=0)
        return t * (log_yes - log_no)
    return t * torch.logsumexp(log_share + F.log_softmax(logits / t, dim=-1), dim=0)


def _weighted(values: Tensor, share: Tensor) -> Tensor:
    """(B, C) of (M, B, C): no matrix product, which autocast would make in a half type, and a GPU in TF32."""
    return (share[:, None, None] * values).sum(dim=0)


def _vote(logits: Tensor, share: Tensor, link: str) -> Tensor:
    if link == "sigmoid":
        yes = _weighted((logits > 0).to(logits), share)
        return torch.where(yes > 0.5 + SLACK, CERTAIN, -CERTAIN).to(logits)
    votes = _weighted(F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits), share)
    # argmax takes the first of equals
    winner = (votes >= votes.amax(dim=-1, keepdim=True) - SLACK).to(torch.uint8).argmax(dim=-1)  # (B,)
    return torch.where(F.one_hot(winner, logits.shape[-1]).bool(), 0.0, -CERTAIN).to(logits)

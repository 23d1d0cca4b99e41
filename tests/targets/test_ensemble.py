"""Every combination rule against a float64 oracle that works on probabilities, not on logarithms of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softcache.errors import ConfigError, LossError
from softcache.targets.ensemble import COMBINE_RULES, KEEPS_LEVEL, check_rule, combine, parse_members

MEMBERS, BATCH, CLASSES = 4, 64, 7
WEIGHTS = [None, (1.0, 1.0, 1.0, 1.0), (0.7, 0.1, 0.1, 0.1), (5.0, 0.0, 3.0, 2.0), (0.0, 0.0, 1.0, 0.0)]
weighted = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
linked = pytest.mark.parametrize("link", ["softmax", "sigmoid"])
tempered = pytest.mark.parametrize("t", [0.5, 1.0, 4.0, 20.0])


def member_logits(*, seed: int = 0, scale: float = 4.0, members: int = MEMBERS) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(rng.normal(0, 3), scale, (BATCH, CLASSES))) for _ in range(members)]


def share_of(weights: Sequence[float] | None, members: int = MEMBERS) -> np.ndarray:
    raw = np.ones(members) if weights is None else np.array(weights)
    return raw / raw.sum()


def probabilities(logits: np.ndarray, t: float, link: str) -> np.ndarray:
    if link == "sigmoid":
        return 1.0 / (1.0 + np.exp(-logits / t))
    scores = np.exp((logits - logits.max(axis=-1, keepdims=True)) / t)
    return scores / scores.sum(axis=-1, keepdims=True)


def stacked(logits: Sequence[Tensor]) -> np.ndarray:
    return np.stack([one.numpy() for one in logits])  # (M, B, C)


@weighted
def test_mean_logits(weights: tuple[float, ...] | None) -> None:
    logits = member_logits()
    wanted = (share_of(weights)[:, None, None] * stacked(logits)).sum(axis=0)
    np.testing.assert_allclose(combine(logits, "mean_logits", weights=weights), wanted, rtol=1e-12, atol=1e-13)


@linked
@tempered
@weighted
def test_mean_probs_at_t_is_the_mean_of_the_soft_targets_at_t(
    weights: tuple[float, ...] | None, t: float, link: str
) -> None:
    logits = member_logits()
    made = combine(logits, "mean_probs_at_t", weights=weights, temperature=t, link=link)
    mean = (share_of(weights)[:, None, None] * probabilities(stacked(logits), t, link)).sum(axis=0)
    np.testing.assert_allclose(probabilities(made.numpy(), t, link), mean, rtol=1e-9, atol=1e-14)


@linked
@tempered
@weighted
def test_mean_probs_is_the_mean_at_one_tempered_afterwards(
    weights: tuple[float, ...] | None, t: float, link: str
) -> None:
    logits = member_logits()
    made = combine(logits, "mean_probs", weights=weights, temperature=t, link=link)
    mean = (share_of(weights)[:, None, None] * probabilities(stacked(logits), 1.0, link)).sum(axis=0)
    if link == "sigmoid":
        wanted = mean ** (1 / t) / (mean ** (1 / t) + (1 - mean) ** (1 / t))
    else:
        wanted = mean ** (1 / t) / (mean ** (1 / t)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(probabilities(made.numpy(), t, link), wanted, rtol=1e-7, atol=1e-13)


def test_the_rules_are_different_teachers() -> None:
    logits = member_logits()
    targets = {rule: _target(logits, rule) for rule in COMBINE_RULES}
    for rule in COMBINE_RULES:
        for other in COMBINE_RULES:
            apart = np.abs(targets[rule] - targets[other]).max()
            assert (apart == 0) if rule == other else (apart > 0.01), (rule, other)


def _target(logits: Sequence[Tensor], rule: str) -> np.ndarray:
    draws = torch.linspace(0, 0.999, BATCH, dtype=torch.float64)
    return probabilities(combine(logits, rule, temperature=4.0, draws=draws).numpy(), 4.0, "softmax")


# ------------------------------------------------------------------------------------------------------------------- vote


def votes_for(winners: Sequence[int], classes: int = 4) -> list[Tensor]:
    """One row per member whose largest logit is the class it votes for; the runner-up is not."""
    return [torch.tensor([[1.0 + (c == winner) + 0.001 * c for c in range(classes)]]) for winner in winners]


@pytest.mark.parametrize(
    ("winners", "weights", "wanted"),
    [
        ((2, 2, 1), None, 2),
        ((3, 1, 1, 3), None, 1),
        ((3, 2, 1, 0), None, 0),
        ((3, 0), (1.0, 0.5), 3),
        ((3, 0, 0), (1.0, 0.5, 0.5), 0),
        ((0, 0, 3), (0.2, 0.2, 0.5), 3),
        ((1, 2, 2), (3.0, 0.0, 0.0), 1),
        # 0.1 + 0.2 against 0.3: equal, however the sums round
        ((1, 1, 3), (0.1, 0.2, 0.3), 1),
        ((3, 3, 1), (0.1, 0.2, 0.3), 1),
        ((2,), None, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vote_gives_one_class_and_ties_go_to_the_smaller(
    winners: tuple[int, ...], weights: tuple[float, ...] | None, wanted: int, dtype: torch.dtype
) -> None:
    made = combine([one.to(dtype) for one in votes_for(winners)], "vote", weights=weights)
    one_hot = [float(c == wanted) for c in range(4)]
    for t in (1.0, 20.0, 1e4):  # certain at any temperature
        assert (made / t).softmax(dim=1)[0].tolist() == one_hot
    assert made.dtype == dtype and bool(made.isfinite().all())


@weighted
def test_vote_counts_like_a_ballot(weights: tuple[float, ...] | None) -> None:
    logits = member_logits(seed=3)
    share = share_of(weights)
    made = combine(logits, "vote", weights=weights).argmax(dim=1)
    contested = 0
    for row in range(BATCH):
        ballot = np.zeros(CLASSES)
        for member, one in enumerate(logits):
            ballot[int(np.argmax(one[row].numpy()))] += share[member]
        best = ballot.max()
        assert made[row] == np.flatnonzero(np.isclose(ballot, best, rtol=0, atol=1e-9))[0]
        contested += int(np.isclose(ballot, best, rtol=0, atol=1e-9).sum() > 1)
    assert contested or weights not in WEIGHTS[:2]  # equal weights: the tie rule was needed


def test_a_member_that_ties_with_itself_votes_for_the_smaller_class() -> None:
    tied = torch.tensor([[0.0, 5.0, 5.0]])
    assert combine([tied, tied], "vote").argmax().item() == 1


@pytest.mark.parametrize("members", range(2, 41, 2))
def test_a_sigmoid_vote_needs_more_than_half(members: int) -> None:
    yes, no = torch.tensor([[2.0, 2.0, -2.0]]), torch.tensor([[-2.0, 2.0, -2.0]])
    half = members // 2
    assert (combine([yes] * half + [no] * half, "vote", link="sigmoid") > 0).tolist() == [[False, True, False]]
    assert (combine([yes] * (half + 1) + [no] * half, "vote", link="sigmoid") > 0).tolist() == [[True, True, False]]


def test_a_sigmoid_vote_is_weighted_per_class_and_certain() -> None:
    a, b = torch.tensor([[3.0, -3.0, 0.0]]), torch.tensor([[-3.0, 3.0, 0.0]])
    made = combine([a, b], "vote", weights=(0.6, 0.4), link="sigmoid")
    assert torch.sigmoid(made / 100).tolist() == [[1.0, 0.0, 0.0]]


# ------------------------------------------------------------------------------------------------------------------- draw


def test_draw_takes_the_member_whose_interval_holds_the_number() -> None:
    logits = [torch.full((8, 2), float(m)) for m in range(3)]
    draws = torch.tensor([0.0, 0.19, 0.2, 0.49, 0.5, 0.51, 0.98, 1 - 2.0**-53], dtype=torch.float64)
    made = combine(logits, "draw", weights=(2, 3, 5), draws=draws)
    assert made[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2] == made[:, 1].tolist()


@weighted
def test_draw_follows_the_weights(weights: tuple[float, ...] | None) -> None:
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = [torch.full((1000, 1), float(m)) for m in range(MEMBERS)]
    made = combine(logits, "draw", weights=weights, draws=draws).long()[:, 0]
    counts = np.bincount(made.numpy(), minlength=MEMBERS)
    np.testing.assert_array_equal(counts, np.round(1000 * share_of(weights)))


@pytest.mark.parametrize("weights", [(0, 1, 0), (0.1, 0.2, 0.7, 0), (0, 0.3, 0, 0.3, 0.3, 0, 0)], ids=str)
def test_draw_never_takes_a_member_of_weight_zero(weights: tuple[float, ...]) -> None:
    logits = [torch.full((2, 1), float(m)) for m in range(len(weights))]
    made = combine(logits, "draw", weights=weights, draws=torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    taken = [int(m) for m in made[:, 0]]
    used = [m for m, weight in enumerate(weights) if weight]
    assert taken == [used[0], used[-1]]


def test_draw_gives_a_member_as_it_is() -> None:
    logits = member_logits()
    draws = torch.rand(BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = combine(logits, "draw", draws=draws)
    for row in range(BATCH):
        assert torch.equal(made[row], logits[int(draws[row] * MEMBERS)][row])


# ----------------------------------------------------------------------------------------------------------- common ground


@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_one_member_is_its_own_ensemble(rule: str) -> None:
    (logits,) = member_logits(members=1)
    made = combine([logits], rule, temperature=4.0, draws=torch.zeros(BATCH, dtype=torch.float64))
    if rule == "vote":
        assert torch.equal(made.argmax(1), logits.argmax(1))
        return
    np.testing.assert_allclose(made.softmax(1), logits.softmax(1), rtol=1e-10)
    if rule in KEEPS_LEVEL:
        assert torch.equal(made, logits)


@linked
@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_a_member_of_weight_zero_changes_nothing(rule: str, link: str) -> None:
    first, second, third = member_logits(members=3)
    draws = torch.linspace(0, 0.999, BATCH, dtype=torch.float64)
    made = combine([first, second, third], rule, weights=(2, 0, 1), temperature=4.0, link=link, draws=draws)
    without = combine([first, third], rule, weights=(2, 1), temperature=4.0, link=link, draws=draws)
    assert bool(made.isfinite().all())
    torch.testing.assert_close(made, without, rtol=1e-12, atol=1e-12)


@linked
@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_extreme_logits_stay_finite(rule: str, link: str) -> None:
    logits = [torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])]
    made = combine(logits, rule, temperature=0.5, link=link, draws=torch.tensor([0.7]))
    assert bool(made.isfinite().all()) and made.dtype == torch.float32


@pytest.mark.parametrize("t", [1.0, 4.0])
@pytest.mark.parametrize("rule", ["mean_probs_at_t", "mean_probs"])
def test_members_that_agree_are_sure_of_it(rule: str, t: float) -> None:
    """A probability of 1 - 1e-18 is 1 in float32; its logit still comes back."""
    logits = torch.tensor([[40.0, -40.0, 0.5]])
    made = combine([logits, logits.clone()], rule, temperature=t, link="sigmoid")
    torch.testing.assert_close(made, logits, rtol=1e-5, atol=1e-5)
    made = combine([logits, logits.clone()], rule, temperature=t)
    torch.testing.assert_close(made - made[:, :1], logits - logits[:, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [rule for rule in COMBINE_RULES if rule != "mean_probs_at_t"])
def test_only_one_rule_depends_on_the_temperature(rule: str) -> None:
    logits, draws = member_logits(), torch.full((BATCH,), 0.6, dtype=torch.float64)
    at = {t: combine(logits, rule, temperature=t, draws=draws) for t in (1.0, 4.0)}
    assert torch.equal(at[1.0], at[4.0])
    moving = [combine(logits, "mean_probs_at_t", temperature=t) for t in (1.0, 4.0)]
    assert not torch.allclose(*moving)


@pytest.mark.parametrize("rule", KEEPS_LEVEL)
def test_rules_that_keep_the_level(rule: str) -> None:
    logits, draws = member_logits(), torch.full((BATCH,), 0.6, dtype=torch.float64)
    moved = combine([one + 5.0 for one in logits], rule, draws=draws)
    torch.testing.assert_close(moved, combine(logits, rule, draws=draws) + 5.0)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), (0.0, 0.0), (1.0, -1.0), (1.0, np.nan), (np.inf, 1.0)])
@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_weights_that_are_none_are_refused(rule: str, weights: tuple[float, ...]) -> None:
    logits = member_logits(members=2)
    with pytest.raises(LossError, match="2 members cannot be weighted by"):
        combine(logits, rule, weights=weights, draws=torch.zeros(BATCH, dtype=torch.float64))


def test_an_unknown_rule_is_refused_with_near_names() -> None:
    check_rule("vote")
    for call in (lambda: check_rule("mean_logit"), lambda: combine(member_logits(), "mean_logit")):
        with pytest.raises(LossError, match=r"unknown combination rule 'mean_logit'\n.*did you mean 'mean_logits'"):
            call()


def test_members_are_named_with_weights_or_without() -> None:
    assert parse_members([]) is None
    assert parse_members(["a=0.7", "b"]) == {"a": 0.7, "b": 1.0}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=0.7", "b=0.2", "a=0.1"], r"--members names member 'a' twice\n.*give it once"),
        (["a", "a"], "member 'a' twice"),
        (["a=high"], "'high' is not a number"),
        (["a=-1"], "not negative"),
        (["a=nan"], "not negative"),
        (["a=0", "b=0"], "all weights are zero"),
    ],
)
def test_members_that_cannot_be_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_members(texts)


class _Products(TorchDispatchMode):
    """Notes every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if any(word in name for word in (".mm.", ".bmm", "addmm", "baddbmm", "matmul", "linear", ".mv.", ".dot.")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@linked
@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_a_users_autocast_or_tf32_changes_nothing(rule: str, link: str) -> None:
    """Members are combined without matrix products, which autocast makes in a half type and a GPU in TF32."""
    logits = [one.float() for one in member_logits(scale=6.0)]
    given = {"weights": (0.7, 0.1, 0.1, 0.1), "link": link, "draws": torch.rand(BATCH), "temperature": 4.0}
    wanted = combine(logits, rule, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16), _Products() as products:
        found = combine(logits, rule, **given)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert products.found == []


def test_exact_ties_go_to_the_smaller_class_under_autocast() -> None:
    """Three members of three say each a class of their own, and weights that add up with a rounding."""
    logits = [torch.eye(3)[[member]] * 9 for member in (2, 1, 0)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert combine(logits, "vote", weights=(0.1, 0.1, 0.1)).argmax().item() == 0
        assert combine([*logits, logits[0]], "vote", weights=(0.1, 0.2, 0.3, 0.2)).argmax().item() == 0

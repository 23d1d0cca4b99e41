"""Mixing: partners, shares and blends from the sample's own draws, against NumPy in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from view_oracles import (
    LAYOUTS,
    SAMPLE,
    SEED,
    channels_last,
    image_of,
    oracle_integer,
    oracle_uniform,
    oracle_words,
    policy_of,
)

from softcache.data.mixing import quantised_beta, symmetric_beta
from softcache.data.philox import Draws, step_key
from softcache.data.views import Policy
from softcache.errors import ConfigError, DataError


def oracle_share(alpha: float, words: Iterator[int]) -> int:
    """0..4096 from Beta(alpha, alpha): Ulrich's formula above 1/2, Jöhnk's pairs below."""
    if alpha > 0.5:
        u, v = 1 - oracle_uniform(next(words)), oracle_uniform(next(words))
        number = (1 + math.cos(2 * math.pi * v) * math.sqrt(1 - u ** (2 / (2 * alpha - 1)))) / 2
        return round(4096 * number)
    while True:
        x, y = ((1 - oracle_uniform(next(words))) ** (1 / alpha) for _ in range(2))
        if x + y <= 1:
            return round(4096 * x / (x + y))


def oracle_mixup(
    own: np.ndarray, partner: np.ndarray, words: Iterator[int], *, alpha: float
) -> tuple[np.ndarray, Fraction]:
    k = oracle_share(alpha, words)
    blend = (k * own.astype(np.int64) + (4096 - k) * partner.astype(np.int64) + 2048) // 4096
    return blend.astype(np.uint8), Fraction(k, 4096)


def oracle_cutmix(
    own: np.ndarray, partner: np.ndarray, words: Iterator[int], *, alpha: float
) -> tuple[np.ndarray, Fraction]:
    side = math.floor(65536 * math.sqrt(1 - oracle_share(alpha, words) / 4096))
    made = own.copy()
    slices = []
    for pixels in own.shape[:2]:
        middle = oracle_integer(next(words), 0, 65535)
        first = middle - side // 2
        edges = [min(max(edge, 0), 65536) / 65536 for edge in (first, first + side)]
        slices.append(slice(*(math.floor(edge * pixels + 0.5) for edge in edges)))
    ys, xs = slices
    made[ys, xs] = partner[ys, xs]
    area = (ys.stop - ys.start) * (xs.stop - xs.start)
    return made, 1 - Fraction(area, own.shape[0] * own.shape[1])


ORACLES = {"mixup": oracle_mixup, "cutmix": oracle_cutmix}
CASES = ["mixup", "mixup:alpha=0.5", "mixup:alpha=1", "mixup:alpha=4", "cutmix", "cutmix:alpha=0.3", "cutmix:alpha=2"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_mixed_view_is_the_oracles(case: str, layout: str) -> None:
    own, partner, policy = image_of(layout, seed=1), image_of(layout, seed=2), policy_of(case)
    before = channels_last(own).copy(), channels_last(partner).copy()
    step = policy.mixing
    assert step is not None
    for view in range(15):
        words = oracle_words(SEED, step.name, 0, SAMPLE, view)
        assert policy.partner(SAMPLE, view, 70) == oracle_integer(next(words), 0, 69)
        wanted, share = ORACLES[step.name](before[0], before[1], words, **step.parameters)
        made, weight = policy.mix(own, partner, SAMPLE, view)
        assert type(made) is type(own) and made.dtype == own.dtype and made.shape == own.shape
        np.testing.assert_array_equal(channels_last(made), wanted)
        assert weight == float(share)
        if step.name == "mixup":
            assert (weight * 4096).is_integer()
    np.testing.assert_array_equal(channels_last(own), before[0])
    np.testing.assert_array_equal(channels_last(partner), before[1])


def test_the_share_is_the_weight_of_the_samples_own_pixels() -> None:
    white, black = np.full((64, 64), 255, np.uint8), np.zeros((64, 64), np.uint8)
    for case in ("mixup:alpha=1", "cutmix"):
        seen = [policy_of(case).mix(white, black, sample, 0) for sample in range(50)]
        assert all(abs(made.mean() / 255 - share) < 0.003 for made, share in seen)
        assert len({share for _, share in seen}) > 40


@pytest.mark.parametrize("alpha", [0.15, 0.2, 0.5, 0.51, 1.0, 2.0, 8.0])
def test_shares_are_distributed_as_beta(alpha: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="compares with scipy's distributions")
    key, count = step_key("mixup", 0), 4000
    numbers = [symmetric_beta(alpha, Draws(0, key, sample, 0)) for sample in range(count)]
    assert abs(np.mean(numbers) - 0.5) < 4 * math.sqrt(1 / (4 * (2 * alpha + 1)) / count)
    assert np.var(numbers) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
    assert stats.kstest(numbers, stats.beta(alpha, alpha).cdf).statistic < 1.95 / math.sqrt(count)


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_extreme_shares_are_whole_numbers_of_4096(alpha: float) -> None:
    shares = [quantised_beta(alpha, Draws(0, step_key("mixup", 0), sample, 0)) for sample in range(500)]
    assert min(shares) >= 0 and max(shares) <= 4096
    if alpha < 1:
        assert {0, 4096} <= set(shares)  # nearly all of them: u ** 100 vanishes for most u
    else:
        assert max(abs(share - 2048) for share in shares) < 4096 * 4.5 / math.sqrt(4 * 201)


def test_every_row_is_a_partner_about_equally_often() -> None:
    policy = policy_of("cutmix")
    found = np.bincount([policy.partner(sample, 1, 8) for sample in range(4000)], minlength=8)
    assert len(found) == 8 and np.abs(found - 500).max() < 5 * math.sqrt(500)


def test_a_mixing_policy_renders_the_view_without_its_partner() -> None:
    item = image_of("rgb")
    plain, mixing = policy_of("crop_flip", "erase:p=1"), policy_of("crop_flip", "erase:p=1", "cutmix")
    for view in range(8):
        np.testing.assert_array_equal(mixing.render(item, SAMPLE, view), plain.render(item, SAMPLE, view))
    assert policy_of("mixup").render(item, SAMPLE, 0) is item
    assert plain.mixing is None and str(mixing.mixing) == "cutmix:alpha=1.0"
    assert mixing.for_evaluation() == Policy((), SEED) and mixing.is_random


@pytest.mark.parametrize(
    "texts", [("mixup", "shift"), ("mixup", "cutmix"), ("cutmix", "cutmix"), ("to_rgb", "mixup", "to_rgb")], ids=str
)
def test_a_mixing_step_is_the_last_and_the_only_one(texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must be the last step of a policy, and the only one that mixes"):
        policy_of(*texts)


@pytest.mark.parametrize(
    ("own", "partner"),
    [
        (image_of("rgb"), image_of("rgb", height=17)),
        (image_of("grey"), image_of("rgb")),
        (image_of("tensor rgb"), image_of("tensor rgb", width=12)),
    ],
    ids=["height", "channels", "tensors"],
)
def test_images_of_two_sizes_are_refused(own: Any, partner: Any) -> None:
    with pytest.raises(DataError, match=r"mixup needs images of one size, got .*\n.*resize or center_crop"):
        policy_of("mixup").mix(own, partner, SAMPLE, 0)


def test_a_policy_that_does_not_mix_has_no_partners() -> None:
    with pytest.raises(ConfigError, match="mixes nothing"):
        policy_of("shift").partner(SAMPLE, 0, 5)


def test_cutmix_boxes_lie_alike_at_any_resolution() -> None:
    policy = policy_of("cutmix")
    for sample in range(60):
        boxes = []
        for size in (20, 200):
            made, _ = policy.mix(torch.zeros(1, size, size).byte(), torch.ones(1, size, size).byte(), sample, 0)
            ys, xs = made[0].nonzero(as_tuple=True)
            boxes.append([int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1] if len(ys) else None)
        if boxes[0] and boxes[1]:
            assert all(abs(10 * one - other) <= 5 for one, other in zip(*boxes, strict=True))


@pytest.mark.parametrize(("case", "other"), [("mixup:alpha=0.2", "mixup:alpha=0.3"), ("cutmix", "cutmix:alpha=0.6")])
def test_one_parameter_changes_pixels(case: str, other: str) -> None:
    own, partner = image_of("rgb", seed=1), image_of("rgb", seed=2)
    one, two = ([policy_of(text).mix(own, partner, sample, 0)[0] for sample in range(20)] for text in (case, other))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_draws_of_mixing_never_change() -> None:
    """Pinned: an accidental change of the arithmetic would be a new version of the step."""
    white, black = np.full((50, 60), 255, np.uint8), np.zeros((50, 60), np.uint8)
    found: dict[str, Any] = {}
    for case, units in (("mixup", 4096), ("mixup:alpha=1", 4096), ("cutmix", 50 * 60)):
        policy = policy_of(case)
        shares = [round(policy.mix(white, black, SAMPLE, view)[1] * units) for view in range(3)]
        found[case] = ([policy.partner(SAMPLE, view, 1000) for view in range(3)], shares)
    assert found == {
        "mixup": ([458, 51, 681], [4096, 4096, 54]),
        "mixup:alpha=1": ([458, 51, 681], [3483, 3531, 312]),
        "cutmix": ([196, 427, 218], [1594, 1976, 1896]),
    }

"""Scalars over training, each against a formula written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest

from softcache.errors import ConfigError
from softcache.losses.schedules import SCHEDULES, Moment, Schedule

EPOCHS, STEPS = 10, 8


def at(text: str, position: float) -> float:
    """The value after so many epochs of a stage of EPOCHS epochs of STEPS steps."""
    step = round(position * STEPS)
    assert step == position * STEPS
    return Schedule.parse(text, "x").at(Moment(step // STEPS, step % STEPS, STEPS, EPOCHS))


def half_cosine(share: float) -> float:
    return math.cos(math.pi * share / 2) ** 2


SHAPES: list[tuple[str, Callable[[float], float]]] = [
    ("0.9", lambda p: 0.9),
    ("1e-3", lambda p: 1e-3),
    ("constant", lambda p: 1.0),
    ("constant(3)", lambda p: 3.0),
    ("linear", lambda p: 1 - p / 10),
    ("linear(8, 2)", lambda p: 8 - 0.6 * p),
    ("linear(8,2,until=5)", lambda p: max(2.0, 8 - 1.2 * p)),
    ("linear(0, 1, start=2, until=40steps)", lambda p: min(1.0, max(0.0, (p - 2) / 3))),
    ("cosine", lambda p: half_cosine(p / 10)),
    ("cosine(4, 1)", lambda p: 1 + 3 * half_cosine(p / 10)),
    ("cosine(0, 1, until=4)", lambda p: 1 - half_cosine(min(1.0, p / 4))),
    ("cubic(0, 0.8)", lambda p: 0.8 - 0.8 * (1 - p / 10) ** 3),
    ("cubic(0.2, 0.8, start=1, until=40steps)", lambda p: 0.8 - 0.6 * (1 - min(1.0, max(0.0, (p - 1) / 4))) ** 3),
    ("step(at=4/8)", lambda p: 0.1 ** ((p >= 4) + (p >= 8))),
    ("step(2, at=4/48steps, gamma=0.5)", lambda p: 2 * 0.5 ** ((p >= 4) + (p >= 6))),
    ("piecewise(0:4, 5:1)", lambda p: max(1.0, 4 - 0.6 * p)),
    ("piecewise(2:1, 4:3, 8:0)", lambda p: 1 if p < 2 else p - 1 if p < 4 else max(0.0, 3 - 0.75 * (p - 4))),
    ("piecewise(8steps:1, 16steps:2)", lambda p: min(2.0, max(1.0, p))),
    ("warmup(4)", lambda p: min(1.0, (p + 1 / 8) / 4)),
    ("warmup(16steps, 0.5)", lambda p: min(0.5, 0.25 * (p + 1 / 8))),
    ("warmup(5, cosine)", lambda p: (p + 1 / 8) / 5 if p < 5 else half_cosine((p - 5) / 5)),
    ("warmup(2, linear(8, 2))", lambda p: 4 * (p + 1 / 8) if p < 2 else 8 - 0.75 * (p - 2)),
    ("warmup(4, step(1, at=2/6, gamma=0.5))", lambda p: 0.125 * (p + 1 / 8) if p < 4 else 0.5 ** (1 + (p >= 6))),
    ("linear(8, 2, by=epoch)", lambda p: 8 - 0.6 * math.floor(p)),
    ("warmup(4, 1, by=epoch)", lambda p: min(1.0, math.floor(p) / 4)),
    ("step(1, at=2.5, by=epoch)", lambda p: 0.1 ** (math.floor(p) >= 2.5)),
]


@pytest.mark.parametrize(("text", "formula"), SHAPES, ids=[text for text, _ in SHAPES])
def test_every_shape_at_every_step(text: str, formula: Callable[[float], float]) -> None:
    found = [at(text, step / STEPS) for step in range(EPOCHS * STEPS + 1)]
    assert found == pytest.approx([formula(step / STEPS) for step in range(EPOCHS * STEPS + 1)], abs=1e-12)
    lowest, highest = Schedule.parse(text, "x").bounds
    assert lowest <= min(found) + 1e-12 and max(found) <= highest + 1e-12


def test_every_schedule_has_a_shape_here() -> None:
    assert {text.partition("(")[0] for text, _ in SHAPES} >= set(SCHEDULES)
    for kind in SCHEDULES.values():
        for example in kind.usage.split(" or "):
            assert Schedule.parse(example, "x").text == example


def test_bounds_hold_what_a_longer_stage_would_reach() -> None:
    assert Schedule.parse("linear(8, 2)", "x").bounds == (2.0, 8.0)
    assert Schedule.parse("step(1, at=100/200, gamma=0.5)", "x").bounds == (0.25, 1.0)
    assert Schedule.parse("warmup(3, 4)", "x").bounds == (0.0, 4.0)
    assert Schedule.parse("piecewise(0:3, 5:-1)", "x").bounds == (-1.0, 3.0)


def test_a_schedule_is_known_by_its_text() -> None:
    one, other = Schedule.parse(" linear( 8,\t2 ) ", "x"), Schedule.parse(0.5, "x")
    assert one.text == "linear( 8, 2 )" and not one.is_constant
    assert other.text == "0.5" and other.is_constant
    assert one == Schedule.parse("linear( 8, 2 )", "y") != other


@pytest.mark.parametrize("text", [text for text, _ in SHAPES])
def test_a_schedule_that_falls_says_so(text: str) -> None:
    found = [at(text, step / STEPS) for step in range(EPOCHS * STEPS + 1)]
    assert Schedule.parse(text, "x").falls is any(b < a - 1e-12 for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x: '' is neither a number nor a schedule"),
        ("cosin", r"'cosin' is neither a number nor a schedule\n.*did you mean 'cosine'"),
        ("linear(8", "has no closing bracket"),
        ("linear(8)", r"has one value\n.*where it ends"),
        ("linear(8, 2, 1)", r"has 3 values\n.*write linear\(8, 2\)"),
        ("linear(8, two)", "'two' is not a finite number"),
        ("linear(8, 2, til=5)", r"linear has no argument 'til'\n.*'until'"),
        ("linear(8, 2, until=-1)", "'-1' is not a finite number of at least 0"),
        ("linear(8, 2, until=fivesteps)", "'five' is not a finite number"),
        ("linear(8, 2, until=15%)", r"'15%' is not a finite number of at least 0\n.*15 or 7.5, or of steps, 500steps"),
        ("step(1, at=50%/75%)", r"'50%' is not a finite number of at least 0\n.*a number of epochs"),
        ("linear(0, 80%)", r"'80%' is not a finite number\n.*written as a number: 0.8"),
        ("linear(8, 2, by=day)", "by='day' is neither step nor epoch"),
        ("step(1)", r"does not say at which epochs\n.*step\(1, at="),
        ("step(1, at=)", "'' is not a finite number"),
        ("piecewise(1, 2)", "a point is epoch:value"),
        ("piecewise(5:1, 2:0)", "the points do not rise"),
        ("piecewise(5:1, 80steps:0)", "the points do not rise"),
        ("piecewise", "has 0 values"),
        ("warmup(cosine)", "'cosine' is not a finite number"),
        ("warmup(5, linear(1, 0, by=epoch))", "by=epoch stands inside"),
        ("inf", "'inf' is not a finite number"),
        ("nan", "'nan' is not a finite number"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule.parse(text, "x")

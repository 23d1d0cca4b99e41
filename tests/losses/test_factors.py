"""The table of factors in LOSSES.md: each line against the other framework's formula, and the page against the lines."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from softcache.losses import LOSSES

sys.path.append(str(Path(__file__).parents[2] / "tools"))
tool = importlib.import_module("docs.loss_factors")

NAMES = [f"{number} {row.loss} of {row.whose.split(',')[0]}" for number, row in enumerate(tool.ROWS)]
CONSTANT = [row for row in tool.ROWS if row.factor != tool.NONE]
OTHERS = [row for row in tool.ROWS if row.factor == tool.NONE]


def names(rows: list[object]) -> list[str]:
    return [NAMES[tool.ROWS.index(row)] for row in rows]


@pytest.mark.parametrize("row", CONSTANT, ids=names(CONSTANT))
def test_a_factor_is_the_same_on_all_inputs(row: object) -> None:
    for draw, found in zip(tool.DRAWS, tool.ratios(row), strict=True):
        assert found == pytest.approx(row.constant(draw), rel=row.within)  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", OTHERS, ids=names(OTHERS))
def test_what_is_called_no_constant_is_none(row: object) -> None:
    found = tool.ratios(row)
    assert all(map(math.isfinite, found))
    assert max(map(abs, found)) > 1.05 * min(map(abs, found))


def test_the_text_of_a_factor_is_its_number() -> None:
    draw = tool.DRAWS[-1]
    words = {"B": draw.batch, "C": draw.classes, "T": tool.T, "M": len(draw.members), "n": draw.late[0][0].numel()}
    for row in CONSTANT:
        text, _, number = row.factor.partition(": ")
        assert eval(text, {}, words) == pytest.approx(row.constant(draw)), row
        assert not number or eval(number) == pytest.approx(row.constant(draw)), row


def test_every_loss_has_a_line_or_is_named_below_them() -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    (named,) = re.findall(r"No other form\s+of (.*?) is known", page, re.S)
    without = set(re.findall(r"`(\w+)`", named))
    with_lines = {tool.name_of(row) for row in tool.ROWS}
    assert with_lines | without == set(LOSSES) and not with_lines & without


def test_a_published_weight_is_the_same_here_or_said_to_be_another() -> None:
    for row in tool.ROWS:
        if row.weight and row.factor != "1":
            assert re.search(r"theirs alone$|: [\d.]+ here$", tool.weight_of(row)), row
    here = {row.loss: tool.weight_of(row) for row in tool.ROWS if " here" in tool.weight_of(row)}
    assert {loss: text.rpartition(": ")[2] for loss, text in here.items()} == {
        "batch_correlation": "0.45 here", "class_correlation": "0.45 here",
        "rkd_distance": "25 here", "rkd_angle": "50 here",
    }  # fmt: skip


def test_the_page_has_the_lines_that_the_tool_prints() -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    block = page.partition(tool.BEGIN)[2].partition(tool.END)[0].splitlines()
    made = tool.markdown(tool.ROWS).splitlines()
    again = "python tools/docs/loss_factors.py --write"
    assert len(block) == len(made), again
    number = re.compile(r"-?\d[\d,]*\.?\d*")
    for there, now in zip(block, made, strict=True):
        if tool.NONE not in now:
            assert there == now, again
            continue
        assert number.sub("#", there) == number.sub("#", now), (
            again
        )  # the second digit of a bound may be another elsewhere
        bounds = [[float(x.replace(",", "")) for x in number.findall(line.split("|")[4])] for line in (there, now)]
        assert bounds[0] == pytest.approx(bounds[1], rel=0.1), again


def test_the_formulas_of_others_are_not_softcaches() -> None:
    source = Path(tool.other.__file__).read_text(encoding="utf-8")
    assert re.findall(r"^(?:from|import) (\w+)", source, re.M) == ["__future__", "math", "torch", "torch"]


def test_students_are_unrelated_or_close_to_their_teachers() -> None:
    for draw in tool.DRAWS:
        student, teacher = (x.detach().flatten() for x in draw.logits)
        found = torch.corrcoef(torch.stack([student, teacher]))[0, 1]
        assert float(found) == pytest.approx(draw.share, abs=0.25)

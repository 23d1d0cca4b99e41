"""dump --first-view: the later views of a policy as a cache of their own, with what a larger dump would have held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump

from softcache.check import verify
from softcache.errors import ConfigError

POLICY = ("shift:pixels=1",)


@pytest.mark.parametrize("codec", ["float32", "lowrank:max_kl=0.001,at_temperature=4"])
def test_later_views_are_those_of_a_larger_dump(quick_dump: QuickDump, tmp_path: Path, codec: str) -> None:
    bent = WORLDS / "bent.py"
    teacher, data = [f"{bent}:bent?name=bent"], f"{bent}:images?count=300"
    settings: dict[str, Any] = {"policy": POLICY, "codec": codec, "view_seed": 5, "teacher": teacher, "data": data}
    whole = quick_dump(views=4, out="whole", **settings)
    later = quick_dump(views=2, first_view=2, out="later", **settings)
    plan = later.manifest.plan
    assert (plan.views.first, plan.views.count, plan.parent) == (2, 2, None)
    assert plan.members == whole.manifest.plan.members
    rows = np.arange(len(later))
    for view in (0, 1):
        mine, theirs = np.full(len(rows), view), np.full(len(rows), view + 2)
        for member, name in ((None, "pixel_digests"), ("bent", "eps")):
            stored = later.reader.gather(member, name, rows, mine)
            assert np.array_equal(stored, whole.reader.gather(member, name, rows, theirs))
        assert torch.equal(later.gather(rows, mine).logits(), whole.gather(rows, theirs).logits())
    for name, array in whole.reader.constants("bent").items():  # fitted on the same pixels
        assert np.array_equal(later.reader.constants("bent")[name], array)
    verdict = verify.run(tmp_path / "later", full=True, replay=1000, data=data)
    assert verdict.state == "whole" and "bit for bit" in verdict.notes[0]


def test_a_teacher_without_weights_is_known_by_the_same_outputs(quick_dump: QuickDump) -> None:
    teacher = [f"{WORLDS}/without_weights.py:sums"]
    first = quick_dump(teacher=teacher, policy=POLICY, out="first")
    later = quick_dump(teacher=teacher, policy=POLICY, first_view=1, out="later")
    assert later.manifest.plan.members[0].fingerprint == first.manifest.plan.members[0].fingerprint


def test_a_cache_of_later_views_grows_by_views_and_members(quick_dump: QuickDump, toy: Path) -> None:
    whole = quick_dump(policy=POLICY, views=4, out="whole")
    quick_dump(policy=POLICY, first_view=1, out="later")
    grown = quick_dump(out="later", extend=True, codec=None, views=3)
    rows = np.arange(len(grown))
    for view in range(3):
        found = grown.gather(rows, np.full(len(rows), view)).logits()
        assert torch.equal(found, whole.gather(rows, np.full(len(rows), view + 1)).logits())
    both = quick_dump(teacher=[f"{toy}:exact?seed=2&name=second"], out="later", extend=True, codec=None)
    assert both.members == ("exact", "second") and both.num_views == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"first_view": -1, "policy": POLICY}, "--first-view -1: views are counted from 0", id="negative"),
        pytest.param(
            {"first_view": 2**53, "policy": POLICY}, "no view beyond number", id="larger than a manifest holds"
        ),
        pytest.param({"first_view": 1}, "--first-view 1, but every view of this policy is the same", id="no policy"),
        pytest.param(
            {"first_view": 1, "extend": True, "codec": None},
            "--first-view cannot be given with --extend",
            id="extension",
        ),
    ],
)
def test_refusals(quick_dump: QuickDump, settings: dict[str, Any], message: str) -> None:
    if settings.get("extend"):
        quick_dump(policy=POLICY)
    with pytest.raises(ConfigError, match=message):
        quick_dump(**settings)

"""Steps that make a model smaller: what they build on, what is checked before, what goes on, and the table with what it costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from conftest import WORLDS

from softcache.config import EvalConfig
from softcache.errors import ConfigError, SoftcacheError
from softcache.evaluate import measure
from softcache.models import load_model
from softcache.reproduce import flow as reproduce
from softcache.reproduce import steps
from softcache.reproduce.recipe import parse_recipe
from softcache.reproduce.table import Row, mean_cost, written
from softcache.students import cost, shrink

TEST = "synthetic:images?classes=4&size=8&channels=1&count=32&split=test"
SMALLER = f"""
title = "made smaller"
source = "nobody (2026)"
[data]
train = "synthetic:images?classes=4&size=8&channels=1&count=64"
test = "{TEST}"
[train]
data = "train"
eval_data = "test"
epochs = 1
threads = 1
[dump]
data = "train"
threads = 1
[shrink]
data = "train"
eval_data = "test"
threads = 1
[[step]]
name = "dense"
label = "dense"
column = "as it is"
train = {{student = "softcache:cnn?width=16"}}
[[step]]
name = "cache"
seeds = true
dump = {{teacher = ["dense"]}}
[[step]]
name = "half"
seeds = true
label = "half"
column = "as it is"
shrink = {{model = "dense", by = ["carve:width=0.5"]}}
[[step]]
name = "healed"
label = "half"
column = "healed"
train = {{student = "half", cache = "cache", loss = ["kd"], lr = 0.01}}
[[step]]
name = "less"
seeds = true
shrink = {{model = "healed", by = ["lowrank:energy=0.5"]}}
[[step]]
name = "anew"
label = "anew"
column = "healed"
beside = "dense"
train = {{student = "softcache:cnn?width=8"}}
[budget.short]
seeds = [3]
"""


@pytest.fixture(autouse=True)
def _timed_once(timed_once: None) -> None:
    """Every test."""


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with_changes(monkeypatch)


def with_changes(monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> None:
    text = SMALLER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    monkeypatch.setattr(reproduce, "read_recipe", lambda name, budget, only=(): parse_recipe(name, text, budget, only))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[reproduce.Reproduced]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "SECONDS", 0.0)
        with_changes(patch)
        yield reproduce.run("smaller", budget="short", out=tmp_path_factory.mktemp("done"), quiet=True)


def folder_of(made: reproduce.Reproduced, name: str) -> Path:
    (folder,) = made.folder.glob(f"{name}-3-*/")
    return folder


def copied(made: reproduce.Reproduced, place: Path) -> Path:
    shutil.copytree(made.folder.parents[1], place)
    return place


@pytest.mark.slow
def test_a_model_is_made_smaller_healed_and_made_smaller_again(done: reproduce.Reproduced) -> None:
    dense, half, healed, less = (
        load_model(str(folder_of(done, name)), num_classes=4) for name in ("dense", "half", "healed", "less")
    )
    counts = [sum(p.numel() for p in model.parameters()) for model in (dense, half, healed, less)]
    assert counts[0] > counts[1] == counts[2] > counts[3]
    first = dense.net.get_submodule("0").weight[::2]  # every second channel of the teacher's first layer
    assert torch.equal(half.net.get_submodule("0").weight, first) and healed.shrunk == half.shrunk
    assert not torch.equal(healed.net.get_submodule("0").weight, first)


@pytest.mark.slow
def test_every_cell_is_that_of_its_own_model(done: reproduce.Reproduced) -> None:
    assert [(row.label, row.column) for row in done.rows] == [
        ("dense", "as it is"), ("half", "as it is"), ("half", "healed"), ("anew", "healed"),
    ]  # fmt: skip
    for name, row in zip(("dense", "half", "healed", "anew"), done.rows, strict=True):
        found = measure.run(str(folder_of(done, name)), EvalConfig(data=TEST, threads=1, device="cpu"), quiet=True)
        assert row.values == [found.errors]
    dense, half, healed, anew = done.rows
    numbers = {
        name: sum(p.numel() for p in load_model(str(folder_of(done, name)), num_classes=4).parameters())
        for name in ("dense", "half", "anew")
    }
    assert half.cost["before"]["parameters"] == anew.cost["before"]["parameters"] == numbers["dense"]
    assert half.cost["after"]["parameters"] == numbers["half"] and anew.cost["after"]["parameters"] == numbers["anew"]
    assert half.cost["after"]["nbytes"] < half.cost["before"]["nbytes"] and half.cost["after"]["seconds_one"] > 0
    assert not dense.cost and not healed.cost
    assert [row["column"] for row in json.loads((done.folder / "table.json").read_text())["rows"]][2] == "healed"


@pytest.mark.slow
def test_what_is_there_is_reused_and_a_deleted_one_is_made_smaller_again_alone(
    done: reproduce.Reproduced, tmp_path: Path, recipe: None
) -> None:
    out = copied(done, tmp_path / "out")
    for left, again in ((None, 0), ("student.safetensors", 1), ("everything", 1)):
        (half,) = (out / "smaller/short").glob("half-3-*/")
        if left == "student.safetensors":  # as one that was killed leaves it
            (half / left).rename(half / f".77.{left}")
        elif left is not None:
            shutil.rmtree(half)
        more = reproduce.run("smaller", budget="short", out=out, quiet=True)
        assert (more.done, more.reused) == (again, 6 - again)
        assert [row.values for row in more.rows] == [row.values for row in done.rows]
        assert sorted(path.name for path in half.iterdir()) == ["shrink.json", "student.safetensors"]


@pytest.mark.slow
def test_what_was_made_smaller_and_not_noted_is_not_made_again(
    done: reproduce.Reproduced, tmp_path: Path, recipe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(done, tmp_path / "out")
    (note,) = out.glob("smaller/short/half-3-*.result.json")
    note.unlink()
    monkeypatch.setattr(steps.shrink, "run", lambda *_, **__: pytest.fail("it is made smaller again"))
    more = reproduce.run("smaller", budget="short", out=out, quiet=True)
    assert more.rows[1].values == done.rows[1].values and dict(more.rows[1].cost) == dict(done.rows[1].cost)
    (table,) = out.glob("smaller/short/half-3-*/shrink.json")
    note.unlink()
    table.write_text('{"measured_after": {"samples": 3}}')
    with pytest.raises(ConfigError, match=r"shrink\.json: cannot be understood"):
        reproduce.run("smaller", budget="short", out=out, quiet=True)


@pytest.mark.slow
def test_another_method_is_another_model_and_so_is_all_that_learns_from_it(
    done: reproduce.Reproduced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_changes(monkeypatch, ("carve:width=0.5", "prune:structured,amount=0.5"))
    more = reproduce.run("smaller", budget="short", out=copied(done, tmp_path / "out"), quiet=True)
    assert (more.done, more.reused) == (3, 3)


def test_steps_of_earlier_versions_are_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.7.0 gave this step a folder of this name."""
    text = """
title = "a table"
source = "nobody (2026)"
[data]
train = "synthetic:images?classes=4&size=8&channels=1&count=64"
test = "synthetic:images?classes=4&size=8&channels=1&count=32&split=test"
[[step]]
name = "teacher"
seeds = false
train = {data = "train", eval_data = "test", epochs = 1, threads = 1, student = "softcache:mlp?hidden=16"}
"""
    monkeypatch.setattr(reproduce, "read_recipe", lambda name, budget, only=(): parse_recipe(name, text, budget, only))
    made = reproduce.run("old", budget="short", out=tmp_path, quiet=True)
    assert [path.name for path in made.folder.glob("*/")] == ["teacher-812ba83c"]


@pytest.mark.slow
def test_what_a_factory_made_is_read_by_it_when_it_is_smaller_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = f"{WORLDS / 'joined_channels.py'}:ways"
    with_changes(monkeypatch, ("softcache:cnn?width=16", factory))
    made = reproduce.run("smaller", budget="short", only=["less"], out=tmp_path, quiet=True)
    assert made.done == 5 and (folder_of(made, "less") / "student.safetensors").is_file()


MISTAKES = [
    (("carve:width=0.5", "carve:widht=0.5"), "unknown parameter 'widht'"),
    (("carve:width=0.5", "carv:width=0.5"), "there is no method 'carv'"),
    (("carve:width=0.5", "carve:depth=0.5"), "has no repeated blocks"),
    (("carve:width=0.5", "prune:structured,amount=0.01"), "no channels can be left out"),
    (("lowrank:energy=0.5", "lowrank:energy=0.5,keep=99"), "there is no module '99' to keep"),
    (('model = "dense"', 'model = "dens"'), "model 'dens' is no step before it"),
    (('model = "dense"', 'model = "cache"'), "model 'cache' is a dump, and no model"),
    (('student = "half"', 'student = "cache"'), "student 'cache' is a dump, and no model"),
    (('student = "half"', 'student = "halv"'), "halv"),
    (('loss = ["kd"]', 'loss = ["kd"], freeze = ["3.first"]'), "the student has no parameters"),
    (('beside = "dense"', 'beside = "dens"'), "beside 'dens' is no step before it"),
    (('beside = "dense"', 'beside = "a:b"'), "beside 'a:b' is no step before it"),
    (('label = "anew"', ""), "a column is a place in a row"),
    (('column = "healed"\nbeside = "dense"', 'beside = "dense"\nseeds = false'), "is done once, 'dense' once for each"),
    (('label = "half"', 'label = "half"\nbeside = "dense"'), "beside is of a step that trains"),
    (('by = ["carve:width=0.5"]', 'by = ["carve:width=0.5"], out = "x"'), "shrink cannot set out"),
    (('by = ["carve:width=0.5"]', 'by = ["carve:width=0.5"], scan = true'), "shrink cannot set scan"),
    (('by = ["carve:width=0.5"]', "by = []"), "a step that shrinks says how"),
    (("carve:width=0.5", 'quantise:int8", "carve:width=0.5'), "of int8 weights nothing more can be cut"),
    (('by = ["carve:width=0.5"]', 'by = ["carve:width=0.5"], seed = 3'), "seed = 3 would win over --seeds"),
    (('by = ["carve:width=0.5"]', 'by = ["carve:width=0.5"], eval_data = "tset"'), "tset"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[row[1] for row in MISTAKES])
def test_mistakes_are_told_before_the_first_step(
    change: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_changes(monkeypatch, change)
    with pytest.raises(SoftcacheError, match=message):
        reproduce.run("smaller", budget="short", out=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_what_random_weights_do_not_tell_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer of random weights has so much of its energy in so few directions that two would be smaller."""
    with_changes(monkeypatch, ("lowrank:energy=0.5", "lowrank:energy=0.9999"))
    asked: list[Any] = []
    monkeypatch.setattr(
        reproduce, "outcome_of", lambda step, *_: asked.append(step) or steps.Outcome("", "", {"errors": 1})
    )
    reproduce.run("smaller", budget="short", only=["less"], out=tmp_path, quiet=True)
    assert [step.name for step in asked] == ["dense", "cache", "half", "healed", "less"]


# ---- the table -----------------------------------------------------------------------------------------------------


def one_cost(parameters: float, zeros: float, seconds: float) -> dict[str, float]:
    return {
        "parameters": parameters, "zeros": zeros, "nbytes": 4 * parameters, "compressed": 4 * (parameters - zeros),
        "seconds_one": seconds, "seconds_batch": 10 * seconds,
    }  # fmt: skip


def row(label: str, column: str, values: list[float], **more: Any) -> Row:
    return Row(label, "top1", None, values, values, "", 30.0, column, more.get("cost", {}))


def test_rows_of_one_label_are_one_line_that_begins_with_what_it_costs() -> None:
    both = {"before": one_cost(4000, 0, 0.004), "after": one_cost(1500, 500, 0.001)}
    rows = [
        row("whole", "as it is", [90.0, 92.0]),
        row("half", "as it is", [10.0, 20.0], cost=both),
        row("half", "healed", [88.5, 88.5]),
    ]
    head, _rule, whole, half = written(rows, [0, 1]).splitlines()
    columns = [
        "parameters",
        "not zero",
        "on disk",
        "compressed",
        "one sample",
        "a batch",
        "as it is, top1",
        "healed, top1",
    ]
    assert [cell.strip() for cell in head.split("  ") if cell.strip()] == [*columns, "minutes"]
    cells = [cell.strip() for cell in half.split("  ") if cell.strip()]
    told = ["half", "1,500", "1,000", "6.0 kB", "4.0 kB", "1.00 ms (0.25)", "10.0 ms (0.25)"]
    assert cells == [*told, f"15 ± {stdev([10, 20]):.2f}", "88.50 ± 0", "1.0"]
    assert [cell.strip() for cell in whole.split("  ") if cell.strip()] == ["whole", "91 ± 1.41", "0.5"]


def test_rows_without_a_column_have_a_table_of_their_own() -> None:
    text = written([row("alone", "", [3.0]), row("half", "healed", [4.0])], [0])
    first, second = text.split("\n\n")
    assert "ours" in first and "alone" in first and "healed, top1" in second and "alone" not in second


def test_costs_are_means_over_the_seeds() -> None:
    costs = [{"before": one_cost(8, 0, 1), "after": one_cost(n, 0, n)} for n in (2.0, 4.0, 9.0)]
    assert mean_cost(costs)["after"]["parameters"] == mean_cost(costs)["after"]["seconds_one"] == mean([2, 4, 9])
    assert mean_cost([*costs, {}]) == {} == mean_cost([])


@pytest.mark.slow
def test_the_table_of_a_shrink_that_is_named_like_one_of_ours_is_its_own(done: reproduce.Reproduced) -> None:
    told = json.loads((folder_of(done, "half") / shrink.TABLE).read_text())
    assert done.rows[1].values == [told["measured_after"]["samples"] - round(32 * told["measured_after"]["top1"])]

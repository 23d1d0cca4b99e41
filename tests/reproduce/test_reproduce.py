"""Recipes: what they say at each budget, what is reused, what is made again; and the bias that evaluation may add."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from PIL import Image
from training import at_each_save

import softcache
from softcache.cli import main
from softcache.config import DumpConfig, EvalConfig, ShrinkConfig, TrainConfig, resolve
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
from softcache.errors import ConfigError, DataError, ModelError, SoftcacheError
from softcache.evaluate import measure
from softcache.evaluate.bias import best_shift
from softcache.report.chart import figure_of
from softcache.reproduce import flow as reproduce
from softcache.reproduce import steps
from softcache.reproduce.recipe import BUDGETS, Step, parse_recipe, read_recipe, recipe_names
from softcache.students import cost
from softcache.train.stages import parse_stages

SMALL = """
title = "a table"
source = "nobody (2026)"
[data]
train = "synthetic:images?classes=4&size=8&channels=1&count=64"
test = "synthetic:images?classes=4&size=8&channels=1&count=32&split=test"
[train]
data = "train"
eval_data = "test"
epochs = 2
threads = 1
student = "softcache:mlp?hidden=8"
[[step]]
name = "teacher"
seeds = false
label = "the teacher"
train = {student = "softcache:mlp?hidden=16"}
[[step]]
name = "cache"
dump = {data = "train", teacher = ["teacher"], threads = 1}
[[step]]
name = "student"
paper = 3
tolerance = 1
train = {cache = "cache", loss = ["kd:temperature=2"]}
[[step]]
name = "biased"
metric = "class_errors"
class = "2"
paper = 1
eval = {run = "student", data = "test", bias = ["2=1.5"], threads = 1}
[budget.short]
train = {epochs = 1}
steps = {student = {lr = 0.5}}
seeds = [7]
"""

DATA = {
    "train": "synthetic:images?classes=4&size=8&channels=1&count=64",
    "test": "synthetic:images?classes=4&size=8&channels=1&count=32&split=test",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "read_recipe", lambda name, budget, only=(): parse_recipe(name, SMALL, budget, only))


# ---------------------------------------------------------------------------------------------------------- what they say


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_consistent_at_every_budget(name: str, budget: str) -> None:
    recipe = read_recipe(name, budget)
    known: dict[str, str] = {}
    for step in recipe.steps:
        settings = dict(step.settings)
        for key in ("data", "eval_data", "bias_data"):
            assert settings.get(key) is None or settings[key] in recipe.data
        for key, name_of in step.named():
            built_on = known.get(name_of, "model")
            kinds = {"cache": ("dump",), "run": ("train", "dump", "model")}
            assert built_on in kinds.get(key, ("train", "shrink", "model"))
        settings.pop("run", None)
        Policy.parse(settings.get("policy", ()), 0)
        if step.kind == "train":
            parse_stages(resolve(TrainConfig, flags={**settings, "out": "x"}).config)
        else:
            kind: Any = {"eval": EvalConfig, "dump": DumpConfig, "shrink": ShrinkConfig}[step.kind]
            resolve(kind, flags=settings if step.kind == "eval" else {**settings, "out": "x"})
        known[step.name] = step.kind
    assert any(step.label for step in recipe.steps) and recipe.estimate != "not estimated"
    assert recipe.seeds


def test_budgets_change_data_settings_and_seeds() -> None:
    paper, short = (parse_recipe("small", SMALL, budget) for budget in ("paper", "short"))
    assert [step.settings.get("epochs") for step in paper.steps] == [2, None, 2, None]
    assert [step.settings.get("epochs") for step in short.steps] == [1, None, 1, None]
    assert [step.settings.get("lr") for step in short.steps] == [None, None, 0.5, None]
    assert (paper.seeds, short.seeds) == ((0, 1, 2), (7,))
    assert [step.seeded for step in paper.steps] == [False, False, True, True]
    assert [step.label for step in paper.steps] == ["the teacher", "", "student", "biased"]


def test_a_step_for_each_pair() -> None:
    text = """
title = "t"
source = "s"
[words]
more = ",x=1"
lr = 0.3
[pair.big-small]
teacher = "mlp?hidden=9"
lr = 0.1
paper = {alone = 5.5}
[pair.other]
teacher = "cnn"
lr = 0.2
[[step]]
name = "{pair}-teacher"
label = "{teacher} alone"
each = true
paper = "alone"
train = {student = "softcache:{teacher}", eval_data = "x", lr = "{lr}", loss = ["ce:weight={lr}{more}"]}
[budget.smoke]
pairs = ["other"]
"""
    one, other = parse_recipe("r", text, "paper").steps
    assert (one.name, one.label, one.paper) == ("big-small-teacher", "mlp?hidden=9 alone", 5.5)
    assert one.settings == {
        "student": "softcache:mlp?hidden=9",
        "eval_data": "x",
        "lr": 0.1,
        "loss": ["ce:weight=0.1,x=1"],
    }
    assert (other.name, other.paper) == ("other-teacher", None)
    assert [step.name for step in parse_recipe("r", text, "smoke").steps] == ["other-teacher"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "titel", r"unknown key 'titel'\n.*'title'"),
        ("paper = 3", "papers = 3", r"step 'student': unknown key 'papers'"),
        ('metric = "class_errors"', 'metric = "class_error"', r"unknown metric 'class_error'\n.*'class_errors'"),
        ("dump = {data", "dumb = {data", "step 'cache': unknown key 'dumb'"),
        ('name = "cache"', 'name = "teacher"', "its steps need names of their own"),
        ("steps = {student", "steps = {students", "unknown key 'students'"),
        ("[data]", "[data", "not TOML"),
        ('title = "a table"\n', "", "has no 'title'"),
        ("paper = 3", 'paper = "three"', "'three' names a number of a pair, and the step has no `each`"),
        ("paper = 3", "paper = [3]", r"paper cannot be \[3\]"),
        ("tolerance = 1", "tolerance = true", "tolerance cannot be True"),
        ("seeds = [7]", "seeds = [true]", "seeds are whole numbers"),
        ("seeds = [7]", "seeds = 7", "seeds cannot be 7"),
        ("seeds = [7]", 'pairs = ["x"]', "unknown key 'x'"),
        ("seeds = false", "each = true", "for each pair, and there is none"),
        ("seeds = false", 'each = ["x"]', "unknown key 'x'"),
        ('eval_data = "test"\n', "", "a train step without evaluation has none"),
        ('name = "cache"', 'name = "cache"\nlabel = "x"', "a dump step without evaluation has none"),
        ('class = "2"\n', "", "add class = NAME"),
        ('train = {student = "softcache:mlp?hidden=16"}', "train = 5", "train cannot be 5"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError, match=message):
        parse_recipe("small", SMALL.replace(old, new, 1), "short")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('cache = "cache", loss', 'cache = "cash", loss', r"step 'student': cache 'cash' is no step before it\n.*'cache'"),
        ('teacher = ["teacher"]', 'teacher = ["student"]', r"step 'cache': teacher 'student' is no step before it"),
        ("seeds = false", "", r"step 'cache' is done once, 'teacher' once for each seed"),
        ('seeds = [7]', 'use = {cache = "x"}', r"unknown key 'cache'"),
    ],
)  # fmt: skip
def test_what_a_step_builds_on_comes_before_it(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError, match=message):
        parse_recipe("small", SMALL.replace(old, new, 1), "short")


def test_steps_are_done_pair_by_pair_and_shared_ones_once() -> None:
    text = """
title = "t"
source = "s"
[pair.a]
teacher = "mlp"
[pair.b]
teacher = "mlp"
[[step]]
name = "teacher-{teacher}"
each = true
train = {student = "softcache:{teacher}"}
[[step]]
name = "{pair}-kd"
each = true
train = {student = "softcache:{teacher}"}
[[step]]
name = "{pair}-at"
each = ["b"]
train = {student = "softcache:{teacher}"}
[budget.short]
only = ["*-at"]
"""
    assert [step.name for step in parse_recipe("r", text, "paper").steps] == ["teacher-mlp", "a-kd", "b-kd", "b-at"]
    assert [step.name for step in parse_recipe("r", text, "short").steps] == ["b-at"]
    assert [step.name for step in parse_recipe("r", text, "short", ["a-*"]).steps] == ["a-kd"]


def test_unknown_recipes_and_budgets() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'digit'\n.*'digits'"):
        read_recipe("digit")
    with pytest.raises(ConfigError, match=r"--budget long: unknown"):
        read_recipe("digits", "long")


# ------------------------------------------------------------------------------------------------------------ working through


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_what_is_there_is_reused_and_what_was_deleted_is_made_again(tmp_path: Path) -> None:
    first = reproduce.run("small", seeds=[0, 1], out=tmp_path, quiet=True)
    assert (first.done, first.reused) == (6, 0)
    (student,) = [row for row in first.rows if row.label == "student"]
    assert len(student.values) == 2 and student.verdict in ("reached", "not reached")
    again = reproduce.run("small", seeds=[0, 1], out=tmp_path, quiet=True)
    assert (again.done, again.reused) == (0, 6)
    assert [row.values for row in again.rows] == [row.values for row in first.rows]

    (one,) = [path for path in first.folder.iterdir() if path.is_dir() and path.name.startswith("student-1")]
    shutil.rmtree(one)
    third = reproduce.run("small", seeds=[0, 1], out=tmp_path, quiet=True)
    assert (third.done, third.reused) == (1, 5)
    assert [row.values for row in third.rows] == [row.values for row in first.rows]

    (tmp_path / "small").rename(tmp_path / "elsewhere")
    (tmp_path / "new").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "new/small")
    more = reproduce.run("small", seeds=[0, 1, 2], out=tmp_path / "new", quiet=True)
    assert (more.done, more.reused) == (2, 6)
    kept = json.loads((more.folder / "table.json").read_text())
    (made,) = kept["made"]
    assert made["torch"] == torch.__version__ and made["device"].startswith(("cpu", "cuda")) and kept["data"]["train"]
    assert kept["seeds"] == [0, 1, 2] and [row["label"] for row in kept["rows"]] == ["the teacher", "student", "biased"]
    assert "student" in more.text() and "paper" in more.text()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    whole = reproduce.run("small", seeds=[0], out=tmp_path / "whole", quiet=True)
    saved: list[str] = []

    def stopped(out: Path, _: Any) -> None:
        saved.append(out.name.partition("-")[0])
        if saved == ["teacher", "teacher", "student"]:
            raise KeyboardInterrupt

    with at_each_save(stopped):
        with pytest.raises(KeyboardInterrupt):
            reproduce.run("small", seeds=[0], out=tmp_path / "parts", quiet=True)
        rest = reproduce.run("small", seeds=[0], out=tmp_path / "parts", quiet=True)
    assert saved == ["teacher", "teacher", "student", "student"]  # two epochs each, none of them twice
    assert (rest.done, rest.reused) == (2, 2)
    assert [row.values for row in rest.rows] == [row.values for row in whole.rows]


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SMALL)
    done = reproduce.run(str(tmp_path / "mine.toml"), budget="short", only=["teacher"], out=tmp_path, quiet=True)
    assert done.folder == tmp_path / "mine/short" and done.recipe.title == "a table"
    with pytest.raises(ConfigError, match=r"there is no recipe file .*none\.toml"):
        read_recipe(str(tmp_path / "none.toml"))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_other_data_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    reproduce.run("small", budget="short", out=tmp_path, quiet=True)
    other = "train=synthetic:images?classes=4&size=8&channels=1&count=48"
    changed = reproduce.run("small", budget="short", data=[other], out=tmp_path, quiet=True)
    assert (changed.done, changed.reused) == (4, 0)
    assert [row.verdict for row in changed.rows] == ["", "", ""] and "(short schedule)" in changed.text()
    assert [row.paper for row in changed.rows] == [None, 3, 1]
    smoke = reproduce.run("small", budget="smoke", seeds=[7], out=tmp_path, quiet=True)
    assert [row.paper for row in smoke.rows] == [None, None, None] and "(smoke schedule)" in smoke.text()
    with pytest.raises(ConfigError, match=r"--data 'trian=digits': the recipe has no data 'trian'\n.*'train'"):
        reproduce.run("small", data=["trian=digits"], out=tmp_path)


@pytest.mark.parametrize(
    ("metric", "values", "verdict"),
    [
        ("errors", [13, 11], "reached"),
        ("errors", [13, 12], "not reached"),
        ("errors", [3], "reached"),
        ("top1", [8.5, 7.5], "reached"),
        ("top1", [8.5, 7.25], "not reached"),
        ("top1", [90.0], "reached"),
    ],
)
def test_the_verdict_is_on_the_mean_with_the_tolerance_on_the_worse_side(
    metric: str, values: list[float], verdict: str
) -> None:
    step = Step("s", "train", {}, paper=10, tolerance=2, metric=metric)
    assert reproduce.verdict(step, values, "paper") == verdict
    assert reproduce.verdict(step, values, "short") == ""
    assert reproduce.verdict(replace(step, paper=None), values, "paper") == ""


def with_changes(monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> None:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    monkeypatch.setattr(reproduce, "read_recipe", lambda name, budget, only=(): parse_recipe(name, text, budget, only))


@pytest.mark.slow
def test_every_number_is_that_of_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_changes(monkeypatch, ("epochs = 2", "epochs = 8\nlr = 0.5"))
    done = reproduce.run("small", seeds=[3, 5], out=tmp_path, quiet=True)
    teacher, student, biased = done.rows
    for place, seed in enumerate((3, 5)):
        (run,) = done.folder.glob(f"student-{seed}-*/")
        assert json.loads((run / "run.json").read_text())["config"]["seed"] == seed
        epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert student.values[place] == epochs[-1]["eval_errors"]
        assert student.best[place] == min(epoch["eval_errors"] for epoch in epochs)
        config = EvalConfig(data=DATA["test"], bias=("2=1.5",), threads=1, device="cpu")
        assert biased.values[place] == measure.run(str(run), config, quiet=True).class_errors["2"][0]
    (run,) = done.folder.glob("teacher-*/")
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert teacher.seconds == pytest.approx(sum(epoch["seconds"] for epoch in epochs)) and teacher.seconds > 0
    assert student.best != student.values or teacher.best != teacher.values  # or the two were never told apart
    assert len(teacher.values) == 1 and len(student.values) == 2
    assert student.seconds > 0


@pytest.mark.slow
def test_another_metric_of_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_changes(monkeypatch)
    first = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    with_changes(monkeypatch, ("paper = 3\n", 'paper = 3\nmetric = "top1"\n'), ('class = "2"', 'class = "1"'))
    second = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    assert (second.done, second.reused) == (0, 4)
    assert second.rows[1].values[0] == pytest.approx(100 - 100 * first.rows[1].values[0] / 32)
    (run,) = second.folder.glob("student-0-*/")
    config = EvalConfig(data=DATA["test"], bias=("2=1.5",), threads=1, device="cpu")
    assert second.rows[2].values == [measure.run(str(run), config, quiet=True).class_errors["1"][0]]
    assert second.rows[2].metric == "errors on 1"
    with_changes(monkeypatch, ("paper = 3\n", 'paper = 3\nmetric = "class_errors"\nclass = "1"\n'))
    third = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True).rows[1]
    config = EvalConfig(data=DATA["test"], threads=1, device="cpu")
    assert third.values == [measure.run(str(run), config, quiet=True).class_errors["1"][0]]
    assert third.best == []  # an epoch's row does not tell the errors of a class
    with_changes(monkeypatch, ('class = "2"', 'class = "two"'))
    with pytest.raises(DataError, match="no class 'two'"):
        reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "done"),
    [
        pytest.param(('bias = ["2=1.5"]', 'bias = ["2=1"]'), 1, id="bias"),
        pytest.param(("temperature=2", "temperature=3"), 2, id="loss"),
        pytest.param(('hidden=16"', 'hidden=17"'), 4, id="teacher"),
        pytest.param(("count=32", "count=31"), 3, id="eval-data"),
    ],
)
def test_what_a_change_makes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], done: int
) -> None:
    with_changes(monkeypatch)
    reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    with_changes(monkeypatch, change)
    again = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    assert (again.done, again.reused) == (done, 4 - done)


def test_a_renamed_teacher_is_another_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_changes(monkeypatch)
    reproduce.run("small", seeds=[0], only=["cache"], out=tmp_path, quiet=True)
    with_changes(monkeypatch, ('name = "teacher"', 'name = "boss"'), ('teacher = ["teacher"]', 'teacher = ["boss"]'))
    done = reproduce.run("small", seeds=[0], only=["cache"], out=tmp_path, quiet=True)
    members = {softcache.open(path).members for path in done.folder.glob("cache-*/")}
    assert members == {("teacher",), ("boss",)}


def test_data_that_changed_and_data_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "one/points.tsv"
    source.parent.mkdir()
    source.write_text("".join(f"word{i % 4} and{i}\t{i % 4}\n" for i in range(40)))
    changes = [
        ('train = "synthetic:images?classes=4&size=8&channels=1&count=64"', 'train = "tsv:{root}/points.tsv"'),
        ('test = "synthetic:images?classes=4&size=8&channels=1&count=32&split=test"', 'test = "tsv:{root}/points.tsv"'),
        ("softcache:mlp?hidden=8", "softcache:textcnn?width=4"),
        ('train = {student = "softcache:mlp?hidden=16"}', "train = {}"),
    ]
    with_changes(monkeypatch, *changes)

    def again() -> tuple[int, int]:
        (path,) = tmp_path.glob("*/points.tsv")
        root = str(path.parent)
        done = reproduce.run("small", only=["teacher"], data_root=root, out=tmp_path / "out", quiet=True)
        return done.done, done.reused

    assert again() == (1, 0)
    source.parent.rename(tmp_path / "two")
    assert again() == (0, 1)
    with (tmp_path / "two/points.tsv").open("a") as file:
        file.write("word1 more\t1\n")
    assert again() == (1, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "spoiled",
    ["", "{}", '{"of": 1, "outcome": {}}', "[]", "LAST", "OTHER", "STUDENT"],
    ids=lambda text: text or "empty",
)
def test_a_note_that_is_not_whole_is_not_believed(tmp_path: Path, spoiled: str) -> None:
    first = reproduce.run("small", seeds=[0], only=["teacher"], out=tmp_path, quiet=True)
    (note,) = first.folder.glob("*.result.json")
    (run,) = first.folder.glob("teacher-*/")
    kept = json.loads(note.read_text())
    if spoiled == "STUDENT":
        shutil.rmtree(run)
        run.mkdir()
    elif spoiled in ("LAST", "OTHER"):
        changed = {"LAST": {"outcome": {**kept["outcome"], "last": "abc"}}, "OTHER": {"of": "0" * 64}}[spoiled]
        note.write_text(json.dumps({**kept, **changed}))
    else:
        note.write_text(spoiled)
    again = reproduce.run("small", seeds=[0], only=["teacher"], out=tmp_path, quiet=True)
    assert (again.done, again.reused) == (1, 0)
    assert again.rows[0].values == first.rows[0].values
    assert json.loads(note.read_text())["of"] == kept["of"]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_what_was_finished_but_not_noted_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    for note in first.folder.glob("*.result.json"):
        note.unlink()
    monkeypatch.setattr(steps.dump, "run", lambda *_, **__: pytest.fail("it dumps again"))
    with at_each_save(lambda *_: pytest.fail("it learns again"), before=True):
        again = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    assert [row.values for row in again.rows] == [row.values for row in first.rows]


def test_root_device_and_models_of_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_changes(monkeypatch, ("seeds = [7]", 'seeds = [7]\nuse = {teacher = "softcache:mlp?hidden=8@STUDENT"}'))
    with pytest.raises(ModelError, match="there are no weights STUDENT"):
        reproduce.run("small", budget="short", out=tmp_path, quiet=True)
    with_changes(monkeypatch, ('train = "synthetic', 'train = "{root}:synthetic'))
    with pytest.raises(SoftcacheError, match="here:synthetic"):
        reproduce.run("small", data_root="here", out=tmp_path, quiet=True)
    with_changes(monkeypatch)
    with pytest.raises(ConfigError, match="unknown device 'tpu0'"):
        reproduce.run("small", device="tpu0", out=tmp_path, quiet=True)


@pytest.mark.usefixtures("small")
def test_download_is_passed_on_and_makes_no_other_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(spec: str, **settings: Any) -> Any:
        asked.append(settings.pop("download"))
        return open_transfer_set(spec, **settings)

    for name, module in sys.modules.items():
        if (
            name.startswith("softcache.")
            and "open_transfer_set" in vars(module)
            and not name.startswith("softcache.data")
        ):
            monkeypatch.setattr(module, "open_transfer_set", opened)
    first = reproduce.run("small", seeds=[0], download=True, out=tmp_path, quiet=True)
    assert set(asked) == {True}
    again = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True)
    assert (again.done, again.reused) == (0, first.done) and asked[-1] is False


@pytest.mark.usefixtures("small")
def test_what_is_given_in_vain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--data gives 'train' twice: digits and synthetic:images"):
        reproduce.run("small", data=["train=digits", "train=synthetic:images"], out=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="--use gives 'teacher' twice: a and b"):
        reproduce.run("small", models=["teacher=a", "teacher=b"], out=tmp_path, quiet=True)
    assert main(["reproduce", "LIST", "--seeds", "1"]) == 2
    assert "--seeds needs a recipe; LIST only lists them" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_seeds_of_a_recipe_whose_steps_are_all_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SMALL[: SMALL.index('[[step]]\nname = "cache"')]
    monkeypatch.setattr(reproduce, "read_recipe", lambda name, budget, only=(): parse_recipe(name, text, budget, only))
    with pytest.raises(ConfigError, match="--seeds 1,2: every step of small is done once"):
        reproduce.run("small", seeds=[1, 2], out=tmp_path, quiet=True)


@pytest.mark.usefixtures("small")
def test_seeds_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seeds 1,1: a seed is given twice"):
        reproduce.run("small", seeds=[1, 1], out=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match=r"--seed 99999999999: must be between 0 and"):
        reproduce.run("small", seeds=[99999999999], out=tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('loss = ["kd:temperature=2"]', "seed = 7", "seed = 7 would win over --seeds"),
        ("epochs = 2", "epochs = 2\nseed = 7", "seed = 7 would win over --seeds"),
        ("steps = {student = {lr = 0.5}}", "steps = {student = {seed = 7}}", "seed = 7 would win over --seeds"),
        ('loss = ["kd:temperature=2"]', 'out = "elsewhere"', "train cannot set out"),
        ('teacher = ["teacher"]', 'teacher = ["teacher"], part = "1/2"', "dump cannot set part"),
    ],
)
def test_what_a_recipe_has_a_place_for_is_not_set_in_a_step(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe("small", SMALL.replace(old, new, 1), "short")
    once = SMALL.replace("seeds = false", "seeds = false\n").replace('hidden=16"', 'hidden=16", seed = 7')
    assert parse_recipe("small", once, "paper").steps[0].settings["seed"] == 7  # done once, with a seed of its own


def test_a_step_has_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = 'stage = [{epochs = 1, freeze = ["0"], loss = ["ce"]}, {epochs = 2, lr = 0.01}]'
    with_changes(
        monkeypatch, ('{student = "softcache:mlp?hidden=16"}', f'{{student = "softcache:mlp?hidden=16", {stages}}}')
    )
    done = reproduce.run("small", only=["teacher"], out=tmp_path, quiet=True)
    (run,) = done.folder.glob("teacher-*/")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0, 1, 1]
    assert json.loads((run / "run.json").read_text())["config"]["stage"] == [
        "epochs=1 freeze=0 loss=ce",
        "epochs=2 lr=0.01",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('loss = ["kd:temperature=2"]', 'loss = ["kd:temprature=2"]'), "temprature"),
        (("epochs = 2", "epoch = 2"), "'epochs'"),
        (("bias = [", "bais = ["), "'bias'"),
        # of the last steps, and of what only the verb itself would refuse
        (('bias = ["2=1.5"]', 'bias = ["9=1.5"]'), "no class '9'"),
        (('class = "2"', 'class = "two"'), "no class 'two'"),
        (('bias = ["2=1.5"]', "temperature = 0"), "--temperature 0.0: must be > 0"),
        (
            ('loss = ["kd:temperature=2"]', 'loss = ["hint"]'),
            "'hint' learns from features, and step 'cache' keeps none",
        ),
        (('loss = ["kd:temperature=2"]', 'members = ["boss"]'), "step 'cache' has no teacher 'boss'"),
        (('loss = ["kd:temperature=2"]', 'student = "softcache:mpl"'), "softcache has no model 'mpl'"),
        (('loss = ["kd:temperature=2"]', 'student = "softcache:mlp?hiden=3"'), "unknown parameter 'hiden'"),
        (('loss = ["kd:temperature=2"]', "accumulate = 0"), "--accumulate 0: must be at least 1"),
        (
            ('loss = ["kd:temperature=2"]', 'policy = ["shift:pixels=1"]'),
            "--policy and --cache cannot be given together",
        ),
        (('loss = ["kd:temperature=2"]', "stage = [{epochs = 0}]"), "--stage 1: epochs 0: must be at least 1"),
        (('loss = ["kd:temperature=2"]', 'data = "trian"'), "trian"),
        (('loss = ["kd:temperature=2"]', 'classes = ["7"]'), "no class '7'"),
        (('teacher = ["teacher"]', 'teacher = ["teacher"], codec = "topk:j=3"'), "'j'"),
        (('teacher = ["teacher"]', 'teacher = ["teacher"], views = 2'), "every view of this policy is the same"),
        (('teacher = ["teacher"]', 'teacher = ["teacher"], for = ["hnit"]'), "--for hnit: unknown loss"),
        (
            ('loss = ["kd:temperature=2"]', 'stage = [{freeze = ["net"]}]'),
            "--freeze net: the student has no parameters",
        ),
        (("&split=test", "&split=tset"), "tset"),
    ],
)
def test_mistakes_in_settings_are_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    with_changes(monkeypatch, change)
    with pytest.raises(SoftcacheError, match=message):
        reproduce.run("small", out=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_the_list_shows_every_recipe_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("LIST", "list"):
        assert main(["reproduce", word]) == 0
        head, _line, *lines = capsys.readouterr().out.splitlines()
        assert head.split()[:2] == ["recipe", "table"] and head.split()[2:] == list(BUDGETS)
        text = " ".join(lines)
        for name in recipe_names():
            assert f"{name} " in text
        (digits,) = [line for line in lines if line.startswith("digits ")]
        assert read_recipe("digits", "smoke").estimate in digits


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_only_some_steps_and_what_they_build_on(tmp_path: Path) -> None:
    first = reproduce.run("small", seeds=[0], only=["cach?"], out=tmp_path, quiet=True)
    assert (first.done, first.reused, [row.label for row in first.rows]) == (2, 0, ["the teacher"])
    assert "the teacher" in first.text() and "none of its rows" in replace(first, rows=()).text()
    assert "the teacher" in (first.folder / "table.only.txt").read_text()
    rest = reproduce.run("small", seeds=[0], only=["bi*"], out=tmp_path, quiet=True)
    assert (rest.done, rest.reused, [row.label for row in rest.rows]) == (2, 2, ["the teacher", "student", "biased"])
    whole = reproduce.run("small", seeds=[0], out=tmp_path, quiet=True).text()
    part = reproduce.run("small", seeds=[0], only=["teacher"], out=tmp_path, quiet=True)
    assert (part.folder / "table.txt").read_text() == whole + "\n"
    assert (part.folder / "table.only.txt").read_text() == part.text() + "\n"
    with pytest.raises(ConfigError, match=r"--only cachet: no step of small at this budget has such a name\n.*'cache'"):
        reproduce.run("small", only=["cachet"], out=tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_model_in_the_place_of_a_step(tmp_path: Path) -> None:
    own = reproduce.run("small", seeds=[0], out=tmp_path / "own", quiet=True)
    (teacher,) = [path for path in own.folder.iterdir() if path.is_dir() and path.name.startswith("teacher-")]
    changed = reproduce.run("small", seeds=[0], models=[f"teacher={teacher}"], out=tmp_path / "other", quiet=True)
    assert [row.values for row in changed.rows] == [row.values for row in own.rows]
    assert not list(changed.folder.glob("teacher-*/"))
    shutil.copytree(own.folder, tmp_path / "copy")
    (copied,) = [path for path in (tmp_path / "copy").iterdir() if path.is_dir() and path.name == teacher.name]
    shutil.copyfile(next(own.folder.glob("student-0-*/")) / "student.safetensors", copied / "student.safetensors")
    other = reproduce.run("small", seeds=[0], models=[f"teacher={copied}"], out=tmp_path / "other", quiet=True)
    assert other.done == 4 and other.rows[0].values == own.rows[1].values
    again = reproduce.run("small", seeds=[0], models=[f"teacher={teacher}"], out=tmp_path / "other", quiet=True)
    assert (again.done, again.reused) == (0, 4)
    (student,) = [path for path in own.folder.iterdir() if path.is_dir() and path.name.startswith("student-")]
    untaught = f"teacher=softcache:mlp?hidden=8@{student}"
    third = reproduce.run("small", seeds=[0], models=[untaught], out=tmp_path / "other", quiet=True)
    assert third.rows[0].values == own.rows[1].values
    assert (third.done, third.reused) == (2, 2)  # the same weights as those copied: its cache has the same id
    with pytest.raises(ConfigError, match=r"--use 'cache=x': the recipe has no training step 'cache'"):
        reproduce.run("small", models=["cache=x"], out=tmp_path)


@pytest.mark.usefixtures("small")
@needs("matplotlib", "demo")
def test_the_table_as_text_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = reproduce.run("small", seeds=[0, 1], out=tmp_path)
    lines = done.text().splitlines()
    head = next(line for line in lines if "paper" in line)
    assert head.split("  ")[-1] == "minutes" and all(f"seed {seed}" in head for seed in (0, 1)) and "verdict" in head
    (row,) = [line for line in lines if line.startswith("student")]
    (told,) = [one for one in done.rows if one.label == "student"]
    assert [float(cell) for cell in row.split()[2:4]] == [3, pytest.approx(np.mean(told.values))]
    assert float(row.split()[4]) == pytest.approx(np.std(told.values, ddof=1), abs=0.005)
    assert (done.folder / "table.txt").read_text() == done.text() + "\n"
    kept = json.loads((done.folder / "table.json").read_text())
    assert kept["rows"][1]["values"] == list(told.values)
    with Image.open(done.folder / "table.png") as picture:
        picture.load()
        assert picture.width > 600 and len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert "1/4  train teacher" in capsys.readouterr().err


@needs("matplotlib", "demo")
def test_the_picture_shows_every_seed_the_mean_and_the_papers_number_in_its_row() -> None:
    def row(label: str, metric: str, paper: float | None, *values: float) -> reproduce.Row:
        return reproduce.Row(label, metric, paper, values, values, "", 1.0)

    rows = [
        row("teacher", "errors", 10.0, 12.0),
        row("  student", "errors", None, 20.0, 30.0),
        row("two", "top1", 70.0, 60.0),
        row("three", "errors", 40.0, 50.0, 52.0),
    ]
    figure = figure_of("a title", rows)
    errors, top1 = figure.axes
    ours, means, paper = (collection.get_offsets().tolist() for collection in errors.collections)
    assert ours == [[12, 0], [20, 1], [30, 1], [50, 2], [52, 2]]
    assert means == [[12, 0], [25, 1], [51, 2]] and paper == [[10, 0], [40, 2]]
    assert [text.get_text() for text in errors.get_yticklabels()] == ["teacher", "student", "three"]
    assert errors.yaxis_inverted() and "top1" in top1.get_xlabel()
    labels = [collection.get_label() for collection in errors.collections]
    assert labels == ["ours, each seed", "ours, mean", "paper"]


@pytest.mark.usefixtures("small")
def test_a_step_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        reproduce.run("small", data=["test=nowhere"], out=tmp_path, quiet=True)
    assert "in step 'teacher' of recipe 'small'" in caught.value.__notes__


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_at_smoke_budget(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    done = reproduce.run(name, budget="smoke", out=tmp_path, quiet=True)
    assert done.rows and all(row.values for row in done.rows)


# ------------------------------------------------------------------------------------------------------------------ biases


@pytest.mark.parametrize("classes", [[3], [1, 4]])
def test_the_best_shift_makes_as_few_errors_as_any(classes: list[int]) -> None:
    draw = np.random.default_rng(5)
    labels = draw.integers(-1, 6, 400)
    logits = draw.normal(0, 2, (400, 6))
    logits[np.arange(400), labels.clip(0)] += 3
    logits[:, classes] -= 4  # as after training without them

    def errors(shift: float) -> int:
        moved = logits.copy()
        moved[:, classes] += shift
        return int(((moved.argmax(axis=1) != labels) & (labels >= 0)).sum())

    found = best_shift(torch.from_numpy(logits), torch.from_numpy(labels), classes)
    fewest = min(errors(shift) for shift in np.linspace(-15, 15, 3001))
    assert errors(found) == fewest < errors(0.0)


def test_no_shift_of_classes_that_nobody_has() -> None:
    logits = torch.tensor([[2.0, 0.0, -50.0], [0.0, 2.0, -50.0]])
    with pytest.raises(ConfigError, match="no shift of these classes"):
        best_shift(logits, torch.tensor([-1, -1]), [2])


# -------------------------------------------------------------------------------------------------------------- other data


@pytest.mark.slow
def test_rows_of_any_set() -> None:
    pytest.importorskip("sklearn", reason="needs the extra softcache[demo]")
    whole = open_transfer_set("digits")
    part = open_transfer_set("digits?rows=10-19")
    assert list(part.keys) == list(whole.keys)[10:20] and (part.labels == whole.labels[10:20]).all()
    for bad in ("9", "19-10", "0-1297", "a-b"):
        with pytest.raises(ConfigError, match=f"rows={bad} is no range of its 1297 samples"):
            open_transfer_set(f"digits?rows={bad}")


def test_synthetic_sets_are_the_same_everywhere_and_can_be_learned() -> None:
    one, other = (open_transfer_set("synthetic:images?classes=3&size=8&count=40") for _ in range(2))
    assert all((one.load(i)[0] == other.load(i)[0]).all() for i in range(40)) and one.load(0)[0].shape == (8, 8, 3)
    test = open_transfer_set("synthetic:images?classes=3&size=8&count=40&split=test")
    means = [np.mean([one.load(i)[0] for i in np.flatnonzero(one.labels == c)], axis=0) for c in range(3)]
    nearest = [int(np.argmin([np.square(test.load(i)[0] - m).sum() for m in means])) for i in range(40)]
    assert nearest == test.labels.tolist()
    texts = open_transfer_set("synthetic:texts?count=30")
    own = [f"c{label}w" in texts.load(i)[0] for i, label in enumerate(texts.labels)]
    assert np.mean(own) > 0.9 and not any(f"c{1 - label}w" in texts.load(i)[0] for i, label in enumerate(texts.labels))
    with pytest.raises(ConfigError, match="no split 'dev'"):
        open_transfer_set("synthetic:images?split=dev")
    with pytest.raises((ConfigError, DataError), match="no such synthetic data"):
        open_transfer_set("synthetic:sounds")

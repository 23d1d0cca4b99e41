"""What a recipe says: a paper's table as steps that train, dump, shrink and evaluate, each with the paper's number beside it.

A recipe is a TOML file, in softcache/reproduce/recipes or one of your own. At the top level stand the settings of the paper
budget; the tables `short` and `smoke` change data and settings for smaller ones.

    title, source, about     whose table, and what to know of it
    [data]                   name -> data spec; {root} is --data-root
    [train] [dump] [shrink] [eval]  settings of every such step: the verb's flags, with _ for -
    [pair.NAME]              words that a step with `each` is written with: it is done for every pair (`each = true`) or for
                             those it names, {word} replaced in all of its strings, {pair} by NAME; where its `paper` is a
                             string, the number is that entry of the pair's `paper`. Steps with `each` that follow one another
                             are done pair by pair, and one that two pairs share once. [words]: of every pair.
    [[step]]                 name, and one of train, dump, shrink, eval: its own settings; `seeds`: once for each seed (true for
                             those that train and evaluate); what they build on is named by `teacher`, `cache`, `init_from`,
                             `run`, `bias_model`, of shrink `model`, and by a `student` that is an earlier step
      label                  of its row of the table; by default its name where it has a paper's number
      column                 of its number: steps of the same label stand in one row, which begins with what the model costs
      beside                 an earlier step, with whose model a trained one is compared in what it costs (shrink does so itself)
      paper, tolerance       the number in the table, and how far ours may be worse
      metric, class          errors, top1 (percent), or class_errors of a class; of students without classes nearest_neighbour,
                             linear_probe, cosine, r2_teacher, ... (shares in percent)
    [budget.paper] [budget.short] [budget.smoke]
                             estimate; data, train, dump, shrink, eval: these settings win over the above and over the steps';
                             steps: name -> settings, which win over all; pairs, seeds; only: patterns of the names of the
                             steps it keeps, beside those that they build on; use: training step -> a model in its place
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from softcache.config import parse_toml, read_toml
from softcache.errors import ConfigError, nearest
from softcache.evaluate.evaluation import OTHER_NUMBERS

BUDGETS = ("smoke", "short", "paper")
DATA = ("data", "eval_data", "bias_data")  # settings that may name the recipe's data
REFERENCES = (
    "teacher",
    "cache",
    "init_from",
    "run",
    "bias_model",
    "model",
)  # settings that name an earlier step or a model
STUDENT = "student"  # a setting that may name an earlier step, and mostly says what to build
BESIDE = "beside"
KINDS = ("train", "dump", "shrink", "eval")
SEEDED = ("train", "eval")  # kinds that are done once for each seed by default
METRICS = ("errors", "top1", "class_errors", *OTHER_NUMBERS)
_TOP = {
    "title": str, "source": str, "about": str, "data": dict, "train": dict, "dump": dict, "shrink": dict, "eval": dict,
    "words": dict, "pair": dict, "step": list, "budget": dict,
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
MANY_STEPS, LONG_TEXT = 2_000, 2**16
_TYPE_NAMES = {str: "a string", dict: "a table", list: "a list", bool: "true or false", int: "a number"}
_STEP = {
    "name": str, "label": str, "each": (bool, list), "seeds": bool, "paper": (int, float, str), "tolerance": (int, float),
    "metric": str, "class": str, "column": str, "beside": str, "train": dict, "dump": dict, "shrink": dict, "eval": dict,
}  # fmt: skip
_BUDGET = {
    "estimate": str, "data": dict, "train": dict, "dump": dict, "shrink": dict, "eval": dict, "pairs": list, "only": list,
    "use": dict, "steps": dict, "seeds": list,
}  # fmt: skip


_FOLDER = "the recipe gives each step its folder"
NOT_OF_A_STEP: dict[str, dict[str, str]] = {
    "train": {"out": _FOLDER},
    "dump": {
        "out": _FOLDER,
        "part": "a step is done whole",
        "extend": "each dump is a cache of its own",
        "list_modules": "it lists and dumps nothing",
    },
    "shrink": {"out": _FOLDER, "scan": "it writes nothing"},
    "eval": {},
}


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: by which other steps refer to it, and its folder.
        kind: "train", "dump", "shrink" or "eval".
        settings: of the verb; `data`, `eval_data` and `bias_data` may name the recipe's data, REFERENCES its earlier steps.
        label: of its row; empty: it has none.
        seeded: it is done once for each seed.
        paper: the published number; None where there is none.
        tolerance: how far from it counts as reached, in the metric's unit.
        metric: what is compared.
        of_class: of the metric "class_errors".
        column: of its number in the row; empty: the row is its own.
        beside: the earlier step with whose model a trained one is compared in what it costs; empty: it is not.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    label: str = ""
    seeded: bool = True
    paper: float | None = None
    tolerance: float | None = None
    metric: str = "errors"
    of_class: str = ""
    column: str = ""
    beside: str = ""

    def named(self) -> Iterator[tuple[str, str]]:
        """(setting, name) of whatever it builds on: an earlier step, or a model. A STUDENT may also be what to build."""
        for key in REFERENCES:
            value = self.settings.get(key, ())
            for name in (value,) if isinstance(value, str) else value:
                yield key, step_of(name) if key == "teacher" else name
        if isinstance(student := self.settings.get(STUDENT), str):
            yield STUDENT, student
        if self.beside:
            yield BESIDE, self.beside


def step_of(teacher: str) -> str:
    """The step that a teacher is of: `dense` of `dense?head=none`; what is no step stays whole."""
    name, _, words = teacher.partition("?")
    return name if words and NAME.fullmatch(name) else teacher


@dataclass(frozen=True)
class Recipe:
    """A table at one budget.

    Attributes:
        name: of its file.
        title, source: whose table.
        about: what to know of it, in a few lines.
        budget: "smoke", "short" or "paper".
        estimate: how long it takes, in words.
        data: name -> spec.
        steps: in the order they are done.
        seeds: by default.
        use: training step -> model in its place.
    """

    name: str
    title: str
    source: str
    about: str
    budget: str
    estimate: str
    data: Mapping[str, str]
    steps: Sequence[Step]
    seeds: Sequence[int] = (0, 1, 2)
    use: Mapping[str, str] = field(default_factory=dict)

    def only(self, patterns: Sequence[str]) -> Recipe:
        """The steps whose names fit a pattern (`resnet56-*`), and those they build on.

        Raises:
            ConfigError: a pattern that fits none.
        """
        names = [step.name for step in self.steps]
        wanted: set[str] = set()
        for pattern in patterns:
            found = fnmatch.filter(names, pattern)
            if not found:
                raise ConfigError(
                    f"--only {pattern}: no step of {self.name} at this budget has such a name",
                    tip=nearest(pattern, names),
                )
            wanted.update(found)
        for step in reversed(self.steps):
            if step.name in wanted:
                wanted.update(name for _, name in step.named())
        return replace(self, steps=[step for step in self.steps if step.name in wanted])


def recipe_names() -> list[str]:
    """Every recipe in the package."""
    folder = files("softcache.reproduce") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name: str, budget: str = "paper", only: Sequence[str] = ()) -> Recipe:
    """A recipe of the package, or of a file, at a budget.

    Args:
        name: of the recipe, or path of a .toml file.
        budget: "smoke", "short" or "paper".
        only: patterns of steps' names, instead of the budget's own.

    Raises:
        ConfigError: no such recipe or budget (with near names), or a recipe that contradicts itself.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(
                f"there is no recipe file {path}", tip="`softcache reproduce LIST` shows those of the package"
            )
        if path.stem in (".", ".."):
            raise ConfigError(f"{path}: its name would be that of a folder above --out", tip="rename it")
        return parse_recipe(path.stem, read_toml(path), budget, only)
    if name not in recipe_names():
        raise ConfigError(
            f"no recipe {name!r}",
            tip=f"{nearest(name, recipe_names())}; `softcache reproduce LIST` shows them; one of your own: path/to/recipe.toml",
        )
    return parse_recipe(name, (files("softcache.reproduce") / "recipes" / f"{name}.toml").read_bytes(), budget, only)


def parse_recipe(name: str, text: str | bytes, budget: str, only: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`, of the text of a file."""
    if budget not in BUDGETS:
        raise ConfigError(f"--budget {budget}: unknown", tip=nearest(budget, BUDGETS))
    where = f"recipe {name}"
    told = parse_toml(text.encode() if isinstance(text, str) else text, where)
    try:
        return _recipe(name, told, budget, only, where)
    except (TypeError, AttributeError, ValueError, KeyError) as exc:  # a value of another kind than one may write there
        raise ConfigError(f"{where}: cannot be understood: {exc!r}", tip="see the recipes of the package") from exc


def _recipe(name: str, told: Mapping[str, Any], budget: str, only: Sequence[str], where: str) -> Recipe:
    _check_keys(told, _TOP, where, needed=("title", "source", "step"))
    budgets, place = told.get("budget", {}), f"{where}: budget.{budget}"
    _check_keys(budgets, dict.fromkeys(BUDGETS, dict), f"{where}: budget")
    changes = budgets.get(budget, {})
    _check_keys(changes, _BUDGET, place)
    data = {**told.get("data", {}), **changes.get("data", {})}
    _check_keys(data, dict.fromkeys(data, str), f"{where}: data")
    seeds = changes.get("seeds", [0, 1, 2])
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise ConfigError(f"{place}: seeds are whole numbers, found {seeds!r}")
    all_pairs = told.get("pair", {})
    _check_known(changes.get("pairs", ()), all_pairs, f"{place}: pairs")
    pairs = {key: {**told.get("words", {}), **all_pairs[key]} for key in changes.get("pairs", all_pairs)}
    _check_entries(told["step"], all_pairs, where)
    entries = _expanded(told["step"], pairs)
    of_step = changes.get("steps", {})
    steps = [_step(entry, told, changes, of_step, f"{where}: step {entry['name']!r}") for entry in entries]
    names = [step.name for step in steps]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"{where}: its steps need names of their own")
    for one in names:
        if not NAME.fullmatch(one):
            raise ConfigError(
                f"{where}: step {one[:200]!r} would be a folder of this name",
                tip="a name has letters, digits, '-', '_', '+' and '.', and begins with a letter or digit",
            )
    _check_keys(of_step, dict.fromkeys(names, dict), f"{place}.steps")
    trained = [step.name for step in steps if step.kind == "train"]
    _check_keys(changes.get("use", {}), dict.fromkeys(trained, str), f"{place}.use")
    _check_named(steps, where)
    recipe = Recipe(
        name,
        told["title"],
        told["source"],
        told.get("about", "").strip(),
        budget,
        changes.get("estimate", "not estimated"),
        data,
        steps,
        tuple(seeds),
        changes.get("use", {}),
    )
    return recipe.only(only or changes.get("only", ("*",)))


def _check_entries(entries: Sequence[Any], pairs: Mapping[str, Any], where: str) -> None:
    """What the steps say, before they are written for each pair."""
    for entry in entries:
        own = f"{where}: step {entry.get('name')!r}" if isinstance(entry, dict) else where
        _check_keys(entry, _STEP, own, needed=("name",))
        if isinstance(entry.get("each"), list):
            _check_known(entry["each"], pairs, f"{own}: each")
        if entry.get("each") and not pairs:
            raise ConfigError(f"{own} is for each pair, and there is none")


def _expanded(entries: Sequence[Mapping[str, Any]], pairs: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps, those with `each` written once for each of their pairs."""
    found: list[Mapping[str, Any]] = []
    for of_pairs, group in itertools.groupby(entries, key=lambda entry: bool(entry.get("each"))):
        block = list(group)
        if not of_pairs:
            found += block
        for name, words in pairs.items() if of_pairs else ():
            for entry in block:
                if entry["each"] is True or name in entry["each"]:
                    written = _of_pair(entry, name, words)
                    found += [] if written in found else [written]
                    if len(found) > MANY_STEPS:
                        raise ConfigError(f"a recipe of more than {MANY_STEPS:,} steps", tip="write fewer pairs")
    return found


def _of_pair(entry: Mapping[str, Any], name: str, words: Mapping[str, Any]) -> dict[str, Any]:
    paper, numbers = entry.get("paper"), words.get("paper", {})
    if isinstance(paper, str):
        paper = numbers.get(paper)
    rest = {key: value for key, value in entry.items() if key not in ("each", "paper")}
    return {**_written(rest, {**words, "pair": name}), **({} if paper is None else {"paper": paper})}


def _written(value: Any, words: Mapping[str, Any]) -> Any:
    """The same with {word} replaced in every string; a string that is one {word} becomes the word's own value."""
    if isinstance(value, dict):
        return {key: _written(one, words) for key, one in value.items()}
    if isinstance(value, list):
        return [_written(one, words) for one in value]
    if not isinstance(value, str):
        return value
    for word, meaning in words.items():
        if value == f"{{{word}}}":
            return meaning
        value = value.replace(f"{{{word}}}", str(meaning))
        if len(value) > LONG_TEXT:
            raise ConfigError(f"{value[:60]!r}... would have more than {LONG_TEXT:,} characters", tip="write it out")
    return value


def _step(
    entry: Mapping[str, Any],
    told: Mapping[str, Any],
    changes: Mapping[str, Any],
    of_step: Mapping[str, Any],
    where: str,
) -> Step:
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        raise ConfigError(f"{where}: needs one of {', '.join(KINDS)}")
    (kind,) = kinds
    settings = {**told.get(kind, {}), **entry[kind], **changes.get(kind, {}), **of_step.get(entry["name"], {})}
    seeded = bool(entry.get("seeds", kind in SEEDED))
    _check_own(kind, settings, seeded, where)
    metric = entry.get("metric", "errors")
    if metric not in METRICS:
        raise ConfigError(f"{where}: unknown metric {metric!r}", tip=nearest(metric, METRICS))
    paper = entry.get("paper")
    label = entry.get("label", entry["name"] if kind != "dump" and paper is not None else "")
    if isinstance(paper, str):
        raise ConfigError(f"{where}: paper = {paper!r} names a number of a pair, and the step has no `each`")
    if label and (kind == "dump" or (kind in ("train", "shrink") and "eval_data" not in settings)):
        raise ConfigError(
            f"{where}: a row of the table needs a number, and a {kind} step without evaluation has none",
            tip="give eval_data, or leave the label and the paper's number out",
        )
    if metric == "class_errors" and "class" not in entry:
        raise ConfigError(f"{where}: metric class_errors is of one class", tip="add class = NAME")
    if "column" in entry and not label:
        raise ConfigError(f"{where}: a column is a place in a row", tip="give the step a label: that of its row")
    if "beside" in entry and (kind != "train" or not label):
        raise ConfigError(
            f"{where}: beside is of a step that trains a row's model",
            tip="a shrink step is compared with its own model",
        )
    return Step(
        entry["name"],
        kind,
        {key: value for key, value in settings.items() if value is not None},
        label,
        seeded,
        None if paper is None else float(paper),
        None if entry.get("tolerance") is None else float(entry["tolerance"]),
        metric,
        str(entry.get("class", "")),
        str(entry.get("column", "")),
        str(entry.get("beside", "")),
    )


def _check_own(kind: str, settings: Mapping[str, Any], seeded: bool, where: str) -> None:
    """Refuse settings that a recipe has a place of its own for, or that leave nothing to build on."""
    for key in NOT_OF_A_STEP[kind]:
        if settings.get(key) is not None:
            raise ConfigError(f"{where}: {kind} cannot set {key}", tip="leave it out: " + NOT_OF_A_STEP[kind][key])
    if kind in ("train", "shrink") and seeded and settings.get("seed") is not None:
        raise ConfigError(
            f"{where}: seed = {settings['seed']} would win over --seeds, so that every seed gives the same number",
            tip="leave seed out, or write `seeds = false` for a step that is done once",
        )


def _check_named(steps: Sequence[Step], where: str) -> None:
    """What a step builds on comes before it, for each of its seeds."""
    before: dict[str, Step] = {}
    for step in steps:
        for key, name in step.named():
            if name not in before and key != STUDENT and (key in ("cache", BESIDE) or ":" not in name):
                raise ConfigError(
                    f"{where}: step {step.name!r}: {key} {name!r} is no step before it", tip=nearest(name, before)
                )
            if key in (STUDENT, BESIDE, "model") and name in before and before[name].kind not in ("train", "shrink"):
                raise ConfigError(f"{where}: step {step.name!r}: {key} {name!r} is a {before[name].kind}, and no model")
            if name in before and before[name].seeded and not step.seeded:
                raise ConfigError(f"{where}: step {step.name!r} is done once, {name!r} once for each seed")
        before[step.name] = step


def _check_keys(table: Any, known: Mapping[str, Any], where: str, needed: Sequence[str] = ()) -> None:
    """Raise ConfigError unless it is a table of known keys, each of its type."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: must be a table, found {table!r}")
    _check_known(table, known, where)
    for key in needed:
        if key not in table:
            raise ConfigError(f"{where}: has no {key!r}")
    for key, value in table.items():
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{where}: {key} cannot be {value!r}", tip=f"give {_TYPE_NAMES[kinds[0]]}")


def _check_known(names: Iterable[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}", tip=nearest(str(name), known))

"""What a recipe says: a paper's table as steps that train, dump and evaluate, each with the paper's number beside it.

A recipe is a TOML file, in softcache/recipes or one of your own. At the top level stand the settings of the paper budget; the
tables `short` and `smoke` change data and settings for smaller ones.

    title, source            whose table it is
    [data]                   name -> data spec; {root} is --data-root
    [train] [dump]           settings of every such step
    [pair.NAME]              words that a step with `each` is written with: it is done for every pair (`each = true`) or for
                             those it names, {word} replaced in all of its strings, {pair} by NAME; where its `paper` is a
                             string, the number is that entry of the pair's `paper`. Steps with `each` that follow one another
                             are done pair by pair, and one that two pairs share once.
    [[step]]                 name, and one of train, dump, eval: its own settings; `seeds` false: one run for all seeds
      paper, tolerance       the number in the table, and how far ours may be off; metric: errors, top1 (percent), class_errors
    [budget.short] [budget.smoke]   estimate; data, train, dump: instead of the above; steps: name -> settings; pairs, seeds;
                             only: patterns of the names of the steps it keeps, beside those that they build on;
                             use: name of a training step -> a model in its place
"""

from __future__ import annotations

import fnmatch
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from softcache.errors import ConfigError, nearest

BUDGETS = ("smoke", "short", "paper")
REFERENCES = ("teacher", "cache", "init_from", "run", "bias_model")  # settings that may name an earlier step
KINDS = ("train", "dump", "eval")
METRICS = ("errors", "top1", "class_errors")
_TOP = {"title", "source", "about", "data", "train", "dump", "eval", "pair", "step", "budget"}
_STEP = {"name", "label", "each", "seeds", "paper", "tolerance", "metric", "class", *KINDS}
_BUDGET = {"estimate", "data", "train", "dump", "eval", "pairs", "only", "use", "steps", "seeds"}


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: by which other steps refer to it, and its folder.
        kind: "train", "dump" or "eval".
        settings: of the verb; `data`, `eval_data` and `bias_data` may name the recipe's data, REFERENCES its earlier steps.
        label: of its row; empty: it has none.
        seeded: it is done once for each seed.
        paper: the published number; None where there is none.
        tolerance: how far from it counts as reached, in the metric's unit.
        metric: what is compared.
        of_class: of the metric "class_errors".
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

    def named(self) -> Iterator[tuple[str, str]]:
        """(setting, name) of whatever REFERENCES name: an earlier step, or a model."""
        for key in REFERENCES:
            value = self.settings.get(key, ())
            for name in (value,) if isinstance(value, str) else value:
                yield key, name


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
    folder = files("softcache") / "recipes"
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
        return parse_recipe(path.stem, path.read_text(encoding="utf-8"), budget, only)
    if name not in recipe_names():
        raise ConfigError(
            f"no recipe {name!r}",
            tip=f"{nearest(name, recipe_names())}; `softcache reproduce LIST` shows them; one of your own: path/to/recipe.toml",
        )
    text = (files("softcache") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return parse_recipe(name, text, budget, only)


def parse_recipe(name: str, text: str, budget: str, only: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`, from the text of a file."""
    if budget not in BUDGETS:
        raise ConfigError(f"--budget {budget}: unknown", tip=nearest(budget, BUDGETS))
    where = f"recipe {name}"
    try:
        told = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{where}: not TOML: {exc}") from None
    _only(told, _TOP, where)
    budgets = told.get("budget", {})
    _only(budgets, set(BUDGETS), f"{where}: budget")
    changes = budgets.get(budget, {})
    _only(changes, _BUDGET, f"{where}: budget.{budget}")
    data = {**told.get("data", {}), **changes.get("data", {})}
    of_step = changes.get("steps", {})
    pairs = told.get("pair", {})
    pairs = {key: pairs[key] for key in changes.get("pairs", pairs)}
    entries = _expanded(told.get("step", []), pairs, where)
    steps = [_step(entry, told, changes, of_step, f"{where}: step {entry.get('name')!r}") for entry in entries]
    names = [step.name for step in steps]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"{where}: its steps need names of their own")
    _only(of_step, set(names), f"{where}: budget.{budget}.steps")
    trained = {step.name for step in steps if step.kind == "train"}
    _only(changes.get("use", {}), trained, f"{where}: budget.{budget}.use")
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
        tuple(changes.get("seeds", (0, 1, 2))),
        changes.get("use", {}),
    )
    return recipe.only(only or changes.get("only", ("*",)))


def _expanded(
    entries: Sequence[Mapping[str, Any]], pairs: Mapping[str, Mapping[str, Any]], where: str
) -> list[Mapping[str, Any]]:
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
    return value


def _step(
    entry: Mapping[str, Any],
    told: Mapping[str, Any],
    changes: Mapping[str, Any],
    of_step: Mapping[str, Any],
    where: str,
) -> Step:
    _only(entry, _STEP, where)
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1 or "name" not in entry:
        raise ConfigError(f"{where}: needs a name and one of {', '.join(KINDS)}")
    (kind,) = kinds
    settings = {**told.get(kind, {}), **entry[kind], **changes.get(kind, {}), **of_step.get(entry["name"], {})}
    metric = entry.get("metric", "errors")
    if metric not in METRICS:
        raise ConfigError(f"{where}: unknown metric {metric!r}", tip=nearest(metric, METRICS))
    paper = entry.get("paper")
    label = entry.get("label", entry["name"] if kind != "dump" and paper is not None else "")
    return Step(
        entry["name"],
        kind,
        {key: value for key, value in settings.items() if value is not None},
        label,
        bool(entry.get("seeds", kind != "dump")),
        None if paper is None else float(paper),
        None if entry.get("tolerance") is None else float(entry["tolerance"]),
        metric,
        str(entry.get("class", "")),
    )


def _check_named(steps: Sequence[Step], where: str) -> None:
    """What a step builds on comes before it, for each of its seeds."""
    before: dict[str, Step] = {}
    for step in steps:
        for key, name in step.named():
            if name not in before and (key == "cache" or ":" not in name):
                raise ConfigError(
                    f"{where}: step {step.name!r}: {key} {name!r} is no step before it", tip=nearest(name, before)
                )
            if name in before and before[name].seeded and not step.seeded:
                raise ConfigError(f"{where}: step {step.name!r} is done once, {name!r} once for each seed")
        before[step.name] = step


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}", tip=nearest(key, known))

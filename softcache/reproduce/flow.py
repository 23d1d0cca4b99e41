"""softcache reproduce: a paper's table again, from shared caches, with its spread and a verdict.

The steps of a recipe are runs and dumps as everybody makes them; `steps.py` does each, or finds what it gave before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from softcache.data.classes import class_indices
from softcache.errors import ConfigError, nearest
from softcache.files.durable import make_folder, write_whole
from softcache.files.inside import refuse_linked_folders
from softcache.report.chart import drawn_rows
from softcache.report.tables import table
from softcache.reproduce.check_steps import Tried, check_step
from softcache.reproduce.recipe import Recipe, Step, read_recipe, recipe_names
from softcache.reproduce.steps import Bench, outcome_of
from softcache.reproduce.table import Row, mean_cost, written


@dataclass(frozen=True)
class Reproduced:
    """A finished recipe.

    Attributes:
        data: name -> spec, as it was read.
        use: training step -> the model that was given in its place.
        made: when, with what and on what device its steps were done: each distinct answer.
        folder: of its runs, caches and table.
        reused, done: how many runs, dumps and evaluations were there already, and how many were not.
    """

    recipe: Recipe
    rows: Sequence[Row]
    seeds: Sequence[int]
    data: Mapping[str, str]
    folder: Path
    reused: int
    done: int
    use: Mapping[str, str] = field(default_factory=dict)
    made: Sequence[Mapping[str, str]] = ()

    def to_json(self) -> dict[str, Any]:
        about = {key: getattr(self.recipe, key) for key in ("name", "title", "source", "budget", "estimate")}
        how = {"made": list(self.made), "data": dict(self.data), "use": dict(self.use), "seeds": list(self.seeds)}
        return {**about, **how, "rows": [asdict(row) for row in self.rows]}

    def text(self) -> str:
        """The table, with what to know of it."""
        schedule = "" if self.recipe.budget == "paper" else f" ({self.recipe.budget} schedule)"
        notes = [self.recipe.about] if self.recipe.about else []
        if schedule:
            notes.append(
                f"This is the {self.recipe.budget} schedule, on other data or with fewer epochs than said above."
            )
        notes += [f"data: {name} = {spec}" for name, spec in self.data.items()]
        notes += [f"given: {step} = {model}" for step, model in self.use.items()]
        notes += ["made: " + ", ".join(f"{key} {value}" for key, value in one.items()) for one in self.made]
        state = f"{self.done} steps done now, {self.reused} reused; all of it is in {self.folder}"
        said = "\n".join(notes)
        return f"{self.recipe.title}{schedule}\n{self.recipe.source}\n\n{written(self.rows, self.seeds)}\n\n{said}\n\n{state}"


def run(
    name: str,
    *,
    budget: str = "paper",
    data_root: str = "data",
    data: Sequence[str] = (),
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    device: str | None = None,
    out: Path = Path("reproduced"),
    download: bool = False,
    allow_code: bool = False,
    quiet: bool = False,
) -> Reproduced:
    """Work through a recipe; whatever of it is in `out` already is reused.

    Args:
        name: of the recipe, or path of a .toml file.
        budget: "smoke", "short" or "paper".
        data_root: what {root} in the recipe's data stands for.
        data: `NAME=SPEC`, other sources of the recipe's data.
        models: `STEP=MODEL`, models in the place of what steps would train.
        seeds: of the students; the recipe's own if empty.
        only: patterns of steps' names: these, and what they build on; all of them if empty. Their table is `table.only`,
            so that it leaves that of the whole recipe alone.
        device: for every step.
        out: a folder for the runs, caches and `table` (.txt, .json, and .png where matplotlib is).
        download: torchvision's data sets that are not in `data_root`.
        allow_code: believe what the run folders in `models` name.

    Raises:
        SoftcacheError: as the steps raise them, with the step's name; mistakes in settings before the first step.
    """
    recipe = read_recipe(name, budget, only)
    specs = {key: spec.replace("{root}", data_root) for key, spec in recipe.data.items()}
    specs |= _named(data, "--data", specs, "data")
    trained = [step.name for step in recipe.steps if step.kind == "train"]
    use = {key: model for key, model in recipe.use.items() if key in trained}
    use |= _named(models, "--use", trained, "training step")
    chosen = tuple(seeds) or tuple(recipe.seeds)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--seeds {','.join(map(str, chosen))}: a seed is given twice", tip="give different ones")
    if seeds and not only and not any(step.seeded for step in recipe.steps):
        raise ConfigError(
            f"--seeds {','.join(map(str, seeds))}: every step of {recipe.name} is done once", tip="leave --seeds out"
        )
    folder = out / recipe.name / budget
    bench = Bench(recipe, folder, specs, use, device, quiet, download, allow_code)
    tried: dict[str, Tried] = {}
    for step in recipe.steps:
        with _naming(step, recipe):
            check_step(step, chosen, bench, tried)
    tried.clear()
    refuse_linked_folders(folder, "folder of a recipe")
    make_folder(folder)
    for number, step in enumerate(recipe.steps, start=1):
        for seed in chosen if step.seeded else (None,):
            if not quiet:
                said = "" if seed is None else f", seed {seed}"
                print(f"{number}/{len(recipe.steps)}  {step.kind} {step.name}{said}", file=sys.stderr, flush=True)
            with _naming(step, recipe):
                bench.outcomes[step.name, seed] = outcome_of(step, seed, bench)
    return _finished(bench, chosen, "table.only" if only else "table")


def recipes() -> list[dict[str, str]]:
    """All recipes: "recipe" (its name), "table" (what it makes again), and what each budget takes."""
    found = []
    for name in recipe_names():
        by_budget = {budget: read_recipe(name, budget) for budget in ("smoke", "short", "paper")}
        takes = {budget: recipe.estimate for budget, recipe in by_budget.items()}
        found.append({"recipe": name, "table": by_budget["paper"].title, **takes})
    return found


def listing() -> str:
    """The same as a table."""
    found = recipes()
    return table(list(found[0]), [list(one.values()) for one in found], words=True)


@contextmanager
def _naming(step: Step, recipe: Recipe) -> Iterator[None]:
    """What is raised while it is entered tells the step."""
    try:
        yield
    except Exception as exc:
        exc.add_note(f"in step {step.name!r} of recipe {recipe.name!r}")
        raise


def _finished(bench: Bench, seeds: Sequence[int], stem: str) -> Reproduced:
    """The table, written as text, JSON and picture under this name."""
    recipe, folder, outcomes = bench.recipe, bench.out, list(bench.outcomes.values())
    made = list({json.dumps(one.made, sort_keys=True): one.made for one in outcomes if one.made}.values())
    rows = [_row(step, bench, seeds) for step in recipe.steps if step.label]
    reused = sum(outcome.reused for outcome in outcomes)
    done = Reproduced(
        recipe, rows, seeds, bench.specs, folder, reused, len(outcomes) - reused, use=bench.models, made=made
    )
    write_whole(folder / f"{stem}.json", (json.dumps(done.to_json(), indent=1) + "\n").encode())
    write_whole(folder / f"{stem}.txt", (done.text() + "\n").encode())
    if rows and find_spec("matplotlib") is not None:
        drawn = [replace(row, label=f"{row.label}, {row.column}" if row.column else row.label) for row in rows]
        write_whole(folder / f"{stem}.png", drawn_rows(f"{recipe.title}, {recipe.budget} budget", drawn))
    elif rows and not bench.quiet:
        print("no picture: it takes `pip install 'softcache[demo]'`", file=sys.stderr)
    return done


def _named(texts: Sequence[str], flag: str, known: Collection[str], what: str) -> dict[str, str]:
    """`NAME=SPEC` of a flag, by name."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {text!r} is not NAME=SPEC", tip=f"its names are {', '.join(known)}")
        if name not in known:
            raise ConfigError(f"{flag} {text!r}: the recipe has no {what} {name!r}", tip=nearest(name, known))
        if name in found:
            raise ConfigError(f"{flag} gives {name!r} twice: {found[name]} and {spec}", tip="keep one of them")
        found[name] = spec
    return found


def _row(step: Step, bench: Bench, seeds: Sequence[int]) -> Row:
    outcomes = [bench.outcomes[step.name, seed] for seed in (seeds if step.seeded else (None,))]
    values = [_value(step, outcome.last) for outcome in outcomes]
    best = [_value(step, outcome.best) for outcome in outcomes if step.metric in outcome.best]
    metric = f"errors on {step.of_class}" if step.metric == "class_errors" else step.metric
    seconds = sum(outcome.seconds for outcome in outcomes)
    paper = None if bench.recipe.budget == "smoke" else step.paper  # on made-up data there is nothing to compare
    judged = verdict(step, values, bench.recipe.budget)
    cost = mean_cost([outcome.cost for outcome in outcomes])
    return Row(step.label, metric, paper, values, best, judged, seconds, step.column, cost)


def _value(step: Step, scores: Mapping[str, Any]) -> float:
    """The step's metric among an outcome's scores."""
    found = scores[step.metric]
    if step.metric == "class_errors":
        names = list(found)
        found = sum(found[names[place]] for place in class_indices(names, [step.of_class]))
    return float(found)


def verdict(step: Step, values: Sequence[float], budget: str) -> str:
    """Whether the mean is as good as the paper's number, up to the tolerance.

    Empty for shorter schedules, and where there is no number or no tolerance.
    """
    if step.paper is None or step.tolerance is None or budget != "paper":
        return ""
    ours = mean(values)
    good = ours >= step.paper - step.tolerance if step.metric == "top1" else ours <= step.paper + step.tolerance
    return "reached" if good else "not reached"

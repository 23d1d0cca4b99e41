"""softcache reproduce: a paper's table again, from shared caches, with its spread and a verdict.

The steps of a recipe are runs and dumps as everybody makes them, each in a folder that its settings and its inputs name: what
is there is reused, what was interrupted goes on, and what is deleted is made again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import softcache
from softcache import dump, evaluate, train
from softcache.chart import draw_rows
from softcache.config import DumpConfig, EvalConfig, TrainConfig, resolve
from softcache.data.selection import class_indices
from softcache.errors import ConfigError, nearest
from softcache.recipe import REFERENCES, Recipe, Step, read_recipe, recipe_names
from softcache.report import table

RESULT = "result.json"


@dataclass(frozen=True)
class Outcome:
    """What one step gave for one seed.

    Attributes:
        folder: of the run or the cache.
        identity: sha256 of what it holds, for the steps that build on it.
        last, best: the metric after the last epoch, and at its best; None for a dump.
        seconds: that it took when it was done.
        reused: it was there already.
    """

    folder: str
    identity: str
    last: float | None = None
    best: float | None = None
    seconds: float = 0.0
    reused: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: of the step.
        metric: "errors", "top1" in percent, or the errors on one class.
        paper: the published number, or None.
        values, best: ours, one for each seed: of the last epoch, and of the best.
        verdict: "reached", "not reached", or why neither can be said.
        seconds: of all seeds together.
    """

    label: str
    metric: str
    paper: float | None
    values: Sequence[float]
    best: Sequence[float]
    verdict: str
    seconds: float


@dataclass(frozen=True)
class Reproduced:
    """A finished recipe."""

    recipe: Recipe
    rows: Sequence[Row]
    seeds: Sequence[int]
    folder: Path
    reused: int
    done: int

    def to_json(self) -> dict[str, Any]:
        about = {key: getattr(self.recipe, key) for key in ("name", "title", "source", "budget", "estimate")}
        rows = [asdict(row) for row in self.rows]
        return {**about, "softcache": softcache.__version__, "seeds": list(self.seeds), "rows": rows}

    def text(self) -> str:
        """The table, with what to know of it."""
        short = "" if self.recipe.budget == "paper" else f"; {self.recipe.budget} schedule, not the paper's"
        header = [
            "",
            "metric",
            "paper",
            "mean",
            "s.d.",
            "best epoch",
            *(f"seed {s}" for s in self.seeds),
            "",
            "minutes",
        ]
        rows = [
            [
                row.label,
                row.metric,
                _number(row.paper),
                _number(mean(row.values)),
                _number(stdev(row.values)) if len(row.values) > 1 else "",
                _number(mean(row.best)),
                *[_number(value) for value in row.values],
                *[""] * (len(self.seeds) - len(row.values)),
                row.verdict,
                f"{row.seconds / 60:.1f}",
            ]
            for row in self.rows
        ]
        about = f"{self.recipe.title}\n{self.recipe.source}{short}"
        state = f"{self.done} steps done now, {self.reused} reused; all of it is in {self.folder}"
        return f"{about}\n\n{table(header, rows)}\n\n{state}"


@dataclass
class _Bench:
    """Where a recipe is being worked through."""

    recipe: Recipe
    out: Path
    device: str | None
    quiet: bool
    outcomes: dict[tuple[str, int | None], Outcome] = field(default_factory=dict)

    def outcome(self, name: str, seed: int | None) -> Outcome | None:
        """Of an earlier step: for the same seed, or its only one; None for what is no step."""
        return self.outcomes.get((name, seed), self.outcomes.get((name, None)))


def run(
    name: str,
    *,
    budget: str = "paper",
    data_root: str = "data",
    data: Sequence[str] = (),
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    device: str | None = None,
    out: Path = Path("reproduced"),
    quiet: bool = False,
) -> Reproduced:
    """Work through a recipe; whatever of it is in `out` already is reused.

    Args:
        name: of the recipe.
        budget: "smoke", "short" or "paper".
        data_root: what {root} in the recipe's data stands for.
        data: `NAME=SPEC`, other sources of the recipe's data.
        seeds: of the students; the recipe's own if empty.
        only: patterns of steps' names: these, and what they build on; all of them if empty.
        device: for every step.
        out: a folder for the runs, caches and the table (text, JSON, and a picture where matplotlib is).

    Raises:
        SoftcacheError: as the steps raise them, with the step's name.
    """
    recipe = read_recipe(name, budget)
    if only:
        recipe = recipe.only(only)
    specs = {key: spec.replace("{root}", data_root) for key, spec in recipe.data.items()}
    for text in data:
        key, equals, spec = text.partition("=")
        if not equals or key not in specs:
            raise ConfigError(
                f"--data {text!r}: the recipe has no such data", tip=f"{nearest(key, specs)}; write NAME=SPEC"
            )
        specs[key] = spec
    chosen = tuple(seeds) or recipe.seeds
    folder = out / name / budget
    bench = _Bench(recipe, folder, device, quiet)
    for number, step in enumerate(recipe.steps, start=1):
        for seed in chosen if step.seeded else (None,):
            if not quiet:
                said = "" if seed is None else f", seed {seed}"
                print(f"{number}/{len(recipe.steps)}  {step.kind} {step.name}{said}", file=sys.stderr, flush=True)
            try:
                bench.outcomes[step.name, seed] = _do(step, seed, bench, specs)
            except Exception as exc:
                exc.add_note(f"in step {step.name!r} of recipe {name!r}")
                raise
    outcomes = bench.outcomes.values()
    reused = sum(outcome.reused for outcome in outcomes)
    rows = [_row(step, bench, chosen) for step in recipe.steps if step.label]
    done = Reproduced(recipe, rows, chosen, folder, reused, len(outcomes) - reused)
    (folder / "table.json").write_text(json.dumps(done.to_json(), indent=1) + "\n")
    (folder / "table.txt").write_text(done.text() + "\n")
    if find_spec("matplotlib") is not None:
        draw_rows(f"{recipe.title}, {budget} budget", rows, folder / "table.png")
    elif not quiet:
        print("no picture: it takes `pip install 'softcache[demo]'`", file=sys.stderr)
    return done


def listing() -> str:
    """All recipes, with what each budget takes."""
    rows = []
    for name in recipe_names():
        paper, short, smoke = (read_recipe(name, budget) for budget in ("paper", "short", "smoke"))
        rows.append([name, paper.title, smoke.estimate, short.estimate, paper.estimate])
    return table(["recipe", "table", "smoke", "short", "paper"], rows, words=True)


def _do(step: Step, seed: int | None, bench: _Bench, specs: Mapping[str, str]) -> Outcome:
    """One step for one seed, or what it gave before."""
    settings, inputs = dict(step.settings), []
    for key in ("data", "eval_data", "bias_data"):
        if key in settings:
            settings[key] = specs.get(settings[key], settings[key])
    for key, name in step.named():
        found = bench.outcome(name, seed)
        inputs.append(name if found is None else found.identity)
        if found is not None and key == "teacher":
            settings[key] = [f"{found.folder}?name={name}" if one == name else one for one in settings[key]]
        elif found is not None:
            settings[key] = found.folder
    if step.kind == "train":
        settings.setdefault("seed", 0 if seed is None else seed)
    if bench.device is not None:
        settings["device"] = bench.device
    own = {key: value for key, value in settings.items() if key not in (*REFERENCES, "device")}
    identity = hashlib.sha256(json.dumps([step.kind, own, inputs], sort_keys=True).encode()).hexdigest()
    suffix = "" if seed is None else f"-{seed}"
    folder = bench.out / f"{step.name}{suffix}-{identity[:8]}"
    before = _read(folder, identity)
    if before is not None:
        return before
    started = time.monotonic()
    if step.kind == "train":
        outcome = _train(step, settings, folder, bench.quiet)
    elif step.kind == "dump":
        outcome = _dump(settings, folder, bench.quiet)
    else:
        outcome = _evaluate(step, settings, folder)
    outcome = Outcome(**{**asdict(outcome), "seconds": time.monotonic() - started})
    place = _note(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"of": identity, "outcome": asdict(outcome)}) + "\n")
    return outcome


def _note(folder: Path) -> Path:
    """Where a step's outcome is kept: beside its folder, which belongs to the run or the cache."""
    return folder.with_name(f"{folder.name}.{RESULT}")


def _read(folder: Path, identity: str) -> Outcome | None:
    """What a finished step gave; None where it is not there, or not whole."""
    place = _note(folder)
    if not place.is_file():
        return None
    try:
        kept = json.loads(place.read_text())
        outcome = Outcome(**{**kept["outcome"], "reused": True})
    except (ValueError, KeyError, TypeError):
        return None
    there = outcome.folder == "" or Path(outcome.folder).is_dir()
    return outcome if kept["of"] == identity and there else None


def _train(step: Step, settings: Mapping[str, Any], folder: Path, quiet: bool) -> Outcome:
    config = resolve(TrainConfig, flags={**settings, "out": str(folder)}).config
    result = train.run(config, quiet=quiet)
    student = hashlib.sha256((folder / train.STUDENT).read_bytes()).hexdigest()
    if result.evaluation is None:
        return Outcome(str(folder), student)
    scores = [row for row in result.metrics if row.get("eval_top1") is not None]
    best = max(scores, key=lambda row: row["eval_top1"])
    last = _metric(step, result.evaluation)
    if step.metric == "class_errors":  # which the metrics of an epoch do not have
        return Outcome(str(folder), student, last, last)
    at_best = best["eval_errors"] if step.metric == "errors" else 100 * best["eval_top1"]
    return Outcome(str(folder), student, last, float(at_best))


def _dump(settings: Mapping[str, Any], folder: Path, quiet: bool) -> Outcome:
    result = dump.run(resolve(DumpConfig, flags={**settings, "out": str(folder)}).config, quiet=quiet)
    assert result.manifest is not None
    return Outcome(str(folder), result.manifest.id)


def _evaluate(step: Step, settings: Mapping[str, Any], folder: Path) -> Outcome:
    own = {key: value for key, value in settings.items() if key != "run"}
    value = _metric(step, evaluate.run(settings["run"], resolve(EvalConfig, flags=own).config, quiet=True))
    return Outcome("", hashlib.sha256(repr(value).encode()).hexdigest(), value, value)


def _metric(step: Step, evaluation: evaluate.Evaluation) -> float:
    assert evaluation.top1 is not None and evaluation.errors is not None
    if step.metric == "top1":
        return 100 * evaluation.top1
    if step.metric == "class_errors":
        counts = evaluation.class_errors
        (place,) = class_indices(list(counts), [step.of_class])
        return float(list(counts.values())[place][0])
    return float(evaluation.errors)


def _row(step: Step, bench: _Bench, seeds: Sequence[int]) -> Row:
    outcomes = [bench.outcomes[step.name, seed] for seed in (seeds if step.seeded else (None,))]
    values = [outcome.last for outcome in outcomes if outcome.last is not None]
    best = [outcome.best for outcome in outcomes if outcome.best is not None]
    metric = f"errors on {step.of_class}" if step.metric == "class_errors" else step.metric
    return Row(
        step.label,
        metric,
        step.paper,
        values,
        best,
        _verdict(step, values, bench.recipe.budget),
        sum(outcome.seconds for outcome in outcomes),
    )


def _verdict(step: Step, values: Sequence[float], budget: str) -> str:
    """Whether the mean is as good as the paper's number, up to the tolerance."""
    if step.paper is None:
        return ""
    if budget != "paper":
        return f"{budget} budget"
    room = step.tolerance or 0.0
    ours = mean(values)
    good = ours >= step.paper - room if step.metric == "top1" else ours <= step.paper + room
    return "reached" if good else "not reached"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"

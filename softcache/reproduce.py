"""softcache reproduce: a paper's table again, from shared caches, with its spread and a verdict.

The steps of a recipe are runs and dumps as everybody makes them, each in a folder that its settings and its inputs name: what
is there is reused, what was interrupted goes on, and what is deleted is made again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import softcache
from softcache import dump, evaluate, train
from softcache.chart import draw_rows
from softcache.config import DumpConfig, EvalConfig, TrainConfig, resolve
from softcache.data.selection import class_indices
from softcache.data.views import Policy
from softcache.errors import ConfigError, nearest
from softcache.machine import describe_device, pick_device
from softcache.models import split_weights
from softcache.recipe import REFERENCES, Recipe, Step, read_recipe, recipe_names
from softcache.report import table

RESULT = "result.json"
OWN = "."  # the folder of the step itself, in what is noted of it: all of it may be moved


@dataclass(frozen=True)
class Outcome:
    """What one step gave for one seed.

    Attributes:
        folder: of the run or the cache.
        identity: sha256 of what it holds, for the steps that build on it.
        last, best: the metric after the last epoch, and at its best; None for a dump.
        seconds: that it took when it was done; of a training run, that of its epochs.
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
        verdict: "reached" or "not reached"; empty where there is no number, or a shorter schedule than the paper's.
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
    """A finished recipe.

    Attributes:
        data: name -> spec, as it was read.
        device: in words.
        folder: of its runs, caches and table.
        reused, done: how many runs, dumps and evaluations were there already, and how many were not.
    """

    recipe: Recipe
    rows: Sequence[Row]
    seeds: Sequence[int]
    data: Mapping[str, str]
    device: str
    folder: Path
    reused: int
    done: int

    def to_json(self) -> dict[str, Any]:
        about = {key: getattr(self.recipe, key) for key in ("name", "title", "source", "budget", "estimate")}
        versions = {"softcache": softcache.__version__, "torch": torch.__version__, "device": self.device}
        made = {"date": date.today().isoformat(), **versions, "data": dict(self.data), "seeds": list(self.seeds)}
        return {**about, **made, "rows": [asdict(row) for row in self.rows]}

    def text(self) -> str:
        """The table, with what to know of it."""
        schedule = "" if self.recipe.budget == "paper" else f" ({self.recipe.budget} schedule)"
        columns: dict[str, list[str]] = {
            "": [row.label for row in self.rows],
            "metric": [row.metric for row in self.rows],
            "paper": [_number(row.paper) for row in self.rows],
            "ours": [_number(mean(row.values)) for row in self.rows],
            "s.d.": [_number(stdev(row.values)) if len(row.values) > 1 else "" for row in self.rows],
            "best epoch": [_number(mean(row.best)) for row in self.rows],
        }
        for place, seed in enumerate(self.seeds if len(self.seeds) > 1 else ()):
            columns[f"seed {seed}"] = [_number(*row.values[place : place + 1]) for row in self.rows]
        columns["verdict"] = [row.verdict for row in self.rows]
        columns["minutes"] = [f"{row.seconds / 60:.1f}" for row in self.rows]
        shown = {head: cells for head, cells in columns.items() if any(cells)}
        done = table(list(shown), list(zip(*shown.values(), strict=True))) if self.rows else "none of its rows"
        at = f"softcache {softcache.__version__}, torch {torch.__version__}, {self.device}"
        state = f"{at}; {self.done} steps done now, {self.reused} reused; all of it is in {self.folder}"
        about = f"\n{self.recipe.about}" if self.recipe.about else ""
        return f"{self.recipe.title}{schedule}\n{self.recipe.source}\n\n{done}\n{about}\n\n{state}"


@dataclass
class _Bench:
    """Where a recipe is being worked through."""

    recipe: Recipe
    out: Path
    specs: Mapping[str, str]
    models: Mapping[str, str]
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
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    device: str | None = None,
    out: Path = Path("reproduced"),
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
        only: patterns of steps' names: these, and what they build on; all of them if empty.
        device: for every step.
        out: a folder for the runs, caches and the table (text, JSON, and a picture where matplotlib is).

    Raises:
        SoftcacheError: as the steps raise them, with the step's name.
    """
    recipe = read_recipe(name, budget, only)
    specs = {key: spec.replace("{root}", data_root) for key, spec in recipe.data.items()}
    specs |= _named(data, "--data", specs)
    used = {**recipe.use, **_named(models, "--use", [step.name for step in recipe.steps if step.kind == "train"])}
    chosen = tuple(seeds) or recipe.seeds
    folder = out / recipe.name / budget
    bench = _Bench(recipe, folder, specs, used, device, quiet)
    for number, step in enumerate(recipe.steps, start=1):
        for seed in chosen if step.seeded else (None,):
            if not quiet:
                said = "" if seed is None else f", seed {seed}"
                print(f"{number}/{len(recipe.steps)}  {step.kind} {step.name}{said}", file=sys.stderr, flush=True)
            try:
                bench.outcomes[step.name, seed] = _do(step, seed, bench)
            except Exception as exc:
                exc.add_note(f"in step {step.name!r} of recipe {recipe.name!r}")
                raise
    outcomes = bench.outcomes.values()
    reused = sum(outcome.reused for outcome in outcomes)
    rows = [_row(step, bench, chosen) for step in recipe.steps if step.label]
    where = describe_device(pick_device(device or "auto"))
    done = Reproduced(recipe, rows, chosen, specs, where, folder, reused, len(outcomes) - reused)
    (folder / "table.json").write_text(json.dumps(done.to_json(), indent=1) + "\n")
    (folder / "table.txt").write_text(done.text() + "\n")
    if rows and find_spec("matplotlib") is not None:
        draw_rows(f"{recipe.title}, {budget} budget", rows, folder / "table.png")
    elif rows and not quiet:
        print("no picture: it takes `pip install 'softcache[demo]'`", file=sys.stderr)
    return done


def listing() -> str:
    """All recipes, with what each budget takes."""
    rows = []
    for name in recipe_names():
        paper, short, smoke = (read_recipe(name, budget) for budget in ("paper", "short", "smoke"))
        rows.append([name, paper.title, smoke.estimate, short.estimate, paper.estimate])
    return table(["recipe", "table", "smoke", "short", "paper"], rows, words=True)


def _do(step: Step, seed: int | None, bench: _Bench) -> Outcome:
    """One step for one seed, or what it gave before."""
    settings, inputs = dict(step.settings), []
    for key in ("data", "eval_data", "bias_data"):
        if key in settings:
            settings[key] = bench.specs.get(settings[key], settings[key])
    for key, name in step.named():
        found = bench.outcome(name, seed)
        inputs.append(name if found is None else found.identity)
        if found is not None and key == "teacher":
            settings[key] = [_as_member(found.folder, name) if one == name else one for one in settings[key]]
        elif found is not None:
            settings[key] = found.folder
    if step.kind == "train":
        settings.setdefault("seed", 0 if seed is None else seed)
    if bench.device is not None:
        settings["device"] = bench.device
    own = {key: value for key, value in settings.items() if key not in (*REFERENCES, "device")}
    model = bench.models.get(step.name)
    if model is not None:
        own["model"] = _model_identity(model)
    identity = hashlib.sha256(json.dumps([step.kind, own, inputs], sort_keys=True).encode()).hexdigest()
    suffix = "" if seed is None else f"-{seed}"
    folder = bench.out / f"{step.name}{suffix}-{identity[:8]}"
    before = _read(folder, identity)
    if before is not None:
        return before
    started = time.monotonic()
    if model is not None:
        outcome = _given(step, model, settings)
    elif step.kind == "train":
        outcome = _train(step, settings, folder, bench.quiet)
    elif step.kind == "dump":
        outcome = _dump(settings, folder, bench.quiet)
    else:
        outcome = _evaluate(step, settings, folder)
    if not outcome.seconds:
        outcome = replace(outcome, seconds=time.monotonic() - started)
    place = _note(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    noted = replace(outcome, folder=OWN if outcome.folder == str(folder) else outcome.folder)
    place.write_text(json.dumps({"of": identity, "outcome": asdict(noted)}) + "\n")
    return outcome


def _as_member(model: str, name: str) -> str:
    """The model as a teacher of this name."""
    head, weights = split_weights(model)
    return f"{head}{'&' if '?' in head else '?'}name={name}" + (f"@{weights}" if weights else "")


def _named(texts: Sequence[str], flag: str, known: Collection[str]) -> dict[str, str]:
    """`NAME=SPEC` of a flag, by name."""
    found = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"{flag} {text!r}: the recipe has no {name!r}", tip=f"{nearest(name, known)}; write NAME=SPEC"
            )
        found[name] = spec
    return found


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
    if kept["of"] != identity or (outcome.folder == OWN and not folder.is_dir()):
        return None
    return replace(outcome, folder=str(folder)) if outcome.folder == OWN else outcome


def _train(step: Step, settings: Mapping[str, Any], folder: Path, quiet: bool) -> Outcome:
    config = resolve(TrainConfig, flags={**settings, "out": str(folder)}).config
    result = train.run(config, quiet=quiet)
    student = _digest(folder / train.STUDENT)
    seconds = sum(row["seconds"] for row in result.metrics)  # of an interrupted run, all of its parts
    if result.evaluation is None:
        return Outcome(str(folder), student, seconds=seconds)
    scores = [row for row in result.metrics if row.get("eval_top1") is not None]
    best = max(scores, key=lambda row: row["eval_top1"])
    last = _metric(step, result.evaluation)
    if step.metric == "class_errors":  # which the metrics of an epoch do not have
        return Outcome(str(folder), student, last, last, seconds)
    at_best = best["eval_errors"] if step.metric == "errors" else 100 * best["eval_top1"]
    return Outcome(str(folder), student, last, float(at_best), seconds)


def _given(step: Step, model: str, settings: Mapping[str, Any]) -> Outcome:
    """A model in the place of the one that the step would train."""
    own = {key: settings[key] for key in ("device", "threads", "autocast") if key in settings}
    if not Path(model).is_dir():  # a run knows how its images were seen
        steps = Policy.parse(settings.get("policy", ()), 0).for_evaluation().steps
        own["policy"] = [str(one) for one in steps]
    evaluation = evaluate.run(
        model, resolve(EvalConfig, flags={"data": settings["eval_data"], **own}).config, quiet=True
    )
    value = _metric(step, evaluation)
    return Outcome(model, _model_identity(model), value, value)


def _model_identity(model: str) -> str:
    """Of what it is called, and of the weights where they are in a file."""
    named = [model, *(_digest(path) for path in map(_weights, split_weights(model)) if path.is_file())]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _weights(text: str) -> Path:
    """The file behind a path of weights, or of a run folder."""
    path = Path(text)
    return path / train.STUDENT if path.is_dir() else path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        verdict(step, values, bench.recipe.budget),
        sum(outcome.seconds for outcome in outcomes),
    )


def verdict(step: Step, values: Sequence[float], budget: str) -> str:
    """Whether the mean is as good as the paper's number, up to the tolerance; of shorter schedules nothing is said."""
    if step.paper is None or budget != "paper":
        return ""
    room = step.tolerance or 0.0
    ours = mean(values)
    good = ours >= step.paper - room if step.metric == "top1" else ours <= step.paper + room
    return "reached" if good else "not reached"


def _number(value: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"

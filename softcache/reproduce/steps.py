"""What one step of a recipe gave: done now, or found where it was done before.

A step's folder is named by its identity: what is done with which settings, on which data, from what other steps gave. So what
is there is reused, what was interrupted goes on, what was deleted is made again, and all of it may be moved.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache import dump
from softcache.config import DumpConfig, EvalConfig, ShrinkConfig, TrainConfig, resolve
from softcache.data.class_counts import counted_labels
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import ConfigError
from softcache.evaluate import measure
from softcache.evaluate.evaluation import SHARES, Evaluation
from softcache.files.durable import make_folder, write_whole
from softcache.files.inside import RUN, is_inside, read_inside
from softcache.machine import describe_device, pick_device
from softcache.models import load_json, path_and_choice, split_weights
from softcache.reproduce.recipe import BESIDE, DATA, REFERENCES, STUDENT, Recipe, Step, step_of
from softcache.spec import parse_spec
from softcache.students import shrink
from softcache.students.beside import costs_beside
from softcache.targets.cache import is_cache
from softcache.targets.cache import open as open_cache
from softcache.train import flow as train
from softcache.train.metrics import best_epoch
from softcache.version import __version__

RESULT = "result.json"
OWN = "."  # in the note of a step: its own folder
MOST_BYTES = 2**24  # of a note
SPREAD = 16  # samples whose contents are looked at, to know data again


@dataclass(frozen=True)
class Outcome:
    """What one step gave for one seed.

    Attributes:
        folder: of the run or the cache; or a model that was given in its place.
        identity: of what it holds, for the steps that build on it.
        last, best: "errors", "top1" (percent) and "class_errors" (class -> errors) of the student that is kept, and the first
            two where top1 was best; empty for a dump.
        seconds: that it took when it was done; of a training run, that of its epochs.
        made: when, with what and on what device.
        reused: it was there already.
        cost: "before" and "after": what the model costs that it began with, and its own, both measured in turns; empty for steps
            that were not asked.
    """

    folder: str
    identity: str
    last: Mapping[str, Any] = field(default_factory=dict)
    best: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    made: Mapping[str, str] = field(default_factory=dict)
    reused: bool = False
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What is known of data that a recipe names.

    Attributes:
        identity: sha256 of its samples, labels and classes, and of what some of its samples hold.
        some: a few of its samples, with its whole class list.
        labelled: how many of all have a label.
    """

    identity: str
    some: TransferSet
    labelled: int


@dataclass
class Bench:
    """Where a recipe is worked through.

    Attributes:
        out: holds a folder for each step and seed.
        specs: name -> data spec.
        models: training step -> a model in its place.
        device: for every step; None: as the recipe says, or as it is found.
        download: of torchvision's data sets that are not there.
        allow_code: believe what given run folders name.
        outcomes: so far, by step and seed (None: of a step that is done once).
        data: data spec -> what is known of it.
    """

    recipe: Recipe
    out: Path
    specs: Mapping[str, str]
    models: Mapping[str, str]
    device: str | None
    quiet: bool
    download: bool = False
    allow_code: bool = False
    outcomes: dict[tuple[str, int | None], Outcome] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)

    def data_of(self, spec: str) -> Data:
        """What a data spec names, looked at once."""
        if spec not in self.data:
            self.data[spec] = _looked_at(spec, download=self.download)
        return self.data[spec]

    def outcome(self, name: str, seed: int | None) -> Outcome | None:
        """Of an earlier step: for the same seed, or its only one; None for what is no step."""
        return self.outcomes.get((name, seed), self.outcomes.get((name, None)))

    def model_of(self, name: str, seed: int | None) -> str:
        """The model of an earlier step, as a verb takes it."""
        found = self.outcome(name, seed)
        assert found is not None  # `_check_named` has refused others
        return _with_factory(found.folder, name, self)


def outcome_of(step: Step, seed: int | None, bench: Bench) -> Outcome:
    """Do a step for one seed, or find what it gave before.

    Raises:
        SoftcacheError: as the verb raises it.
    """
    settings = _settings(step, seed, bench)
    model = bench.models.get(step.name)
    identity = _identity(step, seed, settings, model, bench)
    folder = bench.out / f"{step.name}{'' if seed is None else f'-{seed}'}-{identity[:8]}"
    before = _noted(folder, identity, step, model)
    if before is not None:
        return before
    started = time.monotonic()
    if model is not None:
        outcome = _given(model, settings)
    elif step.kind == "train":
        outcome = _trained(settings, folder, bench.quiet)
    elif step.kind == "dump":
        outcome = _dumped(settings, folder, bench.quiet)
    elif step.kind == "shrink":
        outcome = _shrunk(settings, folder, bench.quiet)
    else:
        outcome = _evaluated(settings)
    if step.beside:
        outcome = replace(outcome, cost=_cost(outcome, settings, bench.model_of(step.beside, seed)))
    device = describe_device(pick_device(settings.get("device", "auto")))
    made = {"date": date.today().isoformat(), "softcache": __version__, "torch": torch.__version__}
    outcome = replace(outcome, seconds=outcome.seconds or time.monotonic() - started, made={**made, "device": device})
    _note(folder, identity, outcome)
    return outcome


def _settings(step: Step, seed: int | None, bench: Bench) -> dict[str, Any]:
    """Of the verb, with the names of data and steps replaced by what they stand for."""
    settings = dict(step.settings)
    for key in DATA:
        if key in settings:
            settings[key] = bench.specs.get(settings[key], settings[key])
    for key, name in step.named():
        found = bench.outcome(name, seed)
        if found is None or key == BESIDE:
            continue
        model = found.folder if key == "cache" else bench.model_of(name, seed)
        if key == "teacher":
            settings[key] = [_as_member(model, name, one) if step_of(one) == name else one for one in settings[key]]
        else:
            settings[key] = model
    if step.kind in ("train", "shrink"):
        settings.setdefault("seed", 0 if seed is None else seed)
    if bench.device is not None:
        settings["device"] = bench.device
    if bench.download:
        settings["download"] = True
    if bench.allow_code:
        settings["allow_code"] = True
    return settings


def _with_factory(folder: str, name: str, bench: Bench) -> str:
    """A run as `MODEL@RUN` where the recipe itself says by what factory it was made: what the run says is not believed."""
    steps = {one.name: one for one in bench.recipe.steps}
    student: Any = name
    while student in steps:  # what was made smaller, and healed, is of the factory's making still
        if student in bench.models:
            return folder
        settings = steps[student].settings
        student = settings.get("model" if steps[student].kind == "shrink" else STUDENT)
    if not isinstance(student, str):
        return folder
    head = split_weights(student)[0]
    return f"{head}@{folder}" if parse_spec(head).is_factory else folder


def _as_member(model: str, name: str, asked: str) -> str:
    """The model as a teacher of this name, with the words of a teacher that it is asked with: `dense?head=none`."""
    head, weights = split_weights(model)
    words = parse_spec(asked).parameters if asked != name else {}
    return parse_spec(head).having(name=name, **words).text + (f"@{weights}" if weights else "")


def _identity(step: Step, seed: int | None, settings: Mapping[str, Any], model: str | None, bench: Bench) -> str:
    """sha256 of all that its result depends on; not of where data, runs and caches lie, nor of the device."""
    inputs, stands_for = [], {*REFERENCES, *DATA, "device", "download", "allow_code"}
    for key, name in step.named():
        found = bench.outcome(name, seed)
        if key == STUDENT and found is None:
            continue  # what to build
        stands_for.add(key)
        # it becomes the member's, with what else it is asked with
        own = [one for one in settings_of(step, key) if step_of(one) == name] if key == "teacher" else []
        inputs.append([key, *own, name if found is None else found.identity])
    parts = {
        "kind": step.kind,
        "settings": {k: v for k, v in settings.items() if k not in stands_for},
        "data": {key: bench.data_of(settings[key]).identity for key in DATA if key in settings},
        "inputs": inputs,
        "model": None if model is None else _model_identity(model),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def settings_of(step: Step, key: str) -> list[str]:
    """A setting of a step as the recipe writes it, which may be one or several."""
    value = step.settings.get(key, ())
    return [value] if isinstance(value, str) else list(value)


def _looked_at(spec: str, *, download: bool) -> Data:
    data = open_transfer_set(spec, download=download)
    spread = np.unique(np.linspace(0, len(data) - 1, SPREAD).astype(int)).tolist() if len(data) else []
    hasher = hashlib.sha256("\n".join([str(len(data)), *data.keys, *data.class_names]).encode())
    hasher.update(np.ascontiguousarray(counted_labels(data)).tobytes())
    hasher.update(b"".join(data.load(index)[1] for index in spread))
    return Data(hasher.hexdigest(), data.select(np.array(spread)), data.labelled)


def _model_identity(model: str) -> str:
    """Of what it is called, and of the files that it is read from, where it names some."""
    files = [path for text in split_weights(model) for path in _model_files(text) if path.is_file()]
    return hashlib.sha256(json.dumps([model, *map(_digest, files)]).encode()).hexdigest()


def _model_files(text: str) -> list[Path]:
    """A file of weights, that of a run folder, or all of a folder of transformers', whose tokenizer counts too."""
    if text.startswith("hf:"):
        folder = Path(parse_spec(text).name)
        return sorted(folder.iterdir()) if folder.is_dir() else []
    path = Path(path_and_choice(text)[0])
    return [path / train.STUDENT if path.is_dir() else path]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(folder: Path) -> Path:
    """Where a step's outcome is noted: beside its folder, which belongs to the run or the cache."""
    return folder.with_name(f"{folder.name}.{RESULT}")


def _note(folder: Path, identity: str, outcome: Outcome) -> None:
    place = _place(folder)
    make_folder(place.parent)
    noted = replace(outcome, folder=OWN if outcome.folder == str(folder) else outcome.folder)
    write_whole(place, (json.dumps({"of": identity, "outcome": asdict(noted)}) + "\n").encode())


def _noted(folder: Path, identity: str, step: Step, model: str | None) -> Outcome | None:
    """What a finished step gave; None where it is not there, or not whole.

    Args:
        model: that was given in its place; a note that names another one is not believed.
    """
    place = _place(folder)
    try:
        kept = load_json(read_inside(place.parent, place.name, MOST_BYTES, RUN))
        outcome = Outcome(**{**kept["outcome"], "reused": True})
        whole = kept["of"] == identity and _is_outcome(outcome)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if outcome.folder != OWN:
        return outcome if whole and outcome.folder in ("", model) else None
    there = is_cache(folder) if step.kind == "dump" else folder.is_dir() and is_inside(folder, train.STUDENT, RUN)
    return replace(outcome, folder=str(folder)) if whole and there else None


def _is_outcome(outcome: Outcome) -> bool:
    """Whether what was read is of the types that a step gives."""
    texts = [outcome.folder, outcome.identity, *outcome.made, *outcome.made.values()]
    if not all(isinstance(one, str) for one in texts) or not isinstance(outcome.seconds, int | float):
        return False
    for scores in (outcome.last, outcome.best, *outcome.cost.values()):
        numbers = [value for key, value in scores.items() if key != "class_errors"]
        numbers += scores.get("class_errors", {}).values()
        if not all(isinstance(one, int | float) for one in numbers):
            return False
    return True


def _trained(settings: Mapping[str, Any], folder: Path, quiet: bool) -> Outcome:
    result = train.run(resolve(TrainConfig, flags={**settings, "out": str(folder)}).config, quiet=quiet)
    student = _digest(folder / train.STUDENT)
    seconds = sum(row["seconds"] for row in result.metrics)  # of an interrupted run, all of its parts
    found = result.evaluation
    if found is None or (found.decisions is None and not found.numbers):  # values, and nothing to compare them with
        return Outcome(str(folder), student, seconds=seconds)
    last = _scores(found)
    place = best_epoch(result.metrics)
    assert place is not None  # `_scores` has refused what has no labels
    best = result.metrics[place]
    at_best = {name: best[f"eval_{name}"] * (100 if name in SHARES else 1) for name in last if f"eval_{name}" in best}
    if found.top1 is not None:
        at_best = {"errors": best["eval_errors"], "top1": 100 * best["eval_top1"]}  # an epoch's row knows no more
    return Outcome(str(folder), student, last, at_best, seconds)


def _given(model: str, settings: Mapping[str, Any]) -> Outcome:
    """A model in the place of the one that the step would train."""
    if "eval_data" not in settings:
        return Outcome(model, _model_identity(model))
    own = {key: settings[key] for key in ("device", "threads", "autocast", "download") if key in settings}
    if not Path(model).is_dir():  # a run knows how its images were seen
        steps = Policy.parse(settings.get("policy", ()), 0).for_evaluation().steps
        own["policy"] = [str(one) for one in steps]
    config = resolve(EvalConfig, flags={"data": settings["eval_data"], **own}).config
    scores = _scores(measure.run(model, config, quiet=True))
    return Outcome(model, _model_identity(model), scores, scores)


def _dumped(settings: Mapping[str, Any], folder: Path, quiet: bool) -> Outcome:
    if is_cache(folder):  # finished, and then stopped before it was noted
        return Outcome(str(folder), open_cache(folder, quiet=quiet).id)
    result = dump.run(resolve(DumpConfig, flags={**settings, "out": str(folder)}).config, quiet=quiet)
    assert result.manifest is not None
    return Outcome(str(folder), result.manifest.id)


def _shrunk(settings: Mapping[str, Any], folder: Path, quiet: bool) -> Outcome:
    if not is_inside(folder, train.STUDENT, RUN):  # else finished, and then stopped before it was noted
        shrink.run(resolve(ShrinkConfig, flags={**settings, "out": str(folder)}).config, quiet=quiet)
    try:
        told = load_json(read_inside(folder, shrink.TABLE, MOST_BYTES, RUN))
        scores = _scores(Evaluation(**told["measured_after"])) if "eval_data" in settings else {}
        cost = {key: told[key] for key in ("before", "after")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(
            f"{folder / shrink.TABLE}: cannot be understood: {exc!r}", tip=f"remove {folder}: the step is done again"
        ) from None
    return Outcome(str(folder), _digest(folder / train.STUDENT), scores, scores, cost=cost)


def _cost(outcome: Outcome, settings: Mapping[str, Any], other: str) -> dict[str, dict[str, float]]:
    """What a trained model costs, and another one, measured in turns."""
    own = {key: settings[key] for key in ("device", "threads", "download", "allow_code") if key in settings}
    before, after = costs_beside((other, outcome.folder), settings["eval_data"], **own)
    return {"before": asdict(before), "after": asdict(after)}


def _evaluated(settings: Mapping[str, Any]) -> Outcome:
    own = {key: value for key, value in settings.items() if key != "run"}
    scores = _scores(measure.run(settings["run"], resolve(EvalConfig, flags=own).config, quiet=True))
    return Outcome("", hashlib.sha256(json.dumps(scores).encode()).hexdigest(), scores, scores)


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.numbers:
        return {name: value * (100 if name in SHARES else 1) for name, value in evaluation.numbers.items()}
    if evaluation.top1 is None or evaluation.errors is None:
        raise ConfigError("the data has no labels, so that nothing can be counted", tip="evaluate on data with labels")
    by_class = {name: errors for name, (errors, _) in evaluation.class_errors.items()}
    return {"errors": evaluation.errors, "top1": 100 * evaluation.top1, "class_errors": by_class}

"""softcache shrink: a trained model, made smaller by one method or several, as a run folder; and what both cost."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from softcache.config import ShrinkConfig
from softcache.config.unused import check_used
from softcache.data.loading import item_shape
from softcache.data.transfer_set import TransferSet
from softcache.data.views import Policy
from softcache.errors import ConfigError, ExportError, ModelError, nearest
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.measure import evaluate
from softcache.files import durable
from softcache.files.durable import require_room
from softcache.machine import as_fresh
from softcache.models import Model, Shrunk, fingerprint, load_model, read_metadata, save_student
from softcache.models.masks import refuse_unknown
from softcache.report.progress import Meter
from softcache.report.tables import percent, size, table
from softcache.spec import call_factory, split_list, split_lists, split_outside
from softcache.students.carve import carve, check_carve
from softcache.students.cost import Cost, cost_of
from softcache.students.export import text_of_copy, weights_of
from softcache.students.int8_speed import Speed, speed_of
from softcache.students.low_rank import check_low_rank, low_rank
from softcache.students.opened import open_all
from softcache.students.prune import check_channels, check_weights, prune_channels, prune_weights
from softcache.students.quantise import check_int8, quantise_int8
from softcache.students.samples import Samples
from softcache.students.traced_program import PACKAGES, Batch
from softcache.train.run_folder import LOCK, STUDENT, locked
from softcache.version import __version__

INT8 = "quantise:int8"
METHODS: dict[str, tuple[Any, Any]] = {  # what checks the settings, and what does it
    "carve": (check_carve, carve),
    "prune:structured": (check_channels, prune_channels),
    "prune:unstructured": (check_weights, prune_weights),
    "lowrank": (check_low_rank, low_rank),
    INT8: (check_int8, quantise_int8),
}
# methods of which there are kinds, and what is said to who names none or another
KINDS = {
    "prune": "prune:unstructured or prune:structured",
    "quantise": INT8,
    "quantise:int4": f"{INT8}; four bits are for the linear layers of language models, which are not quantised so far",
}
ROUNDED = "the times of torch are those of floats that are rounded, not of int8"
TABLE = "shrink.json"  # what is printed, for machines
SHRINK_KEY = "softcache_shrink"  # among the strings of the student's file: what was done, and to which weights
CLOSE = 1e-4  # of the largest logit: what two orders of a sum may differ by


@dataclass(frozen=True)
class Method:
    """One `--by`."""

    text: str
    name: str
    settings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Method:
        """`name:key=value,key=value`, where a value may hold commas; of prune and quantise the kind comes first.

        Raises:
            ConfigError: no such method.
        """
        name, _, rest = text.partition(":")
        words = [word.strip() for word in split_outside(rest, ",") if word.strip()]
        if name in KINDS and words and "=" not in words[0]:
            name, words = f"{name}:{words[0]}", words[1:]
        if name not in METHODS:
            raise ConfigError(
                f"--by {text}: there is no method {name!r}", tip=KINDS.get(name) or nearest(name, METHODS)
            )
        usage = f"{name}{',' if ':' in name else ':'}key=value,key=value"
        settings = split_lists(",".join(words), f"--by {text}", usage)
        return cls(text, name, settings)

    def check(self, samples: Samples) -> None:
        """Raise ConfigError for settings that no network could be made smaller by."""
        check, where = METHODS[self.name][0], f"--by {self.text}"
        known = [name for name in inspect.signature(check).parameters if name != "samples"]
        if strange := [name for name in self.settings if name not in known]:
            raise ConfigError(f"{where}: unknown parameter {strange[0]!r}", tip=nearest(strange[0], known))
        call_factory(check, self.settings, where, samples=samples)

    def apply(self, samples: Samples) -> tuple[Shrunk, str]:
        """Make the samples' network smaller, in place: what was left out, and a line for people."""
        where, net = f"--by {self.text}", samples.model.net
        refuse_unknown(split_list(self.settings.get("keep", "")), net, where)
        done: tuple[Shrunk, str] = call_factory(METHODS[self.name][1], self.settings, where, net=net, samples=samples)
        return done


@dataclass(frozen=True)
class Shrinking:
    """A finished one.

    Attributes:
        path: the run folder.
        source: the model that was made smaller.
        steps: each method, and what it did.
        notes: what else is worth knowing.
        before, after: what both cost.
        eval_data, measured_before, measured_after: how good both are, without healing; None without --eval-data.
        batch_size, device, threads: of the timing.
        speed: of a quantised one in onnxruntime, beside the whole one; None without the extra, and of others.
    """

    path: Path
    source: str
    steps: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    before: Cost
    after: Cost
    eval_data: str | None
    measured_before: Evaluation | None
    measured_after: Evaluation | None
    batch_size: int
    device: str
    threads: int
    speed: Speed | None = None

    def text(self) -> str:
        """For people."""
        both = (self.before, self.after)
        rows: list[list[Any]] = [
            _row("parameters", [cost.parameters for cost in both]),
            _row("of them not zero", [cost.parameters - cost.zeros for cost in both]),
            _row("multiply-adds", [cost.multiply_adds for cost in both]),
            _row("on disk", [cost.nbytes for cost in both], size),
            _row("compressed", [cost.compressed for cost in both], size),
            _row("one sample", [cost.seconds_one for cost in both], _milliseconds),
            _row(f"a batch of {self.batch_size}", [cost.seconds_batch for cost in both], _milliseconds),
        ]
        if self.measured_before is not None and self.measured_after is not None:
            tops = [measured.top1 for measured in (self.measured_before, self.measured_after)]
            name = "right decisions" if self.measured_after.multi_label else "top-1"
            rows.append([f"{name}, not healed", percent(tops[0]), percent(tops[1]), None])
        said = [f"{method}: {what}" for method, what in self.steps] + list(self.notes)
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        on = f"; measured on {self.eval_data}" if self.eval_data else ""
        told = f"times are medians on {self.device}, {threads}{on}"
        speed = [] if self.speed is None else ["", self.speed.text(), ""]
        return "\n".join([*said, "", table(["", "before", "after", "ratio"], rows), "", told, *speed, self._next()])

    def _next(self) -> str:
        return f"{self.path}: next: softcache train --student {self.path} --cache ... --data ... --out ..."

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def _row(name: str, values: Sequence[Any], written: Callable[[Any], Any] = lambda value: value) -> list[Any]:
    """A line of the table: before, after, and what share is left."""
    before, after = values
    return [name, written(before), written(after), f"{after / before:.2f}" if before else None]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


@as_fresh()
def run(config: ShrinkConfig, *, quiet: bool = False) -> Shrinking:
    """Make a model smaller. Torch's settings and random states are afterwards as they were.

    Raises:
        ConfigError: no such method, one that finds nothing to do, or a folder that holds something.
        ModelError: a network that a method cannot make smaller, or that is not the same when its file is read again.
        SoftcacheError: other children, for what cannot be opened.
    """
    methods = [Method.parse(text) for text in config.by]
    check_used(config)
    check_order(methods)
    out = _target(config)
    opened = open_all(config, quiet=quiet)
    policy, eval_set, samples, device = opened.policy, opened.eval_set, opened.samples, opened.device
    for method in methods:  # all of them, before the first takes its time
        method.check(samples)
    before = copy.deepcopy(samples.model)
    require_room(out, sum(tensor.nbytes for tensor in before.state_dict().values()), "the smaller model may need")
    with locked(out), Meter(f"shrink {config.model}", len(methods) + 3, unit="steps", quiet=quiet) as meter:
        for path in _left_in(out):
            durable.remove(path)
        steps: list[tuple[str, str]] = []
        notes: tuple[str, ...] = ()
        for method in methods:
            meter.note(method.text)
            if method.name == INT8 and steps:  # what was cut before it has to be measured while BatchNorm is there
                notes = _measure_batch_norm(samples)
            steps.append((method.text, _applied(method, samples)))
            meter.add()
        quantised = methods[-1].name == INT8
        notes += () if quantised else _measure_batch_norm(samples)
        meter.add()
        both = [Samples.of(before, config.model, samples.example, 0, samples.item, config.batch_size), samples]
        costs = cost_of(both, config.batch_size)
        speed, why = _speed(before, samples, torch.get_num_threads()) if quantised else (None, ())
        meter.add()
        measured = [_measured(one.model, eval_set, policy, config, device) for one in both]
        meter.add()
        result = Shrinking(
            out, config.model, tuple(steps), (*notes, *why), costs[0], costs[1], config.eval_data, measured[0], measured[1],
            config.batch_size, str(device), torch.get_num_threads(), speed,
        )  # fmt: skip
        _write(result, samples, policy, config, fingerprint(before))
    return result


def _speed(before: Model, samples: Samples, threads: int) -> tuple[Speed | None, tuple[str, ...]]:
    """What int8 gains in onnxruntime, where that is installed and takes the network; and what is said of the table's times."""
    if any(find_spec(package) is None for package in PACKAGES):
        return None, (f"{ROUNDED}; with softcache[onnx] int8 is timed as well",)
    if samples.model.gives == "words":  # what is traced is of one length of texts
        return None, (f"{ROUNDED}; int8 was not timed: a tagger is not written as ONNX yet",)
    items = [samples.item(i % samples.count) for i in range(max(4, samples.batch_size))]
    model = samples.model
    try:
        batch, many = Batch.of(model, items[:3], items[:4]), model.input.collate(items[: samples.batch_size])
        return speed_of((before, model), batch, many, samples.what, threads), (ROUNDED,)
    except ExportError as exc:
        return None, (f"{ROUNDED}; int8 was not timed: {exc.message}",)


def check_order(methods: Sequence[Method]) -> None:
    for earlier, later in pairwise(methods):
        if earlier.name == INT8:
            twice = later.name == INT8
            raise ConfigError(
                f"--by {later.text} after --by {earlier.text}: "
                + ("once is enough" if twice else "of int8 weights nothing more can be cut"),
                tip=f"leave one out, {INT8} is the last" if twice else f"give --by {INT8} last",
            )


def _applied(method: Method, samples: Samples) -> str:
    record, said = method.apply(samples)
    if record != Shrunk():
        model = samples.model
        model.shrunk = record if model.shrunk is None else model.shrunk.then(record)
    return said


def _measure_batch_norm(samples: Samples) -> tuple[str, ...]:
    if not samples.given:
        if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in samples.model.modules()):
            return ("BatchNorm keeps the statistics of the whole network; with --data DATA they are measured anew",)
        return ()
    count = samples.measure_batch_norm()
    return (f"BatchNorm measured anew on {samples.count:,} samples, {count} layers",) if count else ()


def _measured(
    model: Model, eval_set: TransferSet | None, policy: Policy, config: ShrinkConfig, device: torch.device
) -> Evaluation | None:
    return None if eval_set is None else evaluate(model, eval_set, policy, device=device, batch_size=config.batch_size)


# ------------------------------------------------------------------------------------------------------------ what goes in


def _target(config: ShrinkConfig) -> Path:
    for name, value in (("--by METHOD", config.by), ("--out DIR", config.out)):
        if not value:
            raise ConfigError(
                f"{name.split()[0]} is missing",
                tip=f"{name}; or --scan, which only tells what each layer can do without",
            )
    out = Path(config.out or "")
    if os.path.lexists(out) and not out.is_dir():
        raise ConfigError(f"{out}: is a file", tip="choose another --out")
    if out.is_dir():
        _left_in(out)
    return out


def _left_in(out: Path) -> list[Path]:
    """What one that was killed has left in the folder; any other file is refused."""
    left = list(out.iterdir())
    if any(path.name == STUDENT or not _is_left(path.name) for path in left):
        raise ConfigError(f"{out}: holds files already", tip="remove them, or choose another --out")
    return [path for path in left if path.name != LOCK]


def _is_left(name: str) -> bool:
    """Whether a shrink that was killed before its student had a name may have left such a file."""
    return (
        name in (LOCK, TABLE) or name.startswith(f"{TABLE}.tmp") or (name[:1] == "." and name.endswith(f".{STUDENT}"))
    )


# ----------------------------------------------------------------------------------------------------------- what comes out


def _write(result: Shrinking, samples: Samples, policy: Policy, config: ShrinkConfig, source: str) -> None:
    """The run folder: the table first, and the student last, when it was seen to be what its file says.

    Args:
        source: fingerprint of the whole model; where it lies is in the table alone, so that the same is the same file anywhere.
    """
    out, model = result.path, samples.model
    weights = weights_of(config.model)
    known = read_metadata(Path(weights)) if os.path.isdir(weights) or weights.endswith(".safetensors") else {}
    told = {
        **{key: value for key, value in known.items() if key.startswith("softcache_")},
        "softcache_policy": json.dumps(policy.to_json()),
        "softcache_version": __version__,
        SHRINK_KEY: json.dumps({"source": source, "by": list(config.by)}),
    }
    durable.write_whole(out / TABLE, (json.dumps(result.to_json(), indent=1) + "\n").encode())
    with durable.written_by_path(out / STUDENT, out / f".{os.getpid()}.{STUDENT}") as aside:
        save_student(model, aside, metadata=told)
        again = load_model(
            text_of_copy(config.model, aside),
            num_classes=model.num_classes,
            class_names=model.data_class_names,
            input_shape=item_shape(samples.example),
            allow_code=config.allow_code,
            device=str(next(model.parameters()).device),
        ).eval()
        expected = samples.run(2)
        with torch.no_grad():
            found = again(samples.inputs(2))
        if not torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max())):
            raise ModelError(
                f"{config.model}: built again from its file, the smaller model gives other logits",
                tip="does a factory build another network each time? nothing was written",
            )

"""Settings: frozen dataclasses <-> TOML files and flags. Unknown keys are refused; where each value came from is kept.

Precedence: defaults < --config file.toml < --set key=value < flags.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from softcache.errors import ConfigError, nearest
from softcache.spec import convert, split_list

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    positional: bool = False,
    repeat: bool = False,
) -> Any:
    """A setting with its help text.

    Args:
        default: `...` makes it required.
        choices: the only values it may have.
        metavar: what stands for its value in help; the name of a positional one.
        positional: on the command line it is a word of its own, not a flag.
        repeat: of a list: each use of the flag is one value, with commas of its own; otherwise commas separate values.
    """
    return field(
        default=None if default is ... else default,
        metadata={
            "help": help,
            "choices": tuple(choices),
            "metavar": metavar,
            "required": default is ...,
            "positional": positional,
            "repeat": repeat,
        },
    )


DATA_HELP = (
    "transfer set: digits, torchvision:NAME?root=..., imagefolder:PATH, images:PATH, table:PATH?text=NAME&label=NAME, "
    "file.py:factory"
)
CLASSES_MAP_HELP = (
    "which of the data's classes is which of the model's: a line for each, the two with a tab between them"
)
CLASSES_MAP_OF_BOTH = (
    "which of the data's classes is which of the model's, and of the cache's: lines with a tab between the two"
)
SETTINGS = "stage"  # the setting whose values are lines of settings
_QUOTED = re.compile(r'(^|,) *"')  # a name in quotes, in a list
AUTOCAST = ("none", "bf16", "fp16")


class Settings:
    """What checks and converts its own fields, made in Python too: `epochs="2"`, `out=Path(...)`, `loss="kd"`.

    Raises:
        ConfigError: a value of another type, an unknown choice, a required setting missing.
    """

    def __post_init__(self) -> None:
        hints, kind = typing.get_type_hints(type(self)), type(self).__name__
        for one in fields(self):  # type: ignore[arg-type]
            where, given = f"{kind}: {one.name}", getattr(self, one.name)
            if one.metadata["required"] and given in (None, ""):
                raise ConfigError(f"{where} is missing", tip=f"{one.name}: {one.metadata['help']}")
            value = _own(given, hints[one.name], where, settings=one.name == SETTINGS)
            _check_choice(one, value, where)
            object.__setattr__(self, one.name, value)


def _own(value: Any, hint: Any, where: str, *, settings: bool) -> Any:
    """A value of Python's as the type of its field; ConfigError where it is none."""
    if value is None and (type(None) in typing.get_args(hint) or hint is str):
        return None  # of a required one it is told below
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if (
        isinstance(value, str)
        and (hint is str or str in typing.get_args(hint))
        and typing.get_origin(hint) is not tuple
    ):
        return value  # "none" too
    if typing.get_origin(hint) is tuple and not isinstance(value, str | dict) and isinstance(value, Iterable):
        value = tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
    if isinstance(value, bytes) or (value is not None and hint is str and not isinstance(value, int | float)):
        raise ConfigError(f"{where}: {value!r} is no text")
    return coerce(value, hint, where, settings=settings)


def _check_choice(one: Field[Any], value: Any, where: str) -> None:
    choices = one.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{where} cannot be {value!r}", tip=nearest(str(value), choices))


@dataclass(frozen=True)
class DataOptions(Settings):
    """Which samples."""

    data: str = option(..., DATA_HELP, metavar="DATA")
    keep_labels: tuple[str, ...] = option(
        (),
        "only samples of these classes: names or indices, 7,8 or 0-4; a name with a comma in double quotes",
        metavar="LABELS",
    )
    drop_labels: tuple[str, ...] = option((), "no samples of these classes", metavar="LABELS")
    samples: str | None = option(None, "only the samples whose keys this file lists, one a line", metavar="FILE")
    without: str | None = option(None, "no samples whose keys this file lists, one a line", metavar="FILE")
    download: bool = option(False, "let torchvision download a data set that is not there")

    def selection(self) -> dict[str, Any]:
        """What `open_transfer_set` takes beside the spec."""
        return {
            "download": self.download,
            "keep_labels": self.keep_labels,
            "drop_labels": self.drop_labels,
            "samples": Path(self.samples) if self.samples else None,
            "without": Path(self.without) if self.without else None,
        }


@dataclass(frozen=True)
class MachineOptions(Settings):
    """Where it runs."""

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one", metavar="DEVICE")
    threads: int | None = option(
        None, "CPU threads of torch (default: OMP_NUM_THREADS, else all cores this process may use)", metavar="N"
    )
    workers: int | None = option(None, "loader processes (default: 0 on a CPU, 4 with a GPU)", metavar="N")
    autocast: str = option(
        "none", "compute in a half type where that is safe; when training, evaluate so too", choices=AUTOCAST
    )


MOST_TOML = 2**24  # bytes
CHECK_FILES_HELP = (
    "no: take cache files of the right name and size for those that the manifest names, without hashing them"
)
ALLOW_CODE_HELP = (
    "believe what a cache, a run folder or a weights file names: call its factories and transforms, open its data"
)
CODEC_HELP = (
    "how logits are stored: float16 (the default), float32, int8, headtail:k=8,bits=8, lowrank, topk:k=10, linear_head; "
    "`softcache plan` compares them on your teacher"
)


@dataclass(frozen=True)
class StorageOptions(MachineOptions, DataOptions):
    """What a dump stores, and how: the same for `dump` and `plan`."""

    teacher: tuple[str, ...] = option(
        ..., "MODEL@WEIGHTS or a run folder; repeat for an ensemble", metavar="TEACHER", repeat=True
    )
    classes_map: str | None = option(None, CLASSES_MAP_HELP, metavar="FILE")
    codec: str | None = option(None, CODEC_HELP, metavar="CODEC")
    max_kl: float | None = option(
        None, "promise: KL(teacher || stored) of every record at most this, in nats; picks a codec", metavar="NATS"
    )
    at_temperature: float = option(4.0, "temperature of the promise", metavar="T")
    features: tuple[str, ...] = option(
        (), "also store features: layer3:pool,layer4:attention; of one member only: name=layer3:pool", metavar="F,F"
    )
    for_: tuple[str, ...] = option(
        (),
        "also store the cheapest features that these losses need: at,crd,dkd (see `softcache losses`)",
        metavar="LOSSES",
    )
    feature_dtype: str = option("float16", "how features are stored", choices=("float16", "int8"))
    policy: tuple[str, ...] = option(
        (), "one step of the view policy, name:key=value,...; repeat", metavar="STEP", repeat=True
    )
    views: int | None = option(None, "views per sample (default: 1)", metavar="V")
    view_seed: int = option(0, "root seed of the views", metavar="SEED")
    batch_size: int = option(256, "samples per teacher call; part of the plan", metavar="B")
    order: str = option(
        "permuted", "rows in a seeded order, or as the data set has them", choices=("permuted", "natural")
    )
    order_seed: int = option(0, "seed of the row order", metavar="SEED")
    shard_rows: int | None = option(None, "rows per shard (default: about 64 shards)", metavar="N")
    no_keys: bool = option(False, "do not store sample keys (private names); ids stay")
    allow_code: bool = option(False, ALLOW_CODE_HELP)


@dataclass(frozen=True)
class PlanConfig(StorageOptions):
    """softcache plan: what a dump would cost and keep, measured on some of the samples."""


@dataclass(frozen=True)
class DumpConfig(StorageOptions):
    """softcache dump: run the teacher once over the transfer set."""

    out: str = option(..., "folder of the cache", metavar="DIR")
    license: str | None = option(
        None, "what others may do with the cache, for its card: cc-by-4.0, ...", metavar="TEXT"
    )
    extend: bool = option(False, "add to the finished cache in --out: up to --views views, or the members of --teacher")
    misfits: str | None = option(
        None,
        "write the keys of all samples that cannot be read, or do not fit the others: for --without",
        metavar="FILE",
    )
    part: str | None = option(None, "i/n: write every n-th span, for job arrays", metavar="I/N")
    list_modules: bool = option(False, "print the teacher's modules and their output shapes for --features, and stop")


@dataclass(frozen=True)
class TrainConfig(MachineOptions, DataOptions):
    """softcache train: a student from a cache, or from hard labels without one."""

    student: str = option(..., "MODEL or MODEL@WEIGHTS", metavar="MODEL")
    out: str = option(..., "run folder", metavar="DIR")
    init_from: str | None = option(
        None, "start from the weights of MODEL@WEIGHTS or of a run, where names and shapes agree", metavar="MODEL"
    )
    init_map: tuple[str, ...] = option(
        (), "of --init-from: layers.1=layers.2 takes the student's layers.1 from there; repeat", metavar="OWN=FROM"
    )
    classes: tuple[str, ...] = option(
        (), "a student of these classes only (names or indices, 7,8 or 0-4)", metavar="LABELS"
    )
    classes_map: str | None = option(None, CLASSES_MAP_OF_BOTH, metavar="FILE")
    eval_data: str | None = option(None, "data set for evaluation", metavar="DATA")
    eval_every: int = option(1, "evaluate only after every N-th epoch, and a stage's last", metavar="N")
    cache: str | None = option(None, "cache to learn from; none = hard labels", metavar="DIR")
    cache_id: str | None = option(None, "pin a manifest of the cache by its id", metavar="ID")
    loss: tuple[str, ...] = option((), "name:weight=W,key=value,...; repeat to add terms", metavar="LOSS", repeat=True)
    combine: str = option(
        "mean_logits", "how members combine: mean_logits, mean_probs_at_t, mean_probs, vote, draw", metavar="RULE"
    )
    members: tuple[str, ...] = option((), "members to use, with weights if wanted: a=0.7,b=0.3", metavar="NAMES")
    labels: str = option("cache", "dataset: allow labels that differ from the cache's", choices=("cache", "dataset"))
    join: str = option("key", "how samples find their rows", choices=("key", "content"))
    check_content: str = option(
        "auto",
        "compare contents with the cache's; auto: spread, and where that cannot be done it is said",
        choices=("auto", "none", "spread", "full"),
    )
    read: str = option("mmap", "pread suits network file systems", choices=("mmap", "pread"))
    check_blocks: str = option(
        "first", "when the checksums of the cache's blocks are looked at", choices=("first", "always", "never")
    )
    check_files: str = option("yes", CHECK_FILES_HELP, choices=("yes", "no"))
    allow_code: bool = option(False, ALLOW_CODE_HELP)
    view: int | None = option(None, "always this view (default: epoch modulo views)", metavar="V")
    size: int | None = option(None, "render the cache's views at this width instead of the teacher's", metavar="PIXELS")
    augment: tuple[str, ...] = option(
        (),
        "one step of a policy of the student's own: views that are not the targets'; known to lose; repeat",
        metavar="STEP",
        repeat=True,
    )
    on_drift: str = option("error", "when views render to other pixels than the teacher saw", choices=("error", "warn"))
    policy: tuple[str, ...] = option(
        (), "one step of the view policy, without a cache; repeat", metavar="STEP", repeat=True
    )
    view_seed: int = option(0, "root seed of the views, without a cache and of --augment", metavar="SEED")
    epochs: int = option(20, "passes over the data", metavar="N")
    more_epochs: int | None = option(
        None, "let the run in --out, of --epochs, go on for so many more; of stages the last", metavar="N"
    )
    batch_size: int = option(128, "samples per step", metavar="B")
    optimizer: str = option("adamw", "what makes the steps", choices=("sgd", "adam", "adamw"))
    lr: float = option(1e-3, "learning rate at its peak", metavar="LR")
    momentum: float = option(0.9, "of sgd", metavar="M")
    nesterov: bool = option(False, "Nesterov momentum, of sgd")
    weight_decay: float = option(0.0, "L2 for sgd and adam, decoupled for adamw", metavar="WD")
    schedule: str = option(
        "cosine",
        "of the learning rate, as a factor: constant, linear, cosine, step(at=150/180/210), warmup(5, cosine), ...",
        metavar="SCHEDULE",
    )
    freeze: tuple[str, ...] = option(
        (), "parameters of the student that stay as they are: layer1,layer2.0.*,* by name or pattern", metavar="NAMES"
    )
    stage: tuple[str, ...] = option(
        (),
        "one stage of several, with what differs in it: 'epochs=5 lr=0.01 freeze=* loss=hint loss=ce:weight=0.1'; repeat",
        metavar="SETTINGS",
        repeat=True,
    )
    clip_norm: float | None = option(None, "scale a larger gradient down to this length", metavar="NORM")
    accumulate: int = option(1, "compute a batch in this many pieces, one after the other", metavar="N")
    ema: float | None = option(
        None, "evaluate and keep an exponential moving average of the weights: 0.999", metavar="D"
    )
    views_per_visit: int = option(1, "a visit of a sample takes this many of its views, in one batch", metavar="K")
    patience: int | None = option(None, "end a stage after this many epochs without a better evaluation", metavar="N")
    keep: str = option("last", "which epoch's student is kept in the end", choices=("last", "best"))
    channels_last: bool = option(
        False, "images' channels lie last in memory: faster convolutions, on a CPU most with bf16"
    )
    compile: bool = option(False, "compile the student with torch.compile")
    sync_bn: bool = option(False, "BatchNorm over the batches of all GPUs")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, into OUT/tensorboard")
    seed: int = option(0, "initial weights, order of samples, dropout", metavar="SEED")
    checkpoint_every: int | None = option(None, "also save every N steps (default: every epoch)", metavar="N")


@dataclass(frozen=True)
class EvalConfig(MachineOptions, DataOptions):
    """softcache eval: how good a model is on a data set."""

    classes_map: str | None = option(None, CLASSES_MAP_OF_BOTH, metavar="FILE")
    cache: str | None = option(None, "compare with the soft targets of this cache of the same data", metavar="DIR")
    combine: str = option("mean_logits", "how the cache's members combine", metavar="RULE")
    members: tuple[str, ...] = option(
        (), "members of the cache to use, with weights if wanted: a=0.7,b=0.3", metavar="NAMES"
    )
    temperature: float = option(1.0, "temperature of the comparison with the cache", metavar="T")
    batch_size: int = option(512, "samples per forward pass", metavar="B")
    policy: tuple[str, ...] = option(
        (), "deterministic view steps (default: those of the run)", metavar="STEP", repeat=True
    )
    bias: tuple[str, ...] = option(
        (), "add to the logits of classes before anything is measured: 3=3.5 or 7=-7.6,8=-7.6", metavar="CLASS=B"
    )
    fit_bias: tuple[str, ...] = option(
        (),
        "find the one number to add to these classes' logits that makes fewest errors on --bias-data",
        metavar="LABELS",
    )
    bias_data: str | None = option(None, "held-out data for --fit-bias", metavar="DATA")
    bias_model: str | None = option(
        None, "find it on this model, a twin that was not trained on --bias-data", metavar="MODEL"
    )
    check_files: str = option("yes", CHECK_FILES_HELP, choices=("yes", "no"))
    per_class: bool = option(False, "also the errors on each class")
    allow_code: bool = option(False, ALLOW_CODE_HELP)


@dataclass(frozen=True)
class ExportConfig(Settings):
    """softcache export: a model as one file for other programs, verified on an evaluation set."""

    to: str = option(
        ...,
        "safetensors: the weights and what rebuilds the network; program: of torch.export; onnx: for other runtimes",
        choices=("safetensors", "program", "onnx"),
        metavar="FORMAT",
    )
    out: str | None = option(
        None, "the file (default: export.safetensors, .pt2 or .onnx in the run folder)", metavar="FILE"
    )
    opset: int | None = option(None, "version of ONNX's operators (default: what this torch writes)", metavar="N")
    data: str | None = option(
        None, "evaluation set (with --allow-code by default the run's own --eval-data)", metavar="DATA"
    )
    classes_map: str | None = option(None, CLASSES_MAP_HELP, metavar="FILE")
    policy: tuple[str, ...] = option(
        (), "deterministic view steps (default: those of the run)", metavar="STEP", repeat=True
    )
    download: bool = option(False, "let torchvision download a data set that is not there")
    allow_code: bool = option(False, ALLOW_CODE_HELP)
    batch_size: int = option(512, "samples per forward pass of the verification", metavar="B")
    device: str = option("auto", "where the verification runs; ONNX always on the CPU", metavar="DEVICE")
    threads: int | None = option(
        None, "CPU threads (default: OMP_NUM_THREADS, else all cores this process may use)", metavar="N"
    )
    workers: int | None = option(None, "loader processes (default: 0 on a CPU, 4 with a GPU)", metavar="N")


BY_HELP = (
    "carve:depth=0.5, carve:width=0.5, carve:keep=NAMES, prune:structured,amount=0.3, prune:unstructured,amount=0.5, "
    "lowrank:energy=0.95, lowrank:rank=0.25; repeat to do one after the other"
)


@dataclass(frozen=True)
class ShrinkConfig(Settings):
    """softcache shrink: a smaller model out of a trained one, as a run folder."""

    model: str = option(..., "run folder or MODEL@WEIGHTS", metavar="MODEL", positional=True)
    by: tuple[str, ...] = option(..., BY_HELP, metavar="METHOD", repeat=True)
    out: str = option(..., "run folder of the smaller model", metavar="DIR")
    data: str | None = option(
        None, "samples by which lowrank chooses and BatchNorm is measured anew; labels are not used", metavar="DATA"
    )
    eval_data: str | None = option(None, "data set on which both models are measured", metavar="DATA")
    classes_map: str | None = option(None, CLASSES_MAP_HELP, metavar="FILE")
    policy: tuple[str, ...] = option(
        (), "deterministic view steps (default: those of the run)", metavar="STEP", repeat=True
    )
    download: bool = option(False, "let torchvision download a data set that is not there")
    allow_code: bool = option(False, ALLOW_CODE_HELP)
    batch_size: int = option(64, "samples of the batch that is timed, and of each forward pass", metavar="B")
    seed: int = option(0, "weights of layers that begin anew", metavar="SEED")
    device: str = option("auto", "where it is measured", metavar="DEVICE")
    threads: int | None = option(None, "CPU threads (default: all cores this process may use)", metavar="N")


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """A config and, per field, where its value came from."""

    config: Config
    origins: Mapping[str, str]


def resolve(
    kind: type[Config], *, file: str | None = None, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> Resolved[Config]:
    """One config out of all sources.

    Args:
        kind: a config dataclass.
        file: a TOML file.
        sets: "key=value" strings.
        flags: values given on the command line, strings or tuples of strings.

    Raises:
        ConfigError: unknown key (with near names), a value of another type, an unknown choice, a required one missing.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for origin, source in _sources(file, sets, flags or {}):
        for key, value in source.items():
            name = key.replace("-", "_")
            name = f"{name}_" if f"{name}_" in known else name  # a Python keyword
            if name not in known:
                raise ConfigError(f"{origin}: unknown setting {key!r}", tip=nearest(name, known))
            values[name] = coerce(value, hints[name], _place(known[name], origin), settings=name == SETTINGS)
            origins[name] = origin
    for name, f in known.items():
        if name in values:
            _check_choice(f, values[name], _place(f, origins[name]))
        if f.metadata["required"] and not values.get(name):
            place, metavar = _place(f, "flag"), f.metadata["metavar"]
            usage = place if f.metadata["positional"] else f"{place} {metavar}"
            raise ConfigError(f"{place} is missing", tip=f"{usage}: {f.metadata['help']}")
    return Resolved(kind(**values), origins)


def _place(one: Field[Any], origin: str) -> str:
    """How a message names a setting: as it was given."""
    if origin != "flag":
        return f"{origin}: {one.name}"
    return str(one.metadata["metavar"]) if one.metadata["positional"] else flag_of(one.name)


def _sources(file: str | None, sets: Sequence[str], flags: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        sources.append((file, parse_toml(read_toml(Path(file)), file)))
    for pair in sets:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r} is not key=value")
        sources.append(("--set", {key: value}))
    sources.append(("flag", flags))
    return sources


def read_toml(path: Path) -> bytes:
    """The bytes of a TOML file, no more than `parse_toml` takes; ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_TOML + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from None


def parse_toml(data: bytes, where: str, *, tip: str = "") -> dict[str, Any]:
    """What TOML says; ConfigError for what is none, has more than MOST_TOML bytes, or is deeper than Python reads."""
    if len(data) > MOST_TOML:
        raise ConfigError(f"{where}: has more than {MOST_TOML:,} bytes", tip="give settings, no data")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{where}: not TOML: {exc}", tip=tip) from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply", tip=tip) from None


def flag_of(name: str) -> str:
    """How a field is written on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")


def coerce(value: Any, hint: Any, where: str, *, settings: bool = False) -> Any:
    """A value from TOML or the command line as the type of its field; tables become `name:key=value,...` strings.

    Args:
        settings: each text is a line of settings, `epochs=5 loss=kd`, and so is each table.
    """
    if isinstance(value, str):
        is_list = typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str
        if is_list and _QUOTED.search(value) and not settings:
            return split_list(value)
        whole = is_list and (":" in value or settings)  # it holds commas of its own
        return (value,) if whole else convert(value, hint, where)
    if isinstance(value, list | tuple):
        if typing.get_origin(hint) is not tuple:
            raise ConfigError(f"{where}: {list(value)!r} is a list, not one value")
        element = (typing.get_args(hint) or (str,))[0]
        written = settings_text if settings else _table_text
        return tuple(written(v, where) if isinstance(v, dict) else coerce(v, element, where) for v in value)
    if isinstance(value, dict):
        raise ConfigError(f"{where}: is a table, not a value")
    return convert(str(value), hint, where)


def _table_text(table: Mapping[str, Any], where: str) -> str:
    if "name" not in table:
        raise ConfigError(f"{where}: a table needs a name", tip='write name = "kd"')
    rest = ",".join(f"{key}={value}" for key, value in table.items() if key != "name")
    return f"{table['name']}:{rest}" if rest else str(table["name"])


def settings_text(table: Mapping[str, Any], where: str) -> str:
    """A table of settings as one line, `epochs=5 loss=hint loss=ce`: what `--stage` takes."""
    parts = []
    for key, value in table.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            text = _table_text(one, f"{where}: {key}") if isinstance(one, dict) else str(one)
            parts.append(shlex.quote(f"{key}={text}"))
    return " ".join(parts)


def parse_settings(text: str, where: str) -> dict[str, list[str]]:
    """`epochs=5 loss=hint loss=ce` -> {"epochs": ["5"], "loss": ["hint", "ce"]}; ConfigError for anything else."""
    found: dict[str, list[str]] = {}
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise ConfigError(f"{where}: {text!r}: {exc}") from None
    for word in _closed(words):
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{where}: {word!r} is not key=value", tip="write 'epochs=5 lr=0.01 loss=kd'")
        if re.search(r"[;,]\s*(epochs|lr|loss|freeze|schedule|optimizer)=", value):
            raise ConfigError(
                f"{where}: {word!r}: settings stand apart by spaces", tip="write 'epochs=5 lr=0.01 loss=kd'"
            )
        found.setdefault(key.replace("-", "_"), []).append(value)
    return found


def _closed(words: Sequence[str]) -> list[str]:
    """The words, those within one pair of brackets put together again: a schedule may be written with spaces."""
    closed: list[str] = []
    for word in words:
        if closed and closed[-1].count("(") > closed[-1].count(")"):
            closed[-1] += f" {word}"
        else:
            closed.append(word)
    return closed


def parse_part(text: str | None) -> tuple[int, int]:
    """`i/n` -> (i, n), counted from 1."""
    if text is None:
        return 1, 1
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise ConfigError(f"--part {text!r} is not i/n", tip="write 1/3, 2/3 and 3/3 for three processes")
    return int(index), int(count)


def to_toml(config: Any) -> str:
    """The settings that are not None, as a TOML file that `--config` reads back."""
    lines = []
    for f in fields(config):
        value = getattr(config, f.name)
        if value is not None:
            lines.append(f"{f.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)

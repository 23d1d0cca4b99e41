"""The settings of each verb: its flags, the keys of its TOML file, and what Python passes to its `run`."""

from __future__ import annotations

from dataclasses import dataclass

from softcache.config.options import (
    ALLOW_CODE_HELP,
    CHECK_FILES_HELP,
    CLASSES_MAP_HELP,
    CLASSES_MAP_OF_BOTH,
    DataOptions,
    MachineOptions,
    StorageOptions,
)
from softcache.config.settings import Settings, option


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
    first_view: int = option(
        0, "the views begin with this one of the policy: a later part of a cache, for `softcache merge`", metavar="V"
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
    cache: str | None = option(None, "cache to learn from, a folder or a URL; none = hard labels", metavar="DIR")
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
    prune: str | None = option(
        None,
        "set weights to zero while it learns: 'unstructured:amount=linear(0, 0.8, until=15)'; held: leave those that are zero",
        metavar="HOW",
    )
    quantise: str | None = option(
        None, "int8: learn as the int8 student that is saved, weights and activations rounded", metavar="int8"
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
    "carve:depth=0.5, carve:width=0.5, carve:keep=NAMES, prune:structured,amount=0.3, prune:structured,target=macs:0.5, "
    "prune:unstructured,amount=0.5, lowrank:energy=0.95, lowrank:rank=0.25, quantise:int8; repeat to do one after the other"
)


@dataclass(frozen=True)
class ShrinkConfig(Settings):
    """softcache shrink: a smaller model out of a trained one, as a run folder."""

    model: str = option(..., "run folder or MODEL@WEIGHTS", metavar="MODEL", positional=True)
    by: tuple[str, ...] = option((), BY_HELP, metavar="METHOD", repeat=True)
    out: str | None = option(None, "run folder of the smaller model", metavar="DIR")
    data: str | None = option(
        None,
        "samples by which a method chooses and BatchNorm is measured anew; labels matter to taylor alone",
        metavar="DATA",
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
    cache: str | None = option(
        None, "soft targets of --data, by which prune:structured,importance=taylor chooses", metavar="DIR"
    )
    scan: bool = option(
        False, "how much worse it is when one layer alone loses 30, 50 and 70 % of its channels; writes nothing"
    )

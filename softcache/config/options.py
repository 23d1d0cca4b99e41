"""Settings that several verbs have: which samples, on what machine, what is stored and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.config.settings import Settings, option

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
CHECK_FILES_HELP = (
    "no: take cache files of the right name and size for those that the manifest names, without hashing them"
)
ALLOW_CODE_HELP = (
    "believe what a cache, a run folder or a weights file names: call its factories and transforms, open its data"
)
CODEC_HELP = (
    "how logits are stored: float16 (the default), float32, int8, headtail:k=8,bits=8, lowrank, topk:k=10, "
    "topset:k=50, linear_head; "
    "`softcache plan` compares them on your teacher"
)
AUTOCAST = ("none", "bf16", "fp16")


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
    max_relative_error: float | None = option(
        None,
        "promise of embeddings and values: |stored - given| / |given| of every record at most this; picks a codec",
        metavar="SHARE",
    )
    whiten: bool = option(
        False, "also store what whitens embeddings and values, for losses with scale=whiten: a matrix of D x D numbers"
    )
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
    batch_tokens: int | None = option(
        None, "tokens per call of a language model, in place of --batch-size (default: by its vocabulary)", metavar="N"
    )
    order: str = option(
        "permuted", "rows in a seeded order, or as the data set has them", choices=("permuted", "natural")
    )
    order_seed: int = option(0, "seed of the row order", metavar="SEED")
    shard_rows: int | None = option(None, "rows per shard (default: about 64 shards)", metavar="N")
    format: str = option(
        "1", "version of the cache's format; 2 is provisional: its caches may have to be made again", choices=("1", "2")
    )
    no_keys: bool = option(False, "do not store sample keys (private names); ids stay")
    allow_code: bool = option(False, ALLOW_CODE_HELP)

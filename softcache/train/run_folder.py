"""The run folder: who may use it, what the run is, and the file that repeats it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.config import TrainConfig, to_toml
from softcache.errors import LockedError, TrainingError
from softcache.files import durable
from softcache.files.inside import RUN as IN_RUN
from softcache.files.inside import read_inside, refuse_link
from softcache.files.locks import release_lock, take_lock
from softcache.models.saved_metadata import load_json
from softcache.models.seal import FORMAT, check_format
from softcache.train.ranks import Ranks
from softcache.train.stages import Stage
from softcache.version import __version__

STUDENT, RUN, CONFIG = "student.safetensors", "run.json", "config.toml"
METRICS_JSONL, METRICS_CSV, LOCK = "metrics.jsonl", "metrics.csv", "lock"
BEST, TENSORBOARD = "best.safetensors", "tensorboard"

MOST_BYTES = 2**24  # of run.json and config.toml

# settings that may differ between a run and its resume: they do not belong to what is computed
FREE_TO_CHANGE = (
    "out",
    "workers",
    "threads",
    "device",
    "checkpoint_every",
    "download",
    "read",
    "check_content",
    "on_drift",
    "tensorboard",
)


def claim_folder(config: TrainConfig) -> Path:
    """The run folder, refused when it holds another run or foreign files."""
    out = Path(config.out)
    if os.path.exists(out) and not out.is_dir():
        raise TrainingError(f"{out}: is a file", tip="choose another --out")
    # listed before the run is read: a process that begins at the same moment writes run.json before anything else
    strangers = out.is_dir() and any(not _is_left(path.name) for path in out.iterdir())
    if about := _read_run(out):
        changed = _changed(about["config"], config)
        if changed:
            listing = "; ".join(f"{key} was {_short(then)}, is now {_short(now)}" for key, (then, now) in changed[:6])
            raise TrainingError(
                f"{out}: holds a run with other settings: {listing}",
                tip="choose another --out; the same settings resume the run",
            )
    elif strangers:
        raise TrainingError(f"{out}: holds files that are no run", tip="choose another --out")
    return out


def holds_run_of(out: Path, config: TrainConfig) -> bool:
    """Whether there is a run in the folder, and it is one with these settings."""
    about = _read_run(out)
    return bool(about) and not _changed(about["config"], config)


def _changed(before: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, tuple[Any, Any]]]:
    """The settings that belong to what is computed and differ from a run's, each with (then, now)."""
    now = json.loads(json.dumps(_comparable(config)))
    usual = json.loads(json.dumps({f.name: f.default for f in fields(config) if f.default is not MISSING}))
    then = {key: before.get(key, usual.get(key)) for key in now}  # an older run did not know every setting
    if then["cache"] and now["cache"]:
        then["cache"] = now["cache"]  # it may have moved: the run holds its id
    then["allow_code"] = now["allow_code"]  # whom its user believes is no part of what is computed
    return [(key, (then[key], now[key])) for key in now if now[key] != then[key]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _is_left(name: str) -> bool:
    """Whether a run that was killed before it wrote down what it is may have left such a file."""
    return name == LOCK or name.startswith(f"{RUN}.tmp")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder and hold its lock; a folder in which nothing came to be is removed again.

    Raises:
        LockedError: another process writes here: `train` or `shrink`.
    """
    durable.make_folder(out)
    refuse_link(out / TENSORBOARD, "run folder")  # the only folder in it that is written into
    try:
        fd = take_lock(out / LOCK)
    except BlockingIOError:
        raise LockedError(
            f"{out}: another process is writing into this folder", tip="wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        durable.remove(out / LOCK)
        if not out.is_symlink() and not any(out.iterdir()):
            durable.remove_folder(out)
        release_lock(fd)


@contextmanager
def only_writer(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder's lock in the first of the ranks, once all of them have looked into it."""
    ranks.everyone(out)
    with locked(out) if ranks.first else nullcontext():
        yield


def _read_run(out: Path) -> dict[str, Any]:
    """What run.json says; empty where there is none.

    Raises:
        TrainingError: it is damaged, a link, or of a newer format.
    """
    path = out / RUN
    try:
        data = read_inside(out, RUN, MOST_BYTES, IN_RUN)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        about = load_json(data)
        check_format(about.get("format"), path, about.get("softcache"), TrainingError)
        config, cache, data_id = about["config"], about["cache"], about["data"]
        if not isinstance(config, dict) or not isinstance(cache, str | None) or not isinstance(data_id, str):
            raise TypeError("config, cache or data")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TrainingError(f"{path}: is damaged ({exc!r})", tip="choose another --out") from None
    return dict(about)


def check_same_data(out: Path, data: str, class_weights: Sequence[Mapping[str, Any]] = ()) -> None:
    """Raise TrainingError when the run in this folder began with other samples, labels, class weights or another vocabulary.

    Args:
        class_weights: as run.json has them; empty where no term has any.
    """
    about = _read_run(out)
    if about and about["data"] != data:
        raise TrainingError(
            f"{out}: this run began with other samples, labels or another vocabulary",
            tip="restore the data set, or choose another --out",
        )
    if about and about.get("class_weights", []) != list(class_weights):
        raise TrainingError(
            f"{out}: this run began with other class weights: their file has changed since",
            tip="restore the file, or choose another --out",
        )


def data_fingerprint(ids: np.ndarray, labels: np.ndarray, vocabulary: Sequence[str]) -> str:
    """sha256 over what a resumed run must find again: (N,) sample ids, labels, and a text model's vocabulary, in order."""
    hasher = hashlib.sha256(np.ascontiguousarray(ids).tobytes())
    hasher.update(np.ascontiguousarray(labels).tobytes())
    hasher.update("\n".join(vocabulary).encode("utf-8"))
    return hasher.hexdigest()


def pinned_cache(out: Path) -> str | None:
    """The id of the cache that the run in this folder began with; None for a new run, or one without a cache."""
    return _read_run(out).get("cache")


def _comparable(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE_TO_CHANGE}


def describe_run(
    out: Path,
    config: TrainConfig,
    stages: Sequence[Stage],
    facts: Mapping[str, Any],
) -> None:
    """run.json and config.toml: what this run is, and the file that repeats it.

    Args:
        facts: "cache" (its id or None), "data" (its fingerprint), and whatever else is worth keeping.
    """
    about = {
        "format": FORMAT,
        "config": _comparable(config),
        **facts,
        "stages": [stage.describe() for stage in stages],
        "softcache": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    durable.write_whole(out / RUN, (json.dumps(about, indent=1) + "\n").encode())
    durable.write_whole(out / CONFIG, to_toml(config).encode())


def write_metrics(out: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """metrics.jsonl and metrics.csv: one row per epoch."""
    durable.write_whole(out / METRICS_JSONL, "".join(json.dumps(row) + "\n" for row in metrics).encode())
    text = io.StringIO(newline="")
    columns = dict.fromkeys(name for row in metrics for name in row)  # stages have terms of their own
    writer = csv.DictWriter(text, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(metrics)
    durable.write_whole(out / METRICS_CSV, text.getvalue().encode())

"""The run folder: who may use it, what the run is, and the file that repeats it."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softcache
from softcache.config import TrainConfig, to_toml
from softcache.errors import TrainingError
from softcache.losses import LossTerm

STUDENT, RUN, CONFIG = "student.safetensors", "run.json", "config.toml"
METRICS_JSONL, METRICS_CSV = "metrics.jsonl", "metrics.csv"

# settings that may differ between a run and its resume: they do not belong to what is computed
FREE_TO_CHANGE = ("out", "workers", "threads", "device", "checkpoint_every", "download", "read", "check_content")


def claim_folder(config: TrainConfig) -> Path:
    """The run folder, refused when it holds another run or foreign files."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out}: is a file", tip="choose another --out")
    if (out / RUN).is_file():
        before = json.loads((out / RUN).read_text())["config"]
        now = json.loads(json.dumps(_comparable(config)))
        changed = [key for key in now if now[key] != before.get(key)]
        if changed:
            listing = "; ".join(f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in changed[:6])
            raise TrainingError(
                f"{out}: holds a run with other settings: {listing}",
                tip="choose another --out; the same settings resume the run",
            )
    elif out.is_dir() and any(path.name != f"{RUN}.tmp" for path in out.iterdir()):
        raise TrainingError(f"{out}: holds files that are no run", tip="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def pinned_cache(out: Path) -> str | None:
    """The id of the cache that the run in this folder began with; None for a new run, or one without a cache."""
    return json.loads((out / RUN).read_text())["cache"] if (out / RUN).is_file() else None


def _comparable(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE_TO_CHANGE}


def describe_run(
    out: Path,
    config: TrainConfig,
    terms: Sequence[LossTerm],
    *,
    cache_id: str | None,
    samples: int,
    labelled: int,
    labels_changed: int,
) -> None:
    """run.json and config.toml: what this run is, and the file that repeats it."""
    about = {
        "config": _comparable(config),
        "cache": cache_id,
        "targets": "matched" if cache_id is not None else None,
        "samples": samples,
        "labelled": labelled,
        "labels_changed": labels_changed,
        "losses": [{"name": t.name, "weight": t.weight, **t.parameters} for t in terms],
        "softcache": softcache.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    _write_aside(out / RUN, json.dumps(about, indent=1) + "\n")
    _write_aside(out / CONFIG, to_toml(config))


def write_metrics(out: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """metrics.jsonl and metrics.csv: one row per epoch."""
    _write_aside(out / METRICS_JSONL, "".join(json.dumps(row) + "\n" for row in metrics))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(metrics[0]))
    writer.writeheader()
    writer.writerows(metrics)
    _write_aside(out / METRICS_CSV, text.getvalue())


def _write_aside(path: Path, text: str) -> None:
    """After a kill there is the old file or the new one, never a part of it."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_bytes(text.encode("utf-8"))
    os.replace(aside, path)

"""A run neither needs nor changes the process's own torch state: number types, devices, gradients, generators, threads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache
from softcache import dump, train
from softcache.config import DumpConfig, EvalConfig, TrainConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.evaluate import measure

DATA = "synthetic:images?classes=4&size=8&channels=1&count=48"


def student(out: Path, **settings: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"loss": "kd:temperature=2", "epochs": 2, "batch_size": 16, "eval_data": DATA, "threads": 1}
    given |= {"student": "softcache:mlp?hidden=8", "device": "cpu", "ema": 0.9}
    train.run(TrainConfig(data=DATA, out=out, **given | settings), quiet=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "student": (out / "student.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }


def everything(folder: Path) -> dict[str, Any]:
    """What a teacher, its cache, a student from it, its evaluation, and a loop of one's own come to."""
    teacher = student(folder / "teacher", loss="ce", ema=None)
    dumped = DumpConfig(
        data=DATA, teacher=folder / "teacher", out=folder / "cache", threads=1, device="cpu", codec="int8"
    )
    result = dump.run(dumped, quiet=True)
    assert result.manifest is not None
    found = student(folder / "run", cache=folder / "cache")
    measured = measure.run(
        str(folder / "run"), EvalConfig(data=DATA, cache=str(folder / "cache"), threads=1, device="cpu")
    )
    joined = softcache.open(folder / "cache", quiet=True).join(open_transfer_set(DATA))
    logits = joined.gather([joined[i][1] for i in range(8)]).logits()
    about = (measured.top1, measured.nll, measured.kl)
    cache = {file.path: file.sha256 for file in result.manifest.files}
    return {
        "teacher": teacher,
        "cache": cache,
        "student": found,
        "eval": about,
        "logits": (logits.tolist(), logits.dtype),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return everything(tmp_path_factory.mktemp("plain"))


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def drawn() -> Iterator[None]:
    """Generators that stand somewhere else."""
    torch.rand(17), np.random.rand(5), random.random()
    yield


def state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
    }


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": float64,
    "another-device": lambda: torch.device("meta"),
    "no-gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "generators": drawn,
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_run_computes_does_not_hang_on_the_process(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    with STATES[name]():
        before = state()
        found = everything(tmp_path)
        after = state()
    for key, value in plain.items():
        assert found[key] == value, key
    for key, value in before.items():
        assert after[key] == value, key

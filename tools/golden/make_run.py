"""Writes tests/golden/runs/<version>/: runs of this version, interrupted and finished, that later versions have to go on with.

    python tools/golden/make_run.py                    # once before each release, never again: what is there is not written anew
    python tools/golden/make_run.py --check FOLDER     # resume what lies there: are the bits those that its version gave?

`exact` is arithmetic that no processor rounds; `rich` has two stages, learned terms, a memory, averages, dropout and Adam;
`pruned` has masks, which its second stage holds; `words` has an answer for each word of a sentence.
Another tree than the script's own is used by PYTHONPATH. `--quick` makes `exact` in a temporary folder, and checks it there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import softcache
from softcache import cli, dump, train
from softcache.config import DumpConfig, TrainConfig

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
MACHINE: dict[str, Any] = {"device": "cpu", "threads": 1, "workers": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {
        "data": "students.py:bits",
        "eval_data": "students.py:bits",
        "student": "students.py:exact",
        "cache": "cache-exact",
        "loss": ("mse_logits",),
        "batch_size": 4,
        "epochs": 3,
        "optimizer": "sgd",
        "lr": 0.5,
        "momentum": 0.5,
        "schedule": "constant",
        "ema": 0.5,
    },
    "rich": {
        "data": "pieces.py:images",
        "eval_data": "pieces.py:images",
        "student": "students.py:rich",
        "cache": "cache-rich",
        "stage": (
            "epochs=1 loss=hint:layer=hidden,student=hidden",
            "epochs=2 loss=kd:temperature=2 loss=crd:layer=hidden,student=hidden,negatives=8,width=4 loss=ce:weight=0.1",
        ),
        "batch_size": 8,
        "optimizer": "adamw",
        "lr": 0.01,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema": 0.9,
        "keep": "best",
    },
    "pruned": {
        "data": "pieces.py:images",
        "eval_data": "pieces.py:images",
        "student": "students.py:rich",
        "cache": "cache-rich",
        "loss": ("kd:temperature=2", "ce:weight=0.1"),
        "stage": ("epochs=1 prune=unstructured:amount=linear(0,0.5)", "epochs=2"),
        "batch_size": 8,
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "ema": 0.9,
    },
    "words": {
        "data": "table:words.jsonl?words=words&tags=tags",
        "eval_data": "table:words.jsonl?words=words&tags=tags",
        "student": "students.py:tagger",
        "cache": "cache-words",
        "loss": ("kd:temperature=2", "ce:weight=0.1", "ctkd:weight=0.1"),
        "epochs": 3,
        "batch_size": 6,
        "accumulate": 2,
        "optimizer": "adamw",
        "lr": 0.01,
        "clip_norm": 1.0,
        "ema": 0.9,
        "keep": "best",
    },
}
STOPS = {
    "exact": (0, 1, 1),
    "rich": (1, 0, 1),
    "pruned": (1, 0, 1),
    "words": (0, 1, 1),
}  # stage, epoch and step that the interrupted run has reached


# where a version keeps a cache that it made -> the run it is for, and its teacher
CACHES = {"cache": ("exact", "students.py:whole"), "cache-words": ("words", "students.py:knowing_tagger")}


class Interrupted(BaseException):
    """The run that is stopped."""


def workplace(folder: Path, source: Path | None) -> None:
    """A folder with all that the runs name: modules, words, and caches; of no version yet they are made, else copied."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pieces.py", "runs/students.py", "runs/words.jsonl"):
        shutil.copy(GOLDEN / name, folder)
    shutil.copytree(GOLDEN / "v1" / "features", folder / "cache-rich")
    for kept, (name, teacher) in CACHES.items():
        if source is None:
            make_cache(folder, SETTINGS[name]["data"], teacher, f"cache-{name}")
        elif (source / kept).exists():
            shutil.copytree(source / kept, folder / f"cache-{name}")


def make_cache(folder: Path, data: str, teacher: str, out: str) -> None:
    with contextlib.chdir(folder):
        dump.run(DumpConfig(data=data, teacher=(teacher,), out=out, codec="float32", **MACHINE), quiet=True)
    for name in ("README.md", "provenance.json"):  # they tell of this machine
        (folder / out / name).unlink()
    shutil.rmtree(folder / out / "dump")


@contextlib.contextmanager
def stopped_at(out: Path, stage: int, epoch: int, step: int) -> Iterator[None]:
    """Stop a run as soon as its checkpoint says so: before the forward pass that comes next."""

    def look(module: torch.nn.Module, inputs: Any) -> None:
        if module.training and (out / "checkpoint.pt").is_file():
            progress = torch.load(out / "checkpoint.pt", weights_only=True)["progress"]
            if (progress["stage"], progress["epoch"], progress["step"]) == (stage, epoch, step):
                raise Interrupted

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with contextlib.suppress(Interrupted):
            yield
            raise RuntimeError(f"{out}: ended before stage {stage}, epoch {epoch}, step {step}")
    finally:
        handle.remove()


def run(name: str, out: str) -> None:
    train.run(TrainConfig(**SETTINGS[name], **MACHINE, checkpoint_every=1, out=out), quiet=True)


def digests(out: Path) -> dict[str, str]:
    """sha256 of the student's tensors, and of all tensors and numbers of the checkpoint, without what counts seconds.

    Nor is what a version says of the file among it: its format, itself, and the digest that the seconds are part of.
    """
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    state = {name: value for name, value in state.items() if name not in ("format", "softcache", "digest")}
    for row in state["progress"]["metrics"]:
        del row["seconds"]
    return {"student": digest(load_file(out / "student.safetensors")), "checkpoint": digest(state)}


def digest(value: Any) -> str:
    hasher = hashlib.sha256()

    def add(at: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{at}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for number, one in enumerate(value):
                add(f"{at}/{number}", one)
        elif isinstance(value, torch.Tensor):
            hasher.update(f"{at} {value.dtype} {tuple(value.shape)}\n".encode() + value.contiguous().numpy().tobytes())
        else:
            hasher.update(f"{at} {value!r}\n".encode())

    add("", value)
    return hasher.hexdigest()


def evaluated(run_folder: str, data: str) -> dict[str, Any]:
    """What `softcache eval --json` says, without what counts seconds."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        how = ["--device", "cpu", "--threads", "1", "--allow-code", "--quiet", "--json"]
        code = cli.main(["eval", run_folder, "--data", data, *how])
    if code:
        raise RuntimeError(f"softcache eval {run_folder}: exit code {code}")
    found: dict[str, Any] = json.loads(told.getvalue())
    del found["seconds"]
    return found


def logits_of(run_folder: str, data: str, out: str) -> dict[str, list[Any]]:
    """Sample key -> logits of a run as a teacher, from a float32 dump; of words a row for each."""
    settings: dict[str, Any] = {"data": data, "teacher": (run_folder,), "allow_code": True}
    dump.run(DumpConfig(**settings, out=out, codec="float32", **MACHINE), quiet=True)
    cache = softcache.open(out)
    rows = np.arange(len(cache))
    targets = cache.gather(rows, np.zeros(len(rows), np.int64))
    logits = targets.logits().double().tolist()
    (member,) = targets.members
    if cache.member(member).index is not None:
        ends = targets.at(member).offsets.tolist()
        logits = [logits[start:stop] for start, stop in pairwise(ends)]
    return dict(zip((cache.samples.key(int(row)) for row in rows), logits, strict=True))


def make(name: str, folder: Path) -> dict[str, Any]:
    """One run, interrupted, resumed and finished, in a workplace; what is expected of those who resume it."""
    interrupted, finished = folder / name / "interrupted", folder / name / "finished"
    with contextlib.chdir(folder):
        with stopped_at(interrupted, *STOPS[name]):
            run(name, f"{name}/interrupted")
        run(name, f"{name}/finished")
        shutil.copytree(interrupted, folder / f"{name}-resumed")
        run(name, f"{name}-resumed")
        if digests(folder / f"{name}-resumed") != digests(finished):
            raise RuntimeError(f"{name}: resumed, it differs from the run that was not interrupted")
        data = SETTINGS[name]["data"]
        rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
        return {
            "made_with": {"softcache": softcache.__version__, "torch": torch.__version__, "numpy": np.__version__},
            "settings": SETTINGS[name],
            "stopped_at": dict(zip(("stage", "epoch", "step"), STOPS[name], strict=True)),
            "digests": digests(finished),
            "metrics": rows,
            "evaluation": evaluated(f"{name}/finished", data),
            "logits": logits_of(f"{name}/finished", data, f"{name}-dumped"),
        }


def write(target: Path, names: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(prefix="make-run-") as scratch:
        folder = Path(scratch)
        workplace(folder, None)
        for name in names:
            expected = make(name, folder)
            shutil.copytree(folder / name, target / name)
            (target / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        for kept, (name, _) in CACHES.items():
            shutil.copytree(folder / f"cache-{name}", target / kept)
    for name in names:
        size = sum(file.stat().st_size for file in (target / name).rglob("*") if file.is_file())
        print(f"{name:<6} {size:>9,} bytes, student {digests(target / name / 'finished')['student'][:16]}")


def check(source: Path) -> int:
    """Resume every interrupted run of a golden folder with this version; 1 if other bits come out."""
    different = 0
    with tempfile.TemporaryDirectory(prefix="check-run-") as scratch:
        folder = Path(scratch)
        workplace(folder, source)
        for name in sorted(path.parent.name for path in source.glob("*/expected.json")):
            expected = json.loads((source / name / "expected.json").read_text())
            shutil.copytree(source / name / "interrupted", folder / name)
            with contextlib.chdir(folder):
                run(name, name)
            found = digests(folder / name)
            for what, wanted in expected["digests"].items():
                equal = found[what] == wanted
                different += not equal
                verdict = "equal" if equal else f"other than {wanted[:16]}"
                print(f"{name:<6} resumed: {what:<10} {found[what][:16]} {verdict}")
    return int(bool(different))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="a folder that an earlier version wrote")
    parser.add_argument("--quick", action="store_true", help="make one run and check it, in a temporary folder")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print(f"softcache {softcache.__version__} from {Path(softcache.__file__).parent}, torch {torch.__version__}")
    if arguments.check:
        return check(arguments.check)
    if arguments.quick:
        with tempfile.TemporaryDirectory(prefix="quick-run-") as scratch:
            write(Path(scratch) / "made", ("exact",))
            return check(Path(scratch) / "made")
    target = GOLDEN / "runs" / softcache.__version__
    if target.exists():
        print(f"{target} is there: golden runs are written once and resumed for good", file=sys.stderr)
        return 2
    write(target, tuple(SETTINGS))
    return 0


if __name__ == "__main__":
    sys.exit(main())

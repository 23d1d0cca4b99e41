"""What a large dump costs: speed, size, memory, and how well `softcache plan` foresaw it.

    python tools/bench/dump.py                                   100,000 samples x 1,000 classes x 8 views, a stub teacher
    python tools/bench/dump.py --samples 4000 --classes 100 --plan-only
    python tools/bench/dump.py --quick                           small, to see that it runs

The stub teacher is one matrix product on 8 x 8 images, so that the pipeline is measured and not a network; its logits have
the rank of its 64 inputs. Memory is the resident set without shared file pages, of a process of its own per step, beside that
of a cache of a tenth of the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from softcache.report.tables import size, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, parser_of, write_json

HERE = Path(__file__)
POLICY = "crop_flip:padding=1"


class Images:
    """N random 8 x 8 images, made when they are asked for."""

    def __init__(self, samples: int, classes: int) -> None:
        self.labels = np.random.default_rng(0).integers(0, classes, samples)
        self.class_names = [f"class {c}" for c in range(classes)]
        self.sample_keys = [f"image/{i:07d}" for i in range(samples)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)


def images(samples: int = 100_000, classes: int = 1000) -> Images:
    """The data set, as a factory for `softcache dump`."""
    return Images(samples, classes)


def stub(num_classes: int) -> nn.Module:
    """The teacher, as a factory."""
    torch.manual_seed(0)
    layer = nn.Linear(64, num_classes)
    with torch.no_grad():
        layer.weight.mul_(8)
    return nn.Sequential(nn.Flatten(), layer)


def private_bytes() -> int:
    """Anonymous memory of this process at its peak so far is not kept by the kernel, so this is what it has now."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


def step(name: str, arguments: argparse.Namespace, samples: int, cache: str) -> dict[str, Any]:
    """One step in this process; its figures."""
    from softcache import dump, train
    from softcache.config import DumpConfig, PlanConfig, TrainConfig
    from softcache.dump import forecast as plan

    data = f"{HERE}:images?samples={samples}&classes={arguments.classes}"
    shared: dict[str, Any] = {
        "data": data,
        "teacher": (f"{HERE}:stub",),
        "policy": (POLICY,),
        "views": arguments.views,
        "codec": arguments.codec,
        "threads": arguments.threads,
    }
    begin = time.monotonic()
    found: dict[str, Any] = {}
    if name == "plan":
        forecast = plan.run(PlanConfig(**shared))
        found = {"predicted_seconds": forecast.choice.seconds, "predicted_bytes": forecast.choice.nbytes}
    elif name == "dump":
        result = dump.run(DumpConfig(**shared, out=cache), quiet=True)
        assert result.manifest is not None
        found = {"dump_seconds": result.seconds, "bytes": result.manifest.nbytes, "views_per_s": result.samples_per_s}
    else:
        config = TrainConfig(
            data=data,
            cache=cache,
            student="softcache:mlp?hidden=32",
            loss=("kd:temperature=4",),
            epochs=1,
            batch_size=256,
            out=cache + "-run",
            threads=arguments.threads,
        )
        train.run(config, quiet=True)
        shutil.rmtree(cache + "-run")
    return found | {"seconds": time.monotonic() - begin, "anonymous": private_bytes()}


def run_step(name: str, arguments: argparse.Namespace, samples: int, cache: Path) -> dict[str, Any]:
    """The same in a process of its own, but for --quick."""
    if arguments.quick:
        return step(name, arguments, samples, str(cache))
    command = [sys.executable, str(HERE), "--step", name, "--cache", str(cache), "--samples", str(samples)]
    for flag in ("classes", "views", "codec", "threads"):
        command += [f"--{flag}", str(getattr(arguments, flag))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def foresight(arguments: argparse.Namespace, folder: Path, repeats: int) -> dict[str, Any]:
    """What plan foresaw, and the median of some dumps."""
    foreseen = run_step("plan", arguments, arguments.samples, folder / "none")
    dumps = []
    for number in range(repeats):
        cache = folder / f"cache-{number}"
        dumps.append(run_step("dump", arguments, arguments.samples, cache))
        if number:
            shutil.rmtree(cache)
    seconds = statistics.median(found["dump_seconds"] for found in dumps)
    return {
        **foreseen,
        "bytes": dumps[0]["bytes"],
        "size_off": foreseen["predicted_bytes"] / dumps[0]["bytes"] - 1,
        "dump_seconds": seconds,
        "each": [round(found["dump_seconds"], 2) for found in dumps],
        "time_off": foreseen["predicted_seconds"] / seconds - 1,
        "views_per_s": dumps[0]["views_per_s"],
        "dump_anonymous": dumps[0]["anonymous"],
    }


def memory(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Of a dump of a tenth of the samples, and of an epoch of training from it and from the whole cache."""
    few = arguments.samples // 10
    found = {"dump_anonymous_at_a_tenth": run_step("dump", arguments, few, folder / "small")["anonymous"]}
    for name, samples, cache in (("at_a_tenth", few, "small"), ("whole", arguments.samples, "cache-0")):
        trained = run_step("train", arguments, samples, folder / cache)
        found[f"train_anonymous_{name}"] = trained["anonymous"]
        found[f"train_seconds_{name}"] = trained["seconds"]
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--codec", default="float16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dumps", type=int, default=3, help="of which the median is compared with the plan")
    parser.add_argument("--plan-only", action="store_true", help="no training, no smaller cache")
    parser.add_argument("--out", type=Path, help="folder for the caches (default: a temporary one)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments, arguments.samples, arguments.cache)))
        return
    if arguments.quick:
        arguments.samples, arguments.classes, arguments.views, arguments.dumps = 200, 20, 2, 1
    with tempfile.TemporaryDirectory(prefix="bench-dump-", dir=arguments.out) as folder:
        found = foresight(arguments, Path(folder), arguments.dumps)
        if not arguments.plan_only:
            found |= memory(arguments, Path(folder))
    shown = {
        name: size(value) if "anonymous" in name or name.endswith("bytes") else value for name, value in found.items()
    }
    print(heading("dump.py", arguments))
    print(table(["figure", ""], [[name, f"{v:.3f}" if isinstance(v, float) else str(v)] for name, v in shown.items()]))
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()

"""What does the cache cost a training step? Cached, hard-label and live-teacher steps, alternating in one run; medians.

    python tools/bench/train.py [--steps 200] [--device cuda] [--teacher softcache:resnet56] [--classes 1000] [--quick]

The small cnn at 32 pixels, batch 128, random images, an untrained teacher: only time matters here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import softcache
from softcache import dump
from softcache.config import DumpConfig
from softcache.data.join import batches
from softcache.data.loading import LoadedBatch, ViewedSet, epoch_order, load_batches, to_device
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import CodecFitError
from softcache.losses import ce, kd, make_term
from softcache.losses.schedules import Moment
from softcache.machine import pick_device
from softcache.models import Model, load_model, save_student
from softcache.report.tables import table
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache
from softcache.targets.teacher import CachedTeacher
from softcache.train.objective import Given, Labels, Objective

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, in_turn, parser_of, write_json

CODECS = "float16 float32 int8 headtail topk lowrank linear_head linear_head:dtype=int8"


class RandomImages:
    """N random 32 x 32 RGB images with random labels."""

    def __init__(self, count: int, classes: int) -> None:
        random = np.random.default_rng(0)
        self.images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.labels = random.integers(0, classes, count)
        self.class_names = [str(c) for c in range(classes)]
        self.sample_keys = [f"image/{i:06d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        image: np.ndarray = self.images[index]
        return image


def images(count: int = 12_800, classes: int = 100) -> RandomImages:
    """The data set, as a factory for `softcache dump`."""
    return RandomImages(count, classes)


def forever(viewed: ViewedSet, batch_size: int, workers: int) -> Iterator[LoadedBatch]:
    """Batches of one epoch after another, full ones only."""
    epoch, count = 0, len(viewed) // batch_size * batch_size
    while True:
        yield from load_batches(viewed, batches(epoch_order(count, 0, epoch), 0, batch_size), workers=workers)
        epoch += 1


def make_step(
    device: torch.device,
    transfer_set: TransferSet,
    student_spec: str,
    targets_of: Callable[[LoadedBatch, Any], Targets | Tensor | None],
    batch_size: int,
    workers: int,
    cache: Cache | None = None,
) -> Callable[[], None]:
    """One training step with a student and an optimiser of its own."""
    torch.manual_seed(0)
    model = load_model(
        student_spec, num_classes=transfer_set.num_classes, input_shape=(32, 32, 3), device=str(device)
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = forever(ViewedSet(transfer_set, Policy(), [model.input.collate]), batch_size, workers)
    terms = [make_term("ce")]
    if cache is not None:
        (codec,) = cache.codecs.values()
        terms.append(make_term("kd" if codec.complete else "kd_lower_bound", temperature=4, weight=0.9))
    objective = Objective(terms, teacher=None if cache is None else CachedTeacher(cache))

    def step() -> None:
        batch = next(loader)
        inputs = to_device(batch.inputs[0], device)
        labels = torch.from_numpy(transfer_set.labels[batch.index]).to(device).long()
        targets = targets_of(batch, inputs)
        student_logits = model(inputs)
        if isinstance(targets, Tensor):
            loss = ce(student_logits, labels) + 0.9 * kd(student_logits, targets, temperature=4)
        else:
            values = objective(student_logits, {}, Given(Labels(labels), targets), Moment())
            loss = objective.total(values, Moment())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def make_caches(root: Path, arguments: argparse.Namespace, data: str) -> dict[str, Path]:
    """Codec -> a cache of the teacher in `root`; codecs that do not fit this teacher are left out."""
    caches = {}
    for codec in arguments.codecs.split(" "):
        config = DumpConfig(
            data=data,
            teacher=(f"{arguments.teacher}@{root}",),
            out=str(root / f"cache-{codec.replace(':', '-')}"),
            codec=codec,
            device=arguments.device,
            threads=arguments.threads,
        )
        try:
            dump.run(config, quiet=True)
            caches[codec] = Path(config.out)
        except CodecFitError as exc:
            print(f"left out: {exc}", file=sys.stderr)
    return caches


def make_kinds(root: Path, arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], None]]:
    """Name -> a step of that kind."""
    data = f"{__file__}:images?count={arguments.samples}&classes={arguments.classes}"
    transfer_set = open_transfer_set(data)
    teacher: Model = load_model(arguments.teacher, num_classes=arguments.classes, input_shape=(32, 32, 3))
    save_student(teacher, root / "student.safetensors", metadata={})
    teacher = teacher.eval().to(device)

    def step_with(targets_of: Callable[[LoadedBatch, Any], Any], cache: Cache | None = None) -> Callable[[], None]:
        return make_step(
            device, transfer_set, arguments.student, targets_of, arguments.batch_size, arguments.workers, cache
        )

    def from_cache(path: Path) -> Callable[[], None]:
        joined = softcache.open(path).join(transfer_set)
        return step_with(lambda batch, inputs: joined.gather_samples(batch.index, batch.views).to(device), joined.cache)

    def live(batch: LoadedBatch, inputs: Any) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = teacher(inputs)
        return logits.clone()

    kinds = {"hard labels": step_with(lambda batch, inputs: None)}
    kinds |= {f"cached, {codec}": from_cache(path) for codec, path in make_caches(root, arguments, data).items()}
    if not arguments.no_live:
        kinds[f"live teacher {arguments.teacher}"] = step_with(live)
    return kinds


def bench(root: Path, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    kinds = make_kinds(root, arguments, device)
    for step in kinds.values():
        for _ in range(min(5, arguments.steps)):
            step()
    times = in_turn(kinds, arguments.steps)
    base = times["hard labels"]
    return [
        {
            "step": name,
            "median_ms": 1e3 * median(values),
            "to_hard_labels": median(values) / median(base),
            "median_of_pairwise_ratios": median(v / b for v, b in zip(values, base, strict=True)),
            "steps": len(values),
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="alternated steps of each kind")
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--codecs", default=CODECS, help=f"separated by spaces (default: {CODECS})")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--student", default="softcache:cnn")
    parser.add_argument("--teacher", default="softcache:resnet32x4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--no-live", action="store_true", help="leave the live teacher out")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.steps, arguments.samples, arguments.batch_size, arguments.classes = 2, 80, 8, 40
        arguments.codecs, arguments.teacher = "float16 topk linear_head", "softcache:cnn"
    device = pick_device(arguments.device)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        results = bench(Path(folder), arguments, device)
    print(heading("train.py", arguments, device))
    print(table(list(results[0]), [list(row.values()) for row in results]))
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()

"""How many stored views are enough? Students from V views, from one fixed target under augmentation, from the live teacher.

    python tools/bench/views.py --data-root data --out views            (about half an hour on two cores)
    python tools/bench/views.py --data-root data --samples 500 --epochs 4 --seeds 0 --views 1,2 --out /tmp/try
    python tools/bench/views.py --quick                                 digits instead of MNIST, to see that it runs

6,000 MNIST images, shifted and rotated; a CNN trained on all 60,000 teaches a 2 x 800 MLP. Every student takes the same steps:
epoch e sees view e mod V. The live teacher sees a fresh view every epoch, and so does the student on hard labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache import dump, train
from softcache.config import DumpConfig, TrainConfig
from softcache.data.join import batches
from softcache.data.loading import ViewedSet, epoch_order, load_batches
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.dump.open_teachers import open_teacher
from softcache.evaluate.measure import evaluate
from softcache.losses import kd
from softcache.losses.schedules import Moment, Schedule
from softcache.models import load_model
from softcache.report.tables import table
from softcache.train.optimizer import make_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, parser_of, write_json

POLICY = ("shift:pixels=3", "rotate:degrees=15")
TEMPERATURE = 4.0
STUDENT = "softcache:mlp?hidden=800,800"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument(
        "--out", type=Path, default=Path("views"), help="folder for teacher, caches, students and results"
    )
    parser.add_argument("--samples", type=int, default=6000, help="of the transfer set")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--views", default="1,5,20,50")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    source = f"torchvision:MNIST?root={arguments.data_root}"
    data, test = f"{source}&train=true", f"{source}&train=false"
    with tempfile.TemporaryDirectory(prefix="bench-views-") as scratch:
        if arguments.quick:
            data = test = "digits"
            arguments.samples, arguments.epochs, arguments.views, arguments.seeds = 100, 2, "1,2", "0"
            arguments.teacher_epochs, arguments.threads, arguments.out = 1, 1, Path(scratch)
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(arguments.threads)
        results = bench(arguments, data, test)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(heading("views.py", arguments))
        print(table(["targets", "test errors, mean", "s.d.", "each seed", "seconds a run"], rows(results)))
        picture(results, arguments.out / "views.png")
    write_json(arguments.json, results)


def bench(arguments: argparse.Namespace, data: str, test: str) -> dict[str, Any]:
    out, epochs = arguments.out, arguments.epochs
    common = {"data": data, "eval_data": test, "threads": arguments.threads}

    teacher = TrainConfig(
        **common,
        student="softcache:cnn",
        loss=("ce",),
        policy=POLICY,
        epochs=arguments.teacher_epochs,
        out=str(out / "teacher"),
    )
    taught = train.run(teacher, quiet=True).evaluation
    assert taught is not None
    say(f"teacher: {taught.errors} errors")

    keys = open_transfer_set(data).keys
    chosen = np.sort(np.random.default_rng(0).choice(len(keys), arguments.samples, replace=False))
    listing = out / "samples.txt"
    listing.write_text("".join(f"{keys[int(i)]}\n" for i in chosen))

    views = [int(v) for v in arguments.views.split(",")]
    made = {"data": data, "samples": str(listing), "teacher": (str(out / "teacher"),), "threads": arguments.threads}
    for count in views:
        dump.run(DumpConfig(**made, policy=POLICY, views=count, out=str(out / f"cache-{count}")), quiet=True)
    dump.run(DumpConfig(**made, out=str(out / "cache-fixed")), quiet=True)

    student = TrainConfig(
        **common, samples=str(listing), student=STUDENT, out="later", epochs=epochs, schedule="warmup(1, cosine)"
    )
    distil = replace(student, loss=(f"kd:temperature={TEMPERATURE}",))
    settings = {f"{v} views": replace(distil, cache=str(out / f"cache-{v}")) for v in views}
    settings["one target, augmented"] = replace(distil, cache=str(out / "cache-fixed"), augment=POLICY)
    settings["hard labels, fresh views"] = replace(student, loss=("ce",), policy=POLICY)
    results: dict[str, Any] = {
        "teacher_errors": taught.errors,
        "epochs": epochs,
        "samples": arguments.samples,
        "errors": {},
    }
    results["seconds"] = {}
    for seed in [int(s) for s in arguments.seeds.split(",")]:
        for name, config in settings.items():
            started = time.monotonic()
            run = train.run(replace(config, seed=seed, out=str(out / f"{name.replace(' ', '-')}-{seed}")), quiet=True)
            assert run.evaluation is not None
            note(results, name, run.evaluation.errors, time.monotonic() - started)
        started = time.monotonic()
        errors = live(replace(distil, seed=seed), str(out / "teacher"), test)
        note(results, "live teacher, fresh views", errors, time.monotonic() - started)
    return results


def live(config: TrainConfig, teacher_text: str, test: str) -> int:
    """The training recipe with the teacher in memory: it sees the student's own views, a fresh one every epoch."""
    transfer_set = open_transfer_set(config.data, **config.selection())
    policy = Policy.parse(POLICY, 0)
    shape = ViewedSet(transfer_set, policy, ()).render(0, 0).shape
    classes: dict[str, Any] = {"num_classes": transfer_set.num_classes, "class_names": transfer_set.class_names}
    teacher = open_teacher(
        teacher_text, taken=(), multi_label=False, input_shape=shape, device="cpu", autocast=None, **classes
    )
    torch.manual_seed(config.seed)
    model = load_model(config.student, input_shape=shape, **classes)
    optimizer = make_optimizer(list(model.parameters()), config)
    factor = Schedule.parse(config.schedule, "schedule")
    viewed = ViewedSet(transfer_set, policy, [model.input.collate, teacher.collate])
    steps = -(-len(transfer_set) // config.batch_size)
    for epoch in range(config.epochs):
        model.train()
        order = epoch_order(len(transfer_set), config.seed, epoch)
        for step, batch in enumerate(load_batches(viewed, batches(order, epoch, config.batch_size))):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor.at(Moment(epoch, step, steps, config.epochs))
            loss = kd(model(batch.inputs[0]), teacher(batch.inputs[1]).logits.clone(), temperature=TEMPERATURE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return errors_on(model, open_transfer_set(test))


def errors_on(model: Any, transfer_set: TransferSet) -> int:
    result = evaluate(model, transfer_set, Policy(), device=torch.device("cpu"))
    assert result.errors is not None
    return result.errors


def note(results: dict[str, Any], name: str, errors: int | None, seconds: float) -> None:
    results["errors"].setdefault(name, []).append(errors)
    results["seconds"].setdefault(name, []).append(round(seconds, 1))
    say(f"{name}: {errors} errors, {seconds:.0f} s")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """One row per kind of target, in the order they were run."""
    made = []
    for name, errors in results["errors"].items():
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        seconds = statistics.median(results["seconds"][name])
        made.append(
            [name, f"{statistics.mean(errors):.1f}", f"{spread:.1f}", ", ".join(map(str, errors)), f"{seconds:.0f}"]
        )
    return made


def picture(results: dict[str, Any], path: Path) -> None:
    """Test errors against the number of stored views, the others as horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    errors = results["errors"]
    stored = {
        int(name.split()[0]): values for name, values in errors.items() if name.endswith(" views") and name[0].isdigit()
    }
    axes.errorbar(
        list(stored),
        [statistics.mean(v) for v in stored.values()],
        [statistics.stdev(v) if len(v) > 1 else 0.0 for v in stored.values()],
        marker="o",
        capsize=3,
        label="V replayed views, from the cache",
    )
    others = {name: values for name, values in errors.items() if name not in {f"{v} views" for v in stored}}
    for style, (name, values) in zip((":", "-.", "--"), others.items(), strict=False):
        axes.axhline(statistics.mean(values), linestyle=style, color="black", linewidth=1, label=name)
    axes.axhline(results["teacher_errors"], color="grey", linewidth=1, label="the teacher")
    axes.set_xscale("log")
    axes.set_xticks(list(stored), [str(v) for v in stored])
    axes.minorticks_off()
    axes.set_xlabel("views stored per sample")
    axes.set_ylabel("test errors of 10,000")
    axes.set_title(f"{results['samples']:,} MNIST images, {results['epochs']} epochs, student 2 x 800")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""What does kd cost in pieces? Time and memory of `chunked_kd` and of `kd`, alternating in one run; medians and peaks.

    python tools/bench/losses.py [--sizes 64x1000 64x150000] [--repeats 20] [--device cuda] [--quick]

Forward and backward, float32 logits of formulas. Memory is what a call holds at its peak beyond the student's logits, their
gradient and the teacher's rows; it must stay below 64 MiB in pieces, else exit code 1. "half, decoded" widens float16 rows
on the way, some rows at a time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from softcache.losses.logits import kd
from softcache.losses.many_classes import LIMIT, chunked_kd
from softcache.machine import pick_device
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, in_turn, parser_of, write_json


def peak_bytes(call: Callable[[], object], device: torch.device | None = None) -> int:
    """The most memory that a call held at a time beyond what was allocated before, the result included."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines about a device that is not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    peak = held = 0
    for *_, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def bench(batch: int, classes: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    place = torch.arange(batch * classes, device=device, dtype=torch.float32).view(batch, classes)
    student = (8 * torch.sin(place * 0.37)).requires_grad_()
    teacher = 8 * torch.cos(place * 0.61 + 1)
    half = teacher.half()

    def decoded(first: int, last: int) -> Tensor:
        return half[first:last].float()

    kinds: dict[str, Callable[[], Tensor]] = {
        "kd": lambda: kd(student, teacher),
        "chunked_kd": lambda: chunked_kd(student, teacher),
        "chunked_kd, half": lambda: chunked_kd(student, half),
        "chunked_kd, half, decoded": lambda: chunked_kd(student, decoded),
    }

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def fresh(loss: Callable[[], Tensor]) -> None:
        student.grad = None
        step(loss)

    peaks: dict[str, int] = {}
    gradients: dict[str, Tensor | None] = {}
    for name, loss in kinds.items():
        student.grad = None
        peaks[name] = peak_bytes(lambda loss=loss: step(loss), device) - student.nbytes  # type: ignore[misc]
        gradients[name] = student.grad
    exact = gradients["kd"]
    assert exact is not None
    times = in_turn({name: lambda loss=loss: fresh(loss) for name, loss in kinds.items()}, repeats)  # type: ignore[misc]
    return [
        {
            "loss": f"{batch} x {classes:,} {name}",
            "median_ms": 1e3 * median(times[name]),
            "to_kd": median(times[name]) / median(times["kd"]),
            "peak_mib": peaks[name] / 2**20,
            "gradient_error": float((gradient - exact).norm() / exact.norm()),
            "bound": None if name == "kd" else "PASS" if peaks[name] <= LIMIT else "FAIL",
        }
        for name, gradient in gradients.items()
        if gradient is not None
    ]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["64x1000", "64x150000"], help="batch x classes")
    parser.add_argument("--repeats", type=int, default=20, help="alternated calls of each kind")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.sizes, arguments.repeats = ["8x1000", "8x40000"], 2
    device = pick_device(arguments.device)
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    results = [row for batch, classes in sizes for row in bench(batch, classes, arguments.repeats, device)]
    print(heading("losses.py", arguments, device))
    print(table(list(results[0]), [list(row.values()) for row in results]))
    write_json(arguments.json, results)
    return 1 if any(row["bound"] == "FAIL" for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What does a loss over a vocabulary cost? `head_loss` beside the plain way, all logits at once: time, memory, gradients.

    python tools/bench/head_loss.py                                    # 8,192 tokens of 512 numbers, 32,000 words; 10 GiB
    python tools/bench/head_loss.py --tokens 2048 --rounds 3           # a smaller machine
    python tools/bench/head_loss.py --quick

Forward and backward, float32, alternating in one run; medians. Memory is the most that a call holds beside hidden states, head
and their gradients. Two cases: cross-entropy and forward KL to the k largest classes and the rest; and to all classes of a
teacher whose logits are made of hidden states of its own by a head ("two complete sides"). Goals: at most 1/20 of the plain way's
memory, 1.1 times its time, 1.5 times with two complete sides. At last a large vocabulary, where a process may take so much
memory and no more: the plain way fails and `head_loss` does not. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from softcache.losses import ce, head_loss, head_term, kd, kd_lower_bound, make_term
from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, in_turn, parser_of, write_json
from bench.losses import peak_bytes

KEPT, T = 50, 2.0
MEMORY = 1 / 20
TIME = {"k largest": 1.1, "two complete sides": 1.5}


@dataclass(frozen=True)
class Inputs:
    """A student's last hidden states (P, D) and head (C, D), and a teacher's of the same size; labels (P,)."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def kept(self) -> dict[str, Tensor]:
        """What a cache keeps of the teacher: made some positions at a time."""
        parts = [self._kept(first, min(first + 256, len(self.labels))) for first in range(0, len(self.labels), 256)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _kept(self, first: int, last: int) -> dict[str, Tensor]:
        logits = self.teacher_logits(first, last)
        values, ids = logits.topk(KEPT, dim=1)
        tail = logits.div_(T).scatter_(1, ids, -torch.inf).logsumexp(dim=1)
        return {"head_ids": ids, "head_logits": values, "tail_logsumexp": tail}

    def teacher_logits(self, first: int, last: int) -> Tensor:
        return self.teacher_hidden[first:last] @ self.teacher_weight.T


def inputs_of(tokens: int, width: int, classes: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*shape).normal_(0, scale, generator=generator)

    hidden, teacher = normal(tokens, width), normal(tokens, width)
    weight, others = (normal(classes, width, scale=2 / width**0.5) for _ in range(2))
    labels = torch.randint(classes, (tokens,), generator=generator)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), teacher, others, labels)


def plain(inputs: Inputs, kept: Mapping[str, Tensor] | None) -> Tensor:
    """All logits at once, and torch's own gradients."""
    logits = inputs.hidden @ inputs.weight.T
    if kept is not None:
        return kd_lower_bound(logits, temperature=T, **kept) + ce(logits, inputs.labels)
    return kd(logits, inputs.teacher_logits(0, len(logits)), T) + ce(logits, inputs.labels)


def in_pieces(inputs: Inputs, kept: Mapping[str, Tensor] | None) -> Tensor:
    def targets(first: int, last: int, _: float) -> Mapping[str, Tensor]:
        if kept is None:
            return {"teacher_logits": inputs.teacher_logits(first, last)}
        return {name: one[first:last] for name, one in kept.items()}

    name = "kd" if kept is None else "kd_lower_bound"
    terms = [head_term(make_term(name, temperature=T)), head_term(make_term("ce"))]
    return head_loss(inputs.hidden, inputs.weight, None, targets, terms, inputs.labels).total


WAYS: dict[str, Callable[[Inputs, Mapping[str, Tensor] | None], Tensor]] = {"plain": plain, "head_loss": in_pieces}


def bench(inputs: Inputs, case: str, rounds: int) -> list[dict[str, Any]]:
    kept = inputs.kept() if case == "k largest" else None
    leaves = (inputs.hidden, inputs.weight)

    def step(way: str) -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        WAYS[way](inputs, kept).backward()

    peaks, gradients = {}, {}
    for way in WAYS:
        inputs.hidden.grad = inputs.weight.grad = None
        peaks[way] = peak_bytes(lambda way=way: step(way)) - sum(leaf.nbytes for leaf in leaves)  # type: ignore[misc]
        gradients[way] = [leaf.grad for leaf in leaves]
    times = in_turn({way: lambda way=way: step(way) for way in WAYS}, rounds)  # type: ignore[misc]
    errors = [
        float((mine - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(gradients["head_loss"], gradients["plain"], strict=True)
        if mine is not None and theirs is not None
    ]
    rows = []
    for way in WAYS:
        memory, time = peaks[way] / peaks["plain"], median(times[way]) / median(times["plain"])
        row: dict[str, Any] = {"case": f"{len(inputs.labels):,} x {len(inputs.weight):,}, {case}: {way}"}
        row |= {"median_s": median(times[way]), "to_plain": time}
        row |= {
            "peak_mib": peaks[way] / 2**20,
            "of_plain": memory,
            "gradient_error": max(errors) if way != "plain" else 0.0,
        }
        row["goals"] = None if way == "plain" else "PASS" if memory <= MEMORY and time <= TIME[case] else "FAIL"
        rows.append(row)
    return rows


def alone(way: str, tokens: int, width: int, classes: int, mib: int) -> None:
    """One step in this process, which may take so many MiB of memory more than it has and the inputs need."""
    torch.set_num_threads(1)
    inputs = inputs_of(tokens, width, classes)
    kept = inputs.kept()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + inputs.hidden.nbytes + inputs.weight.nbytes + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    loss = WAYS[way](inputs, kept)
    loss.backward()
    print(f"{loss.item():.6g}")


def limited(way: str, sizes: list[int]) -> str:
    """What became of a process of its own with a limit."""
    command = [sys.executable, __file__, "--alone", way, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return f"done, loss {done.stdout.strip()}"
    reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return "no memory" if "allocate memory" in reason[0] else reason[0]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5, help="alternated steps of each way")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--large", type=int, default=151_936, help="words of the large vocabulary")
    parser.add_argument("--limit", type=int, default=1024, help="MiB that it may take beside inputs and gradients")
    parser.add_argument(
        "--alone", nargs=5, default=None, help="WAY TOKENS WIDTH CLASSES MIB: what the limited process does"
    )
    arguments = parser.parse_args()
    if arguments.alone:
        way, *sizes = arguments.alone
        alone(way, *map(int, sizes))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    large = [2048, 256, arguments.large, arguments.limit]
    if arguments.quick:
        arguments.tokens, arguments.width, arguments.classes, arguments.rounds = 600, 16, 500, 1
        large = [600, 8, 60_000, 200]
    inputs = inputs_of(arguments.tokens, arguments.width, arguments.classes)
    rows = [row for case in TIME for row in bench(inputs, case, arguments.rounds)]
    print(heading("head_loss.py", arguments))
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    ends = {way: limited(way, large) for way in WAYS}
    tokens, width, classes, mib = large
    print(f"\n{tokens:,} tokens of {width} numbers, {classes:,} words, {mib:,} MiB beside inputs and gradients:")
    for way, end in ends.items():
        print(f"  {way}: {end}")
    write_json(arguments.json, {"ways": rows, "limited": ends})
    kept_to = ends["plain"] == "no memory" and ends["head_loss"].startswith("done")
    missed = not kept_to or any(row["goals"] == "FAIL" for row in rows)
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())

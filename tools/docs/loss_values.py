"""Prints the table of values of every loss at inputs that a formula gives, as Markdown.

    python tools/docs/loss_values.py [NAME ...]
    python tools/docs/loss_values.py --write      # all of them, into softcache/docs/LOSSES.md

Anyone can repeat it, in any language: wave(shape, rate, phase, height) holds height * sin(rate * k + phase) at its k-th
element, k from 0 and counted row by row. Everything is float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import softcache
from softcache.features.spec import REDUCTIONS
from softcache.losses import LOSSES, VECTORS, Loss

PAGE = Path(softcache.__file__).parent / "docs" / "LOSSES.md"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"  # of what this tool writes there
BATCH, CLASSES, WIDTH, MAP = 6, 5, 4, (3, 4, 4)
LABELS = [0, 1, 2, 3, 4, -1]
HEAD = 2
STUDENT, TEACHER = (0.7, 0.0), (1.1, 1.0)  # rate and phase
INPUTS = f"""\
B = {BATCH}, C = {CLASSES}; wave(shape, rate, phase, height)[k] = height sin(rate k + phase), k = 0, 1, ... row by row; float64.

- student_logits = wave((B, C), 0.7, 0, 3), teacher_logits = wave((B, C), 1.1, 1, 3), labels = {LABELS} (-1: none);
- features of student and teacher: wave(shape, 0.7, 0, 2) and wave(shape, 1.1, 1, 2): vectors (B, {WIDTH}), maps (B, 3, 4, 4)
  or what the loss's reduction makes of them (of two layers: the second with 0.5 added to the phase); maps: two of them;
- classifier_weight = wave((C, {WIDTH}), 0.9, 2, 1), classifier_bias = wave((C,), 0.9, 2, 1);
- samples = 0 ... B - 1, sample_ids = 101 ... 100 + B, step = 3, seed = 0; the head of a top-k cache: k = {HEAD}, at the loss's T;
- what is learned or remembered: parameters of more than one element are wave(shape, 0.9, 3, 0.5), and so are the rows of
  memories, scaled to length 1."""


@dataclass(frozen=True)
class Value:
    """One line of the table: a loss at its defaults, in float64.

    Attributes:
        name: in LOSSES.
        settings: its defaults.
        value: at the inputs.
        gradient: L2 norm of the value's gradient by the student's tensors.
        equal: the value where the student's tensors are the teacher's; None where it has no tensors of a teacher.
    """

    name: str
    settings: dict[str, Any]
    value: float
    gradient: float
    equal: float | None


def wave(shape: tuple[int, ...], rate: float, phase: float, height: float) -> Tensor:
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    return height * torch.sin(rate * place + phase)


def logits(rate: float, phase: float) -> Tensor:
    return wave((BATCH, CLASSES), rate, phase, 3.0)


def features(reduction: str, rate: float, phase: float) -> Tensor:
    """(B, ...) as the loss is given them: a vector, or a map after its reduction."""
    if reduction in VECTORS:
        return wave((BATCH, WIDTH), rate, phase, 2.0)
    made = REDUCTIONS[reduction]
    return made.function(*(wave((BATCH, *MAP), rate, phase + 0.5 * layer, 2.0) for layer in range(made.layers)))


def inputs_of(loss: Loss) -> dict[str, Any]:
    """Everything of the vocabulary that the loss asks for."""
    teacher_logits = logits(*TEACHER)
    head_logits, head_ids = teacher_logits.topk(HEAD, dim=1)
    rest = (teacher_logits / loss.defaults.get("temperature", 1.0)).scatter(1, head_ids, -torch.inf)
    kind = loss.features[0] if loss.features else VECTORS[0]
    known = {
        "student_logits": logits(*STUDENT),
        "teacher_logits": teacher_logits,
        "head_ids": head_ids,
        "head_logits": head_logits,
        "tail_logsumexp": rest.logsumexp(dim=1),
        "labels": torch.tensor(LABELS),
        "student_features": features(loss.reduction or kind, *STUDENT),
        "teacher_features": features(kind, *TEACHER),
        "student_maps": [features("map", *STUDENT), features("map", STUDENT[0], 0.5)],
        "teacher_maps": [features("map", *TEACHER), features("map", TEACHER[0], 1.5)],
        "classifier_weight": wave((CLASSES, WIDTH), 0.9, 2.0, 1.0),
        "classifier_bias": wave((CLASSES,), 0.9, 2.0, 1.0),
        "samples": torch.arange(BATCH),
        "sample_ids": torch.arange(101, 101 + BATCH),
        "step": 3,
    }
    return {name: known[name] for name in loss.inputs}


def made(loss: Loss, inputs: dict[str, Any]) -> Any:
    """The function, or the module with all that it learns or remembers set by formula."""
    if loss.module is None:
        return loss.function
    known: dict[str, Any] = {
        "num_samples": BATCH,
        "num_classes": CLASSES,
        "sample_labels": torch.tensor(LABELS),
        "seed": 0,
    }
    for side in ("student", "teacher"):
        if f"{side}_features" in inputs:
            known[f"{side}_shape"] = tuple(inputs[f"{side}_features"].shape[1:])
        known[f"{side}_shapes"] = [tuple(one.shape[1:]) for one in inputs.get(f"{side}_maps", [])]
    module: nn.Module = loss.module(**{name: known[name] for name in loss.sizes}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1:
                parameter.copy_(wave(tuple(parameter.shape), 0.9, 3.0, 0.5))
        for memory in module.buffers():
            if memory.is_floating_point() and memory.ndim == 2:
                memory.copy_(nn.functional.normalize(wave(tuple(memory.shape), 0.9, 3.0, 0.5)))
    return module


def tensors(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def value_of(name: str) -> Value:
    loss = LOSSES[name]
    inputs = inputs_of(loss)
    student = [tensor for key, value in inputs.items() if key.startswith("student_") for tensor in tensors(value)]
    for tensor in student:
        tensor.requires_grad_()
    value = made(loss, inputs)(**inputs)
    gradients = torch.autograd.grad(value, student, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    pairs = {key: key.replace("student_", "teacher_") for key in inputs if key.startswith("student_")}
    equal = {key: inputs[other] for key, other in pairs.items() if other in inputs}
    if "head_ids" in inputs:
        equal["student_logits"] = logits(*TEACHER)
    at_equality = made(loss, inputs)(**inputs | equal).item() if equal else None
    return Value(name, loss.defaults, value.item(), norm.item(), at_equality)


def markdown(values: Iterable[Value]) -> str:
    lines = ["| loss | settings | value | gradient norm | at equality |", "| --- | --- | --- | --- | --- |"]
    for line in values:
        settings = ", ".join(f"{key} {setting}" for key, setting in line.settings.items())
        equal = "" if line.equal is None else digits(line.equal)
        lines.append(f"| {line.name} | {settings} | {digits(line.value)} | {digits(line.gradient)} | {equal} |")
    return "\n".join(lines)


def with_values(page: str, made: str) -> str:
    """The page with `made` between this tool's two marks; ValueError where they are not both there, once."""
    return between(page, made, BEGIN, END)


def between(page: str, made: str, begin: str, end: str) -> str:
    """The page with `made` between two marks; ValueError where they are not both there, once."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(f"the page needs the lines {begin.strip()} and {end.strip()}, each once")
    return f"{before}{begin}{made}\n{end}{after}"


def digits(value: float) -> str:
    """Six of them; what is zero but for rounding as 0."""
    return "0" if abs(value) < 1e-12 else f"{value:.6g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="losses (default: all)")
    parser.add_argument("--write", action="store_true", help="into the page instead of printing; of all losses")
    parser.add_argument("--quick", action="store_true", help="of two losses only")
    arguments = parser.parse_args()
    if arguments.write and (arguments.names or arguments.quick):
        parser.error("--write takes neither NAME nor --quick: the page has all losses")
    if arguments.quick:
        arguments.names = ["kd", "hint"]
    made = f"{INPUTS}\n\n{markdown(value_of(name) for name in arguments.names or LOSSES)}"
    if arguments.write:
        PAGE.write_text(with_values(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made)


if __name__ == "__main__":
    main()

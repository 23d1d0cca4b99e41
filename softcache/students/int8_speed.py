"""How fast a quantised model is as int8, and how large: measured with onnxruntime, beside the one in floats."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softcache.machine import processor_flags
from softcache.models import Model
from softcache.report.tables import size, table
from softcache.students.cost import in_turns
from softcache.students.int8_forms import for_onnx, in_floats, is_quantised
from softcache.students.traced_program import Batch, TensorFact, named_tensors, open_onnx, trace, write_onnx


@dataclass(frozen=True)
class Speed:
    """Two models in onnxruntime, the first in floats and the second of int8.

    Attributes:
        nbytes: of their ONNX files.
        seconds_one, seconds_batch: median time for one sample, and for a batch of `batch_size`, in turns.
        flags: what the processor says of itself that int8 depends on.
    """

    nbytes: tuple[int, int]
    seconds_one: tuple[float, float]
    seconds_batch: tuple[float, float]
    batch_size: int
    threads: int
    flags: tuple[str, ...]

    def text(self) -> str:
        """For people."""
        rows = [
            ["ONNX file", *map(size, self.nbytes), _ratio(self.nbytes)],
            ["one sample", *map(_milliseconds, self.seconds_one), _ratio(self.seconds_one)],
            [f"a batch of {self.batch_size}", *map(_milliseconds, self.seconds_batch), _ratio(self.seconds_batch)],
        ]
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        flags = " ".join(self.flags) or "says nothing of itself"
        slower = [
            what
            for what, (a, b) in zip(("one sample", "a batch"), (self.seconds_one, self.seconds_batch), strict=True)
            if b > a
        ]
        said = f"int8 is slower here for {' and for '.join(slower)}" if slower else "int8 is faster here"
        return "\n".join(
            [table(["onnxruntime", "float", "int8", "ratio"], rows), "", f"{said}; {threads}, processor: {flags}"]
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _ratio(pair: tuple[float, float]) -> str:
    return f"{pair[1] / pair[0]:.2f}"


def speed_of(models: tuple[Model, Model], batch: Batch, many: Any, what: str, threads: int) -> Speed:
    """Write both as ONNX, and run them.

    Args:
        models: in floats, and quantised; on the CPU.
        batch: what they take.
        many: a collated batch.
        what: the model as the user named it.

    Raises:
        ExportError: one of them cannot be written as ONNX, or run.
    """
    output = TensorFact("logits", "float32", ("batch", models[0].num_classes), "")
    one = batch.like([tensor[:1] for tensor in _leaves(many)])
    runs, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models):
            path = Path(folder) / f"{number}.onnx"
            form = for_onnx(model) if is_quantised(model) else in_floats(model)
            write_onnx(trace(form, batch, what), batch, output, {}, path, what)
            sizes.append(path.stat().st_size)
            runs.append(open_onnx(path, threads))
    ones, batches = (in_turns([lambda run=run, x=x: run(x) for run in runs]) for x in (one, many))  # type: ignore[misc]
    count = len(_leaves(many)[0])
    return Speed((sizes[0], sizes[1]), (ones[0], ones[1]), (batches[0], batches[1]), count, threads, processor_flags())


def _leaves(batch: Any) -> Sequence[Any]:
    return [tensor for _, tensor in named_tensors(batch)]

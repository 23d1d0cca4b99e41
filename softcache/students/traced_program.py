"""A model as a graph that other programs run: what it takes, how it is traced and written, and how a stranger opens it."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.data.loading import to_device
from softcache.errors import ConfigError, ExportError
from softcache.models import ImageInput, Model, TextInput, TokenizerInput, VectorInput
from softcache.models.inputs import SEPARATOR
from softcache.report.tables import size

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXTRA_FILE = "softcache.json"  # in a program's archive
ONNX_BYTES = 2**31 - 2**20  # what one such file can hold, and some room for the graph

OPSET_KEY = "softcache_opset"

Forward = Callable[[Any], Tensor]  # a collated batch on the CPU -> (B, C)


@dataclass(frozen=True)
class TensorFact:
    """One input or output of an exported model.

    Attributes:
        name: of an ONNX input; a program takes one batch of the same structure.
        dtype: as in torch and NumPy.
        shape: numbers, and names of the axes that may have any size.
        meaning: range and unit.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str

    def text(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))}), {self.meaning}"


# ------------------------------------------------------------------------------------------------------- what a batch is


@dataclass(frozen=True)
class Batch:
    """An example of what the model's collate makes, and which axes of it may have other sizes.

    Attributes:
        example: a tensor, or a tuple or dict of tensors.
        facts: of each tensor.
        axes: per tensor, axis -> its name.
        text: the least and the largest length of a text, where the model is one of ours.
    """

    example: Any
    facts: tuple[TensorFact, ...]
    axes: tuple[Mapping[int, str], ...]
    text: tuple[int, int] | None

    @classmethod
    def of(cls, model: Model, three: Sequence[Any], four: Sequence[Any]) -> Batch:
        """From three and from four items: an axis whose size changes between the two is one that may."""
        example, other = model.input.collate(three), model.input.collate(four)
        is_text = isinstance(model.input, TextInput | TokenizerInput)
        facts, axes = [], []
        for (name, tensor), (_, again) in zip(named_tensors(example), named_tensors(other), strict=True):
            sizes = zip(tensor.shape, again.shape, strict=True)
            free = {i: f"{name}_{i}" for i, (one, two) in enumerate(sizes) if one != two}
            free |= {i: "batch" for i in free if (tensor.shape[i], again.shape[i]) == (len(three), len(four))}
            free |= {1: "tokens"} if is_text else {}
            facts.append(
                TensorFact(
                    name,
                    dtype_name(tensor.dtype),
                    tuple(free.get(i, n) for i, n in enumerate(tensor.shape)),
                    _meaning(model, tensor),
                )
            )
            axes.append(free)
        text = (model.input.min_tokens, model.input.max_tokens) if isinstance(model.input, TextInput) else None
        return cls(example, tuple(facts), tuple(axes), text)

    def like(self, per_tensor: Sequence[Any]) -> Any:
        """One thing per tensor, in the structure of the example."""
        if isinstance(self.example, Tensor):
            return per_tensor[0]
        if isinstance(self.example, Mapping):
            return dict(zip(self.example, per_tensor, strict=True))
        return list(per_tensor) if isinstance(self.example, list) else tuple(per_tensor)


def named_tensors(batch: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a collated batch with the names they have in an ONNX file.

    Raises:
        ExportError: something else than a tensor, or a tuple, list or dict of them.
    """
    if isinstance(batch, Tensor):
        return [("input", batch)]
    named: list[tuple[str, Any]] = []
    if isinstance(batch, Mapping):
        named = [(str(key), value) for key, value in batch.items()]
    elif isinstance(batch, tuple | list):
        named = [(f"input_{i}", value) for i, value in enumerate(batch)]
    if not named or not all(isinstance(value, Tensor) for _, value in named):
        raise ExportError(
            f"the model's collate makes {type(batch).__name__}, of which no exported model can be given",
            tip="let it return a tensor, or a tuple or dict of tensors",
        )
    return named


def _meaning(model: Model, tensor: Tensor) -> str:
    """Range and unit of an input."""
    taken, whole = model.input, tensor.dtype == torch.uint8
    if isinstance(taken, TextInput):
        span = f"{taken.min_tokens} to {taken.max_tokens} tokens a text"
        between = f"; {taken.ids[SEPARATOR]} stands between the texts of a pair" if SEPARATOR in taken.ids else ""
        return f"token ids: 0 pads, 1 is an unknown token, vocabulary[i] is i + 2{between}; {span}"
    if isinstance(taken, TokenizerInput):
        return "as its tokenizer gives it" + (
            "" if taken.max_tokens is None else f", {taken.max_tokens} tokens at most"
        )
    if isinstance(taken, ImageInput | VectorInput):
        order = "channels first" if isinstance(taken, ImageInput) else "flattened in C order"
        if whole:
            return f"0 to {taken.scale:g}, {order}; scaled and normalised inside"
        return f"already scaled, as an image of 0 to 1 is, {order}; normalised inside"
    if getattr(taken, "own", None) is not None:
        return "as the network's own collate makes it"
    return "0 to 255, scaled to 0 to 1 inside" if whole else "as the network takes it"


# ---------------------------------------------------------------------------------------------------------- writing


class _OneLonger(nn.Module):
    """A text model whose batches get one more token of padding, which its logits do not depend on.

    torch.export treats an axis of length 1 as a case of its own, and the shortest batch leaves one behind the widest
    convolution; so no batch may be the shortest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(F.pad(ids, (0, 1)))


def trace(model: Model, batch: Batch, model_text: str) -> torch.export.ExportedProgram:
    """The model as a graph, on the CPU, so that the file can be opened on any machine.

    Raises:
        ExportError: something in its forward cannot be part of a graph.
    """
    Dim, sizes = torch.export.Dim, {}
    for axes in batch.axes:
        for name in axes.values():
            sizes[name] = Dim(name) if name == "batch" else Dim.AUTO
    if batch.text is not None:
        sizes["tokens"] = Dim("tokens", min=batch.text[0], max=batch.text[1])
    shapes = batch.like([{axis: sizes[name] for axis, name in axes.items()} for axes in batch.axes])
    try:
        with torch.no_grad(), _hushed():
            return torch.export.export(
                model if batch.text is None else _OneLonger(model),
                (batch.example,),
                dynamic_shapes=(shapes,),
                strict=False,
            )
    except Exception as exc:  # whatever a forward may do that cannot be traced
        raise ExportError(
            f"{model_text}: torch.export cannot trace its network: {reason_of(exc)}",
            tip="a graph has no branches on values or sizes and no tensors turned into Python numbers: write the forward "
            "without, or use --to safetensors, which needs no graph",
        ) from None


def write_program(program: torch.export.ExportedProgram, metadata: Mapping[str, str], path: Path) -> None:
    """One .pt2 archive, with the metadata as JSON in its extra file "softcache.json"."""
    torch.export.save(program, path, extra_files={EXTRA_FILE: json.dumps(metadata, sort_keys=True)})


def check_opset(opset: int | None) -> None:
    """Raise ConfigError for a version of ONNX's operators that there is not."""
    if opset is None:
        return
    import onnx

    highest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= highest:
        raise ConfigError(f"--opset {opset}: onnx {onnx.__version__} knows versions 1 to {highest}", tip="18 is usual")


def write_onnx(
    program: torch.export.ExportedProgram,
    batch: Batch,
    output: TensorFact,
    metadata: Mapping[str, str],
    path: Path,
    model_text: str,
    opset: int | None = None,
) -> int:
    """One .onnx file, with the metadata among its properties.

    Args:
        opset: version of ONNX's operators; None: the one that torch takes.

    Returns:
        The version that it is of.

    Raises:
        ExportError: an operator that ONNX does not have, in this version, or more weights than one file holds.
    """
    nbytes = sum(tensor.nbytes for tensor in chain(program.state_dict.values(), program.constants.values()))
    if nbytes > ONNX_BYTES:
        raise ExportError(
            f"{model_text}: {size(nbytes)} of weights; one ONNX file holds 2 GB", tip="use --to program or safetensors"
        )
    try:
        with _hushed():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[fact.name for fact in batch.facts],
                output_names=[output.name],
                dynamic_shapes=(batch.like(batch.axes),),
                opset_version=opset,
            )
    except Exception as exc:  # an operator without a counterpart, or a graph that its optimiser cannot take
        raise ExportError(
            f"{model_text}: cannot be written as ONNX: {reason_of(exc)}",
            tip="an operator may have no counterpart in ONNX; --to program takes everything that torch.export can trace",
        ) from None
    assert made is not None
    found = int(made.model.opset_imports[""])
    if opset not in (None, found):  # torch goes on with its own where it cannot convert
        raise ExportError(
            f"{model_text}: cannot be written with ONNX's operators of version {opset}; torch wrote version {found}",
            tip=f"--opset {found} or higher, or leave it out",
        )
    for node in made.model.graph:  # from where in which file it comes: a third of a small network's bytes
        node.metadata_props.clear()
    made.model.metadata_props.update({**metadata, OPSET_KEY: str(found)})
    made.save(path)
    return found


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what torch prints and warns about its own graphs: what counts is how the file answers in the end."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------------------------------------- opening, as a stranger would


def open_program(path: Path, device: torch.device) -> Forward:
    """As anybody with torch would."""
    program = torch.export.load(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()
    return lambda inputs: module(to_device(inputs, device))


def open_onnx(path: Path, threads: int) -> Forward:
    """On the CPU, whatever the device of the model is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its own kinds of exceptions have no common name
        raise ExportError(
            f"onnxruntime cannot open what was written: {reason_of(exc)}",
            tip="use --to program, or a newer onnxruntime",
        ) from None
    taken = {given.name for given in session.get_inputs()}  # a tensor that nothing depends on is left out

    def forward(inputs: Any) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in named_tensors(inputs) if name in taken}
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reason_of(exc: BaseException) -> str:
    """An exception in one line, its cause where that is the one that knows."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else 'no reason given'}"[:300]

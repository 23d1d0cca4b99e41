"""softcache export: a model as one file for other programs, which gets its name when it has been seen to answer alike.

What is exported takes the batch as the model's own collate makes it, and normalises it. The new file is loaded as a stranger
would, run over an evaluation set beside the model, and thrown away where the two differ.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from softcache.config import ExportConfig, parse_toml
from softcache.config.unused import check_used
from softcache.data.classes import match_classes, places_in, read_classes_map
from softcache.data.loading import ViewedSet, item_shape, spread_items, to_device
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import (
    ClassMismatchError,
    ConfigError,
    DataError,
    ExportError,
    ModelError,
    UntrustedError,
    faults_explained,
    require_extra,
)
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.measure import run_policy
from softcache.files import durable
from softcache.files.durable import require_room
from softcache.files.inside import RUN as IN_RUN
from softcache.files.inside import is_inside, read_inside
from softcache.machine import as_fresh, pick_device, pick_threads, pick_workers
from softcache.models import (
    METADATA_KEY,
    Model,
    describe_model,
    load_model,
    own_classes,
    path_alone,
    path_and_choice,
    read_metadata,
    save_student,
    split_weights,
)
from softcache.models.item_range import check_scale
from softcache.models.model import OTHER_OUTPUTS
from softcache.report.tables import percent, size, table
from softcache.spec import parse_spec
from softcache.students.compare import ABSOLUTE, LEAST_AGREEMENT, RELATIVE, compare
from softcache.students.int8_forms import LEAST_OPSET, for_onnx, for_torch, in_floats, is_quantised
from softcache.students.int8_speed import Speed, speed_of
from softcache.students.traced_program import (
    PACKAGES,
    Batch,
    Forward,
    TensorFact,
    check_opset,
    dtype_name,
    open_onnx,
    open_program,
    trace,
    write_onnx,
    write_program,
)
from softcache.train.run_folder import CONFIG, MOST_BYTES
from softcache.version import __version__

SUFFIXES = {"safetensors": ".safetensors", "program": ".pt2", "onnx": ".onnx"}
EXPORT_KEY = "softcache_export"
TIMED = 64  # samples of the batch that is timed


@dataclass(frozen=True)
class Exported:
    """A finished export and how it was verified.

    Attributes:
        path, format, nbytes: the file.
        data: the evaluation set.
        inputs, output: what the exported model takes and gives.
        before, after: the model and the file, over the evaluation set.
        agreement: share of samples whose largest class is the same; of several labels, of the yes-or-no decisions.
        changed: how many are another one; all of them near-ties within the bound.
        max_difference: largest |difference| of a logit.
        opset: version of ONNX's operators; None for other formats.
        speed: of int8 as ONNX beside floats; None of others.
    """

    path: Path
    format: str
    nbytes: int
    data: str
    inputs: tuple[TensorFact, ...]
    output: TensorFact
    before: Evaluation
    after: Evaluation
    agreement: float
    changed: int
    max_difference: float
    opset: int | None = None
    speed: Speed | None = None

    def text(self) -> str:
        """For people."""
        after, several = dict(self.after.rows()), self.after.multi_label
        opset = "" if self.opset is None else f" (opset {self.opset})"
        rows = [(name, value, after[name]) for name, value in self.before.rows()]
        kept = (
            f"the same {'answer' if several else 'top-1'} for {percent(self.agreement)} of the "
            f"{'yes-or-no decisions' if several else 'samples'} ({self.changed} changed); largest |logit "
        )
        kept = "largest |" if self.output.name in OTHER_OUTPUTS else kept
        what = "number" if self.output.name in OTHER_OUTPUTS else "logit"
        allowed = f"allowed {ABSOLUTE:g} + {RELATIVE:g} |{what}|"
        if self.speed is not None:
            allowed = f"at least {percent(LEAST_AGREEMENT)} have to be the same"
        return "\n".join(
            [
                f"{self.path}: {self.format}{opset}, {size(self.nbytes)}; verified on {self.data}",
                *(f"takes {fact.text()}" for fact in self.inputs),
                f"gives {self.output.text()}",
                "",
                table(["", "model", "exported"], rows),
                "",
                f"{kept}difference| {self.max_difference:.3g}, {allowed}",
                *(["", self.speed.text()] if self.speed is not None else []),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        allowed = {"absolute": ABSOLUTE, "relative": RELATIVE} if self.speed is None else {"agreement": LEAST_AGREEMENT}
        return {**facts, "path": str(self.path), "allowed": allowed}


@as_fresh()
def run(model_text: str, config: ExportConfig, *, quiet: bool = False) -> Exported:
    """Write a model to one file, verified on an evaluation set.

    Args:
        model_text: a run folder, or MODEL@WEIGHTS.

    Raises:
        ExportError: the model cannot be traced, or the file does not answer as the model does; no file is left.
        SoftcacheError: other children, for what cannot be opened.
    """
    check_used(config)
    refuse_untrained(model_text)
    out = _target(model_text, config)
    for package in PACKAGES if config.to == "onnx" else ():
        require_extra(package, "onnx", "export to ONNX")
    check_opset(config.opset)
    data = config.data or _data_of_run(model_text, allow_code=config.allow_code)
    device, threads = pick_device(config.device), pick_threads(config.threads)
    torch.set_num_threads(threads)
    classes_map = read_classes_map(config.classes_map)
    transfer_set = of_its_classes(open_transfer_set(data, download=config.download), model_text, classes_map)
    policy = Policy.parse(config.policy, 0) if config.policy else run_policy(model_text).for_evaluation()
    viewed = ViewedSet(transfer_set, policy, ())
    three, four = ([viewed.render(i, 0) for i in _spread(len(transfer_set), n)] for n in (3, 4))
    shape = item_shape(three[0])
    about = {
        "num_classes": transfer_set.num_classes,
        "class_names": transfer_set.class_names,
        "input_shape": shape,
        "allow_code": config.allow_code,
    }
    with faults_explained(ModelError, f"building the model {model_text!r}"):
        model = load_model(model_text, **about).eval()  # type: ignore[arg-type]
    model.check_trained(repr(model_text))
    if model.gives == "words":
        raise ExportError(
            f"{model_text!r} is a tagger: it gives a row for each word, and that is not exported yet",
            tip="load it in Python: softcache.models.load_model, and let model(model.input.collate(items)) answer",
        )
    check_scale(model, model_text, spread_items(viewed))
    with faults_explained(DataError, f"the collate of {model_text!r}"):
        batch = Batch.of(model, three, four)
    with torch.no_grad():
        with faults_explained(ModelError, f"the model {model_text!r}"):
            logits = model(batch.example)
    output = TensorFact(model.output, dtype_name(logits.dtype), ("batch", *logits.shape[1:]), _meaning(model))
    metadata = _metadata(model, model_text, config.to, batch.facts, output)

    opset: int | None = None
    int8 = config.to == "onnx" and is_quantised(model)
    if int8 and config.opset is not None and config.opset < LEAST_OPSET:
        raise ConfigError(
            f"--opset {config.opset}: int8 weights have a scale for each channel, which ONNX knows since version {LEAST_OPSET}",
            tip=f"--opset {LEAST_OPSET} or higher, or leave it out",
        )
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    require_room(out.parent, weights, "the exported weights need")
    # a folder that cannot be written is found out before the work
    with durable.written_by_path(out, out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")) as aside:
        if config.to == "safetensors":
            save_student(model, aside, metadata=metadata)
            fresh = load_model(text_of_copy(model_text, aside), **about, device=str(device)).eval()  # type: ignore[arg-type]
            exported: Forward = lambda inputs: fresh(to_device(inputs, device))  # noqa: E731
        else:
            program = trace(_for(config.to, model), batch, model_text)
            if config.to == "program":
                write_program(program, metadata, aside)
                exported = open_program(aside, device)
            else:
                opset = write_onnx(program, batch, output, metadata, aside, model_text, config.opset)
                exported = open_onnx(aside, threads)
        found = compare(
            model.to(device),
            exported,
            transfer_set,
            policy,
            device=device,
            batch_size=config.batch_size,
            workers=pick_workers(config.workers, device),
            where=str(out),
            rounded=int8,
            quiet=quiet,
        )
        speed = _speed(model, batch, viewed, model_text, threads) if int8 else None
        nbytes = aside.stat().st_size
    return Exported(out, config.to, nbytes, data, batch.facts, output, *found, opset=opset, speed=speed)


def _for(to: str, model: Model) -> Model:
    """The model in the form whose graph is written."""
    if not is_quantised(model):
        return model
    return for_onnx(model) if to == "onnx" else for_torch(model)


def _speed(model: Model, batch: Batch, viewed: ViewedSet, model_text: str, threads: int) -> Speed:
    """Of a quantised model, beside the same weights in floats."""
    many = model.input.collate([viewed.render(i, 0) for i in _spread(len(viewed.transfer_set), TIMED)])
    return speed_of((in_floats(model), model), batch, many, model_text, threads)


def _meaning(model: Model) -> str:
    """What the numbers of its output are."""
    if model.has_classes:
        return "one number per class"
    return f"one number per value: {', '.join(model.value_names)}" if model.value_names else f"its {model.output}"


def _metadata(
    model: Model, model_text: str, format: str, inputs: Sequence[TensorFact], output: TensorFact
) -> dict[str, str]:
    """What goes with each file: what is known of the weights, and how the exported model is called."""
    weights = Path(weights_of(model_text))
    known = read_metadata(weights) if weights.is_dir() or weights.suffix == ".safetensors" else {}
    carried = {key: value for key, value in known.items() if key.startswith("softcache")}
    call = {
        "format": format,
        "softcache": __version__,
        "torch": torch.__version__,
        "inputs": [asdict(fact) for fact in inputs],
        "output": asdict(output),
    }
    return {**carried, METADATA_KEY: json.dumps(describe_model(model)), EXPORT_KEY: json.dumps(call)}


# ------------------------------------------------------------------------------------------------------- names and places


def _target(model_text: str, config: ExportConfig) -> Path:
    """Where the file goes; refused where something is, or with another ending than programs look for."""
    suffix, folder = SUFFIXES[config.to], _folder_of(model_text)
    if config.out is None and folder is None:
        raise ConfigError("--out is missing", tip=f"{model_text} is no run folder: name a file, --out FILE{suffix}")
    out = Path(config.out) if config.out is not None else Path(str(folder)) / f"export{suffix}"
    if out.suffix != suffix:
        raise ConfigError(
            f"--out {out}: a file of --to {config.to} ends in {suffix}", tip=f"--out {out.with_suffix(suffix)}"
        )
    if os.path.lexists(out):
        raise ConfigError(f"{out}: is there already", tip="remove it, or choose another --out")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}", tip="make it, or choose another --out")
    return out


def _data_of_run(model_text: str, *, allow_code: bool) -> str:
    """The evaluation set of a run's config.toml, which is opened only where that is allowed."""
    folder = _folder_of(model_text)
    if folder is None or not is_inside(folder, CONFIG, IN_RUN):
        raise ConfigError(
            f"{model_text}: says nothing of an evaluation set",
            tip="--data DATA: every export is verified by running it on one",
        )
    told = parse_toml(
        read_inside(folder, CONFIG, MOST_BYTES, IN_RUN),
        str(folder / CONFIG),
        tip="name the evaluation set: --data DATA",
    )
    data = told.get("eval_data")
    if isinstance(data, str) and not allow_code:
        raise UntrustedError(
            f"{model_text}: its config.toml names the evaluation set {data}; data is not opened because a run folder names it",
            tip=f"say it yourself: --data {shlex.quote(data)}",
        )
    if not isinstance(data, str):
        raise ConfigError(
            f"{model_text}: was trained without --eval-data",
            tip="--data DATA: every export is verified by running it on an evaluation set",
        )
    return data


def of_its_classes(transfer_set: TransferSet, model_text: str, classes_map: Mapping[str, str]) -> TransferSet:
    """The evaluation set under the class list of the weights, which may be a part of the set's, or the other way round.

    Raises:
        ClassMismatchError: another class list, or the same in another order.
    """
    names, found = own_classes(model_text, transfer_set.num_classes), transfer_set.class_names
    if names is None or names == found:
        return transfer_set
    if tuple(name for name in found if name in names) == names:  # trained with --classes
        return transfer_set.with_classes(names)
    if len(names) > len(found) and not transfer_set.multi_label:
        columns = places_in(found, names) or match_classes(repr(model_text), names, found, classes_map).columns
        return transfer_set.under(names, columns or range(len(found)))
    if len(names) == len(found):
        try:
            columns = match_classes(repr(model_text), names, found, classes_map).columns
        except ModelError:
            columns = ()
        if columns is None:
            return transfer_set
    where = next((i for i, (a, b) in enumerate(zip(found, names, strict=False)) if a != b), min(len(found), len(names)))
    there, here = ("nothing" if where >= len(n) else repr(n[where]) for n in (found, names))
    raise ClassMismatchError(
        f"class {where} is {there} in {transfer_set.name}, {here} for {model_text}",
        tip="verify on data of the classes that the model was trained for, in their order, or say which is which: "
        "--classes-map FILE",
    )


def refuse_untrained(model_text: str) -> None:
    if path_alone(model_text) is not None or split_weights(model_text)[1]:
        return
    spec = parse_spec(model_text)
    if not spec.scheme:
        raise ModelError(
            f"{model_text!r} is neither a run folder nor a model", tip="name a run folder that exists, or MODEL@WEIGHTS"
        )
    if spec.scheme in ("softcache", "timm", "torchvision") and "weights" not in spec.parameters:
        raise ConfigError(f"{model_text!r} has no weights", tip=f"name them: {model_text}@WEIGHTS, or a run folder")


def weights_of(model_text: str) -> str:
    """The path part of a model text; it need not exist."""
    alone = path_alone(model_text)
    return path_and_choice(split_weights(model_text)[1] or model_text)[0] if alone is None else alone


def _folder_of(model_text: str) -> Path | None:
    """The run folder behind a model text, if there is one."""
    path = Path(weights_of(model_text))
    folder = path.parent if path.suffix == ".safetensors" else path
    return folder if path.exists() and folder.is_dir() else None


def text_of_copy(model_text: str, path: Path) -> str:
    """The model text for a copy of the weights: a student says itself what it is, unless a factory of the user builds it."""
    head = "" if path_alone(model_text) is not None else split_weights(model_text)[0]
    return f"{head}@{path}" if head and parse_spec(head).is_factory else str(path)


def _spread(count: int, wanted: int) -> list[int]:
    """That many positions, spread over the set; some again where it has fewer."""
    return [i * count // wanted for i in range(wanted)]

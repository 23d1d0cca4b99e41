"""Weights on disk: students as safetensors that say how to rebuild themselves, and state dicts of other people."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, SoftcacheError, first_offenders, note_once
from softcache.files import durable
from softcache.files.inside import RUN, is_inside
from softcache.models.checkpoints import SUFFIXES, State, read_state, refuse_others
from softcache.models.fake_quantise import check_int8, packed, unpacked
from softcache.models.from_torchvision import torchvision_weights
from softcache.models.from_transformers import describe_transformer
from softcache.models.graft import regraft
from softcache.models.inputs import ImageInput, TextInput
from softcache.models.model import OTHER_OUTPUTS, Model, final_linear
from softcache.models.projector import Graft
from softcache.models.saved_metadata import load_json
from softcache.models.seal import DIGEST_KEY, FORMAT, FORMAT_KEY, INT8, check_digest, check_format, digest
from softcache.models.shrunk import Shrunk, shrink_by
from softcache.models.word_input import WordInput
from softcache.spec import Spec, outside_quotes, parse_spec, quoted, unquoted

STUDENT = "student.safetensors"  # its name in a run folder
METADATA_KEY = "softcache_model"
BEFORE_STUDENT = {"shrink.json": "shrink", "run.json": "train"}  # what is in a folder before it, and who wrote that
MAX_SPEC = 2**12  # characters
MANY_NUMBERS = 2**18  # one for each feature of an item
IN_RUN = replace(RUN, misfit=ModelError, linked=ModelError)

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class SavedModel:
    """What a saved student says about itself: enough to build its network again.

    Attributes:
        spec: the network, without weights, vocabulary and local folders.
        num_classes: C.
        class_names: in the order of the outputs; empty if it was not known.
        input_shape: shape of one rendered item, or None.
        input: what `Input.describe` gave.
        vocabulary: of a text model, else None.
        graft: what was built into the network after the spec; None for most.
        transformer: configuration and tokenizer of one of transformers' models, else None.
        shrunk: what was left out of the network that the spec names; None for most.
        output: "logits" of most; "embedding" or "values", of `num_classes` numbers.
        value_names: of the output "values".
    """

    spec: str
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    input: Mapping[str, Any]
    vocabulary: tuple[str, ...] | None
    graft: Graft | None = None
    transformer: Mapping[str, Any] | None = None
    shrunk: Shrunk | None = None
    output: str = "logits"
    value_names: tuple[str, ...] = ()


def save_student(model: Model, path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write the network's weights and how to rebuild it as one safetensors file, whole or not at all.

    Args:
        model: its weights are copied to the CPU; tied weights are stored once per name.
        path: the file, by habit `student.safetensors` in a run folder.
        metadata: further strings to keep; the key "softcache_model" is ours.
    """
    durable.write_whole(Path(path), student_bytes(model, metadata))


def student_bytes(model: Model, metadata: Mapping[str, str]) -> bytes:
    """What `save_student` writes."""
    # cloned: safetensors refuses tensors that share memory
    state = packed(model.net, model.net.state_dict())
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    number = FORMAT if model.shrunk is None or not model.shrunk.quantised else INT8
    told = {**metadata, METADATA_KEY: json.dumps(describe_model(model)), FORMAT_KEY: str(number)}
    told[DIGEST_KEY] = digest({"tensors": tensors, "metadata": told})
    # under one key: safetensors writes several in a random order, and equal students should be equal files
    return save(tensors, metadata={"softcache": json.dumps(told, sort_keys=True)})


def describe_model(model: Model) -> dict[str, Any]:
    """JSON-able: what `read_saved` gives back of a student, and what goes with a model that is exported."""
    spec, transformer = parse_spec(model.spec), describe_transformer(model)
    return {
        "spec": (spec.without("weights") if spec.scheme in ("torchvision", "timm") else spec).portable(),
        "num_classes": model.num_classes,
        "class_names": (model.data_class_names or model.class_names or ()) if model.has_classes else (),
        "input_shape": model.input_shape,
        "input": model.input.describe(),
        "vocabulary": model.input.vocabulary if isinstance(model.input, TextInput | WordInput) else None,
        **({"graft": model.graft.to_json()} if model.graft is not None else {}),
        **({"transformer": transformer} if transformer is not None else {}),
        **({"shrunk": model.shrunk.to_json()} if model.shrunk is not None else {}),
        **({} if model.has_classes else {"output": model.output, "value_names": model.value_names}),
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata strings of a safetensors file or of a run folder's student.

    Raises:
        ModelError: it cannot be read, is of a newer format, or is damaged.
    """
    return _opened(weights_file(str(path)))


# files that were compared with their digests in this process, and what their metadata say
_WHOLE: dict[tuple[int, ...], dict[str, str]] = {}


def _opened(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file whose tensors and metadata are those that were saved, as far as it can tell."""
    refuse_others(path)
    try:
        found = os.stat(path)
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if state not in _WHOLE:
            with safe_open(path, framework="pt") as file:
                told = _told(dict(file.metadata() or {}), path)
                seal = {key: told.pop(key, None) for key in (FORMAT_KEY, DIGEST_KEY)}
                if METADATA_KEY in told or any(seal.values()):
                    _check_seal(seal, told, file, path)
            _WHOLE[state] = told
        return dict(_WHOLE[state])
    except (SafetensorError, OSError, ValueError) as exc:
        raise ModelError(f"{path} is not a safetensors file: {exc}", tip="copy it again, or make it again") from None


def _told(found: dict[str, str], path: Path) -> dict[str, str]:
    if "softcache" not in found:
        if any(DIGEST_KEY in value for value in found.values()):
            raise ModelError(f"{path}: is damaged: its metadata has lost its name", tip="copy it again")
        return found
    told = load_json(found["softcache"])
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise ValueError("its metadata are no strings by name")
    return told


def _check_seal(seal: Mapping[str, str | None], told: Mapping[str, str], file: Any, path: Path) -> None:
    text = seal[FORMAT_KEY]
    number: Any = int(text) if text is not None and text.isdecimal() and len(text) < 9 else text
    check_format(number, path, told.get("softcache_version"), ModelError, highest=INT8)
    metadata = {**told, **({} if text is None else {FORMAT_KEY: text})}
    tensors = {} if seal[DIGEST_KEY] is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_digest(
        seal[DIGEST_KEY], {"tensors": tensors, "metadata": metadata}, path, ModelError, sealed=text is not None
    )


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, none of which is read."""
    _opened(path)
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_saved(weights: str) -> SavedModel | None:
    """What the weights say about their model; None for files that do not come from `save_student`."""
    path = weights_file(weights)
    if path.suffix != ".safetensors":
        return None
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        return None
    try:
        return _saved_model(load_json(text))
    except (ValueError, KeyError, TypeError, AttributeError, SoftcacheError) as exc:
        raise ModelError(f"{path}: its {METADATA_KEY!r} metadata cannot be understood: {exc!r}") from None


def _saved_model(about: Any) -> SavedModel:
    """What `describe_model` told; TypeError or ValueError for anything else."""
    shape, vocabulary, graft = about["input_shape"], about["vocabulary"], about.get("graft")
    saved = SavedModel(
        spec=_of_type(about["spec"], str),
        num_classes=_of_type(about["num_classes"], int),
        class_names=_all_of_type(about["class_names"], str),
        input_shape=None if shape is None else _all_of_type(shape, int),
        input=_of_type(about["input"], dict),
        vocabulary=None if vocabulary is None else _all_of_type(vocabulary, str),
        graft=None if graft is None else Graft(**_of_type(graft, dict)),
        transformer=about.get("transformer"),
        shrunk=None if about.get("shrunk") is None else Shrunk.from_json(about["shrunk"]),
        output=_of_type(about.get("output", "logits"), str),
        value_names=_all_of_type(about.get("value_names", []), str),
    )
    if saved.output not in ("logits", *OTHER_OUTPUTS):
        raise ValueError(f"an output {saved.output[:40]!r}")
    if len(saved.spec) > MAX_SPEC or len(saved.input_shape or ()) > 8:
        raise ValueError("a spec or a shape that is too long")
    _of_type(saved.input["kind"], str)
    if any(len(value) > MANY_NUMBERS for value in saved.input.values() if isinstance(value, list)):
        raise ValueError(f"a preprocessing of more than {MANY_NUMBERS:,} numbers")
    if saved.graft is not None:
        _check_graft(saved.graft)
    return saved


def _check_graft(graft: Graft) -> None:
    for name in (graft.layer, graft.head):
        _of_type(name, str)
    for number in (graft.classes, graft.width, graft.projector["factor"]):
        _of_type(number, int)
    for shape in ("student_shape", "teacher_shape"):
        _all_of_type(graft.projector[shape], int)
    _of_type(graft.bias, bool)


def _of_type(value: Any, kind: type[Kind]) -> Kind:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:60]!r} is no {kind.__name__}")
    return value


def _all_of_type(values: Any, kind: type[Kind]) -> tuple[Kind, ...]:
    return tuple(_of_type(value, kind) for value in _of_type(values, list))


def path_alone(text: str) -> str | None:
    """The path of a run folder or of weights that a model's text is, in quotes or not; None where it is a spec.

    A path that exists wins over everything that its signs could mean.
    """
    if os.path.exists(text):  # unlike Path.exists, no error for a spec longer than a file name can be
        return text
    bare = unquoted(text, text) if text.endswith('"') and text.startswith('"') else ""
    return bare if bare and os.path.exists(bare) else None


def split_weights(text: str) -> tuple[str, str]:
    """MODEL and WEIGHTS of `MODEL@WEIGHTS`, quoted as they were; folders in front of a factory's `.py:` may hold an '@'.

    Raises:
        ConfigError: nothing behind the '@', or an '@' that belongs to a path which is there.
    """
    start = max(text.find(".py:"), 0)
    cut = next((place for place, letter in outside_quotes(text) if letter == "@" and place >= start), -1)
    if cut < 0:
        return text, ""
    if not text[cut + 1 :]:
        raise ConfigError(f"{text!r} names no weights", tip="write MODEL@WEIGHTS, or MODEL alone")
    scheme, _, path = text.partition(":")
    if path and os.path.exists(path) and not os.path.exists(text[cut + 1 :]):
        raise ConfigError(
            f"{text!r}: an '@' stands before weights, and there are none at {text[cut + 1 :]}",
            tip=f"where it is part of a path, quote that: {scheme}:{quoted(path, '@')}",
        )
    return text[:cut], text[cut + 1 :]


def path_and_choice(weights: str) -> tuple[str, str]:
    """The path of WEIGHTS, and what is chosen of the file: `file.pth#state_dict_ema`. A path that exists wins."""
    if os.path.exists(weights):
        return weights, ""
    cut = max((place for place, letter in outside_quotes(weights) if letter == "#"), default=-1)
    if cut <= 0 or "/" in weights[cut:]:
        return unquoted(weights, weights), ""
    return unquoted(weights[:cut], weights), weights[cut + 1 :]


def weights_file(weights: str) -> Path:
    """The file behind WEIGHTS, whose path may be that of a run folder; ModelError when there is none."""
    path = Path(path_and_choice(weights)[0])
    if os.path.isdir(path):
        if is_inside(path, STUDENT, IN_RUN):
            return path / STUDENT
        there = [name for name in sorted(os.listdir(path)) if name.endswith((*SUFFIXES, ".safetensors.index.json"))]
        raise ModelError(
            f"the folder {path} holds no {STUDENT}",
            tip=f"name a file in it: {path / there[0]}" if there else _what_it_is(path),
        )
    if not os.path.isfile(path):  # unlike Path.is_file, no error for what is longer than a file name can be
        raise ModelError(f"there are no weights {path}", tip="give a weights file or a run folder that exists")
    return path


def _what_it_is(folder: Path) -> str:
    """A tip for a folder without weights: a run that is not finished, a cache, or neither."""
    names = set(os.listdir(folder))
    if verb := next((verb for name, verb in BEFORE_STUDENT.items() if name in names), None):
        return f"`{verb}` writes it last: run the same command again, until it has finished"
    if "manifest.json" in names:
        return f"it is a cache, which a student learns from (--cache {folder}); a model is a run folder of `train` or `shrink`"
    return "nothing of a run is in it either: name the folder that `train` or `shrink` wrote, or a weights file"


def names_torchvision_weights(spec: Spec, weights: str) -> bool:
    """True when `weights` is to be looked up in torchvision's table: not a path, not a file name."""
    path = Path(path_and_choice(weights)[0])
    is_name = path.name == str(path) and path.suffix not in SUFFIXES
    return spec.scheme == "torchvision" and is_name and not path.exists()


def load_weights(model: Model, weights: str) -> None:
    """Load weights into a model that is already built; its class names become those of the weights, if they have any.

    Args:
        model: changed in place, its device kept.
        weights: a file of weights, as `read_state` takes it, with `#NAME` behind it where it holds several; a run folder; for
            torchvision models also the name of torchvision's weights.

    Raises:
        ModelError: no such file, not a state dict, weights that do not fit, or a saved student whose preprocessing or
            vocabulary is not the model's.
        ConfigError: an unknown name of torchvision weights.
    """
    spec = parse_spec(model.spec)
    if names_torchvision_weights(spec, weights):
        entry = torchvision_weights(spec.name, weights)
        _load(model, entry.get_state_dict(progress=False, check_hash=True), weights)
        model.class_names = tuple(entry.meta["categories"])
        preset = entry.transforms()
        model.input = ImageInput(3, tuple(preset.mean), tuple(preset.std))
        return
    saved = read_saved(weights)
    if saved is not None:
        _check_same_input(model, saved, weights)
        most = sum(map(math.prod, stored_shapes(weights_file(weights)).values()))
        if saved.shrunk is not None and model.shrunk is None:
            reshrink(model, saved.shrunk, weights, most=most)
        if saved.graft is not None and model.graft is None:
            regraft(model, saved.graft, most=most)
    state = state_of(model, weights)
    _load(model, state.tensors, weights)
    model.weights_told = state.told
    model.untrained = ()
    if saved is not None and saved.class_names:
        model.class_names = saved.class_names


def state_of(model: Model, weights: str) -> State:
    """The tensors that WEIGHTS hold for a network; what was chosen among others, or left out, is told once."""
    file = weights_file(weights)
    if file.suffix == ".safetensors":
        _opened(file)
    state = read_state(file, model.net.state_dict(), path_and_choice(weights)[1])
    if state.told:
        note_once(f"{weights}: {state.told}")
    return state


def reshrink(model: Model, record: Shrunk, where: str, *, most: int) -> None:
    """Leave out of a network what was left out of the one that weights were saved of.

    Args:
        most: how many numbers the weights have.

    Raises:
        ModelError: the record is of another network.
    """
    try:
        shrink_by(model.net, record, most=most)
    except ModelError as exc:
        raise ModelError(f"{where} does not fit {model.spec or 'the model'}: {exc.message}", tip=exc.tip) from None
    model.shrunk = record


def fingerprint(module: nn.Module) -> str:
    """sha256 in hex over a network's state dict: names in order, dtypes, shapes, little-endian bytes.

    A Model counts as its bare network. Buffers that are not saved do not count.
    """
    net = module.net if isinstance(module, Model) else module
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode() + b"\n")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if sys.byteorder == "big":
            raw = raw.reshape(-1, tensor.element_size()).flip(1)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _check_same_input(model: Model, saved: SavedModel, weights: str) -> None:
    """Weights are only worth something with the preprocessing they were trained with."""
    found = json.loads(json.dumps(model.input.describe()))
    if found != saved.input:
        keys = [k for k in {**found, **saved.input} if found.get(k) != saved.input.get(k)]
        differ = "; ".join(f"{k} is {saved.input.get(k)} there, {found.get(k)} here" for k in keys)
        raise ModelError(
            f"{weights} was trained with another preprocessing: {differ}",
            tip="name the run folder alone: it brings its own model and preprocessing",
        )
    if isinstance(model.input, TextInput | WordInput) and model.input.vocabulary != saved.vocabulary:
        raise ModelError(
            f"{weights} was trained with another vocabulary",
            tip="leave vocabulary= out: the run brings its own",
        )


def _load(model: Model, state: Mapping[str, Tensor], where: str) -> None:
    """Copy the tensors into the network; ModelError listing everything that does not fit."""
    refuse_misfit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, where)
    check_int8(model.net, state, where)
    model.net.load_state_dict(unpacked(state))


def refuse_misfit(model: Model, there: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ModelError, listing everything, unless tensors of these names and shapes are the network's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.net.state_dict().items()}
    differ = [name for name in wanted if name in there and wanted[name] != there[name]]
    final = final_linear(model.net, model.num_classes)
    final_name = next((f"{name}.weight" for name, module in model.net.named_modules() if module is final), "")
    if final_name in differ and there[final_name][1:] == wanted[final_name][1:]:
        raise ModelError(
            f"{where}: the weights have {there[final_name][0]} classes, the data has {model.num_classes}",
            tip="use weights trained for these classes, train without weights, or begin with all but the classifier: --init-from",
        )
    missing = [name for name in wanted if name not in there]
    surplus = [name for name in there if name not in wanted]
    shapes = [f"{name} {there[name]} there, {wanted[name]} in the model" for name in differ]
    faults = [
        f"{len(names)} {what}: {first_offenders(names, len(names))}"
        for what, names in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise ModelError(
            f"{where} does not fit {model.spec or 'the model'} ({len(wanted)} tensors): " + "; ".join(faults),
            tip="check that the model's name and parameters are those the weights were made with",
        )

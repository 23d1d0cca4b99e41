"""Weights on disk: students as safetensors that say how to rebuild themselves, and state dicts of other people."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, first_offenders, nearest
from softcache.models.from_torchvision import torchvision_weights
from softcache.models.from_transformers import describe_transformer
from softcache.models.graft import regraft
from softcache.models.inputs import ImageInput, TextInput
from softcache.models.model import Model, final_linear
from softcache.models.projector import Graft
from softcache.spec import Spec, parse_spec

STUDENT = "student.safetensors"  # its name in a run folder
METADATA_KEY = "softcache_model"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


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
    """

    spec: str
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    input: Mapping[str, Any]
    vocabulary: tuple[str, ...] | None
    graft: Graft | None = None
    transformer: Mapping[str, Any] | None = None


def save_student(model: Model, path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write the network's weights and how to rebuild it as one safetensors file, whole or not at all.

    Args:
        model: its weights are copied to the CPU; tied weights are stored once per name.
        path: the file, by habit `student.safetensors` in a run folder.
        metadata: further strings to keep; the key "softcache_model" is ours.
    """
    # cloned: safetensors refuses tensors that share memory
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.net.state_dict().items()}
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # under one key: safetensors writes several in a random order, and equal students should be equal files
        told = json.dumps({**metadata, METADATA_KEY: json.dumps(describe_model(model))}, sort_keys=True)
        aside.touch()
        mode = aside.stat().st_mode
        save_file(tensors, aside, metadata={"softcache": told})
        aside.chmod(mode)  # safetensors makes files that nobody else may read
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def describe_model(model: Model) -> dict[str, Any]:
    """JSON-able: what `read_saved` gives back of a student, and what goes with a model that is exported."""
    spec, transformer = parse_spec(model.spec), describe_transformer(model)
    return {
        "spec": (spec.without("weights") if spec.scheme in ("torchvision", "timm") else spec).portable(),
        "num_classes": model.num_classes,
        "class_names": model.data_class_names or model.class_names or (),
        "input_shape": model.input_shape,
        "input": model.input.describe(),
        "vocabulary": model.input.vocabulary if isinstance(model.input, TextInput) else None,
        **({"graft": model.graft.to_json()} if model.graft is not None else {}),
        **({"transformer": transformer} if transformer is not None else {}),
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata strings of a safetensors file or of a run folder's student; ModelError if it cannot be read."""
    path = weights_file(str(path))
    try:
        with safe_open(path, framework="pt") as file:
            found = dict(file.metadata() or {})
            return dict(json.loads(found["softcache"])) if "softcache" in found else found
    except (SafetensorError, OSError, ValueError) as exc:
        raise ModelError(f"{path} is not a safetensors file: {exc}") from None


def read_saved(weights: str) -> SavedModel | None:
    """What the weights say about their model; None for files that do not come from `save_student`."""
    path = weights_file(weights)
    if path.suffix != ".safetensors":
        return None
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        return None
    try:
        about = json.loads(text)
        return SavedModel(
            spec=about["spec"],
            num_classes=about["num_classes"],
            class_names=tuple(about["class_names"]),
            input_shape=None if about["input_shape"] is None else tuple(about["input_shape"]),
            input=about["input"],
            vocabulary=None if about["vocabulary"] is None else tuple(about["vocabulary"]),
            graft=Graft(**about["graft"]) if "graft" in about else None,
            transformer=about.get("transformer"),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise ModelError(f"{path}: its {METADATA_KEY!r} metadata cannot be understood: {exc!r}") from None


def split_weights(text: str) -> tuple[str, str]:
    """MODEL and WEIGHTS of `MODEL@WEIGHTS`; folders in front of a factory's `.py:` may hold an '@' of their own."""
    cut = text.find("@", max(text.find(".py:"), 0))
    if cut < 0:
        return text, ""
    if not text[cut + 1 :]:
        raise ConfigError(f"{text!r} names no weights", tip="write MODEL@WEIGHTS, or MODEL alone")
    return text[:cut], text[cut + 1 :]


def weights_file(weights: str) -> Path:
    """The file behind a weights path, which may be a run folder; ModelError when there is none."""
    path = Path(weights)
    if path.is_dir():
        if not (path / STUDENT).is_file():
            raise ModelError(
                f"the folder {path} holds no {STUDENT}", tip="give a run folder whose training has finished"
            )
        return path / STUDENT
    if not path.is_file():
        raise ModelError(f"there are no weights {path}", tip="give a weights file or a run folder that exists")
    return path


def names_torchvision_weights(spec: Spec, weights: str) -> bool:
    """True when `weights` is to be looked up in torchvision's table: not a path, not a file name."""
    path = Path(weights)
    return spec.scheme == "torchvision" and not path.exists() and path.name == weights and path.suffix not in SUFFIXES


def load_weights(model: Model, weights: str) -> None:
    """Load weights into a model that is already built; its class names become those of the weights, if they have any.

    Args:
        model: changed in place, its device kept.
        weights: a `.safetensors` file; a state dict `.pt`, `.pth` or `.bin`, bare or under "state_dict" or "model"; a
            run folder; for torchvision models also the name of torchvision's weights.

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
    path = weights_file(weights)
    saved = read_saved(weights)
    if saved is not None:
        _check_same_input(model, saved, weights)
        if saved.graft is not None and model.graft is None:
            regraft(model, saved.graft)
    _load(model, read_state(path), weights)
    model.untrained = ()
    if saved is not None and saved.class_names:
        model.class_names = saved.class_names


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


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, never running code from it."""
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path} is not a weights file we know", tip=nearest(path.suffix, SUFFIXES))
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"{path} is not a safetensors file: {exc}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # unpickling bytes that are no pickle can raise almost anything
        reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
        raise ModelError(
            f"{path} cannot be read as plain tensors: {reason}",
            tip="files that hold code are refused; save the weights alone: torch.save(net.state_dict(), path)",
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        raise ModelError(
            f"{path} is not a state dict (names to tensors), bare or under 'state_dict' or 'model'",
            tip="save the weights alone: torch.save(net.state_dict(), path)",
        )
    for prefix in ("_orig_mod.", "module."):  # what torch.compile and DistributedDataParallel put in front
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


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
    if isinstance(model.input, TextInput) and model.input.vocabulary != saved.vocabulary:
        raise ModelError(
            f"{weights} was trained with another vocabulary",
            tip="leave vocabulary= out: the run brings its own",
        )


def _load(model: Model, state: Mapping[str, Tensor], where: str) -> None:
    """Copy the tensors into the network; ModelError listing everything that does not fit."""
    wanted = model.net.state_dict()
    differ = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    final = final_linear(model.net, model.num_classes)
    final_name = next((f"{name}.weight" for name, module in model.net.named_modules() if module is final), "")
    if final_name in differ and state[final_name].shape[1:] == wanted[final_name].shape[1:]:
        raise ModelError(
            f"{where}: the weights have {state[final_name].shape[0]} classes, the data has {model.num_classes}",
            tip="use weights trained for these classes, or train without weights",
        )
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted]
    shapes = [f"{name} {tuple(state[name].shape)} there, {tuple(wanted[name].shape)} in the model" for name in differ]
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
    model.net.load_state_dict(dict(state))

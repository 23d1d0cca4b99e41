"""Spec string -> network with its preprocessing and, if asked, its weights.

Adding a model is a function that returns a Model and a line in MODELS.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.errors import ConfigError, ModelError, SoftcacheError, nearest
from softcache.models.bottleneck import resnet50
from softcache.models.class_names import own_classes
from softcache.models.cnn import cnn
from softcache.models.encoder import encoder
from softcache.models.from_timm import names_timm_weights, timm_model
from softcache.models.from_torchvision import torchvision_model
from softcache.models.from_transformers import TokenizerInput, rebuild_transformer, transformers_model
from softcache.models.graft import graft
from softcache.models.initialise import Initialised, initialise
from softcache.models.inputs import AnyInput, ImageInput, Input, TextInput, VectorInput, restore_input
from softcache.models.language_model import token_model
from softcache.models.mlp import mlp
from softcache.models.mobilenet import mobilenetv2
from softcache.models.model import OTHER_OUTPUTS, Model, final_linear
from softcache.models.projector import Graft, Projector
from softcache.models.resnet import X4, cifar_resnet
from softcache.models.saved_metadata import check_spec, load_json
from softcache.models.shrunk import Shrunk, check_whole_size
from softcache.models.shufflenet import shufflenetv1, shufflenetv2
from softcache.models.tagger import encoder_tagger, tagger
from softcache.models.textcnn import build_vocabulary, read_vocabulary, textcnn, write_vocabulary
from softcache.models.vgg import vgg
from softcache.models.weights import (
    METADATA_KEY,
    SavedModel,
    describe_model,
    fingerprint,
    load_weights,
    names_torchvision_weights,
    path_alone,
    path_and_choice,
    read_metadata,
    read_saved,
    refuse_misfit,
    reshrink,
    save_student,
    split_weights,
    stored_shapes,
    weights_file,
)
from softcache.models.wrn import wide_resnet, wrn
from softcache.spec import Spec, call_factory, load_factory, parse_spec, unquoted

__all__ = [
    "METADATA_KEY",
    "MODELS",
    "AnyInput",
    "Graft",
    "ImageInput",
    "Initialised",
    "Input",
    "Model",
    "Projector",
    "SavedModel",
    "Shrunk",
    "TextInput",
    "TokenizerInput",
    "VectorInput",
    "build",
    "build_vocabulary",
    "describe_model",
    "final_linear",
    "fingerprint",
    "graft",
    "initialise",
    "load_json",
    "load_model",
    "load_weights",
    "own_classes",
    "path_alone",
    "path_and_choice",
    "read_metadata",
    "read_saved",
    "read_vocabulary",
    "save_student",
    "split_weights",
    "write_vocabulary",
]

GRAFTED = 4  # a network may have so many times the numbers of its weights, where a projector took the place of layers

MODELS: dict[str, Callable[..., Model]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet8": cifar_resnet(8),
    "resnet14": cifar_resnet(14),
    "resnet20": cifar_resnet(20),
    "resnet32": cifar_resnet(32),
    "resnet44": cifar_resnet(44),
    "resnet56": cifar_resnet(56),
    "resnet110": cifar_resnet(110),
    "resnet8x4": cifar_resnet(8, X4),
    "resnet32x4": cifar_resnet(32, X4),
    "resnet50": resnet50,
    "wrn": wrn,
    "wrn16_2": wide_resnet(16, 2),
    "wrn40_1": wide_resnet(40, 1),
    "wrn40_2": wide_resnet(40, 2),
    "vgg8": vgg(1),
    "vgg13": vgg(2),
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
    "textcnn": textcnn,
    "encoder": encoder,
    "tagger": tagger,
    "encoder_tagger": encoder_tagger,
}


def load_model(
    text: str,
    *,
    num_classes: int,
    class_names: Sequence[str] = (),
    input_shape: tuple[int, ...] | None = None,
    vocabulary: Sequence[str] | None = None,
    device: str = "cpu",
    allow_code: bool = False,
) -> Model:
    """The model behind `MODEL`, `MODEL@WEIGHTS` or a run folder; fresh weights come from torch's global generator.

    Args:
        text: MODEL is a spec string; WEIGHTS is what `load_weights` takes. A run folder (or its student.safetensors)
            alone brings model, preprocessing and vocabulary.
        num_classes: C of the data.
        class_names: of the data; they are saved with a student.
        input_shape: shape of one rendered item, so that widths need not be said; None for texts.
        vocabulary: for a text model whose spec and weights bring none.
        device: where the network goes.
        allow_code: call the factory that a run folder names. Without it only softcache's, torchvision's, timm's and
            transformers' models are built because a file says so; name the factory in `text` to have it called.

    Raises:
        ModelError: an unknown model, weights that do not fit, another number of classes, a factory that returns
            no nn.Module.
        UntrustedError: a run folder whose model is code.
        ConfigError: an unknown or impossible parameter.
    """
    data: dict[str, Any] = {"num_classes": num_classes, "class_names": tuple(class_names), "input_shape": input_shape}
    if (run := path_alone(text)) is not None:
        return _load_run(run, allow_code=allow_code, **data).to(device)
    head, weights = split_weights(text)
    spec = parse_spec(head)
    if weights and (names_torchvision_weights(spec, weights) or names_timm_weights(spec, weights)):
        # their own builder knows what else the weights change
        if "weights" in spec.parameters:
            raise ModelError(f"{text!r} names weights twice", tip="keep one of them")
        spec, weights = spec.having(weights=unquoted(weights, text)), ""
    saved = read_saved(weights) if weights else None
    if saved is not None and saved.vocabulary is not None:
        vocabulary = saved.vocabulary  # the ids of its embedding
    other = saved if saved is not None and saved.output in OTHER_OUTPUTS else None
    if other is not None:
        data |= {"num_classes": other.num_classes, "class_names": ()}
    model = _build_model(spec, vocabulary=vocabulary, **data)
    if weights:
        load_weights(model, weights)
    if other is not None:
        model.output, model.value_names = other.output, other.value_names
    return model.to(device)


def build(
    spec: Spec,
    *,
    num_classes: int,
    class_names: Sequence[str] = (),
    input_shape: tuple[int, ...] | None = None,
    vocabulary: Sequence[str] | None = None,
) -> Any:
    """What a spec names: a Model for our own, torchvision's, timm's and transformers', else what a user's factory returns.

    A teacher may be anything that maps a batch to logits, so nothing is checked about a factory's result; a student
    goes through `load_model`. A factory is offered num_classes, class_names, input_shape and vocabulary: it gets those
    it asks for.

    Raises:
        ModelError: an unknown model, or a number of classes in the spec that is not the data's.
        ConfigError: an unknown or impossible parameter, a factory that cannot be found.
    """
    offered: dict[str, Any] = {
        "num_classes": num_classes,
        "class_names": tuple(class_names),
        "input_shape": input_shape,
        "vocabulary": vocabulary,
    }
    if spec.is_factory:
        return call_factory(load_factory(spec), spec.parameters, spec.text, **offered)
    said = spec.value("num_classes", str(num_classes))
    if said != str(num_classes):
        raise ModelError(
            f"{spec.text!r} has num_classes={said}, the data has {num_classes} classes",
            tip="head=none gives what its last layer takes" if said == "0" else "leave num_classes out",
        )
    return call_factory(_builder(spec, class_names), spec.parameters, spec.text, **offered)


def _path_like(text: str) -> str:
    """A tip that names what lies at a path much like this one; empty where nothing does."""
    path = Path(text)
    beside = os.listdir(path.parent) if "/" in text and path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean '{path.parent / close[0]}'?" if close else ""


def _builder(spec: Spec, class_names: Sequence[str]) -> Callable[..., Model]:
    if spec.scheme == "torchvision":
        return torchvision_model(spec.name)
    if spec.scheme == "timm":
        return timm_model(spec.name)
    if spec.scheme == "hf":
        return transformers_model(spec.name, class_names)
    if spec.scheme == "softcache":
        if spec.name not in MODELS:
            raise ModelError(f"softcache has no model {spec.name!r}", tip=nearest(spec.name, MODELS))
        return MODELS[spec.name]
    if not spec.scheme:
        shapes = (
            "a model is softcache:mlp, torchvision:resnet18, timm:resnet18, hf:path/to/bert, package.module:factory or "
            "file.py:factory"
        )
        tip = f"did you mean 'softcache:{spec.name}'?" if spec.name in MODELS else _path_like(spec.text) or shapes
        raise ModelError(f"{spec.text!r} is neither a run folder nor a model", tip=tip)
    raise ModelError(
        f"{spec.text!r}: unknown kind of model {spec.scheme!r}",
        tip=nearest(spec.scheme, ("hf", "softcache", "timm", "torchvision"))
        + "; a factory is package.module:name or file.py:name",
    )


def _build_model(spec: Spec, *, transformer: Mapping[str, Any] | None = None, where: str = "", **data: Any) -> Model:
    """A student: as `build`, but always a Model, and labelled with what it was built for.

    Args:
        transformer: what a saved student that is one of transformers' models told, in place of the spec.
        where: the file that told it.
    """
    if transformer is None:
        made = build(spec, **data)
    else:
        made = rebuild_transformer(transformer, data["num_classes"], where)
    if isinstance(made, Model):
        model = made
    elif isinstance(made, nn.Module):
        own = getattr(made, "collate", None)
        if getattr(made, "gives", None) == "tokens" and not callable(own):
            model = token_model(made)
        else:
            model = Model(made, AnyInput(own if callable(own) else None))
    else:
        raise ModelError(
            f"{spec.text!r} returned {type(made).__name__}; a student must be an nn.Module",
            tip="return a torch.nn.Module; other callables can serve as teachers",
        )
    kept = spec.without("vocabulary") if spec.scheme == "softcache" else spec  # it is saved beside the spec
    model.spec = model.spec if spec.scheme == "hf" else kept.portable()
    model.num_classes = data["num_classes"]
    model.data_class_names = data["class_names"]
    model.input_shape = data["input_shape"]
    return model


def _load_run(
    text: str, *, allow_code: bool, num_classes: int, class_names: tuple[str, ...], input_shape: Any
) -> Model:
    """The student of a run folder, built from its own metadata; the data's input shape is not needed."""
    path, saved = weights_file(text), read_saved(text)
    if saved is None:
        if path.suffix in (".onnx", ".pt2"):
            raise ModelError(
                f"{path}: an exported program can be run, not trained or made smaller",
                tip="give the run folder that it was exported from",
            )
        raise ModelError(f"{path} does not say what model it is", tip=f"name it: MODEL@{text}")
    spec = parse_spec(saved.spec)
    if saved.transformer is None:
        check_spec(spec, text, allow_code=allow_code)
    has_classes = saved.output not in OTHER_OUTPUTS
    if has_classes and saved.num_classes != num_classes:
        raise ModelError(
            f"{text} was trained on {saved.num_classes} classes, the data has {num_classes}",
            tip="use the data the run was trained for",
        )
    if spec.scheme.endswith(".py") and not os.path.isfile(spec.scheme):
        raise ModelError(
            f"{text} was built by {saved.spec}, which is not in the current folder",
            tip=f"say where it is: path/to/{saved.spec}@{text}",
        )
    data: dict[str, Any] = {
        "num_classes": saved.num_classes,
        "class_names": (class_names or saved.class_names) if has_classes else (),
        "input_shape": saved.input_shape if saved.input_shape is not None else input_shape,
        "vocabulary": saved.vocabulary,
    }
    if not spec.is_factory or saved.transformer is not None:
        _refuse_too_large(path, spec, saved, text, data)
    model = _build_model(spec, transformer=saved.transformer, where=text, **data)
    try:
        model.input = restore_input(saved.input) or model.input
    except (TypeError, ValueError, ConfigError) as exc:
        raise ModelError(f"{path}: its preprocessing cannot be understood: {exc}", tip="copy it again") from None
    load_weights(model, text)
    if not has_classes:
        model.output, model.value_names = saved.output, saved.value_names
    return model


def _refuse_too_large(path: Path, spec: Spec, saved: SavedModel, text: str, data: Mapping[str, Any]) -> None:
    """Refuse metadata that do not describe the tensors beside them, before anything of their size is allocated."""
    if saved.transformer is None and spec.scheme != "softcache":
        return  # a name has one size
    with torch.device("meta"):
        try:
            made = _build_model(spec, transformer=saved.transformer, where=text, **data)
        except SoftcacheError:
            raise
        except Exception as exc:  # what a network of absurd numbers may raise
            raise ModelError(
                f"{path}: says that it belongs to {saved.spec}, which cannot be built: {type(exc).__name__}: {exc}",
                tip=f"if it is right, name the model yourself: MODEL@{text}",
            ) from None
    there = stored_shapes(path)
    most = sum(map(math.prod, there.values()))
    if saved.shrunk is not None:
        check_whole_size(made.net, most, text)
        reshrink(made, saved.shrunk, text, most=most)
    if saved.graft is None:
        refuse_misfit(made, there, text)
    elif sum(tensor.numel() for tensor in made.net.state_dict().values()) > GRAFTED * most:
        raise ModelError(
            f"{path}: says that it belongs to {saved.spec}, which is far larger than its weights ({most:,} numbers)",
            tip=f"if it is right, name the model yourself: MODEL@{text}",
        )

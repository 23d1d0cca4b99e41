"""Checkpoints as they are published: which network of a file is taken, what is left, and what is told of it."""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, SoftcacheError
from softcache.models import load_model
from softcache.models.checkpoints import read_state


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = OrderedDict(conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4), fc=nn.Linear(4, 10))
    return nn.Sequential(layers)


STATE = network(1).state_dict()
OTHER = network(2).state_dict()


class Config(dict[str, Any]):
    """A dict of its own kind, as many frameworks keep their settings in."""


def under(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


ARGS = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/x"), model=Config(width=4), best=np.float64(3))
PUBLISHED: dict[str, tuple[Any, str, str]] = {
    # what the file holds, what is chosen, what is told
    "timm": ({"epoch": 3, "arch": "x", "state_dict": STATE, "args": ARGS, "metric": np.float32(1)}, "", ""),
    "timm with ema": (
        {"state_dict": OTHER, "state_dict_ema": STATE, "args": ARGS},
        "state_dict_ema",
        "taken from 'state_dict_ema', not from 'state_dict'",
    ),
    "deit": ({"model": STATE, "model_ema": OTHER, "args": ARGS}, "model", "taken from 'model', not from 'model_ema'"),
    "lightning": (
        {"state_dict": {**under("model."), "criterion.weight": torch.ones(3)}, "hyper_parameters": Config(a=ARGS)},
        "",
        "'model.' taken off its names, 1 tensors of other names left out",
    ),
    "lightning's student": (
        {"state_dict": {**under("student."), **under("teacher.", OTHER)}, "callbacks": defaultdict(list)},
        "student",
        "'student.' taken off its names, 9 tensors of other names left out",
    ),
    "moco": (
        {"state_dict": {**under("module.encoder_q."), **under("module.encoder_k.", OTHER)}},
        "encoder_q",
        "'module.encoder_q.' taken off its names, 9 tensors of other names left out",
    ),
    "dino": (
        {"student": under("module.backbone.", OTHER), "teacher": under("backbone."), "loss": {"center": torch.ones(3)}},
        "teacher",
        "taken from 'teacher', not from 'student', 'loss', 'backbone.' taken off its names",
    ),
    "ema": (
        {"ema": {"module": STATE, "decay": 0.9}, "net": under("module.", OTHER)},
        "ema",
        "taken from 'ema.module', not from 'net'",
    ),
    "pytorch-cifar": ({"net": under("module."), "acc": 93.1}, "", "'module.' taken off its names"),
    "thop": ({**STATE, "total_ops": torch.ones(1), "fc.total_params": torch.ones(1)}, "", "2 counters left out"),
    "before BatchNorm counted": ({n: t for n, t in STATE.items() if "tracked" not in n}, "", ""),
    "an optimizer beside it": (
        {"model": STATE, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1}]}},
        "",
        "",
    ),
    "a tensor beside it": ({"state_dict": STATE, "best": torch.ones(1)}, "", "taken from 'state_dict', not from '.'"),
}


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_give_the_network_that_is_meant(name: str, older: bool, tmp_path: Path) -> None:
    content, choice, told = PUBLISHED[name]
    torch.save(content, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=not older)
    found = read_state(tmp_path / "w.pth.tar", network().state_dict(), choice)
    assert found.told == told
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in found.tensors.items())


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"state_dict": STATE, "state_dict_ema": OTHER}, "2 networks: state_dict, state_dict_ema"),
        ({"model": STATE, "model_ema": STATE}, "2 networks: model, model_ema"),
        ({"state_dict": {**under("student."), **under("teacher.")}}, "state_dict.student, state_dict.teacher"),
    ],
)
def test_several_networks_are_never_chosen_from_in_silence(content: Any, names: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=names) as caught:
        read_state(tmp_path / "w.pt", network().state_dict())
    choice = caught.value.tip.rpartition("#")[2]
    assert read_state(tmp_path / "w.pt", network().state_dict(), choice).tensors.keys() == STATE.keys()


def test_a_choice_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "state_dict_ema": OTHER}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="no tensors called 'ema'") as caught:
        read_state(tmp_path / "w.pt", network().state_dict(), "ema")
    assert "state_dict_ema" in caught.value.tip
    torch.save(STATE, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as caught:
        read_state(tmp_path / "w.pt", network().state_dict(), "ema")
    assert "leave #ema out" in caught.value.tip


def test_weights_of_other_classes_are_told_as_such_whatever_they_lie_in(tmp_path: Path) -> None:
    state = load_model("softcache:mlp?hidden=4", num_classes=7, input_shape=(2, 2)).net.state_dict()
    torch.save({"state_dict": under("module.", state), "args": ARGS}, tmp_path / "w.pth.tar")
    with pytest.raises(ModelError, match="the weights have 7 classes, the data has 3"):
        load_model(f"softcache:mlp?hidden=4@{tmp_path}/w.pth.tar", num_classes=3, input_shape=(2, 2))


def test_what_a_file_names_is_never_called(tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Bomb:
        def __init__(self, call: Callable[..., Any], *args: Any) -> None:
            self.call, self.args = call, args

        def __reduce__(self) -> Any:
            return self.call, self.args

    for older in (False, True):
        bombs = {"a": Bomb(eval, f"open({str(made)!r}, 'w')"), "b": Bomb(np.save, str(made), 1)}
        torch.save({"state_dict": STATE, **bombs}, tmp_path / "w.pt", _use_new_zipfile_serialization=not older)
        assert read_state(tmp_path / "w.pt", network().state_dict()).tensors.keys() == STATE.keys()
        for bomb in (Bomb(os.system, f"touch {made}"), Bomb(Path.touch, made)):
            torch.save({"x": bomb}, tmp_path / "w.pt", _use_new_zipfile_serialization=not older)
            with pytest.raises(ModelError, match="which is code"):
                read_state(tmp_path / "w.pt", network().state_dict())
    assert not made.exists()


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "npz":
        np.savez(file, a=np.ones(3))
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("w.pt"))
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("folder/w.pt", "x")
    elif kind == "cut":
        torch.save(STATE, file)
        return file.getvalue()[:-500]
    elif kind == "torch":
        torch.save(STATE, file)
    elif kind == "whole":
        torch.save(nn.Linear(2, 2), file)
    return file.getvalue()


NONE: dict[str, tuple[str, bytes, str]] = {
    "empty": ("w.pth", b"", "is empty"),
    "lfs": (
        "w.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
        "pointer of Git LFS",
    ),
    "page": ("w.pth", b"\n<!DOCTYPE html><html>", "page of the web"),
    "json": ("w.pth", b'{"error": "Invalid credentials"}', "a JSON text"),
    "keras": ("w.pth", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "gzip": ("w.pth.gz", b"\x1f\x8b\x08", "packed by gzip"),
    "npz": ("w.npz", packed("npz"), "NumPy arrays, which is not read"),
    "npy": ("w.npy", b"\x93NUMPY\x01", "one NumPy array"),
    "tar": ("w.pth.tar", packed("tar"), "a tar archive"),
    "zip": ("w.pth", packed("zip"), "zip archive of folder/w.pt"),
    "cut": ("w.pth", packed("cut"), "cut off or damaged"),
    "text": ("w.pth", b"hello world", "torch.save did not write it"),
    "torch": ("w.safetensors", packed("torch"), "written by torch.save"),
    "whole": ("w.pt", packed("whole"), "a whole network, which is code"),
    "another ending": ("w.model", b"hello", "not a weights file we know"),
}


@pytest.mark.parametrize("name", NONE)
def test_a_file_that_holds_no_weights_is_told_as_what_it_is(name: str, tmp_path: Path) -> None:
    file, content, message = NONE[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_state(tmp_path / file, STATE)
    assert caught.value.tip


def test_a_safetensors_file_under_another_ending_is_told(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="is a safetensors file"):
        read_state(tmp_path / "w.pth", STATE)


@pytest.mark.parametrize("begin", [b"PK", b"\x80", b"\x1f\x8b", b"<?xml"])
def test_a_safetensors_file_is_read_whatever_its_length_begins_with(begin: bytes, tmp_path: Path) -> None:
    found = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    size = int.from_bytes(begin[:2].ljust(8, b"\0"), "little")
    header = found.ljust(size, b" ") if size >= len(found) else found
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert read_state(tmp_path / "w.safetensors", {"weight": torch.zeros(1)}).tensors["weight"].item() == 0


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    names = list(STATE)
    places = {name: f"model-{1 + (i > 3)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({f"model.{n}": STATE[n] for n in names if places[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": under("model.", places)}))  # type: ignore[arg-type]
    found = read_state(index, STATE)
    assert all(torch.equal(found.tensors[name], STATE[name]) for name in STATE)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model-2.safetensors, which is not there"):
        read_state(index, STATE)
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(ModelError, match="does not lie beside it"):
        read_state(index, STATE)
    index.write_text("[]")
    with pytest.raises(SoftcacheError, match="no index of weights"):
        read_state(index, STATE)


def test_weights_that_are_something_else_are_told_by_a_model_too(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(NONE["lfs"][1])
    with pytest.raises(ModelError, match="pointer of Git LFS"):
        load_model(f"softcache:mlp?hidden=4@{tmp_path}/w.safetensors", num_classes=3, input_shape=(2, 2))
    with pytest.raises(ModelError, match=r"there are no weights .*w.pth.tar"):
        load_model("torchvision:resnet18@w.pth.tar#model", num_classes=3, input_shape=(8, 8, 3))

"""Students and models under evaluation that are of another kind, or fail: told with the place, before anything is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import WORLDS

from softcache import train
from softcache.config import EvalConfig, ExportConfig, TrainConfig
from softcache.errors import DataError, ModelError, SoftcacheError
from softcache.evaluate.measure import run as evaluate
from softcache.models import load_model
from softcache.students import export

DATA = f"{WORLDS}/float_items.py:pictures?scale=uint8"
CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, how):
        super().__init__()
        self.fc, self.how = nn.Linear(64, num_classes), how
        if how == "collate":
            self.collate = self.own

    def own(self, items):
        raise KeyError("no such column")

    def forward(self, batch):
        z = self.fc(batch.float().flatten(1))
        if self.how == "training" and self.training:
            raise ValueError("not while it learns")
        return {
            "dict": lambda: {"logits": z},
            "tuple": lambda: (z, z),
            "flat": lambda: z[:, 0],
            "fewer": lambda: z[:-1],
            "raises": lambda: z[:, 99] + undefined,
            "large": lambda: nn.functional.conv2d(
                batch.float(), torch.ones(3, 1, 11, 11)
            ).flatten(1),
        }.get(self.how, lambda: z)()


def net(num_classes: int, how: str = ""):
    return Net(num_classes, how)


def function(num_classes: int):
    return lambda batch: batch


def broken(num_classes: int):
    return nn.Linear(num_classes, "five")
"""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "odd.py"
    path.write_text(CODE)
    return path


def run_train(model: str, out: Path) -> Any:
    config = TrainConfig(data=DATA, student=model, out=str(out / "run"), loss=("ce",), epochs=1, threads=1)
    return train.run(config, quiet=True)


def run_evaluate(model: str, out: Path) -> Any:
    return evaluate(model, EvalConfig(data=DATA, threads=1), quiet=True)


def run_export(model: str, out: Path) -> Any:
    return export.run(model, ExportConfig(data=DATA, out=str(out / "a.safetensors"), to="safetensors"), quiet=True)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        pytest.param("net?how=dict", ModelError, "returned dict, not one tensor", id="dict"),
        pytest.param("net?how=tuple", ModelError, "returned tuple, not one tensor", id="tuple"),
        pytest.param(
            "net?how=raises", ModelError, r"failed: (IndexError|NameError): .*\(odd.py, line 25\)", id="raises"
        ),
        pytest.param("net?how=collate", DataError, r"'no such column'", id="collate"),
        pytest.param("function", ModelError, "must be an nn.Module", id="function"),
        pytest.param("broken", ModelError, r"building the .*failed: TypeError: .*\(odd.py, line 41\)", id="factory"),
        pytest.param("net?how=large", ModelError, r"failed: RuntimeError: .*size.*line 26", id="too small pictures"),
    ],
)
@pytest.mark.parametrize("verb", [run_train, run_evaluate, run_export])
def test_faults_of_a_model_are_told_with_their_place(
    pieces: Path, tmp_path: Path, verb: Any, model: str, error: type[SoftcacheError], message: str
) -> None:
    with pytest.raises(error, match=message):
        verb(f"{pieces}:{model}", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["flat", "fewer"])
def test_rows_of_another_shape(pieces: Path, tmp_path: Path, how: str) -> None:
    for verb in (run_train, run_evaluate):
        with pytest.raises(ModelError, match=r"gives \(\d+"):
            verb(f"{pieces}:net?how={how}", tmp_path)


def test_a_fault_of_training_alone(pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"in training failed: ValueError: not while it learns \(odd.py, line 19\)"):
        run_train(f"{pieces}:net?how=training", tmp_path)


@pytest.mark.slow
def test_auxiliary_classifiers_are_left_aside_or_out(tmp_path: Path) -> None:
    import torch

    images = torch.rand(2, 3, 96, 96)
    with_them, without = (
        load_model(f"torchvision:googlenet{text}", num_classes=3, input_shape=(3, 96, 96))
        for text in ("", "?aux_logits=false")
    )
    for model in (with_them, without):
        assert model.train()(images).shape == model.eval()(images).shape == (2, 3)
    assert len(with_them.net.state_dict()) > len(without.net.state_dict())
    with pytest.raises(SoftcacheError, match="has no auxiliary classifiers"):
        load_model("torchvision:resnet18?aux_logits=true", num_classes=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("opens", r"the data set .* failed: KeyError: 'no labels' \(data.py, line 5\)", id="a factory"),
        pytest.param("reads", r"sample reads/\d+: ValueError: no picture \(data.py, line 13\)", id="an item"),
    ],
)
def test_faults_of_a_data_set_are_told_with_their_place(tmp_path: Path, name: str, message: str) -> None:
    data = tmp_path / "data.py"
    data.write_text(
        "import numpy as np\n\n\n"
        "def opens():\n    raise KeyError('no labels')\n\n\n"
        "class Reads:\n    targets = [0, 1]\n    classes = ['a', 'b']\n    __len__ = lambda self: 2\n"
        "    def __getitem__(self, i):\n        raise ValueError('no picture')\n\n\n"
        "def reads():\n    return Reads()\n"
    )
    with pytest.raises(DataError, match=message):
        train.run(
            TrainConfig(data=f"{data}:{name}", student="softcache:mlp", out=str(tmp_path / "run"), loss=("ce",)),
            quiet=True,
        )

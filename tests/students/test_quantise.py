"""Int8 after training: the ends of activations by samples, in what order methods go, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softcache.config import ShrinkConfig
from softcache.errors import ConfigError, ModelError, SoftcacheError
from softcache.models import Model, load_model, save_student
from softcache.models.fake_quantise import INPUT, OUTPUT, Quantised, quantised_layers
from softcache.models.inputs import AnyInput
from softcache.students import shrink
from softcache.students.quantise import ends_of, quantise_int8
from softcache.students.samples import Samples


def numbers(net: nn.Module, rows: list[torch.Tensor], batch_size: int = 2) -> Samples:
    """Samples that are rows of numbers, and the network that takes them."""
    model = Model(net.eval(), AnyInput(None))
    return Samples.of(model, "the model", rows[0], len(rows), lambda i: rows[i], batch_size)


@pytest.mark.parametrize(("shift", "low", "high"), [(0, -3, 5), (4, 0, 9), (-6, -9, 0)])
def test_the_ends_are_the_widest_of_all_samples_and_hold_0(shift: float, low: float, high: float) -> None:
    rows = [torch.tensor(row) + shift for row in ([1.0, 2.0, -3.0], [0.0, 5.0, 1.0], [1.0, 1.0, 1.0])]
    net = nn.Sequential(nn.Linear(3, 2))
    assert ends_of(net, {"0": Quantised()}, numbers(net, rows))["0", INPUT].tolist() == [low, high]


def test_an_activation_that_is_always_0_has_ends_too() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    found = ends_of(net, {"0": Quantised()}, numbers(net, [torch.zeros(3)] * 4))
    assert found["0", INPUT].tolist() == [0.0, 1.0]


def test_answers_are_seen_behind_the_batch_norm_that_is_folded() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2))
    net[1].running_var.fill_(1e-4)  # type: ignore[operator,union-attr]
    rows = list(torch.randn(6, 1, 2, 2))
    samples = numbers(net, rows)
    with torch.no_grad():
        behind = net[:2](torch.stack(rows))  # type: ignore[index]
    record, said = quantise_int8(net, samples)
    assert record.quantised["0"] == Quantised("1", output=True) and "2 layers of int8, 1 of them with" in said
    low, high = net[0].output_range.tolist()  # type: ignore[union-attr,operator]
    assert (low, high) == (pytest.approx(float(behind.min()), rel=1e-4), pytest.approx(float(behind.max()), rel=1e-4))
    assert isinstance(net[1], nn.Identity)
    assert getattr(net[4], OUTPUT) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = load_model(
        "softcache:cnn?width=16", num_classes=4, class_names=("ant", "bee", "cat", "dog"), input_shape=(8, 8)
    )
    save_student(model, folder / "student.safetensors", metadata={})
    return folder


@pytest.fixture
def images(toy: Path) -> str:
    return f"{toy}:images?count=20"


@pytest.fixture(autouse=True)
def _timed_once(timed_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "find_spec", lambda _name: None)  # as without onnxruntime, which takes seconds


def shrunk(run: Path | str, out: Path, *by: str, **settings: Any) -> shrink.Shrinking:
    config = ShrinkConfig(model=str(run), by=by, out=str(out), device="cpu", threads=1, batch_size=8, **settings)
    return shrink.run(config, quiet=True)


def test_int8_is_the_last_of_several_methods(run: Path, tmp_path: Path, images: str) -> None:
    by = ("carve:width=0.5", "lowrank:rank=0.5", "prune:unstructured,amount=0.5", "quantise:int8")
    result = shrunk(run, tmp_path / "out", *by, data=images, eval_data=images)
    model = load_model(str(tmp_path / "out"), num_classes=4)
    layers = dict(quantised_layers(model.net))
    assert model.shrunk is not None and set(layers) == set(model.shrunk.quantised)
    assert any(name.endswith("first") for name in layers)  # of the two that stand for one
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    assert zeros >= 0.49 * sum(layer.weight.numel() for layer in layers.values())
    assert result.after.nbytes < result.before.nbytes / 3
    text = result.text()
    assert "BatchNorm measured anew on" in text and "the times of torch are those of floats that are rounded" in text


def test_int8_alone_measures_no_batch_norm(run: Path, tmp_path: Path, images: str) -> None:
    assert "measured anew" not in shrunk(run, tmp_path / "out", "quantise:int8", data=images).text()


MISTAKES = [
    (("quantise",), "there is no method 'quantise'", "quantise:int8"),
    (("quantise:int4",), "there is no method 'quantise:int4'", "the linear layers of language models"),
    (("quantise:int8",), "there are no samples", "--data DATA"),
    (("quantise:int8", "carve:width=0.5"), "of int8 weights nothing more can be cut", "give --by quantise:int8 last"),
    (("quantise:int8", "quantise:int8"), "once is enough", "leave one out"),
    (("quantise:int8,bits=3",), "unknown parameter 'bits'", "keep"),
]


@pytest.mark.parametrize(("by", "said", "tip"), MISTAKES, ids=[str(row[0]) for row in MISTAKES])
def test_a_mistake_is_told(by: tuple[str, ...], said: str, tip: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SoftcacheError) as caught:
        shrunk(run, tmp_path / "out", *by)
    assert said in caught.value.message and tip in caught.value.tip
    assert not (tmp_path / "out").exists()


def test_a_layer_to_keep_that_is_not_there(run: Path, tmp_path: Path, images: str) -> None:
    with pytest.raises(SoftcacheError, match="there is no module 'nothing' to keep"):
        shrunk(run, tmp_path / "out", "quantise:int8,keep=nothing", data=images)


def test_what_is_quantised_is_not_cut_again(run: Path, tmp_path: Path, images: str) -> None:
    shrunk(run, tmp_path / "int8", "quantise:int8", data=images)
    for by in ("quantise:int8", "lowrank:rank=0.5"):
        with pytest.raises(ModelError, match="is quantised already") as caught:
            shrunk(tmp_path / "int8", tmp_path / "out", by, data=images)
        assert "the model that it was made of" in caught.value.tip


def test_a_network_without_such_layers_is_refused() -> None:
    net = nn.Sequential(nn.Flatten())
    with pytest.raises(ConfigError, match=r"has no nn.Conv2d and no nn.Linear"):
        quantise_int8(net, numbers(net, [torch.zeros(4)] * 2))

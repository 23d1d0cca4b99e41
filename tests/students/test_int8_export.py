"""Quantised students for other programs: the same numbers in a graph of torch, QDQ nodes in ONNX, and what int8 gains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.config import ExportConfig, ShrinkConfig
from softcache.errors import ConfigError, ExportError
from softcache.machine import INT8_FLAGS, processor_flags
from softcache.models import Model, Shrunk, load_model, save_student
from softcache.models.fake_quantise import quantised_layers, whole_weights
from softcache.models.int8_layers import begin_int8, fix_int8, observe, plan_int8
from softcache.students import export, shrink
from softcache.students.int8_forms import for_torch, in_floats, is_quantised
from softcache.students.int8_speed import Speed

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
ONNX = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra softcache[onnx]")


def int8(spec: str = "softcache:resnet8?in_channels=1") -> Model:
    """A quantised model: convolutions with BatchNorm, additions, a linear layer."""
    torch.manual_seed(3)
    model = load_model(spec, num_classes=4, class_names=("ant", "bee", "cat", "dog"), input_shape=(8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 1, 8, 8), dtype=np.uint8))
    model.train()(pixels)
    plan, _ = plan_int8(model.net, lambda: model(pixels[:1]))
    begin_int8(model.net, plan)
    observe(model.eval().net, on=True)
    with torch.no_grad():
        model(pixels)
    observe(model.net, on=False)
    fix_int8(model.net, plan)
    model.shrunk = Shrunk(quantised=plan)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Model:
    return int8()


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_student(model, folder / "student.safetensors", metadata={})
    return folder


@pytest.fixture
def images(toy: Path) -> str:
    return f"{toy}:images?count=20"


@pytest.fixture(autouse=True)
def _timed_once(timed_once: None) -> None:
    """Every test."""


def exported(run: Path, out: Path, to: str, data: str, **settings: Any) -> export.Exported:
    config = ExportConfig(to=to, data=data, out=str(out), device="cpu", threads=1, batch_size=8, **settings)
    return export.run(str(run), config, quiet=True)


def pixels(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_the_form_for_torch_gives_the_same_to_the_last_bit(model: Model) -> None:
    with torch.no_grad():
        assert torch.equal(for_torch(model)(pixels(7)), model(pixels(7)))
        assert not torch.equal(in_floats(model)(pixels(7)), model(pixels(7)))
    assert is_quantised(model) and not is_quantised(in_floats(model)) and not is_quantised(for_torch(model))


@pytest.mark.slow
def test_a_program_holds_int8_weights_and_answers_as_the_model(
    model: Model, run: Path, tmp_path: Path, images: str
) -> None:
    result = exported(run, tmp_path / "x.pt2", "program", images)
    assert result.max_difference == 0.0 and result.speed is None and "allowed 0.001" in result.text()
    program = torch.export.load(tmp_path / "x.pt2")
    matrices = [tensor for tensor in program.state_dict.values() if tensor.ndim > 1 and min(tensor.shape) > 0]
    count = len(list(quantised_layers(model.net)))
    assert sum(tensor.dtype == torch.int8 for tensor in matrices) == count
    assert not any(tensor.is_floating_point() and tensor.numel() > max(tensor.shape) for tensor in matrices)
    with torch.no_grad():
        for rows in (1, 5):
            assert torch.equal(program.module()(pixels(rows)), model(pixels(rows)))


def test_safetensors_come_back_as_they_are(model: Model, run: Path, tmp_path: Path, images: str) -> None:
    assert exported(run, tmp_path / "x.safetensors", "safetensors", images).max_difference == 0.0
    again = load_model(str(tmp_path / "x.safetensors"), num_classes=4).eval()
    with torch.no_grad():
        assert torch.equal(again(pixels(3)), model(pixels(3)))


# ---- ONNX -----------------------------------------------------------------------------------------------------------


@ONNX
@pytest.mark.slow
def test_onnx_has_whole_numbers_behind_dequantize_linear_and_answers_alike(
    model: Model, run: Path, tmp_path: Path, images: str
) -> None:
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    result = exported(run, tmp_path / "x.onnx", "onnx", images)
    assert result.changed <= 1 and result.speed is not None and "at least 99.50 % have to be the same" in result.text()
    graph = onnx.load(tmp_path / "x.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == len(list(quantised_layers(model.net)))
    wanted = sorted(whole_weights(layer).sum().item() for _, layer in quantised_layers(model.net))
    found = []
    for node in layers:
        for place, taken in enumerate(node.input):
            maker = makers[taken]
            assert maker.op_type == "DequantizeLinear"
            if place == 0:
                assert makers[maker.input[0]].op_type == "QuantizeLinear"
                assert weights[maker.input[2]].dtype == np.uint8
            elif place == 1:
                whole, scale, zero = (weights[name] for name in maker.input)
                assert (whole.dtype, scale.shape, set(zero)) == (np.uint8, whole.shape[:1], {128})
                found.append(int((whole.astype(np.int64) - 128).sum()))
            else:
                assert weights[maker.input[0]].dtype == np.int32
    assert sorted(found) == wanted
    assert not any(node.metadata_props for node in graph.node)  # no paths of where it was written

    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    batch = pixels(200)
    answers = torch.from_numpy(session.run(None, {"input": batch.numpy()})[0])
    with torch.no_grad():
        logits = model(batch)
    assert (answers.argmax(1) == logits.argmax(1)).float().mean() >= 0.97
    assert (answers - logits).abs().mean() < 0.02 * logits.std()


@ONNX
@pytest.mark.slow
def test_int8_that_answers_otherwise_is_refused_and_not_left(
    run: Path, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_onnx = export.open_onnx
    changed = 0

    def other(path: Path, threads: int) -> Any:
        forward = open_onnx(path, threads)

        def run_of(inputs: Any) -> Tensor:
            nonlocal changed
            logits = forward(inputs)
            for row in logits[: 2 - changed]:
                row.copy_(row.roll(1))
                changed += 1
            return logits

        return run_of

    monkeypatch.setattr(export, "open_onnx", other)
    with pytest.raises(ExportError, match=r"int8 answers otherwise than the model for [23] of 9"):
        exported(run, tmp_path / "x.onnx", "onnx", f"{images.partition('?')[0]}?count=9")
    assert not list(tmp_path.iterdir())


@ONNX
def test_an_opset_without_scales_per_channel_is_refused(run: Path, tmp_path: Path, images: str) -> None:
    with pytest.raises(ConfigError, match="--opset 12: int8 weights have a scale for each channel") as caught:
        exported(run, tmp_path / "x.onnx", "onnx", images, opset=12)
    assert "--opset 13 or higher" in caught.value.tip


# ---- speed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "many", "said"),
    [
        ((2.0, 1.0), (8.0, 5.0), "int8 is faster here;"),
        ((1.0, 2.0), (8.0, 5.0), "int8 is slower here for one sample;"),
        ((1.0, 2.0), (5.0, 8.0), "int8 is slower here for one sample and for a batch;"),
    ],
)
def test_int8_that_is_slower_is_told_so(one: tuple[float, float], many: tuple[float, float], said: str) -> None:
    text = Speed((4000, 1000), one, many, 64, 1, ("avx2",)).text()
    assert said in text and "1 thread, processor: avx2" in text and "0.25" in text and f"{one[1] / one[0]:.2f}" in text


def test_the_processor_is_told_by_what_int8_depends_on() -> None:
    assert set(processor_flags()) <= set(INT8_FLAGS)
    if Path("/proc/cpuinfo").is_file() and " avx2 " in Path("/proc/cpuinfo").read_text():
        assert "avx2" in processor_flags()


@pytest.mark.slow
@pytest.mark.parametrize("has_onnx", [pytest.param(True, marks=ONNX), False])
def test_shrink_times_int8_where_onnxruntime_is(
    has_onnx: bool, tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_student(
        load_model(
            "softcache:cnn?width=8", num_classes=4, class_names=("ant", "bee", "cat", "dog"), input_shape=(8, 8)
        ),
        tmp_path / "student.safetensors",
        metadata={},
    )
    if not has_onnx:
        monkeypatch.setattr(shrink, "find_spec", lambda _name: None)
    config = ShrinkConfig(
        str(tmp_path), ("quantise:int8",), str(tmp_path / "out"), data=images, device="cpu", threads=1, batch_size=4
    )
    result = shrink.run(config, quiet=True)
    assert (result.speed is not None) == has_onnx
    assert ("with softcache[onnx] int8 is timed as well" in result.text()) == (not has_onnx)
    if result.speed is not None:
        assert result.speed.nbytes[1] < result.speed.nbytes[0] and "onnxruntime" in result.text()
        assert result.to_json()["speed"]["batch_size"] == 4

"""Layers that compute what an int8 program computes: against whole numbers, saved as int8, and refused where they are none."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import softcache.models as models
from softcache.errors import ModelError
from softcache.features.taps import eval_mode
from softcache.models import Model, Shrunk, load_model, save_student
from softcache.models.fake_quantise import (
    INPUT,
    OUTPUT,
    SCALE,
    Quantised,
    QuantisedConv2d,
    QuantisedLinear,
    quantised_layers,
    rounded,
    scale_and_zero,
    unpacked,
    whole_weights,
)
from softcache.models.int8_layers import begin_int8, fix_int8, observe, plan_int8
from softcache.models.norms import is_batch_norm
from softcache.models.seal import digest
from softcache.models.shrunk import shrink_by
from softcache.models.weights import student_bytes

SPEC = "softcache:resnet8?in_channels=1"
JOINED, FUSED = WORLDS / "joined_channels.py", f"{WORLDS / 'fused_norms.py'}:fused"


def run_of(model: Model, size: int = 8) -> Callable[[], Tensor]:
    batch = torch.randint(0, 256, (3, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        with torch.no_grad(), eval_mode(model):
            return model(batch)

    return run


def observing(net: nn.Module, *batches: Tensor) -> None:
    """Run it while its ends follow what they see."""
    observe(net, on=True)
    with torch.no_grad():
        for one in batches:
            net(one)
    observe(net, on=False)


def learning(spec: str = SPEC) -> Model:
    """A model with BatchNorm of its own whose layers learn as quantised ones, and have seen a batch."""
    torch.manual_seed(0)
    model = load_model(spec, num_classes=4, class_names="abcd", input_shape=(8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    plan, _ = plan_int8(model.net, run_of(model))
    begin_int8(model.net, plan)
    observing(model.eval(), torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8))
    model.shrunk = Shrunk(quantised=plan)
    return model.eval()


def fixed() -> Model:
    model = learning()
    assert model.shrunk is not None
    fix_int8(model.net, model.shrunk.quantised)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    save_student(fixed(), folder / "student.safetensors", metadata={})
    return folder


# ---- computing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.7, 3.1), (-2.0, 0.0), (-1e-3, 900.0)])
def test_an_activation_is_one_of_256_numbers_and_0_is_one_of_them(low: float, high: float) -> None:
    holder = nn.Identity()
    holder.register_buffer(INPUT, torch.tensor([low, high]))
    values = torch.linspace(low - 1, high + 1, 1001, dtype=torch.float32)
    found = rounded(holder, INPUT, values).double().numpy()
    step = (np.float64(high) - low) / 255
    zero = round(-low / step)
    oracle = (np.clip(np.round(values.double().numpy() / step) + zero, 0, 255) - zero) * step
    assert len(set(found)) <= 256 and np.abs(found - oracle).max() <= step * 1.001  # a tie may fall to either side
    assert np.mean(np.abs(found - oracle) > 1e-4 * step) < 0.02
    assert rounded(holder, INPUT, torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(6, 5, bias=False)])
def test_a_layer_computes_what_whole_numbers_give(layer: Any) -> None:
    """An oracle in integers: (x - zero) times w, summed up, times both scales, and the bias."""
    net = nn.Sequential(layer)
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 7, 7)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    begin_int8(net, {"0": Quantised()})
    observing(net, values)
    fix_int8(net, {"0": Quantised()})
    found = net.eval()(values)
    quantised: Any = net[0]
    assert isinstance(quantised, QuantisedConv2d | QuantisedLinear)
    step, zero = scale_and_zero(quantised.input_range)
    whole = (values / step).round().add(zero).clamp(0, 255).sub(zero).long()
    weight = whole_weights(quantised).long()
    assert weight.abs().max() == 127 and weight.unique().numel() > 10
    if isinstance(layer, nn.Linear):
        total = whole @ weight.T
        per_channel = (step * quantised.weight_scale).double()
    else:
        total = nn.functional.conv2d(
            whole.double(), weight.double(), None, layer.stride, layer.padding, 1, layer.groups
        )
        per_channel = (step * quantised.weight_scale).double().view(-1, 1, 1)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach() / (step * quantised.weight_scale)
    assert torch.allclose(bias, bias.round(), atol=2e-3)  # whole numbers, too
    total = total + bias.round().double().view(-1, *[1] * (found.ndim - 2))
    assert torch.allclose(found.double(), total.double() * per_channel, rtol=1e-5, atol=1e-5)


def test_weights_of_zero_stay_zero() -> None:
    layer = nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight[:, ::3] = 0.0
    net = nn.Sequential(layer)
    begin_int8(net, {"0": Quantised()})
    observing(net, torch.randn(4, 64))
    fix_int8(net, {"0": Quantised()})
    assert (whole_weights(net[0])[:, ::3] == 0).all() and (net[0].weight[:, ::3] == 0).all()  # type: ignore[index]


def test_a_bias_far_larger_than_its_weights_still_fits_int32() -> None:
    """A channel that BatchNorm has switched off is all bias."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 1e-12
        layer.bias[1] = 5.0
    net = nn.Sequential(layer)
    begin_int8(net, {"0": Quantised()})
    observing(net, torch.randn(8, 4))
    fix_int8(net, {"0": Quantised()})
    step, _ = scale_and_zero(net[0].input_range)  # type: ignore[arg-type]
    assert (net[0].bias.abs() / (step * net[0].weight_scale) < 2**31).all()  # type: ignore[operator,union-attr]
    assert torch.allclose(net.eval()(torch.randn(5, 4))[:, 1], torch.tensor(5.0), atol=1e-5)


def test_gradients_go_straight_through_and_stop_where_values_are_cut_off() -> None:
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.5, -1.0]]))
    begin_int8(net, {"0": Quantised()})
    net[0].input_range.copy_(torch.tensor([-1.0, 1.0]))  # type: ignore[operator,union-attr]
    values = torch.tensor([[0.3, 7.0]], requires_grad=True)
    net.train()(values).sum().backward()
    assert torch.allclose(net[0].weight.grad, torch.tensor([[0.3, 1.0]]), atol=0.01)  # type: ignore[arg-type]
    assert values.grad is not None and values.grad[0, 1] == 0 and abs(values.grad[0, 0] - 0.5) < 0.01


def test_ends_are_set_by_the_first_batch_and_moved_a_little_by_later_ones() -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    begin_int8(net, {"0": Quantised()})
    layer: Any = net[0]
    ends = []
    for high in (4.0, 8.0, 8.0):
        observing(net, torch.tensor([[-1.0], [high]]))
        ends.append(layer.input_range.tolist())
    assert ends == [[-1, 4], [-1, 6], [-1, pytest.approx(6 + 2 / 3)]]
    net.train()(torch.tensor([[-100.0], [100.0]]))
    assert layer.input_range.tolist() == ends[-1]  # nothing is observed
    observing(net, *[torch.tensor([[0.0], [8.0]])] * 300)
    assert layer.input_range.tolist() == [pytest.approx(0, abs=0.05), pytest.approx(8, abs=0.05)]


def test_a_layer_that_saw_nothing_can_be_saved() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    begin_int8(net, {"0": Quantised(output=True)})
    fix_int8(net, {"0": Quantised(output=True)})
    assert net[0].input_range.tolist() == net[0].output_range.tolist() == [0.0, 1.0]  # type: ignore[operator,union-attr]


# ---- which layers, and BatchNorm ------------------------------------------------------------------------------------


def test_batch_norm_goes_into_the_layer_before_it_and_additions_take_rounded_answers() -> None:
    model = load_model(SPEC, num_classes=4, input_shape=(8, 8))
    plan, floats = plan_int8(model.net, run_of(model))
    assert not floats
    assert plan["conv1"] == Quantised("bn1", output=True)  # the first block adds it to what it makes of it
    assert plan["layer1.0.conv1"] == Quantised("layer1.0.bn1")  # the next convolution alone takes it, through a ReLU
    assert plan["layer1.0.conv2"] == Quantised("layer1.0.bn2", output=True)
    assert plan["layer2.0.downsample.0"] == Quantised("layer2.0.downsample.1", output=True)
    assert plan["fc"] == Quantised()


def test_a_batch_norm_that_is_not_all_that_takes_an_answer_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 6)
            self.after, self.twice = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            for norm in (self.norm, self.after, self.twice):
                norm.running_mean.uniform_()  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = self.twice(self.twice(self.last(self.norm(y) + y.relu())))
            return self.after(y).flatten(1)

    net = Both().eval()
    plan, _ = plan_int8(net, lambda: net(torch.ones(1, 1, 8, 8)))
    assert plan == {"conv": Quantised(output=True), "last": Quantised(output=True)}


def test_a_batch_norm_with_an_activation_inside_and_a_frozen_one_are_folded() -> None:
    model = load_model(FUSED, num_classes=4, input_shape=(8, 8))
    plan, floats = plan_int8(model.net, run_of(model))
    assert plan == {
        "conv1": Quantised("norm1", output=True),  # SiLU takes floats
        "conv2": Quantised("norm2"),  # through its ReLU the next convolution alone takes it
        "conv3": Quantised("norm3", output=True),
        "conv4": Quantised(output=True),  # what its BatchNorm does behind is no module
        "flat": Quantised(),
        "fc": Quantised(),
    }
    assert floats == ["odd"]  # which answers otherwise than torch's own kind


def test_what_follows_in_a_batch_norm_stays_as_it_was() -> None:
    model = learning(FUSED)
    net: Any = model.net
    saved, silu = copy.deepcopy(model), net.norm1.act
    assert hasattr(net.norm1.drop, OUTPUT) and model.shrunk is not None
    fix_int8(net, model.shrunk.quantised)
    assert isinstance(net.norm1, nn.Sequential) and net.norm1.act is silu
    assert not net.norm1.drop._buffers and not net.norm1.drop._forward_pre_hooks
    assert getattr(net.conv1, OUTPUT).tolist() == saved.net.norm1.drop.output_range.tolist()
    again = load_model(FUSED, num_classes=4, input_shape=(8, 8))
    shrink_by(again.net, model.shrunk)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run_of(again)(), run_of(model)())


def test_layers_that_share_a_weight_or_are_not_called_stay_floats() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.free, self.tied, self.idle = (
                nn.Embedding(8, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 8),
                nn.Linear(4, 4),
            )
            self.tied.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.free(self.table(x)))

    net = Tied()
    plan, floats = plan_int8(net, lambda: net(torch.tensor([1, 2])))
    assert plan == {"free": Quantised()} and floats == ["table", "tied", "idle"]


def test_names_that_are_kept_stay_floats() -> None:
    model = load_model(SPEC, num_classes=4, input_shape=(8, 8))
    plan, floats = plan_int8(model.net, run_of(model), ["layer1", "fc"])
    assert "conv1" in plan and floats == ["layer1.0.conv1", "layer1.0.conv2", "fc"]


@pytest.mark.parametrize("spec", [SPEC, f"{JOINED}:ways", "softcache:cnn?width=8", FUSED])
def test_folding_changes_nothing_of_what_a_network_answers(spec: str) -> None:
    """To the rounding of a last bit, which an addition may bring to the next of 256 numbers."""
    model = learning(spec)
    assert model.shrunk is not None
    before, whole = run_of(model)(), {name: whole_weights(layer) for name, layer in quantised_layers(model.net)}
    fix_int8(model.net, model.shrunk.quantised)
    after = run_of(model)()
    step = max(float(getattr(layer, INPUT).diff()) / 255 for _, layer in quantised_layers(model.net))
    assert (after - before).abs().max() < 0.05 * before.abs().max() + step
    for name, layer in quantised_layers(model.net):
        same = (whole_weights(layer) == whole[name]) | (whole_weights(layer) == -whole[name])
        assert same.all()  # the factor of BatchNorm, of either sign, is in the scales
    assert not any(is_batch_norm(m) for name, m in model.net.named_modules() if name != "norm4")  # of FUSED


# ---- saved and opened -----------------------------------------------------------------------------------------------


def batch() -> Tensor:
    return torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)


def test_what_is_saved_is_int8_and_computes_the_same_when_it_is_loaded(run: Path) -> None:
    model, again = fixed(), load_model(str(run), num_classes=4).eval()
    tensors = load_file(run / "student.safetensors")
    assert {tensors[f"{name}.weight"].dtype for name, _ in quantised_layers(model.net)} == {torch.int8}
    assert (run / "student.safetensors").stat().st_size < 0.35 * len(student_bytes(load_model(SPEC, num_classes=4), {}))
    assert again.shrunk == model.shrunk == Shrunk.from_json(json.loads(json.dumps(model.shrunk.to_json())))  # type: ignore[union-attr]
    assert torch.equal(again(batch()), model(batch()))
    assert student_bytes(again, {}) == student_bytes(model, {})
    named = load_model(f"{SPEC}@{run}", num_classes=4, class_names="abcd", input_shape=(8, 8)).eval()
    assert torch.equal(named(batch()), model(batch()))


def test_an_earlier_version_is_told_that_it_cannot_read_int8(run: Path) -> None:
    with safe_open(run / "student.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["softcache"])
    assert told["softcache_format"] == "2"  # refused with the version to install
    assert json.loads(told["softcache_model"])["shrunk"]["quantised"]["bits"] == 8
    assert "quantised" not in Shrunk(factors={"fc": 2}).to_json()  # what it can read has nothing new


def test_a_float_student_begins_with_int8_weights(run: Path) -> None:
    student = load_model(SPEC, num_classes=4, class_names="abcd", input_shape=(8, 8))
    models.initialise(student, str(run))
    wanted = unpacked(load_file(run / "student.safetensors"))
    assert torch.equal(student.net.fc.weight, wanted["fc.weight"])  # type: ignore[union-attr,arg-type]


# ---- refused --------------------------------------------------------------------------------------------------------


def forged(source: Path, folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A student with other tensors, or another record, under a digest that fits."""
    tensors = load_file(source / "student.safetensors")
    with safe_open(source / "student.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["softcache"])
    about = json.loads(told["softcache_model"])
    change(tensors, about["shrunk"])
    told["softcache_model"] = json.dumps(about)
    told.pop("softcache_digest")
    told["softcache_digest"] = digest({"tensors": tensors, "metadata": told})
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "student.safetensors", metadata={"softcache": json.dumps(told)})
    return folder


SCALES = [math.nan, math.inf, -1.0, 0.0, 1e-38, 1e38]
ENDS = [
    (math.nan, 1.0), (0.0, math.nan), (0.0, math.inf), (-math.inf, 0.0), (1.0, 2.0), (-2.0, -1.0), (1.0, -1.0), (0.0, 0.0),
    (0.0, 1e38),
]  # fmt: skip


@pytest.mark.parametrize("value", SCALES)
def test_scales_that_no_layer_has_are_refused(value: float, run: Path, tmp_path: Path) -> None:
    folder = forged(run, tmp_path / "forged", lambda tensors, _: tensors[f"layer1.0.conv1.{SCALE}"][3].fill_(value))
    with pytest.raises(ModelError, match=r"layer1.0.conv1.weight_scale has a scale of"):
        load_model(str(folder), num_classes=4)


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("which", [INPUT, OUTPUT])
def test_ends_without_0_or_without_a_length_are_refused(
    which: str, ends: tuple[float, float], run: Path, tmp_path: Path
) -> None:
    folder = forged(run, tmp_path / "forged", lambda tensors, _: tensors[f"conv1.{which}"].copy_(torch.tensor(ends)))
    with pytest.raises(ModelError, match=rf"conv1.{which} goes from .* it must hold 0 and more than that"):
        load_model(str(folder), num_classes=4)


def test_weights_that_are_no_whole_numbers_or_of_other_shapes_are_refused(run: Path, tmp_path: Path) -> None:
    def floats(tensors: dict[str, Tensor], _record: Any) -> None:
        tensors["fc.weight"] = tensors["fc.weight"].float()

    def scales(tensors: dict[str, Tensor], _record: Any) -> None:
        tensors["fc.weight_scale"] = torch.ones(1)

    def without(tensors: dict[str, Tensor], _record: Any) -> None:
        del tensors["fc.input_range"]

    for change, said in ((floats, "fc.weight is torch.float32"), (scales, "fc.weight_scale"), (without, "1 missing")):
        with pytest.raises(ModelError, match=said):
            load_model(str(forged(run, tmp_path / "forged", change)), num_classes=4)


def _layer(**other: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["quantised"]["layers"].update(other)


HONEST = {"norm": None, "output": False}
RECORDS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    *((f"bits {bits}", lambda r, bits=bits: r["quantised"].update(bits=bits)) for bits in (3, 4, 8.0, "8", None, True)),
    *((f"{name!r:.20}", _layer(**{name: HONEST})) for name in ("bn1", "layer1", "", "fc.bias", "relu", "x" * 5000)),
    *((f"layer {how}", _layer(fc=how)) for how in (None, 8, [], {}, {"norm": None}, {**HONEST, "scale": 1.0})),
    *((f"norm {one!r:.20}", _layer(fc={**HONEST, "norm": one})) for one in ("bn1", "conv1", "fc", "", "relu", 1, ["bn1"], "x.y")),
    *((f"output {one!r}", _layer(fc={**HONEST, "output": one})) for one in (None, 1, "yes", True)),
    ("no bits", lambda r: r["quantised"].pop("bits")),
    ("no layers", lambda r: r["quantised"].pop("layers")),
    ("code", lambda r: r["quantised"].update(code="x")),
    ("a list", lambda r: r.update(quantised=[])),
    ("layers in a list", lambda r: r["quantised"].update(layers=["fc"])),
    ("one less", lambda r: r["quantised"]["layers"].pop("fc")),
    ("another module", _layer(layer9=HONEST)),
    ("a factor too", lambda r: r["factors"].update(fc=2)),
    ("cut too", lambda r: r["cut"].append("layer1.0")),
    ("too many", lambda r: r["quantised"].update(layers={f"l{i}": HONEST for i in range(20_000)})),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change"), RECORDS, ids=[row[0] for row in RECORDS])
def test_hostile_records_of_int8_are_refused_and_nothing_is_built(
    case: str, change: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("the network was built"))
    folder = forged(run, tmp_path / "forged", lambda _tensors, record: change(record))
    with pytest.raises(ModelError):
        load_model(str(folder), num_classes=4)

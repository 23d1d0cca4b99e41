"""A student with its teacher's final linear layer: the projector, the surgery, what is refused, and the way to disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError
from softcache.features.spec import parse_features
from softcache.features.taps import Taps
from softcache.models import (
    ImageInput,
    Model,
    Projector,
    fingerprint,
    graft,
    load_model,
    load_weights,
    read_saved,
    save_student,
)
from softcache.models.model import final_linear
from softcache.models.projector import Graft

CLASSES, WIDTH = 3, 6  # of the teacher's final linear layer


def batch(model: Model, count: int = 5, side: int = 8) -> Any:
    draw = np.random.default_rng(0)
    return model.input.collate(list(draw.integers(0, 256, (count, side, side), dtype=np.uint8)))


def classifier(seed: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)


def cnn(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return load_model("softcache:cnn?width=2", num_classes=CLASSES, input_shape=(8, 8)).eval()


def mlp(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return load_model("softcache:mlp?hidden=5", num_classes=CLASSES, input_shape=(8, 8)).eval()


LAST_MAP, POOLED, CLASSIFIER = "10", "12", "13"  # of cnn: ReLU, Flatten, Linear


def grafted(model: Model, layer: str, projector: Projector) -> Model:
    graft(model, layer, projector, *classifier(), batch(model))
    return model.eval()


def example(kind: str) -> Model:
    if kind == "map":
        return grafted(cnn(), LAST_MAP, Projector((8, 2, 2), (WIDTH, 4, 4)))
    if kind == "vector":
        return grafted(cnn(), POOLED, Projector((8,), (WIDTH,)))
    return grafted(mlp(), "2", Projector((5,), (WIDTH,), factor=3))


# --- the projector --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "factor", "output", "parameters"),
    [
        ((4, 8, 8), (6, 8, 8), 2, (6, 8, 8), 4 * 3 + 6 + 9 * 9 + 6 + 3 * 6 + 6),
        ((4, 8, 8), (6, 2, 4), 3, (6, 2, 4), 4 * 2 + 4 + 4 * 9 + 4 + 2 * 6 + 6),  # averaged down
        ((4, 2, 8), (6, 4, 4), 1, (6, 2, 4), 4 * 6 + 12 + 36 * 9 + 12 + 6 * 6 + 6),  # one axis each way
        ((4,), (6,), 2, (6,), 4 * 3 + 3 + 3 * 6 + 6),
    ],
)
def test_projector_shapes(student: Any, teacher: Any, factor: int, output: Any, parameters: int) -> None:
    projector = Projector(student, teacher, factor)
    assert projector(torch.rand(3, *student)).shape == (3, *output)
    assert projector.output_shape == output
    assert sum(p.numel() for p in projector.parameters()) == parameters
    again = Projector(**json.loads(json.dumps(projector.describe())))
    again.load_state_dict(projector.state_dict())
    x = torch.rand(3, *student)
    assert torch.equal(again.eval()(x), projector.eval()(x))


def test_projector_averages_before_it_convolves() -> None:
    projector = Projector((2, 4, 4), (6, 2, 2)).eval()
    x = torch.rand(1, 2, 4, 4)
    means = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(projector(x), projector.layers(means))


def test_projector_reaches_negative_features() -> None:
    # wide: a projector of a few units may start without a negative weight that counts
    for shape in ((32, 3, 3), (32,)):
        projector = Projector(shape, shape)
        assert projector(torch.rand(8, *shape)).min() < 0 < projector(torch.rand(8, *shape)).max()


@pytest.mark.parametrize(
    ("student", "teacher", "factor", "message"),
    [
        ((4, 8, 8), (6,), 2, r"cannot go from features \(4, 8, 8\) to \(6,\)"),
        ((4, 8), (6, 8), 2, "cannot go from features"),
        ((4, 0, 8), (6, 8, 8), 2, "cannot go from features"),
        ((4,), (6,), 0, "to 6 channels cannot divide them by factor=0"),
        ((4,), (6,), 7, "cannot divide them by factor=7"),
    ],
)
def test_projectors_that_cannot_be(student: Any, teacher: Any, factor: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Projector(student, teacher, factor)


# --- the surgery ----------------------------------------------------------------------------------------------------


def test_a_map_goes_through_the_projector_and_the_teachers_classifier() -> None:
    model, (weight, bias) = cnn(), classifier()
    x = batch(model)
    body: Any = copy.deepcopy(model.net)[: int(LAST_MAP) + 1]  # type: ignore[index]
    projector = Projector((8, 2, 2), (WIDTH, 4, 4))
    graft(model, LAST_MAP, projector, weight, bias, batch(model))
    model.eval()
    expected = projector(body(model.input.prepare(x))).mean(dim=(2, 3)) @ weight.T + bias
    torch.testing.assert_close(model(x), expected)
    assert model.graft is not None and model.graft.features == "10.projector"
    (spec,) = parse_features([f"{model.graft.features}:map"], dict(model.net.named_modules()))
    with Taps(model.net, [spec]) as taps:
        model(x)
        assert taps.reduced()[str(spec)].shape == (5, WIDTH, 2, 2)


@pytest.mark.parametrize("layer", [POOLED, CLASSIFIER])
def test_a_vector_goes_through_the_projector_and_the_teachers_classifier(layer: str) -> None:
    model, (weight, bias) = cnn(), classifier()
    x = batch(model)
    body: Any = copy.deepcopy(model.net)[: int(CLASSIFIER)]  # type: ignore[index]
    projector = Projector((8,), (WIDTH,))
    graft(model, layer, projector, weight, bias, batch(model))
    torch.testing.assert_close(model.eval()(x), projector(body(model.input.prepare(x))) @ weight.T + bias)
    assert model.graft is not None
    assert model.net.get_submodule(model.graft.features) is projector


def test_only_the_teachers_layer_is_frozen() -> None:
    for kind in ("map", "vector", "head"):
        model, (weight, bias) = example(kind).train(), classifier()
        frozen = [name for name, p in model.net.named_parameters() if not p.requires_grad]
        head = final_linear(model.net, CLASSES)
        assert head is not None and len(frozen) == 2
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(batch(model)).square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        optimizer.step()
        assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias)


def test_a_classifier_without_bias() -> None:
    model, (weight, _) = mlp(), classifier()
    graft(model, "2", Projector((5,), (WIDTH,)), weight, None, batch(model))
    assert "2.classifier.weight" in model.net.state_dict() and "2.classifier.bias" not in model.net.state_dict()
    head = final_linear(model.net, CLASSES)
    assert head is not None and head.bias is None


def test_the_mode_of_the_student_and_its_statistics_stay() -> None:
    model = cnn().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.net[1].eval()  # type: ignore[index]
    graft(model, LAST_MAP, Projector((8, 2, 2), (WIDTH, 2, 2)), *classifier(), batch(model))
    assert model.training and not model.net[1].training and model.net[0].training  # type: ignore[index]
    for name, b in before.items():
        assert torch.equal(b, dict(model.named_buffers())[name])


class Flat(nn.Module):
    """A student that flattens its map, and uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU()
        self.unused = nn.Linear(1, 1)
        self.fc = nn.Linear(2 * 8 * 8, CLASSES)
        self.same = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.act(self.norm(self.conv(x)))).flatten(1))


class Scaled(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def student(net: nn.Module) -> Model:
    model = Model(net, ImageInput(1))
    model.num_classes, model.spec = CLASSES, "net"
    return model


MAP, VECTOR = Projector((2, 8, 8), (WIDTH, 8, 8)), Projector((5,), (WIDTH,))
FLATTENED = r"layer takes 6 numbers, behind 'norm' the student gives it \(384,\)"
REFUSED = [
    pytest.param(Flat, "norm", MAP, ModelError, FLATTENED, id="flatten"),
    pytest.param(Flat, "act", MAP, ConfigError, "module 'act' is called 2 times", id="twice"),
    pytest.param(Flat, "conv", MAP, ConfigError, "module 'conv' is also 'same'", id="tied"),
    pytest.param(Flat, "unused", VECTOR, ConfigError, "'unused' is called 0 times", id="unused"),
    pytest.param(Flat, "norn", MAP, ConfigError, r"no module 'norn'[\s\S]*'norm'", id="unknown"),
    pytest.param(
        Flat,
        "norm",
        Projector((3, 8, 8), (6, 8, 8)),
        ModelError,
        r"takes \(3, 8, 8\), module 'norm' gives it \(2, 8, 8",
        id="c",
    ),
    pytest.param(
        Flat, "norm", Projector((2, 9, 9), (6, 8, 8)), ModelError, r"takes \(2, 9, 9\), module 'norm' gives", id="hw"
    ),
    pytest.param(Flat, "fc", VECTOR, ModelError, r"takes \(5,\), module 'fc' gives it \(128,\)", id="in front of fc"),
    pytest.param(Scaled, "norm", MAP, ModelError, "do not come from an nn.Linear", id="no head"),
    pytest.param(
        lambda: nn.Sequential(Flat()), "0", MAP, ConfigError, "'0' contains the final linear layer '0.fc'", id="around"
    ),
    pytest.param(
        lambda: cnn().net,
        "7",
        Projector((4, 2, 2), (6, 2, 2)),
        ModelError,
        "not work with a projector behind '7'",
        id="width",
    ),
    pytest.param(
        lambda: cnn().net,
        LAST_MAP,
        Projector((8, 2, 3), (6, 2, 2)),
        ModelError,
        r"takes \(8, 2, 3\)",
        id="would be averaged",
    ),
]


@pytest.mark.parametrize(("build", "layer", "projector", "error", "message"), REFUSED)
def test_students_that_cannot_be_grafted_stay_as_they_were(
    build: Any, layer: str, projector: Projector, error: type[Exception], message: str
) -> None:
    model = student(build())
    x, before = batch(model), fingerprint(model)
    with pytest.raises(error, match=message):
        graft(model, layer, projector, *classifier(), batch(model))
    assert fingerprint(model) == before
    assert model.graft is None and model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model(x).shape == (5, CLASSES)


def test_refused_for_other_classes_and_twice() -> None:
    model = cnn()
    with pytest.raises(ModelError, match=r"has 4 classes, the student 3[\s\S]*class list"):
        graft(model, POOLED, Projector((8,), (WIDTH,)), torch.zeros(4, WIDTH), None, batch(model))
    model = example("map")
    with pytest.raises(ConfigError, match="grafted already, at '10'"):
        graft(model, POOLED, Projector((8,), (WIDTH,)), *classifier(), batch(model))


# --- it lasts -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map", "vector", "head"])
def test_a_grafted_student_survives(kind: str, tmp_path: Path) -> None:
    model = example(kind)
    model.train()(batch(model))  # BatchNorm moves
    model.eval()
    with torch.no_grad():
        expected = model(batch(model))
    save_student(model, tmp_path / "student.safetensors", metadata={})
    stored = read_saved(str(tmp_path))
    assert stored is not None and stored.graft == model.graft
    named = f"{model.spec}@{tmp_path}"
    for text in (str(tmp_path), named):
        again = load_model(text, num_classes=CLASSES, input_shape=(8, 8)).eval()
        assert torch.equal(again(batch(again)), expected)
        assert fingerprint(again) == fingerprint(model) and again.graft == model.graft
        assert sum(not p.requires_grad for p in again.parameters()) == 2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    assert torch.equal(twin(batch(twin)), expected)
    fresh = example(kind)
    fresh.net.load_state_dict(twin.net.state_dict())
    assert torch.equal(fresh(batch(fresh)), expected)
    program = torch.export.export(twin, (batch(twin),))
    torch.testing.assert_close(program.module()(batch(twin)), expected)


def test_weights_of_a_graft_need_a_network_that_has_its_layers(tmp_path: Path) -> None:
    save_student(example("map"), tmp_path / "student.safetensors", metadata={})
    with pytest.raises(ModelError, match="another preprocessing"):
        load_model(f"softcache:mlp?hidden=5@{tmp_path}", num_classes=CLASSES, input_shape=(8, 8))
    torch.manual_seed(0)
    other = Model(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(64, CLASSES)), ImageInput(1))
    other.spec, other.num_classes = "net", CLASSES
    with pytest.raises(ModelError, match="net cannot be grafted at '10' and '13'"):
        load_weights(other, str(tmp_path))


def test_students_without_a_graft_are_saved_as_before(tmp_path: Path) -> None:
    save_student(cnn(), tmp_path / "student.safetensors", metadata={})
    assert b"graft" not in (tmp_path / "student.safetensors").read_bytes()
    stored = read_saved(str(tmp_path))
    assert stored is not None and stored.graft is None


def test_a_note_is_json() -> None:
    note = example("head").graft
    assert note is not None
    assert Graft(**json.loads(json.dumps(note.to_json()))) == note


def test_tracing_leaves_nothing_behind_in_the_preprocessing() -> None:
    """Constants kept for the next step must be real tensors, whoever asked for them first."""
    model = load_model("softcache:mlp?hidden=2&mean=0.125&std=0.375&scale=9", num_classes=CLASSES, input_shape=(8, 8))
    model.eval()
    program = torch.export.export(model, (batch(model),))
    logits = model(batch(model)).detach()
    assert type(logits) is Tensor
    torch.testing.assert_close(program.module()(batch(model)).detach(), logits)

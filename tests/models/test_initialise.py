"""A student that begins with another network's weights: what is copied, what is left, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from softcache.errors import ConfigError, ModelError
from softcache.models import Initialised, Model, final_linear, initialise, load_model, save_student
from softcache.models.initialise import init_from, parse_layer_map, reorder_classes

CLASSES = ("ant", "bee", "cat")


def encoder(depth: int, width: int = 4, classes: int = 3, seed: int = 0) -> nn.Module:
    """Layers that are all alike, with BatchNorm buffers, and a head."""
    torch.manual_seed(seed)
    net = nn.Module()
    net.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(depth))
    net.head = nn.Linear(width, classes)
    for buffer in net.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 9 + seed)
    return net


def mlp(width: int = 4, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    spec = f"softcache:mlp?hidden={width},{width}"
    return load_model(spec, num_classes=len(classes), class_names=classes, input_shape=(2, 3))


def images(model: Model, count: int) -> Any:
    draw = np.random.default_rng(0)
    return model.input.collate([draw.integers(0, 256, (2, 3), dtype=np.uint8) for _ in range(count)])


class Swap(nn.Module):
    """Two classes change places behind the last linear layer."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, [0, 2, 1]]


def saved(model: Model, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    save_student(model, folder / "student.safetensors", metadata={})
    return str(folder)


# --- by name --------------------------------------------------------------------------------------------------------


def test_same_name_and_shape_are_copied() -> None:
    net, source = encoder(2), encoder(2, seed=1).state_dict()
    done = init_from(net, source, {}, "there")
    count = sum(tensor.numel() for tensor in source.values())
    assert done == Initialised("there", tuple(source), {}, (), count, count)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, source[name])
    before = source["head.weight"].clone()
    nn.init.zeros_(net.head.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(source["head.weight"], before)  # a copy, no share


def test_other_shapes_and_names_are_left_and_said() -> None:
    net, source = encoder(3), encoder(2, classes=5, seed=1).state_dict()
    source["extra"] = torch.zeros(2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    done = init_from(net, source, {}, "there")
    kept = {name for name in before if name.startswith(("layers.2", "head"))}
    assert set(done.left) == kept
    assert done.left["head.weight"] == "(5, 4) there, (3, 4) here"
    assert done.unused == ("head.weight", "head.bias", "extra")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] if name in kept else source[name])
    assert "14 of 23 tensors initialised from there" in done.text()
    assert "head.weight ((5, 4) there, (3, 4) here)" in done.text() and "extra" in done.text()


def test_dtype_of_the_student_stays() -> None:
    net, source = encoder(1), {k: v.double() for k, v in encoder(1, seed=1).state_dict().items()}
    init_from(net, source, {}, "there")
    assert net.head.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(net.head.weight, source["head.weight"].float())  # type: ignore[union-attr, arg-type]


# --- by a map -------------------------------------------------------------------------------------------------------


def test_every_second_layer() -> None:
    net, teacher = encoder(2), encoder(4, seed=1)
    done = init_from(net, teacher.state_dict(), parse_layer_map(["layers.0=layers.0", "layers.1=layers.2"]), "there")
    theirs: Any = teacher.layers
    for mine, other in zip(net.layers, (theirs[0], theirs[2]), strict=True):  # type: ignore[arg-type]
        for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(net.head.weight, teacher.head.weight)  # type: ignore[union-attr, arg-type]
    assert done.left == {}
    assert {name[:8] for name in done.unused} == {"layers.1", "layers.3"}


def test_a_prefix_is_a_whole_name_and_the_longest_counts() -> None:
    names = ["a.1.w", "a.10.w", "a.2.w"]
    net = nn.Module()
    net.a = nn.Module()
    for name in names:
        child = nn.Module()
        child.register_buffer("w", torch.zeros(1))
        net.a.add_module(name.split(".")[1], child)
    source = {f"{top}.{i}.w": torch.tensor([value]) for value, top, i in [(1.0, "b", 1), (2.0, "b", 10), (3.0, "c", 0)]}
    done = init_from(net, source, {"a.1": "c.0", "a": "b"}, "there")
    state = net.state_dict()
    assert [state[name].item() for name in names] == [3.0, 2.0, 0.0]
    assert set(done.left) == {"a.2.w"} and done.unused == ("b.1.w",)


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ({"layer.0": "layers.0"}, r"layer.0=layers.0: the student has no 'layer.0'[\s\S]*'layers.0"),
        ({"layers.0": "layer.2"}, r"layers.0=layer.2: there has no 'layer.2'[\s\S]*'layers.2"),
        ({"layers.0": "head"}, "layers.0=head: no tensor below one has the name"),
        ({"head": "layers.0.0"}, r"head=layers.0.0: head.weight is \(3, 4\) in the student, layers.0.0.weight is \(4, 4\) in"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_change_nothing(layer_map: dict[str, str], message: str) -> None:
    net = encoder(2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        init_from(net, encoder(4, seed=1).state_dict(), layer_map, "there")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_nothing_to_copy_is_an_error_with_near_names() -> None:
    source = {f"net.{name}": tensor for name, tensor in encoder(2).state_dict().items()}
    with pytest.raises(ConfigError, match=r"none of its 16 tensors[\s\S]*did you mean 'net.layers.0.0.weight'"):
        init_from(encoder(2), source, {}, "there")
    with pytest.raises(ConfigError, match=r"no tensor .* has its shape there: .* is \(4, 4\) there, \(7, 7\) here"):
        init_from(encoder(2, width=7, classes=2), encoder(2).state_dict(), {}, "there")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["layers.0"], "'layers.0' is not student.prefix=source.prefix"),
        (["=layers.0"], "is not student.prefix"),
        (["layers.0="], "is not student.prefix"),
        (["a=b", "a=c"], "names 'a' twice"),
    ],
)
def test_map_entries_that_cannot_be_read(entries: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_layer_map(entries)


# --- from files -----------------------------------------------------------------------------------------------------


def test_from_a_run_folder_and_from_named_weights(tmp_path: Path) -> None:
    teacher = mlp(seed=1)
    run = saved(teacher, tmp_path / "run")
    torch.save(teacher.net.state_dict(), tmp_path / "w.pt")
    for text in (run, f"{run}/student.safetensors", f"softcache:mlp?hidden=4,4@{run}", f"x.py:f@{tmp_path}/w.pt"):
        student = mlp()
        done = initialise(student, text)
        assert (len(done.copied), done.left, done.source) == (6, {}, text)
        for name, tensor in student.net.state_dict().items():
            assert torch.equal(tensor, teacher.net.state_dict()[name])


def test_a_head_of_other_classes_is_left(tmp_path: Path) -> None:
    run = saved(mlp(classes=("ant", "bee", "cat", "dog", "elk"), seed=1), tmp_path / "run")
    student = mlp()
    head: Any = student.net[-1]  # type: ignore[index]
    before = head.weight.clone()
    done = initialise(student, run)
    assert set(done.left) == {"4.weight", "4.bias"}
    assert torch.equal(head.weight, before)
    assert len(done.copied) == 4


def test_a_head_of_the_same_number_of_other_classes_is_left(tmp_path: Path) -> None:
    run = saved(mlp(classes=("cat", "bee", "ant"), seed=1), tmp_path / "run")
    student = mlp()
    head: Any = student.net[-1]  # type: ignore[index]
    before = head.weight.clone()
    done = initialise(student, run)
    assert done.left == {"4.weight": "of another class list", "4.bias": "of another class list"}
    assert set(done.unused) == {"4.weight", "4.bias"}
    assert torch.equal(head.weight, before)
    asked = initialise(student, run, ["4=4"])  # by name: on purpose
    assert "4.weight" in asked.copied and not torch.equal(head.weight, before)


def test_a_classifier_is_brought_into_another_order() -> None:
    model = mlp(classes=("ant", "bee", "cat", "dog"))
    batch = images(model, 5)
    with torch.no_grad():
        nn.init.normal_(final_linear(model.net).bias)  # type: ignore[union-attr, arg-type]
        before = model.eval()(batch)
    model.train()
    reorder_classes(model, [2, 0, 3, 1], ("cat", "ant", "dog", "bee"), batch)
    assert model.training and model.declared_classes == ("cat", "ant", "dog", "bee")
    torch.testing.assert_close(model.eval()(batch), before[:, [2, 0, 3, 1]])


def test_a_network_whose_classifier_is_no_linear_layer_keeps_its_order() -> None:
    for head in ([nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 3, 1), nn.Flatten()], [nn.Linear(6, 3), Swap()]):
        model = mlp()
        model.net = nn.Sequential(nn.Flatten(), *head)
        with pytest.raises(ModelError, match=r"knows the data's classes in another order, and ends in no nn.Linear"):
            reorder_classes(model, [1, 0, 2], ("bee", "ant", "cat"), images(model, 4))


def test_torchvision_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.get_model("squeezenet1_1", weights=None).state_dict()
    table = torchvision.models.get_model_weights("squeezenet1_1")
    monkeypatch.setattr(table, "get_state_dict", lambda self, *args, **kwargs: state)  # stands in for the download
    student = load_model("torchvision:squeezenet1_1", num_classes=4)
    done = initialise(student, "torchvision:squeezenet1_1@IMAGENET1K_V1")
    assert set(done.left) == {"classifier.1.weight", "classifier.1.bias"}
    assert torch.equal(student.net.state_dict()["features.0.weight"], state["features.0.weight"])


def test_the_words_of_a_text_model_must_be_the_same(tmp_path: Path) -> None:
    def text_model(words: tuple[str, ...]) -> Model:
        return load_model("softcache:textcnn?width=2&embedding=3", num_classes=2, vocabulary=words)

    run = saved(text_model(("a", "b")), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another vocabulary[\s\S]*vocabulary=FILE"):
        initialise(text_model(("b", "a")), run)
    assert initialise(text_model(("a", "b")), run).left == {}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("runs/none", ConfigError, "runs/none: is neither a run folder nor MODEL@WEIGHTS"),
        ("softcache:mlp@runs/none", ModelError, "there are no weights runs/none"),
        ("torchvision:resnet18@IMAGENET1K_V9", ConfigError, r"no weights 'IMAGENET1K_V9'[\s\S]*IMAGENET1K_V1"),
    ],
)
def test_sources_that_are_not_there(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        initialise(mlp(), text)

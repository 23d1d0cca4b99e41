"""Floats that a model would normalise count as scaled to [0, 1]: others are refused, or told where that is all one can say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from torch import Tensor, nn

from softcache import train
from softcache.config import EvalConfig, ExportConfig, PlanConfig, TrainConfig
from softcache.dump import forecast
from softcache.errors import DataError
from softcache.evaluate.measure import run as run_eval
from softcache.models import AnyInput, ImageInput, Model, VectorInput, load_model, save_student
from softcache.models.item_range import ITEMS_KEY, OTHERWISE, SCALED, UINT8, check_same_scale, check_scale, scale_of
from softcache.students import export

DATA = f"{WORLDS}/float_items.py"
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.uint8)
UNIT = torch.from_numpy(PIXELS).float() / 255
IMAGENET = (UNIT - 0.45) / 0.225
IMAGES = ImageInput(3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MNIST = ImageInput(1, (0.1307,), (0.3081,))


def model(taken: Any) -> Model:
    return Model(nn.Identity(), taken)


@pytest.mark.parametrize(
    ("taken", "items", "refused"),
    [
        pytest.param(IMAGES, IMAGENET, True, id="normalised"),
        pytest.param(IMAGES, UNIT * 255, True, id="values of bytes"),
        pytest.param(IMAGES, UNIT * 2 - 1, True, id="from -1 to 1"),
        pytest.param(IMAGES, UNIT - 0.45, True, id="mean taken off"),
        pytest.param(IMAGES, IMAGENET.half(), True, id="half type"),
        pytest.param(IMAGES, IMAGENET.double().numpy().transpose(0, 2, 3, 1), True, id="NumPy, channels last"),
        pytest.param(MNIST, ((UNIT - 0.1307) / 0.3081)[:, :1], True, id="one channel"),
        pytest.param(IMAGES, UNIT, False, id="scaled"),
        pytest.param(IMAGES, UNIT * 1.3 - 0.15, False, id="overshoot of a cubic kernel"),
        pytest.param(IMAGES, UNIT * float("nan"), False, id="only NaN, which the dump names"),
        pytest.param(IMAGES, torch.from_numpy(PIXELS), False, id="uint8"),
        pytest.param(ImageInput(3, (0.0,), (1.0,)), IMAGENET, False, id="taken as they are"),
        pytest.param(
            ImageInput(3, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), UNIT * 255, False, id="of bytes' values"
        ),
        pytest.param(AnyInput(), IMAGENET, False, id="a user's module"),
        pytest.param(VectorInput(), torch.randn(4, 6), True, id="standardised features"),
        pytest.param(VectorInput(), torch.arange(24).reshape(4, 6), True, id="whole numbers"),
        pytest.param(VectorInput(6, (0.0,), (1.0,)), torch.randn(4, 6), False, id="features as they are"),
        pytest.param(
            VectorInput(6, (5.8,) * 6, (0.8,) * 6), torch.randn(4, 6) + 5.8, False, id="features of their own mean"
        ),
        pytest.param(VectorInput(6), torch.rand(4, 6), False, id="features from 0 to 1"),
    ],
)
def test_what_a_teachers_items_may_be(taken: Any, items: Tensor, refused: bool) -> None:
    if not refused:
        assert check_scale(model(taken), "torchvision:resnet18?weights=X", list(items)) is None
        return
    with pytest.raises(DataError, match=r"as scaled to \[0, 1\].*the items have numbers from") as caught:
        check_scale(model(taken), "torchvision:resnet18?weights=X", list(items))
    assert "leave Normalize out" in caught.value.tip
    assert "torchvision:resnet18?weights=X&mean=0&std=1" in caught.value.tip


def test_a_network_of_vectors_that_begins_to_learn_takes_any_range() -> None:
    vectors = list(torch.randn(4, 6) * 9)
    assert check_scale(model(VectorInput()), "softcache:mlp", vectors, learns=True) is None
    with pytest.raises(DataError, match="as scaled"):  # a picture's network has a cure that costs nothing
        check_scale(model(IMAGES), "softcache:cnn", list(IMAGENET), learns=True)


@pytest.mark.parametrize(
    ("learned", "items", "verdict"),
    [
        pytest.param(None, IMAGENET, "told", id="of a version that did not look"),
        pytest.param(None, UNIT, "fine", id="of such a version, scaled"),
        pytest.param(UINT8, IMAGENET, "refused", id="learned from uint8"),
        pytest.param(UINT8, UNIT, "fine", id="uint8 and scaled floats are one scale"),
        pytest.param(OTHERWISE, IMAGENET, "fine", id="learned from such floats"),
        pytest.param(OTHERWISE, torch.from_numpy(PIXELS), "refused", id="learned from floats, gets uint8"),
    ],
)
def test_a_saved_student_is_asked_what_it_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], learned: str | None, items: Tensor, verdict: str
) -> None:
    student = load_model("softcache:cnn?in_channels=3", num_classes=3)
    save_student(student, tmp_path / "student.safetensors", metadata={} if learned is None else {ITEMS_KEY: learned})
    if verdict == "refused":
        with pytest.raises(DataError, match="learned from items that were"):
            check_scale(student, str(tmp_path), list(items))
        return
    told = check_scale(student, str(tmp_path), list(items))
    assert (told is None) == (verdict == "fine")
    assert capsys.readouterr().err.count("softcache: warning") == (verdict == "told")


@pytest.mark.parametrize(
    ("taken", "learned", "evaluated", "refused"),
    [
        pytest.param(IMAGES, UNIT, IMAGENET, True, id="scaled, then normalised"),
        pytest.param(
            ImageInput(3, (0.0,), (1.0,)), torch.from_numpy(PIXELS), IMAGENET, True, id="uint8, then normalised"
        ),
        pytest.param(IMAGES, torch.from_numpy(PIXELS), UNIT, False, id="uint8, then scaled"),
        pytest.param(VectorInput(), torch.rand(4, 6), torch.rand(4, 6) * 2, False, id="features beyond those seen"),
        pytest.param(
            VectorInput(), torch.from_numpy(PIXELS), torch.randn(4, 192), True, id="vectors, uint8 then floats"
        ),
    ],
)
def test_what_a_student_is_measured_on_has_the_scale_it_learns_from(
    taken: Any, learned: Tensor, evaluated: Tensor, refused: bool
) -> None:
    if not refused:
        check_same_scale(taken, list(learned), list(evaluated))
        return
    with pytest.raises(DataError, match="measured on other inputs") as caught:
        check_same_scale(taken, list(learned), list(evaluated))
    assert "in both, or in neither" in caught.value.tip


def test_the_scale_is_a_fact_of_images_and_vectors_alone() -> None:
    assert scale_of(AnyInput(), list(IMAGENET)) is None
    assert scale_of(IMAGES, [PIXELS[0]]) == UINT8
    assert scale_of(IMAGES, list(UNIT)) == SCALED


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's weights, which say nothing of their data."""
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.manual_seed(0)
    torch.save(load_model("softcache:cnn?in_channels=1", num_classes=3).net.state_dict(), path)
    return path


def run_plan(data: str, teacher: str, out: Path) -> Any:
    return forecast.run(PlanConfig(data=data, teacher=(teacher,), threads=1))


def run_evaluation(data: str, model: str, out: Path) -> Any:
    return run_eval(model, EvalConfig(data=data, threads=1), quiet=True)


def run_export(data: str, model: str, out: Path) -> Any:
    return export.run(model, ExportConfig(data=data, out=str(out / "a.safetensors"), to="safetensors"), quiet=True)


def run_train(data: str, model: str, out: Path) -> Any:
    config = TrainConfig(data=data, student=model, out=str(out / "run"), loss=("ce",), epochs=1, threads=1)
    return train.run(config, quiet=True)


@pytest.mark.parametrize("verb", [run_plan, run_evaluation, run_export, run_train])
def test_every_verb_refuses_what_is_normalised_twice(tmp_path: Path, weights: Path, verb: Any) -> None:
    data = f"{DATA}:pictures?scale="
    with pytest.raises(DataError, match="normalised already, or not scaled") as caught:
        verb(f"{data}normalised", f"softcache:cnn?in_channels=1@{weights}", tmp_path)
    assert f"softcache:cnn?in_channels=1&mean=0&std=1@{weights}" in caught.value.tip
    assert list(tmp_path.iterdir()) == []
    verb(f"{data}normalised", f"softcache:cnn?in_channels=1&mean=0&std=1@{weights}", tmp_path)


def test_a_dump_of_normalised_floats(quick_dump: QuickDump, weights: Path) -> None:
    teacher, data = f"softcache:cnn?in_channels=1@{weights}", f"{DATA}:pictures?scale="
    for scale in ("normalised", "bytes"):
        with pytest.raises(DataError, match="normalised already"):
            quick_dump(f"{data}{scale}", [teacher], f"refused-{scale}")
    same = [quick_dump(f"{data}{scale}", [teacher], scale) for scale in ("unit", "uint8", "overshot")]
    rows = [
        cache.join(_items(cache.class_names, scale)).gather(np.arange(24)).logits()
        for cache, scale in zip(same[:2], ("unit", "uint8"), strict=True)
    ]
    assert torch.allclose(*rows, atol=1e-5)


def _items(names: Sequence[str], scale: str) -> Any:
    from softcache.data.transfer_set import open_transfer_set

    return open_transfer_set(f"{DATA}:pictures?scale={scale}")


def test_a_student_tells_what_it_learned_from(tmp_path: Path) -> None:
    from softcache.models import read_metadata

    for number, (data, student, scale) in enumerate(
        [
            ("pictures?scale=uint8", "softcache:cnn", UINT8),
            ("pictures?scale=normalised", "softcache:cnn?mean=0&std=1", OTHERWISE),
            ("vectors", "softcache:mlp?hidden=4", OTHERWISE),
        ]
    ):
        run_train(f"{DATA}:{data}", student, tmp_path / str(number))
        assert read_metadata(tmp_path / str(number) / "run").get(ITEMS_KEY) == scale
        run_evaluation(f"{DATA}:{data}", str(tmp_path / str(number) / "run"), tmp_path)
    with pytest.raises(DataError, match="learned from items that were uint8"):
        run_evaluation(f"{DATA}:pictures?scale=normalised", str(tmp_path / "0" / "run"), tmp_path)

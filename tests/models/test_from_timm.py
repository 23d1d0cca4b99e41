"""timm's models by their spec: what they take, what their weights bring, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.errors import ConfigError, MissingExtraError, ModelError, SoftcacheError
from softcache.models import ImageInput, load_model, read_saved, save_student

timm = pytest.importorskip("timm", reason="needs the extra softcache[timm]")


def test_a_timm_model_takes_items_and_gives_logits() -> None:
    torch.manual_seed(0)
    model = load_model("timm:test_efficientnet", num_classes=5, input_shape=(32, 32, 3)).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    logits = model(model.input.collate(list(images)))
    own = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(model.net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))  # type: ignore[union-attr,index]
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits, model.net((own - mean) / std), rtol=1e-4, atol=1e-5)


def test_channels_size_and_normalisation_can_be_chosen() -> None:
    grey = load_model("timm:test_resnet", num_classes=3, input_shape=(32, 32))
    assert grey.input == ImageInput(1, (0.5,), (0.5,))  # one number in place of three
    sized = load_model("timm:test_vit?img_size=32&mean=0.1&std=0.2", num_classes=3, input_shape=(32, 32, 3))
    assert sized.input == ImageInput(3, (0.1,), (0.2,))
    assert sized(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("text", ["timm:resnet18@a1_in1k", "timm:resnet18?weights=a1_in1k"])
def test_weights_are_named_by_their_tag(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    create = timm.create_model

    def without_download(name: str, *, pretrained: bool, **settings: Any) -> Any:
        asked.append((name, pretrained))
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", without_download)
    model = load_model(text, num_classes=1000)
    assert asked == [("resnet18.a1_in1k", True)]
    assert model.input == ImageInput(3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save_student(model, tmp_path / "student.safetensors", metadata={})
    saved = read_saved(str(tmp_path))
    assert saved is not None and saved.spec == "timm:resnet18"  # a saved student needs no download
    again = load_model(str(tmp_path), num_classes=1000)
    assert asked[1:] == [("resnet18", False)]
    assert torch.equal(again.net.state_dict()["conv1.weight"], model.net.state_dict()["conv1.weight"])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("timm:resnet81", ModelError, r"no model 'resnet81'[\s\S]*'resnet18'"),
        ("timm:zzzz", ModelError, r"no model 'zzzz'[\s\S]*list_models"),
        ("timm:resnet18.a1_in1k", ModelError, r"names weights[\s\S]*timm:resnet18\?weights=a1_in1k"),
        ("timm:resnet18@a9_in1k", ConfigError, r"no weights 'a9_in1k'[\s\S]*'a1_in1k'"),
        ("timm:resnet18@a1_in1k", ModelError, "a1_in1k have 1000 classes, the data has 4"),
        ("timm:resnet18@runs/none", ModelError, "there are no weights runs/none"),
        ("timm:test_resnet?img_size=32", ConfigError, "takes no img_size"),
        ("timm:test_resnet?wieghts=x", ConfigError, r"unknown parameter 'wieghts'[\s\S]*'weights'"),
        ("tim:resnet18", ModelError, r"unknown kind of model 'tim'[\s\S]*'timm'"),
    ],
)
def test_refused(text: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load_model(text, num_classes=4)
    assert len(str(caught.value)) < 400  # not all of timm's names


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "timm" else find(name, *more))
    with pytest.raises(MissingExtraError, match=r"'timm:resnet18' needs the package 'timm'") as caught:
        load_model("timm:resnet18", num_classes=4)
    assert caught.value.tip == "pip install 'softcache[timm]'"

"""Whose classes a file of weights has: ImageNet's by their number, numbers else, the data's where they are as many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from softcache.data.classes import match_classes
from softcache.data.imagenet import ilsvrc_ids
from softcache.models import own_classes

NAME = "shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("outputs", "data", "first"), [(1000, 4, "tench"), (7, 4, "0"), (4, 4, None), (1000, 1000, None)]
)
def test_a_file_of_weights_is_called_by_the_number_of_its_outputs(
    outputs: int, data: int, first: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.get_model(NAME, weights=None, num_classes=outputs).state_dict()
    state = {
        name: torch.zeros(tensor.shape if "fc" in name else (1,)) for name, tensor in shapes.items()
    }  # little on disk
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "w.pth")
    found = own_classes(f"torchvision:{NAME}@{tmp_path}/w.pth", data)
    assert (found and found[0]) == first and (found is None or len(found) == outputs)
    assert ("taken to be ImageNet's" in capsys.readouterr().err) == (first == "tench")
    if first == "tench":
        ids = (ilsvrc_ids()[7], ilsvrc_ids()[900])
        assert match_classes("the teacher", found, ids).columns == (7, 900)


def test_other_networks_and_unknown_classifiers_name_none(tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(3, 4)}, tmp_path / "w.pt")
    assert own_classes(f"softcache:mlp@{tmp_path}/w.pt", 2) is None
    assert own_classes(f"torchvision:squeezenet1_1@{tmp_path}/w.pt", 2) is None

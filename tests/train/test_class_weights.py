"""Class weights and label smoothing: against torch's cross_entropy in float64, and how a run finds and records them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from small_world import World, trained

from softcache.data.transfer_set import open_transfer_set
from softcache.errors import DataError, LossError, TrainingError
from softcache.losses.labelled import ce, mixed_ce
from softcache.train.class_weights import class_weights

LABELS = torch.tensor([2, -1, 0, 0, 4, 0, 2, -1, 4, 0])
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_ce_is_torchs_over_the_labelled_rows(smoothing: float, weighted: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(10, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64) if weighted else None
    known = LABELS >= 0
    rows = F.cross_entropy(logits[known], LABELS[known], weight=weights, label_smoothing=smoothing, reduction="none")
    found = ce(logits, LABELS, smoothing, class_weights=weights)
    torch.testing.assert_close(found, rows.mean(), rtol=1e-12, atol=0)
    if weights is not None:  # torch's own mean divides by the weights
        torchs = F.cross_entropy(logits[known], LABELS[known], weight=weights, label_smoothing=smoothing)
        torch.testing.assert_close(found * known.sum() / weights[LABELS[known]].sum(), torchs, rtol=1e-12, atol=0)
    (own,) = torch.autograd.grad(found, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(rows.mean(), logits)
    torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-14)
    same = mixed_ce(logits, LABELS, LABELS.flip(0), torch.ones(10), smoothing, class_weights=weights)
    torch.testing.assert_close(same, found, rtol=1e-7, atol=0)
    torch.testing.assert_close(ce(logits.float(), LABELS, smoothing, class_weights=weights), found.float())
    assert ce(logits, torch.full((10,), -1), smoothing, class_weights=weights) == 0


def test_what_cannot_be_softened() -> None:
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\)"):
            ce(torch.zeros(1, 2), torch.tensor([0]), value)
    with pytest.raises(ValueError, match="of data with one label per sample"):
        ce(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.1)


def test_balanced_weights_are_scikit_learns() -> None:
    known = LABELS[LABELS >= 0].numpy()
    found = class_weights("balanced", LABELS, NAMES)
    wanted = compute_class_weight("balanced", classes=np.array([0, 2, 4]), y=known)
    assert found[[0, 2, 4]].tolist() == pytest.approx(wanted.tolist()) and found[[1, 3]].tolist() == [1.0, 1.0]
    assert found[known].mean().item() == pytest.approx(1.0)


def test_weights_out_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.tsv"
    file.write_text("cat\t2.5\n0\t0\nb\u2028e\t1e-1\n\ndog\t1\neel\t3\r\n")
    names = ("ant", "b\u2028e", *NAMES[2:])  # no end of a line
    assert class_weights(str(file), LABELS, names).tolist() == pytest.approx([0.0, 0.1, 2.5, 1.0, 3.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "class_weights=.*weights.tsv: cannot be read"),
        ("cat 2.5\n", "line 1: is not a class, a tab and its weight"),
        ("cat\ttwo\n", "line 1: the weight of class 'cat' is 'two', not a number"),
        ("cat\t-1\n", "'cat' is -1; it must be a number that is not negative"),
        ("cat\tnan\n", "'cat' is nan; it must be"),
        ("cat\t1\n2\t1\n", "line 2: class '2' has a weight already"),
        ("cow\t1\n", "no class 'cow'"),
        ("cat\t1\n", "class 'ant' has no weight, nor have 3 others"),
        ("".join(f"{name}\t0\n" for name in NAMES), "every weight is zero"),
    ],
)
def test_a_file_that_gives_no_weights(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.tsv"
    if text is not None:
        file.write_text(text)
    with pytest.raises((LossError, DataError), match=message):
        class_weights(str(file), LABELS, NAMES)


def test_a_run_weighs_its_classes_and_records_how(world: World, tmp_path: Path) -> None:
    """Whole or in pieces, the values and gradients are the same."""
    settings: dict[str, Any] = {"cache": None, "momentum": 0.9, "dropout": 0}
    settings.pop("dropout")
    whole = trained(world.config(tmp_path / "whole", "ce:smoothing=0.1,class_weights=balanced", **settings))
    pieces = trained(
        world.config(tmp_path / "pieces", "ce:smoothing=0.1,class_weights=balanced", accumulate=3, **settings)
    )
    for one, other in zip(whole.steps, pieces.steps, strict=True):
        assert one.values["ce"] == pytest.approx(other.values["ce"], rel=1e-5)
    plain = trained(world.config(tmp_path / "plain", "ce", **settings))
    assert abs(plain.steps[0].values["ce"] - whole.steps[0].values["ce"]) > 1e-4
    about = json.loads((tmp_path / "whole/run.json").read_text())
    labels = [int(one) for one in open_transfer_set(world.spec("toy")).labels if one >= 0]
    wanted = [len(labels) / 5 / Counter(labels)[place] for place in range(5)]
    assert about["class_weights"] == [{"ce": pytest.approx(wanted)}]
    assert about["stages"][0]["losses"][0] | {"weight": 1.0} == {
        "name": "ce", "weight": 1.0, "smoothing": 0.1, "class_weights": "balanced",
    }  # fmt: skip
    assert "class_weights" not in json.loads((tmp_path / "plain/run.json").read_text())


def test_a_run_whose_weights_changed_is_not_resumed(world: World, tmp_path: Path) -> None:
    file = tmp_path / "weights.tsv"
    file.write_text("".join(f"{place}\t1\n" for place in range(5)))
    config = world.config(tmp_path / "run", f"ce:class_weights={file}", cache=None)
    trained(config)
    about = (tmp_path / "run/run.json").read_bytes()
    file.write_text("0\t50\n" + "".join(f"{place}\t1\n" for place in range(1, 5)))
    with pytest.raises(TrainingError, match="began with other class weights: their file has changed"):
        trained(config)
    assert (tmp_path / "run/run.json").read_bytes() == about
    file.write_text("".join(f"{place}\t1.0\n" for place in range(5)))
    assert trained(config).steps == []  # the same weights, and finished

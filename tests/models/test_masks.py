"""Weights that are held at zero: which there are, which go first, and what a checkpoint may say of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from softcache.errors import ConfigError
from softcache.models.masks import Masks, prunable, refuse_unknown, smallest


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)
        self.second.weight = self.first.weight
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.table.weight


def test_convolutions_and_linear_layers_may_lose_weights_a_shared_one_once() -> None:
    net = Net()
    assert list(prunable(net)) == ["conv.weight", "first.weight", "tied.weight"]
    assert list(prunable(net, ("conv", "fir"))) == ["first.weight", "tied.weight"]
    assert list(prunable(nn.Linear(2, 2))) == ["weight"]


def test_projections_of_attention_are_linear_layers() -> None:
    assert list(prunable(nn.MultiheadAttention(4, 2))) == ["in_proj_weight", "out_proj.weight"]
    other = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    assert list(prunable(other)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert list(prunable(nn.Sequential(other), ("0",))) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_go_of_equal_ones_the_first_and_what_is_held_before_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    weights = [draw.integers(-4, 5, shape).astype(np.float32) for shape in ((3, 4), (2, 3, 2))]
    held = [draw.random(weight.shape) < 0.2 for weight in weights]
    sizes = np.concatenate([np.where(h, -1, np.abs(w)).ravel() for w, h in zip(weights, held, strict=True)])
    for count in range(len(sizes) + 1):
        wanted = np.ones(len(sizes), bool)
        wanted[np.argsort(sizes, kind="stable")[:count]] = False
        tensors, left = [torch.from_numpy(w) for w in weights], [torch.from_numpy(~h) for h in held]
        found = smallest(tensors, count, left)
        assert [mask.shape for mask in found] == [weight.shape for weight in tensors]
        assert np.array_equal(torch.cat([mask.reshape(-1) for mask in found]).numpy(), wanted)


def test_a_weight_that_is_no_number_is_not_hidden() -> None:
    (mask,) = smallest([torch.tensor([[1.0, float("nan")], [2.0, 3.0]])], 3)
    assert mask.tolist() == [[False, True], [False, False]]


def test_masks_hold_ever_more_weights_and_their_averages() -> None:
    net, average = nn.Linear(4, 3), nn.Linear(4, 3)
    masks = Masks(net, average)
    assert masks.sparsity == 0.0
    masks.prune(["weight"], 5)
    before = masks.left["weight"].clone()
    net.weight.data[:] = 9.0  # as a step may
    net.weight.data[before] = torch.arange(7.0)
    masks.apply()
    for one in (net, average):
        assert torch.equal(one.weight == 0, ~before) or one is net
    assert int((net.weight == 0).sum()) == 5 + 1  # the one that happens to be 0 is free
    masks.prune(["weight"], 3)  # fewer than are held: they stay
    assert torch.equal(masks.left["weight"], before) and masks.zeros == {"weight": 5}
    masks.prune(["weight"], 8)
    assert not (masks.left["weight"] & ~before).any() and masks.sparsity == 8 / 12
    assert sorted(net.weight[masks.left["weight"]].tolist()) == [3.0, 4.0, 5.0, 6.0]


def test_zeros_are_held_but_not_a_whole_tensor_of_them() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[0].weight.data[0] = 0.0
    nn.init.zeros_(net[1].weight)
    masks = Masks(net)
    masks.hold_zeros(["0.weight", "1.weight"])
    assert masks.zeros == {"0.weight": 4, "1.weight": 0}


def test_a_gradient_of_what_is_held_is_zero_however_large_it_was() -> None:
    net = nn.Linear(2, 1)
    net.weight.data = torch.tensor([[0.1, 5.0]])
    masks = Masks(net)
    masks.apply_to_gradients()  # there is none yet
    masks.prune(["weight"], 1)
    net.weight.grad = torch.tensor([[float("inf"), 2.0]])
    masks.apply_to_gradients()
    assert net.weight.grad.tolist() == [[0.0, 2.0]]


def test_what_is_saved_is_read_again() -> None:
    net = nn.Linear(4, 3)
    masks = Masks(net)
    masks.prune(["weight"], 7)
    again = Masks(net)
    again.load_state_dict({name: mask.clone() for name, mask in masks.state_dict().items()})
    assert torch.equal(again.left["weight"], masks.left["weight"]) and again.zeros == masks.zeros


WHOLE = torch.ones(3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([WHOLE], "its masks are no table"),
        ({}, "other masks than the student has weights: 'weight'"),
        ({"weight": WHOLE, "fc.weight": WHOLE}, "other masks than the student has weights: 'fc.weight'"),
        ({"weight": WHOLE, 7: WHOLE}, "other masks than the student has weights: '7'"),
        ({"weight": WHOLE.float()}, "the mask of 'weight' is none"),
        ({"weight": None}, "the mask of 'weight' is none"),
        ({"weight": WHOLE.T}, r"the mask of 'weight' has shape \(4, 3\), not \(3, 4\)"),
        ({"weight": WHOLE[:1]}, r"the mask of 'weight' has shape \(1, 4\), not \(3, 4\)"),
    ],
)
def test_masks_of_another_network_are_refused(state: Any, message: str) -> None:
    masks = Masks(nn.Linear(4, 3))
    with pytest.raises((TypeError, ValueError), match=message):
        masks.load_state_dict(state)
    assert masks.sparsity == 0.0 and bool(masks.left["weight"].all())


def test_a_module_to_keep_that_is_not_there_is_refused() -> None:
    refuse_unknown(("conv", "norm"), Net(), "x")
    with pytest.raises(ConfigError, match=r"x: there is no module 'con' to keep\n.*did you mean 'conv'"):
        refuse_unknown(("conv", "con"), Net(), "x")

"""Which channels matter: against formulas of their own; how many go for a target; what --scan tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from small_world import World
from torch import Tensor, nn
from torch.nn import functional as F

from softcache import cli
from softcache.config import ShrinkConfig
from softcache.data.loading import ViewedSet
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ConfigError, SoftcacheError
from softcache.models import Model, load_model, save_student
from softcache.models.norms import BATCH_NORMS
from softcache.students import scan, shrink
from softcache.students.channels import channel_groups
from softcache.students.cost import multiply_adds
from softcache.students.importance import importances
from softcache.students.opened import TEMPERATURE, open_all
from softcache.students.prune import prune_channels
from softcache.students.samples import Samples
from softcache.targets.cache import open as open_cache

NAMES = ("ant", "bee", "cat", "dog")
COUNT = 12


def trained(spec: str, names: tuple[str, ...] = NAMES) -> Model:
    model = load_model(spec, num_classes=len(names), class_names=names, input_shape=(8, 8))
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()  # type: ignore[union-attr]
    return model.eval()


def samples_of(model: Model, answers: Tensor | None = None) -> Samples:
    items = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    return replace(Samples.of(model, "the model", items[0], COUNT, lambda i: items[i], 5), answers=answers)


def loss_of_each(samples: Samples, answers: Tensor) -> Tensor:
    """(COUNT,) float64."""
    items = [samples.item(i) for i in range(COUNT)]
    model = samples.model
    logits = model.net(model.input.prepare(model.input.collate(items)).double())
    if answers.ndim == 1:
        return F.cross_entropy(logits, answers.clamp(min=0), reduction="none") * (answers >= 0)
    each = F.binary_cross_entropy_with_logits(logits, answers.clamp(min=0).double(), reduction="none")
    return (each * (answers >= 0)).sum(1)


@pytest.mark.parametrize(
    "spec", ["softcache:mlp?hidden=9,7", "softcache:cnn?width=4", f"{WORLDS / 'joined_channels.py'}:ways"]
)
@pytest.mark.parametrize("several", [False, True])
@torch.no_grad()
def test_taylor_is_the_square_of_what_a_sample_loses_by_a_little_of_a_channel(spec: str, several: bool) -> None:
    """By finite differences in float64: whoever takes the channel gets a little less of it."""
    draw = np.random.default_rng(1)
    answers = torch.from_numpy(draw.integers(-1, 2, (COUNT, 4)) if several else draw.integers(-1, 4, COUNT))
    samples = samples_of(trained(spec), answers)
    net = samples.model.net
    groups = channel_groups(net, samples.run)
    with torch.enable_grad():
        found = importances(net, samples, groups, "taylor")
    samples.model.double()
    less = 1e-5
    for group, values in zip(groups, found, strict=True):
        wanted = []
        for unit in group.units[:4]:
            losses = []
            for factor in (1 + less, 1 - less):
                taking: list[tuple[Any, list[int], Tensor]] = []
                for (name, side), places in unit.items():
                    weight: Any = net.get_submodule(name).weight
                    if side == "in":
                        taking.append((weight, list(places), weight[:, list(places)].clone()))
                        weight[:, list(places)] *= factor
                losses.append(loss_of_each(samples, answers))
                for weight, places, before in taking:
                    weight[:, places] = before
            wanted.append(((losses[0] - losses[1]) / (2 * less)).square().sum())
        assert torch.allclose(values[:4], torch.stack(wanted), rtol=2e-3, atol=1e-6 * float(values.max()))


def test_activation_is_the_mean_size_of_what_is_taken() -> None:
    model = trained("softcache:mlp?hidden=9,7")
    samples = samples_of(model)
    (first, second) = channel_groups(model.net, samples.run)
    found = importances(model.net, samples, [first, second], "activation")
    net: Any = model.net
    x = model.input.prepare(model.input.collate([samples.item(i) for i in range(COUNT)]))
    one = torch.relu(net[0](x.flatten(1)))
    two = torch.relu(net[2](one))
    for group, values, answers, taker in ((first, found[0], one, "2"), (second, found[1], two, "4")):
        order = [unit[taker, "in"][0] for unit in group.units]
        assert torch.allclose(values, answers.detach().abs().sum(0)[order].double(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["taylor", "activation"])
def test_channels_that_are_never_on_go_first(kind: str) -> None:
    """However large their filters are."""
    model = trained("softcache:cnn?width=16")
    net: Any = model.net
    dead = [1, 2, 5, 7, 8, 11, 13, 14]
    net[0].weight.data[dead] *= 100
    net[1].running_mean.zero_(), net[1].weight.data.fill_(0.1), net[1].bias.data.fill_(1.0)
    net[1].weight.data[dead], net[1].bias.data[dead] = 0.0, -1.0
    samples = samples_of(model, torch.arange(COUNT) % 4)
    record, _ = prune_channels(net, samples, amount=0.5, importance=kind, keep=("8",))
    assert record.kept["0"]["out"] == tuple(i for i in range(16) if i not in dead)


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(("kind", "share"), [("params", 0.5), ("macs", 0.3), ("params", 0.11)])
def test_the_smallest_amount_that_leaves_no_more_than_the_target(kind: str, share: float) -> None:
    cost = {"params": lambda s: sum(p.numel() for p in s.model.parameters()), "macs": multiply_adds}[kind]
    spec = "softcache:cnn?width=24"
    samples = samples_of(trained(spec))
    whole = cost(samples)
    _, said = prune_channels(samples.model.net, samples, target=f"{kind}:{share}", round_to=1)
    assert cost(samples) <= share * whole
    amount = float(said.split("amount=")[1].split()[0])
    other = samples_of(trained(spec))
    prune_channels(other.model.net, other, amount=amount - 2e-3, round_to=1)
    assert cost(other) > share * whole or amount < 2e-3
    assert cost(other) < 1.1 * share * whole


def test_a_network_of_a_few_channels_is_pruned_to_any_width() -> None:
    samples = samples_of(trained("softcache:mlp?hidden=7,6"))
    with pytest.raises(ConfigError, match=r"multiples of 8 are left\n.*round_to=1"):
        prune_channels(samples.model.net, samples, amount=0.5)
    record, said = prune_channels(samples.model.net, samples, amount=0.5, round_to=1)
    assert [len(record.kept[name]["out"]) for name in ("0", "2")] == [4, 3] and "6 of 13 channels" in said


# ------------------------------------------------------------------------------------------------- what goes in: the cache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("importance"))
    world.train(world.path / "run", "ce", cache=None)
    return world


def settings(world: World, **more: Any) -> ShrinkConfig:
    given = {
        "model": f"{world.spec('net')}@{world.path / 'run'}",
        "data": world.spec("toy"),
        "device": "cpu",
        "threads": 1,
    }
    return ShrinkConfig(**{**given, **more})


def test_classes_are_drawn_from_the_caches_soft_targets(world: World) -> None:
    cache = world.cache("plain")
    opened = open_all(settings(world, cache=cache, seed=3), quiet=True)
    again = open_all(settings(world, cache=cache, seed=3), quiet=True)
    other = open_all(settings(world, cache=cache, seed=4), quiet=True)
    drawn = opened.samples.answers
    assert drawn is not None and again.samples.answers is not None and other.samples.answers is not None
    assert torch.equal(drawn, again.samples.answers) and not torch.equal(drawn, other.samples.answers)
    whole = open_cache(cache)
    keys = [f"toy/{i}" for i in range(301)]
    targets = whole.gather(whole.find(keys), np.zeros(301, np.int64))
    chances = (targets.logits().double() / TEMPERATURE).softmax(1)
    counts = torch.bincount(drawn, minlength=5)
    assert ((counts - chances.sum(0)).abs() < 5 * (chances * (1 - chances)).sum(0).sqrt()).all()
    own = chances.gather(1, drawn[:, None]).mean()
    assert own > chances.gather(1, drawn[torch.randperm(301)][:, None]).mean()  # of each sample its own


def test_samples_are_seen_as_the_caches_teacher_saw_them(world: World) -> None:
    whole = open_cache(world.cache("plain"))
    opened = open_all(settings(world, cache=world.cache("plain")), quiet=True)
    toy = opened.samples.item(7)
    data = open_transfer_set(world.spec("toy"))
    assert np.array_equal(np.asarray(toy), np.asarray(ViewedSet(data, whole.policy, ()).render(7, 0)))
    assert not np.array_equal(np.asarray(toy), data[7][0])


def test_without_a_cache_taylor_goes_by_the_labels_that_there_are(world: World) -> None:
    opened = open_all(settings(world), quiet=True)
    answers = opened.samples.answers
    assert answers is not None and set(answers.tolist()) == {-1, 0, 1, 2, 3, 4}
    result = shrink.run(
        settings(
            world, by=("prune:structured,amount=0.5,importance=taylor,round_to=1",), out=str(world.path / "small")
        ),
        quiet=True,
    )
    assert result.after.parameters < 0.5 * result.before.parameters


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"by": ("prune:structured,amount=0.5,importance=taylor",), "data": None}, "there are no samples"),
        ({"by": ("prune:structured,amount=0.5,importance=activation",), "data": None}, r"no samples\n.*--data DATA"),
        ({"by": ("prune:structured,amount=0.5,importance=fisher",)}, r"there is no importance 'fisher'\n.*importance=taylor"),
        ({"by": ("prune:structured",)}, r"wants either an amount or a target\n.*target=macs:0.5"),
        ({"by": ("prune:structured,amount=0.5,target=params:0.5",)}, "wants either an amount or a target"),
        ({"by": ("prune:structured,target=params:1.5",)}, r"target=params:1.5: a target is params or macs, .*\n.*params:0.5"),
        ({"by": ("prune:structured,target=bytes:0.5",)}, "target=bytes:0.5: a target is params or macs"),
        ({"by": ("prune:structured,target=params:0.01,round_to=4",)}, "with 4 channels in each group .* are left"),
        ({"by": ("prune:structured,amount=0.5,round_to=0",)}, "round_to=0: must be at least 1"),
        ({"by": ("prune:structured,amount=0.5",), "cache": "c"}, r"--cache c needs --by .*importance=taylor"),
        ({"by": ("prune:structured,amount=0.5,importance=taylor",), "cache": "c", "data": None}, "--cache c needs --data"),
        ({"by": ()}, "--by is missing"),
        ({"by": ("lowrank:rank=0.5",), "out": None}, "--out is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(world: World, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SoftcacheError, match=message):
        shrink.run(settings(world, **{"out": str(tmp_path / "out"), **more}), quiet=True)
    assert not (tmp_path / "out").exists()


def test_data_without_labels_need_a_cache(world: World) -> None:
    model = trained("softcache:mlp?hidden=9", ("ant", "bee", "cat", "dog", "eel"))
    with pytest.raises(ConfigError, match=r"the data have no labels\n.*--cache CACHE"):
        prune_channels(model.net, samples_of(model), amount=0.5, importance="taylor")


# --------------------------------------------------------------------------------------------------------------- the scan


def test_a_scan_tells_what_is_right_without_some_channels_of_a_layer(world: World, tmp_path: Path) -> None:
    """As when what a layer gives is set to zero in the smallest of its channels."""
    before = sorted(tmp_path.iterdir())
    world.train(world.path / "loud", "ce", cache=None, student=world.spec("teacher"), lr=1e-3)
    named = f"{world.spec('teacher')}@{world.path / 'loud'}"
    result = scan.scan(settings(world, model=named, data=None, eval_data=world.spec("toy")), quiet=True)
    assert [layer.layers for layer in result.layers] == [("early.0",), ("late.0",)]
    assert [layer.channels for layer in result.layers] == [8, 16] and sorted(tmp_path.iterdir()) == before
    assert len({right for layer in result.layers for right in layer.right}) > 1
    model = load_model(named, num_classes=5, class_names=("ant", "bee", "cat", "dog", "eel"), input_shape=(8, 8)).eval()
    opened = open_all(settings(world), quiet=True)
    inputs = model.input.collate([opened.samples.item(i) for i in range(301)])
    labels = opened.samples.answers
    assert labels is not None
    net: Any = model.net
    for layer, stage in zip(result.layers, (net.early, net.late), strict=True):
        norms = stage[0].weight.detach().flatten(1).norm(dim=1)
        for share, found in zip((0.3, 0.5, 0.7), layer.right, strict=True):
            gone = norms.argsort()[: round(share * len(norms))]
            hook = stage[2].register_forward_hook(lambda _m, _i, y, gone=gone: y.index_fill(1, gone, 0.0))
            with torch.no_grad():
                right = (model(inputs).argmax(1) == labels)[labels >= 0].float().mean()
            hook.remove()
            assert found == pytest.approx(float(right), abs=1e-6)


def test_without_evaluation_data_answers_that_stay_are_counted(world: World) -> None:
    result = scan.scan(settings(world, by=("prune:structured,importance=activation,keep=head",)), quiet=True)
    assert (result.measured, result.whole, result.importance) == ("answers that stay", 1.0, "activation")
    assert [layer.layers for layer in result.layers] == [("early.0",)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": None}, r"--scan needs samples\n.*--eval-data DATA"),
        ({"by": ("carve:depth=0.5",)}, r"--scan with --by carve:depth=0.5: .*\n.*leave --by out"),
        ({"by": ("prune:structured,amount=0.5",)}, "one layer after the other"),
        ({"by": ("prune:structured,importance=taylor", "prune:structured")}, "one layer after the other"),
        ({"by": ("prune:structured,keep=nowhere",)}, "there is no module 'nowhere' to keep"),
        ({"out": "o"}, "--out o needs --by without --scan"),
    ],
)
def test_a_scan_that_cannot_be_is_refused(world: World, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scan.scan(settings(world, scan=True, **more), quiet=True)


def test_a_scan_of_several_labels_counts_decisions(tmp_path: Path) -> None:
    model = trained("softcache:mlp?hidden=16")
    save_student(model, tmp_path / "student.safetensors", metadata={})
    data = f"{WORLDS / 'some_labels.py'}:some?multi=true"
    config = ShrinkConfig(model=str(tmp_path), scan=True, eval_data=data, device="cpu", threads=1)
    result = scan.scan(config, quiet=True)
    held = open_transfer_set(data)
    with torch.no_grad():
        yes = model(model.input.collate([held[i][0] for i in range(40)])) > 0
    assert result.whole == pytest.approx(float((yes.numpy() == held.labels).mean())) and result.samples == 40


def test_the_table_of_a_scan_and_its_json(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["shrink", settings(world).model, "--scan", "--data", world.spec("toy"), "--device", "cpu", "--threads", "1"]
    assert cli.main([*argv, "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("answers that stay, 301 samples: 100.00 % with all channels\n")
    assert "early.0         6" in said and "-30%" in said and "next: softcache shrink" in said
    assert cli.main([*argv, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lost"] == [0.3, 0.5, 0.7]


def test_modules_are_as_they_were(world: World) -> None:
    """Neither a scan nor a choice by samples leaves hooks, gradients or other weights."""
    samples = open_all(settings(world), quiet=True).samples
    net: nn.Module = samples.model.net
    before = {name: value.clone() for name, value in net.state_dict().items()}
    groups = channel_groups(net, samples.run)
    importances(net, samples, groups, "taylor")
    importances(net, samples, groups, "activation")
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())

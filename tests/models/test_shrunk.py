"""The record of what was cut out of a network: done again before its weights are loaded, and refused where it does not fit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import softcache.models as models
from softcache.errors import ModelError
from softcache.models import Model, Shrunk, load_model, save_student
from softcache.models.seal import digest
from softcache.models.shrunk import Factored, shrink_by

SPEC = "softcache:resnet8?in_channels=1"
# one of everything: a block, channels between two layers, a layer in two
RECORD = Shrunk(
    cut=("layer2.0",),
    kept={
        "layer1.0.conv1": {"out": (0, 2, 5)},
        "layer1.0.bn1": {"out": (0, 2, 5)},
        "layer1.0.conv2": {"in": (0, 2, 5)},
        "layer3.0.conv1": {"in": tuple(range(16))},
        "layer3.0.downsample.0": {"in": tuple(range(16))},
    },
    factors={"layer3.0.conv2": 7, "fc": 3},
)


def small() -> Model:
    """A network that is smaller than its spec says, with weights of its own."""
    model = load_model(SPEC, num_classes=4, class_names="abcd", input_shape=(8, 8))
    shrink_by(model.net, RECORD)
    model.shrunk = RECORD
    for _ in range(2):
        model.train()(torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8))
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    save_student(small(), folder / "student.safetensors", metadata={})
    return folder


def batch() -> torch.Tensor:
    return torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_what_is_left_keeps_its_names_and_values() -> None:
    net = load_model(SPEC, num_classes=4, input_shape=(8, 8)).net
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    shrink_by(net, RECORD)
    after = net.state_dict()
    assert not any(name.startswith("layer2.0.") for name in after)
    assert torch.equal(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"][[0, 2, 5]])
    assert torch.equal(after["layer1.0.conv2.weight"], before["layer1.0.conv2.weight"][:, [0, 2, 5]])
    assert torch.equal(after["layer1.0.bn1.running_var"], before["layer1.0.bn1.running_var"][[0, 2, 5]])
    assert (net.layer1[0].conv1.out_channels, net.layer1[0].bn1.num_features) == (3, 3)  # type: ignore[union-attr,index]
    assert [after[f"fc.{part}.weight"].shape for part in ("first", "second")] == [(3, 64), (4, 3)]
    assert torch.equal(after["fc.second.bias"], before["fc.bias"])
    untouched = [name for name in before if name in after and before[name].shape == after[name].shape]
    assert "conv1.weight" in untouched and all(torch.equal(before[name], after[name]) for name in untouched)


def test_a_depthwise_convolution_keeps_its_groups() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))
    weight = net[0].weight.clone()  # type: ignore[operator,union-attr]
    shrink_by(net, Shrunk(kept={"0": {"out": (1, 3)}, "1": {"out": (1, 3)}}))
    assert (net[0].groups, net[0].in_channels, net[0].out_channels) == (2, 2, 2)
    assert torch.equal(net[0].weight, weight[[1, 3]]) and net(torch.zeros(1, 2, 5, 5)).shape == (1, 2, 5, 5)  # type: ignore[index,arg-type]


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (nn.Linear(6, 5), (6,)),
        (nn.Linear(6, 5, bias=False), (3, 6)),
        (nn.Conv2d(3, 5, 3, 2, 1, bias=False), (3, 9, 9)),
    ],
)
def test_two_layers_have_the_attributes_of_the_one(one: Any, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(one)
    shrink_by(net, Shrunk(factors={"0": 2}))
    two, x = net[0], torch.randn(2, *shape)
    assert isinstance(two, Factored) and two.weight.shape == one.weight.shape
    with torch.no_grad():
        one.weight.copy_(two.weight)
        assert torch.allclose(one(x), two(x), atol=1e-5)
    assert (two.bias is None) == (one.bias is None)


def test_one_record_after_another_is_one_record() -> None:
    first = Shrunk(
        kept={"layer1.0.conv1": {"out": (1, 3, 4, 9)}, "layer1.0.bn1": {"out": (1, 3, 4, 9)}}, factors={"fc": 3}
    )
    later = Shrunk(
        cut=("layer2.0",),
        kept={"layer1.0.conv1": {"out": (0, 2)}, "layer1.0.bn1": {"out": (0, 2)}, "fc.first": {"in": (0, 7)}},
    )
    one_by_one, at_once = (load_model(SPEC, num_classes=4, input_shape=(8, 8)).net for _ in range(2))
    at_once.load_state_dict(copy.deepcopy(one_by_one.state_dict()))
    shrink_by(one_by_one, first)
    shrink_by(one_by_one, later)
    both = first.then(later)
    assert both.kept["layer1.0.conv1"] == {"out": (1, 4)} and both.kept["fc"] == {"in": (0, 7)}
    assert "layer2.0" in both.cut
    shrink_by(at_once, both)
    wanted, found = one_by_one.state_dict(), at_once.state_dict()
    assert {n: t.shape for n, t in wanted.items()} == {n: t.shape for n, t in found.items()}
    assert torch.equal(wanted["layer1.0.conv1.weight"], found["layer1.0.conv1.weight"])


def test_channels_of_a_block_that_is_cut_later_are_forgotten() -> None:
    record = Shrunk(kept={"layer2.0.bn1": {"out": (0,)}}, factors={"layer2.0.conv1": 2}).then(Shrunk(cut=("layer2.0",)))
    assert record == Shrunk(cut=("layer2.0",))


# ---- saved and opened ----------------------------------------------------------------------------------------------


def test_a_run_folder_brings_its_smaller_network(run: Path) -> None:
    torch.manual_seed(0)
    model, again = small(), load_model(str(run), num_classes=4).eval()
    assert again.shrunk == RECORD == Shrunk.from_json(json.loads(json.dumps(RECORD.to_json())))
    assert torch.equal(again(batch()), model(batch()))


def test_its_weights_go_into_the_network_that_is_named(run: Path) -> None:
    model = load_model(f"{SPEC}@{run}", num_classes=4, class_names="abcd", input_shape=(8, 8)).eval()
    assert torch.equal(model(batch()), load_model(str(run), num_classes=4).eval()(batch()))


def test_another_network_is_not_made_smaller_by_it(run: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit softcache:cnn.*names 'layer2.0', which is no module of it"):
        load_model(f"softcache:cnn@{run}", num_classes=4, class_names="abcd", input_shape=(8, 8))


def test_a_network_of_a_user_is_made_smaller_by_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(num_classes: int):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, num_classes))\n"
    )
    spec = f"{tmp_path}/net.py:net"
    model = load_model(spec, num_classes=4)
    record = Shrunk(kept={"1": {"out": (3, 8)}, "3": {"in": (3, 8)}})
    shrink_by(model.net, record)
    model.shrunk = record
    save_student(model, tmp_path / "student.safetensors", metadata={})
    again = load_model(f"{spec}@{tmp_path}/student.safetensors", num_classes=4)
    assert again.net[1].weight.shape == (2, 64)  # type: ignore[index]


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (Shrunk(cut=("layer9",)), "names 'layer9', which is no module of it"),
        (Shrunk(cut=("",)), "names '', which is no module of it"),
        (Shrunk(cut=("layer1.0.conv1",)), "which is no block of a stack"),
        (Shrunk(cut=("fc",)), "which is no block of a stack"),
        (Shrunk(kept={"layer1": {"out": (0,)}}), "a Sequential, which has none to choose"),
        (Shrunk(kept={"conv1": {"out": (0, 16)}}), "that it has not: there are 16"),
        (Shrunk(kept={"conv1": {"out": (-1, 2)}}), "that it has not"),
        (Shrunk(kept={"conv1": {"out": (2, 1, 3)}}), "in another order, or twice"),
        (Shrunk(kept={"conv1": {"out": (1, 1)}}), "in another order, or twice"),
        (Shrunk(kept={"bn1": {"in": (0,)}}), "other channels of 'bn1' than it gives"),
        (Shrunk(kept={"bn1": {"in": (0,), "out": (0, 1)}}), "other channels of 'bn1' than it gives"),
        (Shrunk(factors={"fc": 10**9}), "a rank of 1,000,000,000: 68,000,000,000 numbers, of 100,000 that there are"),
        (Shrunk(factors={"bn1": 1}), "a BatchNorm2d, which has no rank"),
        (Shrunk(factors={"layer1": 1}), "a Sequential, which has no rank"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_by_name(record: Shrunk, said: str) -> None:
    net = load_model(SPEC, num_classes=4, input_shape=(8, 8)).net
    with pytest.raises(ModelError) as caught:
        shrink_by(net, record, most=100_000)
    assert said in caught.value.message


def test_normalisation_over_channels_and_groups_have_none_to_choose() -> None:
    net = nn.Sequential(nn.LayerNorm(4), nn.Conv2d(4, 4, 3, groups=2))
    for name, said in (("0", "a LayerNorm, which has none to choose"), ("1", "a convolution of 2 groups")):
        with pytest.raises(ModelError, match=said):
            shrink_by(net, Shrunk(kept={name: {"out": (0,)}}))


def forged(source: Path, folder: Path, record: Any, **model: Any) -> Path:
    """A student whose record, or whose other metadata, say something else, under a digest that fits."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "student.safetensors")
    with safe_open(source / "student.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["softcache"])
    about = json.loads(told["softcache_model"])
    told["softcache_model"] = json.dumps({**about, "shrunk": record, **model})
    told.pop("softcache_digest")
    told["softcache_digest"] = digest({"tensors": tensors, "metadata": told})
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "student.safetensors", metadata={"softcache": json.dumps(told)})
    return folder


ODD = [None, -1, 0, 1.5, float("nan"), float("inf"), 10**6, 10**12, 2**63, True, "x", "", [], {}, [[]], {"out": [0]}]


def hostile_records(count: int) -> Iterator[tuple[str, Any]]:
    """Records that say something else than the honest one, each in a way of its own."""
    draw = random.Random(16)
    honest = RECORD.to_json()
    names = [
        *honest["kept"],
        *honest["factors"],
        "layer1",
        "layer3.0",
        "conv1",
        "bn1",
        "fc",
        "avgpool",
        "",
        "a.b",
        "fc.first",
    ]
    names += ["__class__", "_modules", "forward", "layer1.0.conv1.weight", "x" * 5000, "../../x", "\x1b[31m", "."]
    for number in range(count):
        record = copy.deepcopy(honest)
        kind = number % 8
        if kind == 0:  # a part that is something else
            record[draw.choice([*honest, "bits", "code"])] = draw.choice(ODD[1:-2])
        elif kind == 1:  # another block, or one more
            record["cut"] = [*record["cut"] * draw.randint(0, 1), draw.choice([*names, *ODD])]
        elif kind == 2:  # channels that it has not, or in another order
            sides = record["kept"][draw.choice([*honest["kept"]])]
            side = draw.choice([*sides])
            sides[side] = draw.choice([[10**9], [-1], [0, 0], [5, 2, 0], [0, 2, 5, 63], [*range(10**4)], *ODD])
        elif kind == 3:  # of another module, or side
            record["kept"][draw.choice(names)] = {
                draw.choice(["in", "out", "up"]): draw.choice([[0, 1], [10**7], [1, 0]])
            }
        elif kind == 4:  # another rank
            record["factors"][draw.choice([*honest["factors"]])] = draw.choice([*ODD, 1, 2, 63, 10**9])
        elif kind == 5:  # of another module
            record["factors"][draw.choice(names)] = draw.choice([1, 2, 10**9])
        elif kind == 6:  # a part less
            part = draw.choice([*honest])
            if draw.random() < 0.5 or not isinstance(record[part], dict):
                del record[part]
            else:
                del record[part][draw.choice([*record[part]])]
        else:  # nothing that fits together
            record = draw.choice(
                [[], "x", 1, {"cut": []}, {**honest, "kept": [1]}, {**honest, "factors": {1: 1}}, [honest]]
            )
        if json.dumps(record) != json.dumps(honest):
            yield f"{number}: {str(record)[:150]}", record


@pytest.mark.parametrize("count", [32, pytest.param(240, marks=pytest.mark.slow)])
def test_hostile_records_are_refused_and_nothing_is_built(
    count: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused while the network is laid out on the meta device, where it takes no memory."""
    monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("the network was built"))
    tried = 0
    for case, record in hostile_records(count):
        folder = forged(run, tmp_path / "forged", record)
        try:
            load_model(str(folder), num_classes=4)
        except ModelError:
            tried += 1
        else:
            pytest.fail(f"loaded: {case}")
    assert tried > 0.9 * count


def test_a_huge_network_of_which_little_is_left_is_refused(run: Path, tmp_path: Path) -> None:
    record = {"cut": [], "kept": {"0": {"out": [0]}, "2": {"in": [0]}}, "factors": {}}
    folder = forged(run, tmp_path / "huge", record, spec="softcache:mlp?hidden=16000000", input={"kind": "vector"})
    with pytest.raises(ModelError, match="was cut out of a network of 1,104,000,004 numbers, and holds"):
        load_model(str(folder), num_classes=4)

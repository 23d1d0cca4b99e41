"""Smaller models: what each method leaves, against oracles; what both cost; the run folder, and mistakes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.rnn import pack_padded_sequence

from softcache import cli
from softcache.config import ShrinkConfig, TrainConfig
from softcache.errors import ConfigError, ModelError, SoftcacheError
from softcache.files import durable
from softcache.models import Model, Projector, Shrunk, graft, initialise, load_model, save_student
from softcache.models.inputs import AnyInput
from softcache.models.norms import BATCH_NORMS
from softcache.models.shrunk import shrink_by
from softcache.models.weights import reshrink
from softcache.students import cost, shrink
from softcache.students.carve import carve, find_stacks, spread_blocks
from softcache.students.channels import channel_groups, kept_without, without_effect
from softcache.students.cost import multiply_adds
from softcache.students.importance import filter_norms
from softcache.students.low_rank import low_rank
from softcache.students.prune import left_of, prune_channels, prune_weights
from softcache.students.samples import Samples

JOINED = WORLDS / "joined_channels.py"


def trained(spec: str, size: int = 8, channels: int = 1) -> Model:
    """A model whose BatchNorm has statistics of its own."""
    shape = (size, size) if channels == 1 else (size, size, channels)
    model = load_model(spec, num_classes=4, class_names=("ant", "bee", "cat", "dog"), input_shape=shape)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def samples_of(model: Model, count: int = 0, size: int = 8, channels: int = 1) -> Samples:
    draw = np.random.default_rng(0)
    shape = (size, size) if channels == 1 else (size, size, channels)
    items = draw.integers(0, 256, (max(1, count), *shape), dtype=np.uint8)
    return Samples.of(model, "the model", items[0], count, lambda i: items[i], 16)


# ---- channels -------------------------------------------------------------------------------------------------------


NETS = [
    f"{JOINED}:ways",
    f"{JOINED}:groups",
    f"{WORLDS / 'fused_norms.py'}:fused",
    "softcache:cnn?width=8",
    "softcache:mlp?hidden=24,16",
    "softcache:resnet8?in_channels=1",
    *(pytest.param(f"softcache:{name}", marks=pytest.mark.slow) for name in ("wrn16_2", "vgg8", "mobilenetv2")),
]


@pytest.mark.parametrize("spec", NETS)
def test_leaving_channels_out_is_the_same_as_not_listening_to_them(spec: str) -> None:
    """Of half of every group, at random: the smaller network gives what the whole one gives with these weights at 0."""
    samples = samples_of(trained(spec))
    groups = channel_groups(samples.model.net, samples.run)
    draw = np.random.default_rng(1)
    gone = [unit for group in groups for unit in group.units if draw.random() < 0.5]
    assert gone
    with without_effect(samples.model.net, gone):
        expected = samples.run(3)
    assert not torch.allclose(samples.run(3), expected, atol=1e-3)
    shrink_by(samples.model.net, Shrunk(kept=kept_without(samples.model.net, gone)))
    assert torch.allclose(samples.run(3), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_channels_are_found_in_every_place_that_has_them() -> None:
    samples = samples_of(trained(f"{JOINED}:ways"))
    found = [
        {f"{name}:{side}" for name, side in group.sides} for group in channel_groups(samples.model.net, samples.run)
    ]
    stream = {
        "stem:out",
        "bn:out",
        "depthwise:out",
        "added:in",
        "added:out",
        "squeeze:in",
        "excite:out",
        "branch:in",
        "down:in",
    }
    assert sorted(map(sorted, found)) == sorted(
        map(sorted, [stream, {"squeeze:out", "excite:in"}, {"branch:out", "down:in"}, {"down:out", "flat:in"}])
    )


def test_a_batch_norm_with_its_activation_inside_lets_channels_through() -> None:
    class WithActivation(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(super().forward(x))

    model = trained("softcache:cnn?width=8")
    model.net[1] = WithActivation(8)  # type: ignore[index,operator]
    groups = channel_groups(model.eval().net, samples_of(model).run)
    assert (("0", "out"), ("1", "out"), ("4", "in")) in [group.sides for group in groups]


@pytest.mark.parametrize(
    ("net", "sides"),
    [
        ("groups", (("fc", "in"), ("of_half", "out"))),  # neither of the two groups' sides, nor the half of it
        ("mixed", (("free", "out"), ("shown", "in"))),  # no others are added, normalised together, or shown
    ],
)
def test_channels_that_cannot_be_told_apart_are_left_whole(net: str, sides: tuple[Any, ...]) -> None:
    samples = samples_of(trained(f"{JOINED}:{net}"))
    assert [group.sides for group in channel_groups(samples.model.net, samples.run)] == [sides]


@pytest.mark.parametrize(
    ("count", "amount", "left"),
    [(32, 0.3, 24), (32, 0.5, 16), (20, 0.5, 8), (16, 0.95, 8), (8, 0.5, 8), (5, 0.5, 5), (64, 0.01, 64)],
)
def test_widths_are_multiples_of_eight(count: int, amount: float, left: int) -> None:
    assert left_of(count, amount) == left


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_smallest_filters_go(norm: str) -> None:
    samples = samples_of(trained("softcache:cnn?width=16"))
    weight = samples.model.net[0].weight.detach().double().flatten(1)  # type: ignore[index,operator,union-attr]
    norms = weight.abs().sum(1) if norm == "l1" else weight.square().sum(1).sqrt()
    group = next(g for g in channel_groups(samples.model.net, samples.run) if g.name == "0")
    order = [unit["0", "out"][0] for unit in group.units]
    assert torch.allclose(filter_norms(samples.model.net, group, norm), norms[order])
    record, _ = prune_channels(samples.model.net, samples, amount=0.5, importance=norm)
    assert record.kept["0"]["out"] == tuple(sorted(norms.argsort(descending=True)[:8].tolist()))
    assert record.kept["1"]["out"] == record.kept["0"]["out"]


# ---- single weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("amount", [0.3, 0.5, 0.95])
def test_the_zeros_are_those_of_torch(scope: str, amount: float) -> None:
    ours, theirs = (trained("softcache:cnn?width=4").net for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    prune_weights(ours, amount=amount, scope=scope)
    layers = [(module, "weight") for module in theirs.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if scope == "global":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=amount)
    else:
        for module, name in layers:
            torch_prune.l1_unstructured(module, name, amount)
    for module, name in layers:
        torch_prune.remove(module, name)
    wanted, found = theirs.state_dict(), ours.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_layers_that_are_kept_keep_their_weights() -> None:
    net = trained("softcache:cnn?width=4").net
    prune_weights(net, amount=0.9, keep=("0", "8"))
    assert [int((m.weight == 0).sum()) > 0 for m in net if isinstance(m, nn.Conv2d)] == [False, True, False]  # type: ignore[union-attr]


# ---- low rank -------------------------------------------------------------------------------------------------------


def test_without_data_the_product_is_the_nearest_of_its_rank() -> None:
    samples = samples_of(trained("softcache:mlp?hidden=40,30"))
    weight = samples.model.net[2].weight.detach().double()  # type: ignore[index,operator,union-attr]
    low_rank(samples.model.net, samples, rank=0.3)
    made: Any = samples.model.net[2]  # type: ignore[index]
    u, s, v = torch.linalg.svd(weight)
    nearest = u[:, :9] @ torch.diag(s[:9]) @ v[:9]
    assert made.first.out_features == 9 and torch.allclose(made.weight.double(), nearest, atol=1e-5)


def test_with_data_the_answers_are_as_near_as_a_rank_allows() -> None:
    """What is lost of a convolution's answers is what lies in the weaker directions of those answers."""
    model = trained("softcache:cnn?width=8")
    samples = samples_of(model, count=16)
    conv: Any = model.net[4]  # type: ignore[index]
    inputs: list[torch.Tensor] = []
    hook = conv.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    samples.run_all()
    hook.remove()
    answers = conv(torch.cat(inputs)).detach().double().movedim(1, -1).reshape(-1, 16)
    record, said = low_rank(model.net, samples, energy=0.9, keep=("0", "8"))
    rank = record.factors["4"]
    squares = torch.linalg.svdvals(answers) ** 2
    assert squares[:rank].sum() >= 0.9 * squares.sum() > squares[: rank - 1].sum()
    made = model.net[4](torch.cat(inputs)).detach().double().movedim(1, -1).reshape(-1, 16)  # type: ignore[index,operator]
    assert float((made - answers).square().sum()) == pytest.approx(float(squares[rank:].sum()), rel=1e-3)
    assert "by what they answer" in said


def test_a_bias_is_no_part_of_the_answers() -> None:
    """Of a linear layer whose bias is far larger than what its weights give."""
    model = trained("softcache:mlp?hidden=20,18")
    linear: Any = model.net[2]  # type: ignore[index]
    linear.bias.data.fill_(100.0)
    samples = samples_of(model, count=16)
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    samples.run_all()
    hook.remove()
    squares = torch.linalg.svdvals(torch.cat(inputs).double() @ linear.weight.detach().double().T) ** 2
    rank = low_rank(model.net, samples, energy=0.95, keep=("0",))[0].factors["2"]
    assert squares[:rank].sum() >= 0.95 * squares.sum() > squares[: rank - 1].sum()


def test_a_layer_whose_weight_is_read_in_its_place_is_left_whole() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called, self.fc = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.called(nn.functional.linear(x, self.read.weight))))

    model = trained("softcache:mlp?hidden=8")
    model.net = Reads()
    assert set(low_rank(model.net, samples_of(model), rank=0.2)[0].factors) == {"called"}


def test_only_layers_in_which_it_saves_are_factored_and_never_the_classifier() -> None:
    samples = samples_of(trained("softcache:mlp?hidden=40,30"))
    record, _ = low_rank(samples.model.net, samples, rank=0.4)
    assert set(record.factors) == {"0", "2"}
    samples = samples_of(trained("softcache:mlp?hidden=40,30"))
    with pytest.raises(ConfigError, match="saves nothing in any of the 2 layers"):
        low_rank(samples.model.net, samples, rank=0.9)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "left"),
    [
        (12, 0.5, [0, 2, 4, 7, 9, 11]),
        (3, 0.5, [0, 2]),
        (2, 0.5, [0]),
        (4, 0.75, [0, 2, 3]),
        (5, 0.2, [0]),
        (6, 0.34, [0, 5]),
    ],
)
def test_blocks_are_spread_from_the_first_to_the_last(count: int, share: float, left: Sequence[int]) -> None:
    assert spread_blocks(count, share) == left


def test_depth_takes_whole_blocks_and_the_rest_is_as_it_was() -> None:
    model = trained("softcache:resnet20?in_channels=1")
    samples, before = samples_of(model), {k: v.clone() for k, v in model.net.state_dict().items()}
    stacks = find_stacks(model.net, samples)
    assert [stack.blocks for stack in stacks] == [tuple(f"layer{i}.{j}" for j in range(3)) for i in (1, 2, 3)]
    record, said = carve(model.net, samples, depth=0.5)
    assert record == Shrunk(cut=("layer1.1", "layer2.1", "layer3.1")) and "3 of 9 blocks cut" in said
    assert all(torch.equal(before[name], tensor) for name, tensor in model.net.state_dict().items())


def test_flat_networks_have_stacks_too() -> None:
    samples = samples_of(trained("softcache:mobilenetv2", size=16), size=16)
    assert [len(stack.blocks) for stack in find_stacks(samples.model.net, samples)] == [1, 2, 3, 4, 3, 3, 1]


def test_blocks_inside_of_blocks_are_no_stack_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(2)))
            self.parts = nn.ModuleList(Part() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return self.inner(x)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    model = trained("softcache:mlp?hidden=8")
    model.net = nn.Sequential(nn.Linear(64, 8), *(Block() for _ in range(3)), nn.Linear(8, 4))
    samples = samples_of(model)
    assert [stack.blocks for stack in find_stacks(model.net, samples)] == [("1", "2", "3")]
    assert carve(model.net, samples, depth=0.5)[0].cut == ("2",)


def test_what_is_kept_is_a_shorter_network_with_a_new_classifier() -> None:
    model = trained("softcache:resnet8x4?in_channels=1")
    record, said = carve(model.net, samples_of(model), keep=("layer1", "layer2", "fc"))
    assert record.cut == ("layer3.0",) and record.kept == {"fc": {"in": tuple(range(128))}}
    assert "fc begins anew" in said and samples_of(model).run(2).shape == (2, 4)


def test_a_stack_in_the_middle_cannot_go() -> None:
    samples = samples_of(trained("softcache:resnet8x4?in_channels=1"))
    with pytest.raises(ModelError, match=r"layer3.0.downsample.0 takes 128 channels and would be given 64"):
        carve(samples.model.net, samples, keep=("layer1", "layer3", "fc"))


def test_width_leaves_channels_evenly_spread() -> None:
    samples = samples_of(trained("softcache:cnn?width=16"))
    record, _ = carve(samples.model.net, samples, width=0.5)
    assert record.kept["0"]["out"] == (0, 2, 4, 6, 8, 10, 12, 14)


# ---- what both cost -------------------------------------------------------------------------------------------------


def test_multiply_adds_are_counted() -> None:
    cnn = samples_of(trained("softcache:cnn?width=4"))
    assert multiply_adds(cnn) == 64 * 9 * 4 + 16 * 9 * 4 * 8 + 4 * 9 * 8 * 16 + 16 * 4
    model = load_model("softcache:encoder?width=8&layers=1&heads=2&hidden=16", num_classes=2, vocabulary=tuple("abc"))
    text = Samples.of(model.eval(), "it", "a b c", 0, lambda _: "", 4)
    assert multiply_adds(text) == 3 * 8 * 8 * 4 + 2 * 3 * 3 * 8 + 2 * 3 * 8 * 16 + 8 * 2


class Recurrent(nn.Module):
    """Two layers, in both directions or one, over five steps of three numbers."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool, **settings: Any) -> None:
        super().__init__()
        self.cells, self.packed = kind(3, 4, num_layers=2, **settings), packed  # type: ignore[call-arg,arg-type]

    def forward(self, x: Tensor) -> Tensor:
        steps = x.expand(5, *x.shape).clone() if not self.cells.batch_first else x[:, None].expand(-1, 5, -1)
        if not self.packed:
            return self.cells(steps)[0].flatten(1)  # type: ignore[no-any-return]
        two = pack_padded_sequence(steps, torch.tensor([2] * len(x)), batch_first=self.cells.batch_first)
        return self.cells(input=two)[0].data  # type: ignore[no-any-return]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"batch_first": True}, {"proj_size": 2}])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_multiply_adds_of_recurrent_layers_are_counted(
    kind: type[nn.RNNBase], gates: int, settings: dict[str, Any], packed: bool
) -> None:
    if "proj_size" in settings and kind is not nn.LSTM:
        return
    model = Model(Recurrent(kind, packed, **settings), AnyInput(None))
    ways, left = 1 + settings.get("bidirectional", False), settings.get("proj_size", 4)
    projected = 4 * left if left != 4 else 0
    each = [gates * 4 * (taken + left) + projected for taken in (3, ways * left)]
    found = multiply_adds(Samples.of(model, "it", torch.zeros(3), 0, lambda _i: None, 1))
    assert found == (2 if packed else 5) * ways * sum(each)


def test_multiply_adds_are_counted_where_a_layer_takes_a_parameter() -> None:
    """As one that pools by attention does: its query is learned."""

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent, self.query = nn.Parameter(torch.ones(1, 2, 3)), nn.Linear(3, 5)
            self.still = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(self.latent.expand(len(x), -1, -1)).flatten(1)

    net = Pool()
    assert (
        multiply_adds(Samples.of(Model(net, AnyInput(None)), "it", torch.zeros(3), 0, lambda _i: None, 1)) == 2 * 3 * 5
    )
    assert net.latent.requires_grad and not net.still.requires_grad


def test_what_is_judged_by_blocks_is_near_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 16, 200_000, dtype=np.uint8).tobytes() + bytes(100_000)
    whole = cost.compressed(data)
    monkeypatch.setattr(cost, "MOST_COMPRESSED", 2**15)
    monkeypatch.setattr(cost, "BLOCK", 2**11)
    assert cost.compressed(data) == pytest.approx(whole, rel=0.1)


def test_batch_norm_is_measured_on_the_samples() -> None:
    model = trained("softcache:cnn?width=4")
    samples = samples_of(model, count=16)
    assert samples.measure_batch_norm() == 3 and not model.training
    first: Any = model.net[0]  # type: ignore[index]
    bn: Any = model.net[1]  # type: ignore[index]
    given = first(model.input.prepare(next(samples.batches()))).detach().double()
    assert torch.allclose(bn.running_mean.double(), given.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(bn.running_var.double(), given.var((0, 2, 3), unbiased=True), rtol=1e-4)
    assert bn.momentum == 0.1


# ---- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("run")
    told = {"softcache_policy": "[]", "softcache_cache": "abc"}
    save_student(trained("softcache:resnet14?in_channels=1"), folder / "student.safetensors", metadata=told)
    return folder


@pytest.fixture(autouse=True)
def _timed_once(timed_once: None) -> None:
    """Every test."""


@pytest.fixture
def images(toy: Path) -> str:
    return f"{toy}:images?count=20"


def shrunk(run: Path | str, out: Path, *by: str, **settings: Any) -> shrink.Shrinking:
    return shrink.run(
        ShrinkConfig(str(run), by, str(out), **{"device": "cpu", "threads": 1, "batch_size": 8, **settings}), quiet=True
    )


@pytest.mark.slow
def test_methods_compose_and_what_comes_out_is_a_run_folder(run: Path, tmp_path: Path, images: str) -> None:
    by = (
        "carve:depth=0.5",
        "prune:structured,amount=0.5,importance=l1",
        "lowrank:rank=0.5",
        "prune:unstructured,amount=0.5",
    )
    result = shrunk(run, tmp_path / "out", *by, data=images, eval_data=images)
    assert [text for text, _ in result.steps] == list(by)
    before, after = result.before, result.after
    assert after.parameters < 0.2 * before.parameters and after.zeros > 0.4 * after.parameters
    assert after.multiply_adds < before.multiply_adds and after.compressed < after.nbytes < before.nbytes
    assert result.measured_before is not None and result.measured_after is not None
    model = load_model(str(tmp_path / "out"), num_classes=4).eval()
    assert sum(p.numel() for p in model.parameters()) == after.parameters
    assert model.shrunk is not None and model.shrunk.cut == ("layer1.1", "layer2.1", "layer3.1")
    assert json.loads((tmp_path / "out/shrink.json").read_text())["after"]["parameters"] == after.parameters
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["shrink.json", "student.safetensors"]
    again = shrunk(tmp_path / "out", tmp_path / "again", "carve:width=0.6")
    assert again.after.parameters <= again.before.parameters == after.parameters


@pytest.mark.slow
def test_the_process_keeps_its_generators_and_threads(run: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    shrunk(run, tmp_path / "out", "carve:depth=0.5", threads=before[1] + 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


def test_of_several_labels_the_table_tells_decisions(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text("def pairs():\n    return [([float(i), 1.0, 2.0], [i % 2, 1]) for i in range(8)]\n")
    torch.manual_seed(1)
    model = load_model("softcache:mlp?hidden=64", num_classes=2, input_shape=(3,))
    save_student(model, tmp_path / "student.safetensors", metadata={})
    text = shrunk(tmp_path, tmp_path / "out", "lowrank:rank=0.2", eval_data=f"{file}:pairs").text()
    assert "right decisions, not healed" in text and "top-1" not in text


@pytest.mark.slow
def test_a_smaller_student_is_healed_from_a_cache(run: Path, tmp_path: Path, images: str, quick_dump: Any) -> None:
    from softcache import train

    shrunk(run, tmp_path / "small", "carve:depth=0.5", "carve:width=0.5")
    quick_dump(images, [str(run)], features=("layer3",))
    config = TrainConfig(
        student=str(tmp_path / "small"), data=images, cache=str(tmp_path / "cache"), out=str(tmp_path / "healed"), epochs=1,
        loss=("kd", "hint:layer=layer3"), batch_size=10, threads=1, device="cpu", init_from=str(run),
    )  # fmt: skip
    train.run(config, quiet=True)
    small, healed = (load_model(str(tmp_path / name), num_classes=4) for name in ("small", "healed"))
    assert healed.shrunk == small.shrunk
    assert [p.shape for p in healed.parameters()] == [p.shape for p in small.parameters()]


def test_a_smaller_student_begins_with_its_own_channels_of_another_network(run: Path) -> None:
    whole = load_model(str(run), num_classes=4)
    model = load_model(str(run), num_classes=4)
    samples = samples_of(model)
    for step in (carve(model.net, samples, depth=0.5), carve(model.net, samples, width=0.5)):
        model.shrunk = step[0] if model.shrunk is None else model.shrunk.then(step[0])
    wanted = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    done = initialise(model, str(run))
    assert done.taken == done.numbers and whole.net.state_dict().keys() > wanted.keys()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in model.net.state_dict().items())


@pytest.mark.parametrize("first", ["carve:depth=0.5", "carve:width=0.7", "prune:structured,amount=0.4"])
def test_a_smaller_student_begins_with_its_own_channels_of_a_smaller_network(run: Path, first: str) -> None:
    """Whatever was left out of the other one before: the channels are those of the whole network that both come from."""
    source, student = (load_model(str(run), num_classes=4) for _ in range(2))
    net, samples = source.net, samples_of(source)
    source.shrunk, _ = shrink.Method.parse(first).apply(samples)
    save_student(source, run / "first.safetensors", metadata={})
    later, _ = carve(net, samples, width=0.6)
    reshrink(student, source.shrunk.then(later), "the student", most=10**9)
    for parameter in student.parameters():
        parameter.data.zero_()
    done = initialise(student, str(run / "first.safetensors"))
    assert done.taken == done.numbers and not done.left
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in student.net.state_dict().items())


def test_where_a_smaller_network_has_other_channels_its_own_are_taken_if_they_fit(run: Path) -> None:
    """Two of the same widths: the other one as it is, or nothing would fit together."""
    even, large = (load_model(str(run), num_classes=4) for _ in range(2))
    even.shrunk, _ = carve(even.net, samples_of(even), width=0.5)
    large.shrunk, _ = prune_channels(large.net, samples_of(large), amount=0.5)
    assert even.shrunk != large.shrunk
    save_student(large, run / "large.safetensors", metadata={})
    assert not initialise(even, str(run / "large.safetensors")).left
    assert all(torch.equal(even.net.state_dict()[name], tensor) for name, tensor in large.net.state_dict().items())


def test_zeros_that_nothing_holds_are_told_before_training(
    run: Path, tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shrunk(run, tmp_path / "sparse", "prune:unstructured,amount=0.8,scope=layer")
    out = str(tmp_path / "out")
    argv = ["train", "--student", str(tmp_path / "sparse"), "--data", images, "--epochs", "1", "--out", out]
    assert cli.main([*argv, "--threads", "1", "--device", "cpu"]) == 0
    assert "80% of the student's weights are zero, as after prune:unstructured" in capsys.readouterr().err


def test_killed_before_the_end_there_is_no_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        shrunk(run, tmp_path / "out", "carve:depth=0.5")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_what_a_killed_one_left_is_not_in_the_way(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("shrink.json", "shrink.json.tmp-0", ".123.student.safetensors"):
        (out / name).write_text("half of")
    shrunk(run, out, "carve:depth=0.5")
    assert sorted(path.name for path in out.iterdir()) == ["shrink.json", "student.safetensors"]
    json.loads((out / "shrink.json").read_text())
    for name in ("student.safetensors", ".mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(ConfigError, match="holds files already"):
            shrunk(run, tmp_path / name, "carve:depth=0.5")
        assert (tmp_path / name / name).read_text() == "mine"


def test_the_same_model_is_the_same_file_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(run, other)
    files = []
    for source, name in ((run, "a"), (other, "b")):
        shrunk(source, tmp_path / name, "carve:depth=0.5")
        files.append((tmp_path / name / "student.safetensors").read_bytes())
    assert files[0] == files[1] and b"elsewhere" not in files[1]


MISTAKES = [
    ("carve", "carve wants one of depth, width and keep, and got none", "--by carve:depth=0.5"),
    ("carve:depth=0.5,width=0.5", "and got depth and width", "several are several --by"),
    ("carve:depth=1", "carve:depth=1: depth is the share that stays", ""),
    ("carve:keep=layer9", "there is no module 'layer9' to keep", "did you mean 'layer"),
    ("carve:keep=layer1,layer2,layer3", "every block of the repeated", "lie in layer1, layer2, layer3"),
    ("carve:deepth=0.5", "unknown parameter 'deepth'", "did you mean 'depth'"),
    ("prune", "there is no method 'prune'", "prune:unstructured or prune:structured"),
    ("prune:unstructured", "parameter 'amount' is missing", "amount="),
    ("prune:unstructured,amount=1", "amount=1: an amount is a share, more than 0 and less than 1", "amount=0.5"),
    ("prune:unstructured,amount=half", "'half' is not a number", ""),
    ("prune:unstructured,amount=0.5,scope=all", "there is no scope 'all'", "scope=global or scope=layer"),
    ("prune:structured,amount=0.5,importance=taylor", "there are no samples", "soft targets or labels"),
    ("prune:structured,amount=0.01", "no channels can be left out", "lowrank"),
    ("lowrank", "lowrank wants either energy or rank", "lowrank:energy=0.95"),
    ("lowrank:energy=2", "lowrank:energy=2: energy is a share", "energy=0.95"),
    ("carve:depth=half", "parameter 'depth': 'half' is not a number", ""),
    ("prune:structured,amount=0.5,keep=conv1,layer1,layer2,layer3", "that has channels to leave out is to be kept", "fewer"),
    ("prune:structured,amount=50%", "'50%' is not a number", "0.5"),
    ("prune:structured,amount=0,5", "'0,5' is not a number", "0.5"),
    ("prune:structured,target=flops:0.5", "target=flops:0.5: a target is params or macs", "target=macs:0.5"),
    ("prune:structured,amount=0.5,importance=size", "there is no importance 'size'", "importance=taylor"),
    ("lowrank:energy=0.9,keep=fcc", "there is no module 'fcc' to keep", "'fc'"),
    ("lowrank:0.5", "'0.5' is not key=value", "lowrank:key=value"),
    ("lowrank:rank=0.5,rank=0.2", "'rank' is given twice", ""),
    ("quantize:int8", "there is no method 'quantize'", "'quantise:int8'"),
    ("lowrank:rank=0.5,samples=100", "unknown parameter 'samples'", "known: energy, keep, rank"),
    ("carve:net=resnet8", "unknown parameter 'net'", ""),
]  # fmt: skip


@pytest.mark.parametrize(("by", "said", "tip"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_told(by: str, said: str, tip: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SoftcacheError) as caught:
        shrunk(run, tmp_path / "out", by)
    assert said in caught.value.message and tip in caught.value.tip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "by",
    [
        "carve:depth=2",
        "prune:structured,target=macs:50",
        "prune:structured,amount=0.5,importance=taylor",
        "prune:unstructured,amount=0",
        "lowrank:energy=95",
        "quantise:int8",  # there are no samples
    ],
)
def test_a_mistake_in_a_later_method_is_told_before_the_first_takes_its_time(
    by: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrink.Method, "apply", lambda *_: pytest.fail("a method was begun"))
    with pytest.raises(ConfigError):
        shrunk(run, tmp_path / "out", "lowrank:rank=0.5", by)
    assert not (tmp_path / "out").exists()


def test_further_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    small = ["--by", "carve:depth=0.5", "--out"]
    for argv, said in (
        ([str(run), *small, str(tmp_path / "full")], "full: holds files already"),
        ([str(run), *small, str(tmp_path / "full/notes.txt")], "notes.txt: is a file"),
        (["softcache:cnn", *small, "x"], "'softcache:cnn' has no weights"),
        ([str(tmp_path / "nowhere"), *small, "x"], "is neither a run folder nor a model"),
        ([str(run), *small, "x", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        ([str(run), *small, "x", "--data", "nothing:here"], "nothing"),
    ):
        assert cli.main(["shrink", *argv, "--device", "cpu", "--threads", "1"]) == 2
        errors = capsys.readouterr().err
        assert said in errors and "Traceback" not in errors


def test_a_network_without_blocks_or_channels_is_refused_by_name(tmp_path: Path, images: str) -> None:
    save_student(trained("softcache:mlp?hidden=12"), tmp_path / "student.safetensors", metadata={})
    with pytest.raises(ModelError, match="has no repeated blocks"):
        shrunk(tmp_path, tmp_path / "out", "carve:depth=0.5")


def test_a_student_with_its_teachers_classifier_is_made_smaller_before(tmp_path: Path) -> None:
    model = trained("softcache:cnn?width=8")
    batch = model.input.collate([np.zeros((8, 8), np.uint8)])
    graft(model, "10", Projector((32, 2, 2), (6, 2, 2)), torch.randn(4, 6), torch.randn(4), batch)
    save_student(model, tmp_path / "student.safetensors", metadata={})
    with pytest.raises(ModelError, match="answers by its teacher's classifier behind a projector"):
        shrunk(tmp_path, tmp_path / "out", "lowrank:rank=0.5")


def test_the_table_is_read_without_arithmetic(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["shrink", str(run), "--by", "prune:unstructured,amount=0.5,scope=layer", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--device", "cpu", "--threads", "1", "--batch-size", "4", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "weights are zero (layer); train --prune held holds them there" in said
    assert "BatchNorm keeps the statistics of the whole network" in said
    lines = {line.split("  ")[0]: line.split()[-1] for line in said.splitlines() if line}
    assert lines["parameters"] == "1.00" and math.isclose(float(lines["of them not zero"]), 0.5, abs_tol=0.01)

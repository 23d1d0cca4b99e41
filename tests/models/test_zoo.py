"""The networks of the distillation benchmarks: their sizes, their stages, and that they compute what the papers draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.features.taps import classifier_feature, classifier_of, list_modules, map_ends
from softcache.models import MODELS, Model, fingerprint, load_model
from softcache.models.bottleneck import Bottleneck
from softcache.models.mobilenet import InvertedResidual
from softcache.models.shufflenet import UnitV1, UnitV2, channel_shuffle
from softcache.models.wrn import PreactivationBlock
from softcache.students.traced_program import Batch, trace

COUNTS = {  # of the benchmark, at 100 classes
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn16_2": 703_284,
    "wrn40_1": 569_780,
    "wrn40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet50": 23_705_252,
}
# where a 32 x 32 image's map has been halved so often, the module that gives the benchmark's feature, and its channels
RESNET = (("layer1", 16, 0), ("layer2", 32, 1), ("layer3", 64, 2))
WIDE = (("block1", 32, 0), ("block2", 64, 1), ("block3", 128, 2))
VGG = (("block0", 64, 0), ("block1", 128, 1), ("block2", 256, 2), ("block4", 512, 3))
MAP_ENDS = {
    **dict.fromkeys(("resnet8", "resnet20", "resnet32", "resnet56", "resnet110"), RESNET),
    **dict.fromkeys(
        ("resnet8x4", "resnet32x4"), tuple((name, 4 * channels, halved) for name, channels, halved in RESNET)
    ),
    **dict.fromkeys(("wrn16_2", "wrn40_2"), WIDE),
    "wrn40_1": tuple((name, channels // 2, halved) for name, channels, halved in WIDE),
    **dict.fromkeys(("vgg8", "vgg13"), VGG),
    "mobilenetv2": (("blocks.1", 12, 1), ("blocks.2", 16, 2), ("blocks.4", 48, 3), ("blocks.6", 160, 4)),
    "shufflenetv1": (("relu", 24, 0), ("layer1", 240, 1), ("layer2", 480, 2), ("layer3", 960, 3)),
    "shufflenetv2": (("relu", 24, 0), ("layer1", 116, 1), ("layer2", 232, 2), ("layer3", 464, 3)),
    "resnet50": (("layer1", 256, 0), ("layer2", 512, 1), ("layer3", 1024, 2), ("layer4", 2048, 3)),
}
KINDS = ["wrn16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet50"]  # one of each
over_kinds = pytest.mark.parametrize("name", KINDS)


def shapes_only(name: str, channels: int = 3, classes: int = 100) -> Any:
    """The bare network without numbers: nothing is drawn or computed."""
    with torch.device("meta"):
        return load_model(f"softcache:{name}?in_channels={channels}", num_classes=classes, device="meta").net


@cache
def made(name: str) -> Model:
    """A network of 7 classes in eval mode whose BatchNorms have seen images, so that signals neither vanish nor explode."""
    torch.manual_seed(1)
    model = load_model(f"softcache:{name}", num_classes=7)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(6, 3, 16, 16))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


# ------------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_count_of_parameters_is_the_benchmark_s(name: str) -> None:
    assert sum(p.numel() for p in shapes_only(name).parameters()) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [*((name, (32, 32)) for name in COUNTS), *((name, (40, 24)) for name in ("resnet8", *KINDS))]
)
def test_the_stages_are_the_benchmark_s(name: str, size: tuple[int, int]) -> None:
    found = map_ends(shapes_only(name), torch.empty(2, 3, *size, device="meta"))
    sizes = [tuple(-(-n // 2**halved) for n in size) for _, _, halved in MAP_ENDS[name]]
    wanted = [(stage, (2, channels, *hw)) for (stage, channels, _), hw in zip(MAP_ENDS[name], sizes, strict=True)]
    assert [(module.name, module.shape) for module in found] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", *KINDS])
def test_every_relu_can_be_tapped(name: str) -> None:
    found = list_modules(shapes_only(name), torch.empty(2, 3, 32, 32, device="meta"))
    calls = [module.calls for module in found if module.kind == "ReLU"]
    assert calls and set(calls) == {1}


@pytest.mark.slow
@over_kinds
@pytest.mark.parametrize("shape", [(1, 28, 28), (4, 33, 47)], ids=str)
def test_sizes_and_channels(name: str, shape: tuple[int, int, int]) -> None:
    net = shapes_only(name, channels=shape[0], classes=9)
    assert net(torch.empty(2, *shape, device="meta")).shape == (2, 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", *KINDS])
def test_the_pooled_feature_has_a_name(name: str) -> None:
    net, x = made(name).net, torch.rand(2, 3, 16, 16)
    head = classifier_of(net, x)
    assert head is not None and head.out_features == 7
    pooled = "tail" if name in ("wrn16_2", "mobilenetv2", "shufflenetv2") else "avgpool"
    assert str(classifier_feature(net, x, head)) == f"{pooled}:flatten"


@pytest.mark.slow
@over_kinds
def test_gradients_reach_every_parameter(name: str) -> None:
    model = made(name)
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    for parameter, tensor in model.net.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), parameter
    model.zero_grad()


@pytest.mark.slow
@over_kinds
def test_same_seed_same_network(name: str) -> None:
    def drawn(seed: int) -> str:
        torch.manual_seed(seed)
        return fingerprint(load_model(f"softcache:{name}", num_classes=3))

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("name", ["resnet20", "wrn16_2", "vgg8", "mobilenetv2", "resnet50"])
def test_the_first_weights_are_he_s(name: str) -> None:
    net: Any = made(name).net
    large = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000]
    assert large
    for conv in large:
        wanted = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert float(conv.weight.detach().std()) == pytest.approx(wanted, rel=0.05)
        assert conv.bias is None or not conv.bias.any()
    if name in ("vgg8", "mobilenetv2"):
        assert float(net.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "vgg8" else pytest.mark.slow) for name in KINDS]
)
def test_a_traced_graph_answers_as_the_network_does(name: str) -> None:
    model = made(name)
    images = list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    program = trace(model, Batch.of(model, images[:3], images[:4]), name).module()
    for count in (1, 3, 5):
        batch = model.input.collate(images[:count])
        torch.testing.assert_close(program(batch), model(batch), atol=1e-5, rtol=1e-4)


def test_wrn_takes_depth_and_width() -> None:
    torch.manual_seed(0)
    named = fingerprint(load_model("softcache:wrn40_1", num_classes=3, input_shape=(8, 8)))
    torch.manual_seed(0)
    said = load_model("softcache:wrn?depth=40&width=1&mean=0.25", num_classes=3, input_shape=(8, 8))
    assert fingerprint(said) == named
    assert said.input.describe()["mean"] == [0.25]
    assert sum(p.numel() for p in shapes_only("wrn").parameters()) == COUNTS["wrn16_2"]


def test_a_full_mobilenet_is_torchvision_s_and_one_convolution() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.mobilenet_v2(num_classes=100)
        ours = load_model("softcache:mobilenetv2?width=1", num_classes=100, device="meta")
        wider: Any = load_model("softcache:mobilenetv2?width=1.25", num_classes=100, device="meta").net
    first = 32 * 32 + 2 * 32  # the 1x1 convolution of the first block, and its BatchNorm
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + first
    assert (wider.classifier.in_features, wider.blocks[1][0].conv[-1].num_features) == (1600, 30)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wrn?depth=20", "depth=20, width=2"),
        ("wrn?depth=4", "depth=4, width=2"),
        ("wrn?width=0", "depth=16, width=0"),
        ("mobilenetv2?width=0.05", "at least 1/16, got 0.05"),
        ("mobilenetv2?width=inf", "at least 1/16, got inf"),
        ("mobilenetv2?width=nan", "at least 1/16, got nan"),
        ("vgg8?in_channels=0", "in_channels must be at least 1"),
    ],
)
def test_networks_that_cannot_be_built(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(f"softcache:{spec}", num_classes=3)


def test_layers_are_named_as_in_published_weights() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def stages(blocks: tuple[int, ...], convs: int) -> set[str]:
        names = [f"layer{i + 1}.{j}." for i, n in enumerate(blocks) for j in range(n)]
        found = {f"{block}conv{k + 1}.weight" for block in names for k in range(convs)}
        found |= {f"{block}bn{k + 1}.{tensor}" for block in names for k in range(convs) for tensor in norm}
        return found | {"conv1.weight", *(f"bn1.{tensor}" for tensor in norm), "linear.weight", "linear.bias"}

    assert set(shapes_only("shufflenetv1").state_dict()) == stages((4, 8, 4), 3)
    shortcuts = {f"layer{i}.0.shortcut.{n}" for i in (1, 2, 3, 4) for n in ("0.weight", *(f"1.{t}" for t in norm))}
    assert set(shapes_only("resnet50").state_dict()) == stages((3, 4, 6, 3), 3) | shortcuts
    vgg = {f"block{i}.{n}.{t}" for i in range(5) for n in (0, 3) for t in ("weight", "bias")}
    vgg |= {f"block{i}.{n}.{t}" for i in range(5) for n in (1, 4) for t in norm}
    assert set(shapes_only("vgg13").state_dict()) == vgg | {"classifier.weight", "classifier.bias"}


# ----------------------------------------------------------------------------- what they compute, layer by layer, float64


def settled(block: nn.Module) -> Any:
    """In float64 and eval mode, with every number of a BatchNorm drawn."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert isinstance(tensor, Tensor)
                nn.init.uniform_(tensor, 0.2, 1.0)
    return block.double().eval()


def conv(x: Tensor, layer: Any, stride: int = 1) -> Tensor:
    """A bias-free convolution that keeps the size at stride 1; a filter of one input channel is depthwise."""
    groups = x.shape[1] // layer.weight.shape[1]
    return F.conv2d(x, layer.weight, stride=stride, padding=layer.weight.shape[2] // 2, groups=groups)


def norm(x: Tensor, layer: Any) -> Tensor:
    scale = layer.weight / (layer.running_var + 1e-5).sqrt()
    return x * scale[:, None, None] + (layer.bias - layer.running_mean * scale)[:, None, None]


def normal(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 1, shape))


def wrn_oracle(b: Any, x: Tensor, stride: int) -> Tensor:
    active = norm(x, b.bn1).relu()
    residual = conv(norm(conv(active, b.conv1, stride), b.bn2).relu(), b.conv2)
    return residual + (x if b.shortcut is None else conv(active, b.shortcut, stride))


def inverted_oracle(b: Any, x: Tensor, stride: int) -> Tensor:
    wide = norm(conv(x, b.conv[0]), b.conv[1]).relu()
    y = norm(conv(norm(conv(wide, b.conv[3], stride), b.conv[4]).relu(), b.conv[6]), b.conv[7])
    return y + x if x.shape == y.shape else y


def shuffled(x: Tensor, groups: int) -> Tensor:
    per_group = x.shape[1] // groups
    return torch.stack([x[:, g * per_group + i] for i in range(per_group) for g in range(groups)], 1)


def unit_v1_oracle(b: Any, x: Tensor, stride: int) -> Tensor:
    y = shuffled(norm(conv(x, b.conv1), b.bn1).relu(), 3 if x.shape[1] > 24 else 1)
    y = norm(conv(norm(conv(y, b.conv2, stride), b.bn2).relu(), b.conv3), b.bn3)
    return (y + x if stride == 1 else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1)).relu()


def unit_v2_oracle(b: Any, x: Tensor, stride: int) -> Tensor:
    half = x.shape[1] // 2
    left, right = (x[:, :half], x[:, half:]) if stride == 1 else (x, x)
    if stride == 2:
        left = norm(conv(norm(conv(left, b.left[0], 2), b.left[1]), b.left[2]), b.left[3]).relu()
    right = norm(conv(right, b.right[0]), b.right[1]).relu()
    right = norm(conv(norm(conv(right, b.right[3], stride), b.right[4]), b.right[5]), b.right[6]).relu()
    return shuffled(torch.cat([left, right], 1), 2)


@pytest.mark.parametrize(
    ("block", "oracle", "c_in", "c_out", "stride"),
    [
        pytest.param(PreactivationBlock, wrn_oracle, 6, 6, 1, id="wrn same"),
        pytest.param(PreactivationBlock, wrn_oracle, 6, 8, 1, id="wrn wider"),
        pytest.param(PreactivationBlock, wrn_oracle, 6, 8, 2, id="wrn halves"),
        pytest.param(lambda *sizes: InvertedResidual(*sizes, 6), inverted_oracle, 4, 4, 1, id="inverted same"),
        pytest.param(lambda *sizes: InvertedResidual(*sizes, 6), inverted_oracle, 4, 5, 1, id="inverted wider"),
        pytest.param(lambda *sizes: InvertedResidual(*sizes, 1), inverted_oracle, 4, 4, 2, id="inverted halves"),
        pytest.param(UnitV1, unit_v1_oracle, 24, 60, 2, id="v1 first"),
        pytest.param(UnitV1, unit_v1_oracle, 48, 96, 2, id="v1 halves"),
        pytest.param(UnitV1, unit_v1_oracle, 48, 48, 1, id="v1 same"),
        pytest.param(UnitV2, unit_v2_oracle, 6, 8, 2, id="v2 halves"),
        pytest.param(UnitV2, unit_v2_oracle, 8, 8, 1, id="v2 same"),
    ],
)
def test_a_block_is_its_formula(
    block: Callable[..., nn.Module], oracle: Any, c_in: int, c_out: int, stride: int
) -> None:
    torch.manual_seed(0)
    made_block, x = settled(block(c_in, c_out, stride)), normal(2, c_in, 7, 6)
    y = made_block(x)
    assert y.shape == (2, c_out, *((7, 6) if stride == 1 else (4, 3)))
    torch.testing.assert_close(y, oracle(made_block, x, stride), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("c_in", "stride"), [(8, 1), (32, 1), (32, 2)])
def test_a_bottleneck_is_torchvision_s(c_in: int, stride: int) -> None:
    torch.manual_seed(0)
    ours, x = settled(Bottleneck(c_in, 8, stride)), normal(2, c_in, 7, 6)
    changes = stride == 2 or c_in != 32
    down = nn.Sequential(nn.Conv2d(c_in, 32, 1, stride, bias=False), nn.BatchNorm2d(32)) if changes else None
    theirs = torchvision.models.resnet.Bottleneck(c_in, 8, stride, down).double().eval()
    theirs.load_state_dict({name.replace("shortcut", "downsample"): value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_channels_are_shuffled_as_drawn() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1).expand(2, 6, 3, 2)
    assert channel_shuffle(x, 2)[1, :, 2, 1].tolist() == [0, 3, 1, 4, 2, 5]
    assert channel_shuffle(x, 3)[0, :, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]


def resnet50_oracle(n: Any, x: Tensor) -> Tensor:
    x = n.layer4(n.layer3(n.layer2(n.layer1(norm(conv(x, n.conv1), n.bn1).relu()))))
    return n.linear(x.mean((2, 3)))


def wide_oracle(n: Any, x: Tensor) -> Tensor:
    x = n.block3(n.block2(n.block1(conv(x, n.conv1))))  # no BatchNorm behind the stem
    return n.fc(norm(x, n.tail.bn1).relu().mean((2, 3)))


def vgg_oracle(n: Any, x: Tensor) -> Tensor:
    for i, block in enumerate((n.block0, n.block1, n.block2, n.block3, n.block4)):
        for at in range(0, len(block), 3):
            x = conv(x, block[at]) + block[at].bias[:, None, None]
            x = norm(x, block[at + 1]).relu()
        x = F.max_pool2d(x, 2) if i < 3 else x
    return n.classifier(x.mean((2, 3)))


def mobilenet_oracle(n: Any, x: Tensor) -> Tensor:
    x = norm(conv(x, n.conv1[0], 2), n.conv1[1]).relu()
    for row in range(7):
        x = n.blocks[row](x)
    return n.classifier(norm(conv(x, n.tail.conv2), n.tail.bn2).relu().mean((2, 3)))


def shufflenet_oracle(n: Any, x: Tensor) -> Tensor:
    x = n.layer3(n.layer2(n.layer1(norm(conv(x, n.conv1), n.bn1).relu())))
    if hasattr(n, "tail"):
        x = norm(conv(x, n.tail.conv2), n.tail.bn2).relu()
    return n.linear(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("wrn16_2", wide_oracle),
        ("vgg8", vgg_oracle),
        ("vgg13", vgg_oracle),
        ("mobilenetv2", mobilenet_oracle),
        ("shufflenetv1", shufflenet_oracle),
        ("shufflenetv2", shufflenet_oracle),
        ("resnet50", resnet50_oracle),
    ],
)
def test_a_network_is_its_parts_in_order(name: str, oracle: Callable[[Any, Tensor], Tensor]) -> None:
    net, x = made(name).net, torch.rand(2, 3, 17, 16)
    with torch.no_grad():
        logits = net(x)
        torch.testing.assert_close(logits, oracle(net, x), rtol=1e-3, atol=1e-4 * float(logits.std()))
    assert logits.std() > 1e-3  # there is something to compare


def test_the_tables_know_every_network() -> None:
    assert set(COUNTS) == set(MAP_ENDS) <= set(MODELS)
    assert not set(MODELS) - set(COUNTS) - {
        "mlp", "cnn", "resnet14", "resnet44", "wrn", "textcnn", "encoder", "tagger", "encoder_tagger",
    }  # fmt: skip

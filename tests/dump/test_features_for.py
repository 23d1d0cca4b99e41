"""dump --for: every loss gets the cheapest features that serve it, and the trainer then finds them by itself."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORLDS
from torch import Tensor, nn

import softcache
from softcache import cli, dump, train
from softcache.codecs import make_codec
from softcache.config import DumpConfig, TrainConfig
from softcache.dump.features_for import features_for
from softcache.dump.open_teachers import open_teacher
from softcache.dump.teacher import Teacher
from softcache.errors import LossError, SoftcacheError
from softcache.features.taps import classifier_feature, classifier_of, map_ends
from softcache.losses import CLASSIFIER, LOSSES, make_term
from softcache.models import load_model, save_student
from softcache.train.pairs import Student, pairs_of

LAYERED = [name for name, loss in LOSSES.items() if loss.has_features]
ON_VECTORS = [name for name in LAYERED if LOSSES[name].layers == CLASSIFIER]
ON_MAPS = [name for name in LAYERED if CLASSIFIER not in LOSSES[name].features]
SMALL = {"crd": "crd:negatives=8,width=4", "reviewkd": "reviewkd:width=8"}

Find = Callable[..., list[str]]


# kind -> teacher, size of its images, another student, one of the same widths
KINDS = {
    "cnn": ("softcache:cnn?width=8", 16, "softcache:cnn?width=4", "softcache:cnn?width=8"),
    "resnet8": ("softcache:resnet8", 16, "softcache:cnn?width=4", "softcache:resnet8"),
    "wrn": ("softcache:wrn?depth=10", 16, "softcache:cnn?width=4", "softcache:wrn?depth=10"),
    "mobilenet": ("torchvision:mobilenet_v3_small", 32, "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small"),
    "vit": ("{user}:vit", 16, "{user}:vit?width=4", "{user}:vit"),
    "mlp": ("softcache:mlp?hidden=16,12", 16, "softcache:mlp?hidden=10", "softcache:mlp?hidden=16,12"),
    "text": ("softcache:textcnn", 0, "softcache:textcnn?width=4", "softcache:textcnn"),
    "no_head": ("{user}:no_head", 16, "softcache:cnn?width=4", ""),
    "probabilities": ("{user}:probabilities", 16, "", ""),
    "functional": ("{user}:functional", 16, "softcache:cnn?width=4", ""),
}  # fmt: skip


class World:
    """A folder with data and teachers: `data(kind)`, `teacher(kind)`, made once."""

    def __init__(self, path: Path) -> None:
        self.path, self.user = path, path / "user.py"
        shutil.copy(WORLDS / "unknown_networks.py", self.user)
        draw = np.random.default_rng(0)
        words = (" ".join(draw.choice(list("abcdefgh"), 6)) for _ in range(24))
        (path / "texts.tsv").write_text("".join(f"{text} {'xyz'[i % 3]}\t{i % 3}\n" for i, text in enumerate(words)))

    def data(self, kind: str) -> str:
        size = KINDS[kind][1]
        return f"{self.user}:images?size={size}" if size else f"tsv:{self.path / 'texts.tsv'}"

    def teacher(self, kind: str) -> str:
        spec = KINDS[kind][0].format(user=self.user)
        if spec.startswith(str(self.user)):
            return spec
        run = self.path / kind
        if not run.exists():
            run.mkdir()
            torch.manual_seed(0)
            size = KINDS[kind][1]
            model = load_model(
                spec, num_classes=3, input_shape=(size, size, 3) if size else None, vocabulary=tuple("abcdefghxyz")
            )
            save_student(model, run / "student.safetensors", metadata={})
        return str(run)

    def student(self, kind: str, *, same: bool = False) -> str:
        return KINDS[kind][3 if same else 2].format(user=self.user)

    def opened(self, kind: str) -> tuple[Teacher, Any]:
        """The teacher, and a collated batch of 4."""
        size = KINDS[kind][1]
        teacher = open_teacher(
            self.teacher(kind), taken=[], num_classes=3, class_names=[], multi_label=False,
            input_shape=(size, size, 3) if size else None, device="cpu", autocast=None,
        )  # fmt: skip
        draw = np.random.default_rng(0)
        images = [draw.integers(0, 256, (size, size, 3)).astype(np.uint8) for _ in range(4)]
        return teacher, teacher.collate(images if size else ["a b c d e f", "b", "c d", "x y z"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def find(world: World) -> Find:
    """find(kind, *losses, codec=...) -> the features that --for would store."""

    def call(kind: str, *losses: str, codec: str = "float16") -> list[str]:
        teacher, batch = world.opened(kind)
        name, _, setting = codec.partition(":")
        key, _, value = setting.partition("=")
        return features_for(losses, teacher, batch, make_codec(name, {key: value} if key else {}, 3))

    return call


def dumped(world: World, kind: str, out: Path, **settings: Any) -> softcache.Cache:
    config = DumpConfig(
        data=world.data(kind), teacher=(world.teacher(kind),), out=str(out), threads=1, workers=0, **settings
    )
    return softcache.open(dump.run(config, quiet=True).path)


def trained(world: World, kind: str, cache: softcache.Cache, loss: str, out: Path) -> train.TrainResult:
    """One epoch of a student of another kind, no layer named; of the same where the loss asks for equal widths."""
    config = TrainConfig(
        cache=str(cache.reader.path), data=world.data(kind), student=world.student(kind, same=loss in ("fsp", "fsp_average")),
        loss=(SMALL.get(loss, loss),), epochs=1, batch_size=12, out=str(out), threads=1, workers=0,
    )  # fmt: skip
    return train.run(config, quiet=True)


# ------------------------------------------------------------------------------------------ the trainer finds them by itself


def refusal(kind: str, loss: str) -> str:
    """Why this teacher cannot serve this loss; "" where it can."""
    if loss in ("mse", "huber"):
        return "it is of teachers that give an embedding or values"
    if kind in ("vit", "mlp", "text") and loss in ON_MAPS:
        return "no modules that give maps"
    return ""


def works(world: World, kind: str, loss: str, tmp_path: Path) -> None:
    wanted = refusal(kind, loss)
    if wanted:
        with pytest.raises(LossError, match=f"--for {loss}: .*{wanted}"):
            dumped(world, kind, tmp_path / "cache", for_=(loss,))
        assert not (tmp_path / "cache").exists()
        return
    cache = dumped(world, kind, tmp_path / "cache", for_=(loss,))
    found = trained(world, kind, cache, loss, tmp_path / "run")
    assert np.isfinite(found.metrics[-1][loss])


@pytest.mark.parametrize("loss", LAYERED)
def test_after_dump_for_a_loss_it_trains_without_naming_layers(loss: str, world: World, tmp_path: Path) -> None:
    works(world, "cnn", loss, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LAYERED)
@pytest.mark.parametrize("kind", ["resnet8", "mobilenet", "vit", "mlp", "text"])
def test_of_every_kind_of_teacher(kind: str, loss: str, world: World, tmp_path: Path) -> None:
    works(world, kind, loss, tmp_path)


def paired(
    world: World, kind: str, cache: softcache.Cache, loss: str, *, same: bool
) -> list[tuple[str, tuple[str, ...]]]:
    """(layer of the teacher, layers of the student) that a loss compares by default."""
    size = KINDS[kind][1]
    model = load_model(world.student(kind, same=same), num_classes=3, input_shape=(size, size, 3))
    items = [np.zeros((size, size, 3), np.uint8)] * 2
    student = Student(model.net, model.input.prepare(model.input.collate(items)))
    pairs = pairs_of(make_term(loss), cache, cache.members, student)
    return [(pair.stored.rpartition(":")[0], pair.student) for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet8", "vit"])
def test_one_dump_for_all_losses_serves_each(kind: str, world: World, find: Find, tmp_path: Path) -> None:
    """Features stored for one loss do not mislead another: each finds what it would have found alone."""
    wanted = [name for name in LAYERED if not refusal(kind, name)]
    together = dumped(world, kind, tmp_path / "all", for_=tuple(wanted))
    for name in wanted:
        layers = [feature.rpartition(":")[0] for feature in find(kind, name)]
        on_vector = LOSSES[name].layers == CLASSIFIER or layers == ["norm"]
        own = [(CLASSIFIER,) if on_vector else tuple(layer.split("+")) for layer in layers]
        assert paired(world, kind, together, name, same=True) == list(zip(layers, own, strict=True)), name


@pytest.mark.slow
def test_the_middle_stays_the_middle_where_other_layers_are_stored_too(world: World, tmp_path: Path) -> None:
    both = dumped(world, "resnet8", tmp_path / "both", for_=("simkd", "fitnet"))
    assert list(both.features[both.members[0]]) == ["layer2:map", "layer3:map"]
    assert paired(world, "resnet8", both, "fitnet", same=False) == [("layer2", ("6",))]
    assert paired(world, "resnet8", both, "simkd", same=False) == [("layer3", ("10",))]
    four = dumped(world, "mobilenet", tmp_path / "four", for_=("fitnet", "vid"))
    assert paired(world, "mobilenet", four, "fitnet", same=False) == [("features.1", ("maxpool",))]
    by_hand = dumped(world, "cnn", tmp_path / "by_hand", features=("10", "2", "6"))  # in any order: early to late
    assert paired(world, "cnn", by_hand, "vid", same=False) == [("2", ("2",)), ("6", ("6",)), ("10", ("10",))]


def test_simkd_takes_the_map_that_the_classifier_pools(world: World, tmp_path: Path) -> None:
    """Behind the last block of a wide ResNet stand a BatchNorm and a ReLU: its classifier takes the average of theirs."""
    cache = dumped(world, "wrn", tmp_path / "wrn", for_=("simkd", "vid"))
    (member,) = cache.members
    assert list(cache.features[member]) == ["block1:map", "block2:map", "block3:map", "tail.relu:map"]
    assert paired(world, "wrn", cache, "simkd", same=True) == [("tail.relu", ("tail.relu",))]
    assert paired(world, "wrn", cache, "simkd", same=False) == [("tail.relu", ("10",))]
    blocks = ["block1", "block2", "block3"]
    assert paired(world, "wrn", cache, "vid", same=True) == [(block, (block,)) for block in blocks]
    rows = np.arange(len(cache))
    targets = cache.gather(rows, np.zeros_like(rows), features=["block3:map", "tail.relu:map"])
    head = cache.classifier(member)
    assert head is not None and head[1] is not None
    logits = targets.feature("tail.relu:map").mean(dim=(2, 3)) @ head[0].T + head[1]
    torch.testing.assert_close(logits, targets.logits(), rtol=2e-3, atol=2e-3)
    before = targets.feature("block3:map").mean(dim=(2, 3)) @ head[0].T + head[1]
    assert (before - targets.logits()).abs().max() > 10 * (logits - targets.logits()).abs().max()


# ------------------------------------------------------------------------------------------------------------ what is stored

STORED = [
    ("cnn", "hint", ["12:flatten"]),
    ("cnn", "at", ["2:attention", "6:attention", "10:attention"]),
    ("cnn", "fitnet", ["6:map"]),
    ("cnn", "sp", ["10:flatten"]),
    ("cnn", "fsp", ["2+6:fsp", "6+10:fsp"]),
    ("cnn", "fsp_average", ["2:map", "6:map", "10:map"]),
    ("cnn", "ickd", ["10:gram"]),
    ("cnn", "simkd", ["10:map"]),
    ("wrn", "simkd", ["tail.relu:map"]),
    ("wrn", "at", ["block1:attention", "block2:attention", "block3:attention"]),
    ("resnet8", "crd", ["avgpool:flatten"]),
    ("resnet8", "ab", ["layer1:sign", "layer2:sign", "layer3:sign"]),
    ("resnet8", "fitnet", ["layer2:map"]),
    ("mobilenet", "srrl", ["classifier.2:flatten"]),
    ("mobilenet", "nst", [f"features.{i}:spatial_gram" for i in (0, 1, 3, 8)]),
    ("mobilenet", "simkd", ["classifier.2:flatten"]),  # a layer stands between its last map and its classifier
    ("vit", "rkd_angle", ["norm:cls"]),
    ("vit", "sp", ["norm:cls"]),
    ("mlp", "hint", ["3:flatten"]),
    ("mlp", "simkd", ["3:flatten"]),
    ("text", "pkt", ["dropout:flatten"]),
    ("no_head", "at", ["conv1:attention", "conv2:attention"]),
    ("no_head", "sp", ["conv2:flatten"]),
    ("functional", "at", ["conv:attention"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "loss", "features"), STORED, ids=[f"{kind}-{loss}" for kind, loss, _ in STORED])
def test_what_a_loss_gets(kind: str, loss: str, features: list[str], find: Find) -> None:
    assert find(kind, loss) == features


def test_losses_on_logits_need_nothing_more(find: Find) -> None:
    on_logits = [name for name, loss in LOSSES.items() if loss.needs("teacher_logits") and not loss.has_features]
    assert len(on_logits) > 8
    assert find("cnn", *on_logits) == []
    assert find("cnn", "kd_lower_bound", codec="topk:k=2") == []


def test_several_losses_get_the_union_and_nothing_twice(find: Find) -> None:
    both = find("cnn", "at", "crd", "dkd")
    assert both == [*find("cnn", "at"), *find("cnn", "crd"), *find("cnn", "dkd")]
    assert find("cnn", "crd", "at", "hint", "at") == both  # whatever the order: early to late
    assert find("cnn", "fitnet", "vid", "reviewkd") == ["2:map", "6:map", "10:map"]
    assert find("cnn", "sp", "simkd") == find("cnn", "simkd") == ["10:map"]  # not the same numbers twice
    assert find("cnn", "sp", "fitnet") == ["6:map", "10:flatten"]


def test_linear_head_keeps_the_vectors_already(find: Find, world: World, tmp_path: Path) -> None:
    assert find("cnn", *(loss for loss in ON_VECTORS if loss not in ("mse", "huber")), codec="linear_head") == []
    assert find("cnn", "crd", "at", codec="linear_head") == find("cnn", "at")
    assert find("mlp", "sp", "simkd", codec="linear_head") == []
    cache = dumped(world, "cnn", tmp_path / "cache", for_=("hint", "srrl"), codec="linear_head")
    assert cache.features[cache.members[0]] == {}
    for loss in ("hint", "srrl"):
        assert np.isfinite(trained(world, "cnn", cache, loss, tmp_path / loss).metrics[-1][loss])


def test_features_that_are_asked_for_too_are_stored_once(world: World, tmp_path: Path) -> None:
    cache = dumped(world, "cnn", tmp_path / "cache", features=("10", "2:attention"), for_=("at", "simkd"))
    assert list(cache.features[cache.members[0]]) == ["10:map", "2:attention", "6:attention", "10:attention"]
    for loss in ("at", "simkd"):
        assert np.isfinite(trained(world, "cnn", cache, loss, tmp_path / loss).metrics[-1][loss])


ALTERNATIVES = {
    "hint": ["12:map", "10:map"],
    "at": ["2:map,6:map,10:map"],
    "sp": ["10:map"],
    "nst": ["2:map,6:map,10:map"],
    "ab": ["2:map,6:map,10:map"],
    "ickd": ["10:map"],
    "simkd": ["10:map"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("loss", ALTERNATIVES)
def test_it_is_the_cheapest(loss: str, world: World, tmp_path: Path) -> None:
    """No more bytes a record than any other features from which the loss gives the same."""

    def nbytes(**settings: Any) -> int:
        cache = dumped(world, "cnn", tmp_path / f"cache{len(list(tmp_path.iterdir()))}", **settings)
        arrays = {name for feature in cache.features[cache.members[0]].values() for name in feature.names.values()}
        kinds = cache.reader.array_kinds(cache.members[0])
        return sum(np.dtype(kinds[name][0]).itemsize * prod(kinds[name][1]) for name in arrays)

    chosen = nbytes(for_=(loss,))
    for other in ALTERNATIVES[loss]:
        assert 0 < chosen <= nbytes(features=(other,))


def test_dump_prints_what_it_costs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "dump",
        "--data",
        world.data("cnn"),
        "--teacher",
        world.teacher("cnn"),
        "--out",
        str(tmp_path / "cache"),
    ]
    assert cli.main([*arguments, "--for", "at,crd,dkd", "--threads", "1", "--workers", "0"]) == 0
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    rows = {line[1]: line[-3] for line in lines if line[:1] == ["cnn"]}
    # two bytes a number, and two for the error of each record
    assert rows == {
        "float16": "8",
        "2:attention": "514",
        "6:attention": "130",
        "10:attention": "34",
        "12:flatten": "66",
    }


# ------------------------------------------------------------------------------------------------------------------ refused

REFUSED = [
    ("cnn", "float16", "cdr", r"--for cdr: unknown loss[\s\S]*'crd'"),
    ("cnn", "float16", "ce", "--for ce: it learns from hard labels alone"),
    ("cnn", "float16", "tf_virtual", "--for tf_virtual: it learns from hard labels alone"),
    ("cnn", "topk:k=2", "dkd", r"--for dkd: it needs the logits of every class[\s\S]*headtail"),
    ("cnn", "float16", "kd_lower_bound", r"--for kd_lower_bound: .* codec 'float16' keeps all[\s\S]*topk"),
    ("probabilities", "float16", "mse_logits", r"--for mse_logits: it needs the level .* gives probs[\s\S]*kd"),
    ("vit", "float16", "at", r"--for at: teacher 'vit' has no modules that give maps[\s\S]*vectors"),
    ("functional", "float16", "fsp", r"--for fsp: teacher 'functional' has maps of one size only \(conv\)"),
    ("functional", "float16", "fsp_average", r"--for fsp_average: teacher 'functional' has maps of one size only"),
    ("functional", "float16", "crd", r"--for crd: no module .* the input of its final linear layer[\s\S]*linear_head"),
    ("no_head", "float16", "hint", r"--for hint: teacher 'no_head' has no final nn.Linear[\s\S]*--features"),
    ("no_head", "float16", "srrl", r"--for srrl: it needs the teacher's classifier"),
    ("no_head", "float16", "simkd", r"--for simkd: it needs the teacher's classifier"),
]


@pytest.mark.parametrize(("kind", "codec", "loss", "message"), REFUSED, ids=[f"{c[0]}-{c[2]}" for c in REFUSED])
def test_refused(kind: str, codec: str, loss: str, message: str, find: Find) -> None:
    with pytest.raises(SoftcacheError, match=message):
        find(kind, "soft_ce" if codec == "float16" else "kd_lower_bound", loss, codec=codec)


def test_the_way_out_that_a_refusal_names_works(world: World, tmp_path: Path) -> None:
    cache = dumped(world, "functional", tmp_path / "cache", for_=("hint",), codec="linear_head")
    assert np.isfinite(trained(world, "functional", cache, "hint", tmp_path / "run").metrics[-1]["hint"])


# ---------------------------------------------------------------------------------------------------------------- the stages


def stage_names(net: nn.Module, inputs: Tensor) -> list[str]:
    return [module.name for module in map_ends(net, inputs)]


MAP_ENDS = [
    ("softcache:resnet8", 32, ["layer1", "layer2", "layer3"], "avgpool:flatten"),
    ("softcache:resnet20", 32, ["layer1", "layer2", "layer3"], "avgpool:flatten"),
    ("softcache:cnn", 16, ["2", "6", "10"], "12:flatten"),
    ("softcache:cnn", 4, ["2", "6"], "12:flatten"),  # the last map has one position
    ("torchvision:resnet18", 64, ["layer1", "layer2", "layer3", "layer4"], "avgpool:flatten"),
    ("torchvision:mobilenet_v2", 64, ["features.3", "features.6", "features.13", "features"], "classifier.0:flatten"),
    ("torchvision:shufflenet_v2_x0_5", 64, ["maxpool", "stage2", "stage3", "conv5"], "conv5:pool"),
    ("torchvision:swin_t", 64, ["features.0.0", "permute"], "flatten:flatten"),  # channels last in between
    ("timm:test_efficientnet", 64, ["blocks.1", "blocks.2", "blocks.3", "bn2"], "global_pool:flatten"),
    ("timm:maxvit_pico_rw_256?img_size=64", 64, ["stages.0", "stages.1", "stages.2", "norm"], "head.drop:flatten"),
    ("timm:test_vit?img_size=64", 64, [], "head_drop:flatten"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "size", "stages", "head"), MAP_ENDS, ids=[f"{case[0]}-{case[1]}" for case in MAP_ENDS]
)
def test_stages_and_the_input_of_the_head(spec: str, size: int, stages: list[str], head: str) -> None:
    torch.manual_seed(0)
    net = load_model(spec, num_classes=5, input_shape=(size, size, 3)).net.eval()
    images = torch.randn(2, 3, size, size)
    assert stage_names(net, images) == stages
    linear = classifier_of(net, images)
    assert linear is not None
    assert str(classifier_feature(net, images, linear)) == head


def test_a_stage_ends_outside_the_block_that_reduces_it() -> None:
    """As the expansion of an inverted residual does not: it is no map that the rest of the network goes through."""
    net = torchvision.models.mobilenet_v3_small(num_classes=5)
    stages = map_ends(net, torch.randn(2, 3, 64, 64))
    assert [(one.name, one.shape and one.shape[1:]) for one in stages] == [
        ("features.1", (16, 16, 16)), ("features.3", (24, 8, 8)), ("features.8", (48, 4, 4)), ("features", (576, 2, 2))
    ]  # fmt: skip


class Shared(nn.Module):
    """An activation for all maps, one for all vectors, and pooling by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.act(self.a(x)))).mean(dim=(2, 3))
        return self.fc(self.act2(self.hidden(self.act2(x))))


def test_a_module_that_is_called_twice_is_no_stage_and_no_feature() -> None:
    torch.manual_seed(0)
    net, images = Shared(), torch.randn(2, 3, 16, 16)
    assert stage_names(net, images) == ["a", "b"]
    assert classifier_of(net, images) is net.fc
    assert classifier_feature(net, images, net.fc) is None  # `act2` gives it, at its second call


class Decoder(nn.Module):
    """Down and up again, with a table for the batch on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up = nn.Upsample(scale_factor=3)
        self.table = nn.Conv2d(3, 2, 5, 5)
        self.pool, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.table(x[:1])  # its first axis is not the batch
        return self.fc(self.pool(self.up(self.down2(self.down1(x)))))


def test_larger_maps_and_other_first_axes_are_no_stages() -> None:
    torch.manual_seed(0)
    assert stage_names(Decoder(), torch.randn(3, 3, 16, 16)) == ["down1", "down2"]


def test_looking_for_stages_leaves_the_network_as_it_was() -> None:
    net = load_model("softcache:resnet8", num_classes=3, input_shape=(16, 16, 3)).net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    map_ends(net, torch.randn(4, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in net.modules())


# ------------------------------------------------------------------------------------------------------------- softcache losses

Printed = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """printed("losses", "dkd") -> what it prints; the exit code must be 0."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    return call


def test_the_list_names_every_loss_once_and_fits_a_terminal(printed: Printed) -> None:
    lines = printed("losses").splitlines()
    assert max(map(len, lines)) <= 130
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("softcache losses"))]
    assert sorted(line.split()[0] for line in table[2:] if line and not line.startswith("on ")) == sorted(LOSSES)
    group = ""
    for line in table[2:]:
        if line.startswith("on "):
            group = line
        elif line:
            name, loss = line.split()[0], LOSSES[line.split()[0]]
            words = (
                "vector"
                if loss.has_features and loss.layers == CLASSIFIER
                else "maps"
                if loss.has_features
                else "labels alone"
            )
            assert (words in group) == (loss.has_features or not loss.has_teacher), name
            assert ("hard labels" in group) == (loss.needs("labels") and not loss.has_features), name
            assert all(key in line for key in loss.defaults), name
            if loss.has_features and loss.layers != CLASSIFIER:
                assert (
                    f"{loss.features[0]}, {loss.layers.replace('_', ' ')}" in line
                )  # which reduction of which layers is stored


@pytest.mark.parametrize("name", LOSSES)
def test_each_is_explained(name: str, printed: Printed) -> None:
    text, loss = printed("losses", name), LOSSES[name]
    told = loss.function.__doc__ or ""
    assert told.strip().splitlines()[0] in text
    assert loss.source in text
    # the term as it is printed is one that the trainer takes, and its settings are the defaults
    (term,) = re.findall(rf"--loss {name}:weight=W(\S*)", text)
    given = dict(part.split("=") for part in term.strip(",").split(",") if part)
    assert make_term(name, **given).describe() == make_term(name).describe()
    assert given.keys() == loss.defaults.keys()
    assert all(f"\n{key} " in text for key in loss.inputs)
    assert ("softcache dump " in text) == ("--cache CACHE" in text) == loss.has_teacher


@pytest.mark.parametrize("name", ["dkd", "at", "srrl", "kd_lower_bound", "ce"])
def test_the_commands_that_it_prints_work(name: str, printed: Printed, world: World, tmp_path: Path) -> None:
    text = printed("losses", name)
    known = {"DATA": world.data("cnn"), "TEACHER": world.teacher("cnn"), "MODEL": world.student("cnn")}
    known |= {"CACHE": str(tmp_path / "cache"), "RUN": str(tmp_path / "run")}
    for verb in ("dump", "train"):
        found = re.search(rf"^{verb} +(softcache {verb} .*?[^\\])$", text, re.M | re.S)
        if found is None:
            assert verb == "dump" and name == "ce"
            continue
        command = found[1].replace("\\\n", " ").replace("weight=W", "weight=1")
        if "topk" in command:
            command = command.replace("k=10", "k=2")  # of three classes
        arguments = [known.get(word, word) for word in shlex.split(command)[1:]]
        printed(*arguments, "--threads", "1", "--workers", "0", *(["--epochs", "1"] if verb == "train" else []))
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_losses_for_machines(printed: Printed) -> None:
    entries = json.loads(printed("losses", "--json"))
    assert [one["name"] for one in entries] == list(LOSSES)
    for one in entries:
        loss = LOSSES[one["name"]]
        signature = inspect.signature(loss.function)
        if isinstance(loss.function, type):
            forward = inspect.signature(loss.function.forward)
            parameters = [*signature.parameters.values(), *forward.parameters.values()]
        else:
            parameters = list(signature.parameters.values())
        assert one["settings"] == {p.name: p.default for p in parameters if p.default is not p.empty}
        assert one == json.loads(printed("losses", one["name"], "--json"))


def test_an_unknown_loss_is_refused_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["losses", "dkdd"]) == 2
    told = capsys.readouterr().err
    assert "unknown loss 'dkdd'" in told and "did you mean 'dkd' or 'kd'" in told

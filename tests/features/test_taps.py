"""Features: what hooks leave behind is what the module gave, reduced and stored as the formulas say, within the bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.codecs.features import FeatureCodec
from softcache.errors import CodecRangeError, ConfigError
from softcache.features import spec as features
from softcache.features.spec import REDUCTIONS, FeatureSpec, parse_features
from softcache.features.taps import ClassifierTap, Taps, classifier_of, list_modules, shapes_of
from softcache.models import load_model

MAP, TOKENS, VECTOR, VIDEO = (6, 5, 4), (7, 5), (9,), (3, 2, 4, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))  # float64


# ----------------------------------------------------------------------------------------------- oracles, NumPy float64


def max_pooled(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, C, height, width): cell i of n covers the positions from floor(i H / n) to ceil((i + 1) H / n)."""
    b, c, h, w = x.shape
    out = np.empty((b, c, height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[:, :, i, j] = x[:, :, rows, columns].max(axis=(2, 3))
    return out


def unit_channels(x: np.ndarray) -> np.ndarray:
    """(B, C, HW) with every channel of length 1; one of zeros stays so."""
    rows = x.reshape(*x.shape[:2], -1)
    return rows / np.maximum(np.sqrt((rows**2).sum(axis=2, keepdims=True)), 1e-12)


def fsp_oracle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    height, width = min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3])
    x, y = max_pooled(x, height, width), max_pooled(y, height, width)
    return np.einsum("bchw,bdhw->bcd", x, y) / (height * width)


ORACLES: dict[str, Callable[..., np.ndarray]] = {
    "map": lambda x: x,
    "pool": lambda x: x.mean(axis=tuple(range(2, x.ndim))),
    "flatten": lambda x: x.reshape(len(x), -1),
    "cls": lambda x: x[:, 0, :],
    "mean_tokens": lambda x: x.sum(axis=1) / x.shape[1],
    "attention": lambda x: (x**2).sum(axis=1) / x.shape[1],
    "gram": lambda x: np.einsum("bchw,bdhw->bcd", x, x) / (x.shape[2] * x.shape[3]),
    "spatial_gram": lambda x: np.einsum("bci,bcj->bij", unit_channels(x), unit_channels(x)) / x.shape[1],
    "fsp": fsp_oracle,
    "sign": lambda x: np.where(x > 0, 1.0, 0.0),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A reduction, the record shapes it is made of, and what it is then stored as."""

    reduction: str
    shapes: tuple[tuple[int, ...], ...]
    record: tuple[int, ...]
    stored: str = field(default="")

    @property
    def spec(self) -> FeatureSpec:
        return FeatureSpec(tuple(f"layer{i}" for i in range(len(self.shapes))), self.reduction)

    @property
    def form(self) -> str:
        return self.stored or self.reduction

    def outputs(self, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [normal(count, *shape, seed=i).to(dtype) for i, shape in enumerate(self.shapes)]


CASES = [
    Case("map", (MAP,), MAP),
    Case("map", (TOKENS,), TOKENS),
    Case("map", (VECTOR,), VECTOR),
    Case("map", (VIDEO,), VIDEO),
    Case("pool", (MAP,), (6,)),
    Case("pool", (VIDEO,), (3,)),
    Case("pool", ((6, 1, 1),), (6,)),
    Case("flatten", (MAP,), (120,)),
    Case("flatten", (TOKENS,), (35,)),
    Case("cls", (TOKENS,), (5,)),
    Case("mean_tokens", (TOKENS,), (5,)),
    Case("attention", (MAP,), (5, 4)),
    Case("gram", (MAP,), (21,)),
    Case("gram", ((4, 1, 2),), (4, 1, 2), "map"),  # 10 against 8
    Case("gram", ((3, 1, 2),), (6,)),  # as many as the map has: the reduction
    Case("gram", ((7, 2, 2),), (28,)),  # 28 against 28, but 49 without the triangle
    Case("spatial_gram", ((16, 3, 2),), (21,)),
    Case("spatial_gram", (MAP,), MAP, "map"),  # 210 against 120
    Case("fsp", ((3, 8, 6), (4, 8, 6)), (3, 4)),
    Case("fsp", ((3, 8, 6), (4, 4, 3)), (3, 4)),
    Case("fsp", ((4, 4, 3), (3, 7, 5)), (4, 3)),
    Case("fsp", ((3, 9, 2), (4, 5, 4)), (3, 4)),
    Case("fsp", ((8, 2, 1), (6, 1, 2)), (28,), "map"),  # 48 against 16 + 12
    Case("sign", (MAP,), (15,)),
    Case("sign", (TOKENS,), (5,)),
    Case("sign", (VECTOR,), (2,)),
    Case("sign", ((1,),), (1,)),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.reduction} {c.shapes}".replace(" ", ""))


def test_every_reduction_has_an_oracle_and_a_case() -> None:
    assert set(ORACLES) == set(REDUCTIONS) == {case.reduction for case in CASES}


@over_cases
def test_a_reduction_is_its_formula(case: Case) -> None:
    outputs = case.outputs()
    wanted = ORACLES[case.reduction](*(x.numpy() for x in outputs))
    made = case.spec.reduce(*outputs)
    assert made.dtype == torch.float64 and made.shape == wanted.shape
    assert np.allclose(made.numpy(), wanted, rtol=1e-12, atol=1e-12)
    assert case.spec.reduced_shape(*case.shapes) == wanted.shape[1:]


@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_reduced_in_float32(case: Case, dtype: torch.dtype) -> None:
    outputs = case.outputs(dtype=dtype)
    wanted = ORACLES[case.reduction](*(x.double().numpy() for x in outputs))
    made = case.spec.reduce(*outputs)
    assert made.dtype == torch.float32
    assert np.allclose(made.numpy(), wanted, rtol=1e-5, atol=1e-5)


@over_cases
def test_autocast_does_not_reach_a_reduction(case: Case) -> None:
    outputs = case.outputs(dtype=torch.float32)
    outside = case.spec.reduce(*outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.spec.reduce(*outputs), outside)


@over_cases
def test_what_is_stored_reads_back_to_the_reduction(case: Case) -> None:
    outputs = case.outputs()
    stored = case.spec.store(*outputs)
    assert case.spec.stored(*case.shapes) == case.form
    assert tuple(stored.shape) == (3, *case.record) == (3, *case.spec.record_shape(*case.shapes))
    assert stored.dtype == (torch.uint8 if case.reduction == "sign" else torch.float64)
    wanted = ORACLES[case.reduction](*(x.numpy() for x in outputs))
    read = case.spec.read(stored, *case.shapes)
    assert read.shape == wanted.shape and np.allclose(read.numpy(), wanted, rtol=1e-12, atol=1e-12)
    if case.form == "map":
        assert np.array_equal(stored.flatten(1), np.concatenate([x.flatten(1) for x in outputs], axis=1))


@over_cases
def test_the_smaller_of_map_and_reduction_is_stored(case: Case) -> None:
    """By bytes in float16; sign bits are an eighth of a byte each, and a symmetric matrix is its triangle."""
    reduced = case.spec.reduced_shape(*case.shapes)
    numbers = reduced[0] * (reduced[0] + 1) // 2 if REDUCTIONS[case.reduction].symmetric else prod(reduced)
    of_reduction = -(-numbers // 8) if case.reduction == "sign" else 2 * numbers
    of_map = 2 * sum(prod(shape) for shape in case.shapes)
    codec = FeatureCodec("float16", case.form, case.spec.record_shape(*case.shapes))
    stored = sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in codec.arrays.values())
    assert stored == min(of_map, of_reduction)


def test_a_large_spatial_gram_is_weighed_without_being_made() -> None:
    assert FeatureSpec(("a",), "spatial_gram").stored((64, 224, 224)) == "map"  # the matrix would take 10 GB
    assert FeatureSpec(("a",), "gram").record_shape((2048, 7, 7)) == (2048, 7, 7)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_triangle_of_a_gram_round_trips(n: int) -> None:
    matrices = normal(4, n, n)
    matrices = matrices + matrices.mT
    triangles = features.upper_triangle(matrices)
    by_hand = np.stack([np.concatenate([m[i, i:] for i in range(n)]) for m in matrices.numpy()])
    assert np.array_equal(triangles, by_hand)
    assert torch.equal(features.from_upper_triangle(triangles, n), matrices)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1001])
def test_bits_are_packed_as_numpy_packs_them_from_the_lowest(n: int) -> None:
    x = normal(5, n)
    x[:, 0] = torch.tensor([0.0, -0.0, torch.inf, 1e-300, -1e-300])
    packed = features.pack_bits(features.sign(x))
    assert np.array_equal(packed.numpy(), np.packbits(x.numpy() > 0, axis=1, bitorder="little"))
    assert np.array_equal(features.unpack_bits(packed, (n,)).numpy(), (x.numpy() > 0).astype(np.float32))


FITS = {
    MAP: ["map", "pool", "flatten", "attention", "gram", "spatial_gram", "sign"],
    TOKENS: ["map", "flatten", "cls", "mean_tokens", "sign"],
    VECTOR: ["map", "flatten", "sign"],
    VIDEO: ["map", "pool", "flatten", "sign"],
}


@pytest.mark.parametrize("shape", FITS, ids=str)
@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS if name != "fsp"])
def test_a_misfit_names_the_module_its_shape_and_what_fits(reduction: str, shape: tuple[int, ...]) -> None:
    spec = FeatureSpec(("stage.3",), reduction)
    if reduction in FITS[shape]:
        assert spec.stored(shape) in (reduction, "map")
        return
    with pytest.raises(ConfigError) as caught:
        spec.check(shape)
    assert f"module 'stage.3' gives (B, {', '.join(map(str, shape))})" in caught.value.message
    assert caught.value.tip == f"reductions that fit: {', '.join(FITS[shape])}"
    with pytest.raises(ConfigError, match=r"module 'stage\.3' gives"):
        spec.reduce(torch.zeros(2, *shape))


def test_fsp_checks_both_of_its_modules() -> None:
    spec = FeatureSpec(("a", "b"), "fsp")
    with pytest.raises(ConfigError, match=r"'fsp' wants a map \(B, C, H, W\); module 'b' gives \(B, 7, 5\)"):
        spec.check(MAP, TOKENS)


def test_an_output_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives \(B\)\n.*name another module"):
        FeatureSpec(("a",), "map").check(())


# -------------------------------------------------------------------------------------------------------------- parsing

NAMES = ["", "conv1", "layer1", "layer1.0", "layer1.0.bn1", "layer2", "layer3", "layer4", "fc"]


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["layer3:pool,layer4:attention"], ["layer3:pool", "layer4:attention"]),
        (["layer3:pool", "layer4:attention"], ["layer3:pool", "layer4:attention"]),
        (["layer3"], ["layer3:map"]),
        ([" layer3:gram , layer1.0.bn1:sign"], ["layer3:gram", "layer1.0.bn1:sign"]),
        (["layer1+layer2:fsp,layer2+layer3:fsp"], ["layer1+layer2:fsp", "layer2+layer3:fsp"]),
        (["layer3:pool,layer3"], ["layer3:pool", "layer3:map"]),
        ([], []),
    ],
    ids=str,
)
def test_features_are_read_and_written_alike(texts: list[str], wanted: list[str]) -> None:
    specs = parse_features(texts, NAMES)
    assert [str(spec) for spec in specs] == wanted
    assert parse_features([str(spec) for spec in specs], NAMES) == specs


def test_a_feature_of_two_modules_keeps_their_order() -> None:
    (spec,) = parse_features(["layer2+layer1:fsp"], NAMES)
    assert spec == FeatureSpec(("layer2", "layer1"), "fsp")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer5:pool", r"no module 'layer5'\n.*did you mean 'layer4'.*--list-modules"),
        ("zzz:pool", r"no module 'zzz'\n  tip: known: conv1, fc, layer1, layer2, layer3, layer4; --list-modules"),
        ("layer1+layr2:fsp", r"no module 'layr2'\n.*did you mean 'layer2'"),
        ("", r"no module ''"),
        ("layer1,", r"no module ''"),
        (":pool", r"no module ''"),
        ("layer3:pol", r"'layer3:pol': unknown reduction 'pol'\n.*did you mean 'pool'"),
        ("layer3:", r"unknown reduction ''\n.*known: attention, cls, flatten"),
        ("layer3:fsp", r"'fsp' takes 2 modules, got 1"),
        ("layer1+layer2+layer3:fsp", r"'fsp' takes 2 modules, got 3"),
        ("layer1+layer2:pool", r"'pool' takes 1 module, got 2"),
        ("layer1+layer2", r"'map' takes 1 module, got 2"),
        ("layer3:pool,layer4,layer3:pool", r"'layer3:pool' is named twice"),
        ("layer3,layer3:map", r"'layer3:map' is named twice"),
    ],
    ids=str,
)
def test_a_feature_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_features([text], NAMES)


# --------------------------------------------------------------------------------------------------------------- models


class Convolutional(nn.Module):
    """Two stages; the second one's BatchNorm is followed by two operations in place, as in many ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.bn(self.conv(x))
        x += 0.5
        return self.fc(self.relu(x).mean(dim=(2, 3)))


class Transformer(nn.Module):
    """A class token, two encoder layers, and a head on the class token."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:  # (B, 6, 8)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        if not self.batch_first:
            x = x.transpose(0, 1)
        x = self.encoder(x)
        return self.fc(x[:, 0] if self.batch_first else x[0])


class Gives(nn.Module):
    """Passes on whatever `make` makes of its input."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


class Around(nn.Module):
    """A module that gives something, and a head."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = Gives(make)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return self.fc(x)


def made(kind: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args).eval()


def features_of(model: nn.Module, *texts: str) -> tuple[FeatureSpec, ...]:
    return parse_features(texts, [name for name, _ in model.named_modules()])


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


IMAGES = normal(3, 3, 8, 8).float()
SEQUENCES = normal(3, 6, 8).float()


@torch.no_grad()
def test_convolutional_features_are_those_of_a_forward_pass_by_hand() -> None:
    model = made(Convolutional)
    stem = model.stem(IMAGES)
    normed = model.bn(model.conv(stem.relu()))
    features = features_of(model, "stem:attention,stem,bn:pool,bn:sign,bn:gram,stem+bn:fsp,bn:spatial_gram,fc")
    untapped = model(IMAGES)
    with Taps(model, features) as tapped:
        logits = model(IMAGES)
        values = tapped.values()
    assert torch.equal(logits, untapped)
    assert torch.equal(values["stem:map"], stem) and torch.equal(values["fc:map"], logits)
    assert list(values) == [str(spec) for spec in features]
    for spec in features:
        given = {"stem": stem, "bn": normed, "fc": logits}
        assert torch.equal(values[str(spec)], spec.store(*(given[layer] for layer in spec.layers)))


@torch.no_grad()
def test_operations_in_place_after_a_module_do_not_reach_its_feature() -> None:
    model = made(Convolutional)
    with Taps(model, features_of(model, "bn,bn:flatten,stem,stem+bn:fsp")) as tapped:
        model(IMAGES)
        values = tapped.values()
    assert (values["bn:map"] < 0).any() and (values["stem:map"] < 0).any()  # else ReLU was seen
    assert torch.equal(values["bn:flatten"], values["bn:map"].flatten(1))
    assert torch.equal(values["stem+bn:fsp"], features.fsp(values["stem:map"], values["bn:map"]))


@torch.no_grad()
def test_transformer_features_are_those_of_a_forward_pass_by_hand() -> None:
    model = made(Transformer)
    features = features_of(model, "encoder:cls,encoder:mean_tokens,encoder.layers.0,encoder.layers.1.norm2:flatten")
    with Taps(model, features) as tapped:
        logits = model(SEQUENCES)
        values = tapped.values()
    assert torch.allclose(logits, model(SEQUENCES), atol=1e-6)  # without hooks, torch takes its fused path
    first = model.encoder.layers[0](torch.cat([model.cls.expand(3, -1, -1), SEQUENCES], dim=1))
    last = model.encoder.layers[1](first)
    wanted = [last[:, 0], last.mean(dim=1), first, last.flatten(1)]
    for spec, want in zip(features, wanted, strict=True):
        assert torch.allclose(values[str(spec)], want, atol=1e-6)
    assert torch.equal(model.fc(values["encoder:cls"]), logits)


@torch.no_grad()
def test_the_reduced_values_are_what_is_read_from_the_stored_ones() -> None:
    model = made(Convolutional)
    features = features_of(model, "bn:gram,bn:spatial_gram,bn:sign,stem:pool,stem+bn:fsp,conv,fc:flatten")
    with Taps(model, features) as tapped:
        model(IMAGES)
        stored = tapped.values()
        model(IMAGES)
        reduced = tapped.reduced()
        model(IMAGES)
    modules = list_modules(model, IMAGES)
    for spec in features:
        assert torch.equal(reduced[str(spec)], spec.read(stored[str(spec)], *shapes_of(spec, modules)))
    assert torch.equal(reduced["bn:gram"], reduced["bn:gram"].mT) and reduced["bn:gram"].shape == (3, 6, 6)
    assert stored["bn:gram"].shape == (3, 21)


@torch.no_grad()
def test_a_model_around_the_tapped_one_may_be_called() -> None:
    model = load_model("softcache:resnet8", num_classes=5, input_shape=(16, 16, 3)).eval()
    batch = model.input.collate(list(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)))
    with Taps(model.net, features_of(model.net, "layer3:pool")) as tapped:
        logits = model(batch)
        values = tapped.values()
    assert torch.equal(model.net.fc(values["layer3:pool"]), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_within_autocast_values_are_float32(dtype: torch.dtype) -> None:
    model = made(Convolutional)
    features = features_of(model, "conv,conv:gram,conv:attention,stem+conv:fsp,conv:spatial_gram")
    with Taps(model, features) as tapped, torch.autocast("cpu", dtype=dtype):
        logits = model(IMAGES)
        values = tapped.values()
    assert logits.dtype == dtype
    given = values["conv:map"]
    assert torch.equal(given, given.to(dtype).float())  # what the module gave, and it gave a half type
    assert all(value.dtype == torch.float32 for value in values.values())
    gram = np.einsum("bchw,bdhw->bcd", given.double(), given.double()) / 16
    triangle = np.stack([g[np.triu_indices(6)] for g in gram])
    assert np.allclose(values["conv:gram"], triangle, rtol=1e-5, atol=1e-6)  # bfloat16 would be 4e-3 off


@torch.no_grad()
def test_float64_stays() -> None:
    model = made(Convolutional).double()
    with Taps(model, features_of(model, "conv:gram")) as tapped:
        model(IMAGES.double())
        assert tapped.values()["conv:gram"].dtype == torch.float64


@pytest.mark.parametrize(
    "text", ["bn", "bn:pool", "bn:attention", "bn:gram", "bn:spatial_gram", "stem+bn:fsp", "bn:flatten"]
)
def test_gradients_flow_where_asked(text: str) -> None:
    """The gradient of a weighted sum of the reduced feature, against finite differences in float64."""
    model = made(Convolutional).double()
    images, (spec,) = IMAGES.double(), features_of(model, text)
    weight = model.stem.weight

    def value() -> Tensor:
        reduced = tapped.reduced()[text if ":" in text else f"{text}:map"]
        return (reduced * torch.linspace(-1, 2, reduced.numel(), dtype=torch.float64).view(reduced.shape)).sum()

    with Taps(model, [spec], detach=False) as tapped:
        model(images)
        (gradient,) = torch.autograd.grad(value(), weight)
        step, direction = 1e-6, normal(*weight.shape, seed=3)
        ends = []
        with torch.no_grad():
            for factor in (step, -2 * step):
                weight += factor * direction
                model(images)
                ends.append(value())
    assert torch.allclose((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5)


def test_by_default_values_are_detached_and_hold_no_graph() -> None:
    model = made(Convolutional)
    with Taps(model, features_of(model, "bn,bn:gram,stem+bn:fsp")) as tapped:
        assert model(IMAGES).requires_grad
        assert not any(value.requires_grad for value in tapped.values().values())


@torch.no_grad()
def test_every_forward_pass_starts_afresh() -> None:
    model = made(Convolutional)
    with Taps(model, features_of(model, "fc,stem+bn:fsp")) as tapped:
        model(IMAGES)  # nobody asks
        with pytest.raises(RuntimeError):
            model(IMAGES[:, :2])
        logits = model(IMAGES[:2])
        assert torch.equal(tapped.values()["fc:map"], logits)
        with pytest.raises(ConfigError, match=r"module 'fc' was not called"):
            tapped.values()


def test_hooks_are_removed_whatever_happens() -> None:
    model = made(Convolutional)
    tapped, headed = Taps(model, features_of(model, "bn,stem+bn:fsp")), ClassifierTap(model.fc)
    for _ in range(2):  # it may be entered again
        with tapped, headed:
            assert hooks_on(model) == 2 + 2 + 1
            model(IMAGES)
        assert hooks_on(model) == 0
    with pytest.raises(KeyError), tapped, headed:
        raise KeyError
    with pytest.raises(RuntimeError), tapped, headed:
        model(IMAGES[:, :2])
    with pytest.raises(RuntimeError):
        list_modules(model, IMAGES[:, :2])
    with pytest.raises(RuntimeError):
        classifier_of(model, IMAGES[:, :2])
    assert hooks_on(model) == 0


def test_a_module_called_twice_is_ambiguous() -> None:
    model = made(Convolutional)
    with Taps(model, [FeatureSpec(("relu",))]), pytest.raises(ConfigError, match=r"'relu' was called more than once"):
        model(IMAGES)


def test_a_module_that_is_not_reached_is_refused() -> None:
    model = made(Convolutional)
    with Taps(model, [FeatureSpec(("unused",)), FeatureSpec(("fc",))]) as tapped:
        model(IMAGES)
        with pytest.raises(ConfigError, match=r"'unused' was not called in the forward pass\n.*--list-modules"):
            tapped.values()


def test_a_module_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no module 'steem'\n.*did you mean 'stem'"):
        Taps(made(Convolutional), [FeatureSpec(("steem",))])


def test_a_misfit_shows_in_the_forward_pass() -> None:
    model = made(Convolutional)
    with Taps(model, [FeatureSpec(("fc",), "pool")]), pytest.raises(ConfigError, match=r"'fc' gives \(B, 5\)"):
        model(IMAGES)


@torch.no_grad()
def test_an_output_without_the_batch_in_front_is_refused() -> None:
    """With the sequence first, `cls` would be the first sample's tokens."""
    model = made(Transformer, False)
    with Taps(model, features_of(model, "encoder:cls")) as tapped:
        model(SEQUENCES)
        with pytest.raises(
            ConfigError, match=r"'encoder' gives \(7, 3, 8\), but the batch has 3 records.*\n.*batch_first"
        ):
            tapped.values()


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda x: (x + 1, None), "tuple[0]"),
    "later in a tuple": (lambda x: (None, x + 1, x), "tuple[1]"),
    "list": (lambda x: [x + 1], "list[0]"),
    "dict": (lambda x: {"loss": None, "hidden": x + 1, "logits": x}, "dict['hidden']"),
    "tensor": (lambda x: x + 1, "Tensor"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_first_tensor_of_an_output_is_taken(output: str) -> None:
    model, x = Around(OUTPUTS[output][0]), normal(3, 4).float()
    with Taps(model, [FeatureSpec(("inner",))]) as tapped:
        model(x)
        assert torch.equal(tapped.values()["inner:map"], x + 1)
    (inner, _) = list_modules(model, x)
    assert (inner.shape, inner.gives, inner.calls) == ((3, 4), OUTPUTS[output][1], 1)


@pytest.mark.parametrize(
    ("make", "gives"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: {"a": 1}, "dict"),
        (lambda x: x.argmax(1), "Tensor of torch.int64"),
        (lambda x: ((x, x),), "tuple"),
    ],
    ids=["none", "dict", "indices", "nested"],
)
def test_an_output_without_numbers_is_refused(make: Callable[[Tensor], Any], gives: str) -> None:
    model, spec = Around(make), FeatureSpec(("inner",))
    with Taps(model, [spec]), pytest.raises(ConfigError, match=rf"'inner' gives {gives}, not a tensor of floating"):
        model(torch.ones(3, 4))


# -------------------------------------------------------------------------------------------------------------- modules


def test_modules_are_listed_with_their_outputs() -> None:
    model = made(Convolutional)
    listed = {m.name: (m.kind, m.shape, m.gives, m.calls) for m in list_modules(model, IMAGES)}
    assert listed == {
        "stem": ("Conv2d", (3, 4, 8, 8), "Tensor", 1),
        "conv": ("Conv2d", (3, 6, 4, 4), "Tensor", 1),
        "bn": ("BatchNorm2d", (3, 6, 4, 4), "Tensor", 1),
        "relu": ("ReLU", (3, 4, 8, 8), "Tensor", 2),
        "unused": ("Linear", None, "nothing", 0),
        "fc": ("Linear", (3, 5), "Tensor", 1),
    }
    assert list(listed) == [name for name, _ in model.named_modules() if name]


def test_attention_inside_a_fused_layer_is_listed() -> None:
    listed = {m.name: m for m in list_modules(made(Transformer), SEQUENCES)}
    assert listed["encoder.layers.1.self_attn"].gives == "tuple[0]"
    assert listed["encoder.layers.1.self_attn"].shape == (3, 7, 8)
    assert listed["encoder.layers.0.linear1"].shape == (3, 7, 16)


@pytest.mark.parametrize("look", [list_modules, classifier_of], ids=["list_modules", "head_of"])
def test_looking_leaves_the_model_as_it_was(look: Callable[[nn.Module, Any], Any]) -> None:
    model = made(Convolutional).train()
    model.bn.eval()  # frozen, as in fine-tuning
    modes, state = (
        {n: m.training for n, m in model.named_modules()},
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    look(model, IMAGES)
    assert {n: m.training for n, m in model.named_modules()} == modes and model.training and not model.bn.training
    model.bn.train()
    look(model, IMAGES)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_shapes_come_from_the_list() -> None:
    modules = list_modules(made(Convolutional), IMAGES)
    assert shapes_of(FeatureSpec(("stem", "bn"), "fsp"), modules) == ((4, 8, 8), (6, 4, 4))
    for spec, message in [
        (FeatureSpec(("relu",)), "'relu' was called more than once"),
        (FeatureSpec(("unused",)), "'unused' was not called"),
        (FeatureSpec(("fc",), "attention"), r"module 'fc' gives \(B, 5\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            shapes_of(spec, modules)
    with pytest.raises(ConfigError, match="'inner' gives NoneType, not a tensor"):
        shapes_of(FeatureSpec(("inner",)), list_modules(Around(lambda x: None), torch.ones(3, 4)))


# ----------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@torch.no_grad()
def test_the_input_of_the_head_gives_the_logits(autocast: bool) -> None:
    model = made(Convolutional)
    with ClassifierTap(model.fc) as head, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for count in (3, 2):
            logits = model(IMAGES[:count])
            value = head.value()
            assert value.dtype == torch.float32 and value.shape == (count, 6)
    assert torch.allclose(model.fc(value), logits.float(), rtol=2e-2 if autocast else 0, atol=1e-2 if autocast else 0)


def test_the_input_of_the_head_is_a_copy_without_a_graph() -> None:
    linear = nn.Linear(4, 5)
    x = torch.ones(3, 4, requires_grad=True) * 2
    with ClassifierTap(linear) as head:
        linear(input=x)
        with torch.no_grad():
            x.mul_(3)
        value = head.value()
    assert torch.equal(value, torch.full((3, 4), 2.0)) and not value.requires_grad


def test_a_head_that_is_given_something_else_is_refused() -> None:
    linear = nn.Linear(4, 5)
    with ClassifierTap(linear) as head:
        with pytest.raises(ConfigError, match=r"final linear layer is given \(3, 1, 4\)"):
            linear(torch.ones(3, 1, 4))
        with pytest.raises(ConfigError, match="final linear layer was not called"):
            head.value()
        linear(torch.ones(3, 4))
        linear(torch.ones(3, 4))
        with pytest.raises(ConfigError, match="final linear layer was called more than once"):
            head.value()


class Headed(nn.Module):
    """A network with two linear layers, and something that is done to what the second one gives."""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)
        self.body = nn.Linear(4, 6)  # registered after the head
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.head(self.body(x).relu()))


HEADS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "as it is": (lambda z: z, True),
    "reshaped to itself": (lambda z: z.view(len(z), -1), True),
    "scaled": (lambda z: z * 1.5, False),
    "scaled in place": (lambda z: z.mul_(1.5), False),
    "moved by one bit": (lambda z: torch.nextafter(z, z + 1), False),
    "softmax": (lambda z: z.softmax(1), False),
    "another dtype": (lambda z: z.double(), False),
    "permuted": (lambda z: z.flip(1), False),
    "some classes": (lambda z: z[:, :4], False),
    "a tuple": (lambda z: (z, z), False),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_is_the_layer_that_gives_the_logits(case: str) -> None:
    after, is_head = HEADS[case]
    model = made(Headed, after)
    assert classifier_of(model, normal(3, 4).float()) is (model.head if is_head else None)


def test_models_with_and_without_a_head() -> None:
    assert (model := made(Convolutional)) and classifier_of(model, IMAGES) is model.fc
    assert (model := made(Transformer)) and classifier_of(model, SEQUENCES) is model.fc
    assert classifier_of(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), IMAGES) is None


class Twice(nn.Module):
    """The head gives the logits, then something else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        self.head(x + 1)
        return logits


def test_a_layer_that_is_called_twice_is_no_head() -> None:
    assert classifier_of(made(Twice), normal(3, 4).float()) is None  # which of its inputs would have to be stored?


# ------------------------------------------------------------------------------------------------------- feature codecs

FLOAT_MAX = float(np.finfo(np.float32).max)

ROWS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "normal": lambda rng, b, n: rng.normal(0, 3, (b, n)),
    "after relu": lambda rng, b, n: rng.normal(0, 3, (b, n)).clip(0),
    "a level": lambda rng, b, n: rng.normal(1000, 0.01, (b, n)),
    "zeros": lambda rng, b, n: np.zeros((b, n)),
    "minus zeros": lambda rng, b, n: np.full((b, n), -0.0),
    "constants": lambda rng, b, n: np.repeat(rng.normal(0, 10, (b, 1)), n, axis=1),
    "one far value": lambda rng, b, n: rng.normal(0, 1e-3, (b, n)) + 6e4 * (np.arange(n) == n // 2),
    "one value": lambda rng, b, n: rng.normal(0, 9, (b, 1)) * (np.arange(n) == n // 2),
    "huge range": lambda rng, b, n: rng.choice([-1, 1], (b, n)) * 10.0 ** rng.uniform(-44, 4.8, (b, n)),
    "two values": lambda rng, b, n: rng.choice([-7.7, 0.3], (b, n)),
    "half way between codes": lambda rng, b, n: np.where(
        np.arange(n) < 2, 255.0 * (np.arange(n) % 2), rng.integers(0, 255, (b, n)) + 0.5
    ),
    "half way between halves": lambda rng, b, n: 1 + (2 * rng.integers(0, 1000, (b, n)) + 1) * 2.0**-11,
    "largest halves": lambda rng, b, n: rng.choice([-65504.0, 65504.0, 65519.99], (b, n)),
    "float16 denormals": lambda rng, b, n: rng.uniform(-(2.0**-14), 2.0**-14, (b, n)),
    "below float16": lambda rng, b, n: rng.uniform(-(2.0**-25), 2.0**-25, (b, n)),
    "float32 denormals": lambda rng, b, n: rng.uniform(-(2.0**-126), 2.0**-126, (b, n)),
    "a few of the smallest": lambda rng, b, n: rng.integers(-300, 300, (b, n)) * 2.0**-149,
}
LARGE_ROWS = {
    "above float16": lambda rng, b, n: rng.normal(0, 1e6, (b, n)),
    "very large": lambda rng, b, n: rng.uniform(-1, 1, (b, n)) * (FLOAT_MAX / 2.001),
    "largest of one sign": lambda rng, b, n: rng.uniform(0, 1, (b, n)) * (FLOAT_MAX / 1.001),
}


def rows_of(make: Callable[[np.random.Generator, int, int], np.ndarray], count: int, n: int) -> Tensor:
    return torch.from_numpy(make(np.random.default_rng([count, n]), count, n).astype(np.float32))


def check_bounds(dtype: str, values: Tensor) -> None:
    """Zero violations of what FeatureCodec's docstring states, and `error` is the measured one."""
    before, n = values.clone(), values.shape[1]
    codec = FeatureCodec(dtype, "map", (n,))
    decoded = codec.decode(codec.encode(values))
    assert torch.equal(values, before) and decoded.dtype == torch.float32 and decoded.shape == values.shape
    x, y = values.double().numpy(), decoded.double().numpy()
    size, peak = np.sqrt((x**2).sum(axis=1)), np.abs(x).max(axis=1)
    distance, spread = np.sqrt(((y - x) ** 2).sum(axis=1)), x.max(axis=1) - x.min(axis=1)
    if dtype == "float16":
        assert (np.abs(y - x) <= np.maximum(2.0**-11 * np.abs(x), 2.0**-25)).all()
        assert (distance <= np.sqrt(2.0**-22 * size**2 + n * 2.0**-50)).all()
        without_denormals = ((x == 0) | (np.abs(x) >= 2.0**-14)).all(axis=1)
        assert (distance <= 2.0**-11 * size)[without_denormals].all()
    else:
        assert (np.abs(y - x).max(axis=1) <= spread / 509 + 2.0**-23 * peak + 2.0**-141).all()
        assert (distance <= np.sqrt(n) * (peak / 254 + 2.0**-141)).all()
        one_sign = (x >= 0).all(axis=1) | (x <= 0).all(axis=1)
        assert (distance <= np.sqrt(n) * (peak / 508 + 2.0**-141))[one_sign].all()
        assert (y == x)[spread == 0].all()
    measured = np.divide(distance, size, out=np.zeros_like(size), where=distance > 0)
    assert np.allclose(codec.error(values, decoded).numpy(), measured, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 2, 64, 1000])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_error_of_a_stored_feature_is_within_its_bound(dtype: str, rows: str, n: int) -> None:
    check_bounds(dtype, rows_of(ROWS[rows], 64, n))


@pytest.mark.parametrize("rows", LARGE_ROWS)
def test_int8_holds_what_float16_refuses(rows: str) -> None:
    values = rows_of(LARGE_ROWS[rows], 64, 200)
    check_bounds("int8", values)
    with pytest.raises(CodecRangeError, match=r"float16 holds \|feature\| <= 65504, found .*\n.*int8"):
        FeatureCodec("float16", "map", (200,)).encode(values)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_bound_holds_on_many_rows(dtype: str, rows: str) -> None:
    check_bounds(dtype, rows_of(ROWS[rows], 20_000, 33))


def test_the_int8_bound_is_a_close_one() -> None:
    """Half a step is reached: a step twice as wide would break the bound, a tenth of it would not be worth stating."""
    values = rows_of(ROWS["half way between codes"], 64, 1000)
    codec = FeatureCodec("int8", "map", (1000,))
    error = (codec.decode(codec.encode(values)).double() - values.double()).abs().amax(dim=1)
    assert (error >= 0.49).all() and (error <= 255 / 509 + 2.0**-23 * 255).all()


def test_int8_decodes_alike_with_a_fused_multiply_add() -> None:
    """Code times step is exact in float32, so rounding once, as a GPU may, gives the same bits."""
    for make in (*ROWS.values(), *LARGE_ROWS.values()):
        codec, values = FeatureCodec("int8", "map", (33,)), rows_of(make, 200, 33)
        arrays = codec.encode(values)
        scale, low = arrays["_scale"].double().unbind(dim=1)
        fused = (arrays[""].double() * scale[:, None] + low[:, None]).numpy()
        assert np.array_equal(codec.decode(arrays).numpy(), fused.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(6,), (6, 5, 4), (7, 5)], ids=str)
def test_the_arrays_are_those_announced(dtype: str, shape: tuple[int, ...]) -> None:
    codec, values = FeatureCodec(dtype, "map", shape), normal(3, *shape).float()
    arrays = codec.encode(values)
    said = {suffix: (np.dtype(kind), (3, *record)) for suffix, (kind, record) in codec.arrays.items()}
    assert {suffix: (array.numpy().dtype, tuple(array.shape)) for suffix, array in arrays.items()} == said
    assert codec.decode(arrays).shape == values.shape
    flat = FeatureCodec(dtype, "map", (prod(shape),))
    assert torch.equal(codec.decode(arrays).flatten(1), flat.decode(flat.encode(values.flatten(1))))
    assert codec.decode(codec.encode(values[:0])).shape == (0, *shape)
    alone = codec.encode(values[1:2])
    assert all(torch.equal(alone[suffix][0], arrays[suffix][1]) for suffix in arrays)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_sign_bits_are_stored_exactly(dtype: str) -> None:
    spec, x = FeatureSpec(("a",), "sign"), normal(4, 6, 5, 3)
    stored = spec.store(x)
    codec = FeatureCodec(dtype, spec.stored((6, 5, 3)), spec.record_shape((6, 5, 3)))
    assert codec.arrays == {"": ("|u1", (12,))}
    arrays: Mapping[str, Tensor] = codec.encode(stored)
    decoded = codec.decode(arrays)
    assert decoded.dtype == torch.uint8 and not codec.error(stored, decoded).any()
    assert np.array_equal(spec.read(decoded, (6, 5, 3)).numpy(), (x.numpy() > 0).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
def test_what_is_not_finite_is_refused(dtype: str, value: float) -> None:
    values = torch.zeros(3, 7)
    values[1, 2] = value
    with pytest.raises(CodecRangeError, match=rf"{dtype} holds .*, found (inf|nan)\n"):
        FeatureCodec(dtype, "map", (7,)).encode(values)


def test_int8_refuses_a_range_that_float32_cannot_hold() -> None:
    with pytest.raises(CodecRangeError, match=r"int8 holds features up to about 1e38, found 3\.4"):
        FeatureCodec("int8", "map", (2,)).encode(torch.tensor([[-FLOAT_MAX, FLOAT_MAX]]))


@pytest.mark.parametrize(
    ("given", "decoded", "wanted"),
    [([3.0, 4.0], [3.0, 4.5], 0.1), ([0.0, 0.0], [0.0, 0.0], 0.0), ([0.0, 0.0], [0.0, 1.0], np.inf),
     ([1e-40, 0.0], [2e-40, 0.0], 1.0), ([2e38, 2e38], [0.0, 0.0], 1.0), ([1.0, 0.0], [np.inf, 0.0], np.inf)],
    ids=str,
)  # fmt: skip
def test_the_relative_error(given: list[float], decoded: list[float], wanted: float) -> None:
    made = FeatureCodec("float16", "map", (2,)).error(torch.tensor([given]), torch.tensor([decoded]))
    assert made.dtype == torch.float64 and made.tolist() == pytest.approx([wanted], rel=1e-4)


def test_a_value_that_is_not_a_number_never_passes_as_exact() -> None:
    codec = FeatureCodec("float16", "map", (2,))
    assert codec.error(torch.zeros(1, 2), torch.tensor([[torch.nan, 0.0]])).isnan().all()


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int7'\n.*did you mean 'int8'"):
        FeatureCodec("int7", "map", (2,))

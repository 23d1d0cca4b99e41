"""Features in a cache: what is gathered is what the live teacher's modules gave, within the error that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS

import softcache
from softcache import cli
from softcache.check import inspect
from softcache.codecs.features import StoredFeature
from softcache.config import DumpConfig
from softcache.dump import flow as dump
from softcache.errors import CacheError, CodecRangeError, ConfigError, ModelError, SoftcacheError, TeacherError
from softcache.spec import load_user_file

BATCH, COUNT = 16, 40
POLICY = ("shift:pixels=2",)
Reduce = Callable[..., np.ndarray]


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1)


def _fsp(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    factor = first.shape[2] // second.shape[2]  # here the first map is twice as large each way
    blocks = first.reshape(*first.shape[:2], second.shape[2], factor, second.shape[3], factor)
    pooled, others = _rows(blocks.max(axis=(3, 5))), _rows(second)
    return np.einsum("bip,bjp->bij", pooled, others) / others.shape[2]


def _spatial_gram(x: np.ndarray) -> np.ndarray:
    unit = _rows(x) / np.linalg.norm(_rows(x), axis=2, keepdims=True)
    return np.einsum("bcp,bcq->bpq", unit, unit) / x.shape[1]


REDUCE: dict[str, Reduce] = {  # float64, (B, ...) -> (B, ...)
    "map": lambda x: x,
    "flatten": lambda x: x.reshape(len(x), -1),
    "pool": lambda x: x.mean(axis=(2, 3)),
    "cls": lambda x: x[:, 0],
    "mean_tokens": lambda x: x.mean(axis=1),
    "attention": lambda x: (x**2).mean(axis=1),
    "gram": lambda x: np.einsum("bip,bjp->bij", _rows(x), _rows(x)) / _rows(x).shape[2],
    "spatial_gram": _spatial_gram,
    "fsp": _fsp,
    "sign": lambda x: (x > 0).astype(np.float64),
}

# feature -> (how it lies on disk, numbers of one record; bytes for sign)
CONV = {
    "stem:map": ("map", 6 * 8 * 8),
    "deep:map": ("map", 10 * 4 * 4),
    "wide:map": ("map", 40 * 2 * 2),
    "deep:pool": ("pool", 10),
    "squeeze:flatten": ("flatten", 40),
    "stem:attention": ("attention", 8 * 8),
    "stem:gram": ("gram", 6 * 7 // 2),
    "wide:gram": ("map", 160),  # its triangle would be 820
    "deep:spatial_gram": ("spatial_gram", 16 * 17 // 2),
    "stem:spatial_gram": ("map", 384),  # its triangle would be 2,080
    "stem+deep:fsp": ("fsp", 60),
    "deep+wide:fsp": ("map", 160 + 160),  # of both modules; the matrix would be 400
    "deep:sign": ("sign", 160 // 8),
}
TEXT = {
    "norm:cls": ("cls", 8),
    "norm:mean_tokens": ("mean_tokens", 8),
    "embed:map": ("map", 56),
    "v:flatten": ("flatten", 56),
    "v:sign": ("sign", 7),
}
MAPS_OF = {"wide:gram": ["wide:map"], "stem:spatial_gram": ["stem:map"]}


@pytest.fixture(scope="module")
def pieces() -> Path:
    return WORLDS / "known_features.py"


def config(pieces: Path, out: Path, data: str = "images", teacher: str | tuple[str, ...] = "conv", **more: Any) -> Any:
    names = (teacher,) if isinstance(teacher, str) else teacher
    settings: dict[str, Any] = {
        "codec": "float32",
        "batch_size": BATCH,
        "threads": 1,
        "workers": 0,
        "device": "cpu",
    } | more
    return DumpConfig(
        data=f"{pieces}:{data}", teacher=tuple(f"{pieces}:{name}" for name in names), out=str(out), **settings
    )


def dumped(*arguments: Any, **settings: Any) -> softcache.Cache:
    return softcache.open(dump.run(config(*arguments, **settings), quiet=True).path)


@pytest.fixture(scope="module")
def caches(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], softcache.Cache]:
    """(model, dtype) -> a cache with every feature of CONV or TEXT; the images in two views."""
    folder = tmp_path_factory.mktemp("caches")
    made = {}
    for dtype in ("float16", "int8"):
        images = {"features": (",".join(CONV),), "policy": POLICY, "views": 2}
        made["conv", dtype] = dumped(pieces, folder / f"conv-{dtype}", feature_dtype=dtype, **images)
        made["text", dtype] = dumped(
            pieces, folder / f"text-{dtype}", "texts", "encoder", features=tuple(TEXT), feature_dtype=dtype
        )
    return made


def live_parts(pieces: Path, cache: softcache.Cache, data: str, teacher: Any, view: int) -> dict[str, np.ndarray]:
    """Module -> what it gives for every row of the cache, float64, in the dump's own batches."""
    items = getattr(load_user_file(pieces), data)().items
    ids = cache.samples.ids
    index = [int(cache.samples.key(row)[5:]) for row in range(len(cache))]
    seen = [cache.policy.render(items[i], int(ids[row]), view) for row, i in enumerate(index)]
    with torch.no_grad():
        found = [teacher.parts(teacher.collate(seen[start : start + BATCH])) for start in range(0, len(seen), BATCH)]
    return {name: torch.cat([part[name] for part in found]).double().numpy() for name in found[0]}


def feature_of(name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    layers, reduction = name.split(":")
    return REDUCE[reduction](*(parts[layer] for layer in layers.split("+")))


def everything(cache: softcache.Cache, view: int, features: list[str], **chosen: Any) -> Any:
    return cache.gather(np.arange(len(cache)), np.full(len(cache), view), features=features, **chosen)


def distance(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(B,) |given - wanted| / |wanted|."""
    given, wanted = given.reshape(len(given), -1), wanted.reshape(len(wanted), -1)
    return np.linalg.norm(given - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def stored_error(cache: softcache.Cache, member: str, name: str, view: int) -> np.ndarray:
    """(N,) as it lies beside the feature."""
    number = [feature.name for feature in cache.member(member).features].index(name)
    rows = np.arange(len(cache))
    return cache.reader.gather(member, f"feature{number}_error", rows, np.full(len(rows), view)).astype(np.float64)


# --------------------------------------------------------------------------------------------------- equal to the live


def test_every_reduction_is_here() -> None:
    assert {name.split(":")[1] for name in (*CONV, *TEXT)} == set(REDUCE)


CASES = [("conv", name, view) for name in CONV for view in (0, 1)] + [("text", name, 0) for name in TEXT]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("model", "name", "view"), CASES)
def test_a_cached_feature_is_the_live_teachers(
    pieces: Path, caches: dict[tuple[str, str], softcache.Cache], model: str, name: str, view: int, dtype: str
) -> None:
    """The stored error is the distance itself, and a small one; of a map that is reduced when it is read, the map's."""
    cache = caches[model, dtype]
    module = load_user_file(pieces)
    teacher, data = (module.conv(), "images") if model == "conv" else (module.encoder(), "texts")
    parts = live_parts(pieces, cache, data, teacher, view)
    live = feature_of(name, parts)
    targets = everything(cache, view, [name])
    cached = targets.feature(name)
    assert cached.dtype == torch.float32 and cached.shape == live.shape
    given, error = cached.double().numpy(), stored_error(cache, model_member(cache), name, view)
    form, reduction = (CONV | TEXT)[name][0], name.split(":")[1]
    if reduction == "sign":
        np.testing.assert_array_equal(given, live)
        assert (error == 0).all()
        return
    if form == reduction:
        if reduction in ("gram", "spatial_gram"):  # a triangle is stored, and its error is what counts
            triangle = np.triu_indices(live.shape[1])
            np.testing.assert_array_equal(given, given.transpose(0, 2, 1))
            given, live = given[:, *triangle], live[:, *triangle]
        found = distance(given, live)
        assert (found <= error * (1 + 1e-6) + 2e-6).all()
        assert (error <= found * (1 + 2**-10) + 2e-6).all()
        if dtype == "int8":  # half a step everywhere would be this far
            rows = live.reshape(len(live), -1)
            half = np.ptp(rows, axis=1) / 509
            assert (found <= half * rows.shape[1] ** 0.5 / np.linalg.norm(rows, axis=1) + 2e-6).all()
    elif name in MAPS_OF:  # the very map that is stored under its own name, reduced in float64
        maps = everything(cache, view, MAPS_OF[name])
        wanted = REDUCE[reduction](*(maps.feature(one).double().numpy() for one in MAPS_OF[name]))
        np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
        np.testing.assert_array_equal(error, stored_error(cache, model_member(cache), MAPS_OF[name][0], view))
    assert 0 < error.max() < (2**-11 if dtype == "float16" else 0.02)
    assert distance(given, live).max() < (0.002 if dtype == "float16" else 0.06)
    assert len(np.unique(given.reshape(len(given), -1), axis=0)) > 1


def model_member(cache: softcache.Cache) -> str:
    (member,) = cache.members
    return member


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("model", "name"), [("conv", n) for n in CONV] + [("text", n) for n in TEXT])
def test_the_smaller_of_map_and_reduction_lies_on_disk(
    caches: dict[tuple[str, str], softcache.Cache], model: str, name: str, dtype: str
) -> None:
    cache = caches[model, dtype]
    member = cache.member(model_member(cache))
    (info,) = [feature for feature in member.features if feature.name == name]
    form, numbers = (CONV | TEXT)[name]
    assert info.stored == form
    (file,) = cache.manifest.files_of("member", member.name)
    nbytes = sum(file.arrays[one].nbytes for one in info.arrays) / (cache.num_views * COUNT)
    width = {"float16": 2 * numbers, "int8": numbers + 8}[dtype]  # a step and an offset
    assert nbytes == (numbers if form == "sign" else width)


def test_views_differ_and_are_gathered_in_any_order(caches: dict[tuple[str, str], softcache.Cache]) -> None:
    cache = caches["conv", "float16"]
    names = ["deep:pool", "stem+deep:fsp", "deep:sign"]
    both = [everything(cache, view, names) for view in (0, 1)]
    draw = np.random.default_rng(0)
    rows, views = draw.integers(0, COUNT, 100), draw.integers(0, 2, 100)
    mixed = cache.gather(rows, views, features=names)
    for name in names:
        whole = torch.stack([one.feature(name) for one in both])
        assert torch.equal(mixed.feature(name), whole[torch.from_numpy(views), torch.from_numpy(rows)])
        assert not torch.equal(whole[0], whole[1])


def test_the_manifest_keeps_the_worst_error_of_each_feature(caches: dict[tuple[str, str], softcache.Cache]) -> None:
    for (model, _), cache in caches.items():
        member = model_member(cache)
        noted = cache.manifest.statistics[member].feature_errors
        names = list(CONV if model == "conv" else TEXT)
        worst = {n: max(stored_error(cache, member, n, v).max() for v in range(cache.num_views)) for n in names}
        assert noted == worst
        assert list(cache.features[member]) == names
        described: Any = inspect.describe(cache.reader.path)
        assert described["statistics"][member]["feature_errors"] == worst
        shown = inspect.report(cache.reader.path)
        assert all(name in shown for name in names)


def test_within_autocast_the_half_types_features_are_stored(pieces: Path, tmp_path: Path) -> None:
    names = ["deep:pool", "stem:gram", "squeeze:flatten"]
    cache = dumped(pieces, tmp_path / "half", features=tuple(names), autocast="bf16")
    plain = dumped(pieces, tmp_path / "plain", features=tuple(names))
    teacher = load_user_file(pieces).conv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = live_parts(pieces, cache, "images", teacher, 0)
    targets = everything(cache, 0, names)
    for name in names:
        live = feature_of(name, parts)
        given = targets.feature(name).double().numpy()
        assert (distance(given, live) <= 2 * stored_error(cache, "conv", name, 0) + 2e-6).all()
        apart = distance(everything(plain, 0, names).feature(name).double().numpy(), live)
        assert apart.max() > 2**-11  # what bfloat16 costs, which is not the codec's doing


# ------------------------------------------------------------------------------------------------- members and rounds


def test_several_members_with_a_feature_of_one_name(pieces: Path, tmp_path: Path) -> None:
    cache = dumped(pieces, tmp_path / "c", teacher=("conv?seed=1", "conv?seed=9"), features=("deep:pool,fc:flatten",))
    assert cache.members == ("conv", "conv-2")
    targets = everything(cache, 0, ["deep:pool"])
    with pytest.raises(CacheError, match="2 members have the feature 'deep:pool'") as raised:
        targets.feature("deep:pool")
    assert raised.value.tip == "name the member: conv, conv-2"
    given = [targets.feature("deep:pool", member) for member in cache.members]
    assert not torch.equal(*given)
    for member, seed, value in zip(cache.members, (1, 9), given, strict=True):
        live = live_parts(pieces, cache, "images", load_user_file(pieces).conv(seed), 0)["deep"].mean(axis=(2, 3))
        assert distance(value.double().numpy(), live).max() < 2**-11
        alone = everything(cache, 0, ["deep:pool"], members=[member])
        assert torch.equal(alone.feature("deep:pool"), value)
    with pytest.raises(CacheError, match="0 members have the feature 'fc:flatten'") as raised:
        targets.feature("fc:flatten")  # it is in the cache, but was not gathered
    assert "known: deep:pool" in raised.value.tip


def test_a_member_without_features_beside_one_with_them(pieces: Path, tmp_path: Path) -> None:
    before = dumped(pieces, tmp_path / "c", features=("deep:pool",))
    cache = dumped(pieces, tmp_path / "c", teacher="conv?seed=9&name=late", extend=True)
    assert cache.members == ("conv", "late")
    targets = everything(cache, 0, ["deep:pool"])
    assert torch.equal(targets.feature("deep:pool"), everything(before, 0, ["deep:pool"]).feature("deep:pool"))
    assert cache.classifier("conv") is not None and cache.classifier("late") is None
    with pytest.raises(CacheError, match="0 members"):
        targets.feature("deep:pool", "late")
    with pytest.raises(CacheError, match="no feature 'deep:pool'") as raised:
        everything(cache, 0, ["deep:pool"], members=["late"])
    assert raised.value.tip == "dump again with --features"
    with pytest.raises(CacheError, match="no feature 'deep:poool'") as raised:
        everything(cache, 0, ["deep:poool"])
    assert raised.value.tip == "did you mean 'deep:pool'?"
    late = dumped(pieces, tmp_path / "c", teacher="conv?seed=5&name=last", extend=True, features=("stem:gram",))
    targets = everything(late, 0, ["deep:pool", "stem:gram"])
    assert list(targets.features) == [("conv", "deep:pool"), ("last", "stem:gram")]
    parts = live_parts(pieces, late, "images", load_user_file(pieces).conv(5), 0)
    assert distance(targets.feature("stem:gram").double().numpy(), feature_of("stem:gram", parts)).max() < 2**-11


def test_features_of_one_member_of_several(pieces: Path, tmp_path: Path) -> None:
    """`member=layer:reduction`, beside those of all; models that share no module."""
    cache = dumped(
        pieces,
        tmp_path / "c",
        teacher=("conv", "wrapped?how=none&name=other"),
        features=("conv=deep:pool,other=inner.deep:pool", "other=inner.fc:flatten"),
    )
    kept = {member: list(features) for member, features in cache.features.items()}
    assert kept == {"conv": ["deep:pool"], "other": ["inner.deep:pool", "inner.fc:flatten"]}
    targets = everything(cache, 0, ["deep:pool", "inner.deep:pool"])
    assert torch.equal(targets.feature("deep:pool"), targets.feature("inner.deep:pool"))  # of equal weights
    with pytest.raises(ConfigError, match="no member is called 'othr'") as raised:
        dumped(pieces, tmp_path / "d", features=("othr=deep:pool",))
    assert "known: conv" in raised.value.tip
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_more_views_keep_the_features_and_equal_all_at_once(pieces: Path, tmp_path: Path, dtype: str) -> None:
    names = ["deep:pool", "wide:gram", "deep:sign"]
    settings: dict[str, Any] = {"policy": POLICY, "features": tuple(names), "feature_dtype": dtype}
    whole = dumped(pieces, tmp_path / "whole", views=3, **settings)
    dumped(pieces, tmp_path / "grown", views=1, **settings)
    grown = dumped(pieces, tmp_path / "grown", views=3, extend=True, codec=None)
    assert grown.num_views == 3
    assert grown.member("conv").features == whole.member("conv").features
    for view in range(3):
        one, other = (everything(cache, view, names) for cache in (whole, grown))
        assert one.arrays["conv"].keys() == other.arrays["conv"].keys()
        for name, value in one.arrays["conv"].items():
            assert torch.equal(value, other.arrays["conv"][name]), name
        for name in names:
            assert np.array_equal(stored_error(whole, "conv", name, view), stored_error(grown, "conv", name, view))
    assert grown.manifest.statistics["conv"].feature_errors == whole.manifest.statistics["conv"].feature_errors
    for one, other in zip(whole.classifier("conv") or (), grown.classifier("conv") or (), strict=True):
        assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


def test_what_the_cache_has_fixed_cannot_be_given_with_more_views(pieces: Path, tmp_path: Path) -> None:
    dumped(pieces, tmp_path / "c", policy=POLICY, features=("deep:pool",))
    with pytest.raises(ConfigError, match="--features cannot be given with more views"):
        dumped(pieces, tmp_path / "c", views=2, extend=True, codec=None, features=("deep:pool",))


# ------------------------------------------------------------------------------------------------------- final layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("teacher", ["conv", "opposite"])
def test_the_final_layer_is_kept_in_the_caches_class_order(
    pieces: Path, tmp_path: Path, teacher: str, bias: bool
) -> None:
    cache = dumped(pieces, tmp_path / "c", teacher=f"{teacher}?bias={bias}", features=("squeeze:flatten",))
    order = [4, 3, 2, 1, 0] if teacher == "opposite" else [0, 1, 2, 3, 4]
    layer = load_user_file(pieces).conv(bias=bias).fc
    kept = cache.classifier(teacher)
    assert kept is not None
    weight, stored_bias = kept
    assert torch.equal(weight, layer.weight.detach()[order])
    assert (stored_bias is None) == (not bias)
    targets = everything(cache, 0, ["squeeze:flatten"])
    made = targets.feature("squeeze:flatten").double() @ weight.double().T
    if stored_bias is not None:
        assert torch.equal(stored_bias, layer.bias.detach()[order])
        made += stored_bias.double()
    # |W (h' - h)| <= |W| |h' - h|, and the error of each h' is stored
    length = targets.feature("squeeze:flatten").double().norm(dim=1).numpy() * 1.01
    bound = weight.double().norm(dim=1).max().item() * length * stored_error(cache, teacher, "squeeze:flatten", 0)
    apart = (made - targets.logits().double()).abs().amax(dim=1).numpy()
    assert (apart <= bound + 1e-6).all() and apart.max() > 0


@pytest.mark.parametrize("teacher", ["wrapped?how=scaled", "wrapped?how=probs", "conv"])
def test_without_a_final_layer_or_features_nothing_is_kept(pieces: Path, tmp_path: Path, teacher: str) -> None:
    features = () if teacher == "conv" else ("inner.deep:pool",)
    cache = dumped(pieces, tmp_path / "c", teacher=teacher, features=features)
    assert cache.classifier(model_member(cache)) is None
    assert not [file.path for file in cache.manifest.files if file.kind == "constants"]


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[str, tuple[str, ...], type[SoftcacheError], str, str]] = {
    "an unknown module": ("conv", ("dep:pool",), ConfigError, "no module 'dep'", "did you mean 'deep'"),
    "an unknown reduction": ("conv", ("deep:poool",), ConfigError, "unknown reduction 'poool'", "did you mean 'pool'"),
    "a second one": ("conv", ("stem:map,deep:poll",), ConfigError, "unknown reduction 'poll'", "did you mean 'pool'"),
    "a misfit": ("conv", ("fc:pool",), ConfigError, r"'fc' gives \(B, 5\)", "reductions that fit: map, flatten, sign"),
    "tokens": ("conv", ("deep:cls",), ConfigError, "wants tokens", "map, pool, flatten, attention"),
    "twice": ("conv", ("deep:pool", "deep:pool"), ConfigError, "named twice", ""),
    "one module of two": ("conv", ("deep:fsp",), ConfigError, "takes 2 modules, got 1", "layer1"),
    "called twice": ("wrapped?how=twice", ("inner.stem:pool",), ConfigError, "called more than once", "around it"),
    "not called": ("wrapped?how=none", ("spare:flatten",), ConfigError, "was not called", "--list-modules"),
    "a function": ("function", ("fc:flatten",), ModelError, "'function' is no torch module", "features"),
    "scikit-learn": ("neighbours", ("fc:flatten",), ModelError, "'neighbours' is no torch module", "features"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(pieces: Path, tmp_path: Path, case: str) -> None:
    teacher, features, error, message, tip = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        dumped(pieces, tmp_path / "c", teacher=teacher, features=features)
    assert tip in raised.value.tip
    assert not (tmp_path / "c").exists()


def test_a_member_that_lacks_the_module_is_refused(pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no module 'deep'") as raised:
        dumped(pieces, tmp_path / "c", teacher=("conv", "wrapped?how=none"), features=("deep:pool",))
    assert "inner.deep" in raised.value.tip
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e5", "3e38"])
def test_a_feature_that_cannot_be_stored_names_the_samples(
    pieces: Path, tmp_path: Path, value: str, dtype: str
) -> None:
    out = tmp_path / "c"
    arguments = (pieces, out, "marked", f"blows?value={value}")
    if dtype == "int8" and value in ("1e5", "3e38"):  # within a step of 255
        cache = dumped(*arguments, features=("inner:flatten",), feature_dtype=dtype)
        largest = everything(cache, 0, ["inner:flatten"]).feature("inner:flatten").amax(dim=1)
        keys = [cache.samples.key(int(row)) for row in np.flatnonzero(largest.numpy() > 100)]
        assert sorted(keys) == ["some/007", "some/021"]
        return
    with pytest.raises((TeacherError, CodecRangeError), match=r"'inner:flatten'.*some/0(07|21)") as raised:
        dumped(*arguments, features=("inner:flatten",), feature_dtype=dtype, batch_size=64)
    assert "some/007" in str(raised.value) and "some/021" in str(raised.value)
    assert "some/008" not in str(raised.value)
    assert not (out / "manifest.json").exists()


def test_the_command_line_refuses_with_the_near_name(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["dump", "--data", f"{pieces}:images", "--teacher", f"{pieces}:conv", "--out", str(tmp_path / "c")]
    assert cli.main([*argv, "--features", "deep:pool", "--features", "step:gram", "--threads", "1"]) == 2
    told = capsys.readouterr().err
    assert "no module 'step'" in told and "did you mean 'stem'" in told and "Traceback" not in told


def test_modules_are_listed_and_nothing_is_written(
    pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["dump", "--data", f"{pieces}:images", "--teacher", f"{pieces}:conv", "--out", str(tmp_path / "c")]
    assert cli.main([*argv, "--teacher", f"{pieces}:wrapped?how=twice", "--list-modules"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"conv", "deep Conv2d 10 x 4 x 4", "fc Linear 5", "wrapped", "inner.wide Conv2d 40 x 2 x 2"} <= set(lines)
    assert "inner.stem Conv2d 6 x 8 x 8 2" in lines and "spare Linear (nothing) 0" in lines
    assert not (tmp_path / "c").exists()


def test_sizes_are_told_before_the_first_row(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dump, "write_spans", lambda *_, **__: pytest.fail("printed too late"))
    with pytest.raises(pytest.fail.Exception, match="printed too late"):
        dump.run(config(pieces, tmp_path / "c", features=("wide:gram,deep:sign",), policy=POLICY, views=3))
    told = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    records = 3 * COUNT
    assert f"conv float32 22 {22 * records / 1000:.1f} kB" in told  # 5 logits and eps
    assert f"conv wide:gram as map, float16 322 {322 * records / 1000:.1f} kB" in told  # 160 numbers and their error
    assert f"conv deep:sign as sign, float16 22 {22 * records / 1000:.1f} kB" in told
    assert told[0] == f"40 samples x 3 views, 1 parts; {366 * records / 1000:.1f} kB in all"


def test_a_cached_feature_reads_its_own_description(caches: dict[tuple[str, str], softcache.Cache]) -> None:
    """The manifest alone says how a feature is decoded: names, forms, shapes and data sets."""
    for cache in caches.values():
        for info in cache.member(model_member(cache)).features:
            made = StoredFeature.described(info.name, info.dtype, info.stored, info.arrays, info.shapes)
            assert str(made.spec) == info.name and made.codec.form == info.stored and made.codec.dtype == info.dtype
            assert list(made.names.values()) == list(info.arrays)

"""Codecs that are fitted on a probe: within their eps, true to their promise, the same again from stored constants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
import pytest
import torch
from codec_rows import CLASSES, ROWS, TEMPERATURES, given, kl
from torch import Tensor

from softcache.codecs import Codec, Field, Probe, make_codec, matmul
from softcache.codecs.fidelity import eps_of, round_up_to_half
from softcache.codecs.linear_head import LinearHeadCodec
from softcache.codecs.lowrank import LowRankCodec, share_above
from softcache.codecs.matmul import affine, affine_rounding, full_float32
from softcache.codecs.transform import GROUP, MAX_BITS, allot, dequantise, principal_components, quantise, quantisers
from softcache.errors import CodecFitError, CodecRangeError, ConfigError

WIDTH = 24  # D of the teachers made up here
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "lowrank": ("lowrank", {}),
    "lowrank, loose": ("lowrank", {"max_kl": "0.001", "at_temperature": "1.0"}),
    "linear_head": ("linear_head", {}),
    "linear_head, int8": ("linear_head", {"dtype": "int8"}),
    "linear_head, groups": ("linear_head", {"group": "8"}),
}
LOWRANK = [case for case, (name, _) in CASES.items() if name == "lowrank"]
HEADS = [case for case, (name, _) in CASES.items() if name == "linear_head"]
over_cases = pytest.mark.parametrize("case", CASES)
over_lowrank = pytest.mark.parametrize("case", LOWRANK)
over_heads = pytest.mark.parametrize("case", HEADS)


@cache
def head(classes: int) -> tuple[Tensor, Tensor]:
    """(C, D) weight and (C,) bias of a made-up teacher's final layer."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, WIDTH, generator=generator) * torch.logspace(0.3, -0.8, WIDTH)
    return weight, torch.randn(classes, generator=generator) / 4


def teacher_rows(classes: int, count: int, *, seed: int, level: float = 0.0) -> Probe:
    """What that teacher gives for `count` samples; `level` shifts some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator).relu() * 2
    weight, bias = head(classes)
    logits = (inputs.double() @ weight.double().T + bias).float()
    logits[::2] += level
    return Probe(logits, inputs, weight, bias)


def probe_rows(classes: int) -> int:
    return 512 if classes <= 1000 else 64


@cache
def fitted(case: str, classes: int) -> Codec:
    name, parameters = CASES[case]
    return make_codec(name, parameters, classes).fit(teacher_rows(classes, probe_rows(classes), seed=0))


def made_from(codec: Codec) -> Codec:
    """The same codec the way a reader gets it: by name, parameters and stored constants."""
    stored = {name: value.numpy().copy() for name, value in codec.constants.items()}
    again = make_codec(codec.name, codec.parameters, codec.num_classes)
    return again.with_constants({name: torch.tensor(value) for name, value in stored.items()})


@cache
def by_hand(case: str, classes: int) -> Codec:
    """lowrank with the teacher's own directions as its basis, and widths that try every kind of part."""
    weight, bias = head(classes)
    directions, lengths, _ = torch.linalg.svd(weight - weight.mean(dim=0), full_matrices=False)
    count = min(WIDTH, classes // GROUP * GROUP)
    bits = torch.tensor([14, 9, 3], dtype=torch.uint8)[: count // GROUP]
    constants = {
        "mean": bias - bias.mean(),
        "basis": directions[:, :count].half(),
        "step": 8 * lengths[:count] / 2.0 ** bits.repeat_interleave(GROUP),
        "bits": bits,
    }
    name, parameters = CASES[case]
    return make_codec(name, parameters, classes).with_constants(constants)


def lowrank(case: str, classes: int) -> LowRankCodec:
    codec = fitted(case, classes)
    assert isinstance(codec, LowRankCodec)
    return codec


def exact(values: Tensor) -> np.ndarray:
    return values.double().numpy()


# ----------------------------------------------------------------------------------------------------------------- bounds


def check_bounds(codec: Codec, rows: Tensor, arrays: Mapping[str, Tensor]) -> int:
    """Check the rows whose eps is finite; the dump refuses the others. How many these are."""
    decoded = codec.decode(arrays)
    if isinstance(codec, LowRankCodec):
        check_promise(codec, rows, decoded, arrays)
    eps = exact(round_up_to_half(eps_of(codec, rows, arrays, decoded)))
    held = np.isfinite(eps)
    rows, decoded, eps = rows[held], decoded[held], eps[held]
    assert decoded.dtype == torch.float32
    assert (np.abs(exact(decoded) - exact(rows)).max(axis=1, initial=0.0) <= eps).all()
    assert (np.abs(exact(decoded).mean(axis=1) - exact(rows).mean(axis=1)) <= eps).all()
    for t in TEMPERATURES:
        assert (kl(rows, decoded, t) <= eps**2 / (2 * t * t) * (1 + 1e-9) + 1e-300).all()
    return len(rows)


def check_promise(codec: LowRankCodec, rows: Tensor, decoded: Tensor, arrays: Mapping[str, Tensor]) -> None:
    assert (kl(rows, decoded, codec.at_temperature) <= codec.max_kl * (1 + 1e-6)).all()
    level, number, _ = (field_values(arrays["records"], field) for field in codec.fields)
    at = arrays["dense_at"].numpy()
    assert arrays["dense"].dtype == torch.float16 and arrays["dense"].shape == (len(at), codec.num_classes)
    assert arrays["dense_at"].dtype == torch.int64 and (np.diff(at) > 0).all() and (number == 0).all()
    above = rows.numpy()[at] - rows.numpy()[at].max(axis=1, keepdims=True)  # float32
    assert np.array_equal(level[at], rows.numpy()[at].max(axis=1, keepdims=True))
    assert np.array_equal(arrays["dense"].numpy(), above.astype(np.float16))
    assert np.array_equal(decoded.numpy()[at], above.astype(np.float16).astype(np.float32) + level[at])


def field_values(records: Tensor, field: Field) -> np.ndarray:
    """(B, numbers) of one field, by its offset, dtype and shape alone."""
    size = np.dtype(field.dtype).itemsize * math.prod(field.shape)
    part = np.ascontiguousarray(records.numpy()[:, field.offset : field.offset + size])
    return part.view(field.dtype)


def split_and_check(codec: Codec, rows: Tensor, inputs: Tensor | None) -> int:
    """Check the rows that the codec does not refuse; how many these are."""
    try:
        arrays = codec.encode(rows, inputs)
    except CodecRangeError:
        if len(rows) == 1:
            return 0
        halves = [slice(0, len(rows) // 2), slice(len(rows) // 2, None)]
        return sum(split_and_check(codec, rows[half], None if inputs is None else inputs[half]) for half in halves)
    return check_bounds(codec, rows, arrays)


OWN = {"its own": 0.0, "its own, other levels": 3e4}
# what float16 cannot hold below the row's largest, or not to the promise; every other kind is held, dense if need be
REFUSED = {
    "a level far away",
    "heavy tails",
    "largest of float16",
    "above float16",
    "largest of float32",
    "range above float32",
    "one class too far below",
}


def check_kinds(codec: Codec, total: int, seed: int) -> None:
    """`total` rows of lowrank: those its teacher gives, at other levels, and every kind of row that it was not fitted for."""
    classes, each = codec.num_classes, math.ceil(total / (len(ROWS) + len(OWN)))
    for level in OWN.values():
        assert split_and_check(codec, teacher_rows(classes, each, seed=seed, level=level).logits, None) == each
    for kind in ROWS:
        if kind in REFUSED:  # the rows that are held have to be found one by one
            split_and_check(codec, given(kind, min(each, 16), classes, seed=seed), None)
            continue
        found = split_and_check(codec, given(kind, each, classes, seed=seed), None)
        # of these, a few have two classes on top that are closer than float16's step at their size
        few = each // 10 + 1 if kind == "huge range" else 0
        assert found >= each - few, f"refused {each - found} of {each} rows of kind {kind!r}"


def check_inputs(case: str, classes: int, total: int, seed: int) -> None:
    """`total` rows of linear_head: its teacher's inputs, and inputs of every kind with the logits that they give."""
    codec, each = fitted(case, classes), math.ceil(total / (len(ROWS) + 1))
    probe = teacher_rows(classes, each, seed=seed)
    assert split_and_check(codec, probe.logits, probe.classifier_input) == each
    weight, bias = head(classes)
    for kind in ROWS:
        inputs = given(kind, each, WIDTH, seed=seed)
        logits = (inputs.double() @ weight.double().T + bias).float()
        held = (
            logits.abs().amax(dim=1) < 1e4
        )  # an error of those beyond may be more than float16 holds: eps is infinite
        split_and_check(codec, logits[held], inputs[held])


def property_rows(classes: int) -> int:
    return 100_000 if classes <= 100 else 10_000 if classes <= 1000 else 256


TENTH = [("lowrank", classes) for classes in CLASSES] + [("lowrank, loose", classes) for classes in CLASSES[:3]]


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize(("case", "classes"), TENTH)
def test_lowrank_holds_a_tenth_of_the_property(case: str, classes: int) -> None:
    codec = fitted(case, classes) if classes in (100, 1000) else by_hand(case, classes)
    check_kinds(codec, property_rows(classes) // 10, seed=1)


@pytest.mark.whole
@pytest.mark.parametrize("classes", CLASSES)
@over_lowrank
def test_lowrank_breaks_no_bound_and_no_promise(case: str, classes: int) -> None:
    check_kinds(by_hand(case, classes) if classes == 10 else fitted(case, classes), property_rows(classes), seed=2)


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("classes", CLASSES)
@over_heads
def test_linear_head_holds_a_tenth_of_the_property(case: str, classes: int) -> None:
    check_inputs(case, classes, property_rows(classes) // 10, seed=1)


@pytest.mark.whole
@pytest.mark.parametrize("classes", CLASSES)
@over_heads
def test_linear_head_breaks_no_bound(case: str, classes: int) -> None:
    check_inputs(case, classes, property_rows(classes), seed=2)


@over_cases
def test_a_level_far_from_zero_costs_no_more_than_float32s_rounding(case: str) -> None:
    """lowrank keeps the level apart; linear_head has it in the layer's bias."""
    codec, near, far = fitted(case, 100), teacher_rows(100, 64, seed=3), teacher_rows(100, 64, seed=3, level=1e5)
    if case in HEADS:
        shift = {**codec.constants, "bias": codec.constants["bias"] + 1e5}
        far, other = Probe(near.logits + 1e5, near.classifier_input), codec.with_constants(shift)
    else:
        other = codec
    found = []
    for one, probe in ((codec, near), (other, far)):
        arrays = one.encode(probe.logits, probe.classifier_input)
        found.append((one.decode(arrays) - probe.logits).abs().amax(dim=1))
        assert len(arrays.get("dense_at", ())) < 4
    assert (found[1] <= found[0] + 4 * 1e5 * 2.0**-23).all()


def test_dense_rows_and_others_lie_side_by_side() -> None:
    codec = lowrank("lowrank", 100)
    rows = teacher_rows(100, 32, seed=3).logits
    rows[::4] = given("normal", 8, 100)
    arrays = codec.encode(rows)
    dense = arrays["dense_at"].tolist()
    assert set(range(0, 32, 4)) <= set(dense) and len(dense) < 12
    without = codec.decode({"records": arrays["records"]})
    others = [i for i in range(32) if i not in dense]
    assert torch.equal(codec.decode(arrays)[others], without[others])
    assert (kl(rows[dense], without[dense], codec.at_temperature) > codec.max_kl).all()
    assert (codec.rounding(arrays)[dense] == 0).all() and (codec.rounding(arrays)[others] > 0).all()


@over_cases
def test_no_rows_at_all(case: str) -> None:
    codec, probe = fitted(case, 100), teacher_rows(100, 1, seed=0)
    assert probe.classifier_input is not None
    arrays = codec.encode(probe.logits[:0], probe.classifier_input[:0])
    assert codec.decode(arrays).shape == (0, 100) and eps_of(
        codec, probe.logits[:0], arrays, codec.decode(arrays)
    ).shape == (0,)


# ----------------------------------------------------------------------------------------------------- an independent reader


def read_lowrank(codec: Codec, records: Tensor) -> np.ndarray:
    """(B, C) float64 logits from the field table and the constants, bit by bit."""
    level, _, packed = (field_values(records, field) for field in codec.fields)
    constants = {name: value.numpy() for name, value in codec.constants.items()}
    bits = constants["bits"].astype(int)
    widths = [min(b, 8) for b in bits] + [b - 8 for b in bits if b > 8]
    stream = np.unpackbits(packed, axis=1, bitorder="little").astype(np.int64)
    parts, start = [], 0
    for width in widths:
        eight = stream[:, start : start + 8 * width].reshape(len(stream), 8, width)
        parts.append((eight << np.arange(width)).sum(axis=2))
        start += 8 * width
    assert start == stream.shape[1]
    codes = np.stack(parts[: len(bits)], axis=1)
    for i, high in enumerate(parts[len(bits) :]):
        codes[:, i] += high << 8
    middle = codes + 0.5 - 2.0 ** (bits - 1)[:, None]
    coordinates = middle.reshape(len(codes), -1) * constants["step"].astype(np.float64)
    return level + constants["mean"].astype(np.float64) + coordinates @ constants["basis"].astype(np.float64).T


def read_linear_head(codec: Codec, arrays: Mapping[str, Tensor]) -> np.ndarray:
    weight, bias = (exact(codec.constants[name]) for name in ("weight", "bias"))
    if not codec.fields:
        return exact(arrays["head_input"]) @ weight.T + bias
    lowest, step, codes = (field_values(arrays["records"], field).astype(np.float64) for field in codec.fields)
    if "group" in codec.parameters:
        lowest, step = (one.repeat(int(codec.parameters["group"]), axis=1)[:, :WIDTH] for one in (lowest, step))
    return (lowest + step * codes) @ weight.T + bias


@pytest.mark.slow
@pytest.mark.parametrize("classes", [100, 1000])
@over_cases
def test_an_independent_reader_finds_the_same(case: str, classes: int) -> None:
    codecs = [fitted(case, classes)] + ([by_hand(case, classes)] if case in LOWRANK else [])
    for codec in codecs:
        probe = teacher_rows(classes, 64, seed=4, level=50.0)
        arrays = {n: v for n, v in codec.encode(probe.logits, probe.classifier_input).items() if n in codec.arrays}
        for name, (dtype, shape) in codec.arrays.items():
            assert arrays[name].numpy().dtype == np.dtype(dtype) and arrays[name].shape == (64, *shape)
        read = read_lowrank(codec, arrays["records"]) if case in LOWRANK else read_linear_head(codec, arrays)
        rounding = codec.rounding(arrays)
        assert rounding is not None
        error = np.abs(exact(codec.decode(arrays)) - read).max(axis=1)
        assert (error <= exact(rounding)).all()
        apart = np.abs(read - exact(probe.logits)).max(axis=1)
        share = 0.05 if "group" in codec.parameters else 0.01  # there by lengths alone
        assert (exact(rounding) < share * np.median(apart)).all()  # not a bound that hides everything


@pytest.mark.parametrize("width", [1, 16, 512])
def test_the_rounding_bound_covers_every_order_of_sums(width: int) -> None:
    rng = np.random.default_rng(width)
    values, matrix, offset = rng.normal(3, 5, (8, width)), rng.normal(1, 1, (20, width)), rng.normal(0, 9, 20)
    values, matrix, offset = (a.astype(np.float32) for a in (values, matrix, offset))
    tensors = [torch.from_numpy(a) for a in (values, matrix, offset)]
    bound = exact(affine_rounding(*tensors))
    made = []
    for _ in range(8):
        order = rng.permutation(width)
        total = np.repeat(offset[None], 8, axis=0)
        for j in order:  # one after the other in float32: the worst of all ways
            total = total + values[:, j : j + 1] * matrix[None, :, j]
        made.append(total)
    assert made[0].dtype == np.float32
    spread = np.ptp(np.stack([*made, affine(*tensors).numpy()]).astype(np.float64), axis=0).max(axis=1)
    assert (spread <= bound).all()
    assert (bound < 4e-7 * (width + 4) * (np.abs(values) @ np.abs(matrix).T + np.abs(offset)).max(axis=1)).all()


@over_cases
def test_restored_from_its_constants_it_is_the_same(case: str) -> None:
    codec, probe = fitted(case, 1000), teacher_rows(1000, 64, seed=5)
    again = made_from(codec)
    assert again == codec and again.fields == codec.fields and again.arrays == codec.arrays
    first, second = (c.encode(probe.logits, probe.classifier_input) for c in (codec, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(codec.decode(first), again.decode(second))
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in codec.constants.values())


@pytest.mark.slow
@over_cases
def test_fitting_twice_gives_the_same_constants(case: str) -> None:
    name, parameters = CASES[case]
    again = make_codec(name, parameters, 100).fit(teacher_rows(100, probe_rows(100), seed=0))
    wanted = fitted(case, 100).constants
    assert again.constants.keys() == wanted.keys()
    assert all(torch.equal(again.constants[n], wanted[n]) for n in wanted)


@over_cases
def test_decoding_is_float32_inside_autocast(case: str) -> None:
    codec, probe = fitted(case, 100), teacher_rows(100, 64, seed=6)
    arrays = codec.encode(probe.logits, probe.classifier_input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = codec.decode(arrays)
        again = codec.encode(probe.logits, probe.classifier_input)
        assert torch.is_autocast_enabled("cpu")
    assert inside.dtype == torch.float32 and torch.equal(inside, codec.decode(arrays))
    assert all(torch.equal(again[name], arrays[name]) for name in arrays)


def precisions() -> list[str]:
    """What is set, in torch's older and newer way."""
    return [torch.get_float32_matmul_precision(), *newer_precisions()]


def newer_precisions() -> list[str]:
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend.fp32_precision for backend in backends if hasattr(backend, "fp32_precision")]


@pytest.fixture
def _put_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_put_back")
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_float32_precision_is_full_inside_and_put_back(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    before, inside = precisions(), []

    def fail_inside() -> None:
        with full_float32(torch.device("cpu")):
            inside.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert inside == [("highest", False)] and precisions() == before


@pytest.mark.usefixtures("_put_back")
def test_float32_precision_set_for_one_backend_is_put_back() -> None:
    if not newer_precisions():
        with full_float32(torch.device("cpu")):
            assert not torch.backends.cuda.matmul.allow_tf32
        return
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = newer_precisions()
    with full_float32(torch.device("cpu")):
        assert "tf32" not in newer_precisions() and not torch.backends.cuda.matmul.allow_tf32
    assert newer_precisions() == before


# ------------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.slow
def test_lowrank_is_small_and_seldom_dense() -> None:
    """24 directions of a thousand classes: less than a tenth of int8, on rows that the fit has not seen."""
    for case in LOWRANK:
        codec = lowrank(case, 1000)
        arrays = codec.encode(teacher_rows(1000, 2000, seed=7).logits)
        assert len(arrays["dense_at"]) < 40
        assert arrays["records"].shape[1] < 100


@pytest.mark.slow
def test_a_smaller_kl_takes_more_bytes() -> None:
    probe = teacher_rows(100, 512, seed=0)
    sizes = [LowRankCodec(100, max_kl, 4.0).fit(probe).arrays["records"][1][0] for max_kl in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert sizes == sorted(set(sizes))


@pytest.mark.slow
def test_a_measured_size_is_no_worse_than_its_neighbours() -> None:
    """What the fit minimises, on the rows that it does not see: records and dense rows together."""
    codec, fresh = lowrank("lowrank", 1000), teacher_rows(1000, 2000, seed=8).logits
    bits = codec.constants["bits"]

    def cost(one: LowRankCodec) -> float:
        arrays = one.encode(fresh)
        return arrays["records"].shape[1] + len(arrays["dense_at"]) / len(fresh) * 2000

    coarser = codec.with_constants({**codec.constants, "bits": bits - 2, "step": codec.constants["step"] * 4})
    assert cost(codec) < cost(coarser)


@pytest.mark.slow
def test_error_feedback_serves_the_likely_classes() -> None:
    """Against rounding each coordinate to the nearest code, with the same bytes: far less KL at T=1, at little cost at T=4."""
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(1012, 96, generator=generator) * torch.logspace(0, -1, 96)
    logits = inputs @ torch.randn(96, 500, generator=generator)
    codec, rows = LowRankCodec(500).fit(Probe(logits[:512])), logits[512:]
    arrays = codec.encode(rows)
    basis, step = exact(codec.constants["basis"]), exact(codec.constants["step"])
    half = 2.0 ** (np.repeat(codec.constants["bits"].numpy().astype(int), 8) - 1)
    level = exact(rows).mean(axis=1, keepdims=True)
    mean = exact(codec.constants["mean"])
    codes = np.clip(np.floor((exact(rows) - level - mean) @ basis / step), -half, half - 1) + 0.5
    nearest = torch.from_numpy(codes * step @ basis.T + mean + level)
    stored = codec.decode({"records": arrays["records"]})
    assert kl(rows, stored, 1.0).mean() < 0.5 * kl(rows, nearest, 1.0).mean()
    assert kl(rows, stored, 4.0).mean() < 1.5 * kl(rows, nearest, 4.0).mean()


# ----------------------------------------------------------------------------------------------------------------- the fitting


@pytest.mark.parametrize(("rows", "classes"), [(60, 20), (20, 60), (48, 48)])
def test_principal_components_are_numpys(rows: int, classes: int) -> None:
    given_rows = given("normal", rows, classes)
    mean, basis = principal_components(given_rows)
    above = exact(given_rows) - exact(given_rows).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(mean.numpy(), above.mean(axis=0), atol=1e-5)
    _, sizes, directions = np.linalg.svd(above - above.mean(axis=0))
    kept = int((sizes > 1e-4 * sizes[0]).sum())
    assert kept == min(rows, classes) - 1
    assert basis.shape == (classes, -(-kept // GROUP) * GROUP) and not basis[:, kept:].any()
    signs = np.sign((exact(basis)[:, :kept] * directions[:kept].T).sum(axis=0))
    np.testing.assert_allclose(exact(basis)[:, :kept] * signs, directions[:kept].T, atol=1e-5)


def test_quantisers_leave_the_error_they_say_and_no_load_leaves_less() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, [0.1, 1.0, 50.0, 3.0, 1.0, 1.0, 1.0, 0.0], (500, 8)).astype(np.float32)
    steps, errors = (exact(t) for t in quantisers(torch.from_numpy(values)))
    longer = np.concatenate([*[values] * 7, 1.8 * values]).astype(np.float64)  # an eighth is 1.8 times as long
    for bits in (1, 3, 8, MAX_BITS):
        half = 2.0 ** (bits - 1)
        for j in range(7):
            found = {}
            for factor in (0.7, 1.0, 1.4):
                step = steps[bits, j] * factor
                near = (np.clip(np.floor(longer[:, j] / step), -half, half - 1) + 0.5) * step
                found[factor] = ((near - longer[:, j]) ** 2).mean()
            np.testing.assert_allclose(errors[bits, j], found[1.0], rtol=2e-3)
            assert found[1.0] <= 1.02 * min(found.values())
    np.testing.assert_allclose(errors[0, :7], (longer[:, :7] ** 2).mean(axis=0), rtol=1e-4)
    assert (errors[:, 7] < 1e-30).all()


def test_dense_rows_are_expected_where_the_tail_reaches_though_none_was_seen() -> None:
    rng = np.random.default_rng(0)
    seen = torch.from_numpy(rng.lognormal(math.log(5e-5), 0.3, 256))
    more = rng.lognormal(math.log(5e-5), 0.3, 1_000_000)
    for limit in (1e-4, 1.5e-4):
        assert share_above(limit, seen) == pytest.approx((more > limit).mean(), rel=0.5)
    assert share_above(1e-3, seen) < 1e-9
    outliers = torch.cat([seen, torch.tensor([1.0, torch.inf, torch.nan, 1e-3])])
    assert share_above(1e-4, outliers) > share_above(1e-4, seen)
    assert share_above(2e-4, torch.full((100,), 1e-4)) == 0 and share_above(5e-5, torch.full((100,), 1e-4)) == 1


def test_codes_are_cells_and_ends_hold_what_is_beyond() -> None:
    values = torch.tensor([-9.0, -2.0, -0.01, 0.0, 0.99, 1.0, 9.0])
    codes = quantise(values, torch.tensor(1.0), torch.tensor(2.0))
    assert codes.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert dequantise(codes, torch.tensor(2.0)).tolist() == [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5]


def test_bytes_go_where_they_lower_the_error_most() -> None:
    def error(group: int, bits: Tensor) -> Tensor:
        return (100.0, 10.0, 1.0)[group] * 4.0**-bits + (5.0, 0.0, 0.0)[group]  # the first one soon gains nothing more

    each = torch.arange(MAX_BITS + 1.0)
    errors = torch.stack([error(group, each) for group in range(3)], dim=1).repeat_interleave(GROUP, dim=1)
    for size in (1, 2, 7, 20, 3 * MAX_BITS):
        options = [option for option in np.ndindex(*(MAX_BITS + 1,) * 3) if sum(option) == size]
        best = min(options, key=lambda option: sum(float(errors[b, GROUP * i]) for i, b in enumerate(option)))
        assert tuple(allot(errors, size).tolist()) == best


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["lowrank", "linear_head"])
def test_not_fitted(name: str) -> None:
    codec, probe = make_codec(name, {}, 100), teacher_rows(100, 4, seed=0)
    uses = [
        lambda: codec.arrays,
        lambda: codec.constants,
        lambda: codec.encode(probe.logits, probe.classifier_input),
        lambda: codec.decode({"records": torch.zeros(1, 9, dtype=torch.uint8), "head_input": torch.zeros(1, WIDTH)}),
    ]
    for use in uses:
        with pytest.raises(CodecFitError, match=rf"codec '{name}' is not fitted yet"):
            use()


@over_cases
def test_parameters_are_what_was_chosen(case: str) -> None:
    name, parameters = CASES[case]
    codec = fitted(case, 100)
    defaults = {"lowrank": {"max_kl": "0.0001", "at_temperature": "4.0"}, "linear_head": {"dtype": "float16"}}[name]
    defaults = {} if "group" in parameters else defaults
    assert codec.parameters == {**defaults, **parameters}
    assert make_codec(name, codec.parameters, 100) == codec
    assert codec.keeps_level and codec.complete and codec.bounded and codec.temperature_range is None
    assert codec.needs_classifier == (name == "linear_head")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("lowrank", {"max_kl": "0"}, r"max_kl=0 and at_temperature=4 must be > 0"),
        ("lowrank", {"at_temperature": "-1"}, r"at_temperature=-1 must be > 0"),
        ("lowrank", {"max_kl": "nan"}, r"max_kl=nan"),
        ("lowrank", {"rank": "3"}, r"has no parameter 'rank'"),
        ("linear_head", {"dtype": "int4"}, r"dtype: unknown value 'int4'"),
        ("linear_head", {"group": "-1"}, r"group=-1: must be at least 1, or 0"),
    ],
    ids=["max_kl", "temperature", "nan", "unknown", "dtype", "group"],
)
def test_parameters_that_cannot_be(name: str, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_codec(name, parameters, 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "classes", "message"),
    [
        (
            "normal",
            300,
            r"does not pay: with KL <= 0.0001 at T=4 a record takes it \d+ B.*, and int8 308 B",
        ),
        ("normal", 10, r"does not pay: .* int8 18 B"),
        ("heavy tails", 300, r"does not pay"),
        ("constants", 2, r"does not pay"),
    ],
    ids=["unstructured", "few classes", "heavy tails", "two classes"],
)
def test_lowrank_refuses_rows_on_which_it_does_not_pay(kind: str, classes: int, message: str) -> None:
    with pytest.raises(CodecFitError, match=message) as caught:
        LowRankCodec(classes).fit(Probe(given(kind, 256, classes)))
    assert "--codec" in caught.value.tip


def test_lowrank_refuses_a_small_probe() -> None:
    with pytest.raises(CodecFitError, match="at least 32 rows, and there are 31"):
        LowRankCodec(100).fit(teacher_rows(100, 31, seed=0))


def test_lowrank_refuses_what_float16_cannot_hold_to_the_promise() -> None:
    strict = LowRankCodec(100, 1e-12, 1.0).with_constants(fitted("lowrank", 100).constants)
    with pytest.raises(CodecRangeError, match=r"float16, which is not enough here: KL .* at T=1, logits up to"):
        strict.encode(teacher_rows(100, 4, seed=0).logits)


def broken_heads() -> dict[str, Probe]:
    probe = teacher_rows(100, 64, seed=0)
    weight, bias = head(100)
    return {
        "none": Probe(probe.logits),
        "no input": Probe(probe.logits, None, weight, bias),
        "log_softmax": Probe(probe.logits.log_softmax(dim=1), probe.classifier_input, weight, bias),
        "class order": Probe(probe.logits.roll(1, dims=1), probe.classifier_input, weight, bias),
        "bias": Probe(probe.logits, probe.classifier_input, weight, bias + 0.1),
        "not finite": Probe(probe.logits, probe.classifier_input, weight * torch.nan, bias),
    }


@pytest.mark.parametrize("which", broken_heads())
def test_linear_head_refuses_a_layer_that_does_not_give_the_logits(which: str) -> None:
    probe = broken_heads()[which]
    with pytest.raises(CodecFitError, match=r"no final nn.Linear|gives numbers up to .* off the logits") as caught:
        LinearHeadCodec(100).fit(probe)
    assert "--codec headtail" in caught.value.tip


def test_linear_head_takes_a_layer_without_bias() -> None:
    probe, (weight, _) = teacher_rows(100, 64, seed=0), head(100)
    assert probe.classifier_input is not None
    codec = LinearHeadCodec(100).fit(Probe(probe.classifier_input @ weight.T, probe.classifier_input, weight))
    assert torch.equal(codec.constants["bias"], torch.zeros(100)) and torch.equal(codec.constants["weight"], weight)


def test_linear_head_says_how_far_off_the_layer_is() -> None:
    probe = broken_heads()["bias"]
    with pytest.raises(CodecFitError, match=r"up to 0\.1 off"):
        LinearHeadCodec(100).fit(probe)


def test_linear_head_accepts_a_teacher_in_tf32() -> None:
    probe = teacher_rows(100, 64, seed=0)
    moved = probe.logits * (1 + 2.0**-11)
    assert LinearHeadCodec(100).fit(Probe(moved, *(probe.classifier_input, *head(100)))).constants.keys() == {
        "weight",
        "bias",
    }


def test_linear_head_in_float16_refuses_overflow_and_int8_holds_it() -> None:
    probe = teacher_rows(100, 4, seed=0)
    assert probe.classifier_input is not None
    large = probe.classifier_input * 1e5
    with pytest.raises(CodecRangeError, match=r"float16 holds inputs up to 65504 of the final layer, found \d"):
        fitted("linear_head", 100).encode(probe.logits, large)
    codec = fitted("linear_head, int8", 100)
    decoded = codec.decode(codec.encode(probe.logits, large))
    wanted = exact(large) @ exact(head(100)[0]).T
    assert (np.abs(exact(decoded) - wanted) < 0.02 * np.abs(wanted).max()).all()


def test_linear_head_in_int8_is_off_by_half_a_step_of_the_rows_range() -> None:
    probe, codec = teacher_rows(100, 64, seed=0), fitted("linear_head, int8", 100)
    assert probe.classifier_input is not None
    lowest, step, codes = (
        field_values(codec.encode(probe.logits, probe.classifier_input)["records"], field).astype(np.float64)
        for field in codec.fields
    )
    inputs = exact(probe.classifier_input)
    np.testing.assert_allclose(step[:, 0], np.ptp(inputs, axis=1) / 255, rtol=1e-6)
    assert (np.abs(lowest + step * codes - inputs) <= step * 0.5001).all()


def grouped_head(**more: float) -> tuple[LinearHeadCodec, Probe]:
    """linear_head in groups, of a teacher whose layer's weight is of bfloat16, scaled and capped afterwards."""
    probe, (weight, bias) = teacher_rows(100, 64, seed=0), head(100)
    assert probe.classifier_input is not None
    weight = weight.bfloat16().float()
    exact_ = probe.classifier_input.double() @ weight.double().T + bias
    cap, scale = more.get("cap", 0.0), more.get("scale", 1.0)
    bent = (torch.tanh(exact_ / cap) * cap if cap else exact_) * scale
    probe = Probe(bent.float(), probe.classifier_input, weight, bias, scale, cap)
    return LinearHeadCodec(100, group=10).fit(probe), probe


def test_linear_head_in_groups_takes_the_bytes_of_its_groups() -> None:
    """1,088 bytes of 1,024 numbers, 1,090 with the bound."""
    weight, inputs = torch.randn(3, 1024), torch.randn(40, 1024)
    probe = Probe(inputs @ weight.T, inputs, weight, torch.zeros(3))
    assert make_codec("linear_head", {"group": "64"}, 3).fit(probe).arrays == {"records": ("|u1", (1024 + 16 * 4,))}
    codec, _ = grouped_head()
    assert (
        codec.arrays == {"records": ("|u1", (WIDTH + 3 * 4,))}
        and codec.format == 2
        and codec.parameters == {"group": "10"}
    )
    assert make_codec("linear_head", {}, 3).format == 1


@pytest.mark.parametrize("more", [{}, {"cap": 5.0}, {"scale": 0.0625}, {"cap": 3.0, "scale": -2.0}], ids=str)
def test_linear_head_in_groups_gives_the_scaled_and_capped_logits_within_eps(more: dict[str, float]) -> None:
    codec, probe = grouped_head(**more)
    assert probe.classifier_input is not None
    arrays = codec.encode(probe.logits, probe.classifier_input)
    decoded = codec.decode(arrays)
    eps = eps_of(codec, probe.logits, arrays, decoded)
    apart = (decoded - probe.logits).abs().amax(dim=1)
    assert bool((apart <= eps).all()) and bool((eps <= 1.5 * apart + 1e-3).all())
    lowest, step, codes = (field_values(arrays["records"], field).astype(np.float64) for field in codec.fields)
    numbers = codes * step.repeat(10, axis=1)[:, :WIDTH] + lowest.repeat(10, axis=1)[:, :WIDTH]
    assert (np.abs(numbers - exact(probe.classifier_input)) <= step.repeat(10, axis=1)[:, :WIDTH] * 0.5001).all()
    own = numbers @ exact(probe.classifier_weight).T + exact(probe.classifier_bias)
    cap, scale = more.get("cap", 0.0), more.get("scale", 1.0)
    own = (np.tanh(own / cap) * cap if cap else own) * scale
    rounding = codec.rounding(arrays)
    assert rounding is not None and (np.abs(exact(decoded) - own).max(axis=1) <= exact(rounding)).all()
    again = make_codec(codec.name, codec.parameters, 100).with_constants(codec.constants)
    assert torch.equal(again.decode(arrays), decoded)
    if more:
        with pytest.raises(CodecFitError, match="off the logits"):
            LinearHeadCodec(100, group=10).fit(Probe(probe.logits, probe.classifier_input, *head(100)))


def test_the_rounding_of_sums_is_scaled_and_that_of_a_cap_is_added() -> None:
    found = {}
    for name, more in {"plain": {}, "scaled": {"scale": -8.0}, "capped": {"cap": 64.0, "scale": 2.0}}.items():
        codec, probe = grouped_head(**more)
        rounding = codec.rounding(codec.encode(probe.logits, probe.classifier_input))
        assert rounding is not None
        found[name] = exact(rounding)
    np.testing.assert_allclose(found["scaled"], 8 * found["plain"], rtol=1e-6)
    np.testing.assert_allclose(found["capped"], 2 * (found["plain"] + 64 * 2.0**-20), rtol=1e-6)


def test_the_weight_stays_in_16_bits_exactly_where_it_can() -> None:
    codec, probe = grouped_head()
    assert probe.classifier_weight is not None
    assert codec.constants["weight"].dtype == torch.uint16
    assert torch.equal(codec.constants["weight"].view(torch.bfloat16).float(), probe.classifier_weight)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in codec._layers.values())
    weight, bias = head(100)
    inputs = teacher_rows(100, 64, seed=0).classifier_input
    assert inputs is not None
    for scaled, dtype in ((weight, torch.float16), (weight * 1e5, torch.uint16)):
        logits = (inputs.double() @ scaled.double().T + bias).float()
        fitted_ = LinearHeadCodec(100, group=8).fit(Probe(logits, inputs, scaled, bias))
        assert fitted_.constants["weight"].dtype == dtype


def test_a_large_weight_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, probe = grouped_head()
    arrays = codec.encode(probe.logits, probe.classifier_input)
    whole, rounding = codec.decode(arrays), codec.rounding(arrays)
    monkeypatch.setattr(matmul, "PIECE", 7 * WIDTH + 3)
    again = LinearHeadCodec(100, group=10).with_constants(codec.constants)
    assert float((again.decode(arrays) - whole).abs().max()) < 1e-5 * float(whole.abs().max())
    assert rounding is not None and torch.allclose(again.rounding(arrays), rounding)


@pytest.mark.parametrize("constants", [{"scaling": torch.tensor([1.0, -1.0])}, {"scaling": torch.tensor([torch.nan, 0.0])},
                                       {"weight": torch.zeros(100, WIDTH)}, {"scaling": torch.zeros(3)}], ids=str)  # fmt: skip
def test_constants_of_groups_that_no_writer_makes_are_refused(constants: dict[str, Tensor]) -> None:
    codec, _ = grouped_head()
    with pytest.raises(CodecFitError, match=r"constant '(scaling|weight)' is"):
        codec.with_constants({**codec.constants, **constants})


def test_linear_head_needs_the_input() -> None:
    with pytest.raises(ValueError, match="encodes the input of the final linear layer, and got none"):
        fitted("linear_head", 100).encode(teacher_rows(100, 4, seed=0).logits)
    with pytest.raises(ValueError, match="takes 24 inputs per row, got 23"):
        fitted("linear_head", 100).encode(teacher_rows(100, 4, seed=0).logits, torch.zeros(4, 23))

"""Codecs: what decodes differs from what was given by at most the eps stored beside it, and the eps is a fact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_rows import CLASSES, ROWS, TEMPERATURES, given, kl
from torch import Tensor

from softcache.codecs import CODECS, Codec, TopkCodec, make_codec
from softcache.codecs.fidelity import GRID, eps_of, kl_rows, round_up_to_half
from softcache.codecs.floats import FLOAT16_MAX
from softcache.codecs.headtail import largest
from softcache.codecs.int8 import codes_of
from softcache.codecs.records import Field, lay_out, read_field, record_bytes, write_fields
from softcache.errors import CacheError, CodecRangeError, ConfigError

# codec and parameters, by the text that names them; every codec that needs no fitting has its defaults here
CASES: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name, kind in CODECS.items() if kind.fit is Codec.fit and not kind.needs_classifier},
    "headtail:k=16,bits=6": ("headtail", {"k": "16", "bits": "6"}),
    "headtail:k=1,bits=4": ("headtail", {"k": "1", "bits": "4"}),
    "topk:k=1": ("topk", {"k": "1"}),
    "topk:k=100": ("topk", {"k": "100"}),
}
BOUNDED = [case for case, (name, _) in CASES.items() if CODECS[name].bounded]
TOPK = [case for case, (name, _) in CASES.items() if name == "topk"]
HEADTAIL = [case for case in CASES if case.startswith("headtail")]
COMPACT = ["int8", *HEADTAIL, *TOPK, "topset"]
SMALL = (1, 2, 4, 10, 37, 100, 1000)

# rows that some codec may refuse; all other kinds are held by each
FAR = {
    "a level far away",
    "above float16",
    "largest of float16",
    "largest of float32",
    "range above float32",
    "one class too far below",
}

over_classes = pytest.mark.parametrize("classes", SMALL)
over_bounded = pytest.mark.parametrize("case", BOUNDED)
over_topk = pytest.mark.parametrize("case", TOPK)


def codec_of(case: str, classes: int) -> Codec:
    name, parameters = CASES[case]
    return make_codec(name, parameters, classes)


def topk_of(case: str, classes: int) -> TopkCodec:
    codec = codec_of(case, classes)
    assert isinstance(codec, TopkCodec)
    return codec


def exact(values: Tensor) -> np.ndarray:
    return values.double().numpy()


# ----------------------------------------------------------------------------------------------------------------- bounds


def held(codec: Codec, logits: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
    """Of the rows that the codec does not refuse: as given, as decoded, and the eps that is stored with them."""
    try:
        arrays = codec.encode(logits)
    except CodecRangeError:
        if len(logits) == 1:
            return logits[:0], logits[:0], np.empty(0)
        halves = [held(codec, half) for half in logits.chunk(2)]
        return (
            torch.cat([half[0] for half in halves]),
            torch.cat([half[1] for half in halves]),
            np.concatenate([half[2] for half in halves]),
        )
    decoded = codec.decode(arrays)
    eps = round_up_to_half(eps_of(codec, logits, arrays, decoded))
    kept = eps.isfinite()
    return logits[kept], decoded[kept], exact(eps[kept])


def check_bounds(codec: Codec, kind: str, logits: Tensor, *, all_held: bool) -> None:
    rows, decoded, eps = held(codec, logits)
    assert len(rows) == len(logits) or not all_held, f"refused rows of kind {kind!r}"
    if not len(rows):
        return
    assert decoded.dtype == torch.float32
    error = np.abs(exact(decoded) - exact(rows)).max(axis=1)
    assert (error <= eps).all(), kind
    for t in TEMPERATURES:
        # the measure is good to 1e-9 of itself, and float64 holds nothing below 1e-300
        assert (kl(rows, decoded, t) <= eps**2 / (2 * t * t) * (1 + 1e-9) + 1e-300).all(), kind


def rows_of_each_kind(classes: int) -> int:
    """So many that all kinds together have 10^5 rows at C <= 100, 10^4 at 1000, 256 beyond."""
    return math.ceil((100_000 if classes <= 100 else 10_000 if classes <= 1000 else 256) / len(ROWS))


def a_tenth(classes: int) -> int:
    return math.ceil(rows_of_each_kind(classes) / 10) if classes in CLASSES else 8


@pytest.mark.slow
@pytest.mark.parametrize("classes", sorted({*SMALL, *CLASSES}))
@over_bounded
def test_error_and_kl_are_within_the_stored_eps(case: str, classes: int) -> None:
    """A tenth of the whole test's rows."""
    for kind in ROWS:
        rows = given(kind, a_tenth(classes), classes, seed=1)
        check_bounds(codec_of(case, classes), kind, rows, all_held=kind not in FAR)


@pytest.mark.whole
@pytest.mark.parametrize("classes", CLASSES)
@over_bounded
def test_no_row_breaks_its_bound(case: str, classes: int) -> None:
    for kind in ROWS:
        rows = given(kind, rows_of_each_kind(classes), classes, seed=2)
        check_bounds(codec_of(case, classes), kind, rows, all_held=kind not in FAR)


@over_bounded
def test_the_eps_is_no_looser_than_a_float16_step_above_the_fact(case: str) -> None:
    for kind in set(ROWS) - FAR:
        rows, decoded, eps = held(codec_of(case, 100), given(kind, 8, 100))
        error = np.abs(exact(decoded) - exact(rows)).max(axis=1)
        assert (eps[error == 0] == 0).all()
        with np.errstate(over="ignore"):
            above = np.nextafter(error.astype(np.float16), np.float16(np.inf))
            assert (eps <= np.nextafter(above, np.float16(np.inf))).all()


def test_the_kl_bound_is_a_real_one() -> None:
    """Where eps is large, the mean KL is of its square's order: the tests above do not compare with something far off."""
    rows, decoded, eps = held(codec_of("float16", 100), given("normal", 64, 100) + 1000)
    assert kl(rows, decoded, 1.0).mean() > 0.05 * (eps**2).mean() and (eps > 0.1).all()


def test_the_two_measures_of_kl_agree() -> None:
    for kind in ("normal", "peaked", "levels", "one class far below"):
        rows = given(kind, 16, 100)
        moved = rows + given("normal", 16, 100, seed=3) / 10
        for t in TEMPERATURES:
            np.testing.assert_allclose(kl_rows(rows, moved, t).numpy(), kl(rows, moved, t), rtol=1e-6, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- what each one says


@over_classes
def test_float32_is_exact(classes: int) -> None:
    codec = codec_of("float32", classes)
    for kind in ROWS:
        logits = given(kind, 8, classes)
        assert torch.equal(codec.decode(codec.encode(logits)).view(torch.int32), logits.view(torch.int32)), kind


@over_classes
def test_float16_is_numpys_rounding(classes: int) -> None:
    for kind in ROWS:
        logits = given(kind, 8, classes)
        with np.errstate(over="ignore"):
            wanted = logits.numpy().astype(np.float16)
        if np.isinf(wanted).any():
            with pytest.raises(CodecRangeError, match=rf"float16 holds \|logit\| <= {FLOAT16_MAX}, found"):
                codec_of("float16", classes).encode(logits)
            continue
        stored = codec_of("float16", classes).encode(logits)["logits"].numpy()
        assert np.array_equal(stored.view(np.uint16), wanted.view(np.uint16)), kind
        size = np.abs(exact(logits))
        error = np.abs(stored.astype(np.float64) - exact(logits))
        assert (error <= np.where(size >= 2.0**-14, 2.0**-11 * size, 2.0**-25)).all(), kind


def rounding_at(logits: np.ndarray) -> np.ndarray:
    """(B, 1) what float32 may add: a few roundings at the largest size that occurs, and of a step that is a denormal."""
    return 2.0**-22 * 2 * np.abs(logits).max(axis=1, keepdims=True) + 256 * 2.0**-149


BEYOND = {"largest of float32", "range above float32"}  # a difference of logits is infinite there


@over_classes
def test_int8_is_off_by_half_a_step(classes: int) -> None:
    for kind in set(ROWS) - BEYOND:
        codec, logits = codec_of("int8", classes), given(kind, 8, classes)
        rows = exact(logits)
        error = np.abs(exact(codec.decode(codec.encode(logits))) - rows)
        step = np.ptp(rows, axis=1, keepdims=True) / 255
        assert (error <= step / 2 + rounding_at(rows)).all(), kind
        assert (error[np.ptp(rows, axis=1) == 0] == 0).all(), kind


def test_a_step_of_zero_gives_codes_of_zero() -> None:
    """0 / 0 would be no number, and its code whatever the machine makes of that."""
    codes = codes_of(torch.full((2, 3), 7.5), torch.full((2,), 7.5), torch.zeros(2), 255)
    assert torch.equal(codes, torch.zeros(2, 3))


@pytest.mark.parametrize("kind", sorted(BEYOND))
@pytest.mark.parametrize("case", ["int8", *HEADTAIL])
def test_a_range_beyond_float32_is_refused_not_wrong(case: str, kind: str) -> None:
    logits = given(kind, 16, 100)
    logits[:, :50] = logits[:, :50].abs()
    logits[:, 50:] = -logits[:, 50:].abs()
    assert len(held(codec_of(case, 100), logits)[0]) == 0
    if case == "int8":
        decoded = codec_of(case, 100).decode(codec_of(case, 100).encode(logits))
        assert not decoded.isnan().any()


def test_int8s_mean_kl_is_that_of_an_even_error() -> None:
    codec, logits = codec_of("int8", 1000), given("normal", 200, 1000)
    arrays = codec.encode(logits)
    step = exact(read_field(arrays["records"], codec.fields[1]))
    for t in GRID:
        ratio = kl(logits, codec.decode(arrays), t).mean() / ((step**2).mean() / (24 * t * t))
        assert 0.5 < ratio < 1.2


@pytest.mark.slow
@over_classes
@pytest.mark.parametrize("case", HEADTAIL)
def test_headtail_keeps_its_head_to_float16_and_its_tail_to_half_a_step(case: str, classes: int) -> None:
    codec = codec_of(case, classes)
    kept, levels = min(int(codec.parameters["k"]), classes), 2 ** int(codec.parameters["bits"]) - 1
    for kind in set(ROWS) - FAR:
        logits = given(kind, 8, classes)
        rows = exact(logits)
        error = np.abs(exact(codec.decode(codec.encode(logits))) - rows)
        order = np.argsort(-rows, axis=1, kind="stable")
        head, tail = order[:, :kept], order[:, kept:]
        slack = rounding_at(rows)
        below = rows.max(axis=1, keepdims=True) - np.take_along_axis(rows, head, 1)
        assert (np.take_along_axis(error, head, 1) <= 2.0**-11 * below + 2.0**-25 + slack).all(), kind
        if classes > kept:
            width = np.ptp(np.take_along_axis(rows, tail, 1), axis=1, keepdims=True)
            assert (np.take_along_axis(error, tail, 1) <= width / levels / 2 + slack).all(), kind


def test_headtail_spends_its_steps_on_the_tail() -> None:
    logits = given("one class far above", 8, 1000)
    tail = np.argsort(-logits.numpy(), axis=1)[:, 8:]
    worst = {}
    for case in ("int8", "headtail"):
        rows, decoded, _ = held(codec_of(case, 1000), logits)
        worst[case] = np.take_along_axis(np.abs(exact(decoded) - exact(rows)), tail, 1).max()
    assert worst["int8"] > 5 and worst["headtail"] < 0.06


@pytest.mark.parametrize("case", HEADTAIL)
def test_a_head_beyond_float16_is_refused(case: str) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 5], logits[1, 7:] = 65505.0 + 16, -1.0
    codec = codec_of(case, 40)
    if codec.parameters["k"] == "1":  # nothing is below the largest in such a head
        assert len(held(codec, logits)[0]) == 2
        return
    with pytest.raises(
        CodecRangeError, match=r"'headtail' holds logits up to 65504 below .* found 6552[12]\n.*--codec int8"
    ):
        codec.encode(logits)


@over_bounded
def test_the_level_of_a_row_is_kept(case: str) -> None:
    assert CODECS[CASES[case][0]].keeps_level
    rows, decoded, _ = held(codec_of(case, 100), given("levels", 32, 100))
    assert np.abs(exact(decoded).mean(axis=1) - exact(rows).mean(axis=1)).max() < 1 + 2.0**-11 * 3e4
    assert np.abs(exact(rows).mean(axis=1)).max() > 2e4


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e5, -3e38, np.inf, -np.inf, np.nan], ids=str)
def test_float16_refuses_what_it_cannot_hold(value: float) -> None:
    logits = torch.zeros(4, 10)
    logits[2, 3] = value
    with pytest.raises(CodecRangeError, match=rf"float16 holds \|logit\| <= {FLOAT16_MAX}, .*\n.*--codec float32"):
        codec_of("float16", 10).encode(logits)


@pytest.mark.parametrize("value", [65504.0, 65519.996], ids=str)
def test_float16_takes_what_rounds_to_its_largest(value: float) -> None:
    rows, decoded, eps = held(codec_of("float16", 2), torch.tensor([[value, 0.0]]))
    assert decoded[0].tolist() == [65504.0, 0.0]
    assert eps[0] >= rows[0, 0].item() - 65504.0


# ------------------------------------------------------------------------------- decoders written from the field table only


def parts_of(codec: Codec, record: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of one record, by name, read from its bytes as the field table says."""
    parts = {}
    for field in codec.fields:
        entry = field.to_json()
        count = int(np.prod(entry["shape"]))
        parts[entry["name"]] = np.frombuffer(record.tobytes(), entry["dtype"], count, entry["offset"])
    return parts


def unpacked(packed: np.ndarray, count: int, bits: int) -> list[int]:
    whole = int.from_bytes(packed.tobytes(), "little")
    return [(whole >> (place * bits)) & ((1 << bits) - 1) for place in range(count)]


def bits_of_ids(classes: int) -> int:
    return next(bits for bits in range(1, 25) if 2**bits >= classes)


def decoded_int8(codec: Codec, record: np.ndarray) -> np.ndarray:
    part = parts_of(codec, record)
    return part["lowest"] + part["step"] * part["codes"].astype(np.float32)


def decoded_headtail(codec: Codec, record: np.ndarray) -> np.ndarray:
    part, classes = parts_of(codec, record), codec.num_classes
    kept = min(int(codec.parameters["k"]), classes)
    codes = np.array(unpacked(part["codes"], classes, int(codec.parameters["bits"])), dtype=np.float32)
    row = part["lowest"] + part["step"] * codes
    ids = unpacked(part["ids"], kept, bits_of_ids(classes))
    row[ids] = np.append(part["largest"], part["largest"] - part["below"].astype(np.float32))
    return row


@pytest.mark.slow
@over_classes
@pytest.mark.parametrize("case", ["int8", *HEADTAIL])
def test_records_mean_what_the_field_table_says(case: str, classes: int) -> None:
    """Bit for bit: a product, a sum and a difference in float32, each rounded once."""
    codec, oracle = codec_of(case, classes), decoded_int8 if case == "int8" else decoded_headtail
    for kind in set(ROWS) - FAR:
        arrays = codec.encode(given(kind, 2, classes))
        for row, record in zip(codec.decode(arrays).numpy(), arrays["records"].numpy(), strict=True):
            assert np.array_equal(row.view(np.uint32), oracle(codec, record).view(np.uint32)), kind


@pytest.mark.slow
@over_classes
@over_topk
def test_a_topk_record_means_what_its_field_table_says(case: str, classes: int) -> None:
    for kind in ROWS:
        check_topk_record(topk_of(case, classes), given(kind, 2, classes))


def check_topk_record(codec: TopkCodec, logits: Tensor) -> None:
    classes, arrays = codec.num_classes, codec.encode(logits)
    kept = min(int(codec.parameters["k"]), classes)
    tails = 4 if classes > kept else 0
    ids, head = codec.head(arrays)
    stored = {t: codec.tail_logsumexp(arrays, t).numpy() for t in (1.0, 2.0, 4.0, 8.0)}
    for at, record in enumerate(arrays["records"].numpy()):
        part = parts_of(codec, record)
        assert ids[at].tolist() == unpacked(part["ids"], kept, bits_of_ids(classes))
        codes = np.array(unpacked(part["below"], kept - 1, 13), dtype=np.uint16)
        below = (codes << 2).view(np.float16).astype(np.float64)
        assert np.array_equal(exact(head[at]), np.append(0.0, -below))
        assert len(part["tails"]) == tails
        for place, t in enumerate(stored):
            wanted = math.log(classes - kept) - float(part["tails"][place]) if tails else -np.inf
            assert stored[t][at] == pytest.approx(wanted, rel=1e-6, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------------- topk


def in_order(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Class ids by descending logit, equal ones by class; and float64 logits in that order, below the largest."""
    ids = np.argsort(-logits.numpy(), axis=1, kind="stable")
    rows = np.take_along_axis(exact(logits), ids, 1)
    return ids, rows - rows[:, :1]


def tail_truth(tail: np.ndarray, t: float) -> np.ndarray:
    """(B,) log of the sum of exp(tail / T), of descending rows."""
    return tail[:, 0] / t + np.log(np.exp((tail - tail[:, :1]) / t).sum(axis=1))


SATURATED = 65408.0


def check_topk(codec: TopkCodec, logits: Tensor, kind: str) -> None:
    classes, kept = codec.num_classes, min(codec.k, codec.num_classes)
    arrays = codec.encode(logits)
    ids, head = codec.head(arrays)
    assert ids.dtype == torch.int64 and head.dtype == torch.float32 and ids.shape == head.shape == (len(logits), kept)
    order, below = in_order(logits)
    wanted = np.maximum(below[:, :kept], -SATURATED)
    assert np.array_equal(ids.numpy(), order[:, :kept]), kind
    assert (np.abs(exact(head) - wanted) <= 2.5 * (2.0**-10 * np.abs(wanted) + 2.0**-24)).all(), kind
    for t in (1.0, 2.0, 4.0, 8.0):
        stored = codec.tail_logsumexp(arrays, t)
        assert stored.dtype == torch.float32 and stored.shape == (len(logits),)
        if classes == kept:
            assert (stored == -torch.inf).all()
            continue
        gap = np.minimum(math.log(classes - kept) - tail_truth(below[:, kept:], t), SATURATED)
        # float32 holds the sum over the tail to about 1e-6
        slack = 2.0**-11 * gap + 2.0**-25 + 2e-6 * (1 + math.log(classes))
        assert (np.abs(exact(stored) - (math.log(classes - kept) - gap)) <= slack * (1 + 1e-3)).all(), kind


@pytest.mark.parametrize(
    "classes", [pytest.param(n, marks=[pytest.mark.slow] * (n > 1000)) for n in sorted({*SMALL, *CLASSES})]
)
@over_topk
def test_topk_keeps_the_largest_and_what_the_others_sum_to(case: str, classes: int) -> None:
    """A tenth of the whole test's rows."""
    for kind in ROWS:
        check_topk(topk_of(case, classes), given(kind, a_tenth(classes), classes, seed=1), kind)


@pytest.mark.whole
@pytest.mark.parametrize("classes", CLASSES)
@over_topk
def test_no_row_breaks_topks_word(case: str, classes: int) -> None:
    for kind in ROWS:
        check_topk(topk_of(case, classes), given(kind, rows_of_each_kind(classes), classes, seed=2), kind)


@pytest.mark.parametrize("kind", sorted(set(ROWS) - FAR))
def test_between_the_stored_temperatures_the_tail_keeps_to_what_convexity_allows(kind: str) -> None:
    """In 1/T a log-sum-exp lies below each chord and above its neighbours' lines; so does what is made up between."""
    codec, logits = topk_of("topk", 1000), given(kind, 16, 1000)
    arrays = codec.encode(logits)
    nodes = [0.0, 0.125, 0.25, 0.5, 1.0]
    at = [np.full(16, math.log(990)), *(exact(codec.tail_logsumexp(arrays, 1 / beta)) for beta in nodes[1:])]
    for t in (1.01, 1.5, 1.99, 2.7, 3.0, 5.0, 6.5, 7.99):
        made, beta = exact(codec.tail_logsumexp(arrays, t)), 1 / t
        i = max(place for place, node in enumerate(nodes) if node < beta)

        def line(a: int, b: int, beta: float = beta) -> np.ndarray:
            return at[a] + (at[b] - at[a]) * (beta - nodes[a]) / (nodes[b] - nodes[a])

        slack = 1e-5 * (1 + np.abs(at[4]))
        assert (made <= line(i, i + 1) + slack).all()
        floor = line(i - 1, i) if i + 2 == len(nodes) else np.maximum(line(i - 1, i), line(i + 1, i + 2))
        assert (made >= np.minimum(floor, line(i, i + 1)) - slack).all()


@pytest.mark.parametrize("kind", ["normal", "peaked", "levels", "low rank"])
def test_between_the_stored_temperatures_the_tail_is_nearer_the_truth_than_a_straight_line(kind: str) -> None:
    codec, logits = topk_of("topk", 1000), given(kind, 64, 1000)
    arrays, tail = codec.encode(logits), in_order(logits)[1][:, 10:]
    for t in (1.2, 1.5, 3.0, 5.0, 6.0, 7.0):
        truth = tail_truth(tail, t)
        below, above = (1.0, 2.0) if t < 2 else (2.0, 4.0) if t < 4 else (4.0, 8.0)
        share = (1 / t - 1 / above) / (1 / below - 1 / above)
        straight = share * tail_truth(tail, below) + (1 - share) * tail_truth(tail, above)
        off = np.abs(exact(codec.tail_logsumexp(arrays, t)) - truth)
        assert off.mean() < 0.25 * np.abs(straight - truth).mean() and off.max() < 0.06


@over_classes
@over_topk
def test_spread_is_a_distribution_with_the_kept_classes_and_an_even_rest(case: str, classes: int) -> None:
    codec, logits = topk_of(case, classes), given("normal", 8, classes)
    arrays = codec.encode(logits)
    ids, head = (part.numpy() for part in codec.head(arrays))
    for t in (1.0, 3.0, 8.0):
        spread = codec.spread(arrays, t)
        assert spread.dtype == torch.float32 and spread.shape == (8, classes)
        p = np.exp(exact(spread))
        weight = np.exp(head.astype(np.float64) / t)
        rest = np.exp(exact(codec.tail_logsumexp(arrays, t)))
        total = weight.sum(axis=1) + rest
        wanted = np.repeat((rest / total / max(1, classes - ids.shape[1]))[:, None], classes, axis=1)
        np.put_along_axis(wanted, ids, weight / total[:, None], 1)
        np.testing.assert_allclose(p, wanted, rtol=2e-5)
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(ROWS) - FAR))
def test_with_as_many_kept_as_there_are_classes_only_the_level_is_lost(kind: str) -> None:
    codec, logits = topk_of("topk", 10), given(kind, 32, 10)
    arrays = codec.encode(logits)
    assert arrays["records"].shape[1] == 5 + 15  # ten ids of 4 bits, nine numbers of 13
    for t in (1.0, 8.0):
        assert np.abs(kl(logits / t, codec.spread(arrays, t), 1.0)).max() < 2e-5


def test_topk_lost_the_level() -> None:
    codec, logits = topk_of("topk", 100), given("normal", 4, 100)
    moved = torch.round(logits * 64) / 64  # exact in float32 at either level
    assert not codec.keeps_level
    assert torch.equal(codec.encode(moved)["records"], codec.encode(moved + 1024)["records"])


def test_topk_gives_no_whole_rows_and_no_other_temperature() -> None:
    codec = topk_of("topk", 1000)
    arrays = codec.encode(given("normal", 2, 1000))
    with pytest.raises(CacheError, match=r"'topk' keeps 10 of 1000 classes only.*\n.*kd_lower_bound.*--codec headtail"):
        codec.decode(arrays)
    for t in (0.99, 8.01, 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="serves temperatures from 1 to 8, not"):
            codec.tail_logsumexp(arrays, t)
    assert not codec.complete and not codec.bounded and codec.temperature_range == (1.0, 8.0)


# ------------------------------------------------------------------------------------------------------- for every codec


def test_every_codec_without_fitting_is_in_the_table() -> None:
    assert {"float32", "float16", "int8", "headtail", "topk", "topset"} <= {name for name, _ in CASES.values()}


@over_classes
@pytest.mark.parametrize("case", CASES)
def test_arrays_say_what_encode_gives(case: str, classes: int) -> None:
    codec = codec_of(case, classes)
    for count in (3, 1, 0):
        logits = given("normal", count, classes)
        before = logits.clone()
        encoded = codec.encode(logits)
        assert torch.equal(logits, before)  # nothing was done in place
        assert list(encoded) == list(codec.arrays)
        for array, (dtype, record) in codec.arrays.items():
            assert encoded[array].numpy().dtype == np.dtype(dtype)
            assert tuple(encoded[array].shape) == (count, *record)
        if codec.complete:
            assert codec.decode(encoded).shape == (count, classes)
        else:
            assert codec.spread(encoded, 2.0).shape == (count, classes)


def decoded(codec: Codec, arrays: dict[str, Tensor]) -> Tensor:
    return codec.decode(arrays) if codec.complete else codec.spread(arrays, 2.0)


@pytest.mark.parametrize("classes", [10, 37, 100, 1001])
@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_depend_on_its_batch(case: str, classes: int) -> None:
    codec, logits = codec_of(case, classes), given("normal", 9, classes)
    whole = codec.encode(logits)
    rows = decoded(codec, whole)
    for row in range(len(logits)):
        alone = codec.encode(logits[row : row + 1])
        assert all(torch.equal(alone[key][0], whole[key][row]) for key in whole)
        assert torch.equal(decoded(codec, alone)[0], rows[row])
    part = {key: value[3:8:2] for key, value in whole.items()}  # other strides, another offset
    assert torch.equal(decoded(codec, part), rows[3:8:2])


@pytest.mark.parametrize("kind", ["ties", "all tied but one", "zeros of both signs", "constants"])
@pytest.mark.parametrize("case", ["headtail", "topk"])
def test_of_equal_logits_the_smaller_class_comes_first(case: str, kind: str) -> None:
    codec, logits = codec_of(case, 100), given(kind, 16, 100)
    ids = next(field for field in codec.fields if field.name == "ids")
    kept = int(codec.parameters["k"])
    records = codec.encode(logits)["records"]
    wanted = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :kept]
    assert [unpacked(row, kept, 7) for row in read_field(records, ids).numpy()] == wanted.tolist()
    assert torch.equal(codec.encode(logits)["records"], records)


@pytest.mark.parametrize("count", [1, 10, 36, 37])
@pytest.mark.parametrize("kind", ROWS)
def test_the_largest_are_those_of_a_stable_sort(kind: str, count: int) -> None:
    logits = given(kind, 24, 37)
    logits[::3] = given("normal", 24, 37)[::3]  # rows with ties and without in one batch
    logits[1, :20] = logits[1, 0]
    wanted = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :count]
    values, ids = largest(logits, count)
    assert ids.tolist() == wanted.tolist() and values.tolist() == logits.gather(1, ids).tolist()


# the promised bytes of a record at C=1000; where there is an eps, its 2 bytes come on top
@pytest.mark.parametrize(
    ("case", "size", "promised"),
    [("int8", 1008, 1010), ("headtail", 1036, 1040), ("headtail:k=16,bits=6", 812, 820), ("topk", 36, 36)],
)
def test_records_are_as_small_as_promised(case: str, size: int, promised: int) -> None:
    codec = codec_of(case, 1000)
    assert codec.arrays == {"records": ("|u1", (size,))}
    assert record_bytes(codec.fields) == size and size + 2 * codec.bounded <= promised


@pytest.mark.parametrize("classes", [1, 10, 100, 1000, 151936, 2**24])
@pytest.mark.parametrize("case", COMPACT)
def test_fields_follow_each_other_without_gaps(case: str, classes: int) -> None:
    codec, end = codec_of(case, classes), 0
    for field in codec.fields:
        assert field.offset == end
        end += np.dtype(field.dtype).itemsize * int(np.prod(field.shape))
        assert field.nbytes == end - field.offset
    assert codec.arrays["records"][1] == (end,)
    assert len({field.name for field in codec.fields}) == len(codec.fields)


@pytest.mark.parametrize("case", CASES)
def test_parameters_build_the_same_codec_again(case: str) -> None:
    codec = codec_of(case, 100)
    assert codec.name == CASES[case][0] and CASES[case][1].items() <= codec.parameters.items()
    assert make_codec(codec.name, codec.parameters, 100) == codec


@pytest.mark.parametrize(
    ("name", "parameters", "classes", "message"),
    [
        ("float61", {}, 10, r"unknown codec 'float61'\n.*did you mean 'float16'"),
        ("headtail", {"bitts": "8"}, 10, r"codec 'headtail' has no parameter 'bitts'\n.*did you mean 'bits'"),
        ("float32", {"k": "8"}, 10, r"codec 'float32' has no parameter 'k'"),
        ("headtail", {"k": "eight"}, 10, r"codec 'headtail': k"),
        ("headtail", {"k": "0"}, 10, r"codec 'headtail': k must be at least 1, got 0"),
        ("headtail", {"bits": "5"}, 10, r"codec 'headtail': bits must be 8, 6 or 4, got 5"),
        ("topk", {"k": "-3"}, 10, r"codec 'topk': k must be at least 1, got -3"),
        ("topk", {}, 2**24 + 1, r"1 to 2\*\*24 classes, not 16777217"),
        ("headtail", {}, 2**24 + 1, r"1 to 2\*\*24 classes, not 16777217"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(name: str, parameters: dict[str, str], classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_codec(name, parameters, classes)


# ---------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("bytes_before", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_fields_are_read_back_wherever_they_lie(bytes_before: int, count: int) -> None:
    fields = lay_out(
        [
            ("before", "|u1", (bytes_before,)),
            ("whole", "<u4", ()),
            ("single", "<f4", (3,)),
            ("half", "<f2", (2, 2)),
            ("bytes", "|u1", (5,)),
        ]
    )
    rng = np.random.default_rng(count)
    values = {
        field.name: torch.from_numpy(rng.integers(0, 200, (count, *field.shape)).astype(field.dtype).astype(np.float32))
        for field in fields
    }
    records = write_fields(fields, values)
    assert records.shape == (count, bytes_before + 4 + 12 + 8 + 5) and records.dtype == torch.uint8
    stored = torch.from_numpy(np.array(records.numpy()))  # as a reader gets them
    for field in fields:
        for rows in (records, stored, torch.cat([stored, stored], dim=1)[:, : records.shape[1]]):
            part = read_field(rows, field)
            assert part.shape == (count, *field.shape) and torch.equal(part.float(), values[field.name])


def test_a_field_is_little_endian_bytes_at_its_offset() -> None:
    fields = lay_out([("a", "<f4", ()), ("b", "<f2", (2,)), ("c", "|u1", (1,))])
    assert [(field.name, field.offset) for field in fields] == [("a", 0), ("b", 4), ("c", 8)]
    values = {"a": torch.tensor([1.5]), "b": torch.tensor([[0.5, -2.0]]), "c": torch.tensor([[7]])}
    wanted = np.float32([1.5]).tobytes() + np.float16([0.5, -2.0]).tobytes() + b"\x07"
    assert write_fields(fields, values)[0].numpy().tobytes() == wanted
    assert fields[1].to_json() == {"name": "b", "offset": 4, "dtype": "<f2", "shape": [2]}
    assert record_bytes(()) == 0 and Field("x", 3, "<u4", (2,)).nbytes == 8


# ------------------------------------------------------------------------------------------------------- round_up_to_half


def every_half() -> np.ndarray:
    """All finite non-negative float16 numbers, in order."""
    return np.arange(0x7C00, dtype=np.uint16).view(np.float16)


def smallest_half_not_below(values: np.ndarray) -> np.ndarray:
    """By search among all of them; infinity above the largest."""
    halves = np.append(every_half(), np.float16(np.inf))
    return halves[np.searchsorted(halves.astype(np.float64), values.astype(np.float64), side="left")]


def test_round_up_keeps_every_float16_and_steps_up_from_everything_between() -> None:
    halves = every_half().astype(np.float32)
    above = np.nextafter(halves, np.float32(np.inf))
    below = np.nextafter(halves[1:], np.float32(0))
    for values in (halves, above, below, (halves[1:] + halves[:-1]) / 2):
        made = round_up_to_half(torch.from_numpy(values)).numpy()
        assert np.array_equal(made, smallest_half_not_below(values))


def test_round_up_of_random_numbers() -> None:
    values = (10.0 ** np.random.default_rng(0).uniform(-45, 38, 20_000)).astype(np.float32)
    made = round_up_to_half(torch.from_numpy(values)).numpy()
    assert np.array_equal(made, smallest_half_not_below(values))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.0, 0.0), (1e-45, 2.0**-24), (65504.0, 65504.0), (65504.01, np.inf), (3e38, np.inf), (np.inf, np.inf)],
    ids=str,
)
def test_round_up_at_the_ends(value: float, wanted: float) -> None:
    assert round_up_to_half(torch.tensor([value], dtype=torch.float32)).item() == wanted


def test_round_up_keeps_what_is_not_a_number() -> None:
    assert round_up_to_half(torch.tensor([torch.nan])).isnan().all()

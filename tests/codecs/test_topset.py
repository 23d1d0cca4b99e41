"""`topset`: ids as a set of fixed size, values in a byte, tails at four temperatures; against integers and float64 alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_rows import ROWS, given
from torch import Tensor

from softcache.codecs import TopsetCodec, make_codec
from softcache.codecs.idset import lower_bits, pack_set, set_bytes, unpack_set
from softcache.codecs.records import read_field
from softcache.errors import CacheError, CodecRangeError, ConfigError, DamagedCacheError

SATURATED = 65408.0
MOST = 2**24
# (k, C): one id, all but one, C below 2 k, a power of two and beside it, vocabularies, the most classes there are
SIZES = [
    (1, 2),
    (1, MOST),
    (7, 8),
    (9, 10),
    (50, 51),
    (50, 99),
    (50, 100),
    (50, 101),
    (16, 4096),
    (50, 8192),
    (50, 32000),
]
SIZES += [(64, 32768), (50, 151936), (128, 151936), (50, MOST - 1), (50, MOST), (300, MOST)]
over_sizes = pytest.mark.parametrize(("k", "classes"), SIZES)


def topset(k: int, classes: int, **parameters: str) -> TopsetCodec:
    codec = make_codec("topset", {"k": str(k), **parameters}, classes)
    assert isinstance(codec, TopsetCodec)
    return codec


def formula(k: int, classes: int) -> int:
    """Bytes of a set of k ids, written down from its definition."""
    low = max(0, math.floor(math.log2(classes / k)))
    return math.ceil((k * low + k + ((classes - 1) >> low) + 1) / 8)


def read_set(packed: bytes, k: int, classes: int) -> list[int]:
    """The ids of a set, bit by bit."""
    bits = [packed[at // 8] >> at % 8 & 1 for at in range(8 * len(packed))]
    low = max(0, math.floor(math.log2(classes / k)))
    ends = [sum(bits[i * low + j] << j for j in range(low)) for i in range(k)]
    ones = [at for at, bit in enumerate(bits[k * low :]) if bit]
    return [((at - i) << low) + end for i, (at, end) in enumerate(zip(ones, ends, strict=True))]


def sets(k: int, classes: int, count: int) -> Tensor:
    """(count, k) rising ids: anywhere, the lowest, the highest, in one heap, and both ends."""
    rng = np.random.default_rng([k, classes])
    made = [np.arange(k), np.arange(classes - k, classes), np.r_[0, classes - k + 1 : classes]]
    start = (classes - k) // 3
    made.append(np.arange(start, start + k))
    made += [rng.choice(classes, k, replace=False) for _ in range(count - len(made))]
    return torch.from_numpy(np.sort(np.stack(made), axis=1))


# ------------------------------------------------------------------------------------------------------------------- sets


@over_sizes
def test_a_set_comes_back_from_as_many_bytes_as_the_formula_says(k: int, classes: int) -> None:
    ids = sets(k, classes, 12)
    packed = pack_set(ids, classes)
    assert packed.shape == (12, formula(k, classes)) and packed.dtype == torch.uint8
    assert set_bytes(k, classes) == formula(k, classes)
    assert [read_set(bytes(row), k, classes) for row in packed.numpy()] == ids.tolist()
    found, whole = unpack_set(packed, k, classes)
    assert torch.equal(found, ids) and bool(whole.all())


def test_sets_of_any_size_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        k = int(rng.integers(1, 140))
        classes = int(min(MOST, k + np.floor(2 ** rng.uniform(0, 24))))
        ids = sets(k, classes, 6)
        found, whole = unpack_set(pack_set(ids, classes), k, classes)
        assert torch.equal(found, ids) and bool(whole.all()), (k, classes)
        assert set_bytes(k, classes) == formula(k, classes), (k, classes)


@pytest.mark.parametrize(("k", "classes"), [(9, 10), (5, 100), (16, 4000), (50, 32000)])
def test_bytes_that_are_no_set_are_told_and_give_classes_all_the_same(k: int, classes: int) -> None:
    """Every bit turned alone, and noise: told to be whole just where the ids rise below C."""
    ids = sets(k, classes, 5)[4:]
    packed = pack_set(ids, classes)
    low = lower_bits(k, classes) * k
    length = low + k + ((classes - 1) >> lower_bits(k, classes)) + 1
    turned = packed.repeat(length, 1)
    turned[torch.arange(length), torch.arange(length) // 8] ^= 1 << (torch.arange(length) % 8).to(torch.uint8)
    noise = torch.randint(0, 256, (400, packed.shape[1]), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    told, refused = [], 0
    for rows in (turned, noise):
        found, whole = unpack_set(rows, k, classes)
        assert bool(((found >= 0) & (found < classes)).all())
        for row, good, got in zip(rows.numpy(), whole.tolist(), found.tolist(), strict=True):
            upper = [bytes(row)[at // 8] >> at % 8 & 1 for at in range(low, length)]
            own = read_set(_cut(row, length), k, classes) if sum(upper) == k else []
            rising = len(own) == k and own[-1] < classes and own == sorted(set(own))
            assert good == rising and (not good or own == got)
            refused += not good
        told.append(whole)
    assert not bool(told[0][low:].any())  # one more or one less
    assert refused > 400


def _cut(row: np.ndarray, length: int) -> bytes:
    """Without the spare bits behind the set."""
    whole = int.from_bytes(row.tobytes(), "little") & ((1 << length) - 1)
    return whole.to_bytes(len(row), "little")


# ---------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("k", [16, 50, 64, 128])
@pytest.mark.parametrize("classes", [8192, 32000, 151936])
def test_a_record_has_the_bytes_of_the_formula(k: int, classes: int) -> None:
    for parameters, tails in (({}, 4), ({"temperatures": "1"}, 1)):
        codec = topset(k, classes, **parameters)
        assert codec.arrays == {"records": ("|u1", (4 + 2 * tails + k + formula(k, classes),))}
    assert (topset(50, 151936).arrays["records"][1][0], topset(128, 151936).arrays["records"][1][0]) == (147, 335)


def tail_truth(rows: np.ndarray, ids: np.ndarray, t: float) -> np.ndarray:
    """(B,) float64 log-sum-exp over all classes but `ids`, below the largest."""
    rest = (rows - rows.max(axis=1, keepdims=True)) / t
    np.put_along_axis(rest, ids, -np.inf, 1)
    top = rest.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(rest - top).sum(axis=1))


def check_records(codec: TopsetCodec, logits: Tensor, what: str) -> None:
    rows, kept = logits.double().numpy(), min(codec.k, codec.num_classes)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :kept]
    arrays = codec.encode(logits)
    ids, head = codec.head(arrays)
    assert ids.dtype == torch.int64 and head.dtype == torch.float32 and ids.shape == head.shape == (len(rows), kept)
    assert np.array_equal(ids[:, 0], order[:, 0]), what
    assert np.array_equal(ids[:, 1:], np.sort(order[:, 1:], axis=1)), what
    wanted = np.maximum(np.take_along_axis(rows, ids.numpy(), 1) - rows.max(axis=1, keepdims=True), -SATURATED)
    reach = -wanted.min(axis=1, keepdims=True)
    rounding = 2.0**-22 * (np.minimum(np.abs(rows).max(axis=1, keepdims=True), 2 * SATURATED) + reach) + 2.0**-140
    assert (np.abs(head.double().numpy() - wanted) <= reach / 508 + rounding).all(), what
    assert bool((head[:, 0] == 0).all()) and bool((head <= 0).all())
    for t in (1.0, 2.0, 4.0, 8.0)[: codec.temperatures]:
        stored = codec.tail_logsumexp(arrays, t).double().numpy()
        if codec.num_classes == kept:
            assert (stored == -np.inf).all()
            continue
        even = math.log(codec.num_classes - kept)
        gap = np.minimum(even - tail_truth(rows, order, t), SATURATED)
        slack = 2.0**-11 * gap + 2.0**-25 + 2e-6 * (1 + math.log(codec.num_classes)) + 2.0**-22 * gap
        assert (np.abs(stored - (even - gap)) <= slack * (1 + 1e-3)).all(), (what, t)


@pytest.mark.parametrize(
    "classes",
    [
        1,
        2,
        10,
        37,
        100,
        1000,
        pytest.param(32768, marks=pytest.mark.slow),
        pytest.param(151936, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", [{"k": "50"}, {"k": "9", "temperatures": "1"}], ids=str)
def test_the_largest_are_kept_within_a_508th_of_their_range_and_the_others_as_a_sum(
    classes: int, case: dict[str, str]
) -> None:
    codec = topset(int(case["k"]), classes, **{name: value for name, value in case.items() if name != "k"})
    for kind in ROWS:
        check_records(codec, given(kind, 40 if classes <= 1000 else 4, classes), kind)


@pytest.mark.slow
def test_the_most_classes_there_are() -> None:
    check_records(topset(50, MOST), given("normal", 1, MOST), "normal")


def test_of_a_class_equal_to_the_largest_the_value_is_not_the_largests() -> None:
    codec = topset(3, 10)
    records = codec.encode(torch.tensor([[1.0, 5, 5, 2, 5, 5, 0, 0, 0, 0]]))
    assert read_field(records["records"], codec.fields[2]).tolist() == [[255, 254, 254]]
    ids, logits = codec.head(records)
    assert (ids.tolist(), logits.tolist()) == ([[1, 2, 4]], [[0.0, 0.0, 0.0]])


def test_of_as_many_classes_as_are_kept_no_ids_are_stored_and_any_temperature_is_served() -> None:
    codec, logits = topset(50, 50), given("normal", 8, 50)
    arrays = codec.encode(logits)
    assert arrays["records"].shape == (8, 4 + 50)
    assert codec.serves(3.3) and codec.serves(1.0, 20.0)
    exact = (logits.double() / 3.3).log_softmax(dim=1)
    reach = float((logits.amax(dim=1) - logits.amin(dim=1)).max())
    assert float((codec.spread(arrays, 3.3) - exact).abs().max()) <= 2 * reach / 508 / 3.3 + 1e-5


@pytest.mark.parametrize("temperatures", ["4", "1"])
def test_a_temperature_whose_tail_is_not_stored_is_refused(temperatures: str) -> None:
    codec = topset(5, 100, temperatures=temperatures)
    arrays, stored = codec.encode(given("normal", 2, 100)), (1.0, 2.0, 4.0, 8.0)[: int(temperatures)]
    for t in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 10.0, math.nan):
        assert codec.serves(t) == (t in stored)
        if t not in stored:
            named = "1, 2, 4 and 8" if temperatures == "4" else "1"
            with pytest.raises(ValueError, match=rf"'topset' serves temperatures? {named} alone, not"):
                codec.tail_logsumexp(arrays, t)
    assert codec.serves(1.0, 1.0) and not codec.serves(1.0, 2.0)
    assert codec.text == ("topset:k=5" if temperatures == "4" else "topset:k=5,temperatures=1")
    with pytest.raises(CacheError, match=r"'topset' keeps 5 of 100 classes only"):
        codec.decode(arrays)


@pytest.mark.parametrize(("field", "value"), [("values", 255), ("values", 0), ("ids", 255), ("ids", 0)])
def test_a_record_that_no_writer_makes_is_damage(field: str, value: int) -> None:
    """Two largest, none, too many ids, none."""
    codec = topset(5, 100)
    records = codec.encode(given("normal", 3, 100))["records"]
    part = next(one for one in codec.fields if one.name == field)
    records[1, part.offset : part.offset + part.nbytes] = value
    for run in (codec.head, lambda arrays: codec.spread(arrays, 2.0)):
        with pytest.raises(
            DamagedCacheError, match=r"1 records of codec 'topset:k=5' are not 5 rising classes below 100, one"
        ):
            run({"records": records})


@pytest.mark.parametrize(
    "parameters", [{"k": "0"}, {"temperatures": "2"}, {"temperatures": "0"}, {"tails": "1"}], ids=str
)
def test_a_topset_that_cannot_be_is_refused(parameters: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="'topset'"):
        make_codec("topset", parameters, 100)


# ------------------------------------------------------------------------------------------- log-probabilities of some alone


def test_k_log_probabilities_alone_make_the_record_that_the_whole_row_makes() -> None:
    codec, logits = topset(20, 1000, temperatures="1"), given("normal", 64, 1000)
    log_probs = logits.double().log_softmax(dim=1)
    best, ids = log_probs.topk(23, dim=1)
    mixed = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    alone = codec.encode_largest(ids[:, mixed], best[:, mixed].float())
    whole = codec.encode(log_probs.float())
    for one, other in zip(codec.head(alone), codec.head(whole), strict=True):
        assert torch.equal(one, other)
    off = (codec.tail_logsumexp(alone, 1.0) - codec.tail_logsumexp(whole, 1.0)).abs()
    left = (1 - best[:, :20].exp().sum(dim=1)).float()
    assert bool((off <= 2.0**-9 + 4e-6 / left).all()) and float(left.min()) < 0.05


@pytest.mark.parametrize(("rest", "most"), [(0.75, -14.0), (0.750001, -60000.0)])
def test_where_the_given_ones_are_all_there_is_the_tail_has_no_probability(rest: float, most: float) -> None:
    """As float32 has them they may come to more than 1."""
    codec = topset(2, 1000, temperatures="1")
    arrays = codec.encode_largest(torch.tensor([[5, 3]]), torch.tensor([[math.log(0.25), math.log(rest)]]))
    assert codec.head(arrays)[0].tolist() == [[3, 5]] and codec.tail_logsumexp(arrays, 1.0).item() < most


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        ([[1, 1, 2]], [[-1.0, -1.0, -2.0]], "3 different classes"),
        ([[1, 2]], [[-1.0, -1.0]], "3 different classes"),
        ([[1, 2, 100]], [[-1.0, -1.0, -2.0]], "classes below 100"),
        ([[1, 2, -1]], [[-1.0, -1.0, -2.0]], "classes below 100"),
        ([[1, 2, 3]], [[-1.0, -math.inf, -2.0]], "finite"),
    ],
)
def test_log_probabilities_that_say_nothing_are_refused(
    ids: list[list[int]], values: list[list[float]], message: str
) -> None:
    with pytest.raises(CodecRangeError, match=message):
        topset(3, 100, temperatures="1").encode_largest(torch.tensor(ids), torch.tensor(values))
    with pytest.raises(ConfigError, match="tail at T=1 alone"):
        topset(3, 100).encode_largest(torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -1.0, -1.0]]))

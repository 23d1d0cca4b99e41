"""Codecs: what decodes differs from what was given by at most the eps stored beside it, and the eps is a fact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.codecs import CODECS, Codec, make_codec
from softcache.codecs.floats import FLOAT16_MAX, round_up_to_half
from softcache.errors import CodecRangeError, ConfigError

CLASSES = (10, 100, 1000)
TEMPERATURES = (1.0, 4.0, 20.0)
Rows = Callable[[np.random.Generator, int], np.ndarray]

ROWS: dict[str, Rows] = {
    "normal": lambda rng, c: rng.normal(0, 4, (16, c)),
    "a level": lambda rng, c: rng.normal(1000, 4, (16, c)),
    "ties": lambda rng, c: rng.choice([-1.1, 0.3, 7.7], (16, c)),
    "constants": lambda rng, c: np.repeat(rng.normal(0, 10, (16, 1)), c, axis=1),
    "zeros": lambda rng, c: np.zeros((3, c)),
    "minus zeros": lambda rng, c: np.full((3, c), -0.0),
    "huge range": lambda rng, c: rng.choice([-1, 1], (16, c)) * 10.0 ** rng.uniform(-40, 4.5, (16, c)),
    "largest": lambda rng, c: rng.choice([-65504.0, 65504.0, 65519.99], (16, c)),
    "float16 denormals": lambda rng, c: rng.uniform(-(2.0**-14), 2.0**-14, (16, c)),
    "below float16": lambda rng, c: rng.uniform(-(2.0**-25), 2.0**-25, (16, c)),
    "float32 denormals": lambda rng, c: rng.uniform(-(2.0**-126), 2.0**-126, (16, c)),
    "one class far off": lambda rng, c: rng.normal(0, 3, (16, c)) - 3e4 * (np.arange(c) == 0),
    "half way between": lambda rng, c: 1.0 + (2 * rng.integers(0, 1000, (16, c)) + 1) * 2.0**-11,
    "one row": lambda rng, c: rng.normal(0, 4, (1, c)),
    "no rows": lambda rng, c: np.empty((0, c)),
}

over_rows = pytest.mark.parametrize("rows", ROWS)
over_classes = pytest.mark.parametrize("classes", CLASSES)
over_codecs = pytest.mark.parametrize("name", CODECS)


def given(rows: str, classes: int, *, seed: int = 0) -> Tensor:
    made = ROWS[rows](np.random.default_rng([seed, classes]), classes)
    return torch.from_numpy(made.astype(np.float32))


def kl(teacher: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    """(B,) KL(softmax(teacher / T) || softmax(other / T)) in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = (x - x.max(axis=1, keepdims=True)) / t
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(other)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


@over_rows
@over_classes
@over_codecs
def test_the_error_is_at_most_the_stored_eps(name: str, classes: int, rows: str) -> None:
    codec, logits = make_codec(name), given(rows, classes)
    before = logits.clone()
    arrays = codec.encode(logits)
    decoded = codec.decode(arrays)
    assert decoded.dtype == torch.float32 and decoded.shape == logits.shape
    assert arrays["eps"].dtype == torch.float16 and arrays["eps"].shape == (len(logits),)
    error = np.abs(decoded.double().numpy() - before.double().numpy()).max(axis=1)
    eps = arrays["eps"].double().numpy()
    assert (error <= eps).all()
    assert torch.equal(logits, before)  # nothing was done in place
    # and no looser than one step of float16 above the fact
    assert (eps <= np.nextafter(error.astype(np.float16), np.float16(np.inf))).all()
    assert (eps[error == 0] == 0).all()


@over_rows
@over_classes
def test_float32_is_exact(classes: int, rows: str) -> None:
    codec, logits = make_codec("float32"), given(rows, classes)
    arrays = codec.encode(logits)
    assert torch.equal(codec.decode(arrays).view(torch.int32), logits.view(torch.int32))
    assert not arrays["eps"].any()


@over_rows
@over_classes
def test_float16_is_numpys_rounding(classes: int, rows: str) -> None:
    logits = given(rows, classes)
    stored = make_codec("float16").encode(logits)["logits"].numpy()
    wanted = logits.numpy().astype(np.float16)
    assert np.array_equal(stored.view(np.uint16), wanted.view(np.uint16))
    normal = np.abs(logits.numpy()) >= 2.0**-14
    error = np.abs(stored.astype(np.float64) - logits.numpy().astype(np.float64))
    assert (error <= np.where(normal, 2.0**-11 * np.abs(logits.numpy().astype(np.float64)), 2.0**-25)).all()


@over_rows
@over_classes
@over_codecs
def test_the_soft_target_moves_by_no_more_than_eps_allows(name: str, classes: int, rows: str) -> None:
    """KL(p_T || p'_T) <= eps**2 / (2 T**2), whatever the row."""
    codec, logits = make_codec(name), given(rows, classes)
    arrays = codec.encode(logits)
    eps = arrays["eps"].double().numpy()
    for t in TEMPERATURES:
        moved = kl(logits.double().numpy(), codec.decode(arrays).double().numpy(), t)
        assert (moved <= eps**2 / (2 * t * t) + 1e-12).all()


def test_the_kl_bound_is_a_real_one() -> None:
    """Where eps is large, the mean KL is of its square's order: the test above does not compare with something far off."""
    logits = given("a level", 100)
    arrays = make_codec("float16").encode(logits)
    moved = kl(logits.double().numpy(), arrays["logits"].double().numpy(), 1.0)
    eps = arrays["eps"].double().numpy()
    assert moved.mean() > 0.05 * (eps**2).mean() and (eps > 0.1).all()


@over_classes
@over_codecs
def test_arrays_say_what_encode_gives(name: str, classes: int) -> None:
    codec, logits = make_codec(name), given("normal", classes)
    said, encoded = codec.arrays(classes), codec.encode(logits)
    assert list(said) == list(encoded) and "eps" in said
    for array, (dtype, record) in said.items():
        assert encoded[array].numpy().dtype == np.dtype(dtype) and dtype.startswith("<")
        assert tuple(encoded[array].shape) == (len(logits), *record)


@over_codecs
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    codec, logits = make_codec(name), given("normal", 100)
    whole = codec.encode(logits)
    for row in range(len(logits)):
        alone = codec.encode(logits[row : row + 1])
        assert all(torch.equal(alone[key][0], whole[key][row]) for key in whole)


@over_codecs
def test_what_a_float_codec_promises(name: str) -> None:
    codec: Codec = make_codec(name)
    assert codec.name == name
    assert codec.keeps_level and codec.complete and codec.temperatures is None


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e5, -3e38, np.inf, -np.inf, np.nan], ids=str)
def test_float16_refuses_what_it_cannot_hold(value: float) -> None:
    logits = torch.zeros(4, 10)
    logits[2, 3] = value
    with pytest.raises(
        CodecRangeError, match=rf"float16 holds \|logit\| <= {FLOAT16_MAX}, found .*\n.*--codec float32"
    ):
        make_codec("float16").encode(logits)


@pytest.mark.parametrize("value", [65504.0, 65519.996], ids=str)
def test_float16_takes_what_rounds_to_its_largest(value: float) -> None:
    codec, logits = make_codec("float16"), torch.tensor([[value, 0.0]])
    arrays = codec.encode(logits)
    assert codec.decode(arrays)[0].tolist() == [65504.0, 0.0]
    assert arrays["eps"].item() >= logits[0, 0].item() - 65504.0


def test_an_unknown_codec_is_refused_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown codec 'float61'\n.*did you mean 'float16'"):
        make_codec("float61")


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

"""`lowrank` of outputs without classes: its promise is a relative error, its rows have no level, and its bytes are FORMAT's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.codecs import Probe, make_codec, restore_codec
from softcache.codecs.lowrank import LowRankCodec
from softcache.errors import CodecFitError, ConfigError


def rows(count: int, seed: int, width: int = 48, rank: int = 12) -> Tensor:
    """(count, width) that lie near a subspace, far from 0, as embeddings do."""
    of_all, of_seed = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, width, generator=of_all) / torch.arange(1.0, rank + 1)[:, None].sqrt()
    mean = 2 * torch.randn(width, generator=of_all)
    noise = 0.002 * torch.randn(count, width, generator=of_seed)
    return torch.randn(count, rank, generator=of_seed) @ basis + mean + noise


def odd_rows() -> Tensor:
    """What no probe foretells: large, tiny, zero, one number alone, the opposite of all."""
    some = rows(6, 9)
    alone = torch.zeros(1, 48)
    alone[0, 7] = 300.0
    near = some.repeat(3, 1) + 0.08 * torch.randn(18, 48, generator=torch.Generator().manual_seed(4))  # just beyond
    return torch.cat([near, some[:2] * 100, some[2:4] * 1e-3, torch.zeros(1, 48), alone, -some[4:]])


@pytest.fixture(scope="module")
def fitted() -> LowRankCodec:
    codec = LowRankCodec(48, max_relative_error=0.02).fit(Probe(rows(512, 1)))
    assert isinstance(codec, LowRankCodec)
    return codec


def read(codec: LowRankCodec, record: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """(W,) float64 of one record, by FORMAT alone."""
    constants = {name: value.numpy() for name, value in codec.constants.items()}
    level, number = record[:4].view("<f4")[0], record[4:8].view("<u4")[0]
    if number:
        return dense[number - 1].astype(np.float64) + level
    stream = np.unpackbits(record[8:], bitorder="little")
    widths, at, numbers = constants["bits"].astype(int), 0, []
    low = []
    for width in widths:
        part = min(width, 8)
        low.append([int(stream[at + i * part : at + (i + 1) * part] @ (1 << np.arange(part))) for i in range(8)])
        at += 8 * part
    for group, width in enumerate(widths):
        if width > 8:
            part = width - 8
            for i in range(8):
                low[group][i] += 256 * int(stream[at + i * part : at + (i + 1) * part] @ (1 << np.arange(part)))
            at += 8 * part
    numbers = np.array(low, dtype=np.float64).ravel() + 0.5 - 2.0 ** (np.repeat(widths, 8) - 1)
    matrix = constants["basis"].astype(np.float64) * constants["step"]
    return constants["mean"] + matrix @ numbers + level


def test_every_record_keeps_the_promise_and_has_no_level(fitted: LowRankCodec) -> None:
    given = torch.cat([rows(300, 2), odd_rows()])
    coded = fitted.encode(given)
    decoded = fitted.decode(coded).double()
    errors = (decoded - given.double()).norm(dim=1) / given.double().norm(dim=1).clamp(min=1e-300)
    assert float(errors.max()) <= 0.02
    assert float(errors[:300].mean()) > 1e-4  # it is no exact copy
    assert 0 < len(coded["dense_at"]) < 40 and int(coded["dense_at"].max()) >= 300
    assert not coded["records"][:, :4].any()  # the level
    assert coded["records"].shape[1] < 40  # of 48 numbers, where int8 takes 56


def test_a_stranger_decodes_it_from_the_format(fitted: LowRankCodec) -> None:
    given = torch.cat([rows(40, 3), odd_rows()])
    coded = fitted.encode(given)
    records = coded["records"].numpy().copy()
    for number, place in enumerate(coded["dense_at"].tolist(), start=1):
        records[place, 4:8] = np.array([number], "<u4").view(np.uint8)
    found = np.stack([read(fitted, record, coded["dense"].numpy()) for record in records])
    np.testing.assert_allclose(fitted.decode(coded).numpy(), found, rtol=1e-5, atol=1e-5)


def test_the_share_of_the_variance_that_it_keeps_is_told(fitted: LowRankCodec) -> None:
    held = rows(512, 1)[3::4]  # on which sizes were tried
    decoded = fitted.decode(fitted.encode(held)).double()
    left = (decoded - held.double()).square().sum()
    whole = (held.double() - held.double().mean(dim=0)).square().sum()
    assert float(fitted.constants["explained"]) == pytest.approx(float(1 - left / whole), abs=1e-6)
    assert 0.99 < float(fitted.constants["explained"]) < 1


def test_its_parameters_and_constants_make_it_again(fitted: LowRankCodec) -> None:
    assert fitted.parameters == {"max_relative_error": "0.02"} and fitted.format == 2 and not fitted.of_classes
    again = restore_codec("lowrank", fitted.parameters, 48, fitted.constants)
    given = rows(20, 4)
    assert torch.equal(again.decode(again.encode(given)), fitted.decode(fitted.encode(given)))
    few = {name: value for name, value in fitted.constants.items() if name != "explained"}
    with pytest.raises(CodecFitError, match="'explained' is missing"):
        restore_codec("lowrank", fitted.parameters, 48, few)
    of_classes = make_codec("lowrank", {}, 48)
    assert of_classes.of_classes and of_classes.parameters.keys() == {"max_kl", "at_temperature"}


def test_a_looser_promise_takes_fewer_bytes() -> None:
    probe = Probe(rows(256, 5))
    sizes = [LowRankCodec(48, max_relative_error=e).fit(probe).arrays["records"][1][0] for e in (0.1, 0.01)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (rows(256, 1, width=8), 0.02, r"does not pay: with a relative error <= 0.02 .*int8:group=64 12 B"),
        (rows(20, 1), 0.1, "at least 32 rows"),
    ],
    ids=["eight numbers", "few rows"],
)  # fmt: skip
def test_where_it_does_not_suit_it_says_so(given: Tensor, error: float, match: str) -> None:
    with pytest.raises(CodecFitError, match=match):
        LowRankCodec(given.shape[1], max_relative_error=error).fit(Probe(given))


def test_a_promise_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_relative_error=-1 must be a number > 0"):
        make_codec("lowrank", {"max_relative_error": "-1"}, 8)

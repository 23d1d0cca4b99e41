"""`int8:group=64`: scales of groups, against float64 arithmetic; what float16 cannot hold is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import QuickDump

from softcache.codecs import make_codec
from softcache.codecs.codec import Codec
from softcache.codecs.int8 import Int8Codec, round_up
from softcache.errors import CacheError, CodecRangeError, ConfigError


def oracle(record: bytes, width: int, group: int) -> np.ndarray:
    """The numbers of a record, as section 25 of FORMAT.md says."""
    groups = -(-width // group)
    lowest, step = np.frombuffer(record[: 2 * groups], "<f2"), np.frombuffer(record[2 * groups : 4 * groups], "<f2")
    codes = np.frombuffer(record[4 * groups :], np.uint8)
    assert len(codes) == width
    return np.array(
        [np.float32(codes[i]) * np.float32(step[i // group]) + np.float32(lowest[i // group]) for i in range(width)]
    )


@pytest.mark.parametrize(("width", "group"), [(1, 64), (64, 64), (65, 64), (130, 64), (10, 3), (7, 100)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 300.0])
def test_records_decode_as_the_page_says_within_half_a_step(width: int, group: int, scale: float) -> None:
    values = torch.randn(20, width) * scale
    codec = make_codec("int8", {"group": str(group)}, width)
    records = codec.encode(values)["records"]
    decoded = codec.decode({"records": records}).numpy()
    for row in range(20):
        np.testing.assert_array_equal(decoded[row], oracle(records[row].numpy().tobytes(), width, group))
    for start in range(0, width, group):
        cell = values[:, start : start + group].double()
        span = (cell.amax(dim=1) - cell.amin(dim=1)).numpy()
        # the stored lowest and step are within one float16 of what a group needs
        lowest_off = 2.0**-10 * np.abs(cell.amin(dim=1).numpy()) + 2.0**-24
        step = (span + lowest_off) / 255 * (1 + 2.0**-10) + 2.0**-24
        error = np.abs(decoded[:, start : start + group] - cell.numpy()).max(axis=1)
        assert (error <= step / 2 + 1e-6 * np.abs(cell.numpy()).max(axis=1)).all()


def test_outliers_spoil_their_group_alone() -> None:
    """1,024 numbers of which 1 % are ten times as large: at most 1,100 bytes, and at most half the error of one scale a row."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(200, 1024)).astype(np.float32)
    values[:, draw.choice(1024, 10, replace=False)] *= 10
    given = torch.from_numpy(values)

    def error(codec: Codec) -> float:
        decoded = codec.decode(codec.encode(given))
        return float(((decoded - given).norm(dim=1) / given.norm(dim=1)).mean())

    whole, groups = make_codec("int8", {}, 1024), make_codec("int8", {"group": "64"}, 1024)
    assert groups.arrays["records"][1][0] + 2 == 1090  # with its bound
    assert error(groups) <= 0.5 * error(whole)


def test_round_up_is_the_smallest_float16_that_is_not_below() -> None:
    values = torch.cat(
        [torch.randn(1000) * s for s in (1e-8, 1e-4, 1.0, 1e4)] + [torch.tensor([0.0, -0.0, 65504.0, -1e-9])]
    )
    found = round_up(values).float().numpy()
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = np.sort(every[np.isfinite(every)].astype(np.float32))
    wanted = every[np.searchsorted(every, values.numpy(), side="left")]
    np.testing.assert_array_equal(found, wanted)
    assert round_up(torch.tensor([65505.0])).isinf().all()


@pytest.mark.parametrize("value", [2e7, -1e5, 4e7])
def test_what_float16_cannot_hold_is_refused_with_group_0(value: float) -> None:
    values = torch.zeros(2, 100)
    values[1, 70] = value
    with pytest.raises(CodecRangeError, match="float16 holds the scales") as caught:
        make_codec("int8", {"group": "64"}, 100).encode(values)
    assert "group=0" in caught.value.tip
    assert make_codec("int8", {"group": "0"}, 100).encode(values)["records"].shape == (2, 108)


def test_the_parameter_stands_only_where_it_says_something() -> None:
    assert make_codec("int8", {}, 9).parameters == {} == make_codec("int8", {"group": "0"}, 9).parameters
    assert make_codec("int8", {"group": "4"}, 9).text == "int8:group=4"
    with pytest.raises(ConfigError, match="group=-1"):
        make_codec("int8", {"group": "-1"}, 9)
    with pytest.raises(ConfigError, match="codec 'int8' has no parameter 'groups'"):
        make_codec("int8", {"groups": "64"}, 9)


def test_a_dump_with_groups_is_of_version_2(quick_dump: QuickDump) -> None:
    grouped = quick_dump(codec="int8:group=4")
    assert grouped.manifest.plan.format == 2 and grouped.codecs["exact"].parameters == {"group": "4"}
    exact = quick_dump(out="exact", codec="float32")
    rows, views = np.arange(40), np.zeros(40, int)
    given, stored = exact.gather(rows, views).logits(), grouped.gather(rows, views).logits()
    eps = torch.from_numpy(grouped.eps("exact", rows, views))
    assert ((stored - given).abs().amax(dim=1) <= eps).all()
    with pytest.raises(ConfigError, match="is of format version 2, and this cache is of version 1"):
        quick_dump(out="exact", extend=True, codec="int8:group=4", teacher=[quick_dump_network()])


def quick_dump_network() -> str:
    from conftest import WORLDS

    return f"{WORLDS / 'toy.py'}:network?seed=3"


def test_version_1_has_no_groups(quick_dump: QuickDump, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = property(lambda self: 1)
    with monkeypatch.context() as patch:
        patch.setattr(Int8Codec, "format", made)
        path = quick_dump(codec="int8:group=4").reader.path
    import softcache

    with pytest.raises(CacheError, match="which format version 1 does not have"):
        softcache.open(path)

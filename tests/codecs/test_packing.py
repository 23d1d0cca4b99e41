"""Bit packing against Python's own whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softcache.codecs.packing import MAX_CLASSES, id_bits, pack, pack_codes, packed_bytes, unpack, unpack_codes
from softcache.errors import ConfigError

BITS_OF = {2: 1, 3: 2, 10: 4, 100: 7, 1000: 10, 21841: 15, 32768: 15, 70000: 17, 151936: 18, 2**24: 24}
COUNTS = (0, 1, 2, 3, 4, 7, 8, 10, 13)


def bytes_of(values: list[int], bits: int) -> list[int]:
    """Value i times 2**(i * bits), summed, lowest byte first."""
    whole = sum(value << (place * bits) for place, value in enumerate(values))
    return list(whole.to_bytes((len(values) * bits + 7) // 8, "little"))


def random_values(rows: int, count: int, end: int) -> torch.Tensor:
    """(rows, count) int64 in [0, end); the first row is all zeros, the second all end - 1."""
    values = np.random.default_rng([rows, count, end]).integers(0, end, (rows, count))
    values[:1], values[1:2] = 0, end - 1
    return torch.from_numpy(values)


@pytest.mark.parametrize("classes", BITS_OF)
def test_ids_take_the_logarithm_of_their_number(classes: int) -> None:
    assert id_bits(classes) == BITS_OF[classes]
    for count in COUNTS:
        ids = random_values(5, count, classes)
        packed = pack(ids, id_bits(classes))
        assert packed.dtype == torch.uint8 and packed.shape == (5, packed_bytes(count, id_bits(classes)))
        assert packed.tolist() == [bytes_of(row, BITS_OF[classes]) for row in ids.tolist()]
        assert torch.equal(unpack(packed, count, id_bits(classes)), ids)


def test_every_width_packs_and_unpacks() -> None:
    for bits in range(1, 25):
        values = random_values(4, 11, 1 << bits)
        packed = pack(values, bits)
        assert packed.tolist() == [bytes_of(row, bits) for row in values.tolist()]
        assert torch.equal(unpack(packed, 11, bits), values)
        assert pack(values[:0], bits).shape == (0, packed_bytes(11, bits))
        assert unpack(packed[:0], 11, bits).shape == (0, 11)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_codes_pack_by_the_same_rule(bits: int) -> None:
    for count in (1, 2, 3, 4, 5, 10, 11, 100, 1001):
        codes = random_values(6, count, 1 << bits).to(torch.uint8)
        packed = pack_codes(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [bytes_of(row, bits) for row in codes.tolist()]
        assert torch.equal(packed, pack(codes, bits))
        assert torch.equal(unpack_codes(packed, count, bits), codes)
        wider = torch.cat([packed, packed], dim=1)[:, : packed.shape[1]]  # a part of a record, not contiguous
        assert torch.equal(unpack_codes(wider, count, bits), codes)
        assert unpack_codes(packed[:0], count, bits).shape == pack_codes(codes[:0], 8).shape == (0, count)
        assert pack_codes(codes[:0], bits).shape == (0, packed_bytes(count, bits))


def test_one_class_takes_one_bit() -> None:
    assert id_bits(1) == 1


@pytest.mark.parametrize("classes", [0, -1, MAX_CLASSES + 1])
def test_other_numbers_of_classes_are_refused(classes: int) -> None:
    with pytest.raises(ConfigError, match=rf"1 to 2\*\*24 classes, not {classes}"):
        id_bits(classes)

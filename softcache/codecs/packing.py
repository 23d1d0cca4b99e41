"""Small whole numbers packed without gaps: value i of a row takes `bits` bits from bit i * bits on, the lowest bit first.

Bit j of a row is bit j % 8 of byte j // 8, bit 0 being a byte's lowest. What is left of the last byte is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.errors import ConfigError

MAX_CLASSES = 1 << 24


def id_bits(num_classes: int) -> int:
    """ceil(log2 C), at least 1: the bits of one class id.

    Raises:
        ConfigError: more than 2**24 classes.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ConfigError(f"class ids are packed for 1 to 2**24 classes, not {num_classes}")
    return max(1, (num_classes - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """(B, n) whole numbers in [0, 2**bits), bits <= 24 -> (B, packed_bytes(n, bits)) uint8."""
    count = values.shape[1]
    which = torch.arange(bits, device=values.device)
    ones = (values.long()[:, :, None] >> which) & 1  # (B, n, bits)
    ones = _padded(ones.flatten(1), 8 * packed_bytes(count, bits))
    weights = 1 << torch.arange(8, device=values.device)
    return (ones.unflatten(1, (-1, 8)) * weights).sum(dim=2).to(torch.uint8)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """What `pack` took: (B, packed_bytes(count, bits)) uint8 -> (B, count) int64."""
    start = torch.arange(count, device=packed.device) * bits
    value = torch.zeros(len(packed), count, dtype=torch.int64, device=packed.device)
    last = packed.shape[1] - 1
    for step in range(packed_bytes(bits + 7, 1)):  # the most bytes that one value can touch
        # a byte past the end is never part of a value: any other may stand for it
        value |= packed[:, (start // 8 + step).clamp(max=last)].long() << (8 * step)
    return (value >> start % 8) & ((1 << bits) - 1)


def unpack_ids(packed: Tensor, count: int, num_classes: int) -> Tensor:
    """(B, count) int64 class ids; one that is no class becomes the last one, since on a GPU it could not be refused."""
    return unpack(packed, count, id_bits(num_classes)).clamp_(max=num_classes - 1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`pack` for (B, n) uint8 codes of 8, 6 or 4 bits: the same bytes, in a few passes over them.

    Takes a little-endian machine, as every view of stored numbers does.
    """
    count = codes.shape[1]
    if bits == 8:
        return codes
    if bits == 4:
        pair = _padded(codes, 2 * packed_bytes(count, 4)).view(torch.int16)
        return (pair | pair >> 4).to(torch.uint8)
    fours = (count + 3) // 4
    four = _padded(codes, 4 * fours).view(torch.int32)  # (B, fours): each four codes of 8 bits
    joined = four.clone()  # changed in place: an operation's result has no usable strides where there are no rows
    joined &= 0x3F
    for place in (1, 2, 3):  # from bit 8 * place to bit 6 * place
        joined |= (four >> 2 * place) & (0x3F << 6 * place)
    three = joined.view(torch.uint8).unflatten(1, (fours, 4))[:, :, :3]
    return three.flatten(1)[:, : packed_bytes(count, 6)]


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """What `pack_codes` took: (B, packed_bytes(count, bits)) uint8 -> (B, count) uint8."""
    if bits == 8:
        return packed
    if bits == 4:
        pair = packed.new_zeros(packed.shape, dtype=torch.int16)
        pair += packed
        pair |= pair << 4
        pair &= 0x0F0F
        return pair.view(torch.uint8)[:, :count]
    fours = (count + 3) // 4
    wide = packed.new_zeros(len(packed), fours, 4)
    wide[:, :, :3] = _padded(packed, 3 * fours).unflatten(1, (fours, 3))
    joined = wide.flatten(1).view(torch.int32)  # (B, fours): each four codes of 6 bits
    four = joined.clone()
    four &= 0x3F
    for place in (1, 2, 3):
        four |= (joined & (0x3F << 6 * place)) << 2 * place
    return four.view(torch.uint8)[:, :count]


def _padded(values: Tensor, width: int) -> Tensor:
    """(B, n) -> (B, width), contiguous, with zeros behind."""
    padded = values.new_zeros(len(values), width)
    padded[:, : values.shape[1]] = values
    return padded

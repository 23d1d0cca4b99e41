"""Sets of class ids in a fixed number of bytes: their lower bits packed, the upper ones in unary.

Source: Elias, "Efficient Storage and Retrieval by Content and Address of Static Files" (1974); Fano, "On the Number of Bits
Required to Implement an Associative Memory" (1971).
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.codecs.packing import packed_bytes, unpack


def lower_bits(count: int, num_classes: int) -> int:
    """floor(log2(C / count)): how many bits of each id are packed; count <= C."""
    return (num_classes // count).bit_length() - 1


def _upper_bits(count: int, num_classes: int) -> int:
    return count + ((num_classes - 1) >> lower_bits(count, num_classes)) + 1


def set_bytes(count: int, num_classes: int) -> int:
    """The bytes of a set of `count` of C ids, 1 <= count <= C: about count (2 + log2(C / count)) bits."""
    return packed_bytes(count * lower_bits(count, num_classes) + _upper_bits(count, num_classes), 1)


def pack_set(ids: Tensor, num_classes: int) -> Tensor:
    """(B, n) rising int64 ids in [0, C) -> (B, set_bytes(n, C)) uint8."""
    count = ids.shape[1]
    width = lower_bits(count, num_classes)
    bits = ids.new_zeros(len(ids), 8 * set_bytes(count, num_classes), dtype=torch.uint8)
    for place in range(width):
        bits[:, place : count * width : width] = ids >> place & 1
    places = count * width + (ids >> width) + torch.arange(count, device=ids.device)
    bits.scatter_(1, places, torch.ones_like(places, dtype=torch.uint8))
    packed = bits[:, ::8].clone()
    for place in range(1, 8):
        packed |= bits[:, place::8] << place
    return packed


def unpack_set(packed: Tensor, count: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """What `pack_set` took, and which rows are such a set.

    Returns:
        (B, count) int64 ids, classes in any case, and (B,) bool: false where the bytes are not `count` rising ids below C.
    """
    width = lower_bits(count, num_classes)
    length, first = _upper_bits(count, num_classes), count * width
    bits = packed.new_empty(len(packed), 8 * packed.shape[1])
    for place in range(8):
        bits[:, place::8] = packed >> place & 1
    upper = bits[:, first : first + length]
    ranks = upper.cumsum(dim=1, dtype=torch.int32)  # which one it is, counted from 1
    column = torch.where(upper > 0, ranks - 1, count).clamp_(max=count).long()
    places = torch.arange(length, device=packed.device).expand(len(packed), length)
    at = ranks.new_zeros(len(packed), count + 1, dtype=torch.int64).scatter_(1, column, places)[:, :count]
    ids = (at - torch.arange(count, device=packed.device)) << width | unpack(packed, count, width)
    whole = (ranks[:, -1] == count) & (ids[:, 1:] > ids[:, :-1]).all(dim=1) & (ids[:, -1] < num_classes)
    return ids.clamp_(0, num_classes - 1), whole

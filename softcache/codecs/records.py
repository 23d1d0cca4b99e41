"""Compact records: the fields of one record laid out in one row of bytes, so that a row is one read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

DTYPES = {"|u1": torch.uint8, "<f2": torch.float16, "<f4": torch.float32, "<u4": torch.int32}


@dataclass(frozen=True)
class Field:
    """One field of a record: `shape` numbers of `dtype` (NumPy's notation) from byte `offset` on; bit-packed fields are |u1."""

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "offset": self.offset, "dtype": self.dtype, "shape": list(self.shape)}


def lay_out(wanted: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[Field, ...]:
    """Fields one after the other, without gaps: put the widest dtypes first, and they are aligned."""
    fields: list[Field] = []
    offset = 0
    for name, dtype, shape in wanted:
        fields.append(Field(name, offset, dtype, shape))
        offset += fields[-1].nbytes
    return tuple(fields)


def record_bytes(fields: Sequence[Field]) -> int:
    """The length of a record: where its last field ends."""
    return max((field.offset + field.nbytes for field in fields), default=0)


def read_field(records: Tensor, field: Field) -> Tensor:
    """(B, *shape) values of one field out of (B, R) uint8 records; a view where alignment allows it."""
    raw = records[:, field.offset : field.offset + field.nbytes]
    dtype = DTYPES[field.dtype]
    if dtype != torch.uint8:
        width = dtype.itemsize
        if raw.stride(1) == 1 and raw.stride(0) % width == 0 and raw.storage_offset() % width == 0:
            raw = raw.view(dtype)
        else:
            copy = raw.new_empty(len(raw), prod(field.shape), dtype=dtype)
            copy.view(torch.uint8).copy_(raw)
            raw = copy
    return raw if len(field.shape) == 1 else raw.reshape(len(records), *field.shape)


def write_fields(fields: Sequence[Field], values: Mapping[str, Tensor]) -> Tensor:
    """(B, R) uint8 records from the values of every field, each (B, *shape) and converted to its field's dtype."""
    first = values[fields[0].name]
    records = first.new_empty(len(first), record_bytes(fields), dtype=torch.uint8)
    for field in fields:
        flat = values[field.name].reshape(len(first), prod(field.shape))
        if DTYPES[field.dtype] != torch.uint8:
            # copied first: views as bytes need the strides of new memory, which operations on no rows do not give
            flat = flat.new_empty(flat.shape, dtype=DTYPES[field.dtype]).copy_(flat).view(torch.uint8)
        records[:, field.offset : field.offset + field.nbytes] = flat
    return records

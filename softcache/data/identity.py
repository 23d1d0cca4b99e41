"""What a sample is called and what it holds: sample ids from keys, digests from content. FORMAT.md has test vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from softcache.errors import DataError, DuplicateKeyError

DIGEST_BYTES = 16
PIXEL_DIGEST_BYTES = 4


def sample_id(key: str) -> int:
    """uint64 id of one key: BLAKE2b with an 8-byte digest over the key's UTF-8, little-endian. Keys are not normalised."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")


def sample_ids(keys: Iterable[str]) -> np.ndarray:
    """(N,) uint64 ids of many keys."""
    return np.fromiter((sample_id(key) for key in keys), dtype=np.uint64)


def check_unique(keys: Sequence[str], ids: np.ndarray) -> None:
    """Raise DuplicateKeyError when two samples share a key, or two keys share an id."""
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if not same.size:
        return
    first, second = keys[int(order[same[0]])], keys[int(order[same[0] + 1])]
    if first == second:
        raise DuplicateKeyError(
            f"{len(same)} samples repeat a key; the first is {first!r}. A sample id must name one sample.",
            tip="make the keys of the data set unique (a path, or split/index)",
        )
    raise DuplicateKeyError(
        f"keys {first!r} and {second!r} have the same 64-bit id {int(ids[order[same[0]]]):016x}",
        tip="rename one of them",
    )


def item_digest(item: Any, *, size: int = DIGEST_BYTES) -> bytes:
    """BLAKE2b digest of an item in canonical form: kind, dtype and shape, each length-prefixed, then its bytes.

    Args:
        item: a NumPy array, a tensor (CPU), a string, bytes, a number, or tuples, lists and mappings of them.
        size: digest length in bytes (16 for contents, 4 for the pixels of a view).

    Raises:
        DataError: an item of another type.
    """
    hasher = hashlib.blake2b(digest_size=size)
    _feed(hasher, item)
    return hasher.digest()


def pixel_digest(item: Any) -> int:
    """uint32 digest of a rendered view (4-byte `item_digest`, little-endian)."""
    return int.from_bytes(item_digest(item, size=PIXEL_DIGEST_BYTES), "little")


def file_digest(data: bytes) -> bytes:
    """16-byte BLAKE2b digest of a file's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _feed(hasher: Any, item: Any) -> None:
    if isinstance(item, str):
        _head(hasher, "str")
        _prefixed(hasher, item.encode("utf-8"))
    elif isinstance(item, bytes):
        _head(hasher, "bytes")
        _prefixed(hasher, item)
    elif isinstance(item, Mapping):
        _head(hasher, "mapping", str(len(item)))
        for key in sorted(item):
            _prefixed(hasher, str(key).encode("utf-8"))
            _feed(hasher, item[key])
    elif isinstance(item, tuple | list):
        _head(hasher, "sequence", str(len(item)))
        for element in item:
            _feed(hasher, element)
    elif isinstance(item, bool | int | float | np.generic):
        _feed(hasher, np.asarray(item))
    elif isinstance(item, np.ndarray) or hasattr(item, "__array__"):
        array = np.asarray(item)
        if array.dtype.hasobject:
            raise DataError(
                f"an item of dtype {array.dtype} has no canonical bytes", tip="use numbers, strings or bytes"
            )
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        _head(hasher, "array", array.dtype.str, ",".join(map(str, array.shape)))
        hasher.update(np.ascontiguousarray(array).tobytes())
    else:
        raise DataError(
            f"an item of type {type(item).__name__} has no canonical bytes",
            tip="let the data set return NumPy arrays, tensors, strings, numbers, or tuples and dicts of them",
        )


def _head(hasher: Any, *parts: str) -> None:
    for part in parts:
        _prefixed(hasher, part.encode("utf-8"))


def _prefixed(hasher: Any, data: bytes) -> None:
    hasher.update(len(data).to_bytes(8, "little"))
    hasher.update(data)

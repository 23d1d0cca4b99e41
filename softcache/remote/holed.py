"""A file with holes: the checksums of its blocks are there, and so many of its blocks as were needed; and which these are.

Beside the file lies one byte for each block, 1 where it is there. A block is written first and marked afterwards.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from softcache.cache.canonical import canonical_json
from softcache.cache.file_entry import StoredFile
from softcache.cache.schema import BLOCK_BYTES, CRC_SUFFIX
from softcache.files import durable

MARKS = ".blocks"
MOST_BYTES = 1 << 40  # of a file, whose checksums are then 64 MiB: they are held in memory


def has_holes(file: StoredFile) -> bool:
    """Whether a file is worth fetching by blocks: of version 2, records, and not a small one."""
    return (
        file.checksums is not None and file.kind in ("member", "views") and 2 * BLOCK_BYTES < file.nbytes <= MOST_BYTES
    )


def holed_name(file: StoredFile) -> str:
    """What it is called in a store: by its sha256, and by where its blocks lie and which checksums they have."""
    entry = file.to_json()
    about = canonical_json({key: entry[key] for key in ("bytes", "arrays", "checksums")})
    return f"{file.sha256}.{hashlib.sha256(about).hexdigest()[:32]}"


def first_marks(file: StoredFile) -> tuple[dict[str, int], int]:
    """Data set -> the place of its first block among the marks; and how many marks there are."""
    starts, count = {}, 0
    for name in sorted(name for name in file.arrays if not name.endswith(CRC_SUFFIX)):
        starts[name] = count
        count += file.arrays[name + CRC_SUFFIX].shape[0]
    return starts, count


def make_holed(path: Path, file: StoredFile, sums: Mapping[int, bytes]) -> None:
    """The file with no block yet.

    Args:
        sums: offset -> the checksums that lie there.
    """
    durable.make_folder(path.parent)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    durable.write_whole(marks_path(path), bytes(first_marks(file)[1]), tag=tag)
    with durable.written_aside(path, tag=tag) as out:
        durable.set_size(out, file.nbytes)
        for offset, data in sums.items():
            durable.write_at(out, data, offset)


def marks_path(path: Path) -> Path:
    return path.with_name(path.name + MARKS)


def read_marks(path: Path, file: StoredFile) -> bytearray:
    """A byte for each block; where the marks are lost, none is there."""
    count = first_marks(file)[1]
    try:
        found = bytearray(marks_path(path).read_bytes())
    except FileNotFoundError:
        found = bytearray()
    return found if len(found) == count else bytearray(count)


def write_blocks(path: Path, file: StoredFile, name: str, first: int, data: bytes) -> None:
    """Put blocks into their place, and mark them."""
    with durable.closing(durable.open_again(path)) as out:
        durable.write_at(out, data, file.arrays[name].offset + first * BLOCK_BYTES)
    count = -(-len(data) // BLOCK_BYTES)
    with durable.closing(durable.open_or_create(marks_path(path))) as out:
        durable.write_at(out, b"\1" * count, first_marks(file)[0][name] + first)

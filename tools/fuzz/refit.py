"""A changed file made to fit: the checksums of HDF5's own metadata, and those of the data."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from hostile.metadata import header_end, lookup3
from softcache.cache.file_entry import StoredFile
from softcache.cache.schema import BLOCK_BYTES

SIGNATURES = (
    b"\x89HDF",
    b"OHDR",
    b"OCHK",
    b"FRHP",
    b"FHDB",
    b"FHIB",
    b"BTHD",
    b"BTLF",
    b"BTIN",
    b"SMTB",
    b"FSHD",
    b"FSSE",
)


def guarded_parts(data: bytes, file: StoredFile) -> list[tuple[int, int]]:
    """(start, stop) of the parts of a file's metadata that are followed by their checksum."""
    found = []
    for signature in SIGNATURES:
        at = data.find(signature)
        while at >= 0:
            if not any(a.offset <= at < a.offset + a.nbytes for a in file.arrays.values()):
                for stop in _ends(data, at, signature):
                    if lookup3(data[at:stop]) == int.from_bytes(data[stop : stop + 4], "little"):
                        found.append((at, stop))
                        break
            at = data.find(signature, at + 1)
    return found


def _ends(data: bytes, at: int, signature: bytes) -> Sequence[int]:
    """Where a part may end: known for the superblock and for object headers, tried out for the few others."""
    if signature == b"\x89HDF":
        return [at + 44]
    if signature == b"OHDR":
        return [header_end(data, at)]
    return range(at + 8, min(at + 600, len(data) - 4))


def with_fitting_metadata(data: bytes, honest: bytes, guarded: Sequence[tuple[int, int]]) -> bytes:
    """The same bytes with the checksums of changed HDF5 metadata made to fit, so that the library looks further."""
    fitted = bytearray(data)
    for start, stop in guarded:
        if data[start : stop + 4] != honest[start : stop + 4]:
            fitted[stop : stop + 4] = lookup3(bytes(fitted[start:stop])).to_bytes(4, "little")
    return bytes(fitted)


def refitted(data: bytes, file: StoredFile) -> tuple[bytes, StoredFile]:
    """The file with checksums that fit its data, as far as they lie in it, and the manifest's entry of it."""
    fitted = bytearray(data)
    for name, array in file.arrays.items():
        sums = file.arrays.get(f"{name}_crc32")
        if sums is None or sums.offset + sums.nbytes > len(fitted):
            continue
        starts = range(array.offset, array.offset + array.nbytes, BLOCK_BYTES)
        stop = array.offset + array.nbytes
        values = [zlib.crc32(fitted[at : min(at + BLOCK_BYTES, stop)]) for at in starts]
        fitted[sums.offset : sums.offset + sums.nbytes] = np.array(values, "<u4").tobytes()
    return bytes(fitted), replace(
        file, nbytes=len(fitted), sha256=sha256(fitted).hexdigest(), checksums=_of_sums(file, bytes(fitted))
    )


def _of_sums(file: StoredFile, data: bytes) -> str | None:
    """The sha256 of the checksums that lie in a file of version 2, as far as they do."""
    if file.checksums is None:
        return None
    sums = [file.arrays[name] for name in sorted(file.arrays) if name.endswith("_crc32")]
    return sha256(b"".join(bytes(data[one.offset : one.offset + one.nbytes]) for one in sums)).hexdigest()

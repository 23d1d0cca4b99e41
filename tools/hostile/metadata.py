"""HDF5's own metadata: its checksums, and object headers with other bytes in them."""

from __future__ import annotations

from hostile.forge import Forge
from hostile.honest import PLAIN


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash (2006, public domain), with which HDF5 guards its metadata."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask

    def turn(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    at = 0
    while len(data) - at > 12:
        x, y, z = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4, 8))
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for k, part in ((4, 0), (6, 1), (8, 2), (16, 0), (19, 1), (4, 2)):
            if part == 0:
                a = ((a - c) & mask) ^ turn(c, k)
                c = (c + b) & mask
            elif part == 1:
                b = ((b - a) & mask) ^ turn(a, k)
                a = (a + c) & mask
            else:
                c = ((c - b) & mask) ^ turn(b, k)
                b = (b + a) & mask
        at += 12
    rest = data[at:]
    if not rest:
        return c
    x, y, z = (int.from_bytes(rest[i : i + 4], "little") for i in (0, 4, 8))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    for k, part in ((14, 0), (11, 1), (25, 2), (16, 0), (4, 1), (14, 2), (24, 0)):
        if part == 0:
            c = ((c ^ b) - turn(b, k)) & mask
        elif part == 1:
            a = ((a ^ c) - turn(c, k)) & mask
        else:
            b = ((b ^ a) - turn(a, k)) & mask
    return c


def header_end(data: bytes | bytearray, at: int) -> int:
    """Where the checksum of an object header (version 2) begins, by the header's own flags and size."""
    flags = data[at + 5]
    start = at + 6 + (16 if flags & 32 else 0) + (4 if flags & 16 else 0)
    width = 1 << (flags & 3)
    return start + width + int.from_bytes(data[start : start + width], "little")


def patch_header(forge: Forge, name: str, old: bytes, new: bytes, *, last_only: bool = False) -> None:
    """Other bytes in the object header of a data set, with the header's checksum made to fit."""
    path = forge.root / PLAIN
    data = bytearray(path.read_bytes())
    start = data.rfind(b"OHDR", 0, forge.array(PLAIN, name)["offset"])
    end = header_end(data, start)
    header = bytes(data[start:end])
    assert old in header, f"the header of {name} has no {old.hex()}"
    at = header.rfind(old) if last_only else header.find(old)
    header = header[:at] + header[at:].replace(old, new)
    data[start : end + 4] = header + lookup3(header).to_bytes(4, "little")
    path.write_bytes(data)

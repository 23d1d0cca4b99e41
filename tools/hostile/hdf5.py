"""HDF5 features that no cache has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from hostile.forge import Forge, Gate, case
from hostile.honest import PLAIN, SAMPLES
from hostile.metadata import lookup3, patch_header


def h5_case(name: str, change: Callable[[h5py.File], Any], *, without: str = "", gate: Gate = "verify") -> None:
    """A file changed by the HDF5 library: what stands in the data sets' places stays, so only `verify --full` can see it.

    Args:
        without: a data set that is unlinked first, in a session of its own, so that its place is not used again.
    """

    def make(forge: Forge) -> None:
        path = forge.root / PLAIN
        honest = {n: forge.read(PLAIN, n) for n in forge.file(PLAIN)["arrays"]}
        if without:
            with h5py.File(path, "r+", libver=("v110", "v110")) as file:
                del file[without]
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            change(file)
        for n, values in honest.items():
            forge.write(PLAIN, n, values)
        forge.refit(PLAIN)
        forge.save()

    case(f"h5/{name}", gate=gate)(make)


def _low_level(name: bytes, shape: tuple[int, ...], dtype: Any, **how: Any) -> Callable[[h5py.File], None]:
    """Create a data set with creation properties that h5py's upper layer has no words for."""

    def create(file: h5py.File) -> None:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        for method, arguments in how.items():
            getattr(layout, method)(*arguments)
        kind = dtype if isinstance(dtype, h5py.h5t.TypeID) else h5py.h5t.py_create(np.dtype(dtype))
        h5py.h5d.create(file.id, name, kind, h5py.h5s.create_simple(shape), dcpl=layout)

    return create


PLACE = (2, 256, 6)  # of the data set that is replaced: `logits`, float16
TINY = np.zeros(PLACE, "<f2")


def _external_storage(file: h5py.File) -> None:
    file.create_dataset("logits", PLACE, "<f2", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(PLACE, "<f2")
    layout[...] = h5py.VirtualSource("elsewhere.h5", "logits", PLACE)
    file.create_virtual_dataset("logits", layout)


def _cumulative_bomb(file: h5py.File) -> None:
    for i in range(200):
        _low_level(f"bomb{i}".encode(), (2**44,), "<f2")(file)


def _deep_groups(file: h5py.File) -> None:
    group = file
    for _ in range(2000):
        group = group.create_group("g")


def _link_cycle(file: h5py.File) -> None:
    group = file.create_group("loop")
    group["again"] = group
    file["root"] = file["/"]
    group["soft"] = h5py.SoftLink("/loop/soft")


def _giant_attribute(numbers: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["logits"].attrs.create("giant", np.zeros(numbers))

    return change


def _attribute(name: str, value: Any, **how: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs.create(name, value, **how)

    return change


def _committed_type(file: h5py.File) -> None:
    file["named"] = np.dtype("<f2")
    file.create_dataset("logits", PLACE, dtype=file["named"])


def _data(dtype: Any, **how: Any) -> Callable[[h5py.File], None]:
    """`logits` of another kind."""

    def change(file: h5py.File) -> None:
        file.create_dataset("logits", PLACE, dtype, **how)

    return change


h5_case("external storage", _external_storage, without="logits")
h5_case("external link", lambda f: f.__setitem__("logits", h5py.ExternalLink("/etc/passwd", "/x")), without="logits")
h5_case(
    "external link to a file beside it",
    lambda f: f.__setitem__("logits", h5py.ExternalLink("part-00001.h5", "logits")),
    without="logits",
)
h5_case("soft link", lambda f: f.__setitem__("logits", h5py.SoftLink("/eps")), without="logits")
h5_case("dangling soft link", lambda f: f.__setitem__("logits", h5py.SoftLink("/nowhere")), without="logits")
h5_case("extra soft link", lambda f: f.__setitem__("again", h5py.SoftLink("/eps")))
h5_case("hard link under a second name", lambda f: f.__setitem__("again", f["eps"]))
h5_case("two names, one data set", lambda f: f.__setitem__("feature0_error", f["eps"]), without="feature0_error")
h5_case("virtual data set", _virtual, without="logits")
h5_case("shape bomb, contiguous, 2 PiB", _low_level(b"logits", (2**50,), "<f2"), without="logits")
h5_case(
    "shape bomb, chunked, 2 PiB",
    lambda f: f.create_dataset("logits", (2**50,), "<f2", chunks=(2**10,)),
    without="logits",
)
h5_case("shape bomb of 32 axes", _low_level(b"logits", (2,) * 32, "<f2"), without="logits")
h5_case("cumulative bomb, 200 data sets of 32 TiB", _cumulative_bomb)
h5_case("chunks", _data("<f2", chunks=(1, 256, 6)), without="logits")
h5_case("chunks that may grow", _data("<f2", chunks=(1, 256, 6), maxshape=(None, 256, 6)), without="logits")
h5_case("filter gzip", _data("<f2", compression="gzip"), without="logits")
h5_case("filters shuffle, fletcher32", _data("<f2", shuffle=True, fletcher32=True), without="logits")
h5_case("compact layout", _low_level(b"logits", PLACE, "<f2", set_layout=(h5py.h5d.COMPACT,)), without="logits")
h5_case("not allocated", _low_level(b"logits", PLACE, "<f2"), without="logits")
h5_case("variable-length arrays", _data(h5py.vlen_dtype("<f2")), without="logits")
h5_case("variable-length strings", _data(h5py.string_dtype()), without="logits")
h5_case("fixed strings", _data("S2"), without="logits")
h5_case("object references", _data(h5py.ref_dtype), without="logits")
h5_case("region references", _data(h5py.regionref_dtype), without="logits")
h5_case("compound type", _data(np.dtype([("a", "<f2")])), without="logits")
h5_case("compound type, nested", _data(np.dtype([("a", [("b", [("c", "<f2")])])])), without="logits")
h5_case("enum type", _data(h5py.enum_dtype({"a": 1, "b": 2}, basetype="<i2")), without="logits")
h5_case("opaque type", _data(np.dtype("V2")), without="logits")
h5_case("array type", _data(np.dtype(("<f2", (6,)))), without="logits")
h5_case("bit field", _low_level(b"logits", PLACE, h5py.h5t.STD_B16LE), without="logits")
h5_case("byte-swapped type", _data(">f2"), without="logits")
h5_case("signed instead of float", _data("<i2"), without="logits")
h5_case("complex numbers", _data("<c8"), without="logits")
h5_case("committed type", _committed_type, without="logits")
h5_case("another shape, same bytes", _low_level(b"logits", (512, 6), "<f2"), without="logits")
h5_case("scalar", lambda f: f.create_dataset("logits", (), "<f2"), without="logits")
h5_case("null data space", lambda f: f.create_dataset("logits", dtype="<f2", data=h5py.Empty("<f2")), without="logits")
h5_case("giant attribute", _giant_attribute(2**16))
h5_case("attribute of 16 MiB", _giant_attribute(2**21), gate="open")
h5_case("extra attribute of the root group", _attribute("note", "hello"))
h5_case("extra attribute of a data set", lambda f: f["eps"].attrs.create("unit", 1))
h5_case("ten thousand attributes", lambda f: [f.attrs.create(f"a{i}", 1) for i in range(10000)])
h5_case("another format number", _attribute("softcache_format", 7, dtype="<u4"))
h5_case("format number of another type", _attribute("softcache_format", 1, dtype=">u4"))
h5_case("format number as an array", _attribute("softcache_format", [1, 1], dtype="<u4"))
h5_case("another kind", _attribute("softcache_kind", np.bytes_("dense!")))
h5_case("kind as a variable-length string", _attribute("softcache_kind", "member"))
h5_case("no kind", lambda f: f.attrs.__delitem__("softcache_kind"))
h5_case("a group", lambda f: f.create_group("more"))
h5_case("a group in a data set's name", lambda f: f.create_group("logits"), without="logits")
h5_case("deep groups", _deep_groups)
h5_case("link cycles", _link_cycle)
h5_case("an extra data set", lambda f: f.create_dataset("extra", (4,), "<f2", data=np.ones(4, "<f2")))
h5_case("a data set less", lambda f: None, without="logits")
h5_case("a data set under another name", lambda f: f.move("logits", "Logits"))
h5_case("two thousand links", lambda f: [f.__setitem__(f"s{i}", h5py.SoftLink("/x")) for i in range(2000)])


def _bytes_case(name: str, change: Callable[[bytes], bytes], *, path: str = PLAIN, shift: int = 0) -> None:
    """A file whose bytes are changed; the data sets' offsets move by `shift`."""

    def make(forge: Forge) -> None:
        changed = change((forge.root / path).read_bytes())
        (forge.root / path).write_bytes(changed)
        for array in forge.file(path)["arrays"].values():
            array["offset"] += shift
        forge.refit(path)
        forge.save()

    case(f"h5/{name}", gate="verify")(make)


def _patched(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + new + data[at + len(new) :]


_bytes_case("trailing data, 4 KiB", lambda data: data + b"x" * 4096)
_bytes_case("trailing data, one byte", lambda data: data + b"x")
_bytes_case("user block", lambda data: b"#!/bin/sh\n".ljust(4096, b"\0") + data, shift=4096)
_bytes_case("no signature", _patched(0, b"not HDF5"))
_bytes_case("superblock of version 0", _patched(8, b"\0"))
_bytes_case("superblock says it is being written", _patched(11, b"\5"))
_bytes_case("superblock ends the file elsewhere", _patched(28, (2**40).to_bytes(8, "little")))
_bytes_case("root group outside the file", _patched(36, (2**62).to_bytes(8, "little")))
_bytes_case("root group header is the superblock", _patched(36, bytes(8)))
_bytes_case("zeros instead of HDF5 headers", lambda data: bytes(4096) + data[4096:])


@case("h5/written by an older library", gate="verify")
def written_by_an_older_library(forge: Forge) -> None:
    """Everything in place, but in the oldest form of the format."""
    honest = {name: forge.read(PLAIN, name) for name in forge.file(PLAIN)["arrays"]}
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, 4096)
    handle = h5py.h5f.create(os.fsencode(forge.root / PLAIN), h5py.h5f.ACC_TRUNC, fapl=access)
    with h5py.File(handle) as file:
        file.attrs.create("softcache_format", forge.entry["format"], dtype="<u4")
        file.attrs.create("softcache_kind", np.bytes_("member"))
        for name, values in honest.items():
            made = file.create_dataset(name, data=values, track_times=False)
            forge.array(PLAIN, name)["offset"] = int(made.id.get_offset())
    forge.refit(PLAIN)
    forge.save()


def _shape_case(name: str, shape: tuple[int, ...], *, last_only: bool) -> None:
    def make(forge: Forge) -> None:
        old, new = (b"".join(n.to_bytes(8, "little") for n in numbers) for numbers in (PLACE, shape))
        patch_header(forge, "logits", old, new, last_only=last_only)
        forge.refit(PLAIN)
        forge.save()

    case(f"h5/{name}", gate="verify")(make)


_shape_case("another shape of the same bytes in the same place", (4, 128, 6), last_only=False)
_shape_case("a largest shape that is larger", (2, 256, 2**40), last_only=True)


@case("h5/a B-tree of names with more records than its node", gate="verify")
def a_b_tree_of_names_with_more_records_than_its_node(forge: Forge) -> None:
    """Found by a mutant: HDF5 2.0 reads past its memory (signal 11) where the header of a B-tree says too many."""
    data = bytearray((forge.root / SAMPLES).read_bytes())
    tree = data.index(b"BTHD")
    data[tree + 26 : tree + 28] = (42).to_bytes(2, "little")  # records of the root node
    data[tree + 34 : tree + 38] = lookup3(bytes(data[tree : tree + 34])).to_bytes(4, "little")
    (forge.root / SAMPLES).write_bytes(data)
    forge.refit(SAMPLES)
    forge.save()

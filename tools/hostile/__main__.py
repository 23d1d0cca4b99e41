"""Hostile caches, made from one small honest one: every case has sizes, hashes, checksums and ids recomputed to fit.

So only the rules can refuse it: the strict manifest, the gate, the way files are opened, what the reader checks of samples and
records, and, for HDF5 features that no reader ever looks at, the structural check of `verify --full`.

python tools/hostile                   every case: refused by what, where, in what time; exit 1 if one is accepted
python tools/hostile --only 'h5/*'     some of them
python tools/hostile --keep FOLDER     leave the caches there
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

import softcache
from softcache.cache.checksums import CheckBlocks
from softcache.cache.plan import FeatureInfo, MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.reader import CacheReader
from softcache.cache.samples import build_table
from softcache.cache.schema import BLOCK_BYTES, ArraySpec, Layout, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.shard import write_shard
from softcache.cache.write.writer import CacheWriter, Setup
from softcache.check import verify
from softcache.errors import SoftcacheError

ROWS, VIEWS, CLASSES = 300, 2, ("ant", "bee", "cat", "dog", "eel", "fox")
SAMPLES, PROBE = "samples.h5", "probe.h5"
CODED, DENSE, CONSTANTS = "members/coded/part-00000.h5", "members/coded/dense-00000.h5", "members/coded/constants.h5"
PLAIN, HEAD, PIXELS = "members/plain/part-00000.h5", "members/head/part-00000.h5", "views/part-00000.h5"
CODES = 4  # bytes of codes in a record of the member `coded`
CODED_BYTES, HEAD_BYTES = 8 + CODES, 21


# ---------------------------------------------------------------------------------------------------- the honest cache


def make_honest(path: Path) -> None:
    """600 records of three members: `coded` has records, dense rows and constants, `plain` a feature, `head` packed ids."""
    draw = np.random.default_rng(4)
    layout = Layout(num_rows=ROWS, num_views=VIEWS, shard_rows=256, shard_views=VIEWS)
    with CacheWriter(path, _plan(layout), lambda: _setup(draw)) as writer:
        for span in writer.my_spans():
            count = span.rows * span.views
            with writer.span(span, _data_sets(span)) as out:
                out.append(None, {"pixel_digests": draw.integers(0, 2**32, count, dtype="<u4")})
                out.append_dense("coded", draw.normal(size=(3, len(CLASSES))).astype("<f2"))
                for name, arrays in _records(draw, count).items():
                    out.append(name, arrays, MemberStatistics(records=count))
        assert writer.commit(lambda manifest: f"# {manifest.id}\n", {}) is not None


def _plan(layout: Layout) -> Plan:
    promise = {"max_kl": "0.0001", "at_temperature": "4.0"}
    coded = _fields([("level", "<f4", ()), ("dense", "<u4", ()), ("codes", "|u1", (CODES,))])
    head = _fields([("largest", "<f4", ()), ("lowest", "<f4", ()), ("step", "<f4", ()), ("below", "<f2", (1,))])
    head += _fields([("ids", "|u1", (1,)), ("codes", "|u1", (6,))], start=14)
    made_with = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    return Plan(
        samples=SampleInfo("toy", ROWS, "", "item", True, False, "natural", "0"),
        class_names=CLASSES,
        views=ViewInfo(VIEWS, 0, "0", "derived", ({"name": "shift", "version": 1, "parameters": {"pixels": "1"}},)),
        members=(
            _member("coded", "lowrank", promise, coded, promise=promise),
            _member(
                "plain", "float16", {}, [], features=[("trunk:pool", "pool", ["feature0"], "float16", [[4, 2, 2]])]
            ),
            _member("head", "headtail", {"k": "2", "bits": "8"}, head, class_order=(1, 0, 2, 3, 4, 5)),
        ),
        rounds=(
            Round(
                layout,
                ("coded", "plain", "head"),
                True,
                {**made_with, "device": "cpu", "batch_size": 256, "threads": 1, "autocast": "none"},
            ),
        ),
    )


def _member(
    name: str,
    codec: str,
    parameters: Mapping[str, str],
    fields: Sequence[Mapping[str, Any]],
    *,
    features: Sequence[tuple[Any, ...]] = (),
    class_order: Sequence[int] | None = None,
    promise: Mapping[str, str] | None = None,
) -> MemberInfo:
    stored = {"name": codec, "parameters": parameters, "fields": fields}
    described = tuple(FeatureInfo(*feature) for feature in features)
    return MemberInfo(name, "toy", "0" * 64, "logits", "float32", class_order, stored, described, promise)


def _fields(parts: list[tuple[str, str, tuple[int, ...]]], *, start: int = 0) -> list[dict[str, Any]]:
    fields = []
    for name, dtype, shape in parts:
        fields.append({"name": name, "offset": start, "dtype": dtype, "shape": list(shape)})
        start += ArraySpec(name, dtype, shape).nbytes
    return fields


def _data_sets(span: Span) -> dict[str, list[ArraySpec]]:
    place = (span.views, span.rows)
    eps = ArraySpec("eps", "<f2", place)
    feature = [ArraySpec("feature0", "<f2", (*place, 4)), ArraySpec("feature0_error", "<f2", place)]
    return {
        "coded": [ArraySpec("records", "|u1", (*place, CODED_BYTES)), eps],
        "plain": [ArraySpec("logits", "<f2", (*place, len(CLASSES))), eps, *feature],
        "head": [ArraySpec("records", "|u1", (*place, HEAD_BYTES)), eps],
    }


def _records(draw: np.random.Generator, count: int) -> dict[str, dict[str, np.ndarray]]:
    def normal(*shape: int, dtype: str = "<f2") -> np.ndarray:
        return draw.normal(size=(count, *shape)).astype(dtype)

    dense = np.zeros(count, "<u4")
    dense[[0, 7, count - 1]] = [1, 2, 3]
    codes = draw.integers(0, 256, (count, CODES), dtype=np.uint8)
    scales = np.concatenate([normal(3, dtype="<f4").view("u1"), np.abs(normal(1)).view("u1")], axis=1)
    ids = np.full((count, 1), 2 | 5 << 3, "u1")  # two ids of three bits
    head = np.concatenate([scales, ids, draw.integers(0, 256, (count, 6), dtype=np.uint8)], axis=1)
    return {
        "coded": {"records": _side_by_side(normal(1, dtype="<f4"), dense[:, None], codes), "eps": np.abs(normal())},
        "plain": {
            "logits": normal(6),
            "eps": np.abs(normal()),
            "feature0": normal(4),
            "feature0_error": np.abs(normal()),
        },
        "head": {"records": head, "eps": np.abs(normal())},
    }


def _side_by_side(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(part).view("u1") for part in parts], axis=1)


def _setup(draw: np.random.Generator) -> Setup:
    keys = [f"toy/{i:04d}" for i in range(ROWS)]
    ids = np.array([int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") for k in keys], "<u8")
    labels, digests = draw.integers(-1, len(CLASSES), ROWS), draw.integers(0, 256, (ROWS, 16), dtype=np.uint8)
    samples = build_table(keys, ids, labels, digests, len(CLASSES), np.arange(ROWS), store_keys=True)
    probe = {
        "rows": np.array([3, 299], "<u8"),
        "views": np.array([0, 1], "<u4"),
        "shapes": np.array([[2, 2, 1], [2, 2, 1]], "<u4"),
        "pixels": draw.integers(0, 256, 8, dtype=np.uint8),
    }
    return Setup(samples, probe, {"coded": _constants(draw)})


def _constants(draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Of `lowrank`: eight coordinates of four bits."""
    return {
        "codec_mean": draw.normal(size=len(CLASSES)).astype("<f4"),
        "codec_basis": draw.normal(size=(len(CLASSES), 8)).astype("<f2"),
        "codec_step": np.full(8, 0.25, "<f4"),
        "codec_bits": np.array([CODES], np.uint8),
    }


# ------------------------------------------------------------------------------------------------------------ the forge


def dumps(value: Any) -> bytes:
    """The canonical form where there is one, and something close to it for what has none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


class Forge:
    """A cache whose manifest can be made to fit anything that was done to its files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entry: dict[str, Any] = json.loads((root / "manifest.json").read_bytes())

    def file(self, path: str) -> dict[str, Any]:
        return next(file for file in self.entry["files"] if file["path"] == path)

    def array(self, path: str, name: str) -> dict[str, Any]:
        return self.file(path)["arrays"][name]

    def write(self, path: str, name: str, values: np.ndarray, *, start: int = 0) -> None:
        """Put bytes into a data set."""
        with (self.root / path).open("r+b") as handle:
            handle.seek(self.array(path, name)["offset"] + start)
            handle.write(np.ascontiguousarray(values).tobytes())

    def read(self, path: str, name: str) -> np.ndarray:
        array = self.array(path, name)
        spec = ArraySpec(name, array["dtype"], tuple(array["shape"]))
        data = (self.root / path).read_bytes()[array["offset"] :][: spec.nbytes]
        return np.frombuffer(data, spec.dtype).reshape(spec.shape)

    def replace(self, path: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Another file in its place, honestly written."""
        old = self.file(path)
        kind, member = old["kind"], old.get("member")
        stored = write_shard(self.root / path, arrays, kind=kind, relative_path=path, member=member).to_json()
        old.update({name: stored[name] for name in ("bytes", "sha256", "arrays")})

    def refit(self, path: str) -> None:
        """Checksums, size and sha256 to fit a file's bytes, as far as the manifest's data sets lie inside it."""
        file, data = self.file(path), bytearray((self.root / path).read_bytes())
        for name, array in file["arrays"].items():
            sums = file["arrays"].get(f"{name}_crc32")
            if sums is None:
                continue
            start, nbytes = array["offset"], ArraySpec(name, array["dtype"], tuple(array["shape"])).nbytes
            values = [
                zlib.crc32(data[at : min(at + BLOCK_BYTES, start + nbytes)])
                for at in range(start, start + nbytes, BLOCK_BYTES)
            ]
            packed = np.array(values, "<u4").tobytes()
            if sums["offset"] >= 0 and sums["offset"] + len(packed) <= len(data) and start + nbytes <= len(data):
                data[sums["offset"] : sums["offset"] + len(packed)] = packed
        (self.root / path).write_bytes(data)
        file.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def save(self) -> None:
        self.publish(dumps(self.entry))

    def publish(self, data: bytes) -> None:
        """These bytes as the manifest, under their id as well."""
        for old in (self.root / "manifests").glob("*.json"):
            old.unlink()
        (self.root / "manifest.json").write_bytes(data)
        (self.root / "manifests" / f"{hashlib.sha256(data).hexdigest()}.json").write_bytes(data)


Gate = Literal["open", "verify"]


@dataclass(frozen=True)
class Case:
    """One way to be hostile.

    Attributes:
        name: kind/what.
        make: turns a copy of the honest cache into it; gives the bytes of further manifests, each a variant to be tried.
        gate: "open": opening or reading refuses it. "verify": `verify --full` does, nothing else has to look there.
        numbers: what reading gives where it is not refused: the "honest" numbers, or "other" ones, those that the manifest names.
    """

    name: str
    make: Callable[[Forge], Iterator[tuple[str, bytes]] | None]
    gate: Gate
    numbers: Literal["honest", "other"]


CASES: dict[str, Case] = {}
Make = Callable[[Forge], "Iterator[tuple[str, bytes]] | None"]


def case(name: str, *, gate: Gate = "open", numbers: Literal["honest", "other"] = "honest") -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        assert name not in CASES, name
        CASES[name] = Case(name, make, gate, numbers)
        return make

    return register


# ------------------------------------------------------------------------------------- HDF5 features that no cache has


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
def _(forge: Forge) -> None:
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


# --------------------------------------------------------------------------------- places that are not the data sets' own


@case("place/two data sets swapped", gate="verify", numbers="other")
def _(forge: Forge) -> None:
    one, other = forge.array(PLAIN, "eps"), forge.array(PLAIN, "feature0_error")
    one["offset"], other["offset"] = other["offset"], one["offset"]
    forge.refit(PLAIN)
    forge.save()


@case("place/over an HDF5 header", gate="verify", numbers="other")
def _(forge: Forge) -> None:
    forge.array(PIXELS, "pixel_digests")["offset"] = 4096  # the root group's
    forge.refit(PIXELS)
    forge.save()


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


def _patch_header(forge: Forge, name: str, old: bytes, new: bytes, *, last_only: bool = False) -> None:
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


@case("place/over an HDF5 header, and HDF5 says so too", gate="verify", numbers="other")
def _(forge: Forge) -> None:
    data, array = (forge.root / PLAIN).read_bytes(), forge.array(PLAIN, "eps")
    place = data.rfind(b"OHDR", 0, forge.array(PLAIN, "logits")["offset"])  # the header of `logits`
    _patch_header(forge, "eps", array["offset"].to_bytes(8, "little"), place.to_bytes(8, "little"))
    array["offset"] = place
    forge.refit(PLAIN)
    forge.save()


def _shape_case(name: str, shape: tuple[int, ...], *, last_only: bool) -> None:
    def make(forge: Forge) -> None:
        old, new = (b"".join(n.to_bytes(8, "little") for n in numbers) for numbers in (PLACE, shape))
        _patch_header(forge, "logits", old, new, last_only=last_only)
        forge.refit(PLAIN)
        forge.save()

    case(f"h5/{name}", gate="verify")(make)


_shape_case("another shape of the same bytes in the same place", (4, 128, 6), last_only=False)
_shape_case("a largest shape that is larger", (2, 256, 2**40), last_only=True)


@case("h5/a B-tree of names with more records than its node", gate="verify")
def _(forge: Forge) -> None:
    """Found by a mutant: HDF5 2.0 reads past its memory (signal 11) where the header of a B-tree says too many."""
    data = bytearray((forge.root / SAMPLES).read_bytes())
    tree = data.index(b"BTHD")
    data[tree + 26 : tree + 28] = (42).to_bytes(2, "little")  # records of the root node
    data[tree + 34 : tree + 38] = lookup3(bytes(data[tree : tree + 34])).to_bytes(4, "little")
    (forge.root / SAMPLES).write_bytes(data)
    forge.refit(SAMPLES)
    forge.save()


def _place_case(name: str, path: str, data_set: str, **changes: Any) -> None:
    def make(forge: Forge) -> None:
        forge.array(path, data_set).update(changes)
        offset = changes.get("offset", 0)
        if "dtype" not in changes and isinstance(offset, int) and offset >= 0 and "shape" not in changes:
            forge.refit(path)  # else there is nothing that could be made to fit
        forge.save()

    case(f"place/{name}", gate="open")(make)


_place_case("offset into the superblock", PIXELS, "pixel_digests", offset=0)
_place_case("offset not aligned", PIXELS, "pixel_digests", offset=8200)
_place_case("negative offset", PIXELS, "pixel_digests", offset=-4096)
_place_case("offset at the end of the file", PIXELS, "pixel_digests", offset=2**20)
_place_case("offset beyond 2^53", PIXELS, "pixel_digests", offset=2**53)
_place_case("offset beyond 2^64", PIXELS, "pixel_digests", offset=2**64)
_place_case("offset of a fraction", PIXELS, "pixel_digests", offset=8192.0)
_place_case("offset true", PIXELS, "pixel_digests", offset=True)
_place_case("shape of 2 PiB", PIXELS, "pixel_digests", shape=[2, 2**48])
_place_case("shape whose bytes overflow", PIXELS, "pixel_digests", shape=[2**40, 2**40])
_place_case("negative axes", PIXELS, "pixel_digests", shape=[-2, -256])
_place_case("no axes", PIXELS, "pixel_digests", shape=[])
_place_case("axes of nothing", PIXELS, "pixel_digests", shape=[2, 0], offset=0)
_place_case("a thousand axes", PIXELS, "pixel_digests", shape=[2, 256, *[1] * 1000])
_place_case("dtype object", PIXELS, "pixel_digests", dtype="|O")
_place_case("dtype big-endian", PIXELS, "pixel_digests", dtype=">u4")
_place_case("dtype structured", PIXELS, "pixel_digests", dtype="<u2,<u2")
_place_case("dtype of no known name", PIXELS, "pixel_digests", dtype="fast")
_place_case("dtype double", PIXELS, "pixel_digests", dtype="<f8", shape=[2, 128])


@case("place/two entries for the same bytes")
def _(forge: Forge) -> None:
    forge.array(PLAIN, "feature0_error")["offset"] = forge.array(PLAIN, "eps")["offset"]
    forge.refit(PLAIN)
    forge.save()


@case("place/data sets overlap")
def _(forge: Forge) -> None:
    forge.array(PLAIN, "eps")["offset"] = forge.array(PLAIN, "logits")["offset"] + 4096
    forge.refit(PLAIN)
    forge.save()


@case("place/checksums over their data")
def _(forge: Forge) -> None:
    forge.array(PLAIN, "eps_crc32")["offset"] = forge.array(PLAIN, "eps")["offset"]
    forge.save()


@case("place/data sets of no file: many files of one TiB each")
def _(forge: Forge) -> None:
    """Files with holes: a TiB that takes no space, of which the data sets use a few kB."""
    with (forge.root / PLAIN).open("r+b") as handle:
        handle.truncate(2**40)
    forge.file(PLAIN)["bytes"] = 2**40
    forge.save()


# ------------------------------------------------------------------------------------------------- files that are not files


def _moved_and_linked(forge: Forge, path: str) -> None:
    aside = forge.root.with_name(forge.root.name + "-aside")
    aside.mkdir()
    shutil.move(forge.root / path, aside / "it")
    (forge.root / path).symlink_to(aside / "it")


@case("file/a symbolic link")
def _(forge: Forge) -> None:
    _moved_and_linked(forge, PLAIN)


@case("file/a symbolic link within the cache")
def _(forge: Forge) -> None:
    shutil.move(forge.root / PLAIN, forge.root / "members/plain/other.h5")
    (forge.root / PLAIN).symlink_to("other.h5")


@case("file/a folder that is a symbolic link")
def _(forge: Forge) -> None:
    _moved_and_linked(forge, "members/plain")


@case("file/the folder of all members is a symbolic link")
def _(forge: Forge) -> None:
    _moved_and_linked(forge, "members")


@case("file/samples.h5 is a symbolic link")
def _(forge: Forge) -> None:
    _moved_and_linked(forge, SAMPLES)


@case("file/a symbolic link to itself")
def _(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    (forge.root / PLAIN).symlink_to(Path(PLAIN).name)


@case("file/the manifest is a symbolic link")
def _(forge: Forge) -> None:
    _moved_and_linked(forge, "manifest.json")


@case("file/the folder of manifests is a symbolic link", gate="verify")
def _(forge: Forge) -> None:
    _moved_and_linked(forge, "manifests")


@case("file/the manifest's copy is a symbolic link", gate="verify")
def _(forge: Forge) -> None:
    (copy,) = (forge.root / "manifests").iterdir()
    _moved_and_linked(forge, f"manifests/{copy.name}")


@case("file/a pipe")
def _(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    os.mkfifo(forge.root / PLAIN)


@case("file/the manifest is a pipe")
def _(forge: Forge) -> None:
    (forge.root / "manifest.json").unlink()
    os.mkfifo(forge.root / "manifest.json")


@case("file/a socket")
def _(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    here = os.getcwd()
    os.chdir((forge.root / PLAIN).parent)  # a socket's path may have 107 bytes at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(Path(PLAIN).name)
    os.chdir(here)


@case("file/a directory")
def _(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    (forge.root / PLAIN).mkdir()


@case("file/the manifest is a directory")
def _(forge: Forge) -> None:
    (forge.root / "manifest.json").unlink()
    (forge.root / "manifest.json").mkdir()


@case("file/a folder that is a file")
def _(forge: Forge) -> None:
    shutil.rmtree(forge.root / "members/plain")
    (forge.root / "members/plain").write_bytes(b"")


@case("file/missing")
def _(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()


@case("file/empty, and the manifest says so")
def _(forge: Forge) -> None:
    (forge.root / PLAIN).write_bytes(b"")
    forge.refit(PLAIN)
    forge.save()


@case("file/no copy of the manifest")
def _(forge: Forge) -> None:
    for copy in (forge.root / "manifests").iterdir():
        copy.unlink()


@case("file/the copy of the manifest has other bytes", gate="verify")
def _(forge: Forge) -> None:
    (copy,) = (forge.root / "manifests").iterdir()
    copy.write_bytes(copy.read_bytes() + b" ")


# ------------------------------------------------------------------------------------------- names that are not our names

BAD_PATHS = [
    "../x.h5",
    "../../etc/passwd",
    "/etc/passwd",
    "//etc/passwd",
    "members/../../x.h5",
    "members/plain/../plain/part-00000.h5",
    "./members/plain/part-00000.h5",
    "members//plain/part-00000.h5",
    "members/plain/part-00000.h5/",
    "members\\plain\\part-00000.h5",
    "file:///etc/passwd",
    "C:\\windows",
    "~/x.h5",
    "members/Plain/part-00000.h5",
    "MEMBERS/plain/part-00000.h5",
    "members/plain/part-00000.H5",
    "members/plain/part-00000.h5\0",
    "members/plain/part-00000.h5\0.txt",
    "members/plain/part-00000.h5\n",
    "members/plain/part-00000.h5 ",
    "members/plain/part-00000.h5.",
    " members/plain/part-00000.h5",
    "members/plain\u200b/part-00000.h5",
    "members/p\u2113ain/part-00000.h5",
    "members/\uff50lain/part-00000.h5",
    "members/pl\u0430in/part-00000.h5",
    "members/plain/part-0000\u0660.h5",
    "members/plain/part-000000.h5",
    "members/plain/part-0.h5",
    "members/plain/part-00007.h5",
    "members/plain/part-00000.h5:stream",
    "members/other/part-00000.h5",
    "manifest.json",
    "README.md",
    "CON",
    "",
    ".",
    "a" * 5000,
]


@case("name/paths of files")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for bad in BAD_PATHS:
        forge.file(PLAIN)["path"] = bad
        yield repr(bad[:40]), dumps(forge.entry)
        forge.file(bad)["path"] = PLAIN


BAD_MEMBERS = [
    "",
    ".",
    "..",
    "../plain",
    "Plain",
    "PLAIN",
    "plain ",
    " plain",
    "plain.",
    "plain\n",
    "plain\0",
    "-plain",
]
BAD_MEMBERS += [
    "pl\u0430in",
    "\uff50lain",
    "plain\u200b",
    "p" * 65,
    "a/b",
    "a\\b",
    "_plain",
    "pl.ain",
    "\u0131",
    "\ud83d",
]


@case("name/members")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    text = dumps(forge.entry).decode()
    for bad in BAD_MEMBERS:
        quoted = json.dumps(bad, ensure_ascii=False)
        renamed = text.replace('"plain"', quoted).replace("members/plain/", f"members/{quoted[1:-1]}/")
        yield repr(bad[:40]), renamed.encode("utf-8", "surrogatepass")


@case("name/data sets")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    text = dumps(forge.entry).decode()
    for bad in [
        "Logits",
        "logits ",
        "../logits",
        "/logits",
        "a/b",
        "logits\0",
        "",
        "log\u0456ts",
        "l" * 65,
        "logits.x",
        "1x",
    ]:
        quoted = json.dumps(bad, ensure_ascii=False)[1:-1]
        yield (
            repr(bad[:40]),
            text.replace('"logits"', f'"{quoted}"').replace('"logits_crc32"', f'"{quoted}_crc32"').encode(),
        )


@case("name/twice")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    entry = forge.entry
    for what, change in {
        "a class": lambda e: e["class_names"].__setitem__(1, e["class_names"][0]),
        "a member": lambda e: e["members"].append(e["members"][0]),
        "a member under one name": lambda e: e["members"][1].update(name="coded"),
        "a member of a round": lambda e: e["rounds"][0]["members"].append("plain"),
        "a file": lambda e: e["files"].append(e["files"][-1]),
        "a file in the middle": lambda e: e["files"].insert(3, e["files"][3]),
        "samples": lambda e: e["files"].insert(0, e["files"][0]),
        "a round": lambda e: e["rounds"].append(e["rounds"][0]),
        "a feature": lambda e: e["members"][1]["features"].append(e["members"][1]["features"][0]),
    }.items():
        changed = json.loads(dumps(entry))
        change(changed)
        yield what, dumps(changed)


# --------------------------------------------------------------------------------------------- JSON that no writer writes


@case("json/form")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    data = dumps(forge.entry)
    text = data.decode()
    number = f'"count":{ROWS}'
    assert number in text
    for what, changed in {
        "empty": b"",
        "null": b"null",
        "a list": b"[]",
        "a string": b'"manifest"',
        "an empty object": b"{}",
        "only the format": dumps({"format": forge.entry["format"]}),
        "cut off": data[:-1],
        "half of it": data[: len(data) // 2],
        "something behind it": data + b"{}",
        "a line break behind it": data + b"\n",
        "a NUL behind it": data + b"\0",
        "spaces": data.replace(b":", b": ", 5),
        "a byte order mark": b"\xef\xbb\xbf" + data,
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32-le"),
        "not UTF-8": data.replace(b'"ant"', b'"\xff\xfe"'),
        "over-long UTF-8": data.replace(b'"ant"', b'"\xc0\xaf"'),
        "a lone surrogate, escaped": data.replace(b'"ant"', b'"\\ud800"'),
        "a lone surrogate, as bytes": data.replace(b'"ant"', b'"\xed\xa0\x80"'),
        "another escape of a letter": data.replace(b'"ant"', b'"\\u0061nt"'),
        "an escaped slash": data.replace(b"members/plain", b"members\\/plain"),
        "keys not sorted": data[:-1] + b',"aaa":1}',
        "a key twice, the same": data.replace(b'"format":1', b'"format":1,"format":1'),
        "a key twice, another value": data.replace(b'"format":1', b'"format":7,"format":1'),
        "a key twice, in a file": data.replace(b'"kind":"samples"', b'"kind":"samples","kind":"probe"'),
        "NaN": text.replace(number, '"count":NaN').encode(),
        "Infinity": text.replace(number, '"count":Infinity').encode(),
        "-Infinity": text.replace(number, '"count":-Infinity').encode(),
        "1e999": text.replace(number, '"count":1e999').encode(),
        "-0": text.replace(number, '"count":-0').encode(),
        "-0 as an offset": data.replace(b'"offset":0', b'"offset":-0'),
        "300.0": text.replace(number, '"count":300.0').encode(),
        "3e2": text.replace(number, '"count":3e2').encode(),
        "a leading zero": text.replace(number, '"count":0300').encode(),
        "a plus sign": text.replace(number, '"count":+300').encode(),
        "hexadecimal": text.replace(number, '"count":0x12c').encode(),
        "2^53": text.replace(number, f'"count":{2**53}').encode(),
        "2^63": text.replace(number, f'"count":{2**63}').encode(),
        "2^64": text.replace(number, f'"count":{2**64}').encode(),
        "-2^63": text.replace(number, f'"count":{-(2**63)}').encode(),
        "a number of a million digits": text.replace(number, '"count":' + "9" * 10**6).encode(),
        "a number of a hundred digits": text.replace(number, '"count":' + "9" * 100).encode(),
        "a decimal of a million digits": data.replace(b'"order_seed":"0"', b'"order_seed":"' + b"9" * 10**6 + b'"'),
        "a seed in Arabic digits": text.replace('"order_seed":"0"', '"order_seed":"\u0663"').encode(),
        "a hundred thousand arrays": b"[" * 100_000 + b"]" * 100_000,
        "a hundred thousand objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a hundred thousand arrays, open": b"[" * 100_000,
        "depth in a field": data.replace(b'"class_order":null', b'"class_order":' + b"[" * 50_000 + b"]" * 50_000),
        "depth of 500 in a field": data.replace(b'"class_order":null', b'"class_order":' + b"[" * 500 + b"]" * 500),
        "a string of ten million bytes": data.replace(b'"toy"', b'"' + b"x" * 10**7 + b'"'),
        "an array of 200,000": data.replace(b'"class_order":null', b'"class_order":[' + b"1," * 200_000 + b"1]"),
        "a later format": data.replace(b'"format":1', b'"format":2'),
        "an earlier format": data.replace(b'"format":1', b'"format":0'),
        "format true": data.replace(b'"format":1', b'"format":true'),
        "format 1.0": data.replace(b'"format":1', b'"format":1.0'),
        "format a string": data.replace(b'"format":1', b'"format":"1"'),
        "format a huge number": data.replace(b'"format":1', b'"format":9007199254740991'),
        "pickle": b"\x80\x04\x95",
        "XML": b"<manifest/>",
    }.items():
        assert changed != data, what
        yield what, changed


def _walk(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(place, value) of everything in a JSON value; of an array's elements the first only."""
    if at:
        yield at, value
    if isinstance(value, dict):
        for key in value:
            yield from _walk(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from _walk(value[0], (*at, 0))


def _changed_at(entry: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    copy = json.loads(dumps(entry))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    change(inner, at[-1])
    return dumps(copy)


# where keys are free, one of them more or less is another description, not a broken one
FREE = {"kl", "feature_errors", "parameters", "statistics"}


@case("json/a field is missing")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for at, _value in _walk(forge.entry):
        if isinstance(at[-1], str) and not (len(at) > 1 and at[-2] in FREE - {"statistics"}):
            yield ".".join(map(str, at)), _changed_at(forge.entry, at, lambda inner, key: inner.pop(key))


@case("json/a field too many")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for at, value in _walk({"top": forge.entry}):
        if isinstance(value, dict) and at[-1] not in FREE - {"statistics"}:
            changed = _changed_at({"top": forge.entry}, at, lambda inner, key: inner[key].update(zzz=1))
            yield ".".join(map(str, at)), dumps(json.loads(changed)["top"])


NULLABLE = {"license", "parent", "class_order", "promise"}
WRONG: list[Any] = [None, True, 1, -1, 2**53, 2**70, 1.5, "x\0", [], {}, [None], {"": {}}, [[]]]


def _same_kind(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return value is None and isinstance(other, str)  # a licence may be any string
    return isinstance(value, str | list | dict) or (isinstance(value, int) and 0 <= other < 2**53)


@case("json/a value of the wrong type")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for at, value in _walk(forge.entry):
        for wrong in WRONG:
            if not _same_kind(value, wrong) and not (wrong is None and at[-1] in NULLABLE):
                entry = json.loads(dumps(forge.entry))
                _set(*at, to=wrong)(entry)
                yield f"{'.'.join(map(str, at))} = {wrong!r}", dumps(entry)


@case("json/a hash of another form")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    honest = forge.file(PLAIN)["sha256"]
    for bad in [
        "",
        honest[:-1],
        honest + "0",
        honest.upper(),
        "0x" + honest[2:],
        honest[:-1] + "g",
        honest[:-1] + "\n",
        " " + honest,
    ]:
        forge.file(PLAIN)["sha256"] = bad
        yield repr(bad), dumps(forge.entry)


# ------------------------------------------------------------------------------ descriptions that do not describe one cache


def _set(*at: Any, to: Any) -> Callable[[Any], None]:
    def change(entry: Any) -> None:
        for key in at[:-1]:
            entry = entry[key]
        entry[at[-1]] = to

    return change


LAYOUT = ("rounds", 0, "layout")
SECOND_ROUND = {"num_rows": ROWS, "num_views": 2, "shard_rows": 256, "shard_views": 2, "first_view": 1, "first_part": 2}


def _second_round(**layout: int) -> Callable[[Any], None]:
    def change(entry: Any) -> None:
        entry["rounds"].append({**entry["rounds"][0], "layout": {**SECOND_ROUND, **layout}})

    return change


DESCRIPTIONS: dict[str, Callable[[Any], Any]] = {
    "2^50 rows": _set(*LAYOUT, "num_rows", to=2**50),
    "2^50 rows, and as many samples": lambda e: (
        _set(*LAYOUT, "num_rows", to=2**50)(e),
        _set("samples", "count", to=2**50)(e),
    ),
    "2^52 rows and views": lambda e: (
        e["rounds"][0]["layout"].update(num_rows=2**52, num_views=2**52, shard_views=1),
        _set("samples", "count", to=2**52)(e),
        _set("views", "count", to=2**52)(e),
    ),
    "no rows": _set(*LAYOUT, "num_rows", to=0),
    "no samples at all": lambda e: (_set(*LAYOUT, "num_rows", to=0)(e), _set("samples", "count", to=0)(e)),
    "one row less": lambda e: (_set(*LAYOUT, "num_rows", to=ROWS - 1)(e), _set("samples", "count", to=ROWS - 1)(e)),
    "one row more": lambda e: (_set(*LAYOUT, "num_rows", to=ROWS + 1)(e), _set("samples", "count", to=ROWS + 1)(e)),
    "shard_rows 0": _set(*LAYOUT, "shard_rows", to=0),
    "shard_rows negative": _set(*LAYOUT, "shard_rows", to=-256),
    "shard_rows 1": _set(*LAYOUT, "shard_rows", to=1),
    "shard_rows 2^52": _set(*LAYOUT, "shard_rows", to=2**52),
    "shard_rows 512": _set(*LAYOUT, "shard_rows", to=512),
    "shard_views 0": _set(*LAYOUT, "shard_views", to=0),
    "shard_views 1": _set(*LAYOUT, "shard_views", to=1),
    "no views": _set(*LAYOUT, "num_views", to=0),
    "views.count 3": _set("views", "count", to=3),
    "views.count 1": _set("views", "count", to=1),
    "views.count 0": _set("views", "count", to=0),
    "first view 1": _set(*LAYOUT, "first_view", to=1),
    "first view 2^52": _set(*LAYOUT, "first_view", to=2**52),
    "first part 1": _set(*LAYOUT, "first_part", to=1),
    "rounds overlap": _second_round(first_view=1),
    "rounds leave a gap": _second_round(first_view=3),
    "a round of views that are there": _second_round(first_view=0),
    "a round without files": _second_round(first_view=2),
    "a round whose parts are another's": _second_round(first_view=2, first_part=0),
    "no rounds": _set("rounds", to=[]),
    "no members": _set("members", to=[]),
    "no files": _set("files", to=[]),
    "no classes": _set("class_names", to=[]),
    "a class less": lambda e: e["class_names"].pop(),
    "a class more": lambda e: e["class_names"].append("gnu"),
    "a member that no round wrote": _set("rounds", 0, "members", to=["coded", "plain"]),
    "a round of no member": _set("rounds", 0, "members", to=[]),
    "a round of an unknown member": _set("rounds", 0, "members", to=["coded", "plain", "head", "more"]),
    "members of a round in another order": _set("rounds", 0, "members", to=["plain", "coded", "head"]),
    "no new views": _set("rounds", 0, "new_views", to=False),
    "another kind of file": lambda e: e["files"][0].update(kind="member"),
    "an unknown kind of file": lambda e: e["files"][0].update(kind="script"),
    "a file of another member": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(member="coded"),
    "rows of another part": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(rows=[0, 44]),
    "rows backwards": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(rows=[256, 0]),
    "views of another part": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(views=[0, 1]),
    "files in another order": lambda e: e["files"].reverse(),
    "a file less": lambda e: e["files"].pop(),
    "no samples": lambda e: e["files"].pop(0),
    "a member's part less": lambda e: e["files"].remove(next(f for f in e["files"] if f["path"] == PLAIN)),
    "a size of 0": lambda e: e["files"][0].update(bytes=0),
    "a size of one less": lambda e: e["files"][0].update(bytes=e["files"][0]["bytes"] - 1),
    "a size of 2^52": lambda e: e["files"][0].update(bytes=2**52),
    "statistics of samples": lambda e: e["files"][0].update(statistics=e["files"][-1]["statistics"]),
    "statistics of more records": lambda e: e["files"][-1]["statistics"].update(records=10**9),
    "more right than there are": lambda e: e["files"][-1]["statistics"].update(correct=1),
    "class_order no permutation": _set("members", 2, "class_order", to=[0, 0, 1, 2, 3, 4]),
    "class_order of 2^52": _set("members", 2, "class_order", to=[0, 1, 2, 3, 4, 2**52]),
    "an unknown codec": _set("members", 0, "codec", "name", to="zip"),
    "an unknown parameter of a codec": _set(
        "members", 2, "codec", "parameters", to={"k": "2", "bits": "8", "eval": "1"}
    ),
    "a parameter of a codec missing": _set("members", 2, "codec", "parameters", to={"k": "2"}),
    "k of -1": _set("members", 2, "codec", "parameters", to={"k": "-1", "bits": "8"}),
    "k of 2^70": _set("members", 2, "codec", "parameters", to={"k": str(2**70), "bits": "8"}),
    "bits of 64": _set("members", 2, "codec", "parameters", to={"k": "2", "bits": "64"}),
    "a codec of another layout": _set("members", 2, "codec", "name", to="int8"),
    "a codec without records": _set("members", 2, "codec", to={"name": "float32", "parameters": {}, "fields": []}),
    "float32 for float16": _set("members", 1, "codec", "name", to="float32"),
    "a field past the record": _set("members", 0, "codec", "fields", 2, "offset", to=2**40),
    "a field over another": _set("members", 0, "codec", "fields", 2, "offset", to=0),
    "a field of 2^52 numbers": _set("members", 0, "codec", "fields", 2, "shape", to=[2**52]),
    "a field of objects": _set("members", 0, "codec", "fields", 2, "dtype", to="|O"),
    "a feature of another shape": _set("members", 1, "features", 0, "shapes", to=[[5, 2, 2]]),
    "a feature of 2^52 numbers": _set("members", 1, "features", 0, "shapes", to=[[2**52, 2**52, 2**52]]),
    "a feature without shapes": _set("members", 1, "features", 0, "shapes", to=[]),
    "a feature of an unknown reduction": _set("members", 1, "features", 0, "name", to="trunk:eval"),
    "a feature stored in an unknown form": _set("members", 1, "features", 0, "stored", to="pickle"),
    "a feature of an unknown dtype": _set("members", 1, "features", 0, "dtype", to="object"),
    "a feature as int8": _set("members", 1, "features", 0, "dtype", to="int8"),
    "a feature that is the logits": _set("members", 1, "features", 0, "arrays", to=["logits"]),
    "a feature that is checksums": _set("members", 1, "features", 0, "arrays", to=["feature0_crc32"]),
    "a feature that is not there": _set("members", 1, "features", 0, "arrays", to=["feature1"]),
    "a feature of no data set": _set("members", 1, "features", 0, "arrays", to=[]),
    "an unknown output": _set("members", 0, "output", to="votes"),
    "an unknown order": _set("samples", "order", to="random"),
    "an unknown kind of digest": _set("samples", "digest_kind", to="crc"),
    "an unknown kind of replay": _set("views", "replay", to="exec"),
    "multi_label": _set("samples", "multi_label", to=True),
    "without keys": _set("samples", "has_keys", to=False),
    "statistics of an unknown member's parent": _set("parent", to={"id": "0" * 64, "statistics": {"more": {}}}),
    "a parent without a hash": _set("parent", to={"id": "../x", "statistics": {}}),
}


@case("description/does not hold together")
def _(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for what, change in DESCRIPTIONS.items():
        entry = json.loads(dumps(forge.entry))
        change(entry)
        assert entry != forge.entry, what
        yield what, dumps(entry)


@case("description/another hash", gate="verify")
def _(forge: Forge) -> None:
    forge.file(SAMPLES)["sha256"] = "0" * 64
    forge.save()


@case("description/a fingerprint of other samples", gate="verify")
def _(forge: Forge) -> None:
    forge.entry["samples"]["fingerprint"] = "0" * 64
    forge.save()


# ------------------------------------------------------------------------------- numbers that no dump writes, honestly stored


def _values_case(name: str, path: str, change: Callable[[dict[str, np.ndarray]], Any], *, gate: Gate = "open") -> None:
    """A file written by the real writer, with other arrays; the manifest's plan stays."""

    def make(forge: Forge) -> None:
        arrays = {n: forge.read(path, n).copy() for n in forge.file(path)["arrays"] if not n.endswith("_crc32")}
        change(arrays)
        place = {name: value for name, value in forge.file(path).items() if name in ("rows", "views", "statistics")}
        forge.replace(path, arrays)
        forge.file(path).update(place)
        forge.save()

    case(f"values/{name}", gate=gate, numbers="other")(make)


def _put(name: str, at: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


def _now(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: make(arrays[name])})


_values_case("label beyond the classes", SAMPLES, _put("labels", 5, 6))
_values_case("label below -1", SAMPLES, _put("labels", 5, -2))
_values_case("label of 2^31 - 1", SAMPLES, _put("labels", 5, 2**31 - 1))
_values_case("key offsets not ascending", SAMPLES, _put("key_offsets", 5, 2**40))
_values_case("key offsets end early", SAMPLES, _put("key_offsets", -1, 3))
_values_case("key offsets begin late", SAMPLES, _put("key_offsets", 0, 3))
_values_case("a sample id twice", SAMPLES, lambda a: a["ids"].__setitem__(1, a["ids"][0]), gate="verify")
_values_case("ids of other samples", SAMPLES, lambda a: a["ids"].__setitem__(slice(2), a["ids"][[1, 0]]), gate="verify")
_values_case("fewer samples", SAMPLES, lambda a: a.update({n: v[:299] for n, v in a.items() if n != "key_bytes"}))
_values_case("an extra data set of the samples", SAMPLES, lambda a: a.update(extra=np.zeros(3, "<f4")))
_values_case("no digests", SAMPLES, lambda a: a.pop("digests"))
_values_case("probe: shapes of more pixels", PROBE, _put("shapes", (0, 0), 2**31), gate="open")
_values_case("probe: a row beyond the samples", PROBE, _put("rows", 0, ROWS), gate="open")
_values_case("probe: a view beyond the views", PROBE, _put("views", 0, VIEWS), gate="open")
_values_case("constants: none of the basis", CONSTANTS, lambda a: a.pop("codec_basis"))
_values_case("constants: one more", CONSTANTS, lambda a: a.update(codec_more=np.zeros(3, "<f4")))
_values_case("constants: a mean of other classes", CONSTANTS, _now("codec_mean", lambda v: np.append(v, v)))
_values_case("constants: a basis of another shape", CONSTANTS, _now("codec_basis", lambda v: v[:, :7]))
_values_case("constants: a flat basis", CONSTANTS, _now("codec_basis", lambda v: v.reshape(-1)))
_values_case("constants: a basis of integers", CONSTANTS, _now("codec_basis", lambda v: v.astype("<u8")))
_values_case("constants: steps of another number", CONSTANTS, _now("codec_step", lambda v: v[:3]))
_values_case("constants: widths of 255 bits", CONSTANTS, _put("codec_bits", 0, 255))
_values_case("constants: no widths", CONSTANTS, _put("codec_bits", 0, 0))
_values_case("constants: widths of another group", CONSTANTS, _now("codec_bits", lambda v: np.array([2, 2], "u1")))
_values_case("constants: empty", CONSTANTS, _now("codec_mean", lambda v: v[:0]))
_values_case("constants: a head of no layer", CONSTANTS, lambda a: a.update(head_weight=np.zeros((2, 3, 4), "<f4")))
_values_case("records: a dense row that is not there", CODED, _put("records", (0, 0, slice(4, 8)), 255))
_values_case("records: a dense row past the last", CODED, _put("records", (0, 0, slice(4, 8)), [4, 0, 0, 0]))
_values_case("dense: fewer rows", DENSE, _now("logits", lambda v: v[:2]))
_values_case("dense: rows of other classes", DENSE, _now("logits", lambda v: v[:, :5]))
_values_case("records of another length", CODED, _now("records", lambda v: v[:, :, :-1]))
_values_case("logits of other classes", PLAIN, _now("logits", lambda v: v[:, :, :-1]))
_values_case("logits of another dtype", PLAIN, _now("logits", lambda v: v.astype("<f4")))
_values_case("eps of another dtype", PLAIN, _now("eps", lambda v: v.astype("<f4")))
_values_case("no eps", PLAIN, lambda a: a.pop("eps"))
_values_case("an extra data set of a part", PLAIN, lambda a: a.update(extra=a["eps"]))
_values_case("a feature of another shape", PLAIN, _now("feature0", lambda v: v[:, :, :2]))
_values_case("pixel digests of other views", PIXELS, _now("pixel_digests", lambda v: v[:1]))


@case("values/checksums of other bytes", numbers="other")
def _(forge: Forge) -> None:
    forge.write(PLAIN, "logits", np.ones(7, "<f2"))  # size and sha256 are made to fit, the checksums are not
    data = (forge.root / PLAIN).read_bytes()
    forge.file(PLAIN)["sha256"] = hashlib.sha256(data).hexdigest()
    forge.save()


# ------------------------------------------------------------------------------------------------------------- the judge


def read_stored(reader: CacheReader) -> dict[str, np.ndarray]:
    """Everything that is stored, through the reader: what each data set gives for every record."""
    plan = reader.manifest.plan
    samples = reader.samples
    views, rows = (part.reshape(-1) for part in np.mgrid[: plan.views.count, : plan.samples.count])
    found = {f"samples/{name}": value for name, value in samples.arrays().items()}
    found |= {f"probe/{name}": value for name, value in reader.probe().items()}
    for member in [None, *(m.name for m in plan.members)]:
        for name in ["pixel_digests"] if member is None else reader.array_kinds(member):
            found[f"{member}/{name}"] = reader.gather(member, name, rows, views)
        if member is not None:
            found |= {f"{member}/{name}": value for name, value in reader.constants(member).items()}
    return found


def read_decoded(cache: softcache.Cache) -> dict[str, np.ndarray]:
    """What a training loop is given: keys, labels, logits and features of every record, all at once."""
    views, rows = (part.reshape(-1) for part in np.mgrid[: cache.num_views, : len(cache)])
    features = sorted({name for of_member in cache.features.values() for name in of_member})
    targets = cache.gather(rows, views, features=features)
    found = {"labels": targets.labels.numpy(), "keys": np.array([cache.samples.key(row) for row in range(len(cache))])}
    for member in cache.members:
        found[f"{member}/logits"] = targets.logits(member).numpy()
        found |= {f"{member}/{name}": targets.feature(name, member).numpy() for name in cache.features[member]}
        cache.head(member)
    return found


def read_everything(path: Path, *, check_blocks: CheckBlocks = "first") -> dict[str, np.ndarray]:
    cache = softcache.open(path, check_blocks=check_blocks)
    return read_stored(cache.reader) | {f"decoded/{name}": value for name, value in read_decoded(cache).items()}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.tobytes() == other[name].tobytes()
        for name, value in one.items()
    )


@dataclass(frozen=True)
class Outcome:
    """What became of one hostile cache.

    Attributes:
        reading: the typed error of opening and reading, or "honest numbers" or "other numbers".
        verifying: the typed error or first fault of `verify --full`, or "whole".
        fault: why that is not good enough; "" where it is.
    """

    case: str
    reading: str
    verifying: str
    fault: str
    reading_s: float
    verifying_s: float


def judge(name: str, case: Case, root: Path, honest: Mapping[str, np.ndarray], *, verifying: bool = True) -> Outcome:
    started = time.monotonic()
    reading, refused = _reading(root, honest)
    between = time.monotonic()
    verified, found = _verifying(root) if verifying else ("not asked", True)
    stopped = time.monotonic()
    fault = ""
    if "CRASH" in reading or "CRASH" in verified:
        fault = "an error that is not ours"
    elif case.gate == "verify" and not found:
        fault = "verify --full calls it whole"
    elif not refused and (case.gate == "open" or (case.numbers == "honest" and reading != "honest numbers")):
        fault = "reading accepts it"
    return Outcome(name, reading, verified, fault, between - started, stopped - between)


def _reading(root: Path, honest: Mapping[str, np.ndarray]) -> tuple[str, bool]:
    """What happened, and whether it is a refusal."""
    try:
        return ("honest numbers" if same(read_everything(root), honest) else "other numbers"), False
    except SoftcacheError as exc:
        return f"{type(exc).__name__}: {_first_line(exc.message)}", True
    except Exception as exc:  # a crash: what this tool looks for
        return f"CRASH {type(exc).__name__}: {_first_line(str(exc))}", False


def _verifying(root: Path) -> tuple[str, bool]:
    try:
        verdict = verify.run(root, full=True, quiet=True)
        return (_first_line(verdict.faults[0]), True) if verdict.state == "damaged" else (verdict.state, False)
    except SoftcacheError as exc:
        return f"{type(exc).__name__}: {_first_line(exc.message)}", True
    except Exception as exc:
        return f"CRASH {type(exc).__name__}: {_first_line(str(exc))}", False


def _first_line(text: str) -> str:
    return ascii((text.splitlines() or [""])[0])[1:-1]


def folder_name(case: str) -> str:
    return case.replace("/", "-").replace(" ", "_")


def try_case(
    case: Case,
    honest_root: Path,
    honest: Mapping[str, np.ndarray],
    folder: Path,
    *,
    verifying: bool = True,
    at_most: int = 10**6,
) -> Iterator[Outcome]:
    """Make the case out of a copy of the honest cache, and judge it and its variants.

    Args:
        verifying: run `verify --full` too.
        at_most: so many of the variants, evenly chosen.
    """
    root = folder / folder_name(case.name)
    shutil.copytree(honest_root, root)
    forge = Forge(root)
    variants = case.make(forge)
    if variants is None:
        yield judge(case.name, case, root, honest, verifying=verifying)
        return
    chosen = list(variants)
    for what, data in chosen[:: -(-len(chosen) // at_most)]:
        forge.publish(data)
        yield judge(f"{case.name}: {what}", case, root, honest, verifying=verifying)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of case names")
    parser.add_argument("--keep", type=Path, help="make the caches in this folder and leave them there")
    parser.add_argument("--all", action="store_true", help="one line for every variant, not only for every case")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="softcache-hostile-"))
    make_honest(folder / "honest")
    honest = read_everything(folder / "honest")
    verdict = verify.run(folder / "honest", full=True, quiet=True)
    print(f"honest cache: {verdict.text()}")
    assert verdict.state == "whole"
    outcomes: list[Outcome] = []
    for case in CASES.values():
        if fnmatch.fnmatch(case.name, args.only):
            found = list(try_case(case, folder / "honest", honest, folder))
            outcomes += found
            for outcome in found if args.all or len(found) == 1 else [o for o in found if o.fault]:
                print(line(outcome))
            if len(found) > 1:
                print(f"{case.name}: {len(found)} variants, {sum(not o.fault for o in found)} refused")
    if args.keep is None:
        shutil.rmtree(folder)
    bad = [outcome for outcome in outcomes if outcome.fault]
    slowest = max(outcomes, key=lambda o: o.reading_s + o.verifying_s)
    print(f"{len(outcomes)} hostile caches: {len(outcomes) - len(bad)} refused, {len(bad)} not")
    print(f"slowest: {slowest.case}: {slowest.reading_s:.2f} s reading, {slowest.verifying_s:.2f} s verifying")
    return 1 if bad else 0


def line(outcome: Outcome) -> str:
    mark = f"NOT REFUSED ({outcome.fault})" if outcome.fault else "refused"
    times = f"{outcome.reading_s:.2f} + {outcome.verifying_s:.2f} s"
    return f"{outcome.case:<52} {mark:<8} {times}\n    read:   {outcome.reading[:150]}\n    verify: {outcome.verifying[:150]}"


if __name__ == "__main__":
    sys.exit(main())

"""HDF5 structure against the manifest: the only place that opens HDF5 for reading, and it does so in a child process.

An HDF5 file is a program for the library that parses it, and whoever made the cache wrote that program. So a child with little
memory and time opens the file, follows no link and reads no data; what it finds must be exactly what the manifest says.
Nothing else is allowed, so no list of dangerous features has to be complete.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from softcache.cache.file_entry import StoredFile
from softcache.cache.open_file import open_checked
from softcache.errors import CacheError

try:
    import resource
except ImportError:  # not a POSIX system: caches are read there, and their HDF5 structure is not checked
    resource = None  # type: ignore[assignment]

CHILD = (sys.executable, "-P", "-m", "softcache.cache.hdf5_check")
START_S = 120.0  # until the child has imported h5py: long only on a machine that does something else
MAX_FAULTS, MAX_FAULT_CHARS, MAX_REPLY_BYTES = 20, 300, 65536

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK = struct.Struct("<8sBBBBQQQ")  # its first 36 bytes, up to the end of the file's address
NOT_THERE = 2**64 - 1

STANDARD_TYPES = {  # of the manifest -> of the HDF5 library
    "|u1": "STD_U8LE",
    "<u2": "STD_U16LE",
    "<u4": "STD_U32LE",
    "<u8": "STD_U64LE",
    "<i4": "STD_I32LE",
    "<f2": "IEEE_F16LE",
    "<f4": "IEEE_F32LE",
}


@dataclass(frozen=True)
class Limits:
    """What the child may use.

    Attributes:
        wall_s, cpu_s: for one file; an honest one takes a millisecond.
        memory_bytes: address space beyond what it has before the first file.
        deaths: after so many files that it did not survive, the others are not opened any more.
    """

    wall_s: float = 10.0
    cpu_s: int = 4
    memory_bytes: int = 2**30
    deaths: int = 8


def structure_faults(
    root: Path, files: Iterable[StoredFile], *, limits: Limits | None = None
) -> Iterator[tuple[StoredFile, list[str]]]:
    """Each file with where its HDF5 structure differs from the manifest's entry. Ask for files whose sha256 has matched.

    Raises:
        CacheError: the child process cannot be started, or not be limited.
        DamagedCacheError: a file is missing, has another size, or is no regular file.
    """
    limits = limits or Limits()
    child: _Child | None = None
    deaths = 0
    try:
        for file in files:
            if deaths >= limits.deaths:
                yield file, [f"not checked: the HDF5 library did not survive {deaths} files before it"]
                continue
            child = child or _Child(limits)
            fd = open_checked(root, file)
            try:
                found = child.ask(fd, file)
            finally:
                os.close(fd)
            if child.cause_of_death:
                found = [f"the HDF5 library did not survive it ({child.cause_of_death})"]
                child, deaths = None, deaths + 1
            yield file, found
    finally:
        if child is not None:
            child.end()


class _Child:
    """The process that opens HDF5: asked file by file, until it dies or is ended."""

    def __init__(self, limits: Limits) -> None:
        if resource is None:
            raise CacheError(
                "HDF5 structure is checked by a process with little memory and time, and Python on "
                f"{sys.platform} has no module 'resource' to limit one",
                tip="check it on Linux; `verify` without --full does not need it",
            )
        self._limits, self.cause_of_death = limits, ""
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*CHILD, str(theirs.fileno()), json.dumps(asdict(limits))],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._reply(START_S)
        if self.cause_of_death:
            raise CacheError(
                f"the process that checks HDF5 structure did not start ({self.cause_of_death})",
                tip="check that `python -c 'import h5py'` works; `verify` without --full does not need it",
            )

    def ask(self, fd: int, file: StoredFile) -> list[str]:
        """What is wrong with an open file. `cause_of_death` is set afterwards if the child did not survive it."""
        request = {
            "kind": file.kind,
            "format": file.format,
            "bytes": file.nbytes,
            "arrays": {name: array.to_json() | {"bytes": array.nbytes} for name, array in file.arrays.items()},
        }
        try:
            self._channel.settimeout(self._limits.wall_s)
            socket.send_fds(self._channel, [b"?"], [fd])
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            return self._died("it did not take the question in time")
        except OSError:
            pass  # it is gone: its end of the channel says how
        return self._reply(self._limits.wall_s)

    def _reply(self, seconds: float) -> list[str]:
        """The next line from the child, a list of faults; `cause_of_death` is set where there is none in time."""
        deadline, received = time.monotonic() + seconds, b""
        while not received.endswith(b"\n"):
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                piece = self._channel.recv(4096)
            except TimeoutError:
                return self._died(f"no answer in {seconds:g} s")
            except OSError:
                piece = b""
            received += piece
            if not piece or len(received) > MAX_REPLY_BYTES:
                return self._died("too long an answer" if piece else "")
        try:
            faults = json.loads(received)
        except ValueError:
            faults = None
        if not isinstance(faults, list) or not all(isinstance(fault, str) for fault in faults):
            return self._died("an answer that is none")
        return faults

    def _died(self, cause: str) -> list[str]:
        """End it. Where no cause is given, its exit status says it."""
        if not cause:
            try:
                code = self._process.wait(timeout=self._limits.wall_s)
                cause = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                cause = "it closed its end of the channel"
        self.cause_of_death = cause
        self.end()
        return []

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()


def _environment() -> dict[str, str]:
    """Of the child: no HDF5 plugins, drivers or locks (they would need a writable file system), nothing of the user's."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    package_root = str(Path(__file__).resolve().parents[2])
    return kept | {
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, sys.path)]),
        "HDF5_PLUGIN_PRELOAD": "::",
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # each of its threads would reserve memory
    }


# ---------------------------------------------------------------------------------------------------------- in the child


def serve(channel_fd: int, limits: Limits) -> None:
    """Answer one line per descriptor and question, until the other side is gone."""
    import h5py  # noqa: F401  # before the limits: its libraries take address space, and no file has been seen yet

    _limit_process(limits)
    with socket.socket(fileno=channel_fd) as channel, channel.makefile("rb") as lines:
        answer: list[str] = []  # to no question: it is ready
        while True:
            channel.sendall(json.dumps(answer).encode() + b"\n")
            _, fds, _, _ = socket.recv_fds(channel, 1, 1)
            if not fds:
                return
            spent = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(spent.ru_utime + spent.ru_stime) + 1 + limits.cpu_s)
            answer = answer_to(fds[0], json.loads(lines.readline()))
            os.close(fds[0])


def answer_to(fd: int, request: Mapping[str, Any]) -> list[str]:
    """The first faults of a file."""
    try:
        found = list(
            islice(file_faults(fd, request["format"], request["kind"], request["bytes"], request["arrays"]), MAX_FAULTS)
        )
    except Exception as exc:  # whatever the library makes of a hostile file is a reason to refuse it
        found = [f"the HDF5 library refuses it: {type(exc).__name__}: {exc}"]
    return [fault.replace("\n", " ")[:MAX_FAULT_CHARS] for fault in found]


def _limit_process(limits: Limits) -> None:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 16)
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere the address space cannot be limited, or its size not be known
        _limit(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + limits.memory_bytes)


def _limit(what: int, wanted: int) -> None:
    """Lower a limit, never raise it above what was given to us. The hard limit stays: the CPU time's is moved file by file."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def file_faults(fd: int, format: int, kind: str, nbytes: int, arrays: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What differs from the one structure that is allowed. Counts come before names, names before anything is opened."""
    import h5py

    head = os.pread(fd, SUPERBLOCK.size, 0)
    # version 3, 8-byte offsets and lengths, closed; no user block, no extension (driver, cache image), nothing behind the end
    if head != SUPERBLOCK.pack(SIGNATURE, 3, 8, 8, 0, 0, NOT_THERE, nbytes):
        yield f"its superblock is not that of a plain HDF5 file of {nbytes} bytes: {head.hex()}"
        return
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    handle = h5py.h5f.open(f"/dev/fd/{fd}".encode(), h5py.h5f.ACC_RDONLY, fapl=access)
    try:
        root = h5py.h5g.open(handle, b"/")
        yield from _attribute_faults(root, format, kind)
        names, wanted = set(_names(root, len(arrays) + 1)), {name.encode() for name in arrays}
        if names != wanted:
            yield f"holds {len(names)} links, the manifest names {len(wanted)}: {_listing(names ^ wanted)} on one side only"
            return
        bodies = [(array["offset"], array["offset"] + array["bytes"]) for array in arrays.values()]
        for name, array in arrays.items():
            for fault in _data_set_faults(root, name.encode(), array, bodies):
                yield f"{name!r} {fault}"
    finally:
        handle.close()


def _names(root: Any, most: int) -> list[bytes]:
    """The first names of links in the root group."""
    names: list[bytes] = []

    def take(name: bytes) -> bool | None:
        names.append(name)
        return True if len(names) >= most else None  # True ends it

    root.links.iterate(take)
    return names


def _listing(names: set[bytes]) -> str:
    shown = ", ".join(repr(name[:40])[1:] for name in sorted(names)[:5])
    return shown + (", ..." if len(names) > 5 else "")


def _attribute_faults(root: Any, format: int, kind: str) -> Iterator[str]:
    import h5py
    import numpy as np

    count = h5py.h5a.get_num_attrs(root)
    if count != 2:
        yield f"has {count} attributes, should have softcache_format and softcache_kind"
        return
    text = kind.encode()
    for name, dtype, value in [("softcache_format", "<u4", format), ("softcache_kind", f"S{len(text)}", text)]:
        if not h5py.h5a.exists(root, name.encode()):
            yield f"has no attribute {name}"
            continue
        attribute = h5py.h5a.open(root, name.encode())
        found, space = attribute.get_type(), attribute.get_space()
        if isinstance(value, int):
            fits = found.equal(h5py.h5t.STD_U32LE)
        else:
            fits = (
                found.get_class() == h5py.h5t.STRING and not found.is_variable_str() and found.get_size() == len(text)
            )
        if not fits or found.committed() or space.get_simple_extent_type() != h5py.h5s.SCALAR:
            yield f"attribute {name} is of another type"
            continue
        read = np.zeros((), dtype)
        attribute.read(read)
        if read.item() != value:
            yield f"attribute {name} is {read.item()!r}, should be {value!r}"


def _data_set_faults(root: Any, name: bytes, array: Mapping[str, Any], bodies: list[tuple[int, int]]) -> Iterator[str]:
    import h5py

    if root.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        yield "is a link to somewhere else"
        return
    info = h5py.h5o.get_info(root, name)
    if info.type != h5py.h5o.TYPE_DATASET or info.rc != 1:
        yield "is not a data set" if info.type != h5py.h5o.TYPE_DATASET else "has another name as well"
        return
    if any(start <= info.addr < stop for start, stop in bodies):
        yield "has its header inside a data set"
    dataset = h5py.h5d.open(root, name)
    found, space, layout = dataset.get_type(), dataset.get_space(), dataset.get_create_plist()
    if not found.equal(getattr(h5py.h5t, STANDARD_TYPES[array["dtype"]])) or found.committed():
        yield f"is not stored as {array['dtype']}"
    shape = tuple(array["shape"])
    if space.get_simple_extent_type() != h5py.h5s.SIMPLE or space.get_simple_extent_ndims() != len(shape):
        yield f"does not have {len(shape)} axes"
    elif space.get_simple_extent_dims() != shape:
        yield f"is of shape {space.get_simple_extent_dims()}, the manifest says {shape}"
    elif space.get_simple_extent_dims(True) != shape:
        yield f"may grow from shape {shape} to {space.get_simple_extent_dims(True)}"
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters() or layout.get_external_count():
        yield "is not stored in one piece as it is"
        return
    if dataset.get_storage_size() != array["bytes"]:
        yield f"takes {dataset.get_storage_size()} bytes, the manifest says {array['bytes']}"
    offset = (dataset.get_offset() or 0) if array["bytes"] else 0
    if offset != array["offset"]:
        yield f"lies at {offset}, the manifest says {array['offset']}"
    if h5py.h5a.get_num_attrs(dataset):
        yield "has attributes"


if __name__ == "__main__":
    serve(int(sys.argv[1]), Limits(**json.loads(sys.argv[2])))

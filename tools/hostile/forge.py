"""What was done to a cache made to fit: sizes, hashes, checksums and ids; and the list of cases."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softcache.cache.file_entry import StoredFile
from softcache.cache.file_lists import ListedFiles
from softcache.cache.manifest import Manifest
from softcache.cache.schema import BLOCK_BYTES, ArraySpec
from softcache.cache.write.shard import write_shard


def dumps(value: Any) -> bytes:
    """The canonical form where there is one, and something close to it for what has none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


class Forge:
    """A cache whose manifest can be made to fit anything that was done to its files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entry: dict[str, Any] = json.loads((root / "manifest.json").read_bytes())
        # of version 2: list -> what it says of its files
        self.listed: dict[str, list[dict[str, Any]]] = {
            one["path"]: json.loads((root / one["path"]).read_bytes()) for one in self.entry.get("lists", ())
        }

    @property
    def files(self) -> list[dict[str, Any]]:
        """The entries of all files."""
        return [file for one in self.listed.values() for file in one] if self.listed else self.entry["files"]

    def file(self, path: str) -> dict[str, Any]:
        return next(file for file in self.files if file["path"] == path)

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
        about = {"kind": old["kind"], "member": old.get("member"), "format": 2 if self.listed else 1}
        stored = write_shard(self.root / path, arrays, relative_path=path, **about).to_json()
        old.update({name: stored[name] for name in ("bytes", "sha256", "arrays", "checksums") if name in stored})

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
        if self.listed:
            file["checksums"] = self._digest_of_sums(file, bytes(data))

    def _digest_of_sums(self, file: Mapping[str, Any], data: bytes) -> str:
        hasher = hashlib.sha256()
        for name in sorted(name for name in file["arrays"] if name.endswith("_crc32")):
            array = file["arrays"][name]
            hasher.update(
                data[array["offset"] : array["offset"] + ArraySpec(name, array["dtype"], tuple(array["shape"])).nbytes]
            )
        return hasher.hexdigest()

    def save(self) -> None:
        for one in self.entry.get("lists", ()):
            data = dumps(self.listed[one["path"]])
            (self.root / one["path"]).write_bytes(data)
            size = sum(file["bytes"] for file in self.listed[one["path"]])
            one.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), file_bytes=size)
        self.publish(dumps(self.entry))

    def publish(self, data: bytes) -> None:
        """These bytes as the manifest, under their id as well."""
        for old in (self.root / "manifests").glob("*.json"):
            old.unlink()
        (self.root / "manifest.json").write_bytes(data)
        (self.root / "manifests" / f"{hashlib.sha256(data).hexdigest()}.json").write_bytes(data)


def relisted(manifest: Manifest, changed: Mapping[str, StoredFile]) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest of version 2 with other entries for some paths, and the bytes of all its lists."""
    files, lists, data = manifest.files, [], {}
    assert isinstance(files, ListedFiles)
    for number, one in enumerate(files.lists):
        piece = [changed.get(file.path, file) for file in files.read(number)]
        data[one.path] = dumps([file.to_json() for file in piece])
        size = sum(file.nbytes for file in piece)
        digest = hashlib.sha256(data[one.path]).hexdigest()
        lists.append(replace(one, nbytes=len(data[one.path]), sha256=digest, file_bytes=size))
    return replace(manifest, files=ListedFiles(files.root, files.plan, lists)), data


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


def assign(*at: Any, to: Any) -> Callable[[Any], None]:
    """A change of a manifest: another value at this place."""

    def change(entry: Any) -> None:
        for key in at[:-1]:
            entry = entry[key]
        entry[at[-1]] = to

    return change

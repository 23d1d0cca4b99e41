"""A model of a disk: what survives a power cut."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.watched import Call


@dataclass(eq=False)
class Inode:
    """A file: what a process reads now, what is surely on the disk, and what was done since."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def do(self, what: str, number: int, data: bytes = b"") -> None:
        self.pending.append((what, number, data))
        _change(self.data, what, number, data)

    def sync(self) -> None:
        self.durable, self.pending = bytes(self.data), []


def _change(target: bytearray, what: str, number: int, data: bytes) -> None:
    if what == "cut":
        del target[number:]
        target.extend(bytes(number - len(target)))
    else:
        target.extend(bytes(max(0, number + len(data) - len(target))))
        target[number : number + len(data)] = data


@dataclass(eq=False)
class Folder:
    """A folder: its names now, those that are surely on the disk, and what was done to them since."""

    names: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)

    def do(self, name: str, node: Any, instead_of: str = "") -> None:
        self.pending.append((name, instead_of, node))
        _rename(self.names, name, instead_of, node)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.names), []


def _rename(names: dict[str, Any], name: str, instead_of: str, node: Any) -> None:
    names.pop(instead_of, None)
    names.pop(name, None)
    if node is not None:
        names[name] = node


class Disk:
    """A file system that keeps only what was synced: contents by fsync of the file, names by fsync of their folder."""

    def __init__(self) -> None:
        self.root = Folder()

    def apply(self, call: Call) -> None:
        folder, name = self._place(call.path)
        node: Any = folder.names.get(name) if name else folder  # "" is the folder around the cache
        if call.name == "mkdir":
            folder.do(name, Folder())
        elif call.name == "unlink":
            folder.do(name, None)
        elif call.name == "replace":
            folder.do(self._place(call.to)[1], node, instead_of=name)
        elif call.name == "fsync":
            node.sync()
        elif call.name == "open" and call.flags & os.O_CREAT:
            if node is None:
                folder.do(name, node := Inode())
            if call.flags & os.O_TRUNC:
                node.do("cut", 0)
        elif call.name == "ftruncate":
            node.do("cut", call.size)
        elif call.name == "posix_fallocate":
            node.do("cut", max(call.size, len(node.data)))
        elif call.name in ("pwrite", "write"):
            node.do("write", len(node.data) if call.offset < 0 else call.offset, call.data)

    def _place(self, path: str) -> tuple[Folder, str]:
        *folders, name = ("" if path == "." else path).split("/")
        at = self.root
        for folder in folders:
            at = at.names[folder]
        return at, name

    def survivors(self, how: str, draw: random.Random) -> dict[str, bytes | None]:
        """Path -> bytes (None: a folder) after a power cut.

        Args:
            how: "all" of the calls took effect; those not synced are "lost"; every name is there, but of the bytes that were
                not synced only some are ("torn"); or of both some are ("mixed").
        """
        found: dict[str, bytes | None] = {}

        def walk(folder: Folder, prefix: str) -> None:
            names = dict(folder.names if how in ("all", "torn") else folder.durable)
            for change in folder.pending if how == "mixed" else []:
                if draw.random() < 0.5:
                    _rename(names, change[0], change[1], change[2])
            for name, node in names.items():
                if isinstance(node, Folder):
                    found[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    found[prefix + name] = bytes(node.data) if how == "all" else _survived(node, how, draw)

        walk(self.root, "")
        return found


def _survived(file: Inode, how: str, draw: random.Random) -> bytes:
    data = bytearray(file.durable)
    for what, number, written in file.pending if how != "lost" else []:
        if draw.random() < 0.5:
            torn = len(written) * draw.randrange(3) // 2
            _change(data, what, number, written[:torn])
    return bytes(data)


def lay_out(root: Path, found: Mapping[str, bytes | None]) -> Path:
    """The survivors as files; the cache folder among them."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, data in found.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    return root / "cache"

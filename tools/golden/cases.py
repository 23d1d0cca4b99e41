"""The small dumps that golden caches and the check of equal bytes are made of: every codec and content, on arithmetic data.

Only public names are used, so that the table can be dumped by other versions of softcache too.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from softcache import cli, dump
from softcache.config import DumpConfig

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
PIECES = GOLDEN / "pieces.py"

WIDE: dict[str, Any] = {
    "data": f"{PIECES}:images?count=300&classes=64",
    "teacher": (f"{PIECES}:network?classes=64&width=4",),
}
CACHES: dict[str, dict[str, Any]] = {
    "float32": {"codec": "float32"},
    "float16": {"codec": "float16", "policy": ("shift:pixels=1",), "views": 2},
    "int8": {"codec": "int8"},
    "headtail": {"codec": "headtail:k=3,bits=6"},
    "topk": {"codec": "topk:k=5"},
    "linear_head": {"codec": "linear_head"},
    "linear_head-int8": {"codec": "linear_head:dtype=int8"},
    "lowrank": {"codec": "lowrank:max_kl=2e-6,at_temperature=4", **WIDE},
    "features": {"codec": "float16", "features": ("hidden:flatten",), "feature_dtype": "int8", "license": "cc0-1.0"},
    "multi-label": {"codec": "float16", "data": f"{PIECES}:images?multi_label=true", "no_keys": True},
    "mixed": {"codec": "float16", "policy": ("crop_flip:padding=1", "mixup"), "views": 2},
}
# of codecs that version 1 does not have
CACHES_2: dict[str, dict[str, Any]] = {
    "topset": {"codec": "topset:k=5"},
    "linear_head-groups": {"codec": "linear_head:group=8"},
}


def make(folder: Path, settings: dict[str, Any]) -> None:
    """One dump, without what tells of this machine."""
    defaults = {"data": f"{PIECES}:images", "teacher": (f"{PIECES}:network",), "device": "cpu", "threads": 1}
    settings = {**defaults, **settings}
    dump.run(DumpConfig(out=str(folder), workers=0, batch_size=16, **settings), quiet=True)


def make_extended(folder: Path, format: int = 1) -> None:
    """Three rounds: a member, another view, another member."""
    policy, first = ("shift:pixels=1",), f"{PIECES}:network?name=first"
    how = {} if format == 1 else {"format": str(format)}  # earlier versions have no such setting
    make(folder, {"codec": "int8", "policy": policy, "views": 1, "teacher": (first,), **how})
    make(folder, {"extend": True, "views": 2, "teacher": (first,)})
    make(folder, {"extend": True, "teacher": (f"{PIECES}:network?name=second&seed=2",), "codec": "float16"})


def make_in_parts(folder: Path) -> None:
    """A dump shared by two processes, one after the other: of several shards, so that each has something to do."""
    for part in ("1/2", "2/2"):
        make(folder, {"codec": "int8", "policy": ("shift:pixels=1",), "views": 3, "shard_rows": 5, "part": part})


def make_subset(parent: Path, folder: Path, *choice: str) -> None:
    """`softcache subset` of a cache; the choice is written as its flags."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        code = cli.main(["subset", str(parent), str(folder), *choice])
    if code:
        raise RuntimeError(f"softcache subset {parent}: exit code {code}: {told.getvalue()}")

"""The seal of what a run writes: a format number, and a digest of tensors and metadata that is compared when it is read.

Format 1 (0.6.0): student.safetensors, best.safetensors, checkpoint.pt and run.json carry the number; the three with tensors carry
the digest. What earlier versions wrote has neither, and is read. Format 2 (0.8.0): students whose weights are int8.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcache.errors import SoftcacheError, note_once

FORMAT = 1
INT8 = 2  # of students with weights that have to be multiplied by scales
FORMAT_KEY, DIGEST_KEY = "softcache_format", "softcache_digest"  # among the strings of a safetensors file

STRETCH = 64  # a tensor that is one number many times, as `expand` makes it, takes no room in a file


def digest(value: Any) -> str:
    """sha256 in hex over tensors, numbers, strings and None in mappings and lists, each with its type, name and place."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        hasher.update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if sys.byteorder == "big":
            raw = raw.reshape(-1, value.element_size()).flip(1).contiguous()
        hasher.update(raw.numpy())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=lambda one: (type(one).__name__, str(one))):
            _feed(hasher, key)
            _feed(hasher, value[key])
        _feed(hasher, getattr(value, "_metadata", None))  # of a state dict: the versions of its modules
    elif isinstance(value, list | tuple):
        hasher.update(f"sequence {len(value)}\n".encode())
        for one in value:
            _feed(hasher, one)
    else:
        text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else repr(value)
        hasher.update(f"{type(value).__name__} {len(text)} {text}\n".encode())


def check_format(found: Any, where: Path, wrote: Any, error: type[SoftcacheError], *, highest: int = FORMAT) -> None:
    """Raise `error` for a format number that this version does not read.

    Args:
        found: the number; None of an earlier version.
        wrote: the version that the file says wrote it.
        highest: the number up to which such files are read.
    """
    if found is None:
        return
    if type(found) is not int or found < 1:
        raise error(f"{where}: its format number is {str(found)[:40]!r}", tip="it is damaged: copy it again")
    if found > highest:
        known = isinstance(wrote, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,30}", wrote)
        wanted = f"'softcache>={wrote}'" if known else "-U softcache"
        raise error(
            f"{where}: is of format {found}; this softcache reads formats up to {highest}",
            tip=f"pip install {wanted}",
        )


def check_digest(found: Any, value: Any, where: Path, error: type[SoftcacheError], *, sealed: bool) -> None:
    """Raise `error` where the digest is not that of `value`. Of an earlier version there is none, which is said once.

    Args:
        found: the digest in the file; None where it has none.
        sealed: the file has a format number, so that it must have a digest.
    """
    if found is None and not sealed:
        note_once(
            f"{where}: was written by an earlier version and has no digest, so that a damaged bit in it is not noticed"
        )
    elif found != digest(value):
        raise error(
            f"{where}: is damaged: its tensors and metadata are not those that were saved",
            tip="copy it again from where it came from, or make it again",
        )


def refuse_stretched(value: Any, nbytes: int, where: Path, error: type[SoftcacheError]) -> None:
    """Raise `error` for tensors that say they are far larger than the file of `nbytes` that they were read from."""
    asked = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
    if asked > STRETCH * nbytes + 2**24:
        raise error(
            f"{where}: has {nbytes:,} bytes, and tensors that would take {asked:,}: more than {STRETCH} times as many",
            tip="if they are meant so, save them whole: tensor.contiguous().clone()",
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for one in inner:
        yield from _tensors(one)

"""What somebody else's teacher gave: as numbers, or in words where it is none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.errors import TeacherError, first_offenders, is_users_file


def numbers(raw: Any) -> Tensor | None:
    """Arrays, and sequences of numbers, as a tensor; None for everything else."""
    if raw is None or isinstance(raw, str | bytes | Mapping | Iterator):
        return None
    if isinstance(raw, list | tuple) and any(isinstance(one, Tensor) for one in raw):
        return None
    try:
        return torch.as_tensor(np.asarray(raw))
    except (TypeError, ValueError, RuntimeError):  # ragged, or no numbers
        return None


def not_finite(name: str, samples: str, *, has_classes: bool) -> TeacherError:
    """For numbers that no cache holds; `samples` says of which."""
    gave = "gave logits that are not finite for" if has_classes else "gave numbers that are not finite for"
    return TeacherError(
        f"teacher {name!r} {gave} {samples}",
        tip="look at these samples, and mend them or leave them out (--without FILE); under autocast fp16 try "
        "--autocast bf16 or none",
    )


def described(raw: Any) -> str:
    """What a result is, for a message: its class, and what it holds."""
    if isinstance(raw, Tensor):
        layout = "" if raw.layout == torch.strided else f" in layout {raw.layout}".replace("torch.", "")
        return f"a tensor of {str(raw.dtype).removeprefix('torch.')}{layout}"
    name = type(raw).__name__
    if isinstance(raw, Mapping):
        return f"{name} of {first_offenders(map(repr, raw), len(raw))}"
    if isinstance(raw, list | tuple):
        kinds = (f"{type(one).__name__}{list(getattr(one, 'shape', ''))}" for one in raw)
        return f"{name} of {first_offenders(kinds, len(raw), 3)}"
    if isinstance(raw, np.ndarray):
        return f"an array of {raw.dtype}"
    return name


def likely_meant(raw: Any) -> str:
    """Which part of a result is likely meant."""
    if isinstance(raw, Mapping):
        return next((f"result[{key!r}]" for key in ("logits", "scores", "output", "out") if key in raw), "its logits")
    if isinstance(raw, list | tuple) and raw and isinstance(raw[0], Tensor | np.ndarray) and raw[0].ndim == 2:
        return "result[0]"
    return "its logits"


def place_of(function: Any) -> str:
    """(file.py, line 3), where a Python function or a method begins; nothing for others."""
    call = function if inspect.isroutine(function) else type(function).__call__ if callable(function) else None
    code = getattr(inspect.unwrap(call), "__code__", None) if call is not None else None
    if code is None or not is_users_file(code.co_filename):
        return ""
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})"

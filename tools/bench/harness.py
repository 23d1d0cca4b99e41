"""What every benchmark does alike: its flags, what it says of the machine, kinds that take turns, and figures as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

QUICK = "quick: figures mean nothing"


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs; its figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def heading(name: str, arguments: argparse.Namespace, device: torch.device | None = None) -> str:
    """The line above a table: which benchmark, on what, with what."""
    cuda = device is not None and device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else platform.machine()
    versions = f"torch {torch.__version__}, numpy {np.__version__}, h5py {h5py.__version__}"
    line = f"bench/{name}: {where}, {torch.get_num_threads()} threads, {versions}"
    return f"{line}\n{QUICK}" if arguments.quick else line


def write_json(file: Path | None, found: Any) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")


def in_turn(kinds: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind in each round; neither is always first."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        names = list(kinds)
        for name in names if number % 2 else reversed(names):
            begin = time.perf_counter()
            kinds[name]()
            times[name].append(time.perf_counter() - begin)
    return times

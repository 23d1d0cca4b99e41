"""One bit of a student or a checkpoint is flipped: either it is refused, or everything that is loaded equals the original."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.world import Outcome
from softcache.errors import SoftcacheError
from softcache.models import describe_model, load_model, read_metadata, weights
from softcache.models.seal import digest
from softcache.train.checkpoint import read_progress
from softcache.train.ranks import ALONE


def of_student(run: Path) -> str:
    """A digest of all that loading a run folder gives."""
    weights._WHOLE.clear()  # which knows a file by its times, and they are not so fine as these flips are fast
    model = load_model(str(run), num_classes=3)
    told = [describe_model(model), read_metadata(run), list(model.class_names or ()), list(model.data_class_names)]
    return digest([dict(model.net.state_dict()), repr(told)])


def of_checkpoint(run: Path) -> str:
    progress, state = read_progress(run, ALONE)
    return digest([vars(progress), state])


LOADED: dict[str, Callable[[Path], str]] = {
    "student.safetensors": of_student,
    "checkpoint.pt": of_checkpoint,
}


def places(size: int, count: int, draw: random.Random) -> Iterator[int]:
    """Bits: half of them anywhere, half where a file says what it is, at its beginning and its end."""
    edge = min(size, 4096)
    for number in range(count):
        byte = draw.randrange(size)
        if number % 2:
            byte = draw.choice([draw.randrange(edge), size - 1 - draw.randrange(edge)])
        yield 8 * byte + draw.randrange(8)


def flipped(run: Path, count: int, *, seed: int = 0) -> Iterator[Outcome]:
    """So many flips, shared among the files of a run folder that the verbs made; the files are as before afterwards."""
    draw = random.Random(seed)
    for name, load in LOADED.items():
        path = run / name
        whole, wanted = path.read_bytes(), load(run)
        for bit in places(len(whole), count // len(LOADED), draw):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            yield _outcome(f"{name}: bit {bit}", lambda load=load: load(run), wanted)  # type: ignore[misc]
        path.write_bytes(whole)


def _outcome(case: str, load: Callable[[], str], wanted: str) -> Outcome:
    said: Any = ""
    faults: list[str] = []
    code = 0
    try:
        if load() != wanted:
            faults.append("something else was loaded")
    except SoftcacheError as exc:
        code, said = 2, exc.message
    except Exception as exc:
        faults.append(f"traceback: {type(exc).__name__}: {str(exc)[:100]}")
    return Outcome(case, code, faults, said, 0.0)

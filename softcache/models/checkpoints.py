"""Other people's checkpoints: the tensors of one network out of what published files hold, chosen and never guessed.

No code of a file runs: a class that it names is an empty thing in whose place nothing happens, and only tensors are taken.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from softcache.errors import ConfigError, ModelError, first_offenders, nearest
from softcache.models.seal import refuse_stretched
from softcache.spec import quoted

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".th")
# what frameworks put in front of a network's names
WRAPPERS = (
    "_orig_mod", "module", "model", "net", "network", "student", "teacher", "ema", "ema_model", "encoder_q", "encoder_k",
    "base_encoder", "online_encoder", "target_encoder", "momentum_encoder", "backbone", "encoder",
)  # fmt: skip
COUNTERS = ("total_ops", "total_params")  # that thop leaves in a network
STEPS = "num_batches_tracked"  # BatchNorm's own counter, which older files lack
DEEPEST = 4  # of dicts in a file
MOST_NAMES = 256  # of classes in a file
MOST_INDEX = 2**26  # bytes
HEADS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it: git lfs pull"),
    (b"\x1f\x8b", "packed by gzip", "unpack it first: gunzip"),
    (b"\x89HDF", "an HDF5 file, as Keras writes", "convert it: torch.save({name: torch.from_numpy(array), ...}, 'weights.pt')"),
    (b"\x93NUMPY", "one NumPy array", "save a dict of tensors by name: torch.save(..., 'weights.pt')"),
    (b"7z\xbc\xaf", "packed by 7-Zip", "unpack it first"),
    (b"Rar!", "packed by RAR", "unpack it first"),
)  # fmt: skip


_Group = tuple[tuple[str, ...], Mapping[str, Tensor]]


@dataclass(frozen=True)
class State:
    """The tensors of one network.

    Attributes:
        tensors: by the names that the network has.
        told: what was chosen and left out of the file, in words; empty where it held these tensors and nothing else.
    """

    tensors: dict[str, Tensor]
    told: str = ""


@dataclass(frozen=True)
class _Found:
    """Tensors in a file: the names of the dicts they lie in, the prefix that is taken off, and how many names are wanted ones."""

    place: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Tensor]
    hits: int

    @property
    def name(self) -> str:
        return ".".join((*self.place, *(self.prefix.rstrip(".").split(".") if self.prefix else ())))


def read_state(path: Path, wanted: Mapping[str, Tensor], choice: str = "") -> State:
    """The tensors of a checkpoint that are a network's, on the CPU, never running code from it.

    Args:
        path: `.safetensors`, the index of several such files, or what `torch.save` wrote: a state dict alone, or beside
            settings, optimizers and other state dicts.
        wanted: a network's state dict, whose names say which of several is meant. Wrappers' prefixes are taken off where its
            names are found behind them.
        choice: which one, of several: the name of a dict in the file (`state_dict_ema`, `ema.module`), of what stands in front
            of tensors' names (`student`), or of both (`state_dict.student`).

    Raises:
        ModelError: not a file of tensors, told as what it is; or several networks, and no choice.
        ConfigError: a choice that is not there.
    """
    content = _content(path)
    groups = list(_state_dicts(content))
    if not groups:
        raise ModelError(f"{path} {_what_is_there(content)}", tip=_save_tip(content))
    found = [one for place, tensors in groups for one in _closest(place, tensors, wanted, choice)]
    if not found:
        names = sorted({one.name for place, tensors in groups for one in _closest(place, tensors, wanted, "")} - {""})
        raise ConfigError(
            f"{path}: holds no tensors called {choice!r}",
            tip=nearest(choice, names)
            if names
            else f"it holds one set of tensors, without a name: leave #{choice} out",
        )
    return _adapted(_only_one(found, path, choice), wanted, groups)


def _only_one(found: list[_Found], path: Path, choice: str) -> _Found:
    """The one with most of the wanted names; ModelError where several have them all alike."""
    best = max(one.hits for one in found)
    most = max(len(one.tensors) for one in found if one.hits == best)
    alike = [one for one in found if one.hits == best and (best or len(one.tensors) == most)]
    alike = [one for one in alike if one.name == choice] or alike
    if len(alike) > 1:
        names = [one.name or "." for one in alike]
        raise ModelError(
            f"{path}: holds the tensors of {len(alike)} networks: {first_offenders(names, len(names), 12)}",
            tip=f"choose one of them behind a '#', as in {quoted(path.name, '@', '#')}#{names[0]}",
        )
    return alike[0]


def _closest(
    place: tuple[str, ...], tensors: Mapping[str, Tensor], wanted: Collection[str], choice: str
) -> list[_Found]:
    """The tensors behind each prefix under which most of the wanted names are found; as they are where none is."""
    names = {name for name in wanted if not name.endswith(STEPS)} or set(wanted)
    prefixes = {""} | {prefix for name in tensors for prefix in _prefixes(name, choice)}
    found = [_Found(place, one, tensors, sum(one + name in tensors for name in names)) for one in sorted(prefixes)]
    found = [one for one in found if _is_called(one.name, choice)]
    most = max((one.hits for one in found), default=0)
    if not most:  # nothing fits: that is said with the names that the file has, but for what stands in front of all
        found = [one for one in found if all(name.startswith(one.prefix) for name in tensors)][-1:]
    return [one for one in found if one.hits == most]


def _is_called(name: str, choice: str) -> bool:
    return not choice or f".{choice}." in f".{name}." or (choice == "." and not name)


def _prefixes(name: str, choice: str) -> Iterator[str]:
    """`module.`, `module.model.` of `module.model.fc.weight`: the wrappers that a name begins with, and what was chosen."""
    parts = name.split(".")
    known = (*WRAPPERS, *choice.split("."))
    for count, part in enumerate(parts[:-1], start=1):
        if part not in known:
            return
        yield ".".join(parts[:count]) + "."


def _adapted(found: _Found, wanted: Mapping[str, Tensor], groups: Sequence[_Group]) -> State:
    """The tensors without the prefix, without others' counters, with BatchNorm's own where an older file has none."""
    inside = {n.removeprefix(found.prefix): t for n, t in found.tensors.items() if n.startswith(found.prefix)}
    told = []
    if others := [repr(".".join(place) or ".") for place, _ in groups if place != found.place]:
        told.append(f"taken from {'.'.join(found.place) or '.'!r}, not from {first_offenders(others, len(others))}")
    if found.prefix:
        told.append(f"{found.prefix!r} taken off its names")
    if outside := len(found.tensors) - len(inside):
        told.append(f"{outside} tensors of other names left out")
    counters = [n for n in inside if n not in wanted and n.rpartition(".")[2] in (*COUNTERS, STEPS)]
    if counters and found.hits:
        inside = {name: tensor for name, tensor in inside.items() if name not in counters}
        told.append(f"{len(counters)} counters left out")
    steps = [name for name in wanted if name.endswith(STEPS) and name not in inside]
    if steps and found.hits and not any(name.endswith(STEPS) for name in inside):
        inside |= {name: torch.zeros_like(wanted[name], device="cpu") for name in steps}
    return State(inside, ", ".join(told))


# ------------------------------------------------------------------------------------------------------------ what a file holds


def _state_dicts(content: Any, place: tuple[str, ...] = ()) -> Iterator[_Group]:
    """The tensors by name in every dict of the content, with the keys that lead to it."""
    if not isinstance(content, Mapping) or len(place) > DEEPEST or not all(isinstance(key, str) for key in content):
        return
    if tensors := {key: value for key, value in content.items() if isinstance(value, Tensor)}:
        yield place, tensors
    for key, value in content.items():
        yield from _state_dicts(value, (*place, key))


def _what_is_there(content: Any) -> str:
    if isinstance(content, _Nothing):
        return f"is not a state dict (names to tensors): it holds {content}, a whole network, which is code"
    if isinstance(content, Mapping):
        objects = [f"{key!r} ({value})" for key, value in content.items() if isinstance(value, _Nothing)]
        keys = first_offenders(map(repr, content), len(content))
        also = f"; {first_offenders(objects, len(objects))} is an object, which is code" if objects else ""
        return f"is not a state dict (names to tensors), and holds none; its keys are {keys or 'none'}{also}"
    return f"is not a state dict (names to tensors): it holds {type(content).__name__}"


def _save_tip(content: Any) -> str:
    is_code = isinstance(content, _Nothing) or any(
        isinstance(one, _Nothing) for one in (content.values() if isinstance(content, Mapping) else ())
    )
    where = "where that code is at hand, " if is_code else ""
    return f"{where}save the weights alone: torch.save(net.state_dict(), path)"


# ----------------------------------------------------------------------------------------------------------------- reading bytes


class _Nothing:
    """Stands in the place of an object of a class that a file names: it keeps nothing, and does nothing."""

    said = "an object"

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...
    def __setstate__(self, _state: Any) -> None: ...
    def __str__(self) -> str:
        return self.said


def _content(path: Path) -> Any:
    """What a file holds: tensors, numbers, strings, and dicts and lists of them."""
    if path.name.endswith(".index.json"):
        return _of_index(path)
    begin = _begin(path)
    if path.suffix not in SUFFIXES and not begin.startswith((b"PK", *(head for head, _, _ in HEADS))):
        raise ModelError(f"{path} is not a weights file we know", tip=nearest(path.suffix, SUFFIXES))
    refuse_others(path)
    if path.suffix == ".safetensors":
        if begin.startswith((b"PK", b"\x80")) and not _is_safetensors(begin):
            raise ModelError(f"{path}: was written by torch.save", tip=f"rename it to {path.stem}.pth")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"{path} is not a safetensors file: {exc}", tip="fetch it again") from None
    if _is_safetensors(begin):
        raise ModelError(f"{path}: is a safetensors file", tip=f"rename it to {path.stem}.safetensors")
    content = _loaded(path)
    refuse_stretched(content, path.stat().st_size, path, ModelError)
    return content


def _loaded(path: Path) -> Any:
    """What torch.save wrote, with an empty thing for every object of another class than a tensor."""
    try:
        things = {name: _thing(name) for name in get_unsafe_globals_in_checkpoint(path)}
    except Exception:  # of an older form of file, whose names come one by one
        things = {}
    while True:
        try:
            with safe_globals([(thing, name) for name, thing in things.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as exc:  # unpickling bytes that are no pickle can raise almost anything
            if not _learned(things, str(exc)):
                raise ModelError(
                    f"{path} cannot be read as plain tensors: {_reason(exc)}",
                    tip="fetch it again if it came from the web; if it holds code, which is refused, save the weights alone: "
                    "torch.save(net.state_dict(), path)",
                ) from None


def _learned(things: dict[str, type], message: str) -> bool:
    """Whether there is a thing now that stands in for what torch would not make, or one that takes items where it has some."""
    if len(things) > MOST_NAMES:
        return False
    if found := re.search(r"Unsupported global: GLOBAL (\S+) was not", message):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"
        known = name in things
        things[name] = _thing(name)
        return not known
    if found := re.search(r"Can only (\w+) .*<class '[\w.]*\bNothing of (.+?)'>", message):
        things[found[2]] = _thing(found[2], dict if "ITEM" in found[1] else list)
        return True
    return False


def _thing(name: str, holds: type | None = None) -> type:
    """A class that stands in for another of this name. One that `holds` items makes an empty dict or list of them."""
    made = type(f"Nothing of {name}", (_Nothing,), {"said": name})
    if holds is not None:
        empty: Any = OrderedDict if holds is dict else list  # torch lets these two take items and attributes
        made.__new__ = lambda cls, *_args, **_kwargs: empty()  # type: ignore[method-assign,assignment]
    return made


def _reason(exc: Exception) -> str:
    """What torch said, without its advice."""
    if "persistent_load" in str(exc):
        return "it holds a whole network, which is code"
    if "reduce for unrecognized function" in str(exc):
        return "it calls a function, which is code"
    if found := re.search(r"GLOBAL (\S+)", str(exc)):
        return f"it names {found[1].rstrip('.')}, which is code"
    if isinstance(exc, RuntimeError | OSError) and "Weights only load failed" not in str(exc):
        return f"{type(exc).__name__}: {exc}".splitlines()[0]
    return "torch.save did not write it, or it is damaged"


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as exc:
        raise ModelError(f"{path}: cannot be read: {exc.strerror}") from None


def _is_safetensors(begin: bytes) -> bool:
    """Whether a header of JSON begins behind its length in eight bytes, whatever letters those are."""
    return begin[8:10] == b'{"'


def refuse_others(path: Path) -> None:
    """Raise ModelError, saying what it is, for a file that is something else under a name of weights."""
    begin = _begin(path)
    if _is_safetensors(begin):
        return
    if not begin:
        raise ModelError(f"{path}: is empty", tip="fetch it again: the download was cut off")
    text = begin.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ModelError(
            f"{path}: is a page of the web, not the weights",
            tip="fetch the file itself, by the address behind its button for downloads",
        )
    for head, what, tip in HEADS:
        if begin.startswith(head):
            raise ModelError(f"{path}: is {what}", tip=tip)
    if path.suffix != ".safetensors" and text.startswith(b'{"') and b"\0" not in begin:
        raise ModelError(f"{path}: is a JSON text, not weights", tip="fetch the file itself: a server wrote a message")
    if begin[257:262] == b"ustar":
        raise ModelError(
            f"{path}: is a tar archive", tip=f"unpack it, and name the file of weights in it: tar xf {path}"
        )
    if begin.startswith(b"PK"):
        _refuse_archive(path)


def _refuse_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        raise ModelError(f"{path}: is cut off or damaged", tip="fetch it again") from None
    if any(name.endswith(".npy") for name in names):
        raise ModelError(
            f"{path}: is an archive of NumPy arrays, which is not read",
            tip="convert it: torch.save({name: torch.from_numpy(array) for name, array in numpy.load(path).items()}, "
            "'weights.pt')",
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise ModelError(
            f"{path}: is a TorchScript program, which is code",
            tip="save its weights alone: torch.save(torch.jit.load(path).state_dict(), 'weights.pt')",
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ModelError(
            f"{path}: is a zip archive of {first_offenders(names, len(names))}",
            tip="unpack it, and name the file of weights in it",
        )


def _of_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, as transformers writes one for weights in several files."""
    try:
        raw = path.read_bytes()[: MOST_INDEX + 1]
        places = json.loads(raw)["weight_map"]
        files = sorted({str(PurePosixPath(one)) for one in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ModelError(f"{path}: is no index of weights: {exc!r}", tip="fetch it again") from None
    state: dict[str, Tensor] = {}
    for name in files:
        if os.path.basename(name) != name or name.endswith(".json"):
            raise ModelError(f"{path}: names {name!r}, which does not lie beside it", tip="fetch index and files again")
        if not path.with_name(name).is_file():
            raise ModelError(f"{path}: names {name}, which is not there", tip="fetch all of its files into one folder")
        state |= _content(path.with_name(name))
    if missing := [name for name in places if name not in state]:
        raise ModelError(f"{path}: its files lack {first_offenders(missing, len(missing))}", tip="fetch them again")
    return state

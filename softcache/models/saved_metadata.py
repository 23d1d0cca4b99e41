"""What the metadata of a weights file tells, which may come from anybody: checked, and bounded, before anything is built of it.

A family of ours, torchvision's, timm's or transformers' is built by its name, with numbers as its parameters: nothing else can
be named that opens a file, asks the network or runs code. Any other factory is called only where the user allows it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from softcache.errors import ModelError, UntrustedError
from softcache.spec import Spec

FAMILIES = ("softcache", "torchvision", "timm")
NUMBERS = re.compile(r"[-+0-9.eE]{0,32}(,[-+0-9.eE]{1,32}){0,1024}|true|false|none", re.IGNORECASE)
NAME = re.compile(r"\w{1,128}", re.ASCII)
MOST = 2**24  # of a width or a number of layers
MANY_LAYERS = 1024
MOST_OF_OTHERS = (
    4096  # channels, or pixels of a side: torchvision's and timm's networks are not laid out without memory
)
# of a transformers configuration: what would have it fetch something, or choose code by a name
FETCHES = re.compile(
    "auto_map|.*name_or_path|.*attn_implementation|.*experts_implementation|.*kernel.*|quantization_config|backbone.*|.*pretrained.*"
    "|.*remote.*|_commit_hash|transformers_weights"
)
MANY_MODULES = 2**15
COUNTS = re.compile("layer|depth|block|group|expert|num_.*heads|^n_head")  # of modules: each is made, one by one


def load_json(text: str | bytes) -> Any:
    """What a JSON document says; ValueError for what is none, or deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_spec(spec: Spec, text: str, *, allow_code: bool) -> None:
    """Refuse what a weights file says of its network, where that is more than a family with numbers.

    Args:
        spec: as the file has it.
        text: how the user named the file.
        allow_code: the user believes the file.

    Raises:
        UntrustedError: a factory, or a parameter that is no number.
        ModelError: a number that no network has.
    """
    if allow_code:
        return
    again = shlex.quote(f"{spec.text}@{text}")
    if spec.is_factory:
        raise UntrustedError(
            f"{text}: says that it belongs to {spec.text}, which is code; code is not run because a file names it",
            tip=f"if you know that code and trust it, name it yourself: {again} in the place of {text}, a file.py with its path; "
            "in Python allow_code=True",
        )
    if spec.scheme not in FAMILIES or not NAME.fullmatch(spec.name):
        raise UntrustedError(
            f"{text}: says that it belongs to {spec.text}, which is none of the models that are built because a file names them",
            tip=f"if you trust it, name the model yourself: MODEL@{text}",
        )
    for key, value in spec.parameters.items():
        if key in ("weights", "vocabulary") or not NUMBERS.fullmatch(value):
            raise UntrustedError(
                f"{text}: says that it belongs to {spec.text}, and {key}={value} is no number: it may name a file or a download",
                tip=f"if you trust it, name the model yourself: {again} in the place of {text}",
            )
    _check_numbers(spec, text, again)


def _check_numbers(spec: Spec, text: str, again: str) -> None:
    for key, value in spec.parameters.items():
        most = MANY_LAYERS if key in ("depth", "layers") else MOST if spec.scheme == "softcache" else MOST_OF_OTHERS
        numbers = [_number(one) for one in value.split(",")]
        if len(numbers) > MANY_LAYERS or any(abs(one) > most for one in numbers):
            raise ModelError(
                f"{text}: says that it belongs to {spec.text}, where {key} is over {most:,}, or has over {MANY_LAYERS:,} numbers",
                tip=f"if that is so, name the model yourself: {again} in the place of {text}",
            )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # true, none, or nothing: the builder's own conversion says the rest


def check_config(told: Any, text: str) -> dict[str, Any]:
    """The configuration of one of transformers' models, without what says where it came from.

    Raises:
        ModelError: no plain settings; a key that could make transformers fetch or choose code; numbers that no network has.
    """
    if not isinstance(told, Mapping) or not isinstance(told.get("model_type"), str):
        raise ModelError(f"{text}: its configuration of transformers is damaged", tip="copy the file again")
    _check_setting(told, text, "config", 6)
    return dict(told)


def _check_setting(value: Any, text: str, place: str, deep: int) -> None:
    if isinstance(value, Mapping) and deep > 0:
        for key, inner in value.items():
            if not isinstance(key, str) or (FETCHES.fullmatch(key) and not _is_number(inner)):
                _refuse_setting(text, f"{place}.{key}")
            _check_setting(inner, text, f"{place}.{key}", deep - 1)
    elif isinstance(value, list) and deep > 0:
        for inner in value:
            _check_setting(inner, text, place, deep - 1)
    elif isinstance(value, str):
        if len(value) > 256 or "/" in value or "\\" in value:
            _refuse_setting(text, place)
    elif isinstance(value, bool) or value is None or isinstance(value, float):
        return
    elif isinstance(value, int):
        name = place.rpartition(".")[2]
        most = MANY_MODULES if COUNTS.search(name) and not name.endswith(("_size", "_dim")) else 2**31
        if abs(value) > most:
            _refuse_setting(text, place)
    else:
        _refuse_setting(text, place)


def _is_number(value: Any) -> bool:
    """A size, or a list of them, or nothing: a convolution has a kernel too, and a model inside another one no name."""
    if isinstance(value, list):
        return all(map(_is_number, value))
    return value in (None, False, "") or (isinstance(value, int | float) and value is not True)


def _refuse_setting(text: str, place: str) -> None:
    raise ModelError(
        f"{text}: its configuration of transformers has a {place[:100]} that is not believed: it could name a file, a download "
        "or code, or asks for more than any network has",
        tip="if you trust it, give the folder that save_pretrained wrote: hf:FOLDER, with the weights behind '@'",
    )

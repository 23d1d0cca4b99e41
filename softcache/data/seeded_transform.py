"""Seeded replay: any image transform as a view step, with every global generator seeded before each call.

Weaker than a derived step: what the transform makes of its random numbers is its own affair, so another version of it, of
torch or of NumPy may render other pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.data.images import describe, to_tensor
from softcache.data.philox import Draws, step_key
from softcache.errors import ConfigError, DataError, faults_explained, place_of
from softcache.spec import Spec, call_factory, load_factory, parse_spec


def seeded(image: Tensor, draws: Draws, *, transform: str) -> Tensor:
    """What a user's transform makes of the image, with Python's, NumPy's and torch's generators seeded from the draws.

    Args:
        image: uint8 (C, H, W); the transform gets a copy of its own.
        draws: three words are used, one for each generator.
        transform: `package.module:factory?arg=1` or `path/file.py:factory`; the factory gives a callable image -> image.

    Raises:
        ConfigError: the factory is not there, or does not give a callable.
        DataError: the transform fails, or gives something else than a uint8 image.
    """
    change = _open(transform)
    try:
        with seeded_generators(draws):
            made = change(image.clone(memory_format=torch.contiguous_format))
    except Exception as exc:
        raise DataError(
            f"{transform!r} failed on {describe(image)}: {type(exc).__name__}: {exc} ({place_of(exc)})",
            tip="it is called with a uint8 tensor C x H x W, and must take every image of the data set",
        ) from exc
    return _as_image(made, transform)


@contextmanager
def seeded_generators(draws: Draws) -> Iterator[None]:
    """Inside, the global CPU generators of random, NumPy and torch start from three words; afterwards they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(draws.word())
        word = draws.word()
        np.random.seed([word & 0xFFFFFFFF, word >> 32])
        torch.default_generator.manual_seed(draws.word())  # torch.manual_seed would reach for every GPU as well
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@lru_cache(maxsize=64)
def _open(transform: str) -> Callable[[Tensor], Any]:
    """The callable behind a spec, made once in each process; with fixed seeds, so that every process makes the same one."""
    spec = parse_spec(transform)
    _check_file(spec)
    with seeded_generators(Draws(0, step_key(transform, 0), 0, 0)):
        factory = load_factory(spec)
        with faults_explained(ConfigError, f"the transform {transform!r}"):
            made = call_factory(factory, spec.parameters, spec.text)
    if not callable(made):
        raise ConfigError(
            f"{transform!r} gave {type(made).__name__}, which cannot be called",
            tip="a factory takes the parameters of the spec and gives a function image -> image",
        )
    return made


def _check_file(spec: Spec) -> None:
    path = Path(spec.scheme)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(
            f"the views are rendered by {spec.text!r}, and there is no file {path.absolute()}",
            tip="start from the folder the dump was started from, or put the file there",
        )


def _as_image(made: Any, transform: str) -> Tensor:
    try:
        return to_tensor(made).as_subclass(Tensor)
    except DataError:
        raise DataError(
            f"{transform!r} gave {describe(made)}; a view is a uint8 image (tensor C x H x W, array H x W x C, or PIL)",
            tip="leave scaling to floats and normalising out of it: they belong to the model",
        ) from None

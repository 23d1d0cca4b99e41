"""What was public in a released version can still be imported, or warns that it will go."""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest

import softcache
from softcache.data.transfer_set import open_transfer_set

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
NAMES = [line for line in (HERE / "public_0_4.txt").read_text().splitlines() if not line.startswith("#")]
GROUPS = sorted({name.rpartition(".")[0] for name in NAMES})


@pytest.fixture(scope="module")
def instances() -> dict[str, Any]:
    """One of each class whose attributes are public, by the class's name."""
    cache = softcache.open(GOLDEN / "v1/features")
    joined = cache.join(open_transfer_set(f"{GOLDEN / 'pieces.py'}:images"))
    return {
        "softcache.Cache": cache,
        "softcache.Joined": joined,
        "softcache.Targets": joined.gather_samples([0], [0]),  # type: ignore[arg-type]
    }


def found(name: str) -> Any:
    """A module, or what the longest name of a module before it holds."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            at = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            at = getattr(at, part)
        return at
    raise AttributeError(name)


@pytest.mark.parametrize("group", GROUPS)
def test_what_was_public_is_there(group: str, instances: dict[str, Any]) -> None:
    missing = []
    for name in (name for name in NAMES if name.rpartition(".")[0] == group):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # for one version an old name may warn
            try:
                getattr(instances[group], name.rpartition(".")[2]) if group in instances else found(name)
            except AttributeError:
                missing.append(name)
    assert missing == []


def test_the_list_holds_every_kind_of_name() -> None:
    assert len(NAMES) == len(set(NAMES)) > 250
    errors = {name for name in NAMES if name.startswith("softcache.errors.")}
    assert all(issubclass(found(name), softcache.errors.SoftcacheError) for name in errors) and len(errors) == 25
    assert inspect.isfunction(found("softcache.dump.run")) and inspect.isfunction(found("softcache.train.run"))
    with pytest.raises(AttributeError):
        found("softcache.Cash")

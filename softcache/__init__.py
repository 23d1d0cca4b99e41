"""softcache: run the teacher once, train any number of students from its stored logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softcache.version import __version__

__all__ = ["Cache", "Joined", "Targets", "__version__", "open"]

if TYPE_CHECKING:
    from softcache.targets import Cache, Joined, Targets, open


def __getattr__(name: str) -> Any:
    # loaded on first use, so that `softcache --help` does not import torch
    if name in __all__:
        from softcache import targets

        return getattr(targets, name)
    raise AttributeError(f"module 'softcache' has no attribute {name!r}")

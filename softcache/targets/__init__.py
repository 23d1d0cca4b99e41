"""Reading a cache: open, join with a data set, gather, decode, combine. What training loops use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Cache", "Joined", "Targets", "open"]

if TYPE_CHECKING:
    from softcache.targets.batch import Targets
    from softcache.targets.cache import Cache, Joined, open


def __getattr__(name: str) -> Any:
    if name in __all__:
        from softcache.targets import cache

        return getattr(cache, name)
    raise AttributeError(f"module 'softcache.targets' has no attribute {name!r}")

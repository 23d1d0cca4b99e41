"""The teacher, once: teachers x views x transfer set -> cache. Begin with flow.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["DumpResult", "run"]

if TYPE_CHECKING:
    from softcache.dump.flow import DumpResult, run


def __getattr__(name: str) -> Any:
    if name in __all__:
        from softcache.dump import flow

        return getattr(flow, name)
    raise AttributeError(f"module 'softcache.dump' has no attribute {name!r}")

"""Any number of students: cache + transfer set -> student. Begin with flow.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["TrainResult", "run"]

if TYPE_CHECKING:
    from softcache.train.flow import TrainResult, run


def __getattr__(name: str) -> Any:
    if name in __all__:
        from softcache.train import flow

        return getattr(flow, name)
    raise AttributeError(f"module 'softcache.train' has no attribute {name!r}")

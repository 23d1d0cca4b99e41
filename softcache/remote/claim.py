"""Whose a place is while somebody pushes to it: the file `push.json` there says which cache is not whole yet."""

from __future__ import annotations

import json
from collections.abc import Sequence

from softcache.errors import RemoteError

PUSHING = "push.json"  # gone once all is there


def refuse_others(url: str, there: Sequence[str], started: bytes | None, id: str) -> None:
    """RemoteError where files lie in a place that are no cache's, or of another cache that is not finished.

    Args:
        there: names of files of a place without a manifest.
        started: what its push.json holds; None: it has none.
    """
    if not there:
        return
    try:
        begun = json.loads(started or b"")["id"]
    except (ValueError, KeyError, TypeError):
        raise RemoteError(
            f"{url}: is not empty, and holds no whole cache ({', '.join(sorted(there)[:3])})",
            tip="push to an empty place",
        ) from None
    if begun != id:
        raise RemoteError(
            f"{url}: a push of another cache (id {str(begun)[:12]}...) is not finished there",
            tip="finish it, or push to another place; this one may be deleted",
        )

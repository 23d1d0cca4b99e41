"""What softcache remembers on this machine, outside of every cache: small JSON files below SOFTCACHE_HOME. All may be deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: whoever comes at the same time does the same work
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 1 << 26

_HELD: set[int] = set()


def home() -> Path:
    """`$SOFTCACHE_HOME`, else `softcache` in `$XDG_CACHE_HOME`, else `~/.cache/softcache`."""
    named = os.environ.get("SOFTCACHE_HOME")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "softcache")


def recall(name: str) -> dict[str, Any]:
    """What was remembered under a name; nothing where that is not there, or is damaged."""
    try:
        fd = os.open(home() / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            found = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(name: str, what: dict[str, Any]) -> bool:
    """Keep it under a name for later processes; False where this machine's home cannot be written.

    Nothing here is worth an fsync: what is lost is found again.
    """
    path = home() / name
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        make_private(path.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(what, file, separators=(",", ":"))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def make_private(folder: Path) -> None:
    """Make a folder and its parents: `mkdir` gives its mode to the last of them alone."""
    for one in (*reversed(folder.parents), folder):
        one.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Wait for whoever on this host does the same work; where nothing can be locked, nobody is waited for."""
    path = home() / f"{name}.lock"
    fd = None
    with suppress(OSError):
        make_private(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _HELD.add(fd)
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fd is not None:
            _HELD.discard(fd)
            os.close(fd)


def _forget_in_child() -> None:
    # a forked worker would hold its parent's lock for as long as it lives
    for fd in _HELD:
        os.close(fd)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

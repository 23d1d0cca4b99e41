"""softcache store: flags, examples and printing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option
from softcache.errors import ConfigError
from softcache.spec import split_list

UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20, "TB": 10**12, "TiB": 2**40}


@dataclass(frozen=True)
class StoreConfig:
    """softcache store: what this machine keeps of caches that were opened by a URL."""

    action: str = option(
        "list",
        "list: show it; prune: remove what nobody has open",
        choices=("list", "prune"),
        metavar="ACTION",
        positional=True,
    )
    ids: str | None = option(
        None, "of prune: only caches whose ids begin so: a,b (default: all)", metavar="IDS", positional=True
    )
    keep: str | None = option(None, "of prune: what was opened last, up to this size: 20GB, or 512MiB", metavar="SIZE")
    older: float | None = option(None, "of prune: only what was not opened for so many days", metavar="DAYS")


def run(config: StoreConfig, output: Output) -> int:
    given = {"IDS": config.ids, "--keep": config.keep, "--older": config.older}
    named = [name for name, value in given.items() if value is not None]
    if config.action == "list":
        if named:
            raise ConfigError(f"{named[0]} belongs to `softcache store prune`", tip="`softcache store list` shows all")
        return _list(output)
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} cannot be given together", tip="give one of them")
    if config.older is not None and not config.older >= 0:
        raise ConfigError(f"--older {config.older}: is no number of days", tip="give 0 or more")
    return _prune(config, output)


def _list(output: Output) -> int:
    from softcache.remote import prune
    from softcache.remote.store import shared_store
    from softcache.report.tables import size, table

    store = shared_store()
    found = prune.listed(store)
    if output.json:
        about = [
            {"id": one.id, "url": one.url, "bytes_here": one.bytes_here, "bytes": one.nbytes, "opened": one.opened,
             "in_use": one.in_use} for one in found
        ]  # fmt: skip
        print(json.dumps({"path": str(store.root), "caches": about}))
        return 0
    if not found:
        print(f"{store.root}: nothing is kept")
        return 0
    rows = [
        [
            one.id[:16],
            one.url or "?",
            size(one.bytes_here),
            size(one.nbytes),
            _when(one.opened),
            "yes" if one.in_use else "no",
        ]
        for one in found
    ]
    print(table(["id", "url", "here", "of", "last opened", "in use"], rows))
    print(f"{store.root}: {size(prune.bytes_of(store))}; at most {prune.limit_gib():g} GiB are kept ({prune.LIMIT})")
    return 0


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "?"


def _prune(config: StoreConfig, output: Output) -> int:
    from softcache.remote import prune
    from softcache.remote.store import shared_store
    from softcache.report.tables import size

    store = shared_store()
    keep = None if config.keep is None else bytes_of(config.keep)
    chosen = prune.chosen_by(store, ids=split_list(config.ids or ""), keep=keep, older=config.older)
    gone, freed = prune.prune(store, chosen)
    if output.json:
        print(json.dumps({"path": str(store.root), "removed": [one.id for one in gone], "bytes": freed}))
        return 0
    for one in gone:
        print(f"removed {one.id[:16]} {one.url}")
    print(f"{store.root}: {size(freed)} freed")
    return 0


def bytes_of(text: str) -> int:
    """Of `20GB`, `512MiB`, or plain bytes."""
    number, factor = text, 1
    for unit, size in UNITS.items():
        if text.endswith(unit):
            number, factor = text.removesuffix(unit), size
    try:
        found = float(number) * factor
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise ConfigError(f"--keep {text}: is no size", tip=f"write a number and a unit of {', '.join(UNITS)}: 20GB")
    return int(found)


VERB = Verb(
    config=StoreConfig,
    run=run,
    summary="list or remove what is kept of caches that were opened by a URL",
    examples="""
softcache store list
softcache store prune --older 30
softcache store prune --keep 20GB --json
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

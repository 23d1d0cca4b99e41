"""What lies beside a manifest to be looked at: the card, croissant.json, a preview. None of it is covered by the id."""

from __future__ import annotations

from pathlib import Path

from softcache.cache.card import card
from softcache.cache.card.croissant import croissant
from softcache.cache.manifest import Manifest
from softcache.cache.schema import CARD
from softcache.files.inside import read_inside

CROISSANT = "croissant.json"
MAX_SHOWN = 2**24  # bytes of each; croissant.json has most where a cache has very many files
PICTURES = 2


def preview_path(id: str) -> str:
    """Of the table of some samples. It has the id in its name: an extended cache has another one."""
    return f"preview/{id[:16]}.parquet"


def picture_paths(id: str) -> list[str]:
    """Of the pictures of samples, where there are any."""
    return [f"preview/{id[:16]}-{number}.png" for number in range(PICTURES)]


def shown_files(path: Path, manifest: Manifest) -> dict[str, bytes]:
    """path -> bytes of what is to be shown beside a manifest.

    The card that lies in the cache, as long as it names this id, with the preview and the pictures that it names; else one that
    is made of the manifest alone.
    """
    own = _card_there(path, manifest.id)
    if own is not None:
        text = own.decode("utf-8", "replace")
        named = [name for name in (preview_path(manifest.id), *picture_paths(manifest.id)) if name in text]
        try:
            files = {name: read_inside(path, name, MAX_SHOWN) for name in named}
        except FileNotFoundError:
            own = None
        else:
            preview = files.get(preview_path(manifest.id))
            about = None if preview is None else (preview_path(manifest.id), preview)
            return {**files, CROISSANT: croissant(manifest, about), CARD: own}
    return {CROISSANT: croissant(manifest), CARD: card(manifest).encode("utf-8")}


def _card_there(path: Path, id: str) -> bytes | None:
    try:
        data = read_inside(path, CARD, MAX_SHOWN)
    except FileNotFoundError:
        return None
    return data if f"`{id}`".encode() in data else None

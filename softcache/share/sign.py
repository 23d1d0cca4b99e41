"""softcache sign: a signature of a cache's id, beside its manifest."""

from __future__ import annotations

from pathlib import Path

from softcache.cache.manifest import read_manifest
from softcache.cache.signatures import merged, read_signatures, sign_id, signatures_path
from softcache.errors import ConfigError
from softcache.files import durable


def run(cache: Path, key_file: Path, *, id: str | None = None) -> tuple[str, str]:
    """Sign a cache; signatures that are there stay, and the same is not written twice.

    Args:
        key_file: see `sign_id`.
        id: of an older state of it.

    Returns:
        its id, and the fingerprint of the key.
    """
    manifest = read_manifest(cache, id=id)
    armoured, fingerprint = sign_id(manifest.id, key_file)
    there, new = read_signatures(cache, manifest.id), armoured.encode("ascii")
    both = merged(there, new)
    if new not in both:
        raise ConfigError(f"{cache / signatures_path(manifest.id)}: has as many signatures as are read")
    if both != there:
        durable.require_room(cache, len(both), "the signatures need")
        durable.write_whole(cache / signatures_path(manifest.id), both)
    return manifest.id, fingerprint

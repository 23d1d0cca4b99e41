"""softcache card: the card of a cache, with a preview of its samples that a hub shows. Read it top to bottom.

Nothing of it is covered by the cache's id: it may be made again, changed by hand, or deleted. `push` sends it, `pull` leaves it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from softcache.cache.card import card
from softcache.cache.card.beside import CROISSANT, picture_paths, preview_path
from softcache.cache.card.croissant import croissant
from softcache.cache.card.preview_columns import preview_columns
from softcache.cache.schema import CARD
from softcache.errors import ConfigError
from softcache.files import durable
from softcache.files.inside import refuse_linked_folders
from softcache.share.preview import pictures_of, preview_cells, to_parquet
from softcache.targets.cache import open as open_cache

LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
OURS = re.compile(r"[0-9a-f]{16}(-[0-9])?\.(parquet|png)")  # in the folder preview/


@dataclass(frozen=True)
class Shown:
    """What was made.

    Attributes:
        id: of the cache.
        files: paths in it, the card last.
        rows: samples in the preview; None without one.
    """

    id: str
    files: Sequence[str]
    rows: int | None


def run(
    path: Path,
    *,
    languages: Sequence[str] = (),
    pictures: str | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
    quiet: bool = False,
) -> Shown:
    """Write the card of a cache, what it shows, and croissant.json.

    Args:
        languages: of the samples, as ISO 639 calls them.
        pictures: a transfer set, two of whose pictures are shown; None: nothing of any sample is.
        left_out: member -> what it does not read of its texts, in words.

    Returns:
        what was made: without pyarrow no preview.

    Raises:
        ConfigError: a language that is none.
        DataError, ContentMismatchError: see `pictures_of`.
    """
    for language in languages:
        if not LANGUAGE.fullmatch(language):
            raise ConfigError(
                f"--language {language!r}: is no code of a language", tip="as ISO 639 has it: en, de, pt-BR"
            )
    refuse_linked_folders(path)
    cache = open_cache(path, quiet=quiet)
    manifest, id = cache.manifest, cache.id
    files: dict[str, bytes] = {}
    rows, preview = None, None
    if importlib.util.find_spec("pyarrow") is not None:
        cells = preview_cells(cache)
        rows, preview = len(cells["sample"]), preview_path(id)
        files[preview] = to_parquet(preview_columns(manifest.plan), cells)
    captions = {}
    if pictures is not None:
        for name, (data, caption) in zip(picture_paths(id), pictures_of(cache, pictures), strict=False):
            files[name], captions[name] = data, caption
    files[CROISSANT] = croissant(manifest, None if preview is None else (preview, files[preview]))
    page = card(manifest, left_out, languages=languages, preview=preview, pictures=captions)
    files[CARD] = page.encode("utf-8")
    durable.require_room(path, sum(map(len, files.values())), "the card and its preview need")
    for name, data in files.items():
        durable.make_folder((path / name).parent)
        durable.write_whole(path / name, data)
    for old in sorted((path / "preview").glob("*")):
        if OURS.fullmatch(old.name) and f"preview/{old.name}" not in files:
            durable.remove(old)
    return Shown(id, tuple(files), rows)

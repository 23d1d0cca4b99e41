"""softcache pull of a part: what `subset` would write of that cache, in bytes and id. Read it top to bottom.

Only the blocks are fetched that hold what is wanted, into a store of its own beside the new folder, from which the part is cut.
A block is compared with its checksum, and the checksums with the manifest: that finds accidents, and no forger. Where somebody is
to have signed the cache, whole files are fetched and hashed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softcache.cache.file_lists import ListedFiles
from softcache.cache.manifest import Manifest
from softcache.cache.reader import CacheReader
from softcache.cache.schema import MANIFEST
from softcache.cache.signatures import allowed_signers_of
from softcache.cache.write.writer import refuse_foreign_folder
from softcache.remote.fetch import signatures_there
from softcache.remote.named import read_named
from softcache.remote.opened import enter, id_of
from softcache.remote.places import Place
from softcache.remote.reach import open_transport
from softcache.remote.source import RECORDS, StoreSource
from softcache.remote.store import Store
from softcache.share.subset import Choice, begun_with, cut
from softcache.targets.cache import Cache


@dataclass(frozen=True)
class PulledPart:
    """A part, and what was fetched for it.

    Attributes:
        manifest: of the part.
        parent: id of the cache that it is of.
        records: bytes of records that were fetched.
        others: bytes of what stands once: manifest, lists, checksums, samples.h5, probe, constants, indexes.
        names: who has signed the parent, where that was asked.
    """

    manifest: Manifest
    parent: str
    records: int
    others: int
    names: tuple[str, ...]


def run(place: Place, out: Path, choice: Choice, *, signed_by: Path | None = None, quiet: bool = False) -> PulledPart:
    """The chosen part of a cache in the folder `out`; one that was interrupted is gone on with.

    Args:
        signed_by: a list of signers, of whom one must have signed the whole cache.

    Raises:
        RemoteError: it cannot be had, or is not what its id says.
        SignatureError: nobody of the list has signed it.
        SoftcacheError: as `subset.run`.
    """
    refuse_foreign_folder(out)
    store = Store(out.parent / f".{out.name}.pulling")
    place = replace(place, id=place.id or begun_with(str(place), out))
    names: Sequence[str] = ()
    if signed_by is not None:
        transport = open_transport(place)
        id = id_of(read_named(transport, place))
        names = allowed_signers_of(signatures_there(transport, id), id, signed_by)
        place = replace(place, id=id)
    folder, place = enter(place, store, quiet=quiet)
    source = StoreSource(store, place, sparing=True, whole=signed_by is not None, quiet=quiet)
    cache = Cache(CacheReader(folder, id=place.id, source=source))
    manifest = cut(cache, str(place), out, choice, quiet=quiet)
    others = Counter(source.fetched)
    records = others.pop(RECORDS, 0)
    listed = cache.manifest.files.lists if isinstance(cache.manifest.files, ListedFiles) else ()
    about = (folder / MANIFEST).stat().st_size + sum(one.nbytes for one in listed)
    cache.reader.close()
    store.remove_all()
    return PulledPart(manifest, cache.id, records, others.total() + about, tuple(names))

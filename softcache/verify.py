"""softcache verify: is this cache whole? Quick: names and sizes. Full: hashes, block checksums and HDF5 structure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.reader import MappedFile, open_checked
from softcache.cache.schema import MANIFEST, MANIFESTS, member_shard_path, view_shard_path
from softcache.cache.shard import StoredFile, bad_blocks, sha256_of, structure_faults
from softcache.errors import DamagedCacheError, DriftError, SoftcacheError, UnfinishedCacheError

WHOLE, DAMAGED, UNFINISHED = 0, 1, 3


@dataclass
class Verdict:
    """What a check found.

    Attributes:
        state: "whole", "damaged" or "unfinished".
        faults: one sentence each, naming file, data set and block.
        notes: what else there is to say of a whole cache.
    """

    path: str
    state: str
    faults: list[str] = field(default_factory=list)
    files: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    id: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"whole": WHOLE, "damaged": DAMAGED, "unfinished": UNFINISHED}[self.state]

    def text(self) -> str:
        if self.state == "whole":
            head = f"{self.path}: whole; {self.files} files, {self.nbytes / 1e6:,.1f} MB in {self.seconds:.2f} s, id {self.id}"
            return "\n".join([head, *(f"  {note}" for note in self.notes)])
        head = f"{self.path}: {self.state}"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])


def run(path: Path, *, full: bool, quiet: bool = False, replay: int = 0, data: str | None = None) -> Verdict:
    """Check a cache. A folder that is no cache at all raises CacheError; damage is a verdict, not an exception.

    Args:
        full: hashes, checksums and structure too.
        replay: how many records to render again; their pixels must be what the teacher saw.
        data: the transfer set for that; None: the one the dump was given.
    """
    started = time.monotonic()
    try:
        manifest = read_manifest(path)
    except UnfinishedCacheError as exc:
        return Verdict(str(path), "unfinished", [exc.message])
    except DamagedCacheError as exc:
        return Verdict(str(path), "damaged", [exc.message])
    faults = list(_manifest_faults(path, manifest))
    for file in tqdm(manifest.files, desc="verify", unit="file", disable=quiet or None, leave=False):
        faults += _file_faults(path, file, full=full)
    notes: list[str] = []
    if replay and not faults:
        # imported here: only a replay needs torch and the data set
        from softcache.replay import Replay

        try:
            notes.append(Replay(path, data).check(replay))
        except DriftError as exc:
            faults.append(f"replay: {exc.message}; {exc.tip}")
    return Verdict(
        str(path),
        "damaged" if faults else "whole",
        faults,
        len(manifest.files),
        manifest.nbytes,
        time.monotonic() - started,
        manifest.id,
        notes,
    )


def _manifest_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """The manifest against its own immutable copy, and against what its layout asks for."""
    copy = path / MANIFESTS / f"{manifest.id}.json"
    if not copy.is_file():
        yield f"{MANIFEST}: has sha256 {manifest.id}, but manifests/{manifest.id}.json is not there"
    elif copy.read_bytes() != (path / MANIFEST).read_bytes():
        yield f"{MANIFEST}: differs from manifests/{manifest.id}.json"
    plan = manifest.plan
    for kind, member in [("views", None), *(("member", m.name) for m in plan.members)]:
        layouts = plan.layouts_of(member)
        found = sorted((f.path, f.rows, f.views) for f in manifest.files_of(kind, member))
        wanted = sorted(
            (
                member_shard_path(member, s.index) if member else view_shard_path(s.index),
                (s.row_start, s.row_stop),
                (s.view_start, s.view_stop),
            )
            for layout in layouts
            for s in layout.spans()
        )
        ends = [(layout.first_view, layout.first_view + layout.num_views) for layout in layouts]
        starts = [0, *(stop for _, stop in ends)]
        if found != wanted or [start for start, _ in ends] != starts[:-1] or starts[-1] != plan.views.count:
            yield f"{MANIFEST}: the {kind} shards of {member or 'the views'} do not cover rows and views once each"


def _file_faults(root: Path, file: StoredFile, *, full: bool) -> list[str]:
    try:
        if not full:
            import os

            os.close(open_checked(root / file.path, file))
            return []
        MappedFile(root, file)
    except SoftcacheError as exc:
        return [exc.message]
    path = root / file.path
    faults = [
        f"{file.path}: data set {name!r}, block {block}: checksum differs" for name, block in bad_blocks(path, file)
    ]
    digest = sha256_of(path)
    if digest != file.sha256:
        return [*faults, f"{file.path}: sha256 is {digest}, the manifest says {file.sha256}"]
    return faults + [f"{file.path}: {fault}" for fault in structure_faults(path, file)]

"""The files of a cache that lies somewhere else, fetched into a store as they are read: by whole files, or by blocks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from softcache.cache.checksums import digest_of_sums, read_sums
from softcache.cache.file_entry import StoredFile
from softcache.cache.schema import BLOCK_BYTES
from softcache.cache.source import Touched
from softcache.errors import DamagedCacheError, RemoteError
from softcache.files import durable
from softcache.files.inside import open_inside
from softcache.remote.fetch import PARTIAL, Wanted, fetch
from softcache.remote.holed import first_marks, has_holes, holed_name, make_holed, read_marks, write_blocks
from softcache.remote.places import Place
from softcache.remote.ranges import Run, read_blocks, read_checksums, runs_of
from softcache.remote.reach import open_transport
from softcache.remote.store import Store
from softcache.remote.transport import NoRangesError, Transport
from softcache.remote.work import Work
from softcache.report.progress import Meter

CHUNK_BLOCKS = 16  # 1 MiB: so much is fetched around a block that is touched
AT_ONCE_FILES = 128  # that are changed at once

RECORDS, CHECKSUMS, SETUP = "records", "checksums", "setup"  # what fetched bytes are counted as


class StoreSource:
    """A `Source` over a store.

    Args:
        place: with the whole id.
        sparing: fetch only what is asked for.
        whole: fetch whole files only, each of which is hashed.
        quiet: no progress.

    Attributes:
        fetched: what -> bytes that this process has fetched.
    """

    def __init__(
        self, store: Store, place: Place, *, sparing: bool = False, whole: bool = False, quiet: bool = True
    ) -> None:
        assert place.id is not None
        self.store, self.place, self.sparing, self.whole, self.quiet = store, place, sparing, whole, quiet
        self.where = str(place)
        self.fetched: Counter[str] = Counter()
        self._marks: dict[str, tuple[dict[str, int], bytearray] | None] = {}  # by path; None: it is whole
        self._lock = Lock()
        self._transport: tuple[int, Transport | None] = 0, None
        store.hold(place.id)

    def __getstate__(self) -> dict[str, Any]:
        how = {"sparing": self.sparing, "whole": self.whole, "quiet": self.quiet}
        return {"store": self.store, "place": self.place, **how}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("store"), state.pop("place"), **state)  # type: ignore[misc]

    def prepare(self, files: Sequence[StoredFile]) -> None:
        new = [file for file in files if file.path not in self._marks and not self._found(file)]
        for group in _groups(sorted(new, key=lambda file: file.sha256)):
            with self.store.changing(file.sha256 for file in group):
                missing = [file for file in group if not self._found(file)]
                if missing:
                    self._begin(missing)
                    for file in missing:
                        self._found(file)

    def _found(self, file: StoredFile) -> bool:
        """Whether it is there, whole or with holes; its marks are read then."""
        if self.store.path_of(file.sha256).is_file():
            self._marks[file.path] = None
        elif self._has_holes(file) and (path := self.store.path_of(holed_name(file))).is_file():
            self._marks[file.path] = first_marks(file)[0], read_marks(path, file)
        else:
            return False
        return True

    def _has_holes(self, file: StoredFile) -> bool:
        return has_holes(file) and not self.whole

    def _begin(self, files: Sequence[StoredFile]) -> None:
        """Fetch files that are wanted whole, and of others what is needed before the first block."""
        nbytes = sum(file.nbytes for file in files if not self._has_holes(file))
        durable.require_room(self.store.root, nbytes, "what is to be fetched needs")
        with Meter(f"fetch {self.place}", nbytes, unit="B", quiet=self.quiet) as meter:
            work = Work()
            work.over(files, lambda file: self._begin_one(file, work, meter.add))

    def _begin_one(self, file: StoredFile, work: Work, note: Callable[[int], None]) -> None:
        if self._has_holes(file):
            try:
                sums = read_checksums(self.transport, file, work.part(self._counting(CHECKSUMS)))
                make_holed(self.store.path_of(holed_name(file)), file, sums)
                return
            except NoRangesError:  # this server has whole files only
                durable.require_room(self.store.root, file.nbytes, "what is to be fetched needs")
        count = self._counting(RECORDS if file.kind in ("member", "views", "dense") else SETUP)

        def done(nbytes: int) -> None:
            count(nbytes)
            with self._lock:
                note(nbytes)

        target = self.store.path_of(file.sha256)
        there = target.with_name(target.name + PARTIAL)
        before = there.stat().st_size if there.is_file() else 0
        count(-before)
        fetch(self.transport, Wanted(file.path, file.nbytes, file.sha256), target, work.part(done))

    def open(self, file: StoredFile) -> int:
        if file.path not in self._marks:
            self.prepare([file])
        holed = self._marks[file.path] is not None
        path = self.store.path_of(holed_name(file) if holed else file.sha256)
        fd = open_inside(path.parent, path.name)
        right = os.fstat(fd).st_size == file.nbytes
        if right and holed:
            right = digest_of_sums(fd, file) == file.checksums
        if not right:
            os.close(fd)
            raise DamagedCacheError(
                f"{path}: is not what was fetched of {self.where}: {file.path}",
                tip="empty the store when nobody reads from it: softcache store prune",
            )
        return fd

    def need(self, touched: Sequence[Touched]) -> None:
        self.prepare([one.file for one in touched if one.file.path not in self._marks])
        lacking: dict[str, tuple[StoredFile, dict[str, set[int]]]] = {}
        for file, name, blocks in touched:
            found = self._marks[file.path]
            if found is None:
                continue
            first, marks = found[0][name], found[1]
            new = [block for block in blocks if not marks[first + block]]
            if new:
                lacking.setdefault(file.path, (file, {}))[1].setdefault(name, set()).update(new)
        for group in _groups(sorted(lacking.values(), key=lambda one: one[0].sha256)):
            with self.store.changing(file.sha256 for file, _ in group):
                runs = [run for file, names in group for run in self._runs(file, names)]
                durable.require_room(self.store.root, sum(run.nbytes for run in runs), "what is to be fetched needs")
                work = Work(self._counting(RECORDS))
                work.over(runs, lambda run: self._fetch(run, work))  # noqa: B023
                for file, _ in group:
                    self._found(file)

    def _runs(self, file: StoredFile, names: dict[str, set[int]]) -> Iterator[Run]:
        """What is still to be fetched, after another process may have done so: these blocks, and those around them."""
        starts, marks = first_marks(file)[0], read_marks(self.store.path_of(holed_name(file)), file)
        for name, blocks in names.items():
            first, count = starts[name], -(-file.arrays[name].nbytes // BLOCK_BYTES)
            if not self.sparing:
                chunks = {block // CHUNK_BLOCKS * CHUNK_BLOCKS for block in blocks if not marks[first + block]}
                blocks = {block for chunk in chunks for block in range(chunk, min(chunk + CHUNK_BLOCKS, count))}
            yield from runs_of(file, name, sorted(block for block in blocks if not marks[first + block]))

    def _fetch(self, run: Run, work: Work) -> None:
        path = self.store.path_of(holed_name(run.file))
        fd = open_inside(path.parent, path.name)
        try:
            sums: np.ndarray = read_sums(fd, run.file, run.name)
        finally:
            os.close(fd)
        try:
            data = read_blocks(self.transport, run, sums, work)
        except NoRangesError:
            raise RemoteError(
                f"{self.place.url}/{run.file.path}: this server has begun to send whole files only",
                tip="fetch all of it: softcache pull URL FOLDER",
            ) from None
        write_blocks(path, run.file, run.name, run.first, bytes(data))

    def again(self, file: StoredFile, name: str, block: int) -> bool:
        with self.store.changing([file.sha256]):
            if self._marks[file.path] is not None:
                self._fetch(Run(file, name, block, block + 1), Work(self._counting(RECORDS)))
                return True
            durable.remove(self.store.path_of(file.sha256))
            return False

    def _counting(self, what: str) -> Callable[[int], None]:
        def note(nbytes: int) -> None:
            with self._lock:
                self.fetched[what] += nbytes

        return note

    @property
    def transport(self) -> Transport:
        """Of this process: a forked one has its own."""
        pid, found = self._transport
        if found is None or pid != os.getpid():
            found = open_transport(self.place)
            self._transport = os.getpid(), found
        return found


Item = TypeVar("Item")


def _groups(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """So many as are changed at once."""
    return (items[start : start + AT_ONCE_FILES] for start in range(0, len(items), AT_ONCE_FILES))

"""Is this the file that the manifest names? It is hashed before its first number is used, and what was found is remembered.

Of version 2 only the checksums that lie in it are hashed, which takes no time: they say the same of every block that is read.

Names, sizes and the checksums of blocks cannot tell a file from one of the same layout that another teacher, another transfer
set or another dump gave: each of them is right in itself. The sha256 in the manifest can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from softcache.cache.checksums import BadBlock, bad_blocks, damage_of, digest_of_sums, sha256_of
from softcache.cache.file_entry import StoredFile
from softcache.cache.file_lists import ListedFiles
from softcache.cache.open_file import COPY_AGAIN, open_checked
from softcache.cache.schema import CRC_SUFFIX
from softcache.cache.source import Source
from softcache.errors import DamagedCacheError, warn_once
from softcache.files import home

Facts = tuple[int, int, int, int, int]  # device, inode, size, mtime_ns and ctime_ns: who writes a file changes them

# a file system's clock may tick as slowly as this: a file that was written within a tick could be written once more
SETTLED_NS = 2 * 10**9


def binding_digest(fd: int, file: StoredFile, stop: Callable[[], bool] = lambda: False) -> str:
    """What binds an open file to its entry: the sha256 of all of its bytes; of version 2 that of its checksums."""
    return sha256_of(fd, stop=stop) if file.checksums is None else digest_of_sums(fd, file)


def facts_of(file: int | str) -> Facts:
    """Of an open file, or of whatever lies at a path: that is to be looked at again when it is opened."""
    found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class BoundFiles:
    """The files of one manifest. `open` gives a descriptor of the very file that the manifest names, or refuses.

    Args:
        root: the folder of the cache.
        files: what the manifest says of them.
        check: False takes whatever has the right name and size.
        known: facts -> sha256 of files that were hashed already: a process hands them to its workers.
        source: fetches the files, which do not lie in `root`, and sees to it that they are the manifest's.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[StoredFile],
        *,
        check: bool = True,
        known: Mapping[Facts, str] | None = None,
        source: Source | None = None,
    ) -> None:
        self.root, self.files, self.check, self.source = root, files, check, source
        self._known: dict[Facts, str] = dict(known or {})
        self._recalled = False

    @property
    def known(self) -> dict[Facts, str]:
        """Facts -> sha256 of the files that are known to be the manifest's."""
        if not self._hashes_whole_files:
            return dict(self._known)  # no list is read for it
        wanted = {file.sha256 for file in self.files}
        return {facts: digest for facts, digest in self._known.items() if digest in wanted}

    @property
    def _hashes_whole_files(self) -> bool:
        return not isinstance(self.files, ListedFiles)

    def setup_files(self) -> Iterable[StoredFile]:
        """With all files among them that belong to no part."""
        return self.files.setup() if isinstance(self.files, ListedFiles) else self.files

    def open(self, file: StoredFile) -> int:
        """A read-only descriptor of a file, which is hashed where nobody knows it yet.

        Raises:
            DamagedCacheError: the file is missing, no regular file, of another size, or another file than the manifest names.
            BadBlock: it is that file, damaged; says where.
            RemoteError: it cannot be fetched.
        """
        if self.source is not None:
            return self.source.open(file)
        fd = open_checked(self.root, file)
        try:
            if self.check and not self._is_known(facts_of(fd), file):
                self._refuse_other(fd, file)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def bind_all(self, note: Callable[[int], None] = lambda nbytes: None) -> None:
        """Hash every file that is not known, in threads, and remember it; one process of a host does so, others wait.

        Of version 2 nothing is to be done: a file is bound when it is opened.

        What is wrong with a file is told when it is opened: nobody may need it.

        Args:
            note: is told the bytes of each file that is done.
        """
        if self.source is not None or not self.check or not self._hashes_whole_files or not self._unknown():
            return
        with home.one_at_a_time(self._name()):
            self._recalled = False  # whoever held the lock may have remembered them meanwhile
            unknown = self._unknown()
            done = sum(file.nbytes for file in self.files) - sum(file.nbytes for file in unknown)
            note(done)
            started, found = time.time_ns(), self._hashed(unknown, note)
            self._known |= found
            settled = {facts: digest for facts, digest in found.items() if started - max(facts[3:]) > SETTLED_NS}
            if settled and not self._remember(settled):
                warn_once(
                    f"{home.home()} cannot be written, so the files of a cache are hashed anew by every process that opens it; "
                    "set SOFTCACHE_HOME to a folder that can"
                )

    def _hashed(self, files: Sequence[StoredFile], note: Callable[[int], None]) -> dict[Facts, str]:
        """Facts -> sha256 of each file that did not change while it was read."""
        stopped, found = Event(), {}
        pool = ThreadPoolExecutor(os.cpu_count())  # hashing lets other threads run
        try:
            for file, one in zip(files, pool.map(lambda file: self._hash(file, stopped), files), strict=True):
                note(file.nbytes)
                if one is not None:
                    found[one[0]] = one[1]
        finally:  # after Ctrl-C nobody waits for files of many GB
            stopped.set()
            pool.shutdown(cancel_futures=True)
        return found

    def _hash(self, file: StoredFile, stopped: Event) -> tuple[Facts, str] | None:
        with suppress(DamagedCacheError):  # told when it is opened
            fd = open_checked(self.root, file)
            try:
                facts = facts_of(fd)
                digest = binding_digest(fd, file, stopped.is_set)
                return (facts, digest) if facts == facts_of(fd) and not stopped.is_set() else None
            finally:
                os.close(fd)
        return None

    def _unknown(self) -> list[StoredFile]:
        unknown = []
        for file in self.files:
            with suppress(OSError):  # told when it is opened
                if not self._is_known(facts_of(f"{self.root}/{file.path}"), file):
                    unknown.append(file)
        return unknown

    def _is_known(self, facts: Facts, file: StoredFile) -> bool:
        if facts not in self._known and not self._recalled and self._hashes_whole_files:
            self._recalled = True
            self._known = self._recall() | self._known
        return self._known.get(facts) == file.binding

    def _refuse_other(self, fd: int, file: StoredFile) -> None:
        facts, digest = facts_of(fd), binding_digest(fd, file)
        if digest == file.binding:
            self._known[facts] = digest
            return
        # the checksums of its blocks tell damage from a file that is whole, and another one
        for name in file.arrays:
            for block in () if name.endswith(CRC_SUFFIX) else bad_blocks(fd, file, name):
                raise BadBlock(damage_of(file, name, block))
        raise DamagedCacheError(
            f"{self.root / file.path}: is not the file that the manifest names: its size is right, "
            f"{'its sha256' if file.checksums is None else 'the sha256 of its checksums'} is {digest[:16]}..., not "
            f"{file.binding[:16]}...; what it holds may be of another teacher or of other samples",
            tip=f"{COPY_AGAIN}; --check-files no (in Python check_files=False) reads it as it is",
        )

    def _name(self) -> str:
        """Where this folder's files are remembered: a folder keeps its inode when it is renamed, and when a cache grows."""
        found = os.stat(self.root)
        return f"checked/{found.st_dev:x}-{found.st_ino:x}.json"

    def _recall(self) -> dict[Facts, str]:
        known: dict[Facts, str] = {}
        entries = home.recall(self._name()).get("files")
        for entry in entries if isinstance(entries, list) else ():
            if _is_entry(entry):
                known[tuple(entry[:5])] = entry[5]
        return known

    def _remember(self, found: Mapping[Facts, str]) -> bool:
        """Beside what is remembered of this folder's other files; of a file that was written anew the older facts go."""
        inodes = {facts[:2] for facts in found}
        kept = {facts: digest for facts, digest in self._recall().items() if facts[:2] not in inodes}
        entries = [[*facts, digest] for facts, digest in {**kept, **found}.items()]
        return home.remember(self._name(), {"files": entries})


def _is_entry(entry: Any) -> bool:
    """Whether it is five numbers and a sha256, as `_remember` writes them."""
    return (
        isinstance(entry, list)
        and len(entry) == 6
        and all(type(number) is int for number in entry[:5])
        and isinstance(entry[5], str)
    )

"""The file lists of version 2: what the files of a cache are, in pieces that name them once and for all; read as they are needed.

A manifest of a hundred thousand parts names some lists, and each list some thousands of files. Whoever opens a cache reads the
list of its samples; whoever reads a record reads the list that has its part.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, overload

from softcache.cache.canonical import canonical_json
from softcache.cache.file_entry import MEMBER, SETUP, VIEWS, FileList, StoredFile, part_of
from softcache.cache.manifest_rules import check_listed
from softcache.cache.plan import Plan
from softcache.cache.schema import LIST_BYTES, MAX_LIST_BYTES, list_path, part_path
from softcache.cache.statistics import MemberStatistics
from softcache.cache.strict_json import LISTED, read_shape
from softcache.errors import DamagedCacheError, LinkedCacheError
from softcache.files.inside import read_inside


class ListedFiles(Sequence[StoredFile]):
    """All files of a cache in order, read list by list.

    Raises, whenever a list is read:
        DamagedCacheError: it is not there, is not what the manifest names, or does not describe what the plan asks for.
    """

    def __init__(self, root: Path, plan: Plan, lists: Sequence[FileList]) -> None:
        self.root, self.plan, self.lists = root, plan, lists
        self._read: dict[int, tuple[StoredFile, ...]] = {}
        self._kinds: dict[
            str, Mapping[str, Any]
        ] = {}  # member -> what its data sets are, by the first list that was read
        self._paths: dict[int, dict[str, StoredFile]] = {}
        self._starts: dict[str | None, tuple[list[int], list[int]]] = {}  # member -> (first part, number) of its lists
        for number, one in enumerate(lists):
            if one.of != SETUP:
                starts, numbers = self._starts.setdefault(one.member, ([], []))
                starts.append(one.parts[0])
                numbers.append(number)

    def __len__(self) -> int:
        return sum(one.files for one in self.lists)

    def __iter__(self) -> Iterator[StoredFile]:
        for number in range(len(self.lists)):
            yield from self.read(number)

    @overload
    def __getitem__(self, at: int) -> StoredFile: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[StoredFile]: ...
    def __getitem__(self, at: int | slice) -> StoredFile | Sequence[StoredFile]:
        return tuple(self)[at]

    @property
    def nbytes(self) -> int:
        return sum(one.file_bytes for one in self.lists)

    @property
    def statistics(self) -> Mapping[str, MemberStatistics]:
        """Member -> what was measured over all its records; no list is read for it."""
        sums = {member.name: MemberStatistics() for member in self.plan.members}
        for one in self.lists:
            if one.statistics is not None and one.member is not None:
                sums[one.member] += one.statistics
        return sums

    def faults(self) -> Iterator[tuple[FileList, str]]:
        """The lists that are not what the manifest names, each with what is wrong."""
        for number, one in enumerate(self.lists):
            try:
                self.read(number)
            except LinkedCacheError:  # which is no damage
                raise
            except DamagedCacheError as exc:
                yield one, exc.message.removeprefix(f"{self.root / one.path}: ")

    def whole(self) -> Iterator[StoredFile]:
        """The files of the lists that are what the manifest names."""
        damaged = {one.path for one, _ in self.faults()}
        for number, one in enumerate(self.lists):
            if one.path not in damaged:
                yield from self.read(number)

    def setup(self) -> Iterator[StoredFile]:
        """The files of all rounds that belong to no part."""
        for number, one in enumerate(self.lists):
            if one.of == SETUP:
                yield from self.read(number)

    def among(self, kind: str, member: str | None) -> Iterator[StoredFile]:
        """Files, with all of a kind and a member among them: of the lists that may have such."""
        of = {"views": VIEWS, "member": MEMBER, "dense": MEMBER}.get(kind, SETUP)
        for number, one in enumerate(self.lists):
            if one.of == of and (of == SETUP or one.member == member):
                yield from self.read(number)

    def of_part(self, kind: str, member: str | None, part: int) -> StoredFile | None:
        """The file of a part; None where there is none."""
        starts, numbers = self._starts.get(member, ([], []))
        at = bisect_right(starts, part) - 1
        if at < 0 or part >= self.lists[numbers[at]].parts[1]:
            return None
        number = numbers[at]
        if number not in self._paths:
            self._paths[number] = {file.path: file for file in self.read(number)}
        return self._paths[number].get(part_path(kind, member, part))

    def read(self, number: int) -> tuple[StoredFile, ...]:
        """The files of a list, after every check."""
        if number not in self._read:
            self._read[number] = self._checked(self.lists[number])
        return self._read[number]

    def _checked(self, one: FileList) -> tuple[StoredFile, ...]:
        where = self.root / one.path
        tip = "copy the cache again, or restore it with `softcache repair`"
        try:
            data = read_inside(self.root, one.path, MAX_LIST_BYTES)
        except FileNotFoundError:
            raise DamagedCacheError(f"{where}: the manifest names this list, but it is not there", tip=tip) from None
        if hashlib.sha256(data).hexdigest() != one.sha256:
            raise DamagedCacheError(f"{where}: is not the list that the manifest names: its sha256 differs", tip=tip)
        try:
            files = tuple(StoredFile.from_json(entry) for entry in read_shape(data, LISTED))
            check_listed(self.plan, one, files, self._kinds)
        except ValueError as exc:
            raise DamagedCacheError(f"{where}: is no list that can be trusted: {exc}", tip=tip) from None
        return files


def make_lists(plan: Plan, round_number: int, files: Iterable[StoredFile]) -> list[tuple[FileList, bytes]]:
    """The lists of one round and their bytes.

    Args:
        files: of the round: those of its setup, then those of its parts in order.
    """
    named: dict[tuple[str, str | None], list[StoredFile]] = {(SETUP, None): [], (VIEWS, None): []}
    for file in files:
        of = VIEWS if file.kind == "views" else MEMBER if file.rows is not None else SETUP
        named.setdefault((of, file.member if of == MEMBER else None), []).append(file)
    made: list[tuple[FileList, bytes]] = []
    for of, member in [(SETUP, None), (VIEWS, None), *((MEMBER, name) for name in plan.rounds[round_number].members)]:
        for piece in _pieces(named.get((of, member), []), whole=of == SETUP):
            data = canonical_json([file.to_json() for file in piece])
            parts = (0, 0) if of == SETUP else (_part(piece[0]), _part(piece[-1]) + 1)
            statistics = sum_of(piece) if of == MEMBER else None
            path = list_path(round_number, len(made))
            about = FileList(
                path, len(data), hashlib.sha256(data).hexdigest(), round_number, of, member, parts, len(piece),
                sum(file.nbytes for file in piece), statistics,
            )  # fmt: skip
            made.append((about, data))
    return made


def _pieces(files: Sequence[StoredFile], *, whole: bool) -> Iterator[list[StoredFile]]:
    """Cut between parts, so that no list is long; all at once where there are no parts."""
    if whole:
        if files:
            yield list(files)
        return
    piece: list[StoredFile] = []
    taken = 2  # the brackets
    for _, of_part in groupby(files, _part):
        part = list(of_part)
        size = sum(len(canonical_json(file.to_json())) + 1 for file in part)  # and a comma
        if piece and taken + size - 1 > LIST_BYTES:
            yield piece
            piece, taken = [], 2
        piece += part
        taken += size
    if piece:
        yield piece


def _part(file: StoredFile) -> int:
    part = part_of(file)
    assert part is not None
    return part


def sum_of(files: Iterable[StoredFile]) -> MemberStatistics:
    """What was measured over the records of all these files."""
    total = MemberStatistics()
    for file in files:
        if file.statistics is not None:
            total += file.statistics
    return total

"""The gate: a manifest that passes describes one whole, consistent cache, and nothing outside it.

Every number is checked against the others before a file is opened: a reader behind it can compute places without looking
again, and needs to check of a file only that it is a regular one of the stated size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from softcache.cache.file_entry import MEMBER, SETUP, VIEWS, FileList, StoredArray, StoredFile
from softcache.cache.plan import OTHER_OUTPUTS, MemberInfo, Plan
from softcache.cache.plan_rules import DTYPES, GateError, check_plan, demand, fields_of, parts_of, width_of
from softcache.cache.schema import (
    ALIGNMENT,
    ARRAY_NAME,
    CANDIDATES,
    CRC_SUFFIX,
    MAX_LIST_BYTES,
    OUTPUT_PREFIX,
    PROBE,
    PROBE_RECORDS,
    SAMPLES,
    TOKENIZER,
    ArraySpec,
    Span,
    constants_path,
    dense_shard_path,
    index_path,
    list_path,
    member_shard_path,
    numbered_constants_path,
    view_shard_path,
)
from softcache.cache.statistics import MemberStatistics

DTYPES_2 = DTYPES | {"<u2"}
LOGIT_ARRAYS = {"logits", "head_input", "records"}  # of a member's part: exactly one of them
MAX_SIZE = 2**53
MIN_ENTRY_BYTES = 200  # of a file in a list: its two digests and the names of its fields take more
HEADER_BYTES, ARRAY_HEADER_BYTES = 2**20, 2**14  # far more than HDF5 needs for a file, and for each of its data sets


def check_manifest(plan: Plan, files: Sequence[StoredFile]) -> None:
    """GateError unless plan and files describe one whole cache, of version 1."""
    check_plan(plan)
    spans = sum(map(parts_of, plan.rounds))  # arithmetic: no list of parts is made before this holds
    demand(spans <= len(files), f"{spans} parts, but only {len(files)} files are named")
    _check_order(_named(plan), files)
    _check_files(plan, files, {})


def check_lists(plan: Plan, lists: Sequence[FileList]) -> None:
    """GateError unless the lists of a manifest of version 2 cut the files that the plan asks for."""
    at = 0
    for number, one in enumerate(plan.rounds):
        first, count = at, parts_of(one)
        span = (one.layout.first_part, one.layout.first_part + count)
        groups = [(VIEWS, None)] * one.new_views + [(MEMBER, member) for member in one.members]
        if at < len(lists) and (lists[at].round, lists[at].of) == (number, SETUP):
            _check_list(lists[at], list_path(number, 0), number, (SETUP, None), (0, 0))
            at += 1
        elif number == 0:
            raise GateError("lists: none says what the samples are")
        for group in groups:
            reached = span[0]
            while reached < span[1]:
                demand(at < len(lists), f"lists: part {reached} of {group[1] or group[0]} is in none")
                stop = lists[at].parts[1]
                demand(reached < stop <= span[1], f"lists[{at}]: parts {lists[at].parts} do not follow")
                _check_list(lists[at], list_path(number, at - first), number, group, (reached, stop))
                reached, at = stop, at + 1
    demand(at == len(lists), "lists: one more than the plan asks for")


def _check_list(
    one: FileList, path: str, round_number: int, group: tuple[str, str | None], parts: tuple[int, int]
) -> None:
    wanted = (path, round_number, *group, parts)
    demand((one.path, one.round, one.of, one.member, one.parts) == wanted, f"lists: {one.path[:80]!r} is not {wanted}")
    demand(0 < one.nbytes <= MAX_LIST_BYTES, f"{path}: has {one.nbytes} bytes")
    fits = max(1, parts[1] - parts[0]) <= one.files <= one.nbytes // MIN_ENTRY_BYTES
    demand(fits, f"{path}: names {one.files} files of {parts[1] - parts[0]} parts in {one.nbytes} bytes")
    demand((one.statistics is not None) == (one.of == MEMBER), f"{path}: statistics are a member's")


def check_listed(
    plan: Plan, one: FileList, files: Sequence[StoredFile], kinds: dict[str, Mapping[str, StoredArray]]
) -> None:
    """GateError unless these are the files of a list of version 2.

    Args:
        kinds: member -> the data sets of one of its parts, if one was looked at; is filled.
    """
    _check_order(_named_in_list(plan, one, files), files)
    demand(len(files) == one.files, f"{len(files)} files, the manifest says {one.files}")
    demand(sum(file.nbytes for file in files) == one.file_bytes, "files of other sizes than the manifest says")
    _check_files(plan, files, kinds)
    if one.statistics is not None:
        total = MemberStatistics()
        for file in files:
            total += file.statistics or MemberStatistics()
        demand(total == one.statistics, "other statistics than the manifest says")


def _check_files(plan: Plan, files: Sequence[StoredFile], kinds: dict[str, Mapping[str, StoredArray]]) -> None:
    for file in files:
        _check_arrays(file)
        if file.kind == "samples":
            _check_samples(plan, file)
        elif file.kind == "probe":
            _check_probe(file)
        elif file.kind == "views":
            _check_exactly(file, {name: ("<u4", _place(file)) for name in plan.views.digests})
        elif file.kind == "constants":
            _check_constants(file, plan)
        elif file.kind == "dense":
            _check_dense(plan, file)
        elif file.kind == "positions":
            _check_positions(plan, file)
        elif file.kind == "candidates":
            _check_candidates(plan, file)
        elif file.kind == "tokenizer":
            _check_tokenizer(plan, file)
        else:
            assert file.member is not None
            _check_records(plan.member(file.member), plan, file, kinds.setdefault(file.member, file.arrays))


@dataclass(frozen=True)
class _Named:
    """What identifies a file of the list."""

    path: str
    kind: str
    member: str | None = None
    span: Span | None = None
    optional: bool = False
    index: str | None = None
    of_views: tuple[int, int] | None = None

    def fits(self, file: StoredFile) -> bool:
        rows = None if self.span is None else (self.span.row_start, self.span.row_stop)
        views = self.of_views if self.span is None else (self.span.view_start, self.span.view_stop)
        found = (file.path, file.kind, file.member, file.rows, file.views, file.index)
        return found == (self.path, self.kind, self.member, rows, views, self.index)


def _check_order(named: Iterable[_Named], files: Sequence[StoredFile]) -> None:
    """Exactly the files that the plan asks for, in the order of FORMAT.md section 4, or 21."""
    at = 0
    for wanted in named:
        if at < len(files) and wanted.fits(files[at]):
            at += 1
        elif not wanted.optional:
            found = repr(files[at].path[:80]) if at < len(files) else "the end"
            raise GateError(f"files[{at}]: {wanted.path!r} should stand here, not {found}")
    demand(at == len(files), "files: one more than the plan asks for")


def _named(plan: Plan) -> Iterator[_Named]:
    yield _Named(SAMPLES, "samples")
    yield _Named(PROBE, "probe", optional=True)
    known: set[str] = set()
    for one in plan.rounds:
        for member in (m.name for m in plan.members if m.name in one.members and m.name not in known):
            known.add(member)
            yield _Named(constants_path(member), "constants", member, optional=True)
        for span in one.layout.spans():
            if one.new_views:
                yield _Named(view_shard_path(span.index), "views", None, span)
            for member in one.members:
                yield _Named(member_shard_path(member, span.index), "member", member, span)
                yield _Named(dense_shard_path(member, span.index), "dense", member, span, optional=True)


def _named_in_list(plan: Plan, one: FileList, files: Sequence[StoredFile]) -> Iterator[_Named]:
    """What a list of version 2 asks for."""
    round_ = plan.rounds[one.round]
    if one.of == SETUP:
        yield from _named_setup(plan, one.round, files)
        return
    for part in range(*one.parts):
        span = round_.layout.span(part - round_.layout.first_part)
        if one.of == VIEWS:
            yield _Named(view_shard_path(part), "views", None, span)
            continue
        assert one.member is not None
        yield _Named(member_shard_path(one.member, part), "member", one.member, span)
        yield _Named(dense_shard_path(one.member, part), "dense", one.member, span, optional=True)


def _named_setup(plan: Plan, number: int, files: Sequence[StoredFile]) -> Iterator[_Named]:
    one = plan.rounds[number]
    if number == 0:
        yield _Named(SAMPLES, "samples")
        yield _Named(PROBE, "probe", optional=True)
        if any(index.kind == "candidates" for index in plan.indexes):
            yield _Named(CANDIDATES, "candidates")
        if plan.vocabulary is not None:
            yield _Named(TOKENIZER, "tokenizer")
    views = (one.layout.first_view, one.layout.first_view + one.layout.num_views)
    for name in one.indexes:
        yield _Named(index_path(name, number), "positions", index=name, of_views=views)
    known = {member for earlier in plan.rounds[:number] for member in earlier.members}
    for member in (m.name for m in plan.members if m.name in one.members and m.name not in known):
        count = sum(file.kind == "constants" and file.member == member for file in files)
        for place in range(count):
            yield _Named(numbered_constants_path(member, place), "constants", member)


def _check_arrays(file: StoredFile) -> None:
    """Data sets with their checksums, each inside the file, none over another."""
    demand(file.nbytes > 0, f"{file.path}: has no bytes")
    demand((file.statistics is not None) == (file.kind == "member"), f"{file.path}: statistics are a member part's")
    places = []
    for name, stored in file.arrays.items():
        where = f"{file.path}: {name[:80]!r}"
        demand(ARRAY_NAME.fullmatch(name) is not None, f"{where} is no name of a data set")
        dtypes = DTYPES if file.checksums is None else DTYPES_2
        demand(stored.dtype in dtypes, f"{where} has dtype {stored.dtype[:20]!r}")
        demand(stored.nbytes < MAX_SIZE, f"{where} has more bytes than any file")
        demand(stored.offset % ALIGNMENT == 0, f"{where} starts at {stored.offset}, no multiple of {ALIGNMENT}")
        if not stored.nbytes:
            demand(stored.offset == 0, f"{where} has no bytes, so its offset is 0")
        else:
            demand(stored.offset >= ALIGNMENT, f"{where} lies over the file's own header")
            places.append((stored.offset, stored.nbytes, where))
        if not name.endswith(CRC_SUFFIX):
            sums = ArraySpec(name, stored.dtype, stored.shape).checksums
            found = file.arrays.get(sums.name)
            fits = found is not None and (found.dtype, found.shape) == (sums.dtype, sums.shape)
            demand(fits, f"{where} has no checksums, or another number of them")
        else:
            demand(name.removesuffix(CRC_SUFFIX) in file.arrays, f"{where} are the checksums of nothing")
    end = 0
    for offset, nbytes, where in sorted(places):
        demand(offset >= end, f"{where} lies over another data set")
        end = offset + nbytes
    demand(end <= file.nbytes, f"{file.path}: data sets reach past the end of the file")
    # whoever hashes a file reads all of it, holes included: it may not be longer than what is stored in it
    taken = sum(nbytes + ALIGNMENT for _, nbytes, _ in places) + HEADER_BYTES + len(file.arrays) * ARRAY_HEADER_BYTES
    demand(
        file.nbytes <= taken, f"{file.path}: has {file.nbytes} bytes, its data sets and headers take {taken} at most"
    )


Kinds = Mapping[str, tuple[str, tuple[int, ...]]]


def _data_sets(file: StoredFile) -> dict[str, StoredArray]:
    return {name: stored for name, stored in file.arrays.items() if not name.endswith(CRC_SUFFIX)}


def _check_exactly(file: StoredFile, wanted: Kinds) -> None:
    found = {name: (stored.dtype, stored.shape) for name, stored in _data_sets(file).items()}
    demand(found == dict(wanted), f"{file.path}: holds {_listing(found)}, should hold {_listing(wanted)}")


def _listing(kinds: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(kinds.items()))
    return shown[:300] or "nothing"


def _check_samples(plan: Plan, file: StoredFile) -> None:
    count, classes = plan.samples.count, plan.num_classes
    labels = ("|u1", (count, -(-classes // 8))) if plan.samples.multi_label else ("<i4", (count,))
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "ids": ("<u8", (count,)),
        "labels": labels,
        "digests": ("|u1", (count, 16)),
    }
    if plan.samples.has_masks:
        wanted["mask_digests"] = ("|u1", (count, 16))
    _check_exactly(file, wanted | _keys(plan, file, count))


def _keys(plan: Plan, file: StoredFile, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The data sets of keys, where there are keys."""
    total = max(0, _length(file, "key_bytes"))
    return {"key_bytes": ("|u1", (total,)), "key_offsets": ("<u8", (count + 1,))} if plan.samples.has_keys else {}


def _length(file: StoredFile, name: str) -> int:
    """Of a data set of one axis; -1 where there is none such."""
    stored = file.arrays.get(name)
    return stored.shape[0] if stored is not None and len(stored.shape) == 1 else -1


def _check_candidates(plan: Plan, file: StoredFile) -> None:
    count = _length(file, "ids")
    demand(count >= 0, f"{file.path}: holds no ids")
    _check_exactly(file, {"ids": ("<u8", (count,)), "digests": ("|u1", (count, 16)), **_keys(plan, file, count)})


def _check_tokenizer(plan: Plan, file: StoredFile) -> None:
    assert plan.vocabulary is not None
    demand(not file.arrays, f"{file.path}: has data sets")
    told = (file.sha256, file.checksums)
    demand(told == (plan.vocabulary["tokenizer"],) * 2, f"{file.path}: is not the tokenizer of the vocabulary")


def _check_positions(plan: Plan, file: StoredFile) -> None:
    """Of the shapes that the index asks for; what they hold is looked at when it is read."""
    assert file.index is not None and file.views is not None
    index, count, views = plan.index(file.index), plan.samples.count, file.views[1] - file.views[0]
    offsets = file.arrays.get("offsets")
    agree = offsets is not None and offsets.shape[:1] == (1,)
    m = 1 if agree else views
    demand(not index.labels or m == 1, f"{file.path}: has labels, and views that differ")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "offsets": ("<u8", (m, count + 1)),
        "lengths": ("<u4", (m, count)),
    }
    if index.kind == "grid":
        wanted["shapes"] = ("<u4", (m, count, 2))
    per_position = {"listed": "<u4"} if index.listed else {}
    per_position |= {"entries": "<u4"} if index.kind == "candidates" else {}
    per_position |= {"labels": "<i4"} if index.labels and file.path == index_path(file.index, 0) else {}
    total = max((_length(file, name) for name in per_position), default=0)
    _check_exactly(file, wanted | {name: (dtype, (total,)) for name, dtype in per_position.items()})


def _check_probe(file: StoredFile) -> None:
    count = _length(file, "rows")
    demand(0 < count <= PROBE_RECORDS, f"{file.path}: holds {count} records, should hold 1 to {PROBE_RECORDS}")
    shapes = {"rows": ("<u8", (count,)), "views": ("<u4", (count,)), "shapes": ("<u4", (count, 3))}
    _check_exactly(file, {**shapes, "pixels": ("|u1", (_length(file, "pixels"),))})


def _check_constants(file: StoredFile, plan: Plan) -> None:
    names = _data_sets(file)
    demand(bool(names), f"{file.path}: holds nothing")
    assert file.member is not None
    others = (OUTPUT_PREFIX,) if plan.member(file.member).output in OTHER_OUTPUTS else ()
    for name in names:
        known = name.startswith(("codec_", "head_", *others))
        demand(known, f"{file.path}: {name!r} is neither a codec's nor the head's, nor the scale of an output")


def _check_dense(plan: Plan, file: StoredFile) -> None:
    found = _data_sets(file).get("logits")
    count = found.shape[0] if found is not None and found.shape else 0
    assert file.member is not None
    member = plan.member(file.member)
    most = MAX_SIZE if member.index is not None else int(np.prod(_place(file)))  # an index says how many there are
    demand(0 < count <= most, f"{file.path}: holds {count} rows")
    _check_exactly(file, {"logits": ("<f2", (count, width_of(member, plan)))})


def _check_records(member: MemberInfo, plan: Plan, file: StoredFile, first: Mapping[str, StoredArray]) -> None:
    """A member's part: every data set has its place's shape first, and is of one kind in all parts."""
    found, place = _data_sets(file), _place(file)
    coded = LOGIT_ARRAYS & found.keys()
    wanted = int(member.codec is not None)
    demand(len(coded) == wanted, f"{file.path}: holds {sorted(coded)}, should hold {wanted} of {sorted(LOGIT_ARRAYS)}")
    allowed = {*coded, "eps"} if coded else set()
    for number, feature in enumerate(member.features):
        allowed |= {*feature.arrays, f"feature{number}_error"}
    demand(found.keys() <= allowed and allowed - {"eps"} <= found.keys(), f"{file.path}: holds {sorted(found)}")
    counts: dict[str, int] = {}  # index -> positions of this part
    for name, stored in found.items():
        where, index = f"{file.path}: {name!r}", member.index_of(name)
        axes = 2 if index is None else 1
        lead = place if index is None else (counts.setdefault(index, stored.shape[0] if stored.shape else 0),)
        demand(stored.shape[:axes] == lead, f"{where} is of shape {stored.shape}, its part of {lead}")
        kind = first.get(name)
        same = kind is not None and (kind.dtype, kind.shape[axes:]) == (stored.dtype, stored.shape[axes:])
        demand(same, f"{where} is of another kind than in the member's first part")
    demand(
        found.keys() == {n for n in first if not n.endswith(CRC_SUFFIX)}, f"{file.path}: not the first part's data sets"
    )
    records = place if member.index is None else (counts[member.index],)
    _check_coded(member, plan, file, records)
    if file.statistics is not None:
        _check_statistics(file.statistics, prod(records), file.path)


def _check_coded(member: MemberInfo, plan: Plan, file: StoredFile, records: tuple[int, ...]) -> None:
    """The data sets of the codec have its shapes."""
    found, axes = _data_sets(file), len(records)
    if "logits" in found:
        fits = found["logits"].shape[axes:] == (width_of(member, plan),)
        demand(fits, f"{file.path}: 'logits' are not one per class")
    if "eps" in found:
        fits = (found["eps"].dtype, found["eps"].shape) == ("<f2", records)
        demand(fits, f"{file.path}: 'eps' is not one number a record")
    end = 0
    for entry in fields_of(member):
        end = max(end, entry["offset"] + ArraySpec("", entry["dtype"], tuple(entry["shape"])).nbytes)
    if "records" in found:
        fits = (found["records"].dtype, found["records"].shape[axes:]) == ("|u1", (end,))
        demand(fits, f"{file.path}: not the codec's records")
    else:
        demand(end == 0, f"{file.path}: no records, but the codec has fields")


def _check_statistics(s: MemberStatistics, records: int, where: str) -> None:
    counts = (s.labelled, s.dense, s.measured)
    demand(s.records == records and max(counts) <= records, f"{where}: statistics of another number of records")
    demand(
        all(0 <= kept <= 1.001 * records for kept in s.kept.values()), f"{where}: keeps more probability than there is"
    )
    demand(s.correct <= s.labelled and s.agreed <= s.measured, f"{where}: statistics count more than there are")


def _place(file: StoredFile) -> tuple[int, int]:
    """(views, rows) of a part."""
    assert file.rows is not None and file.views is not None
    return file.views[1] - file.views[0], file.rows[1] - file.rows[0]

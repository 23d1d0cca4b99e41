"""The gate: a manifest that passes describes one whole, consistent cache, and nothing outside it.

Every number is checked against the others before a file is opened: a reader behind it can compute places without looking
again, and needs to check of a file only that it is a regular one of the stated size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from softcache.cache.file_entry import StoredArray, StoredFile
from softcache.cache.plan import MemberInfo, Plan, Round
from softcache.cache.schema import (
    ALIGNMENT,
    ARRAY_NAME,
    CRC_SUFFIX,
    MEMBER_NAME,
    PROBE,
    PROBE_RECORDS,
    ROW_UNIT,
    SAMPLES,
    ArraySpec,
    Layout,
    Span,
    constants_path,
    dense_shard_path,
    member_shard_path,
    view_shard_path,
)
from softcache.cache.statistics import MemberStatistics

DTYPES = {"|u1", "<u4", "<u8", "<i4", "<f2", "<f4"}
LOGIT_ARRAYS = {"logits", "head_input", "records"}  # of a member's part: exactly one of them
DIGEST_KINDS, ORDERS, REPLAYS = {"file", "item"}, {"permuted", "natural", "selected"}, {"derived", "seeded"}
OUTPUTS = {"logits", "log_probs", "probs"}
MAX_SIZE = 2**53
MAX_AXES, MAX_FEATURE = 8, 2**26  # of one record of a layer's output; a Gram matrix has the square of its channels
HEADER_BYTES, ARRAY_HEADER_BYTES = 2**20, 2**14  # far more than HDF5 needs for a file, and for each of its data sets


class GateError(ValueError):
    """What about a manifest does not hold together."""


def check_manifest(plan: Plan, files: Sequence[StoredFile]) -> None:
    """GateError unless plan and files describe one whole cache."""
    check_plan(plan)
    spans = sum(map(_parts, plan.rounds))  # arithmetic: no list of parts is made before this holds
    _demand(spans <= len(files), f"{spans} parts, but only {len(files)} files are named")
    _check_order(plan, files)
    kinds: dict[str, Mapping[str, StoredArray]] = {}
    for file in files:
        _check_arrays(file)
        if file.kind == "samples":
            _check_samples(plan, file)
        elif file.kind == "probe":
            _check_probe(file)
        elif file.kind == "views":
            _check_exactly(file, {"pixel_digests": ("<u4", _place(file))})
        elif file.kind == "constants":
            _check_constants(file)
        elif file.kind == "dense":
            _check_dense(plan, file)
        else:
            assert file.member is not None
            _check_records(plan.member(file.member), plan, file, kinds.setdefault(file.member, file.arrays))


def check_plan(plan: Plan) -> None:
    """GateError unless samples, classes, views, members and rounds fit one another."""
    names, members = plan.class_names, [member.name for member in plan.members]
    _demand(len(names) > 0 and len(set(names)) == len(names), "class_names: none, or one twice")
    _demand(plan.samples.count > 0, "samples.count: is 0")
    _demand(plan.samples.digest_kind in DIGEST_KINDS, f"samples.digest_kind: {plan.samples.digest_kind!r}")
    _demand(plan.samples.order in ORDERS, f"samples.order: {plan.samples.order!r}")
    _demand(plan.views.count > 0, "views.count: is 0")
    _demand(plan.views.replay in REPLAYS, f"views.replay: {plan.views.replay!r}")
    _demand(len(members) > 0 and len(set(members)) == len(members), "members: none, or one twice")
    for member in plan.members:
        _check_member(member, len(names))
    if plan.parent is not None:
        _demand(set(plan.parent.statistics) <= set(members), "parent.statistics: of members that are not there")
    _demand(len(plan.rounds) > 0, "rounds: none")
    first_part = 0
    for number, one in enumerate(plan.rounds):
        where = f"rounds[{number}]"
        _check_layout(one.layout, plan, first_part, where)
        _demand(len(one.members) == len(set(one.members)) > 0, f"{where}.members: none, or one twice")
        _demand(set(one.members) <= set(members), f"{where}.members: one that is not in members")
        first_part += _parts(one)
    for name in (None, *members):
        reached = 0
        for layout in plan.layouts_of(name):
            _demand(
                layout.first_view == reached,
                f"rounds: view {reached} of {name or 'the pixel digests'} is not there once",
            )
            reached += layout.num_views
        _demand(reached == plan.views.count, f"rounds: {name or 'the pixel digests'} have {reached} views")


def _parts(one: Round) -> int:
    return one.layout.row_ranges * one.layout.view_ranges  # `len` cannot say numbers of 2**63 and more


def _check_member(member: MemberInfo, num_classes: int) -> None:
    where = f"member {member.name[:80]!r}"
    _demand(MEMBER_NAME.fullmatch(member.name) is not None, f"{where}: is no name of a member")
    _demand(member.output in OUTPUTS, f"{where}: output {member.output!r}")
    if member.class_order is not None:
        _demand(sorted(member.class_order) == list(range(num_classes)), f"{where}: class_order is no permutation")
    for entry in member.codec["fields"]:
        _demand(entry["dtype"] in DTYPES, f"{where}: field of dtype {entry['dtype']!r}")
    for feature in member.features:
        sizes = [prod(shape) for shape in feature.shapes if 0 < len(shape) <= MAX_AXES and min(shape) > 0]
        fits = len(sizes) == len(feature.shapes) > 0 and max(sizes) <= MAX_FEATURE
        _demand(fits, f"{where}: feature {feature.name[:80]!r} is of shapes {str(feature.shapes)[:80]}")
    arrays = [name for feature in member.features for name in feature.arrays]
    _demand(len(set(arrays)) == len(arrays), f"{where}: two features share a data set")


def _check_layout(layout: Layout, plan: Plan, first_part: int, where: str) -> None:
    _demand(layout.num_rows == plan.samples.count, f"{where}: num_rows is not samples.count")
    _demand(layout.num_views > 0 and layout.shard_views > 0, f"{where}: no views")
    _demand(layout.first_view + layout.num_views <= plan.views.count, f"{where}: more views than views.count")
    _demand(
        layout.shard_rows > 0 and layout.shard_rows % ROW_UNIT == 0, f"{where}: shard_rows is no multiple of {ROW_UNIT}"
    )
    _demand(layout.first_part == first_part, f"{where}: first_part is not {first_part}")


@dataclass(frozen=True)
class _Named:
    """What identifies a file of the list."""

    path: str
    kind: str
    member: str | None = None
    span: Span | None = None
    optional: bool = False

    def fits(self, file: StoredFile) -> bool:
        rows = None if self.span is None else (self.span.row_start, self.span.row_stop)
        views = None if self.span is None else (self.span.view_start, self.span.view_stop)
        found = (file.path, file.kind, file.member, file.rows, file.views)
        return found == (self.path, self.kind, self.member, rows, views)


def _check_order(plan: Plan, files: Sequence[StoredFile]) -> None:
    """Exactly the files that the plan asks for, in the order of FORMAT.md section 4."""
    at = 0
    for wanted in _named(plan):
        if at < len(files) and wanted.fits(files[at]):
            at += 1
        elif not wanted.optional:
            found = repr(files[at].path[:80]) if at < len(files) else "the end"
            raise GateError(f"files[{at}]: {wanted.path!r} should stand here, not {found}")
    _demand(at == len(files), "files: one more than the plan asks for")


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


def _check_arrays(file: StoredFile) -> None:
    """Data sets with their checksums, each inside the file, none over another."""
    _demand(file.nbytes > 0, f"{file.path}: has no bytes")
    _demand((file.statistics is not None) == (file.kind == "member"), f"{file.path}: statistics are a member part's")
    places = []
    for name, stored in file.arrays.items():
        where = f"{file.path}: {name[:80]!r}"
        _demand(ARRAY_NAME.fullmatch(name) is not None, f"{where} is no name of a data set")
        _demand(stored.dtype in DTYPES, f"{where} has dtype {stored.dtype[:20]!r}")
        _demand(stored.nbytes < MAX_SIZE, f"{where} has more bytes than any file")
        _demand(stored.offset % ALIGNMENT == 0, f"{where} starts at {stored.offset}, no multiple of {ALIGNMENT}")
        if not stored.nbytes:
            _demand(stored.offset == 0, f"{where} has no bytes, so its offset is 0")
        else:
            _demand(stored.offset >= ALIGNMENT, f"{where} lies over the file's own header")
            places.append((stored.offset, stored.nbytes, where))
        if not name.endswith(CRC_SUFFIX):
            sums = ArraySpec(name, stored.dtype, stored.shape).checksums
            found = file.arrays.get(sums.name)
            fits = found is not None and (found.dtype, found.shape) == (sums.dtype, sums.shape)
            _demand(fits, f"{where} has no checksums, or another number of them")
        else:
            _demand(name.removesuffix(CRC_SUFFIX) in file.arrays, f"{where} are the checksums of nothing")
    end = 0
    for offset, nbytes, where in sorted(places):
        _demand(offset >= end, f"{where} lies over another data set")
        end = offset + nbytes
    _demand(end <= file.nbytes, f"{file.path}: data sets reach past the end of the file")
    # whoever hashes a file reads all of it, holes included: it may not be longer than what is stored in it
    taken = sum(nbytes + ALIGNMENT for _, nbytes, _ in places) + HEADER_BYTES + len(file.arrays) * ARRAY_HEADER_BYTES
    _demand(
        file.nbytes <= taken, f"{file.path}: has {file.nbytes} bytes, its data sets and headers take {taken} at most"
    )


Kinds = Mapping[str, tuple[str, tuple[int, ...]]]


def _data_sets(file: StoredFile) -> dict[str, StoredArray]:
    return {name: stored for name, stored in file.arrays.items() if not name.endswith(CRC_SUFFIX)}


def _check_exactly(file: StoredFile, wanted: Kinds) -> None:
    found = {name: (stored.dtype, stored.shape) for name, stored in _data_sets(file).items()}
    _demand(found == dict(wanted), f"{file.path}: holds {_listing(found)}, should hold {_listing(wanted)}")


def _listing(kinds: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(kinds.items()))
    return shown[:300] or "nothing"


def _check_samples(plan: Plan, file: StoredFile) -> None:
    count, classes = plan.samples.count, len(plan.class_names)
    labels = ("|u1", (count, -(-classes // 8))) if plan.samples.multi_label else ("<i4", (count,))
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "ids": ("<u8", (count,)),
        "labels": labels,
        "digests": ("|u1", (count, 16)),
    }
    if plan.samples.has_keys:
        keys = file.arrays.get("key_bytes")
        total = keys.shape[0] if keys is not None and len(keys.shape) == 1 else 0
        wanted |= {"key_bytes": ("|u1", (total,)), "key_offsets": ("<u8", (count + 1,))}
    _check_exactly(file, wanted)


def _check_probe(file: StoredFile) -> None:
    def length(name: str) -> int:
        stored = file.arrays.get(name)
        return stored.shape[0] if stored is not None and len(stored.shape) == 1 else -1

    count = length("rows")
    _demand(0 < count <= PROBE_RECORDS, f"{file.path}: holds {count} records, should hold 1 to {PROBE_RECORDS}")
    shapes = {"rows": ("<u8", (count,)), "views": ("<u4", (count,)), "shapes": ("<u4", (count, 3))}
    _check_exactly(file, {**shapes, "pixels": ("|u1", (length("pixels"),))})


def _check_constants(file: StoredFile) -> None:
    names = _data_sets(file)
    _demand(bool(names), f"{file.path}: holds nothing")
    for name in names:
        _demand(name.startswith(("codec_", "head_")), f"{file.path}: {name!r} is neither a codec's nor the head's")


def _check_dense(plan: Plan, file: StoredFile) -> None:
    found = _data_sets(file).get("logits")
    count = found.shape[0] if found is not None and found.shape else 0
    _demand(0 < count <= int(np.prod(_place(file))), f"{file.path}: holds {count} rows")
    _check_exactly(file, {"logits": ("<f2", (count, len(plan.class_names)))})


def _check_records(member: MemberInfo, plan: Plan, file: StoredFile, first: Mapping[str, StoredArray]) -> None:
    """A member's part: every data set has its place's shape first, and is of one kind in all parts."""
    found, place = _data_sets(file), _place(file)
    coded = LOGIT_ARRAYS & found.keys()
    _demand(len(coded) == 1, f"{file.path}: holds {sorted(coded)}, should hold one of {sorted(LOGIT_ARRAYS)}")
    allowed = {*coded, "eps"}
    for number, feature in enumerate(member.features):
        allowed |= {*feature.arrays, f"feature{number}_error"}
    _demand(found.keys() <= allowed and allowed - {"eps"} <= found.keys(), f"{file.path}: holds {sorted(found)}")
    for name, stored in found.items():
        where = f"{file.path}: {name!r}"
        _demand(stored.shape[:2] == place, f"{where} is of shape {stored.shape}, its part of {place}")
        kind = first.get(name)
        same = kind is not None and (kind.dtype, kind.shape[2:]) == (stored.dtype, stored.shape[2:])
        _demand(same, f"{where} is of another kind than in the member's first part")
    _demand(
        found.keys() == {n for n in first if not n.endswith(CRC_SUFFIX)}, f"{file.path}: not the first part's data sets"
    )
    if "logits" in found:
        _demand(found["logits"].shape[2:] == (len(plan.class_names),), f"{file.path}: 'logits' are not one per class")
    if "eps" in found:
        _demand(
            (found["eps"].dtype, found["eps"].shape) == ("<f2", place), f"{file.path}: 'eps' is not one number a record"
        )
    end = 0
    for entry in member.codec["fields"]:
        end = max(end, entry["offset"] + ArraySpec("", entry["dtype"], tuple(entry["shape"])).nbytes)
    if "records" in found:
        _demand(
            (found["records"].dtype, found["records"].shape[2:]) == ("|u1", (end,)),
            f"{file.path}: not the codec's records",
        )
    else:
        _demand(end == 0, f"{file.path}: no records, but the codec has fields")
    if file.statistics is not None:
        _check_statistics(file.statistics, place[0] * place[1], file.path)


def _check_statistics(s: MemberStatistics, records: int, where: str) -> None:
    counts = (s.labelled, s.dense, s.measured)
    _demand(s.records == records and max(counts) <= records, f"{where}: statistics of another number of records")
    _demand(s.correct <= s.labelled and s.agreed <= s.measured, f"{where}: statistics count more than there are")


def _place(file: StoredFile) -> tuple[int, int]:
    """(views, rows) of a part."""
    assert file.rows is not None and file.views is not None
    return file.views[1] - file.views[0], file.rows[1] - file.rows[0]


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise GateError(what)

"""Whether a plan is one: samples, classes, views, members, indexes and rounds that fit one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from softcache.cache.plan import (
    CLASS_OUTPUTS,
    OTHER_OUTPUTS,
    PIXEL_DIGESTS,
    TOKEN_DIGESTS,
    MemberInfo,
    Plan,
    Round,
)
from softcache.cache.schema import FORMAT_VERSION, MEMBER_NAME, ROW_UNIT, Layout

DTYPES = {"|u1", "<u4", "<u8", "<i4", "<f2", "<f4"}
DIGEST_KINDS, ORDERS, REPLAYS = {"file", "item"}, {"permuted", "natural", "selected"}, {"derived", "seeded"}
ORDERS_2 = ORDERS | {"merged"}
INDEX_KINDS = {"tokens", "words", "grid", "frames", "candidates"}
DIGESTS = {PIXEL_DIGESTS, TOKEN_DIGESTS}
MAX_AXES, MAX_FEATURE = 8, 2**26  # of one record of a layer's output; a Gram matrix has the square of its channels


class GateError(ValueError):
    """What about a manifest does not hold together."""


def check_plan(plan: Plan) -> None:
    """GateError unless samples, classes, views, members and rounds fit one another."""
    names, members = plan.class_names, [member.name for member in plan.members]
    demand(len(set(names)) == len(names), "class_names: one twice")
    demand(plan.samples.count > 0, "samples.count: is 0")
    demand(plan.samples.digest_kind in DIGEST_KINDS, f"samples.digest_kind: {plan.samples.digest_kind!r}")
    orders = ORDERS if plan.format == FORMAT_VERSION else ORDERS_2
    demand(plan.samples.order in orders, f"samples.order: {plan.samples.order!r}")
    demand(plan.views.count > 0, "views.count: is 0")
    demand(plan.views.replay in REPLAYS, f"views.replay: {plan.views.replay!r}")
    demand(len(members) > 0 and len(set(members)) == len(members), "members: none, or one twice")
    if plan.format == FORMAT_VERSION:
        demand(len(names) > 0, "class_names: none")
        demand(len(plan.parents) <= 1, "parent: several")
    else:
        _check_plan_2(plan)
    for member in plan.members:
        _check_member(member, plan)
    for parent in plan.parents:
        demand(set(parent.statistics) <= set(members), "parent.statistics: of members that are not there")
    demand(len(plan.rounds) > 0, "rounds: none")
    first_part = 0
    for number, one in enumerate(plan.rounds):
        where = f"rounds[{number}]"
        _check_layout(one.layout, plan, first_part, where)
        demand(len(one.members) == len(set(one.members)) > 0, f"{where}.members: none, or one twice")
        demand(set(one.members) <= set(members), f"{where}.members: one that is not in members")
        first_part += parts_of(one)
    for name in (None, *members):
        _check_views(name or "the pixel digests", plan.layouts_of(name), plan)
    for index in plan.indexes:
        _check_views(f"index {index.name}", [plan.rounds[n].layout for n in plan.rounds_of_index(index.name)], plan)


def _check_views(what: str, layouts: Sequence[Layout], plan: Plan) -> None:
    """Each view once."""
    reached = 0
    for layout in layouts:
        demand(layout.first_view == reached, f"rounds: view {reached} of {what} is not there once")
        reached += layout.num_views
    demand(reached == plan.views.count, f"rounds: {what} have {reached} views")


def _check_plan_2(plan: Plan) -> None:
    """What version 2 has of its own."""
    demand(plan.vocabulary is None or not plan.class_names, "class_names: beside a vocabulary")
    demand(plan.vocabulary is None or plan.num_classes > 0, "vocabulary.count: is 0")
    ids = [parent.id for parent in plan.parents]
    demand(len(set(ids)) == len(ids), "parents: one twice")
    demand(plan.samples.order != "merged" or len(ids) > 0, "samples.order: merged, of no cache")
    digests = plan.views.digests
    demand(0 < len(set(digests)) == len(digests) and set(digests) <= DIGESTS, f"views.digests: {str(digests)[:80]}")
    names = [index.name for index in plan.indexes]
    demand(len(set(names)) == len(names), "indexes: one twice")
    for index in plan.indexes:
        demand(MEMBER_NAME.fullmatch(index.name) is not None, f"indexes: {index.name[:80]!r} is no name")
        demand(index.kind in INDEX_KINDS, f"indexes: kind {index.kind[:20]!r}")
        demand(not index.labels or index.kind == "words", f"indexes: labels of {index.kind}")
    for number, one in enumerate(plan.rounds):
        demand(len(set(one.indexes)) == len(one.indexes), f"rounds[{number}].indexes: one twice")
        demand(set(one.indexes) <= set(names), f"rounds[{number}].indexes: one that is not in indexes")
    labelled = {index.name for index in plan.indexes if index.labels}
    demand(not plan.rounds or labelled <= set(plan.rounds[0].indexes), "indexes: labels that came later")
    for member in plan.members:
        demand(member.indexes <= set(names), f"member {member.name[:80]!r}: an index that is not in indexes")


def parts_of(one: Round) -> int:
    return one.layout.row_ranges * one.layout.view_ranges  # `len` cannot say numbers of 2**63 and more


def _check_member(member: MemberInfo, plan: Plan) -> None:
    where = f"member {member.name[:80]!r}"
    demand(MEMBER_NAME.fullmatch(member.name) is not None, f"{where}: is no name of a member")
    if plan.format == FORMAT_VERSION:
        demand(member.output in CLASS_OUTPUTS, f"{where}: output {member.output!r}")
    else:
        _check_output(member, plan, where)
    if member.class_order is not None:
        order = list(range(width_of(member, plan)))
        demand(sorted(member.class_order) == order, f"{where}: class_order is no permutation")
    for entry in fields_of(member):
        demand(entry["dtype"] in DTYPES, f"{where}: field of dtype {entry['dtype']!r}")
    for feature in member.features:
        sizes = [prod(shape) for shape in feature.shapes if 0 < len(shape) <= MAX_AXES and min(shape) > 0]
        fits = len(sizes) == len(feature.shapes) > 0 and max(sizes) <= MAX_FEATURE
        demand(fits, f"{where}: feature {feature.name[:80]!r} is of shapes {str(feature.shapes)[:80]}")
    arrays = [name for feature in member.features for name in feature.arrays]
    demand(len(set(arrays)) == len(arrays), f"{where}: two features share a data set")


def _check_output(member: MemberInfo, plan: Plan, where: str) -> None:
    """Of version 2: what a member gives, and how many numbers."""
    width, names, promise = member.width or 0, member.value_names, member.promise or {}
    if member.output is None:
        alone = member.codec is None and width == 0 and member.index is None and promise == {}
        demand(alone and len(member.features) > 0, f"{where}: neither records nor features alone")
    elif member.output in CLASS_OUTPUTS:
        demand(0 < width == plan.num_classes, f"{where}: {width} numbers of {plan.num_classes} classes")
    else:
        demand(
            member.output in OTHER_OUTPUTS and width > 0, f"{where}: output {member.output[:20]!r} of {width} numbers"
        )
    demand((member.codec is None) == (member.output is None), f"{where}: a codec without an output, or none")
    wanted = width if member.output == "values" else 0
    demand(len(names) == len(set(names)) == wanted, f"{where}: {len(names)} value_names, should be {wanted}")
    kinds: tuple[set[str], ...] = (
        ({"max_kl", "at_temperature"}, set()) if member.output in CLASS_OUTPUTS else ({"max_relative_error"}, set())
    )
    demand(set(promise) in kinds, f"{where}: promises {sorted(promise)}")


def width_of(member: MemberInfo, plan: Plan) -> int:
    """How many numbers a decoded record has."""
    return plan.num_classes if member.width is None else member.width


def fields_of(member: MemberInfo) -> Sequence[Mapping[str, Any]]:
    fields: Sequence[Mapping[str, Any]] = () if member.codec is None else member.codec["fields"]
    return fields


def _check_layout(layout: Layout, plan: Plan, first_part: int, where: str) -> None:
    demand(layout.num_rows == plan.samples.count, f"{where}: num_rows is not samples.count")
    demand(layout.num_views > 0 and layout.shard_views > 0, f"{where}: no views")
    demand(layout.first_view + layout.num_views <= plan.views.count, f"{where}: more views than views.count")
    rows = layout.shard_rows
    power = plan.format != FORMAT_VERSION and 0 < rows < ROW_UNIT and rows & (rows - 1) == 0
    demand(power or (rows > 0 and rows % ROW_UNIT == 0), f"{where}: shard_rows is no multiple of {ROW_UNIT}")
    demand(layout.first_part == first_part, f"{where}: first_part is not {first_part}")


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise GateError(what)

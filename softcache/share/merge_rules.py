"""What must be alike in caches that are merged, and what is said of the first thing that is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.canonical import differences
from softcache.cache.plan import MemberInfo, Plan
from softcache.cache.plan_rules import width_of
from softcache.cache.positions import cut_positions
from softcache.cache.schema import OUTPUT_PREFIX, PROVISIONAL_FORMAT
from softcache.errors import CacheError, first_offenders
from softcache.targets.cache import Cache

SAME_ORDER = "dump both with the same --order and --order-seed; or add the teacher with `dump --extend`"
NOT_FITTED = (
    "dump both with the same --codec, and one that is not fitted to its samples (float16, int8, headtail, topk); or all of it "
    "in one dump"
)
TIPS = {
    "format": "dump the one of version 1 again with --format 2",
    "license": "say with --license what may be done with the merged cache, if its owners agree",
    "class_names": "dump both with the same classes in the same order; `softcache diff` shows what else differs",
    "samples.digest_kind": "open the data of both in the same way: digests of files and of items are never compared",
    "samples.has_keys": "dump both with --no-keys, or neither",
    "views.steps": "dump both with the same --policy",
    "views.root_seed": "dump both with the same --view-seed",
    "views.count": "bring the views of both to the same number with `softcache subset --views` or `dump --extend`",
    "views.first": "views are merged where the second cache begins with the view behind the first one's last; give them in the "
    "order of their views; `dump --first-view` and `softcache subset --views` make such",
    "samples.order": SAME_ORDER,
    "samples.order_seed": SAME_ORDER,
    "samples.multi_label": "a sample has one class, or several, in both",
    "samples.has_masks": "open the data of both with their maps of labels, or neither",
    "made_with.autocast": "other numbers come of half types: dump both with the same --autocast",
    "members": "merge caches of the same teachers, in one order of classes; `softcache subset --members` leaves out what only "
    "one has. A teacher without weights, such as a function or a service, is known by its first answers, and here these are to "
    "other samples: dump all of them at once",
}


def cannot(a: Path | str, b: Path, why: str, tip: str = "") -> CacheError:
    """The refusal of two caches."""
    return CacheError(f"{a} and {b} cannot be merged: {why}", tip=tip)


def refuse_unlike(a: Path | str, b: Path, fields: Iterable[tuple[str, Any, Any]]) -> None:
    """CacheError that names the first of some fields which differs, with both values."""
    for where, x, y in fields:
        if x != y:
            raise cannot(a, b, f"{where} is {_shown(x)} in the first and {_shown(y)} in the second", _tip(where))


def _tip(where: str) -> str:
    if where.startswith("members.") and not where.endswith(".fingerprint"):
        return NOT_FITTED if ".codec" in where else "dump both with the same --codec, --features and promise"
    return next((tip for name, tip in TIPS.items() if where == name or where.startswith((f"{name}.", f"{name}["))), "")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} ({', '.join(map(str, value[:3]))}{', ...' if len(value) > 3 else ''})"[:120]
    if isinstance(value, Mapping):
        return "there"
    return "missing" if value is None else repr(value)[:80]


def shared_fields(a: Plan, b: Plan) -> Iterator[tuple[str, Any, Any]]:
    """What must be alike whatever is merged: classes, how samples were digested, how views are made."""
    # both as version 2 says it, so that a field which version 1 leaves out is no difference
    one, other = (replace(plan, format=PROVISIONAL_FORMAT).to_json() for plan in (a, b))
    for name in ("class_names", "vocabulary", "rendering"):
        yield from differences(one[name], other[name], name)
    for name in ("digest_kind", "multi_label", "has_masks"):
        yield f"samples.{name}", one["samples"][name], other["samples"][name]
    yield from differences(one["views"]["steps"], other["views"]["steps"], "views.steps")
    for name in ("root_seed", "replay") if a.views.steps else ():  # without steps nothing is drawn
        yield f"views.{name}", one["views"][name], other["views"][name]
    yield from differences(one["views"]["digests"], other["views"]["digests"], "views.digests")
    yield from differences(one["indexes"], other["indexes"], "indexes")


def matched_members(a: Path | str, b: Path, one: Plan, other: Plan) -> dict[str, str]:
    """The second cache's name of each member -> the first one's. CacheError unless both have the same, stored alike."""
    if len(one.members) == len(other.members) == 1:
        (x,), (y,) = one.members, other.members
        refuse_unlike(a, b, [(f"members.{x.name}.fingerprint", x.fingerprint, y.fingerprint)])
    weights = {member.name: member.fingerprint for member in one.members}
    names: dict[str, str] = {}
    for member in sorted(other.members, key=lambda member: weights.get(member.name) != member.fingerprint):
        free = [name for name, found in weights.items() if found == member.fingerprint and name not in names.values()]
        if free:  # of two teachers with the same weights, stored in two ways, each is found by its name
            names[member.name] = member.name if member.name in free else free[0]
    only_a = [member.name for member in one.members if member.name not in names.values()]
    only_b = [member.name for member in other.members if member.name not in names]
    if only_a or only_b:
        told = "; ".join(
            f"{', '.join(map(repr, only))} only in {path}" for only, path in ((only_a, a), (only_b, b)) if only
        )
        raise cannot(a, b, f"they have other members, by their weights: {told}", TIPS["members"])
    for theirs, ours in names.items():
        stored = (_stored(one.member(ours), one), _stored(other.member(theirs), other))
        refuse_unlike(a, b, differences(*stored, f"members.{ours}"))
    return names


def _stored(member: MemberInfo, plan: Plan) -> dict[str, Any]:
    """What a member's records depend on: not what people call it."""
    told = replace(member, width=0 if member.output is None else width_of(member, plan)).to_json(PROVISIONAL_FORMAT)
    return {name: value for name, value in told.items() if name not in ("name", "model")}


def refuse_unlike_constants(a: Cache, ours: str, b: Cache, theirs: str) -> None:
    """CacheError where a codec was fitted otherwise, or a final layer is another one. A scale is no part of any record."""
    one, other = (
        {name: array for name, array in found.items() if not name.startswith(OUTPUT_PREFIX)}
        for found in (a.reader.constants(ours), b.reader.constants(theirs))
    )
    for name in sorted({*one, *other}):
        x, y = one.get(name), other.get(name)
        if x is None or y is None or (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
            raise cannot(
                a.reader.path,
                b.reader.path,
                f"the constant {name} of member {ours!r} differs: what its records mean was fitted on other samples",
                NOT_FITTED,
            )


def refuse_other_samples(a: Cache, b: Cache) -> None:
    """CacheError unless the rows of both are the same samples in one order, with the same labels and contents.

    The ids are known to be the same, in any order.
    """
    one, other = a.samples, b.samples
    x, y = np.argsort(one.ids), np.argsort(other.ids)
    for what in ("labels", "digests", "mask_digests"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if mine is None or theirs is None:
            continue
        rows = np.flatnonzero((mine[x] != theirs[y]).reshape(len(one), -1).any(axis=1))
        if rows.size:
            named = first_offenders((one.key(int(x[row])) for row in rows), rows.size)
            called = {"labels": "another label", "digests": "another content", "mask_digests": "another map of labels"}
            raise cannot(
                a.reader.path,
                b.reader.path,
                f"samples.fingerprint differs: {rows.size:,} of {len(one):,} samples have {called[what]} in the second: {named}",
                "merge caches of one transfer set; `softcache diff` compares the two",
            )
    mine, theirs = a.manifest.plan.samples, b.manifest.plan.samples
    if not np.array_equal(one.ids, other.ids):
        fields = [(f"samples.{name}", getattr(mine, name), getattr(theirs, name)) for name in ("order", "order_seed")]
        refuse_unlike(a.reader.path, b.reader.path, fields)
        raise cannot(
            a.reader.path,
            b.reader.path,
            "the same samples stand in other rows, since the data listed them in another order",
            "dump the second from the data as the first had it; or add its teacher with `dump --extend`, which finds them by id",
        )


def refuse_other_positions(a: Cache, b: Cache) -> None:
    """CacheError unless the indexes of both say the same of every row."""
    rows = np.arange(len(a))
    for index in a.manifest.plan.indexes:
        one, other = (cut_positions(cache.reader.index(index.name), rows, 0, cache.num_views) for cache in (a, b))
        x, y = one.arrays(), other.arrays()
        if x.keys() != y.keys() or any(not np.array_equal(x[name], y[name]) for name in x):
            raise cannot(
                a.reader.path,
                b.reader.path,
                f"index {index.name!r} has other positions of the same samples in the second",
                "merge caches of texts that are cut into the same words",
            )


def refuse_overlap(a: Cache, b: Cache) -> bool:
    """Whether two caches have no sample in common; CacheError where they have some, and not all."""
    common = np.intersect1d(a.samples.ids, b.samples.ids, assume_unique=True)
    if common.size and not common.size == len(a) == len(b):
        rows = np.flatnonzero(np.isin(b.samples.ids, common))
        named = first_offenders((b.samples.key(int(row)) for row in rows), rows.size)
        raise cannot(
            a.reader.path,
            b.reader.path,
            f"{rows.size:,} samples are in both ({named}), of {len(a):,} in the first and {len(b):,} in the second",
            "merge caches of the same samples, or of different ones: `softcache subset --without FILE` leaves samples out",
        )
    return not common.size

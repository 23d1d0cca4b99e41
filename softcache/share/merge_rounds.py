"""Caches of one transfer set as one: the rounds of each behind those of the one before, as `dump --extend` would have added them.

Their files are copied as they are; only names and numbers of parts, and of views, are other ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from softcache.cache.file_entry import StoredFile, part_of, round_of
from softcache.cache.plan import PIXEL_DIGESTS, Parent, Plan, Round
from softcache.cache.schema import FORMAT_VERSION, member_name, part_path
from softcache.cache.write.copier import Copy
from softcache.data.drift import check_drift
from softcache.errors import DriftError, warn
from softcache.share.merge_rules import (
    cannot,
    matched_members,
    refuse_other_positions,
    refuse_other_samples,
    refuse_unlike,
    refuse_unlike_constants,
    shared_fields,
)
from softcache.targets.cache import Cache

COPIED = {"member", "dense", "views", "constants"}  # of every cache but the first


@dataclass(frozen=True)
class Stack:
    """What some caches of one transfer set are together.

    Attributes:
        first: the cache whose samples, probe and indexes are kept.
        plan: of all rounds.
        rounds: the files of each round, in the order of the manifest.
        views: of each view, which cache has its digests, and which view it is there.
        members: of each member, which cache has its constants, and its name there.
        called: the caches, in a message.
        notes: what was tolerated.
    """

    first: Cache
    plan: Plan
    rounds: Sequence[Sequence[Copy]]
    views: Sequence[tuple[Cache, int]]
    members: Mapping[str, tuple[Cache, str]]
    called: str
    notes: Sequence[str] = ()


def stack_of(cache: Cache) -> Stack:
    """One cache alone."""
    plan = cache.manifest.plan
    rounds: list[list[Copy]] = [[] for _ in plan.rounds]
    for file in cache.manifest.files:
        rounds[round_of(plan, file)].append(Copy(cache.reader.path, file, file))
    return Stack(
        cache, plan, rounds, _views_of(cache), {name: (cache, name) for name in cache.members}, str(cache.reader.path)
    )


def _views_of(cache: Cache) -> list[tuple[Cache, int]]:
    return [(cache, view) for view in range(cache.num_views)]


def added(stack: Stack, cache: Cache) -> Stack:
    """With the members of one more cache beside those that are there, or with its views behind them.

    Raises:
        CacheError: it is of other samples, or views, or has nothing to add; names the first field that differs.
    """
    a, b = stack.called, cache.reader.path
    one, other = stack.plan, cache.manifest.plan
    refuse_unlike(a, b, [("format", one.format, other.format)])
    refuse_unlike(a, b, shared_fields(one, other))
    refuse_other_samples(stack.first, cache)
    if other.views.first == one.views.first + one.views.count:
        return _with_views(stack, cache)
    refuse_unlike(a, b, [("views.first", one.views.first, other.views.first)])
    refuse_unlike(a, b, [("views.count", one.views.count, other.views.count)])
    return _with_members(stack, cache)


def _with_members(stack: Stack, cache: Cache) -> Stack:
    a, b = stack.called, cache.reader.path
    one, other = stack.plan, cache.manifest.plan
    known = {member.fingerprint: member.name for member in one.members}
    for member in other.members:
        if member.fingerprint in known:
            raise cannot(
                a,
                b,
                f"member {member.name!r} of the second has the weights of {known[member.fingerprint]!r}, over the same views",
                "leave it out with `softcache subset --members`; views are merged where the second cache has later ones",
            )
    refuse_other_positions(stack.first, cache)
    notes = _compare_digests(stack, cache)
    names: dict[str, str] = {}
    taken = [member.name for member in one.members]
    for member in other.members:
        names[member.name] = member_name(member.name, taken) if member.name in taken else member.name
        taken.append(names[member.name])
    rounds = [replace(r, new_views=False, indexes=(), members=tuple(names[m] for m in r.members)) for r in other.rounds]
    plan = replace(
        one,
        members=(*one.members, *(replace(member, name=names[member.name]) for member in other.members)),
        parents=_parents(stack, cache, names),
    )
    made = _behind(stack, cache, plan, rounds, names, COPIED - {"views"})
    members = {**stack.members, **{ours: (cache, theirs) for theirs, ours in names.items()}}
    return replace(made, members=members, notes=[*stack.notes, *notes])


def _with_views(stack: Stack, cache: Cache) -> Stack:
    a, b = stack.called, cache.reader.path
    one, other = stack.plan, cache.manifest.plan
    if one.indexes:
        raise cannot(a, b, "views of samples with several answers each (`indexes`) are not put behind one another")
    names = matched_members(a, b, one, other)
    for theirs, ours in names.items():
        refuse_unlike_constants(*stack.members[ours], cache, theirs)
    order = [member.name for member in one.members]
    count = one.views.count
    rounds = [
        replace(
            r,
            layout=replace(r.layout, first_view=r.layout.first_view + count),
            members=tuple(sorted((names[m] for m in r.members), key=order.index)),
        )
        for r in other.rounds
    ]
    views = replace(one.views, count=count + other.views.count)
    plan = replace(one, views=views, parents=_parents(stack, cache, names))
    made = _behind(stack, cache, plan, rounds, names, COPIED - {"constants"}, first_view=count)
    return replace(made, views=[*stack.views, *_views_of(cache)])


def _behind(
    stack: Stack,
    cache: Cache,
    plan: Plan,
    rounds: Sequence[Round],
    names: Mapping[str, str],
    kinds: set[str],
    *,
    first_view: int = 0,
) -> Stack:
    """The cache's rounds behind those of the stack, with its files of some kinds.

    Args:
        plan: of the whole, still without these rounds.
        rounds: the cache's, as they are to be, but for the numbers of their parts.
        names: the cache's names of members -> those in the whole.
        first_view: what its views count from.
    """
    theirs = cache.manifest.plan
    first_part = sum(len(one.layout) for one in stack.plan.rounds)
    moved = [replace(one, layout=replace(one.layout, first_part=one.layout.first_part + first_part)) for one in rounds]
    copies: list[list[Copy]] = [[] for _ in rounds]
    for file in cache.manifest.files:
        if file.kind in kinds:
            target = _renamed(file, names, first_part, first_view)
            copies[round_of(theirs, file)].append(Copy(cache.reader.path, file, target))
    for one, of_round in zip(moved, copies, strict=True):
        of_round.sort(key=lambda copy, one=one: _place(copy.target, one))  # type: ignore[misc]
    plan = replace(plan, rounds=(*plan.rounds, *moved))
    called = f"{stack.called} with {cache.reader.path}"
    return replace(stack, plan=plan, rounds=[*stack.rounds, *copies], called=called)


def _renamed(file: StoredFile, names: Mapping[str, str], first_part: int, first_view: int) -> StoredFile:
    """The same bytes in their new place."""
    member = None if file.member is None else names[file.member]
    part = part_of(file)
    if part is None:
        return replace(file, path=f"members/{member}/{Path(file.path).name}", member=member)
    assert file.views is not None
    views = (file.views[0] + first_view, file.views[1] + first_view)
    return replace(file, path=part_path(file.kind, member, part + first_part), member=member, views=views)


def _place(file: StoredFile, one: Round) -> tuple[int, int, bool]:
    """What files of a round are sorted by: constants, then part by part its views, and each member's part and dense file."""
    part = part_of(file)
    if part is None:
        return -1, 0, False  # in the order in which they are
    return part, -1 if file.member is None else list(one.members).index(file.member), file.kind == "dense"


def _parents(stack: Stack, cache: Cache, names: Mapping[str, str]) -> tuple[Parent, ...]:
    """The caches that what is put together was taken out of, each once."""
    found = {parent.id: dict(parent.statistics) for parent in stack.plan.parents}
    for parent in cache.manifest.plan.parents:
        found.setdefault(parent.id, {}).update({names[name]: told for name, told in parent.statistics.items()})
    if len(found) > 1 and stack.plan.format == FORMAT_VERSION:
        raise cannot(
            stack.called,
            cache.reader.path,
            f"parent.id differs: they were taken out of different caches ({', '.join(one[:12] for one in found)}), and version "
            f"{FORMAT_VERSION} of the format has room for one",
            "merge the whole caches, and take out of the merged one",
        )
    return tuple(Parent(id, statistics) for id, statistics in found.items())


def _compare_digests(stack: Stack, cache: Cache) -> list[str]:
    """What there is to tell of pixels that differ by a rounding; CacheError where they differ by more.

    A member that is added must have seen what the others saw.
    """
    told, probe, rows = [], _probed(cache), np.arange(len(cache))
    for name in cache.manifest.plan.views.digests:
        for view, (shown, at) in enumerate(stack.views):
            ours, theirs = np.full(len(rows), at), np.full(len(rows), view)
            y = cache.reader.gather(None, name, rows, theirs)
            count = int((shown.reader.gather(None, name, rows, ours) != y).sum())
            if not count:
                continue

            def render(row: int, at: int, shown: Cache = shown) -> np.ndarray | None:
                return probe.get((row, stack.views.index((shown, at))))

            try:
                drift = check_drift(shown.reader, rows, ours, y, render) if name == PIXEL_DIGESTS else None
            except DriftError:
                drift = None
            different = (
                f"{count:,} of {len(rows):,} samples have other {name.replace('_', ' ')} in view {view} of the second"
            )
            if drift is None:
                raise cannot(
                    stack.called,
                    cache.reader.path,
                    f"{different}: their teachers were not shown the same",
                    "dump both from the same data and with the same versions of torchvision and pillow, or add the teacher with "
                    "`dump --extend`",
                )
            told.append(f"{different}, by {drift.apart} of 255 at most")
    if told:
        warn("; ".join(told))
    return told


def _probed(cache: Cache) -> dict[tuple[int, int], np.ndarray]:
    """(row, view) -> the pixels that the cache's probe has of it."""
    probe = cache.reader.probe()
    if not probe:
        return {}
    ends = np.cumsum([0, *probe["shapes"].clip(min=1).prod(axis=1, dtype=np.int64)])
    found = {}
    for number, (row, view) in enumerate(zip(probe["rows"].tolist(), probe["views"].tolist(), strict=True)):
        shape = tuple(int(n) for n in probe["shapes"][number] if n)
        found[row, view] = probe["pixels"][ends[number] : ends[number + 1]].reshape(shape)
    return found

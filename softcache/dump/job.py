"""What a dump adds: a new cache, more views of a finished one, or more members over its views."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.bound_files import BoundFiles
from softcache.cache.canonical import canonical_json, differences
from softcache.cache.dump_folder import Planned, read_planned
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import PIXEL_DIGESTS, TOKEN_DIGESTS, MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.positions import Positions
from softcache.cache.reader import CacheReader, read_constants
from softcache.cache.samples import SampleTable, first_order
from softcache.cache.schema import FORMAT_VERSION, PROVISIONAL_FORMAT, fit_layout, member_name, plan_layout
from softcache.config import DumpConfig, StorageOptions
from softcache.data.classes import check_classes
from softcache.data.identity import sample_ids
from softcache.data.join import find_ids
from softcache.data.transfer_set import TransferSet
from softcache.data.views import Policy
from softcache.dump.layout import Storage, member_info
from softcache.dump.position_index import bytes_of_a_row, check_has_index, in_rows, index_of, part_bytes
from softcache.dump.teacher import Teacher
from softcache.errors import ConfigError, DataError, ModelError, first_offenders

# settings that a cache fixed when it was made
OF_THE_CACHE = ("policy", "view_seed", "order", "order_seed", "format", "no_keys", "license", "first_view")


@dataclass(frozen=True)
class Job:
    """What is to be rendered and which members are to be written.

    Attributes:
        policy: how views are rendered.
        order: (N,) position in the transfer set of each row.
        first_view, views: the views to write are [first_view, first_view + views).
        base: the manifest that is extended; None for a new cache.
        planned: what an interrupted dump of the same round fixed; None if there is none.
        positions: of the words or tokens of each row; None where samples have one answer each.
    """

    policy: Policy
    order: np.ndarray
    first_view: int
    views: int
    base: Manifest | None = None
    planned: Planned | None = None
    positions: Positions | None = None

    @property
    def new_views(self) -> bool:
        """Whether pixel digests are to be written: they are there already when only members are added."""
        return self.base is None or self.first_view > 0

    @property
    def base_id(self) -> str | None:
        return self.base.id if self.base else None

    def known_member(self, name: str) -> MemberInfo | None:
        """A member as the cache, or an interrupted dump of this round, has fixed it."""
        for plan in (self.planned.plan if self.planned else None, self.base.plan if self.base else None):
            for member in plan.members if plan is not None else ():
                if member.name == name:
                    return member
        return None

    def known_constants(self, out: Path, name: str) -> dict[str, np.ndarray]:
        """What was fitted for that member then."""
        stored = [*(self.base.files if self.base else ()), *(self.planned.files if self.planned else ())]
        return read_constants(BoundFiles(out, stored), name)


def new_job(config: StorageOptions, transfer_set: TransferSet, out: Path | None = None, *, first_view: int = 0) -> Job:
    """A cache of its own, whose view 0 is view `first_view` of the policy."""
    count = len(transfer_set)
    order = first_order(count, config.order, config.order_seed)
    policy = replace(Policy.parse(config.policy, config.view_seed), first_view=first_view)
    views = 1 if config.views is None else config.views
    if views < 1:
        raise ConfigError(f"--views {views}: at least one view is needed")
    if views > 1 and not policy.is_random:
        raise ConfigError(
            f"--views {views}, but every view of this policy is the same ({policy})",
            tip="add a random step such as --policy crop_flip, or leave --views out",
        )
    if first_view < 0:
        raise ConfigError(f"--first-view {first_view}: views are counted from 0")
    if first_view + views > 2**53:
        raise ConfigError(f"--first-view {first_view}: a cache has no view beyond number 2**53 - 1")
    if first_view > 0 and not policy.is_random:
        raise ConfigError(
            f"--first-view {first_view}, but every view of this policy is the same ({policy})",
            tip="add a random step such as --policy crop_flip, or leave --first-view out",
        )
    planned = read_planned(out, 0) if out is not None else None
    return Job(policy, order, 0, views, None, planned, in_rows(transfer_set, order))


def extension_job(config: DumpConfig, transfer_set: TransferSet) -> Job:
    """More views, or the same ones for more members, of the cache in --out.

    Raises:
        ConfigError: settings that the cache has fixed, or fewer views than there are.
        DataError: the transfer set is not the cache's.
        ClassMismatchError: its classes are others, or in another order.
    """
    out = Path(config.out)
    base = read_manifest(out)
    for name in OF_THE_CACHE:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot be given with --extend",
                tip=f"the cache keeps its own: {Policy.of_cache(base.plan.views)}" if name == "policy" else "",
            )
    there, wanted = base.plan.views.count, config.views
    policy = Policy.of_cache(base.plan.views, allow_code=config.allow_code)
    if wanted is not None and wanted < there:
        raise ConfigError(
            f"--views {wanted}: the cache has {there} already", tip="with --extend, --views is the number in the end"
        )
    if wanted is not None and wanted > there and not policy.is_random:
        raise ConfigError(f"--views {wanted}, but every view of this cache's policy is the same ({policy})")
    check_has_index(transfer_set, base.plan, CacheReader(out).tokenizer())
    if base.plan.class_names:
        check_classes(transfer_set, base.plan.class_names)
    order = order_of(CacheReader(out).samples, transfer_set)
    more = wanted is not None and wanted > there
    first, views = (there, wanted - there) if more and wanted is not None else (0, there)
    planned = read_planned(out, len(base.plan.rounds))
    return Job(policy, order, first, views, base, planned, in_rows(transfer_set, order))


def order_of(table: SampleTable, transfer_set: TransferSet) -> np.ndarray:
    """Where each row's sample stands in the transfer set, which must hold these samples and no others."""
    ids = sample_ids(transfer_set.keys)
    found = find_ids(ids, table.ids)
    missing = np.flatnonzero(found < 0)
    if missing.size or len(ids) != len(table):
        named = first_offenders((table.key(int(row)) for row in missing), missing.size)
        raise DataError(
            f"{transfer_set.name}: is not the transfer set of this cache: {len(ids):,} samples, the cache has "
            f"{len(table):,}" + (f"; {missing.size} are not there: {named}" if missing.size else ""),
            tip="give --data as it was when the cache was made; other samples are dumped into a cache of their own, and "
            "`softcache merge` puts the two together",
        )
    return found


def match_members(job: Job, teachers: Sequence[Teacher]) -> list[Teacher]:
    """The teachers that have something to write, named as the cache's members where they are those already.

    Returns:
        For a new cache all of them; for more views one per member, in the cache's order; for more members the new ones (none
        when all are there).

    Raises:
        ModelError: a member of the cache is not among the teachers, or a teacher has no place.
    """
    if job.base is None:
        return list(teachers)
    known = {member.fingerprint: member for member in job.base.plan.members}
    if not job.new_views:
        fresh = [teacher for teacher in teachers if teacher.fingerprint not in known]
        taken = [member.name for member in job.base.plan.members]
        for teacher in fresh:
            if teacher.is_named and teacher.name in taken:
                raise ModelError(
                    f"the cache has a member {teacher.name!r} already, with other weights",
                    tip="give the new one a name of its own: another name=... in its spec",
                )
            teacher.name = member_name(teacher.wanted_name, taken)
            taken.append(teacher.name)
        return fresh
    left, matched = list(teachers), []
    for member in job.base.plan.members:
        found = next((teacher for teacher in left if teacher.fingerprint == member.fingerprint), None)
        if found is None:
            raise ModelError(
                f"member {member.name!r} of the cache ({member.model}) is not among the teachers: more views need every member",
                tip="give all of them as they were; weights, model and preprocessing must be the same",
            )
        found.name = member.name
        matched.append(found)
        left.remove(found)
    if left:
        raise ModelError(
            f"teacher {left[0].name!r} is no member of the cache: views and members are added one after the other",
            tip="extend the views first, then run again with the new teacher and without --views",
        )
    return matched


def make_plan(
    config: StorageOptions,
    job: Job,
    transfer_set: TransferSet,
    teachers: Sequence[Teacher],
    storages: Mapping[str, Storage],
    made_with: dict[str, Any],
) -> Plan:
    """Everything that is fixed before the first row; a new cache's fingerprint of samples is added by the writer.

    Raises:
        ModelError: a member's new views would be of another kind than those that are there.
    """
    base = job.base
    format = _format(config, base, teachers, storages)
    infos = [member_info(teacher, storages[teacher.name]) for teacher in teachers]
    if format != FORMAT_VERSION:
        infos = [replace(info, width=teacher.width) for info, teacher in zip(infos, teachers, strict=True)]
    first_part = sum(len(one.layout) for one in base.plan.rounds) if base else 0
    record_bytes = max(storage.record_bytes for storage in storages.values())
    layout = plan_layout(
        len(transfer_set),
        job.views,
        len(infos),
        bytes_of_a_row(record_bytes, job.positions),
        shard_rows=config.shard_rows,
        first_view=job.first_view,
        first_part=first_part,
        format=format,
    )
    if format != FORMAT_VERSION:
        layout = fit_layout(layout, part_bytes(record_bytes, job.positions, layout))
    index, rendered = index_of(transfer_set), transfer_set.rendering
    indexes = () if index is None or not job.new_views else (index.name,)  # which has them in all its views
    this = Round(layout, tuple(info.name for info in infos), job.new_views, made_with, indexes)
    if base is not None:
        if job.new_views:
            for info in infos:
                _check_same_member(base.plan.member(info.name), info, format)
        old = {member.name for member in base.plan.members}
        return replace(
            base.plan,
            views=replace(base.plan.views, count=max(base.plan.views.count, job.first_view + job.views)),
            members=(*base.plan.members, *(info for info in infos if info.name not in old)),
            rounds=(*base.plan.rounds, this),
        )
    return Plan(
        samples=SampleInfo(
            source=transfer_set.name,
            count=len(transfer_set),
            fingerprint="",
            digest_kind=transfer_set.digest_kind,
            has_keys=not config.no_keys,
            multi_label=transfer_set.multi_label,
            order=config.order,
            order_seed=str(config.order_seed),
        ),
        class_names=tuple(transfer_set.class_names),
        views=ViewInfo(
            job.views,
            job.policy.first_view,
            str(config.view_seed),
            job.policy.replay,
            job.policy.to_json(),
            (PIXEL_DIGESTS,) if rendered is None else (TOKEN_DIGESTS,),
        ),
        members=tuple(infos),
        rounds=(this,),
        format=format,
        indexes=() if index is None else (index,),
        vocabulary=None
        if rendered is None
        else {"count": rendered.vocabulary.count, "tokenizer": rendered.vocabulary.sha256},
        rendering=None if rendered is None else rendered.facts(),
    )


def _format(
    config: StorageOptions, base: Manifest | None, teachers: Sequence[Teacher], storages: Mapping[str, Storage]
) -> int:
    """The version that is written: the cache's own; of a new cache what was asked for, or what teachers and codecs need.

    Raises:
        ConfigError: a codec that the version of the cache does not know.
        ModelError: a teacher without classes, for whose answers it has no place.
    """
    others = [teacher for teacher in teachers if not is_of_version_1(teacher)]
    needed = max(PROVISIONAL_FORMAT if others else FORMAT_VERSION, *map(_codec_format, storages.values()))
    if base is None:
        return max(int(config.format), needed)
    if others and base.plan.format == FORMAT_VERSION:
        raise ModelError(
            f"teacher {others[0].name!r} gives {others[0].output}, and the cache is of format version {FORMAT_VERSION}, which "
            "holds classes alone",
            tip="dump it into a cache of its own (another --out), or all members again with --format 2",
        )
    if needed > base.plan.format:
        newer = [s.codec for s in storages.values() if s.codec is not None and s.codec.format > base.plan.format]
        named = ", ".join(sorted({codec.text for codec in newer}))
        raise ConfigError(
            f"--codec {named} is of format version {needed}, and this cache is of version {base.plan.format}",
            tip="choose another codec, or make a new cache",
        )
    return base.plan.format


def is_of_version_1(teacher: Teacher) -> bool:
    """Whether version 1 has a place for what it gives: a row of logits for each sample."""
    return teacher.has_classes and teacher.index is None


def _codec_format(storage: Storage) -> int:
    return FORMAT_VERSION if storage.codec is None else storage.codec.format


def _check_same_member(before: MemberInfo, now: MemberInfo, format: int) -> None:
    """The views of one member must all be of one kind, since the manifest describes them once."""
    changed = list(differences(*(json.loads(canonical_json(info.to_json(format))) for info in (now, before))))
    if changed:
        listing = "; ".join(f"{name} was {old!r}, is now {new!r}" for name, new, old in changed[:6])
        raise ModelError(
            f"member {before.name!r} would not be what it was: {listing}",
            tip="give the teacher as it was, with the same --autocast",
        )

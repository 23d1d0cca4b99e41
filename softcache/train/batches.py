"""What a student learns from: the samples as it will see them, and the place of each in the cache. All checks are done here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.cache.plan import OTHER_OUTPUTS
from softcache.config import TrainConfig
from softcache.data.class_counts import chance_warning, described, listed_warnings, offset_warning
from softcache.data.classes import class_indices, read_classes_map
from softcache.data.identity import sample_ids
from softcache.data.join import SPREAD
from softcache.data.loading import (
    LoadedBatch,
    Pair,
    Partners,
    ViewedSet,
    load_batches,
    spread_items,
    to_device,
)
from softcache.data.position_labels import PositionLabels, check_some_word
from softcache.data.transfer_set import TransferSet, open_transfer_set, under_classes
from softcache.data.views import Policy
from softcache.errors import CacheError, ConfigError, LossError, tell_once, warn
from softcache.evaluate.outputs import Beside, the_vector, vectors_of
from softcache.losses import LossTerm
from softcache.models import Input
from softcache.models.inputs import is_text
from softcache.models.item_range import ITEMS_KEY, scale_of
from softcache.models.left_out import LOOKED_AT, left_out
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache, Joined
from softcache.targets.cache import open as open_cache
from softcache.targets.ensemble import parse_members
from softcache.targets.teacher import CachedTeacher
from softcache.train.fits import check_kind, fit_warnings
from softcache.train.objective import Given, Labels
from softcache.train.pieces import Batch
from softcache.train.ranks import Ranks
from softcache.train.run_folder import pinned_cache
from softcache.train.terms import check_labels, check_mixed, check_positions, check_term, stored_members
from softcache.version import __version__


@dataclass(frozen=True)
class Output:
    """What a student gives of a sample.

    Attributes:
        kind: "logits"; "embedding" or "values".
        width: how many numbers.
        value_names: of values.
        member: who gave such; "" of classes.
    """

    kind: str
    width: int
    value_names: tuple[str, ...] = ()
    member: str = ""

    @property
    def has_classes(self) -> bool:
        return self.kind not in OTHER_OUTPUTS


@dataclass(frozen=True)
class Material:
    """The data of a run.

    Attributes:
        transfer_set: its labels and classes are the student's.
        eval_set: the same of the evaluation data; None without.
        beside: what a student without classes is compared with on the evaluation data, where the cache holds that too.
        policy: what the student sees.
        joined: each sample's place in the cache; None without a cache.
        teacher: the cache's members as one teacher; None likewise.
        partners: what mixed views are mixed with.
        ids: (N,) uint64 sample ids in the cache; None without one: those of the keys.
        given: what the student is to give.
        labelled: how many samples have a label; of several, one that is known; of words, one of them.
        drift: how the views differ from what the teacher saw, by a rounding; None where they do not.
        warnings: what is odd about the labels, about who is right on them, and about what the terms make of the targets.
    """

    transfer_set: TransferSet
    eval_set: TransferSet | None
    policy: Policy
    joined: Joined | None
    teacher: CachedTeacher | None
    partners: Partners
    ids: np.ndarray | None
    given: Output
    beside: Beside | None
    labelled: int
    drift: str | None
    warnings: tuple[str, ...] = ()

    @property
    def cache(self) -> Cache | None:
        return None if self.joined is None else self.joined.cache

    @property
    def positions(self) -> PositionLabels | None:
        """Where samples have several answers: how many each has, and their labels."""
        return self.transfer_set.positions

    def viewed(self, collates: Sequence[Any] = ()) -> ViewedSet:
        """The samples rendered by the policy, for loader workers."""
        return ViewedSet(self.transfer_set, self.policy, collates, partners=self.partners, ids=self.ids)

    def few(self, collate: Any, view: int, count: int = 2) -> LoadedBatch:
        """Two samples as training loads them, or as many; or all there are. Those without a word come last."""
        order = range(len(self.transfer_set))
        chosen = order if self.positions is None else np.argsort(self.positions.counts == 0, kind="stable").tolist()
        pairs = [(index, view) for index in chosen[:count]]
        return next(load_batches(self.viewed([collate]), [pairs]))

    @cached_property
    def some_items(self) -> list[Any]:
        """Rendered samples, spread over the set: what the student is looked at with before it learns."""
        return spread_items(self.viewed())

    @cached_property
    def sample_ids(self) -> np.ndarray:
        """(N,) uint64."""
        return sample_ids(self.transfer_set.keys) if self.ids is None else self.ids

    def facts(self, config: TrainConfig, data: str, initialised: str | None) -> dict[str, Any]:
        """What a run records of its data.

        Args:
            data: its fingerprint.
            initialised: what the student took from other weights.
        """
        cached = self.cache is not None
        return {
            "cache": self.cache.id if self.cache is not None else None,
            "data": data,
            "targets": ("mismatched" if config.augment else "matched") if cached else None,
            "drift": self.drift,
            "initialised": initialised,
            "samples": len(self.transfer_set),
            "labelled": self.labelled,
            **self._of_positions(),
            "labels_changed": self.joined.labels_changed if self.joined is not None else 0,
            "class_warnings": list(self.warnings),
        }

    def _of_positions(self) -> dict[str, int]:
        if self.positions is None:
            return {}
        labels = self.positions.labels
        return {"positions": len(labels), "labelled_positions": int((labels >= 0).sum())}

    def tell(self, *, quiet: bool) -> None:
        """Warnings of the classes; unless quiet also the class list with its counts, and how often each member is right."""
        listed_warnings(self.warnings)
        if quiet:
            return
        members = {} if self.cache is None else self.cache.manifest.statistics
        rights = [(name, one.accuracy, one.labelled) for name, one in members.items()]
        lines = [
            f"member {name}: top-1 {share:.2%} of {labelled:,} labelled records in the cache"
            for name, share, labelled in rights
            if share is not None
        ]
        for line in (described(self.transfer_set), *lines):  # of many students from one cache once
            tell_once(line)

    def left_out(self, taken: Input, *, quiet: bool) -> dict[str, Any]:
        """What a run records of texts that a student with this input does not read: nothing where that is not worth telling."""
        if not is_text(self.some_items[0]):
            return {}
        found = left_out(taken, spread_items(self.viewed(), LOOKED_AT))
        if found is None or not found.is_worth_telling:
            return {}
        if not quiet:
            print(f"the student: {found.text()}", file=sys.stderr)
        return {"left_out": found.to_json()}

    def metadata(self, taken: Input) -> dict[str, str]:
        """What the file of a student with this input says of the data it learned from."""
        scale = scale_of(taken, self.some_items)
        return {
            **({ITEMS_KEY: scale} if scale is not None else {}),
            "softcache_policy": json.dumps(self.policy.to_json()),
            "softcache_cache": self.cache.id if self.cache is not None else "",
            "softcache_version": __version__,
        }

    def batch(self, loaded: LoadedBatch, config: TrainConfig, features: Sequence[str], device: torch.device) -> Batch:
        """What a worker loaded, on the device, with its labels and its targets.

        Args:
            features: to read of the cache.
        """
        targets = self._targets(loaded, config, features, device)
        samples = torch.from_numpy(loaded.index).to(device)
        ids = torch.from_numpy(self.sample_ids[loaded.index].view(np.int64)).to(device)
        inputs = to_device(loaded.inputs[0], device)
        if self.positions is None:
            given = Given(self._labels(loaded, device), targets, samples, ids)
            return Batch(inputs, given, config.views_per_visit)
        own = self.positions.take(loaded.index)
        labels = Labels(torch.from_numpy(own.labels).to(device).long())
        rows = records = own.counts
        recorded = None
        if targets is not None and self.teacher is not None and self.teacher.index is not None:
            at, targets = targets.positions[self.teacher.index], targets.per_position(self.teacher.index)
            records = at.counts
            if len(at.numbers) < len(labels.own):
                recorded = torch.from_numpy(at.among(rows)).to(device)
        given = Given(labels, targets, samples, ids, recorded=recorded)
        return Batch(inputs, given, config.views_per_visit, rows, records)

    def _labels(self, batch: LoadedBatch, device: torch.device) -> Labels:
        """The hard labels of a batch, and of its partners where views are mixed."""

        def on_device(labels: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(labels).to(device)
            return tensor if tensor.ndim == 2 else tensor.long()

        own = on_device(self.transfer_set.labels[batch.index])
        if batch.partner_rows is None or batch.shares is None:
            return Labels(own)
        others = self.partners.transfer_set.labels[self.partners.index_of_row[batch.partner_rows]]
        return Labels(own, on_device(others), torch.from_numpy(batch.shares).to(device))

    def _targets(
        self, batch: LoadedBatch, config: TrainConfig, features: Sequence[str], device: torch.device
    ) -> Targets | None:
        """The stored targets of a batch, on the device, still encoded; None without a cache."""
        if self.joined is None or self.teacher is None:
            return None
        views = batch.views
        if config.augment:  # the student's own views; the targets stay with the cache's
            pinned = config.view is not None
            views = np.full_like(views, config.view) if pinned else views % self.joined.cache.num_views
        chosen = self.joined.gather_samples(batch.index, views, members=self.teacher.members, features=features)
        return chosen.to(device)


def open_material(config: TrainConfig, terms: Sequence[LossTerm], *, quiet: bool = True) -> Material:
    """Open data and cache, join them, and refuse whatever does not fit the terms.

    Args:
        quiet: no progress while the cache's files are hashed.

    Raises:
        SoftcacheError: and its children, each with what to do.
    """
    transfer_set = open_transfer_set(config.data, **config.selection())
    eval_set = open_transfer_set(config.eval_data, download=config.download) if config.eval_data else None
    for one in (transfer_set, eval_set):
        if one is not None:
            check_some_word(one.positions, one.name)
    cache, classes_map = _open_cache(config, quiet=quiet), read_classes_map(config.classes_map)
    if cache is not None:
        transfer_set = under_classes(transfer_set, cache.class_names, "the cache", classes_map)
    if eval_set is not None:
        eval_set = under_classes(eval_set, transfer_set.class_names, transfer_set.name)
    joined = _join(cache, transfer_set, config, classes_map) if cache is not None else None
    check_kind(terms, multi_label=transfer_set.multi_label, name=transfer_set.name)
    chosen = tuple(class_indices(transfer_set.class_names, config.classes)) if config.classes else None
    weights = parse_members(config.members)
    teacher = None if cache is None else CachedTeacher(cache, config.combine, weights, config.seed, chosen)
    if transfer_set.positions is not None:
        check_positions(terms)
    if teacher is not None:
        teacher = teacher.answering(transfer_set)
        for term in terms:
            check_term(teacher, term)
    policy = _policy(config, cache)
    if policy.mixing is not None:
        check_mixed(terms, str(policy))
    partners = joined.partners if joined else Partners(transfer_set.whole, np.arange(len(transfer_set.whole)))
    ids = joined.cache.samples.ids[joined.rows] if joined is not None else None
    drift = None
    if joined is not None and not config.augment:
        drift = _check_views(
            joined, ViewedSet(transfer_set, joined.cache.policy, (), partners=partners, ids=ids), config
        )
    if config.classes:
        transfer_set = transfer_set.with_classes(config.classes)
        eval_set = None if eval_set is None else eval_set.with_classes(config.classes)
        partners = replace(partners, transfer_set=partners.transfer_set.with_classes(config.classes))
    given, labelled = output_of(terms, teacher, transfer_set), transfer_set.labelled
    if transfer_set.positions is not None and not given.has_classes:
        raise LossError(
            f"a student of words gives classes, and no term is on them: member {given.member!r} gave {given.kind}",
            tip="learn from a member that gave classes, with kd and others on logits, or from labels with ce",
        )
    beside = None if given.has_classes or eval_set is None else _beside(cache, eval_set, given)
    check_labels(terms, labelled=labelled, name=transfer_set.name)
    warnings = list(_class_warnings(transfer_set, cache))
    if teacher is not None:
        warnings += fit_warnings(terms, stored_members(teacher), teacher.cache.num_classes)
    return Material(
        transfer_set, eval_set, policy, joined, teacher, partners, ids, given, beside, labelled, drift, tuple(warnings)
    )


def output_of(terms: Sequence[LossTerm], teacher: CachedTeacher | None, transfer_set: TransferSet) -> Output:
    """What a student of these terms gives: classes, unless no term is on them and a member gave an embedding or values.

    Then as many numbers as the first such member that a term is of, or else the first of all. Where features alone are there, as
    many as the only vector among them.

    Raises:
        LossError: the data has no classes, and a term is on them.
    """
    of_classes = [term for term in terms if term.loss.needs("student_logits") or term.loss.graft]
    if teacher is not None and not of_classes:
        said = [term.placement["member"] for term in terms if "member" in term.placement]
        for name in [*said, *teacher.members]:
            member = teacher.cache.member(name)
            if member.output in OTHER_OUTPUTS:
                return Output(member.output, member.width or 0, tuple(member.value_names), name)
        for name in () if teacher.class_members else (*said, *teacher.members):
            widths = vectors_of(teacher.cache, name)
            if len(widths) == 1 or not transfer_set.num_classes:
                return Output("embedding", widths[the_vector(teacher.cache, name)], (), name)
    if not transfer_set.num_classes:
        raise LossError(
            f"{transfer_set.name} has no classes, and "
            + (f"loss {of_classes[0].name!r} is on them" if of_classes else "no member gave an embedding or values"),
            tip="learn from an embedding or from values: --loss cosine, mse; or say how many classes there are: classes=10",
        )
    return Output("logits", transfer_set.num_classes)


def _beside(cache: Cache | None, eval_set: TransferSet, given: Output) -> Beside | None:
    """The member on the evaluation data, where the cache holds all of it as it is evaluated; else None."""
    if cache is None or cache.policy.is_random or (cache.find(list(eval_set.keys)) < 0).any():
        return None
    return Beside(cache.join(eval_set), given.member)


def _class_warnings(transfer_set: TransferSet, cache: Cache | None) -> Iterator[str]:
    """What is odd about the labels, and members of the cache that are right no oftener than chance."""
    if (offset := offset_warning(transfer_set)) is not None:
        yield offset
    if cache is None:
        return
    for name, s in cache.manifest.statistics.items():
        # views of one sample are no further samples
        views = cache.num_views if cache.member(name).index else max(1, s.records // max(1, len(cache)))
        counted = s.correct / views, s.labelled / views, cache.num_classes
        told = chance_warning(f"member {name!r} of the cache", *counted, cache.member(name).index or "samples")
        if told is not None:
            yield told


def visits(
    order: np.ndarray, views: Sequence[int], batch_size: int, ranks: Ranks, *, start: int = 0
) -> Iterator[list[Pair]]:
    """This rank's (index, view) pairs of each batch, from batch number `start` on: every view of a sample side by side."""
    for first in range(start * batch_size, len(order), batch_size):
        batch = order[first : first + batch_size]
        yield [(index, view) for index in batch[ranks.own(len(batch))].tolist() for view in views]


def views_of(epoch: int, cache: Cache | None, config: TrainConfig) -> list[int]:
    """The student's views in an epoch: with a cache e mod V, or the pinned one; of the student's own a fresh one."""
    if cache is not None and config.view is not None and not config.augment:
        return [config.view]
    taken = range(epoch * config.views_per_visit, (epoch + 1) * config.views_per_visit)
    return [view if cache is None or config.augment else view % cache.num_views for view in taken]


def _open_cache(config: TrainConfig, *, quiet: bool) -> Cache | None:
    """The cache to learn from; a run that is resumed stays with the manifest it began with."""
    if config.cache is None:
        return None
    out = Path(config.out)
    before = pinned_cache(out)
    try:
        cache = open_cache(
            config.cache,
            id=before or config.cache_id,
            mode=config.read,  # type: ignore[arg-type]
            check_blocks=config.check_blocks,  # type: ignore[arg-type]
            check_files=config.check_files == "yes",
            allow_code=config.allow_code,
            quiet=quiet,
        )
    except CacheError as exc:
        if before is not None:
            exc.add_note(f"{out} began with cache {before}; another one needs another --out")
        raise
    if config.view is not None and not 0 <= config.view < cache.num_views:
        raise ConfigError(f"--view {config.view}: the cache has views 0 to {cache.num_views - 1}")
    if config.views_per_visit > cache.num_views and not config.augment:
        raise ConfigError(
            f"--views-per-visit {config.views_per_visit}: of each sample the cache has {cache.num_views}",
            tip="dump more: softcache dump --extend --views N"
            if cache.policy.is_random
            else "its views are all alike: dump with a random step, such as --policy crop_flip --views N",
        )
    return cache


def _join(cache: Cache, transfer_set: TransferSet, config: TrainConfig, classes_map: Mapping[str, str]) -> Joined:
    return cache.join(
        transfer_set,
        by=config.join,  # type: ignore[arg-type]
        labels=config.labels,  # type: ignore[arg-type]
        check_content=None if config.check_content == "auto" else config.check_content,  # type: ignore[arg-type]
        classes_map=None if transfer_set.class_names == cache.class_names else classes_map,
    )


def _policy(config: TrainConfig, cache: Cache | None) -> Policy:
    """What the student sees: the cache's own views, at its own size if asked; or others, which the targets do not fit."""
    if cache is None or config.augment:
        return Policy.parse(config.augment or config.policy, config.view_seed)
    return cache.policy if config.size is None else cache.policy.at_size(config.size)


def _check_views(joined: Joined, viewed: ViewedSet, config: TrainConfig) -> str | None:
    """Some records, spread over samples and views, must render to the pixels the teacher saw; a rounding is told once."""
    cache, count = joined.cache, len(joined)
    index_of_row = Partners.of(viewed.transfer_set, joined.rows, len(cache)).index_of_row

    def render(row: int, view: int) -> Any:
        index = int(index_of_row[row])
        return None if index < 0 else viewed.render(index, view)

    index = np.unique(np.linspace(0, count - 1, min(SPREAD, count)).astype(np.int64))
    views = np.arange(len(index), dtype=np.int64) % cache.num_views
    items = [viewed.render(int(i), int(v)) for i, v in zip(index, views, strict=True)]
    drift = cache.check_pixels(items, joined.rows[index].astype(np.int64), views, render, on_drift=config.on_drift)
    if drift is None:
        return None
    warn(f"{drift}; the run records it")
    return str(drift)

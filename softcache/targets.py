"""softcache.open(path) -> Cache: join, gather, decode. The public door for any training loop.

joined = softcache.open("caches/a").join(train_set)
for (images, labels), records in DataLoader(joined, batch_size=128, shuffle=True):
    teacher_logits = joined.gather(records).logits()
    loss = 0.9 * kd(student(images), teacher_logits, temperature=4) + 0.1 * ce(student(images), labels)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from softcache.cache.manifest import Manifest, MemberInfo
from softcache.cache.reader import CacheReader, ReadMode
from softcache.cache.samples import SampleTable
from softcache.codecs import Codec, make_codec
from softcache.data.identity import pixel_digest
from softcache.data.join import ContentCheck, JoinBy, join, replace_item
from softcache.data.philox import Draws, step_key
from softcache.data.views import Policy
from softcache.ensemble import KEEPS_LEVEL, combine
from softcache.errors import CacheError, DriftError, first_offenders, nearest

__all__ = ["Cache", "Joined", "Targets", "open"]


@dataclass(frozen=True)
class Targets:
    """The stored targets of one batch, still encoded; decoded on whatever device they are moved to.

    Attributes:
        rows, views: (B,) int64 place of each record in the cache.
        arrays: member -> data set -> (B, ...) stored values.
        codecs: member -> codec.
        samples: the cache's sample table, read only when labels or ids are asked for.
    """

    rows: np.ndarray
    views: np.ndarray
    samples: SampleTable
    arrays: Mapping[str, Mapping[str, Tensor]]
    codecs: Mapping[str, Codec]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Targets:
        """The same targets with the stored values on another device."""
        moved = {
            member: {name: value.to(device, non_blocking=non_blocking) for name, value in arrays.items()}
            for member, arrays in self.arrays.items()
        }
        return replace(self, arrays=moved)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    @property
    def labels(self) -> Tensor:
        """(B,) int64 class index or -1, or (B, C) bool, on the CPU; as the cache holds them."""
        return torch.from_numpy(self.samples.labels_of(self.rows))

    @property
    def sample_ids(self) -> np.ndarray:
        """(B,) uint64."""
        return self.samples.ids[self.rows]

    def logits(self, member: str | None = None) -> Tensor:
        """(B, C) float32 logits of one member (default: the only one).

        Raises:
            CacheError: no such member, or several and none named.
        """
        if member is None:
            if len(self.arrays) > 1:
                raise CacheError(
                    f"this cache has {len(self.arrays)} members: {', '.join(self.arrays)}",
                    tip="name one: logits(member), or combine them: combined(rule)",
                )
            member = next(iter(self.arrays))
        if member not in self.arrays:
            raise CacheError(f"no member {member!r}", tip=nearest(member, self.arrays))
        return self.codecs[member].decode(self.arrays[member])

    def combined(
        self,
        rule: str = "mean_logits",
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        link: str = "softmax",
        draw_seed: int = 0,
    ) -> Tensor:
        """(B, C) float32 logits of the ensemble: softmax(result / T) is its soft target at T.

        Args:
            rule: one of COMBINE_RULES, see `softcache.ensemble.combine`.
            weights: member -> weight, for the members to use; None = all, equally.
            temperature: of the loss that asks.
            link: "softmax", or "sigmoid" for multi-label targets.
            draw_seed: of the rule "draw", which picks a member per sample and view.
        """
        chosen = self.members if weights is None else tuple(weights)
        logits = [self.logits(member) for member in chosen]
        if len(logits) == 1 and rule in KEEPS_LEVEL:
            return logits[0]
        draws = self._draws(draw_seed) if rule == "draw" else None
        return combine(
            logits,
            rule,
            weights=None if weights is None else [weights[member] for member in chosen],
            temperature=temperature,
            link=link,
            draws=draws,
        )

    def _draws(self, seed: int) -> Tensor:
        """(B,) float64 numbers in [0, 1), a function of (seed, sample id, view) alone."""
        key = step_key("member", 0)
        pairs = zip(self.sample_ids.tolist(), self.views.tolist(), strict=True)
        return torch.tensor([Draws(seed, key, sample, view).uniform() for sample, view in pairs], dtype=torch.float64)


class Cache:
    """A committed cache, opened for reading. Pickles by path and id; nothing is written into the folder."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader
        self.codecs = {m.name: make_codec(m.codec["name"]) for m in self.manifest.plan.members}
        self._names = {  # what decoding takes; the error bounds are read only when asked for
            member: [name for name in codec.arrays(self.num_classes) if name != "eps"]
            for member, codec in self.codecs.items()
        }

    @property
    def manifest(self) -> Manifest:
        return self.reader.manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest.plan.class_names)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.plan.class_names)

    @property
    def num_views(self) -> int:
        return self.manifest.plan.views.count

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.manifest.plan.members)

    def member(self, name: str) -> MemberInfo:
        for member in self.manifest.plan.members:
            if member.name == name:
                return member
        raise CacheError(f"{self.reader.path}: no member {name!r}", tip=nearest(name, self.members))

    @property
    def samples(self) -> SampleTable:
        return self.reader.samples

    @property
    def policy(self) -> Policy:
        """The view policy that the teacher's inputs were rendered with."""
        views = self.manifest.plan.views
        return Policy.from_json(views.steps, int(views.root_seed))

    def __len__(self) -> int:
        return len(self.samples)

    def gather(self, rows: np.ndarray, views: np.ndarray, *, members: Sequence[str] | None = None) -> Targets:
        """The targets of B (row, view) pairs.

        Args:
            rows, views: (B,) integers.
            members: which members to read; None = all.

        Raises:
            IndexError: a row or view outside the cache.
        """
        names = self.members if members is None else members
        arrays = {}
        for member in names:
            if member not in self.codecs:
                raise CacheError(f"{self.reader.path}: no member {member!r}", tip=nearest(member, self.members))
            arrays[member] = {
                name: torch.from_numpy(self.reader.gather(member, name, rows, views)) for name in self._names[member]
            }
        codecs = {name: self.codecs[name] for name in names}
        return Targets(rows, views, self.samples, arrays, codecs)

    def eps(self, member: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B,) float32 bound on |stored - given| over the logits of each record."""
        return self.reader.gather(member, "eps", rows, views).astype(np.float32)

    def join(
        self,
        dataset: Any,
        *,
        keys: Sequence[str] | None = None,
        by: JoinBy = "key",
        labels: Literal["cache", "dataset"] = "cache",
        check_content: ContentCheck | None = None,
    ) -> Joined:
        """The data set with each sample's place in this cache; see `softcache.data.join.join` for arguments and errors."""
        rows, changed = join(
            self.samples,
            dataset,
            self.class_names,
            keys=keys,
            by=by,
            labels=labels,
            check_content=check_content,
            digest_kind=self.manifest.plan.samples.digest_kind,
        )
        return Joined(self, dataset, rows, labels_changed=changed)

    def check_pixels(self, items: Sequence[Any], rows: np.ndarray, views: np.ndarray) -> None:
        """Raise DriftError unless rendered items are, bit for bit, what the teacher saw.

        Args:
            items: B rendered views.
            rows, views: (B,) their places in the cache.
        """
        stored = self.reader.gather(None, "pixel_digests", rows, views)
        found = np.array([pixel_digest(item) for item in items], dtype=np.uint32)
        where = np.flatnonzero(stored != found)
        if where.size:
            made = self.manifest.plan.made_with
            raise DriftError(
                f"{where.size} of {len(items)} checked views render to other pixels than the teacher saw: "
                + first_offenders((self.samples.key(int(rows[i])) for i in where), where.size),
                tip=f"the cache was made with softcache {made['softcache']}, torch {made['torch']}, torchvision "
                f"{made['torchvision']}; check the decoder's and torchvision's versions and the data set",
            )

    def __getstate__(self) -> CacheReader:
        return self.reader

    def __setstate__(self, reader: CacheReader) -> None:
        self.__init__(reader)  # type: ignore[misc]


class Joined(Dataset[Any]):
    """A data set whose samples know their place in a cache: joined[i] -> (sample, record).

    `record` is view * num_rows + row, one integer that a DataLoader collates by itself; `gather(records)` turns a batch of
    them into Targets. The sample is what the data set gives, its item rendered as the cache's view.

    Attributes:
        rows: (N,) row of the cache for each sample.
        view: the view index that items are rendered at.
        labels_changed: samples whose label differs from the cache's (allowed by labels="dataset").
    """

    def __init__(self, cache: Cache, dataset: Any, rows: np.ndarray, *, view: int = 0, labels_changed: int = 0) -> None:
        self.cache, self.dataset, self.rows, self.view = cache, dataset, rows, view
        self.labels_changed = labels_changed
        self._policy = cache.policy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row, sample = int(self.rows[index]), self.dataset[index]
        if self._policy.steps:
            sample_id = int(self.cache.samples.ids[row])
            sample = replace_item(sample, lambda item: self._policy.render(item, sample_id, self.view))
        return sample, self.view * len(self.cache) + row

    def for_view(self, view: int) -> Joined:
        """The same join, its items rendered at another view: one per epoch, `epoch % cache.num_views`."""
        if not 0 <= view < self.cache.num_views:
            raise IndexError(f"view {view} is outside 0..{self.cache.num_views - 1}")
        return Joined(self.cache, self.dataset, self.rows, view=view, labels_changed=self.labels_changed)

    def gather(self, records: Tensor | np.ndarray, *, members: Sequence[str] | None = None) -> Targets:
        """The targets of a batch of records, in the batch's order."""
        if isinstance(records, Tensor):
            records = records.cpu().numpy()
        views, rows = np.divmod(np.asarray(records, dtype=np.int64), len(self.cache))
        return self.cache.gather(rows, views, members=members)

    def gather_samples(self, index: np.ndarray, views: np.ndarray, *, members: Sequence[str] | None = None) -> Targets:
        """The targets of samples given by their position in the data set, at the given views."""
        return self.cache.gather(self.rows[index].astype(np.int64), views, members=members)


def open(path: str | os.PathLike[str], *, id: str | None = None, mode: ReadMode = "mmap") -> Cache:
    """Open a cache for reading.

    Args:
        path: the folder that `softcache dump` wrote; read-only mounts work.
        id: pin a manifest by its id (a unique prefix is enough); None = the newest.
        mode: "mmap", or "pread" for network file systems.

    Raises:
        CacheError: not a cache; UnfinishedCacheError: a dump under way; DamagedCacheError: files that do not fit the manifest.
    """
    return Cache(CacheReader(path, id=id, mode=mode))

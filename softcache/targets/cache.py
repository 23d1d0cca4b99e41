"""softcache.open(path) -> Cache: join, gather, decode. The public door for any training loop.

joined = softcache.open("caches/a").join(train_set)
for (images, labels), records in DataLoader(joined, batch_size=128, shuffle=True):
    teacher_logits = joined.gather(records).logits()
    loss = 0.9 * kd(student(images), teacher_logits, temperature=4) + 0.1 * ce(student(images), labels)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from softcache.cache.card.teachers import codec_text
from softcache.cache.checksums import CheckBlocks
from softcache.cache.manifest import Manifest
from softcache.cache.plan import CLASS_OUTPUTS, FeatureInfo, MemberInfo
from softcache.cache.positions import PositionIndex
from softcache.cache.reader import CacheReader
from softcache.cache.row_table import ReadMode
from softcache.cache.samples import SampleTable
from softcache.cache.schema import MANIFEST, OUTPUT_PREFIX, PROVISIONAL_FORMAT, WORK
from softcache.codecs.codec import widened
from softcache.data.drift import Drift, Render, check_drift
from softcache.data.foreign import check_map_style, dataset_keys, item_of, label_of, replace_item
from softcache.data.identity import pixel_digest, sample_ids
from softcache.data.join import ContentCheck, JoinBy, find_ids, join
from softcache.data.loading import Partners
from softcache.data.same_positions import check_counts, check_listed, check_position_labels
from softcache.data.same_tokens import check_same_rendering
from softcache.data.tables import item_column, with_columns
from softcache.data.views import Policy
from softcache.data.word_samples import are_strings, kept_positions, positions_of
from softcache.errors import CacheError, DataError, LabelMismatchError, nearest, note_once, warn_once
from softcache.features.spec import SCALES
from softcache.remote.opened import open_place
from softcache.remote.places import has_id, is_place, parse_place
from softcache.report.progress import Meter
from softcache.targets.batch import Targets
from softcache.targets.described import member_codec, member_feature
from softcache.targets.forms import JoinedForm, as_dict, as_pair
from softcache.targets.output_scale import scale_factor
from softcache.targets.positions import BatchPositions

__all__ = ["Cache", "Joined", "Targets", "open"]


class Cache:
    """A committed cache, opened for reading: what `softcache.open` gives. Nothing is written into its folder.

    It pickles by path and id, so that a worker process opens maps of its own. `len(cache)` is its number of samples, N.

    Attributes:
        reader: the stored arrays, undecoded.
        codecs: member -> its codec; none of a member of features alone.
        features: member -> feature (`layer:reduction`) -> how it is stored.
        allow_code: whether transforms that the cache names may be called.
    """

    def __init__(self, reader: CacheReader, *, allow_code: bool = False) -> None:
        self.reader, self.allow_code = reader, allow_code
        members = self.manifest.plan.members
        self._has_indexes = bool(self.manifest.plan.indexes)
        self.codecs = {member.name: member_codec(reader, member) for member in members if member.codec is not None}
        self.features = {m.name: {f.name: member_feature(reader, m.name, f) for f in m.features} for m in members}
        self._others = {m.name: m.output for m in members if m.output not in CLASS_OUTPUTS}

    @property
    def manifest(self) -> Manifest:
        """What was dumped and how, and every file with its hash: the one that was opened, whatever is added later."""
        return self.reader.manifest

    @property
    def id(self) -> str:
        """The manifest's sha256 in hex: another id, another cache."""
        return self.manifest.id

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names, in the order of the logits' columns; none where no member has an output of classes."""
        return tuple(self.manifest.plan.class_names)

    @property
    def multi_label(self) -> bool:
        """Its samples have several labels, each a yes or no: soft targets are sigmoids."""
        return self.manifest.plan.samples.multi_label

    @property
    def num_classes(self) -> int:
        """C."""
        return self.manifest.plan.num_classes

    @property
    def num_views(self) -> int:
        """V, the views of each sample."""
        return self.manifest.plan.views.count

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the ensemble's members; one for a single teacher."""
        return tuple(member.name for member in self.manifest.plan.members)

    def member(self, name: str) -> MemberInfo:
        """What the manifest says of a member: model, fingerprint, output, codec, features; CacheError where there is none."""
        for member in self.manifest.plan.members:
            if member.name == name:
                return member
        raise CacheError(f"{self.reader.path}: no member {name!r}", tip=nearest(name, self.members))

    @property
    def samples(self) -> SampleTable:
        """Who the samples are, by row: ids (N,) uint64, labels, keys and content digests (N, 16) uint8."""
        return self.reader.samples

    @property
    def policy(self) -> Policy:
        """The view policy that the teacher's inputs were rendered with; ConfigError where this version renders it otherwise."""
        return Policy.of_cache(self.manifest.plan.views, allow_code=self.allow_code)

    def __len__(self) -> int:
        return len(self.samples)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """(len(keys),) int64 row of each sample key, -1 where the cache does not hold it.

        Example:
            >>> row, missing = cache.find(["synthetic/train/000003", "nobody"]).tolist()
            >>> cache.samples.key(row), missing
            ('synthetic/train/000003', -1)
        """
        return find_ids(self.samples.ids, sample_ids(keys))

    def gather(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        *,
        members: Sequence[str] | None = None,
        features: Sequence[str] = (),
    ) -> Targets:
        """The targets of B (row, view) pairs, in their order, on the CPU and still encoded.

        Args:
            rows, views: (B,) integers.
            members: which members to read; None = all.
            features: which features to read as well (`layer:reduction`), of every one of these members that has them.

        Raises:
            IndexError: a row or view outside the cache.
            CacheError: no such member, or none of them has a feature.
            DamagedCacheError: a block of 64 KiB that is read has other bytes than were written.

        Example:
            >>> targets = cache.gather(np.array([5, 0, 5]), np.array([1, 0, 1]))
            >>> logits = targets.logits()
            >>> logits.shape, logits.dtype, torch.equal(logits[0], logits[2])
            (torch.Size([3, 10]), torch.float32, True)
        """
        names = self.members if members is None else members
        arrays = {member: self._gather(member, rows, views) for member in names}
        codecs = self.codecs
        if members is not None:
            codecs = {name: codecs[name] for name in names if name in codecs}
        others = self._others
        if others and members is not None:
            others = {name: others[name] for name in names if name in others}
        found = {(m, f): self.features[m][f] for m in names for f in features if f in self.features[m]}
        for feature in features:
            if not any(feature == name for _, name in found):
                known = [name for member in names for name in self.features[member]]
                raise CacheError(
                    f"{self.reader.path}: no feature {feature!r}",
                    tip=nearest(feature, known) if known else "dump again with --features",
                )
        for (member, _), cached in found.items():
            read = self.stored if self._has_indexes else self.reader.gather
            for name in cached.arrays():
                arrays[member][name] = torch.from_numpy(read(member, name, rows, views))
        if not self._has_indexes:
            return Targets(rows, views, self.samples, arrays, codecs, found, others)
        index_of: dict[str | tuple[str, str], str] = {}
        index_of |= {name: index for name in names if (index := self.member(name).index) is not None}
        index_of |= {key: index for key in found if (index := self._feature_info(*key).index) is not None}
        positions = {name: self.positions(name, rows, views) for name in dict.fromkeys(index_of.values())}
        return Targets(rows, views, self.samples, arrays, codecs, found, others, positions, index_of)

    def positions(self, index: str, rows: np.ndarray, views: np.ndarray) -> BatchPositions:
        """What an index says of B (row, view) pairs: how many positions each has, which ones, their labels.

        Raises:
            CacheError: there is no such index.
        """
        found, plan = self.reader.index(index), self.manifest.plan
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        numbers, kind = found.positions(rows, views), plan.index(index)
        return BatchPositions(
            index,
            numbers.offsets,
            numbers.values,
            found.labels(rows, views).values if kind.labels else None,
            found.entries(rows, views).values if kind.kind == "candidates" else None,
            found.shapes(rows, views) if kind.kind == "grid" else None,
        )

    def _feature_info(self, member: str, feature: str) -> FeatureInfo:
        return next(info for info in self.member(member).features if info.name == feature)

    def stored(self, member: str, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The stored values of one data set of a member: (B, ...) records of B pairs, or (P, ...) of all their positions."""
        if self.reader.index_of(member, name) is None:
            return self.reader.gather(member, name, rows, views)
        return self.reader.slices(member, name, rows, views).values

    def head(self, member: str) -> tuple[Tensor, Tensor | None] | None:
        """As `classifier`, by its old name: for one version more."""
        warnings.warn("Cache.head is now Cache.classifier", DeprecationWarning, stacklevel=2)
        return self.classifier(member)

    def classifier(self, member: str) -> tuple[Tensor, Tensor | None] | None:
        """(C, D) float32 weight and (C,) float32 bias (None: it has none) of a member's final linear layer, on the CPU.

        Returns:
            None where the cache does not keep it: it is there beside features, and in the codec linear_head.

        Raises:
            CacheError: no such member, or what is stored is no layer of its classes.
        """
        stored = self.reader.constants(member)
        codec = self.codecs.get(member)
        if codec is None:
            return None
        for prefix in ("head_", "codec_") if codec.needs_classifier else ("head_",):
            if f"{prefix}weight" in stored:
                bias = stored.get(f"{prefix}bias")
                shapes = [array.shape[:1] for array in (stored[f"{prefix}weight"], bias) if array is not None]
                if stored[f"{prefix}weight"].ndim != 2 or set(shapes) != {(codec.num_classes,)}:
                    raise CacheError(
                        f"{self.reader.path}: the stored layer of member {member!r} is not one of its outputs"
                    )
                weight = widened(torch.tensor(stored[f"{prefix}weight"], device="cpu"))
                return weight, None if bias is None else torch.tensor(bias, device="cpu")
        return None

    def output_scale(self, member: str, kind: str) -> tuple[Tensor, Tensor]:
        """(W,) mean and what (x - mean) is multiplied with, of a member's embedding or values: measured at the dump, stored once.

        What is stored is as the teacher gave it; this brings numbers of any size to deviations of about 1.

        Args:
            kind: "member": by one number, the root of the mean variance, so that directions and proportions stay; "each": each
                number by its own deviation; "whiten": and by the correlations between them, from a dump with `--whiten`.

        Returns:
            (W,) float32 mean, and (W,) float32 numbers, or for "whiten" a (W, W) matrix from the right; on the CPU.

        Raises:
            CacheError: no such member, kind or scale.

        Example:
            >>> embedded = softcache.open("caches/embedded")
            >>> mean, factor = embedded.output_scale("teacher", "each")
            >>> numbers = (embedded.gather(np.arange(64), np.zeros(64, np.int64)).embedding() - mean) * factor
            >>> bool((numbers.std(dim=0) - 1).abs().max() < 0.1)
            True
        """
        if kind not in SCALES:
            raise CacheError(f"unknown scale {kind!r}", tip=nearest(kind, SCALES))
        width, what = self.member(member).width, f"member {member!r}"
        found = {
            name.removeprefix(OUTPUT_PREFIX): torch.tensor(array, device="cpu")
            for name, array in self.reader.constants(member).items()
            if name.startswith(OUTPUT_PREFIX)
        }
        for name, value in found.items():
            shape = (width, width) if name == "whitening" else (width,)
            if tuple(value.shape) != shape or value.dtype != torch.float32 or not bool(value.isfinite().all()):
                raise CacheError(f"{self.reader.path}: the stored {name} of {what} is not one of its {width} numbers")
        factor = scale_factor(found, kind, what)
        return found["mean"], factor

    def _gather(self, member: str, rows: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """What decoding takes of one member; the bounds are read only when asked for."""
        codec = self.codecs.get(member)
        if codec is None:
            self.member(member)  # refuses one that is not there; this one keeps features alone
            return {}
        read = self.stored if self._has_indexes else self.reader.gather
        found = {name: read(member, name, rows, views) for name in codec.arrays}
        for field in codec.fields:
            if field.name == "dense":
                raw = found["records"][:, field.offset : field.offset + 4]
                numbers = np.ascontiguousarray(raw).view("<u4")[:, 0]
                at = np.flatnonzero(numbers)
                if at.size:
                    if (index := self.member(member).index) is not None:
                        counts = self.reader.index(index).counts(rows, views)
                        rows, views = np.repeat(rows, counts), np.repeat(views, counts)
                    found["dense"] = self.reader.dense(member, rows[at], views[at], numbers[at])
                    found["dense_at"] = at
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def eps(self, member: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B,) float32 bound on |stored - given| over the logits of each record; CacheError where its codec has none.

        Of a member whose records are of positions (P,).
        """
        if self.member(member).codec is None or not self.codecs[member].bounded:
            codec = codec_text(self.member(member).codec)
            raise CacheError(f"codec {codec!r} of member {member!r} has no bound on single logits")
        return self.stored(member, "eps", np.asarray(rows), np.asarray(views)).astype(np.float32)

    def join(
        self,
        dataset: Any,
        *,
        keys: Sequence[str] | Literal["position"] | None = None,
        key: str | None = None,
        item: str | None = None,
        label: str | None = None,
        by: JoinBy = "key",
        labels: Literal["cache", "dataset"] = "cache",
        check_content: ContentCheck | None = None,
        whole: Any = None,
        classes_map: Mapping[str, str] | None = None,
    ) -> Joined:
        """The data set with each sample's place in this cache, after every check.

        Args:
            dataset: map-style, of N samples; its names are asked for (`sample_keys`), through `Subset` and `ConcatDataset` too. A
                Hugging Face data set and a pandas DataFrame give their rows as dicts.
            keys: N names of its samples in its order, where it does not know them itself; "position": sample i is the one that
                the cache knows by number i, of a class of yours that was made of one of torchvision's, say.
            key, item, label: of a table, the columns of its samples' names, of what the teacher saw, and of their labels. None of
                `item`: item, image or text; None of `label`: label or labels.
            by: "key", or "content": by the digests of what the samples hold.
            labels: "dataset" allows labels that differ from the cache's.
            check_content: compare what samples hold with what the teacher saw: "none", "spread" (64 samples) or "full", and
                refuse where that cannot be done. None: "spread", and where it cannot be done that is said on stderr, once.
            whole: under a policy that mixes, where partners are found; None: the data set itself, or what it was selected from.
            classes_map: data set's class -> cache's class, for those that are called otherwise.

        Raises:
            MissingSampleError: samples that the cache does not hold.
            LabelMismatchError: labels that differ from the cache's, of samples or of their words.
            ContentMismatchError: samples that hold something else than the teacher saw, or are cut into words otherwise.
            ClassMismatchError: other classes, or in another order.
            RenderingError: tokens of another vocabulary, or texts that were made into tokens otherwise.
            JoinError: a data set that can only be iterated, or whose samples have no names.

        Example:
            >>> joined = cache.join(data)
            >>> len(joined), joined.labels_changed
            (64, 0)
            >>> (image, label), record = joined[3]
            >>> image.shape, label == int(data.labels[3])
            ((32, 32, 3), True)
        """
        check_map_style(dataset)
        dataset = with_columns(dataset, key=key, item=item, label=label)
        if whole is not None:
            whole = with_columns(whole, key=key, item=item, label=label)
        check_same_rendering(self.manifest.plan, self.reader.tokenizer(), dataset)
        found = join(
            self.samples,
            dataset,
            self.class_names,
            keys=keys,
            by=by,
            labels=labels,
            check_content=check_content,
            digest_kind=self.manifest.plan.samples.digest_kind,
            as_dumped=self._as_dumped,
            same_pixels=self._same_pixels,
            classes_map=classes_map,
        )
        changed = found.changed + self._check_positions(dataset, found.rows, allow=labels == "dataset")
        return Joined(self, dataset, found.rows, labels_changed=changed, whole=whole, watch_labels=found.watch)

    def _check_positions(self, dataset: Any, rows: np.ndarray, *, allow: bool) -> int:
        """The positions of the samples must be those of the cache's indexes of that kind; how many of their labels differ."""
        plan = self.manifest.plan
        indexes = [self.reader.index(info.name) for info in plan.indexes if info.kind in ("words", "tokens")]
        if not indexes or not len(rows):
            return 0
        if plan.vocabulary is not None:
            self._check_tokens(dataset, rows, indexes)
            return 0
        own = positions_of(dataset, self.class_names)
        if own is None:
            warn_once(
                f"the cache has answers about words, and whether {type(dataset).__name__} has the same ones is not known: give "
                "its samples as dicts of 'words' and 'tags', or see to it that each has as many words, in their order"
            )
            return 0
        changed = 0
        for index in indexes:
            check_counts(index, rows, own.counts, self.samples.key)
            changed += check_position_labels(index, rows, own.counts, own.labels, self.samples.key, allow=allow)
        return changed

    def _check_tokens(self, dataset: Any, rows: np.ndarray, indexes: Sequence[PositionIndex]) -> None:
        """The tokens of a data set that keeps them, and which carry loss, must be the cache's: those of each sample."""
        own = kept_positions(dataset)
        if own is None or own.kind != "tokens":
            return  # contents tell, where they can be compared
        for index in indexes:
            check_counts(index, rows, own.lengths, self.samples.key)
            check_listed(index, rows, own.counts, own.listed, self.samples.key)

    def _as_dumped(self, item: Any) -> bool:
        """Whether an item is of the kind that the teacher was given, as far as the cache tells: by its probe, if it has one."""
        if isinstance(item, str | bytes | Image.Image):
            return True
        if are_strings(item):
            return any(info.kind == "words" for info in self.manifest.plan.indexes)
        shapes = self.reader.probe().get("shapes", np.zeros((0, 3)))
        kinds = {tuple(int(n) for n in shape if n) for shape in shapes}
        is_image = str(getattr(item, "dtype", "")).removeprefix("torch.") == "uint8"
        return is_image and bool(kinds) and (bool(self.manifest.plan.views.steps) or tuple(item.shape) in kinds)

    def _same_pixels(self, items: Sequence[Any], rows: np.ndarray) -> bool:
        """Whether these samples, rendered as their first view, have the pixels that the teacher saw."""
        policy = self.policy
        if policy.mixing is not None:
            return False
        ids = self.samples.ids[rows]
        rendered = [policy.render(item, int(one), 0) for item, one in zip(items, ids, strict=True)]
        digests = np.array([pixel_digest(item) for item in rendered], dtype=np.uint32)
        return bool(
            (self.reader.gather(None, self.manifest.plan.views.digests[0], rows, np.zeros_like(rows)) == digests).all()
        )

    def check_pixels(
        self, items: Sequence[Any], rows: np.ndarray, views: np.ndarray, render: Render, *, on_drift: str = "error"
    ) -> Drift | None:
        """Compare rendered items with what the teacher saw; and judge.

        Args:
            items: B rendered views.
            rows, views: (B,) their places in the cache.
            render: (row, view) -> the rendered item, None where the sample is not at hand; for the probe.
            on_drift: "error", or "warn", which tolerates any difference.

        Returns:
            None where all pixels are the teacher's; a Drift where they are at most 2 of 255 apart.

        Raises:
            DriftError: they are further apart, or a sample is another one.
        """
        digests = np.array([pixel_digest(item) for item in items], dtype=np.uint32)
        return check_drift(self.reader, rows, views, digests, render, on_drift=on_drift)

    def __getstate__(self) -> tuple[CacheReader, bool]:
        return self.reader, self.allow_code

    def __setstate__(self, state: tuple[CacheReader, bool]) -> None:
        self.__init__(state[0], allow_code=state[1])  # type: ignore[misc]


class Joined(Dataset[Any]):
    """A data set whose samples know their place in a cache: joined[i] -> (sample, record).

    `record` is view * num_rows + row, one integer that a DataLoader collates by itself; `gather(records)` turns a batch of
    them into Targets. The sample is what the data set gives, its item rendered as the cache's view. Where views are mixed,
    joined[i] is (sample, record, partner row, share): the row of the sample it is mixed with, and the weight of its own label.

    Attributes:
        rows: (N,) row of the cache for each sample.
        labels_changed: samples whose label differs from the cache's (allowed by labels="dataset").
        item_column: of a table, where its items are; None otherwise.
    """

    def __init__(
        self,
        cache: Cache,
        dataset: Any,
        rows: np.ndarray,
        *,
        view: int = 0,
        labels_changed: int = 0,
        whole: Any = None,
        watch_labels: bool = False,
    ) -> None:
        self.cache, self.dataset, self.rows = cache, dataset, rows
        self.labels_changed, self._watch_labels = labels_changed, watch_labels
        self.whole = getattr(dataset, "whole", dataset) if whole is None else whole
        self._policy, self.item_column = cache.policy, item_column(dataset)
        self._view = _shared(view)
        self._gathered: int | None = 0  # records of the present view; None once a second pass was told

    @property
    def view(self) -> int:
        """The view index that items are rendered at; assigning another one reaches loader workers that are running."""
        return int(self._view)

    @view.setter
    def view(self, view: int) -> None:
        self._check_view(view)
        if view != self.view:
            self._view[0] = view
            self._gathered = None if self._gathered is None else 0

    def set_epoch(self, epoch: int) -> None:
        """Render the view of an epoch from now on, `epoch % cache.num_views`; loader workers that are running do so too.

        Accelerate, and so the Trainer of transformers, call it before each epoch by themselves; in Lightning one line does:
        `def on_train_epoch_start(self): joined.set_epoch(self.current_epoch)`.

        Example:
            >>> joined.set_epoch(3)
            >>> joined.view == 3 % cache.num_views
            True
            >>> joined.view = 0
        """
        self.view = epoch % self.cache.num_views

    def _check_view(self, view: int) -> None:
        if not 0 <= view < self.cache.num_views:
            raise IndexError(f"view {view} is outside 0..{self.cache.num_views - 1}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._rendered(index, self.dataset[index], self.view)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """A batch in one reading, where the data set reads so."""
        read, view = getattr(self.dataset, "__getitems__", None), self.view
        samples = [self.dataset[i] for i in indices] if read is None else read(indices)
        return [self._rendered(i, sample, view) for i, sample in zip(indices, samples, strict=True)]

    def _rendered(self, index: int, sample: Any, view: int) -> tuple[Any, ...]:
        row, policy = int(self.rows[index]), self._policy
        if self._watch_labels:
            self._check_label(sample, row)
        record = view * len(self.cache) + row
        if not policy.steps:
            return sample, record
        sample_id = int(self.cache.samples.ids[row])
        if policy.mixing is None:
            return replace_item(sample, lambda item: policy.render(item, sample_id, view), self.item_column), record
        partner = policy.partner(sample_id, view, len(self.cache))
        other = policy.render(self._item_at(partner), int(self.cache.samples.ids[partner]), view)
        share = 1.0

        def mix(item: Any) -> Any:
            nonlocal share
            mixed, share = policy.mix(policy.render(item, sample_id, view), other, sample_id, view)
            return mixed

        return replace_item(sample, mix, self.item_column), record, partner, share

    def _check_label(self, sample: Any, row: int) -> None:
        """No list of labels was at hand when the data set was joined: each is compared when its sample is read."""
        label, stored = label_of(sample), int(self.cache.samples.labels[row])
        whole = isinstance(label, int | np.integer) or (isinstance(label, Tensor) and label.ndim == 0)
        if not whole or stored < 0 or not 0 <= int(label) != stored:
            return
        raise LabelMismatchError(
            f"the label of {self.cache.samples.key(row)} is {int(label)} in the data set and {stored} in the cache",
            tip='if the labels were corrected on purpose, join with labels="dataset"',
        )

    def _item_at(self, row: int) -> Any:
        """The item of any row of the cache, out of the whole data set."""
        index = int(self.partners.index_of_row[row])
        if index < 0:
            raise DataError(
                f"{self.cache.samples.key(row)}: views are mixed with this sample, and the data set does not hold it",
                tip="give the whole data set: join(subset, whole=data_set)",
            )
        return item_of(self.whole[index], self.item_column)

    @cached_property
    def partners(self) -> Partners:
        """Where each row of the cache stands in the whole data set."""
        count = len(self.cache)
        if self.whole is self.dataset:
            return Partners.of(self.whole, self.rows, count, self.cache.samples.ids)
        return Partners(self.whole, find_ids(sample_ids(dataset_keys(self.whole)), self.cache.samples.ids))

    def for_view(self, view: int) -> Joined:
        """The same join, its items rendered at another view: one per epoch, `epoch % cache.num_views`.

        Raises:
            IndexError: the cache has no such view.

        Example:
            >>> second = joined.for_view(1)
            >>> second[3][1] - joined[3][1] == len(cache)
            True
        """
        self._check_view(view)
        return Joined(
            self.cache,
            self.dataset,
            self.rows,
            view=view,
            labels_changed=self.labels_changed,
            whole=self.whole,
            watch_labels=self._watch_labels,
        )

    def as_dict(self) -> JoinedForm:
        """The same samples as dicts, for what takes nothing else: the sample's own entries, and "key", "view" and "record".

        A sample that is no dict is there as "item" and "label".

        Example:
            >>> one = joined.as_dict()[3]
            >>> sorted(one), one["record"] == joined[3][1]
            (['item', 'key', 'label', 'record', 'view'], True)
        """
        return JoinedForm(self, as_dict)

    def as_pair(self) -> JoinedForm:
        """The same samples as (item, record): the record stands in the label's place, for loops that take (inputs, labels).

        Example:
            >>> item, record = joined.as_pair()[3]
            >>> int(joined.gather([record]).labels[0]) == int(data.labels[3])
            True
        """
        return JoinedForm(self, as_pair)

    def gather(
        self, records: Tensor | np.ndarray, *, members: Sequence[str] | None = None, features: Sequence[str] = ()
    ) -> Targets:
        """The targets of a batch of records, in the batch's order.

        Args:
            records: (B,) int64, as `joined[i]` gave them and a DataLoader collated them.
            members, features: as `Cache.gather`.

        Raises:
            IndexError, CacheError, DamagedCacheError: as `Cache.gather`.

        Example:
            >>> loader = DataLoader(joined, batch_size=16, shuffle=True)
            >>> (images, labels), records = next(iter(loader))
            >>> targets = joined.gather(records)
            >>> targets.logits().shape, torch.equal(targets.labels, labels)
            (torch.Size([16, 10]), True)
        """
        if isinstance(records, Tensor):
            records = records.cpu().numpy()
        views, rows = np.divmod(np.asarray(records, dtype=np.int64), len(self.cache))
        self._count_pass(len(rows))
        return self.cache.gather(rows, views, members=members, features=features)

    def _count_pass(self, count: int) -> None:
        """Say it once where a whole pass over one view of several is followed by another: somebody's loop lets it stand still."""
        if self.cache.num_views == 1 or self._gathered is None:
            return
        self._gathered += count
        ranks = torch.distributed.get_world_size() if _in_a_group() else 1
        if self._gathered * ranks >= 2 * len(self):
            self._gathered = None
            warn_once(
                f"a second whole pass over view {self.view}, and the cache has {self.cache.num_views}: call "
                "joined.set_epoch(epoch) before each epoch; loader workers that stay alive follow it"
            )

    def gather_samples(
        self,
        index: np.ndarray,
        views: np.ndarray,
        *,
        members: Sequence[str] | None = None,
        features: Sequence[str] = (),
    ) -> Targets:
        """The targets of samples given by their position in the data set, at the given views.

        Args:
            index, views: (B,) int64.
            members, features: as `Cache.gather`.
        """
        return self.cache.gather(self.rows[index].astype(np.int64), views, members=members, features=features)


def _shared(view: int) -> Tensor:
    """A number in memory that processes share: loader workers that are running see another one from their next sample on."""
    number = torch.tensor([view], device="cpu")
    try:
        return number.share_memory_()
    except (RuntimeError, OSError):  # no such memory here: workers follow when they are started
        return number


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_cache(path: str | os.PathLike[str], *, finished: bool = True) -> bool:
    """Whether a dump is there; with `finished=False` also one that is still to be finished, which `open` refuses.

    A URL is one; of `hf:NAME`, which may be a network, only with an id behind it.
    """
    text = os.fspath(path)
    if is_place(text):
        return not text.startswith("hf:") or has_id(text)
    return os.path.isfile(os.path.join(path, MANIFEST)) or (not finished and os.path.isdir(os.path.join(path, WORK)))


def open(
    path: str | os.PathLike[str],
    *,
    id: str | None = None,
    mode: ReadMode = "mmap",
    check_blocks: CheckBlocks = "first",
    check_files: bool = True,
    allow_code: bool = False,
    quiet: bool = False,
) -> Cache:
    """Open a cache for reading. Every file is hashed when it is first opened on this machine, and again only when it was written.

    Which files were hashed is remembered outside of the cache, below `$SOFTCACHE_HOME` (else `$XDG_CACHE_HOME/softcache`, else
    `~/.cache/softcache`). A file that is not the one that the manifest names is refused when it is first read.

    Args:
        path: the folder that `softcache dump` wrote; read-only mounts work. Or the URL of such a folder, with the id behind it
            (`https://HOST/PATH@ID`): what is read is fetched, checked, and kept below `$SOFTCACHE_HOME/store`.
        id: pin a manifest by its id (a unique prefix is enough); None = the newest, which of a URL is said.
        mode: "mmap", or "pread" for network file systems.
        check_blocks: when the checksum of each block of 64 KiB that a gather touches is looked at: when it is "first" touched,
            "always", or "never".
        check_files: False takes every file that has the right name and size for the one that the manifest names.
        allow_code: a view may be made by a transform that the cache names, and rendering it then calls that code of yours.
        quiet: no progress on stderr while files are hashed.

    Raises:
        CacheError: not a cache, of another format version, or no manifest of that id.
        UnfinishedCacheError: a dump under way.
        DamagedCacheError: files that do not fit the manifest.
        RemoteError: a URL that cannot be reached, or gives other bytes than its manifest names; also when its targets are read.

    Example:
        >>> cache = softcache.open("caches/a")
        >>> len(cache), cache.num_views, cache.num_classes, cache.members
        (64, 2, 10, ('teacher',))
        >>> softcache.open("caches/a", id=cache.id[:12]).id == cache.id
        True
    """
    if isinstance(path, str) and is_place(path):
        folder, source = open_place(parse_place(path, id), quiet=quiet)
        reader = CacheReader(folder, id=source.place.id, mode=mode, check_blocks=check_blocks, source=source)
    else:
        reader = CacheReader(path, id=id, mode=mode, check_blocks=check_blocks, check_files=check_files)
    if reader.manifest.plan.format == PROVISIONAL_FORMAT and not quiet:
        note_once(
            f"{path}: is of format version {PROVISIONAL_FORMAT}, which is provisional: a later softcache may want it made again"
        )
    with Meter(f"check {path}", reader.manifest.nbytes, unit="B", quiet=quiet) as meter:
        reader.files.bind_all(meter.add)
    return Cache(reader, allow_code=allow_code)

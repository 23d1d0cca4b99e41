"""The stored targets of one batch: moved to a device as they are, decoded there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from softcache.cache.samples import SampleTable
from softcache.codecs import Codec
from softcache.codecs.features import StoredFeature
from softcache.data.label_kind import link_of, log_soft_target
from softcache.data.philox import Draws, step_key
from softcache.errors import CacheError, nearest
from softcache.targets.ensemble import COMBINE_RULES, combine
from softcache.targets.positions import BatchPositions


@dataclass(frozen=True)
class Targets:
    """The stored targets of one batch, still encoded; decoded on whatever device they are moved to.

    Attributes:
        rows, views: (B,) int64 place of each record in the cache.
        arrays: member -> data set -> (B, ...) stored values.
        codecs: member -> codec; none of a member of features alone.
        outputs: member -> what it gave, of those that gave no classes: "embedding", "values"; None of features alone.
        samples: the cache's sample table, read only when labels or ids are asked for.
        features: (member, feature) -> how it is decoded; its stored values are among the member's arrays.
        positions: index -> the positions of the batch.
        index_of: member, and (member, feature) -> the index of its records, where they are of positions: their stored values are
            then flat, (P, ...) for the P positions of the batch.
    """

    rows: np.ndarray
    views: np.ndarray
    samples: SampleTable
    arrays: Mapping[str, Mapping[str, Tensor]]
    codecs: Mapping[str, Codec]
    features: Mapping[tuple[str, str], StoredFeature] = field(default_factory=dict)
    outputs: Mapping[str, str | None] = field(default_factory=dict)
    positions: Mapping[str, BatchPositions] = field(default_factory=dict)
    index_of: Mapping[str | tuple[str, str], str] = field(default_factory=dict)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Targets:
        """The same targets with the stored values on another device, where they are then decoded.

        Args:
            non_blocking: do not wait for the copy, where the memory is pinned.
        """
        moved = {
            member: {name: value.to(device, non_blocking=non_blocking) for name, value in arrays.items()}
            for member, arrays in self.arrays.items()
        }
        return replace(self, arrays=moved)

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the members that were gathered."""
        return tuple(self.arrays)

    @property
    def labels(self) -> Tensor:
        """(B,) int64 class index or -1, or (B, C) bool, on the CPU; as the cache holds them."""
        return torch.from_numpy(self.samples.labels_of(self.rows))

    @property
    def link(self) -> str:
        """How logits become soft targets: "softmax", or "sigmoid" where the cache's samples have several labels."""
        return link_of(multi_label=self.samples.multi_label)

    @property
    def sample_ids(self) -> np.ndarray:
        """(B,) uint64 ids of the samples."""
        return self.samples.ids[self.rows]

    def logits(self, member: str | None = None) -> Tensor:
        """(B, C) float32 logits of one member (default: the only one), before softmax, on the targets' device.

        Of a member whose records are of positions (P, C).

        Raises:
            CacheError: no such member, several and none named, one that gave no classes, or a codec that keeps some of them only.

        Example:
            >>> targets = joined.gather([joined[i][1] for i in range(4)])
            >>> targets.logits().shape, targets.logits("teacher").dtype
            (torch.Size([4, 10]), torch.float32)
        """
        member = self._one(member, "logits(member), or combine them: combined(rule)")
        if member in self.outputs:
            raise self._other_output(member, "logits of classes")
        return self.codecs[member].decode(self.arrays[member])

    def embedding(self, member: str | None = None) -> Tensor:
        """(B, D) float32 embedding of one member (default: the only one), as it gave it, on the targets' device.

        Raises:
            CacheError: no such member, several and none named, or one that gave something else.
        """
        return self._output(member, "embedding")

    def values(self, member: str | None = None) -> Tensor:
        """(B, K) float32 values of one member (default: the only one), in the order of `Cache.member(name).value_names`.

        Raises:
            CacheError: no such member, several and none named, or one that gave something else.
        """
        return self._output(member, "values")

    def output(self, member: str) -> Tensor:
        """(B, W) float32 of one member: its logits, its embedding or its values; CacheError of a member of features alone."""
        member = self._one(member, "output(member)")
        if member not in self.codecs:
            raise self._other_output(member, "an output")
        return self.codecs[member].decode(self.arrays[member])

    def _output(self, member: str | None, kind: str) -> Tensor:
        member = self._one(member, f"{kind}(member)")
        if self.outputs.get(member, "logits") != kind:
            raise self._other_output(member, f"an {kind}" if kind == "embedding" else kind)
        return self.codecs[member].decode(self.arrays[member])

    def _one(self, member: str | None, how: str) -> str:
        """The member that is meant."""
        if member is None:
            if len(self.arrays) > 1:
                raise CacheError(
                    f"this cache has {len(self.arrays)} members: {', '.join(self.arrays)}", tip=f"name one: {how}"
                )
            member = next(iter(self.arrays))
        if member not in self.arrays:
            raise CacheError(f"no member {member!r}", tip=nearest(member, self.arrays))
        return member

    def _other_output(self, member: str, wanted: str) -> CacheError:
        gave = self.outputs.get(member, "logits")
        how = {"embedding": "embedding(member)", "values": "values(member)", None: "feature(name, member)"}
        return CacheError(
            f"member {member!r} holds no {wanted.removeprefix('an ')}: it gave {gave or 'features alone'}",
            tip=f"ask for what it has: {how.get(gave, 'logits(member)')}",
        )

    def at(self, member: str | None = None, feature: str | None = None) -> BatchPositions:
        """The positions that a member's records (default: the only one's) are of, or those of one of its features.

        Raises:
            CacheError: it has one record for each sample.
        """
        member = self._one(member, "at(member)")
        index = self.index_of.get(member if feature is None else (member, feature))
        if index is None:
            what = f"member {member!r}" if feature is None else f"feature {feature!r} of member {member!r}"
            raise CacheError(
                f"{what} has one record for each sample, and no positions", tip="use logits() and feature()"
            )
        return self.positions[index]

    def flat(self, member: str | None = None, feature: str | None = None) -> Tensor:
        """(P, ...) float32 decoded values of all positions of the batch, sample after sample: `at(member).offsets` cuts them.

        Args:
            member: default: the only one.
            feature: one of its features instead of its logits, embedding or values.
        """
        member = self._one(member, "flat(member)")
        self.at(member, feature)
        return self.output(member) if feature is None else self.feature(feature, member)

    def padded(
        self, member: str | None = None, feature: str | None = None, *, fill: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The same as (B, L, ...) values, `fill` where a sample has no position, and a (B, L) bool mask of those that it has."""
        positions, values = self.at(member, feature), self.flat(member, feature)
        return positions.pad(values, fill), positions.mask(values.device)

    def feature(self, name: str, member: str | None = None) -> Tensor:
        """(B, ...) float32 feature as a loss sees it: reduced as its name says.

        Args:
            name: `layer:reduction`, as it was dumped and asked for.
            member: default: the only one that has it.

        Raises:
            CacheError: it was not gathered, or several members have it.
        """
        found = [key for key in self.features if key[1] == name and member in (None, key[0])]
        if len(found) != 1:
            known = [feature for _, feature in self.features]
            raise CacheError(
                f"{len(found)} members have the feature {name!r} in this batch",
                tip=(nearest(name, known) if known else "ask for features when gathering: gather(..., features=[...])")
                if not found
                else f"name the member: {', '.join(one for one, _ in found)}",
            )
        return self.features[found[0]].decode(self.arrays[found[0][0]])

    def classifier_input(self, member: str) -> Tensor:
        """(B, D) float32 input of a member's final linear layer, where its codec keeps that: linear_head; else CacheError."""
        return self.codecs[member].classifier_input(self.arrays[member])

    def head_input(self, member: str) -> Tensor:
        """As `classifier_input`, by its old name: for one version more."""
        warnings.warn("Targets.head_input is now Targets.classifier_input", DeprecationWarning, stacklevel=2)
        return self.classifier_input(member)

    def per_position(self, index: str) -> Targets:
        """The same records with a row for each position of an index: B becomes P, and every function above gives (P, ...).

        Members over another index, or with one record for each sample, are left out, and features likewise. `labels` and
        `sample_ids` are those of the samples, once for each position.
        """
        counts = self.positions[index].counts
        members = [member for member in self.arrays if self.index_of.get(member) == index]
        features = {
            key: feature
            for key, feature in self.features.items()
            if key[0] in members and self.index_of.get(key) == index
        }
        arrays = {}
        for member in members:
            left = {name for key in self.features if key not in features for name in self._names(key, member)}
            arrays[member] = {name: value for name, value in self.arrays[member].items() if name not in left}
        return replace(
            self,
            rows=np.repeat(self.rows, counts),
            views=np.repeat(self.views, counts),
            arrays=arrays,
            codecs={member: codec for member, codec in self.codecs.items() if member in members},
            outputs={member: kind for member, kind in self.outputs.items() if member in members},
            features=features,
            positions={},
            index_of={},
        )

    def rows_between(self, first: int, last: int) -> Targets:
        """The targets of rows [first, last) of this batch: last - first of them."""
        arrays = {}
        for member, stored in self.arrays.items():
            of_feature = {
                name: self._ends(feature, first, last)
                for feature in self.features
                for name in self._names(feature, member)
            }
            start, stop = self._ends(member, first, last)
            own = {}
            for name, value in stored.items():
                if name not in ("dense", "dense_at"):
                    begin, end = of_feature.get(name, (start, stop))
                    own[name] = value[begin:end]
            if "dense" in stored:
                inside = (stored["dense_at"] >= start) & (stored["dense_at"] < stop)
                if bool(inside.any()):
                    own |= {"dense": stored["dense"][inside], "dense_at": stored["dense_at"][inside] - start}
            arrays[member] = own
        positions = {name: one.between(first, last) for name, one in self.positions.items()}
        return replace(
            self, rows=self.rows[first:last], views=self.views[first:last], arrays=arrays, positions=positions
        )

    def _ends(self, key: str | tuple[str, str], first: int, last: int) -> tuple[int, int]:
        """Where the values of samples [first, last) lie in those of a member, or of a (member, feature)."""
        index = self.index_of.get(key)
        if index is None:
            return first, last
        offsets = self.positions[index].offsets
        return int(offsets[first]), int(offsets[last])

    def _names(self, feature: tuple[str, str], member: str) -> Sequence[str]:
        """The data sets of a feature, if it is this member's."""
        return list(self.features[feature].arrays()) if feature[0] == member else []

    def head(self, member: str, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """What a codec that keeps k classes has of a member: of topk.

        Returns:
            (B, k) int64 ids and (B, k) float32 logits of the classes, and (B,) float32 log of the sum of exp(logit / T) over all
            others, at the level of the logits.

        Raises:
            CacheError: the codec keeps every class.
            ValueError: a temperature that the codec does not serve.
        """
        codec, arrays = self.codecs[member], self.arrays[member]
        return (*codec.head(arrays), codec.tail_logsumexp(arrays, temperature))

    def log_probs(self, member: str, temperature: float) -> Tensor:
        """(B, C) float32 log-softmax of one member at a temperature, in nats: its soft target, where a sample has one class.

        A codec that keeps only some classes spreads the rest's probability evenly.

        Example:
            >>> targets = joined.gather([joined[i][1] for i in range(4)])
            >>> bool((targets.log_probs("teacher", 4.0).exp().sum(dim=1) - 1).abs().max() < 1e-5)
            True
        """
        codec, arrays = self.codecs[member], self.arrays[member]
        if not codec.complete:
            return codec.spread(arrays, temperature)
        return (codec.decode(arrays) / temperature).log_softmax(dim=1)

    def log_soft_target(self, member: str, temperature: float) -> Tensor:
        """(B, C) float32 logarithm of one member's soft target, in nats: `log_probs`; of several labels of each one's yes."""
        if not self.samples.multi_label or not self.codecs[member].complete:
            return self.log_probs(member, temperature)
        return log_soft_target(self.logits(member), temperature, multi_label=True)

    def combined(
        self,
        rule: str = "mean_logits",
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        link: str | None = None,
        draw_seed: int = 0,
    ) -> Tensor:
        """(B, C) float32 logits of the ensemble: softmax(result / T), or sigmoid, is its soft target at T.

        Args:
            rule: "mean_logits", "mean_probs_at_t" (of the probabilities at T), "mean_probs" (at 1, tempered afterwards), "vote"
                (one-hot of the class with most votes; of several labels the majority on each), or "draw" (one member per
                sample and view). Only "mean_logits" and "draw" keep the members' level.
            weights: member -> weight, for the members to use; they are normalised. None = all, equally.
            temperature: of the loss that asks.
            link: "softmax", or "sigmoid" for several labels per sample. None: as the cache's labels are.
            draw_seed: of the rule "draw": the member is a function of it, the sample's id and the view.

        Raises:
            LossError: an unknown rule, a temperature that is not positive, or weights that are not numbers >= 0 with a sum > 0.
            CacheError: a member that was not gathered, one that gave no classes, or one whose codec keeps some of them only.

        Example:
            >>> ensemble = softcache.open("caches/ensemble")
            >>> targets = ensemble.gather(np.arange(4), np.zeros(4, np.int64))
            >>> a, b = (targets.logits(member) for member in targets.members)
            >>> mixed = targets.combined("mean_logits", weights={"a": 3.0, "b": 1.0})
            >>> torch.allclose(mixed, 0.75 * a + 0.25 * b, atol=1e-5)
            True
        """
        chosen = self.members if weights is None else tuple(weights)
        others = [
            f"{member!r} ({self.outputs[member] or 'features alone'})" for member in chosen if member in self.outputs
        ]
        if others:
            raise CacheError(
                f"members combine over classes, and these have none: {', '.join(others)}",
                tip="learn from each by itself (member=NAME), or choose members with classes: weights={...}, --members",
            )
        self._refuse_several_indexes(chosen)
        logits = [self.logits(member) for member in chosen]
        if len(logits) == 1 and rule in COMBINE_RULES and rule != "vote":  # the mean of one, at its level
            return logits[0]
        draws = self._draws(draw_seed, self.index_of.get(chosen[0])) if rule == "draw" else None
        return combine(
            logits,
            rule,
            weights=None if weights is None else [weights[member] for member in chosen],
            temperature=temperature,
            link=self.link if link is None else link,
            draws=draws,
        )

    def _refuse_several_indexes(self, members: Sequence[str]) -> None:
        found = {self.index_of.get(member) for member in members}
        if len(found) > 1:
            named = ", ".join(f"{member}: {self.index_of.get(member) or 'none'}" for member in members)
            raise CacheError(
                f"members over several indexes cannot be combined ({named}): their records are of other positions",
                tip="choose members over one index",
            )

    def _draws(self, seed: int, index: str | None = None) -> Tensor:
        """(B,) float64 numbers in [0, 1), a function of (seed, sample id, view) alone; (P,) where records are of positions."""
        key = step_key("member", 0)
        pairs = zip(self.sample_ids.tolist(), self.views.tolist(), strict=True)
        drawn = [Draws(seed, key, sample, view).uniform() for sample, view in pairs]
        draws = torch.tensor(drawn, dtype=torch.float64, device="cpu")
        return draws if index is None else draws.repeat_interleave(torch.from_numpy(self.positions[index].counts))

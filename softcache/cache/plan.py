"""What is fixed before the first row is written: samples, classes, views, members, and how each round is cut into parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softcache.cache.schema import FORMAT_VERSION, Layout
from softcache.cache.statistics import MemberStatistics


@dataclass(frozen=True)
class SampleInfo:
    """The transfer set as the cache knows it. `fingerprint` is sha256 over (id, label, content digest) in order of id."""

    source: str
    count: int
    fingerprint: str
    digest_kind: str  # "file" or "item"
    has_keys: bool
    multi_label: bool
    order: str  # "permuted", "natural", or "selected": the rows of another cache, in its order
    order_seed: str


@dataclass(frozen=True)
class ViewInfo:
    """The view policy: `steps` are {"name", "version", "parameters": {name: string}}; `replay` is "derived" or "seeded".

    View v of the cache is rendered as view `first` + v: a cache made out of another one may begin with a later view.
    """

    count: int
    first: int
    root_seed: str
    replay: str
    steps: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FeatureInfo:
    """One stored feature of a member.

    Attributes:
        name: as it was asked for, `layer:reduction`.
        stored: "map" or the reduction: in which form it lies on disk, whichever is smaller.
        arrays: its data sets in each part, in the codec's order.
        dtype: "float16" or "int8".
        shapes: of one record of each tapped output, before any reduction.
    """

    name: str
    stored: str
    arrays: Sequence[str]
    dtype: str
    shapes: Sequence[Sequence[int]]


@dataclass(frozen=True)
class MemberInfo:
    """One ensemble member: which model with which weights, and how its logits are stored.

    Attributes:
        name: [a-z0-9][a-z0-9_-]{0,63}.
        model: portable spec string.
        fingerprint: sha256 of the weights, or of the outputs on the first batch for a teacher without weights.
        output: what the teacher gave: "logits", "log_probs" or "probs". Stored are logits, or logs of probabilities.
        compute_dtype: dtype of the teacher's last layer, before the cast to float32.
        class_order: None when the teacher's classes stood in the cache's order, else the applied permutation.
        codec: {"name", "parameters": {name: string}, "fields": [{name, offset, dtype, shape}]}.
        features: what else is stored of each record.
        promise: {"max_kl", "at_temperature"}, both strings: no record is further than that; None where nothing was promised.
    """

    name: str
    model: str
    fingerprint: str
    output: str
    compute_dtype: str
    class_order: Sequence[int] | None
    codec: Mapping[str, Any]
    features: Sequence[FeatureInfo] = ()
    promise: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "features": [dict(vars(feature)) for feature in self.features]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MemberInfo:
        return cls(**{**entry, "features": tuple(FeatureInfo(**feature) for feature in entry["features"])})


@dataclass(frozen=True)
class Round:
    """What one dump added: the views of its layout, of these members. The first round makes the cache, others extend it.

    Attributes:
        layout: how it is cut into parts.
        members: whose records it wrote.
        new_views: whether its views were new, so that their pixel digests are its too.
        made_with: softcache, torch, device, batch_size, threads, autocast, ...: what equal bytes depend on.
    """

    layout: Layout
    members: Sequence[str]
    new_views: bool
    made_with: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": dict(vars(self.layout)),
            "members": list(self.members),
            "new_views": self.new_views,
            "made_with": dict(self.made_with),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Round:
        return cls(
            Layout(**entry["layout"]), tuple(entry["members"]), bool(entry["new_views"]), dict(entry["made_with"])
        )


@dataclass(frozen=True)
class Parent:
    """The cache that this one was taken out of.

    Attributes:
        id: of its manifest.
        statistics: member -> what was measured when its records were dumped, over all of them.
    """

    id: str
    statistics: Mapping[str, MemberStatistics]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "statistics": {name: s.to_json() for name, s in self.statistics.items()}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Parent:
        return cls(entry["id"], {n: MemberStatistics.from_json(s) for n, s in entry["statistics"].items()})


@dataclass(frozen=True)
class Plan:
    """Everything that is fixed before the first row is written; the manifest is this plus the files.

    `license` is what the owner says others may do with the cache; None where nothing was said.
    """

    samples: SampleInfo
    class_names: Sequence[str]
    views: ViewInfo
    members: Sequence[MemberInfo]
    rounds: Sequence[Round]
    license: str | None = None
    parent: Parent | None = None
    format: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "license": self.license,
            "parent": None if self.parent is None else self.parent.to_json(),
            "samples": dict(vars(self.samples)),
            "class_names": list(self.class_names),
            "views": dict(vars(self.views)),
            "members": [member.to_json() for member in self.members],
            "rounds": [one.to_json() for one in self.rounds],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Plan:
        return cls(
            samples=SampleInfo(**entry["samples"]),
            class_names=tuple(entry["class_names"]),
            views=ViewInfo(**entry["views"]),
            members=tuple(MemberInfo.from_json(member) for member in entry["members"]),
            rounds=tuple(Round.from_json(one) for one in entry["rounds"]),
            license=entry["license"],
            parent=None if entry["parent"] is None else Parent.from_json(entry["parent"]),
            format=int(entry["format"]),
        )

    def member(self, name: str) -> MemberInfo:
        """KeyError when there is none of that name."""
        for member in self.members:
            if member.name == name:
                return member
        raise KeyError(name)

    def layouts_of(self, member: str | None) -> list[Layout]:
        """The layouts that hold a member's records (None: the pixel digests of the views), in the order of their views."""
        chosen = [r.layout for r in self.rounds if (r.new_views if member is None else member in r.members)]
        return sorted(chosen, key=lambda layout: layout.first_view)

    @property
    def made_with(self) -> Mapping[str, Any]:
        """Of the round that made the cache."""
        return self.rounds[0].made_with

    def spans(self) -> Iterator[tuple[Round, Any]]:
        """(round, span) of every part of every round, in the order of their numbers."""
        for one in self.rounds:
            for span in one.layout.spans():
                yield one, span

"""What is fixed before the first row is written: samples, classes, views, members, and how each round is cut into parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from softcache.cache.schema import FORMAT_VERSION, Layout
from softcache.cache.statistics import MemberStatistics

PIXEL_DIGESTS, TOKEN_DIGESTS = "pixel_digests", "token_digests"
CLASS_OUTPUTS = ("logits", "log_probs", "probs")
OTHER_OUTPUTS = ("embedding", "values")  # of version 2


@dataclass(frozen=True)
class SampleInfo:
    """The transfer set as the cache knows it. `fingerprint` is sha256 over (id, label, content digest) in order of id.

    `has_masks`: samples.h5 also holds a digest of each sample's map of labels; of version 2.
    """

    source: str
    count: int
    fingerprint: str
    digest_kind: str  # "file" or "item"
    has_keys: bool
    multi_label: bool
    order: str  # "permuted", "natural", or "selected": the rows of another cache, in its order; "merged": of several
    order_seed: str
    has_masks: bool = False

    def to_json(self, format: int) -> dict[str, Any]:
        return _without({**vars(self)}, ("has_masks",) if format == FORMAT_VERSION else ())


@dataclass(frozen=True)
class ViewInfo:
    """The view policy: `steps` are {"name", "version", "parameters": {name: string}}; `replay` is "derived" or "seeded".

    View v of the cache is rendered as view `first` + v: a cache made out of another one, or so dumped, begins with a later view.
    `digests`: the data sets of each file of views/, of version 2.
    """

    count: int
    first: int
    root_seed: str
    replay: str
    steps: Sequence[Mapping[str, Any]]
    digests: Sequence[str] = (PIXEL_DIGESTS,)

    def to_json(self, format: int) -> dict[str, Any]:
        return _without({**vars(self), "digests": list(self.digests)}, ("digests",) if format == FORMAT_VERSION else ())


@dataclass(frozen=True)
class IndexInfo:
    """An index: how many positions each (row, view) has, and which. Data sets name it.

    Attributes:
        name: as a member's.
        kind: "tokens", "words", "grid", "frames" or "candidates".
        listed: only some of the positions have records.
        labels: the positions have labels, which enter the fingerprint of the samples.
    """

    name: str
    kind: str
    listed: bool = False
    labels: bool = False


@dataclass(frozen=True)
class FeatureInfo:
    """One stored feature of a member.

    Attributes:
        name: as it was asked for, `layer:reduction`.
        stored: "map" or the reduction: in which form it lies on disk, whichever is smaller.
        arrays: its data sets in each part, in the codec's order.
        dtype: "float16" or "int8".
        shapes: of one record of each tapped output, before any reduction.
        index: whose positions its records are of; None: one record of each sample and view.
    """

    name: str
    stored: str
    arrays: Sequence[str]
    dtype: str
    shapes: Sequence[Sequence[int]]
    index: str | None = None

    def to_json(self, format: int = FORMAT_VERSION) -> dict[str, Any]:
        return _without(dict(vars(self)), ("index",) if format == FORMAT_VERSION else ())


@dataclass(frozen=True)
class MemberInfo:
    """One ensemble member: which model with which weights, and how its logits are stored.

    Attributes:
        name: [a-z0-9][a-z0-9_-]{0,63}.
        model: portable spec string.
        fingerprint: sha256 of the weights, or of the outputs on the first batch for a teacher without weights.
        output: what the teacher gave: "logits", "log_probs" or "probs", of which logits or logs of probabilities are stored;
            "embedding" or "values"; None where it keeps features alone.
        compute_dtype: dtype of the teacher's last layer, before the cast to float32.
        class_order: None when the teacher's classes stood in the cache's order, else the applied permutation.
        codec: {"name", "parameters": {name: string}, "fields": [{name, offset, dtype, shape}]}; None beside an output of None.
        features: what else is stored of each record.
        promise: {"max_kl", "at_temperature"}, both strings: no record is further than that; None where nothing was promised.
        index: whose positions its records are of; None: one record of each sample and view.
        width: how many numbers a decoded record has; None in version 1, where that is the number of classes.
        value_names: of the output "values".
        input: what it alone did to its inputs and outputs: prompt, pooling, truncation.
    """

    name: str
    model: str
    fingerprint: str
    output: str | None
    compute_dtype: str
    class_order: Sequence[int] | None
    codec: Mapping[str, Any] | None
    features: Sequence[FeatureInfo] = ()
    promise: Mapping[str, str] | None = None
    index: str | None = None
    width: int | None = None
    value_names: Sequence[str] = ()
    input: Mapping[str, str] = field(default_factory=dict)

    def to_json(self, format: int = FORMAT_VERSION) -> dict[str, Any]:
        features = [feature.to_json(format) for feature in self.features]
        entry = {**vars(self), "features": features, "value_names": list(self.value_names), "input": dict(self.input)}
        return _without(entry, ("index", "width", "value_names", "input") if format == FORMAT_VERSION else ())

    def index_of(self, array: str) -> str | None:
        """The index of one of its data sets; None of those that have one record a sample and view."""
        for number, feature in enumerate(self.features):
            if array in feature.arrays or array == f"feature{number}_error":
                return feature.index
        return self.index

    @property
    def indexes(self) -> set[str]:
        """Of all its data sets."""
        return {name for name in (self.index, *(feature.index for feature in self.features)) if name is not None}

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
        indexes: whose positions it wrote, of version 2.
    """

    layout: Layout
    members: Sequence[str]
    new_views: bool
    made_with: Mapping[str, Any]
    indexes: Sequence[str] = ()

    def to_json(self, format: int = FORMAT_VERSION) -> dict[str, Any]:
        entry = {
            "layout": dict(vars(self.layout)),
            "members": list(self.members),
            "new_views": self.new_views,
            "made_with": dict(self.made_with),
        }
        if format != FORMAT_VERSION:
            entry["indexes"] = list(self.indexes)
            entry["made_with"] = {"batch_tokens": None, **self.made_with}
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Round:
        return cls(
            Layout(**entry["layout"]),
            tuple(entry["members"]),
            bool(entry["new_views"]),
            dict(entry["made_with"]),
            tuple(entry.get("indexes", ())),
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

    def to_json(self, format: int = FORMAT_VERSION) -> dict[str, Any]:
        return {"id": self.id, "statistics": {name: s.to_json(format) for name, s in self.statistics.items()}}

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
    parents: Sequence[Parent] = ()
    format: int = FORMAT_VERSION
    indexes: Sequence[IndexInfo] = ()
    vocabulary: Mapping[str, Any] | None = None
    rendering: Mapping[str, str] | None = None

    @property
    def parent(self) -> Parent | None:
        """The cache that this one was taken out of; None where it was dumped, or its records are of several."""
        return self.parents[0] if len(self.parents) == 1 else None

    def measured_before(self, member: str) -> MemberStatistics | None:
        """What was measured of a member in the caches that this one was taken out of, or merged of; None: nothing."""
        found = [parent.statistics[member] for parent in self.parents if member in parent.statistics]
        return reduce(MemberStatistics.__add__, found) if found else None

    def to_json(self) -> dict[str, Any]:
        parents = [one.to_json(self.format) for one in self.parents]
        entry = {
            "format": self.format,
            "license": self.license,
            "samples": self.samples.to_json(self.format),
            "class_names": list(self.class_names),
            "views": self.views.to_json(self.format),
            "members": [member.to_json(self.format) for member in self.members],
            "rounds": [one.to_json(self.format) for one in self.rounds],
        }
        if self.format == FORMAT_VERSION:
            return entry | {"parent": parents[0] if parents else None}
        return entry | {
            "parents": parents,
            "vocabulary": None if self.vocabulary is None else dict(self.vocabulary),
            "rendering": None if self.rendering is None else dict(self.rendering),
            "indexes": [dict(vars(index)) for index in self.indexes],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Plan:
        if int(entry["format"]) == FORMAT_VERSION:
            parents = [] if entry["parent"] is None else [entry["parent"]]
        else:
            parents = entry["parents"]
        return cls(
            samples=SampleInfo(**entry["samples"]),
            class_names=tuple(entry["class_names"]),
            views=ViewInfo(**entry["views"]),
            members=tuple(MemberInfo.from_json(member) for member in entry["members"]),
            rounds=tuple(Round.from_json(one) for one in entry["rounds"]),
            license=entry["license"],
            parents=tuple(map(Parent.from_json, parents)),
            format=int(entry["format"]),
            indexes=tuple(IndexInfo(**index) for index in entry.get("indexes", ())),
            vocabulary=entry.get("vocabulary"),
            rendering=entry.get("rendering"),
        )

    @property
    def num_classes(self) -> int:
        """C: how many classes the samples' labels and the outputs of classes are over."""
        return len(self.class_names) if self.vocabulary is None else int(self.vocabulary["count"])

    def index(self, name: str) -> IndexInfo:
        """KeyError when there is none of that name."""
        for index in self.indexes:
            if index.name == name:
                return index
        raise KeyError(name)

    def rounds_of_index(self, name: str) -> list[int]:
        """The rounds that wrote an index, in the order of their views."""
        found = [number for number, one in enumerate(self.rounds) if name in one.indexes]
        return sorted(found, key=lambda number: self.rounds[number].layout.first_view)

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


def _without(entry: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A new entry without what this version does not have."""
    return {name: value for name, value in entry.items() if name not in names}

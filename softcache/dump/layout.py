"""How a member's records are stored: its codec, its features, and what was promised of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np

from softcache.cache.plan import FeatureInfo, MemberInfo, Plan
from softcache.cache.schema import ArraySpec, Span
from softcache.cache.write.shard import file_bytes
from softcache.codecs import Codec, codec_constants, make_codec, restore_codec
from softcache.codecs.features import StoredFeature
from softcache.codecs.fidelity import grid_of
from softcache.config import StorageOptions
from softcache.dump.position_index import InPart
from softcache.dump.teacher import Teacher
from softcache.errors import ConfigError
from softcache.features.taps import shapes_of
from softcache.report.tables import size, table
from softcache.spec import split_term


@dataclass(frozen=True)
class Promise:
    """KL(given || stored) of every record at `temperature` is at most `max_kl` nats."""

    max_kl: float
    temperature: float

    def __str__(self) -> str:
        return f"KL <= {self.max_kl:g} at T={self.temperature:g}"

    def to_json(self) -> dict[str, str]:
        return {"max_kl": repr(self.max_kl), "at_temperature": repr(self.temperature)}

    @classmethod
    def from_json(cls, entry: Mapping[str, str]) -> Promise:
        return cls(float(entry["max_kl"]), float(entry["at_temperature"]))


@dataclass(frozen=True)
class ErrorPromise:
    """|stored - given| / |given| of every record of an output without classes is at most `max_relative_error`, in L2 norm."""

    max_relative_error: float

    def __str__(self) -> str:
        return f"relative error <= {self.max_relative_error:g}"

    def to_json(self) -> dict[str, str]:
        return {"max_relative_error": repr(self.max_relative_error)}

    @classmethod
    def from_json(cls, entry: Mapping[str, str]) -> ErrorPromise:
        return cls(float(entry["max_relative_error"]))


def promise_from(entry: Mapping[str, str] | None) -> Promise | ErrorPromise | None:
    """What a manifest says was promised of a member."""
    if entry is None:
        return None
    return ErrorPromise.from_json(entry) if "max_relative_error" in entry else Promise.from_json(entry)


Arrays = dict[str, tuple[str, tuple[int, ...]]]  # data set -> (NumPy dtype string, shape of one record)


def record_bytes(arrays: Arrays) -> int:
    """Bytes of one record."""
    return sum(ArraySpec("", dtype, tail).nbytes for dtype, tail in arrays.values())


def constants_bytes(constants: Arrays) -> int:
    """How long the file of a member's constants is; 0 where there are none."""
    return file_bytes([ArraySpec(name, dtype, shape) for name, (dtype, shape) in constants.items()]) if constants else 0


def feature_arrays(feature: StoredFeature) -> Arrays:
    """Data set -> (dtype, shape of one record) of a feature; the last one is the record's relative L2 error."""
    return {**feature.arrays(), feature.error_name: ("<f2", ())}


@dataclass(frozen=True)
class Storage:
    """How one member's records are stored.

    Attributes:
        codec: None where features alone are kept.
        beside: what else stands once for all records: weight and bias of the teacher's final linear layer, kept beside
            features; of an output without classes its scale.
        index: whose positions its records are of; None: one record of each sample and view.
        has_classes: what is stored are logits, of which a divergence between soft targets can be told.
    """

    codec: Codec | None
    features: Sequence[StoredFeature] = ()
    promise: Promise | ErrorPromise | None = None
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)
    has_classes: bool = True
    index: str | None = None

    def arrays(self) -> Arrays:
        """Data set -> (dtype, shape of one record): the codec's, the bound of each record, and the features'."""
        arrays = {} if self.codec is None else dict(self.codec.arrays)
        if self.codec is not None and self.codec.bounded:
            arrays["eps"] = ("<f2", ())
        for feature in self.features:
            arrays |= feature_arrays(feature)
        return arrays

    @property
    def grid(self) -> tuple[float, ...]:
        """The temperatures at which fidelity is measured: the codec's, and the promise's; none of what has no classes."""
        if not self.has_classes or self.codec is None:
            return ()
        asked = {self.promise.temperature} if isinstance(self.promise, Promise) else set()
        return tuple(sorted({*grid_of(self.codec), *asked}))

    def array_specs(self, span: Span, records: int | None = None) -> list[ArraySpec]:
        """The data sets of one part; `records` is how many positions it has, where there is an index."""
        place = (span.views, span.rows) if records is None else (records,)
        return [ArraySpec(name, dtype, (*place, *tail)) for name, (dtype, tail) in self.arrays().items()]

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, without rows that a codec keeps dense."""
        return record_bytes(self.arrays())

    @property
    def codec_bytes(self) -> int:
        """Of these, the logits' with their bound."""
        return self.record_bytes - sum(record_bytes(feature_arrays(feature)) for feature in self.features)

    def constants(self) -> dict[str, np.ndarray]:
        """What stands once for all records: the codec's constants, and what is beside."""
        fitted = {} if self.codec is None else self.codec.constants
        return {**{f"codec_{name}": value.numpy() for name, value in fitted.items()}, **self.beside}

    def with_constants(self, constants: Mapping[str, np.ndarray]) -> Storage:
        """The same with the constants that lie on disk: equal for every part and every resume."""
        if self.codec is None:
            return self
        return replace(self, codec=self.codec.with_constants(codec_constants(constants)))


def error_promise_of(config: StorageOptions) -> ErrorPromise | None:
    """What --max-relative-error promises of outputs without classes; ConfigError for one that cannot be kept."""
    if config.max_relative_error is None:
        return None
    if not 0 < config.max_relative_error < inf:
        raise ConfigError(f"--max-relative-error {config.max_relative_error:g}: must be a number > 0")
    return ErrorPromise(float(config.max_relative_error))


def promise_of(config: StorageOptions, *, multi_label: bool) -> Promise | None:
    """The promise that the flags make of logits; ConfigError for one that cannot be kept or checked."""
    if config.max_kl is None:
        return None
    if not (0 < config.max_kl < inf and 0 < config.at_temperature < inf):
        raise ConfigError(
            f"--max-kl {config.max_kl:g} --at-temperature {config.at_temperature:g}: both must be numbers > 0"
        )
    if multi_label:
        raise ConfigError(
            "--max-kl promises a divergence between softmax targets; this set has several labels per sample",
            tip="choose a codec with --codec; its eps bounds every logit",
        )
    return Promise(float(config.max_kl), float(config.at_temperature))  # a NumPy number writes itself otherwise


def asked_codec(text: str, num_classes: int, promise: Promise | ErrorPromise | None) -> Codec:
    """The codec that `name:key=value,...` names, not fitted; lowrank takes the promise as its own."""
    name, parameters = split_term(text, "--codec")
    if name == "lowrank" and isinstance(promise, ErrorPromise):
        parameters = {"max_relative_error": str(promise.max_relative_error), **parameters}
    elif name == "lowrank" and isinstance(promise, Promise):
        parameters = {"max_kl": str(promise.max_kl), "at_temperature": str(promise.temperature), **parameters}
    return make_codec(name, parameters, num_classes)


def needs_fit(codec: Codec) -> bool:
    """Whether it has constants that are found on a probe."""
    return type(codec).fit is not Codec.fit


def restore(member: MemberInfo, num_classes: int, constants: Mapping[str, np.ndarray]) -> Codec | None:
    """A member's codec as an earlier dump fixed it; None of features alone."""
    if member.codec is None:
        return None
    return restore_codec(member.codec["name"], member.codec["parameters"], num_classes, codec_constants(constants))


def stored_features(teacher: Teacher, texts: Sequence[str], dtype: str, batch: Any) -> list[StoredFeature]:
    """How the features that `--features` names are stored, from the shapes that one collated batch gives."""
    specs = teacher.parse_features(texts) if texts else ()
    modules = teacher.list_modules(batch) if specs else []
    made = []
    for number, spec in enumerate(specs):
        shapes = shapes_of(spec, modules)
        made.append(StoredFeature.laid_out(spec, shapes, dtype, f"feature{number}"))
    return made


def member_info(teacher: Teacher, storage: Storage) -> MemberInfo:
    """What the manifest says of a member."""
    codec = storage.codec
    return MemberInfo(
        name=teacher.name,
        model=teacher.model_spec,
        fingerprint=teacher.fingerprint or "",
        output=teacher.output if teacher.has_output else None,
        compute_dtype=teacher.compute_dtype,
        class_order=teacher.class_order,
        codec=None
        if codec is None
        else {
            "name": codec.name,
            "parameters": codec.parameters,
            "fields": [field.to_json() for field in codec.fields],
        },
        features=tuple(_feature_info(feature) for feature in storage.features),
        promise=None if storage.promise is None else storage.promise.to_json(),
        index=storage.index,
        value_names=teacher.value_names,
        input=teacher.told_input,
    )


def _feature_info(feature: StoredFeature) -> FeatureInfo:
    names = tuple(feature.names.values())
    return FeatureInfo(feature.name, feature.codec.form, names, feature.codec.dtype, feature.shapes)


def bytes_of_spans(spans: Iterable[Span], storages: Mapping[str, Storage], in_part: InPart) -> int:
    """What these spans will take on the disk at least: without rows that a codec keeps dense."""
    counted = [(span, in_part(span)) for span in spans]
    specs = (s for span, records in counted for one in storages.values() for s in one.array_specs(span, records))
    return sum(spec.nbytes + spec.checksums.nbytes for spec in specs)


def sizes(plan: Plan, storages: Mapping[str, Storage], positions: int | None = None) -> str:
    """What this round will write, as a table: bytes of a record and of the whole, for each member and each thing kept.

    Args:
        positions: words or tokens with a record, of all samples; None where each has one record a view.
    """
    layout = plan.rounds[-1].layout
    records = (layout.num_rows if positions is None else positions) * layout.num_views
    what = ", ".join(index.kind for index in plan.indexes)
    rows, total = [], 0
    for name, storage in storages.items():
        parts = [] if storage.codec is None else [(storage.codec.text, storage.codec_bytes)]
        parts += [
            (f"{f.name} as {f.codec.form}, {f.codec.dtype}", record_bytes(feature_arrays(f))) for f in storage.features
        ]
        rows += [[name, what, f"{nbytes:,}", size(nbytes * records)] for what, nbytes in parts]
        total += sum(nbytes for _, nbytes in parts)
    title = (
        f"{layout.num_rows:,} samples x {layout.num_views} views{'' if positions is None else f', {positions:,} {what}'}, "
        f"{len(layout)} parts; {size(total * records)} in all"
    )
    return title + "\n" + table(["member", "stored", "bytes a record", "bytes"], rows)

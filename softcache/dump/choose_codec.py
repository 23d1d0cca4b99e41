"""What codecs cost and keep on a teacher's own rows, and which one a dump takes."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from softcache.cache.plan import OTHER_OUTPUTS, MemberInfo
from softcache.cache.schema import OUTPUT_PREFIX
from softcache.codecs import Codec, Probe, make_codec
from softcache.codecs.fidelity import binary_kl_rows, eps_of, explained, kl_at, relative_errors, round_up_to_half
from softcache.config import StorageOptions, flag_of
from softcache.data.label_kind import answers
from softcache.data.loading import ViewedSet
from softcache.dump.batch_composition import check_batch_composition
from softcache.dump.features_for import features_for
from softcache.dump.job import Job
from softcache.dump.kept import VOCABULARY
from softcache.dump.layout import (
    Arrays,
    ErrorPromise,
    Promise,
    Storage,
    asked_codec,
    constants_bytes,
    error_promise_of,
    needs_fit,
    promise_from,
    promise_of,
    restore,
    stored_features,
)
from softcache.dump.output_scale import measure_scale
from softcache.dump.results import not_finite
from softcache.dump.row_batches import cut_rows, tokens_of
from softcache.dump.teacher import Teacher
from softcache.errors import CodecFitError, CodecRangeError, ConfigError, first_offenders, nearest

DEFAULT_CODEC = "float16"
CHECKED_SAMPLES = 64  # of the first batch, which is run twice, and once more in another composition
FITTED_ROWS = 2048  # on which codecs are fitted
MEASURED_ROWS = 1024  # others, on which they are compared
SCALED_ROWS = 256  # on which the deviation of an output is measured: to 4 per cent
PROBE_NUMBERS = 2**26  # logits held at once: fewer rows where there are many classes
HEADROOM = 2.0  # a codec is picked when its worst record on the probe is this far below the promise

CANDIDATES = (
    "float32",
    "float16",
    "int8",
    "headtail:k=8,bits=8",
    "headtail:k=16,bits=6",
    "headtail:k=16,bits=4",
    "lowrank",
    "linear_head:dtype=float16",
    "linear_head:dtype=int8",
    "topk:k=10",
    "topk:k=100",
    "topset:k=50",
)


OF_NUMBERS = ("int8:group=64", "lowrank:max_relative_error=0.1")  # also compared for outputs without classes


class Prober:
    """Runs teachers on some of the rows, at view 0: what codecs are fitted on and compared by, whatever is dumped later.

    It is view 0 of the policy, of a cache that begins with a later view too: so its members are fitted, and known again by
    their first outputs, as those of the cache of the views before it.

    Args:
        viewed: renders the samples.
        order: of the rows, as they are dumped.
        batch_size: of the teachers.
        fitted_rows: the first ones, on which codecs are fitted.
        measured_rows: those behind them, on which codecs are compared.
        batch_tokens: of a call, in place of `batch_size` samples.
    """

    def __init__(
        self,
        viewed: ViewedSet,
        order: np.ndarray,
        batch_size: int,
        *,
        fitted_rows: int = FITTED_ROWS,
        measured_rows: int = MEASURED_ROWS,
        batch_tokens: int | None = None,
    ) -> None:
        self._viewed, self._order, self._batch_size = viewed, order, batch_size
        self._view = -viewed.policy.first_view
        self._fitted_rows, self._measured_rows = fitted_rows, measured_rows
        self._rows: dict[tuple[str, bytes], Probe] = {}
        self._batch_tokens, self._tokens = batch_tokens, None
        positions = getattr(viewed.transfer_set, "positions", None)
        if batch_tokens is not None:
            self._tokens = tokens_of(viewed.transfer_set, order)
        self._counts = (
            np.ones(len(order), np.int64) if positions is None else positions.counts[order]
        )  # records of each row

    def items(self, start: int, count: int) -> list[Any]:
        """Rendered samples of rows [start, start + count), fewer at the end."""
        return self._rendered(range(start, min(start + count, len(self._order))))

    def _rendered(self, rows: Iterable[int]) -> list[Any]:
        return [self._viewed.render(int(self._order[row]), self._view) for row in rows]

    def first_items(self) -> list[Any]:
        """Rendered samples of the first rows, without words none: what a teacher is looked at with before anything is written."""
        rows = np.flatnonzero(self._counts)[:CHECKED_SAMPLES]
        if self._tokens is not None and self._batch_tokens is not None:  # one call; two texts at least, to compare
            held = int((np.cumsum(self._tokens[rows]) <= self._batch_tokens).sum())
            rows = rows[: max(2, held)]
        return self._rendered(rows.tolist())

    def first_batch(self, teacher: Teacher) -> Any:
        """The collated inputs of the first rows."""
        return teacher.collated(self.first_items())

    def fitting_rows(self, teacher: Teacher) -> Probe:
        """What a codec is fitted on."""
        return self._run(teacher, self._having(0, _at_most(self._fitted_rows, teacher.width)))

    def measuring_rows(self, teacher: Teacher) -> Probe:
        """Rows behind those of the fit, where there are enough; else the same."""
        count = _at_most(self._measured_rows, teacher.width)
        start = min(_at_most(self._fitted_rows, teacher.width), max(0, int(self._counts.sum()) - count))
        return self._run(teacher, self._having(start, count))

    def scaling_rows(self, teacher: Teacher, *, whiten: bool) -> torch.Tensor:
        """(n, W) on which the scale of an output without classes is measured: few, unless directions are told apart.

        They are spread over all rows, since the data may be sorted, and the first ones are then of one kind.
        """
        count = _at_most(self._fitted_rows, teacher.width) if whiten else SCALED_ROWS
        return self._run(teacher, self._spread(count)).logits

    def _spread(self, count: int) -> np.ndarray:
        """Rows with about so many records together: one at random out of each of as many equal stretches, always the same."""
        known = np.flatnonzero(self._counts)
        stretches = min(len(known), -(-count * len(known) // max(1, int(self._counts.sum()))))
        within = (np.random.Philox(key=0).random_raw(stretches) >> np.uint64(32)) / 2**32
        return known[np.unique(((np.arange(stretches) + within) * len(known) / max(1, stretches)).astype(np.int64))]

    def _having(self, start: int, count: int) -> np.ndarray:
        """The rows that have records [start, start + count)."""
        ends = np.cumsum(self._counts)
        first, last = (
            np.searchsorted(ends, start, side="right"),
            np.searchsorted(ends, min(start + count, ends[-1])),
        )
        return first + np.flatnonzero(self._counts[first : last + 1])

    def _run(self, teacher: Teacher, rows: np.ndarray) -> Probe:
        """What it says of these rows."""
        key = (teacher.name, rows.tobytes())
        if key not in self._rows:
            classifier = teacher.find_classifier(self.first_batch(teacher))
            before, teacher.classifier = teacher.classifier, classifier
            logits, inputs = [], []
            own = None if self._tokens is None else self._tokens[rows]
            for cut in cut_rows(len(rows), self._batch_size, own, self._batch_tokens):
                batch = rows[cut.start : cut.stop]
                output = teacher(teacher.collated(self._rendered(batch.tolist())))
                self._check_finite(teacher, output.logits, np.repeat(batch, self._counts[batch]))
                logits.append(output.logits.cpu())
                if output.classifier_input is not None:
                    inputs.append(output.classifier_input.cpu())
            teacher.classifier = before
            weight, bias = teacher.classifier_constants(classifier) if classifier is not None else (None, None)
            if weight is not None and bias is None:
                bias = torch.zeros(len(weight))
            self._rows[key] = Probe(torch.cat(logits), torch.cat(inputs) if inputs else None, weight, bias)
        return self._rows[key]

    def _check_finite(self, teacher: Teacher, logits: torch.Tensor, rows: np.ndarray) -> None:
        """TeacherError naming the samples of records that are not finite."""
        bad = (~logits.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            keys, found = self._viewed.transfer_set.keys, dict.fromkeys(rows[bad].tolist())
            named = first_offenders((keys[int(self._order[row])] for row in found), len(found))
            named = f"{len(bad)} {teacher.asked} of this batch: {named}"
            raise not_finite(teacher.name, named, has_classes=teacher.has_classes)


def _at_most(rows: int, num_classes: int) -> int:
    return min(rows, max(256, PROBE_NUMBERS // num_classes))


@dataclass(frozen=True)
class Surveyed:
    """One codec on one teacher's rows.

    Attributes:
        codec: as `--codec` takes it.
        arrays: of one record, its bound included: data set -> (dtype, shape).
        constants: what stands once for all records, likewise.
        record_bytes: of a record with its bound, dense rows counted in.
        seconds: to encode and check one record.
        mean_kl, worst_kl: temperature -> nats; a temperature that the codec does not serve is left out.
        agreement: share of records whose largest class is kept.
        mean_error, worst_error: relative L2 error of a record of an output without classes.
        explained: share of the variance of such outputs over the records that is kept.
        dense: share of records that are kept dense.
        refused: why it cannot be used; the rest is then empty.
    """

    codec: str
    arrays: Arrays = field(default_factory=dict)
    constants: Arrays = field(default_factory=dict)
    record_bytes: float = 0.0
    seconds: float = 0.0
    mean_kl: Mapping[float, float] = field(default_factory=dict)
    worst_kl: Mapping[float, float] = field(default_factory=dict)
    agreement: float = 0.0
    dense: float = 0.0
    mean_error: float = 0.0
    worst_error: float = 0.0
    explained: float = 1.0
    refused: str = ""


def candidates(
    num_classes: int,
    codecs: Sequence[str] = CANDIDATES,
    *,
    has_classes: bool = True,
    promise: Promise | ErrorPromise | None = None,
) -> list[str]:
    """The codecs worth comparing: none whose head would be the whole row; of an output without classes none of classes.

    Args:
        promise: of such an output, which lowrank takes as its own.
    """
    if not has_classes:
        more = [text for text in OF_NUMBERS if promise is None or not text.startswith("lowrank")]
        made = {text: asked_codec(text, num_classes, promise) for text in dict.fromkeys((*codecs, *more))}
        return [text for text, codec in made.items() if not codec.of_classes]
    heads = {
        text: asked_codec(text, num_classes, None) for text in codecs if text.startswith(("headtail", "topk", "topset"))
    }
    least = VOCABULARY - 1  # topset is of vocabularies
    return [
        text
        for text in codecs
        if text not in heads
        or max(getattr(heads[text], "k", 0), least if text.startswith("topset") else 0) < num_classes
    ]


def survey_codec(text: str, teacher: Teacher, prober: Prober, promise: Promise | ErrorPromise | None) -> Surveyed:
    """Fit a codec on some rows of a teacher and measure it on others."""
    num_classes = teacher.width
    if not teacher.has_output:
        return Surveyed(text)
    try:
        codec = asked_codec(text, num_classes, promise)
        _check_kind(codec, teacher)
        codec = codec.fit(prober.fitting_rows(teacher)) if needs_fit(codec) else codec
        given = prober.measuring_rows(teacher)
        begin = time.perf_counter()
        coded = codec.encode(given.logits, given.classifier_input)
        decoded = codec.decode(coded) if codec.complete else None
        if codec.bounded and decoded is not None:
            eps = round_up_to_half(eps_of(codec, given.logits, coded, decoded))
            if not bool(eps.isfinite().all()):
                raise CodecRangeError(f"codec {codec.name!r} cannot hold these logits: they are too large")
        seconds = (time.perf_counter() - begin) / len(given.logits)
    except (CodecFitError, CodecRangeError, ConfigError) as exc:
        return Surveyed(text, refused=exc.message)
    dense = len(coded["dense_at"]) / len(given.logits) if "dense_at" in coded else 0.0
    if not teacher.has_classes:
        assert decoded is not None
        errors, storage = relative_errors(given.logits, decoded), Storage(codec)
        return Surveyed(
            text,
            storage.arrays(),
            kinds_of(storage.constants()),
            storage.record_bytes + dense * 2 * num_classes,
            seconds,
            dense=dense,
            mean_error=float(errors.mean()),
            worst_error=float(errors.max()),
            explained=explained(given.logits, decoded),
        )
    served = isinstance(promise, Promise) and codec.serves(promise.temperature)
    grid = Storage(codec, promise=promise if served else None).grid
    several = teacher.multi_label
    if several and decoded is not None:
        kl = {t: binary_kl_rows(given.logits, decoded, t) for t in grid}
    else:
        kl = {t: kl_at(codec, given.logits, coded, decoded, t) for t in grid}
    said = [answers(logits, multi_label=several) for logits in (given.logits, decoded) if logits is not None]
    agreed = float((said[0] == said[-1]).double().mean())  # of a codec without all classes, of its largest: it has that
    storage = Storage(codec)
    return Surveyed(
        text,
        storage.arrays(),
        kinds_of(storage.constants()),
        storage.record_bytes + dense * 2 * num_classes,
        seconds,
        {t: float(rows.mean()) for t, rows in kl.items()},
        {t: float(rows.max()) for t, rows in kl.items()},
        agreed,
        dense,
    )


def kinds_of(constants: Mapping[str, np.ndarray]) -> Arrays:
    """Data set -> (NumPy dtype string, shape)."""
    return {name: (array.dtype.newbyteorder("<").str, array.shape) for name, array in constants.items()}


def _check_kind(codec: Codec, teacher: Teacher) -> None:
    """ConfigError for a codec of classes where there are none, and one that keeps some where each is a question of its own."""
    if codec.of_classes and not teacher.has_classes:
        raise ConfigError(
            f"--codec {codec.text} is of logits, and teacher {teacher.name!r} gives {teacher.output}",
            tip="--codec lowrank takes a promise of its own here: --max-relative-error 0.1"
            if codec.name == "lowrank"
            else "choose float16, float32 or int8",
        )
    if codec.name == "lowrank" and teacher.has_classes and not codec.of_classes:
        raise ConfigError(
            f"--codec {codec.text} is of outputs without classes, and teacher {teacher.name!r} gives {teacher.output}",
            tip="promise a divergence: lowrank:max_kl=1e-4,at_temperature=4",
        )
    if teacher.multi_label and not codec.complete:
        raise ConfigError(
            f"--codec {codec.text} keeps the largest classes and the rest of a softmax; this set has several labels per sample, "
            "and no loss learns from some of them",
            tip="choose float16, int8 or headtail, which keep every logit",
        )


def pick_codec(
    teachers: Sequence[Teacher],
    prober: Prober,
    promise: Promise | ErrorPromise,
    records: int,
    *,
    codecs: Sequence[str] = CANDIDATES,
) -> str:
    """The codec that keeps every class and, with headroom, the promise on the probed rows of every teacher in the least space.

    Args:
        records: of one teacher; constants are stored once for all of them.
        codecs: to pick from.
    """
    best: tuple[float, str] | None = None
    for text in candidates(teachers[0].width, codecs, has_classes=teachers[0].has_classes, promise=promise):
        found = [survey_codec(text, teacher, prober, promise) for teacher in teachers]
        if all(keeps(one, promise) for one in found):
            size = sum(records * one.record_bytes + constants_bytes(one.constants) for one in found)
            best = min(best, (size, text)) if best is not None else (size, text)
    if best is None:
        flag = "--max-kl" if isinstance(promise, Promise) else "--max-relative-error"
        raise CodecFitError(f"no codec keeps {promise} on these teachers", tip=f"raise {flag}, or use --codec float32")
    return best[1]


def keeps(found: Surveyed, promise: Promise | ErrorPromise) -> bool:
    """Whether a surveyed codec may be picked for a promise; one that keeps failing rows dense needs no headroom."""
    headroom = 1.0 if found.codec.startswith("lowrank") else HEADROOM
    if isinstance(promise, ErrorPromise):
        return not found.refused and found.worst_error * headroom <= promise.max_relative_error
    if found.refused or found.codec.startswith(("topk", "topset")) or promise.temperature not in found.worst_kl:
        return False
    return found.worst_kl[promise.temperature] * headroom <= promise.max_kl


def choose_storages(
    config: StorageOptions,
    job: Job,
    teachers: Sequence[Teacher],
    prober: Prober,
    out: Path | None,
    *,
    codecs: Sequence[str] = CANDIDATES,
) -> dict[str, Storage]:
    """Member -> how it is stored: as the cache or an interrupted dump has it, as --codec says, or as --max-kl picks of `codecs`.

    The teachers' taps are set to what their storage needs.
    """
    known = {teacher.name: job.known_member(teacher.name) for teacher in teachers}
    if job.base is not None and job.new_views:
        for name in ("codec", "max_kl", "max_relative_error", "features", "for_", "whiten"):
            if getattr(config, name) not in (None, (), False):
                raise ConfigError(f"{flag_of(name)} cannot be given with more views: the cache's members keep theirs")
        return {t.name: _as_before(job, t, prober, out) for t in teachers}
    promises = promises_of(config, teachers)
    texts_of = _codecs_of(config, job, teachers, prober, promises, codecs)
    storages = {}
    for teacher in teachers:
        codec, promise = None, promises[teacher.has_classes] if teacher.has_output else None
        text = texts_of.get(teacher.has_classes) if teacher.has_output else None
        before, wanted = known[teacher.name], asked_codec(text, teacher.width, promise) if text is not None else None
        if before is not None and (wanted is None or _same(before.codec or {}, wanted)):
            assert out is not None
            codec = restore(before, teacher.width, job.known_constants(out, teacher.name))
        elif wanted is not None:
            _check_kind(wanted, teacher)
            codec = wanted.fit(prober.fitting_rows(teacher)) if needs_fit(wanted) else wanted
        _check_served(codec, promise)
        texts = _asked_of(config.features, teacher, known)
        named = {str(spec) for spec in teacher.parse_features(texts)} if texts else set()
        needed = features_for(config.for_, teacher, prober.first_batch(teacher), codec)
        texts += [text for text in needed if text not in named]
        if texts and teacher.index is not None:
            raise ConfigError(
                f"feature {texts[0]} of teacher {teacher.name!r}: features are of samples, and here words are asked about",
                tip="leave --features and --for out",
            )
        if before is None:
            beside = _scale(teacher, prober, whiten=config.whiten)
        else:
            assert out is not None
            beside = _scale_before(job.known_constants(out, teacher.name), whiten=config.whiten)
        storages[teacher.name] = _tapped(teacher, codec, texts, config.feature_dtype, promise, prober, beside)
    if config.whiten and not any(teacher.output in OTHER_OUTPUTS for teacher in teachers):
        raise ConfigError("--whiten is of embeddings and values, and no teacher gives any", tip="leave it out")
    return storages


def _scale_before(constants: Mapping[str, np.ndarray], *, whiten: bool) -> dict[str, np.ndarray]:
    """As an interrupted dump measured it; ConfigError where this one asks for another."""
    found = {name: value for name, value in constants.items() if name.startswith(OUTPUT_PREFIX)}
    if whiten != (f"{OUTPUT_PREFIX}whitening" in found):
        raise ConfigError(
            f"this dump was begun {'without' if whiten else 'with'} --whiten, and its constants are written",
            tip=f"{'leave it out' if whiten else 'give it'} as before, or use another --out",
        )
    return found


def _scale(teacher: Teacher, prober: Prober, *, whiten: bool) -> dict[str, np.ndarray]:
    """Of an output without classes, measured on rows spread over all of them."""
    if teacher.output not in OTHER_OUTPUTS:
        return {}
    measured = measure_scale(prober.scaling_rows(teacher, whiten=whiten), whiten=whiten)
    return {f"{OUTPUT_PREFIX}{name}": value.numpy() for name, value in measured.items()}


Promises = Mapping[bool, Promise | ErrorPromise | None]  # of members with classes, and of those without


def promises_of(config: StorageOptions, teachers: Sequence[Teacher]) -> Promises:
    """What is promised of members with classes, and of those without; ConfigError for a promise of members that are not there."""
    kinds = {teacher.has_classes for teacher in teachers if teacher.has_output}
    for flag, given, kind in (
        ("--max-kl", config.max_kl, True),
        ("--max-relative-error", config.max_relative_error, False),
    ):
        if given is not None and kind not in kinds:
            gives = sorted({teacher.output for teacher in teachers})
            other = "--max-relative-error" if kind else "--max-kl"
            raise ConfigError(f"{flag} promises nothing of {', '.join(gives)}", tip=f"of these {other} does")
    several = any(teacher.multi_label for teacher in teachers)
    with_classes = promise_of(config, multi_label=several) if True in kinds else None
    return {True: with_classes, False: error_promise_of(config)}


def _codecs_of(
    config: StorageOptions,
    job: Job,
    teachers: Sequence[Teacher],
    prober: Prober,
    promises: Promises,
    codecs: Sequence[str],
) -> dict[bool, str]:
    """The codec of members with classes, and of those without, as --codec says or as a promise picks it.

    Nothing is said of a kind whose members all have their codecs.
    """
    found = {}
    with_output = [teacher for teacher in teachers if teacher.has_output]
    if config.codec is not None and not with_output:
        raise ConfigError(f"--codec {config.codec}: of these teachers features alone are kept", tip="leave it out")
    for kind in dict.fromkeys(teacher.has_classes for teacher in with_output):
        own, promise = [teacher for teacher in with_output if teacher.has_classes == kind], promises[kind]
        if config.codec is not None:
            found[kind] = config.codec
        elif not all(job.known_member(teacher.name) for teacher in own):
            records = len(job.order) * job.views
            picked = None if promise is None else pick_codec(own, prober, promise, records, codecs=codecs)
            found[kind] = picked or DEFAULT_CODEC
    return found


def _as_before(job: Job, teacher: Teacher, prober: Prober, out: Path | None) -> Storage:
    """How the cache stores a member already: its codec, its features and its promise hold for more views too."""
    before = job.known_member(teacher.name)
    assert before is not None
    assert out is not None
    return storage_of(before, teacher, job.known_constants(out, teacher.name), prober)


def storage_of(
    member: MemberInfo,
    teacher: Teacher,
    constants: Mapping[str, np.ndarray] | None,
    prober: Prober,
    names: Collection[str] = (),
) -> Storage:
    """How a member is stored, as the manifest describes it; its codec is fitted again where `constants` is None.

    Args:
        names: of the data sets that its constants had, where they are made again.
    """
    if constants is not None or member.codec is None:
        codec = restore(member, teacher.width, constants or {})
    else:
        codec = make_codec(member.codec["name"], member.codec["parameters"], teacher.width)
        codec = codec.fit(prober.fitting_rows(teacher))
    promise = promise_from(member.promise)
    dtype = member.features[0].dtype if member.features else "float16"
    has_scale = constants is None and f"{OUTPUT_PREFIX}mean" in names
    beside = _scale(teacher, prober, whiten=f"{OUTPUT_PREFIX}whitening" in names) if has_scale else {}
    return _tapped(teacher, codec, [feature.name for feature in member.features], dtype, promise, prober, beside)


def _tapped(
    teacher: Teacher,
    codec: Codec | None,
    texts: Sequence[str],
    dtype: str,
    promise: Promise | ErrorPromise | None,
    prober: Prober,
    beside: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Storage:
    """The storage, with the teacher's taps set to what it needs."""
    if codec is None and not texts:
        raise ConfigError(
            f"teacher {teacher.name!r}: of output=features its features alone are kept, and none is asked for",
            tip="name some: --features LAYER:pool (--list-modules prints the layers), or --for hint",
        )
    batch = prober.first_batch(teacher)
    features = stored_features(teacher, texts, dtype, batch)
    on_input = codec is not None and codec.needs_classifier
    classifier = teacher.find_classifier(batch) if (features and teacher.has_classes) or on_input else None
    teacher.features = tuple(feature.spec for feature in features)
    teacher.classifier = classifier if on_input else None
    if codec is None:  # only now is it known what of it must stay the same
        teacher.check_first_batch(batch)
        check_batch_composition(teacher, prober.first_items())
    if features and teacher.has_classes:
        beside = _classifier_arrays(teacher, classifier)
    return Storage(codec, features, promise, beside, teacher.has_classes, teacher.index)


def _asked_of(texts: Sequence[str], teacher: Teacher, names: Iterable[str]) -> list[str]:
    """The features asked of one member: all that name none, and those written `member=layer:reduction`."""
    asked = []
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        member, equals, feature = text.partition("=")
        if equals and member not in names:
            raise ConfigError(f"--features {text!r}: no member is called {member!r}", tip=nearest(member, names))
        if not equals or member == teacher.name:
            asked.append(feature if equals else text)
    return asked


def _check_served(codec: Codec | None, promise: Promise | ErrorPromise | None) -> None:
    if codec is not None and isinstance(promise, Promise) and not codec.serves(promise.temperature):
        raise ConfigError(
            f"--at-temperature {promise.temperature:g}: codec {codec.name!r} serves {codec.served}",
            tip="promise it at one of these, or use a codec that keeps every class",
        )


def _same(before: Mapping[str, Any], wanted: Codec) -> bool:
    return before["name"] == wanted.name and dict(before["parameters"]) == wanted.parameters


def _classifier_arrays(teacher: Teacher, classifier: torch.nn.Linear | None) -> dict[str, np.ndarray]:
    if classifier is None or teacher.classifier is not None:  # linear_head keeps the layer itself
        return {}
    weight, bias = teacher.classifier_constants(classifier)
    arrays = {"head_weight": weight.numpy()}
    return arrays if bias is None else {**arrays, "head_bias": bias.numpy()}

"""softcache plan: what a dump would cost and keep, before it is paid for. Measured on some of the samples.

Sizes are computed from the layout, fidelity is measured on rows that the codecs were not fitted on, and the time is
extrapolated from small dumps of the same command into a temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from softcache.cache.plan import PIXEL_DIGESTS
from softcache.cache.schema import FORMAT_VERSION, PROVISIONAL_FORMAT, ArraySpec, Layout, fit_layout, plan_layout
from softcache.cache.write.shard import file_bytes
from softcache.codecs.fidelity import GRID
from softcache.config import DumpConfig, PlanConfig
from softcache.config.unused import check_used
from softcache.data.drift import make_probe
from softcache.data.loading import Partners, ViewedSet
from softcache.data.transfer_set import TransferSet
from softcache.dump import flow as dump
from softcache.dump.choose_codec import (
    CANDIDATES,
    MEASURED_ROWS,
    Prober,
    Surveyed,
    candidates,
    choose_storages,
    kinds_of,
    promises_of,
    survey_codec,
)
from softcache.dump.job import Job, new_job
from softcache.dump.kept import VOCABULARY, Kept, kept_by_size, kept_table
from softcache.dump.layout import (
    Arrays,
    ErrorPromise,
    Promise,
    Storage,
    asked_codec,
    constants_bytes,
    feature_arrays,
    record_bytes,
)
from softcache.dump.open_teachers import open_teachers
from softcache.dump.position_index import InPart, bytes_of_a_row, one_each, part_bytes, records_of
from softcache.dump.row_batches import batch_tokens_of
from softcache.dump.samples import open_samples
from softcache.dump.teacher import Teacher
from softcache.errors import CodecFitError, ConfigError
from softcache.machine import as_fresh, pick_device, pick_threads
from softcache.report.progress import Meter
from softcache.report.tables import percent, size, table

TRIAL_SECONDS = 6.0  # how long the larger trial dump should take
FEWEST_ROWS, MOST_ROWS = 512, 16384
TRIALS = 3  # dumps
ALONE = "features alone"  # in place of a codec, where no teacher's output is kept


@dataclass(frozen=True)
class Rates:
    """What a dump takes: seconds to begin and to end, per sample read, and per view written."""

    fixed: float
    per_sample: float
    per_view: float

    def seconds(self, samples: int, views: int) -> float:
        return self.fixed + samples * (self.per_sample + views * self.per_view)


@dataclass(frozen=True)
class Choice:
    """One codec of the plan, over all members.

    Attributes:
        found: member -> what was measured.
        nbytes: of the whole cache.
        seconds: of the whole dump.
    """

    codec: str
    found: Mapping[str, Surveyed]
    nbytes: int
    seconds: float

    @property
    def refused(self) -> str:
        return next((one.refused for one in self.found.values() if one.refused), "")

    def worst(self, temperature: float) -> float | None:
        """The worst KL of a record of any member; None where the codec does not serve the temperature."""
        values = [one.worst_kl.get(temperature) for one in self.found.values()]
        return None if self.refused or None in values else max(v for v in values if v is not None)

    @property
    def worst_error(self) -> float:
        """The worst relative error of a record of any member without classes."""
        return max(one.worst_error for one in self.found.values())

    @property
    def fidelity(self) -> tuple[str, str]:
        """Of outputs without classes, for the table."""
        if self.codec == ALONE:
            return "-", "-"
        return f"{self.mean_error:.1e} / {self.worst_error:.1e}", f"{100 * self.explained:.4g} %"

    @property
    def explained(self) -> float:
        """The least share of the variance that is kept of a member without classes."""
        return min(one.explained for one in self.found.values())

    @property
    def mean_error(self) -> float:
        """The largest mean of a member."""
        return max(one.mean_error for one in self.found.values())

    def mean(self, temperature: float) -> float | None:
        """The largest mean KL of a member."""
        values = [one.mean_kl.get(temperature) for one in self.found.values()]
        return None if self.refused or None in values else max(v for v in values if v is not None)


@dataclass(frozen=True)
class Forecast:
    """What `softcache plan` found.

    Attributes:
        samples, views, members, classes: what is to be dumped.
        choices: the codecs compared, the chosen one among them.
        chosen: the codec that this command would dump with.
        promise: what --max-kl asks for.
        features: member -> feature -> bytes of a record.
        kept: of a vocabulary, what `topset` keeps of the probability.
        words: of all samples, where each has a record; None: samples have one answer each.
        multi_label: the samples have several labels: KL is the binary one, mean over the labels of a record.
        outputs: what the members gave that gave no classes; a plan is of members with classes, or of others.
    """

    samples: int
    views: int
    members: int
    classes: int
    choices: Sequence[Choice]
    chosen: str
    promise: Promise | ErrorPromise | None
    features: Mapping[str, Mapping[str, int]]
    multi_label: bool = False
    outputs: Sequence[str] = ()
    words: int | None = None
    kept: Sequence[Kept] = ()

    @property
    def _size(self) -> str:
        """What is to be dumped."""
        words = "" if self.words is None else f" of {self.words:,} words"
        return f"{self.samples:,} samples{words} x {self.views} views x {self.members} members"

    @property
    def choice(self) -> Choice:
        return next(one for one in self.choices if one.codec == self.chosen)

    def text(self) -> str:
        """The table for people."""
        if self.outputs:
            return self._text_of_numbers()
        asked = {self.promise.temperature} if isinstance(self.promise, Promise) else set()
        grid = [*GRID, *(asked - set(GRID))]
        header = ["", "codec", "bytes a record", "cache", "dump", "MB/s", *(f"KL T={t:g}" for t in grid)]
        header.append("decisions kept" if self.multi_label else "top-1 kept")
        rows = [self._row(one, grid) for one in self.choices if not one.refused]
        chosen = self.choice
        lines = [
            f"{self._size}, {self.classes:,} classes; "
            f"{'binary KL of a label' if self.multi_label else 'KL'} in nats, mean / worst record",
            "",
            table(header, rows),
        ]
        for member, kept in self.features.items():
            lines += [
                f"  feature {name} of {member}: {nbytes:,} bytes a record, counted in" for name, nbytes in kept.items()
            ]
        lines += self._refused()
        lines += ["", *kept_table(self.kept)] if self.kept else []
        lines += ["", f"> {self.chosen}: {size(chosen.nbytes)}, about {_duration(chosen.seconds)}"]
        if isinstance(self.promise, Promise):
            worst = chosen.worst(self.promise.temperature)
            shown = "dense where it fails" if chosen.codec.startswith("lowrank") else f"worst {worst:.2g}"
            lines[-1] += f"; {self.promise}: {shown}, checked again on every record while dumping"
        return "\n".join(lines)

    def _text_of_numbers(self) -> str:
        """Of members without classes."""
        header = ["", "codec", "bytes a record", "cache", "dump", "MB/s", "relative error", "variance kept"]
        rows = [[*self._cells(one), *one.fidelity] for one in self.choices if not one.refused]
        chosen = self.choice
        lines = [
            f"{self._size}, {', '.join(self.outputs)}; relative error of a record, mean / worst",
            "",
            table(header, rows),
        ]
        for member, kept in self.features.items():
            lines += [
                f"  feature {name} of {member}: {nbytes:,} bytes a record, counted in" for name, nbytes in kept.items()
            ]
        lines += self._refused()
        lines += ["", f"> {self.chosen}: {size(chosen.nbytes)}, about {_duration(chosen.seconds)}"]
        if self.promise is not None:
            shown = "dense where it fails" if chosen.codec.startswith("lowrank") else f"worst {chosen.worst_error:.2g}"
            lines[-1] += f"; {self.promise}: {shown}, checked again on every record while dumping"
        return "\n".join(lines)

    def _refused(self) -> list[str]:
        """Why other codecs cannot be used."""
        refused = [f"  {one.codec}: {one.refused}" for one in self.choices if one.refused]
        return ["", "not for this teacher:", *refused] if refused else []

    def _cells(self, one: Choice) -> list[str]:
        """What every kind of output has."""
        largest = max(found.record_bytes for found in one.found.values())
        cells = [">" if one.codec == self.chosen else "", one.codec, f"{largest:,.1f}", size(one.nbytes)]
        return [*cells, _duration(one.seconds), f"{one.nbytes / 1e6 / max(1e-9, one.seconds):.1f}"]

    def _row(self, one: Choice, grid: Sequence[float]) -> list[str]:
        cells = self._cells(one)
        for t in grid:
            mean, worst = one.mean(t), one.worst(t)
            cells.append("-" if mean is None or worst is None else f"{mean:.1e} / {worst:.1e}")
        return [*cells, percent(min(found.agreement for found in one.found.values()))]

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "samples": self.samples,
            **({} if self.words is None else {"words": self.words}),
            "views": self.views,
            "members": self.members,
            "classes": self.classes,
            "chosen": self.chosen,
            **({"kept": [asdict(one) for one in self.kept]} if self.kept else {}),
            "features": {member: dict(kept) for member, kept in self.features.items()},
            "codecs": {
                one.codec: {"refused": one.refused}
                if one.refused
                else {
                    "bytes": one.nbytes,
                    "seconds": one.seconds,
                    "record_bytes": max(found.record_bytes for found in one.found.values()),
                    "agreement": min(found.agreement for found in one.found.values()),
                    "kl": {f"{t:g}": {"mean": one.mean(t), "worst": one.worst(t)} for t in GRID},
                    **(
                        {"error": {"mean": one.mean_error, "worst": one.worst_error}, "explained": one.explained}
                        if self.outputs
                        else {}
                    ),
                }
                for one in self.choices
            },
        }


@as_fresh()
def run(
    config: PlanConfig,
    *,
    quiet: bool = False,
    codecs: Sequence[str] = CANDIDATES,
    measured_rows: int = MEASURED_ROWS,
    trial_rows: tuple[int, int] = (FEWEST_ROWS, MOST_ROWS),
    trial_seconds: float = TRIAL_SECONDS,
) -> Forecast:
    """Measure codecs on the teachers' own rows, and small dumps for the time; nothing is kept.

    Args:
        config: of the dump that is planned.
        quiet: as for the other verbs; nothing is printed here.
        codecs: to compare, and to pick from where --max-kl asks for it.
        measured_rows: on which codecs are compared.
        trial_rows: the fewest and the most rows of a trial dump.
        trial_seconds: how long the larger trial dump should take.

    Raises:
        SoftcacheError: and its children, as the dump would raise them.
    """
    check_used(config)
    torch.set_num_threads(pick_threads(config.threads))
    begin = time.monotonic()
    _open(config, measured_rows)
    middle = time.monotonic()
    transfer_set, job, viewed, prober, teachers = _open(config, measured_rows)
    once = max(0.0, 2 * middle - begin - time.monotonic())  # what a process loads the first time, as a dump's will
    _refuse_both(teachers)
    first = next((teacher for teacher in teachers if teacher.has_output), teachers[0])
    with_classes, classes = first.has_classes, first.width
    promise = promises_of(config, teachers)[with_classes]
    storages = choose_storages(config, job, teachers, prober, None, codecs=codecs)
    texts, chosen = [ALONE], ALONE
    if (codec := storages[first.name].codec) is not None:
        chosen, asked = codec.text, candidates(classes, codecs, has_classes=with_classes, promise=promise)
        # as a dump would write them, so that the chosen one is not there twice
        texts = list(dict.fromkeys([*(asked_codec(text, classes, promise).text for text in asked), chosen]))
    with Meter("plan", len(texts) + TRIALS, unit="trials", quiet=quiet) as meter:
        surveyed = {
            text: {t.name: survey_codec(text, t, prober, promise) for t in teachers} for text in meter.over(texts)
        }
        tried = chosen
        try:
            rates = _rates(config, transfer_set, job, tried, trial_rows, trial_seconds, meter)
        except CodecFitError:  # it suits the whole set, and not the few samples of a trial
            tried = "float32"
            rates = _rates(config, transfer_set, job, tried, trial_rows, trial_seconds, meter)
    rates, probe_bytes = replace(rates, fixed=rates.fixed + once), _probe_bytes(viewed, job)
    beside = {t.name for t in teachers if storages[t.name].features and t.has_classes}
    classifiers = {t.name: _classifier_arrays(t, prober) if t.name in beside else {} for t in teachers}
    features = {
        name: {f.name: record_bytes(feature_arrays(f)) for f in s.features}
        for name, s in storages.items()
        if s.features
    }
    base = sum(one.seconds for one in surveyed[tried].values())
    choices = []
    for text, found in surveyed.items():
        if any(one.refused for one in found.values()):
            choices.append(Choice(text, found, 0, 0.0))
            continue
        per_view = rates.per_view + sum(one.seconds for one in found.values()) - base
        seconds = replace(rates, per_view=max(0.0, per_view)).seconds(len(transfer_set), job.views)
        scales = {name: kinds_of(s.beside) for name, s in storages.items() if not s.has_classes}
        has_layer = text != ALONE and asked_codec(text, classes, promise).needs_classifier  # linear_head
        kept = {**({} if has_layer else classifiers), **scales}
        nbytes = probe_bytes + _cache_bytes(config, transfer_set, job, found, storages, kept)
        choices.append(Choice(text, found, nbytes, seconds))
    choices.sort(key=lambda one: (bool(one.refused), -one.nbytes))
    return Forecast(
        len(transfer_set),
        job.views,
        len(teachers),
        transfer_set.num_classes,
        choices,
        chosen,
        promise,
        features,
        transfer_set.multi_label,
        tuple(dict.fromkeys(teacher.output for teacher in teachers if not with_classes)),
        None if job.positions is None else job.positions.total,
        _kept(teachers, prober, chosen),
    )


def _kept(teachers: Sequence[Teacher], prober: Prober, chosen: str) -> list[Kept]:
    """Of members with very many classes, or whose codec is topset."""
    of_classes = [teacher for teacher in teachers if teacher.has_output and teacher.has_classes]
    if not of_classes or not (chosen.startswith("topset") or of_classes[0].width >= VOCABULARY):
        return []
    return kept_by_size([prober.measuring_rows(teacher).logits for teacher in of_classes])


def _refuse_both(teachers: Sequence[Teacher]) -> None:
    """Codecs are compared by the divergence of classes, or by the error of other numbers."""
    if len({teacher.has_classes for teacher in teachers if teacher.has_output}) > 1:
        raise ConfigError(
            "plan compares codecs for members with classes, or for members without, and here are both",
            tip="plan them one after the other: sizes add up",
        )


def _open(config: PlanConfig, measured_rows: int) -> tuple[TransferSet, Job, ViewedSet, Prober, list[Teacher]]:
    """What a dump opens before its first row."""
    transfer_set, _ = open_samples(config)
    job = new_job(config, transfer_set)
    viewed = ViewedSet(transfer_set, job.policy, (), partners=Partners(transfer_set, job.order))
    most = batch_tokens_of(config, transfer_set)
    prober = Prober(viewed, job.order, config.batch_size, measured_rows=measured_rows, batch_tokens=most)
    teachers = open_teachers(config, prober, transfer_set, pick_device(config.device))
    return transfer_set, job, viewed, prober, teachers


def _cache_bytes(
    config: PlanConfig,
    transfer_set: TransferSet,
    job: Job,
    found: Mapping[str, Surveyed],
    storages: Mapping[str, Storage],
    classifiers: Mapping[str, Arrays],
) -> int:
    """Of all files together, to the byte but for rows that a codec keeps dense."""
    count, classes = len(transfer_set), transfer_set.num_classes
    records = {name: {**one.arrays, **_feature_arrays(storages[name])} for name, one in found.items()}
    largest = max(sum(ArraySpec("", d, s).nbytes for d, s in arrays.values()) for arrays in records.values())
    others = any(not storage.has_classes or storage.index for storage in storages.values())
    formats = [storage.codec.format for storage in storages.values() if storage.codec is not None]
    format = max(PROVISIONAL_FORMAT if others else int(config.format), *formats, FORMAT_VERSION)
    row_bytes = bytes_of_a_row(largest, job.positions)
    layout = plan_layout(count, job.views, len(found), row_bytes, shard_rows=config.shard_rows, format=format)
    if format != FORMAT_VERSION:
        layout = fit_layout(layout, part_bytes(largest, job.positions, layout))
    labels = ArraySpec("labels", "|u1", (count, -(-classes // 8))) if transfer_set.multi_label else None
    samples = [
        ArraySpec("ids", "<u8", (count,)),
        labels or ArraySpec("labels", "<i4", (count,)),
        ArraySpec("digests", "|u1", (count, 16)),
    ]
    if not config.no_keys:
        key_bytes = sum(len(key.encode()) for key in transfer_set.keys)
        samples += [ArraySpec("key_bytes", "|u1", (key_bytes,)), ArraySpec("key_offsets", "<u8", (count + 1,))]
    total, in_part = file_bytes(samples), records_of(job.positions, layout)
    for name, arrays in records.items():
        total += _parts_bytes(layout, arrays, in_part)
        if (codec := storages[name].codec) is not None:
            total += _dense_bytes(layout, found[name].dense, codec.num_classes, in_part)
        total += constants_bytes({**found[name].constants, **classifiers.get(name, {})})
    if job.positions is not None:
        numbers = job.positions.arrays()
        total += file_bytes([ArraySpec(name, one.dtype.str, one.shape) for name, one in numbers.items()])
    return total + _parts_bytes(layout, {PIXEL_DIGESTS: ("<u4", ())})


def _classifier_arrays(teacher: Teacher, prober: Prober) -> Arrays:
    """Of the final linear layer, which is kept beside features."""
    classifier = teacher.find_classifier(prober.first_batch(teacher))
    if classifier is None:
        return {}
    weight, bias = teacher.classifier_constants(classifier)
    arrays: Arrays = {"head_weight": ("<f4", tuple(weight.shape))}
    return arrays if bias is None else {**arrays, "head_bias": ("<f4", tuple(bias.shape))}


def _feature_arrays(storage: Storage) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: spec for feature in storage.features for name, spec in feature_arrays(feature).items()}


def _parts_bytes(layout: Layout, arrays: Mapping[str, tuple[str, tuple[int, ...]]], in_part: InPart = one_each) -> int:
    """Of one member's parts; parts of one shape are of one size."""
    sizes: dict[tuple[int, ...], int] = {}
    total = 0
    for span in layout.spans():
        records = in_part(span)
        shape = (span.views, span.rows) if records is None else (records,)
        if shape not in sizes:
            sizes[shape] = file_bytes([ArraySpec(n, d, (*shape, *tail)) for n, (d, tail) in arrays.items()])
        total += sizes[shape]
    return total


def _dense_bytes(layout: Layout, share: float, classes: int, in_part: InPart) -> int:
    """Of the rows that one member's codec will keep dense, if they are as many in every part as on the probe."""
    records = ((span.rows * span.views, in_part(span)) for span in layout.spans())
    counts = Counter(round(share * (whole if some is None else some)) for whole, some in records)
    return sum(n * file_bytes([ArraySpec("logits", "<f2", (rows, classes))]) for rows, n in counts.items() if rows)


def _probe_bytes(viewed: ViewedSet, job: Job) -> int:
    probe = make_probe(lambda row, view: viewed.render(int(job.order[row]), view), len(job.order), job.views)
    return file_bytes([ArraySpec(n, a.dtype.newbyteorder("<").str, a.shape) for n, a in probe.items()]) if probe else 0


def _rates(
    config: PlanConfig,
    transfer_set: TransferSet,
    job: Job,
    codec: str,
    trial_rows: tuple[int, int],
    trial_seconds: float,
    meter: Meter,
) -> Rates:
    """From small dumps of this command: a first one to see how long it takes, two of different size, one of two views."""
    count, (fewest, most) = len(transfer_set), trial_rows
    with tempfile.TemporaryDirectory(prefix="softcache-plan-") as folder:

        def trial(rows: int, views: int) -> tuple[float, float]:
            """Seconds of a dump of so many rows and views: those before its first view, and those of one view."""
            number = len(list(Path(folder).iterdir()))
            keys = Path(folder) / f"keys-{number}.txt"
            chosen = np.linspace(0, count - 1, min(rows, count)).astype(np.int64)
            keys.write_text("".join(f"{transfer_set.keys[int(i)]}\n" for i in chosen), encoding="utf-8")
            values = {f.name: getattr(config, f.name) for f in fields(PlanConfig)}
            values |= {"samples": str(keys), "codec": None if codec == ALONE else codec, "views": views, "max_kl": None}
            values["at_temperature"] = PlanConfig.at_temperature  # of no use without a promise
            done = dump.run(DumpConfig(**values, out=str(Path(folder) / f"cache-{number}")), quiet=True)
            meter.add()
            per_view = 1 / done.samples_per_s
            return max(0.0, done.seconds - len(chosen) * views * per_view), per_view

        few, views = min(count, fewest), min(2, job.views)
        trial(few, views)  # the first one also pays for what every process loads once
        before, per_view = trial(few, views)
        taken = before + few * views * per_view
        rows = min(count, most, max(2 * few, int(few * trial_seconds / max(taken, 0.01))))
        if rows <= few:  # the whole set was tried
            return Rates(before, 0.0, per_view)
        before_more, per_view = trial(rows, views)
        per_sample = max(0.0, (before_more - before) / (rows - few))
        return Rates(max(0.0, before - few * per_sample), per_sample, per_view)


def _duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""manifest.json: what a cache holds and what made it. Canonical JSON; the sha256 of its bytes is the cache's id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.cache.schema import FORMAT_VERSION, MANIFEST, MANIFESTS, OUR_FILES, PLAN, WORK, Layout
from softcache.cache.stored import StoredFile
from softcache.errors import CacheError, DamagedCacheError, UnfinishedCacheError

MAX_MANIFEST_BYTES = 64 * 2**20


def canonical_json(value: Any) -> bytes:
    """UTF-8, sorted keys, no spaces; only strings, booleans, null and integers below 2**53 are allowed."""
    _check_canonical(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _check_canonical(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            assert isinstance(key, str), f"JSON key {key!r} is not a string"
            _check_canonical(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_canonical(inner)
    else:
        assert value is None or isinstance(value, bool | str) or (isinstance(value, int) and abs(value) < 2**53), (
            f"{value!r} has no canonical JSON form; write seeds and non-integers as strings"
        )


@dataclass(frozen=True)
class SampleInfo:
    """The transfer set as the cache knows it. `fingerprint` is sha256 over (id, label, content digest) in order of id."""

    source: str
    count: int
    fingerprint: str
    digest_kind: str  # "file" or "item"
    has_keys: bool
    multi_label: bool
    order: str  # "permuted" or "natural"
    order_seed: str


@dataclass(frozen=True)
class ViewInfo:
    """The view policy: `steps` are {"name", "version", "parameters": {name: string}}; `replay` is "derived" or "seeded"."""

    count: int
    root_seed: str
    replay: str
    steps: Sequence[Mapping[str, Any]]


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
        codec: {"name", "parameters": {name: string}}.
    """

    name: str
    model: str
    fingerprint: str
    output: str
    compute_dtype: str
    class_order: Sequence[int] | None
    codec: Mapping[str, Any]


@dataclass(frozen=True)
class MemberStatistics:
    """Measured over all records of one member while they were written.

    Attributes:
        records: rows x views.
        labelled: records of samples with one class label.
        correct: of those, where the largest logit is the label's.
        entropy: mean entropy of softmax(logits) at T=1, in nats.
        max_eps: the largest |stored - given| of any logit.
        floored: probabilities of exactly zero that were stored as the floor's logarithm.
    """

    records: int = 0
    labelled: int = 0
    correct: int = 0
    entropy_sum: float = 0.0
    max_eps: float = 0.0
    floored: int = 0

    def __add__(self, other: MemberStatistics) -> MemberStatistics:
        return MemberStatistics(
            self.records + other.records,
            self.labelled + other.labelled,
            self.correct + other.correct,
            self.entropy_sum + other.entropy_sum,
            max(self.max_eps, other.max_eps),
            self.floored + other.floored,
        )

    @property
    def entropy(self) -> float:
        return self.entropy_sum / max(1, self.records)

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "labelled": self.labelled,
            "correct": self.correct,
            "entropy_sum": repr(self.entropy_sum),
            "max_eps": repr(self.max_eps),
            "floored": self.floored,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MemberStatistics:
        return cls(
            int(entry["records"]),
            int(entry["labelled"]),
            int(entry["correct"]),
            float(entry["entropy_sum"]),
            float(entry["max_eps"]),
            int(entry["floored"]),
        )


@dataclass(frozen=True)
class Plan:
    """Everything that is fixed before the first row is written; the manifest is this plus files and statistics.

    `made_with` holds softcache, torch, device, batch_size, threads, autocast: what equal bytes depend on.
    """

    samples: SampleInfo
    class_names: Sequence[str]
    views: ViewInfo
    members: Sequence[MemberInfo]
    layout: Layout
    made_with: Mapping[str, Any]
    format: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "samples": dict(vars(self.samples)),
            "class_names": list(self.class_names),
            "views": dict(vars(self.views)),
            "members": [dict(vars(member)) for member in self.members],
            "layout": dict(vars(self.layout)),
            "made_with": dict(self.made_with),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Plan:
        return cls(
            samples=SampleInfo(**entry["samples"]),
            class_names=tuple(entry["class_names"]),
            views=ViewInfo(**entry["views"]),
            members=tuple(MemberInfo(**member) for member in entry["members"]),
            layout=Layout(**entry["layout"]),
            made_with=entry["made_with"],
            format=int(entry["format"]),
        )


@dataclass(frozen=True)
class Manifest:
    """A committed cache. `id` is the sha256 of the canonical JSON."""

    plan: Plan
    files: Sequence[StoredFile]
    statistics: Mapping[str, MemberStatistics]
    id: str = ""

    def to_bytes(self) -> bytes:
        return canonical_json(
            self.plan.to_json()
            | {
                "files": [file.to_json() for file in self.files],
                "statistics": {name: s.to_json() for name, s in self.statistics.items()},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: Path) -> Manifest:
        """Parse a manifest; CacheError when it is of another version, DamagedCacheError when it is not one at all."""
        try:
            entry = json.loads(data)
            found = entry["format"]
        except (ValueError, KeyError, TypeError) as exc:
            raise DamagedCacheError(
                f"{where}: not a manifest ({exc})", tip="copy the cache again, or restore the file from manifests/"
            ) from None
        if isinstance(found, bool) or found != FORMAT_VERSION:
            raise CacheError(
                f"{where}: written in format version {found}; this softcache reads version {FORMAT_VERSION}",
                tip="install the softcache that wrote it, or dump again",
            )
        try:
            manifest = cls(
                plan=Plan.from_json(entry),
                files=tuple(StoredFile.from_json(file) for file in entry["files"]),
                statistics={name: MemberStatistics.from_json(s) for name, s in entry["statistics"].items()},
                id=hashlib.sha256(data).hexdigest(),
            )
            for file in manifest.files:
                if not OUR_FILES.fullmatch(file.path):
                    raise ValueError(f"{file.path!r} is not the name of a cache file")
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise DamagedCacheError(
                f"{where}: field missing or of the wrong type ({exc})",
                tip="copy the cache again, or restore the file from manifests/",
            ) from None

    def files_of(self, kind: str, member: str | None = None) -> Iterator[StoredFile]:
        return (file for file in self.files if file.kind == kind and file.member == member)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def read_manifest(path: Path, *, id: str | None = None) -> Manifest:
    """The manifest of a cache folder: the newest, or the one with the given id (a unique prefix is enough).

    Raises:
        CacheError: no such folder, not a cache, or a version this code cannot read.
        UnfinishedCacheError: a dump that has not been committed; the message says how far it is.
        DamagedCacheError: the manifest's bytes do not have the id that is its name.
    """
    if not path.is_dir():
        raise CacheError(f"{path}: there is no such folder", tip="give the folder that `softcache dump --out` wrote")
    if id is not None:
        matches = sorted((path / MANIFESTS).glob(f"{id}*.json"))
        if len(matches) != 1:
            known = ", ".join(p.stem[:12] for p in sorted((path / MANIFESTS).glob("*.json"))) or "none"
            raise CacheError(f"{path}: {len(matches)} manifests match id {id!r}; known: {known}")
        file = matches[0]
    else:
        file = path / MANIFEST
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise DamagedCacheError(f"{file}: {file.stat().st_size} bytes is no manifest of ours")
        data = file.read_bytes()
    except FileNotFoundError:
        raise _without_manifest(path) from None
    manifest = Manifest.from_bytes(data, file)
    if id is not None and manifest.id != file.stem:
        raise DamagedCacheError(f"{file}: its bytes have sha256 {manifest.id}", tip="copy the cache again")
    return manifest


def _without_manifest(path: Path) -> CacheError:
    if not (path / PLAN).is_file():
        if (path / WORK).is_dir():
            return UnfinishedCacheError(
                f"{path}: the dump is not finished: it was still reading the samples, no span is written",
                tip="run the same `softcache dump` command again to resume it",
            )
        return CacheError(
            f"{path}: no {MANIFEST}, so this is not a softcache cache",
            tip="give the folder that `softcache dump --out` wrote",
        )
    total = len(Plan.from_json(json.loads((path / PLAN).read_bytes())["plan"]).layout)
    done = len(read_journals(path))
    return UnfinishedCacheError(
        f"{path}: the dump is not finished: {done} of {total} spans are written ({100 * done // max(1, total)} %)",
        tip="run the same `softcache dump` command again to resume it; finished shards are kept",
    )


def read_journals(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Span index -> its different journal entries, over all parts: one, unless a span was written twice.

    A line torn by a crash is skipped: its span is done again.
    """
    entries: dict[int, list[dict[str, Any]]] = {}
    for journal in sorted((path / WORK).glob("part-*.jsonl")):
        for line in journal.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                known = entries.setdefault(int(entry["span"]), [])
                if entry not in known:
                    known.append(entry)
            except (ValueError, KeyError, TypeError):
                continue
    return entries


def differences(wanted: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, wanted, found) of every leaf that differs between two JSON values."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in sorted({*wanted, *found}):
            yield from differences(wanted.get(key), found.get(key), f"{prefix}.{key}" if prefix else key)
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            yield from differences(one, other, f"{prefix}[{index}]")
    elif wanted != found:
        yield prefix, wanted, found

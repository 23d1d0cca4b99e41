"""softcache inspect: what made this cache, from what, how big, and what one sample's soft target looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.card.teachers import codec_text, record_bytes
from softcache.cache.plan import CLASS_OUTPUTS, IndexInfo, Plan
from softcache.cache.provenance import read_provenance
from softcache.cache.reader import CacheReader
from softcache.cache.schema import PROVISIONAL_FORMAT
from softcache.cache.statistics import MemberStatistics
from softcache.check.word_targets import WordTargets, word_targets
from softcache.data.identity import sample_id
from softcache.data.label_kind import log_soft_target
from softcache.errors import ConfigError, MissingSampleError, nearest
from softcache.report.tables import bar, percent, size, table
from softcache.targets.cache import Cache
from softcache.targets.cache import open as open_cache

TEMPERATURES = (1.0, 2.0, 4.0, 20.0)
SHOWN_CLASSES = 8
SHOWN_DIVERGENCES = ("1", "4")


def describe(path: Path | str) -> dict[str, Any]:
    """Everything the manifest says, for machines."""
    manifest = _unread(path).manifest
    return {
        "id": manifest.id,
        "bytes": manifest.nbytes,
        "files": len(manifest.files),
        **manifest.plan.to_json(),
        "statistics": {
            name: {
                "accuracy": s.accuracy,
                "entropy": s.entropy,
                "max_eps": s.max_eps,
                "records": s.records,
                "dense": s.dense,
                "agreement": s.agreement,
                "kl": {t: {"mean": s.mean_kl(t), "worst": d.worst} for t, d in s.kl.items()},
                "feature_errors": dict(s.feature_errors),
                **({"kept": {f"{t:g}": share for t, share in s.mean_kept.items()}} if s.kept else {}),
                **({} if s.error is None else {"error": _error_of(s)}),
            }
            for name, s in manifest.statistics.items()
        },
    }


def _unread(path: Path | str) -> Cache:
    """A cache, of whose manifest alone is told: no file of a folder has to be hashed for it."""
    return open_cache(path) if isinstance(path, str) else Cache(CacheReader(path))


def _error_of(s: MemberStatistics) -> dict[str, float]:
    """Relative error of the records that were measured."""
    assert s.error is not None
    return {"mean": s.error.sum / max(1, s.measured), "worst": s.error.worst}


def report(path: Path | str) -> str:
    """The same for people."""
    cache = _unread(path)
    plan, manifest = cache.manifest.plan, cache.manifest
    names = list(cache.class_names)
    facts = [
        ("id", manifest.id),
        ("format", f"version {plan.format}" + (" (provisional)" if plan.format == PROVISIONAL_FORMAT else "")),
        ("transfer set", f"{plan.samples.source}, {plan.samples.count:,} samples"),
        ("classes", f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "none"),
        *_of_tokens(plan),
        ("views", f"{plan.views.count} of {cache.policy}, root seed {plan.views.root_seed}"),
        ("size", f"{size(manifest.nbytes)} in {len(manifest.files)} files"),
        *_rounds(plan),
        *([("licence", plan.license)] if plan.license is not None else []),
        *[("taken out of" if plan.parent else "merged of", parent.id) for parent in plan.parents],
        ("made with", ", ".join(f"{k} {v}" for k, v in plan.made_with.items())),
    ]
    made = {} if isinstance(path, str) else read_provenance(path)
    if {"finished", "host"} <= made.keys():
        facts.append(("made", f"{made['finished']} on {made['host']}"))
    members = []
    for member in plan.members:
        if member.output not in CLASS_OUTPUTS:
            continue
        s = manifest.statistics[member.name]
        members.append(
            [
                member.name,
                member.model,
                member.output,
                codec_text(member.codec),
                f"{record_bytes(manifest, member.name):.1f}",
                f"{s.max_eps:.3g}" if cache.codecs[member.name].bounded else "none",
                *(_divergence(s, t) for t in SHOWN_DIVERGENCES),
                percent(s.accuracy),
                "-" if cache.multi_label else f"{s.entropy:.4f}",  # it is of a softmax
                member.fingerprint[:12],
            ]
        )
    divergences = [f"KL at T={t}, mean / worst" for t in SHOWN_DIVERGENCES]
    header = ["member", "model", "output", "codec", "bytes a record", "max eps", *divergences]
    header += ["top-1", "entropy (nats)", "weights"]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    lines += ["", table(header, members)] if members else []
    lines += _others(cache)
    for name, s in manifest.statistics.items():
        if s.dense:
            lines.append(f"  {s.dense:,} of {s.records:,} records of {name} are kept dense, counted in")
        if s.kept:
            told = ", ".join(f"{share:.1%} at T={t:g}" for t, share in s.mean_kept.items())
            lines.append(f"  the classes kept of {name} hold {told} of the probability")
    features = [
        [m.name, f.name, f.stored, f.dtype, " + ".join(map(str, f.shapes)), f"{error:.2g}"]
        for m in plan.members
        for f in m.features
        for error in [manifest.statistics[m.name].feature_errors.get(f.name, 0.0)]
    ]
    if features:
        lines += ["", table(["member", "feature", "stored as", "dtype", "output", "worst L2 error"], features)]
    return "\n".join(lines)


def _of_tokens(plan: Plan) -> list[tuple[str, str]]:
    """Which tokens the classes are, and how texts became tokens."""
    found = []
    if plan.vocabulary is not None:
        found.append(("tokenizer", f"{plan.vocabulary['count']:,} ids, sha256 {plan.vocabulary['tokenizer'][:16]}"))
    if plan.rendering is not None:
        found.append(("rendering", ", ".join(f"{name} {value}" for name, value in sorted(plan.rendering.items()))))
    return found


def _others(cache: Cache) -> list[str]:
    """A table of the members without classes."""
    rows = []
    for member in cache.manifest.plan.members:
        s, codec = cache.manifest.statistics[member.name], cache.codecs.get(member.name)
        if member.output in CLASS_OUTPUTS:
            continue
        error = None if s.error is None or not s.measured else _error_of(s)
        gave = f"values {', '.join(member.value_names)}" if member.value_names else member.output or "features alone"
        shown = "-" if error is None else f"{error['mean']:.2g} / {error['worst']:.2g}"
        size_of = f"{record_bytes(cache.manifest, member.name):.1f}"
        did = ", ".join(f"{name} {value}" for name, value in sorted(member.input.items())) or "-"
        eps = "-" if codec is None else f"{s.max_eps:.3g}"
        rows.append([member.name, member.model, gave, member.width, codec_text(member.codec), size_of, eps, shown, did])
        rows[-1].append(member.fingerprint[:12])
    header = ["member", "model", "output", "numbers", "codec", "bytes a record", "max eps"]
    return ["", table([*header, "relative error, mean / worst", "of its own", "weights"], rows)] if rows else []


def _rounds(plan: Plan) -> list[tuple[str, str]]:
    """A line for the dump, and one for each that extended it."""
    lines = [("index", _index_text(index)) for index in plan.indexes]
    for number, one in enumerate(plan.rounds):
        layout, stop = one.layout, one.layout.first_view + one.layout.num_views
        what = f"views {layout.first_view} to {stop - 1} of {', '.join(one.members)}"
        parts = f"{len(layout)} parts of {layout.shard_rows:,} rows x {layout.shard_views} views"
        lines.append(
            (
                "extended by" if number else "rows",
                f"{what}; {parts}" + ("" if number else f", {plan.samples.order} order"),
            )
        )
    return lines


def _index_text(index: IndexInfo) -> str:
    """Its name, and what its positions are."""
    of = f"{'some ' if index.listed else ''}{index.kind}"
    of = "the tokens that carry loss" if index.kind == "tokens" and index.listed else of
    return f"{index.name}: {of}{', with labels' if index.labels else ''}"


def _divergence(s: MemberStatistics, temperature: str) -> str:
    if temperature not in s.kl:
        return "not measured"
    return f"{s.mean_kl(temperature):.2g} / {s.kl[temperature].worst:.2g}"


@dataclass(frozen=True)
class SoftTarget:
    """What the teachers answered to one view of one sample.

    Attributes:
        id: in hex.
        labels: indices of its classes; several where the data is multi-label, none where it is unlabelled.
        blocks: title (a member, or the ensemble) -> temperature -> (C,) float64 probabilities; of several labels each that of
            yes, so that they do not add up to 1.
        outputs: member without classes -> the names of its values (none of an embedding), and (W,) float32 numbers.
    """

    key: str
    id: str
    row: int
    view: int
    labels: Sequence[int]
    class_names: Sequence[str]
    blocks: Mapping[str, Mapping[float, np.ndarray]]
    outputs: Mapping[str, tuple[Sequence[str], np.ndarray]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        blocks = {
            title: {f"{t:g}": probabilities.tolist() for t, probabilities in by_temperature.items()}
            for title, by_temperature in self.blocks.items()
        }
        others = {
            name: {"names": list(names), "numbers": found.tolist()} for name, (names, found) in self.outputs.items()
        }
        about = {"key": self.key, "id": self.id, "row": self.row, "view": self.view, "labels": list(self.labels)}
        return {**about, "classes": list(self.class_names), "probabilities": blocks} | (
            {"outputs": others} if others else {}
        )

    def text(self) -> str:
        """As bars, one block per member, then the ensemble's."""
        names = self.class_names
        named = ", ".join(names[i] for i in self.labels) or "none"
        lines = [f"{self.key}: row {self.row}, view {self.view}, id {self.id}, label {named}"]
        for title, tables in self.blocks.items():
            order = np.argsort(-tables[1.0], kind="stable")[:SHOWN_CLASSES]
            width = max(len(names[i]) for i in order)
            lines += ["", title, " " * (width + 4) + "".join(f"{f'T={t:g}':<22}" for t in tables)]
            for i in order:
                mark = "*" if int(i) in self.labels else " "
                cells = [f"{100 * p[i]:6.2f} % {bar(float(p[i]), 12):<12}" for p in tables.values()]
                lines.append(f"{mark} {names[i]:<{width}}  " + " ".join(cells).rstrip())
            if len(names) > SHOWN_CLASSES:
                lines.append(f"  ... {len(names) - SHOWN_CLASSES} more classes")
        for title, (names, found) in self.outputs.items():
            lines += ["", title]
            if names:
                lines += [f"  {name}  {value:.6g}" for name, value in zip(names, found.tolist(), strict=True)]
            else:
                first = ", ".join(f"{value:.4g}" for value in found[:SHOWN_CLASSES].tolist())
                more = ", ..." if len(found) > SHOWN_CLASSES else ""
                lines.append(f"  {len(found):,} numbers of length {np.linalg.norm(found):.4g}: {first}{more}")
        return "\n".join(lines)


def soft_target(path: Path | str, key: str, *, view: int = 0, combine: str = "mean_probs") -> SoftTarget | WordTargets:
    """One sample's soft target at several temperatures: of each member, then of the ensemble; or those of its words at T=1."""
    cache = open_cache(path)
    if not 0 <= view < cache.num_views:
        raise ConfigError(f"--view {view}: the cache has views 0 to {cache.num_views - 1}")
    row = row_of(cache, key)
    plain = [m.name for m in cache.manifest.plan.members if m.index is None and m.output is not None]
    alone = [
        (m.name, f.name) for m in cache.manifest.plan.members if m.output is None for f in m.features if f.index is None
    ]
    if not plain and not alone and (of_words := word_targets(cache, row, view)) is not None:
        return of_words
    if not plain and not alone:
        raise ConfigError(
            f"{path}: no member has an answer of its own for a sample", tip="softcache.open(...).gather reads them"
        )
    chosen = [*plain, *dict.fromkeys(member for member, _ in alone)]
    asked = list(dict.fromkeys(feature for _, feature in alone))
    targets = cache.gather(np.array([row]), np.array([view]), members=chosen, features=asked)
    members = [name for name in plain if name not in targets.outputs]
    samples = cache.samples
    label = samples.labels_of(np.array([row]))[0]
    labels = [int(i) for i in np.flatnonzero(label)] if samples.multi_label else [int(label)] * (int(label) >= 0)
    codecs = [cache.codecs[member] for member in members]
    served = [t for t in TEMPERATURES if all(codec.serves(t) for codec in codecs)]
    blocks = {member: {t: targets.log_soft_target(member, t) for t in served} for member in members}
    if len(members) > 1 and all(codec.complete for codec in codecs):
        combined = {t: targets.combined(combine, weights=dict.fromkeys(members, 1.0), temperature=t) for t in served}
        blocks[f"ensemble ({combine})"] = {
            t: log_soft_target(logits, t, multi_label=cache.multi_label) for t, logits in combined.items()
        }
    return SoftTarget(
        samples.key(row),
        f"{int(samples.ids[row]):016x}",
        row,
        view,
        labels,
        cache.class_names,
        {
            title: {t: log_probs[0].double().exp().numpy() for t, log_probs in found.items()}
            for title, found in blocks.items()
        },
        {
            name: (list(cache.member(name).value_names), targets.output(name)[0].numpy())
            for name, output in targets.outputs.items()
            if output is not None
        }
        | {f"{name}, {feature}": ([], targets.feature(feature, name)[0].flatten().numpy()) for name, feature in alone},
    )


def row_of(cache: Cache, key: str) -> int:
    """The row of a key, or of an id in hex."""
    samples = cache.samples
    wanted = {sample_id(key)} | ({int(key, 16)} if len(key) == 16 and _is_hex(key) else set())
    for candidate in wanted:
        where = np.flatnonzero(samples.ids == np.uint64(candidate))
        if where.size:
            return int(where[0])
    some = [samples.key(row) for row in range(min(len(samples), 2000))]
    raise MissingSampleError(f"{cache.reader.path}: no sample {key!r}", tip=nearest(key, some)[:200])


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdef" for c in text)

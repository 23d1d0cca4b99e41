"""softcache diff: what differs between two caches, and how far apart their teachers are over the samples that both have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.cache.plan import CLASS_OUTPUTS, OTHER_OUTPUTS
from softcache.cache.schema import PROVISIONAL_FORMAT
from softcache.errors import ConfigError, JoinError, nearest
from softcache.report.progress import Meter
from softcache.report.tables import percent, table
from softcache.targets.cache import Cache
from softcache.targets.cache import open as open_cache

BATCH_NUMBERS = 1 << 22  # of one member, held in memory at once
TEMPERATURES = (1.0, 4.0)
SHOWN = 10  # samples that differ most
LEFT_OUT = ("rounds", "members", "class_names", "format")  # told in another way, or nothing about what is stored


@dataclass(frozen=True)
class MemberDifference:
    """How far apart two members are, over all records of common samples and views.

    Attributes:
        a, b: their names.
        records: how many were compared.
        agreement: of classes: share where the largest logit is of the same class.
        kl: of classes: temperature -> mean KL(a || b) in nats; of several labels the sum of the binary ones.
        cosine, relative: of other outputs: mean cosine, and mean |a - b| / |a|.
        most: (sample, view, how far), the farthest first: by KL at T=1, or by |a - b| / |a|.
    """

    a: str
    b: str
    records: int
    agreement: float | None = None
    kl: Mapping[str, float] = field(default_factory=dict)
    cosine: float | None = None
    relative: float | None = None
    most: Sequence[tuple[str, int, float]] = ()


@dataclass(frozen=True)
class Difference:
    """What differs between two caches.

    Attributes:
        ids: of both.
        fields: (where in the manifest, in a, in b) of what differs; values as JSON has them.
        samples: how many both have, only a, only b.
        relabelled: how many common samples have another label.
        changed: how many common samples have another content.
        views: how many views were compared.
        members: pairs of members that were compared.
        notes: what could not be compared, and why.
    """

    ids: tuple[str, str]
    fields: Sequence[tuple[str, Any, Any]]
    samples: tuple[int, int, int]
    relabelled: int
    changed: int
    views: int
    members: Sequence[MemberDifference]
    notes: Sequence[str]


def run(
    a: Path | str,
    b: Path | str,
    *,
    pairs: Sequence[str] = (),
    temperatures: Sequence[float] = TEMPERATURES,
    quiet: bool = False,
) -> Difference:
    """Compare two caches.

    Args:
        pairs: `NAME` or `NAME=OTHER`: members of a and of b to compare; empty: those of the same name, or the only two.
        temperatures: of the KL.

    Raises:
        ConfigError: a member that is not there, or two that give unlike things.
        JoinError: the caches have no sample in common.
    """
    if not all(0 < one < float("inf") for one in temperatures):
        raise ConfigError(f"temperatures {temperatures}: one is no number above 0", tip="--temperatures 1,4")
    first, second = open_cache(a, quiet=quiet), open_cache(b, quiet=quiet)
    rows_a, rows_b = common_rows(first, second)
    if not len(rows_a):
        raise JoinError(
            f"{a} and {b} have no sample in common: sample ids are hashes of their names",
            tip="compare caches of one transfer set; `softcache inspect` says what each was made from",
        )
    views, notes = common_views(first, second)
    chosen = pairs_of(first, second, pairs)
    found = []
    with Meter(f"diff {a} {b}", len(chosen) * len(views) * len(rows_a), unit="records", quiet=quiet) as meter:
        for name_a, name_b in chosen:
            why = unlike(first, second, name_a, name_b)
            told = why or compare(first, second, (name_a, name_b), (rows_a, rows_b), views, temperatures, meter)
            if isinstance(told, str):
                notes.append(f"{name_a} and {name_b}: {told}")
            else:
                found.append(told)
    labels = [cache.samples.labels_of(rows) for cache, rows in ((first, rows_a), (second, rows_b))]
    comparable = labels[0].shape == labels[1].shape and first.class_names == second.class_names
    if not comparable:
        notes.append("the class lists differ, and labels are not compared")
    digests = [cache.samples.digests[rows] for cache, rows in ((first, rows_a), (second, rows_b))]
    kinds = {cache.manifest.plan.samples.digest_kind for cache in (first, second)}
    if len(kinds) > 1:
        notes.append("contents were digested in different ways, and are not compared")
    return Difference(
        (first.id, second.id),
        list(fields_of(first, second)),
        (len(rows_a), len(first) - len(rows_a), len(second) - len(rows_b)),
        int((labels[0] != labels[1]).reshape(len(rows_a), -1).any(axis=1).sum()) if comparable else 0,
        int((digests[0] != digests[1]).any(axis=1).sum()) if len(kinds) == 1 else 0,
        len(views),
        found,
        notes,
    )


def common_rows(a: Cache, b: Cache) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int64 rows of a, ascending, and (n,) those of b: the samples that both have."""
    _, rows_a, rows_b = np.intersect1d(a.samples.ids, b.samples.ids, assume_unique=True, return_indices=True)
    order = np.argsort(rows_a, kind="stable")
    return rows_a[order], rows_b[order]


def common_views(a: Cache, b: Cache) -> tuple[list[tuple[int, int]], list[str]]:
    """(view of a, view of b) that were rendered alike, and what is to be said of the others."""
    one, other = (cache.manifest.plan.views for cache in (a, b))
    alike = one.steps == other.steps and (
        not one.steps or (one.root_seed, one.replay) == (other.root_seed, other.replay)
    )
    if not alike:
        what = f"the views differ ({a.policy} and {b.policy})"
        return [(0, 0)], [f"{what}: the first of each is compared, and it may be of other pixels"]
    samples = [cache.manifest.plan.samples for cache in (a, b)]
    if a.policy.mixing is not None and samples[0].fingerprint != samples[1].fingerprint:
        return [], ["views are mixed with partners of the cache's own samples, which differ: no records are compared"]
    first, stop = max(one.first, other.first), min(one.first + one.count, other.first + other.count)
    if first >= stop:
        return [], ["the caches have other views of the samples: no records are compared"]
    return [(view - one.first, view - other.first) for view in range(first, stop)], []


def pairs_of(a: Cache, b: Cache, asked: Sequence[str]) -> list[tuple[str, str]]:
    """The members to compare."""
    if not asked:
        same = [(name, name) for name in a.members if name in b.members]
        return same or ([(a.members[0], b.members[0])] if len(a.members) == len(b.members) == 1 else [])
    chosen = []
    for text in asked:
        name_a, _, name_b = text.partition("=")
        for name, cache in ((name_a, a), (name_b or name_a, b)):
            if name not in cache.members:
                raise ConfigError(f"{cache.reader.path}: no member {name!r}", tip=nearest(name, cache.members))
        chosen.append((name_a, name_b or name_a))
    return chosen


def unlike(a: Cache, b: Cache, name_a: str, name_b: str) -> str | None:
    """Why two members cannot be compared; None where they can."""
    one, other = a.member(name_a), b.member(name_b)
    if one.output is None or other.output is None:
        return "one of them gave features alone"
    kinds = [info.output in CLASS_OUTPUTS for info in (one, other)]
    if kinds[0] != kinds[1] or (not kinds[0] and one.output != other.output):
        return f"one gave {one.output}, the other {other.output}"
    if kinds[0] and sorted(a.class_names) != sorted(b.class_names):
        return "they have other classes"
    if kinds[0] and a.multi_label != b.multi_label:
        return "one has several labels a sample"
    for info, cache in ((one, a), (other, b)):
        codec = cache.codecs.get(info.name)
        if codec is not None and not codec.complete:
            return f"codec {codec.name!r} of {info.name} keeps some classes only"
    if not kinds[0] and (one.width, one.value_names) != (other.width, other.value_names):
        return f"one gave {one.width} numbers, the other {other.width}, or others"
    if (one.index is None) != (other.index is None):
        return "one answers for each sample, the other for each position of one"
    return None


class _Farthest:
    """The records that differ most."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int, int]] = []  # how far, row of a, view

    def add(self, far: Tensor, rows: np.ndarray, view: int) -> None:
        top = far.topk(min(SHOWN, len(far)))
        new = [(float(v), int(rows[i]), view) for v, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        self.found = sorted([*self.found, *new], reverse=True)[:SHOWN]


def compare(
    a: Cache,
    b: Cache,
    names: tuple[str, str],
    rows: tuple[np.ndarray, np.ndarray],
    views: Sequence[tuple[int, int]],
    temperatures: Sequence[float],
    meter: Meter,
) -> MemberDifference | str:
    """How far apart two members are that give the same kind of thing; or why they cannot be compared after all."""
    classes = a.member(names[0]).output not in OTHER_OUTPUTS
    place = {name: number for number, name in enumerate(b.class_names)}
    order = [place[name] for name in a.class_names] if classes else []
    width = a.num_classes if classes else a.member(names[0]).width or 1
    statistics = a.manifest.statistics[names[0]]
    answers = max(1, statistics.records // max(1, len(a) * a.num_views))  # a sample, on the average
    batch = max(1, BATCH_NUMBERS // (max(1, width) * answers))
    sums: dict[str, float] = {}
    count, farthest = 0, _Farthest()
    for places in views:
        for start in range(0, len(rows[0]), batch):
            own = [one[start : start + batch] for one in rows]
            sides, at, listed = [], own[0], []
            for cache, name, chosen, view in zip((a, b), names, own, places, strict=True):
                targets = cache.gather(chosen, np.full(len(chosen), view), members=(name,))
                index = cache.member(name).index
                if index is not None:
                    found = targets.positions[index]
                    listed.append((found.counts, found.numbers))
                    at, targets = np.repeat(own[0], found.counts), targets.per_position(index)
                sides.append((targets.logits(name) if classes else targets.output(name)).double())
            if listed and not all(np.array_equal(x, y) for x, y in zip(*listed, strict=True)):
                return "they answer about other positions of the same samples"
            x, y = sides[0], sides[1][:, order] if classes else sides[1]
            measured, far = _of_classes(x, y, temperatures, a.multi_label) if classes else _of_numbers(x, y)
            for key, value in measured.items():
                sums[key] = sums.get(key, 0.0) + value
            count += len(x)
            farthest.add(far, at, places[0])
            meter.add(len(own[0]))
    means = {key: value / max(1, count) for key, value in sums.items()}
    most = [(a.samples.key(row), view, far) for far, row, view in farthest.found]
    if not classes:
        return MemberDifference(*names, count, cosine=means.get("cosine"), relative=means.get("relative"), most=most)
    kl = {key.removeprefix("kl "): value for key, value in means.items() if key.startswith("kl ")}
    return MemberDifference(*names, count, means.get("agreement"), kl, most=most)


def _of_classes(x: Tensor, y: Tensor, temperatures: Sequence[float], several: bool) -> tuple[dict[str, float], Tensor]:
    """Sums over (B, C) logits, and (B,) KL at T=1."""
    same = ((x > 0) == (y > 0)).double().mean(dim=1) if several else (x.argmax(dim=1) == y.argmax(dim=1)).double()
    sums = {"agreement": float(same.sum())}
    for temperature in temperatures:
        sums[f"kl {temperature:g}"] = float(_kl(x / temperature, y / temperature, several).sum())
    return sums, _kl(x, y, several)


def _kl(x: Tensor, y: Tensor, several: bool) -> Tensor:
    """(B,) KL in nats of softmax, or the sum of the binary ones of sigmoid."""
    if several:
        p = torch.sigmoid(x)
        yes = torch.nn.functional.logsigmoid(x) - torch.nn.functional.logsigmoid(y)
        no = torch.nn.functional.logsigmoid(-x) - torch.nn.functional.logsigmoid(-y)
        return (p * yes + (1 - p) * no).sum(dim=1)
    log_p, log_q = x.log_softmax(dim=1), y.log_softmax(dim=1)
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    return terms.sum(dim=1)


def _of_numbers(x: Tensor, y: Tensor) -> tuple[dict[str, float], Tensor]:
    """Sums over (B, D) vectors, and (B,) |x - y| / |x|."""
    size, far = x.norm(dim=1), (x - y).norm(dim=1)
    relative = torch.where(size > 0, far / size.clamp(min=1e-300), (far > 0).double())  # of zeros: all or nothing
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
    return {"relative": float(relative.sum()), "cosine": float(cosine.sum())}, relative


# ------------------------------------------------------------------------------------------------------------- the manifests


def fields_of(a: Cache, b: Cache) -> Iterator[tuple[str, Any, Any]]:
    """What the manifests say differently, field by field."""
    plans = [cache.manifest.plan for cache in (a, b)]
    # both as version 2 says it, so that a field which version 1 leaves out is no difference
    told: list[dict[str, Any]] = [replace(plan, format=PROVISIONAL_FORMAT).to_json() for plan in plans]
    for name in told[0] | told[1]:
        if name not in LEFT_OUT:
            yield from _differing(name, told[0].get(name), told[1].get(name))
    yield from _differing("format", plans[0].format, plans[1].format)
    yield from _differing("class_names", *(_shortened(plan.class_names) for plan in plans))
    members = [{one["name"]: one for one in side["members"]} for side in told]
    for name in members[0] | members[1]:
        yield from _differing(f"members.{name}", members[0].get(name), members[1].get(name))
    made = [side["rounds"][-1]["made_with"] for side in told]
    yield from _differing("made_with", *made)


def _shortened(names: Sequence[str]) -> list[str] | str:
    return list(names) if len(names) <= 20 else f"{len(names)} classes: {', '.join(names[:3])}, ..."


def _differing(where: str, x: Any, y: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(x, dict) and isinstance(y, dict):
        for name in x | y:
            yield from _differing(f"{where}.{name}", x.get(name), y.get(name))
    elif x != y:
        yield where, _there(x), _there(y)


def _there(value: Any) -> Any:
    return "there" if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------------------------ in words


def text(a: Path | str, b: Path | str, found: Difference) -> str:
    """The readable account."""
    if found.ids[0] == found.ids[1]:
        return f"{a} and {b} are the same cache, id {found.ids[0]}"
    both, only_a, only_b = found.samples
    lines = [f"a = {a}, id {found.ids[0][:16]}", f"b = {b}, id {found.ids[1][:16]}", ""]
    shown = [[where, _short(x), _short(y)] for where, x, y in found.fields]
    lines += [
        table(["what differs", "a", "b"], shown) if shown else "the manifests say the same but for their files",
        "",
    ]
    lines.append(f"samples: {both:,} in both, {only_a:,} only in a, {only_b:,} only in b")
    if found.relabelled or found.changed:
        lines.append(f"of those in both {found.relabelled:,} have another label, {found.changed:,} another content")
    for one in found.members:
        lines += ["", *_member_lines(one, found.views)]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)


def _member_lines(one: MemberDifference, views: int) -> Iterator[str]:
    name = one.a if one.a == one.b else f"{one.a} (a) and {one.b} (b)"
    over = f"{one.records:,} records" + (f" of {views} views" if views > 1 else "")
    if one.agreement is not None:
        kl = ", ".join(f"{value:.3g} nats at T={temperature}" for temperature, value in one.kl.items())
        yield f"{name}: the same decision in {percent(one.agreement)} of {over}; mean KL(a || b) {kl}"
        unit = "KL"
    else:
        yield f"{name}: mean cosine {one.cosine:.4f}, mean relative difference {one.relative:.3g} over {over}"
        unit = "relative difference"
    if one.most and one.most[0][2] > 0:
        rows = [[sample, view, f"{far:.4g}"] for sample, view, far in one.most]
        yield table(["differs most", "view", unit], rows)


def _short(value: Any) -> str:
    told = "-" if value is None else value if isinstance(value, str) else str(value)
    return told if len(told) <= 48 else told[:45] + "..."

"""softcache inspect: what made this cache, from what, how big, and what one sample's soft target looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.schema import PROVENANCE
from softcache.data.identity import sample_id
from softcache.errors import ConfigError, MissingSampleError, nearest
from softcache.report import bar, percent, size, table
from softcache.targets import Cache
from softcache.targets import open as open_cache

TEMPERATURES = (1.0, 2.0, 4.0, 20.0)
SHOWN_CLASSES = 8


def describe(path: Path) -> dict[str, Any]:
    """Everything the manifest says, for machines."""
    manifest = open_cache(path).manifest
    return {
        "id": manifest.id,
        "bytes": manifest.nbytes,
        "files": len(manifest.files),
        **manifest.plan.to_json(),
        "statistics": {
            name: {"accuracy": s.accuracy, "entropy": s.entropy, "max_eps": s.max_eps, "records": s.records}
            for name, s in manifest.statistics.items()
        },
    }


def report(path: Path) -> str:
    """The same for people."""
    cache = open_cache(path)
    plan, manifest = cache.manifest.plan, cache.manifest
    names = list(cache.class_names)
    per_view = sum(s.nbytes for m in cache.members for f in manifest.files_of("logits", m) for s in f.arrays.values())
    facts = [
        ("id", manifest.id),
        ("transfer set", f"{plan.samples.source}, {plan.samples.count:,} samples"),
        ("classes", f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"),
        ("views", f"{plan.views.count} of {cache.policy}, root seed {plan.views.root_seed}"),
        ("size", f"{size(manifest.nbytes)} in {len(manifest.files)} files"),
        (
            "per record",
            f"{per_view / max(1, plan.samples.count * plan.views.count * len(cache.members)):.1f} B a member",
        ),
        ("rows", f"{plan.samples.order} order, {plan.layout.shard_rows:,} rows a shard"),
        ("made with", ", ".join(f"{k} {v}" for k, v in plan.made_with.items())),
    ]
    provenance = Path(path) / PROVENANCE
    if provenance.is_file():
        made = json.loads(provenance.read_text())
        facts.append(("made", f"{made['finished']} on {made['host']}, {made['seconds']:.1f} s"))
    members = []
    for member in plan.members:
        s = manifest.statistics[member.name]
        members.append(
            [
                member.name,
                member.model,
                member.output,
                member.codec["name"],
                f"{s.max_eps:.3g}",
                percent(s.accuracy),
                f"{s.entropy:.4f}",
                member.fingerprint[:12],
            ]
        )
    header = ["member", "model", "output", "codec", "max eps", "top-1", "entropy (nats)", "weights"]
    width = max(len(name) for name, _ in facts)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in facts), "", table(header, members)])


def sample_report(path: Path, key: str, *, view: int = 0, combine: str = "mean_probs") -> str:
    """One sample's soft target at several temperatures, as bars; one block per member, then the ensemble's."""
    cache = open_cache(path)
    if not 0 <= view < cache.num_views:
        raise ConfigError(f"--view {view}: the cache has views 0 to {cache.num_views - 1}")
    row = _row_of(cache, key)
    rows, views = np.array([row]), np.array([view])
    targets = cache.gather(rows, views)
    samples = cache.samples
    label = samples.labels_of(rows)[0]
    truth = [int(i) for i in np.flatnonzero(label)] if samples.multi_label else [int(label)] * (int(label) >= 0)
    named = ", ".join(cache.class_names[i] for i in truth) or "none"
    lines = [f"{samples.key(row)}: row {row}, view {view}, id {int(samples.ids[row]):016x}, label {named}"]
    blocks = {member: [targets.logits(member)] * len(TEMPERATURES) for member in cache.members}
    if len(cache.members) > 1:
        blocks[f"ensemble ({combine})"] = [targets.combined(combine, temperature=t) for t in TEMPERATURES]
    for title, logits in blocks.items():
        shown = zip(TEMPERATURES, logits, strict=True)
        tables = {t: (z[0].double() / t).softmax(dim=0).numpy() for t, z in shown}
        order = np.argsort(-tables[1.0], kind="stable")[:SHOWN_CLASSES]
        width = max(len(cache.class_names[i]) for i in order)
        lines += ["", title, " " * (width + 4) + "".join(f"{f'T={t:g}':<22}" for t in TEMPERATURES)]
        for i in order:
            mark = "*" if int(i) in truth else " "
            cells = [f"{100 * tables[t][i]:6.2f} % {bar(float(tables[t][i]), 12):<12}" for t in TEMPERATURES]
            lines.append(f"{mark} {cache.class_names[i]:<{width}}  " + " ".join(cells).rstrip())
        if len(cache.class_names) > SHOWN_CLASSES:
            lines.append(f"  ... {len(cache.class_names) - SHOWN_CLASSES} more classes")
    return "\n".join(lines)


def _row_of(cache: Cache, key: str) -> int:
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

"""A small dump, torch-free and deterministic: two parts, and an extension by one view; of version 2 by a member and its index."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from faults.report import demand
from golden import indexed
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.samples import build_table
from softcache.cache.schema import ArraySpec, Layout, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Part, Setup

ROWS, CLASSES = 600, ("ant", "bee", "cat", "dog")
FIRST = Layout(num_rows=ROWS, num_views=2, shard_rows=512, shard_views=2)
SECOND = Layout(num_rows=ROWS, num_views=1, shard_rows=512, shard_views=1, first_view=2, first_part=len(FIRST))


FORMAT = {"version": 1}  # which of the two; see `use`


def use(version: int) -> None:
    """Dump caches of this version from here on."""
    FORMAT["version"] = version


def logits_at(rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(n, C) float32: no two records are alike."""
    return ((rows * 8 + views)[:, None] * 4 + np.arange(len(CLASSES))).astype("<f4")


def codes_at(rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(n, 4) uint8."""
    return ((rows * 7 + views * 13)[:, None] + np.arange(4)).astype(np.uint8)


def _plan(rounds: int) -> Plan:
    fields = [("level", 0, "<f4", []), ("dense", 4, "<u4", []), ("codes", 8, "|u1", [4])]
    lowrank = {"max_kl": "0.0001", "at_temperature": "4.0"}
    made_with: dict[str, Any] = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    made_with |= {"device": "cpu", "batch_size": 128, "threads": 1, "autocast": "none"}

    def member(name: str, codec: str, parameters: Mapping[str, str], fields: Sequence[Any]) -> MemberInfo:
        listed = [dict(zip(("name", "offset", "dtype", "shape"), one, strict=True)) for one in fields]
        about = {"name": codec, "parameters": dict(parameters), "fields": listed}
        return MemberInfo(name, "toy", "0" * 64, "logits", "float32", class_order=None, codec=about)

    layouts = (FIRST, SECOND)[:rounds]
    return Plan(
        samples=SampleInfo("toy", ROWS, "", "item", True, False, "natural", "0"),
        class_names=CLASSES,
        views=ViewInfo(
            count=sum(layout.num_views for layout in layouts),
            first=0,
            root_seed="0",
            replay="derived",
            steps=({"name": "shift", "version": 1, "parameters": {"pixels": "1"}},),
        ),
        members=(member("plain", "float32", {}, []), member("compact", "lowrank", lowrank, fields)),
        rounds=tuple(Round(layout, ("plain", "compact"), True, made_with) for layout in layouts),
    )


def _setup() -> Setup:
    keys = [f"toy/{i:04d}" for i in range(ROWS)]
    ids = np.array([int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") for k in keys], "<u8")
    digests = np.arange(ROWS * 16).reshape(ROWS, 16).astype(np.uint8)
    samples = build_table(
        keys, ids, np.arange(ROWS) % len(CLASSES), digests, len(CLASSES), np.arange(ROWS), store_keys=True
    )
    probe = {
        "rows": np.array([3, 599], "<u8"),
        "views": np.array([0, 1], "<u4"),
        "shapes": np.array([[2, 2, 1], [2, 2, 1]], "<u4"),
        "pixels": np.arange(8, dtype=np.uint8),
    }
    return Setup(samples, probe, {"compact": {"codec_basis": np.eye(4, dtype="<f4")}})


def _write_spans(writer: CacheWriter, pause_s: float) -> None:
    for span in writer.my_spans():
        place = (span.views, span.rows)
        specs = {
            "plain": [ArraySpec("logits", "<f4", (*place, 4)), ArraySpec("eps", "<f2", place)],
            "compact": [ArraySpec("records", "|u1", (*place, 12))],
        }
        with writer.span(span, specs) as out:
            for rows, views in _batches(span):
                time.sleep(pause_s)
                number = np.zeros(len(rows), "<u4")
                dense = np.flatnonzero(rows % 97 == 0)
                if len(dense):
                    number[dense] = out.append_dense(
                        "compact", logits_at(rows, views)[dense].astype("<f2")
                    ) + np.arange(len(dense))
                records = np.zeros((len(rows), 12), np.uint8)
                records[:, 4:8], records[:, 8:] = number.view(np.uint8).reshape(-1, 4), codes_at(rows, views)
                about = MemberStatistics(records=len(rows), labelled=len(rows), correct=len(rows) // 2)
                out.append(None, {"pixel_digests": (rows * 3 + views).astype("<u4")})
                out.append("plain", {"logits": logits_at(rows, views), "eps": np.zeros(len(rows), "<f2")}, about)
                out.append("compact", {"records": records}, replace(about, dense=len(dense)))


def _batches(span: Span) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for view in range(span.view_start, span.view_stop):
        for start in range(span.row_start, span.row_stop, 128):
            rows = np.arange(start, min(start + 128, span.row_stop))
            yield rows, np.full(len(rows), view)


def write_part(path: Path, part: Part, *, extend: bool = False, pause_s: float = 0.0) -> Manifest | None:
    """One process's share of the dump, or of its extension."""
    if FORMAT["version"] == 2:
        return indexed.write_round(path, 1 + extend, part, at_row=lambda: time.sleep(pause_s))
    base = read_manifest(path) if extend else None
    if base is not None and len(base.plan.rounds) == 2:
        return base
    with CacheWriter(
        path, _plan(1 + extend), lambda: Setup(_setup().samples) if extend else _setup(), part=part, base=base
    ) as writer:
        _write_spans(writer, pause_s)
        return writer.commit(lambda manifest: f"# {manifest.id}\n", {"host": "any"})


def write_cache(path: Path) -> None:
    """The dump in two parts, then its extension; whatever is there already is not done again."""
    write_part(path, Part(1, 2))
    write_part(path, Part(2, 2))
    demand(write_part(path, Part(), extend=True) is not None, "the extension was not committed")

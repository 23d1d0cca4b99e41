"""A small cache of version 2 that has everything new in it, written from arrays; every number is a formula of its place.

Words with labels, cells of grids whose sizes differ from view to view, the same at a coarser stride and listed, lists of
candidates; members of classes, of values, of an embedding, and of features alone. Three rounds: a dump, a member over an index of
its own, and another view of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import FeatureInfo, IndexInfo, MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.positions import Positions, build_positions
from softcache.cache.samples import SampleTable, build_table
from softcache.cache.schema import ArraySpec, Layout, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Part, Setup

ROWS, CLASSES, CANDIDATES = 20, ("dog", "cat", "eel", "fox", "ant"), 7
KINDS = {"words": "words", "cells": "grid", "coarse": "grid", "list": "candidates"}
# member -> its index, and its data sets: dtype and shape of one record
MEMBERS: dict[str, tuple[str | None, dict[str, tuple[str, tuple[int, ...]]]]] = {
    "tagger": ("words", {"logits": ("<f2", (5,)), "eps": ("<f2", ())}),
    "segmenter": ("cells", {"records": ("|u1", (13,)), "eps": ("<f2", ())}),
    "ranker": ("list", {"logits": ("<f4", (1,)), "eps": ("<f2", ())}),
    "embedder": (None, {"logits": ("<f2", (6,)), "eps": ("<f2", ()), "feature0": ("<f2", (3,)), "feature0_error": ("<f2", ())}),
    "layers": (None, {"feature0": ("<f2", (2,)), "feature0_error": ("<f2", ())}),
    "strided": ("coarse", {"logits": ("<f4", (5,)), "eps": ("<f2", ())}),
}  # fmt: skip
FEATURES = {"embedder": "words", "layers": "cells"}  # whose features have an index
FIRST_MEMBERS = ("tagger", "segmenter", "ranker", "embedder", "layers")


def length_of(index: str, row: int, view: int) -> int:
    """How many positions there are."""
    if index == "words":
        return row * 5 % 8  # none, one, and more
    if index == "list":
        return row * 3 % 5
    height, width = shape_of(index, row, view)
    return height * width


def shape_of(index: str, row: int, view: int) -> tuple[int, int]:
    height, width = 1 + (row + view) % 3, (row * 2 + view) % 5
    return (height, width) if index == "cells" else (height, max(1, width))


def listed_of(index: str, row: int, view: int) -> list[int]:
    """The positions that have records: of the coarse grid every second one."""
    return list(range(0, length_of(index, row, view), 2 if index == "coarse" else 1))


def entries_of(row: int) -> list[int]:
    return [(row + i) % CANDIDATES for i in range(length_of("list", row, 0))]


def labels_of(row: int) -> list[int]:
    return [(row + i) % 6 - 1 for i in range(length_of("words", row, 0))]


def number_at(member: str, name: str, row: int, view: int, position: int) -> np.ndarray:
    """One record of a data set: other numbers at each place."""
    dtype, shape = MEMBERS[member][1][name]
    if name in ("eps", "feature0_error"):
        return np.zeros((), dtype)
    if name == "records":  # int8: lowest, step, codes
        head = np.array([-1.0 - row % 3, 0.5], "<f4").view(np.uint8)
        return np.concatenate([head, (row * 7 + view * 5 + position * 3 + np.arange(5)).astype(np.uint8)])
    start = row * 31 + view * 17 + position * 7 + len(member)
    return ((start + 3 * np.arange(np.prod(shape))) % 256 / 8).astype(dtype).reshape(shape)


def index_of(member: str, name: str) -> str | None:
    index, _ = MEMBERS[member]
    return FEATURES.get(member) if name.startswith("feature") else index


def positions_of(index: str, views: range) -> Positions:
    """An index in some views, as a round writes it."""
    places = [(row, view) for view in views for row in range(ROWS)]
    grid = (len(views), ROWS)
    counts = np.array([len(listed_of(index, *place)) for place in places]).reshape(grid)
    given: dict[str, Any] = {}
    if KINDS[index] == "grid":
        given["shapes"] = np.array([shape_of(index, *place) for place in places]).reshape(*grid, 2)
    if index == "coarse":
        given["listed"] = [one for place in places for one in listed_of(index, *place)]
    if index == "list":
        given["entries"] = [one for row, _ in places for one in entries_of(row)]
    if index == "words" and views[0] == 0:
        given["labels"] = [one for row, _ in places for one in labels_of(row)]
    lengths = np.array([length_of(index, *place) for place in places]).reshape(grid)
    return build_positions(lengths, counts=counts, **given)


def _member(name: str) -> MemberInfo:
    index, arrays = MEMBERS[name]
    fields: list[dict[str, Any]] = []
    if name == "segmenter":
        parts: Sequence[tuple[str, int, str, list[int]]]
        parts = [("lowest", 0, "<f4", []), ("step", 4, "<f4", []), ("codes", 8, "|u1", [5])]
        fields = [dict(zip(("name", "offset", "dtype", "shape"), one, strict=True)) for one in parts]
    codec = {"segmenter": "int8", "ranker": "float32", "strided": "float32"}.get(name, "float16")
    width = arrays["logits"][1][0] if "logits" in arrays else 5 * (name == "segmenter")
    about = None if name == "layers" else {"name": codec, "parameters": {}, "fields": fields}
    features = []
    if name in FEATURES:
        _, shape = arrays["feature0"]
        features = [FeatureInfo("trunk:map", "map", ["feature0"], "float16", [list(shape)], FEATURES[name])]
    output = {"ranker": "values", "embedder": "embedding", "layers": None}.get(name, "logits")
    names = ("score",) if name == "ranker" else ()
    told = {"prompt": "query: ", "pooling": "mean"} if name == "embedder" else {}
    return MemberInfo(name, "toy", "0" * 64, output, "float32", None, about, features, None, index, width, names, told)


def plan_of(rounds: int, shard_rows: int = 8) -> Plan:
    made_with: dict[str, Any] = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    made_with |= {"device": "cpu", "batch_size": 4, "batch_tokens": 64, "threads": 1, "autocast": "none"}
    first = Layout(ROWS, 2, shard_rows, 1)
    second = Layout(ROWS, 2, 2 * shard_rows, 2, first_part=len(first))
    third = Layout(ROWS, 1, shard_rows, 1, first_view=2, first_part=len(first) + len(second))
    indexes = ("words", "cells", "list")
    made = (
        Round(first, FIRST_MEMBERS, True, made_with, indexes),
        Round(second, ("strided",), False, made_with, ("coarse",)),
        Round(third, (*FIRST_MEMBERS, "strided"), True, made_with, (*indexes, "coarse")),
    )[:rounds]
    members, known = (
        made[-1].members if rounds != 2 else (*FIRST_MEMBERS, "strided"),
        ["words", "cells", "list", "coarse"],
    )
    steps = ({"name": "shift", "version": 1, "parameters": {"pixels": "1"}},)
    return Plan(
        samples=SampleInfo("toy", ROWS, "", "item", True, False, "natural", "0", has_masks=True),
        class_names=CLASSES,
        views=ViewInfo(3 if rounds == 3 else 2, 0, "0", "derived", steps, ("pixel_digests", "token_digests")),
        members=tuple(map(_member, members)),
        rounds=made,
        format=2,
        indexes=tuple(
            IndexInfo(name, KINDS[name], name == "coarse", name == "words") for name in known[: 3 if rounds == 1 else 4]
        ),
        rendering={"truncation": "none"},
    )


def _keys(what: str, count: int) -> tuple[list[str], np.ndarray]:
    keys = [f"{what}/{i:04d}" for i in range(count)]
    return keys, np.array(
        [int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") for k in keys], "<u8"
    )


def samples_of() -> SampleTable:
    keys, ids = _keys("toy", ROWS)
    digests = np.arange(ROWS * 16).reshape(ROWS, 16).astype(np.uint8)
    table = build_table(keys, ids, np.arange(ROWS) % 5, digests, len(CLASSES), np.arange(ROWS), store_keys=True)
    return replace(table, mask_digests=digests[::-1].copy())


def setup_of(rounds: int) -> Setup:
    """What the last of so many rounds writes before its first row."""
    one = plan_of(rounds).rounds[-1]
    views = range(one.layout.first_view, one.layout.first_view + one.layout.num_views)
    positions = {name: positions_of(name, views) for name in one.indexes}
    if rounds > 1:
        return Setup(samples_of(), positions=positions)
    keys, ids = _keys("document", CANDIDATES)
    joined = "".join(keys).encode()
    candidates = {
        "ids": ids,
        "digests": np.arange(CANDIDATES * 16).reshape(-1, 16).astype(np.uint8),
        "key_bytes": np.frombuffer(joined, np.uint8),
        "key_offsets": np.cumsum([0, *map(len, keys)]).astype("<u8"),
    }
    return Setup(samples_of(), positions=positions, candidates=candidates)


def records_of(member: str, name: str, rows: Sequence[int], view: int) -> np.ndarray:
    """All records of some rows in one view, row by row, position by position."""
    index = index_of(member, name)
    places = [
        (row, i) for row in rows for i in (range(1) if index is None else range(len(listed_of(index, row, view))))
    ]
    dtype, shape = MEMBERS[member][1][name]
    made = [number_at(member, name, row, view, i) for row, i in places]
    return np.stack(made) if made else np.zeros((0, *shape), dtype)


def specs_of(writer: CacheWriter, member: str, span: Span) -> list[ArraySpec]:
    """The data sets of a part."""
    specs = []
    for name, (dtype, shape) in MEMBERS[member][1].items():
        index = index_of(member, name)
        place = (span.views, span.rows) if index is None else (writer.index(index).in_part(span),)
        specs.append(ArraySpec(name, dtype, (*place, *shape)))
    return specs


def write_round(
    path: Path, rounds: int, part: Part | None = None, *, shard_rows: int = 8, at_row: Callable[[], None] = lambda: None
) -> Manifest | None:
    """One process's share of the last of so many rounds."""
    base = read_manifest(path) if rounds > 1 else None
    if base is not None and len(base.plan.rounds) >= rounds:
        return base
    with CacheWriter(path, plan_of(rounds, shard_rows), lambda: setup_of(rounds), part=part, base=base) as writer:
        one = writer.plan.rounds[-1]
        for span in writer.my_spans():
            with writer.span(span, {member: specs_of(writer, member, span) for member in one.members}) as out:
                for view in range(span.view_start, span.view_stop):
                    for start in range(span.row_start, span.row_stop, 4):
                        at_row()
                        rows = range(start, min(start + 4, span.row_stop))
                        if one.new_views:
                            digests = np.array([row * 3 + view for row in rows], "<u4")
                            out.append(None, {"pixel_digests": digests, "token_digests": digests + 1})
                        for member in one.members:
                            _append(out, member, rows, view)
        return writer.commit(lambda manifest: f"# {manifest.id}\n", {"host": "any"})


def _append(out: Any, member: str, rows: Sequence[int], view: int) -> None:
    arrays: Mapping[str, np.ndarray] = {name: records_of(member, name, rows, view) for name in MEMBERS[member][1]}
    index, _ = MEMBERS[member]
    count = len(rows) if index is None else sum(len(listed_of(index, row, view)) for row in rows)
    out.append(member, arrays, MemberStatistics(records=count))


def make_indexed(path: Path, *, parts: int = 1, rounds: int = 3, shard_rows: int = 8) -> Manifest:
    """The whole cache, each round shared by so many processes, one after the other."""
    for number in range(1, rounds + 1):
        for index in range(1, parts + 1):
            made = write_round(path, number, Part(index, parts), shard_rows=shard_rows)
    assert made is not None
    return made

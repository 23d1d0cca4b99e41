"""A cache of what live taggers say of words, written from arrays; what they say is asked in float64; and the sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import WORLDS
from torch import Tensor

from softcache.cache.plan import IndexInfo, MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.positions import build_positions
from softcache.cache.samples import build_table
from softcache.cache.schema import ArraySpec, Layout
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Setup
from softcache.config import TrainConfig
from softcache.data.identity import pixel_digest, sample_ids
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.spec import load_user_file

WORLD = WORLDS / "words.py"
STUDENT = f"{WORLD}:tagger?seed=7&double=true"
COUNT, BATCH = 40, 8
NAMES = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
SEEDS = {"a": 1, "b": 2, "c": 3}


def sentences(path: Path, *, count: int = 40, seed: int = 0, unlabelled: float = 0.15, longest: int = 9) -> str:
    """JSON lines of made-up words with tags, some of them null; the fifth sentence and the last one have no words. The spec."""
    draw, lines = np.random.default_rng(seed), []
    for number in range(count):
        length = 0 if number in (4, count - 1) else int(draw.integers(1, longest + 1))
        words = ["".join(draw.choice(list("abcdefgh"), int(draw.integers(1, 6)))) for _ in range(length)]
        tags = [None if draw.random() < unlabelled else NAMES[sum(map(ord, word)) % len(NAMES)] for word in words]
        lines.append(f'{{"words": {list_of(words)}, "tags": {list_of(tags)}}}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"table:{path}?words=words&tags=tags&classes={','.join(NAMES)}"


def list_of(values: Sequence[str | None]) -> str:
    return "[" + ", ".join("null" if value is None else f'"{value}"' for value in values) + "]"


def live_teacher(member: str, items: Sequence[Sequence[str]]) -> list[Tensor]:
    """(n, C) float64 logits of each sentence, asked one by one."""
    network = load_user_file(WORLD).tagger(len(NAMES), SEEDS[member], scale=8.0, double=True)
    with torch.no_grad():
        return [network([words]) if len(words) else torch.empty(0, len(NAMES), dtype=torch.float64) for words in items]


def listed_words(length: int, every: int) -> list[int]:
    """Which words of a sentence have a record."""
    return list(range(0, length, every))


def write_cache(
    path: Path,
    spec: str,
    members: Sequence[str] = ("a",),
    *,
    every: int = 1,
    labels: bool = True,
    other: Mapping[str, Any] | None = None,
    part_rows: int = 256,
) -> str:
    """A cache over the index `words`, its rows in the order of the samples; float32.

    Args:
        every: each so-manieth word has a record.
        other: member -> (N, C) logits, one answer for each sample.
        part_rows: rows of a part.
    """
    data, other = open_transfer_set(spec), other or {}
    assert data.positions is not None
    items, count = [data[i][0] for i in range(len(data))], len(data)
    listed = [listed_words(len(words), every) for words in items]
    own = [label for i, at in enumerate(listed) for label in data.positions.of(i)[at].tolist()]
    given: dict[str, Any] = {"counts": np.array([len(at) for at in listed])}
    given |= {"listed": [place for at in listed for place in at]} if every > 1 else {}
    given |= {"labels": own} if labels else {}
    index = build_positions(np.array([len(words) for words in items]), **given)
    records = {
        name: np.concatenate([z[at].numpy() for z, at in zip(live_teacher(name, items), listed, strict=True)]).astype(
            "<f4"
        )
        for name in members
    }
    plan = _plan(data, [*members, *other], set(members), every > 1, labels, part_rows)
    digests = np.frombuffer(b"".join(data.load(i)[1] for i in range(count)), np.uint8).reshape(-1, 16)
    table = build_table(
        list(data.keys),
        sample_ids(data.keys),
        np.full(count, -1, np.int32),
        digests,
        len(NAMES),
        np.arange(count),
        store_keys=True,
    )
    with CacheWriter(path, plan, lambda: Setup(table, positions={"words": index})) as writer:
        for span in writer.my_spans():
            specs = {}
            for name in (*members, *other):
                place = (writer.index("words").in_part(span),) if name in members else (span.views, span.rows)
                specs[name] = [ArraySpec("logits", "<f4", (*place, len(NAMES))), ArraySpec("eps", "<f2", place)]
            with writer.span(span, specs) as out:
                rows = slice(span.row_start, span.row_stop)
                words = slice(int(index.offsets[0, rows.start]), int(index.offsets[0, rows.stop]))
                seen = np.array([pixel_digest(item) for item in items[rows]], "<u4")
                out.append(None, {"pixel_digests": seen})
                for name in (*members, *other):
                    values = records[name][words] if name in members else np.asarray(other[name], "<f4")[rows]
                    arrays = {"logits": values, "eps": np.zeros(len(values), "<f2")}
                    out.append(name, arrays, MemberStatistics(records=len(values)))
        writer.commit(lambda manifest: f"# {manifest.id}\n", {"host": "any"})
    return str(path)


def _plan(
    data: TransferSet, members: Sequence[str], of_words: set[str], listed: bool, labels: bool, part_rows: int
) -> Plan:
    made_with: dict[str, Any] = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    made_with |= {"device": "cpu", "batch_size": 4, "batch_tokens": None, "threads": 1, "autocast": "none"}
    codec = {"name": "float32", "parameters": {}, "fields": []}
    infos = [
        MemberInfo(
            name,
            "toy",
            "0" * 64,
            "logits",
            "float32",
            None,
            codec,
            (),
            None,
            "words" if name in of_words else None,
            len(NAMES),
        )
        for name in members
    ]
    layout = Layout(len(data), 1, part_rows, 1)
    return Plan(
        samples=SampleInfo(data.name, len(data), "", "item", True, False, "natural", "0"),
        class_names=NAMES,
        views=ViewInfo(1, 0, "0", "derived", (), ("pixel_digests",)),
        members=tuple(infos),
        rounds=(Round(layout, tuple(members), True, made_with, ("words",)),),
        format=2,
        indexes=(IndexInfo("words", "words", listed, labels),),
    )


@dataclass(frozen=True)
class World:
    """The sentences, and caches of what taggers say of them: of every word, of every second one, of several members."""

    path: Path
    data: str
    caches: dict[str, str]

    def config(self, out: Path, *losses: str, cache: str | None = "one", **settings: Any) -> TrainConfig:
        """By default an epoch of five steps of SGD in float64."""
        given: dict[str, Any] = {
            "data": self.data, "student": STUDENT, "epochs": 1, "batch_size": BATCH, "optimizer": "sgd", "lr": 0.05,
            "momentum": 0.9, "schedule": "constant", "threads": 1, "workers": 0, "device": "cpu",
        }  # fmt: skip
        if cache is not None:
            given |= {"cache": self.caches[cache], "check_content": "none"}
        return TrainConfig(out=str(out), loss=losses, **{**given, **settings})


def made_world(path: Path) -> World:
    data = sentences(path / "s.jsonl", count=COUNT)
    whole = np.random.default_rng(5).normal(size=(COUNT, len(NAMES)))
    caches = {
        "one": write_cache(path / "one", data),
        "second": write_cache(path / "second", data, every=2),
        "three": write_cache(path / "three", data, tuple(SEEDS)),
        "with a whole one": write_cache(path / "mixed", data, other={"whole": whole}),
    }
    return World(path, data, caches)

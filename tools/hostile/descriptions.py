"""Descriptions that do not describe one cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hostile.forge import Forge, assign, case, dumps
from hostile.honest import PLAIN, ROWS, SAMPLES

LAYOUT = ("rounds", 0, "layout")
SECOND_ROUND = {"num_rows": ROWS, "num_views": 2, "shard_rows": 256, "shard_views": 2, "first_view": 1, "first_part": 2}


def _second_round(**layout: int) -> Callable[[Any], None]:
    def change(entry: Any) -> None:
        entry["rounds"].append({**entry["rounds"][0], "layout": {**SECOND_ROUND, **layout}})

    return change


DESCRIPTIONS: dict[str, Callable[[Any], Any]] = {
    "2^50 rows": assign(*LAYOUT, "num_rows", to=2**50),
    "2^50 rows, and as many samples": lambda e: (
        assign(*LAYOUT, "num_rows", to=2**50)(e),
        assign("samples", "count", to=2**50)(e),
    ),
    "2^52 rows and views": lambda e: (
        e["rounds"][0]["layout"].update(num_rows=2**52, num_views=2**52, shard_views=1),
        assign("samples", "count", to=2**52)(e),
        assign("views", "count", to=2**52)(e),
    ),
    "no rows": assign(*LAYOUT, "num_rows", to=0),
    "no samples at all": lambda e: (assign(*LAYOUT, "num_rows", to=0)(e), assign("samples", "count", to=0)(e)),
    "one row less": lambda e: (assign(*LAYOUT, "num_rows", to=ROWS - 1)(e), assign("samples", "count", to=ROWS - 1)(e)),
    "one row more": lambda e: (assign(*LAYOUT, "num_rows", to=ROWS + 1)(e), assign("samples", "count", to=ROWS + 1)(e)),
    "shard_rows 0": assign(*LAYOUT, "shard_rows", to=0),
    "shard_rows negative": assign(*LAYOUT, "shard_rows", to=-256),
    "shard_rows 1": assign(*LAYOUT, "shard_rows", to=1),
    "shard_rows 2^52": assign(*LAYOUT, "shard_rows", to=2**52),
    "shard_rows 512": assign(*LAYOUT, "shard_rows", to=512),
    "shard_views 0": assign(*LAYOUT, "shard_views", to=0),
    "shard_views 1": assign(*LAYOUT, "shard_views", to=1),
    "no views": assign(*LAYOUT, "num_views", to=0),
    "views.count 3": assign("views", "count", to=3),
    "views.count 1": assign("views", "count", to=1),
    "views.count 0": assign("views", "count", to=0),
    "first view 1": assign(*LAYOUT, "first_view", to=1),
    "first view 2^52": assign(*LAYOUT, "first_view", to=2**52),
    "first part 1": assign(*LAYOUT, "first_part", to=1),
    "rounds overlap": _second_round(first_view=1),
    "rounds leave a gap": _second_round(first_view=3),
    "a round of views that are there": _second_round(first_view=0),
    "a round without files": _second_round(first_view=2),
    "a round whose parts are another's": _second_round(first_view=2, first_part=0),
    "no rounds": assign("rounds", to=[]),
    "no members": assign("members", to=[]),
    "no files": assign("files", to=[]),
    "no classes": assign("class_names", to=[]),
    "a class less": lambda e: e["class_names"].pop(),
    "a class more": lambda e: e["class_names"].append("gnu"),
    "a member that no round wrote": assign("rounds", 0, "members", to=["coded", "plain"]),
    "a round of no member": assign("rounds", 0, "members", to=[]),
    "a round of an unknown member": assign("rounds", 0, "members", to=["coded", "plain", "head", "more"]),
    "members of a round in another order": assign("rounds", 0, "members", to=["plain", "coded", "head"]),
    "no new views": assign("rounds", 0, "new_views", to=False),
    "another kind of file": lambda e: e["files"][0].update(kind="member"),
    "an unknown kind of file": lambda e: e["files"][0].update(kind="script"),
    "a file of another member": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(member="coded"),
    "rows of another part": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(rows=[0, 44]),
    "rows backwards": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(rows=[256, 0]),
    "views of another part": lambda e: next(f for f in e["files"] if f["path"] == PLAIN).update(views=[0, 1]),
    "files in another order": lambda e: e["files"].reverse(),
    "a file less": lambda e: e["files"].pop(),
    "no samples": lambda e: e["files"].pop(0),
    "a member's part less": lambda e: e["files"].remove(next(f for f in e["files"] if f["path"] == PLAIN)),
    "a size of 0": lambda e: e["files"][0].update(bytes=0),
    "a size of one less": lambda e: e["files"][0].update(bytes=e["files"][0]["bytes"] - 1),
    "a size of 2^52": lambda e: e["files"][0].update(bytes=2**52),
    "statistics of samples": lambda e: e["files"][0].update(statistics=e["files"][-1]["statistics"]),
    "statistics of more records": lambda e: e["files"][-1]["statistics"].update(records=10**9),
    "more right than there are": lambda e: e["files"][-1]["statistics"].update(correct=1),
    "class_order no permutation": assign("members", 2, "class_order", to=[0, 0, 1, 2, 3, 4]),
    "class_order of 2^52": assign("members", 2, "class_order", to=[0, 1, 2, 3, 4, 2**52]),
    "an unknown codec": assign("members", 0, "codec", "name", to="zip"),
    "an unknown parameter of a codec": assign(
        "members", 2, "codec", "parameters", to={"k": "2", "bits": "8", "eval": "1"}
    ),
    "a parameter of a codec missing": assign("members", 2, "codec", "parameters", to={"k": "2"}),
    "k of -1": assign("members", 2, "codec", "parameters", to={"k": "-1", "bits": "8"}),
    "k of 2^70": assign("members", 2, "codec", "parameters", to={"k": str(2**70), "bits": "8"}),
    "bits of 64": assign("members", 2, "codec", "parameters", to={"k": "2", "bits": "64"}),
    "a codec of another layout": assign("members", 2, "codec", "name", to="int8"),
    "a codec without records": assign("members", 2, "codec", to={"name": "float32", "parameters": {}, "fields": []}),
    "float32 for float16": assign("members", 1, "codec", "name", to="float32"),
    "a field past the record": assign("members", 0, "codec", "fields", 2, "offset", to=2**40),
    "a field over another": assign("members", 0, "codec", "fields", 2, "offset", to=0),
    "a field of 2^52 numbers": assign("members", 0, "codec", "fields", 2, "shape", to=[2**52]),
    "a field of objects": assign("members", 0, "codec", "fields", 2, "dtype", to="|O"),
    "a feature of another shape": assign("members", 1, "features", 0, "shapes", to=[[5, 2, 2]]),
    "a feature of 2^52 numbers": assign("members", 1, "features", 0, "shapes", to=[[2**52, 2**52, 2**52]]),
    "a feature without shapes": assign("members", 1, "features", 0, "shapes", to=[]),
    "a feature of an unknown reduction": assign("members", 1, "features", 0, "name", to="trunk:eval"),
    "a feature stored in an unknown form": assign("members", 1, "features", 0, "stored", to="pickle"),
    "a feature of an unknown dtype": assign("members", 1, "features", 0, "dtype", to="object"),
    "a feature as int8": assign("members", 1, "features", 0, "dtype", to="int8"),
    "a feature that is the logits": assign("members", 1, "features", 0, "arrays", to=["logits"]),
    "a feature that is checksums": assign("members", 1, "features", 0, "arrays", to=["feature0_crc32"]),
    "a feature that is not there": assign("members", 1, "features", 0, "arrays", to=["feature1"]),
    "a feature of no data set": assign("members", 1, "features", 0, "arrays", to=[]),
    "an unknown output": assign("members", 0, "output", to="votes"),
    "an unknown order": assign("samples", "order", to="random"),
    "an unknown kind of digest": assign("samples", "digest_kind", to="crc"),
    "an unknown kind of replay": assign("views", "replay", to="exec"),
    "multi_label": assign("samples", "multi_label", to=True),
    "without keys": assign("samples", "has_keys", to=False),
    "statistics of an unknown member's parent": assign("parent", to={"id": "0" * 64, "statistics": {"more": {}}}),
    "a parent without a hash": assign("parent", to={"id": "../x", "statistics": {}}),
}


@case("description/does not hold together")
def does_not_hold_together(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for what, change in DESCRIPTIONS.items():
        entry = json.loads(dumps(forge.entry))
        change(entry)
        assert entry != forge.entry, what
        yield what, dumps(entry)


@case("description/another hash", gate="verify")
def another_hash(forge: Forge) -> None:
    forge.file(SAMPLES)["sha256"] = "0" * 64
    forge.save()


@case("description/a fingerprint of other samples", gate="verify")
def a_fingerprint_of_other_samples(forge: Forge) -> None:
    forge.entry["samples"]["fingerprint"] = "0" * 64
    forge.save()

"""Which part of a dump a process writes is what FORMAT section 16 says: part p is process I's of J where p mod J = I - 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softcache import dump
from softcache.cache.write.writer import Part
from softcache.config import DumpConfig


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_parts_of_processes(count: int) -> None:
    for index in range(1, count + 1):
        assert [p for p in range(12) if Part(index, count).owns(p)] == [p for p in range(12) if p % count == index - 1]


def spans_of(path: Path, work: str, part: str) -> list[int]:
    journal = path / "dump" / work / f"part-{part.replace('/', '-of-')}.jsonl"
    return [json.loads(line)["span"] for line in journal.read_text().splitlines()]


def test_a_dump_in_parts_and_an_extension_whose_first_part_is_the_second_process_s(tmp_path: Path, toy: Path) -> None:
    """Parts are numbered through all rounds: of an extension that begins with part 2, the first process of three has part 3."""
    settings: dict[str, Any] = {"data": f"{toy}:images?count=300", "out": str(tmp_path / "cache"), "shard_rows": 256}
    settings |= {"threads": 1, "workers": 0, "codec": "float32"}
    for part, spans in (("2/2", [1]), ("1/2", [0])):
        dump.run(DumpConfig(teacher=(f"{toy}:exact",), part=part, **settings), quiet=True)
        assert spans_of(tmp_path / "cache", "", part) == spans
    for part, spans in (("1/3", [3]), ("3/3", [2])):
        dump.run(DumpConfig(teacher=(f"{toy}:exact?seed=1",), extend=True, part=part, **settings), quiet=True)
        assert spans_of(tmp_path / "cache", "extend-1", part) == spans

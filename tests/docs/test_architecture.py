"""docs/ARCHITECTURE.md: its table of rooms is the one that imports are tested against, and what it names is where it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from promises.test_layering import ALLOWED, ONLY_FROM, ONLY_TO, PACKAGE, ROOT

import softcache

PAGE = Path(softcache.__file__).parent / "docs" / "ARCHITECTURE.md"
TEXT = PAGE.read_text(encoding="utf-8")
QUESTIONS = 30
PLACE = re.compile(r"`(softcache/[\w/]+\.py): ([\w.]+)`")


def rows_of(text: str, *head: str) -> Iterator[list[str]]:
    """The rows of every table whose header is this."""
    lines = text.split("\n")
    for start, line in enumerate(lines):
        if line == f"| {' | '.join(head)} |":
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                cells = [cell.strip() for cell in row.strip("|").split(" | ")]
                assert len(cells) == len(head), row
                yield cells


# --------------------------------------------------------------------------------------------------------------- questions


@cache
def defined_in(source: str) -> frozenset[str]:
    """Functions and classes at the top of a module, and `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def wrong_places(text: str) -> list[str]:
    """The answers that name no file of ours, or something that is not defined in it."""
    wrong = []
    for _, where in rows_of(text, "question", "where"):
        places = PLACE.findall(where)
        if not places or len(places) != where.count(".py: "):
            wrong.append(where)
        for file, name in places:
            path = ROOT.parent / file
            if not path.is_file() or name not in defined_in(path.read_text(encoding="utf-8")):
                wrong.append(f"{file}: {name}")
    return wrong


def test_every_answer_names_what_is_defined_there() -> None:
    questions = [question for question, _ in rows_of(TEXT, "question", "where")]
    assert len(questions) >= QUESTIONS and len(set(questions)) == len(questions)
    assert all(question.endswith("?") for question in questions)
    assert wrong_places(TEXT) == []


@pytest.mark.parametrize(
    "where",
    [
        "`softcache/gone.py: run`",
        "`softcache/spec.py: gone`",
        "`softcache/targets/batch.py: combined`",  # a method of Targets
        "`softcache/targets/batch.py: Targets.arrays`",  # a field
        "`softcache/spec.py`",
        "`softcache/spec.py: convert`, softcache/spec.py: gone",
    ],
)
def test_a_planted_answer_is_found(where: str) -> None:
    head = "| question | where |\n|---|---|\n"
    assert wrong_places(f"{head}| there? | `softcache/targets/batch.py: Targets.combined` |\n") == []
    assert len(wrong_places(f"{head}| there? | {where} |\n")) == 1


# ------------------------------------------------------------------------------------------------------------------- rooms


def room_row(room: str) -> str:
    """The row of a room as the tables of the layering test have it."""
    cells = []
    for one in sorted(ALLOWED[room]):
        note = ""
        if (room, one) in ONLY_FROM:
            note = f" (only in {_names(ONLY_FROM[room, one])})"
        if (room, one) in ONLY_TO:
            note = f" (only {_names(ONLY_TO[room, one])} of it)"
        cells.append(f"`{one}`{note}")
    return f"| `{room}` | {', '.join(cells) or 'nothing of ours'} |"


def _names(modules: set[str]) -> str:
    return ", ".join(f"`{module.rpartition('.')[2]}`" for module in sorted(modules))


def test_the_rooms_are_those_that_imports_are_tested_against() -> None:
    told = [f"| {room} | {allowed} |" for room, allowed in rows_of(TEXT, "room", "may import")]
    wanted = list(map(room_row, ALLOWED))
    assert [row for row in wanted if row not in told] == [], "rows to write"
    assert [row for row in told if row not in wanted] == [], "rows to delete"
    assert len(told) == len(wanted)


def test_every_folder_and_loose_module_is_in_the_tree() -> None:
    tree = re.findall(r"^```\nsoftcache/\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    words = set(re.split(r"\s+", tree[0]))
    modules = {path.name for path in ROOT.glob("*.py")} | {"FORMAT.md", "py.typed"}
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {word for word in words if word.endswith(("/", ".py", ".md", ".typed"))} == modules | folders
    assert {name.rstrip("/").removesuffix(".py") for name in folders | modules} >= {*ALLOWED} - {PACKAGE}

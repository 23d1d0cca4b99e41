"""Losses, codecs, view steps and sources of data are told where users read of them, all of them and no others."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import softcache
from softcache.cache.card import phrases
from softcache.codecs import CODECS
from softcache.config.options import CODEC_HELP
from softcache.data.transfer_set import FILE_SOURCES, MADE_UP, SOURCES
from softcache.data.views import STEPS
from softcache.losses import LOSSES

DOCS = Path(softcache.__file__).parent / "docs"
README = DOCS.parents[1] / "README.md"


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def tables(text: str) -> list[str]:
    """The tables of a text, without their two head lines."""
    found = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    return ["".join(one.splitlines(keepends=True)[2:]) for one in found]


def named(text: str) -> set[str]:
    """The names in code spans: `name`, `name:key=value`, `name(...)`."""
    return set(re.findall(r"`(\w+)(?::[^`]*)?`", text))


def test_losses() -> None:
    (table,) = tables(section("LOSSES.md", "Which there are"))
    assert named(table) - {"linear_head", "standardized"} == set(LOSSES)
    for page in (DOCS / "LOSSES.md", README):
        assert f"{len(LOSSES)} losses" in page.read_text(encoding="utf-8"), page


def test_codecs() -> None:
    sizes = tables((DOCS / "CODECS.md").read_text(encoding="utf-8"))[0]
    (bounds,) = tables(section("CODECS.md", "What is lost"))
    for table in (sizes, bounds):
        first = "\n".join(row.split(" | ")[0] for row in table.splitlines())
        assert named(first) == set(CODECS)
    assert all(re.search(rf"\b{name}\b", CODEC_HELP) for name in CODECS)
    assert set(phrases.CODECS) == set(CODECS)


@pytest.mark.parametrize("name", STEPS)
def test_view_steps(name: str) -> None:
    short, whole = tables(section("VIEWS.md", "Steps"))
    parameters = set(list(inspect.signature(STEPS[name].function).parameters)[2:])
    if name == "seeded":  # which is written as its transform
        assert "package.module:factory" in short and name in phrases.STEPS
        return
    assert name in named(short) and name in phrases.STEPS
    (row,) = [row for row in whole.splitlines() if row.startswith(f"| `{name}` |")]
    assert set(re.findall(r"`(\w+)(?:=[^`]*)?`", row.partition(" | ")[2])) == parameters


def test_no_step_is_told_that_is_none() -> None:
    assert set(phrases.STEPS) == set(STEPS)
    assert {row.split("`")[1] for row in tables(section("VIEWS.md", "Steps"))[1].splitlines()} == {*STEPS} - {"seeded"}


def test_sources_of_data() -> None:
    (table,) = tables(section("DATA.md", "Names"))
    told = {re.split(r"[:?`]", row.removeprefix("| `"))[0] for row in table.splitlines()}
    assert told == {*SOURCES, "package.module"} and {*FILE_SOURCES} < {*SOURCES}
    assert all(f"`synthetic:{name}" in table for name in MADE_UP)

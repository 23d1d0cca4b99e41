"""`softcache help`: the pages, one page, a verb's flags, and what is near a topic that is none."""

from __future__ import annotations

import json
import pydoc
import sys
from pathlib import Path

import pytest

from softcache import cli
from softcache.commands import help


@pytest.fixture(autouse=True)
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pages."""
    (tmp_path / "TRAINING.md").write_text("# Training\n\nA student learns\nfrom a cache. It takes epochs.\n\nMore.\n")
    (tmp_path / "LOSSES.md").write_text("# Losses\n\n## First\n\nTerms are added up.\n")
    monkeypatch.setattr(help, "DOCS", tmp_path)
    return tmp_path


def test_the_list_has_the_first_sentence_of_every_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["LOSSES    Terms are added up", "TRAINING  A student learns from a cache"]
    assert cli.main(["help", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"LOSSES": "Terms are added up", "TRAINING": "A student learns from a cache"}


@pytest.mark.parametrize("topic", ["TRAINING", "training", "Training"])
def test_a_page_is_printed_as_it_is(docs: Path, capsys: pytest.CaptureFixture[str], topic: str) -> None:
    assert cli.main(["help", topic]) == 0
    assert capsys.readouterr().out == (docs / "TRAINING.md").read_text()


def test_a_verb_goes_before_a_page_that_differs_by_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "LOSSES"]) == 0
    assert capsys.readouterr().out.startswith("# Losses")
    assert cli.main(["help", "losses"]) == 0
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["losses", "--help"])
    assert capsys.readouterr().out == shown != ""


def test_on_a_terminal_it_goes_through_a_pager(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paged: list[str] = []
    monkeypatch.setattr(pydoc, "pager", paged.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["help", "training"]) == 0
    assert paged[0].startswith("# Training") and capsys.readouterr().out == ""


@pytest.mark.parametrize(("topic", "near"), [("trainin", "training"), ("verfy", "verify"), ("LOSES", "losses")])
def test_an_unknown_topic_names_the_nearest(capsys: pytest.CaptureFixture[str], topic: str, near: str) -> None:
    assert cli.main(["help", topic]) == 2
    said, errors = capsys.readouterr()
    assert said == "" and f"there is no page and no verb {topic!r}" in errors and f"'{near}'" in errors

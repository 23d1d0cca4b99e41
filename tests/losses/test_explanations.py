"""`softcache losses NAME` of every loss: its own text, and what a text has to say."""

from __future__ import annotations

import re

import pytest

from softcache.commands.describe_losses import explanation, to_json
from softcache.losses import INPUTS, LOSSES

UNITS = "in nats|in squared units of|in the fourth power of|in squares of|without unit"
SAME = {"fitnet": "hint"}  # one formula on another layer


@pytest.mark.parametrize("name", LOSSES)
def test_the_text_says_shapes_types_units_errors_and_paper(name: str) -> None:
    loss, text = LOSSES[name], " ".join(to_json(name)["text"].split())
    for word in (*loss.inputs, *loss.defaults):
        assert re.search(rf"\b{word}\b", text), word
    assert re.search("any float dtype", text, re.I) and re.search(r"\(B, .*?\)", text)
    assert re.search("scalar", text, re.I) and re.search(UNITS, text, re.I)
    assert "Raises:" in text and "Source:" in text
    assert "as `kd`" not in text  # which a reader of one text does not see


@pytest.mark.parametrize("name", LOSSES)
def test_the_paper_in_the_list_is_that_of_the_text(name: str) -> None:
    source, text = LOSSES[name].source, to_json(name)["text"]
    assert re.search(r"(19|20)\d\d", source)
    for author in re.findall(r"[A-Z]\w+(?=,| et al\.| (?:19|20)\d\d)", source):
        assert author in text.partition("Source:")[2], author
    for year in re.findall(r"(?:19|20)\d\d", source):
        assert year in text.partition("Source:")[2], year


def test_no_two_losses_share_a_text_but_those_of_one_formula() -> None:
    texts: dict[str, str] = {}
    for name in LOSSES:
        assert texts.setdefault(to_json(name)["text"], name) in (name, SAME.get(name)), name


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_below_the_text_is_of_this_loss(name: str) -> None:
    loss, shown = LOSSES[name], explanation(name)
    assert shown.startswith(f"{name}\n\n")
    assert f"--loss {name}:weight=W" in shown
    inputs = shown.partition("inputs, in your own loop:\n")[2].splitlines()
    assert [line.split()[0] for line in inputs] == list(loss.inputs)
    assert [line.split(maxsplit=1)[1] for line in inputs] == [INPUTS[key] for key in loss.inputs]
    assert ("adapter=" in shown) == (loss.has_features and not loss.graft)
    assert ("--loss ce" in shown) == (
        (loss.has_teacher and not loss.needs("labels") and not loss.graft) or name == "ce"
    )


def test_simkd_is_explained_as_itself() -> None:
    shown = explanation("simkd")
    assert "FitNet" not in shown and "Reused Teacher Classifier" in shown
    assert (
        "needs      the map that the classifier averages, or the input of the final linear layer of the teacher"
        in shown
    )

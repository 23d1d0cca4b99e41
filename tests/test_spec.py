"""Spec strings: one rule of quoting for everything that is named on the command line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from softcache.config import DumpConfig, resolve
from softcache.data.classes import class_indices
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ConfigError
from softcache.evaluate.bias import parse_bias
from softcache.models import split_weights
from softcache.models.weights import path_and_choice
from softcache.spec import make_spec, parse_spec, quoted, split_list, split_term, unquoted

SIGNS = "ab.py:/?&=@#,%\"' ()é字\\-"


def odd_names(seed: int, count: int) -> list[str]:
    """Names of signs that mean something in some spec, spaces, quotes and letters beyond ASCII."""
    draw = random.Random(seed)
    return ["".join(draw.choices(SIGNS, k=draw.randint(1, 12))) for _ in range(count)]


def test_a_spec_of_any_names_is_read_back_as_what_it_was_made_of() -> None:
    names = odd_names(0, 1500)
    for scheme, name, value in zip(names[::3], names[1::3], names[2::3], strict=True):
        for one in (scheme.replace(".py", ""), f"{scheme}.py", ""):
            made = make_spec(one, name, {"key": quoted(value), "other": "1"})
            found = parse_spec(made.text)
            assert (found.scheme, found.name) == (one, name), made.text
            assert (found.value("key"), found.value("other")) == (value, "1"), made.text
            assert make_spec(found.scheme, found.name, found.parameters).text == made.text
            assert found.without("key").having(key=value).value("key") == value


@pytest.mark.parametrize(
    "text",
    [
        "digits",
        "softcache:mlp?hidden=800,800&dropout=0.5",
        "torchvision:MNIST?root=data&train=true",
        "imagefolder:/data/a b/100%/it's/me@home#1,2=3",
        "tsv:C:\\films.tsv?text=a,b&label=x",
        "here/it is.py:make?path=a=b",
        'tsv:5" pipes.tsv?label=the "other" one',
        "a@b/net.py:make",
    ],
)
def test_specs_without_quotes_are_written_as_they_always_were(text: str) -> None:
    spec = parse_spec(text)
    assert make_spec(spec.scheme, spec.name, spec.parameters).text == spec.without().text == text


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("softcache:mlp@w.pt", "w.pt"),
        ('hf:"me@home/bert"@w.pt', "w.pt"),
        ('softcache:textcnn?vocabulary="a@b.txt"&width=8@w.pt', "w.pt"),
        ('"a@b/net.py":make@"w@1#2.pt"#ema', '"w@1#2.pt"#ema'),
        ("a@b/net.py:make@w@1.pt", "w@1.pt"),
        ("softcache:mlp", ""),
    ],
)
def test_weights_stand_behind_the_first_at_that_is_in_no_quotes(text: str, weights: str) -> None:
    head, found = split_weights(text)
    assert found == weights and text == head + (f"@{weights}" if weights else "")


@pytest.mark.parametrize(
    ("weights", "path", "choice"),
    [
        ("w.pt#ema.module", "w.pt", "ema.module"),
        ('"w#1.pt"#ema', "w#1.pt", "ema"),
        ('"w#1.pt"', "w#1.pt", ""),
        ("runs#2/w.pt", "runs#2/w.pt", ""),
        ("#1.pt", "#1.pt", ""),
    ],
)
def test_what_is_chosen_of_weights_stands_behind_a_hash(weights: str, path: str, choice: str) -> None:
    assert path_and_choice(weights) == (path, choice)


def test_a_path_that_is_there_wins_over_what_its_signs_could_mean(tmp_path: Path) -> None:
    file = tmp_path / "w.pt#ema"
    file.touch()
    assert path_and_choice(str(file)) == (str(file), "")


def test_lists_terms_and_biases_have_the_same_quotes() -> None:
    names = ("Paris, Texas", "Rome", 'the "old" town', "a=b")
    written = '"Paris, Texas",Rome,the "old" town,"a=b"'
    assert split_list(written) == names
    assert (
        resolve(
            DumpConfig, flags={"data": "digits", "teacher": ("x",), "out": "y", "keep_labels": written}
        ).config.keep_labels
        == names
    )
    assert class_indices(names, split_list(written)) == [0, 1, 2, 3]
    assert parse_bias(split_list('"Paris, Texas"=1.5,Rome=2'), names) == {"Paris, Texas": 1.5, "Rome": 2.0}
    assert split_term('step:path="a,b=(c",at=cosine(1, 2)', "--policy")[1] == {"path": "a,b=(c", "at": "cosine(1, 2)"}


def test_a_class_list_in_a_spec_quotes_each_name(tmp_path: Path) -> None:
    (tmp_path / "what?&.tsv").write_text("red\tx, y\nblue\tz\n")
    found = open_transfer_set(f'tsv:"{tmp_path}/what?&.tsv"?classes="x, y",z')
    assert found.class_names == ("x, y", "z") and found.labels.tolist() == [0, 1]
    assert found.name == 'tsv:"what?&.tsv"?classes="x, y",z'


@pytest.mark.parametrize(
    ("text", "message", "tip"),
    [
        ('imagefolder:"a?b', "never closed", '""'),
        ('imagefolder:"a?b"c', "stands behind a closing quote", "whole part"),
        ('imagefolder:"?x', "never closed", '""'),
        ("imagefolder:a?b", "is not key=value", "'imagefolder:\"a?b\"'"),
        ("imagefolder:a?x=1&b", "is not key=value", "'imagefolder:\"a?x=1&b\"'"),
    ],
)
def test_a_spec_that_cannot_be_read_says_how_it_is_quoted(text: str, message: str, tip: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_spec(text)
    assert tip in caught.value.tip


def test_a_path_with_a_question_mark_that_is_there_is_offered_in_quotes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a?text=b.tsv").write_text("x\ty\n")
    with pytest.raises(ConfigError) as caught:
        open_transfer_set("tsv:a?text=b.tsv")
    assert caught.value.tip == 'quote the path: tsv:"a?text=b.tsv"'
    assert len(open_transfer_set('tsv:"a?text=b.tsv"?classes=*')) == 1
    Path("me@home").mkdir()
    with pytest.raises(ConfigError) as caught:
        split_weights("hf:me@home")
    assert caught.value.tip == 'where it is part of a path, quote that: hf:"me@home"'


def test_quotes_are_taken_off_a_whole_part_only() -> None:
    assert unquoted('"a ""b"" c"') == 'a "b" c' and unquoted('a "b"') == 'a "b"' and unquoted("") == ""
    assert [unquoted(quoted(name)) for name in odd_names(1, 500)] == odd_names(1, 500)


def test_columns_of_a_table_are_named_by_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('"a, b",c,label\nx,y,p\nz,w,q\n')
    assert open_transfer_set(f'table:{tmp_path}/t.csv?text="a, b"&label=label')[1][0] == "z"
    assert open_transfer_set(f'table:{tmp_path}/t.csv?text="a, b",c&label=label')[1][0] == ("z", "w")

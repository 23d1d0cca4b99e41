"""Dirt in a label column is no class: headers, empty labels, spellings, numbers that measure. Each refusal names its override."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import ConfigError, DataError


def opened(path: Path, rows: list[tuple[str, str]], query: str = "") -> TransferSet:
    (path / "x.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return open_transfer_set(f"tsv:{path / 'x.tsv'}{query}")


FILMS = [(f"film number {i} was", "pos" if i % 2 else "neg") for i in range(8)]
NUMBERED = [(text, str(i % 3)) for i, (text, _) in enumerate(FILMS)]


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        pytest.param(("sentence", "label"), FILMS, id="text and label"),
        pytest.param(("Review Text", "Sentiment"), FILMS, id="capitals"),
        pytest.param(("utt", "intent_id"), FILMS, id="only the label's name"),
        pytest.param(("tweet", "what"), FILMS, id="only the text's name"),
        pytest.param(("words", "kind"), NUMBERED, id="a word above numbers"),
    ],
)
def test_a_first_line_that_names_the_columns_is_asked_about(
    tmp_path: Path, header: tuple[str, str], rows: list[tuple[str, str]]
) -> None:
    with pytest.raises(DataError, match=r"line 1: .* looks like the names of the columns") as caught:
        opened(tmp_path, [header, *rows])
    assert "header=true" in caught.value.tip and "header=false" in caught.value.tip
    with pytest.raises(DataError, match="looks like"):
        opened(tmp_path, [header, *rows[:4], header, *rows[4:]])  # files that were put together
    named = opened(tmp_path, [header, *rows], "?header=true")
    assert len(named) == 8 and header[1] not in named.class_names
    kept = opened(tmp_path, [header, *rows], "?header=false")  # as earlier versions took it: same keys, same classes
    assert len(kept) == 9 and header[1] in kept.class_names and kept.keys[1] == "x/000001"
    with pytest.raises(DataError, match=r"label '.*' is not in classes=") as caught:
        opened(tmp_path, [header, *rows], f"?classes={','.join(named.class_names)}")
    assert "header=true" in caught.value.tip


def test_empty_labels_are_none_or_a_class_only_where_it_is_said(tmp_path: Path) -> None:
    rows = [*FILMS, ("and this", ""), ("and that", "")]
    with pytest.raises(DataError, match="line 9: the label is empty, as in 2 of 10 rows") as caught:
        opened(tmp_path, rows)
    assert "empty=unlabelled" in caught.value.tip and "empty=class" in caught.value.tip
    none = opened(tmp_path, rows, "?empty=unlabelled")
    assert none.labels.tolist() == [0, 1] * 4 + [-1, -1] and none.class_names == ("neg", "pos")
    own = opened(tmp_path, rows, "?empty=class")  # as earlier versions took it
    assert own.labels.tolist() == [1, 2] * 4 + [0, 0] and own.class_names == ("", "neg", "pos")
    declared = opened(tmp_path, rows, "?empty=unlabelled&classes=pos,neg")
    assert declared.labels.tolist() == [1, 0] * 4 + [-1, -1]
    numbers = opened(tmp_path, [*NUMBERED, ("and this", ""), ("and that", "nan")], "?empty=unlabelled")
    assert numbers.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, -1, -1] and numbers.class_names == ("0", "1", "2")
    with pytest.raises(ConfigError, match="unknown value 'maybe'"):
        opened(tmp_path, rows, "?empty=maybe")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1", " 0"], r"line 3: label ' 0' differs from '0'"),
        (["Pos", "neg", "pos"], r"'pos' differs from 'Pos'"),
        (["a b", "a  b"], r"'a  b' differs from 'a b'"),
        (["caf\u00e9", "cafe\u0301"], "differs from"),
        (["1", "2", "1.0"], r"'1.0' differs from '1'"),
        (["x ", "x"], r"'x' differs from 'x '"),
    ],
)
def test_two_spellings_of_one_name_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    rows = [(f"this is sample {i} of", label) for i, label in enumerate(labels * 2)]
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, rows)
    assert "classes=*" in caught.value.tip
    found = opened(tmp_path, rows, "?classes=*")
    assert found.class_names == tuple(sorted(set(labels)))
    assert opened(tmp_path, rows, f"?classes={','.join(dict.fromkeys(labels))}").num_classes == len(set(labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([f"{i / 7:.3f}" for i in range(60)], "60 different numbers with fractions"),
        ([f"{i / 7:.3f}" for i in range(20)], "20 different numbers with fractions"),
        ([str(i) for i in range(250)], "250 different labels in 250 rows"),
        ([f"https://somewhere/{i}" for i in range(250)], "250 different labels"),
        ([f"this is the text itself {i}" for i in range(20)], "20 different labels in 20 rows"),
        (["1", "2", "nan", "1"], "line 3: label 'nan' among numbers"),
        (["1.0", "NA", "2.0"], "line 2: label 'NA' among numbers"),
    ],
)
def test_columns_that_are_no_class_labels_are_told_as_what_they_are(
    tmp_path: Path, labels: list[str], message: str
) -> None:
    rows = [(f"this is sample {i} of", label) for i, label in enumerate(labels)]
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, rows)
    assert "classes=*" in caught.value.tip
    assert opened(tmp_path, rows, "?classes=*").num_classes == len(set(labels))

"""Tables in text files: TSV, CSV and JSON lines, read where they lie, as Python's own csv and json read them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.data.identity import item_digest
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import DataError, SoftcacheError

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
HARD = 'ab ,;|\t"\n\r\u2028\u00e9\U0001f600'


def opened(path: Path, content: str | bytes, query: str = "") -> TransferSet:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_transfer_set(f"table:{path}{query}")


def items(found: TransferSet) -> list[Any]:
    return [found[i][0] for i in range(len(found))]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize(
    ("name", "content", "query", "texts", "labels", "classes"),
    [
        pytest.param(
            "x.csv", 'text,label\n"a, b",pos\n"he said ""hi""",neg\n', "", ["a, b", 'he said "hi"'], [1, 0],
            ("neg", "pos"), id="quotes",
        ),
        pytest.param(
            "x.csv", '\ufeffid;review;stars\r\n1;"two\r\nlines";2\r\n\r\n2;, ;10\r\n', "?text=review&label=stars",
            ["two\r\nlines", ", "], [0, 1], ("2", "10"), id="a spreadsheet's",
        ),
        pytest.param("x.csv", "\ufeffa,x\n", "?header=false", ["a"], [0], ("x",), id="a mark before a row"),
        pytest.param("x.csv", "a b\tx\nc\ty", "?header=false", ["a b", "c"], [0, 1], ("x", "y"), id="tabs"),
        pytest.param("x.csv", "n,m\nq,r\n", "?label=none&header=false&text=1", ["m", "r"], [-1, -1], (), id="numbers"),
        pytest.param("x.csv", 'a "b" c,x\n"",x\n', "?quotes=false", ['a "b" c', '""'], [0, 0], ("x",), id="letters"),
        pytest.param("x.tsv", '"a\tb"\tx\n', "?quotes=true&header=false", ["a\tb"], [0], ("x",), id="quoted tabs"),
        pytest.param("x", "a|b\tx\n", "?label=1&separator=|&header=false", ["a"], [0], ("b\tx",), id="a bar"),
        pytest.param(
            "x.jsonl", '{"label": 2, "text": "a\\nb"}\n\n{"text": "c", "label": 1.0, "more": []}\n', "", ["a\nb", "c"],
            [1, 0], ("1", "2"), id="json",
        ),
        pytest.param(
            "x.txt", '{"q": "a"}\n{"q": "b", "y": true}\n{"q": "c", "y": null}\n', "?text=q&label=y&empty=unlabelled",
            ["a", "b", "c"], [-1, 0, -1], ("True",), id="json by content",
        ),
        pytest.param("x.txt", "text\tlabel\na,b\t1\n", "", ["a,b"], [0], ("1",), id="tabs by content"),
    ],
)  # fmt: skip
def test_a_table_is_read_by_its_ending_and_its_content(
    tmp_path: Path, name: str, packing: str, content: str, query: str, texts: list[str], labels: list[int], classes: Any
) -> None:
    found = opened(tmp_path / (name + packing), PACKED[packing](content.encode()), query)
    assert items(found) == texts and found.labels.tolist() == labels and found.class_names == classes
    assert list(found.keys) == [f"{name}/{i:06d}".replace(".tsv", "") for i in range(len(texts))]
    again = pickle.loads(pickle.dumps(found))  # as a spawned worker gets it
    assert items(again) == texts and again.load(0)[1] == item_digest(texts[0])


def test_table_and_tsv_give_the_same_of_the_same_file(tmp_path: Path) -> None:
    rows = ['"quoted\tx', "it's\u2028one\x85line\ty", " \tx", 'a ""b""\ty']
    found = opened(tmp_path / "x.tsv", "\n".join(rows))
    other = open_transfer_set(f"tsv:{tmp_path / 'x.tsv'}")
    assert list(found.keys) == list(other.keys) and found.labels.tolist() == other.labels.tolist()
    assert [found.load(i) for i in range(4)] == [other.load(i) for i in range(4)]


@pytest.mark.parametrize("seed", range(12))
def test_csv_and_json_lines_are_read_as_pythons_own_modules_read_them(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    how = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    letters = (
        HARD if how == csv.QUOTE_ALL else HARD.replace("\r", "")
    )  # which csv leaves without quotes, and reads otherwise
    rows = [["".join(draw.choices(letters, k=draw.randint(0, 12))) for _ in range(3)] for _ in range(40)]
    for row in rows:
        row[2] = draw.choice(["yes", "no, not", 'so "so"'])
    written = io.StringIO(newline="")
    delimiter, end = draw.choice(",;\t|"), draw.choice(["\n", "\r\n"])
    csv.writer(written, delimiter=delimiter, lineterminator=end, quoting=how).writerows([["a", "b", "label"], *rows])
    expected = list(csv.reader(io.StringIO(written.getvalue(), newline=""), delimiter=delimiter))[1:]
    separator = "tab" if delimiter == "\t" else delimiter
    found = opened(tmp_path / "x.csv", written.getvalue(), f"?text=a,b&label=label&separator={separator}")
    assert items(found) == [(a, b) for a, b, _ in expected] == [(a, b) for a, b, _ in rows]
    assert [found.class_names[i] for i in found.labels] == [row[2] for row in rows]
    lines = [json.dumps(dict(zip("abc", row, strict=True)), ensure_ascii=draw.random() < 0.5) for row in rows]
    as_json = opened(tmp_path / "x.jsonl", "\n".join(lines), "?text=a,b&label=c")
    assert items(as_json) == items(found) and as_json.labels.tolist() == found.labels.tolist()


def test_the_separator_is_found_where_one_divides_the_rows(tmp_path: Path) -> None:
    for separator in ",;\t|":
        found = opened(tmp_path / "x.csv", f'text{separator}label\n"a{separator} b,c;d|e"{separator}1\n')
        assert items(found) == [f"a{separator} b,c;d|e"]
    with pytest.raises(DataError, match=r"',' and ';' divide its first rows into equal numbers") as caught:
        opened(tmp_path / "x.csv", "a,b;c\nd,e;f\n")
    assert "separator=," in caught.value.tip


@pytest.mark.parametrize(
    ("name", "content", "query", "message"),
    [
        ("x.csv", "text,label\na,b,c\n", "", r"line 2: 3 columns, but line 1 has 2\n.*in double quotes"),
        ("x.csv", 'text,label\n"a,b\n\nc,d\n', "?separator=,", r"line 2: the quotes that begin here are never closed"),
        ("x.csv", 'text,label\nok,1\n"a" b,c\n', "", r'line 3: letters follow a closing quote.*\n.*""'),
        ("x.csv", 'text,label\n"a\nb",c\n\n\xffd,e\n'.encode("latin-1"), "", "line 5: not UTF-8"),
        ("x.csv", "text,label\ra,b\rc,d", "?separator=,", "line 1: a carriage return outside quotes"),
        ("x.csv", "id,review,stars\n1,a,2\n", "?header=true", r"is the text\? There are 'id', 'review'.*\n.*text=NAME"),
        ("x.csv", "id,text,stars\n1,a,2\n", "?header=true", r"which of its columns is the label\?"),
        ("x.csv", "id,review,stars\n1,a,2\n", "", r"is the text\? There are 'id', 'review', 'stars'\n.*text=NAME"),
        ("x.csv", "id,review,stars\n1,a,2\n", "?text=reviw&label=stars", "no column 'reviw' for the text\n.*'review'"),
        ("x.csv", "id,review,stars\n1,a,2\n", "?text=said&label=x", "no column 'x'.*\n.*header=true.*'id', 'review', 'stars'"),
        ("x.csv", "text,label,text\na,b,c\n", "?text=text&label=label", "two columns are called 'text'"),
        ("x.csv", "text,label\na,1\n", "?text=txt&header=true", "no column 'txt' for the text[^$]*did you mean 'text'"),
        ("x.csv", "text,label\na,1\n", "?text=text,label,text", "names 3 columns"),
        ("x.csv", "text,label,id\na,1,\n", "?key=id", "line 2: the sample's key is ''"),
        ("x.csv", "text,label\n", "", "line 2: the file ends before the first row"),
        ("x.csv", "a,1\nb,2\n", "?separator=ab", "separator=ab"),
        ("x.csv", b"PK\x03\x04\xff", "", r"is a workbook or a zip archive[^$]*save the sheet as CSV"),
        ("x.csv", "text,label\n".encode("utf-16"), "", "is UTF-16"),
        ("x.csv", b"\x1f\x8b\x08\0\xff", "", "is packed by gzip"),
        ("x.csv", 'text,label\n"a\nb",x\nc,\n', "", "line 4: the label is empty"),
        ("x.csv", "text,a,b\nx,0,1\ny,1,no\n", "?label=a,b", "line 3: 'no' in the column 'b' is neither 0 nor 1"),
        ("x.csv", "text,a,b\nx,0,1\n", "?label=a,b&classes=one", "1 classes= for 2 columns"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": null}\n', "", "line 2: the text 'text' is missing"),
        ("x.jsonl", '{"text": NaN, "label": 1}\n', "", "line 1: the text 'text' is nan, which is no string"),
        ("x.jsonl", '{"text": "a", "label": {}}\n', "", r"line 1: the label is \{\}"),
        ("x.jsonl", '{"text": "a", "label": ["x"]}\n{"text": "b", "label": "x"}\n', "", "line 2: the label is 'x', and a list"),
        ("x.jsonl", '{"text": "a"\n', "", "line 1: no JSON"),
        ("x.json", '[\n{"text": "a"}]\n', "", r"line 1: no JSON[^$]*jq -c"),
        ("x.json", '[{"text": "a"}]\n', "", r"line 1: a JSON list, and no object"),
        ("x.jsonl", '{"text": "a", "label": 1}\n', "?text=0", "no column 0 for the text"),
    ],
)  # fmt: skip
def test_faults_of_tables_name_the_line_and_the_cure(
    tmp_path: Path, name: str, content: str | bytes, query: str, message: str
) -> None:
    with pytest.raises(SoftcacheError, match=message):
        opened(tmp_path / name, content, query)


def test_who_has_a_csv_file_is_led_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,1\nb,0\n")
    for spec in (f"tsv:{path}", f"tsv:{path}?text=text&label=label", f"tsv:{path}?header=true", str(path)):
        with pytest.raises(SoftcacheError) as caught:
            open_transfer_set(spec)
        assert f"table:{path}" in caught.value.tip, spec
    with pytest.raises(SoftcacheError, match=rf"text:{path}: without tokenizer=\n.*table:{path}"):
        open_transfer_set(f"text:{path}")
    for scheme in ("csv", "jsonl", "json", "txt"):
        with pytest.raises(SoftcacheError, match=rf"no source is called '{scheme}'\n.*table:{path}"):
            open_transfer_set(f"{scheme}:{path}")
    assert items(open_transfer_set(f"tsv:{path}?label=none")) == ["text,label", "a,1", "b,0"]  # as it always was
    assert f"table:{path} reads CSV" in capsys.readouterr().err


def test_quotes_that_stay_in_tab_separated_text_are_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = 'so "good"\tx\n"a" or "b"\ty\n"\tx\n""\ty\n'  # nobody's CSV
    opened(tmp_path / "x.tsv", plain)
    quoted = plain + '"so ""good"""\tx\n'
    opened(tmp_path / "x.tsv", quoted, "?quotes=false")
    open_transfer_set(f"tsv:{tmp_path / 'x.tsv'}")
    assert "quotes" not in capsys.readouterr().err
    assert items(opened(tmp_path / "x.tsv", quoted))[4] == '"so ""good"""'
    assert "as in row 4, and they stay there: quotes=true" in capsys.readouterr().err


def test_a_folder_is_told_what_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder\n.*imagefolder:.*hf-dataset:"):
        open_transfer_set(f"table:{tmp_path}")
    (tmp_path / "state.json").touch()
    with pytest.raises(SoftcacheError, match="did you mean hf-dataset:"):
        open_transfer_set(str(tmp_path))


def test_a_column_gives_the_keys(tmp_path: Path) -> None:
    found = opened(tmp_path / "x.csv", "id,text,label\n7,a,x\nzwei,b,y\n", "?key=id")
    assert list(found.keys) == ["7", "zwei"] and items(found) == ["a", "b"]
    assert list(opened(tmp_path / "x.jsonl", '{"n": 7, "text": "a", "label": 0}\n', "?key=n").keys) == ["7"]


def test_a_pair_of_texts_is_a_tuple(tmp_path: Path) -> None:
    found = opened(tmp_path / "x.csv", "premise,hypothesis,label\na,b,x\n,c,y\n", "?text=premise,hypothesis")
    assert items(found) == [("a", "b"), ("", "c")] and found.labels.tolist() == [0, 1]
    assert found.load(0)[1] == item_digest(("a", "b")) == item_digest(["a", "b"]) != item_digest("a b")
    comma = opened(tmp_path / "x.csv", '"a,b",label\nhi,x\n', "?text=a,b")  # a column of that name comes first
    assert items(comma) == ["hi"]


def test_several_columns_or_a_list_are_several_classes(tmp_path: Path) -> None:
    found = opened(tmp_path / "x.csv", "text,rude,loud\na,0,1\nb,1.0,True\nc,0,0\n", "?label=rude,loud")
    assert found.multi_label and found.class_names == ("rude", "loud")
    assert found.labels.tolist() == [[False, True], [True, True], [False, False]]
    lines = '{"text": "a", "label": ["loud"]}\n{"text": "b", "label": ["rude", "loud"]}\n{"text": "c", "label": []}\n'
    lists = opened(tmp_path / "x.jsonl", lines, "?classes=rude,loud")
    assert lists.labels.tolist() == found.labels.tolist() and lists.class_names == found.class_names


def test_the_texts_stay_in_the_file(tmp_path: Path) -> None:
    found = opened(tmp_path / "x.csv", "text,label\n" + "".join(f'"{i}{"x" * 9999}",{i % 2}\n' for i in range(50)))
    assert len(pickle.dumps(found)) < 50_000 and found.select(np.array([7])).load(0)[0].startswith("7x")
    copy = pickle.dumps(found)
    with (tmp_path / "x.csv").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="the file changed while it was in use"):
        found.load(40)
    with pytest.raises(DataError, match="the file changed while it was in use"):
        pickle.loads(copy)


def test_a_cell_may_be_longer_than_csv_allows(tmp_path: Path) -> None:
    csv.field_size_limit(before := 131_072)
    text = "x," * 100_000
    assert items(opened(tmp_path / "x.csv", f'text,label\n"{text}",1\n')) == [text]
    assert csv.field_size_limit() == before

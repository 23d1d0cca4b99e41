"""Samples that are words with a tag each: files, tables and somebody's data sets, against lists written by hand."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from columns import ClassLabel, HuggingFace
from torch.utils.data import Subset

from softcache.data.class_counts import described
from softcache.data.columns_source import source_of_columns
from softcache.data.identity import item_digest
from softcache.data.map_style import from_dataset
from softcache.data.tagged_words import TagsFound
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import ConfigError, DataError, SoftcacheError
from softcache.words import Words

CONLL2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
# NN B-NP O
-DOCSTART- -X- -X- O
Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER


"""
CONLLU = """# newdoc id = a
# sent_id = 1
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t_\t_
4\tel\tel\tDET\t_\t_\t5\tdet\t_\t_
5\t20 000 mar\tmar\t_\t_\t_\t1\tobl\t_\t_
5.1\tx\tx\tVERB\t_\t_\t_\t_\t_\t_

# sent_id = 2
1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_
"""


def rows(found: TransferSet) -> list[tuple[list[str], list[str | None]]]:
    """Words and names of tags of each sample, as anybody reads them."""
    names = [*found.class_names, None]
    return [(list(words), [names[tag] for tag in tags]) for words, tags in (found[i] for i in range(len(found)))]


@pytest.mark.parametrize(
    ("name", "content", "query", "wanted"),
    [
        pytest.param(
            "a.conll", CONLL2003, "",
            [(["EU", "rejects", "#"], ["B-ORG", "O", "O"]), (["Peter", "Blackburn"], ["B-PER", "I-PER"])], id="2003",
        ),
        pytest.param(
            "a.conll", CONLL2003, "?tags=1",
            [(["EU", "rejects", "#"], ["NNP", "VBZ", "NN"]), (["Peter", "Blackburn"], ["NNP", "NNP"])], id="a column",
        ),
        pytest.param(
            "a.conllu", CONLLU, "",
            [(["Vamos", "nos", "a", "el", "20 000 mar"], ["VERB", "PRON", "ADP", "DET", None]), (["#"], ["SYM"])],
            id="universal",
        ),
        pytest.param(
            "a.txt", "#tag\tO\r\n\u00a0b\tB\r\n\t\r\nc\tO", "", [(["#tag", "\u00a0b"], ["O", "B"]), (["c"], ["O"])],
            id="tabs, no end",
        ),
        pytest.param("a.iob", "\ufeffa\nb\n\nc\n", "", [(["a", "b"], [None, None]), (["c"], [None])], id="no tags"),
        pytest.param("a.iob", "O a\nB b\n", "?words=-1&tags=0&classes=B,O", [(["a", "b"], ["O", "B"])], id="turned"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_file_of_a_word_a_line_holds_the_sentences_that_a_reader_sees(
    tmp_path: Path, name: str, packing: str, content: str, query: str, wanted: Any
) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(gzip.compress(content.encode()) if packing else content.encode())
    found = open_transfer_set(f"conll:{path}{query}")
    assert rows(found) == wanted
    assert list(found.keys) == [f"{name}/{i:06d}" for i in range(len(wanted))]
    assert found.labels.tolist() == [-1] * len(wanted) and found.positions is not None
    assert rows(pickle.loads(pickle.dumps(found))) == wanted


JSON = '{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"], "id": 7}\n{"tokens": [], "ner_tags": [], "id": 8}\n'
JSON += '{"tokens": ["c"], "ner_tags": [null], "id": 9}\n'
CSV = 'tokens,tags\n"[""a"", ""b""]","[0, 2]"\n[],[]\n"[""c""]",[-100]\n'
WANTED = [(["a", "b"], ["O", "B-X"]), ([], []), (["c"], [None])]


@pytest.mark.parametrize(
    ("name", "content", "query"),
    [
        ("x.jsonl", JSON, "?words=tokens"),
        ("x.jsonl", JSON, "?words=tokens&tags=ner_tags&classes=O,B-Y,B-X"),
        ("x.csv", CSV, "?words=tokens&classes=O,B-Y,B-X"),
        ("x.tsv", '["a", "b"]\t["O", "B-X"]\n[]\t[]\n["c"]\t[""]\n', "?words=0&tags=1&header=false&empty=unlabelled"),
    ],
)
def test_rows_of_lists_are_words_with_a_tag_each(tmp_path: Path, name: str, content: str, query: str) -> None:
    (tmp_path / name).write_text(content)
    found = open_transfer_set(f"table:{tmp_path / name}{query}")
    assert rows(found) == WANTED
    assert found.labelled == 1 and found.num_classes in (2, 3)
    assert rows(pickle.loads(pickle.dumps(found))) == WANTED


@pytest.mark.parametrize("none", [-1, -100, -100.0, np.int64(-100), np.float32(-1)])
def test_a_number_that_says_no_label_is_no_class_whatever_the_tags_are(none: Any) -> None:
    for tags in (["O", none], [3, none], [np.str_("O"), none]):
        found = TagsFound("x")
        found.add("x", Words(["a", "b"]), tags)
        labels, names = found.done()
        assert names == (str(tags[0]),) and type(names[0]) is str and labels.labels.tolist() == [0, -1]
    found = TagsFound("x")
    found.add("x", Words(["a"]), [none])
    assert found.done()[1] == ()


def test_comments_stand_between_sentences(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text(
        "# of a newspaper\na O\n# id = 3\nb B\n-DOCSTART-\n# another text of it\n#\n# O\n"
    )
    found = open_transfer_set(f"conll:{tmp_path}/x.conll")
    assert rows(found) == [(["a", "b"], ["O", "B"]), (["#"], ["O"])]


def test_a_table_of_hugging_face_brings_the_names_of_its_tags_by_key(tmp_path: Path) -> None:
    class Listed:
        feature = ClassLabel(["O", "B-X"])

    columns = {"tokens": [["a", "b"], [], ["c"]], "ner_tags": [[0, 1], [], [-100]], "id": ["u", "v", "w"]}
    table = HuggingFace({"ner_tags": Listed()}, columns)
    for found in (
        source_of_columns(table, "x", "x", words="tokens", key="id"),
        from_dataset(table, "x", "x", {"words": "tokens", "tags": "ner_tags", "key": "id"}),
    ):
        assert rows(TransferSet("x", found)) == WANTED and list(found.keys) == ["u", "v", "w"]
    found = from_dataset(table, "x", "x")
    assert rows(TransferSet("x", found)) == WANTED
    with pytest.raises(ConfigError, match="names its classes itself"):
        source_of_columns(table, "x", "x", words="tokens", classes=("O",))


class Pairs:
    """Words with tags, two words among them: not a pair of texts."""

    words = True
    class_names = ("O", "B-X")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> Any:
        return [(["a", "b"], np.array([0, 1])), ([], []), (("c",), None)][row]


class Dicts(Pairs):
    words = None  # type: ignore[assignment]

    def __getitem__(self, row: int) -> Any:
        words, tags = Pairs()[row]
        return {"tokens": words, "tags": tags}


@pytest.mark.parametrize("dataset", [Pairs(), Dicts(), Subset(Dicts(), [0, 1, 2])])  # type: ignore[arg-type]
def test_a_data_set_of_somebodys_gives_words(dataset: Any) -> None:
    source = from_dataset(dataset, "mine", "mine")
    wanted = WANTED if hasattr(dataset, "class_names") else [(["a", "b"], ["0", "1"]), ([], []), (["c"], [None])]
    found = TransferSet("mine", source)
    assert rows(found) == wanted
    again = TransferSet("again", from_dataset(found, "again", "again"))  # as a factory may return it
    assert rows(again) == wanted and list(again.keys) == list(found.keys)


def test_some_samples_of_a_set_of_words_keep_their_keys_and_tags() -> None:
    whole = open_transfer_set("synthetic:words?count=9")
    found = from_dataset(Subset(Subset(whole, [8, 3, 5]), [2, 0]), "mine", "mine")
    assert rows(TransferSet("mine", found)) == [rows(whole)[5], rows(whole)[8]]
    assert list(found.keys) == [whole.keys[5], whole.keys[8]]


@pytest.mark.parametrize("samples", [[(["a", "b"], ["O", "B"])], [(["a", "b"], [0, 2]), (["c"], [1])]])
def test_words_that_are_not_said_to_be_such_are_refused_with_what_to_say(samples: Any) -> None:
    with pytest.raises(DataError) as caught:
        from_dataset(samples, "mine", "mine")
    assert "words = True" in caught.value.tip


def test_contents_are_told_apart_by_where_words_end(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"words": ["a b", "c"]}\n{"words": ["a", "b c"]}\n{"words": ["a", "b", "c"]}\n')
    found = open_transfer_set(f"table:{tmp_path}/x.jsonl?words=words&tags=none")
    digests = [found.load(i)[1] for i in range(3)]
    assert len(set(digests)) == 3
    assert digests[0] == item_digest(["a b", "c"]) == item_digest(Words(["a b", "c"]))  # lists are digested alike


def test_whatever_chooses_samples_or_classes_takes_the_tags_along(tmp_path: Path) -> None:
    whole = open_transfer_set("synthetic:words?count=40")
    chosen = whole.select(np.array([7, 3, 3, 39]))
    assert rows(chosen) == [rows(whole)[i] for i in (7, 3, 3, 39)]
    assert rows(open_transfer_set("synthetic:words?count=40&rows=5-8")) == rows(whole)[5:9]
    (tmp_path / "keys").write_text("synthetic/train/000007\nsynthetic/train/000009\n")
    some = open_transfer_set("synthetic:words?count=40", samples=tmp_path / "keys")
    assert rows(some) == [rows(whole)[i] for i in (7, 9)]
    rest = open_transfer_set("synthetic:words?count=40", without=tmp_path / "keys")
    assert rows(rest) == [one for i, one in enumerate(rows(whole)) if i not in (7, 9)]
    fewer = chosen.with_classes(["I-K0", "O"])
    assert fewer.class_names == ("O", "I-K0")
    kept = [(words, [tag if tag in ("O", "I-K0") else None for tag in tags]) for words, tags in rows(chosen)]
    assert rows(fewer) == kept and fewer.whole.positions is not None
    names = ("X", *reversed(whole.class_names))
    under = chosen.under(names, [names.index(name) for name in chosen.class_names])
    assert rows(under) == rows(chosen) and under.class_names == names


def test_the_made_up_words_follow_their_rule() -> None:
    found = open_transfer_set("synthetic:words?count=60&kinds=2&most=9&split=test")
    seen = set()
    for words, tags in rows(found):
        kind: str | None = None
        wanted = []
        for word in words:
            if word.startswith("k"):
                kind = f"K{word[1]}"
                wanted.append(f"B-{kind}")
            elif kind is not None and int(word[1:]) % 2:
                wanted.append(f"I-{kind}")
            else:
                kind = None
                wanted.append("O")
        assert tags == wanted and 1 <= len(words) <= 9
        seen.update(tags)
    assert seen == set(found.class_names)
    assert rows(found) != rows(open_transfer_set("synthetic:words?count=60&kinds=2&most=9"))


@pytest.mark.parametrize(
    ("name", "content", "spec", "message"),
    [
        ("x.jsonl", '{"w": ["a", "b"], "t": [1]}', "table:{}?words=w&tags=t", r"line 1: 1 tags for 2 words, which begin"),
        ("x.jsonl", '{"w": ["a"], "t": ["X"]}', "table:{}?words=w&tags=t&classes=O,B", r"line 1: tag 'X' is not in classes"),
        ("x.jsonl", '{"w": ["a"], "t": [3]}', "table:{}?words=w&tags=t&classes=O,B", r"line 1: tag '3' is not in classes"),
        ("x.jsonl", '{"w": ["a", ""], "t": [1, 1]}', "table:{}?words=w&tags=t", r"line 1: word 1 is empty"),
        ("x.jsonl", '{"w": ["\\u00a0 "], "t": [1]}', "table:{}?words=w&tags=t", r"line 1: word 0 is .*nothing but spaces"),
        ("x.jsonl", '{"w": ["a\\u0000"], "t": [1]}', "table:{}?words=w&tags=t", r"line 1: word 0, .* control character"),
        ("x.jsonl", '{"w": ["a\\nb"], "t": [1]}', "table:{}?words=w&tags=t", r"control character"),
        ("x.jsonl", '{"w": ["a", 3], "t": [1, 1]}', "table:{}?words=w&tags=t", r"line 1: word 1 is 3, which is no string"),
        ("x.jsonl", '{"w": "a b", "t": [1, 1]}', "table:{}?words=w&tags=t", r"line 1: 'a b' is no JSON list"),
        ("x.jsonl", '{"w": ["a"], "t": ["x", ["y"]]}', "table:{}?words=w&tags=t", r"2 tags for 1 words"),
        ("x.jsonl", '{"w": ["a"], "t": [["y"]]}', "table:{}?words=w&tags=t", r"the tag \['y'\] is neither"),
        ("x.jsonl", '{"w": ["a"], "t": [""]}', "table:{}?words=w&tags=t", r"line 1: a tag is empty"),
        ("x.jsonl", '{"w": ["a", "b"], "t": ["PER", "per"]}', "table:{}?words=w&tags=t", r"'per' differs from 'PER' by case"),
        ("x.jsonl", '{"w": ["a"], "t": [1], "p": [1]}', "table:{}?words=w", r"which of its columns holds the tags"),
        ("x.jsonl", '{"w": ["a"], "t": [1]}', "table:{}?words=w&label=t", r"words=w and label=t"),
        ("x.jsonl", '{"w": ["a"], "t": [1]}', "table:{}?text=w&tags=t", r"tags=t without words="),
        ("x.jsonl", '{"w": ["a"], "t": [1]}', "table:{}?words=w&tags=t&empty=class", r"an empty tag is no class"),
        ("x.jsonl", '{"w": ["a"], "t": [1]}', "table:{}?words=q&tags=t", r"no column 'q' for the words"),
        ("x.jsonl", '{"w": ["a"], "t": [1]}', "table:{}?text=w&label=none", r"which is no string"),
        ("x.csv", "w,t\n\"['a']\",[1]\n", "table:{}?words=w&tags=t", r"line 2: .* is no JSON list"),
        ("x.conll", "a O\nb\n", "conll:{}", r"line 2: 1 columns, where the first word has 2"),
        ("x.conll", "a O\nb O\n", "conll:{}?tags=2", r"no column 2 for the tags, there are 2"),
        ("x.conll", "a O\nb O\n", "conll:{}?tags=NER", r"tags=NER is no number of a column"),
        ("x.conll", "a O\nb O\n", "conll:{}?words=1", r"words=1 and tags=-1 are one column"),
        ("x.tsv", '["a"]\t["O"]\n', "table:{}?words=0&tags=0&header=false", r"words= and tags= are the same column"),
        ("x.jsonl", '{"w": ["a"], "t": [1]}', "table:{}?words=w&tags=w", r"words= and tags= are the same column"),
        ("x.conll", "a O\n#b\nc O\n", "conll:{}", r"line 2: 1 columns, where the first word has 2"),
        ("x.conll", "a\tO\n# b\nc\tO\n", "conll:{}", r"line 2: 1 columns, where the first word has 2"),
        ("x.conll", "a O\n\n#b\nc O\n", "conll:{}", r"line 3: 1 columns"),
        ("x.conll", "\n\n-DOCSTART- -X- O O\n\n", "conll:{}", r"holds no words"),
        ("x.conll", "a\tO\nb\t\n", "conll:{}", r"the sentence at line 1: a tag is empty"),
        ("x.conll", b"a O\n\xff O\n", "conll:{}", r"line 2: not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_word_or_tag_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, spec: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SoftcacheError, match=message) as caught:
        open_transfer_set(spec.format(path))
    assert caught.value.tip


def test_letters_that_differ_by_case_alone_may_be_two_tags(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("a PER\nb per\n")
    found = open_transfer_set(f"conll:{tmp_path}/x.conll?classes=*")
    assert found.class_names == ("PER", "per")


def test_a_file_without_blank_lines_is_refused_before_it_becomes_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("softcache.data.conll.LONGEST", 5)
    (tmp_path / "x.conll").write_text("a O\n" * 6)
    with pytest.raises(DataError, match="line 1 has more than 5 words"):
        open_transfer_set(f"conll:{tmp_path}/x.conll")


def test_classes_of_samples_cannot_be_chosen_where_words_have_them() -> None:
    with pytest.raises(ConfigError, match="here words have classes") as caught:
        open_transfer_set("synthetic:words", keep_labels=["O"])
    assert "--samples" in caught.value.tip


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda: (["a", "b"], [0]), "sample mine/000000: 1 tags for 2 words"),
        (lambda: ("a b", [0]), "words are a list of strings, found str 'a b'"),
        (lambda: (None, None), "found nothing"),
        (lambda: (["a"], [5]), "tag 5 is no index of the 2 classes"),
        (lambda: (["a"], "O"), "tags are a list"),
        (lambda: {"words": ["a"], "tokens": ["a"]}, "which one holds the words"),
    ],
)
def test_a_sample_that_is_no_words_is_named(sample: Callable[[], Any], message: str) -> None:
    class Odd(Pairs):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> Any:
            return sample()

    with pytest.raises(DataError, match=message):
        from_dataset(Odd(), "mine", "mine")


def test_json_lists_of_a_csv_are_what_json_writes(tmp_path: Path) -> None:
    hard = ['say "hi"', "a,b", "caf\u00e9", "[", "\u200b"]
    (tmp_path / "x.csv").write_text('w\n"' + json.dumps(hard).replace('"', '""') + '"\n')
    found = open_transfer_set(f"table:{tmp_path}/x.csv?words=w&tags=none")
    assert rows(found) == [(hard, [None] * 5)]


def test_the_classes_of_words_are_counted_by_word(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(JSON)
    found = open_transfer_set(f"table:{tmp_path}/x.jsonl?words=tokens")
    assert described(found) == "2 classes: B-X 1, O 1; 1 words without a tag; 3 words in 3 samples"


def test_a_table_that_is_a_file_of_words_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("a O\nb B-X\n\nc O\n")
    with pytest.raises(ConfigError) as caught:
        open_transfer_set(f"table:{tmp_path}/x.conll")
    assert len(open_transfer_set(caught.value.tip.removeprefix("read it as "))) == 2

"""Texts as tokens: ids are the tokenizer's, each token carries loss in one window alone, prompts carry none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_world import CHATS, TEXTS, count_of, save_chat, save_tokenizer, write_texts

from softcache.data.identity import item_digest, pixel_digest
from softcache.data.rendering import Vocabulary, read_vocabulary
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import SoftcacheError
from softcache.tokens import Tokens

LONG = " the cat sat on the mat in the rain" * 3


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tok").parent


def opened(path: Path, tokenizer: Path, **parameters: Any) -> TransferSet:
    more = "".join(f"&{name}={value}" for name, value in parameters.items())
    return open_transfer_set(f"text:{path}?tokenizer={tokenizer}{more}")


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids_of(tokenizer: Path, text: str) -> list[int]:
    """By the library itself, nothing put around."""
    from tokenizers import Tokenizer

    found: list[int] = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return found


def named(tokenizer: Path, *tokens: str) -> list[int]:
    from tokenizers import Tokenizer

    return [Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id(token) for token in tokens]


def test_a_folder_is_a_text_a_file_with_bos_and_eos(tmp_path: Path, tokenizer: Path) -> None:
    data = opened(write_texts(tmp_path / "docs"), tokenizer)
    assert list(data.keys) == ["deep/t1.txt", "deep/t3.txt", "deep/t5.txt", "t0.txt", "t2.txt", "t4.txt"]
    (bos, eos), (item, following) = named(tokenizer, "<s>", "</s>"), data[3]
    wanted = ids_of(tokenizer, TEXTS[0])
    assert item.ids.tolist() == [bos, *wanted, eos] and item.ids.dtype == np.int32
    assert item.trains.tolist() == [False, *[True] * (len(wanted) + 1)]
    assert following.tolist() == [*wanted, eos] and item.listed.tolist() == list(range(len(wanted) + 1))
    empty, _ = data[1]
    assert empty.ids.tolist() == [bos, eos] and empty.listed.tolist() == [0]
    assert data.num_classes == count_of(tokenizer / "tokenizer.json") == max(bos, eos) + 1
    assert (data.rendering is not None) and data.rendering.facts() == {"bos": "<s>", "eos": "</s>"}
    assert str(tmp_path) not in data.name


def test_bos_and_eos_are_what_the_user_says(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a dog")
    item, _ = opened(path, tokenizer, bos="none", eos="none")[0]
    assert item.ids.tolist() == ids_of(tokenizer, "a dog") and item.listed.tolist() == [0, 1, 2][: len(item) - 1]
    item, _ = opened(path, tokenizer, bos="</s>", eos="<s>")[0]
    assert item.ids[[0, -1]].tolist() == named(tokenizer, "</s>", "<s>")


def test_a_cut_text_gets_no_eos_and_what_is_cut_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("the cat sat on the mat")
    whole = ids_of(tokenizer, "the cat sat on the mat")
    data = opened(path, tokenizer, max_tokens=4)
    assert data[0][0].ids.tolist()[1:] == whole[:4] and data.positions is not None
    assert data.positions.cut is not None and data.positions.cut.tolist() == [len(whole) - 4]
    exact = opened(path, tokenizer, max_tokens=len(whole))
    assert exact[0][0].ids.tolist()[1:] == [*whole, *named(tokenizer, "</s>")]


@pytest.mark.parametrize("bos", ["<s>", "none"])
@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, 3), (5, 1), (9, 6), (64, 0), (1000, 0)])
def test_each_token_is_foretold_once_whatever_the_windows(
    tmp_path: Path, tokenizer: Path, bos: str, window: int, stride: int
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(LONG)
    data = opened(path, tokenizer, window=window, bos=bos, **({"stride": stride} if stride else {}))
    whole = [*ids_of(tokenizer, LONG), *named(tokenizer, "</s>")]
    before = 0 if bos == "none" else 1
    keys = ["long.txt"] if len(data) == 1 else [f"long.txt#w{number}" for number in range(len(data))]
    assert list(data.keys) == keys
    step, at, foretold = stride or window - before - 1, 0, []
    for number in range(len(data)):
        item, following = data[number]
        own = item.ids[before:].tolist()
        assert len(item) <= window and own == whole[at : at + len(own)]
        assert item.ids[:before].tolist() == named(tokenizer, "<s>")[:before]
        foretold += [at + i + 1 - before for i in item.listed.tolist()]
        assert following.tolist() == [item.ids[i + 1] for i in item.listed.tolist()]
        at += step
    # every token once, in order; without BOS nothing stands before the first one
    assert foretold == list(range(1 - before, len(whole)))


def test_only_what_begins_behind_the_prompt_carries_loss(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"prompt": "the cat", "completion": " sat on"},
        {"prompt": "the cat ", "completion": "sat on"},  # the space of " sat" is the prompt's
        {"prompt": "the ca", "completion": "t sat"},
        {"prompt": "", "completion": "a dog"},
        {"prompt": "a dog", "completion": ""},
    ]
    data = opened(lines(tmp_path / "p.jsonl", *rows), tokenizer)
    from tokenizers import Tokenizer

    made, carried = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), []
    for number, row in enumerate(rows):
        item, _ = data[number]
        ids = ids_of(tokenizer, row["prompt"] + row["completion"])
        assert item.ids.tolist()[1:-1] == ids
        carried.append([made.decode([int(one)]) for one in item.ids[item.trains][:-1]])
        assert item.trains[-1]  # EOS
    assert carried == [[" sat", " on"], [" on"], [" sat"], ["a", " dog"], []]
    assert list(data.keys) == [f"p.jsonl/{number:06d}" for number in range(5)]


def test_lines_and_named_rows(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("a dog\n\n  \nthe cat\r\n")
    assert list(opened(path, tokenizer, document="line").keys) == ["many.txt/000000", "many.txt/000003"]
    named_rows = lines(tmp_path / "k.jsonl", {"text": "a dog", "id": "x"}, {"text": "the cat", "id": 7})
    assert list(opened(named_rows, tokenizer, key="id").keys) == ["x", "7"]


def test_digests_are_of_ids_and_of_what_carries_loss() -> None:
    ids, trains = np.array([5, 6, 7], np.int32), np.array([False, True, True])
    item = Tokens(ids, trains)
    as_array = np.array([[5, 6, 7], [0, 1, 1]], "<i4")
    assert item_digest(item) == item_digest(as_array) and pixel_digest(item) == pixel_digest(as_array)
    others = [Tokens(ids, np.array([False, False, True])), Tokens(ids[::-1].copy(), trains)]
    assert len({pixel_digest(one) for one in (item, *others)}) == 3


def test_the_vocabulary_counts_holes(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tok")
    found, config = read_vocabulary(str(path))
    assert found.count == count_of(path) > len(found.ids) and config["eos_token"] == "</s>"
    assert found.sha256 == Vocabulary(path.read_bytes()).sha256


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"window": 2}, "leaves no room"),
        ({"stride": 3}, "without window="),
        ({"window": 8, "stride": 7}, "asked of nobody"),
        ({"eos": "<end>"}, "has no such token"),
        ({"max_tokens": -1}, "below 0"),
        ({"key": "id"}, "is of JSON lines"),
    ],
)
def test_parameters_that_cannot_be_are_refused(
    tmp_path: Path, tokenizer: Path, parameters: dict[str, Any], said: str
) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a dog")
    with pytest.raises(SoftcacheError, match=said):
        opened(path, tokenizer, **parameters)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "the first line has none"),
        ({"prompt": "a"}, "has the fields 'prompt'"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "has the fields"),
        ({"text": 3}, "its text is int"),
        (["a"], "no JSON object"),
    ],
)
def test_rows_that_hold_no_text_are_named(tmp_path: Path, tokenizer: Path, row: object, said: str) -> None:
    with pytest.raises(SoftcacheError, match=said) as found:
        opened(lines(tmp_path / "r.jsonl", {"text": "a dog"}, row), tokenizer)
    assert "line 2" in found.value.message


def test_a_tokenizer_that_does_not_say_what_ends_a_text_is_asked(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer_config.json").unlink()
    text = tmp_path / "one.txt"
    text.write_text("a dog")
    with pytest.raises(SoftcacheError, match="which token ends a text"):
        open_transfer_set(f"text:{text}?tokenizer={path}")
    with pytest.raises(SoftcacheError, match="without tokenizer="):
        open_transfer_set(f"text:{text}")
    assert len(open_transfer_set(f"text:{text}?tokenizer={path}&eos=none")) == 1


def test_a_selection_keeps_the_positions_of_its_samples(tmp_path: Path, tokenizer: Path) -> None:
    data = opened(write_texts(tmp_path / "docs"), tokenizer, max_tokens=3)
    chosen = data.select(np.array([4, 0]))
    assert chosen.positions is not None and chosen.positions.lengths.tolist() == [len(data[4][0]), len(data[0][0])]
    assert chosen.positions.listed is not None
    assert chosen.positions.listed.tolist() == [*data[4][0].listed, *data[0][0].listed]
    assert chosen[0][1].tolist() == data[4][1].tolist() and chosen.num_classes == data.num_classes


TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": " sat on"},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": " the mat"},
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["turns", "marked"])
def test_of_messages_the_answers_carry_loss(tmp_path: Path, kind: str) -> None:
    folder = save_chat(tmp_path / "chat", CHATS[kind])
    data = opened(lines(tmp_path / "m.jsonl", {"messages": TALK}), folder)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    item, _ = data[0]
    assert item.ids.tolist() == theirs.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    carried = "".join(theirs.decode([int(one)]) for one in item.ids[item.trains])
    assert carried == " sat on</s> the mat</s>"
    assert data.rendering is not None
    facts = data.rendering.facts()
    assert facts["template"] == hashlib.sha256(CHATS[kind].encode()).hexdigest() and facts["loss"] == "assistant"
    assert (facts["bos"], facts["eos"]) == ("none", "none")


def test_letters_of_a_special_token_in_a_text_are_told(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library reads them as that token: an end of text in its midst."""
    rows = [{"text": "the cat"}, {"text": "the </s> cat"}, {"prompt": "<s> a", "completion": " dog"}]
    data = opened(lines(tmp_path / "a.jsonl", *rows), tokenizer)
    (eos,) = named(tokenizer, "</s>")
    assert data[1][0].ids.tolist()[:-1].count(eos) == 1
    told = capsys.readouterr().err
    assert (
        "2 texts hold the letters of a special token, such as '</s>'" in told
        and "a.jsonl/000001, a.jsonl/000002" in told
    )
    opened(lines(tmp_path / "b.jsonl", rows[0]), tokenizer)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_messages_whose_answers_nobody_can_tell_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    talk = lines(tmp_path / "m.jsonl", {"messages": TALK})
    with pytest.raises(SoftcacheError, match="otherwise when more follows"):
        opened(talk, save_chat(tmp_path / "chat", CHATS["forgetful"]))
    with pytest.raises(SoftcacheError, match="it has no chat templates"):
        opened(talk, save_chat(tmp_path / "none", ""))
    folder = save_chat(tmp_path / "turns", CHATS["turns"])
    with pytest.raises(SoftcacheError, match=r"a tokenizer\.json has none"):
        opened(talk, folder / "tokenizer.json")
    with pytest.raises(SoftcacheError, match=r"line 2: has no messages"):
        opened(lines(tmp_path / "x.jsonl", {"messages": TALK}, {"text": "a"}), folder)
    with pytest.raises(SoftcacheError, match="nothing carries loss"):
        opened(lines(tmp_path / "y.jsonl", {"messages": TALK[:1]}), folder)

"""What a model does not read of its texts is counted, told by dump and train, and kept in run, provenance and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softcache import dump, train
from softcache.config import DumpConfig, TrainConfig
from softcache.models import ImageInput, TextInput, TokenizerInput
from softcache.models.left_out import LeftOut, left_out

WORDS = ("a", "bee", "sees", "cat")
TEXTS = ["a bee", "A cat sees a bee.", "dog", "", "a " * 9]


def test_what_is_cut_and_unknown_is_counted_by_hand() -> None:
    """Tokens 2, 6 (the full stop is one), 1, 0, 9; of those that are read the full stop is cut off and `dog` unknown."""
    found = left_out(TextInput(WORDS, max_tokens=5), TEXTS)
    assert found == LeftOut(texts=5, cut=2, tokens=18, lost=1 + 4, unknown=1, most=5)
    assert found.is_worth_telling
    assert found.text() == (
        "2 of 5 texts (40.0 %) are longer than its 5 tokens, and 27.8 % of all tokens are left out; "
        "7.7 % of the tokens that it reads are unknown to it"
    )


def test_nothing_is_told_where_nothing_is_left_out() -> None:
    found = left_out(TextInput(WORDS, max_tokens=9), ["a bee", "a cat"])
    assert found is not None
    assert not found.is_worth_telling
    assert found.text() == "nothing of 2 texts is left out"
    many = left_out(TextInput(WORDS, max_tokens=200), ["a bee sees " * 40, "dog"])
    assert many is not None and many.unknown == 1 and not many.is_worth_telling  # one of a hundred and more
    assert left_out(ImageInput(3), []) is None


def test_a_tokenizers_special_tokens_take_room_too() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra softcache[text]")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "bee": 4, "cat": 5}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    taken = TokenizerInput(made.to_str(), ("input_ids",), max_tokens=5, pad_id=0)
    texts = ["a bee", "a cat a bee dog", "dog dog"]  # 4, 7 and 4 tokens; of the second [CLS] a cat a [SEP] are read
    assert left_out(taken, texts) == LeftOut(texts=3, cut=1, tokens=15, lost=2, unknown=2, most=5)
    assert [len(row) for row in taken.collate(texts)["input_ids"]] == [5, 5, 5]
    unlimited = left_out(TokenizerInput(made.to_str(), ("input_ids",), max_tokens=None, pad_id=0), texts)
    assert unlimited == LeftOut(texts=3, cut=0, tokens=15, lost=0, unknown=3, most=None)


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(None, id="nothing"),
        pytest.param({"texts": 1}, id="too little"),
        pytest.param({"texts": "<b>", "cut": 1, "tokens": 1, "lost": 1, "unknown": 1, "most": 1}, id="text"),
        pytest.param({"texts": 1, "cut": 1, "tokens": 1, "lost": 1, "unknown": 1, "most": [1]}, id="a list"),
    ],
)
def test_somebody_elses_provenance_is_read_with_care(told: Any) -> None:
    assert LeftOut.from_json(told) is None
    own = LeftOut(5, 2, 18, 5, 1, None)
    assert LeftOut.from_json(json.loads(json.dumps(own.to_json()))) == own


CODE = """
class Texts(list):
    class_names = ("no", "yes")
    sample_keys = [f"text/{i}" for i in range(30)]


def texts():
    return Texts(("a bee sees a cat and " * (1 + i % 3) + f"number {i % 3}", i % 2) for i in range(30))
"""


def test_dump_train_run_provenance_and_card_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of 8, 14 and 20 tokens, of which ten are read: 20 of 30 are cut, by 4 or by 10."""
    world = tmp_path / "world.py"
    world.write_text(CODE)
    student = "softcache:textcnn?max_tokens=10&width=4&embedding=4"
    settings: dict[str, Any] = {"data": f"{world}:texts", "threads": 1}
    told = "20 of 30 texts (66.7 %) are longer than its 10 tokens, and 33.3 % of all tokens are left out"
    config = TrainConfig(student=student, out=str(tmp_path / "run"), loss=("ce",), epochs=1, **settings)
    train.run(config, quiet=False)
    assert f"the student: {told}" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["left_out"]["cut"] == 20
    cache = DumpConfig(teacher=(str(tmp_path / "run"),), out=str(tmp_path / "cache"), workers=0, **settings)
    dump.run(cache, quiet=False)
    assert f"teacher 'run': {told}" in capsys.readouterr().err
    assert json.loads((tmp_path / "cache/provenance.json").read_text())["left_out"]["run"]["lost"] == 10 * 4 + 10 * 10
    assert f"it did not read everything: {told}" in (tmp_path / "cache/README.md").read_text()
    # an extension by a teacher that reads everything keeps what was told of the first
    whole = TrainConfig(
        student=student.replace("10", "40"), out=str(tmp_path / "all"), loss=("ce",), epochs=1, **settings
    )
    train.run(whole, quiet=True)
    assert "left_out" not in json.loads((tmp_path / "all/run.json").read_text())
    more = DumpConfig(teacher=(str(tmp_path / "all"),), out=str(tmp_path / "cache"), workers=0, extend=True, **settings)
    dump.run(more, quiet=True)
    card = (tmp_path / "cache/README.md").read_text()
    assert card.count("it did not read everything") == 1

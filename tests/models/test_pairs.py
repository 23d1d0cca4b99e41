"""Pairs of texts as items: what the text models read of them, and the whole way from a dump to an export."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QuickDump

import softcache
from softcache import cli
from softcache.data.images import to_tensor
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ContentMismatchError, DataError, JoinError
from softcache.models import ImageInput, TextInput, VectorInput, build_vocabulary, load_model
from softcache.models.inputs import SEPARATOR, AnyInput, is_text
from softcache.models.left_out import LeftOut, left_out

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from columns import Frame

WORDS = (SEPARATOR, "a", "bee", "sees", "cat")
PAIRS = [("a bee", "a cat sees"), ("", "dog"), ["a " * 9, "bee"]]


def test_a_pair_is_read_with_a_separator_between_its_texts() -> None:
    taken = TextInput(WORDS, max_tokens=12)
    assert taken.collate(PAIRS).tolist() == [
        [3, 4, 2, 3, 6, 5, 0, 0, 0, 0, 0],
        [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 4],
    ]


def test_the_longer_text_of_a_pair_is_cut_first() -> None:
    """Against taking one token after the other from the longer one."""
    draw = random.Random(0)
    for _ in range(300):
        first, second, most = draw.randint(0, 9), draw.randint(0, 9), draw.randint(1, 12)
        left = [first, second]
        while sum(left) + 1 > most:
            left[left[0] <= left[1]] -= 1
        (row,) = TextInput(WORDS, max_tokens=most).collate([("a " * first, "bee " * second)]).tolist()
        assert row == [3] * left[0] + [2] + [4] * left[1]


def test_what_is_left_out_of_pairs_is_counted_by_hand() -> None:
    """Tokens 6, 2 and 11, of which five are read; the `dog` is unknown, and of the first pair `sees` is cut off."""
    found = left_out(TextInput(WORDS, max_tokens=5), PAIRS)
    assert found == LeftOut(texts=3, cut=2, tokens=19, lost=1 + 6, unknown=1, most=5)


def test_a_vocabulary_of_pairs_begins_with_the_separator() -> None:
    assert build_vocabulary([("b a", "a"), ("a", "b")]) == [SEPARATOR, "a", "b"]
    assert build_vocabulary(["b a", "a b a"]) == ["a", "b"]
    assert SEPARATOR not in build_vocabulary([f"{SEPARATOR} {SEPARATOR}"])


def test_items_that_are_no_pairs_are_told() -> None:
    taken = TextInput(WORDS)
    with pytest.raises(DataError, match="some items are pairs of texts and some are single"):
        taken.collate([("a", "b"), "a"])
    with pytest.raises(DataError, match="strings, found tuple"):
        taken.collate([("a", "b", "c")])
    with pytest.raises(
        DataError, match=r"pairs of texts, and the model's vocabulary was made of single ones\n.*\[SEP\]"
    ):
        TextInput(WORDS[1:]).collate([("a", "b")])
    with pytest.raises(DataError, match="numbers, found a text"):
        VectorInput().collate([("a", "b")])
    with pytest.raises(DataError, match="images, found a text"):
        ImageInput().collate([("a", "b")])
    with pytest.raises(DataError, match="the items are texts"):
        AnyInput().collate([("a", "b")])
    with pytest.raises(DataError, match="a view policy needs uint8 images"):
        to_tensor(("a", "b"))
    assert is_text(["a", "b"]) and not is_text(("a", 1)) and not is_text(("a",))


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ten pairs; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    rows = [
        (" ".join(draw.choice(["a", "bee", "sees", "cat"], 5)), draw.choice(["a bee", "no cat"])) for _ in range(24)
    ]
    lines = [{"premise": one, "hypothesis": two, "label": int(i % 3)} for i, (one, two) in enumerate(rows)]
    Path("nli.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "table:nli.jsonl?text=premise,hypothesis"


@pytest.mark.parametrize(
    ("network", "export"),
    [
        pytest.param("textcnn?width=4&embedding=4", False, id="textcnn"),
        pytest.param("encoder?width=4&layers=1&heads=1&hidden=4", True, id="encoder", marks=pytest.mark.slow),
    ],
)
def test_pairs_go_the_whole_way(pairs: str, network: str, export: bool, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--data", pairs, "--threads", "1", "--workers", "0"]
    train = ["train", *few, "--student", f"softcache:{network}&max_tokens=7", "--epochs", "1", "--quiet"]
    assert cli.main([*train, "--out", "teacher"]) == 0
    assert cli.main(["dump", *few, "--teacher", "teacher", "--codec", "float32", "--out", "cache"]) == 0
    assert "24 of 24 texts (100.0 %) are longer than its 7 tokens" in capsys.readouterr().err
    assert cli.main([*train, "--cache", "cache", "--out", "student"]) == 0
    assert cli.main(["eval", "student", "--data", pairs, "--threads", "1"]) == 0
    data = open_transfer_set(pairs)
    model = load_model("teacher", num_classes=3, class_names=data.class_names).eval()
    items = [data[i][0] for i in range(24)]
    assert items[0] == (json.loads(Path("nli.jsonl").read_text().split("\n")[0])["premise"], items[0][1])
    joined = softcache.open("cache").join(data)
    stored = joined.gather_samples(torch.arange(24), torch.zeros(24, dtype=torch.int64)).logits("teacher")
    with torch.no_grad():
        torch.testing.assert_close(stored, model(model.input.collate(items)), atol=1e-5, rtol=1e-5)
    if not export:
        return
    assert cli.main(["export", "student", "--data", pairs, "--to", "program", "--threads", "1"]) == 0
    assert "2 stands between the texts of a pair" in capsys.readouterr().out


def test_a_table_of_pairs_joins_by_two_columns(pairs: str, quick_dump: QuickDump) -> None:
    Path("t.py").write_text("def teacher(): return lambda pairs: [[len(a), len(b), 0.5] for a, b in pairs]")
    cache = quick_dump(pairs, ["t.py:teacher"])
    rows = [json.loads(line) for line in Path("nli.jsonl").read_text().split("\n")]
    columns = {name: [row[name] for row in rows] for name in rows[0]} | {
        "id": [f"nli.jsonl/{i:06d}" for i in range(24)]
    }
    table = Frame(columns)
    joined = cache.join(table, key="id", item="premise,hypothesis", check_content="full")
    sample, *_ = joined[3]
    assert (sample["premise"], sample["hypothesis"]) == (rows[3]["premise"], rows[3]["hypothesis"])
    assert joined.as_pair()[3][0] == (rows[3]["premise"], rows[3]["hypothesis"])
    with pytest.raises(ContentMismatchError):
        cache.join(table, key="id", item="hypothesis,premise", check_content="full")
    with pytest.raises(JoinError, match="no column 'hypothesys'"):
        cache.join(table, key="id", item="premise,hypothesys")


def test_views_of_pairs_are_refused(pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    student = ["--student", "softcache:textcnn?width=4&embedding=4", "--epochs", "1", "--out", "run"]
    assert cli.main(["train", "--data", pairs, *student, "--policy", "crop_flip"]) == 2
    assert "a view policy needs uint8 images" in capsys.readouterr().err

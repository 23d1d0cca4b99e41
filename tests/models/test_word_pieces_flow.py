"""transformers' taggers from a cache to a student: teacher and student of different tokenizers, on the same words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QuickDump

from softcache import cli
from softcache.data.transfer_set import open_transfer_set
from softcache.models import load_model

pytest.importorskip("transformers", reason="needs the extra softcache[text]")

from test_word_pieces import CLASSES, bert

QUIET = ["--quiet", "--threads", "1", "--workers", "0", "--epochs", "2", "--optimizer", "adamw", "--lr", "0.01"]


def words_file(path: Path) -> str:
    """Twenty-four sentences of words that the tokenizer knows, cuts, and does not know."""
    draw, known = np.random.default_rng(0), ["a", "film", "filmed", "goodly", "zzz", ".", "the"]
    lines = []
    for _ in range(24):
        words = draw.choice(known, int(draw.integers(1, 5))).tolist()
        lines.append(json.dumps({"words": words, "tags": [CLASSES[len(word) % 3] for word in words]}))
    path.write_text("\n".join(lines) + "\n")
    return f"table:{path}?words=words&tags=tags&classes={','.join(CLASSES)}"


@pytest.mark.slow
@pytest.mark.parametrize("align", ["first", "mean"])
def test_its_words_are_dumped_and_learned_by_students_of_any_tokenizer(
    quick_dump: QuickDump, tmp_path: Path, align: str
) -> None:
    data = words_file(tmp_path / "w.jsonl")
    folder = bert(tmp_path / "bert")
    cache = quick_dump(data=data, teacher=[f"hf:{folder}?align={align}"], batch_size=7)
    found = open_transfer_set(data)
    model = load_model(f"hf:{folder}?align={align}", num_classes=3, class_names=CLASSES).eval()
    with torch.no_grad():  # each sentence alone
        wanted = torch.cat([model(model.input.collate([found[i][0]])) for i in range(len(found))])
    targets = cache.gather(cache.find(list(found.keys)), np.zeros(len(found), np.int64))
    torch.testing.assert_close(targets.flat(), wanted, rtol=1e-5, atol=1e-5)
    assert cache.manifest.plan.members[0].input == {"align": align}
    path = str(cache.reader.path)
    for student, name in ((f"hf:{folder}?align=first", "own"), ("softcache:tagger?width=4&embedding=4", "small")):
        out = str(tmp_path / name)
        common = ["--cache", path, "--data", data, "--student", student, "--loss", "kd", "--loss", "ce", "--out", out]
        assert cli.main(["train", *common, *QUIET]) == 0
        assert (
            cli.main(["eval", out, "--data", data, "--cache", path, "--quiet", "--threads", "1", "--workers", "0"]) == 0
        )
    again = str(tmp_path / "again")  # a run folder stands for its model, and begins another one
    begun = ["--student", f"hf:{folder}?align=first", "--init-from", str(tmp_path / "own"), "--out", again]
    assert cli.main(["train", "--data", data, *begun, *QUIET]) == 0
    assert cli.main(["export", again, "--data", data, "--out", str(tmp_path / "x.onnx"), "--quiet"]) == 2

"""transformers' classifiers made smaller, and opened again without the folder that they came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra softcache[text]")
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from softcache.config import ShrinkConfig, TrainConfig
from softcache.models import load_model
from softcache.models.fake_quantise import quantised_layers
from softcache.students import cost, shrink
from softcache.train import flow

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, num_labels=2, **SIZES)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def written(path: Path) -> Path:
    texts = ["a b", "c d a", "b", "d d d", "a", "c"]
    path.write_text("".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))
    return path


@pytest.mark.slow
def test_a_bert_is_made_smaller_by_each_method(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    texts = written(tmp_path / "texts.tsv")
    copied = Path(shutil.copytree(bert, tmp_path / "copied"))
    by = ("carve:depth=0.5", "prune:structured,amount=0.5", "lowrank:energy=0.9", "prune:unstructured,amount=0.5")
    config = ShrinkConfig(
        f"hf:{copied}",
        by,
        str(tmp_path / "out"),
        data=f"tsv:{texts}?text=0&label=1",
        batch_size=4,
        threads=1,
        device="cpu",
    )
    result = shrink.run(config, quiet=True)
    shutil.rmtree(copied)
    model = load_model(str(tmp_path / "out"), num_classes=2).eval()
    assert model.shrunk is not None
    assert model.shrunk.cut == ("bert.encoder.layer.1", "bert.encoder.layer.2")
    assert {len(sides["out"]) for name, sides in model.shrunk.kept.items() if "intermediate" in name} == {24}
    assert model.shrunk.factors and "classifier" not in model.shrunk.factors
    assert result.after.parameters < 0.6 * result.before.parameters
    assert model(model.input.collate(["a b", "c"])).shape == (2, 2)


@pytest.mark.slow
def test_a_bert_is_pruned_and_quantised_while_it_learns(bert: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bert, tmp_path / "copied"))
    stages = ("epochs=1 prune='unstructured:amount=0.5'", "epochs=1 quantise=int8")
    data = f"tsv:{written(tmp_path / 'texts.tsv')}?text=0&label=1"
    config = TrainConfig(
        student=f"hf:{copied}",
        out=str(tmp_path / "out"),
        data=data,
        stage=stages,
        batch_size=3,
        threads=1,
        device="cpu",
    )
    flow.run(config, quiet=True)
    shutil.rmtree(copied)
    model = load_model(str(tmp_path / "out"), num_classes=2).eval()
    layers = dict(quantised_layers(model.net))
    assert len(layers) == 4 * 6 + 2  # of each block; the pooler and the classifier
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    assert zeros >= 0.49 * sum(layer.weight.numel() for layer in layers.values())
    assert model(model.input.collate(["a b", "c"])).shape == (2, 2)

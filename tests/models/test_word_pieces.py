"""transformers' token classifiers on words: the logits that transformers gives of each word's pieces, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softcache.errors import ConfigError, DataError, ModelError, SoftcacheError
from softcache.models import Model, describe_model, load_model, save_student
from softcache.words import Words

pytest.importorskip("transformers", reason="needs the extra softcache[text]")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertTokenizer,
    GPT2Config,
    GPT2ForTokenClassification,
    PreTrainedTokenizerFast,
)

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "##ly", "##ed", "good", ".", "the"]
CLASSES = ("B-X", "I-X", "O")
SAMPLES = [
    Words(["a", "goodlyed", "film", "."]),
    Words(),
    Words(["filmed", "Filmly", "zzz", "\u200b", "the.film"]),  # cut, unknown, vanished, cut in two by its dot
    Words(["[SEP]", "a"]),
]


def bert(
    folder: Path, *, classes: tuple[str, ...] = CLASSES, kind: Any = BertForTokenClassification, **sizes: Any
) -> Path:
    told = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    told = told if kind is BertForTokenClassification else {}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    net = kind(BertConfig(vocab_size=len(PIECES), max_position_embeddings=14, **small | sizes, **told))
    with torch.no_grad():
        for value in net.parameters():
            value.mul_(3)  # so that logits differ between words
    net.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(PIECES)}, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT that tags words."""
    return bert(tmp_path_factory.mktemp("pieces") / "bert")


def loaded(spec: str, **settings: Any) -> Model:
    return load_model(spec, num_classes=3, class_names=CLASSES, **settings).eval()


def logits_of(model: Model, samples: list[Words]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(model.input.collate(samples))
    return found


def by_hand(folder: Path, words: Words, align: str, cut: dict[str, list[int]]) -> list[Tensor]:
    """Logits of each word of one sample: piece ids written by hand, one text at a time, no padding."""
    net = AutoModelForTokenClassification.from_pretrained(folder).eval()
    ids, places = [2], []
    for word in words:
        places.append(range(len(ids), len(ids) + len(cut[word])))
        ids += cut[word]
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([[*ids, 3]])).logits[0]
    return [logits[next(iter(p))] if align == "first" else logits[list(p)].double().mean(0).float() for p in places]


CUT = {
    "a": [4], "goodlyed": [8, 6, 7], "film": [5], ".": [9], "filmed": [5, 7], "Filmly": [5, 6], "zzz": [1], "\u200b": [1],
    "the.film": [10, 9, 5], "[SEP]": [3],
}  # fmt: skip


@pytest.mark.parametrize("align", ["first", "mean"])
def test_a_word_has_the_logits_that_transformers_gives_its_pieces(saved: Path, align: str) -> None:
    model = loaded(f"hf:{saved}?align={align}")
    wanted = torch.stack([row for words in SAMPLES for row in by_hand(saved, words, align, CUT)])
    found = logits_of(model, SAMPLES)
    assert found.shape == (11, 3) and model.gives == "words" and model.class_names == CLASSES
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    alone = torch.cat([logits_of(model, [words]) for words in SAMPLES])
    torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-5)
    assert logits_of(model, [Words()]).shape == (0, 3)


def test_a_saved_token_classifier_aligns_by_the_first_piece(saved: Path) -> None:
    told, first = loaded(f"hf:{saved}"), loaded(f"hf:{saved}?align=first")
    assert torch.equal(logits_of(told, SAMPLES), logits_of(first, SAMPLES)) and told.spec == first.spec
    other = loaded(f"hf:{saved}?align=mean")
    assert other.spec != first.spec and other.told_input == {"align": "mean"}
    assert not torch.allclose(logits_of(other, SAMPLES), logits_of(first, SAMPLES))


def test_pieces_are_those_that_transformers_gives_of_words(saved: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    model = loaded(f"hf:{saved}")
    for words in (one for one in SAMPLES if "\u200b" not in one):
        mine = model.input.collate([words])
        wanted = theirs(list(words), is_split_into_words=True)
        assert mine["input_ids"][0].tolist() == wanted["input_ids"]
        assert mine["words"][0].tolist() == [-1 if word is None else word for word in wanted.word_ids()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_stand_on_either_side(tmp_path: Path, side: str) -> None:
    folder = bert(tmp_path / "bert")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"padding_side": side}))
    model = loaded(f"hf:{folder}")
    batch = model.input.collate(SAMPLES)
    assert (batch["words"][3, 0] == -1) and (batch["attention_mask"][3, 0] == (side == "right"))
    if side == "right":  # else positions shift, as transformers shifts them
        alone = torch.cat([logits_of(model, [words]) for words in SAMPLES])
        torch.testing.assert_close(alone, logits_of(model, SAMPLES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("align", ["first", "mean"])
def test_a_trained_tagger_stands_for_itself(saved: Path, tmp_path: Path, align: str) -> None:
    model = loaded(f"hf:{saved}?align={align}")
    save_student(model, tmp_path / "student.safetensors", metadata={})
    again = load_model(str(tmp_path), num_classes=3, class_names=CLASSES).eval()  # the folder is not asked
    assert torch.equal(logits_of(again, SAMPLES), logits_of(model, SAMPLES))
    assert describe_model(again) == describe_model(model) and again.gives == "words"


def test_an_encoder_begins_as_a_tagger_with_a_new_classifier(tmp_path: Path) -> None:
    folder = bert(tmp_path / "mlm", kind=BertForMaskedLM)
    model = loaded(f"hf:{folder}?align=first")
    assert model.untrained == ("classifier.bias", "classifier.weight") and model.gives == "words"
    assert logits_of(model, SAMPLES).shape == (11, 3)
    with pytest.raises(ModelError, match="random numbers"):
        model.check_trained("it")


def test_longer_samples_are_refused_and_not_cut(saved: Path) -> None:
    model = loaded(f"hf:{saved}")
    assert logits_of(model, [Words(["a"] * 12)]).shape == (12, 3)  # and two special tokens are its 14 positions
    with pytest.raises(DataError, match="13 words has 15 pieces, and the model takes 14") as caught:
        model.input.collate([Words(["a"]), Words(["a"] * 13)])
    assert "--without" in caught.value.tip
    with pytest.raises(DataError, match="5 words has 7 pieces, and the model takes 6"):
        loaded(f"hf:{saved}?max_tokens=6").input.collate([Words(["a"] * 5)])


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("?align=last", ConfigError, "align"),
        ("?align=first&pooling=cls", ConfigError, "align=first and pooling=cls"),
        ("?align=first&prompt=x", ConfigError, "align=first and prompt=x"),
        ("?max_tokens=2", ConfigError, "leaves no room"),
        ("?max_tokens=15", ConfigError, "takes 14 at most"),
    ],
)
def test_specs_that_name_no_tagger(saved: Path, query: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error) as caught:
        loaded(f"hf:{saved}{query}")
    assert message in str(caught.value)


def test_other_classes_are_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="the weights have 3 classes, the data has 2"):
        load_model(f"hf:{saved}", num_classes=2, class_names=("O", "X"))


def test_texts_are_refused_by_a_tagger_of_words(saved: Path) -> None:
    with pytest.raises(DataError, match="a tagger takes words, found str"):
        loaded(f"hf:{saved}").input.collate(["a film"])


def bytes_tokenizer(*, prefix: bool, unknown: bool = True) -> PreTrainedTokenizerFast:
    """Letters, each with the space before it where there is one, as GPT-2 has them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<pad>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def test_a_decoder_whose_words_begin_with_a_space(tmp_path: Path) -> None:
    taken = bytes_tokenizer(prefix=True)
    net = GPT2ForTokenClassification(
        GPT2Config(vocab_size=len(taken), n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0)
    )
    net.save_pretrained(tmp_path)
    taken.save_pretrained(tmp_path)
    model = loaded(f"hf:{tmp_path}?align=mean")
    samples = [Words(["ab", "c"]), Words(["\u200b"])]
    batch = model.input.collate(samples)
    assert batch["words"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]  # a space, and the bytes of each letter
    assert logits_of(model, samples).shape == (3, 3)


def test_a_word_that_vanishes_without_an_unknown_token_is_refused(saved: Path) -> None:
    from dataclasses import replace

    taken = loaded(f"hf:{saved}").input
    with pytest.raises(DataError, match=r"leaves nothing of the word '\\u200b'"):
        replace(taken, unknown=None).collate([SAMPLES[2]])  # type: ignore[type-var]

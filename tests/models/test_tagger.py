"""The taggers: their formulas, a row for each word, of its text alone; and how words become numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, DataError, ModelError, SoftcacheError
from softcache.models import Model, initialise, load_model, save_student
from softcache.models.inputs import has_vocabulary, is_pair
from softcache.models.textcnn import build_vocabulary
from softcache.models.word_input import WordInput, case_of
from softcache.words import Words

SIZES = {"tagger": "?width=6&embedding=5&layers=2", "encoder_tagger": "?width=8&layers=2&heads=2&hidden=12&max_words=9"}
KNOWN = ("the", "cat", "sat", "on", "mat")
SAMPLES = [
    Words(["The", "cat", "sat"]),
    Words(),
    Words(["on", "MAT", "12.5", "?", "McX", "unseen", "the"]),
    Words(["cat"]),
]
CLASSES = ("O", "B", "I")


def made(name: str, seed: int = 0, **parameters: Any) -> Model:
    torch.manual_seed(seed)
    model = load_model(f"softcache:{name}{SIZES[name]}", num_classes=3, class_names=CLASSES, vocabulary=KNOWN)
    return model.eval()


def logits_of(model: Model, samples: list[Words]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(model.input.collate(samples))
    return found


def embedded(net: Any, words: Words) -> Tensor:
    """(L, D), summed by hand."""
    rows = []
    for word in words:
        low = word.lower()
        numbers = {
            "word": KNOWN.index(low) + 2 if low in KNOWN else 1,
            "ending": 1 + zlib.crc32(low[-3:].encode()) % 1024,
            "beginning": 1 + zlib.crc32(low[:3].encode()) % 1024,
            "case": {"The": 2, "MAT": 3, "12.5": 5, "?": 6, "McX": 4}.get(word, 1),
        }
        rows.append(sum(net.embedding.tables[name].weight[i] for name, i in numbers.items()))
    return torch.stack(rows)  # type: ignore[arg-type]


def of_bilstm(net: Any, x: Tensor) -> Tensor:
    """torch's own LSTM of two directions, on one text."""
    for layer in net.layers:
        both = nn.LSTM(x.shape[1], layer.onward.hidden_size, batch_first=True, bidirectional=True)
        state = dict(layer.onward.state_dict())
        state |= {f"{name}_reverse": value for name, value in layer.back.state_dict().items()}
        both.load_state_dict(state)
        x = both(x[None])[0][0]
    return x


def of_encoder(net: Any, x: Tensor) -> Tensor:
    """Without a mask, on one text."""
    x = (x + net.positions.weight[: len(x)])[None]
    for layer in net.layers:
        x = layer(x)
    return net.norm(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "oracle"), [("tagger", of_bilstm), ("encoder_tagger", of_encoder)])
def test_a_tagger_is_its_formula_on_each_text_alone(name: str, oracle: Callable[[Any, Tensor], Tensor]) -> None:
    model = made(name)
    with torch.no_grad():
        wanted = torch.cat([model.net.fc(oracle(model.net, embedded(model.net, words))) for words in SAMPLES if words])
    found = logits_of(model, SAMPLES)
    assert model.gives == "words" and found.shape == (11, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([logits_of(model, [one]) for one in SAMPLES]), found, rtol=1e-5, atol=1e-5)
    assert logits_of(model, [Words(), Words()]).shape == (0, 3)


@pytest.mark.parametrize("name", SIZES)
def test_gradients_reach_every_table_and_no_padding(name: str) -> None:
    model = made(name).train()
    model(model.input.collate(SAMPLES)).sum().backward()
    for parameter, value in model.net.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), parameter
        assert bool(value.grad.any()), parameter
    assert not any(table.weight.grad[0].any() for table in model.net.embedding.tables.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SIZES)
def test_a_saved_tagger_brings_its_words(name: str, tmp_path: Path) -> None:
    model = made(name)
    save_student(model, tmp_path / "student.safetensors", metadata={})
    again = load_model(str(tmp_path), num_classes=3, class_names=CLASSES).eval()
    assert torch.equal(logits_of(again, SAMPLES), logits_of(model, SAMPLES)) and again.spec == model.spec
    assert again.input == model.input
    other = load_model(f"softcache:{name}{SIZES[name]}", num_classes=3, vocabulary=("other", *KNOWN[1:]))
    with pytest.raises(ConfigError, match="trained with another vocabulary"):
        initialise(other, str(tmp_path))
    started = made(name, seed=5)
    initialise(started, str(tmp_path))
    assert torch.equal(logits_of(started.eval(), SAMPLES), logits_of(model, SAMPLES))


def test_two_words_are_no_pair_of_texts() -> None:
    assert is_pair(("a", "b")) and not is_pair(Words(["a", "b"])) and has_vocabulary(Words(["a", "b"]))


def test_a_vocabulary_of_words_cuts_no_word() -> None:
    samples = [Words(["New-York", "it's"]), Words(["new-york", "IT'S", "once"])]
    assert build_vocabulary(samples) == ["it's", "new-york"]


def test_cases_are_told_apart() -> None:
    found = [case_of(word) for word in ("the", "The", "THE", "McX", "a1", "--", "I", "İ", "été", "漢字")]
    assert found == [1, 2, 3, 4, 5, 6, 2, 2, 1, 1]


def test_longer_samples_are_refused_and_not_cut() -> None:
    model = made("encoder_tagger")
    assert logits_of(model, [Words("a" * 9)]).shape == (9, 3)
    with pytest.raises(DataError, match=r"10 words, and the model takes 9.*no answer") as caught:
        model.input.collate([Words(["a"]), Words("a" * 10)])
    assert "--without" in caught.value.tip and "max_words" in caught.value.tip
    assert WordInput(KNOWN).collate([Words("a" * 400)]).shape == (1, 400, 4)


@pytest.mark.parametrize(
    ("spec", "item", "message", "tip"),
    [
        ("softcache:tagger", "a text", "a tagger takes words, found str", "conll:PATH"),
        ("softcache:tagger", ("a", "pair"), "a tagger takes words, found tuple", "conll:PATH"),
        ("softcache:textcnn", Words(["a"]), "a text model takes strings, found", "softcache:tagger"),
        ("softcache:mlp", Words(["a"]), "takes numbers, found words", "softcache:tagger"),
        ("softcache:cnn", Words(["a"]), "takes images, found words", "softcache:tagger"),
    ],
)
def test_a_model_of_another_kind_names_the_right_one(spec: str, item: Any, message: str, tip: str) -> None:
    shape = (4,) if spec.endswith("mlp") else (8, 8, 3)
    model = load_model(spec, num_classes=2, vocabulary=KNOWN, input_shape=shape)
    with pytest.raises(DataError, match=message) as caught:
        model.input.collate([item])
    assert tip in caught.value.tip


@pytest.mark.parametrize(
    ("spec", "words", "error", "message"),
    [
        ("softcache:tagger", None, ModelError, "softcache:tagger needs a vocabulary"),
        ("softcache:tagger?width=0", KNOWN, ConfigError, "width=0"),
        ("softcache:encoder_tagger?width=9&heads=2", KNOWN, ConfigError, "multiple of heads"),
        ("softcache:encoder_tagger?dropout=1", KNOWN, ConfigError, "dropout"),
    ],
)
def test_taggers_that_cannot_be_built(spec: str, words: Any, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error) as caught:
        load_model(spec, num_classes=3, vocabulary=words)
    assert message in str(caught.value)


def test_a_network_of_a_users_says_that_it_gives_words() -> None:
    class Mine(nn.Module):
        gives = "words"

    class Odd(nn.Module):
        gives = "letters"

    from softcache.models import AnyInput

    assert Model(Mine(), AnyInput()).gives == "words" and Model(nn.Linear(1, 1), AnyInput()).gives == "sample"
    assert AnyInput().collate(SAMPLES) == SAMPLES
    with pytest.raises(ModelError, match="gives='letters'"):
        Model(Odd(), AnyInput())

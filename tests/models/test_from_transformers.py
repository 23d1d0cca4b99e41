"""transformers' sequence classifiers by their spec: what they take and give, what is kept of them, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QuickDump
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import softcache
from softcache import cli
from softcache.data.transfer_set import open_transfer_set
from softcache.dump.open_teachers import open_teacher
from softcache.dump.teacher import Teacher
from softcache.errors import ConfigError, DataError, MissingExtraError, ModelError, SoftcacheError
from softcache.features.taps import classifier_feature, classifier_of
from softcache.models import METADATA_KEY, Model, TokenizerInput, describe_model, initialise, load_model, save_student
from softcache.models.from_transformers import BESIDES
from softcache.models.left_out import left_out
from softcache.models.saved_metadata import check_config
from softcache.reproduce import flow as reproduce
from softcache.students.traced_program import Batch, trace

pytest.importorskip("transformers", reason="needs the extra softcache[text]")

import huggingface_hub.constants
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
)
from transformers.utils import logging

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "good",
    "bad",
    "very",
    "film",
    "##ly",
    "not",
    "but",
    ".",
    ",",
]
LONG = "a very very bad film , but not a bad film , very not bad . good"  # more tokens than there are positions
TEXTS = ["a good film .", "bad", "", LONG, "not badly , but XYZ", "good [SEP] Bad"]
CLASSES = ("x", "y", "z")
QUIET = ["--quiet", "--threads", "1", "--workers", "0"]


def bert_config(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 12, "num_labels": 3} | sizes | changes)


def tokenizer(*, words: list[str] = WORDS, **settings: Any) -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, **{"do_lower_case": True} | settings)


def save(folder: Path, net: Any, taken: Any) -> Path:
    """With parameters large enough for the logits to differ between texts."""
    torch.manual_seed(5)  # not all texts of one class
    for parameter in net.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    net.save_pretrained(folder)
    if taken is not None:
        taken.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT that classifies, and its tokenizer."""
    return save(tmp_path_factory.mktemp("hf") / "bert", BertForSequenceClassification(bert_config()), tokenizer())


@pytest.fixture
def bert(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "bert"))


@pytest.fixture
def here(bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the model in `bert`, texts in `texts.tsv`."""
    monkeypatch.chdir(bert.parent)
    rows = [f"{text}\t{i % 3}\n" for i, text in enumerate([*TEXTS, *reversed(WORDS[5:]), "a film", "a film , not bad"])]
    Path("texts.tsv").write_text("".join(rows))
    return bert.parent


def change(file: Path, **entries: Any) -> None:
    """Replace entries of a JSON file; None removes one."""
    told = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def lose(folder: Path, *names: str) -> None:
    """Take tensors out of the weights."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in names}, file, {"format": "pt"})


def live(folder: Path, texts: list[str], **settings: Any) -> Any:
    """What transformers itself makes of the texts in one batch."""
    taken = AutoTokenizer.from_pretrained(folder)
    if taken.model_max_length > 1000:  # nobody told it
        settings = {"max_length": 12} | settings
    batch = taken(texts, padding=True, truncation=True, return_tensors="pt", **settings)
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch, output_hidden_states=True)


def logits_of(model: Model, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return model.eval()(model.input.collate(texts))


def live_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Any:
    """As `live`, of pairs."""
    batch = AutoTokenizer.from_pretrained(folder)(
        [one for one, _ in pairs],
        [two for _, two in pairs],
        padding=True,
        truncation=True,
        max_length=12,
        return_tensors="pt",
    )
    with torch.no_grad():
        return batch, AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch)


def loaded(spec: str, **settings: Any) -> Model:
    return load_model(spec, **{"num_classes": 3, "class_names": CLASSES} | settings)


def teacher_of(spec: str, names: tuple[str, ...] = CLASSES) -> Teacher:
    return open_teacher(
        spec,
        taken=(),
        num_classes=len(names),
        class_names=names,
        multi_label=False,
        input_shape=None,
        device="cpu",
        autocast=None,
    )


# -------------------------------------------------------------------------------------------------- what it takes and gives


def test_pairs_are_read_as_transformers_reads_them(made: Path) -> None:
    pairs = [*zip(TEXTS, reversed(TEXTS), strict=True), ("", "a film"), ("a film " * 20, "a " * 9)]
    model = loaded(f"hf:{made}")
    batch, output = live_pairs(made, pairs)
    taken = model.input.collate(pairs)
    assert all(torch.equal(tensor, batch[name]) for name, tensor in taken.items()) and taken["token_type_ids"].any()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(taken), output.logits)
    one = left_out(model.input, pairs[-1:])
    assert one is not None and one.cut == 1 and one.tokens == 3 + 40 + 9 and one.lost == one.tokens - 12


def test_logits_are_those_of_transformers(made: Path) -> None:
    model = loaded(f"hf:{made}")
    batch = model.input.collate(TEXTS)
    assert list(batch) == ["input_ids", "token_type_ids", "attention_mask"]
    assert {tensor.shape for tensor in batch.values()} == {(6, 12)}
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [2, 3, 5, 6, 8, 12]  # the long one was cut, others padded
    wanted = live(made, TEXTS).logits
    assert torch.equal(logits_of(model, TEXTS), wanted) and wanted.std(0).min() > 0.3
    for text, row in zip(TEXTS, wanted, strict=True):  # a text alone, without the padding
        torch.testing.assert_close(logits_of(model, [text])[0], row, rtol=1e-4, atol=1e-5)


def test_it_computes_in_float32(made: Path, bert: Path) -> None:
    file = bert / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    change(bert / "config.json", dtype="bfloat16")
    model = loaded(f"hf:{bert}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_of(model, TEXTS), live(made, TEXTS).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("most", [3, 7])
def test_texts_are_cut_where_one_wants(made: Path, most: int) -> None:
    model = loaded(f"hf:{made}?max_tokens={most}")
    batch = model.input.collate([LONG, "bad"])
    assert batch["input_ids"].shape == (2, most) and batch["input_ids"][0, -1] == WORDS.index("[SEP]")
    assert torch.equal(logits_of(model, [LONG, "bad"]), live(made, [LONG, "bad"], max_length=most).logits)


def test_a_tokenizer_may_have_a_limit_of_its_own(bert: Path) -> None:
    tokenizer(model_max_length=6).save_pretrained(bert)
    assert torch.equal(logits_of(loaded(f"hf:{bert}"), [LONG]), live(bert, [LONG]).logits)
    assert loaded(f"hf:{bert}").input.collate([LONG])["input_ids"].shape == (1, 6)
    assert loaded(f"hf:{bert}?max_tokens=12").input.collate([LONG])["input_ids"].shape == (1, 12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_takes_what_its_tokenizer_gives(tmp_path: Path, side: str) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    taken = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[MASK]", padding_side=side, truncation_side=side,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=12, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    folder = save(tmp_path / "gpt2", GPT2ForSequenceClassification(config), taken)
    model, texts = loaded(f"hf:{folder}"), ["a good film .", "bad", LONG]
    assert model.input.collate(texts)["input_ids"][1].tolist().index(WORDS.index("bad")) == (
        11 if side == "left" else 0
    )
    assert torch.equal(logits_of(model, texts), live(folder, texts).logits)
    assert list(model.input.collate(texts)) == ["input_ids", "attention_mask"]
    assert logits_of(model, [""]).isfinite().all()  # no token at all: one of padding


def test_positions_that_begin_behind_the_padding_row(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, type_vocab_size=1, num_labels=3, pad_token_id=1,
    )  # fmt: skip
    words = ["[UNK]", "[PAD]", *WORDS[2:]]
    folder = save(tmp_path / "roberta", RobertaForSequenceClassification(config), tokenizer(words=words))
    model = loaded(f"hf:{folder}?max_tokens=10")  # of 12 rows two are not for tokens
    assert torch.equal(logits_of(model, [LONG, "bad"]), live(folder, [LONG, "bad"], max_length=10).logits)
    assert loaded(f"hf:{folder}").input == model.input
    with pytest.raises(ConfigError, match="max_tokens=11, the network takes 10 at most"):
        loaded(f"hf:{folder}?max_tokens=11")


def test_it_goes_to_a_spawned_worker(made: Path) -> None:
    model = loaded(f"hf:{made}")
    model.input.collate(TEXTS)
    again = pickle.loads(pickle.dumps(model.input.collate))
    assert all(
        torch.equal(a, b) for a, b in zip(again(TEXTS).values(), model.input.collate(TEXTS).values(), strict=True)
    )


# ------------------------------------------------------------------------------------------------------------ as a teacher


@pytest.mark.parametrize(
    ("names", "data", "order"),
    [
        (None, ("b", "c", "a"), None),  # LABEL_0, ...
        (("c", "a", "b"), ("a", "b", "c"), [1, 2, 0]),
        (("c", "a", "b"), ("c", "a", "b"), None),
        (("c", "a", "b"), ("0", "1", "2"), None),  # named by number
        (("2", "0", "1"), ("0", "1", "2"), [1, 2, 0]),  # these numbers are names
    ],
)
def test_classes_are_matched_by_name(
    bert: Path, names: tuple[str, ...] | None, data: tuple[str, ...], order: list[int] | None
) -> None:
    if names:
        change(bert / "config.json", id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    one = teacher_of(f"hf:{bert}", data)
    assert one.class_order == order
    found = one(one.collate(TEXTS)).logits
    wanted = live(bert, TEXTS).logits
    assert torch.equal(found, wanted if order is None else wanted[:, order])


def test_some_of_its_classes_are_chosen_by_name(bert: Path) -> None:
    change(bert / "config.json", id2label={0: "c", 1: "a", 2: "b"}, label2id={"c": 0, "a": 1, "b": 2})
    one = teacher_of(f"hf:{bert}", ("b", "c"))
    assert (one.match.columns, one.class_order) == ((2, 0), None)
    assert torch.equal(one(one.collate(TEXTS)).logits, live(bert, TEXTS).logits[:, [2, 0]])


def test_a_fingerprint_says_what_is_computed_and_not_where_it_lies(bert: Path, tmp_path: Path) -> None:
    first = teacher_of(f"hf:{bert}")
    assert first.name == "bert" and "/" not in first.model_spec
    moved = shutil.copytree(bert, tmp_path / "elsewhere" / "same")
    change(moved / "config.json", transformers_version="5.0.1", id2label={0: "x", 1: "y", 2: "z"}, architectures=None)
    save_student(loaded(f"hf:{bert}"), tmp_path / "student.safetensors", metadata={})
    same = [teacher_of(f"hf:{moved}"), teacher_of(str(tmp_path / "student.safetensors"))]
    assert {one.fingerprint for one in same} == {first.fingerprint}

    def changed(how: Any, query: str = "") -> str | None:
        folder = shutil.copytree(bert, tmp_path / "changed")
        how(folder)
        found = teacher_of(f"hf:{folder}{query}").fingerprint
        shutil.rmtree(folder)
        return found

    others = [
        changed(lambda folder: change(folder / "config.json", num_attention_heads=2)),
        changed(lambda folder: tokenizer(do_lower_case=False).save_pretrained(folder)),
        changed(lambda folder: None, "?max_tokens=11"),
        changed(lambda folder: save(folder, BertForSequenceClassification(bert_config(hidden_size=16)), None)),
    ]
    assert len({first.fingerprint, *others}) == 5


def test_a_cache_holds_the_live_logits_and_features(here: Path, quick_dump: QuickDump) -> None:
    layers = {
        "bert.encoder.layer.0:cls": 1,
        "bert.encoder:cls": 2,
        "bert.encoder.layer.1:mean_tokens": 2,
        "bert.pooler:flatten": None,
    }
    cache = quick_dump(data="tsv:texts.tsv", teacher=["hf:bert"], features=tuple(layers))
    transfer_set = open_transfer_set("tsv:texts.tsv")
    texts = [transfer_set.load(i)[0] for i in range(len(transfer_set))]
    everything = np.arange(len(texts))
    targets = cache.join(transfer_set).gather_samples(everything, 0 * everything, features=list(layers))
    # in the order of the dump, and one batch, as it was there: padding counts in mean_tokens
    wanted = live(here / "bert", texts)
    torch.testing.assert_close(targets.logits(), wanted.logits, rtol=1e-5, atol=1e-5)
    for name, layer in layers.items():
        if layer is None:
            model = loaded("hf:bert")
            state: Any = wanted.hidden_states[2][:, 0]
            kept = model.net.get_submodule("bert.pooler.dense")(state).tanh().detach()
        else:
            hidden = wanted.hidden_states[layer]
            kept = hidden[:, 0] if name.endswith("cls") else hidden.mean(1)
        torch.testing.assert_close(targets.feature(name), kept, rtol=2e-3, atol=2e-3)  # float16
    assert cache.member("bert").model == teacher_of("hf:bert").model_spec


def test_its_head_is_found(made: Path) -> None:
    model = loaded(f"hf:{made}").eval()
    batch = model.input.collate(TEXTS)
    head = classifier_of(model.net, batch)
    assert head is model.net.get_submodule("classifier")
    assert str(classifier_feature(model.net, batch, head)) == "dropout:flatten"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "features"), [("float16", ["dropout:flatten"]), ("linear_head:dtype=float16", [])], ids=["float", "head"]
)
def test_students_learn_from_its_cache(here: Path, codec: str, features: list[str]) -> None:
    """From its logits, and from what its classifier takes: as a feature, or as the codec stores it."""
    dump = ["dump", "--data", "tsv:texts.tsv", "--teacher", "hf:bert?name=tiny", "--codec", codec, "--for", "crd,simkd"]
    assert cli.main([*dump, "--out", "cache", *QUIET]) == 0
    cache = softcache.open("cache")
    assert cache.members == ("tiny",) and cache.classifier("tiny") is not None
    assert [feature.name for feature in cache.member("tiny").features] == features
    train = ["train", "--cache", "cache", "--data", "tsv:texts.tsv", "--optimizer", "adamw", "--lr", "0.01", *QUIET]
    student = [*train, "--student", "softcache:textcnn?width=16&embedding=16", "--batch-size", "6"]
    assert cli.main([*student, "--loss", "kd:temperature=2", "--epochs", "60", "--out", "run"]) == 0
    texts = [line.split("\t")[0] for line in Path("texts.tsv").read_text().splitlines()]
    found, wanted = (logits_of(loaded(spec, class_names=("0", "1", "2")), texts) for spec in ("run", "hf:bert"))
    assert (found.argmax(1) == wanted.argmax(1)).double().mean() > 0.6 and wanted.argmax(1).bincount().min() > 1
    simkd = [
        *train,
        "--student",
        "hf:bert?max_tokens=8",
        "--loss",
        "simkd:student=head",
        "--epochs",
        "1",
        "--out",
        "again",
    ]
    assert cli.main(simkd) == 0
    assert loaded("again", class_names=("0", "1", "2")).graft is not None


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_recipe_of_sst2_with_one_as_the_teacher(here: Path) -> None:
    data = [
        f"{name}=synthetic:texts?classes=3&count=48&split={split}"
        for name, split in (("train", "train"), ("test", "test"))
    ]

    def again() -> reproduce.Reproduced:
        return reproduce.run(
            "sst2",
            budget="smoke",
            data=data,
            models=["teacher=hf:bert?max_tokens=9"],
            only=["cnn-features"],
            out=here,
            quiet=True,
        )

    done = again()
    (path,) = done.folder.glob("cache-*/")
    cache = softcache.open(path)
    assert cache.members == ("teacher",) and cache.member("teacher").model.startswith(
        "hf:BertForSequenceClassification"
    )
    assert (done.done, done.reused) == (3, 0) and (again().done, again().reused) == (0, 3)
    state = load_file("bert/model.safetensors")
    state["classifier.weight"] += 1
    save_file(state, "bert/model.safetensors", metadata={"format": "pt"})
    assert again().done == 3
    tokenizer(words=[*WORDS[:5], *reversed(WORDS[5:])]).save_pretrained("bert")
    assert again().done == 3


# ------------------------------------------------------------------------------------------------------------ as a student


@pytest.mark.slow
def test_a_trained_one_stands_for_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = loaded("hf:bert", class_names=("0", "1", "2"))
    student = ["--student", "hf:bert?max_tokens=9", "--optimizer", "adamw", "--lr", "0.002", "--epochs", "3"]
    assert cli.main(["train", "--data", "tsv:texts.tsv", "--out", "run", *student, *QUIET]) == 0
    (here / "bert").rename(here / "gone")
    after = load_model("run", num_classes=3)
    assert isinstance(after.input, TokenizerInput) and after.input.max_tokens == 9
    assert after.net.state_dict().keys() == before.net.state_dict().keys() == load_file("gone/model.safetensors").keys()
    assert not torch.equal(logits_of(after, ["bad"]), logits_of(before, ["bad"]))
    capsys.readouterr()
    assert cli.main(["eval", "run", "--data", "tsv:texts.tsv", "--json", "--threads", "1"]) == 0
    labels = torch.from_numpy(open_transfer_set("tsv:texts.tsv").labels).long()
    texts = [line.split("\t")[0] for line in Path("texts.tsv").read_text().splitlines()]
    right = (logits_of(after, texts).argmax(1) == labels).double().mean().item()
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(right)
    dump = ["dump", "--data", "tsv:texts.tsv", "--teacher", "run", "--codec", "float32", "--out", "cache"]
    assert cli.main([*dump, *QUIET]) == 0
    everything = np.arange(len(texts))
    cached = softcache.open("cache").join(open_transfer_set("tsv:texts.tsv")).gather_samples(everything, 0 * everything)
    torch.testing.assert_close(cached.logits(), logits_of(after, texts), rtol=1e-5, atol=1e-5)
    learned = load_file("run/student.safetensors")  # and back in transformers' own hands
    net = BertForSequenceClassification(bert_config())
    net.load_state_dict(learned)
    batch = after.input.collate(texts)
    with torch.no_grad():
        assert torch.equal(net.eval()(**batch).logits, logits_of(after, texts))


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--data", "tsv:texts.tsv", "--out", "run", "--student", "hf:bert", "--epochs", "1", *QUIET]
    assert cli.main(run) == 0
    shutil.rmtree(here / "bert")
    words = [*WORDS[:5], *reversed(WORDS[5:])]
    save(here / "bert", BertForSequenceClassification(bert_config()), tokenizer(words=words))
    capsys.readouterr()
    assert cli.main(run) == 2
    assert "this run began with other samples, labels or another vocabulary" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_classifier_is_for_a_student(bert: Path, tmp_path: Path) -> None:
    lose(bert, "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    lost = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(loaded(f"hf:{bert}", num_classes=5, class_names=tuple("abcde")))
    assert [student.untrained for student in students] == [lost] * 3
    heads = [student.net.get_submodule("classifier").weight for student in students]
    assert heads[0].shape == (5, 32) and torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    kept = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(students[2].net.state_dict()[kept], load_file(bert / "model.safetensors")[kept])
    with pytest.raises(ModelError, match=r"hold no bert.pooler.dense.bias, .*classifier.weight, which would be random"):
        teacher_of(f"hf:{bert}")
    save_student(students[0], tmp_path / "student.safetensors", metadata={})
    assert teacher_of(f"hf:{bert}@{tmp_path}/student.safetensors", tuple("abcde")).has_weights
    torch.manual_seed(3)
    again = load_model(str(tmp_path), num_classes=5)
    assert again.untrained == () and torch.equal(again.net.get_submodule("classifier").weight, heads[0])


@pytest.mark.slow
def test_another_tokenizer_is_another_model(made: Path, bert: Path, tmp_path: Path) -> None:
    student = loaded(f"hf:{made}")
    save_student(student, tmp_path / "student.safetensors", metadata={})
    initialise(loaded(f"hf:{bert}"), str(tmp_path))
    tokenizer(words=[*WORDS[:5], *reversed(WORDS[5:])]).save_pretrained(bert)
    other = loaded(f"hf:{bert}")
    with pytest.raises(ConfigError, match="trained with another tokenizer"):
        initialise(other, str(tmp_path))
    with pytest.raises(ModelError, match=r"trained with another preprocessing: definition is \w{64} there") as caught:
        loaded(f"hf:{bert}@{tmp_path}")
    assert len(str(caught.value)) < 600
    with pytest.raises(ModelError, match="max_tokens is 12 there, 5 here"):
        loaded(f"hf:{made}?max_tokens=5@{tmp_path}")


@pytest.mark.slow
def test_a_traced_graph_takes_every_length(made: Path) -> None:
    model = loaded(f"hf:{made}").eval()
    batch = Batch.of(model, ["a", "bad", "film"], ["a", "bad", "film", "not"])  # of one length, as it happens
    assert [fact.shape for fact in batch.facts] == [("batch", "tokens")] * 3
    program = trace(model, batch, "bert").module()
    for texts in (["a"], [""], [LONG], ["a", "bad film"], TEXTS):
        given = model.input.collate(texts)
        torch.testing.assert_close(program(given), model(given), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("?max_tokens=13", ConfigError, "max_tokens=13, the network takes 12 at most"),
        ("?max_tokens=2", ConfigError, r"max_tokens=2 leaves no room[\s\S]*2 of them"),
        ("?max_tokens=many", ConfigError, "'many' is not"),
        ("?max_token=8", ConfigError, r"unknown parameter 'max_token'[\s\S]*'max_tokens'"),
        ("?num_classes=4", ModelError, "num_classes=4, the data has 3"),
        ("/nowhere", ModelError, r"there is no folder .*nowhere[\s\S]*on the hub"),
        ("/config.json", ModelError, r"there is no folder .*config.json"),
    ],
)
def test_specs_that_name_no_model(made: Path, query: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        loaded(f"hf:{made}{query}")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_by_another_name(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights="adapter_model.bin")


def of_another_kind(folder: Path) -> None:
    ViTConfig().save_pretrained(folder)


def with_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('code of a model was run')")
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "own.Config"})


SPOILT = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config.json[\s\S]*without 'hf:'"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "its configuration cannot be read: "),
    "images": (of_another_kind, "is a 'vit' model, of which transformers makes no sequence classifier"),
    "code": (with_code, r"its configuration is code of its own, which is not run[\s\S]*file.py:factory"),
    "no tokenizer": (without_tokenizer, r"without the files of its tokenizer[\s\S]*tokenizer.save_pretrained"),
    "no padding": (
        lambda folder: change(folder / "tokenizer_config.json", pad_token=None, tokenizer_class="TokenizersBackend"),
        r"no padding token[\s\S]*pad_token =",
    ),
    "pickled": (pickled, r"its weights cannot be read: OSError.*model.safetensors[\s\S]*only safetensors are read"),
    "pickled, named": (pickled_by_another_name, r"names the weights adapter_model.bin[\s\S]*only safetensors"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\1\0\0\0\0\0\0\0"),
        "its weights cannot be read: SafetensorError",
    ),
    "a layer is missing": (
        lambda folder: lose(folder, "bert.encoder.layer.1.output.dense.weight"),
        r"another network than its config.json says; they hold no bert.encoder.layer.1.output.dense.weight",
    ),
    "other widths": (
        lambda folder: change(folder / "config.json", intermediate_size=24),
        "they have another shape: bert.encoder.layer.0.intermediate.dense.bias",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_folders_that_hold_no_classifier(bert: Path, spoil: Any, message: str) -> None:
    spoil(bert)
    with pytest.raises(ModelError, match=message) as caught:
        loaded(f"hf:{bert}")
    assert caught.value.tip and len(caught.value.message) < 400


def test_a_tokenizer_that_does_more_than_its_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = BertTokenizer.__call__
    monkeypatch.setattr(
        BertTokenizer, "__call__", lambda self, texts, **more: theirs(self, [f"a {text}" for text in texts], **more)
    )
    with pytest.raises(ModelError, match=r"BertTokenizer, does more than a tokenizer.json can say[\s\S]*collate"):
        loaded(f"hf:{made}")


def test_a_tokenizer_without_a_file(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertTokenizer, "is_fast", False)
    with pytest.raises(ModelError, match=r"BertTokenizer, cannot be written as a tokenizer.json"):
        loaded(f"hf:{bert}")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("config", {"model_type": "none of them"}),
        ("config", {}),
        ("input", {"definition": {"version": "1.0"}}),
        ("input", {"max_tokens": 1}),
    ],
)
def test_a_student_that_says_nonsense_of_itself(made: Path, tmp_path: Path, part: str, said: dict[str, Any]) -> None:
    model = loaded(f"hf:{made}")
    told = describe_model(model)
    told["transformer"][part] = {**told["transformer"][part], **said} if said else {}
    save_file(model.net.state_dict(), tmp_path / "student.safetensors", {METADATA_KEY: json.dumps(told)})
    with pytest.raises(
        ModelError, match=r"transformers cannot build the student again|configuration of transformers is damaged"
    ):
        load_model(str(tmp_path), num_classes=3)


def test_other_classes(made: Path) -> None:
    with pytest.raises(ModelError, match="the weights have 3 classes, the data has 4"):
        loaded(f"hf:{made}", num_classes=4, class_names=("a", "b", "c", "d"))


def test_classes_of_other_names(bert: Path) -> None:
    change(bert / "config.json", id2label={0: "bad", 1: "fair", 2: "good"})
    with pytest.raises(ModelError, match="knows other classes than the data has, for example 'bad'"):
        teacher_of(f"hf:{bert}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["dump", "--data", "{toy}:images", "--teacher", "hf:bert4"],
            "a text model takes strings, found numpy.ndarray",
        ),
        (["dump", "--data", "tsv:texts.tsv", "--teacher", "hf:empty"], "without the files of its tokenizer"),
        (
            ["dump", "--data", "tsv:texts.tsv", "--teacher", "hf:user/nothing"],
            "there is no such folder, and from the hub",
        ),
        (
            ["train", "--data", "{toy}:images", "--student", "hf:bert4"],
            "a text model takes strings, found numpy.ndarray",
        ),
        (
            ["export", "hf:base", "--data", "tsv:texts.tsv", "--to", "safetensors"],
            "its weights hold no classifier.bias, classifier.weight",
        ),
        (["dump", "--data", "tsv:texts.tsv", "--teacher", "hf:base"], "which would be random numbers"),
        (["train", "--data", "tsv:texts.tsv", "--student", "hf:bert4"], "the weights have 4 classes, the data has 3"),
    ],
)
def test_the_command_line_refuses(
    here: Path, toy: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(here / "bert4", BertForSequenceClassification(bert_config(num_labels=4)), tokenizer())
    without_tokenizer(Path(shutil.copytree("bert", "empty")))
    lose(Path(shutil.copytree("bert", "base")), "classifier.weight", "classifier.bias")
    assert cli.main([*(word.format(toy=toy) for word in argv), "--out", "out.safetensors", *QUIET]) == 2
    told = capsys.readouterr().err
    assert message in told and "tip: " in told and "Traceback" not in told
    assert not Path("out.safetensors").exists()


def test_random_classifiers_are_not_evaluated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lose(here / "bert", "classifier.weight")
    assert cli.main(["eval", "hf:bert", "--data", "tsv:texts.tsv", "--threads", "1"]) == 2
    assert "its weights hold no classifier.weight, which would be random numbers" in capsys.readouterr().err


def test_items_are_strings(made: Path) -> None:
    with pytest.raises(DataError, match="a text model takes strings, found int"):
        loaded(f"hf:{made}").input.collate(["a", 1])


def test_without_transformers(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_student(loaded(f"hf:{made}"), tmp_path / "student.safetensors", metadata={})
    find = importlib.util.find_spec
    hidden = "transformers"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == hidden else find(name, *more))
    for spec in (f"hf:{made}", str(tmp_path)):
        with pytest.raises(MissingExtraError, match="needs the package 'transformers'") as caught:
            loaded(spec)
        assert caught.value.tip == "pip install 'softcache[text]'"


# ------------------------------------------------------------------------------------------- no code, no network, no noise


def test_a_configuration_cannot_fetch_code(bert: Path) -> None:
    """Attention named as a package on the hub would be fetched and run."""
    wanted = live(bert, TEXTS).logits
    for entry in ("attn_implementation", "_attn_implementation"):
        change(bert / "config.json", **{entry: "somebody/attention"})
    assert torch.equal(logits_of(loaded(f"hf:{bert}"), TEXTS), wanted)


def test_a_folder_needs_no_network(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded(f"hf:{made}")
    assert asked == []


def test_it_is_silent_and_leaves_no_setting_behind(
    bert: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(bert, "classifier.weight")
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    caplog.clear()
    capfd.readouterr()
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), dict(os.environ))
    loaded(f"hf:{bert}")
    assert capfd.readouterr() == ("", "") and caplog.messages == []
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), dict(os.environ)) == before
    logging.set_verbosity_warning()


@pytest.mark.slow
def test_only_who_asks_for_it_imports_it() -> None:
    code = "import sys, softcache.cli, softcache.models; print(*{'transformers', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_masked_language_model_is_no_teacher(tmp_path: Path) -> None:
    folder = save(tmp_path / "mlm", BertForMaskedLM(bert_config()), tokenizer())
    assert loaded(f"hf:{folder}").untrained
    with pytest.raises(ModelError, match="which would be random numbers"):
        teacher_of(f"hf:{folder}")


@pytest.mark.slow
def test_the_settings_of_every_classifier_are_believed() -> None:
    """But of those that fetch kernels from the hub."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    refused, tried = set(), 0
    for kind in CLASSIFIERS:
        try:
            told = json.loads(kind().to_json_string(use_diff=False))
        except Exception:  # one that has no defaults
            continue
        tried += 1
        try:
            check_config({key: value for key, value in told.items() if key not in BESIDES}, "x")
        except ModelError:
            refused.add(kind.__name__)
    assert tried > 20 and refused <= {"JambaConfig", "ZambaConfig", "Zamba2Config"}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_with_a_pooling_gives_embeddings_of_the_text_alone(
    here: Path, quick_dump: QuickDump, pooling: str
) -> None:
    """As the network itself gives them, text by text and so without padding, behind the prompt."""
    cache = quick_dump(
        data="table:texts.tsv?text=0&label=1", teacher=[f"hf:bert?pooling={pooling}&prompt=a good "], codec="float32"
    )
    member = cache.manifest.plan.members[0]
    assert (member.output, member.width) == ("embedding", 32)
    assert dict(member.input) == {"pooling": pooling, "prompt": "a good ", "max_tokens": "12"}
    net = BertForSequenceClassification.from_pretrained("bert").bert.eval()
    taken = tokenizer()
    for row in range(0, len(cache), 5):
        text = open_transfer_set("table:texts.tsv?text=0&label=1")[int(cache.samples.key(row)[-6:])][0]
        with torch.no_grad():
            inputs = taken("a good " + text, truncation=True, max_length=12, return_tensors="pt")
            tokens = net(**inputs).last_hidden_state[0]
        wanted = tokens[0] if pooling == "cls" else tokens.mean(dim=0)
        stored = cache.gather(np.array([row]), np.array([0])).embedding()[0]
        torch.testing.assert_close(stored, wanted, rtol=1e-3, atol=1e-4)

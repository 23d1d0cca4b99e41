"""The model zoo: sizes, items in, logits out, and weights that come back as they left."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORLDS
from safetensors.torch import load_file, save_file
from torch import nn

from softcache.errors import ConfigError, DataError, DumpError, ModelError, SoftcacheError, UntrustedError
from softcache.models import (
    MODELS,
    AnyInput,
    ImageInput,
    TextInput,
    VectorInput,
    build,
    build_vocabulary,
    final_linear,
    fingerprint,
    load_model,
    load_weights,
    read_metadata,
    read_saved,
    read_vocabulary,
    save_student,
    write_vocabulary,
)
from softcache.models.inputs import restore_input, tokenize
from softcache.spec import parse_spec

WORDS = ("the", "cat", "sat", "mat", ".")
TEXTS = ["The cat sat.", "", "a dog sat on the mat, the cat sat too ."]


def u8(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def logits_of(model: Any, items: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(model.input.collate(items))


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "me@work" / "nets.py"  # an '@' that does not announce weights
    path.parent.mkdir()
    shutil.copy(WORLDS / "odd_modules.py", path)
    return str(path)


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "num_classes", "input_shape", "parameters"),
    [
        ("softcache:resnet20", 100, None, 278_324),  # the counts of the CRD benchmark
        ("softcache:resnet56", 100, (32, 32, 3), 861_620),
        ("softcache:resnet8x4", 100, (32, 32, 3), 1_233_540),
        ("softcache:resnet32x4", 100, (3, 32, 32), 7_433_860),
        ("softcache:resnet20", 10, (32, 32), 278_324 - 65 * 90 - 2 * 9 * 16),
        ("softcache:mlp", 10, (28, 28), 785 * 800 + 801 * 800 + 801 * 10),
        ("softcache:mlp?hidden=1200,1200&dropout=0.5", 10, (28, 28), 2_395_210),
        ("softcache:mlp?hidden=", 10, (8, 8), 650),
        ("softcache:mlp?in_features=5&hidden=7", 2, None, 6 * 7 + 8 * 2),
        ("softcache:mlp?hidden=&mean=" + ",".join(["0.5"] * 100), 2, (10, 10), 101 * 2),  # longer than a file name
        ("softcache:cnn?width=4", 10, (8, 8), 9 * (4 + 32 + 128) + 2 * 28 + 170),
        ("softcache:cnn?width=4&in_channels=3&num_classes=10", 10, None, 9 * (12 + 32 + 128) + 2 * 28 + 170),
    ],
)
def test_parameter_count(spec: str, num_classes: int, input_shape: Any, parameters: int) -> None:
    model = load_model(spec, num_classes=num_classes, input_shape=input_shape)
    assert sum(p.numel() for p in model.parameters()) == parameters


IMAGE_MODELS = [name for name in MODELS if name not in ("textcnn", "encoder", "tagger", "encoder_tagger")]


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize(
    ("items", "input_shape"),
    [
        pytest.param([u8(8, 8), u8(8, 8, seed=1)], (8, 8), id="numpy HW"),
        pytest.param([u8(12, 10, 3), u8(12, 10, 3, seed=1)], (12, 10, 3), id="numpy HWC"),
        pytest.param([torch.from_numpy(u8(1, 8, 8, seed=s)) for s in (0, 1)], (1, 8, 8), id="torch CHW"),
        pytest.param([torch.rand(3, 12, 10), torch.rand(3, 12, 10)], (3, 12, 10), id="torch float"),
    ],
)
def test_items_in_logits_out(name: str, items: list[Any], input_shape: tuple[int, ...]) -> None:
    logits = logits_of(load_model(f"softcache:{name}", num_classes=5, input_shape=input_shape), items)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("side", [8, 28, 32])
def test_cnn_takes_the_usual_sizes(side: int) -> None:
    assert logits_of(
        load_model("softcache:cnn?width=4", num_classes=3, input_shape=(side, side)), [u8(side, side)]
    ).shape == (1, 3)


def test_mlp_options() -> None:
    torch.manual_seed(0)
    one = load_model("softcache:mlp?hidden=6", num_classes=2, input_shape=(3, 4))
    torch.manual_seed(0)
    small = load_model("softcache:mlp?hidden=6&init_scale=0.5", num_classes=2, input_shape=(3, 4))
    for a, b in zip(one.parameters(), small.parameters(), strict=True):
        assert torch.equal(0.5 * a, b)
    dropped: Any = load_model("softcache:mlp?hidden=6,7&dropout=0.25", num_classes=2, input_shape=(3, 4)).net
    assert [type(m).__name__ for m in dropped] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [m.p for m in dropped.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]


def test_same_seed_same_network() -> None:
    def made(seed: int) -> str:
        torch.manual_seed(seed)
        return fingerprint(load_model("softcache:resnet8", num_classes=3))

    assert made(1) == made(1) != made(2)


def test_resnet_shortcut_reaches_the_output() -> None:
    net: Any = load_model("softcache:resnet8", num_classes=3).net
    block = net.layer1[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 4, 4)
    assert torch.equal(block.eval()(x), x)


def test_resnet_stages_halve_twice() -> None:
    net: Any = load_model("softcache:resnet8x4", num_classes=3).net
    one = net.layer1(net.conv1(torch.rand(1, 3, 32, 24)))
    two = net.layer2(one)
    assert [tuple(x.shape[1:]) for x in (one, two, net.layer3(two))] == [(64, 32, 24), (128, 16, 12), (256, 8, 6)]


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_image_layouts_agree() -> None:
    images = [u8(6, 5, 3, seed=s) for s in range(4)]
    take = ImageInput(3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    batch = take.collate(images)
    assert (batch.shape, batch.dtype) == ((4, 3, 6, 5), torch.uint8)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    oracle = ((np.stack(images) / 255 - mean) / std).transpose(0, 3, 1, 2)  # float64
    prepared = take.prepare(batch)
    assert prepared.dtype == torch.float32
    assert prepared.is_contiguous()
    np.testing.assert_allclose(prepared.numpy(), oracle, atol=1e-6)
    tensors = [torch.from_numpy(i).permute(2, 0, 1) for i in images]
    flipped_twice = [np.ascontiguousarray(i[:, ::-1])[:, ::-1] for i in images]  # negative strides
    for same in (tensors, flipped_twice, [images[0], *tensors[1:]]):
        assert torch.equal(take.prepare(take.collate(same)), prepared)
    floats = [i.astype(np.float64) / 255 for i in images]  # already scaled: not divided again
    np.testing.assert_allclose(take.prepare(take.collate(floats)).numpy(), oracle, atol=1e-6)


@pytest.mark.parametrize(
    ("take", "item", "expected"),
    [
        (VectorInput(), np.array([[0, 255]], np.uint8), [-1.0, 1.0]),
        (VectorInput(mean=(0.0,), std=(1.0,), scale=16), np.array([[0, 8], [4, 16]], np.uint8), [0.0, 0.5, 0.25, 1.0]),
        (VectorInput(mean=(0.0,), std=(1.0,)), np.array([3.5, -2.0]), [3.5, -2.0]),
        (VectorInput(mean=(0.0,), std=(1.0,)), torch.tensor([3, 300]), [3.0, 300.0]),
        (VectorInput(2, mean=(1.0, 2.0), std=(2.0, 4.0)), torch.tensor([2.0, 4.0], dtype=torch.bfloat16), [0.5, 0.5]),
        (ImageInput(1, (0.0,), (1.0,), scale=16), np.array([[8, 16]], np.uint8), [[[0.5, 1.0]]]),
        (ImageInput(2, (0.5,), (0.25, 0.5)), torch.full((2, 1, 1), 1.0), [[[2.0]], [[1.0]]]),
        (AnyInput(), np.array([[0, 255]], np.uint8), [[[0.0, 1.0]]]),
        (AnyInput(), torch.tensor([0, 255], dtype=torch.uint8), [0.0, 1.0]),
        (AnyInput(), np.array([[0.0, 255.0]]), [[0.0, 255.0]]),
    ],
)
def test_prepared_values(take: Any, item: Any, expected: Any) -> None:
    prepared = take.prepare(take.collate([item, item]))
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, torch.tensor([expected, expected]))


def test_any_input_moves_channels_first_for_uint8_arrays_only() -> None:
    assert AnyInput().collate([u8(4, 5, 3)]).shape == (1, 3, 4, 5)
    assert AnyInput().collate([np.zeros((4, 5, 3), np.float32)]).shape == (1, 4, 5, 3)


def test_prepare_serves_gradients_after_inference_mode() -> None:
    take = VectorInput(2, mean=(0.125, 0.25), std=(3.0, 5.0))
    with torch.inference_mode():
        take.prepare(torch.ones(1, 2))
    x = torch.ones(1, 2, requires_grad=True)
    take.prepare(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 / 3, 1 / 5]]))


@pytest.mark.parametrize(
    ("take", "items", "message"),
    [
        (ImageInput(3), [u8(4, 4, 3), u8(4, 5, 3)], r"differ in shape: \(4, 4, 3\) and \(4, 5, 3\)[\s\S]*resize:N"),
        (ImageInput(3), [u8(4, 4)], r"shape \(4, 4\) has 1 channel.*takes shape \(3, H, W\)[\s\S]*to_rgb"),
        (ImageInput(1), [u8(4, 4, 3)], r"shape \(4, 4, 3\) has 3 channel.*takes shape \(1, H, W\)[\s\S]*in_channels=3"),
        (ImageInput(None, (0.1, 0.2, 0.3)), [u8(4, 4)], r"has 1 channel.*takes shape \(3, H, W\)"),
        (ImageInput(None), [u8(4, 4), u8(4, 4, 3)], r"differ in shape"),
        (ImageInput(1), [u8(4, 4), u8(4, 4) / 255], "differ in dtype: uint8 and float32"),
        (ImageInput(1), [np.zeros((4, 4), np.int64)], "uint8 or float, found int64"),
        (ImageInput(1), [u8(4)], "not an image"),
        (ImageInput(1), [[1, 2]], "found list"),
        (ImageInput(1), ["cat"], "takes images, found a text[\\s\\S]*textcnn"),
        (VectorInput(6), [u8(2, 4)], r"shape \(2, 4\) has 8 numbers, the model takes \(6,\)"),
        (VectorInput(), [u8(2, 4), u8(3, 4)], r"differ in shape: \(2, 4\) and \(3, 4\)"),
        (VectorInput(), ["cat"], "found a text"),
        (VectorInput(), [np.array([1j])], "complex128"),
        (TextInput(WORDS), [u8(2, 2)], "takes strings, found numpy.ndarray"),
        (AnyInput(), ["cat"], r"texts[\s\S]*method collate\(items\)"),
        (AnyInput(), [u8(2, 2), u8(2, 3)], r"differ in shape"),
    ],
)
def test_items_that_do_not_fit(take: Any, items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        take.collate(items)


@pytest.mark.parametrize(
    "take",
    [
        ImageInput(3, (0.1, 0.2, 0.3), (0.4,)),
        VectorInput(4, scale=16),
        TextInput(WORDS, 8, 3),
        AnyInput(),
    ],
)
def test_inputs_travel(take: Any) -> None:
    """To spawned workers as a pickle, to the run folder as JSON."""
    again = pickle.loads(pickle.dumps(take))
    assert again == take
    description = json.loads(json.dumps(take.describe()))
    assert restore_input(description) == (take if description["kind"] in ("image", "vector") else None)


# --- text -----------------------------------------------------------------------------------------------------------


def test_tokens_and_vocabulary(tmp_path: Path) -> None:
    assert tokenize("Don't stop,  NOW!") == ["don't", "stop", ",", "now", "!"]
    texts = ["c b b a a", "A c d"]
    assert build_vocabulary(texts) == ["a", "b", "c"]  # d is seen once; b and c tie
    assert build_vocabulary(texts, size=1) == ["a"]
    assert build_vocabulary(texts, min_count=3) == ["a"]
    write_vocabulary(tmp_path / "v.txt", ["a", "ünï", "'"])
    assert read_vocabulary(tmp_path / "v.txt") == ("a", "ünï", "'")


def test_text_collate() -> None:
    take = TextInput(WORDS, max_tokens=4, min_tokens=3)
    assert take.collate(["The CAT dog sat . mat", "."]).tolist() == [[2, 3, 1, 4], [6, 0, 0, 0]]
    assert take.collate(["", "cat"]).tolist() == [[0, 0, 0], [3, 0, 0]]
    assert take.collate([""]).dtype == torch.int64


def test_text_logits_do_not_depend_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    model = load_model("softcache:textcnn?width=6&embedding=5&kernels=2,4", num_classes=3, vocabulary=WORDS)
    net: Any = model.net
    for conv in net.convs:
        nn.init.constant_(conv.bias, 3.0)  # padding alone would win the maximum
    together = logits_of(model, TEXTS)
    assert together.shape == (3, 3)
    for text, logits in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(logits_of(model, [text])[0], logits)
        vectors = net.embedding(model.input.collate([text])[0]).detach()  # (L, 5): the formula, window by window
        pooled = [
            torch.stack([(c.weight * vectors[i : i + k].T).sum((1, 2)) + c.bias for i in range(len(vectors) - k + 1)])
            for k, c in zip((2, 4), net.convs, strict=True)
        ]
        features = torch.cat([p.amax(0).relu() for p in pooled])
        torch.testing.assert_close(net.fc(features).detach(), logits)


def test_text_run_folder_works_alone(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "words.txt", WORDS)
    model = load_model(
        f"softcache:textcnn?width=4&vocabulary={tmp_path}/words.txt", num_classes=2, class_names=("n", "p")
    )
    assert model.spec == "softcache:textcnn?width=4"
    save_student(model, tmp_path / "student.safetensors", metadata={})
    os.remove(tmp_path / "words.txt")
    again = load_model(str(tmp_path), num_classes=2)
    assert isinstance(again.input, TextInput)
    assert again.input.vocabulary == WORDS
    assert torch.equal(logits_of(again, TEXTS), logits_of(model, TEXTS))
    named = load_model(f"softcache:textcnn?width=4@{tmp_path}", num_classes=2, vocabulary=("other",))
    assert torch.equal(logits_of(named, TEXTS), logits_of(model, TEXTS))
    write_vocabulary(tmp_path / "words.txt", WORDS[::-1])
    with pytest.raises(ModelError, match="another vocabulary"):
        load_model(f"softcache:textcnn?width=4&vocabulary={tmp_path}/words.txt@{tmp_path}", num_classes=2)


# --- specs that cannot be built -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("softcache:resnet21", ModelError, r"no model 'resnet21'[\s\S]*'resnet20'"),
        ("mlp", ModelError, r"neither a run folder nor a model[\s\S]*softcache:mlp"),
        ("runs/none", ModelError, "'runs/none' is neither a run folder nor a model"),
        ("sofcache:mlp", ModelError, r"unknown kind of model 'sofcache'[\s\S]*did you mean 'softcache'"),
        ("softcache:mlp?hiden=3", ConfigError, r"unknown parameter 'hiden'[\s\S]*'hidden'"),
        ("softcache:mlp?hidden=a", ConfigError, "not a whole number"),
        ("softcache:mlp?hidden=0", ConfigError, "hidden=\\(0,\\)"),
        ("softcache:mlp?dropout=1", ConfigError, "dropout=1.0"),
        ("softcache:mlp?num_classes=10", ModelError, "num_classes=10, the data has 4 classes"),
        ("softcache:mlp?in_features=5", ModelError, r"in_features=5.*\(3, 4\) have 12"),
        ("softcache:cnn?width=0", ConfigError, "width must be at least 1"),
        ("softcache:cnn?in_channels=0", ConfigError, "in_channels must be at least 1"),
        ("softcache:cnn?mean=0.1,0.2", ConfigError, "mean has 2 and std 1 numbers"),
        ("softcache:cnn?std=0", ConfigError, "must be > 0"),
        ("softcache:textcnn", ModelError, r"needs a vocabulary[\s\S]*vocabulary=FILE[\s\S]*softcache:cnn"),
        ("softcache:textcnn?vocabulary=none.txt", ModelError, "cannot read the vocabulary none.txt"),
        ("torchvision:resnet81", ModelError, r"'resnet81'[\s\S]*'resnet18'"),
        ("torchvision:fasterrcnn_resnet50_fpn", ModelError, "no classification model"),
        ("torchvision:resnet18?wieghts=x", ConfigError, r"unknown parameter 'wieghts'[\s\S]*'weights'"),
        ("torchvision:resnet18@IMAGENET1K_V9", ConfigError, r"no weights 'IMAGENET1K_V9'[\s\S]*'IMAGENET1K_V1'"),
        ("torchvision:resnet18@IMAGENET1K_V1", ModelError, "IMAGENET1K_V1 have 1000 classes, the data has 4"),
        ("torchvision:resnet18?weights=IMAGENET1K_V1@IMAGENET1K_V1", ModelError, "names weights twice"),
        ("torchvision:squeezenet1_1@runs/none", ModelError, "there are no weights runs/none"),
        ("softcache:mlp@", ConfigError, "names no weights"),
        ("softcache:mlp@none.safetensors", ModelError, "there are no weights none.safetensors"),
    ],
)
def test_models_that_cannot_be_built(text: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(text, num_classes=4, input_shape=(3, 4))


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("softcache:textcnn?max_tokens=4", WORDS, "max_tokens is 4, the network needs at least 5"),
        ("softcache:textcnn?kernels=0", WORDS, r"kernels=\(0,\)"),
        ("softcache:textcnn", ("a", "b", "a"), "repeats 1 token"),
    ],
)
def test_text_models_that_cannot_be_built(text: str, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SoftcacheError, match=message):
        load_model(text, num_classes=4, vocabulary=words)


def test_items_that_are_no_images_or_have_no_size() -> None:
    with pytest.raises(ConfigError, match=r"shape \(100,\) are not images"):
        load_model("softcache:cnn", num_classes=2, input_shape=(100,))
    with pytest.raises(ModelError, match="does not know how many numbers"):
        load_model("softcache:mlp", num_classes=2)


# --- factories ------------------------------------------------------------------------------------------------------


def test_factory_module(factories: str) -> None:
    model = load_model(f"{factories}:plain?width=5", num_classes=4, input_shape=(2, 6))
    assert model.spec == "nets.py:plain?width=5"
    net: Any = model.net
    assert (model.output, net[1].out_features) == ("logits", 5)
    items = [u8(2, 6, seed=s) for s in range(3)]
    scaled = torch.from_numpy(np.stack(items)).float() / 255
    torch.testing.assert_close(logits_of(model, items), model.net(scaled[:, None]).detach())


def test_factory_module_with_its_own_collate(factories: str) -> None:
    model = load_model(f"{factories}:Lengths", num_classes=4)
    assert model.output == "probs"
    probs = logits_of(model, ["a", "four"])
    assert torch.equal(probs, model.net({"lengths": torch.tensor([[1.0], [4.0]])}))
    assert pickle.loads(pickle.dumps(model.input)).collate(["four"])["lengths"].item() == 4


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("plain?widht=5", ConfigError, r"unknown parameter 'widht'[\s\S]*'width'"),
        ("plane", ConfigError, r"no factory 'plane'[\s\S]*'plain'"),
        ("not_a_module", ModelError, "returned builtin_function_or_method; a student must be an nn.Module"),
        ("Odd", ModelError, r"output='scores'[\s\S]*logits, log_probs, probs"),
    ],
)
def test_factories_that_do_not_work(factories: str, name: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(f"{factories}:{name}", num_classes=4)


def test_a_network_that_returns_two_things(factories: str) -> None:
    with pytest.raises(ModelError, match="returned tuple, not one tensor"):
        logits_of(load_model(f"{factories}:Pair", num_classes=4), [u8(2, 2)])


def test_build_gives_the_raw_result(factories: str) -> None:
    assert build(parse_spec(f"{factories}:not_a_module"), num_classes=4) is print


def test_factory_run_folder(factories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(f"{factories}:plain?width=5", num_classes=4)
    run = tmp_path / "run@home"  # an '@' of its own
    run.mkdir()
    save_student(model, run / "student.safetensors", metadata={})
    with pytest.raises(UntrustedError, match=r"nets.py:plain\?width=5, which is code[\s\S]*'nets.py:plain\?width=5@"):
        load_model(str(run), num_classes=4)
    with pytest.raises(ModelError, match=r"built by nets.py:plain\?width=5[\s\S]*path/to/nets.py:plain\?width=5@"):
        load_model(str(run), num_classes=4, allow_code=True)
    named = load_model(f"{factories}:plain?width=5@{run}", num_classes=4)
    monkeypatch.chdir(Path(factories).parent)
    alone = load_model("../run@home", num_classes=4, allow_code=True)
    assert fingerprint(named) == fingerprint(alone) == fingerprint(model)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp?hidden=6&mean=0.1&std=0.3", "cnn?width=4&scale=16", "resnet8?in_channels=3"])
def test_run_folder_round_trip(name: str, tmp_path: Path) -> None:
    items = [u8(8, 8, 3, seed=s) for s in range(3)]
    classes = ("zebra", "ant", "mole")
    torch.manual_seed(0)
    spec = f"softcache:{name}"
    model = load_model(spec, num_classes=3, class_names=classes, input_shape=(8, 8, 3))
    assert model.class_names is None
    model.train()(model.input.collate(items))  # moves the BatchNorm buffers away from their start
    save_student(model, tmp_path / "student.safetensors", metadata={"cache_id": "abc", "softcache_model": "not yours"})
    assert os.listdir(tmp_path) == ["student.safetensors"]
    (tmp_path / "any").touch()
    assert (tmp_path / "student.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert load_file(tmp_path / "student.safetensors").keys() == model.net.state_dict().keys()
    assert read_metadata(tmp_path)["cache_id"] == "abc"
    for text in (str(tmp_path), str(tmp_path / "student.safetensors"), f"{spec}@{tmp_path}"):
        again = load_model(text, num_classes=3, input_shape=(8, 8, 3))
        assert fingerprint(again.net) == fingerprint(model.net)
        assert torch.equal(logits_of(again, items), logits_of(model, items))
        assert (again.class_names, again.spec, again.input) == (classes, model.spec, model.input)
    saved = read_saved(str(tmp_path))
    save_student(load_model(str(tmp_path), num_classes=3), tmp_path / "student.safetensors", metadata={})
    assert read_saved(str(tmp_path)) == saved  # a copy of a copy forgets nothing


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("softcache:mlp?hidden=", num_classes=3, input_shape=(2, 2))
    path = tmp_path / "student.safetensors"
    save_student(model, path, metadata={})
    before = path.read_bytes()

    def refuse(source: Any, target: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", refuse)
    nn.init.zeros_(next(model.net.parameters()))
    with pytest.raises(DumpError, match="disk gone"):
        save_student(model, path, metadata={})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["student.safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_dict_files(suffix: str, under: str | None, prefix: str, tmp_path: Path) -> None:
    model = load_model("softcache:mlp?hidden=3", num_classes=2, input_shape=(2, 2))
    state = {prefix + name: tensor for name, tensor in model.net.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save({under: state, "epoch": 3} if under else state, path)
    again = load_model(f"softcache:mlp?hidden=3@{path}", num_classes=2, input_shape=(2, 2))
    assert fingerprint(again) == fingerprint(model)


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["BOMB"],))


def test_code_in_a_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    torch.save({"state_dict": Bomb()}, tmp_path / "w.pt")
    model = load_model("softcache:mlp?hidden=3", num_classes=2, input_shape=(2, 2))
    with pytest.raises(ModelError, match=r"cannot be read as plain tensors: .*mkdir, which is code"):
        load_weights(model, str(tmp_path / "w.pt"))
    assert not (tmp_path / "boom").exists()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def refused(state: dict[str, torch.Tensor], message: str) -> None:
        save_file(state, tmp_path / "w.safetensors")
        model = load_model("softcache:mlp?hidden=3", num_classes=100, input_shape=(2, 2))
        before = fingerprint(model)
        with pytest.raises(ModelError, match=message):
            load_weights(model, str(tmp_path / "w.safetensors"))
        assert fingerprint(model) == before

    fits = load_model("softcache:mlp?hidden=3", num_classes=100, input_shape=(2, 2)).net.state_dict()
    ten = {**fits, "2.weight": torch.zeros(10, 3), "2.bias": torch.zeros(10)}
    refused(ten, "the weights have 10 classes, the data has 100")
    refused({k: v for k, v in fits.items() if "bias" not in k}, "2 missing: 0.bias, 2.bias")
    refused({**fits, **{f"x{i}": torch.zeros(1) for i in range(7)}}, "7 surplus: x0, x1, x2, x3, x4 and 2 more")
    refused(
        {**fits, "0.weight": torch.zeros(3, 9)}, r"1 of another shape: 0.weight \(3, 9\) there, \(3, 4\) in the model"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"\0" * 40, "not a safetensors file"),
        ("w.pt", b"not a pickle", "cannot be read as plain tensors"),
        ("w.pt", [1, 2], "is not a state dict"),
        ("w.pt", {}, "is not a state dict"),
        ("w.pt", {"epoch": 3, "weight": torch.zeros(2)}, "1 surplus: weight"),
        ("w.onnx", b"", r"not a weights file we know[\s\S]*.safetensors"),
    ],
)
def test_files_that_hold_no_weights(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    model = load_model("softcache:mlp?hidden=3", num_classes=2, input_shape=(2, 2))
    with pytest.raises(ModelError, match=message):
        load_weights(model, str(path))


def test_runs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no student.safetensors[\s\S]*nothing of a run is in it either"):
        load_model(str(tmp_path), num_classes=3)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no student.safetensors[\s\S]*finished"):
        load_model(str(tmp_path), num_classes=3)
    model = load_model("softcache:mlp?hidden=3&mean=0.25", num_classes=3, input_shape=(2, 2))
    path = tmp_path / "student.safetensors"
    save_student(model, path, metadata={})
    with pytest.raises(ModelError, match="trained on 3 classes, the data has 5"):
        load_model(str(tmp_path), num_classes=5)
    with pytest.raises(ModelError, match=r"another preprocessing: mean is \[0.25\] there, \[0.5\] here"):
        load_model(f"softcache:mlp?hidden=3@{tmp_path}", num_classes=3, input_shape=(2, 2))
    save_file(load_file(path), path, metadata={"softcache_model": '{"spec": "softcache:mlp"}'})
    with pytest.raises(ModelError, match="cannot be understood"):
        load_model(str(tmp_path), num_classes=3)
    save_file(load_file(path), path)
    with pytest.raises(ModelError, match=r"does not say what model it is[\s\S]*MODEL@"):
        load_model(str(tmp_path), num_classes=3)


@pytest.mark.parametrize("name", ["export.onnx", "export.pt2"])
def test_an_exported_program_is_no_model_that_can_be_trained(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"a program")
    with pytest.raises(ModelError, match=r"can be run, not trained[\s\S]*the run folder that it was exported from"):
        load_model(str(tmp_path / name), num_classes=3)


def test_torchvision_weights_bring_normalisation_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = torchvision.models.get_model("squeezenet1_1", weights=None).state_dict()
    table = torchvision.models.get_model_weights("squeezenet1_1")
    monkeypatch.setattr(table, "get_state_dict", lambda self, *args, **kwargs: state)  # stands in for the download
    at = load_model("torchvision:squeezenet1_1@IMAGENET1K_V1", num_classes=1000)
    query = load_model("torchvision:squeezenet1_1?weights=IMAGENET1K_V1", num_classes=1000)
    later = load_model("torchvision:squeezenet1_1?mean=0&std=1", num_classes=1000)
    load_weights(later, "IMAGENET1K_V1")
    for model in (at, query, later):
        assert torch.equal(model.net.state_dict()["features.0.weight"], state["features.0.weight"])
        assert model.input == ImageInput(3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert model.class_names is not None
        assert (len(model.class_names), model.class_names[0]) == (1000, "tench")
    assert at.spec == query.spec == "torchvision:squeezenet1_1?weights=IMAGENET1K_V1"
    save_student(at, tmp_path / "student.safetensors", metadata={})
    saved = read_saved(str(tmp_path))
    assert saved is not None
    assert saved.spec == "torchvision:squeezenet1_1"  # a run needs no download to come back
    assert load_model(str(tmp_path), num_classes=1000).input == at.input


def test_torchvision_run_folder_keeps_its_normalisation(tmp_path: Path) -> None:
    model = load_model("torchvision:squeezenet1_1", num_classes=4)
    assert logits_of(model, [u8(32, 32, 3)]).shape == (1, 4)
    model.input = ImageInput(3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))  # as weights with another preset would have it
    save_student(model, tmp_path / "student.safetensors", metadata={})
    assert load_model(str(tmp_path), num_classes=4).input == model.input


# --- small helpers --------------------------------------------------------------------------------------------------


def test_fingerprint_sees_names_types_shapes_and_bytes() -> None:
    class Holder(nn.Module):
        def __init__(self, **tensors: torch.Tensor) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    zeros = torch.zeros(4)
    nets = [Holder(a=zeros), Holder(b=zeros), Holder(a=zeros.view(2, 2)), Holder(a=zeros.int()), Holder(a=zeros + 1)]
    nets += [Holder(a=torch.tensor(0.0)), Holder(a=zeros.bfloat16()), Holder(a=-zeros), Holder(a=zeros, b=zeros)]
    prints = [fingerprint(net) for net in nets]
    assert len(set(prints)) == len(nets)
    assert fingerprint(Holder(b=zeros, a=zeros)) == prints[-1]  # the order of registration does not count
    plain = hashlib.sha256(b'["a", "float32", [1]]\n' + bytes([0, 0, 0x80, 0x3F])).hexdigest()
    assert fingerprint(Holder(a=torch.ones(1))) == plain


@pytest.mark.slow
def test_final_linear() -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 3), nn.ReLU())
    assert final_linear(net) is net[2]
    assert final_linear(net, 5) is net[1]
    assert final_linear(net, 7) is None
    assert final_linear(nn.ReLU()) is None
    for name in IMAGE_MODELS:
        model = load_model(f"softcache:{name}", num_classes=6, input_shape=(8, 8))
        found = final_linear(model.net, 6)
        assert found is not None
        assert found.out_features == 6


def test_models_compile_whole() -> None:
    """No graph break in the preprocessing: the compiler sees one graph from uint8 to logits."""
    model = load_model("softcache:mlp?hidden=3", num_classes=2, input_shape=(2, 2)).eval()
    batch = model.input.collate([u8(2, 2)])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch), model(batch))


def test_a_mistyped_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ModelError) as caught:
        load_model(f"{tmp_path}/techer", num_classes=4)
    assert caught.value.tip == f"did you mean '{tmp_path}/teacher'?"
    with pytest.raises(ModelError) as caught:
        load_model(f"{tmp_path}/zzz", num_classes=4)
    assert "softcache:mlp" in caught.value.tip


@pytest.mark.parametrize(
    ("holds", "tip"),
    [
        ((), "nothing of a run is in it either"),
        (("notes.txt",), "nothing of a run is in it either"),
        (("run.json", "lock"), "`train` writes it last: run the same command again"),
        (("shrink.json",), "`shrink` writes it last: run the same command again"),
        (("manifest.json",), "it is a cache, which a student learns from"),
        (("w.pt",), "name a file in it"),
    ],
)
def test_a_folder_without_weights_is_told_by_what_it_holds(tmp_path: Path, holds: tuple[str, ...], tip: str) -> None:
    for name in holds:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"holds no student.safetensors") as caught:
        load_model(str(tmp_path), num_classes=4)
    assert tip in caught.value.tip

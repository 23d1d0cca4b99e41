"""Exported files: opened as a stranger would, they answer as the model does; those that do not are refused and not left."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, needs
from torch import Tensor

from softcache import cli
from softcache.config import ExportConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
from softcache.errors import (
    ClassMismatchError,
    ConfigError,
    DataError,
    ExportError,
    MissingExtraError,
    ModelError,
    SoftcacheError,
)
from softcache.evaluate.measure import evaluate
from softcache.files import durable
from softcache.models import Model, Projector, graft, load_model, read_metadata, save_student
from softcache.students import export, traced_program

ONNX = needs("onnx", "onnx")
CLASSES = ("ant", "bee", "cat", "dog")  # of the toy images
WORDS = tuple("abcdefg")
TEXTS = ["a b", "c", "a b c d e f g a b c", "g f e d", "", "b b b b b b", "a " * 64, "a " * 99, "a b c d e"]
KINDS = ("mlp", "cnn", "textcnn", "grafted")


@pytest.fixture(scope="session")
def nets() -> Path:
    return WORLDS / "hard_to_export.py"


@pytest.fixture
def images(toy: Path) -> str:
    return f"{toy}:images?count=9"


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.tsv"
    path.write_text("".join(f"{text}\t{'yes' if i % 2 else 'no'}\n" for i, text in enumerate(TEXTS)))
    return f"tsv:{path}?text=0&label=1"


def trained(kind: str) -> Model:
    """A small student whose weights, and BatchNorm statistics, are not those of its class."""
    torch.manual_seed(3)
    if kind == "textcnn":
        model = load_model(
            "softcache:textcnn?width=3&embedding=4", num_classes=2, class_names=("no", "yes"), vocabulary=WORDS
        )
        model.train()(model.input.collate(TEXTS))
        return model
    spec = "softcache:mlp?hidden=5&scale=16" if kind == "mlp" else "softcache:cnn?width=2&mean=0.25&std=0.125"
    model = load_model(spec, num_classes=4, class_names=CLASSES, input_shape=(8, 8))
    batch = model.input.collate(list(np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)))
    if kind == "grafted":
        graft(model, "10", Projector((8, 2, 2), (6, 2, 2)), torch.randn(4, 6), torch.randn(4), batch)
    for _ in range(3):
        model.train()(batch)
    return model


def run_folder(folder: Path, model: Model, eval_data: str | None = None, policy: str = "") -> str:
    folder.mkdir()
    told = {"softcache_policy": json.dumps(Policy.parse((policy,) if policy else (), 0).to_json())}
    save_student(model, folder / "student.safetensors", metadata={**told, "softcache_cache": "abc"})
    lines = ["epochs = 1"] + ([f"eval_data = {json.dumps(eval_data)}"] if eval_data else [])
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    return str(folder)


def exported(text: str, to: str, **settings: Any) -> export.Exported:
    settings = {"device": "cpu", "threads": 1, "batch_size": 4, "allow_code": True} | settings
    return export.run(text, ExportConfig(to=to, **settings), quiet=True)


def open_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    return load_model(str(path), num_classes=2 if "text" in str(path) else 4).eval()


def open_program(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra softcache[onnx]")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, given.name, taken.shape[0], given.shape[0]) == ("input", "logits", "batch", "batch")
    return lambda batch: torch.from_numpy(session.run(["logits"], {"input": batch.numpy()})[0])


OPEN = {"safetensors": open_safetensors, "program": open_program, "onnx": open_onnx}


def told_by(path: Path) -> dict[str, Any]:
    """The metadata of an exported file, read without softcache; JSON values as objects."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["softcache"])
    elif path.suffix == ".pt2":
        extra = {"softcache.json": ""}
        torch.export.load(path, extra_files=extra)
        found = json.loads(extra["softcache.json"])
    else:
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra softcache[onnx]")
        found = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return {key: json.loads(value) if value[0] in "[{" else value for key, value in found.items()}


# --- whole files ----------------------------------------------------------------------------------------------------


WHOLE = [
    pytest.param(
        kind,
        to,
        marks=[ONNX, pytest.mark.slow] if to == "onnx" else [pytest.mark.slow] * (to == "program" and kind != "mlp"),
        id=f"{kind}-{to}",
    )
    for kind in KINDS
    for to in OPEN
]


@pytest.mark.parametrize(("kind", "to"), WHOLE)
def test_an_exported_file_answers_as_the_model_does(
    kind: str, to: str, images: str, texts: str, tmp_path: Path
) -> None:
    model = trained(kind)
    result = exported(run_folder(tmp_path / kind, model, texts if kind == "textcnn" else images), to)
    assert result.path == tmp_path / kind / f"export{export.SUFFIXES[to]}"
    assert (result.agreement, result.changed, result.before.samples) == (1.0, 0, 9)
    assert result.max_difference < 1e-5
    assert result.nbytes == result.path.stat().st_size

    forward = OPEN[to](result.path)
    model.eval()
    draw = np.random.default_rng(1)
    for count in (1, 2, 3, 11):
        if kind == "textcnn":
            items: list[Any] = TEXTS * 2 if count == 11 else ["a", "b c", "d e f g"][:count]
        else:
            items = list(draw.integers(0, 256, (count, 8, 8), dtype=np.uint8))
        batch = model.input.collate(items)
        with torch.no_grad():
            torch.testing.assert_close(forward(batch).detach(), model(batch), atol=1e-5, rtol=1e-5)

    told = told_by(result.path)
    about = told["softcache_model"]
    assert about["class_names"] == list(model.data_class_names)
    assert about["spec"] == model.spec and about["input"] == json.loads(json.dumps(model.input.describe()))
    assert about["vocabulary"] == (list(WORDS) if kind == "textcnn" else None)
    assert about.get("graft") == (json.loads(json.dumps(model.graft.to_json())) if model.graft else None)
    assert told["softcache_cache"] == "abc" and told["softcache_policy"] == Policy().to_json()
    (call,) = told["softcache_export"]["inputs"]
    shapes = {"mlp": ["batch", 64], "textcnn": ["batch", "tokens"]}
    assert call["shape"] == shapes.get(kind, ["batch", 1, 8, 8])
    assert call["dtype"] == ("int64" if kind == "textcnn" else "uint8")
    meanings = {"mlp": "0 to 16, flattened", "textcnn": "5 to 64 tokens"}
    assert meanings.get(kind, "0 to 255, channels first") in call["meaning"]


@pytest.mark.slow
def test_the_accuracies_are_those_of_eval(images: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", trained("cnn"), images)
    result = exported(run, "program")
    model = load_model(run, num_classes=4)
    alone = evaluate(model, open_transfer_set(images), Policy(), device=torch.device("cpu"))
    for one in (result.before, result.after):
        assert (one.top1, one.nll) == (alone.top1, pytest.approx(alone.nll))
    text = result.text()
    assert f"{100 * result.before.top1:.2f} %" in text  # type: ignore[operator]
    assert "the same top-1 for 100.00 % of the samples (0 changed)" in text
    assert "takes input: uint8 (batch, 1, 8, 8), 0 to 255, channels first; scaled and normalised inside" in text


@pytest.mark.slow
def test_float_items_are_taken_as_floats(images: str, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "floats.py").write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('t', {str(toy)!r})\n"
        "t = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(t)\n"
        "class Floats(t.Images):\n    def __getitem__(self, i):\n        return (self.images[i] / 255).astype('float32'), 0\n"
        "def floats():\n    return Floats(9, 0, False, False)\n"
    )
    result = exported(run_folder(tmp_path / "run", trained("cnn")), "program", data=f"{tmp_path}/floats.py:floats")
    assert result.inputs[0].dtype == "float32" and "already scaled" in result.inputs[0].meaning
    module = torch.export.load(result.path).module()
    model = load_model(str(tmp_path / "run"), num_classes=4).eval()
    item = np.full((8, 8), 0.25, np.float32)
    torch.testing.assert_close(module(torch.full((1, 1, 8, 8), 0.25)), model(model.input.collate([item])))


@pytest.mark.parametrize("to", ["program", pytest.param("onnx", marks=[ONNX, pytest.mark.slow])])
def test_a_batch_of_two_tensors(to: str, nets: Path, images: str, tmp_path: Path) -> None:
    model = load_model(f"{nets}:Two", num_classes=4)
    torch.save(model.net.state_dict(), tmp_path / "w.pt")
    result = exported(f"{nets}:Two@{tmp_path}/w.pt", to, data=images, out=str(tmp_path / f"two{export.SUFFIXES[to]}"))
    assert [(fact.name, fact.shape) for fact in result.inputs] == [("pixels", ("batch", 64)), ("sums", ("batch",))]
    assert result.agreement == 1.0 and result.max_difference < 1e-4


@pytest.mark.slow
def test_a_batch_that_is_a_list(nets: Path, images: str, tmp_path: Path) -> None:
    torch.save(load_model(f"{nets}:Listed", num_classes=4).net.state_dict(), tmp_path / "w.pt")
    result = exported(f"{nets}:Listed@{tmp_path}/w.pt", "program", data=images, out=str(tmp_path / "x.pt2"))
    assert [fact.name for fact in result.inputs] == ["input_0", "input_1"] and result.agreement == 1.0


def test_a_factory_comes_back_from_safetensors(nets: Path, images: str, tmp_path: Path) -> None:
    """Its file is not in the current folder, and the exported weights alone cannot say where it is."""
    text = f"{nets}:Net@{run_folder(tmp_path / 'run', load_model(f'{nets}:Net', num_classes=4))}"
    result = exported(text, "safetensors", data=images)
    assert result.path == tmp_path / "run" / "export.safetensors"
    assert read_metadata(result.path)["softcache_cache"] == "abc"


@pytest.mark.slow
def test_the_policy_of_the_run_is_used(images: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", trained("cnn"), images, policy="resize:size=12")
    result = exported(run, "program")
    assert result.inputs[0].shape == ("batch", 1, 12, 12)
    other = exported(run, "program", policy=("resize:size=16",), out=str(tmp_path / "other.pt2"))
    assert other.inputs[0].shape == ("batch", 1, 16, 16)


def test_a_student_of_some_classes_is_verified_on_those(images: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ("bee", "dog")
    model = load_model("softcache:mlp?hidden=3", num_classes=2, class_names=names, input_shape=(8, 8))
    result = exported(run_folder(tmp_path / "run", model, images), "safetensors")
    labels = open_transfer_set(images).labels
    assert result.before.labelled == int(np.isin(labels, [1, 3]).sum()) < result.before.samples == 9


def test_data_that_lacks_a_class_of_the_model_is_taken(images: str, tmp_path: Path) -> None:
    names = ("aardvark", *CLASSES)
    model = load_model("softcache:mlp?hidden=3", num_classes=5, class_names=names, input_shape=(8, 8))
    result = exported(run_folder(tmp_path / "run", model, images), "safetensors")
    data = open_transfer_set(images)
    with torch.no_grad():
        largest = model(model.input.collate([data.load(i)[0] for i in range(len(data))])).argmax(1).numpy()
    assert result.before.top1 == pytest.approx((largest == data.labels + 1).mean())


def test_a_set_of_one_sample(toy: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", trained("mlp"), f"{toy}:images?count=1")
    assert exported(run, "program").before.samples == 1


# --- files that do not answer alike ---------------------------------------------------------------------------------


def twisted(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    opened = export.open_program

    def twisted_program(path: Path, device: torch.device) -> Callable[[Any], Tensor]:
        forward = opened(path, device)
        return lambda batch: change(forward(batch))

    monkeypatch.setattr(export, "open_program", twisted_program)


def one_wrong(value: float) -> Callable[[Tensor], Tensor]:
    """Another value in one logit of one sample, in a later batch."""
    seen = [0]

    def change(logits: Tensor) -> Tensor:
        seen[0] += len(logits)
        if seen[0] == 9:
            logits = logits.clone()
            logits[-1, 2] += value
        return logits

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda x: x * 1.05 + 0.01, "output 0 of sample toy/0000 is", id="all"),
        pytest.param(one_wrong(0.1), "output 2 of sample toy/0008 is", id="one"),
        pytest.param(one_wrong(float("nan")), "output 2 of sample toy/0008 is nan", id="NaN"),
        pytest.param(lambda x: x[:, :3], r"gives \(1, 3\) where the model gives \(1, 4\)", id="shape"),
    ],
)
def test_a_file_that_differs_is_refused_and_not_left(
    change: Any, message: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", trained("mlp"), images)
    twisted(monkeypatch, change)
    with pytest.raises(ExportError, match=message):
        exported(run, "program")
    assert sorted(path.name for path in Path(run).iterdir()) == ["config.toml", "student.safetensors"]


def test_a_near_tie_may_change(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("mlp")
    with torch.no_grad():
        model.net[-1].weight.zero_()  # type: ignore[index]
        model.net[-1].bias.copy_(torch.tensor([0.0, 0.5, 0.4999, 0.0]))  # type: ignore[index]
    run = run_folder(tmp_path / "run", model, images)
    twisted(monkeypatch, one_wrong(0.0003))
    result = exported(run, "program")
    assert result.changed == 1 and result.agreement == pytest.approx(8 / 9)
    assert result.max_difference == pytest.approx(0.0003, rel=1e-3)
    assert "88.89 % of the samples (1 changed)" in result.text()


def test_the_bound_grows_with_the_logit(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("mlp")
    with torch.no_grad():
        model.net[-1].bias[2] = 1000.0  # type: ignore[index]
    run = run_folder(tmp_path / "run", model, images)
    twisted(monkeypatch, one_wrong(0.9))
    assert exported(run, "program").max_difference == pytest.approx(0.9, rel=1e-3)


def test_an_interruption_leaves_nothing(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run", trained("mlp"), images)

    def interrupt(logits: Tensor) -> Tensor:
        assert not (Path(run) / "export.pt2").exists()  # it has no name before it is verified
        raise KeyboardInterrupt

    twisted(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        exported(run, "program")
    assert sorted(path.name for path in Path(run).iterdir()) == ["config.toml", "student.safetensors"]


# --- networks that cannot be exported -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("Branch", "program", r"cannot trace its network: GuardOnDataDependent[^\n]+\n  tip: [^\n]*--to safetensors"),
        pytest.param("Branch", "onnx", "torch.export cannot trace its network", marks=ONNX),
        ("ThreeAtATime", "program", "torch.export cannot trace its network: [^\n]*batch"),
        ("Counting", "program", "allowed is a difference"),
        pytest.param(
            "Eigenvalues",
            "onnx",
            r"cannot be written as ONNX: [^\n]*eig[^\n]*\n  tip: [^\n]*--to program",
            marks=pytest.mark.slow,
        ),
        ("Strings", "program", "the model's collate makes list, of which no exported model"),
    ],
)
def test_networks_that_cannot_be_exported(
    name: str, to: str, message: str, nets: Path, images: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(f"{nets}:{name}", num_classes=4)
    torch.save(model.net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ExportError, match=message):
        exported(f"{nets}:{name}@{tmp_path}/w.pt", to, data=images, out=str(tmp_path / f"x{export.SUFFIXES[to]}"))
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    assert "".join(capfd.readouterr()) == ""  # none of torch's graphs


@pytest.mark.parametrize("name", ["Branch", "ThreeAtATime"])
def test_weights_alone_need_no_graph(name: str, nets: Path, images: str, tmp_path: Path) -> None:
    model = load_model(f"{nets}:{name}", num_classes=4)
    torch.save(model.net.state_dict(), tmp_path / "w.pt")
    text = f"{nets}:{name}@{tmp_path}/w.pt"
    assert exported(text, "safetensors", data=images, out=str(tmp_path / "x.safetensors")).max_difference == 0


@ONNX
def test_more_weights_than_one_onnx_file_holds(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_program, "ONNX_BYTES", 100)
    with pytest.raises(ExportError, match=r"1.4 kB of weights; one ONNX file holds 2 GB"):
        exported(run_folder(tmp_path / "run", trained("mlp"), images), "onnx")


# --- mistakes -------------------------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    pass


def without_eval_data(folder: Path) -> None:
    (folder / "run/config.toml").write_text("epochs = 1\n")


def without_config(folder: Path) -> None:
    (folder / "run/config.toml").unlink()


def bad_config(folder: Path) -> None:
    (folder / "run/config.toml").write_text("epochs = \n")


def unfinished(folder: Path) -> None:
    (folder / "run/student.safetensors").unlink()


def file_there(folder: Path) -> None:
    (folder / "run/export.pt2").write_bytes(b"somebody's")


def cut_short(folder: Path) -> None:
    path = folder / "run/student.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def other_classes(folder: Path) -> None:
    shutil.rmtree(folder / "run")
    model = load_model(
        "softcache:mlp?hidden=2", num_classes=4, class_names=("bee", "ant", "cat", "dog"), input_shape=(8, 8)
    )
    run_folder(folder / "run", model)


def more_and_other_classes(folder: Path) -> None:
    shutil.rmtree(folder / "run")
    model = load_model(
        "softcache:mlp?hidden=2", num_classes=5, class_names=("eel", "elk", *CLASSES[:3]), input_shape=(8, 8)
    )
    run_folder(folder / "run", model)


MISTAKES = [
    ("no such run", "nowhere", {"out": "x.pt2"}, nothing, ModelError, "'nowhere' is neither a run folder nor a model"),
    ("no such run, and no file named", "nowhere", {}, nothing, ModelError, "'nowhere' is neither a run folder nor a model"),
    ("run unfinished", "run", {}, unfinished, ModelError, "holds no student.safetensors"),
    ("damaged weights", "run", {}, cut_short, ModelError, "is not a safetensors file"),
    ("no weights", "softcache:mlp", {"out": "x.pt2"}, nothing, ConfigError, r"has no weights[\s\S]*softcache:mlp@WEIGHTS"),
    ("weights not there", "softcache:mlp@none.pt", {"out": "x.pt2"}, nothing, ModelError, "there are no weights none.pt"),
    ("no data", "run", {"data": None}, without_eval_data, ConfigError, r"without --eval-data\n  tip: --data DATA"),
    ("no config", "run", {"data": None}, without_config, ConfigError, r"nothing of an evaluation set\n  tip: --data DATA"),
    ("bad config", "run", {"data": None}, bad_config, ConfigError, r"config.toml: not TOML[\s\S]*--data DATA"),
    ("other data", "run", {"data": "digist"}, nothing, ConfigError, "no source is called 'digist'"),
    ("another order", "run", {}, other_classes, ClassMismatchError, r"class 0 is 'ant' in [^\n]*, 'bee' for run"),
    ("more classes", "run", {}, more_and_other_classes, ModelError, "knows 5 classes, and of the data's not 'dog'"),
    ("other data's classes", "run", {"data": "{toy}:images?rgb=true"}, nothing, DataError, "has 192 numbers"),
    ("no out", "softcache:mlp?hidden=5&scale=16@weights.pt", {}, nothing, ConfigError, "--out is missing"),
    ("ending", "run", {"out": "x.onnx"}, nothing, ConfigError, r"--to program ends in .pt2\n  tip: --out x.pt2"),
    ("there already", "run", {}, file_there, ConfigError, "run/export.pt2: is there already"),
    ("the run's own file", "run", {"to": "safetensors", "out": "run/student.safetensors"}, nothing, ConfigError, "is there"),
    ("no folder", "run", {"out": "no/x.pt2"}, nothing, ConfigError, "no/x.pt2: there is no folder no"),
    ("folder is a file", "run", {"out": "weights.pt/x.pt2"}, nothing, ConfigError, "there is no folder weights.pt"),
    ("device", "run", {"device": "gpu"}, nothing, ConfigError, "unknown device 'gpu'"),
    ("opset of a program", "run", {"opset": 18}, nothing, ConfigError, "--opset 18 needs --to onnx"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "settings", "prepare", "error", "message"), [case[1:] for case in MISTAKES], ids=[c[0] for c in MISTAKES]
)
def test_mistakes_leave_no_file(
    text: str,
    settings: dict[str, Any],
    prepare: Callable[[Path], None],
    error: type[SoftcacheError],
    message: str,
    images: str,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained("mlp")
    run_folder(tmp_path / "run", model)
    torch.save(model.net.state_dict(), "weights.pt")
    prepare(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    settings = {"data": images, "to": "program"} | settings
    if settings["data"]:
        settings["data"] = settings["data"].format(toy=toy)
    with pytest.raises(error, match=message):
        exported(text, **settings)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@ONNX
@pytest.mark.slow
def test_the_version_of_onnx_operators_is_the_one_that_was_asked_for(images: str, tmp_path: Path) -> None:
    import onnx

    run, said = run_folder(tmp_path / "run", trained("mlp"), images), {"to": "onnx", "data": images}
    for opset in (17, 20):
        result = exported(run, out=str(tmp_path / f"{opset}.onnx"), opset=opset, **said)
        read = onnx.load(result.path)
        assert [one.version for one in read.opset_import if one.domain == ""] == [opset] == [result.opset]
        assert {one.key: one.value for one in read.metadata_props}["softcache_opset"] == str(opset)
        assert f"onnx (opset {opset})" in result.text() and result.to_json()["opset"] == opset
    for opset, error, message in (
        (0, ConfigError, "--opset 0: onnx .* knows versions 1 to"),
        (999, ConfigError, "--opset 999: onnx .* knows versions 1 to"),
        (7, ExportError, r"version 7; torch wrote version \d+"),
    ):
        with pytest.raises(error, match=message):
            exported(run, out=str(tmp_path / "no.onnx"), opset=opset, **said)
        assert not (tmp_path / "no.onnx").exists()


@ONNX
def test_onnx_needs_its_extra(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run", trained("mlp"), images)
    find_spec = importlib.util.find_spec
    for package in traced_program.PACKAGES:
        hidden = lambda name, *a, p=package: None if name == p else find_spec(name, *a)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
        with pytest.raises(MissingExtraError, match=rf"'{package}'[\s\S]*pip install 'softcache\[onnx\]'"):
            exported(run, "onnx")
    assert exported(run, "program").changed == 0


def test_the_command_line(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", trained("mlp"), images)
    flags = ["--device", "cpu", "--threads", "1", "--quiet"]
    assert cli.main(["export", run, "--to", "program", *flags]) == 2  # the run folder alone names the data
    assert f"--data {images}" in capsys.readouterr().err.replace("'", "")
    flags += ["--data", images]
    assert cli.main(["export", run, "--to", "program", *flags]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{run}/export.pt2: program, ") and said.err == ""
    assert cli.main(["export", run, "--to", "safetensors", *flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == f"{run}/export.safetensors" and facts["agreement"] == 1
    assert facts["max_difference"] == 0 and facts["before"]["top1"] == facts["after"]["top1"]
    assert facts["inputs"][0]["shape"] == ["batch", 64] and facts["allowed"] == {"absolute": 1e-3, "relative": 1e-3}
    assert cli.main(["export", run, "--to", "onxx", *flags]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err
    assert cli.main(["export", run, *flags]) == 2
    assert "--to is missing" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", trained("mlp"), images)

    def refuse(path: Path) -> None:
        with durable.explained("open", path):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(durable, "create", refuse)
    command = ["export", run, "--to", "program", "--data", images, "--device", "cpu", "--threads", "1", "--quiet"]
    assert cli.main(command) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(images: str, texts: str, tmp_path: Path) -> None:
    for kind in ("cnn", "textcnn"):
        run = run_folder(tmp_path / kind, trained(kind), texts if kind == "textcnn" else images)
        for to in ("safetensors", "program", "onnx"):
            assert exported(run, to, device="cuda").max_difference < 1e-4
        module = torch.export.load(tmp_path / kind / "export.pt2").module()
        model = load_model(run, num_classes=2 if kind == "textcnn" else 4)
        items: list[Any] = ["a"] if kind == "textcnn" else [np.zeros((8, 8), np.uint8)]
        assert module(model.input.collate(items)).device.type == "cpu"  # the file is one for any machine


@pytest.mark.slow
def test_a_file_uses_no_statistics_of_the_batch(images: str, tmp_path: Path) -> None:
    """As one made of a model in training mode would."""
    result = exported(run_folder(tmp_path / "run", trained("cnn"), images), "program")
    module = torch.export.load(result.path).module()
    batch = torch.randint(0, 255, (5, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(module(batch)[:1], module(batch[:1]))

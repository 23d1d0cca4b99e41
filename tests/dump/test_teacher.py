"""A teacher is frozen, checked, and refused when its outputs cannot be trusted."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from torch import Tensor, nn

from softcache.cache.schema import member_name
from softcache.data.classes import Match
from softcache.dump.open_teachers import open_teacher
from softcache.dump.teacher import Teacher
from softcache.errors import ConfigError, ModelError, SoftcacheError, TeacherError
from softcache.models import load_model, save_student
from softcache.models.estimators import ArrayCollate

BATCH = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def collate(items: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(item) for item in items])


def teacher(network: Any, *, classes: int = 3, output: str = "logits", **settings: Any) -> Teacher:
    return Teacher("t", "spec", network, collate, output=output, num_classes=classes, **settings)


def linear(classes: int = 3) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(5, classes)


class Through(nn.Module):
    """A linear layer and whatever happens to its result; `count` says how often it was called."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.change, self.count = linear(), change, 0
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        self.count += 1
        return self.change(self, self.fc(batch))


def in_train_mode(net: Any, logits: Tensor) -> Tensor:
    net.drop.train()
    return logits


def learning(net: Any, logits: Tensor) -> Tensor:
    net.seen += 1
    return logits


def learning_batch_norm(net: Any, logits: Tensor) -> Tensor:
    net.norm.running_mean.mul_(0.9).add_(0.1 * logits.mean(0))
    return logits


@pytest.mark.parametrize(
    ("change", "message", "tip"),
    [
        pytest.param(in_train_mode, "modules in train mode", r"train\(\)", id="train mode"),
        pytest.param(learning, "changed its buffer 'seen'", "must not learn", id="buffer"),
        pytest.param(learning_batch_norm, r"changed its buffer 'norm\.running_mean'", "eval mode", id="BatchNorm"),
        pytest.param(
            lambda net, z: z + net.count, "two outputs for one batch, up to 1 apart", "dropout", id="counting"
        ),
        pytest.param(lambda net, z: z + 1e-6 * torch.rand(3), "two outputs for one batch", "function of", id="noise"),
        pytest.param(lambda net, z: z.softmax(1), r"probabilities \(they sum to one\)", "output=probs", id="probs"),
        pytest.param(lambda net, z: z.log_softmax(1), "log-probabilities", "output=log_probs", id="log_probs"),
        pytest.param(lambda net, z: z[:, :2], r"shape \(6, 2\).*3 classes", "these classes", id="classes"),
        pytest.param(lambda net, z: z[0], r"shape \(3,\)", "these classes", id="no batch"),
        pytest.param(lambda net, z: z[:, :, None], r"shape \(6, 3, 1\)", "these classes", id="three axes"),
    ],
)
def test_refused_on_the_first_batch(change: Any, message: str, tip: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        teacher(Through(change)).check_first_batch(BATCH)
    assert re.search(tip, caught.value.tip)


def test_a_sound_teacher_passes_and_gives_its_networks_logits() -> None:
    net = Through(lambda net, z: net.norm(net.drop(z)))
    net.norm.running_mean.fill_(0.5)
    one = teacher(net.train())
    one.check_first_batch(BATCH)
    with torch.no_grad():
        expected = (net.fc(BATCH) - 0.5) / (1 + 1e-5) ** 0.5  # dropout off, running statistics used
    torch.testing.assert_close(one(BATCH).logits, expected)
    one.check_at_end()
    assert not any(p.requires_grad for p in net.parameters())


def test_learning_late_is_found_at_the_end() -> None:
    net = Through(lambda net, z: learning(net, z) if net.count > 2 else z)
    one = teacher(net)
    one.check_first_batch(BATCH)
    one(BATCH)
    with pytest.raises(TeacherError, match="changed its buffer 'seen'"):
        one.check_at_end()


@pytest.mark.parametrize("declared", ["probs", "log_probs"])
def test_declared_probabilities_are_no_fault(declared: str) -> None:
    change = {"probs": lambda net, z: z.softmax(1), "log_probs": lambda net, z: z.log_softmax(1)}[declared]
    one = teacher(Through(change), output=declared)
    one.check_first_batch(BATCH)
    with torch.no_grad():
        expected = linear()(BATCH).double().log_softmax(1)
    torch.testing.assert_close(one(BATCH).logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_hot_logits_of_a_few_rows_are_not_called_probabilities() -> None:
    """Rows must all sum to one, and be non-negative, before anybody is accused."""
    values = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, -1.0, 0.0]])
    teacher(lambda batch: values).check_first_batch(BATCH)
    with pytest.raises(TeacherError, match="probabilities"):
        teacher(lambda batch: values[:2]).check_first_batch(BATCH)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("inf")])
def test_probabilities_outside_their_range(value: float) -> None:
    with pytest.raises(TeacherError, match="outside \\[0, 1\\]"):
        teacher(lambda batch: np.full((6, 3), value), output="probs")(BATCH)


def test_zero_probabilities_get_the_floor() -> None:
    p = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    out = teacher(lambda batch: p, output="probs")(BATCH)
    np.testing.assert_allclose(out.logits.numpy(), np.log(np.maximum(p, 2.0**-24)), rtol=1e-6)
    assert out.floored == 3


@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_multi_label_probabilities_become_log_odds(kind: str) -> None:
    p = np.array([[0.0, 0.5, 1.0], [0.25, 0.875, 2.0**-30]])
    with np.errstate(divide="ignore"):
        given = p if kind == "probs" else np.log(p)
    out = teacher(lambda batch: given, output=kind, multi_label=True)(BATCH)
    floor = 2.0**-24
    expected = np.log(np.maximum(p, floor)) - np.log(np.maximum(1 - p, floor))
    np.testing.assert_allclose(out.logits.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert out.floored == 3  # 0, 1 and 2**-30


def test_not_finite_logits_come_out_as_they_are() -> None:
    """The dump refuses them, where it can name the samples."""
    out = teacher(lambda batch: torch.tensor([[1.0, float("nan"), 0.0]]))(BATCH)
    assert out.logits.isnan().tolist() == [[False, True, False]]


def test_class_order_is_applied_to_the_columns() -> None:
    out = teacher(lambda batch: torch.tensor([[10.0, 11.0, 12.0]]), match=Match((2, 0, 1), 3, ""))(BATCH)
    assert out.logits.tolist() == [[12.0, 10.0, 11.0]]


def test_results_of_any_float_kind() -> None:
    for made in (np.float64([[1, 2, 3.5]]), [[1, 2, 3.5]], torch.tensor([[1, 2, 3.5]]).half()):
        out = teacher(lambda batch, made=made: made)(BATCH)
        assert out.logits.dtype == torch.float32
        assert out.logits.tolist() == [[1, 2, 3.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_last_layer_states_its_rounding(dtype: torch.dtype) -> None:
    exact = torch.tensor([[1.2345678, -20.765432, 300.12345], [0.1, 0.2, 0.3]])
    one = teacher(lambda batch: exact.to(dtype))
    out = one(BATCH)
    error = (out.logits - exact).abs().amax(dim=1)
    assert one.rounds
    assert one.compute_dtype == str(dtype).removeprefix("torch.")
    assert bool((error <= out.rounding).all()) and bool((error > 0).all())
    assert bool((out.rounding < 0.02 * exact.abs().amax(dim=1)).all())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_last_linear_layer_runs_in_float32_under_autocast(wrapped: bool) -> None:
    torch.manual_seed(1)
    hidden, last = nn.Linear(5, 16), nn.Linear(16, 3)
    net: nn.Module = nn.Sequential(hidden, nn.Tanh(), last)
    if wrapped:
        net = nn.Sequential(net)
    dtypes: list[torch.dtype] = []
    hidden.register_forward_hook(lambda *seen: dtypes.append(seen[2].dtype))
    one = teacher(net, autocast=torch.bfloat16)
    out = one(BATCH)
    assert dtypes[-1] == torch.bfloat16  # before, the layer was looked for without autocast
    assert one.compute_dtype == "float32"
    assert not one.rounds
    assert out.rounding.max() == 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inner = torch.tanh(hidden(BATCH))
    torch.testing.assert_close(out.logits, inner.float() @ last.weight.T + last.bias, rtol=1e-6, atol=1e-6)
    assert "forward" not in last.__dict__  # as it was before


def test_without_a_linear_layer_the_half_type_is_reported() -> None:
    net = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 3, 1), nn.Flatten())
    one = teacher(net, autocast=torch.bfloat16)
    out = one(BATCH)
    with torch.no_grad():
        error = (net(BATCH) - out.logits).abs().amax(dim=1)
    assert one.compute_dtype == "bfloat16"
    assert bool((out.rounding >= 2.0**-9 * out.logits.abs().amax(dim=1)).all())
    assert error.max() > 0


def test_unknown_output() -> None:
    with pytest.raises(ConfigError, match="unknown output 'prob'") as caught:
        teacher(linear(), output="prob")
    assert "probs" in caught.value.tip


@pytest.mark.parametrize(
    ("wanted", "taken", "name"),
    [
        pytest.param("resnet20", [], "resnet20", id="as it is"),
        pytest.param("ResNet 20!", [], "resnet-20", id="cleaned"),
        pytest.param("a", ["a"], "a-2", id="second"),
        pytest.param("a", ["a", "a-2", "a-3"], "a-4", id="fourth"),
        pytest.param("A", ["a"], "a-2", id="case"),
        pytest.param("--", [], "teacher", id="nothing left"),
        pytest.param("été", [], "t", id="not ASCII"),
        pytest.param("x" * 99, ["x" * 56], "x" * 56 + "-2", id="long"),
    ],
)
def test_member_names(wanted: str, taken: list[str], name: str) -> None:
    from softcache.cache.schema import MEMBER_NAME

    assert member_name(wanted, taken) == name
    assert MEMBER_NAME.fullmatch(name)


# ---- opening --------------------------------------------------------------------------------------------------------


def opened(path: Path, text: str, taken: Sequence[str] = (), names: Sequence[str] = ("a", "b", "c")) -> Teacher:
    return open_teacher(
        text.format(pieces=path / "pieces.py", folder=path),
        taken=taken,
        num_classes=len(names),
        class_names=names,
        multi_label=False,
        input_shape=(5,),
        device="cpu",
        autocast=None,
    )


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    shutil.copy(WORLDS / "estimators.py", tmp_path / "pieces.py")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name", "output", "spec"),
    [
        pytest.param("{pieces}:proba", "proba", "probs", "pieces.py:proba", id="predict_proba"),
        pytest.param("{pieces}:decision", "decision", "logits", "pieces.py:decision", id="decision_function"),
        pytest.param("{pieces}:both", "both", "probs", "pieces.py:both", id="both"),
        pytest.param("{pieces}:plain", "plain", "logits", "pieces.py:plain", id="function"),
        pytest.param("{pieces}:plain?name=Mine", "mine", "logits", "pieces.py:plain", id="named"),
        pytest.param("{pieces}:module?output=log_probs", "module", "log_probs", "pieces.py:module", id="module"),
        pytest.param("softcache:mlp?hidden=4", "mlp", "logits", "softcache:mlp?hidden=4", id="ours"),
    ],
)
def test_what_a_spec_opens(pieces: Path, text: str, name: str, output: str, spec: str) -> None:
    one = opened(pieces, text)
    assert (one.name, one.output, one.model_spec, one.class_order) == (name, output, spec, None)
    items = [np.arange(5, dtype=np.float32) + i for i in range(2)]
    assert one(one.collate(items)).logits.shape == (2, 3)


def test_a_run_folder_brings_its_name_weights_and_class_order(pieces: Path) -> None:
    model = load_model("softcache:mlp?hidden=4", num_classes=3, class_names=("c", "a", "b"), input_shape=(5,))
    (pieces / "best-run").mkdir()
    save_student(model, pieces / "best-run" / "student.safetensors", metadata={})
    one = opened(pieces, "{folder}/best-run")
    items = [np.arange(5, dtype=np.float32) - i for i in range(3)]
    with torch.no_grad():
        live = model.eval()(model.input.collate(items))
    assert (one.name, one.class_order) == ("best-run", [1, 2, 0])
    assert torch.equal(one(one.collate(items)).logits, live[:, [1, 2, 0]])
    assert opened(pieces, "{folder}/best-run", taken=["best-run"]).name == "best-run-2"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        pytest.param(
            "{pieces}:other_classes", ModelError, r"knows other classes than the data has.*'4'", id="estimator classes"
        ),
        pytest.param("{pieces}:unfit", ModelError, "neither is callable nor", id="not a model"),
        pytest.param("{pieces}:plain@w.pt", ModelError, "only be loaded into a torch module", id="weights"),
        pytest.param("{pieces}:nothing", ConfigError, "no factory 'nothing'", id="factory"),
        pytest.param("softcache:mpl", ModelError, "no model 'mpl'", id="model"),
        pytest.param("{folder}", ModelError, "holds no student.safetensors", id="no run"),
    ],
)
def test_specs_that_open_nothing(pieces: Path, text: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        opened(pieces, text)


def test_estimators_see_their_classes_by_name(pieces: Path) -> None:
    assert opened(pieces, "{pieces}:named").class_order == [1, 2, 0]
    with pytest.raises(ModelError, match=r"knows other classes.*'c'") as caught:
        opened(pieces, "{pieces}:named", names=("a", "b", "z"))
    assert "class names" in caught.value.tip


def test_fingerprints_follow_weights_output_and_preprocessing(pieces: Path) -> None:
    def made(seed: int, text: str) -> str | None:
        torch.manual_seed(seed)
        return opened(pieces, text).fingerprint

    first = made(0, "softcache:mlp?hidden=4")
    assert first == made(0, "softcache:mlp?hidden=4")
    different = [
        made(1, "softcache:mlp?hidden=4"),
        made(0, "softcache:mlp?hidden=4&mean=0.4"),
        made(0, "softcache:mlp?hidden=4&output=log_probs"),
    ]
    assert len({first, *different}) == 4


def test_a_callable_is_known_by_its_outputs(pieces: Path) -> None:
    one = opened(pieces, "{pieces}:decision")
    assert one.fingerprint is None
    items = [np.arange(5, dtype=np.float32) + i for i in range(2)]
    one.check_first_batch(one.collate(items))
    assert one.fingerprint == hashlib.sha256(np.stack(items)[:, :3].tobytes()).hexdigest()


def test_array_collate() -> None:
    batch = ArrayCollate()([np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((2, 3), np.uint8)])
    assert batch.dtype == np.float32
    assert batch.tolist() == [[0, 1, 2, 3, 4, 5], [1] * 6]
    assert ArrayCollate()(["a text", "another"]) == ["a text", "another"]

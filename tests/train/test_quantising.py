"""`train --quantise int8`: a student learns as the int8 program that it becomes, from a stage on, and is saved as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_world import World
from torch import Tensor
from training import run_with, some_in_the_quick_tier, stopped_after

from softcache.config import TrainConfig
from softcache.errors import ConfigError
from softcache.evaluate.measure import evaluate
from softcache.models import load_model
from softcache.models.fake_quantise import (
    INPUT,
    OBSERVED,
    OUTPUT,
    Quantised,
    quantised_layers,
    rounded_weight,
    whole_weights,
)
from softcache.train import flow
from softcache.train.flow import one_step
from softcache.train.metrics import best_epoch

STEPS = 3
PLAN = {
    "early.0": Quantised("early.1"),
    "late.0": Quantised("late.1", output=True),  # whose answers are averaged before the last layer takes them
    "head": Quantised(),
}
WHOLE = {"early.0.weight", "late.0.weight", "head.weight"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("quantising"))


def config(world: World, out: Path, **settings: Any) -> TrainConfig:
    given = {
        "cache": None,
        "student": f"{world.spec('net')}?norm=true",
        "eval_data": world.spec("toy"),
        "quantise": "int8",
    }
    return world.config(out, "ce", **given | settings)


def opened(world: World, out: Path) -> Any:
    return load_model(
        f"{world.spec('net')}?norm=true@{out}", num_classes=5, class_names=("ant", "bee", "cat", "dog", "eel")
    ).eval()


def measured(world: World, model: Any) -> Any:
    material = flow.prepare(config(world, world.path / "x")).material
    assert material.eval_set is not None
    return evaluate(model, material.eval_set, material.policy.for_evaluation(), device=torch.device("cpu"))


# ---- one run --------------------------------------------------------------------------------------------------------


def test_a_student_learns_with_rounded_numbers_and_is_saved_as_int8(world: World, tmp_path: Path) -> None:
    ends: list[list[float]] = []
    learned: dict[str, Tensor] = {}

    def step(prepared: Any, *rest: Any) -> dict[str, Tensor]:
        values = one_step(prepared, *rest)
        layers = dict(quantised_layers(prepared.model.net))
        assert set(layers) == set(PLAN)
        ends.append(layers["late.0"].input_range.tolist())
        learned.update({name: whole_weights(layer) for name, layer in layers.items()})
        return values

    result = run_with(config(world, tmp_path / "run", epochs=2), step=step)
    assert len({tuple(two) for two in ends}) > STEPS and all(low == 0 < high for low, high in ends)  # behind a ReLU
    tensors = load_file(tmp_path / "run/student.safetensors")
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.int8} == WHOLE
    assert not any("running" in name or OBSERVED in name for name in tensors)
    for name in PLAN:  # the whole numbers with which it learned, some with the sign of BatchNorm's factor
        assert torch.equal(tensors[f"{name}.weight"].abs(), learned[name].abs())
    model = opened(world, tmp_path / "run")
    assert dict(model.shrunk.quantised) == PLAN
    again = measured(world, model)
    assert result.evaluation is not None and again.errors == result.evaluation.errors


def test_what_is_rounded_is_what_a_step_sees(world: World, tmp_path: Path) -> None:
    """The first batch of a run, computed again by hand."""
    seen: list[Any] = []

    def step(prepared: Any, live: Any, loaded: Any, *rest: Any) -> dict[str, Tensor]:
        if not seen:
            layer = prepared.model.net.early[0]
            hook = layer.register_forward_hook(
                lambda m, args, output: seen.append((m, args[0], rounded_weight(m), output))
            )
            try:
                values = one_step(prepared, live, loaded, *rest)
            finally:
                hook.remove()
            layer, taken, weight, output = seen[0]
            low, high = float(taken.min().clamp(max=0)), float(taken.max().clamp(min=0))
            assert layer.input_range.tolist() == pytest.approx([low, high])
            scale = (high - low) / 255
            rounded = torch.fake_quantize_per_tensor_affine(taken, scale, round(-low / scale), 0, 255)
            wanted = torch.nn.functional.conv2d(rounded.double(), weight.double(), None, padding=1)
            assert torch.allclose(output.double(), wanted, atol=1e-4)
            return values
        return one_step(prepared, live, loaded, *rest)

    run_with(config(world, tmp_path / "run"), step=step)
    assert seen


def test_evaluation_moves_no_ends_and_a_later_stage_leaves_them(world: World, tmp_path: Path) -> None:
    found: list[tuple[int, list[float], list[float]]] = []

    def step(prepared: Any, live: Any, *rest: Any) -> dict[str, Tensor]:
        layer = dict(quantised_layers(prepared.model.net)).get("head")
        before = [] if layer is None else layer.input_range.tolist()
        values = one_step(prepared, live, *rest)
        found.append((live.number, before, [] if layer is None else layer.input_range.tolist()))
        return values

    stages = ("epochs=1", "epochs=2 quantise=int8", "epochs=2")
    run_with(config(world, tmp_path / "run", quantise=None, stage=stages), step=step)
    by_stage = {number: [pair for n, *pair in found if n == number] for number in range(3)}
    assert all(pair == [[], []] for pair in by_stage[0])
    assert all(before != after for before, after in by_stage[1])
    assert [after for _, after in by_stage[1][:-1]] == [
        before for before, _ in by_stage[1][1:]
    ]  # also over an evaluation
    assert {tuple(two) for pair in by_stage[2] for two in pair} == {tuple(by_stage[1][-1][1])}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["int8"] for row in rows] == [0, 1, 1, 1, 1]
    assert dict(opened(world, tmp_path / "run").shrunk.quantised) == PLAN


@pytest.mark.parametrize(
    "settings", [{"ema": 0.5}, {"freeze": ("early",)}, {"keep": "best"}, {"accumulate": 2}], ids=str
)
def test_other_settings_go_with_it(settings: dict[str, Any], world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = world_run(config(world, out, epochs=2, lr=0.01, **settings))
    model = opened(world, out)
    for _, layer in quantised_layers(model.net):
        low, high = getattr(layer, INPUT).tolist()
        assert low <= 0 < high and high - low > 1e-3
    assert model.net.late[0].output_range.tolist() != [0.0, 1.0]
    again = measured(world, model)
    assert result.evaluation is not None and again.errors == result.evaluation.errors


def world_run(made: TrainConfig) -> Any:
    return flow.run(made, quiet=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler
def test_a_compiled_student_learns_the_same_int8(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the compiler sees; its kernels, which take minutes to be made, are those of every compiled student."""
    compiled, torchs = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(1) or torchs(model, backend="aot_eager"))
    stages = ("epochs=1", "epochs=2 quantise=int8", "epochs=1 prune='unstructured:amount=0.5'")
    both = []
    for name, asked in (("eager", False), ("compiled", True)):
        world_run(config(world, tmp_path / name, quantise=None, stage=stages, lr=0.01, compile=asked))
        both.append(load_file(tmp_path / name / "student.safetensors"))
    eager, found = both
    assert len(compiled) == 3 and eager.keys() == found.keys()
    for name, tensor in eager.items():
        if tensor.dtype == torch.int8:
            assert int((tensor.int() - found[name].int()).abs().max()) <= 1  # on the border of two
        else:
            assert torch.allclose(tensor, found[name], rtol=1e-3, atol=1e-5), name


def test_zeros_that_are_held_are_zeros_of_int8(world: World, tmp_path: Path) -> None:
    stages = ("epochs=1 prune='unstructured:amount=0.6'", "epochs=1 quantise=int8", "epochs=1")
    world_run(config(world, tmp_path / "run", quantise=None, stage=stages))
    tensors = load_file(tmp_path / "run/student.safetensors")
    weights = [tensors[name] for name in WHOLE]
    assert sum(int((weight == 0).sum()) for weight in weights) >= 0.6 * sum(weight.numel() for weight in weights) - 1


def test_the_best_epoch_is_one_of_int8() -> None:
    rows = [
        {"eval_top1": 0.9, "int8": 0},
        {"eval_top1": 0.7, "int8": 1},
        {"eval_top1": 0.8, "int8": 1},
        {"eval_top1": 0.6, "int8": 1},
    ]
    assert best_epoch(rows) == 2


# ---- a student that comes quantised ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8(world: World) -> Path:
    out = world.path / "int8"
    world_run(config(world, out))
    return out


def test_a_quantised_student_is_healed_as_one(world: World, tmp_path: Path, int8: Path) -> None:
    student = f"{world.spec('net')}?norm=true@{int8}"
    world_run(config(world, tmp_path / "run", student=student, quantise=None, epochs=3, lr=0.3))
    before, after = load_file(int8 / "student.safetensors"), load_file(tmp_path / "run/student.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after[name])
        assert moved == (not name.endswith("_range")), name
        assert tensor.dtype == after[name].dtype
    assert dict(opened(world, tmp_path / "run").shrunk.quantised) == PLAN


def test_it_begins_as_it_was_saved(world: World, tmp_path: Path, int8: Path) -> None:
    prepared = flow.prepare(
        config(world, tmp_path / "x", student=f"{world.spec('net')}?norm=true@{int8}", quantise=None)
    )
    batch = torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        items = prepared.model.input.collate(list(batch.numpy()))
        assert torch.allclose(prepared.model.eval()(items), opened(world, int8)(items), atol=1e-5)


# ---- stopped and gone on with ---------------------------------------------------------------------------------------

STAGES = ("epochs=1", "epochs=1 quantise=int8", "epochs=1 optimizer=adamw lr=1e-3")


def alike(world: World, out: Path, **settings: Any) -> TrainConfig:
    return config(world, out, quantise=None, stage=STAGES, ema=0.5, keep="best", momentum=0.9, **settings)


def outcome(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (out / "student.safetensors").read_bytes(), [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    out = world.path / "undisturbed"
    world_run(alike(world, out))
    return out


@pytest.mark.parametrize("saves", some_in_the_quick_tier(range(1, len(STAGES) * STEPS + 1)))
def test_stopped_after_any_step_it_ends_as_one_that_was_not(
    saves: int, world: World, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with stopped_after(saves), pytest.raises(KeyboardInterrupt):
        world_run(alike(world, out, checkpoint_every=1))
    world_run(alike(world, out))
    assert outcome(out) == outcome(undisturbed)
    world_run(alike(world, out))  # a finished one is given back as it is
    assert outcome(out) == outcome(undisturbed)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantise": "int4"}, r"--quantise int4: only int8 can be learned"),
        ({"quantise": None, "stage": ("quantise=int3",)}, r"--stage 1: quantise int3: only int8 can be learned"),
    ],
)
def test_a_mistake_is_told(settings: dict[str, Any], said: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        world_run(config(world, tmp_path / "run", **settings))


def test_quantising_twice_is_refused(world: World, tmp_path: Path, int8: Path) -> None:
    student = f"{world.spec('net')}?norm=true@{int8}"
    with pytest.raises(ConfigError, match="is quantised already, and learns as such") as caught:
        world_run(config(world, tmp_path / "run", student=student))
    assert caught.value.tip == "leave --quantise out" and not (tmp_path / "run/checkpoint.pt").exists()


def test_observed_ends_are_no_part_of_what_is_saved(int8: Path) -> None:
    assert {name.rpartition(".")[2] for name in load_file(int8 / "student.safetensors")} == {
        "weight", "weight_scale", "bias", INPUT, OUTPUT,
    }  # fmt: skip

"""`train --prune`: beside torch.nn.utils.prune step by step, what is held stays zero, and what cannot be is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_world import World, weights_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from training import run_with

from softcache import cli
from softcache.errors import ConfigError
from softcache.evaluate.measure import evaluate
from softcache.losses.schedules import Moment, Schedule
from softcache.models import load_model
from softcache.models.seal import digest
from softcache.train import flow
from softcache.train.flow import one_step
from softcache.train.metrics import best_epoch, is_stale
from softcache.train.pruning import Pruning

STEPS = 3
LAYERS = ("early.0", "late.0", "head")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pruning"))


def told(world: World, *losses: str, **settings: Any) -> list[str]:
    """What is said before the first step."""
    return list(flow.rehearse(flow.prepare(world.config(world.path / "run", *losses, **settings))))


def zeros_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: (net.get_submodule(name).weight == 0).clone() for name in LAYERS}  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------- beside torch's own


class Twin:
    """A copy of the student that torch.nn.utils.prune prunes, trained on the same batches by a loop of its own."""

    def __init__(self, net: nn.Module, scope: str) -> None:
        self.net, self.scope = copy.deepcopy(net), scope
        self.layers = [(self.net.get_submodule(name), "weight") for name in LAYERS]
        self._optimizer: torch.optim.Optimizer | None = None

    def prune(self, amount: float | int) -> None:
        if self.scope == "global":
            torch_prune.global_unstructured(self.layers, torch_prune.L1Unstructured, amount=amount)
        else:
            for layer, name in self.layers:
                torch_prune.l1_unstructured(layer, name, amount)

    def step(self, images: Tensor, labels: Tensor) -> None:
        if self._optimizer is None:  # when there are masks, and so weight_orig
            parameters = list(self.net.parameters())
            self._optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
        self._optimizer.zero_grad()
        F.cross_entropy(self.net(images.float() / 255), labels, ignore_index=-1).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)
        self._optimizer.step()
        for layer, name in self.layers:
            hook = next(h for h in layer._forward_pre_hooks.values() if isinstance(h, torch_prune.BasePruningMethod))
            setattr(layer, name, hook.apply_mask(layer))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_rate_is_torchs_own_pruning_again_and_again(world: World, tmp_path: Path, scope: str) -> None:
    """l1_unstructured before each step; momentum, weight decay and the gradient's length as torch's masks make them."""
    twins: list[Twin] = []
    apart: list[float] = []

    def step(prepared: Any, live: Any, loaded: Any, *rest: Any) -> dict[str, Tensor]:
        if not twins:
            twins.append(Twin(prepared.model.net, scope))
        batch = prepared.material.batch(loaded, prepared.config, live.objective.feature_names, prepared.device)
        twins[0].prune(0.1)
        twins[0].step(batch.inputs, batch.given.labels.own)
        values = one_step(prepared, live, loaded, *rest)
        for name in LAYERS:
            found, wanted = (net.get_submodule(name).weight for net in (prepared.model.net, twins[0].net))
            assert torch.equal(found == 0, wanted == 0)
            apart.append(float((found - wanted).detach().abs().max()))
        return values

    config = world.config(
        tmp_path / "run", "ce", cache=None, epochs=4, momentum=0.9, weight_decay=0.01, clip_norm=0.05,
        prune=f"unstructured:rate=0.1,scope={scope}",
    )  # fmt: skip
    rows = run_with(config, step=step).metrics
    assert len(apart) == 4 * STEPS * len(LAYERS) and max(apart) < 1e-6
    assert rows[-1]["sparsity"] == pytest.approx(1 - 0.9**12, abs=0.02)


# ---------------------------------------------------------------------------------------------------- what is held stays


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "lr": 0.5},
        {"optimizer": "adamw", "weight_decay": 0.1, "ema": 0.8, "accumulate": 2},
        {"optimizer": "adam", "weight_decay": 0.1, "clip_norm": 0.1, "ema": 0.8, "channels_last": True},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_what_was_set_to_zero_stays_so_after_every_step(world: World, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of the student and of its average, and as many as the schedule says."""
    before: dict[str, Tensor] = {}
    count, amounts = 0, Schedule.parse("linear(0.1, 0.7, until=2)", "x")

    def step(prepared: Any, live: Any, loaded: Any, moment: Moment, number: int) -> dict[str, Tensor]:
        nonlocal count
        values = one_step(prepared, live, loaded, moment, number)
        nets = [prepared.model.net] + ([] if prepared.average is None else [prepared.average.module.net])
        held = {name: ~mask for name, mask in prepared.masks.left.items()}
        for name, mask in before.items():
            assert not (mask & ~held[name]).any()
        for net in nets:
            assert all(not net.get_parameter(name)[mask].any() for name, mask in held.items())
            assert sum(int(zeros.sum()) for zeros in zeros_of(net).values()) == sum(int(m.sum()) for m in held.values())
        of = {name: mask for name, mask in held.items() if name != "head.weight"}
        assert not held["head.weight"].any()
        total = sum(mask.numel() for mask in of.values())
        assert sum(int(mask.sum()) for mask in of.values()) == round(amounts.at(moment) * total)
        before.update({name: mask.clone() for name, mask in held.items()})
        count += 1
        return values

    config = world.config(
        tmp_path / "run", "ce", cache=None, epochs=3,
        prune="unstructured:amount=linear(0.1, 0.7, until=2),keep=head", **settings,
    )  # fmt: skip
    result = run_with(config, step=step)
    assert count == 9
    saved = weights_of(tmp_path / "run")
    share = sum((saved[f"{n}.weight"] == 0).sum() for n in LAYERS) / sum(saved[f"{n}.weight"].size for n in LAYERS)
    assert result.metrics[-1]["sparsity"] == pytest.approx(float(share), abs=1e-12)


def test_stages_without_a_word_of_it_hold_what_those_before_set_to_zero(world: World, tmp_path: Path) -> None:
    stages = (
        "epochs=1",
        "epochs=2 prune='unstructured:amount=cubic(0, 0.6, until=1)'",
        "epochs=2 prune=none",
        "epochs=1",
    )
    result = world.train(tmp_path / "run", "ce", cache=None, stage=stages)
    sparsities = [row["sparsity"] for row in result.metrics]
    assert sparsities[0] == 0 < sparsities[1] < sparsities[2] == pytest.approx(0.6, abs=0.01)
    assert sparsities[2:] == [sparsities[2]] * 4
    saved = weights_of(tmp_path / "run")
    assert sum(int((saved[f"{name}.weight"] == 0).sum()) for name in LAYERS) == round(
        sparsities[-1] * sum(saved[f"{name}.weight"].size for name in LAYERS)
    )


def test_frozen_weights_stay_as_they_are(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "dense", "ce", cache=None, epochs=1)
    world.train(
        tmp_path / "run", "ce", cache=None, init_from=str(tmp_path / "dense"), freeze=("late",),
        prune="unstructured:amount=0.5,scope=layer",
    )  # fmt: skip
    before, after = weights_of(tmp_path / "dense"), weights_of(tmp_path / "run")
    assert (before["late.0.weight"] == after["late.0.weight"]).all()
    for name in ("early.0.weight", "head.weight"):
        assert (after[name] == 0).sum() == round(0.5 * after[name].size)


def test_every_says_how_often_it_looks(world: World, tmp_path: Path) -> None:
    found: dict[str, list[int]] = {}
    for every in ("step", "epoch", "4steps"):
        counts = found.setdefault(every, [])

        def step(prepared: Any, *rest: Any, counts: list[int] = counts) -> dict[str, Tensor]:
            values = one_step(prepared, *rest)
            counts.append(prepared.masks.zeros["late.0.weight"])
            return values

        prune = f"unstructured:rate=0.25,scope=layer,every={every}"
        run_with(world.config(tmp_path / every, "ce", cache=None, epochs=2, prune=prune), step=step)
    each = [0]
    while len(each) < 7:
        each.append(each[-1] + round(0.25 * (648 - each[-1])))
    assert found["step"] == each[1:]
    assert found["epoch"] == [each[1]] * 3 + [each[2]] * 3
    assert found["4steps"] == [each[1]] * 4 + [each[2]] * 2


# --------------------------------------------------------------------------------------------------------- healing


@pytest.fixture(scope="module")
def sparse(world: World) -> Path:
    """A student of which half of the weights are zero, as after shrink."""
    world.train(world.path / "dense", "ce", cache=None, epochs=1)
    state = load_file(world.path / "dense/student.safetensors")
    for name in ("early.0.weight", "late.0.weight"):
        state[name][: len(state[name]) // 2] = 0.0
    state["head.weight"][:] = 0.0
    save_file(state, world.path / "sparse.safetensors")
    return world.path / "sparse.safetensors"


def test_held_zeros_stay_and_the_others_heal(world: World, tmp_path: Path, sparse: Path) -> None:
    student = f"{world.spec('net')}@{sparse}"
    (line,) = told(world, "ce", cache=None, student=student, prune="held")
    assert line == "--prune held: head.weight begins as zeros throughout, and is not held"
    (line,) = told(world, "ce", cache=None, student=student)
    assert "nothing holds them there" in line and "--prune held leaves them zero" in line
    assert told(world, "ce", cache=None, student=student, prune="unstructured:amount=linear(0.65, 0.7)") == []
    world.train(tmp_path / "run", "ce", cache=None, student=student, prune="held", epochs=2, optimizer="adam")
    begun, healed = weights_of(sparse.parent, sparse.name), weights_of(tmp_path / "run")
    for name in ("early.0.weight", "late.0.weight"):
        assert ((healed[name] == 0) == (begun[name] == 0)).all() and (healed[name] != begun[name]).any()
    assert (healed["head.weight"] != 0).mean() > 0.5  # but for channels that are dead


def test_a_weight_that_is_zero_by_accident_later_on_is_not_held(world: World, sparse: Path) -> None:
    prepared = flow.prepare(
        world.config(world.path / "run", "ce", cache=None, student=f"{world.spec('net')}@{sparse}", prune="held")
    )
    masks, pruning = prepared.masks, prepared.stages[0].pruning
    assert masks is not None and pruning is not None
    pruning.before(masks, Moment(0, 0, STEPS, 1))
    zeros = dict(masks.zeros)
    masks.weights["head.weight"].data[0, 0] = 1.0
    masks.weights["late.0.weight"].data[:] = 0.0
    pruning.before(masks, Moment(0, 1, STEPS, 1))
    assert masks.zeros == zeros


def test_the_student_that_is_saved_is_the_one_that_was_evaluated(world: World, tmp_path: Path) -> None:
    """Of the average, and of the best epoch among those with as many zeros as ever."""
    result = world.train(
        tmp_path / "run", "ce", cache=None, eval_data=world.spec("toy"), ema=0.5, keep="best", epochs=4,
        prune="unstructured:amount=linear(0, 0.8, until=2)",
    )  # fmt: skip
    prepared = flow.prepare(world.config(tmp_path / "again", "ce", cache=None, eval_data=world.spec("toy")))
    names = ("ant", "bee", "cat", "dog", "eel")
    spec = f"{world.spec('net')}@{tmp_path / 'run'}"
    model = load_model(spec, num_classes=5, class_names=names, input_shape=(8, 8))
    assert prepared.material.eval_set is not None
    found = evaluate(model, prepared.material.eval_set, prepared.material.policy, device=torch.device("cpu"))
    assert result.evaluation is not None and (found.top1, found.nll) == (result.evaluation.top1, result.evaluation.nll)
    row = result.metrics[result.kept_epoch]
    assert row["sparsity"] == max(one["sparsity"] for one in result.metrics) and row["eval_top1"] == found.top1
    assert sum(int(zeros.sum()) for zeros in zeros_of(model.net).values()) == round(0.8 * 762)


def test_the_best_epoch_is_one_of_those_with_most_zeros_and_none_is_stale_before() -> None:
    rows = [
        {"eval_top1": top1, "sparsity": s} for top1, s in ((0.9, 0.0), (0.8, 0.4), (0.5, 0.8), (0.6, 0.8), (0.5, 0.8))
    ]
    assert best_epoch(rows) == 3 and best_epoch(rows[:2]) == 1
    assert [is_stale(rows[:n], 1, 0) for n in range(1, 6)] == [False, False, False, False, True]


def test_a_student_that_is_pruned_and_then_quantised_has_the_zeros_of_its_masks(world: World, tmp_path: Path) -> None:
    """Of its average; and healed as an int8 student it keeps them."""
    stages = ("prune='unstructured:amount=0.6'", "epochs=2 quantise=int8 lr=0.01")
    result = world.train(tmp_path / "run", "ce", cache=None, stage=stages, ema=0.5)
    student = f"{world.spec('net')}@{tmp_path / 'run'}"
    world.train(tmp_path / "healed", "ce", cache=None, student=student, prune="held", epochs=2)
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "healed")
    names = [f"{name}.weight" for name in LAYERS]
    zeros = {name: before[name] == 0 for name in names}
    assert (
        sum(int(zero.sum()) for zero in zeros.values())
        >= round(0.6 * 762)
        == round(result.metrics[-1]["sparsity"] * 762)
    )
    assert all(
        before[name].dtype == after[name].dtype == np.int8 and not after[name][zeros[name]].any() for name in names
    )
    assert any((before[name] != after[name]).any() for name in names)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lottery", r"no way 'lottery' to prune while training\n.*held, unstructured"),
        ("structured:amount=0.5", r"no way 'structured' .*\n.*softcache shrink --by prune:structured"),
        ("unstructured", r"wants either an amount or a rate\n.*linear\(0, 0.8, until=15\)"),
        ("unstructured:amount=0.5,rate=0.1", "wants either an amount or a rate"),
        ("unstructured:amount=1", r"1 is no share of weights.*\n.*0.95 leaves one of twenty"),
        ("unstructured:amount=linear(0, 1.5)", "0 to 1.5 is no share of weights"),
        ("unstructured:amount=-0.1", "-0.1 is no share of weights"),
        ("unstructured:amount=0", "0 is no share of weights"),
        ("unstructured:rate=step(1, at=3)", "0.1 to 1 is no share of weights"),
        ("unstructured:amount=linear(0.8, 0)", r"linear\(0.8, 0\) falls, and what was set to zero stays so"),
        ("unstructured:amount=step(0.5, at=2)", r"step\(0.5, at=2\) falls"),
        ("unstructured:amount=piecewise(0:0, 1:0.5, 2:0.4)", "falls"),
        ("unstructured:amount=warmup(2, linear(0.5, 0.2))", "falls"),
        ("unstructured:amount=half", r"'half' is neither a number nor a schedule"),
        ("unstructured:amount=linear(0, 0.5", "no closing bracket"),
        ("unstructured:amount=0.5,scope=all", r"unknown value 'all'\n.*global, layer"),
        ("unstructured:amount=0.5,every=never", r"every=never is no time\n.*every=100steps"),
        ("unstructured:amount=0.5,every=0", "every=0 is no time"),
        ("unstructured:amuont=0.5", r"unknown parameter 'amuont'\n.*'amount'"),
        ("unstructured:said=0.5,amount=0.5", "unknown parameter 'said'"),
        ("unstructured:amount=0.5,amount=0.6", "'amount' is given twice"),
        ("unstructured:0.5", "'0.5' is not key=value"),
        ("held:scope=layer", "held takes no settings"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--prune {text.partition(':')[0]}[\\s\\S]*{message}"):
        Pruning.parse(text, "--prune")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune": "unstructured:amount=0.5,keep=early,haed"}, r"there is no module 'haed' to keep\n.*'head'"),
        ({"prune": "unstructured:amount=0.5,keep=early,late,head"}, "no convolution and no linear layer .* is left"),
        ({"prune": "unstructured:amount=0.5,keep=head", "freeze": ("early", "late")}, "no convolution and no linear"),
        ({"prune": "unstructured:rate=1e-4"}, r"at most 0.0001 of 762 weights is less than one.*\n.*every=epoch"),
        ({"prune": "held"}, r"no weight of the student is zero.*\n.*shrink --by prune:unstructured"),
        ({"stage": ("epochs=1", "prune=held")}, r"--stage 2: prune held: nothing holds a zero in the stages before"),
        ({"stage": ("epochs=1", "prune=unstructured:amount=2")}, "--stage 2: prune unstructured:amount=2: 2 is no share"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_student_is_refused(world: World, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        told(world, "ce", cache=None, **settings)


def test_an_amount_that_is_far_from_its_end_is_told(world: World) -> None:
    (line,) = told(world, "ce", cache=None, prune="unstructured:amount=linear(0, 0.8, until=10)")
    assert "the amount of --prune comes to 7% of its peak in 1 epochs" in line


def test_a_run_whose_zeros_depend_on_its_length_does_not_go_on(world: World, tmp_path: Path) -> None:
    for name, prune, follows in (("a", "linear(0, 0.8)", True), ("b", "linear(0, 0.8, until=1)", False)):
        out, settings = tmp_path / name, {"cache": None, "prune": f"unstructured:amount={prune}"}
        world.train(out, "ce", **settings)
        if follows:
            with pytest.raises(
                ConfigError, match=r"the amount of --prune, linear\(0, 0.8\), depends on how many epochs"
            ):
                world.train(out, "ce", more_epochs=1, **settings)
        else:
            world.train(out, "ce", more_epochs=1, **settings)
            world.train(tmp_path / "whole", "ce", epochs=2, **settings)
            found, wanted = weights_of(out), weights_of(tmp_path / "whole")
            assert all((found[key] == wanted[key]).all() for key in wanted)


def changed_masks(change: Callable[[dict[str, Any]], None], path: Path) -> None:
    """A checkpoint with other masks, sealed anew as a stranger could."""
    state = torch.load(path, weights_only=True)
    change(state)
    del state["digest"]
    torch.save({**state, "digest": digest(state)}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("masks"), "it holds no masks"),
        (lambda s: s.update(masks=[1]), "its masks are no table"),
        (lambda s: s["masks"].update({"net.weight": torch.ones(2, dtype=torch.bool)}), "other masks than the student"),
        (lambda s: s["masks"].update({"head.weight": torch.ones(1, 12, dtype=torch.bool)}), r"has shape \(1, 12\)"),
        (lambda s: s["masks"].update({"head.weight": torch.ones(5, 12)}), "the mask of 'head.weight' is none"),
    ],
    ids=["gone", "a list", "unknown", "shape", "numbers"],
)
def test_a_checkpoint_with_other_masks_is_refused(
    world: World, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str, capsys: Any
) -> None:
    out = tmp_path / "run"
    argv = ["train", "--data", world.spec("toy"), "--student", world.spec("net"), "--loss", "ce", "--out", str(out)]
    argv += ["--prune", "unstructured:amount=linear(0, 0.5)", "--threads", "1", "--device", "cpu", "--quiet"]
    argv += ["--epochs", "1"]
    assert cli.main(argv) == 0
    changed_masks(lambda s: s["progress"].update(epoch=0, metrics=[]), out / "checkpoint.pt")
    changed_masks(change, out / "checkpoint.pt")
    capsys.readouterr()
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert "checkpoint.pt: does not fit this student" in said and "tip: choose another --out" in said
    assert re.search(message, said) and "Traceback" not in said


def test_the_run_folder_says_what_was_pruned(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", "ce", cache=None, stage=("prune=unstructured:amount=0.5", "epochs=1"))
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert [stage["prune"] for stage in about["stages"]] == ["unstructured:amount=0.5", None]

"""Runs of every released version are evaluated, exported, dumped from and resumed: what `tools/golden/make_run.py` left."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import softcache
from softcache import cli, dump, train
from softcache.config import DumpConfig, TrainConfig
from softcache.errors import UntrustedError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RUNS = sorted(path.parent for path in GOLDEN.glob("runs/*/*/expected.json"))
MACHINE: dict[str, Any] = {"device": "cpu", "threads": 1, "workers": 0}
SLACK = 1e-5  # other processors sum in another order; `exact` is arithmetic that none of them rounds

each_run = pytest.mark.parametrize("run", RUNS, ids=["/".join(run.parts[-2:]) for run in RUNS])


@pytest.fixture
def place(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with everything that the run names, and the run as `interrupted` and `finished`."""
    for name in ("pieces.py", "runs/students.py", "runs/words.jsonl"):
        shutil.copy(GOLDEN / name, tmp_path)
    shutil.copytree(GOLDEN / "v1/features", tmp_path / "cache-rich")
    shutil.copytree(run.parent / "cache", tmp_path / "cache-exact")
    if run.name == "words":
        shutil.copytree(run.parent / "cache-words", tmp_path / "cache-words")
    for state in ("interrupted", "finished"):
        shutil.copytree(run / state, tmp_path / state)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "expected.json").read_text())
    return found


def resume(run: Path, out: str) -> Path:
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in expected_of(run)["settings"].items()}
    train.run(TrainConfig(**settings, **MACHINE, checkpoint_every=1, out=out), quiet=True)
    return Path(out)


def tensors_in(value: Any, at: str = "") -> dict[str, torch.Tensor]:
    """Everything in a checkpoint that is a tensor, by its place."""
    if isinstance(value, torch.Tensor):
        return {at: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {place: tensor for key, one in pairs for place, tensor in tensors_in(one, f"{at}/{key}").items()}


def checkpoint_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return found


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_there_are_runs_of_every_released_version() -> None:
    assert {run.parent.name for run in RUNS} >= {"0.4.0"}
    assert {run.name for run in RUNS} == {"exact", "rich", "pruned", "words"}
    for name, since in (("pruned", "0.8.0"), ("words", "0.9.0")):
        assert {run.parent.name for run in RUNS if run.name == name} >= {since}


@each_run
def test_it_is_evaluated_to_the_numbers_of_its_version(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = expected_of(run)
    student = f"{wanted['settings']['student']}@finished"  # a factory is called because its user names it
    command = ["eval", student, "--data", wanted["settings"]["data"], "--device", "cpu", "--threads", "1"]
    assert cli.main([*command, "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    del found["seconds"]
    assert found.keys() >= wanted["evaluation"].keys()  # later versions say more
    for name, value in wanted["evaluation"].items():
        assert found[name] == (pytest.approx(value, rel=SLACK) if isinstance(value, float) else value), name


@each_run
@pytest.mark.parametrize("form", ["safetensors", pytest.param("program", marks=pytest.mark.slow)])
def test_it_is_exported(run: Path, place: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`export` itself compares the file's answers with the run's."""
    out = {"safetensors": "student.safetensors", "program": "student.pt2"}[form]
    command = ["export", "finished", "--to", form, "--out", out, "--device", "cpu", "--threads", "1", "--json"]
    code = cli.main([*command, "--allow-code"])  # of its model, and of the evaluation set that it names
    if run.name == "words":
        assert code == 2 and "is not exported yet" in capsys.readouterr().err
        return
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["changed"] == 0 and told["max_difference"] <= SLACK
    if form == "safetensors":
        assert equal(load_file(out), load_file(run / "finished/student.safetensors"))


@each_run
def test_it_teaches(run: Path, place: Path) -> None:
    """Dumped from, it gives the logits that its version gave."""
    wanted = expected_of(run)
    named = {"data": wanted["settings"]["data"], "teacher": ("finished",)}
    with pytest.raises(UntrustedError, match="which is code"):
        dump.run(DumpConfig(**named, out="dumped", codec="float32", **MACHINE), quiet=True)
    dump.run(DumpConfig(**named, out="dumped", codec="float32", allow_code=True, **MACHINE), quiet=True)
    cache = softcache.open("dumped")
    rows = cache.find(list(wanted["logits"]))
    found = cache.gather(rows, np.zeros(len(rows), np.int64)).logits()
    told = [torch.tensor(one, dtype=torch.float32).reshape(-1, found.shape[1]) for one in wanted["logits"].values()]
    difference = (found - torch.cat(told)).abs().max()
    assert difference <= (0 if run.name == "exact" else SLACK)


@each_run
def test_resumed_it_ends_where_its_version_ended(run: Path, place: Path) -> None:
    """`exact` bit for bit; and twice resumed, either of them."""
    wanted = expected_of(run)
    shutil.copytree("interrupted", "again")
    once, twice = resume(run, "interrupted"), resume(run, "again")

    def states(out: Path) -> dict[str, torch.Tensor]:
        kept = {name: value for name, value in checkpoint_of(out).items() if name != "random"}
        return tensors_in(kept) | load_file(out / "student.safetensors")

    assert equal(states(once), states(twice))
    for kind in ("torch", "numpy", "python"):  # and "cuda", one for each GPU of the machine
        ended, told = (checkpoint_of(out)["random"][0][kind] for out in (once, Path("finished")))
        assert equal(tensors_in([ended]), tensors_in([told])) and str(ended) == str(told), kind
    found, there = states(once), states(Path("finished"))
    assert found.keys() == there.keys()
    for name, tensor in there.items():
        if run.name == "exact":
            assert torch.equal(found[name], tensor), name
        else:
            off = (found[name].double() - tensor.double()).norm()
            assert off <= SLACK * tensor.double().norm() + 1e-12, name

    rows = [json.loads(line) for line in (once / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [list(row) for row in wanted["metrics"]]
    for row, told in zip(rows, wanted["metrics"], strict=True):
        del row["seconds"], told["seconds"]
        assert row == pytest.approx(told, rel=SLACK)
    about, told_about = (json.loads((out / "run.json").read_text()) for out in (once, run / "finished"))
    assert {name: about["config"][name] for name in told_about["config"]} == told_about["config"]


@pytest.fixture
def first_step() -> Iterator[Callable[[], dict[str, Any]]]:
    """What the next run has in hand before its first step: the network, the optimiser's, and every random state."""
    noted: dict[str, Any] = {"passes": []}  # of which the last ones are the first step's, one for each of its pieces

    def forward(module: torch.nn.Module, inputs: Any) -> None:
        if type(module).__name__ in ("Exact", "Rich", "Tagger") and module.training and "optimizer" not in noted:
            one: dict[str, Any] = {"net": {name: tensor.clone() for name, tensor in module.state_dict().items()}}
            one["torch"] = torch.get_rng_state()
            one["numpy"], one["python"] = np.random.get_state(), random.getstate()
            noted["passes"].append(one)

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if "optimizer" not in noted:
            noted["optimizer"] = tensors_in(copied(optimizer.state_dict()["state"]))
            noted["learned"] = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    handles = [
        register_module_forward_pre_hook(forward),
        register_optimizer_step_pre_hook(step),
    ]
    yield lambda: noted
    for handle in handles:
        handle.remove()


def copied(state: Any) -> Any:
    """An optimiser's state; numbers in it as tensors."""
    return {key: {name: torch.as_tensor(v).clone() for name, v in one.items()} for key, one in state.items()}


@each_run
def test_a_resumed_run_goes_on_with_every_bit_of_the_checkpoint(
    run: Path, place: Path, first_step: Callable[[], dict[str, Any]]
) -> None:
    saved = checkpoint_of(place / "interrupted")
    resume(run, "interrupted")
    noted = first_step()
    noted |= noted["passes"][-expected_of(run)["settings"].get("accumulate", 1)]
    assert equal(noted["net"], dict(saved["net"]))
    assert equal(noted["optimizer"], tensors_in(copied(saved["optimizer"]["state"])))
    assert len(noted["optimizer"]) > 0
    learned = {tensor.numpy().tobytes() for tensor in noted["learned"]}
    parameters = {name: t for name, t in saved["net"].items() if "running" not in name and "num_batches" not in name}
    assert {tensor.numpy().tobytes() for tensor in parameters.values()} <= learned
    of_terms = {tensor.numpy().tobytes() for tensor in saved["parts"].values()}
    assert learned <= of_terms | {tensor.numpy().tobytes() for tensor in parameters.values()}
    (states,) = saved["random"]
    assert torch.equal(noted["torch"], states["torch"])
    assert noted["numpy"][1].tolist() == states["numpy"][1].tolist() and noted["numpy"][2] == states["numpy"][2]
    assert list(noted["python"][1]) == states["python"][1]


@each_run
def test_a_finished_run_is_returned_as_it_is(run: Path, place: Path) -> None:
    resume(run, "finished")
    assert equal(load_file("finished/student.safetensors"), load_file(run / "finished/student.safetensors"))
    assert equal(tensors_in(checkpoint_of(Path("finished"))), tensors_in(checkpoint_of(run / "finished")))

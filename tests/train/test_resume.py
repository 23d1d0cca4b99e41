"""A training run that is killed and resumed ends with the weights and the metrics of one that was left alone."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, seed_everything
from torch import nn
from training import some_in_the_quick_tier, stopped_after

from softcache import cli
from softcache.errors import TrainingError
from softcache.train import flow, session, stop
from softcache.train.checkpoint import Progress, Trained, read_progress, restore, save_progress
from softcache.train.ranks import Ranks

EPOCHS, STEPS = 3, 12
SLOW = pytest.mark.slow
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pieces.py, and a cache of two random views."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copy(WORLDS / "slow_student.py", folder / "pieces.py")
    argv = ["dump", "--data", f"{folder}/pieces.py:toy", "--teacher", f"{folder}/pieces.py:teacher"]
    argv += ["--policy", "crop_flip:padding=1", "--views", "2", "--threads", "1", "--device", "cpu", "--quiet"]
    assert cli.main([*argv, "--out", str(folder / "cache")]) == 0
    return folder


@pytest.fixture(scope="module")
def server() -> Any:
    """Processes that start at once, torch already imported; they can be killed without any chance to clean up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["softcache.train", "torchvision", "torch._dynamo"])
    return context


CACHED = "--cache {folder}/cache --loss kd:temperature=3,weight=0.8 --loss ce:weight=0.2"
HARD = "--policy crop_flip:padding=1 --policy shift:pixels=1 --loss ce"


def command(folder: Path, out: Path, *more: str, settings: str = CACHED) -> list[str]:
    argv = ["train", "--data", f"{folder}/pieces.py:toy", "--eval-data", f"{folder}/pieces.py:toy"]
    argv += ["--student", f"{folder}/pieces.py:student", "--out", str(out), "--epochs", str(EPOCHS)]
    argv += ["--batch-size", "16", "--threads", "1", "--device", "cpu", "--quiet", "--seed", "5", "--lr", "0.01"]
    return [*argv, *settings.format(folder=folder).split(), *more]


def _exit_with(argv: list[str], pause_s: float) -> None:
    """In a process of its own: a command, and its exit code."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a process that a shell starts, for the loader's workers
    os.environ["STUDENT_PAUSE_S"] = str(pause_s)
    sys.exit(cli.main(argv))


def outcome(out: Path) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """What must not differ: the student's bytes, the metrics without their seconds, and the CSV's."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    metrics, cells = ([{k: v for k, v in row.items() if k != "seconds"} for row in one] for one in (rows, table))
    return hashlib.sha256((out / "student.safetensors").read_bytes()).hexdigest(), metrics, cells


def step_of(checkpoint: Path) -> tuple[int, int]:
    """(epoch, step) that a checkpoint stands at; (0, 0) before the first."""
    if not checkpoint.exists():
        return 0, 0
    state = torch.load(checkpoint, weights_only=True)
    return state["progress"]["epoch"], state["progress"]["step"]


def kill_in_the_middle(server: Any, argv: list[str], out: Path, moment: random.Random) -> tuple[int, int]:
    """Start, wait for a random checkpoint, then a little longer, and kill; where the last checkpoint stands."""
    awaited = (moment.randrange(EPOCHS), moment.choice([3, 6, 9]))
    process = server.Process(target=_exit_with, args=(argv, 0.03))
    process.start()
    start = time.monotonic()
    while step_of(out / "checkpoint.pt") < awaited:
        assert process.is_alive() and time.monotonic() - start < 60
        time.sleep(0.005)
    time.sleep(moment.uniform(0, 0.03))  # less than the steps up to the next checkpoint take
    process.kill()
    process.join()
    assert not (out / "student.safetensors").exists()
    return step_of(out / "checkpoint.pt")


def check(server: Any, folder: Path, tmp_path: Path, settings: str, workers: int, kills: int, seed: int) -> None:
    argv: Callable[[str], list[str]] = lambda name: command(  # noqa: E731
        folder, tmp_path / name, "--workers", str(workers), "--checkpoint-every", "3", settings=settings
    )
    assert cli.main(command(folder, tmp_path / "alone", settings=settings)) == 0
    moment, places = random.Random(seed), []
    for _ in range(kills):
        places.append(kill_in_the_middle(server, argv("killed"), tmp_path / "killed", moment))
        if places[-1][0] == EPOCHS - 1:
            break
    assert any(step for _, step in places), f"every kill was at the border of an epoch: {places}"
    if workers:  # a process with threads, such as this one, should not fork
        process = server.Process(target=_exit_with, args=(argv("killed"), 0.0))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    else:
        assert cli.main(argv("killed")) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_and_resumed(server: Any, folder: Path, tmp_path: Path) -> None:
    check(server, folder, tmp_path, CACHED, workers=0, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.whole)])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [pytest.param(CACHED, id="cached"), pytest.param(HARD, id="hard")])
def test_killed_several_times(
    server: Any, folder: Path, tmp_path: Path, settings: str, workers: int, seed: int
) -> None:
    check(server, folder, tmp_path, settings, workers, kills=3, seed=10 + seed)


@pytest.mark.slow
def test_a_run_that_stopped_after_an_epoch_goes_on(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Interrupted between two epochs, before the metrics were written, and after the last epoch."""
    from softcache.train import flow as train

    assert cli.main(command(folder, tmp_path / "alone")) == 0
    for stop_after in range(1, 2 * EPOCHS + 2):
        out, calls = tmp_path / f"stopped-{stop_after}", 0

        def counted(original: Callable[..., Any], *args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop_after:  # noqa: B023
                raise KeyboardInterrupt
            return original(*args, **more)

        with monkeypatch.context() as patch:
            for name in ("save_progress", "write_metrics", "save_student"):
                original = getattr(train, name)
                patch.setattr(train, name, lambda *a, original=original, **k: counted(original, *a, **k))
            assert cli.main(command(folder, out)) == 130
        assert cli.main(command(folder, out)) == 0
        assert outcome(out) == outcome(tmp_path / "alone")


# two stages, each of two epochs of three steps; whatever is carried from one step to a later one
EVERYTHING = ["--views-per-visit", "2", "--accumulate", "2", "--ema", "0.9", "--clip-norm", "0.5", "--keep", "best"]
EVERYTHING += ["--patience", "5", "--batch-size", "64", "--epochs", "2", "--optimizer", "sgd"]
EVERYTHING += ["--loss", "crd:negatives=8,width=8,layer=0", "--loss", "hint:layer=0,weight=0.1"]
ALTERNATELY = "prune='unstructured:rate=0.1,every=2steps'"
EVERYTHING += ["--stage", f"freeze=layers.1 lr=0.05 schedule='warmup(4steps, linear)' {ALTERNATELY}"]
GROWING = "prune='unstructured:amount=linear(0.1, 0.6),scope=layer'"
FADING = "loss='kd:temperature=linear(8, 2),weight=cosine(1, 0.5)' loss=crd:negatives=8,width=8,layer=0"
EVERYTHING += ["--stage", f"optimizer=adamw {FADING} loss=hint:layer=0,weight=0.1 loss=ctkd {GROWING} quantise=int8"]
SAVES = 12


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    argv = ["dump", "--data", f"{folder}/pieces.py:toy", "--teacher", f"{folder}/pieces.py:teacher", "--quiet"]
    argv += ["--policy", "crop_flip:padding=1", "--views", "3", "--threads", "1", "--device", "cpu"]
    assert cli.main([*argv, "--features", "0:flatten", "--out", str(folder / "features")]) == 0
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    seed_everything()  # as each test does; a checkpoint keeps the states of generators that training leaves alone, too
    assert cli.main(everything(folder, out)) == 0
    return out


def everything(folder: Path, out: Path, *more: str) -> list[str]:
    return command(folder, out, *EVERYTHING, *more, settings="--cache {folder}/features")


def stop_after(saves: int, argv: list[str]) -> None:
    """Run until that many checkpoints have been written, and break off."""
    with stopped_after(saves):
        assert cli.main(argv) == 130


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Places at which two checkpoints differ, but for the seconds, and the digest that counts them in."""
    if isinstance(one, dict):
        keys = [key for key in {**one, **other} if key not in ("seconds", "digest")]
        return [place for key in keys for place in differing(one.get(key), other.get(key), f"{where}/{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, pair in pairs for place in differing(*pair, f"{where}/{i}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if one == other else [where]


@pytest.mark.parametrize("saves", some_in_the_quick_tier(range(1, SAVES + 1)))
def test_stopped_after_any_step_and_resumed(folder: Path, undisturbed: Path, tmp_path: Path, saves: int) -> None:
    out = tmp_path / "run"
    stop_after(saves, everything(folder, out, "--checkpoint-every", "1"))
    state = torch.load(out / "checkpoint.pt", weights_only=True)["progress"]
    assert (state["stage"], len(state["metrics"]), state["step"]) == ((saves - 1) // 6, saves // 3, saves % 3)
    assert cli.main(everything(folder, out)) == 0
    assert outcome(out) == outcome(undisturbed)
    states = [torch.load(place / "checkpoint.pt", weights_only=True) for place in (out, undisturbed)]
    assert differing(*states) == []
    assert {"net", "parts", "optimizer", "average", "masks", "random"} <= states[0].keys()
    assert any(name.endswith("student_bank") for name in states[0]["parts"])


@pytest.mark.parametrize(
    ("place", "calls", "number", "where"),
    [
        pytest.param(
            "one_step",
            1,
            signal.SIGTERM,
            "in epoch 1 after step 1 of 3",
            id="in the first step",
            marks=pytest.mark.slow,
        ),
        pytest.param("one_step", 8, INT, "in epoch 3 after step 2 of 3", id="in a step of the second stage"),
        pytest.param(
            "one_step",
            6,
            signal.SIGTERM,
            "in epoch 2 after step 3 of 3",
            id="in the last step of an epoch",
            marks=pytest.mark.slow,
        ),
        pytest.param("evaluate", 2, TERM, "in epoch 2 after step 3 of 3", id="while it is evaluated"),
        pytest.param("save_progress", 1, INT, "after epoch 1", id="while it is saved", marks=pytest.mark.slow),
        pytest.param("make_optimizer", 2, TERM, "after epoch 2", id="between two stages", marks=pytest.mark.slow),
        pytest.param("save_progress", 4, TERM, None, id="while it is saved for the last time"),
    ],
)
def test_a_signal_saves_the_run_where_it_stands(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: Any, capsys: Any,
    place: str, calls: int, number: int, where: str | None,
) -> None:  # fmt: skip
    module, argv = (session if place == "evaluate" else flow), everything(folder, tmp_path / "run")
    original, left = getattr(module, place), calls

    def signalled(*args: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if place == "evaluate":
                torch.rand(1), random.random()  # what was drawn before it is broken off will be drawn again
            signal.raise_signal(number)
        return original(*args, **more)

    monkeypatch.setattr(module, place, signalled)
    handlers = [signal.getsignal(one) for one in (TERM, INT)]
    assert cli.main(argv) == 128 + number
    assert [signal.getsignal(one) for one in (TERM, INT)] == handlers
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    told = f"run is saved {where}: the same command goes on from there" if where else "goes on from the checkpoint in"
    assert re.search(f"softcache: {word}; .*{told}", capsys.readouterr().err)
    assert cli.main(argv) == 0
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    states = [torch.load(place / "checkpoint.pt", weights_only=True) for place in (tmp_path / "run", undisturbed)]
    assert differing(*states) == []


def test_a_signal_before_the_first_step_has_nothing_to_save(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(flow, "rehearse", lambda _: signal.raise_signal(signal.SIGTERM))
    assert cli.main(command(folder, tmp_path / "run")) == 143
    assert capsys.readouterr().err.endswith("terminated; nothing was learned yet; the same command starts again\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, INT])
def test_a_step_that_takes_too_long_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, number: int
) -> None:
    """After a grace, or a second Ctrl-C; two signals at once are one."""
    monkeypatch.setattr(stop, "GRACE_S" if number == signal.SIGTERM else "TWICE_S", 0.05)

    def endless(*_: Any) -> Any:
        signal.raise_signal(number)
        signal.raise_signal(number)
        for _ in range(200):
            time.sleep(0.06)
            if number == signal.SIGINT:
                signal.raise_signal(number)
        raise AssertionError("it went on for ever")

    monkeypatch.setattr(flow, "one_step", endless)
    assert cli.main(command(folder, tmp_path / "run")) == 128 + number
    assert capsys.readouterr().err.endswith("nothing was learned yet; the same command starts again\n")


@pytest.mark.slow
def test_stopped_after_every_step(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    for _ in range(SAVES):
        stop_after(1, everything(folder, tmp_path / "run", "--checkpoint-every", "1"))
    assert cli.main(everything(folder, tmp_path / "run")) == 0
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_a_finished_run_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert cli.main(command(folder, tmp_path / "run")) == 0
    first, metrics = outcome(tmp_path / "run"), (tmp_path / "run/metrics.jsonl").read_bytes()
    assert cli.main(command(folder, tmp_path / "run")) == 0
    assert outcome(tmp_path / "run") == first
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_what_may_change_on_resume(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers and checkpoints may; anything that is part of the result may not."""
    assert cli.main(command(folder, tmp_path / "run")) == 0
    first = outcome(tmp_path / "run")
    assert cli.main(command(folder, tmp_path / "run", "--checkpoint-every", "5", "--read", "pread")) == 0
    assert outcome(tmp_path / "run") == first
    assert cli.main(command(folder, tmp_path / "run", "--lr", "0.02")) == 2
    assert "lr was 0.01, is now 0.02" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == first


def pieces(weight: float = 1.0) -> Trained:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=weight)
    return Trained(net, nn.ModuleList(), optimizer, torch.amp.GradScaler("cpu", enabled=False))


def test_random_states_and_progress_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.standard_normal()
    progress = Progress(
        1, 3, 2, {"loss": torch.tensor(0.5, dtype=torch.float64)}, [{"epoch": 0, "loss": 0.5, "view": 1}]
    )
    save_progress(tmp_path, pieces(3.0), progress, Ranks())
    expected = draw()
    assert draw() != expected
    found, saved = read_progress(tmp_path, Ranks())
    other = pieces()
    restore(tmp_path, other, saved, Ranks())
    assert draw() == expected
    assert found == progress
    assert other.net.state_dict()["weight"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert other.optimizer.param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save_progress(tmp_path, pieces(), Progress(), Ranks())
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"no checkpoint", "empty": b"", "other": b""}[damage])
    if damage == "other":
        torch.save({"epoch": 3, "step": 0}, path)  # as an earlier version wrote them
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: (cannot be read|is no checkpoint)") as caught:
        read_progress(tmp_path, Ranks())
    assert "delete it" in caught.value.tip


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"random": Path("x"), "epoch": 0}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_progress(tmp_path, Ranks())


def test_a_checkpoint_of_another_student_or_number_of_processes_is_refused(tmp_path: Path) -> None:
    save_progress(tmp_path, pieces(), Progress(), Ranks())
    _, saved = read_progress(tmp_path, Ranks())
    other = pieces()
    narrow = Trained(nn.Linear(1, 1), other.term_modules, other.optimizer, other.scaler)
    with pytest.raises(TrainingError, match="does not fit this student"):
        restore(tmp_path, narrow, saved, Ranks())
    with pytest.raises(TrainingError, match="was saved by 1 processes, these are 2") as caught:
        read_progress(tmp_path, Ranks(0, 2))
    assert "resume with as many" in caught.value.tip

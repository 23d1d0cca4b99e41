"""Several processes train one student as one process would: step by step from the same weights, and freely.

A group of processes, joined over the loopback, runs most cases one after the other; what a step computed is compared with the
same step of one process. Some need three: with two, `rank * shares[0]` is as good as the sum of the shares before. The slow
tests start torchrun itself.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import words_cache
from safetensors.torch import load_file
from small_world import Arrays, Outcome, World, arrays, joined, relative, trained, weights_of
from training import at_each_save, run_with

from softcache import cli
from softcache.config import TrainConfig
from softcache.errors import SoftcacheError, TrainingError
from softcache.evaluate.evaluation import Evaluation
from softcache.losses import LOSSES
from softcache.train import flow as train
from softcache.train.flow import one_step
from softcache.train.ranks import joined_ranks

pytestmark = pytest.mark.slow  # processes that talk to one another

STEPS = 3  # of an epoch: batches of 128, 128 and 45; of the last, one rank takes 23 samples and the other 22
# batches of 127, 127 and 47, of which three ranks take 43, 42, 42 and 16, 16, 15: the first has more than the second
THREE = {"batch_size": 127}

# ------------------------------------------------------------------------------------------------ two processes, many orders


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    """In a process of its own: join the others, then do what is asked until the pipe is closed."""
    torch.set_num_threads(1)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ.update(here)
    with joined_ranks(torch.device("cpu")) as ranks:

        @contextmanager
        def as_joined(_: torch.device) -> Iterator[Any]:
            yield ranks

        train.joined_ranks = as_joined
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, function(*arguments)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))


class Group:
    """Processes that are the ranks of a group; calling it has all do the same, and gives what each returned."""

    def __init__(self, size: int) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["softcache.train", "torchvision", "torch._dynamo"])
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(60), f"rank {rank} does not answer"
            done, value = pipe.recv()
            assert done, f"rank {rank}:\n{value}"
            found.append(value)
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    group = Group(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def trio() -> Iterator[Group]:
    group = Group(3)
    yield group
    group.close()


# ------------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Differences:
    """The largest relative difference of any step: of a term, of all gradients together, of one tensor's alone."""

    value: float
    gradient: float
    tensor: float
    buffer: float
    metrics: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1e}" for name, value in vars(self).items())


def differences(alone: Outcome, both: Sequence[Outcome]) -> Differences:
    """Several ranks against one process: the mean of their values, and each one's gradients and buffers."""
    value = gradient = tensor = buffer = 0.0
    assert {len(rank.steps) for rank in both} == {len(alone.steps)}
    for one, *two in zip(alone.steps, *(rank.steps for rank in both), strict=True):
        for name, wanted in one.values.items():
            value = max(value, relative(np.mean([rank.values[name] for rank in two]), wanted))
        for rank in two:
            assert rank.gradients.keys() == one.gradients.keys()
            assert rank.after.keys() == one.after.keys()
            gradient = max(gradient, relative(joined(rank.gradients), joined(one.gradients)))
            tensor = max([tensor, *(relative(rank.gradients[name], g) for name, g in one.gradients.items())])
            buffer = max([buffer, *(relative(rank.after[name], b) for name, b in one.after.items())])
    return Differences(value, gradient, tensor, buffer, metrics_apart(both[0].metrics, alone.metrics))


def metrics_apart(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of any term in any epoch."""
    names = [name for name, v in wanted[0].items() if isinstance(v, float) and name != "seconds"]
    return max(relative(row[name], own[name]) for row, own in zip(found, wanted, strict=True) for name in names)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("ranks"))
    world.cache("plain")
    return world


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> words_cache.World:
    return words_cache.made_world(tmp_path_factory.mktemp("words"))


# ---------------------------------------------------------------------------- each step from the same weights: one against two

RKD = ("rkd_distance:weight=25,layer=late:pool", "rkd_angle:weight=50,layer=late:pool")
CRD = ("crd:negatives=32,width=16,layer=late:pool",)
LABELS = ("ce", "dkd", "wsld", "tf_virtual")

CASES = [
    pytest.param(("kd",), {}, id="kd"),
    pytest.param(RKD, {}, id="rkd"),
    pytest.param(("sp:weight=3000",), {}, id="sp"),
    pytest.param(("dist",), {}, id="dist"),
    pytest.param(CRD, {"epochs": 2}, id="crd"),
    pytest.param(LABELS, {}, id="labels-of-some"),
    pytest.param(("ce", "kd"), {"cache": "mixed"}, id="mixed"),
    pytest.param(("ctkd",), {}, id="ctkd"),
    pytest.param(("vid",), {}, id="vid"),
    pytest.param(("cc:layer=late:pool", "pkt:weight=30000,layer=late:pool"), {}, id="cc-pkt"),
    pytest.param(("batch_correlation", "class_correlation"), {}, id="mlkd"),
    pytest.param(("kd", "ce", "rkd_distance:layer=late:pool"), {"views_per_visit": 2}, id="views-per-visit"),
    pytest.param(("kd", "srrl:layer=late:pool"), {"freeze": ("early", "head.bias")}, id="frozen"),
    pytest.param(("fitnet:layer=early,student=early",), {}, id="some-alone"),
    pytest.param(("cosine", "relational_kl"), {"cache": "embedding"}, id="embedding"),
    pytest.param(("crd:negatives=32,width=16", "hint:scale=whiten"), {"cache": "embedding"}, id="embedding-crd"),
]
# every loss that relates samples of a batch to one another, and one of each other kind
IN_BATCH = [
    pytest.param(("kd", "ce"), {}, id="kd-ce"),
    pytest.param(RKD, {}, id="rkd"),
    pytest.param(("sp:weight=3000", "dist"), {}, id="sp-dist"),
    pytest.param(CRD, {"epochs": 2}, id="crd"),
    pytest.param(("cc:layer=late:pool", "pkt:weight=30000,layer=late:pool"), {}, id="cc-pkt"),
    pytest.param(("batch_correlation", "class_correlation"), {}, id="mlkd"),
    pytest.param(("kd", "ce", "rkd_distance:layer=late:pool"), {"views_per_visit": 2}, id="views-per-visit"),
    pytest.param(("kd", "ce", "hint:layer=late:pool"), {"accumulate": 3}, id="pieces"),
    pytest.param(("ce", "kd"), {"cache": "mixed"}, id="mixed"),
    pytest.param(("cosine", "relational_kl"), {"cache": "embedding"}, id="embedding"),
    pytest.param(("hint", "cosine:scale=each"), {"cache": "embedding", "accumulate": 3}, id="embedding-pieces"),
    pytest.param(
        ("pkt:scale=whiten", "sp", "crd:negatives=32,width=16"), {"cache": "embedding"}, id="embedding-relations"
    ),
]
# a term, the gradient as a whole and the banks; a tensor of which most cancels out is coarser in float32
CLOSE, CLOSE_TENSOR = 1e-5, 1e-4


def check_close(name: str, found: Differences) -> None:
    print(f"\n{name}: {found}")
    assert max(found.value, found.gradient, found.buffer, found.metrics) < CLOSE
    assert found.tensor < CLOSE_TENSOR


def starts_of(outcome: Outcome) -> list[Arrays]:
    return [step.before for step in outcome.steps]


@pytest.mark.parametrize(("losses", "settings"), CASES)
def test_a_step_of_two_ranks_is_that_of_one_process(
    world: World, pair: Group, tmp_path: Path, losses: tuple[str, ...], settings: dict[str, Any]
) -> None:
    config = world.config(tmp_path / "alone", *losses, **settings)
    alone = trained(config)
    both = pair(trained, replace(config, out=str(tmp_path / "two")), starts_of(alone))
    assert len(alone.steps) == STEPS * config.epochs
    check_close("+".join(losses), differences(alone, both))


@pytest.mark.parametrize(("losses", "settings"), IN_BATCH)
def test_a_step_of_three_ranks_is_that_of_one_process(
    world: World, trio: Group, tmp_path: Path, losses: tuple[str, ...], settings: dict[str, Any]
) -> None:
    config = world.config(tmp_path / "alone", *losses, **{**THREE, **settings})
    alone = trained(replace(config, accumulate=1))  # which changes nothing for one process either
    three = trio(trained, replace(config, out=str(tmp_path / "three")), starts_of(alone))
    assert len(alone.steps) == STEPS * config.epochs
    check_close("+".join(losses) + ", three ranks", differences(alone, three))


def test_every_loss_within_a_batch_is_tried_on_three_ranks() -> None:
    tried = {parse_term(text) for case in IN_BATCH for text in case.values[0]}  # type: ignore[union-attr]
    assert {name for name, loss in LOSSES.items() if loss.over == "batch"} <= tried


def parse_term(text: str) -> str:
    return text.partition(":")[0]


def positions_of(config: TrainConfig) -> list[list[int]]:
    """The transfer set's positions that this rank takes in each step."""
    taken: list[list[int]] = []

    def noted(prepared: Any, live: Any, loaded: Any, *rest: Any) -> dict[str, torch.Tensor]:
        taken.append(loaded.index.tolist())
        return train.one_step(prepared, live, loaded, *rest)

    run_with(config, step=noted)
    return taken


def test_three_ranks_take_the_order_of_one_process(world: World, trio: Group, tmp_path: Path) -> None:
    """Side by side their samples are its batches, none twice and none left out."""
    config = world.config(tmp_path / "alone", "kd", epochs=2, **THREE)
    alone = positions_of(config)
    three = trio(positions_of, replace(config, out=str(tmp_path / "three")))
    assert [list(chain(*shares)) for shares in zip(*three, strict=True)] == alone
    assert [[len(one) for one in rank] for rank in three] == [[43, 43, 16] * 2, [42, 42, 16] * 2, [42, 42, 15] * 2]
    assert sorted(chain(*alone[:STEPS])) == list(range(301))


def test_labels_so_rare_that_some_ranks_see_none(world: World, pair: Group, tmp_path: Path) -> None:
    config = world.config(tmp_path / "alone", "ce", data=world.spec("toy?rare=true"), cache=None)
    alone = trained(config)
    both = pair(trained, replace(config, out=str(tmp_path / "two")), starts_of(alone))
    assert any(0.0 in [rank.steps[i].values["ce"] for rank in both] for i in range(STEPS))
    check_close("ce on rare labels", differences(alone, both))


def test_a_batch_in_parts_is_the_whole_batch_on_one_and_two_ranks(world: World, pair: Group, tmp_path: Path) -> None:
    losses = ("kd", "ce", "hint:layer=late:pool", "at", "vid")
    config = world.config(tmp_path / "whole", *losses)
    whole = trained(config)
    parts = replace(config, accumulate=3)
    one = trained(replace(parts, out=str(tmp_path / "one")), starts_of(whole))
    check_close("3 parts on one rank", differences(whole, [one, one]))
    two = pair(trained, replace(parts, out=str(tmp_path / "two")), starts_of(whole))
    check_close("3 parts on two ranks", differences(whole, two))


WORDS = ("kd", "ce", "dkd:weight=0.5", "dist", "ctkd", "batch_correlation:weight=0.1")


@pytest.mark.parametrize("cache", ["one", "second"])
@pytest.mark.parametrize("batch_size", [8, 2])
def test_a_step_of_two_ranks_over_words_is_that_of_one_process(
    words: words_cache.World, pair: Group, tmp_path: Path, batch_size: int, cache: str
) -> None:
    """Sentences of unlike lengths; of two, one has no words, and its rank none. What is clipped is the gradient of all."""
    config = words.config(tmp_path / "alone", *WORDS, cache=cache, batch_size=batch_size, clip_norm=0.5, lr=0.02)
    alone = trained(config)
    both = pair(trained, replace(config, out=str(tmp_path / "two")), starts_of(alone))
    check_close(f"words in batches of {batch_size}", differences(alone, both))


def test_words_in_pieces_on_three_ranks_are_those_of_one_process(
    words: words_cache.World, trio: Group, tmp_path: Path
) -> None:
    config = words.config(tmp_path / "alone", "kd", "ce", "dkd:weight=0.5", "ctkd", cache="second", batch_size=7)
    alone = trained(config)
    three = trio(trained, replace(config, out=str(tmp_path / "three"), accumulate=2), starts_of(alone))
    check_close("words in pieces on three ranks", differences(alone, three))


def test_batch_statistics_are_each_ranks_own(world: World, pair: Group, tmp_path: Path) -> None:
    """So the result differs, by as much as is printed."""
    for losses in (("kd",), ("reviewkd:width=8",)):
        norm = "true" if losses == ("kd",) else "false"  # reviewkd brings its own
        config = world.config(tmp_path / f"alone-{norm}", *losses, student=world.spec(f"net?norm={norm}"))
        alone = trained(config)
        both = pair(trained, replace(config, out=str(tmp_path / f"two-{norm}")), starts_of(alone))
        found = differences(alone, both)
        print(f"\nwith BatchNorm, {losses[0]}: {found}")
        assert 1e-4 < found.gradient < 1
        assert found.value < 0.1


def seed_after(config: TrainConfig) -> int:
    seeds = []

    def step(*given: Any) -> Any:
        seeds.append(torch.initial_seed())
        return one_step(*given)

    run_with(config, step=step)
    assert len(set(seeds)) == 1
    return seeds[0]


def test_each_rank_has_dropout_of_its_own(world: World, pair: Group, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run", "kd", student=world.spec("net?dropout=0.5"), seed=8)
    first, second = pair(seed_after, config)
    assert first == 8  # as one process
    assert second != 8


def test_a_stage_begins_with_the_same_statistics_on_every_rank(world: World, pair: Group, tmp_path: Path) -> None:
    """Those of the first rank, which are the student's: a frozen BatchNorm normalises with them."""
    stages = ("loss=kd", "loss=hint:layer=late:pool loss=ce freeze=early,late")
    config = world.config(tmp_path / "run", student=world.spec("net?norm=true"), stage=stages)
    first, second = pair(trained, config)
    assert len(first.steps) == 2 * STEPS
    for number, (one, two) in enumerate(zip(first.steps, second.steps, strict=True)):
        means = [step.after["model.net.early.1.running_mean"] for step in (one, two)]
        assert np.array_equal(*means) == (number >= STEPS)


# --------------------------------------------------------------------------------------------------------- 30 steps, freely


def masks_of(config: TrainConfig) -> list[Arrays]:
    """What was held after each step, and the student that is kept then."""
    found = []

    def step(prepared: Any, *rest: Any) -> dict[str, torch.Tensor]:
        values = one_step(prepared, *rest)
        masks = {f"mask of {name}": mask for name, mask in prepared.masks.left.items()}
        found.append(arrays(masks | prepared.kept.net.state_dict()))
        return values

    run_with(config, step=step)
    return found


def test_both_ranks_set_the_same_weights_to_zero(world: World, pair: Group, tmp_path: Path) -> None:
    prune = "unstructured:amount=linear(0, 0.9)"
    config = world.config(tmp_path / "run", "kd", epochs=2, ema=0.5, prune=prune, momentum=0.9, weight_decay=0.01)
    first, second = pair(masks_of, config)
    assert len(first) == 2 * STEPS
    for one, two in zip(first, second, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    assert sum(int((~array).sum()) for array in first[-1].values() if array.dtype == bool) == round(0.75 * 762)


def ends_of(config: TrainConfig) -> list[Arrays]:
    """The ends of all activations after each step."""
    found = []

    def step(prepared: Any, *rest: Any) -> dict[str, torch.Tensor]:
        values = one_step(prepared, *rest)
        found.append(
            arrays({name: t for name, t in prepared.model.net.state_dict().items() if name.endswith("_range")})
        )
        return values

    run_with(config, step=step)
    return found


def test_the_ends_of_activations_are_those_of_the_whole_batch_on_both_ranks(
    world: World, pair: Group, tmp_path: Path
) -> None:
    given = {"quantise": "int8", "eval_data": world.spec("toy"), "epochs": 2, "lr": 0.01}
    first, second = pair(ends_of, world.config(tmp_path / "both", "kd", **given))
    alone = ends_of(world.config(tmp_path / "alone", "kd", **given))
    assert len(first) == len(alone) == 2 * STEPS
    for one, two, wanted in zip(first, second, alone, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in wanted)
        assert all(np.allclose(one[name], wanted[name], rtol=0.02, atol=0.02) for name in wanted)
    weights = [load_file(tmp_path / run / "student.safetensors") for run in ("both", "alone")]
    assert weights[0].keys() == weights[1].keys()


def outcome_of(config: TrainConfig) -> list[dict[str, Any]]:
    return train.run(config, quiet=True).metrics


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(("kd",), id="kd"),
        pytest.param((*RKD, "sp:weight=3000"), id="rkd-sp"),
        pytest.param(("dist",), id="dist"),
        pytest.param(CRD, id="crd"),
    ],
)
def test_thirty_steps_of_two_ranks_end_where_one_process_does(
    world: World, pair: Group, tmp_path: Path, losses: tuple[str, ...]
) -> None:
    config = world.config(tmp_path / "alone", *losses, epochs=30 // STEPS, lr=0.01, schedule="cosine", ema=0.9)
    alone = outcome_of(config)
    both, same = pair(outcome_of, replace(config, out=str(tmp_path / "two")))
    one, two = weights_of(tmp_path / "alone"), weights_of(tmp_path / "two")
    apart = max(relative(two[name], wanted) for name, wanted in one.items())
    print(f"\n{'+'.join(losses)}, 30 steps: weights {apart:.1e}, metrics {metrics_apart(both, alone):.1e}")
    assert apart < 1e-3
    assert metrics_apart(both, alone) < 1e-3
    assert metrics_apart(same, both) == 0


# ------------------------------------------------------------------------------------------ what the ranks must agree about


def with_scores(config: TrainConfig, scores: Sequence[float]) -> tuple[list[dict[str, Any]], int]:
    """Train, with evaluations that were made up; the metrics, and how often this rank evaluated."""
    calls = 0

    def scored() -> Evaluation:
        nonlocal calls
        calls += 1
        return Evaluation(100, 100, 0.0, top1=scores[min(calls, len(scores)) - 1], nll=1.0)

    return run_with(config, measure=scored).metrics, calls


def test_the_first_rank_evaluates_and_all_stop_and_keep_the_same(world: World, pair: Group, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_data": world.spec("toy"), "epochs": 9, "patience": 2, "keep": "best"}
    config = world.config(tmp_path / "run", "kd", **settings)
    (metrics, calls), (same, none) = pair(with_scores, config, (0.2, 0.5, 0.4, 0.5, 0.9))
    assert [row["eval_top1"] for row in metrics] == [0.2, 0.5, 0.4, 0.5]
    assert (calls, none) == (5, 0)  # once more for the student that was kept
    assert metrics_apart(same, metrics) == 0
    # the best was the second epoch's: what a run of two epochs ends with
    pair(outcome_of, replace(config, out=str(tmp_path / "short"), epochs=2, patience=None, keep="last"))
    kept, wanted = weights_of(tmp_path / "run"), weights_of(tmp_path / "short")
    assert all(np.array_equal(kept[name], wanted[name]) for name in wanted)


def stopped(config: TrainConfig, after: int) -> int:
    """Train until the checkpoint number `after` has been written, then break off; how many were written."""
    calls = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    with at_each_save(counted), suppress(KeyboardInterrupt):
        train.run(config, quiet=True)
    return calls


def files_of(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """The student's bytes, and the metrics without their seconds."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return hashlib.sha256((out / "student.safetensors").read_bytes()).hexdigest(), metrics


def resumable(world: World, out: Path) -> TrainConfig:
    """Everything that could differ after a restart on two ranks: dropout of each its own, BatchNorm, banks, a stage to come."""
    stages = (
        f"loss=kd loss={CRD[0]} freeze=early.0 prune='unstructured:amount=linear(0.2, 0.6)'",
        "loss=ce loss=hint:layer=late:pool freeze=late,early",
    )
    student = world.spec("net?norm=true&dropout=0.3")
    return world.config(out, student=student, stage=stages, checkpoint_every=1, ema=0.9, accumulate=2)


def test_two_ranks_resume_bit_for_bit(world: World, pair: Group, tmp_path: Path) -> None:
    config = resumable(world, tmp_path / "alone")
    pair(outcome_of, config)
    again = replace(config, out=str(tmp_path / "stopped"))
    for done in range(2 * STEPS):
        assert pair(stopped, again, 1) == [1, 1], done
        with pytest.raises(TrainingError, match="was saved by 2 processes, these are 1") as caught:
            train.run(again, quiet=True)
        assert "resume with as many" in caught.value.tip
    pair(outcome_of, again)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "alone")


def test_three_ranks_resume_where_they_stopped_and_end_where_one_process_does(
    world: World, trio: Group, tmp_path: Path
) -> None:
    """With dropout of each its own as three that were not stopped, up to the order in which three gradients are added, which
    DistributedDataParallel chooses anew after a first step; without dropout as one process."""
    config = replace(resumable(world, tmp_path / "whole"), batch_size=127)
    trio(outcome_of, config)
    again = replace(config, out=str(tmp_path / "stopped"))
    for done in range(2):
        assert trio(stopped, again, 2) == [2] * 3, done
    trio(outcome_of, again)
    stopped_there, whole = weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole")
    assert max(relative(stopped_there[name], whole[name]) for name in whole) < 1e-6

    plain = world.config(tmp_path / "alone", "kd", *CRD, checkpoint_every=1, epochs=2, **THREE)
    one = outcome_of(plain)
    broken = replace(plain, out=str(tmp_path / "three"))
    for done in range(3):
        assert trio(stopped, broken, 1) == [1] * 3, done
    three, *_ = trio(outcome_of, broken)
    wanted, found = weights_of(tmp_path / "alone"), weights_of(tmp_path / "three")
    assert max(relative(found[name], wanted[name]) for name in wanted) < 1e-4
    assert metrics_apart(three, one) < 1e-4


def run_refused(config: TrainConfig) -> str:
    with pytest.raises(SoftcacheError) as caught:
        train.run(config, quiet=True)
    return str(caught.value)


def test_two_ranks_refuse_what_one_process_began_and_a_batch_too_small(
    world: World, pair: Group, tmp_path: Path
) -> None:
    config = world.config(tmp_path / "run", "kd", checkpoint_every=1)
    assert stopped(config, 2) == 2
    for said in pair(run_refused, config):
        assert "was saved by 1 processes, these are 2" in said
    for said in pair(run_refused, replace(config, out=str(tmp_path / "other"), batch_size=100)):
        assert "the last of 301 samples in batches of 100 are 1, fewer than the 2 processes" in said


def _stop_in_step(config: TrainConfig, rank: int | None, step: int) -> str:
    """On each rank: one of them, or all, gets SIGTERM in a step; what the run says it stands at."""
    own, calls = int(os.environ["RANK"]), 0

    def signalled(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and rank in (own, None):
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    original, train.one_step = train.one_step, signalled
    before = signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        train.run(config, quiet=True)
    except _Stopped as exc:
        return exc.__notes__[0]
    finally:
        train.one_step = original
        signal.signal(signal.SIGTERM, before)
    return "it was not stopped"


class _Stopped(BaseException):
    pass


def _raise_stopped(*_: Any) -> None:
    raise _Stopped


@pytest.mark.parametrize("rank", [0, 1, None])
def test_a_signal_to_any_rank_stops_all_of_them_at_one_step(
    world: World, pair: Group, tmp_path: Path, rank: int | None
) -> None:
    """At the end of the next step, since nobody waits for the votes; a run goes on from there as if nothing had been."""
    config = world.config(tmp_path / "run", "kd", *CRD, epochs=2, student=world.spec("net?norm=true&dropout=0.3"))
    told = pair(_stop_in_step, config, rank, 1)
    assert (
        told == [f"{tmp_path / 'run'} is saved in epoch 1 after step 2 of 3: the same command goes on from there"] * 2
    )
    told = pair(_stop_in_step, config, rank, 3)
    assert (
        told == [f"{tmp_path / 'run'} is saved in epoch 2 after step 3 of 3: the same command goes on from there"] * 2
    )
    for name in ("run", "alone"):
        pair(outcome_of, replace(config, out=str(tmp_path / name)))
    assert files_of(tmp_path / "run") == files_of(tmp_path / "alone")


# ------------------------------------------------------------------------------------------------------ torchrun itself

QUIET = {"OMP_NUM_THREADS": "1"}  # torchrun warns where nobody has said so


def argv_of(config: TrainConfig) -> list[str]:
    """The command line that says the same."""
    argv = ["train", "--data", config.data, "--student", config.student, "--cache", str(config.cache)]
    argv += ["--out", config.out, "--epochs", str(config.epochs), "--batch-size", str(config.batch_size)]
    argv += ["--optimizer", config.optimizer, "--lr", str(config.lr), "--schedule", config.schedule]
    argv += ["--threads", "1", "--device", "cpu", "--check-content", "none"]
    argv += [word for loss in config.loss for word in ("--loss", loss)]
    if config.eval_data:
        argv += ["--eval-data", config.eval_data]
    if config.checkpoint_every:
        argv += ["--checkpoint-every", str(config.checkpoint_every)]
    return argv


def but_for_chance(err: str) -> list[str]:
    """What is said besides that these teachers are right no oftener than by chance, and that losses do not reach all."""
    expected = "softcache: warning: (member 'teacher'.* and chance is|.* get no gradient from any loss)"
    return [line for line in err.splitlines() if not re.match(expected, line)]


def torchrun(argv: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "softcache",
    ]
    pipe = subprocess.PIPE
    environment = os.environ | QUIET | environment
    return subprocess.Popen([*command, *argv], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_torchrun_says_nothing_twice_and_ends_where_one_process_does(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = ("kd", "crd:negatives=32,width=16,layer=late:pool", "sp:weight=3000")
    config = world.config(tmp_path / "two", *losses, epochs=30 // STEPS, lr=0.01, eval_data=world.spec("toy"))
    ran = torchrun(argv_of(config))
    out, err = ran.communicate(timeout=120)
    assert ran.returncode == 0, err
    lines = err.splitlines()
    assert len(set(lines)) == len(lines)  # the class list, a warning of the teacher, and how far it is
    steps = [int(found[1]) for line in lines if (found := re.match(r"train \S+/two: (\d+) of 30 steps", line))]
    assert steps == sorted(set(steps))
    assert sum(line.startswith("softcache: warning: ") for line in lines) == 1
    assert out.count("eval_top1") == 1
    assert out.count("next: softcache eval") == 1
    assert cli.main(argv_of(replace(config, out=str(tmp_path / "alone")))) == 0
    one, two = weights_of(tmp_path / "alone"), weights_of(tmp_path / "two")
    apart = max(relative(two[name], wanted) for name, wanted in one.items())
    rows = [files_of(tmp_path / name)[1] for name in ("two", "alone")]
    with capsys.disabled():
        print(f"\ntorchrun, {'+'.join(losses)}, 30 steps: weights {apart:.1e}, metrics {metrics_apart(*rows):.1e}")
    assert apart < 1e-3
    assert metrics_apart(*rows) < 1e-3


def test_torchrun_warns_of_nothing_where_some_parameters_are_left_alone(world: World, tmp_path: Path) -> None:
    ran = torchrun([*argv_of(world.config(tmp_path / "run", "fitnet:layer=early,student=early")), "--quiet"])
    _, err = ran.communicate(timeout=120)
    assert (ran.returncode, but_for_chance(err)) == (0, [])


@pytest.mark.timeout(300)
def test_torchrun_killed_and_resumed_is_bit_for_bit_the_same(world: World, tmp_path: Path) -> None:
    student = world.spec("net?norm=true&dropout=0.3")
    losses = ("kd", *CRD, "reviewkd:width=8")
    config = world.config(tmp_path / "killed", *losses, student=student, epochs=3, checkpoint_every=1)
    ran, start = torchrun(argv_of(config), STUDENT_PAUSE_S="0.1"), time.monotonic()
    while not (tmp_path / "killed/metrics.jsonl").is_file():  # the first epoch
        assert ran.poll() is None and time.monotonic() - start < 60
        time.sleep(0.01)
    time.sleep(0.15)
    for pid in processes_of(tmp_path / "killed"):
        os.kill(pid, signal.SIGKILL)
    ran.communicate()
    assert not (tmp_path / "killed/student.safetensors").exists()
    for name in ("killed", "alone"):
        ran = torchrun([*argv_of(replace(config, out=str(tmp_path / name))), "--quiet"])
        _, err = ran.communicate(timeout=120)
        assert (ran.returncode, but_for_chance(err)) == (0, [])
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "alone")


def processes_of(out: Path) -> list[int]:
    """torchrun and the two that it started, which are in sessions of their own; the folder is in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except OSError:
            continue
        if str(out).encode() in words:
            found.append(int(entry.name))
    return found

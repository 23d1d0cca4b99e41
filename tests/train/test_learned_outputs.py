"""Students that learn an embedding or values: parity with the live teacher, what they give, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from torch import Tensor, nn
from training import run_with

import softcache
from softcache import dump
from softcache.config import DumpConfig, EvalConfig, TrainConfig
from softcache.errors import CacheError, LossError
from softcache.evaluate import measure
from softcache.losses import LOSSES
from softcache.models import load_model
from softcache.spec import load_user_file
from softcache.train import flow

WORLD = WORLDS / "numbers.py"
EMBEDDER, WHOLE = f"{WORLD}:embedder?output=embedding", f"{WORLD}:whole?output=values&names=sum,bright"
DATA = f"{WORLD}:images?kind=classes"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """one: an embedding of 12; both: that, another of 5, values and classes."""
    path = tmp_path_factory.mktemp("caches")
    members = {
        "one": (EMBEDDER,),
        "half": (EMBEDDER,),
        "both": (EMBEDDER, f"{EMBEDDER}&width=5&name=small&seed=1", WHOLE, f"{WORLD}:classifier"),
        "values": (WHOLE,),
    }
    for name, teachers in members.items():
        codec = "float16" if name == "half" else "float32"
        made = DumpConfig(
            data=DATA, teacher=teachers, out=str(path / name), codec=codec, threads=1, workers=0, whiten=True
        )
        dump.run(made, quiet=True)
    head = (f"{WORLD}:classifier", EMBEDDER)
    beside = DumpConfig(data=DATA, teacher=head, out=str(path / "head"), for_=("hint",), threads=1, workers=0)
    dump.run(beside, quiet=True)
    return {name: str(path / name) for name in (*members, "head")}


def config(cache: str, out: Path, *losses: str, **settings: Any) -> TrainConfig:
    given = {
        "data": DATA, "student": "softcache:mlp?hidden=16", "epochs": 1, "batch_size": 20, "optimizer": "sgd", "lr": 0.05,
        "momentum": 0.9, "schedule": "constant", "threads": 1, "workers": 0, "check_content": "none",
    }  # fmt: skip
    return TrainConfig(cache=cache, out=str(out), loss=losses, **{**given, **settings})


# ----------------------------------------------------------------------------------------------- parity with the live teacher


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def cosines(x: Tensor) -> Tensor:
    return unit(x) @ unit(x).T


def distances(x: Tensor) -> Tensor:
    gaps = x[:, None] - x[None]
    table = torch.where(torch.eye(len(x)) > 0, 0.0, (gaps.square().sum(dim=2) + 1e-300).sqrt())
    return table / (table.sum() / (len(x) * (len(x) - 1)))


def angles(x: Tensor) -> Tensor:
    gaps = x[None] - x[:, None]
    directions = gaps / torch.where(torch.eye(len(x)) > 0, 1.0, (gaps.square().sum(dim=2) + 1e-300).sqrt())[:, :, None]
    return torch.einsum("jid,jkd->jik", directions, directions)


def smooth(gap: Tensor, delta: float = 1.0) -> Tensor:
    size = gap.abs()
    return torch.where(size <= delta, gap.square() / 2, delta * (size - delta / 2)).mean()


def others(x: Tensor, temperature: float) -> Tensor:
    table = cosines(x) / temperature - torch.diag(torch.full((len(x),), torch.inf, dtype=torch.float64))
    return table.softmax(dim=1)


def taylor(x: Tensor) -> Tensor:
    z = 0.8 * cosines(x)
    return np.exp(-0.8) * (1 + z + z.square() / 2)


def shares(x: Tensor) -> Tensor:
    return (1 + cosines(x)) / (1 + cosines(x)).sum(dim=1, keepdim=True)


def rkl(s: Tensor, t: Tensor) -> Tensor:
    q, p, off = others(s, 0.1), others(t, 0.1), torch.eye(len(s)) == 0
    return (p[off] * (p[off].log() - q[off].log())).sum() / len(s)


def pkt(s: Tensor, t: Tensor) -> Tensor:
    return (shares(t) * ((shares(t) + 1e-7) / (shares(s) + 1e-7)).log()).mean()


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda s, t: (1 - (unit(s) * unit(t)).sum(dim=1)).mean(),
    "hint": lambda s, t: (s - t).square().mean(),
    "mse": lambda s, t: (s - t).square().mean(),
    "huber": lambda s, t: smooth(s - t),
    "rkd_distance": lambda s, t: smooth(distances(s) - distances(t)),
    "rkd_angle": lambda s, t: smooth(angles(s) - angles(t)),
    "relational_kl": rkl,
    "pkt": pkt,
    "cc": lambda s, t: (taylor(s) - taylor(t)).square().mean(),
    "sp": lambda s, t: (unit(s @ s.T) - unit(t @ t.T)).square().mean(),
}


def at_scale(kind: str, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """By the rows (n, W) that the dump measured: here all of them."""
    mean = rows.mean(dim=0)
    deviation = (rows - mean).square().mean(dim=0).sqrt()
    if kind == "member":
        return lambda x: (x - mean) / deviation.square().mean().sqrt()
    if kind == "each":
        return lambda x: (x - mean) / deviation
    each = (rows - mean) / deviation
    root, inverse = each.T @ each / len(rows) + 0.01 * torch.eye(rows.shape[1]), torch.eye(rows.shape[1]).double()
    for _ in range(40):  # Denman and Beavers: to the square root and its inverse
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    return lambda x: (x - mean) / deviation @ inverse


@dataclass
class Step:
    before: dict[str, Tensor]
    parts: nn.Module
    inputs: Any
    index: np.ndarray
    value: float
    gradients: dict[str, Tensor]


def steps_of(made: TrainConfig) -> list[Step]:
    """Every step of a run, with the weights that it began with and the gradients that it found."""
    found: list[Step] = []

    def noted(prepared: Any, live: Any, loaded: Any, *rest: Any) -> dict[str, Tensor]:
        before = {name: value.detach().clone() for name, value in live.learner.model.net.state_dict().items()}
        gradients: dict[str, Tensor] = {}
        parts = copy.deepcopy(live.objective.term_modules)

        def note(*_: Any) -> None:
            for name, parameter in live.learner.model.net.named_parameters():
                gradients[name] = parameter.grad.clone()

        hook = live.trained.optimizer.register_step_pre_hook(note)
        values = flow.one_step(prepared, live, loaded, *rest)
        hook.remove()
        found.append(Step(before, parts, loaded.inputs[0], loaded.index, values["loss"].item(), gradients))
        return values

    run_with(made, step=noted)
    return found


def live_teacher(member: str) -> Tensor:
    """(60, W) float64, asked here of the pictures themselves."""
    world = load_user_file(WORLD)
    network = world.whole() if member == "whole" else world.embedder((8, 8))
    pictures = torch.from_numpy(world.images(kind="classes").images)
    with torch.no_grad():
        return network.double()(pictures).double()


SCALED = [f"{loss}:scale={kind}" for kind, names in {
    "member": ("hint", "huber", "pkt"), "each": ("cosine", "cc", "mse"), "whiten": ("hint", "rkd_angle", "relational_kl", "sp"),
}.items() for loss in names]  # fmt: skip
OF_VALUES = ("hint", "mse", "huber", "huber:scale=each", "mse:scale=each", "mse:scale=whiten")
RELATIONS = (
    "rkd_distance",
    "rkd_angle",
    "relational_kl",
    "pkt",
    "cc",
    "sp",
)  # of which the teacher's side is scaled alone


PARITY = [*((loss, "one") for loss in (*FORMULAS, *SCALED)), *((loss, "values") for loss in OF_VALUES)]
QUICK = (*FORMULAS, "hint:scale=whiten", "mse:scale=each")  # the others in the slow tier


@pytest.mark.parametrize(
    ("loss", "cache"), [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in PARITY]
)
def test_twenty_steps_are_those_of_the_live_teacher_in_float64(
    caches: dict[str, str], tmp_path: Path, loss: str, cache: str
) -> None:
    """Value and gradient of each step, from the weights that the step began with; momentum stands still meanwhile."""
    width, member = (12, "embedder") if cache == "one" else (2, "whole")
    spec = "softcache:mlp?hidden=16"
    made = config(caches[cache], tmp_path / "run", loss, epochs=7, student=spec, lr=1e-9 if cache == "values" else 0.05)
    steps = steps_of(made)
    assert len(steps) == 21
    teacher, model = live_teacher(member), load_model(spec, num_classes=width, input_shape=(8, 8))
    name, _, kind = loss.partition(":scale=")
    scale = at_scale(kind, teacher) if kind else lambda x: x
    for step in steps:
        net = copy.deepcopy(model.net).double()
        net.load_state_dict({name: value.double() for name, value in step.before.items()})
        own = net(model.input.prepare(step.inputs).double())
        value = FORMULAS[name](own if name in RELATIONS else scale(own), scale(teacher[step.index]))
        assert step.value == pytest.approx(value.item(), rel=2e-5, abs=1e-7)
        wanted = torch.autograd.grad(value, list(net.parameters()))
        whole, found = (torch.cat([g.double().flatten() for g in gs]) for gs in (wanted, step.gradients.values()))
        assert float((whole - found).norm()) <= 2e-4 * float(whole.norm()) + 1e-9


@pytest.mark.slow
def test_twenty_steps_of_crd_are_those_of_the_live_teacher_in_float64(caches: dict[str, str], tmp_path: Path) -> None:
    """With what it had learned and remembered when a step began; its formula has an oracle of its own."""
    spec = "softcache:mlp?hidden=16"
    steps = steps_of(config(caches["one"], tmp_path / "run", "crd:negatives=16,width=8", epochs=7, student=spec))
    teacher, model = live_teacher("embedder"), load_model(spec, num_classes=12, input_shape=(8, 8))
    keys = load_user_file(WORLD).images().sample_keys
    ids = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys]
    for number, step in enumerate(steps):
        net, core = copy.deepcopy(model.net).double(), copy.deepcopy(step.parts[0].cores[0]).double().train()
        net.load_state_dict({name: value.double() for name, value in step.before.items()})
        own = net(model.input.prepare(step.inputs).double())
        place = torch.from_numpy(step.index)
        sample_ids = torch.from_numpy(np.array([ids[i] for i in step.index], np.uint64).view(np.int64))
        value = core(own, teacher[step.index], place, sample_ids, number)
        assert step.value == pytest.approx(value.item(), rel=2e-5, abs=1e-7)
        wanted = torch.autograd.grad(value, list(net.parameters()))
        whole, found = (torch.cat([g.double().flatten() for g in gs]) for gs in (wanted, step.gradients.values()))
        assert float((whole - found).norm()) <= 2e-4 * float(whole.norm()) + 1e-9
    assert len(steps) == 21 and len({step.value for step in steps}) == 21


def test_every_loss_that_may_be_asked_of_an_output_has_its_parity() -> None:
    assert {name for name, loss in LOSSES.items() if loss.reads_output} == {*FORMULAS, "crd"}


def test_what_float16_rounds_is_seen_and_small(caches: dict[str, str], tmp_path: Path) -> None:
    exact, rounded = (steps_of(config(caches[name], tmp_path / name, "cosine"))[0] for name in ("one", "half"))
    assert exact.value != rounded.value and exact.value == pytest.approx(rounded.value, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- what a student gives


def test_a_student_gives_what_its_member_gives_and_is_loaded_so(caches: dict[str, str], tmp_path: Path) -> None:
    flow.run(config(caches["one"], tmp_path / "run", "cosine"), quiet=True)
    model = load_model(str(tmp_path / "run"), num_classes=3)
    assert (model.output, model.num_classes, model.declared_classes) == ("embedding", 12, None)
    again = DumpConfig(data=DATA, teacher=(str(tmp_path / "run"),), out=str(tmp_path / "again"), threads=1, workers=0)
    assert dump.run(again, quiet=True).manifest.plan.members[0].output == "embedding"  # type: ignore[union-attr]
    flow.run(config(caches["values"], tmp_path / "values", "mse"), quiet=True)
    assert load_model(str(tmp_path / "values"), num_classes=3).value_names == ("sum", "bright")


def test_several_teachers_of_unlike_widths_with_an_adapter_each(caches: dict[str, str], tmp_path: Path) -> None:
    losses = ("cosine:member=embedder,adapter=linear", "hint:member=small,adapter=mlp", "relational_kl:member=small")
    result = flow.run(
        config(caches["both"], tmp_path / "run", *losses, student="softcache:mlp?hidden=16&outputs=8"), quiet=True
    )
    assert {"cosine", "hint", "relational_kl"} <= result.metrics[0].keys()
    assert load_model(str(tmp_path / "run"), num_classes=3).num_classes == 8


def test_at_a_members_scale_teachers_of_unlike_size_count_alike(tmp_path: Path) -> None:
    """An embedding of 12 beside one of 5 that is a hundred times as large: without a scale one of the two is all there is."""
    large = f"{EMBEDDER}&width=5&name=large&seed=1&times=100"
    made = DumpConfig(
        data=DATA, teacher=(EMBEDDER, large), out=str(tmp_path / "c"), codec="float32", threads=1, workers=0
    )
    dump.run(made, quiet=True)
    first = {}
    for scale in ("", ",scale=member"):
        losses = tuple(f"hint:member={name},adapter=linear{scale}" for name in ("embedder", "large"))
        out, student = tmp_path / f"run{scale[1:6]}", "softcache:mlp?hidden=16&outputs=8"
        row = flow.run(config(str(tmp_path / "c"), out, *losses, student=student, lr=1e-3), quiet=True).metrics[0]
        first[scale] = row["hint-2"] / row["hint"]
    assert first[""] > 1000 and 0.5 < first[",scale=member"] < 2


def test_classes_and_an_embedding_at_once(caches: dict[str, str], tmp_path: Path) -> None:
    """A term on classes makes a student of classes: kd takes the members that have some, cosine the input of its last layer."""
    losses = ("kd", "mse_logits", "ce", "cosine:member=embedder")
    result = flow.run(config(caches["both"], tmp_path / "run", *losses), quiet=True)
    assert {"kd", "mse_logits", "ce", "cosine"} <= result.metrics[0].keys()
    assert load_model(str(tmp_path / "run"), num_classes=3).output == "logits"
    of_alone = config(caches["both"], tmp_path / "alone", "kd", members=("classifier",), seed=0)
    both, alone = flow.run(config(caches["both"], tmp_path / "kd", "kd"), quiet=True), flow.run(of_alone, quiet=True)
    assert both.metrics[0]["kd"] == alone.metrics[0]["kd"]


@pytest.mark.parametrize(
    ("cache", "losses", "settings", "match"),
    [
        ("values", ("kd",), {}, r"loss 'kd' is on classes, and no member gave any: 'whole' gave values\n.*mse or huber"),
        ("one", ("ce", "dkd"), {}, r"loss 'dkd' is on classes, and no member gave any: 'embedder' gave embedding\n.*cosine"),
        ("one", ("srrl",), {}, "loss 'srrl' is on classes"),
        ("both", ("cosine",), {}, "loss 'cosine' compares with one teacher.*embedder, small, whole"),
        (
            "one", ("cosine",), {"student": "softcache:mlp?hidden=16&outputs=8"},
            r"features are 8 wide and the teacher's 12\n.*\n.*layer output of the student, output of the teacher 'embedder'",
        ),
        ("both", ("cosine:member=small", "hint:member=embedder"), {}, "features are 5 wide and the teacher's 12"),
        ("both", ("mse:member=classifier",), {}, "loss 'mse' is of members that gave an embedding or values; here gave"),
        ("both", ("ce", "cosine:member=small,student=output"), {}, "the student gives classes, and its output is compared"),
        ("one", ("hint:scale=all",), {}, "loss 'hint': unknown scale 'all'"),
        (
            "head", ("kd", "hint:member=classifier,scale=each"), {},
            "loss 'hint': scale=each is of what a member gave.* of member 'classifier' is a layer",
        ),
        ("head", ("hint:member=embedder,student=head,adapter=linear,scale=whiten", "kd"), {},
         r"loss 'hint': scale=whiten: the cache holds nothing that whitens member 'embedder'\n.*--whiten"),
    ],
    ids=[
        "kd", "dkd", "srrl", "whose", "width", "unlike", "mse of classes", "output of classes", "no scale", "layer", "no matrix",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(
    caches: dict[str, str], tmp_path: Path, cache: str, losses: tuple[str, ...], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(LossError, match=match):
        flow.run(config(caches[cache], tmp_path / "run", *losses, **settings), quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_data_without_classes_learns_and_is_evaluated_beside_its_cache(
    caches: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels are no part of it: the same pictures without any find the same records."""
    bare = f"{WORLD}:images"
    made = config(caches["one"], tmp_path / "run", "cosine", data=bare, eval_data=bare, epochs=2, keep="best")
    result = flow.run(made, quiet=True)
    row = result.metrics[-1]
    assert {"eval_cosine", "eval_recall_at_10", "eval_spearman"} <= row.keys() and "eval_top1" not in row
    with_labels = measure.run(
        str(tmp_path / "run"), EvalConfig(data=DATA, cache=caches["one"], threads=1, workers=0), quiet=True
    )
    assert {"nearest_neighbour", "class_recall_at_5", "linear_probe", "cosine"} <= with_labels.numbers.keys()
    assert with_labels.numbers["cosine"] == pytest.approx(row["eval_cosine"], abs=1e-9)
    of_teacher = measure.run(caches["one"], EvalConfig(data=DATA, threads=1, workers=0), quiet=True)
    assert of_teacher.numbers["nearest_neighbour"] > 0.5 and "cosine" not in of_teacher.numbers
    assert json.loads(json.dumps(with_labels.to_json()))["numbers"] == dict(with_labels.numbers)


def test_a_student_of_values_is_measured_by_the_numbers_of_the_data_and_by_the_cache(tmp_path: Path) -> None:
    data = f"{WORLD}:images?kind=score"
    made = DumpConfig(
        data=data, teacher=(f"{WORLD}:regression?output=values",), out=str(tmp_path / "c"), threads=1, workers=0
    )
    dump.run(made, quiet=True)
    result = flow.run(config(str(tmp_path / "c"), tmp_path / "run", "huber", data=data, eval_data=data), quiet=True)
    assert {"eval_r2", "eval_spearman", "eval_mean_error", "eval_r2_teacher"} <= result.metrics[-1].keys()


def test_a_cache_of_several_asks_which_one_is_meant(caches: dict[str, str], tmp_path: Path) -> None:
    flow.run(config(caches["one"], tmp_path / "run", "cosine"), quiet=True)
    asked = EvalConfig(data=DATA, cache=caches["both"], threads=1, workers=0)
    with pytest.raises(
        CacheError, match=r"2 members gave embedding: 'embedder' gave embedding, 'small'.*\n.*--members"
    ):
        measure.run(str(tmp_path / "run"), asked, quiet=True)


def test_a_loop_of_ones_own_reads_both_kinds(caches: dict[str, str]) -> None:
    cache = softcache.open(caches["both"], quiet=True)
    joined = cache.join(load_user_file(WORLD).images(kind="classes"))
    targets = joined.gather([joined[i][1] for i in range(3)])
    assert targets.embedding("small").shape == (3, 5) and targets.values("whole").shape == (3, 2)
    torch.testing.assert_close(targets.rows_between(1, 3).embedding("small"), targets.embedding("small")[1:])

"""Offline equals online: each loss from the cache, as train computes it, beside the same loss on the live teacher's tensors.

The cached side is `train.run` itself. Before each of its steps the live side takes over the student's weights, what the terms
have learned and remember; it runs the teacher on the pixels that the student was given, taps both networks with hooks of
its own, reduces and combines in float64 as written out here, and calls the loss's formula (which has an oracle elsewhere).
`pytest tests/test_offline_online.py -rP` shows the differences.

The teacher that the float32 statement is made with computes with small whole numbers, so that its logits, its features
and what is stored of them are exact in float16, in any batch and order of sums; a spatial Gram, which has square roots in
it, is stored as the map that it is made of. Whatever differs then is not the storage's. The teacher of the last tests has
any numbers.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORLDS
from torch import Tensor, nn
from training import run_with

import softcache
from softcache import dump
from softcache.config import DumpConfig, TrainConfig
from softcache.losses import LOSSES, OUTPUT, VECTORS
from softcache.models import Model
from softcache.spec import load_user_file
from softcache.train import flow as train
from softcache.train.learner import Learner
from softcache.train.session import LiveStage, Prepared

BATCH, EPOCHS, COUNT, VIEWS = 8, 2, 78, 2
STEPS = EPOCHS * 10  # the last batch of an epoch has 6 samples
WEIGHT, SEED = 0.7, 5
MEMBERS = {"a": 1, "b": 2}  # name -> seed of its weights
KEPT = 4  # of 5 classes by topk: what is left is one, and exact


# --- the live side ---------------------------------------------------------------------------------------------------


def spatial_gram(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    rows = rows / rows.square().sum(dim=2, keepdim=True).sqrt().clamp(min=1e-12)
    return torch.einsum("bcp,bcq->bpq", rows, rows) / rows.shape[1]


def fsp(x: Tensor, y: Tensor) -> Tensor:
    """The second map has half the size."""
    return torch.einsum("bchw,bdhw->bcd", F.max_pool2d(x, 2), y) / y[0, 0].numel()


REDUCED: dict[str, Callable[..., Tensor]] = {
    "map": lambda x: x,
    "pool": lambda x: x.mean(dim=(2, 3)),
    "flatten": lambda x: x.reshape(len(x), -1),
    "cls": lambda x: x[:, 0],
    "mean_tokens": lambda x: x.mean(dim=1),
    "attention": lambda x: (x**2).mean(dim=1),
    "gram": lambda x: torch.einsum("bchw,bdhw->bcd", x, x) / x[0, 0].numel(),
    "spatial_gram": spatial_gram,
    "sign": lambda x: (x > 0).to(x.dtype),
    "fsp": fsp,
}
MAP_ENDS = ("stage1", "stage2", "stage3")
STORED: dict[str, tuple[str, ...]] = {  # kind of feature -> layers it is dumped of
    "logits": (),
    "head": (),
    "pool": ("stage3",),
    "flatten": ("stage3",),
    "cls": ("tokens",),
    "mean_tokens": ("tokens",),
    "map": MAP_ENDS,
    "attention": MAP_ENDS,
    "gram": ("stage2",),
    "spatial_gram": ("stage1", "stage2"),  # where the map is smaller
    "sign": MAP_ENDS,
    "fsp": ("stage1+stage2", "stage2+stage3"),
}


@dataclass(frozen=True)
class Case:
    """One loss on one kind of cache.

    Attributes:
        loss: in LOSSES.
        kind: of feature that the cache holds, a key of STORED.
        settings: of the term, as on the command line.
        values: what they mean, settings of the formula.
        student: factory in worlds/three_maps.py.
        layers: (teacher's, student's) by pair; "head" is the input of the final linear layer.
        sizes: to which the teacher's maps are averaged down, by pair.
        cache: settings of the dump.
        members: name -> weight, of the teacher that the logits are combined to.
        member: whose features they are.
        combine: the rule.
        classes: that the student has; none: all.
        run: further settings of the run.
    """

    loss: str
    kind: str
    settings: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    student: str = "student"
    layers: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    cache: tuple[tuple[str, Any], ...] = ()
    members: Mapping[str, int] = field(default_factory=lambda: {"a": 1})
    member: str = "a"
    combine: str = "mean_logits"
    classes: tuple[int, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reduction(self) -> str:
        """What the loss is given of the teacher's layer: what is cheapest to store is made of a map."""
        wanted = LOSSES[self.loss].features[0]
        return self.kind if self.kind != "map" or wanted == "map" else wanted.replace("head", "pool")


def default_case(name: str, kind: str) -> Case:
    """What a loss's line in the table says, so that a new loss is covered by its line."""
    loss = LOSSES[name]
    few: dict[str, tuple[str, ...]] = {"crd": ("negatives=32",), "reviewkd": ("width=8",)}
    settings = few.get(name, ())
    if not loss.has_features:
        codec = f"topk:k={KEPT}" if loss.needs("head_ids") else "float32"
        return Case(name, "logits", settings, cache=(("codec", codec),))
    stored = STORED[kind] or ("head",)
    if kind == "map" and loss.layers != "map_ends":
        stored = ("stage2",) if loss.layers == "middle" else ("stage3",)
        settings += (f"layer={stored[0]}",)
    to_head = loss.layers == "head" or ("head" in loss.features and kind in ("head", "cls", "mean_tokens"))
    own = dict.fromkeys(stored, "head") if to_head else dict(zip(stored, stored, strict=True))
    if loss.graft:
        own = dict.fromkeys(stored, "stage3.projector" if kind == "map" else "fc.projector")
        settings += () if kind == "map" else ("student=head",)
    student = "student?wide=true" if kind == "fsp" or name == "fsp_average" else "student"
    return Case(name, kind, settings, student=student, layers=tuple(own.items()))


class Live:
    """Teachers and a student beside the run's, with what its terms have of their own."""

    def __init__(self, pieces: Path, case: Case, cache: softcache.Cache, *, whole: bool) -> None:
        made = load_user_file(pieces)
        self.case, self.cache, self.step = case, cache, 0
        self.visited: Counter[tuple[int, int]] = Counter()  # records
        self.teachers = {name: made.teacher(MEMBERS[name], whole).eval() for name in case.members}
        self.seen = {name: tapped(net) for name, net in self.teachers.items()}
        self.data = made.images()
        hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in self.data.sample_keys]
        self.ids = [int.from_bytes(word, "little") for word in hashes]

    @cached_property
    def record_of(self) -> dict[bytes, tuple[int, int]]:
        """Pixels -> the sample's position in the transfer set, and the view that they are of it."""
        pairs = [(index, view) for index in range(COUNT) for view in range(VIEWS)]
        found = {self.pixels(*pair).numpy().tobytes(): pair for pair in pairs}
        assert len(found) == len(pairs)  # no two are alike
        return found

    def pixels(self, index: int, view: int) -> Tensor:
        """(1, 8, 8) as networks take them."""
        item = self.cache.policy.render(self.data[index][0], self.ids[index], view)
        collated: Tensor = self.teachers[self.case.member].collate([item])
        return collated[0]

    def take(self, model: Model, parts: nn.Module) -> None:
        """Copies of what a run has built."""
        self.model, self.parts = copy.deepcopy(model), copy.deepcopy(parts)
        self.own = tapped(self.model.net)

    def follow(self, model: nn.Module, parts: nn.Module) -> None:
        """The same weights, and the same memories."""
        self.model.load_state_dict(model.state_dict())
        self.parts.load_state_dict(parts.state_dict())
        self.model.zero_grad()
        self.parts.zero_grad()

    def loss(self, pixels: Tensor) -> Tensor:
        """() weighted, of the batch that a step is computed of."""
        case = self.case
        loss = LOSSES[case.loss]
        part: Any = next(self.parts.children())
        settings = {key: value for key, value in loss.defaults.items() if key not in loss.fixed} | dict(case.values)
        settings = {key: value(self.step / STEPS) if callable(value) else value for key, value in settings.items()}
        with torch.no_grad():
            known: dict[str, Any] = dict(self.of_teachers(pixels, settings.get("temperature", 1.0)))
        known |= {"student_logits": self.model.train()(pixels), "step": self.step}
        if self.cache.policy.mixing is None:
            records = [self.record_of[image.numpy().tobytes()] for image in pixels]
            self.visited.update(records)
            known |= self.of_samples([index for index, _ in records])
        pairs = [self.pair(index, part.adapters[index]) for index in range(len(case.layers))]
        if loss.needs("student_maps"):
            known |= {"student_maps": [own for own, _ in pairs], "teacher_maps": [theirs for _, theirs in pairs]}
            pairs = []
        values: list[Tensor] = []
        for index, (own, theirs) in enumerate(pairs or [(None, None)]):
            compute = part.cores[index] if loss.module else loss.function
            inputs = known | {"student_features": own, "teacher_features": theirs}
            value: Any = compute(**{name: inputs[name] for name in loss.inputs}, **settings)
            values.append(value)
        self.step += 1
        return WEIGHT * torch.stack(values).sum()

    def of_teachers(self, pixels: Tensor, temperature: float) -> dict[str, Tensor]:
        """What losses are given of the teachers' logits and of their last layer."""
        logits = {name: net(pixels).double() for name, net in self.teachers.items()}
        chosen = list(self.case.classes) or slice(None)
        teacher = combined(logits, self.case.members, self.case.combine, temperature)[:, chosen]
        kept = teacher.topk(min(KEPT, teacher.shape[1]), dim=1)
        below = teacher - kept.values[:, :1]
        rest = below.scatter(1, kept.indices, -torch.inf) / temperature
        layer: nn.Linear = self.teachers[self.case.member].fc
        return {
            "teacher_logits": teacher.float(),
            "head_ids": kept.indices,
            "head_logits": below.gather(1, kept.indices).float(),
            "tail_logsumexp": rest.logsumexp(dim=1).float(),
            "classifier_weight": layer.weight[chosen],
            "classifier_bias": layer.bias[chosen],
        }

    def of_samples(self, positions: list[int]) -> dict[str, Tensor]:
        """What losses are given of the samples themselves."""
        labels = torch.from_numpy(self.data.labels)[positions]
        if self.case.classes:
            labels = torch.tensor(
                [self.case.classes.index(k) if k in self.case.classes else -1 for k in labels.tolist()]
            )
        ids = np.array([self.ids[position] for position in positions], dtype=np.uint64)
        return {
            "labels": labels,
            "samples": torch.tensor(positions),
            "sample_ids": torch.from_numpy(ids.view(np.int64)),
        }

    def pair(self, index: int, adapter: nn.Module) -> tuple[Tensor, Tensor]:
        """What a loss gets of one pair of layers: the student's, and the teacher's in float32."""
        case, (theirs, own) = self.case, self.case.layers[index]
        reduction = case.reduction
        maps = [self.seen[case.member][layer].double() for layer in theirs.split("+")]
        if case.sizes:
            ratio = [mine // size for mine, size in zip(maps[0].shape[2:], case.sizes[index], strict=True)]
            maps = [F.avg_pool2d(maps[0], ratio)]
        teacher = (maps[0] if reduction == "head" else REDUCED[reduction](*maps)).float()
        outputs = [self.own[layer] for layer in own.split("+")]
        if reduction in VECTORS:
            (output,) = outputs
            if output.ndim == 4:
                output = REDUCED["flatten" if reduction == "flatten" else "pool"](output)
            return adapter(output), teacher
        if len(outputs) == 1:
            outputs = [adapter(outputs[0])]
        return REDUCED[LOSSES[case.loss].reduction or reduction](*outputs), teacher


def tapped(net: Any) -> dict[str, Any]:
    """Module -> its output in the last forward pass, and "head": the input of `fc`."""
    seen: dict[str, Any] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
    net.fc.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("head", inputs[0]))
    return seen


def combined(logits: Mapping[str, Tensor], weights: Mapping[str, int], rule: str, t: float) -> Tensor:
    """(B, C) float64 logits of one or two teachers."""
    share = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    if rule == "mean_probs_at_t":
        return t * torch.stack([share[name] * (logits[name] / t).softmax(dim=1) for name in share]).sum(dim=0).log()
    return torch.stack([share[name] * logits[name] for name in share]).sum(dim=0)


BOTH_B: Any = {"members": {"a": 1, "b": 1}, "member": "b"}


# --- one run, both sides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What both sides found in one step: () losses, flat gradients of the student and of what the terms learn."""

    cached_loss: float
    live_loss: float
    cached: tuple[Tensor, Tensor]
    live: tuple[Tensor, Tensor]


Walk = Callable[..., list[Step]]


class World:
    """The user's file, and the caches that were made with it."""

    def __init__(self, path: Path) -> None:
        self.path, self.pieces = path, path / "pieces.py"
        shutil.copy(WORLDS / "three_maps.py", self.pieces)
        self.caches: dict[Any, softcache.Cache] = {}

    def cache(self, case: Case, *, whole: bool) -> softcache.Cache:
        """Of the teachers that a case names."""
        features = tuple(f"{layer}:{case.kind}" for layer in STORED[case.kind])
        settings: dict[str, Any] = {"codec": "linear_head" if case.kind == "head" else "float32", "features": features}
        settings |= {"policy": ("shift:pixels=3",)} | dict(case.cache)
        key = (case.kind, tuple(settings.items()), tuple(case.members), whole)
        if key not in self.caches:
            config = DumpConfig(
                data=f"{self.pieces}:images",
                teacher=tuple(f"{self.pieces}:teacher?name={m}&seed={MEMBERS[m]}&whole={whole}" for m in case.members),
                out=str(self.path / f"cache{len(self.caches)}"),
                views=VIEWS,
                view_seed=3,  # of which no two views of a sample are alike
                threads=1,
                **settings,
            )
            self.caches[key] = softcache.open(dump.run(config, quiet=True).path)
        return self.caches[key]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def walk(world: World, tmp_path: Path) -> Walk:
    """walk(case) -> STEPS steps of `train.run`, each beside the live teacher's."""

    def run(case: Case, *, whole: bool = True) -> list[Step]:
        cache = world.cache(case, whole=whole)
        live = Live(world.pieces, case, cache, whole=whole)
        steps: list[Step] = []

        def look(prepared: Prepared) -> None:
            live.take(prepared.model, prepared.objectives[0].term_modules)

        def step(prepared: Prepared, stage: LiveStage, *rest: Any) -> dict[str, Tensor]:
            """The cached step, and before the optimiser changes anything the live teacher's on the same inputs."""
            inputs: list[Tensor] = []

            def before_forward(learner: Learner, arguments: tuple[Any, ...]) -> None:
                live.follow(learner.model, learner.objective.term_modules)
                inputs.append(arguments[0])

            def before_step(*_: Any) -> None:
                loss = live.loss(inputs[-1])
                loss.backward()
                cached = flat_gradient(prepared.model), flat_gradient(stage.objective.term_modules)
                beside = flat_gradient(live.model), flat_gradient(live.parts)
                compared.append((loss.item(), cached, beside))

            compared: list[Any] = []
            hooks = [
                stage.learner.register_forward_pre_hook(before_forward),
                stage.trained.optimizer.register_step_pre_hook(before_step),
            ]
            values = train.one_step(prepared, stage, *rest)
            for hook in hooks:
                hook.remove()
            ((live_loss, cached, beside),) = compared
            steps.append(Step(values["loss"].item(), live_loss, cached, beside))
            return values

        settings = ",".join((f"weight={WEIGHT}", *case.settings))
        config = TrainConfig(
            data=f"{world.pieces}:images",
            cache=str(cache.reader.path),
            student=f"{world.pieces}:{case.student}",
            loss=(f"{case.loss}:{settings}",),
            members=tuple(f"{name}={weight}" for name, weight in case.members.items()),
            combine=case.combine,
            classes=tuple(map(str, case.classes)),
            out=str(tmp_path / "run"),
            epochs=EPOCHS,
            batch_size=BATCH,
            optimizer="adam",  # whatever the size of a loss
            schedule="constant",
            lr=0.005,
            seed=SEED,
            threads=1,
            **case.run,
        )
        run_with(config, step=step, look=look)
        assert len(steps) == STEPS
        if live.visited:  # nothing in views that are mixed
            assert live.visited == dict.fromkeys(live.record_of.values(), config.views_per_visit)
        return steps

    return run


def flat_gradient(module: nn.Module) -> Tensor:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters() if p.requires_grad]
    return torch.cat([gradient.double().flatten() for gradient in gradients]) if gradients else torch.zeros(0)


def differences(steps: list[Step]) -> tuple[float, float, float]:
    """The worst difference of the loss in 1e-5 |loss| + 1e-7, and of both gradients in 1e-5 of the live one's length."""
    losses = [abs(s.cached_loss - s.live_loss) / (1e-5 * abs(s.live_loss) + 1e-7) for s in steps]
    gradients = [[relative(s.cached[i], s.live[i]) / 1e-5 for s in steps] for i in (0, 1)]
    return max(losses), max(gradients[0]), max(gradients[1])


def relative(cached: Tensor, live: Tensor) -> float:
    apart = (cached - live).norm().item()
    return apart / live.norm().item() if apart else 0.0


def check(steps: list[Step], what: str) -> None:
    """Every step within the bounds; prints how much of them was used."""
    loss, student, learned = differences(steps)
    print(
        f"{what}: {len(steps)} steps, loss {steps[0].live_loss:.4g} -> {steps[-1].live_loss:.4g}; worst difference / bound: "
        f"loss {loss:.4f}, gradient of the student {student:.4f}, of learned parts {learned:.4f}"
    )
    assert max(loss, student, learned) <= 1
    assert len({step.live_loss for step in steps}) > len(steps) / 2  # the student moved
    assert all(step.live[0].norm() > 0 for step in steps)
    assert all(step.live[1].norm() > 0 for step in steps if len(step.live[1]))


# the layer that makes logits takes 8 numbers, and the last map has 32
MISFITS = [("srrl", "flatten"), ("simkd", "flatten")]
CASES = [(name, kind) for name, loss in LOSSES.items() for kind in loss.features or ("logits",)]
# outputs without classes are compared with the live teacher's in tests/train/test_learned_outputs.py
CASES = [case for case in CASES if case not in MISFITS and case[1] != OUTPUT]
CHEAPEST = list({name: (name, kind) for name, kind in reversed(CASES)}.values())[::-1]
OTHERS = [case for case in CASES if case not in CHEAPEST]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CHEAPEST, ids=map(" ".join, CHEAPEST))
def test_every_loss(name: str, kind: str, walk: Walk) -> None:
    check(walk(default_case(name, kind)), f"{name} from {kind}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), OTHERS, ids=map(" ".join, OTHERS))
def test_every_loss_from_what_else_serves_it(name: str, kind: str, walk: Walk) -> None:
    check(walk(default_case(name, kind)), f"{name} from {kind}")


FURTHER = {
    "standardized kd": Case("kd", "logits", ("standardized=true",), {"standardized": True}),
    "standardized dkd": Case("dkd", "logits", ("standardized=true",), {"standardized": True}),
    "temperature decay": Case(
        "kd", "logits", ("temperature=linear(8, 2)",), {"temperature": lambda done: 8 - 6 * done}
    ),
    "temperature decay from a head": Case(
        "kd_lower_bound",
        "logits",
        ("temperature=linear(8, 2)",),
        {"temperature": lambda done: 8 - 6 * done},
        cache=(("codec", f"topk:k={KEPT}"),),
    ),
    "curriculum": Case("ctkd", "logits", ("reversal=linear(0.2, 1)",), {"reversal": lambda done: 0.2 + 0.8 * done}),
    "an ensemble's logits": Case("kd", "logits", members={"a": 1, "b": 3}),
    "an ensemble's probabilities at a falling T": Case(
        "kd",
        "logits",
        ("temperature=linear(8, 2)",),
        {"temperature": lambda done: 8 - 6 * done},
        members={"a": 1, "b": 3},
        combine="mean_probs_at_t",
    ),
    "an ensemble of linear heads": Case("dist", "head", members={"a": 3, "b": 1}),
    "the second member's head": Case("hint", "head", ("member=b",), layers=(("head", "head"),), **BOTH_B),
    "the second member's vector": Case("hint", "pool", ("member=b",), layers=(("stage3", "head"),), **BOTH_B),
    "the second member's attention": Case(
        "at", "attention", ("member=b",), layers=tuple((stage, stage) for stage in MAP_ENDS), **BOTH_B
    ),
    "the only member with a vector": Case(
        "crd",
        "pool",
        ("negatives=32",),
        layers=(("stage3", "head"),),
        cache=(("features", ("b=stage3:pool",)),),
        **BOTH_B,
    ),
    "two views a visit, labels": Case("dkd", "logits", run={"views_per_visit": 2}),
    "two views a visit, a memory": Case(
        "crd", "pool", ("negatives=32",), layers=(("stage3", "head"),), run={"views_per_visit": 2}
    ),
    "mixed views": Case("kd", "logits", cache=(("policy", ("shift:pixels=3", "mixup")),)),
    "mixed views, maps": Case(
        "fitnet", "map", ("layer=stage2",), layers=(("stage2", "stage2"),), cache=(("policy", ("mixup",)),)
    ),
    "some classes": Case("shifted_kd", "logits", classes=(0, 2, 3)),
    "some classes of a classifier": Case("srrl", "pool", layers=(("stage3", "head"),), classes=(0, 2, 3)),
    "the authors' squared logits": Case("srrl", "head", ("logits=mse",), {"logits": "mse"}, layers=(("head", "head"),)),
    "an adapter for averaged fsp": Case(
        "fsp_average", "map", ("adapter=linear",), layers=tuple((stage, stage) for stage in MAP_ENDS)
    ),
    "an adapter of two layers": Case("hint", "cls", ("adapter=mlp",), layers=(("tokens", "head"),)),
    "an adapter where none is needed": Case("pkt", "pool", ("adapter=linear",), layers=(("stage3", "head"),)),
    "two layers, summed": Case(
        "fitnet", "map", ("layer=stage3/stage1",), layers=(("stage3", "stage3"), ("stage1", "stage1"))
    ),
    "another layer of the student": Case("rkd_distance", "pool", ("student=stage2",), layers=(("stage3", "stage2"),)),
    **{
        f"{loss}, smaller maps of the student": Case(
            loss,
            "map",
            ("layer=stage1/stage2", "student=stage1/stage2", *more),
            student="small",
            layers=(("stage1", "stage1"), ("stage2", "stage2")),
            sizes=((4, 4), (2, 2)),
        )
        for loss, *more in (("at",), ("nst",), ("ab",), ("vid",), ("fitnet",), ("reviewkd", "width=8"))
    },
    **{
        f"{loss}, larger maps of the student": Case(
            loss,
            kind,
            ("layer=stage2/stage3" if kind != "spatial_gram" else "layer=stage2", f"student={own}", *more),
            layers=tuple(zip(("stage2", "stage3"), own.split("/"), strict=False)),
        )
        for loss, kind, own, *more in (
            ("at", "attention", "stage1/stage2"),
            ("nst", "spatial_gram", "stage1"),
            ("ab", "sign", "stage1/stage2"),
            ("vid", "map", "stage1/stage2"),
            ("fitnet", "map", "stage1/stage2"),
            ("reviewkd", "map", "stage1/stage2", "width=8"),
        )
    },
    "a map larger along one axis and smaller along the other": Case(
        "at", "map", ("layer=stage2", "student=stage3"), student="long", layers=(("stage2", "stage3"),), sizes=((4, 2),)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FURTHER)
def test_further_ways(what: str, walk: Walk) -> None:
    check(walk(FURTHER[what]), f"{FURTHER[what].loss}: {what}")


# --- a teacher of any numbers ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("kind", [kind for kind in STORED if kind != "logits"])
def test_stored_tensors_are_within_their_stated_error(kind: str, dtype: str, world: World) -> None:
    """The largest relative L2 error that the cache states holds for every record and view, beside the live teacher."""
    codec = (("codec", f"linear_head:dtype={dtype}"),) if kind == "head" else ()
    stored = (("feature_dtype", dtype),) if kind != "head" else ()  # the codec keeps what it takes
    case = Case("hint", kind, cache=(*stored, *codec))
    cache = world.cache(case, whole=False)
    live = Live(world.pieces, case, cache, whole=False)
    names = [f"{layer}:{kind}" for layer in STORED[kind]]
    pairs = [(index, view) for index in range(COUNT) for view in range(VIEWS)]
    targets = cache.join(live.data).gather_samples(*np.array(pairs).T, features=names)
    with torch.no_grad():
        live.teachers["a"](torch.stack([live.pixels(*pair) for pair in pairs]))
    found = {}  # name -> decoded, live, stated
    if kind == "head":
        found["head"] = (
            targets.classifier_input("a"),
            live.seen["a"]["head"],
            {"float16": 2**-11, "int8": 2 / 254}[dtype],
        )
    for name in names:
        feature = cache.features["a"][name]
        arrays = {suffix: targets.arrays["a"][array] for suffix, array in feature.names.items()}
        stated = cache.manifest.statistics["a"].feature_errors[name]
        found[name] = feature.codec.decode(arrays), stored_form(live, name), stated
    for name, (decoded, given, stated) in found.items():
        given = given.double().flatten(1)
        error = ((decoded.double().flatten(1) - given).norm(dim=1) / given.norm(dim=1)).max().item()
        print(f"{name} in {dtype}: relative L2 error {error:.2e} at most, stated {stated:.2e}")
        assert error <= stated + 1e-6  # float32 in batches of another size moves what the live teacher gives
        assert stated <= {"float16": 2**-11, "int8": 2e-2}[dtype]
        assert (error > 1e-5) == (kind != "sign")


def stored_form(live: Live, name: str) -> Tensor:
    """(B, ...) of the live teacher's last pass as it is stored: a map, a reduction, the upper triangle of one, or bits."""
    layers, _, reduction = name.rpartition(":")
    maps = [live.seen["a"][layer].double() for layer in layers.split("+")]
    if live.cache.features["a"][name].codec.form == "map":
        return maps[0]
    made = REDUCED[reduction](*maps)
    if reduction == "gram":
        rows, columns = np.triu_indices(made.shape[1])
        return made[:, rows, columns]
    if reduction == "sign":
        packed = np.packbits(made.flatten(1).numpy().astype(np.uint8), axis=1, bitorder="little")
        return torch.from_numpy(packed)
    return made


ROOM = {"float16": (0.01, 0.03), "int8": (0.05, 0.1)}  # twice what was measured: of a loss, of its gradient
TURNS = ("tvd", "tvd_lower_bound")  # their gradients jump where student and teacher give a class the same probability
ROOM_OF_TURNS = 0.6  # likewise
ROUNDED = [(name, kind, "float16") for name, kind in CASES]
ROUNDED += [(name, kind, "int8") for name, kind in CHEAPEST]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "dtype"), ROUNDED, ids=map(" ".join, ROUNDED))
def test_every_loss_of_rounded_tensors(name: str, kind: str, dtype: str, walk: Walk) -> None:
    """What the rounding of logits and features does to a loss and its gradient, step by step."""
    case = default_case(name, kind)
    settings: dict[str, Any] = {} if kind in ("logits", "head") else {"feature_dtype": dtype}
    if kind == "head":
        settings["codec"] = f"linear_head:dtype={dtype}"
    elif not LOSSES[name].needs("head_ids"):
        settings["codec"] = dtype
    steps = walk(replace(case, cache=tuple((dict(case.cache) | settings).items())), whole=False)
    loss = [abs(s.cached_loss - s.live_loss) / abs(s.live_loss) for s in steps]
    gradient = [relative(torch.cat(s.cached), torch.cat(s.live)) for s in steps]
    print(
        f"{dtype} {name} from {kind}: relative difference of the loss {max(loss):.1e} at most, {sum(loss) / STEPS:.1e} on "
        f"average; of the gradient {max(gradient):.1e} and {sum(gradient) / STEPS:.1e}"
    )
    assert max(loss) <= ROOM[dtype][0]
    assert max(gradient) <= (ROOM_OF_TURNS if name in TURNS else ROOM[dtype][1])

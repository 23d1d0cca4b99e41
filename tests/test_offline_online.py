"""Offline equals online: each loss from the cache, as train computes it, beside the same loss on the live teacher's tensors.

The cached side is `train.run` itself. Before each of its steps the live side takes over the student's weights, what the terms
have learned and remember; it runs the teacher on the pixels that the student was given, taps both networks with hooks of
its own, reduces and combines in float64 as written out here, and calls the loss's formula (which has an oracle elsewhere).
`pytest tests/test_offline_online.py -rP` shows the differences.

The teacher that the float32 statement is made with computes with small whole numbers, so that its logits, its features
and what is stored of them are exact in float16, in any batch and order of sums; a spatial Gram, which has square roots in
it, is stored as the map that it is made of. Whatever differs then is not the storage's. `test_rounded_features` has a teacher
of any numbers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softcache
from softcache import dump, train
from softcache.config import DumpConfig, TrainConfig
from softcache.data.transfer_set import open_transfer_set
from softcache.learner import Learner
from softcache.losses import LOSSES, VECTORS
from softcache.spec import load_user_file

BATCH, EPOCHS, COUNT, VIEWS = 8, 2, 78, 2
STEPS = EPOCHS * 10  # the last batch of an epoch has 6 samples
WEIGHT, SEED = 0.7, 5

PIECES = '''
"""Images, teachers (exact in float16 or not) and students of small maps."""

import numpy as np
import torch
from torch import nn

CLASSES = ("ant", "bee", "cat", "dog", "elk")


class Images:
    """Random images; every fifth has no label."""

    class_names = CLASSES

    def __init__(self):
        draw = np.random.default_rng(0)
        self.items = draw.integers(0, 256, (78, 8, 8)).astype(np.uint8)
        self.labels = np.where(np.arange(78) % 5 == 3, -1, draw.integers(0, 5, 78))
        self.sample_keys = [f"some/{i:02d}" for i in range(78)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i], self.labels[i]


def images():
    return Images()


class Whole(nn.Module):
    """Whole numbers up to 5 in size, over 4."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return (x / self.step).round().clamp(-5, 5) / 4


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).mT  # (B, H W, C)


class Net(nn.Module):
    """Three stages of maps, tokens made of the last, and a linear layer on their mean."""

    def __init__(self, widths, strides, seed, whole=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = 1
            for i, (width, stride) in enumerate(zip(widths, strides), start=1):
                conv = nn.Conv2d(before, width, 3, stride=stride, padding=1)
                after = Whole((16, 4, 4)[i - 1]) if whole else nn.Identity()
                setattr(self, f"stage{i}", nn.Sequential(conv, after))
                before = width
            self.tokens = Tokens()
            self.fc = nn.Linear(before, 5)
            if whole:
                for name, parameter in self.named_parameters():
                    top = 4 if name.startswith("fc") else 3
                    parameter.data = torch.randint(1 - top, top, parameter.shape).float()

    def collate(self, items):
        return torch.stack([torch.from_numpy(item) for item in items])[:, None].float() // 32  # whole numbers up to 7

    def forward(self, x):
        x = self.stage2(self.stage1(x).relu())
        return self.fc(self.tokens(self.stage3(x.relu())).mean(dim=1))


def teacher(seed: int = 1, whole: bool = True):
    return Net((4, 8, 8), (1, 2, 2), seed, whole)


def student(wide: bool = False):
    return Net((4, 8, 8) if wide else (3, 5, 6), (1, 2, 2), 9)


def small():
    """Its maps are 4 x 4, 2 x 2 and 2 x 2."""
    return Net((3, 5, 6), (2, 2, 1), 9)


def long():
    """Its maps are 8 x 8, 8 x 4 and 8 x 2."""
    return Net((3, 5, 6), (1, (1, 2), (1, 2)), 9)
'''


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
STAGES = ("stage1", "stage2", "stage3")
STORED = {  # kind of feature -> layers it is dumped of; with head the codec is linear_head, with logits there is no feature
    "logits": (),
    "head": (),
    "pool": ("stage3",),
    "flatten": ("stage3",),
    "cls": ("tokens",),
    "mean_tokens": ("tokens",),
    "map": STAGES,
    "attention": STAGES,
    "gram": ("stage3",),
    "spatial_gram": ("stage1", "stage2"),  # where the map is smaller
    "sign": STAGES,
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
        student: factory in PIECES.
        layers: (teacher's, student's) by pair; "head" is the input of the final linear layer.
        sizes: to which the teacher's maps are averaged down, by pair.
        cache: settings of the dump.
        members: name -> weight, of the term's teacher.
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
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reduction(self) -> str:
        """What the loss is given of the teacher's layer: what is cheapest to store is made of a map."""
        wanted = LOSSES[self.loss].features[0]
        return self.kind if self.kind != "map" or wanted == "map" else wanted.replace("head", "pool")


def default_case(name: str, kind: str) -> Case:
    """What a loss's line in the table says, so that a new loss is covered by its line."""
    loss = LOSSES[name]
    settings = {"crd": ("negatives=32",), "reviewkd": ("width=8",)}.get(name, ())
    if not loss.has_features:
        codec = "topk:k=4" if loss.needs("head_ids") else "float32"  # of 5 classes: what is left is one, and exact
        return Case(name, "logits", settings, cache=(("codec", codec),))
    stored = STORED[kind] or ("head",)
    if kind == "map" and loss.layers != "stages":
        stored = ("stage2",) if loss.layers == "middle" else ("stage3",)
        settings += (f"layer={stored[0]}",)
    own = dict.fromkeys(stored, "head") if loss.layers == "head" else dict(zip(stored, stored, strict=True))
    if loss.layers == "last" and kind == "head":
        own = {"head": "stage3"}
    if loss.graft:
        own = {layer: "stage3.projector" if kind == "map" else "fc.projector" for layer in stored}
        settings += () if kind == "map" else ("student=head",)
    student = "student?wide=true" if kind == "fsp" else "student"
    return Case(name, kind, settings, student=student, layers=tuple(own.items()))


class Live:
    """Teachers and a student beside the run's, with what its terms have of their own."""

    def __init__(self, pieces: Path, case: Case, cache: softcache.Cache, *, whole: bool) -> None:
        made = load_user_file(pieces)
        seeds = {"a": 1, "b": 2}
        self.case, self.steps = case, 0
        self.teachers = {name: made.teacher(seeds[name], whole).eval() for name in ("a", *case.members)}
        self.seen: dict[str, dict[str, Any]] = {name: tapped(net) for name, net in self.teachers.items()}
        data = open_transfer_set(f"{pieces}:images")
        ids = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in data.keys]
        self.ids = torch.from_numpy(np.array(ids, dtype=np.uint64).view(np.int64))
        self.labels = torch.from_numpy(data.labels).long()
        collate = self.teachers["a"].collate
        self.sample_of = {}  # pixels -> position
        for index in range(COUNT):
            for view in range(VIEWS):
                pixels = collate([cache.policy.render(data.load(index)[0], ids[index], view)])
                assert self.sample_of.setdefault(pixels.numpy().tobytes(), index) == index

    def take(self, model: nn.Module, parts: nn.Module) -> None:
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
        (part,) = self.parts
        settings = {key: value for key, value in loss.defaults.items() if key not in loss.fixed} | dict(case.values)
        settings = {key: value(self.steps / STEPS) if callable(value) else value for key, value in settings.items()}
        with torch.no_grad():
            logits = {name: net(pixels).double() for name, net in self.teachers.items()}
        student_logits = self.model.train()(pixels)
        samples = torch.tensor([self.sample_of[image.numpy().tobytes()] for image in pixels])
        teacher_logits = combined(logits, case.members, case.run.get("combine"), settings.get("temperature", 1.0))
        kept = teacher_logits.topk(4, dim=1)
        left = teacher_logits.scatter(1, kept.indices, -torch.inf) - kept.values[:, :1]
        head: nn.Linear = self.teachers["a"].fc
        known = {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits.float(),
            "head_ids": kept.indices,
            "head_logits": (kept.values - kept.values[:, :1]).float(),
            "tail_logsumexp": (left / settings.get("temperature", 1.0)).logsumexp(dim=1).float(),
            "labels": self.labels[samples],
            "classifier_weight": head.weight.detach(),
            "classifier_bias": head.bias.detach(),
            "samples": samples,
            "sample_ids": self.ids[samples],
            "step": self.steps,
        }
        pairs = [self.pair(index, part.adapters[index]) for index in range(len(case.layers))]
        if loss.needs("student_levels"):
            known |= {"student_levels": [own for own, _ in pairs], "teacher_levels": [theirs for _, theirs in pairs]}
        values = []
        for index, (own, theirs) in enumerate(pairs if loss.needs("student_features") else [(None, None)]):
            compute = part.cores[index] if loss.module else loss.function
            inputs = known | {"student_features": own, "teacher_features": theirs}
            values.append(compute(**{name: inputs[name] for name in loss.inputs}, **settings))
        self.steps += 1
        return WEIGHT * sum(values, start=torch.zeros(()))

    def pair(self, index: int, adapter: nn.Module) -> tuple[Tensor, Tensor]:
        """What a loss gets of one pair of layers: the student's, and the teacher's in float32."""
        case, (theirs, own) = self.case, self.case.layers[index]
        reduction = case.reduction
        maps = [self.seen["a" if "member" not in case.run else case.run["member"]][layer] for layer in theirs.split("+")]
        if case.sizes:
            ratio = [mine // size for mine, size in zip(maps[0].shape[2:], case.sizes[index], strict=True)]
            maps = [F.avg_pool2d(maps[0], ratio)]
        teacher = maps[0].double() if reduction == "head" else REDUCED[reduction](*(x.double() for x in maps))
        outputs = [self.own[layer] for layer in own.split("+")]
        if reduction in VECTORS:
            (output,) = outputs
            if output.ndim == 4:
                output = REDUCED["flatten" if reduction == "flatten" else "pool"](output)
            return adapter(output), teacher.float()
        if len(outputs) == 1:
            outputs = [adapter(outputs[0])]
        return REDUCED[LOSSES[case.loss].reduction or reduction](*outputs), teacher.float()


def tapped(net: nn.Module) -> dict[str, Any]:
    """Module -> its output in the last forward pass, and "head": the input of `fc`."""
    seen: dict[str, Any] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
    net.fc.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("head", inputs[0]))  # type: ignore[operator]
    return seen


def combined(logits: Mapping[str, Tensor], weights: Mapping[str, int], rule: str | None, t: float) -> Tensor:
    """(B, C) float64 logits of one or two teachers."""
    share = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    if rule == "mean_probs_at_t":
        return t * torch.stack([share[name] * (logits[name] / t).softmax(dim=1) for name in share]).sum(dim=0).log()
    return torch.stack([share[name] * logits[name] for name in share]).sum(dim=0)


# --- one run, both sides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What both sides found in one step: () losses, flat gradients of the student and of what the terms learn."""

    cached_loss: float
    live_loss: float
    cached: tuple[Tensor, Tensor]
    live: tuple[Tensor, Tensor]


class World:
    """The user's file, and the caches that were made with it."""

    def __init__(self, path: Path) -> None:
        self.path, self.pieces = path, path / "pieces.py"
        self.pieces.write_text(PIECES)
        self.caches: dict[Any, softcache.Cache] = {}

    def cache(self, case: Case, *, whole: bool) -> softcache.Cache:
        """Of the teachers that a case names."""
        features = [f"{layer}:{case.kind}" for layer in STORED[case.kind]]
        settings = {"codec": "linear_head" if case.kind == "head" else "float32"} | dict(case.cache)
        key = (case.kind, tuple(settings.items()), tuple(case.members), whole)
        if key not in self.caches:
            seeds = {"a": 1, "b": 2}
            config = DumpConfig(
                data=f"{self.pieces}:images",
                teacher=tuple(f"{self.pieces}:teacher?name={m}&seed={seeds[m]}&whole={whole}" for m in case.members),
                out=str(self.path / f"cache{len(self.caches)}"),
                features=tuple(features),
                policy=("shift:pixels=1",),
                views=VIEWS,
                threads=1,
                **settings,
            )
            self.caches[key] = softcache.open(dump.run(config, quiet=True).path)
        return self.caches[key]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def walk(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Step]]]:
    """walk(case) -> STEPS steps of `train.run`, each beside the live teacher's."""

    def run(case: Case, *, whole: bool = True) -> list[Step]:
        cache = world.cache(case, whole=whole)
        live, steps, taken = Live(world.pieces, case, cache, whole=whole), [], {}
        build, forward, make = train.build_objectives, Learner.forward, train.make_optimizer

        def note_parts(*arguments: Any) -> Any:
            objectives, student = build(*arguments)
            live.take(arguments[1], objectives[0].parts)
            return objectives, student

        def note_inputs(self: Learner, inputs: Tensor, given: Any, moment: Any) -> Any:
            live.follow(self.model, self.objective.parts)
            values = forward(self, inputs, given, moment)
            taken.update(learner=self, inputs=inputs, loss=self.objective.total(values, moment).item())
            return values

        def compare(*_: Any) -> None:
            loss = live.loss(taken["inputs"])
            loss.backward()
            learner = taken["learner"]
            cached = flat_gradient(learner.model), flat_gradient(learner.objective.parts)
            beside = flat_gradient(live.model), flat_gradient(live.parts)
            steps.append(Step(taken["loss"], loss.item(), cached, beside))

        def make_and_hook(*arguments: Any) -> torch.optim.Optimizer:
            optimizer = make(*arguments)
            optimizer.register_step_pre_hook(compare)
            return optimizer

        monkeypatch.setattr(train, "build_objectives", note_parts)
        monkeypatch.setattr(Learner, "forward", note_inputs)
        monkeypatch.setattr(train, "make_optimizer", make_and_hook)
        settings = ",".join((f"weight={WEIGHT}", *case.settings))
        config = TrainConfig(
            data=f"{world.pieces}:images",
            cache=str(cache.reader.path),
            student=f"{world.pieces}:{case.student}",
            loss=(f"{case.loss}:{settings}",),
            members=tuple(f"{name}={weight}" for name, weight in case.members.items()),
            out=str(tmp_path / "run"),
            epochs=EPOCHS,
            batch_size=BATCH,
            optimizer="adam",  # whatever the size of a loss
            schedule="constant",
            lr=0.005,
            seed=SEED,
            threads=1,
            **{key: value for key, value in case.run.items() if key != "member"},
        )
        train.run(config, quiet=True)
        assert len(steps) == STEPS
        return steps

    yield run


def flat_gradient(module: nn.Module) -> Tensor:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters() if p.requires_grad]
    return torch.cat([gradient.double().flatten() for gradient in gradients]) if gradients else torch.zeros(0)


def differences(steps: list[Step]) -> tuple[float, float, float]:
    """The worst difference of the loss in 1e-5 |loss| + 1e-7, and of both gradients relative to the live one's length."""
    losses = [abs(s.cached_loss - s.live_loss) / (1e-5 * abs(s.live_loss) + 1e-7) for s in steps]
    moved = [[relative(s.cached[i], s.live[i]) for s in steps] for i in (0, 1)]
    return max(losses), max(moved[0]), max(moved[1])


def relative(cached: Tensor, live: Tensor) -> float:
    apart = (cached - live).norm().item()
    return apart / live.norm().item() if apart else 0.0


CASES = [(name, kind) for name, loss in LOSSES.items() for kind in loss.features or ("logits",)]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name} {kind}" for name, kind in CASES])
def test_every_loss(name, kind, walk):
    steps = walk(default_case(name, kind))
    print(name, kind, differences(steps), steps[0].live_loss, steps[-1].live_loss, steps[0].live[0].norm(), steps[0].live[1].norm())
    assert max(differences(steps)[1:]) <= 1e-5
    assert differences(steps)[0] <= 1

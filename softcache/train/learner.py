"""A student with everything that learns beside it, and the parts of a batch that it computes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softcache.config import TrainConfig
from softcache.errors import ConfigError, LossError, ModelError
from softcache.features.taps import eval_mode
from softcache.losses import HEAD, LossTerm
from softcache.losses.schedules import Moment
from softcache.models import Model
from softcache.models.graft import graft
from softcache.models.projector import Projector
from softcache.train.objective import Given, Objective
from softcache.train.pairs import Student, StudentTaps, pairs_of
from softcache.train.ranks import Ranks
from softcache.train.stages import Stage, freeze
from softcache.train.term_modules import Parts, Sizes
from softcache.train.terms import CachedTeacher, named_terms

# its name since torch 2.12, and before
SYNC = next(
    n for n in ("forward_sync_buffers", "broadcast_buffers") if n in signature(DistributedDataParallel).parameters
)


class Learner(nn.Module):
    """Student and objective as one module, so that DistributedDataParallel sees every parameter that learns.

    Args:
        model: the student.
        objective: of the stage.
        taps: what the objective's pairs need of the student's layers; None without pairs.
        autocast: half type to compute the student in, or None.
        compiled: run the student through torch.compile.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        taps: StudentTaps | None,
        *,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self._taps, self._autocast = taps, autocast
        if compiled:
            torch.compiler.reset()  # what was compiled for other taps, in an earlier stage, would not call these
        self._run = torch.compile(model) if compiled else model

    def forward(self, inputs: Any, given: Given, moment: Moment) -> dict[str, Tensor]:
        """Term -> () unweighted value, as `Objective`."""
        with torch.autocast(given.labels.own.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            student_logits = self._run(inputs)
        outputs = {} if self._taps is None else self._taps.outputs()
        values: dict[str, Tensor] = self.objective(student_logits, outputs, given, moment)
        return values

    def leaves_some_alone(self, inputs: Any) -> bool:
        """Whether some parameter of the student that may learn gets no gradient from this stage's terms."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with eval_mode(self.model):
            logits = self.model(inputs)
        reached = [] if self._taps is None else list(self._taps.outputs().values())
        if any(term.loss.needs("student_logits") for term in self.objective.terms.values()):
            reached.append(logits)
        sums = [tensor.sum() for tensor in reached if tensor.requires_grad]
        if not sums or not learning:
            return bool(learning)
        return None in torch.autograd.grad(torch.stack(sums).sum(), learning, allow_unused=True)

    def rehearse(self, inputs: Any, given: Given, moments: Sequence[Moment]) -> None:
        """Compute the terms of some samples, with nothing learned or remembered: what does not fit is refused before a step.

        Raises:
            LossError: a term that cannot be computed of such tensors, or with its settings.
            ConfigError: what the terms depend on is all frozen.
            ModelError: a student that does not give a row of logits for each sample.
        """
        with eval_mode(self):
            with torch.no_grad():
                logits = self.model(inputs)
                wanted = (len(given.labels.own), self.model.num_classes)
                if not isinstance(logits, Tensor) or logits.shape != wanted:
                    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                    raise ModelError(
                        f"{self.model.spec}: gives {found} for {wanted[0]} samples of {wanted[1]} classes",
                        tip=f"a student's output must be logits of shape (B, {wanted[1]})",
                    )
            for moment in moments:
                if not self.objective.total(self(inputs, given, moment), moment).requires_grad:
                    raise ConfigError(
                        "no parameter that learns has a part in this stage's terms",
                        tip="freeze less, or add a term that reaches what is not frozen",
                    )


def over_ranks(learner: Learner, ranks: Ranks, device: torch.device, inputs: Any) -> nn.Module:
    """The learner itself, or as one of several whose gradients are averaged after each batch.

    Args:
        inputs: a collated batch on the device, to see which parameters a stage leaves alone.
    """
    if ranks.size == 1:
        return learner
    # BatchNorm's statistics are each rank's own unless --sync-bn; where a stage freezes them, they must be the student's
    ranks.share(learner.buffers())
    return DistributedDataParallel(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        **{SYNC: False},  # type: ignore[arg-type]
        find_unused_parameters=learner.leaves_some_alone(inputs),
    )


def build_objectives(
    stages: Sequence[Stage], model: Model, inputs: Any, teacher: CachedTeacher | None, sizes: Sizes, ranks: Ranks
) -> tuple[list[Objective], Student | None]:
    """The objective of each stage, and the student as probed with a batch of inputs (None where no term taps it).

    A term that stands in several stages with the same layers and fixed settings keeps what it learned in the earlier ones.
    A loss that grafts the teacher's classifier onto the student does so now.

    Raises:
        LossError: a feature that is not in the cache, layers or widths that do not fit.
    """
    student = None
    terms = [term for stage in stages for term in stage.terms]
    if any(term.loss.has_features for term in terms):
        student = Student(model.net, model.input.prepare(inputs))
        grafting = {tuple(term.placement.items()): term for term in terms if term.loss.graft}
        if len(grafting) > 1:
            raise LossError("the student can take over one teacher's classifier, and two terms ask for it")
        for term in grafting.values():
            _graft(term, model, student, teacher, inputs)
            student = Student(model.net, model.input.prepare(inputs))
    made: dict[Any, Parts] = {}
    objectives = []
    for stage in stages:
        parts = []
        for name, term in named_terms(stage.terms):
            fixed = [(key, term.settings[key]) for key in term.loss.fixed]
            key = (name, *sorted(term.placement.items()), *fixed)
            if key not in made:
                pairs = []
                if term.loss.has_features:
                    assert teacher is not None and student is not None
                    grafted = model.graft.features if term.loss.graft and model.graft is not None else None
                    pairs = pairs_of(term, teacher.cache, teacher.members, student, layer=grafted)
                made[key] = Parts(term, pairs, sizes, teacher)
            parts.append(made[key])
        objectives.append(Objective(stage.terms, parts, teacher, ranks))
    return objectives, student


def _graft(term: LossTerm, model: Model, student: Student, teacher: CachedTeacher | None, inputs: Any) -> None:
    assert teacher is not None
    (pair, *more) = pairs_of(term, teacher.cache, teacher.members, student)
    if more:
        raise LossError(f"loss {term.name!r} projects one layer", tip="name it: layer=LAYER")
    weight, bias = teacher.classifier()
    if len(pair.student_shapes[0]) != len(pair.teacher_shape):
        raise LossError(
            f"loss {term.name!r}: layer {'+'.join(pair.student)} of the student gives {pair.student_shapes[0]}, {pair.stored} "
            f"of the teacher {pair.teacher_shape}: a projector goes from a map to a map, or from a vector to a vector",
            tip="student=head puts it in front of the student's final linear layer; dump LAYER:map for a map",
        )
    layer = student.head_name if pair.student == (HEAD,) else pair.student[0]
    projector = Projector(pair.student_shapes[0], pair.teacher_shape)
    graft(model, layer, projector, weight, bias, inputs)


def freeze_for(stage: Stage, model: Model, objective: Objective, fixed: Collection[str]) -> list[nn.Parameter]:
    """The parameters that a stage trains, after freezing the others.

    Args:
        fixed: parameters of the student that are frozen for good.

    Raises:
        ConfigError: a pattern that names nothing, or nothing is left to train.
    """
    freeze(model.net, stage.config.freeze, fixed)
    learned = [p for p in (*model.parameters(), *objective.parameters()) if p.requires_grad]
    if not learned:
        raise ConfigError(
            "every parameter is frozen, so there is nothing to train",
            tip="freeze less, or add a loss with an adapter",
        )
    return learned


def make_optimizer(parameters: Sequence[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW, a step of all parameters in one pass where the device has that."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)

"""A student with everything that learns beside it, and the gradients of a batch, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softcache.errors import ConfigError, ModelError, faults_explained
from softcache.features.taps import eval_mode
from softcache.losses import OUTPUT
from softcache.losses.schedules import Moment
from softcache.models import Model
from softcache.train.checkpoint import random_states, restore_random_states
from softcache.train.objective import Given, Objective
from softcache.train.pairs import Student, StudentTaps
from softcache.train.ranks import Ranks

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
        with (
            faults_explained(ModelError, f"the student {self.model.spec!r}, in training"),
            torch.autocast(given.labels.own.device.type, dtype=self._autocast, enabled=self._autocast is not None),
        ):
            student_logits = self._run(inputs) if len(given.labels.own) else self._of_no_rows()
        outputs = {} if self._taps is None else self._taps.outputs()
        outputs[OUTPUT] = student_logits
        values: dict[str, Tensor] = self.objective(student_logits, outputs, given, moment)
        return values

    def _of_no_rows(self) -> Tensor:
        """(0, C) of samples without a word, which no network need be able to take; all that learns has a part in it."""
        learning = [parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad]
        total = (
            torch.stack(learning).sum() if learning else torch.zeros((), device=next(self.model.parameters()).device)
        )
        return total.expand(0, self.model.num_classes)

    def leaves_some_alone(self, inputs: Any) -> bool:
        """Whether some parameter of the student that may learn gets no gradient from this stage's terms."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with eval_mode(self.model):
            logits = self.model(inputs)
        reached = [] if self._taps is None else list(self._taps.outputs().values())
        on_output = any(pair.student == (OUTPUT,) for pair in self.objective.pairs)
        if on_output or any(term.loss.needs("student_logits") for term in self.objective.terms.values()):
            reached.append(logits)
        sums = [tensor.sum() for tensor in reached if tensor.requires_grad]
        if not sums or not learning:
            return bool(learning)
        return None in torch.autograd.grad(torch.stack(sums).sum(), learning, allow_unused=True)

    def rehearse(self, inputs: Any, given: Given, moments: Sequence[Moment]) -> dict[str, Tensor]:
        """The terms of some samples, with nothing learned or remembered: what does not fit is refused before a step.

        Returns:
            Term -> () unweighted value at the last moment, with its graph.

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
                    what = "logits" if self.model.has_classes else f"an output (its {self.model.output})"
                    numbers = "classes" if self.model.has_classes else "numbers"
                    rows, shape = f"{wanted[0]} samples", f"(B, {wanted[1]})"
                    if given.samples is not None and len(given.samples) != wanted[0]:
                        rows, shape = f"{len(given.samples)} samples with {wanted[0]} words", f"(words, {wanted[1]})"
                    raise ModelError(
                        f"{self.model.spec}: gives {found} for {rows} of {wanted[1]} {numbers}",
                        tip=f"a student's output must be {what} of shape {shape}",
                    )
            for moment in moments:
                values: dict[str, Tensor] = self(inputs, given, moment)
                if not self.objective.total(values, moment).requires_grad:
                    raise ConfigError(
                        "no parameter that learns has a part in this stage's terms",
                        tip="freeze less, or add a term that reaches what is not frozen",
                    )
        return values

    def rehearse_in_training(self, inputs: Any, given: Given, moment: Moment) -> None:
        """Compute the terms of some samples as a step would; what that changes is put back."""
        before = {name: value.clone() for name, value in self.state_dict().items()}
        states, was_training = random_states(), {module: module.training for module in self.modules()}
        try:
            self.train()
            self(inputs, given, moment)
        finally:
            self.load_state_dict(before)
            restore_random_states(states)
            for module, training in was_training.items():
                module.training = training


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


def tapped(student: Student | None, objective: Objective) -> AbstractContextManager[StudentTaps | None]:
    """What an objective needs of the student's layers, while it is entered."""
    return nullcontext() if student is None or not objective.pairs else StudentTaps(student, objective.pairs)


def backward(
    learner: nn.Module,
    objective: Objective,
    pieces: Sequence[tuple[Any, Given]],
    scaler: torch.amp.GradScaler,
    moment: Moment,
) -> dict[str, Tensor]:
    """Add up the gradients of a batch, piece by piece; the value of each term, and of their sum, on this rank."""
    values: dict[str, Tensor] = {}
    for number, (inputs, given) in enumerate(pieces, start=1):
        # gradients go over the ranks once, with the last piece
        alone = number < len(pieces) and isinstance(learner, DistributedDataParallel)
        with learner.no_sync() if alone else nullcontext():  # type: ignore[operator]
            found = learner(inputs, given, moment)
            loss = objective.total(found, moment)
            scaler.scale(loss).backward()
        for name, value in {**found, "loss": loss}.items():
            values[name] = values.get(name, 0.0) + value.detach().double()
    return values

"""What a run will learn little by, told before its first step with the number that shows it, or refused if it is nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, first_offenders
from softcache.losses import LossTerm
from softcache.losses.schedules import Moment, Schedule
from softcache.models import Initialised
from softcache.models.masks import prunable
from softcache.train.session import Prepared
from softcache.train.stages import Stage, unused_settings
from softcache.train.terms import named_terms

LOOKED_AT = 4096  # moments of a stage, spread over its steps
LEFT_OF_START = 0.05  # of a moving average at the end of a run
TAKEN = 0.5  # of a student's numbers, by --init-from
PEAK = 0.5  # of the highest value of a schedule
MANY_ZEROS = 0.2  # of a student's weights: no network begins with so many
ROUNDED = 0.01  # of a student's weights
MOVED = 1e-6  # learning rate times steps: less than float32 keeps of a weight of about 1 and more
SOFTEST, HARDEST = 200.0, 0.07  # temperatures


@dataclass(frozen=True)
class Reach:
    """What the terms of a stage move, as a rehearsal found it.

    Attributes:
        terms: in which some parameter that learns has a part.
        single: on pieces of one sample their gradient is zero.
        parameters: of the student, those that get a gradient.
    """

    terms: frozenset[str]
    single: frozenset[str]
    parameters: frozenset[str]


def reach_of(
    net: nn.Module, terms: Mapping[str, LossTerm], values: Mapping[str, Tensor], single: Mapping[str, Tensor]
) -> Reach:
    """Of the values of terms, with their graphs.

    Args:
        values: on some samples.
        single: the same on one sample; empty where no piece of the run is so small.
    """
    named = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    learns = {name for name, value in values.items() if value.requires_grad and weighs(terms[name])}
    reached: set[str] = set()
    if learns and named:
        total = torch.stack([values[name] for name in sorted(learns)]).sum()
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
        reached = {name for name, gradient in zip(named, found, strict=True) if gradient is not None}
    still = {
        name for name, value in single.items() if terms[name].loss.over == "batch" and not _moves(value, named.values())
    }
    return Reach(frozenset(learns), frozenset(still & learns), frozenset(reached))


def _moves(value: Tensor, parameters: object) -> bool:
    if not value.requires_grad:
        return False
    found = torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=True)  # type: ignore[call-overload]
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def weighs(term: LossTerm) -> bool:
    """Whether the term has a weight at all; one of weight 0 is only watched."""
    return term.weight.bounds != (0.0, 0.0)


def single_samples(prepared: Prepared) -> bool:
    """Whether pieces of the run's batches are of one sample seen once, with no other process to gather from."""
    config = prepared.config
    size = min(config.batch_size, prepared.count)
    return prepared.ranks.size == 1 and config.views_per_visit == 1 and size < 2 * min(config.accumulate, size)


def outlook(prepared: Prepared, reaches: Sequence[Reach]) -> tuple[str, ...]:
    """What is told before the first step, a line each.

    Raises:
        ConfigError: nothing at all can be learned.
    """
    steps, stages = prepared.steps, prepared.stages
    idle = [_idle(stage, steps, reach) for stage, reach in zip(stages, reaches, strict=True)]
    if all(idle) and not any(map(_is_short, stages, reaches)):
        raise ConfigError(f"nothing can be learned: {idle[0]}", tip="mend it, or evaluate the student as it is")
    told = [_of(stages, number, why) for number, why in enumerate(idle) if why]
    for number, (stage, reach) in enumerate(zip(stages, reaches, strict=True)):
        if not idle[number]:
            told += [_of(stages, number, one) for one in _of_stage(stage, steps, reach)]
    told += _of_average(prepared)
    told += _of_start(prepared.initialised)
    told += _of_zeros(prepared)
    told += _of_parameters(prepared, reaches)
    told += _of_judgement(prepared)
    told += [one.said for one in unused_settings(prepared.config, stages)]
    told += _of_one_member(prepared)
    told += _of_pieces(prepared)
    return tuple(dict.fromkeys(told))


def _of(stages: Sequence[Stage], number: int, text: str) -> str:
    return text if len(stages) == 1 else f"--stage {number + 1}: {text}"


def moments(stage: Stage, steps: int) -> list[Moment]:
    """Of a stage, all of them or LOOKED_AT that are spread over it, the first and the last among them."""
    epochs = stage.config.epochs
    places = np.unique(np.linspace(0, epochs * steps - 1, min(LOOKED_AT, epochs * steps)).astype(np.int64)).tolist()
    return [Moment(place // steps, place % steps, steps, epochs) for place in places]


def _idle(stage: Stage, steps: int, reach: Reach) -> str:
    """Why nothing is learned in a stage; empty where something is."""
    at = moments(stage, steps)
    if not any(stage.factor.at(moment) for moment in at):
        return f"the learning rate is 0 throughout (schedule {stage.config.schedule!r})"
    if not any(term.weight.at(moment) for term in stage.terms for moment in at):
        weights = ", ".join(f"{term.name} {term.weight.text}" for term in stage.terms)
        return f"every weight is 0 throughout ({weights})"
    if reach.terms and reach.terms == reach.single:
        return (
            f"pieces of one sample leave nothing to relate, and the gradient of {', '.join(sorted(reach.terms))} is 0"
        )
    return ""


def _is_short(stage: Stage, reach: Reach) -> bool:
    """Whether more epochs would teach something: a trial of one epoch of a long schedule is no mistake."""
    return any(stage.factor.bounds) and any(map(weighs, stage.terms)) and reach.terms != reach.single


def _of_stage(stage: Stage, steps: int, reach: Reach) -> Iterator[str]:
    config, at = stage.config, moments(stage, steps)
    rates = np.array([stage.factor.at(moment) for moment in at])
    yield from _of_schedule("the learning rate", stage.factor, rates, config.epochs)
    if stage.pruning is not None and stage.pruning.schedule is not None:
        what, shares = stage.pruning.schedule
        yield from _of_schedule(what, shares, np.array([shares.at(moment) for moment in at]), config.epochs)
    moved = config.lr * float(rates.mean()) * config.epochs * steps
    if moved < MOVED:
        yield (
            f"{config.epochs * steps:,} steps at a learning rate of at most {config.lr * rates.max():.3g} are {moved:.2g} "
            "in all: the weights stay about where they are"
        )
    for name, term in named_terms(stage.terms):
        if not weighs(term):
            continue
        weights = np.array([term.weight.at(moment) for moment in at])
        yield from _of_schedule(f"the weight of {name}", term.weight, weights, config.epochs)
        if name not in reach.terms:
            yield f"loss {name!r}: no parameter that learns has a part in it, so its gradient is 0"
        if name in reach.single:
            yield f"loss {name!r} relates samples to one another: pieces of one sample leave it a gradient of 0"
        if term.temperature is not None:
            yield from _of_temperature(name, term.temperature)


def _of_schedule(what: str, schedule: Schedule, values: np.ndarray, epochs: int) -> Iterator[str]:
    """A schedule that is mostly 0 in this stage, or that never comes near its peak."""
    highest, peak = float(np.abs(values).max()), max(map(abs, schedule.bounds))
    none = float((values == 0).mean())
    if none > 0.5:
        yield f"{what} is 0 in {none:.0%} of the steps of {epochs} epochs ({schedule.text})"
    elif highest < PEAK * peak:
        yield f"{what} comes to {highest / peak:.0%} of its peak in {epochs} epochs ({schedule.text})"


def _of_temperature(name: str, temperature: Schedule) -> Iterator[str]:
    lowest, highest = temperature.bounds
    if highest > SOFTEST:
        yield (
            f"loss {name!r}: at temperature {highest:g} two classes whose logits differ by 10 get probabilities that differ "
            f"by {math.expm1(10 / highest):.2%}: in float32 little of the teacher is left"
        )
    if lowest < HARDEST:
        yield (
            f"loss {name!r}: at temperature {lowest:g} logits that differ by 1 give probabilities that differ by a factor of "
            f"{math.exp(min(700.0, 1 / lowest)):.0e}: soft targets are hard labels, and T**2 is {lowest**2:.0e}"
        )


def _of_average(prepared: Prepared) -> Iterator[str]:
    """A moving average that is still about the network of the first step at the end."""
    decay, steps = prepared.config.ema, prepared.steps * sum(stage.config.epochs for stage in prepared.stages)
    if decay is None or steps < 2 or decay ** (steps - 1) <= LEFT_OF_START:
        return
    better = math.floor(100 * 0.01 ** (1 / (steps - 1))) / 100  # of which 1 % would be left
    yield (
        f"--ema {decay:g} over {steps:,} steps: {decay ** (steps - 1):.0%} of the average is still the network of the first "
        f"step" + (f"; --ema {better:g} would leave 1 %" if 0 < better < decay else "")
    )


def _of_start(initialised: Initialised | None) -> Iterator[str]:
    if initialised is not None and initialised.taken < TAKEN * initialised.numbers:
        share = initialised.taken / initialised.numbers
        yield (
            f"--init-from {initialised.source} gives {initialised.taken:,} of the student's {initialised.numbers:,} numbers "
            f"({share:.1%}); the others begin at random"
        )


def _of_zeros(prepared: Prepared) -> Iterator[str]:
    """Weights that were pruned one by one, and that may learn again."""
    weights = prunable(prepared.model.net)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    count = sum(weight.numel() for weight in weights.values())
    first = prepared.stages[0].pruning
    if first is not None and first.schedule is None:
        empty = [name for name, weight in weights.items() if not weight.any()]
        if empty:
            yield f"--prune held: {first_offenders(empty, len(empty))} begins as zeros throughout, and is not held"
        return
    taken = 0.0 if first is None or first.amount is None else first.amount.at(Moment())  # it takes zeros first
    if zeros > MANY_ZEROS * count and taken < zeros / count - ROUNDED:
        yield (
            f"{zeros / count:.0%} of the student's weights are zero, as after prune:unstructured, and nothing holds them there: "
            "training changes them too; --prune held leaves them zero"
        )


def _of_parameters(prepared: Prepared, reaches: Sequence[Reach]) -> Iterator[str]:
    """Numbers of the student that no stage trains although none of them is frozen throughout, and a student that never learns."""
    named = dict(prepared.model.net.named_parameters())
    reached = frozenset[str]().union(*(reach.parameters for reach in reaches))
    asked = {pattern for stage in prepared.stages for pattern in stage.config.freeze}
    left = [name for name in named if name not in reached and name not in prepared.fixed]
    total = sum(parameter.numel() for parameter in named.values())
    if not reached:
        yield f"no stage trains the student: none of its {total:,} numbers gets a gradient"
    elif left and not asked:
        count = sum(named[name].numel() for name in left)
        yield f"{count:,} of the student's {total:,} numbers get no gradient from any loss: {first_offenders(left, len(left))}"


def _of_judgement(prepared: Prepared) -> Iterator[str]:
    """Settings that go by evaluations, and evaluations that can count nothing."""
    config, data = prepared.config, prepared.material.eval_set
    if data is None or data.labelled:
        return
    if config.keep == "best":
        yield f"{data.name} has no labels, so that no epoch is better than another: --keep best keeps the last"
    if any(stage.config.patience is not None for stage in prepared.stages):
        yield f"{data.name} has no labels, so that no epoch is better than another: --patience ends no stage"


def _of_one_member(prepared: Prepared) -> Iterator[str]:
    """A rule that combines one member, which is itself under each of them but `vote`."""
    teacher, combine = prepared.material.teacher, prepared.config.combine
    if teacher is not None and len(teacher.members) == 1 and combine not in ("mean_logits", "vote"):
        yield f"--combine {combine} does nothing: {teacher.members[0]} is the only member"


def _of_pieces(prepared: Prepared) -> Iterator[str]:
    asked, size = prepared.config.accumulate, min(prepared.config.batch_size, prepared.count)
    if asked > size:
        yield f"--accumulate {asked}: batches have {size} samples, and so many pieces at most"

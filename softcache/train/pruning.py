"""`--prune`: which weights become zero while a student learns, and when. How they stay zero: `softcache.models.masks`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from softcache.errors import ConfigError, nearest
from softcache.losses.schedules import STEPS, Moment, Place, Schedule
from softcache.models.masks import Masks, refuse_unknown
from softcache.models.shrunk import is_below
from softcache.spec import call_factory, split_lists

HELD = "held"
EACH_STEP = Place(1, in_steps=True)
WORDS = {"step": f"1{STEPS}", "epoch": "1"}  # how often
USAGE = "unstructured:amount=linear(0, 0.8, until=15), or held"


@dataclass(frozen=True)
class Pruning:
    """What a stage does to the weights of its student, before its steps.

    Attributes:
        text: as the user wrote it, with the place where.
        amount: the share of the weights that are zero; None where they go by a rate, or are only held.
        rate: the share of those left that goes each time.
        scope: "global": the smallest of all together; "layer": that share of each one.
        keep: names of modules whose weights stay.
        every: how often it looks.
    """

    text: str
    amount: Schedule | None = None
    rate: Schedule | None = None
    scope: str = "global"
    keep: tuple[str, ...] = ()
    every: Place = EACH_STEP

    @classmethod
    def parse(cls, text: str, where: str) -> Pruning:
        """`unstructured:amount=SCHEDULE,scope=...,keep=...,every=...`, or `held`; `where` begins a message.

        Raises:
            ConfigError: something else, a share out of range, or an amount that falls.
        """
        name, _, rest = text.partition(":")
        said = f"{where} {text}"
        if name.strip() == HELD:
            if rest:
                raise ConfigError(f"{said}: held takes no settings", tip=f"write {where} held")
            return cls(said)
        if name.strip() != "unstructured":
            way = "while it learns a student loses weights, not channels: softcache shrink --by prune:structured does that"
            raise ConfigError(
                f"{said}: there is no way {name!r} to prune while training",
                tip=way if name.strip() == "structured" else nearest(name, ("unstructured", HELD)),
            )
        settings = split_lists(rest, said, f"{where} '{USAGE.split(', or')[0]}'")
        return _unstructured(call_factory(_Told, settings, said), said)

    @property
    def schedule(self) -> tuple[str, Schedule] | None:
        """What changes over the stage, with its name in words; None where it only holds."""
        for name, schedule in (("amount", self.amount), ("rate", self.rate)):
            if schedule is not None:
                return f"the {name} of --prune", schedule
        return None

    def before(self, masks: Masks, moment: Moment) -> None:
        """What is due before a step: more weights are held."""
        if self.schedule is None:
            if moment.epoch == moment.step == 0:  # of the stage; later a weight may be zero by accident
                masks.hold_zeros(self.names(masks))
            return
        every = max(1, round(self.every.epochs(moment.steps) * moment.steps))
        if (moment.epoch * moment.steps + moment.step) % every:
            return
        for names in self._together(masks):
            masks.prune(names, self._wanted(*masks.count(names), self.schedule[1].at(moment)))

    def _wanted(self, count: int, zeros: int, share: float) -> int:
        return round(share * count) if self.rate is None else zeros + round(share * (count - zeros))

    def names(self, masks: Masks) -> list[str]:
        """The weights that it chooses from: those that learn and are not to be kept."""
        return [n for n, weight in masks.weights.items() if weight.requires_grad and not is_below(n, self.keep)]

    def _together(self, masks: Masks) -> Iterator[list[str]]:
        names = self.names(masks)
        yield from [names] if self.scope == "global" else [[name] for name in names]

    def check(self, masks: Masks, net: nn.Module, before: Sequence[Pruning | None]) -> None:
        """Refuse what holds nothing, before anything is learned; which parameters learn must be known.

        Args:
            before: what the stages before do.

        Raises:
            ConfigError: a module to keep that is not there, nothing to choose from or to hold, or less than one weight.
        """
        refuse_unknown(self.keep, net, self.text)
        names = self.names(masks)
        if not names:
            raise ConfigError(
                f"{self.text}: no convolution and no linear layer of the student is left to choose weights of",
                tip="keep and freeze fewer of them",
            )
        if self.schedule is None:
            self._check_zeros([masks.weights[name] for name in names], before)
            return
        most = self.schedule[1].bounds[1]
        if not any(self._wanted(*masks.count(group), most) for group in self._together(masks)):
            largest = max(masks.count(group)[0] for group in self._together(masks))
            raise ConfigError(
                f"{self.text}: at most {most:g} of {largest:,} weights is less than one, so that none would ever go",
                tip="more at a time, and less often: every=epoch",
            )

    def _check_zeros(self, weights: Sequence[Tensor], before: Sequence[Pruning | None]) -> None:
        if any(before):
            return
        if before:
            raise ConfigError(
                f"{self.text}: nothing holds a zero in the stages before, and training changes it",
                tip="hold them from the first stage on: --prune held, beside --stage",
            )
        if not any(0 < int((weight == 0).sum()) < weight.numel() for weight in weights):
            raise ConfigError(
                f"{self.text}: no weight of the student is zero, so that there is nothing to hold",
                tip="--prune 'unstructured:amount=0.5' sets some to zero; so does softcache shrink --by prune:unstructured",
            )


@dataclass(frozen=True)
class _Told:
    """The settings of `unstructured`, as they are written."""

    amount: str | None = None
    rate: str | None = None
    scope: Literal["global", "layer"] = "global"
    keep: tuple[str, ...] = ()
    every: str = "step"


def _unstructured(told: _Told, said: str) -> Pruning:
    if (told.amount is None) == (told.rate is None):
        raise ConfigError(
            f"{said}: wants either an amount or a rate",
            tip="amount='linear(0, 0.8, until=15)' is the share of all weights that are zero, rate=0.01 that of those left "
            "which goes each time",
        )
    share = Schedule.parse(told.amount if told.rate is None else told.rate, said)
    lowest, highest = share.bounds
    if lowest < 0 or not 0 < highest < 1:
        found = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        raise ConfigError(
            f"{said}: {found} is no share of weights: at least 0, less than 1, and not 0 throughout",
            tip="0.5 takes half of the weights, 0.95 leaves one of twenty",
        )
    if told.amount is not None and share.falls:
        raise ConfigError(
            f"{said}: {share.text} falls, and what was set to zero stays so",
            tip="write an amount that rises: linear(0, 0.8), step(0.2, at=5/10, gamma=2)",
        )
    often = WORDS.get(told.every, told.every)
    if not re.fullmatch(r"(\d*[1-9]\d*|\d+\.\d*[1-9]\d*)(steps)?", often):
        raise ConfigError(f"{said}: every={told.every} is no time", tip="every=step, every=epoch, every=100steps")
    amount, rate = (share, None) if told.rate is None else (None, share)
    return Pruning(said, amount, rate, told.scope, told.keep, Place.parse(often, said))

"""The stages of a run: each with its own terms, learning rate and frozen parts, one after the other."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from softcache.config import TrainConfig, coerce, parse_settings
from softcache.config.unused import Part, Unused, unused
from softcache.errors import ConfigError, nearest
from softcache.losses import LossTerm
from softcache.losses.schedules import Moment, Schedule
from softcache.train.pruning import Pruning
from softcache.train.terms import parse_terms

SETTINGS = (
    "epochs", "loss", "lr", "schedule", "optimizer", "momentum", "nesterov", "weight_decay", "freeze", "patience", "prune",
    "quantise",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        config: the run's, with what this stage changes.
        terms: what is learned in it.
        factor: of the learning rate.
        pruning: which weights it sets to zero; None: no others than the stages before.
        own: the settings that it changes.
    """

    config: TrainConfig
    terms: tuple[LossTerm, ...]
    factor: Schedule
    pruning: Pruning | None = None
    own: frozenset[str] = frozenset()

    def describe(self) -> dict[str, Any]:
        """As a run records it."""
        settings = {name: getattr(self.config, name) for name in SETTINGS if name != "loss"}
        return {**settings, "losses": [term.describe() for term in self.terms]}

    def rate(self, moment: Moment) -> float:
        """The learning rate of a step."""
        return self.config.lr * self.factor.at(moment)


def parse_stages(config: TrainConfig) -> list[Stage]:
    """The stages that a run names, or the run as one stage.

    Raises:
        ConfigError: an unknown setting, one that belongs to the whole run, or an impossible value.
        LossError: a term that cannot be.
    """
    hints = typing.get_type_hints(TrainConfig)
    choices = {f.name: f.metadata["choices"] for f in fields(TrainConfig)}
    stages = []
    for number, text in enumerate(config.stage or ("",), start=1):
        where = f"--stage {number}" if config.stage else "--"
        changes: dict[str, Any] = {}
        for key, values in parse_settings(text, where).items():
            if key not in SETTINGS:
                whole = key in hints
                raise ConfigError(
                    f"{where}: {key!r} " + ("belongs to the whole run" if whole else "is no setting of a stage"),
                    tip=f"give --{key.replace('_', '-')} once, beside --stage" if whole else nearest(key, SETTINGS),
                )
            if key != "loss" and len(values) > 1 and typing.get_origin(hints[key]) is not tuple:
                raise ConfigError(f"{where}: {key} is given twice", tip="keep one of them")
            value = tuple(values) if key == "loss" else ",".join(values)
            changes[key] = value if key == "loss" else coerce(value, hints[key], f"{where}: {key}")
            if choices[key] and value not in choices[key]:
                raise ConfigError(f"{where}: {key} cannot be {value!r}", tip=nearest(str(value), choices[key]))
        own = replace(config, stage=(), **changes)
        _check(own, where)
        terms = tuple(parse_terms(own.loss, has_cache=config.cache is not None))
        factor = Schedule.parse(own.schedule, f"{where}: schedule" if config.stage else "--schedule")
        if factor.bounds[0] < 0:
            raise ConfigError(f"{where}: schedule {own.schedule!r} makes the learning rate negative")
        pruning = (
            Pruning.parse(own.prune, f"{where}: prune" if "prune" in changes else "--prune") if own.prune else None
        )
        stages.append(Stage(own, terms, factor, pruning, frozenset(changes)))
    return stages


def _check(config: TrainConfig, where: str) -> None:
    prefix = "--" if where == "--" else f"{where}: "
    if config.epochs < 1:
        raise ConfigError(f"{prefix}epochs {config.epochs}: must be at least 1")
    if not 0 < config.lr < float("inf"):
        raise ConfigError(f"{prefix}lr {config.lr}: must be > 0")
    for name in ("weight_decay", "momentum"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"{prefix}{name.replace('_', '-')} {getattr(config, name)}: must be at least 0")
    if config.quantise not in (None, "int8"):
        raise ConfigError(f"{prefix}quantise {config.quantise}: only int8 can be learned", tip=f"{prefix}quantise int8")
    if config.patience is not None and config.patience < 1:
        raise ConfigError(f"{prefix}patience {config.patience}: must be at least 1")
    if config.optimizer == "sgd" and config.nesterov and not config.momentum:
        raise ConfigError(f"{prefix}nesterov needs a momentum above 0", tip="0.9 is usual; or leave --nesterov out")


def unused_settings(config: TrainConfig, stages: Sequence[Stage]) -> list[Unused]:
    """The settings of a run and of its stages that do nothing."""
    parts = [Part(f"--stage {number}: ", stage.own, stage.config) for number, stage in enumerate(stages, start=1)]
    return unused(config, parts if config.stage else (), SETTINGS)

"""Settings that do nothing: one table of what each needs beside it. They are refused; or said, where no result could differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from softcache.config.options import StorageOptions
from softcache.config.settings import flag_of
from softcache.config.verbs import DumpConfig, ExportConfig, PlanConfig, ShrinkConfig, TrainConfig
from softcache.errors import ConfigError, warn_once

Met = Callable[[Any], bool]


@dataclass(frozen=True)
class Rule:
    """When a setting does something.

    Attributes:
        setting: of the config.
        needs: what it needs beside it, in words.
        met: whether that is there.
        said: with or without it the result is the same, so that it is said and not refused.
    """

    setting: str
    needs: str
    met: Met
    said: bool = False


def _with_cache(config: TrainConfig) -> bool:
    return config.cache is not None


def _with_evaluation(config: TrainConfig) -> bool:
    return bool(config.eval_data)


def _with_sgd(config: TrainConfig) -> bool:
    return config.optimizer == "sgd"


def _compares_views(config: TrainConfig) -> bool:
    return config.cache is not None and not config.augment


def _draws_views(config: TrainConfig) -> bool:
    return bool(config.augment) or (config.cache is None and bool(config.policy))


def _has_views(config: TrainConfig) -> bool:
    return config.cache is not None or bool(config.policy)


_OF_STORAGE = (
    Rule("at_temperature", "--max-kl", lambda c: c.max_kl is not None),
    Rule("feature_dtype", "--features or --for", lambda c: bool(c.features or c.for_)),
    Rule("view_seed", "--policy", lambda c: bool(c.policy), said=True),  # it is part of a plan all the same
    Rule("order_seed", "--order permuted", lambda c: c.order == "permuted", said=True),  # likewise
)
RULES: dict[type[Any], tuple[Rule, ...]] = {
    TrainConfig: (
        *(
            Rule(name, "--cache", _with_cache)
            for name in ("members", "cache_id", "view", "size", "augment", "combine", "labels", "join")
        ),
        *(
            Rule(name, "--cache", _with_cache, said=True)
            for name in ("check_content", "read", "check_blocks", "check_files")
        ),
        Rule("on_drift", "--cache without --augment", _compares_views, said=True),
        Rule("view_seed", "--augment, or --policy without --cache", _draws_views),
        Rule("views_per_visit", "several views, of a --cache or a --policy", _has_views),
        *(Rule(name, "--eval-data", _with_evaluation) for name in ("keep", "eval_every", "patience")),
        *(Rule(name, "--optimizer sgd", _with_sgd) for name in ("momentum", "nesterov")),
        Rule("init_map", "--init-from", lambda c: bool(c.init_from)),
    ),
    PlanConfig: _OF_STORAGE,
    DumpConfig: _OF_STORAGE,
    ShrinkConfig: (
        Rule("cache", "--data", lambda c: c.data is not None),
        Rule("cache", "--by prune:structured,importance=taylor", lambda c: any("taylor" in by for by in c.by)),
        Rule("out", "--by without --scan", lambda c: not c.scan),
        Rule("seed", "--by without --scan, or --cache", lambda c: not c.scan or c.cache is not None),
    ),
    ExportConfig: (Rule("opset", "--to onnx", lambda c: c.to == "onnx"),),
}


@dataclass(frozen=True)
class Part:
    """A part of a run with settings of its own.

    Attributes:
        where: how a message names it.
        own: the settings that it sets.
        config: the run's, with those.
    """

    where: str
    own: frozenset[str]
    config: Any


@dataclass(frozen=True)
class Unused:
    """A setting that does nothing: what is said of it, and whether it is refused."""

    text: str
    refused: bool

    @property
    def said(self) -> str:
        """What is said of one that is not refused."""
        return self.text if "does nothing" in self.text else f"{self.text}, and does nothing here"


def unused(config: Any, parts: Sequence[Part] = (), changeable: Sequence[str] = ()) -> list[Unused]:
    """The settings of a config that are not at their default and do nothing.

    Args:
        parts: of a run in parts; a setting of the run is used where one of them leaves it as it is.
        changeable: the settings that a part may set.
    """
    defaults = {field.name: field.default for field in fields(config)}
    found = []
    for rule in _rules(config):
        if getattr(config, rule.setting) != defaults[rule.setting]:
            left = [part.config for part in parts if rule.setting not in part.own] or ([] if parts else [config])
            if left and not any(map(rule.met, left)):
                found.append(_told(rule, config, ""))
        for part in parts:
            if rule.setting in part.own and getattr(part.config, rule.setting) != defaults[rule.setting]:
                found += [] if rule.met(part.config) else [_told(rule, part.config, part.where)]
    for name in changeable:
        if parts and getattr(config, name) != defaults[name] and all(name in part.own for part in parts):
            found.append(Unused(f"{flag_of(name)} does nothing: every --stage sets its own", refused=False))
    return found


def _rules(config: Any) -> tuple[Rule, ...]:
    return next((rules for kind, rules in RULES.items() if isinstance(config, kind)), ())


def _told(rule: Rule, config: Any, where: str) -> Unused:
    value = getattr(config, rule.setting)
    shown = "" if isinstance(value, bool | tuple) else f" {value}"
    name = f"{where}{rule.setting.replace('_', '-')}" if where else flag_of(rule.setting)
    return Unused(f"{name}{shown} needs {rule.needs}", refused=not rule.said)


def refuse_unused(found: Sequence[Unused]) -> None:
    """Raise ConfigError for the first that is refused."""
    for one in found:
        if one.refused:
            raise ConfigError(one.text, tip="add that, or leave it out: it would do nothing")


def check_used(config: StorageOptions | ExportConfig | ShrinkConfig) -> None:
    """Refuse what a config sets in vain, or say it where no result could differ."""
    found = unused(config)
    refuse_unused(found)
    for one in found:
        warn_once(one.said)

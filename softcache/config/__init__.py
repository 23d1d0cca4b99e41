"""Settings: frozen dataclasses <-> TOML files and flags. Unknown keys are refused; where each value came from is kept.

`verbs` has each verb's own, `options` what several share; `settings` is how one is declared and gathered; `unused` says which do
nothing beside the others.
"""

from softcache.config.lines import parse_part, parse_settings
from softcache.config.options import DataOptions, MachineOptions, StorageOptions
from softcache.config.settings import Resolved, Settings, coerce, flag_of, option, resolve
from softcache.config.toml import parse_toml, read_toml, to_toml
from softcache.config.verbs import DumpConfig, EvalConfig, ExportConfig, PlanConfig, ShrinkConfig, TrainConfig

__all__ = [
    "DataOptions",
    "DumpConfig",
    "EvalConfig",
    "ExportConfig",
    "MachineOptions",
    "PlanConfig",
    "Resolved",
    "Settings",
    "ShrinkConfig",
    "StorageOptions",
    "TrainConfig",
    "coerce",
    "flag_of",
    "option",
    "parse_part",
    "parse_settings",
    "parse_toml",
    "read_toml",
    "resolve",
    "to_toml",
]

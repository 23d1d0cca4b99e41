"""Configs that are made in Python check and convert their own fields, as the command line's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.config import (
    DumpConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    Settings,
    ShrinkConfig,
    StorageOptions,
    TrainConfig,
    resolve,
)
from softcache.errors import ConfigError

NEEDED: dict[type[Any], dict[str, Any]] = {
    TrainConfig: {"data": "digits", "student": "softcache:mlp", "out": "runs/a"},
    DumpConfig: {"data": "digits", "teacher": "runs/t", "out": "caches/a"},
    PlanConfig: {"data": "digits", "teacher": "runs/t"},
    EvalConfig: {"data": "digits"},
    ExportConfig: {"to": "onnx"},
    ShrinkConfig: {"model": "runs/a", "by": ("carve:depth=0.5",), "out": "runs/b"},
}


def made(kind: type[Any], **settings: Any) -> Any:
    return kind(**NEEDED[kind] | settings)


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        (TrainConfig, {"out": Path("runs/a")}, "runs/a"),
        (TrainConfig, {"eval_data": Path("d.tsv")}, "d.tsv"),
        (TrainConfig, {"epochs": "2"}, 2),
        (TrainConfig, {"epochs": np.int64(2)}, 2),
        (TrainConfig, {"lr": "1e-3"}, 1e-3),
        (TrainConfig, {"lr": 1}, 1.0),
        (TrainConfig, {"lr": np.float64(0.1)}, 0.1),
        (TrainConfig, {"loss": "kd"}, ("kd",)),
        (TrainConfig, {"loss": "kd:temperature=4,weight=0.9"}, ("kd:temperature=4,weight=0.9",)),
        (TrainConfig, {"loss": ["kd", "ce:weight=0.1"]}, ("kd", "ce:weight=0.1")),
        (TrainConfig, {"loss": [{"name": "kd", "temperature": 4}]}, ("kd:temperature=4",)),
        (TrainConfig, {"stage": [{"epochs": 2, "loss": ["kd", "ce"]}]}, ("epochs=2 loss=kd loss=ce",)),
        (
            TrainConfig,
            {"stage": "epochs=2 loss=kd:weight=1,temperature=2"},
            ("epochs=2 loss=kd:weight=1,temperature=2",),
        ),
        (TrainConfig, {"keep_labels": [7, "cat"]}, ("7", "cat")),
        (TrainConfig, {"keep_labels": 7}, ("7",)),
        (TrainConfig, {"keep_labels": range(3)}, ("0", "1", "2")),
        (TrainConfig, {"classes": (name for name in ("a", "b"))}, ("a", "b")),
        (TrainConfig, {"nesterov": "true"}, True),
        (TrainConfig, {"schedule": 0.5}, "0.5"),
        (TrainConfig, {"ema": None}, None),
        (TrainConfig, {"view": "0"}, 0),
        (TrainConfig, {"check_content": "none"}, "none"),
        (DumpConfig, {"teacher": "runs/t"}, ("runs/t",)),
        (
            DumpConfig,
            {"teacher": [Path("runs/t"), "softcache:mlp?hidden=8,8@w.pt"]},
            ("runs/t", "softcache:mlp?hidden=8,8@w.pt"),
        ),
        (DumpConfig, {"codec": "none"}, "none"),  # text stays text: that it is no codec is told where it is read
        (DumpConfig, {"max_kl": "1e-3"}, 1e-3),
        (EvalConfig, {"bias": "3=3.5"}, ("3=3.5",)),
        (ExportConfig, {"out": Path("a.onnx")}, "a.onnx"),
        (ShrinkConfig, {"model": Path("runs/t")}, "runs/t"),
        (ShrinkConfig, {"by": "prune:structured,amount=0.3"}, ("prune:structured,amount=0.3",)),
    ],
)
def test_values_become_of_their_own_type(kind: type[Any], given: dict[str, Any], wanted: Any) -> None:
    ((name, value),) = given.items()
    config = made(kind, **given)
    assert (getattr(config, name), type(getattr(config, name))) == (wanted, type(wanted))
    if isinstance(value, str) and name not in ("codec",):
        assert config == resolve(kind, flags=NEEDED[kind] | given).config


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TrainConfig, {"epochs": "two"}, "TrainConfig: epochs: 'two' is not a whole number"),
        (TrainConfig, {"epochs": 2.5}, "TrainConfig: epochs: '2.5' is not a whole number"),
        (TrainConfig, {"epochs": None}, "TrainConfig: epochs: 'None' is not a whole number"),
        (TrainConfig, {"epochs": [1, 2]}, r"TrainConfig: epochs: \[1, 2\] is a list, not one value"),
        (TrainConfig, {"lr": "fast"}, "TrainConfig: lr: 'fast' is not a number"),
        (TrainConfig, {"student": object()}, "TrainConfig: student: .* is no text"),
        (TrainConfig, {"out": b"runs"}, "TrainConfig: out: b'runs' is no text"),
        (TrainConfig, {"loss": {"name": "kd"}}, "TrainConfig: loss: is a table"),
        (TrainConfig, {"loss": [{"weight": 1}]}, "TrainConfig: loss: a table needs a name"),
        (TrainConfig, {"optimizer": "lion"}, "TrainConfig: optimizer cannot be 'lion'"),
        (TrainConfig, {"nesterov": "perhaps"}, "'perhaps' is not true or false"),
        (TrainConfig, {"student": ""}, "TrainConfig: student is missing"),
        (TrainConfig, {"data": None}, "TrainConfig: data is missing"),
        (DumpConfig, {"teacher": None}, "DumpConfig: teacher is missing"),
        (DumpConfig, {"feature_dtype": "int4"}, r"DumpConfig: feature_dtype cannot be 'int4'\n.*did you mean 'int8'"),
        (ExportConfig, {"to": "onx"}, r"ExportConfig: to cannot be 'onx'\n.*did you mean 'onnx'"),
    ],
)
def test_what_is_no_value_is_refused_with_its_place(kind: type[Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(kind, **given)


def test_every_config_of_the_verbs_that_work_in_python_checks_itself() -> None:
    kinds: Sequence[type[Any]] = (*NEEDED, StorageOptions)
    for kind in kinds:
        assert issubclass(kind, Settings)
    for kind in NEEDED:
        for field in fields(kind):
            if field.name not in NEEDED[kind]:
                assert getattr(made(kind), field.name) == field.default

"""Settings that do nothing beside the others: each row of the table is refused or said, and no setting is left out unseen."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from softcache.config import (
    DataOptions,
    DumpConfig,
    ExportConfig,
    MachineOptions,
    PlanConfig,
    ShrinkConfig,
    TrainConfig,
)
from softcache.config.unused import RULES, check_used, unused
from softcache.errors import ConfigError
from softcache.train.refuse import check
from softcache.train.stages import SETTINGS, parse_stages, unused_settings

NEEDED: dict[type[Any], dict[str, Any]] = {
    TrainConfig: {"data": "d", "student": "m", "out": "nowhere"},
    PlanConfig: {"data": "d", "teacher": ("t",)},
    DumpConfig: {"data": "d", "teacher": ("t",), "out": "nowhere"},
    ShrinkConfig: {"model": "m"},
    ExportConfig: {"to": "program"},
}
TAYLOR = "prune:structured,amount=0.5,importance=taylor"
# (config, the setting in vain, what makes it count, said and not refused)
ROWS: list[tuple[type[Any], dict[str, Any], dict[str, Any], bool]] = [
    (TrainConfig, {"members": ("a",)}, {"cache": "c"}, False),
    (TrainConfig, {"cache_id": "1"}, {"cache": "c"}, False),
    (TrainConfig, {"view": 0}, {"cache": "c"}, False),
    (TrainConfig, {"size": 32}, {"cache": "c"}, False),
    (TrainConfig, {"augment": ("shift",)}, {"cache": "c"}, False),
    (TrainConfig, {"combine": "vote"}, {"cache": "c"}, False),
    (TrainConfig, {"labels": "dataset"}, {"cache": "c"}, False),
    (TrainConfig, {"join": "content"}, {"cache": "c"}, False),
    (TrainConfig, {"check_content": "full"}, {"cache": "c"}, True),
    (TrainConfig, {"read": "pread"}, {"cache": "c"}, True),
    (TrainConfig, {"check_blocks": "never"}, {"cache": "c"}, True),
    (TrainConfig, {"check_files": "no"}, {"cache": "c"}, True),
    (TrainConfig, {"on_drift": "warn"}, {"cache": "c"}, True),
    (TrainConfig, {"on_drift": "warn", "augment": ("shift",), "cache": "c"}, {"augment": ()}, True),
    (TrainConfig, {"view_seed": 3}, {"policy": ("shift:pixels=1",)}, False),
    (TrainConfig, {"view_seed": 3, "cache": "c"}, {"augment": ("shift:pixels=1",)}, False),
    (TrainConfig, {"views_per_visit": 2}, {"policy": ("shift:pixels=1",)}, False),
    (TrainConfig, {"keep": "best"}, {"eval_data": "d"}, False),
    (TrainConfig, {"eval_every": 2}, {"eval_data": "d"}, False),
    (TrainConfig, {"patience": 2}, {"eval_data": "d"}, False),
    (TrainConfig, {"momentum": 0.5}, {"optimizer": "sgd"}, False),
    (TrainConfig, {"nesterov": True}, {"optimizer": "sgd"}, False),
    (TrainConfig, {"init_map": ("a=b",)}, {"init_from": "m"}, False),
    *(
        row
        for kind in (PlanConfig, DumpConfig)
        for row in (
            (kind, {"at_temperature": 2.0}, {"max_kl": 0.1}, False),
            (kind, {"feature_dtype": "int8"}, {"for_": ("at",)}, False),
            (kind, {"view_seed": 1}, {"policy": ("shift",)}, True),
            (kind, {"order_seed": 1, "order": "natural"}, {"order": "permuted"}, True),
        )
    ),
    (ShrinkConfig, {"cache": "c", "by": (TAYLOR,)}, {"data": "d"}, False),
    (ShrinkConfig, {"cache": "c", "data": "d"}, {"by": (TAYLOR,)}, False),
    (ShrinkConfig, {"out": "o", "scan": True}, {"scan": False}, False),
    (ShrinkConfig, {"seed": 3, "scan": True}, {"scan": False}, False),
    (ExportConfig, {"opset": 18}, {"to": "onnx"}, False),
]


@pytest.mark.parametrize(
    ("kind", "vain", "cure", "said"), ROWS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_a_setting_that_does_nothing_is_refused_or_said(
    kind: type[Any], vain: dict[str, Any], cure: dict[str, Any], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = kind(**NEEDED[kind] | vain)
    found = [
        one
        for one in unused(config)
        if one.text.startswith(f"--{[*vain][-1 if len(vain) > 1 and 'order' in vain else 0].replace('_', '-')}")
    ]
    assert [one.refused for one in found] == [not said]
    assert not [one for one in unused(replace(config, **cure)) if one.text == found[0].text]
    assert unused(kind(**NEEDED[kind])) == []
    if said:
        check_used(config)
        assert f"{found[0].text}, and does nothing here" in capsys.readouterr().err
    else:
        with pytest.raises(ConfigError, match=r"needs .*[\s\S]*it would do nothing"):
            check_used(config)


def test_every_rule_has_a_row() -> None:
    for kind, rules in RULES.items():
        names = {name for row_kind, vain, _, _ in ROWS if row_kind is kind for name in vain}
        assert {rule.setting for rule in rules} <= names
        assert {rule.setting for rule in rules} <= {field.name for field in fields(kind)}


STAGES = ("epochs=1 optimizer=sgd momentum=0.5", "epochs=1 optimizer=adamw")


@pytest.mark.parametrize(
    ("settings", "text", "refused"),
    [
        ({"momentum": 0.5, "stage": ("epochs=1 optimizer=sgd", "epochs=1")}, None, False),
        (
            {"momentum": 0.5, "stage": ("epochs=1 optimizer=sgd momentum=0.9", "epochs=1")},
            "--momentum 0.5 needs --optimizer sgd",
            True,
        ),
        ({"stage": ("epochs=1 momentum=0.5", "epochs=1")}, "--stage 1: momentum 0.5 needs --optimizer sgd", True),
        ({"stage": STAGES}, None, False),
        ({"stage": ("epochs=1 patience=2",)}, "--stage 1: patience 2 needs --eval-data", True),
        ({"epochs": 7, "stage": STAGES}, "--epochs does nothing: every --stage sets its own", False),
        ({"loss": ("ce",), "stage": ("loss=ce", "loss=ce")}, "--loss does nothing: every --stage sets its own", False),
        ({"epochs": 7, "stage": ("epochs=1", "lr=0.1")}, None, False),
    ],
)
def test_stages_use_what_one_of_them_leaves_as_it_is(settings: dict[str, Any], text: str | None, refused: bool) -> None:
    config = TrainConfig(**NEEDED[TrainConfig] | settings)
    found = [(one.text, one.refused) for one in unused_settings(config, parse_stages(config))]
    assert found == ([] if text is None else [(text, refused)])


def test_what_an_older_version_began_may_go_on_with_it(tmp_path: Path) -> None:
    config = TrainConfig(data="d", student="m", out=str(tmp_path), momentum=0.5)
    with pytest.raises(ConfigError, match=r"--momentum 0\.5 needs --optimizer sgd"):
        check(config)
    (tmp_path / "run.json").touch()
    check(config)


# Settings that always do something, or whose use shows only when data, model or cache are open. A new setting belongs into a
# list: here, or into the table of rules.
DATA_AND_MACHINE = {field.name for base in (DataOptions, MachineOptions) for field in fields(base)}
USED: dict[type[Any], set[str]] = {
    TrainConfig: {
        *(name for name in SETTINGS if name not in ("momentum", "nesterov", "patience")),
        *DATA_AND_MACHINE,
        *("student", "out", "init_from", "classes", "classes_map", "eval_data", "cache", "allow_code", "policy"),
        *(
            "batch_size",
            "stage",
            "clip_norm",
            "accumulate",
            "ema",
            "channels_last",
            "compile",
            "sync_bn",
            "tensorboard",
        ),
        *("seed", "checkpoint_every", "more_epochs"),
    },
    DumpConfig: {
        *DATA_AND_MACHINE,
        *(
            "teacher",
            "classes_map",
            "codec",
            "max_kl",
            "max_relative_error",
            "whiten",
            "features",
            "for_",
            "policy",
            "views",
            "batch_size",
            "batch_tokens",
            "order",
        ),
        *(
            "format",
            "shard_rows",
            "no_keys",
            "allow_code",
            "out",
            "license",
            "extend",
            "part",
            "list_modules",
            "misfits",
            "first_view",
        ),
    },
    ExportConfig: {
        *("to", "out", "data", "classes_map", "policy", "download", "allow_code", "batch_size", "device", "threads"),
        "workers",
    },
    ShrinkConfig: {
        *(
            "model",
            "by",
            "data",
            "eval_data",
            "classes_map",
            "policy",
            "download",
            "allow_code",
            "batch_size",
            "device",
        ),
        *("threads", "scan"),
    },
}


@pytest.mark.parametrize("kind", USED, ids=lambda kind: kind.__name__)
def test_every_setting_was_looked_at(kind: type[Any]) -> None:
    ruled = {rule.setting for rule in RULES[kind]}
    assert not ruled & USED[kind]
    assert {field.name for field in fields(kind)} <= ruled | USED[kind]
    assert all(field.default is not MISSING for field in fields(kind))

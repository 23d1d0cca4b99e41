"""Taggers made smaller: samples without words are passed over, and what cannot be done is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softcache.config import DumpConfig, ShrinkConfig
from softcache.dump import flow
from softcache.errors import ConfigError
from softcache.models import load_model, save_student
from softcache.students import scan, shrink
from softcache.students.importance import importances
from softcache.students.opened import open_all
from softcache.students.prune import free_groups

NAMES = ("A", "B")
WORDS = ("one", "two", "three", "four")
KINDS = {
    "tagger": "softcache:tagger?width=8&embedding=8",
    "encoder": "softcache:encoder_tagger?width=16&heads=2&hidden=32&layers=1",
}


@pytest.fixture(autouse=True)
def _timed_once(timed_once: None) -> None:
    """Every test."""


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Twelve sentences, of which the first and two others have no words."""
    lines = []
    for number in range(12):
        words = list(WORDS[: number % 5])
        tags = [NAMES[place % 2] for place in range(len(words))]
        lines.append(f'{{"words": {words}, "tags": {tags}}}'.replace("'", '"'))
    (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")
    return f"table:{tmp_path / 's.jsonl'}?words=words&tags=tags&classes=A,B"


def saved(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    folder.mkdir()
    model = load_model(KINDS[kind], num_classes=2, class_names=NAMES, vocabulary=WORDS)
    save_student(model, folder / "student.safetensors", metadata={"softcache_policy": "[]"})
    return str(folder)


def config(model: str, *by: str, **settings: Any) -> ShrinkConfig:
    return ShrinkConfig(model, by, **{"device": "cpu", "threads": 1, "batch_size": 4, **settings})


def test_the_example_is_the_first_sample_that_has_words(tmp_path: Path, data: str) -> None:
    model = saved(tmp_path / "m", "encoder")
    asked = config(model, "prune:unstructured,amount=0.5", data=data, eval_data=data, out=str(tmp_path / "out"))
    result = shrink.run(asked, quiet=True)
    assert result.after.multiply_adds > 0 and result.measured_after is not None
    samples = open_all(asked, quiet=True).samples
    assert list(samples.example) == ["one"] and samples.count == 9
    assert all(len(samples.item(i)) for i in range(9))


def test_a_quantised_tagger_is_not_timed_in_onnxruntime_and_that_is_said(tmp_path: Path, data: str) -> None:
    result = shrink.run(
        config(saved(tmp_path / "m", "tagger"), "quantise:int8", data=data, out=str(tmp_path / "out")), quiet=True
    )
    assert result.speed is None and "a tagger is not written as ONNX yet" in result.text()


@pytest.mark.parametrize("cached", [False, True])
def test_taylor_of_words_is_refused(tmp_path: Path, data: str, cached: bool) -> None:
    model, more = saved(tmp_path / "m", "encoder"), {}
    if cached:
        made = DumpConfig(data=data, teacher=(model,), out=str(tmp_path / "c"), threads=1, workers=0)
        flow.run(made, quiet=True)
        more = {"cache": str(tmp_path / "c")}
    by = "prune:structured,amount=0.5,importance=taylor"
    with pytest.raises(ConfigError, match=r"one answer for each sample, .* one for each word\n.*importance=activation"):
        shrink.run(config(model, by, data=data, out=str(tmp_path / "out"), **more), quiet=True)


def test_activation_of_words_is_the_mean_size_over_the_words(tmp_path: Path, data: str) -> None:
    opened = open_all(config(saved(tmp_path / "m", "encoder"), data=data, batch_size=100), quiet=True)
    samples = opened.samples
    net: Any = samples.model.net
    (group,) = [g for g in free_groups(net, samples, (), "it") if ("layers.0.linear2", "in") in g.sides]
    taken: list[torch.Tensor] = []
    hook = net.layers[0].linear2.register_forward_pre_hook(lambda _m, args: taken.append(args[0]))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        samples.model(samples.model.input.collate([samples.item(i) for i in range(samples.count)]))
    torch.backends.mha.set_fastpath_enabled(fast)
    hook.remove()
    (found,) = importances(net, samples, [group], "activation")
    torch.testing.assert_close(found, taken[0].abs().double().mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert isinstance(net.layers[0].linear2, nn.Linear)


def test_a_scan_of_a_tagger(tmp_path: Path, data: str) -> None:
    found = scan.scan(config(saved(tmp_path / "m", "encoder"), scan=True, data=data), quiet=True)
    assert found.layers and found.whole == 1
    found = scan.scan(config(str(tmp_path / "m"), scan=True, eval_data=data), quiet=True)
    assert 0 < found.whole < 1 and found.samples == 21
    assert f"right on {data}, 21 words: " in found.text()

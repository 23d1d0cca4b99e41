"""What `inspect` shows of a cache whose samples have several labels: probabilities of each, not of one among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import WORLDS

from softcache import dump
from softcache import open as open_cache
from softcache.check.inspect import report, soft_target
from softcache.config import DumpConfig
from softcache.errors import ConfigError

LOGITS = np.random.default_rng(0).normal(0, 3, (5, 2, 3)).astype(np.float32)


def dumped(tmp_path: Path, **settings: str) -> Path:
    np.savez(tmp_path / "given.npz", logits=LOGITS, labels=LOGITS[:, 0] > 0)
    pieces, out = WORLDS / "given_logits.py", tmp_path / "cache"
    teachers = tuple(f"{pieces}:pick?index={i}&name=m{i}" for i in (0, 1))
    data = f"{pieces}:given?path={tmp_path / 'given.npz'}"
    dump.run(DumpConfig(data=data, teacher=teachers, out=str(out), threads=1, **settings), quiet=True)
    return out


def test_several_labels_have_a_probability_each(tmp_path: Path) -> None:
    out = dumped(tmp_path, codec="float32")
    found = soft_target(out, "given/3")
    yes = {t: 1 / (1 + np.exp(-LOGITS[3].astype(float) / t)) for t in (1.0, 4.0)}
    for t, wanted in yes.items():
        np.testing.assert_allclose(found.blocks["m0"][t], wanted[0], rtol=1e-5)
        np.testing.assert_allclose(found.blocks["m1"][t], wanted[1], rtol=1e-5)
    np.testing.assert_allclose(found.blocks["ensemble (mean_probs)"][1.0], yes[1.0].mean(axis=0), rtol=1e-5)
    assert found.labels == np.flatnonzero(LOGITS[3, 0] > 0).tolist()
    lines = report(out).splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("member "))
    assert lines[place + 2].split()[-2] == "-"  # the entropy is of a softmax
    targets = open_cache(out).gather(np.array([0]), np.array([0]))
    assert targets.link == "sigmoid"


def test_a_codec_that_keeps_some_classes_is_none_for_several_labels(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="keeps the largest classes and the rest of a softmax; this set has several labels"
    ):
        dumped(tmp_path, codec="topk:k=2")

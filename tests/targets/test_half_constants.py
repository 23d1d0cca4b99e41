"""The final layer of a member of version 2 may be stored in a half type: float16, or bfloat16 as its 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS

import softcache
from softcache import cli, dump
from softcache.check import verify
from softcache.config import DumpConfig
from softcache.dump.layout import Storage

WORLD = WORLDS / "numbers.py"
DATA = f"{WORLD}:images?kind=classes"


def as_stored(weight: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 weight in fewer bits; the bits of bfloat16 rounded to the nearest."""
    if dtype == "<f2":
        return weight.astype("<f2")
    bits = weight.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def strangers_weight(folder: Path, member: str, name: str) -> np.ndarray:
    """float32, by FORMAT alone: the upper 16 bits of a float32, or a float16."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    lists = [json.loads((folder / one["path"]).read_bytes()) for one in manifest["lists"] if one["of"] == "setup"]
    (entry,) = (one for found in lists for one in found if one["path"] == f"members/{member}/constants-00000.h5")
    array = entry["arrays"][name]
    data = (folder / entry["path"]).read_bytes()
    stored = np.frombuffer(data, array["dtype"], int(np.prod(array["shape"])), array["offset"]).reshape(array["shape"])
    return (stored.astype("<u4") << 16).view("<f4") if array["dtype"] == "<u2" else stored.astype("<f4")


@pytest.fixture
def halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """halved(dtype, **settings) -> a dump whose weights lie in that type."""

    def make(dtype: str, **settings: Any) -> softcache.Cache:
        whole = Storage.constants

        def fewer(self: Storage) -> dict[str, np.ndarray]:
            return {n: as_stored(v, dtype) if n.endswith("weight") else v for n, v in whole(self).items()}

        monkeypatch.setattr(Storage, "constants", fewer)
        made = DumpConfig(data=DATA, teacher=(f"{WORLD}:classifier",), out=str(tmp_path / "c"), format="2", threads=1,
                          workers=0, **settings)  # fmt: skip
        dump.run(made, quiet=True)
        monkeypatch.undo()
        return softcache.open(tmp_path / "c", quiet=True)

    return make


@pytest.mark.parametrize("dtype", ["<u2", "<f2"])
def test_a_layer_in_a_half_type_decodes_within_eps_as_a_stranger_does(halved: Any, dtype: str, tmp_path: Path) -> None:
    cache = halved(dtype, codec="linear_head")
    rows, views = np.arange(60), np.zeros(60, np.int64)
    weight, bias = cache.classifier("classifier")
    strange = strangers_weight(tmp_path / "c", "classifier", "codec_weight")
    assert weight.dtype == torch.float32 and np.array_equal(weight.numpy(), strange)
    inputs = cache.stored("classifier", "head_input", rows, views).astype(np.float64)
    wanted = inputs @ strange.astype(np.float64).T + bias.numpy()
    np.testing.assert_allclose(cache.gather(rows, views).logits().numpy(), wanted, atol=1e-5)
    exact = live(cache, rows)
    apart = np.abs(cache.gather(rows, views).logits().double().numpy() - exact).max(axis=1)
    assert (apart <= cache.eps("classifier", rows, views) + 1e-6).all() and apart.max() > 1e-5
    assert verify.run(tmp_path / "c", full=True, quiet=True).faults == []


def live(cache: softcache.Cache, rows: np.ndarray) -> np.ndarray:
    """(n, 3) float64 logits of the teacher itself."""
    from softcache.spec import load_user_file

    world = load_user_file(WORLD)
    net, images = world.classifier(3, (8, 8)).double(), torch.from_numpy(world.images().images).double() / 255
    with torch.no_grad():
        given = net(images).numpy()
    return given[[int(cache.samples.key(int(row))[4:]) for row in rows]]


@pytest.mark.parametrize("dtype", ["<u2", "<f2"])
def test_a_head_beside_features_is_widened_and_goes_into_a_subset_as_it_is(
    halved: Any, dtype: str, tmp_path: Path
) -> None:
    cache = halved(dtype, codec="float16", for_=("hint",))
    weight, _ = cache.classifier("classifier")
    strange = strangers_weight(tmp_path / "c", "classifier", "head_weight")
    assert np.array_equal(weight.numpy(), strange)
    assert cli.main(["subset", str(tmp_path / "c"), str(tmp_path / "less"), "--keep-labels", "cat"]) == 0
    assert np.array_equal(strangers_weight(tmp_path / "less", "classifier", "head_weight"), strange)
    arrays = {name for file in cache.manifest.files_of("constants", "classifier") for name in file.arrays}
    assert "head_weight" in arrays
    shutil.rmtree(tmp_path / "less")
